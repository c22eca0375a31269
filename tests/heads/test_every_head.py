"""Properties of every registered head, whatever it is."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headplug import create_head, describe_head, list_heads
from headplug.errors import CheckpointError, DimensionError
from headplug.heads.parameters import param_groups

Build = Callable[..., nn.Module]
State = dict[str, Tensor]

pytestmark = pytest.mark.parametrize("name", list_heads())


def state(head: nn.Module) -> State:
    return {k: v.clone() for k, v in head.state_dict().items()}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def structure(head: nn.Module) -> dict[str, Any]:
    return {k: (v.shape, v.dtype) for k, v in head.state_dict().items()}


def output(head: nn.Module, x: Tensor) -> Tensor:
    """What a head gives; several tensors, of several sets of prototypes, side by side."""
    z = head(x)
    return z if isinstance(z, Tensor) else torch.cat(list(z), dim=-1)


def width(head: nn.Module) -> int:
    widths: int | list[int] = head.output_dim
    return widths if isinstance(widths, int) else sum(widths)


def trained(head: nn.Module, steps: int = 3) -> nn.Module:
    """Takes a few optimiser steps, so that no parameter or statistic has its first value."""
    parameters = list(head.parameters())
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    optimiser = torch.optim.SGD(parameters, **options) if parameters else None
    for _ in range(steps):
        z = output(head.train(), torch.randn(8, head.input_dim).requires_grad_())
        (z * torch.randn_like(z)).sum().backward()
        if optimiser:
            optimiser.step()
            optimiser.zero_grad()
    return head


def test_output_has_the_declared_shape_and_is_finite_float32(name: str, build: Build) -> None:
    head = build(name)
    z = output(head, torch.randn(8, head.input_dim))
    assert z.shape == (8, width(head))
    assert z.dtype == torch.float32
    assert z.isfinite().all()


def test_dims_are_those_asked_for(name: str, build: Build) -> None:
    head = build(name, input_dim=28)
    assert head.input_dim == 28
    expected = describe_head(name).defaults["output_dim"]
    assert head.output_dim == {int: 12, list: [12, 7], type(None): 28}[type(expected)]


def test_loss_reaches_the_input_and_every_trainable_parameter(name: str, build: Build) -> None:
    head = build(name)
    x = torch.randn(8, head.input_dim, requires_grad=True)
    z = output(head, x)
    (z * torch.randn_like(z)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    for parameter, value in head.named_parameters():
        assert (value.grad is not None) == value.requires_grad, parameter
        assert value.grad is None or value.grad.abs().sum() > 0, parameter


def test_config_rebuilds_the_head_from_json_and_omegaconf(name: str, build: Build) -> None:
    head = build(name)
    assert head.config["name"] == name
    for config in (json.loads(json.dumps(head.config)), OmegaConf.create(head.config)):
        again = create_head(config)
        assert again.config == head.config
        assert structure(again) == structure(head)
        assert str(again) == str(head)


def test_state_dict_carries_everything_to_a_rebuilt_head(name: str, build: Build) -> None:
    head = trained(build(name))
    again = create_head(head.config)
    again.load_state_dict(head.state_dict(), strict=True)
    x = torch.randn(8, head.input_dim)
    for mode in (True, False):  # in training mode too: a loaded head trains on
        assert torch.equal(output(again.train(mode), x), output(head.train(mode), x))
    assert same(state(again), state(head))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))])
def test_copies_give_equal_outputs_and_share_nothing(
    name: str, build: Build, how: Callable[[nn.Module], nn.Module]
) -> None:
    head = trained(build(name))
    twin = how(head)
    x = torch.randn(8, head.input_dim)
    assert torch.equal(output(twin, x), output(head, x))
    assert twin.config == head.config
    for a, b in zip(head.state_dict().values(), twin.state_dict().values(), strict=True):
        assert a.data_ptr() != b.data_ptr()


def test_compiles_into_one_graph(name: str, build: Build) -> None:
    head = build(name)
    x = torch.randn(4, 3, head.input_dim)
    expected = output(copy.deepcopy(head), x)
    torch._dynamo.reset()
    assert torch.equal(output(torch.compile(head, fullgraph=True, backend="eager"), x), expected)


def test_exports_for_inference(name: str, build: Build) -> None:
    head = trained(build(name)).eval()
    x = torch.randn(4, head.input_dim)
    exported = torch.export.export(head, (x,)).module()
    assert torch.equal(output(exported, x), output(head, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trains_under_autocast(name: str, build: Build, dtype: torch.dtype) -> None:
    head = build(name)
    x = torch.randn(8, head.input_dim, requires_grad=True)
    with torch.autocast("cpu", dtype):
        z = output(head, x)
    assert z.isfinite().all()
    z.float().square().sum().backward()
    learning = [x, *(p for p in head.parameters() if p.requires_grad)]
    assert all(p.grad.isfinite().all() for p in learning)


def test_works_in_bfloat16(name: str, build: Build) -> None:
    head = build(name).to(torch.bfloat16)
    z = output(head, torch.randn(8, head.input_dim, dtype=torch.bfloat16))
    assert z.dtype == torch.bfloat16
    assert z.isfinite().all()


def test_is_built_on_the_meta_device_and_filled_from_a_state_dict(name: str, build: Build) -> None:
    head = trained(build(name)).eval()
    x = torch.randn(8, head.input_dim)
    for assign in (True, False):
        with torch.device("meta"):
            empty = create_head(head.config)
        assert {t.device.type for t in empty.state_dict().values()} <= {"meta"}
        assert output(empty.eval(), x.to("meta")).shape == (8, width(head))
        empty = empty if assign else empty.to_empty(device="cpu")
        empty.load_state_dict(head.state_dict(), assign=assign)
        assert torch.equal(output(empty, x), output(head, x))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 5), (2, 4, 5)])
def test_leading_dims_are_kept(name: str, build: Build, shape: tuple[int, ...]) -> None:
    head = trained(build(name)).eval()
    x = torch.randn(*shape, head.input_dim)
    z = output(head, x)
    assert z.shape == (*shape, width(head))
    assert torch.equal(z.reshape(-1, width(head)), output(head, x.reshape(-1, head.input_dim)))


def test_maps_with_channels_moved_last_are_read_along_channels(name: str, build: Build) -> None:
    head = build(name).eval()
    maps = torch.randn(2, head.input_dim, 4, 5)
    z = output(head, maps.permute(0, 2, 3, 1))
    assert torch.allclose(z[1, 2, 3], output(head, maps[1, :, 2, 3]), atol=1e-5)
    in_memory = maps.to(memory_format=torch.channels_last)
    assert torch.allclose(output(head, in_memory.permute(0, 2, 3, 1)), z, atol=1e-5)


def test_tokens_count_as_one_batch_in_training(name: str, build: Build) -> None:
    head = build(name).train()
    flat = copy.deepcopy(head)
    x = torch.randn(3, 5, head.input_dim)
    assert torch.equal(output(head, x).flatten(0, 1), output(flat, x.flatten(0, 1)))
    assert same(state(head), state(flat))


@pytest.mark.parametrize("shape", [(8, 21), (2, 5, 19), (2, 20, 4, 5), (20, 8)])
def test_wrong_width_is_refused_with_both_widths(
    name: str, build: Build, shape: tuple[int, ...]
) -> None:
    head = build(name, input_dim=20)
    with pytest.raises(DimensionError, match=rf"{name}.*takes 20 .*input_dim={shape[-1]}\b"):
        head(torch.randn(shape))


def test_evaluation_is_deterministic_and_changes_nothing(name: str, build: Build) -> None:
    head = trained(build(name)).eval()
    before = state(head)
    x = torch.randn(8, head.input_dim)
    z = output(head, x)
    assert torch.equal(output(head, x), z)
    tolerance = 1e-6 * float(z.detach().abs().max())
    assert torch.allclose(output(head, x[:1]), z[:1], atol=tolerance)  # no row sees another
    assert same(state(head), before)


def test_same_seed_gives_the_same_head(name: str, build: Build) -> None:
    heads = []
    for _ in range(2):
        torch.manual_seed(3)
        heads.append(build(name))
    assert same(state(heads[0]), state(heads[1]))


def test_requires_grad_frees_no_weight_that_is_frozen(name: str, build: Build) -> None:
    head = build(name)
    before = state(head)
    head.requires_grad_(True)
    trained(head)
    moving = {n for n, _ in head.named_parameters()} | statistics(head)
    for key, value in state(head).items():
        assert torch.equal(value, before[key]) == (key not in moving), key
    if describe_head(name).defaults.get("freeze"):
        assert any(before[key].ndim == 2 for key in before.keys() - moving)


def statistics(head: nn.Module) -> set[str]:
    """Names of the buffers that training moves: those of norms that keep statistics."""
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in head.named_modules()
        if isinstance(module, _BatchNorm) or getattr(module, "fixed", True) is False
        for name, _ in module.named_buffers(recurse=False)
    }


def first_layer(head: nn.Module) -> str | None:
    """The path of the first layer that has weights, or the weight's where the head holds it."""
    path = next((n for n, _ in head.named_parameters()), None)
    return path and (path.rpartition(".")[0] or path)


