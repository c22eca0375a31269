"""How lightly's examples and benchmarks build models, written anew, on the real lightly.

Images are (batch, 3, 3, 12): a linear layer per position is the backbone, so that pooled vectors,
tokens and maps all come from the same features.
"""

from __future__ import annotations

import copy
import gc
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from headplug import create_head, find_slots, swap_head, tap
from headplug.errors import DimensionError, SlotError

pytest.importorskip("lightly")

from lightly import loss as losses
from lightly.models.modules import MaskedVisionTransformerTorchvision, heads
from lightly.models.modules.memory_bank import MemoryBankModule
from lightly.models.modules.nn_memory_bank import NNMemoryBankModule
from lightly.models.utils import activate_requires_grad, deactivate_requires_grad, update_momentum

BATCH, C, H, HID, Z = 8, 12, 16, 24, 8
M = 0.9


def copied(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module)
    deactivate_requires_grad(twin)
    return twin


class Model(nn.Module):
    """What the patterns share: a backbone, and the pairs that the loop updates by EMA."""

    slot: ClassVar[str | None] = None  # where the model has several projection heads
    path: ClassVar[str] = "projection_head"
    twin: ClassVar[str | None] = None
    aliases: ClassVar[tuple[str, ...]] = ()
    dependents: ClassVar[tuple[str, ...]] = ()
    pairs: ClassVar[dict[str, str]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(C, H)

    def h(self, x: Tensor, backbone: str = "backbone") -> Tensor:
        pooled: Tensor = getattr(self, backbone)(x).mean((1, 2))
        return pooled

    def z(self, x: Tensor) -> Tensor:
        return self.projection_head(self.h(x))

    @torch.no_grad()
    def z_momentum(self, x: Tensor) -> Tensor:
        return self.projection_head_momentum(self.h(x, "backbone_momentum"))

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        raise NotImplementedError


class SimCLR(Model):
    def __init__(self, z: int) -> None:
        super().__init__()
        self.projection_head = heads.SimCLRProjectionHead(H, HID, z)
        self.criterion = self.make_criterion()

    def make_criterion(self) -> nn.Module:
        return losses.NTXentLoss()

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        return self.criterion(self.z(x0), self.z(x1))


class DCL(SimCLR):
    def make_criterion(self) -> nn.Module:
        return losses.DCLLoss()


class FroSSL(SimCLR):
    def make_criterion(self) -> nn.Module:
        return losses.FroSSLLoss()

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        return self.criterion([self.z(x0), self.z(x1)])


class BarlowTwins(Model):
    def __init__(self, z: int) -> None:
        super().__init__()
        self.projection_head = heads.BarlowTwinsProjectionHead(H, HID, z)
        self.criterion = losses.BarlowTwinsLoss()

    loss = SimCLR.loss


class VICReg(Model):
    def __init__(self, z: int) -> None:
        super().__init__()
        self.projection_head = heads.VICRegProjectionHead(H, HID, z, num_layers=2)
        self.criterion = losses.VICRegLoss()

    loss = SimCLR.loss


class DetCon(Model):
    """The head sees (batch * regions, features)."""

    def __init__(self, z: int) -> None:
        super().__init__()
        self.projection_head = heads.SimCLRProjectionHead(H, HID, z)
        self.criterion = losses.DetConSLoss(gather_distributed=False)

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        views = [
            self.projection_head(self.backbone(x).mean(2).flatten(0, 1)).unflatten(0, (BATCH, 3))
            for x in (x0, x1)
        ]
        masks = torch.arange(3).expand(BATCH, 3)
        return self.criterion(*views, masks, masks)


class LeJEPA(Model):
    def __init__(self, z: int) -> None:
        super().__init__()
        self.projection_head = heads.LeJEPAProjectionHead(H, HID, z)
        self.criterion = losses.LeJEPALoss(sigreg_num_vectors=16)

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        both = torch.stack([self.z(x0), self.z(x1)])
        return self.criterion(local_proj=both, global_proj=both)


class VICRegL(Model):
    """Two heads: one on vectors, one on maps with channels last."""

    def __init__(self, z: int) -> None:
        super().__init__()
        self.projection_head = heads.BarlowTwinsProjectionHead(H, HID, z)
        self.local_projection_head = heads.VicRegLLocalProjectionHead(H, HID, z)
        self.criterion = losses.VICRegLLoss(num_matches=(4, 2))

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        features = [(self.z(x), self.local_projection_head(self.backbone(x))) for x in (x0, x1)]
        grids = [torch.rand(BATCH, 3, 3, 2) for _ in features]
        return self.criterion(global_view_features=features, global_view_grids=grids)


class VICRegLLocal(VICRegL):
    slot = path = "local_projection_head"


class SimSiam(Model):
    dependents = ("prediction_head",)

    def __init__(self, z: int) -> None:
        super().__init__()
        self.projection_head = heads.SimSiamProjectionHead(H, HID, z)
        self.prediction_head = heads.SimSiamPredictionHead(z, 4, z)
        self.criterion = losses.NegativeCosineSimilarity()

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        z0, z1 = self.z(x0), self.z(x1)
        p0, p1 = self.prediction_head(z0), self.prediction_head(z1)
        return 0.5 * (self.criterion(z0.detach(), p1) + self.criterion(z1.detach(), p0))


class NNCLR(Model):
    dependents = ("prediction_head", "memory_bank")

    def __init__(self, z: int) -> None:
        super().__init__()
        self.projection_head = heads.NNCLRProjectionHead(H, HID, z)
        self.prediction_head = heads.NNCLRPredictionHead(z, HID, z)
        self.memory_bank = NNMemoryBankModule((32, z))
        self.criterion = losses.NTXentLoss()

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        z0, z1 = self.z(x0), self.z(x1)
        p0, p1 = self.prediction_head(z0), self.prediction_head(z1)
        z0 = self.memory_bank(z0.detach(), update=False)
        z1 = self.memory_bank(z1.detach(), update=True)
        return 0.5 * (self.criterion(z0, p1) + self.criterion(z1, p0))


class SwAV(Model):
    dependents = ("prototypes",)

    def __init__(self, z: int) -> None:
        super().__init__()
        self.projection_head = heads.SwaVProjectionHead(H, HID, z)
        self.prototypes = heads.SwaVPrototypes(z, 12)
        self.criterion = losses.SwaVLoss()

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        self.prototypes.normalize()
        high = [self.prototypes(F.normalize(self.z(x))) for x in (x0, x1)]
        return self.criterion(high, [])


class SwAVQueue(SwAV):
    dependents = ("prototypes", "queues.0", "queues.1")

    def __init__(self, z: int) -> None:
        super().__init__(z)
        self.prototypes = heads.SwaVPrototypes(z, 12, 1)
        self.queues = nn.ModuleList([MemoryBankModule((32, z)) for _ in range(2)])

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        self.prototypes.normalize()
        z = [F.normalize(self.z(x)) for x in (x0, x1)]
        queued = [q(v.detach(), update=True)[1] for q, v in zip(self.queues, z, strict=True)]
        with torch.no_grad():
            banks = [self.prototypes(b.t(), 1) for b in queued]
        return self.criterion([self.prototypes(v, 1) for v in z], [], banks)


class Momentum(Model):
    twin = "projection_head_momentum"
    pairs: ClassVar[dict[str, str]] = {
        "backbone": "backbone_momentum",
        "projection_head": "projection_head_momentum",
    }

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.projection_head = head
        self.backbone_momentum = copied(self.backbone)
        self.projection_head_momentum = copied(self.projection_head)


class BYOL(Momentum):
    dependents = ("prediction_head",)

    def __init__(self, z: int) -> None:
        super().__init__(heads.BYOLProjectionHead(H, HID, z))
        self.prediction_head = heads.BYOLPredictionHead(z, HID, z)
        self.criterion = losses.NegativeCosineSimilarity()

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        p0, p1 = self.prediction_head(self.z(x0)), self.prediction_head(self.z(x1))
        return self.criterion(p0, self.z_momentum(x1)) + self.criterion(p1, self.z_momentum(x0))


class BYOLBenchmark(BYOL):
    """Teacher under another name, drawn independently."""

    twin = "teacher_projection_head"
    pairs: ClassVar[dict[str, str]] = {
        "backbone": "backbone_momentum",
        "projection_head": "teacher_projection_head",
    }

    def __init__(self, z: int) -> None:
        super().__init__(z)
        del self.projection_head_momentum
        self.teacher_projection_head = heads.BYOLProjectionHead(H, HID, z)
        deactivate_requires_grad(self.teacher_projection_head)

    @torch.no_grad()
    def z_momentum(self, x: Tensor) -> Tensor:
        return self.teacher_projection_head(self.h(x, "backbone_momentum"))


class MoCo(Momentum):
    dependents = ("criterion.memory_bank",)

    def __init__(self, z: int) -> None:
        super().__init__(heads.MoCoProjectionHead(H, HID, z))
        self.criterion = losses.NTXentLoss(memory_bank_size=(32, z))

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        return self.criterion(self.z(x0), self.z_momentum(x1))


class MoCoV3(BYOL):
    """lightly's MoCo head serves as predictor as well; only the name tells."""

    def __init__(self, z: int) -> None:
        super().__init__(z)
        self.prediction_head = heads.MoCoProjectionHead(z, HID, z, 2, True)


class TiCo(Momentum):
    dependents = ("criterion",)

    def __init__(self, z: int) -> None:
        super().__init__(heads.TiCoProjectionHead(H, HID, z))
        self.criterion = losses.TiCoLoss()

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        return self.criterion(self.z(x0), self.z_momentum(x1))


class MMCR(Momentum):
    def __init__(self, z: int) -> None:
        super().__init__(heads.MMCRProjectionHead(H, HID, z))
        self.criterion = losses.MMCRLoss()

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        online = torch.stack([self.z(x0), self.z(x1)], 1)
        return self.criterion(online, torch.stack([self.z_momentum(x) for x in (x0, x1)], 1))


class SMoG(Momentum):
    dependents = ("prediction_head", "prototypes", "memory_bank")

    def __init__(self, z: int) -> None:
        super().__init__(heads.SMoGProjectionHead(H, HID, z))
        self.prediction_head = heads.SMoGPredictionHead(z, HID, z)
        self.prototypes = heads.SMoGPrototypes(F.normalize(torch.rand(6, z)), beta=0.99)
        self.memory_bank = MemoryBankModule((32, z))

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        z0, z1 = self.z(x0), self.z_momentum(x1)
        self.memory_bank(z0.detach(), update=True)
        groups = self.prototypes.get_updated_group_features(z0.detach())
        logits = self.prototypes(self.prediction_head(z0), groups)
        assignments = self.prototypes.assign_groups(z1)
        self.prototypes.set_group_features(groups)
        return F.cross_entropy(logits, assignments)


class DenseCL(Model):
    """Two heads of the same class and shape, one on vectors and one on tokens."""

    slot = path = "projection_head_global"
    twin = "projection_head_global_momentum"
    dependents = ("criterion_global.memory_bank",)
    pairs: ClassVar[dict[str, str]] = {
        "backbone": "backbone_momentum",
        "projection_head_global": "projection_head_global_momentum",
        "projection_head_local": "projection_head_local_momentum",
    }

    def __init__(self, z: int) -> None:
        super().__init__()
        self.projection_head_global = heads.DenseCLProjectionHead(H, HID, z)
        self.projection_head_local = heads.DenseCLProjectionHead(H, HID, z)
        for name, twin in self.pairs.items():
            self.add_module(twin, copied(getattr(self, name)))
        self.criterion_global = losses.NTXentLoss(memory_bank_size=(32, z))
        self.criterion_local = losses.NTXentLoss(memory_bank_size=(32, z))

    def both(self, x: Tensor, ending: str = "") -> tuple[Tensor, Tensor]:
        maps = getattr(self, f"backbone{ending}")(x)
        local = getattr(self, f"projection_head_local{ending}")(maps.flatten(1, 2))
        return getattr(self, f"projection_head_global{ending}")(maps.mean((1, 2))), local

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        g0, l0 = self.both(x0)
        with torch.no_grad():
            g1, l1 = self.both(x1, "_momentum")
        local = self.criterion_local(l0.flatten(0, 1), l1.flatten(0, 1))
        return self.criterion_global(g0, g1) + local


class DenseCLLocal(DenseCL):
    slot = path = "projection_head_local"
    twin = "projection_head_local_momentum"
    dependents = ("criterion_local.memory_bank",)


class DINO(Model):
    """The teacher's head is drawn anew; the loop calls the heads and a method of the student's."""

    path, twin = "student_head", "teacher_head"
    dependents = ("criterion",)
    pairs: ClassVar[dict[str, str]] = {
        "student_backbone": "teacher_backbone",
        "student_head": "teacher_head",
    }

    def __init__(self, z: int) -> None:
        super().__init__()
        self.student_backbone = self.backbone
        self.teacher_backbone = copied(self.backbone)
        self.student_head = heads.DINOProjectionHead(H, HID, 6, z, freeze_last_layer=1)
        self.teacher_head = heads.DINOProjectionHead(H, HID, 6, z)
        deactivate_requires_grad(self.teacher_head)
        self.criterion = losses.DINOLoss(output_dim=z)

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = [self.teacher_head(self.h(x, "teacher_backbone")) for x in (x0, x1)]
        student = [self.student_head(self.h(x, "student_backbone")) for x in (x0, x1)]
        return self.criterion(teacher, student, epoch=0)

    def after_backward(self) -> None:
        self.student_head.cancel_last_layer_gradients(current_epoch=0)


class DINOBenchmark(DINO):
    """`projection_head` is the EMA copy."""

    path, twin = "student_projection_head", "projection_head"
    pairs: ClassVar[dict[str, str]] = {"student_projection_head": "projection_head"}

    def __init__(self, z: int) -> None:
        super().__init__(z)
        self.student_projection_head, self.projection_head = self.student_head, self.teacher_head
        del self.student_head, self.teacher_head

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = [self.projection_head(self.h(x, "teacher_backbone")) for x in (x0, x1)]
        student = [self.student_projection_head(self.h(x)) for x in (x0, x1)]
        return self.criterion(teacher, student)

    def after_backward(self) -> None:
        self.student_projection_head.cancel_last_layer_gradients(0)


class IBOT(DINO):
    """One head under three names, called through `forward`."""

    aliases = ("student_cls_head", "student_patch_head")
    dependents = ("criterion", "patch_criterion.center")

    def __init__(self, z: int) -> None:
        super().__init__(z)
        self.student_cls_head = self.student_patch_head = self.student_head
        self.teacher_cls_head = self.teacher_patch_head = self.teacher_head
        self.patch_criterion = losses.IBOTPatchLoss(output_dim=z)

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        mask = torch.zeros(BATCH, 3, 3, dtype=torch.bool)
        mask[:, 1] = True
        with torch.no_grad():
            teacher = [
                self.teacher_cls_head.forward(self.h(x, "teacher_backbone")) for x in (x0, x1)
            ]
            targets = self.teacher_patch_head.forward(self.teacher_backbone(x0)[mask])
        student = [self.student_cls_head.forward(self.h(x, "student_backbone")) for x in (x0, x1)]
        masked = self.student_patch_head.forward(self.student_backbone(x0)[mask])
        return self.criterion(teacher, student) + self.patch_criterion(targets, masked, mask)


class TwoHeads(nn.Module):
    def __init__(self, dino_head: nn.Module, ibot_head: nn.Module) -> None:
        super().__init__()
        self.dino_head, self.ibot_head = dino_head, ibot_head


class DINOv2(IBOT):
    """The shared head lies in a module of the user's."""

    path, twin = "student_head.dino_head", "teacher_head.dino_head"
    aliases = ("student_head.ibot_head",)

    def __init__(self, z: int) -> None:
        super().__init__(z)
        del self.student_cls_head, self.student_patch_head
        del self.teacher_cls_head, self.teacher_patch_head
        student = heads.DINOv2ProjectionHead(H, HID, 6, z)
        teacher = heads.DINOv2ProjectionHead(H, HID, 6, z)
        deactivate_requires_grad(teacher)
        self.student_head = TwoHeads(student, student)
        self.teacher_head = TwoHeads(teacher, teacher)

    student_cls_head = property(lambda self: self.student_head.dino_head)
    student_patch_head = property(lambda self: self.student_head.ibot_head)
    teacher_cls_head = property(lambda self: self.teacher_head.dino_head)
    teacher_patch_head = property(lambda self: self.teacher_head.ibot_head)

    def after_backward(self) -> None:
        pass


class MSN(Model):
    """Inverted names: `projection_head` is the copy, prototypes are a bare parameter."""

    path, twin = "anchor_projection_head", "projection_head"
    dependents = ("prototypes",)
    pairs: ClassVar[dict[str, str]] = {
        "anchor_backbone": "backbone",
        "anchor_projection_head": "projection_head",
    }

    def __init__(self, z: int) -> None:
        super().__init__()
        self.projection_head = heads.MSNProjectionHead(H, HID, z)
        self.anchor_backbone = copy.deepcopy(self.backbone)
        self.anchor_projection_head = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone)
        deactivate_requires_grad(self.projection_head)
        self.prototypes = nn.Parameter(torch.randn(10, z))
        self.criterion = self.make_criterion()

    def make_criterion(self) -> nn.Module:
        return losses.MSNLoss()

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        with torch.no_grad():
            targets = self.projection_head(self.h(x0))
        anchors = self.anchor_projection_head(self.h(x1, "anchor_backbone"))
        return self.criterion(anchors, targets, self.prototypes)


