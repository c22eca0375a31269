"""Swapping heads in plain PyTorch models: what is found, what is refused, what is left behind."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headplug import ProjectionHead, create_head, find_slots, register_head, swap_head
from headplug.errors import (
    DimensionError,
    HeadplugError,
    OptionError,
    SlotError,
    UnknownNameError,
)
from headplug.heads import HEADS
from headplug.hosts import Dependent, HeadSlot
from headplug.swap.records import records

B, H, Z = 6, 16, 8  # backbone input, representation, projection


def mlp(fan_in: int = H, hidden: int = 24, fan_out: int = Z) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(fan_in, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, fan_out)
    )


def frozen_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).requires_grad_(False)


def holder(**children: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, child in children.items():
        model.add_module(name, child)
    return model


def simclr(name: str = "projector") -> nn.Module:
    return holder(backbone=nn.Linear(B, H), **{name: mlp()})


def byol(head: str = "projector", twin: str = "momentum_projector", **more: nn.Module) -> nn.Module:
    backbone, projector = nn.Linear(B, H), mlp()
    children = {
        "backbone": backbone,
        "backbone_momentum": frozen_copy(backbone),
        head: projector,
        twin: frozen_copy(projector),
    }
    return holder(**children, **more)


class Photograph:
    """Everything of a model that a refused or undone swap must leave as it was."""

    def __init__(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        self.model, self.optimizers = model, optimizers
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.order = [p for p, _ in model.named_modules(remove_duplicate=False)]
        self.state = {k: v.clone() for k, v in model.state_dict().items()}
        self.tensors = {n: id(t) for n, t in self._named()}
        self.flags = {n: t.requires_grad for n, t in model.named_parameters()}
        self.modes = {p: m.training for p, m in self.modules.items()}
        self.groups = [[list(g["params"]) for g in o.param_groups] for o in optimizers]
        self.saved = [copy.deepcopy(o.state_dict()) for o in optimizers]
        self.random = torch.get_rng_state()

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters(remove_duplicate=False)
        yield from self.model.named_buffers(remove_duplicate=False)

    def compare(self) -> None:
        now = dict(self.model.named_modules(remove_duplicate=False))
        assert list(now) == self.order
        assert all(now[p] is m for p, m in self.modules.items())
        state = self.model.state_dict()
        assert list(state) == list(self.state)
        for key, value in state.items():
            assert value.dtype == self.state[key].dtype
            assert value.device == self.state[key].device
            assert value.is_meta or torch.equal(value, self.state[key])
        assert {n: id(t) for n, t in self._named()} == self.tensors
        assert {n: t.requires_grad for n, t in self.model.named_parameters()} == self.flags
        assert {p: m.training for p, m in now.items()} == self.modes
        for optimizer, groups, saved in zip(self.optimizers, self.groups, self.saved, strict=True):
            for group, params in zip(optimizer.param_groups, groups, strict=True):
                assert [id(p) for p in group["params"]] == [id(p) for p in params]
            assert_same_state(optimizer.state_dict(), saved)
        assert torch.equal(torch.get_rng_state(), self.random)


def assert_same_state(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for key, values in a["state"].items():
        for name, value in values.items():
            other = b["state"][key][name]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other


def storages(module: nn.Module) -> set[int]:
    tensors = [*module.parameters(), *module.buffers()]
    return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


def assert_twin(head: nn.Module, twin: nn.Module) -> None:
    assert type(twin) is type(head)
    assert twin is not head
    ours, theirs = head.state_dict(), twin.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not storages(head) & storages(twin)
    assert not any(p.requires_grad for p in twin.parameters())
    assert [n for n, _ in head.named_buffers()] == [n for n, _ in twin.named_buffers()]


# finding


@pytest.mark.parametrize("name", ["projector", "projection_head", "projection", "proj_head"])
def test_head_is_found_by_its_name_and_replaced(name: str) -> None:
    model = simclr(name)
    (slot,) = find_slots(model)
    assert (slot.path, slot.role, slot.input_dim, slot.output_dim) == (name, "projection", H, Z)
    swap = swap_head(model, "simclr_plain")
    assert model.get_submodule(name) is swap.head
    assert (swap.head.input_dim, swap.head.output_dim) == (H, Z)
    assert swap.head(torch.rand(5, H)).shape == (5, Z)


@pytest.mark.parametrize(
    ("build", "path"),
    [
        (lambda: holder(net=nn.Linear(B, H), odd=mlp()), "odd"),
        (lambda: holder(a=holder(b=holder(c=mlp(), d=nn.ReLU()))), "a.b.c"),
        (lambda: nn.Sequential(nn.Linear(B, H), nn.ReLU(), mlp()), "2"),
        (lambda: holder(heads=nn.ModuleList([nn.Identity(), mlp()])), "heads.1"),
        (lambda: holder(parts=nn.ModuleDict({"f": nn.Linear(B, H), "g": mlp()})), "parts.g"),
        (lambda: holder(parts=nn.ModuleDict({"head": nn.Sequential(mlp())})), "parts.head.0"),
        (lambda: holder(g=nn.Linear(H, Z)), "g"),
    ],
)
def test_a_named_path_is_swapped_wherever_it_lies(
    build: Callable[[], nn.Module], path: str
) -> None:
    model = build()
    before = Photograph(model)
    swap = swap_head(model, "simclr_plain", slot=path)
    assert model.get_submodule(path) is swap.head
    assert [p for p, _ in model.named_modules() if not p.startswith(path + ".")] == [
        p for p in before.order if not p.startswith(path + ".")
    ]
    swap.restore()
    before.compare()


def test_a_sequential_still_runs_with_the_new_head() -> None:
    model = nn.Sequential(nn.Linear(B, H), mlp(), nn.Linear(Z, 3))
    swap_head(model, "simclr_plain", slot="1")
    assert model(torch.rand(4, B)).shape == (4, 3)


def test_a_slot_from_find_slots_can_be_passed() -> None:
    model = byol()
    (slot,) = find_slots(model)
    swap = swap_head(model, "simclr_plain", slot=slot)
    assert swap.report.twin_paths == ("momentum_projector",)


def test_several_heads_are_listed_with_the_argument_that_chooses() -> None:
    model = holder(projector=mlp(), projection_head=mlp(fan_out=5))
    with pytest.raises(SlotError) as caught:
        swap_head(model, "simclr_plain")
    for word in ("2 known", "projector (projection, 16 > 8)", "projection_head", "slot="):
        assert word in str(caught.value)


def vit(pixels: int = 192, dim: int = H, **parts: nn.Module) -> nn.Module:
    """A backbone that takes patches of 8 x 8 x 3, hidden layers as wide as their pixels inside."""
    blocks = nn.Sequential(nn.Linear(dim, pixels), nn.GELU(), nn.Linear(pixels, dim))
    encoder = holder(patches=nn.Conv2d(3, dim, 8, 8), blocks=blocks)
    return holder(encoder=encoder, **parts)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (vit(out=nn.Linear(H, 192)), r"'out' \(Linear\) gives the 192 pixels of a patch"),
        (vit(dec=nn.Sequential(nn.Linear(H, 4), nn.Linear(4, 192))), r"'dec' \(Sequential\) gives"),
        (vit(decoder_pred=nn.Linear(H, 7)), r"'decoder_pred' \(Linear\) seems to give the input"),
        (holder(model=vit(out=nn.Linear(H, 192))), r"'model\.out' \(Linear\) gives"),
        (vit(dim=192, decoder=nn.Linear(192, 192)), r"'decoder' \(Linear\) seems"),
    ],
)
def test_what_is_trained_by_reconstruction_is_refused_with_the_reason(
    model: nn.Module, words: str
) -> None:
    for call in (find_slots, lambda m: swap_head(m, "simclr_plain")):
        with pytest.raises(SlotError, match=rf"reconstruction .*no projection head.*{words}.*tap"):
            call(model)
    model.projector = mlp()
    assert swap_head(model, "simclr_plain").report.paths == ("projector",)


@pytest.mark.parametrize(
    "model",
    [
        vit(),
        vit(dim=192, g=nn.Linear(192, 192)),
        vit().encoder,
        holder(backbone=nn.Sequential(nn.Conv2d(3, 8, 2, 2)), fc=nn.Linear(8, 10)),
    ],
)
def test_a_bare_backbone_is_not_taken_for_a_masked_autoencoder(model: nn.Module) -> None:
    assert find_slots(model) == []
    with pytest.raises(SlotError, match=r"no known projection heads; .*A bare backbone"):
        swap_head(model, "simclr_plain")


def test_a_head_without_widths_is_named_with_what_to_say() -> None:
    model = holder(backbone=nn.Linear(B, H), projector=nn.Identity())
    with pytest.raises(SlotError, match=r"'projector' is a Identity whose widths are unknown"):
        swap_head(model, "simclr_plain")
    model.projector.input_dim = model.projector.output_dim = H
    assert swap_head(model, "simclr_plain").report.output_dim == H


def test_other_heads_are_shown_where_there_is_no_projection_head() -> None:
    model = holder(backbone=nn.Linear(B, H), predictor=mlp(H, 24, H))
    with pytest.raises(SlotError, match=r"It has predictor \(prediction, 16 > 16\)"):
        swap_head(model, "simclr_plain")


def test_no_head_names_the_modules_and_the_argument() -> None:
    model = holder(trunk=nn.Linear(B, H), stem=nn.Linear(H, H))
    with pytest.raises(SlotError, match=r"no known.*trunk, stem.*slot="):
        swap_head(model, "simclr_plain")


def test_an_unknown_path_shows_the_closest() -> None:
    with pytest.raises(UnknownNameError, match=r"'projektor'.*projector"):
        swap_head(simclr(), "simclr_plain", slot="projektor")


def test_widths_that_cannot_be_read_can_be_said() -> None:
    model = holder(backbone=nn.Linear(B, H), projector=nn.Identity())
    before = Photograph(model)
    with pytest.raises(SlotError, match=r"model\.projector\.input_dim"):
        swap_head(model, "simclr_plain", slot="projector")
    before.compare()
    model.projector.input_dim = model.projector.output_dim = H
    assert swap_head(model, "simclr_plain", slot="projector", output_dim=4).head.output_dim == 4


def test_a_lazy_head_has_no_widths_yet() -> None:
    with pytest.raises(SlotError, match="widths are unknown"):
        swap_head(holder(projector=nn.LazyLinear(Z)), "simclr_plain", slot="projector")


def test_a_lazy_backbone_does_not_hinder() -> None:
    model = holder(backbone=nn.LazyLinear(H), projector=nn.Linear(H, Z))
    assert swap_head(model, "simclr_plain").report.paths == ("projector",)


@pytest.mark.parametrize("names", [("projector", "g", "h"), ("g", "h", "projector")])
def test_a_head_under_three_names_is_one_slot_and_all_are_replaced(names: tuple[str, ...]) -> None:
    head = mlp()
    model = holder(backbone=nn.Linear(B, H), **dict.fromkeys(names, head))
    before = Photograph(model)
    (slot,) = find_slots(model)
    assert {slot.path, *slot.aliases} == set(names)
    for asked in (None, *names):
        with swap_head(model, "simclr_plain", slot=asked) as swap:
            assert set(swap.report.paths) == set(names)
            assert all(model.get_submodule(n) is swap.head for n in names)
        before.compare()


# twins


@pytest.mark.parametrize(
    ("head", "twin"),
    [
        ("projector", "momentum_projector"),
        ("projection_head", "projection_head_momentum"),
        ("projection_head", "teacher_projection_head"),
        ("anchor_projection_head", "projection_head"),  # MSN: the plain name is the copy
        ("student_head", "teacher_head"),
        ("projector", "g"),
    ],
)
@pytest.mark.parametrize("name", ["simclr_plain", "byol", "ae_embedding", "reweighting"])
def test_head_and_twin_change_together(head: str, twin: str, name: str) -> None:
    model = byol(head, twin)
    model.get_submodule(twin).eval()
    slot = head if head in ("student_head", "anchor_projection_head") else None
    same = {"slot": slot, "output_dim": H if name == "reweighting" else Z}
    swap = swap_head(model, name, **same)
    assert (swap.report.paths, swap.report.twin_paths) == ((head,), (twin,))
    assert model.get_submodule(twin) is swap.twin
    assert_twin(swap.head, swap.twin)
    assert swap.head.training
    assert not swap.twin.training


def test_an_independently_drawn_twin_is_found_too() -> None:
    model = holder(projector=mlp(), target_projector=mlp().requires_grad_(False))
    assert find_slots(model)[0].twin == "target_projector"


def test_twin_of_a_whole_copied_encoder() -> None:
    online = holder(net=nn.Linear(B, H), projector=mlp())
    model = holder(online=online, target=frozen_copy(online))
    swap = swap_head(model, "simclr_plain")
    assert swap.report.paths == ("online.projector",)
    assert swap.report.twin_paths == ("target.projector",)


def test_twin_deep_in_an_averaged_copy_is_found_by_its_values() -> None:
    model = simclr()
    model.add_module("averaged", holder(module=holder(net=frozen_copy(model.projector))))
    assert find_slots(model)[0].twin == "averaged.module.net"


def test_twins_of_two_equal_heads_are_told_apart() -> None:
    model = holder(
        projection_head_global=mlp(),
        projection_head_local=mlp(),
        projection_head_local_momentum=mlp().requires_grad_(False),
        projection_head_global_momentum=mlp().requires_grad_(False),
    )
    for which in ("global", "local"):
        swap = swap_head(model, "simclr_plain", slot=f"projection_head_{which}")
        assert swap.report.twin_paths == (f"projection_head_{which}_momentum",)


def test_a_frozen_layer_of_the_backbone_is_not_taken_for_a_twin() -> None:
    backbone = nn.Sequential(nn.Linear(Z, Z), nn.ReLU(), nn.Linear(Z, Z)).requires_grad_(False)
    model = holder(backbone=backbone, projector=nn.Linear(Z, Z))
    swap = swap_head(model, "simclr_plain")
    assert (swap.twin, swap.report.slot.twin) == (None, None)
    assert model.backbone is backbone


def test_a_frozen_sibling_of_the_same_shape_is_asked_about() -> None:
    model = nn.Sequential(nn.Linear(Z, Z).requires_grad_(False), nn.ReLU(), nn.Linear(Z, Z))
    before = Photograph(model)
    with pytest.raises(SlotError, match="twin=None"):
        swap_head(model, "simclr_plain", slot="2")
    before.compare()
    assert swap_head(model, "simclr_plain", slot="2", twin=None).twin is None


@pytest.mark.parametrize("slot", [None, "projector", "target_projector"])
def test_two_trained_copies_need_the_argument_that_settles_it(slot: str | None) -> None:
    projector = mlp()
    model = holder(projector=projector, target_projector=copy.deepcopy(projector))
    before = Photograph(model)
    with pytest.raises(SlotError) as caught:
        swap_head(model, "simclr_plain", slot=slot)
    for word in ("projector", "target_projector", "requires_grad=False", "twin=", "twin=None"):
        assert word in str(caught.value)
    before.compare()
    swap = swap_head(model, "simclr_plain", slot="projector", twin="target_projector")
    assert swap.report.twin_paths == ("target_projector",)
    assert_twin(swap.head, swap.twin)


def test_two_trained_copies_under_names_that_are_not_known_are_asked_about() -> None:
    head = mlp()
    model = holder(projector=head, g=copy.deepcopy(head))
    with pytest.raises(SlotError, match="alike"):
        swap_head(model, "simclr_plain")


def test_a_model_frozen_as_a_whole_does_not_say_which_copy_is_which() -> None:
    model = byol().requires_grad_(False)
    with pytest.raises(SlotError, match="twin="):
        swap_head(model, "simclr_plain", slot="projector")


def test_naming_the_copy_points_to_the_trained_head() -> None:
    model = byol()
    before = Photograph(model)
    with pytest.raises(SlotError, match=r"EMA twin of 'projector'.*slot='projector'"):
        swap_head(model, "simclr_plain", slot="momentum_projector")
    with pytest.raises(SlotError, match=r"slot='projector\.3'"):
        swap_head(model, "simclr_plain", slot="momentum_projector.3")
    before.compare()


def test_explicit_twins() -> None:
    model = byol("projector", "elsewhere")
    swap = swap_head(model, "simclr_plain", twin="elsewhere")
    assert model.elsewhere is swap.twin
    swap.restore()
    copied = model.elsewhere
    assert swap_head(model, "simclr_plain", twin=None).twin is None
    assert model.elsewhere is copied


@pytest.mark.parametrize(
    ("twin", "error"),
    [("projector", SlotError), ("nowhere", UnknownNameError), ("backbone", DimensionError)],
)
def test_an_impossible_twin_is_refused(twin: str, error: type[HeadplugError]) -> None:
    model = byol()
    before = Photograph(model)
    with pytest.raises(error):
        swap_head(model, "simclr_plain", twin=twin)
    before.compare()


def test_dependents_are_seen_with_an_explicit_twin_too() -> None:
    model = byol(predictor=nn.Linear(Z, Z))
    for twin in (None, "momentum_projector"):
        swap = swap_head(model, "simclr_plain", slot="projector", twin=twin, output_dim=Z + 1)
        assert swap.report.rebuilt == ("predictor",)
        assert model.predictor.weight.shape == (Z + 1, Z + 1)
        swap.restore()


@pytest.mark.parametrize("name", ["reweighting", "identity"])
def test_frozen_heads_are_swapped_again_with_their_twins(name: str) -> None:
    model = byol("projection_head", "g")
    swap_head(model, name, output_dim=H)
    (slot,) = find_slots(model)
    assert slot.twin == "g"
    swap = swap_head(model, "simclr_plain")
    assert model.g is swap.twin
    assert_twin(swap.head, swap.twin)


def test_a_twin_can_be_made_of_a_weight_normed_head() -> None:
    model = byol()
    head = nn.Sequential(nn.Linear(H, 4), nn.utils.weight_norm(nn.Linear(4, Z, bias=False)))
    swap = swap_head(model, head)
    assert_twin(head, swap.twin)
    x = torch.rand(3, H)
    assert torch.equal(head(x), swap.twin(x))


def test_a_twin_has_the_buffers_that_are_not_saved_as_well() -> None:
    class Random(nn.Linear):
        def __init__(self) -> None:
            super().__init__(H, Z)
            self.register_buffer("drawn", torch.rand(Z), persistent=False)

    swap = swap_head(byol(), Random())
    assert torch.equal(swap.head.drawn, swap.twin.drawn)
    assert not storages(swap.head) & storages(swap.twin)


def test_a_subclass_that_is_not_registered_keeps_its_class_in_the_twin() -> None:
    class Scaled(type(create_head("mlp", input_dim=H))):
        def project(self, x: Tensor) -> Tensor:
            return 2 * super().project(x)

    swap = swap_head(byol(), Scaled(H, Z, norm="none"))
    x = torch.rand(3, H)
    assert torch.equal(swap.head(x), swap.twin(x))


def test_a_head_that_cannot_be_copied_is_built_twice_or_refused() -> None:
    class Stubborn(ProjectionHead):
        name = "stubborn"

        def __init__(self, input_dim: int, output_dim: int = Z) -> None:
            super().__init__(input_dim, output_dim)
            self.layers = nn.Linear(input_dim, output_dim)

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise TypeError("no copies")

    class Nameless(nn.Linear):
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise TypeError("no copies")

    register_head("stubborn", Stubborn)
    try:
        swap = swap_head(byol(), "stubborn")
        assert_twin(swap.head, swap.twin)
    finally:
        del HEADS._entries["stubborn"]
    model, nameless = byol(), Nameless(H, Z)
    before = Photograph(model)
    with pytest.raises(SlotError, match="Register"):
        swap_head(model, nameless)
    before.compare()


# device, dtype, mode


@pytest.mark.parametrize("name", ["simclr_plain", "simclr", "ae_embedding"])
def test_new_heads_take_the_dtype_of_the_old(name: str) -> None:
    model = byol().to(torch.bfloat16)
    swap = swap_head(model, name)
    for module in (swap.head, swap.twin):
        assert {t.dtype for t in module.parameters()} == {torch.bfloat16}
    assert_twin(swap.head, swap.twin)


def test_a_head_after_a_float32_reweighting_takes_the_models_dtype() -> None:
    model = simclr().to(torch.bfloat16)
    swap_head(model, "reweighting", output_dim=H)
    swap = swap_head(model, "simclr_plain")
    assert {p.dtype for p in swap.head.parameters()} == {torch.bfloat16}


def test_new_heads_go_to_the_meta_device_with_the_model() -> None:
    model = byol().to("meta")
    swap = swap_head(model, "simclr")
    for module in (swap.head, swap.twin):
        assert all(t.is_meta for t in (*module.parameters(), *module.buffers()))


def test_new_heads_do_not_follow_the_default_device() -> None:
    model = byol()
    with torch.device("meta"):
        swap = swap_head(model, "simclr")
    assert not any(t.is_meta for m in (swap.head, swap.twin) for t in m.state_dict().values())


@pytest.mark.parametrize("training", [True, False])
def test_new_heads_take_the_mode_of_the_old(training: bool) -> None:
    model = byol()
    model.projector.train(training)
    model.momentum_projector.train(not training)
    swap = swap_head(model, "simclr")
    assert all(m.training is training for m in swap.head.modules())
    assert all(m.training is not training for m in swap.twin.modules())


# dependents and refusals


class Moco(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.projector = nn.Linear(B, H), mlp()
        self.momentum_projector = frozen_copy(self.projector)
        self.register_buffer("queue", torch.rand(2, Z, 32))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.projection_head = nn.Linear(B, H), mlp()
        self.prototypes = nn.Parameter(torch.rand(12, Z))
        self.pos_embed = nn.Parameter(torch.rand(1, 4, Z))


@pytest.mark.parametrize(
    ("build", "dependents"),
    [
        (lambda: byol(predictor=mlp(Z, 4, Z)), [Dependent("predictor", "prediction", Z)]),
        (lambda: byol(prediction_head=nn.Linear(Z, Z)), ["prediction_head"]),
        (lambda: holder(projector=mlp(), prototypes=nn.Linear(Z, 12)), ["prototypes"]),
        (Moco, [Dependent("queue", "queue", Z)]),
        (Masked, [Dependent("prototypes", "prototypes", Z)]),
        (simclr, []),
        (lambda: holder(projector=mlp(), predictor=nn.Linear(Z + 1, 4)), []),
    ],
)
def test_what_follows_the_old_width_is_named_and_follows_the_new(
    build: Callable[[], nn.Module], dependents: list[Any]
) -> None:
    model = build()
    (slot,) = [s for s in find_slots(model) if s.role == "projection"]
    paths = [d if isinstance(d, str) else d.path for d in dependents]
    assert [d.path for d in slot.dependents] == paths
    assert all(d in slot.dependents for d in dependents if isinstance(d, Dependent))
    before = Photograph(model)
    planned = swap_head(model, "simclr_plain", dry_run=True, output_dim=5)
    before.compare()
    swap = swap_head(model, "simclr_plain", output_dim=5)
    assert planned.report == swap.report
    assert swap.report.rebuilt == tuple(paths)
    if paths:
        assert f"made anew for 5 features: {', '.join(paths)}" in str(swap.report)
    assert [(d.path, d.width) for d in find_slots(model)[0].dependents] == [(p, 5) for p in paths]
    state = model.state_dict()
    followed = tuple(paths)
    rest = [k for k in before.state if not k.startswith((slot.path, "momentum_", *followed))]
    assert all(torch.equal(state[k], before.state[k]) for k in rest)
    assert {k for k in state if k.startswith(followed)} == {
        k for k in before.state if k.startswith(followed)
    }
    swap.restore()
    before.compare()


def test_the_next_layers_of_a_sequential_depend_on_the_head() -> None:
    model = nn.Sequential(
        nn.Linear(B, H), mlp(), nn.BatchNorm1d(Z), nn.ReLU(), nn.Linear(Z, 3), nn.Linear(3, Z)
    )
    last = model[5]
    before = Photograph(model)
    with swap_head(model, "simclr_plain", slot="1", output_dim=5) as swap:
        assert swap.report.rebuilt == ("2", "4")
        assert model(torch.ones(4, B)).shape == (4, Z)
        assert model[5] is last
    before.compare()


def test_a_predictor_is_tied_to_the_projection_it_predicts() -> None:
    model = byol(predictor=mlp(Z, 4, Z))
    before = Photograph(model)
    with pytest.raises(DimensionError, match=r"projector \(projection, made for 8\)"):
        swap_head(model, "simclr_plain", slot="predictor", output_dim=5)
    before.compare()
    assert swap_head(model, "simclr_plain", slot="predictor").report.paths == ("predictor",)


def test_a_new_width_without_dependents_is_allowed_and_noted() -> None:
    swap = swap_head(simclr(), "simclr_plain", output_dim=5)
    assert swap.head.output_dim == 5
    assert any("from 8 to 5" in note for note in swap.report.notes)


def refused(**kwargs: Any) -> tuple[dict[str, Any], type[HeadplugError]]:
    error = kwargs.pop("error")
    return kwargs, error


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        refused(head="simclr_plain", input_dim=H + 1, error=DimensionError),
        refused(head={"name": "simclr_plain", "input_dim": H + 1}, error=DimensionError),
        refused(head="simclr_plain", output_dim=0, error=OptionError),
        refused(head="simclr_plane", error=UnknownNameError),
        refused(head="simclr_plain", hiden_dim=4, error=OptionError),
        refused(head="reweighting", output_dim=Z, error=HeadplugError),
        refused(head="reweighting", error=DimensionError),  # H features: Conv1d cannot follow
        refused(head={"input_dim": H}, error=OptionError),
        refused(head=7, error=OptionError),
        refused(head=nn.Linear(H + 1, Z), error=DimensionError),
        refused(head=nn.Linear(H, Z + 1), error=DimensionError),
        refused(head=nn.Linear(H, Z), output_dim=Z, error=OptionError),
        refused(head=nn.ReLU(), error=DimensionError),
        refused(head="simclr_plain", slot="projector.1", error=SlotError),
        refused(head="ae_embedding", weights=nn.Linear(H + 1, 4), error=HeadplugError),
        refused(head="ae_embedding", weights="nowhere.safetensors", error=HeadplugError),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_refused_swap_leaves_no_trace(
    arguments: dict[str, Any], error: type[HeadplugError], dry_run: bool
) -> None:
    model = byol(predictor=mlp(Z, 4, Z), prototypes=mixed())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = Photograph(model, optimizer)
    with pytest.raises(error):
        swap_head(model, **arguments, dry_run=dry_run, optimizer=optimizer)
    before.compare()


def mixed() -> nn.Module:
    """Prototypes that no rule can make for another width."""
    return nn.Sequential(nn.Conv1d(Z, 4, 1), nn.Flatten(), nn.Linear(Z, 4))


def test_a_wrong_width_says_both() -> None:
    with pytest.raises(DimensionError, match=r"17 features.*16.*input_dim=16"):
        swap_head(simclr(), nn.Linear(H + 1, Z))


def test_a_wrapped_model_is_refused() -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(simclr())
        before = Photograph(model)
        with pytest.raises(SlotError, match=r"DistributedDataParallel.*then wrap"):
            swap_head(model, "simclr_plain")
        before.compare()
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_that_does_not_let_modules_be_set_is_left_as_it_was() -> None:
    class Guarded(nn.Module):
        sealed = False

        def __init__(self) -> None:
            super().__init__()
            self.projector = mlp()
            self.momentum_projector = frozen_copy(self.projector)
            self.sealed = True

        def __setattr__(self, name: str, value: Any) -> None:
            if self.sealed and name == "momentum_projector":
                raise AttributeError("read only")
            super().__setattr__(name, value)

    model = Guarded()
    before = Photograph(model)
    with pytest.raises(SlotError, match=r"momentum_projector.*read only"):
        swap_head(model, "simclr_plain")
    before.compare()


# after a swap


def test_a_swap_leaves_the_random_state_as_it_was() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    swap_head(byol(), "simclr_plain", dry_run=True)
    torch.manual_seed(3)
    model = byol()
    state = torch.get_rng_state()
    swap_head(model, "simclr")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), expected)


def test_the_same_seed_draws_the_same_head() -> None:
    heads = []
    for _ in range(2):
        torch.manual_seed(5)
        heads.append(swap_head(simclr(), "simclr").head)
    first, second = (h.state_dict() for h in heads)
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    "head",
    ["simclr_plain", {"name": "byol", "hidden_dim": 4}, nn.Linear(H, Z), "reweighting"],
)
def test_a_dry_run_changes_nothing_and_reports_the_same(head: Any) -> None:
    model = byol()
    optimizer = torch.optim.Adam(model.projector.parameters())
    before = Photograph(model, optimizer)
    built = copy.deepcopy(head)
    planned = swap_head(model, built, dry_run=True, optimizer=optimizer)
    before.compare()
    if isinstance(built, nn.Module):
        assert dict(built.named_parameters()).keys() == dict(head.named_parameters()).keys()
    planned.restore()
    before.compare()
    done = swap_head(model, built, optimizer=optimizer)
    assert planned.report == done.report
    assert str(planned.report) == str(done.report)


def test_a_dry_run_does_not_move_a_built_head() -> None:
    head = nn.Linear(H, Z).eval()
    swap_head(byol().to(torch.float64), head, dry_run=True)
    assert head.weight.dtype == torch.float32
    assert not head.training


@pytest.mark.parametrize("name", ["simclr", "ae_embedding", "reweighting", "identity"])
def test_restore_gives_back_the_very_same_modules(name: str) -> None:
    model = byol()
    before = Photograph(model)
    swap = swap_head(model, name, output_dim=H if name in ("reweighting", "identity") else Z)
    swap.restore()
    before.compare()
    swap.restore()  # a second time is nothing
    before.compare()


def test_a_swap_is_undone_at_the_end_of_a_block() -> None:
    model = byol()
    before = Photograph(model)
    with swap_head(model, "simclr_plain") as swap:
        assert model.projector is swap.head
    before.compare()
    with pytest.raises(KeyError), swap_head(model, "simclr_plain"):
        raise KeyError
    before.compare()


def test_swaps_are_undone_in_their_order_only() -> None:
    model = byol()
    before = Photograph(model)
    first = swap_head(model, "simclr_plain")
    second = swap_head(model, "byol", hidden_dim=4)
    with pytest.raises(SlotError, match=r"projector no longer holds.*later one first"):
        first.restore()
    assert model.projector is second.head
    second.restore()
    assert model.projector is first.head
    first.restore()
    before.compare()


def test_the_report_says_what_was_done_and_goes_through_json() -> None:
    model = byol(predictor=mlp(Z, 4, Z))
    old = sum(p.numel() for p in model.projector.parameters())
    report = swap_head(model, "ae_embedding", embedding_dim=4, weights=nn.Linear(H, 4)).report
    text = str(report)
    for words in ("projector: Sequential (16 > 8) becomes ae_embedding (16 > 8)", f"{old:,}"):
        assert words in text
    assert "EMA twin: momentum_projector" in text
    data = json.loads(json.dumps(report.as_dict()))
    assert data["slot"]["dependents"] == [
        {"path": "predictor", "kind": "prediction", "width": 8, "twin": None, "limit": None,
         "rivals": []}
    ]  # fmt: skip
    assert data["trainable"] == [old, 4 * Z + Z]
    assert data["frozen"] == [0, H * 4 + 4]  # fixed weights; running statistics are none
    assert create_head(data["new"]).config == data["new"]


def test_the_report_warns_of_what_still_refers_to_the_old_head() -> None:
    model = byol()
    model.pairs = [(model.projector, model.momentum_projector)]
    model.projector.register_forward_hook(lambda *_: None)
    notes = " ".join(swap_head(model, "simclr_plain").report.notes)
    assert "'pairs'" in notes
    assert "hooks" in notes


def test_a_built_head_and_a_mapping_are_taken() -> None:
    model = simclr()
    built = nn.Sequential(nn.Linear(H, 4), nn.ReLU(), nn.Linear(4, Z))
    assert swap_head(model, built).head is built
    swap = swap_head(model, {"name": "mlp", "hidden_dim": 5, "norm": "none"}, num_layers=3)
    assert swap.head.config["hidden_dim"] == 5
    assert swap.head.config["num_layers"] == 3
    assert swap.head.output_dim == Z
    omegaconf = pytest.importorskip("omegaconf")
    swap = swap_head(model, omegaconf.OmegaConf.create({"name": "byol", "hidden_dim": 4}))
    assert swap.head.hidden_dim == 4


def test_a_registered_head_that_must_be_given_its_width_gets_the_slots() -> None:
    class Strict(nn.Linear):
        def __init__(self, input_dim: int, output_dim: int) -> None:
            super().__init__(input_dim, output_dim)

    register_head("strict", Strict)
    try:
        assert swap_head(simclr(), "strict").head.out_features == Z
    finally:
        del HEADS._entries["strict"]


def test_a_swapped_model_is_copied_and_pickled_with_its_twin() -> None:
    model = byol()
    swap_head(model, "reweighting", output_dim=H)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (slot,) = find_slots(again)
        assert slot.twin == "momentum_projector"


PATHS = st.sampled_from(["projector", "projection_head", "proj_head"])
WIDTH = st.integers(1, 40)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(
        ["mlp", "simclr", "simclr_plain", "byol", "simsiam", "moco_v3", "ae_embedding"]
    ),
    path=PATHS,
    paired=st.booleans(),
    fan_in=WIDTH,
    fan_out=WIDTH,
    output_dim=st.none() | WIDTH,
)
def test_only_the_head_differs_after_a_swap(
    name: str, path: str, paired: bool, fan_in: int, fan_out: int, output_dim: int | None
) -> None:
    head = mlp(fan_in, 3, fan_out)
    model = holder(backbone=nn.Linear(2, fan_in), classifier=nn.Linear(fan_in, 2), **{path: head})
    if paired:
        model.add_module(f"{path}_momentum", frozen_copy(head))
    before = Photograph(model)
    width = {} if output_dim is None else {"output_dim": output_dim}
    swap = swap_head(model, name, **width)
    changed = (f"{path}.", f"{path}_momentum.")
    state = model.state_dict()
    assert {k for k in state if not k.startswith(changed)} == {
        k for k in before.state if not k.startswith(changed)
    }
    assert all(torch.equal(state[k], v) for k, v in before.state.items() if k in state
               and not k.startswith(changed))  # fmt: skip
    assert (swap.twin is not None) is paired
    assert swap.head.output_dim == (fan_out if output_dim is None else output_dim)
    if name != "ae_embedding":
        assert swap.head.eval()(torch.ones(2, fan_in)).shape == (2, swap.head.output_dim)
    swap.head.train()
    swap.restore()
    before.compare()


# optimisers


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.projector(model.backbone(torch.rand(7, B))).square().mean()
        loss.backward()
        optimizer.step()


def make(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "adam, all parameters":
        return torch.optim.Adam(model.parameters(), lr=0.1)
    if kind == "sgd, groups":
        return torch.optim.SGD(
            [
                {"params": list(model.backbone.parameters()), "lr": 0.01},
                {"params": list(model.projector.parameters()), "lr": 0.5, "weight_decay": 0.1},
            ],
            momentum=0.9,
        )
    return torch.optim.AdamW(list(model.named_parameters()), lr=0.1)


KINDS = ["adam, all parameters", "sgd, groups", "adamw, named parameters"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_optimiser_trains_the_new_head_and_gets_the_old_one_back(kind: str) -> None:
    model = byol()
    optimizer = make(kind, model)
    train(model, optimizer)
    before = Photograph(model, optimizer)
    old = [*model.projector.parameters(), *model.momentum_projector.parameters()]
    swap = swap_head(model, "simclr", optimizer=optimizer)

    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert not held & {id(p) for p in old}
    assert held >= {id(p) for p in swap.head.parameters()}
    assert not held & {id(p) for p in swap.twin.parameters()}
    assert not any(p in optimizer.state for p in old)
    weight = swap.head.layers[0].weight
    (home,) = [g for g in optimizer.param_groups if any(p is weight for p in g["params"])]
    assert home["lr"] == (0.5 if "groups" in kind else 0.1)
    if "named" in kind:
        names = dict(zip(home["param_names"], home["params"], strict=True))
        assert names["projector.layers.0.weight"] is swap.head.layers[0].weight
        assert not any(n.startswith("momentum_projector") for n in names)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)

    swap.restore()
    before.compare()
    swap = swap_head(model, "simclr", optimizer=optimizer)
    start = {n: p.clone() for n, p in swap.head.named_parameters()}
    train(model, optimizer)
    assert all(not torch.equal(p, start[n]) for n, p in swap.head.named_parameters())
    assert all(p in optimizer.state for p in swap.head.parameters())
    swap.restore()
    assert not any(p in optimizer.state for p in swap.head.parameters())
    optimizer.state_dict()  # raises where state is left of parameters that no group has
    for group, params in zip(optimizer.param_groups, before.groups[0], strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in params]
    train(model, optimizer)


def test_frozen_parts_of_the_new_head_stay_out_of_the_optimiser() -> None:
    model = simclr()
    optimizer = make("sgd, groups", model)
    swap = swap_head(model, "ae_embedding", weights=nn.Linear(H, 4), optimizer=optimizer)
    embedding = swap.head.embedding.weight.clone()
    train(model, optimizer)
    assert torch.equal(swap.head.embedding.weight, embedding)
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [
        id(p) for p in swap.head.parameters()
    ]
    swap_head(model, "reweighting", optimizer=optimizer, output_dim=H)
    train(model, optimizer)
    assert optimizer.param_groups[1]["params"] == []


@pytest.mark.parametrize("groups", [0, 2])
def test_a_head_in_none_or_several_groups_is_refused(groups: int) -> None:
    model = byol()
    parts = [{"params": list(model.backbone.parameters())}]
    if groups:
        parts += [
            {"params": list(m.parameters())} for m in (model.projector[0], model.projector[3])
        ]
    optimizer = torch.optim.SGD(parts, lr=0.1, momentum=0.9)
    before = Photograph(model, optimizer)
    with pytest.raises(SlotError, match=r"in (no|2) groups.*after the swap"):
        swap_head(model, "simclr_plain", optimizer=optimizer)
    before.compare()


def test_two_swaps_with_one_optimiser_are_undone_in_their_order_only() -> None:
    model = holder(backbone=nn.Linear(B, H), projector=mlp(), projection_head=mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = Photograph(model, optimizer)
    first = swap_head(model, "simclr_plain", slot="projector", optimizer=optimizer)
    second = swap_head(model, "simclr_plain", slot="projection_head", optimizer=optimizer)
    between = Photograph(model, optimizer)
    with pytest.raises(SlotError, match="later one first"):
        first.restore()
    between.compare()
    second.restore()
    first.restore()
    before.compare()


def test_slots_print_as_one_line() -> None:
    assert str(HeadSlot("a.b", "projection", 4, 2, twin="c")) == (
        "a.b (projection, 4 > 2, EMA twin c)"
    )


def test_an_optimiser_that_was_not_passed_is_warned_about():
    model = nn.Sequential()
    model.backbone, model.projector = nn.Linear(4, 8), nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="optimizer="):
        swap = swap_head(model, "simclr_plain")
    assert "optimizer=" in str(swap.report)
    swap.restore()
    assert not swap_head(model, "simclr_plain", optimizer=optimizer).report.notes


def test_the_frozen_copy_is_no_business_of_the_optimiser() -> None:
    model = byol()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="parameters of 'projector': pass it"):
        swap_head(model, "simclr_plain")
    assert len(optimizer.param_groups[0]["params"]) == len(list(byol().parameters()))


@pytest.mark.parametrize("name", ["reweighting", "identity"])
def test_the_optimiser_is_warned_about_after_a_head_without_parameters_too(name: str) -> None:
    model = simclr()
    swap_head(model, name, output_dim=H)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="will not train the new parameters of 'projector'"):
        swap_head(model, "simclr_plain").restore()
    with pytest.raises(SlotError, match="in no groups"):
        swap_head(model, "simclr_plain", optimizer=optimizer)


def test_weights_of_a_whole_model_are_taken_from_the_place_that_is_named() -> None:
    def model() -> nn.Module:
        parts = {"backbone": nn.Linear(4, 6), "projector": nn.Linear(6, 3)}
        heads = {name: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3)) for name in "ab"}
        return nn.ModuleDict(parts | {"predictor": heads["a"], "predictor2": heads["b"]})

    trained, new = model(), model()
    options = {"hidden_dim": 5, "weights": trained}
    for slot in ("predictor2", "predictor"):
        swap = swap_head(new, "simclr_plain", slot=slot, twin=None, **options)
        ours, theirs = swap.head.state_dict().values(), trained[slot].state_dict().values()
        assert all(map(torch.equal, ours, theirs))


def test_an_ema_copy_in_the_script_is_not_left_behind() -> None:
    student = simclr()
    teacher = copy.deepcopy(student).requires_grad_(False)
    before = Photograph(student)
    for outside in ([teacher], teacher.projector):
        with pytest.raises(SlotError, match=r"copy of 'projector'.*nn\.ModuleDict"):
            swap_head(student, "simclr_plain", outside=outside)
        before.compare()
    with pytest.warns(UserWarning, match="EMA copy of 'projector' outside the model"):
        report = swap_head(student, "simclr_plain", dry_run=True).report
    assert "EMA copy" in str(report)
    both = nn.ModuleDict({"model": student, "ema": teacher})
    swap = swap_head(both, "simclr_plain")
    assert swap.report.twin_paths == ("ema.projector",)
    assert type(teacher.projector) is type(student.projector)


def test_a_model_inside_a_data_parallel_wrapper_is_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    try:
        model = simclr()
        wrapper = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(SlotError, match="already wrapped in DistributedDataParallel"):
            swap_head(model, "simclr_plain")
        del wrapper
        swap_head(model, "simclr_plain")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "byol", "head": nn.Linear(2, 2)}, "the model comes first, not 'byol'"),
        ({"head": nn.Linear}, "a head is a name"),
        ({"outside": None}, "outside takes modules .* not None"),
        ({"outside": "criterion"}, "outside takes modules .* not 'criterion'"),
        ({"outside": [nn.Linear]}, "outside takes modules"),
        ({"optimizer": "adam"}, "optimizer is one optimiser .* not 'adam'"),
        ({"optimizer": [torch.optim.SGD([torch.zeros(1)], lr=1)]}, "pass the one that trains"),
        ({"slot": nn.Linear(2, 2)}, "slot is the path of the head, not Linear"),
        ({"twin": nn.Linear(2, 2)}, "twin is the path of the EMA copy, or None, not Linear"),
        ({"model": create_head("byol", input_dim=4)}, "is a head itself"),
    ],
)
def test_arguments_of_a_wrong_kind_are_named(arguments: dict[str, Any], words: str) -> None:
    given = {"model": simclr(), "head": "simclr_plain", **arguments}
    with pytest.raises(OptionError, match=words):
        swap_head(**given)


def test_the_heads_that_are_there_are_recorded() -> None:
    model = byol()
    first = swap_head(model, "simclr_plain")
    whole = nn.ModuleDict({"model": model})
    (record,) = records(whole)
    assert (record["slot"], record["twin"]) == ("model.projector", "model.momentum_projector")
    assert record["head"] == first.head.config
    second = swap_head(model, "reweighting")
    assert [r["head"]["name"] for r in records(model)] == ["reweighting"]
    second.restore()
    assert [r["head"]["name"] for r in records(model)] == ["simclr_plain"]
    assert records(copy.deepcopy(model)) == records(model)
    first.restore()
    assert records(model) == []