@pytest.mark.parametrize("part", ["all", "everything", "first"])
class TestFreezing:
    @pytest.fixture
    def free(self, name: str, build: Build) -> nn.Module:
        return build(name, freeze=False)

    @pytest.fixture
    def head(self, name: str, part: str, free: nn.Module, build: Build) -> nn.Module:
        what = {"all": True, "everything": "*", "first": first_layer(free)}[part]
        if what is None:
            assert list(free.parameters()) == []
            what = True
        return build(name, freeze=what)

    @pytest.fixture
    def fixed(self, free: nn.Module, head: nn.Module) -> set[str]:
        names = [dict(h.named_parameters()).keys() for h in (free, head)]
        return set(names[0] - names[1])

    def test_weights_become_buffers_under_the_same_keys(
        self, name: str, part: str, free: nn.Module, head: nn.Module, fixed: set[str]
    ) -> None:
        assert structure(head) == structure(free)
        assert fixed <= dict(head.named_buffers()).keys()
        assert bool(fixed) == bool(list(free.parameters()))
        if part == "everything":
            assert list(head.parameters()) == []

    def test_weights_survive_training_and_ema(
        self, name: str, part: str, head: nn.Module, fixed: set[str]
    ) -> None:
        from lightly.models.utils import update_momentum

        twin = copy.deepcopy(head)
        before = state(head)
        trained(head.requires_grad_(True))
        if list(head.parameters()):  # lightly's function takes no empty list
            update_momentum(head, twin, m=0.9)
        moved = {k for k, v in state(head).items() if not torch.equal(v, before[k])}
        assert moved == {n for n, _ in head.named_parameters()} | statistics(head)
        assert fixed & moved == set()
        if part == "everything":
            assert moved == set()  # the statistics of norms neither
        assert all(torch.equal(twin.state_dict()[k], before[k]) for k in fixed)

    def test_weights_and_config_survive_a_round_trip(
        self, name: str, part: str, head: nn.Module, fixed: set[str]
    ) -> None:
        trained(head)
        again = create_head(json.loads(json.dumps(head.config)))
        again.load_state_dict(head.state_dict(), strict=True)
        assert again.config == head.config
        assert same(state(again), state(head))
        assert fixed & dict(again.named_parameters()).keys() == set()
        before = state(again)
        trained(again.requires_grad_(True))
        assert all(torch.equal(again.state_dict()[k], before[k]) for k in fixed)

    def test_batch_norm_can_be_made_synchronous(
        self, name: str, part: str, head: nn.Module, fixed: set[str]
    ) -> None:
        trained(head).eval()
        x = torch.randn(8, head.input_dim)
        expected, before = output(head, x), state(head)
        after = nn.SyncBatchNorm.convert_sync_batchnorm(head)
        assert not any(type(m) is nn.BatchNorm1d for m in after.modules())
        assert torch.equal(output(after, x), expected)
        assert same(state(after), before)