class PMSN(MSN):
    def make_criterion(self) -> nn.Module:
        return losses.PMSNLoss()


class CAPI(Model):
    """A student's and a teacher's head that are both trained and no copies of each other."""

    slot = path = "student_head"
    dependents = ("teacher_head",)

    def __init__(self, z: int) -> None:
        super().__init__()
        self.student_head = heads.CAPIProjectionHead(H, z, weight_norm=True)
        self.teacher_head = heads.CAPIProjectionHead(H, z)
        self.criterion = losses.CAPILoss()

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        teacher = self.teacher_head(self.backbone(x0).flatten(1, 2).detach())
        student = self.student_head(self.backbone(x1).flatten(1, 2))
        return self.criterion(teacher, student) + self.criterion(teacher, teacher)


class CAPITeacher(CAPI):
    slot = path = "teacher_head"
    dependents = ("student_head",)


PATTERNS: list[type[Model]] = [
    SimCLR, DCL, FroSSL, BarlowTwins, VICReg, DetCon, LeJEPA, VICRegL, VICRegLLocal, SimSiam, NNCLR,
    SwAV, SwAVQueue, BYOL, BYOLBenchmark, MoCo, MoCoV3, TiCo, MMCR, SMoG, DenseCL, DenseCLLocal,
    DINO, DINOBenchmark, IBOT, DINOv2, MSN, PMSN, CAPI, CAPITeacher,
]  # fmt: skip
each_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.__name__)


