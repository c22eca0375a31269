"""What follows the width of a projection: rules, limits, and what a user's script holds."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from headplug import create_head, find_slots, swap_head
from headplug.errors import DimensionError, SlotError

B, H, OLD, NEW, HID = 6, 16, 8, 6, 10


def model_with(**parts: nn.Module | Tensor) -> nn.Module:
    model = nn.Module()
    model.backbone, model.projector = nn.Linear(B, H), nn.Linear(H, OLD)
    for name, part in parts.items():
        if isinstance(part, nn.Module) or not isinstance(part, nn.Parameter):
            (model.add_module if isinstance(part, nn.Module) else model.register_buffer)(name, part)
        else:
            model.register_parameter(name, part)
    return model


def swap(model: nn.Module, width: int = NEW, **arguments: Any) -> Any:
    return swap_head(model, "simclr_plain", slot="projector", output_dim=width, **arguments)


def chain(*widths: int, norm: type[nn.Module] | None = nn.BatchNorm1d) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), *([norm(fan_out)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers[:-2] if norm else layers[:-1])


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in module.state_dict().items()}


class Subclassed(nn.Linear):
    """A linear layer with an initialisation and a setting of its own."""

    scale = 2.0

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.25)
        if self.bias is not None:
            nn.init.constant_(self.bias, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


class Looped(nn.Module):
    """A predictor that keeps its layers in a list."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.input_dim, self.output_dim = widths[0], widths[-1]
        pairs = itertools.pairwise(widths)
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in pairs])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


PREDICTORS: dict[str, Callable[[int], nn.Module]] = {
    "bottleneck": lambda z: chain(z, 4, z),
    "hidden as wide as the old": lambda z: chain(z, OLD, z),
    "three layers as wide as the old": lambda z: chain(z, OLD, OLD, z),
    "one layer": lambda z: nn.Linear(z, z),
    "no bias": lambda z: nn.Sequential(nn.Linear(z, 4, bias=False), nn.Linear(4, z)),
    "norm first": lambda z: nn.Sequential(nn.LayerNorm(z), nn.Linear(z, z), nn.Tanh()),
    "norm last": lambda z: nn.Sequential(chain(z, OLD, z), nn.BatchNorm1d(z, affine=False)),
    "layer norms": lambda z: chain(z, OLD, z, norm=nn.LayerNorm),
    "rms norms": lambda z: nn.Sequential(nn.RMSNorm(z), chain(z, 4, z, norm=nn.RMSNorm)),
    "list of layers": lambda z: Looped(z, 4, 5, z),
    "list, hidden as wide as the old": lambda z: Looped(z, 4, OLD, z),
    "headplug's own": lambda z: create_head(
        "byol_predictor", input_dim=z, output_dim=z, hidden_dim=OLD
    ),
    "weight norm": lambda z: parametrizations.weight_norm(nn.Linear(z, z, bias=False)),
}


@pytest.mark.parametrize("kind", PREDICTORS)
def test_predictors_are_as_if_built_for_the_new_width(kind: str) -> None:
    old, expected = PREDICTORS[kind](OLD), PREDICTORS[kind](NEW)
    model = model_with(predictor=old)
    with swap(model) as done:
        new = model.predictor
        assert done.report.rebuilt == ("predictor",)
        assert shapes(new) == shapes(expected)
        assert repr(new) == repr(expected)
        x = torch.rand(5, NEW)
        assert new(x).shape == (5, NEW)
        new(x).sum().backward()
        assert all(p.grad is not None for p in new.parameters())
        assert [s.dependents[0].width for s in find_slots(model)[:1]] == [NEW]
    assert model.predictor is old


def test_what_does_not_touch_the_width_is_copied() -> None:
    model = model_with(predictor=chain(OLD, 4, 5, OLD))
    old = {n: t.clone() for n, t in model.predictor.state_dict().items()}
    swap(model)
    new = model.predictor.state_dict()
    kept = [n for n in old if n.startswith(("1.", "3.", "4."))]
    assert kept
    assert all(torch.equal(old[n], new[n]) for n in kept)
    assert model.predictor[3].weight is not None