@pytest.mark.parametrize("part", ["none", "first"])
def test_param_groups_hold_each_trained_weight_once(name: str, part: str, build: Build) -> None:
    head = build(name)
    if part == "first" and (path := first_layer(head)):
        head = build(name, freeze=path)
    groups = param_groups(head, weight_decay=0.1)
    there = [id(p) for g in groups for p in g["params"]]
    assert sorted(there) == sorted(id(p) for p in head.parameters() if p.requires_grad)
    names = {id(p): n for n, p in head.named_parameters()}
    decaying = [p for g in groups if g["weight_decay"] for p in g["params"]]
    assert all(p.ndim > 1 for p in decaying)
    for p in decaying:
        layer, _, weight = names[id(p)].rpartition(".")
        assert weight not in getattr(head.get_submodule(layer), "no_decay", ())
    if groups:
        assert len(torch.optim.AdamW(groups, lr=0.1).param_groups) == len(groups)


def test_weights_are_read_from_wherever_they_are(name: str, build: Build, tmp_path: Path) -> None:
    if all(p.name != "weights" for p in describe_head(name).shared):
        pytest.skip(f"{name} reads weights in a way of its own, which its own tests check")
    head = trained(build(name))
    saved = state(head)
    save_file(saved, tmp_path / "head.safetensors")
    torch.save(saved, tmp_path / "head.pt")
    torch.save({"state_dict": saved, "epoch": 3}, tmp_path / "head.ckpt")
    sources: list[Any] = [saved, head, head.solo_state_dict()]
    sources += [str(tmp_path / "head.safetensors"), tmp_path / "head.pt", tmp_path / "head.ckpt"]
    for source in sources:
        again = build(name, weights=source)
        assert same(state(again), saved)
        assert again.config == head.config