def build(pattern: type[Model], z: int = Z) -> Model:
    torch.manual_seed(0)
    return pattern(z)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    modules = dict(model.named_modules(remove_duplicate=False))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    buffers = {k: id(v) for k, v in model.named_buffers()}
    flags = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    yield
    now = dict(model.named_modules(remove_duplicate=False))
    assert list(now) == list(modules)
    assert all(now[p] is m for p, m in modules.items())
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[k], v) for k, v in state.items())
    assert {k: id(v) for k, v in model.named_buffers()} == buffers
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), random)


def weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(6, H, generator=generator) / 4, torch.randn(6, generator=generator)


def train(model: Model, head: nn.Module, twin: nn.Module | None, steps: int = 2) -> None:
    """Trains as lightly's examples do and checks what moved, and how."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = {n: p.detach().clone() for n, p in head.named_parameters()}
    fixed = {n: b.clone() for n, b in head.named_buffers() if "embedding" in n or "weights" in n}
    for step in range(steps):
        before = None if twin is None else [p.clone() for p in twin.parameters()]
        for online, momentum in model.pairs.items():
            update_momentum(model.get_submodule(online), model.get_submodule(momentum), m=M)
        if twin is not None and before is not None:
            for was, now, source in zip(before, twin.parameters(), head.parameters(), strict=True):
                assert torch.equal(now, (was * M).add(source, alpha=1 - M))
        generator = torch.Generator().manual_seed(step)
        views = torch.randn(2, BATCH, 3, 3, C, generator=generator)
        loss = model.loss(*views)
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        getattr(model, "after_backward", lambda: None)()
        optimizer.step()
    for name, parameter in head.named_parameters():
        if name.startswith("last_layer"):  # DINO's loop cancels its gradients in the first epoch
            continue
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
            # a bias in front of a norm, or one that views share, may have a gradient of zero
            assert parameter.ndim < 2 or not torch.equal(parameter, start[name])
        else:
            assert torch.equal(parameter, start[name])
    for module in filter(None, (head, twin)):
        buffers = dict(module.named_buffers())
        assert all(torch.equal(buffers[n], b) for n, b in fixed.items())


@each_pattern
def test_the_slot_is_described(pattern: type[Model]) -> None:
    model = build(pattern)
    with unchanged(model):
        slots = {s.path: s for s in find_slots(model)}
    slot = slots[pattern.path]
    assert slot.role == ("local projection" if "local_" in pattern.path else "projection")
    assert (slot.input_dim, slot.output_dim) == (H, Z)
    assert (slot.twin, slot.maybe_twins) == (pattern.twin, ())
    assert set(slot.aliases) == set(pattern.aliases)
    assert {d.path for d in slot.dependents} == set(pattern.dependents)
    assert {d.width for d in slot.dependents} <= {Z}
    assert pattern.twin not in slots
    alone = [s for s in slots.values() if s.role == "projection"]
    assert (len(alone) == 1) is (pattern.slot is None or pattern is VICRegLLocal)


def test_dependents_are_told_by_kind() -> None:
    kinds = {(d.path, d.kind) for p in PATTERNS for d in slot_of(build(p), p).dependents}
    assert kinds == {
        ("prediction_head", "prediction"),
        ("memory_bank", "memory bank"),
        ("prototypes", "prototypes"),
        ("queues.0", "memory bank"),
        ("queues.1", "memory bank"),
        ("criterion.memory_bank", "memory bank"),
        ("criterion_global.memory_bank", "memory bank"),
        ("criterion_local.memory_bank", "memory bank"),
        ("criterion", "loss centre"),
        ("criterion", "loss state"),
        ("patch_criterion.center", "loss centre"),
        ("teacher_head", "clusters"),
        ("student_head", "clusters"),
    }


def slot_of(model: Model, pattern: type[Model]) -> Any:
    return next(s for s in find_slots(model) if s.path == pattern.path)


HEADS: dict[str, Callable[[int], dict[str, Any]]] = {
    "simclr_plain": lambda z: {},
    "ae_embedding": lambda z: {"weights": weights()},
    "reweighting": lambda z: {"kappa": 1.1},
    "identity": lambda z: {},
}


@each_pattern
@pytest.mark.parametrize("name", HEADS)
def test_two_steps_with_another_head_of_the_same_width(pattern: type[Model], name: str) -> None:
    z = H if name in ("reweighting", "identity") else Z
    model = build(pattern, z)
    with unchanged(model), swap_head(model, name, pattern.slot, **HEADS[name](z)) as swap:
        assert swap.report.slot.path == pattern.path
        assert set(swap.report.paths) == {pattern.path, *pattern.aliases}
        for path in swap.report.paths:
            assert model.get_submodule(path) is swap.head
        assert (swap.twin is not None) is (pattern.twin is not None)
        if swap.twin is not None:
            assert model.get_submodule(str(pattern.twin)) is swap.twin
            a, b = swap.head.state_dict(), swap.twin.state_dict()
            assert all(torch.equal(a[k], b[k]) for k in a)
    old = model.get_submodule(pattern.path)
    old_state = {k: v.clone() for k, v in old.state_dict().items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    swap = swap_head(model, name, pattern.slot, **HEADS[name](z))
    train(model, swap.head, swap.twin)
    swap.restore()
    assert all(m is modules[p] for p, m in model.named_modules(remove_duplicate=False))
    assert all(torch.equal(v, old_state[k]) for k, v in old.state_dict().items())
    train(model, old, model.get_submodule(pattern.twin) if pattern.twin else None, steps=1)


@each_pattern
def test_taps_read_what_the_head_receives_and_returns_in_a_step(pattern: type[Model]) -> None:
    model = build(pattern).eval()
    head = model.get_submodule(pattern.path)
    views = torch.randn(2, BATCH, 3, 3, C, generator=torch.Generator().manual_seed(0))
    names = ("pre_projection", "projection")
    if [s.role for s in find_slots(model)].count("projection") > 1:  # the user says which
        with pytest.raises(SlotError, match="'pre_projection' needs one projection head"):
            tap(model, *names).__enter__()
    if pattern.slot:
        names = (f"{pattern.path}:input", pattern.path)
    with tap(model, *names, detach=True) as taps:
        model.loss(*views)
    received, returned = taps.read()
    assert received
    with torch.no_grad():
        for h, z in zip(received, returned, strict=True):
            assert torch.allclose(head(h), z, atol=1e-6)


TOGETHER: dict[type[Model], str] = {  # heads of one model that must agree on the width
    VICRegL: "local_projection_head", VICRegLLocal: "projection_head",
}  # fmt: skip


@each_pattern
def test_two_steps_with_another_output_width(pattern: type[Model]) -> None:
    z, model = Z - 2, build(pattern)
    modules = dict(model.named_modules(remove_duplicate=False))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    tensors = {k: id(v) for k, v in (*model.named_parameters(), *model.named_buffers())}
    with unchanged(model):
        planned = swap_head(model, "simclr_plain", pattern.slot, output_dim=z, dry_run=True)
    swap = swap_head(model, "simclr_plain", pattern.slot, output_dim=z)
    assert planned.report == swap.report
    assert set(swap.report.rebuilt) == set(pattern.dependents)

    expected, new = shapes(build(pattern, z)), shapes(model)
    followers = tuple(f"{path}." for path in pattern.dependents)
    made = {k for k in expected if k.startswith(followers) or k in pattern.dependents}
    assert {k: new.get(k) for k in made} == {k: expected[k] for k in made}
    heads = (*swap.report.paths, *swap.report.twin_paths)
    rest = [k for k in state if not k.startswith((*heads, *followers)) and k not in made]
    assert all(torch.equal(model.state_dict()[k], state[k]) for k in rest)

    other = TOGETHER.get(pattern)
    if other:
        swap_head(model, "simclr_plain", other, output_dim=z)
    if "memory" in "".join(pattern.dependents) or "queues" in "".join(pattern.dependents):
        banks = [m for m in model.modules() if isinstance(m, MemoryBankModule)]
        followed = [m for m in banks if m.size == (32, z)]
        assert followed
        for bank in followed:
            assert bank.bank.shape == (32, z)
            assert torch.allclose(bank.bank.norm(dim=1), torch.ones(32))
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, swap.head, swap.twin)
    for name, parameter in model.named_parameters():
        if name.startswith(followers) and parameter.requires_grad and parameter.ndim > 1:
            assert not torch.equal(parameter, start[name]), name
    if other or pattern in (DenseCL, DenseCLLocal):
        return
    swap.restore()
    assert all(m is modules[p] for p, m in model.named_modules(remove_duplicate=False))
    now = {k: id(v) for k, v in (*model.named_parameters(), *model.named_buffers())}
    assert now == tensors
    assert all(torch.equal(model.state_dict()[k], state[k]) for k in state if "backbone" not in k)
    old = model.get_submodule(pattern.path)
    train(model, old, model.get_submodule(pattern.twin) if pattern.twin else None, steps=1)


def shapes(model: nn.Module) -> dict[str, Any]:
    named = (*model.named_parameters(), *model.named_buffers())
    return {n: (tuple(t.shape), t.dtype, t.requires_grad) for n, t in named}


@pytest.mark.parametrize("n_prototypes", [12, [12, Z], [Z, Z, 5]])
def test_every_list_of_swav_prototypes_follows(n_prototypes: int | list[int]) -> None:
    model = build(SwAV)
    model.prototypes = heads.SwaVPrototypes(Z, n_prototypes)
    swap_head(model, "simclr_plain", output_dim=6)
    expected = heads.SwaVPrototypes(6, n_prototypes)
    assert repr(model.prototypes) == repr(expected)
    given = model.prototypes(torch.rand(2, 6))
    assert isinstance(given, list) is isinstance(n_prototypes, list)
    model.prototypes.normalize()


def test_smog_prototypes_keep_their_momentum_and_unit_rows() -> None:
    model = build(SMoG)
    swap_head(model, "simclr_plain", output_dim=6)
    assert model.prototypes.beta == 0.99
    features = model.prototypes.group_features
    assert not features.requires_grad
    assert torch.allclose(features.norm(dim=1), torch.ones(6))


def test_the_prototypes_of_msn_are_trained_and_averages_forgotten() -> None:
    model = build(MSN)
    optimizer = torch.optim.SGD([model.prototypes, *model.anchor_projection_head.parameters()], 0.1)
    swap = swap_head(model, "simclr_plain", output_dim=6, optimizer=optimizer)
    assert isinstance(model.prototypes, nn.Parameter)
    assert optimizer.param_groups[0]["params"][0] is model.prototypes
    swap.restore()
    assert optimizer.param_groups[0]["params"][0] is model.prototypes

    dino = build(DINO)
    dino.loss(*torch.randn(2, BATCH, 3, 3, C))
    assert dino.criterion.center.any()
    swap_head(dino, "simclr_plain", output_dim=6)
    assert torch.equal(dino.criterion.center, torch.zeros(1, 1, 6))


def test_a_frozen_embedding_in_capis_other_head_stays_as_it_is() -> None:
    model = build(CAPI)
    teacher = swap_head(model, "ae_embedding", "teacher_head", weights=weights()).head
    student = swap_head(model, "simclr_plain", "student_head", output_dim=5)
    assert student.report.rebuilt == ("teacher_head",)
    assert (model.teacher_head.output_dim, teacher.output_dim) == (5, Z)
    assert torch.equal(model.teacher_head.embedding.weight, weights()[0])
    student.restore()
    assert model.teacher_head is teacher


def test_the_lengths_of_capis_clusters_stay_one_and_frozen() -> None:
    model = build(CAPI)
    swap_head(model, "simclr_plain", "teacher_head", output_dim=6)
    layer = model.student_head.layer
    assert (layer.weight_g.shape, layer.weight_g.requires_grad) == ((6, 1), False)
    assert (layer.weight_g == 1).all()
    assert layer.weight_v.shape == (6, H)


def test_the_predictor_of_capi_is_in_front_of_the_head() -> None:
    module = pytest.importorskip("lightly.models.modules.capi_predictor_timm")
    model = build(CAPI)
    model.predictor = module.CAPIPredictorTIMM(embed_dim=Z, grid_size=3, depth=1, num_heads=2)
    assert [s.path for s in find_slots(model)] == ["student_head", "teacher_head"]
    swap = swap_head(model, "simclr_plain", "student_head", output_dim=6)
    assert swap.report.rebuilt == ("teacher_head",)


# losses and banks that the user's script holds


def lone(pattern: type[Model], *names: str) -> tuple[Model, dict[str, nn.Module]]:
    """A model whose losses and banks are variables of the script, as in lightly's examples."""
    model = build(pattern)
    taken = {name: getattr(model, name) for name in names}
    for name, module in taken.items():
        delattr(model, name)
        vars(model)[name] = module  # the training step finds it; it is no part of the model
    return model, taken