@pytest.mark.parametrize("width", [NEW, 40])
def test_layers_are_drawn_as_linear_layers_are(width: int) -> None:
    model = model_with(predictor=nn.Sequential(nn.Linear(OLD, 400), nn.ReLU(), nn.Linear(400, OLD)))
    with torch.no_grad():  # however trained
        for parameter in model.predictor.parameters():
            parameter.fill_(7.0)
    swap(model, width)
    for layer in (model.predictor[0], model.predictor[2]):
        bound = 1 / math.sqrt(layer.in_features)
        for values in (layer.weight.detach().flatten(), layer.bias.detach()):
            assert values.abs().max() <= bound
            if len(values) > 100:
                assert float(values.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
                assert abs(values.mean()) < bound / 5


def test_a_subclass_of_a_linear_layer_keeps_its_class_settings_and_initialisation() -> None:
    layer = Subclassed(OLD, 5)
    layer.scale = 3.0
    model = model_with(prototypes=layer)
    swap(model)
    new = model.prototypes
    assert (type(new), new.scale, new.in_features) == (Subclassed, 3.0, NEW)
    assert torch.equal(new.weight, torch.full((5, NEW), 0.25))
    assert torch.equal(new(torch.ones(1, NEW)), torch.full((1, 5), 3 * (0.25 * NEW + 0.5)))


@pytest.mark.parametrize("part", ["predictor", "prototypes"])
def test_frozen_parameters_stay_frozen_and_modes_stay(part: str) -> None:
    module = chain(OLD, HID, OLD)
    module[0].bias.requires_grad_(False)
    module[3].requires_grad_(False)
    module[1].eval()
    model = model_with(**{part: module})
    flags = {n: p.requires_grad for n, p in module.named_parameters()}
    modes = {n: m.training for n, m in module.named_modules()}
    swap(model)
    new = getattr(model, part)
    assert new is not module
    assert {n: p.requires_grad for n, p in new.named_parameters()} == flags
    assert {n: m.training for n, m in new.named_modules()} == modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    unit = F.normalize(torch.randn(12, OLD))
    model = model_with(predictor=chain(OLD, 4, OLD), queue=unit, proto=nn.Parameter(unit.clone()))
    model.to(dtype)
    swap(model)
    floating = [t for t in model.state_dict().values() if t.is_floating_point()]
    assert {t.dtype for t in floating} == {dtype}
    for rows in (model.queue, model.proto):
        assert rows.shape == (12, NEW)
        assert torch.allclose(rows.float().norm(dim=1), torch.ones(12), atol=1e-2)


def test_a_model_on_the_meta_device_stays_there() -> None:
    normed = parametrizations.weight_norm(nn.Linear(OLD, 3))
    model = model_with(predictor=chain(OLD, 4, OLD), prototypes=normed, queue=torch.rand(12, OLD))
    swap(model.to("meta"))
    assert all(t.is_meta for t in model.state_dict().values())
    assert model.queue.shape == (12, NEW)
    assert model.prototypes(torch.empty(2, NEW, device="meta")).shape == (2, 3)


@pytest.mark.parametrize("make", [nn.utils.weight_norm, parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_keeps_its_lengths_and_is_drawn_anew(make: Any) -> None:
    layer = make(nn.Linear(OLD, 5, bias=False))
    names = sorted(n for n, _ in layer.named_parameters())
    layer.get_parameter(names[0]).data.fill_(3.0)
    layer.get_parameter(names[0]).requires_grad_(False)
    model = model_with(prototypes=layer)
    swap(model)
    new = model.prototypes
    assert sorted(n for n, _ in new.named_parameters()) == names
    assert not new.get_parameter(names[0]).requires_grad
    new(torch.rand(2, NEW)).sum().backward()
    assert new.get_parameter(names[1]).grad is not None
    assert new.weight.shape == (5, NEW)
    assert torch.allclose(new.weight.norm(dim=1), torch.full((5,), 3.0))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lengths_that_nobody_set_are_those_of_the_new_directions() -> None:
    model = model_with(prototypes=nn.utils.weight_norm(nn.Linear(OLD, 5, bias=False)))
    swap(model)
    new = model.prototypes
    assert torch.allclose(new.weight_g.flatten(), new.weight_v.norm(dim=1))


def test_prototypes_in_lists_all_follow() -> None:
    unit = nn.ModuleList([nn.Linear(OLD, k, bias=False) for k in (5, OLD)]).requires_grad_(False)
    for layer in unit:
        layer.weight.copy_(F.normalize(layer.weight))
    model = model_with(prototypes=unit)
    swap(model)
    for layer, k in zip(model.prototypes, (5, OLD), strict=True):
        assert layer.weight.shape == (k, NEW)
        assert not layer.weight.requires_grad
        assert torch.allclose(layer.weight.norm(dim=1), torch.ones(k))


# tensors


@pytest.mark.parametrize(
    ("shape", "axis"), [((32, OLD), 1), ((OLD, 32), 0), ((2, OLD, 32), 1), ((2, 32, OLD), 2),
                        ((OLD, OLD), 1), ((2, OLD, OLD), 1)],
)  # fmt: skip
def test_queues_keep_their_layout_and_their_norm(shape: tuple[int, ...], axis: int) -> None:
    model = model_with(queue=F.normalize(torch.randn(shape), dim=axis))
    swap(model)
    assert model.queue.shape == tuple(NEW if i == axis else s for i, s in enumerate(shape))
    assert torch.allclose(model.queue.norm(dim=axis), torch.ones(()), atol=1e-6)
    assert "queue" in dict(model.named_buffers())


def test_a_queue_whose_layout_is_unclear_is_refused() -> None:
    model = model_with(queue=torch.randn(OLD, OLD))
    with pytest.raises(DimensionError, match=r"queue \(queue, made for 8\): its shape \(8, 8\)"):
        swap(model)


@pytest.mark.parametrize(
    ("values", "check"),
    [
        (torch.zeros(32, OLD), lambda t: not t.any()),
        (torch.ones(32, OLD), lambda t: bool((t == 1).all())),
        (5 * torch.randn(400, OLD), lambda t: 4 < t.std() < 6),
        (torch.empty(400, OLD).uniform_(-(OLD**-0.5), OLD**-0.5),
         lambda t: 0.9 * NEW**-0.5 < t.abs().max() <= NEW**-0.5),
    ],
)  # fmt: skip
def test_tensors_are_drawn_as_the_old_seem_to_have_been(
    values: Tensor, check: Callable[[Tensor], bool]
) -> None:
    model = model_with(prototypes=nn.Parameter(values))
    swap(model)
    assert isinstance(model.prototypes, nn.Parameter)
    assert model.prototypes.shape == (len(values), NEW)
    assert check(model.prototypes.detach())


def test_a_centre_starts_at_zero() -> None:
    model = model_with(center=torch.rand(1, OLD))
    swap(model)
    assert torch.equal(model.center, torch.zeros(1, NEW))


def test_a_tensor_under_two_names_stays_one() -> None:
    model = model_with(prototypes=nn.Parameter(torch.randn(5, OLD)))
    model.loss = nn.Module()
    model.loss.prototypes = model.prototypes
    old = model.prototypes
    with swap(model):
        assert model.prototypes is model.loss.prototypes
        assert model.prototypes.shape == (5, NEW)
    assert model.prototypes is old
    assert model.loss.prototypes is old


def test_a_module_under_two_names_stays_one() -> None:
    model = model_with(predictor=chain(OLD, 4, OLD))
    model.again = model.predictor
    swap(model)
    assert model.again is model.predictor


# EMA copies


def test_the_copy_of_a_dependent_follows_it() -> None:
    online = model_with(predictor=chain(OLD, 4, OLD))
    model = nn.ModuleDict({"online": online, "target": copy.deepcopy(online)})
    model["target"].requires_grad_(False).eval()
    old = model["target"].predictor
    done = swap_head(model, "simclr_plain", slot="online.projector", output_dim=NEW)
    assert done.report.rebuilt == ("online.predictor", "target.predictor")
    ours, theirs = (model[k].predictor for k in ("online", "target"))
    assert torch.equal(ours[0].weight, theirs[0].weight)
    assert ours[0].weight.data_ptr() != theirs[0].weight.data_ptr()
    assert not any(p.requires_grad for p in theirs.parameters())
    assert not theirs.training
    (slot,) = [s for s in find_slots(model) if s.path == "online.projector"]
    assert [(d.path, d.twin) for d in slot.dependents] == [("online.predictor", "target.predictor")]
    done.restore()
    assert model["target"].predictor is old


# randomness


def test_parts_are_drawn_independently_and_the_random_state_stays() -> None:
    def build() -> nn.Module:
        torch.manual_seed(3)
        return model_with(
            predictor=nn.Linear(OLD, OLD), prototypes=nn.Linear(OLD, OLD), queue=torch.rand(9, OLD)
        )

    models = [build(), build()]
    for model in models:
        random = torch.get_rng_state()
        swap(model)
        assert torch.equal(torch.get_rng_state(), random)
    first, second = (m.state_dict() for m in models)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(models[0].predictor.weight, models[0].prototypes.weight[:NEW])


# refusals


class Branching(nn.Module):
    """Two branches that both take the projection: not one chain of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(OLD, 4), nn.Linear(OLD, 4), nn.Linear(4, OLD)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x) + self.b(x))


class Skipping(nn.Module):
    """Two residual blocks: the width runs through the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = chain(OLD, 4, OLD), chain(OLD, 4, OLD)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return x + self.b(x)


class Masked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(OLD, OLD)
        self.register_buffer("mask", torch.ones(OLD, OLD))


class Stubborn(nn.Linear):
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TypeError("no copies")


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "convolution": (lambda: nn.Sequential(nn.Conv1d(OLD, 4, 1), nn.Linear(OLD, OLD)), "Conv1d"),
    "attention": (
        lambda: nn.ModuleDict({"a": nn.MultiheadAttention(OLD, 2), "b": nn.Linear(OLD, OLD)}),
        "MultiheadAttention",
    ),
    "branches": (Branching, "Branching does not run with 6 features"),
    "residual blocks": (Skipping, "Skipping does not run with 6 features"),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(OLD, OLD)),
        "holds parametrizations.weight",
    ),
    "old spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(OLD, OLD)), "weight_orig"),
    "tensors of its own": (Masked, "mask"),
    "no copies": (lambda: Stubborn(OLD, OLD), "no copies"),
    "normed subclass": (
        lambda: parametrizations.weight_norm(Subclassed(OLD, OLD)),
        "ParametrizedSubclassed",
    ),
    "weight norm along the inputs": (
        lambda: parametrizations.weight_norm(nn.Linear(OLD, OLD), dim=1),
        "normalised along another axis",
    ),
    "lazy": (lambda: nn.Sequential(nn.Linear(OLD, 4), nn.LazyLinear(OLD)), "not seen a batch"),
    "transformer": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(OLD, 4, 16), 1),
        "4 attention heads need a multiple of 4",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_follow_is_named_with_both_widths(kind: str) -> None:
    make, reason = REFUSED[kind]
    model = model_with(predictor=make(), prototypes=nn.Linear(OLD, 3), queue=torch.rand(OLD, OLD))
    modules, state = dict(model.named_modules()), copy.deepcopy(dict(model.state_dict(keep_vars=0)))
    for dry_run in (True, False):
        with pytest.raises(DimensionError) as caught:
            swap(model, dry_run=dry_run)
        text = str(caught.value)
        for words in ("gives 6 features instead of 8", "predictor (prediction, made for 8)", reason,
                      "queue (queue, made for 8)", "Keep output_dim=8"):  # fmt: skip
            assert words in text
        assert "prototypes" not in text
    assert dict(model.named_modules()) == modules
    now = model.state_dict()
    assert all(torch.equal(now[k], v) for k, v in state.items() if "Uninit" not in type(v).__name__)