@pytest.mark.parametrize(
    ("path", "twin"),
    [
        ("projection_head", "projection_head_momentum"),
        ("projector", "momentum_projector"),
        ("head", "momentum_head"),
        ("module.student.head", "module.student.head_ema"),
    ],
)
def test_weights_are_found_in_a_whole_model(name: str, path: str, twin: str, build: Build) -> None:
    if all(p.name != "weights" for p in describe_head(name).shared):
        pytest.skip(f"{name} reads weights in a way of its own, which its own tests check")
    head = trained(build(name))
    for names in (head.state_dict(), head.solo_state_dict()):
        model = {"backbone.weight": torch.randn(7, 7)}
        model |= {f"{twin}.{k}": v + 1 for k, v in names.items()}
        model |= {f"{path}.{k}": v.clone() for k, v in names.items()}
        if names:
            assert same(state(build(name, weights=model)), state(head))
        else:
            with pytest.raises(CheckpointError, match="has none of its own"):
                build(name, weights=model)


def test_entry_says_what_it_is(name: str) -> None:
    entry = describe_head(name)
    assert 10 < len(entry.summary) <= 80
    assert not entry.summary.endswith(".")
    assert entry.paper == "" or entry.paper.startswith("arXiv ")
    text = str(entry)
    for part in (f"{name}: {entry.summary}", entry.paper, entry.source, "input_dim (required)"):
        assert part in text
    for option, value in entry.defaults.items():
        assert f"{option}={value!r}" in text
    assert json.loads(json.dumps(entry.defaults)) == entry.defaults