@pytest.mark.parametrize(
    ("pattern", "names", "rebuilt"),
    [
        (MoCo, ["criterion"], ["outside.0.memory_bank"]),
        (NNCLR, ["criterion", "memory_bank"], ["prediction_head", "outside.1"]),
        (NNCLR, ["prediction_head", "memory_bank"], ["outside.0", "outside.1"]),
        (SMoG, ["memory_bank", "prototypes"], ["prediction_head", "outside.0", "outside.1"]),
        (SwAVQueue, ["queues"], ["prototypes", "outside.0.0", "outside.0.1"]),
        (SwAV, ["prototypes"], ["outside.0"]),
        (DINO, ["criterion"], ["outside.0"]),
        (IBOT, ["criterion", "patch_criterion"], ["outside.0", "outside.1.center"]),
        (TiCo, ["criterion"], ["outside.0"]),
    ],
)
def test_what_the_script_holds_follows_and_stays_the_same_object(
    pattern: type[Model], names: list[str], rebuilt: list[str]
) -> None:
    model, taken = lone(pattern, *names)
    if pattern is TiCo:
        model.loss(*torch.randn(2, BATCH, 3, 3, C))
    before = {
        name: [(p, id(t), t.clone()) for p, t in module.state_dict().items()]
        for name, module in taken.items()
    }
    contents = {name: vars(module) for name, module in taken.items()}
    outside = list(taken.values())
    swap = swap_head(model, "simclr_plain", pattern.slot, output_dim=6, outside=outside)
    assert list(swap.report.rebuilt) == rebuilt
    assert all(getattr(model, name) is module for name, module in taken.items())
    train(model, swap.head, swap.twin)
    swap.restore()
    assert all(vars(module) is contents[name] for name, module in taken.items())
    for name, module in taken.items():
        now = module.state_dict()
        assert all(torch.equal(now[p], t) for p, _, t in before[name])
    old = model.get_submodule(pattern.path)
    train(model, old, model.get_submodule(pattern.twin) if pattern.twin else None, steps=1)