def test_a_tensor_that_only_looks_like_it_is_refused() -> None:
    model = model_with(classes=nn.Parameter(torch.rand(5, OLD)))
    with pytest.raises(DimensionError, match=r"classes \(tensor, made for 8\): nothing but its sh"):
        swap(model)


def test_layers_frozen_for_good_are_refused() -> None:
    predictor = nn.Sequential(chain(OLD, 4, OLD), nn.BatchNorm1d(OLD))
    model = model_with(predictor=predictor)
    from headplug.heads.parameters import freeze

    freeze(predictor, "1")
    with pytest.raises(DimensionError, match="FrozenBatchNorm"):
        swap(model)


@pytest.mark.parametrize(("width", "heads"), [(12, 4), (16, 2)])
def test_transformers_keep_their_heads_and_options(width: int, heads: int) -> None:
    def build(z: int) -> nn.Module:
        layer = nn.TransformerEncoderLayer(
            z, heads, 2 * z, 0.2, F.gelu, 1e-4, True, norm_first=True, bias=False
        )
        return nn.TransformerEncoder(layer, 2, nn.LayerNorm(z), enable_nested_tensor=False)

    model = model_with(predictor=build(OLD))
    swap(model, width)
    expected = build(width)
    assert repr(model.predictor) == repr(expected)
    assert shapes(model.predictor) == shapes(expected)


# hooks


def test_hooks_of_the_user_are_not_copied_but_said() -> None:
    model = model_with(predictor=chain(OLD, 4, OLD))
    seen: list[int] = []

    class Owner:
        big = torch.zeros(3)

        def record(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen.append(output.shape[-1])

    handle = model.predictor[0].register_forward_hook(Owner().record)
    done = swap(model)
    assert seen == []
    model.predictor(torch.rand(3, NEW))
    assert seen == []
    assert any("hooks" in n and "predictor" in n for n in done.report.notes)
    done.restore()
    model.predictor(torch.rand(3, OLD))
    assert seen == [4]
    handle.remove()


# optimisers


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    z = model.projector(model.backbone(torch.rand(7, B)))
    (model.predictor(z).square().mean() + model.prototypes(z).square().mean()).backward()
    optimizer.step()


def groups_of(model: nn.Module, kind: str) -> Any:
    if kind == "all":
        return model.parameters()
    if kind == "named":
        return list(model.named_parameters())
    if kind == "by part":
        return [{"params": list(m.parameters()), "lr": 0.1 * (i + 1)}
                for i, m in enumerate(model.children())]  # fmt: skip
    small = [p for n, p in model.named_parameters() if n.startswith("p") and p.ndim < 2
             and "projector" not in n]  # fmt: skip
    rest = [p for p in model.parameters() if not any(p is s for s in small)]
    return [{"params": rest, "weight_decay": 0.1}, {"params": small, "weight_decay": 0.0}]


@pytest.mark.parametrize("kind", ["all", "named", "by part", "by decay"])
def test_each_new_parameter_takes_the_place_of_the_old_one(kind: str) -> None:
    model = model_with(predictor=chain(OLD, 4, OLD), prototypes=nn.Linear(OLD, 3))
    model.prototypes.weight.requires_grad_(False)  # a frozen one too: it may be trained later
    optimizer = torch.optim.SGD(groups_of(model, kind), lr=0.1, momentum=0.9)
    step(model, optimizer)
    before = [list(g["params"]) for g in optimizer.param_groups]
    named = {id(p): n for n, p in model.named_parameters()}
    places = [[named[id(p)] for p in g] for g in before]
    state = {id(p): s["momentum_buffer"].clone() for p, s in optimizer.state.items()}
    backbone = optimizer.state[model.backbone.weight]["momentum_buffer"]

    done = swap(model, optimizer=optimizer)
    assert not any("optimiser" in note for note in done.report.notes)
    now = {id(p): n for n, p in model.named_parameters()}
    for group, names in zip(optimizer.param_groups, places, strict=True):
        held = [now[id(p)] for p in group["params"]]
        assert [n for n in held if "projector" not in n] == [n for n in names if "proj" not in n]
        assert group.get("param_names", held) == held
    assert optimizer.state[model.backbone.weight]["momentum_buffer"] is backbone
    assert model.predictor[0].weight not in optimizer.state
    start = model.predictor[0].weight.detach().clone()
    step(model, optimizer)
    assert not torch.equal(model.predictor[0].weight, start)
    optimizer.load_state_dict(optimizer.state_dict())

    done.restore()
    for group, params in zip(optimizer.param_groups, before, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in params]
    for p in model.predictor.parameters():
        assert torch.equal(optimizer.state[p]["momentum_buffer"], state[id(p)])
    step(model, optimizer)


def test_optimisers_that_were_not_passed_are_named_with_all_paths() -> None:
    model = model_with(predictor=chain(OLD, 4, OLD), prototypes=nn.Linear(OLD, 3))
    heads = torch.optim.SGD(model.projector.parameters(), lr=0.1)
    others = torch.optim.SGD([*model.predictor.parameters(), *model.prototypes.parameters()], 0.1)
    with pytest.warns(UserWarning, match="'projector' and 'predictor' and 'prototypes'"):
        swap(model).restore()
    with pytest.warns(UserWarning, match="of 'predictor' and 'prototypes':"):
        swap(model, optimizer=heads).restore()
    assert len(others.param_groups[0]["params"]) == 8


# what the user's script holds


class Bank(nn.Module):
    """A loss with a memory bank of its own in a plain PyTorch script."""

    def __init__(self, z: int) -> None:
        super().__init__()
        self.size = [32, z]
        self.register_buffer("bank", F.normalize(torch.randn(32, z)), persistent=False)
        self.statistic = torch.zeros(1, z)

    def forward(self, z: Tensor) -> Tensor:
        self.statistic = 0.9 * self.statistic + 0.1 * z.detach().mean(0)
        return (z @ self.bank.T).mean() + self.statistic.sum()


def test_modules_of_the_script_stay_the_same_objects() -> None:
    model, bank, predictor = model_with(), Bank(OLD), chain(OLD, 4, OLD)
    plain = nn.CrossEntropyLoss()
    old = (bank.bank, bank.statistic, predictor[0], predictor[0].weight)
    optimizer = torch.optim.SGD([*model.parameters(), *predictor.parameters()], lr=0.1)
    parts = [bank, predictor, plain]
    dry = swap(model, outside=parts, optimizer=optimizer, dry_run=True)
    assert bank.bank is old[0]
    done = swap(model, outside=parts, optimizer=optimizer)
    assert dry.report == done.report
    assert done.report.rebuilt == ("outside.0", "outside.1")
    assert any("CrossEntropyLoss in outside holds nothing of 8" in n for n in done.report.notes)
    assert (bank.size, bank.bank.shape, bank.statistic.shape) == ([32, NEW], (32, NEW), (1, NEW))
    assert torch.allclose(bank.bank.norm(dim=1), torch.ones(32))
    assert "bank" not in bank.state_dict()
    z = model.projector(model.backbone(torch.rand(7, B)))
    start = predictor[0].weight.detach().clone()
    (bank(predictor(z)) + predictor(z).square().mean()).backward()
    optimizer.step()
    assert not torch.equal(predictor[0].weight, start)
    done.restore()
    assert (bank.bank, bank.statistic, predictor[0], predictor[0].weight) == old
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert held == {id(p) for p in (*model.parameters(), *predictor.parameters())}
    z = model.projector(model.backbone(torch.rand(7, B)))
    assert bank(predictor(z)).isfinite()


class Probed(nn.Module):
    """A model whose prototypes have a name of their own, beside a probe of the representation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.backbone = nn.Linear(B, OLD), nn.Linear(OLD, H)
        self.projector, self.codes = nn.Linear(H, OLD), nn.Linear(OLD, 12, bias=False)
        self.probe = nn.Linear(H, 5)
        self.parts = nn.ModuleDict({"norm": nn.BatchNorm1d(OLD), "rest": nn.Linear(4, 4)})


def test_layers_of_the_old_width_under_unknown_names_are_named_and_can_be_passed() -> None:
    model = Probed()
    codes, weight = model.codes, model.codes.weight
    model.backbone = nn.Sequential(model.stem, nn.ReLU(), model.backbone)
    del model.stem
    with pytest.warns(UserWarning, match=r"has 6: codes \(Linear\), parts\.norm \("):
        swap(model).restore()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    done = swap(model, outside=[codes, model.parts["norm"]], optimizer=optimizer)
    assert done.report.rebuilt == ("outside.0", "outside.1")
    assert (done.report.notes, model.codes) == ((), codes)
    assert (codes.weight.shape, model.parts["norm"].num_features) == ((12, NEW), NEW)
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert held == {id(p) for p in model.parameters()}
    done.restore()
    assert codes.weight is weight


def test_what_may_take_the_representation_as_well_is_not_named() -> None:
    model = nn.Module()
    model.projector, model.probe = nn.Linear(H, H), nn.Linear(H, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap(model)


def test_what_is_passed_and_known_already_follows_once() -> None:
    model = model_with(predictor=chain(OLD, 4, OLD))
    model.loss = nn.ModuleDict({"predictor": model.predictor, "rest": nn.ReLU()})
    done = swap(model, outside=[model.loss])
    assert done.report.rebuilt == ("predictor",)
    assert model.loss["predictor"] is model.predictor


def test_one_module_outside_needs_no_list_and_what_is_in_the_model_is_not_outside() -> None:
    bank = Bank(OLD)
    assert swap(model_with(), outside=bank).report.rebuilt == ("outside.0",)
    inside = model_with(predictor=nn.Linear(OLD, OLD))
    assert swap(inside, outside=inside.predictor).report.rebuilt == ("predictor",)


def test_what_is_outside_and_cannot_follow_is_refused_with_the_rest() -> None:
    model, bank = model_with(queue=torch.rand(OLD, OLD)), Bank(OLD)
    bank.register_buffer("square", torch.rand(OLD, OLD))
    before = dict(vars(bank))
    with pytest.raises(DimensionError, match=r"queue \(queue.*outside\.0 \(outside, made for 8\)"):
        swap(model, outside=[bank])
    assert vars(bank) == before


def test_swaps_with_the_same_module_outside_are_undone_in_their_order_only() -> None:
    bank = Bank(OLD)
    first = swap(model_with(), outside=bank)
    second = swap(model_with(), outside=Bank(OLD))
    other = nn.Module()
    other.projector = nn.Linear(H, NEW)
    later = swap(other, 5, outside=bank)
    with pytest.raises(SlotError, match=r"outside\.0 no longer holds.*later one first"):
        first.restore()
    later.restore()
    first.restore()
    second.restore()
    assert bank.bank.shape == (32, OLD)


def test_nothing_outside_changes_where_the_width_does_not() -> None:
    bank = Bank(OLD)
    content = vars(bank)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = swap(model_with(), OLD, outside=bank)
    assert vars(bank) is content
    assert (done.report.rebuilt, done.report.notes) == ((), ())


def test_what_may_belong_to_either_of_two_heads_is_asked_for() -> None:
    from lightly.loss import NTXentLoss

    def model() -> nn.Module:
        heads = {name: nn.Linear(H, OLD) for name in ("head_g", "head_l")}
        losses = {name: NTXentLoss(memory_bank_size=(4, OLD)) for name in ("loss1", "loss2")}
        return nn.ModuleDict({"backbone": nn.Linear(B, H), **heads, **losses})

    def swapped(model: nn.Module, **arguments: Any) -> Any:
        projectors = nn.ModuleDict(
            {"projector": model["head_g"], "projection_head": model["head_l"]}
        )
        whole = nn.ModuleDict({**projectors, **{k: model[k] for k in ("loss1", "loss2")}})
        return whole, swap_head(
            whole, "simclr_plain", slot="projection_head", twin=None, output_dim=NEW, **arguments
        )

    parts = model()
    with pytest.raises(
        DimensionError, match=r"loss1\.memory_bank .*'projection_head' or for 'proj"
    ):
        swapped(parts)
    assert [parts[k].memory_bank.size[1] for k in ("loss1", "loss2")] == [OLD, OLD]
    whole, swap = swapped(parts, outside=[parts["loss2"]])
    assert [whole[k].memory_bank.size[1] for k in ("loss1", "loss2")] == [OLD, NEW]
    assert "outside" not in str(swap.report)


def test_a_report_has_no_warning_where_all_has_followed() -> None:
    model = model_with(predictor=chain(OLD, 4, OLD))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not swap(model).report.notes
    (note,) = swap(model_with()).report.notes
    assert "fails at the first batch" in note


def test_another_model_with_a_head_of_its_own_is_not_named() -> None:
    from lightly.models.modules import BYOLPredictionHead

    other = model_with(prediction_head=BYOLPredictionHead(OLD, 4, OLD))
    other.projector = chain(H, 4, OLD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap(model_with())
    assert other.projector