@pytest.mark.parametrize(
    ("pattern", "names", "words"),
    [
        (MoCo, ["criterion"], ["NTXentLoss (memory bank)"]),
        (NNCLR, ["memory_bank"], ["NNMemoryBankModule (memory bank)"]),
        (
            SwAVQueue,
            ["queues", "prototypes"],
            ["MemoryBankModule (memory", "SwaVPrototypes (proto"],
        ),
        (BYOL, ["prediction_head"], ["BYOLPredictionHead (prediction)"]),
        (DINO, ["criterion"], ["DINOLoss (loss centre)"]),
        (TiCo, ["criterion"], ["TiCoLoss (loss state)"]),
    ],
)
def test_what_the_script_holds_and_does_not_pass_is_named_and_fails_loudly(
    pattern: type[Model], names: list[str], words: list[str]
) -> None:
    model, _ = lone(pattern, *names)
    if pattern is TiCo:
        model.loss(*torch.randn(2, BATCH, 3, 3, C))
    with pytest.warns(UserWarning, match=r"made for 8 features.*now has 6.*outside=\[") as caught:
        swap = swap_head(model, "simclr_plain", output_dim=6)
    (text,) = [str(w.message) for w in caught if "outside=[...]" in str(w.message)]
    assert all(part in text for part in words)
    assert text in swap.report.notes
    assert caught[0].filename == __file__
    with pytest.raises(RuntimeError):
        model.loss(*torch.randn(2, BATCH, 3, 3, C))


def test_a_loss_beside_the_model_in_a_larger_module_is_named_too() -> None:
    model, taken = lone(MoCo, "criterion")
    larger = nn.ModuleDict({"model": model, "loss": taken["criterion"]})
    with pytest.warns(UserWarning, match=r"has 6: NTXentLoss \(memory bank\)\."):
        swap_head(model, "simclr_plain", output_dim=6)
    assert larger["loss"].memory_bank.size == (32, Z)


def test_what_belongs_to_other_models_or_was_swapped_out_is_not_named() -> None:
    others = [
        build(MoCo),
        build(BYOL),
        losses.NTXentLoss(memory_bank_size=(32, Z + 1)),
        losses.TiCoLoss(),
    ]
    done = swap_head(others[1], "simclr_plain", output_dim=6)
    gc.collect()  # of earlier tests
    model, taken = lone(MoCo, "criterion")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap_head(model, "simclr_plain", output_dim=6, outside=taken["criterion"]).restore()
        swap_head(model, "mlp").restore()
        swap_head(build(BYOL), "simclr_plain", output_dim=6, outside=losses.NTXentLoss())
        del model, taken
        swap_head(build(BYOL), "simclr_plain", output_dim=6)
    assert done.report.rebuilt == ("prediction_head",)


def test_a_loss_of_the_script_that_holds_no_width_stays_and_is_noted() -> None:
    model, taken = lone(SimCLR, "criterion")
    content = vars(taken["criterion"])
    swap = swap_head(model, "simclr_plain", output_dim=6, outside=taken["criterion"])
    assert vars(taken["criterion"]) is content
    assert any("NTXentLoss in outside holds nothing of 8 features" in n for n in swap.report.notes)


@pytest.mark.parametrize(
    "pattern", [p for p in PATTERNS if p.twin is not None], ids=lambda p: p.__name__
)
def test_the_copy_cannot_be_swapped_alone(pattern: type[Model]) -> None:
    model = build(pattern)
    with unchanged(model), pytest.raises(SlotError, match=f"slot='{pattern.path}'"):
        swap_head(model, "simclr_plain", slot=pattern.twin)


def test_the_copys_other_names_are_refused_as_well() -> None:
    for name in ("teacher_cls_head", "teacher_patch_head"):
        with pytest.raises(SlotError, match="slot='student_head'"):
            swap_head(build(IBOT), "simclr_plain", slot=name)


def test_two_projection_heads_must_be_chosen_from() -> None:
    with pytest.raises(SlotError, match=r"projection_head_global.*projection_head_local.*slot="):
        swap_head(build(DenseCL), "simclr_plain")


def test_the_last_layer_of_a_dino_head_can_be_kept() -> None:
    model = build(DINO)
    swap = swap_head(model, "simclr_plain", slot="student_head.layers")
    assert (swap.head.input_dim, swap.head.output_dim) == (H, 6)
    assert model.teacher_head.layers is swap.twin
    assert [d.path for d in swap.report.slot.dependents] == ["student_head.last_layer"]
    train(model, model.student_head, model.teacher_head)
    swap = swap_head(model, "simclr_plain", slot="student_head.layers", output_dim=7)
    assert swap.report.rebuilt == ("student_head.last_layer", "teacher_head.last_layer")
    ours, theirs = model.student_head.last_layer, model.teacher_head.last_layer
    assert ours.weight_v.shape == (Z, 7)
    assert torch.equal(ours.weight_v, theirs.weight_v)
    assert (ours.weight_g == 1).all()
    assert (ours.weight_g.requires_grad, ours.weight_v.requires_grad) == (False, True)
    train(model, model.student_head, model.teacher_head)


def test_a_dino_head_can_be_put_in_with_its_twin() -> None:
    model = build(DINO)
    swap = swap_head(model, heads.DINOv2ProjectionHead(H, HID, 5, Z))
    train(model, swap.head, swap.twin)


def test_what_a_dino_loop_calls_is_there_and_noted() -> None:
    model = build(DINO)
    planned = swap_head(model, "simclr_plain", dry_run=True)
    assert not hasattr(planned.head, "cancel_last_layer_gradients")
    swap = swap_head(model, "simclr_plain")
    assert any("cancel_last_layer_gradients()" in note for note in swap.report.notes)
    assert planned.report == swap.report
    copy.deepcopy(model).after_backward()
    swap_head(model, "mlp")
    model.after_backward()


def test_teachers_that_were_not_frozen_are_asked_about() -> None:
    model = build(BYOLBenchmark)
    assert all(s.sure for s in find_slots(model))
    activate_requires_grad(model.teacher_projection_head)
    assert not all(s.sure for s in find_slots(model))
    with unchanged(model), pytest.raises(SlotError, match=r"twin='teacher_projection_head'"):
        swap_head(model, "simclr_plain")
    for arguments in (
        {"slot": "projection_head", "twin": "teacher_projection_head"},
        {"twin": "teacher_projection_head"},
    ):
        with swap_head(model, "simclr_plain", **arguments) as swap:
            assert model.teacher_projection_head is swap.twin
            assert not any(p.requires_grad for p in swap.twin.parameters())
            assert [d.path for d in swap.report.slot.dependents] == ["prediction_head"]


def test_plain_sequential_heads_beside_lightlys_parts() -> None:
    model = build(MoCo)
    model.g = nn.Sequential(nn.Linear(H, HID), nn.ReLU(), nn.Linear(HID, Z))
    model.g_momentum = copied(model.g)
    swap = swap_head(model, "simclr_plain", slot="g")
    assert model.g_momentum is swap.twin
    assert [d.path for d in swap.report.slot.dependents] == ["criterion.memory_bank"]


def test_lightlys_base_class_is_named_by_its_attribute() -> None:
    model = nn.ModuleDict(
        {
            "projection_head": heads.ProjectionHead([(H, Z, None, None)]),
            "prediction_head": heads.ProjectionHead([(Z, Z, None, None)]),
        }
    )
    assert [s.role for s in find_slots(model)] == ["projection", "prediction"]


def test_the_loss_state_of_tico_is_forgotten_and_made_by_the_next_batch() -> None:
    model = build(TiCo)
    model.loss(*torch.randn(2, BATCH, 3, 3, C))
    criterion, old = model.criterion, model.criterion.C
    swap = swap_head(model, "simclr_plain", output_dim=5)
    assert swap.report.rebuilt == ("criterion",)
    assert model.criterion.C is None
    assert (model.criterion.beta, model.criterion.rho) == (criterion.beta, criterion.rho)
    train(model, swap.head, swap.twin)
    assert model.criterion.C.shape == (5, 5)
    swap.restore()
    assert model.criterion is criterion
    assert criterion.C is old


def test_whitening_follows_the_width_as_far_as_its_slices_allow() -> None:
    model = build(SimCLR)
    model.criterion = losses.WMSELoss(embedding_dim=Z, w_size=20, eps=0.1, momentum=0.2)
    swap = swap_head(model, "simclr_plain", output_dim=10)
    assert swap.report.rebuilt == ("criterion.whitening",)
    expected = losses.WMSELoss(embedding_dim=10, w_size=20, eps=0.1, momentum=0.2).whitening
    new = model.criterion.whitening
    assert vars(new).keys() == vars(expected).keys()
    assert (new.num_features, new.eps, new.momentum) == (10, 0.1, 0.2)
    assert torch.equal(new.running_variance, torch.eye(10))
    assert model.criterion(torch.randn(40, 10)).isfinite()
    swap.restore()
    with (
        unchanged(model),
        pytest.raises(DimensionError, match=r"whitening, made for 8\): 10 is the widest"),
    ):
        swap_head(model, "simclr_plain", output_dim=11)


def test_the_frozen_embedding_outlasts_everything_bit_for_bit() -> None:
    model = build(BYOL)
    swap = swap_head(model, "ae_embedding", weights=weights())
    weight, bias = weights()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(20):
        update_momentum(model.projection_head, model.projection_head_momentum, m=0.99)
        optimizer.zero_grad()
        model.loss(*torch.randn(2, BATCH, 3, 3, C)).backward()
        optimizer.step()
        activate_requires_grad(model.projection_head)
    for head in (swap.head, swap.twin):
        assert torch.equal(head.embedding.weight, weight)
        assert torch.equal(head.embedding.bias, bias)


def test_update_momentum_needs_a_parameter_and_gets_one() -> None:
    bare = create_head("reweighting", input_dim=H)
    with pytest.raises(RuntimeError):
        update_momentum(bare, bare, m=M)  # what headplug is there for
    model = build(BYOL, H)
    swap = swap_head(model, "reweighting")
    assert any("no parameters" in note for note in swap.report.notes)
    update_momentum(model.projection_head, model.projection_head_momentum, m=M)
    assert sum(p.numel() for p in swap.head.parameters()) == 0
    model.projection_head_momentum.load_state_dict(model.projection_head.state_dict())


# methods without a projector


def aim() -> nn.Module:
    module = pytest.importorskip("lightly.models.modules.heads_timm")
    return module.AIMPredictionHead(H, 6, hidden_dim=HID, num_blocks=1)


def mae() -> nn.Module:
    module = pytest.importorskip("lightly.models.modules.masked_vision_transformer_decoder_timm")
    return module.MaskedVisionTransformerDecoderTIMM(9, H, depth=1, num_heads=2)


def pixio() -> nn.Module:
    module = pytest.importorskip("lightly.models.modules.masked_autoencoder_timm")
    return module.PixioDecoderTIMM(
        num_patches=9, patch_size=1, embed_dim=H, decoder_embed_dim=HID, decoder_depth=1,
        decoder_num_heads=2,
    )  # fmt: skip


def simmim() -> nn.Module:
    return nn.Linear(H, 192)


def direct_clr() -> nn.Module:
    return losses.DirectCLRLoss(loss_dim=6)


def ijepa() -> nn.Module:
    module = pytest.importorskip("lightly.models.modules.ijepa_timm")
    return module.IJEPAPredictorTIMM(9, 1, H, HID, num_heads=2)


@pytest.mark.parametrize(
    ("make", "name", "method"),
    [
        (aim, "projection_head", "AIM"),
        (mae, "decoder", "MAE or Pixio"),
        (pixio, "decoder", "Pixio"),
        (ijepa, "predictor", "I-JEPA"),
        (direct_clr, "criterion", "DirectCLR"),
        (simmim, "to_pixels", r"trained by reconstruction \(MAE, SimMIM, ...\)"),
        (simmim, "decoder", r"trained by reconstruction \(MAE, SimMIM, ...\)"),
    ],
)
def test_methods_without_a_projector_are_refused_with_the_reason(
    make: Callable[[], nn.Module], name: str, method: str
) -> None:
    vit = torchvision.models.VisionTransformer(16, 8, 1, 2, H, HID)
    model = nn.ModuleDict({"backbone": MaskedVisionTransformerTorchvision(vit), name: make()})
    with unchanged(model):
        for call in (find_slots, lambda m: swap_head(m, "simclr_plain")):
            with pytest.raises(SlotError, match=rf"{method} has no projection head.*{name}"):
                call(model)
    assert find_slots(nn.ModuleDict({"backbone": model["backbone"]})) == []
    model["g"] = nn.Linear(H, Z)
    assert swap_head(model, "simclr_plain", slot="g").report.paths == ("g",)


# Lightning


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param)


def lightning_model(pl: Any, where: str) -> Any:
    """BYOL as a LightningModule that swaps its head in the hook of that name."""

    class Lit(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = build(BYOL)
            self.projection_head = self.model.projection_head
            self.error: SlotError | None = None
            self.swap: Any = None
            self.do("__init__")

        def do(self, hook: str) -> None:
            if hook == where:
                self.swap = swap_head(self, "ae_embedding", weights=weights())

        def configure_model(self) -> None:
            self.do("configure_model")

        def setup(self, stage: str) -> None:
            self.do("setup")

        def on_train_start(self) -> None:
            if where == "on_train_start":
                try:
                    swap_head(self, "simclr_plain")
                except SlotError as error:
                    self.error = error

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            update_momentum(self.projection_head, self.model.projection_head_momentum, m=M)
            return self.model.loss(*batch[0].unbind(1))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Lit()


def fit(pl: Any, model: Any) -> Any:
    data = torch.utils.data.TensorDataset(torch.randn(2 * BATCH, 2, 3, 3, C))
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, barebones=False,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=BATCH))
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["__init__", "configure_model", "setup"])
def test_a_lightning_module_can_swap_before_its_optimiser_exists(pl: Any, where: str) -> None:
    model = lightning_model(pl, where)
    before = model.swap and model.swap.head.layers.output.weight.clone()
    trainer = fit(pl, model)
    assert set(model.swap.report.paths) == {"projection_head", "model.projection_head"}
    output = model.swap.head.layers.output.weight
    assert model.projection_head is model.swap.head
    assert any(output is p for g in trainer.optimizers[0].param_groups for p in g["params"])
    assert output.grad is not None
    assert before is None or not torch.equal(before, output)
    assert torch.equal(model.swap.head.embedding.weight, weights()[0])


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_that_has_its_optimiser_is_refused_with_advice(pl: Any) -> None:
    model = lightning_model(pl, "on_train_start")
    trainer = fit(pl, model)
    assert "would not train the new parameters of" in str(model.error)
    assert "Swap before trainer.fit(), or pass optimizer=" in str(model.error)
    with unchanged(model), pytest.raises(SlotError, match=r"trainer\.optimizers\[0\]"):
        swap_head(model, "simclr_plain")
    swap = swap_head(model, "simclr_plain", optimizer=trainer.optimizers[0])
    held = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
    assert held >= {id(p) for p in swap.head.parameters()}
    wrong = torch.optim.SGD(swap.head.parameters(), lr=0.1)
    with pytest.raises(SlotError, match="already exists"):
        swap_head(model, "simclr_plain", optimizer=wrong)
    assert math.isfinite(model.model.loss(*torch.randn(2, BATCH, 3, 3, C)).item())
