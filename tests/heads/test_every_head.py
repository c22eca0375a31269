"""Properties of every registered head, whatever it is."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headplug import create_head, describe_head, list_heads
from headplug.errors import DimensionError

Build = Callable[..., nn.Module]
State = dict[str, Tensor]

pytestmark = pytest.mark.parametrize("name", list_heads())


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def state(head: nn.Module) -> State:
    return {k: v.clone() for k, v in head.state_dict().items()}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def structure(head: nn.Module) -> dict[str, Any]:
    return {k: (v.shape, v.dtype) for k, v in head.state_dict().items()}


def trained(head: nn.Module, steps: int = 3) -> nn.Module:
    """Takes a few optimiser steps, so that no parameter or statistic has its first value."""
    parameters = list(head.parameters())
    optimiser = torch.optim.SGD(parameters, lr=0.1, weight_decay=0.1) if parameters else None
    for _ in range(steps):
        z = head.train()(torch.randn(8, head.input_dim).requires_grad_())
        (z * torch.randn_like(z)).sum().backward()
        if optimiser:
            optimiser.step()
            optimiser.zero_grad()
    return head


def test_output_has_the_declared_shape_and_is_finite_float32(name: str, build: Build) -> None:
    head = build(name)
    z = head(torch.randn(8, head.input_dim))
    assert z.shape == (8, head.output_dim)
    assert z.dtype == torch.float32
    assert z.isfinite().all()


def test_dims_are_those_asked_for(name: str, build: Build) -> None:
    head = build(name, input_dim=28)
    assert head.input_dim == 28
    expected = describe_head(name).defaults["output_dim"]
    assert head.output_dim == (28 if expected is None else 12)


def test_loss_reaches_the_input_and_every_trainable_parameter(name: str, build: Build) -> None:
    head = build(name)
    x = torch.randn(8, head.input_dim, requires_grad=True)
    z = head(x)
    (z * torch.randn_like(z)).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    for parameter, value in head.named_parameters():
        assert value.requires_grad, parameter
        assert value.grad is not None, parameter
        assert value.grad.abs().sum() > 0, parameter


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
        assert torch.equal(again.train(mode)(x), head.train(mode)(x))
    assert same(state(again), state(head))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))])
def test_copies_give_equal_outputs_and_share_nothing(
    name: str, build: Build, how: Callable[[nn.Module], nn.Module]
) -> None:
    head = trained(build(name))
    twin = how(head)
    x = torch.randn(8, head.input_dim)
    assert torch.equal(twin(x), head(x))
    assert twin.config == head.config
    for a, b in zip(head.state_dict().values(), twin.state_dict().values(), strict=True):
        assert a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize("shape", [(8,), (4, 3)])
def test_compiles_into_one_graph(name: str, build: Build, shape: tuple[int, ...]) -> None:
    head = build(name)
    x = torch.randn(*shape, head.input_dim)
    expected = copy.deepcopy(head)(x)
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trains_under_autocast(name: str, build: Build, dtype: torch.dtype) -> None:
    head = build(name)
    x = torch.randn(8, head.input_dim, requires_grad=True)
    with torch.autocast("cpu", dtype):
        z = head(x)
    assert z.isfinite().all()
    z.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in [x, *head.parameters()])


def test_works_in_bfloat16(name: str, build: Build) -> None:
    head = build(name).to(torch.bfloat16)
    z = head(torch.randn(8, head.input_dim, dtype=torch.bfloat16))
    assert z.dtype == torch.bfloat16
    assert z.isfinite().all()


def test_is_built_on_the_meta_device_and_filled_from_a_state_dict(name: str, build: Build) -> None:
    head = trained(build(name)).eval()
    x = torch.randn(8, head.input_dim)
    for assign in (True, False):
        with torch.device("meta"):
            empty = create_head(head.config)
        assert {t.device.type for t in empty.state_dict().values()} <= {"meta"}
        assert empty.eval()(x.to("meta")).shape == (8, head.output_dim)
        empty = empty if assign else empty.to_empty(device="cpu")
        empty.load_state_dict(head.state_dict(), assign=assign)
        assert torch.equal(empty(x), head(x))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 5), (2, 4, 5)])
def test_leading_dims_are_kept(name: str, build: Build, shape: tuple[int, ...]) -> None:
    head = trained(build(name)).eval()
    x = torch.randn(*shape, head.input_dim)
    z = head(x)
    assert z.shape == (*shape, head.output_dim)
    assert torch.equal(z.reshape(-1, head.output_dim), head(x.reshape(-1, head.input_dim)))


def test_maps_with_channels_moved_last_are_read_along_channels(name: str, build: Build) -> None:
    head = build(name).eval()
    maps = torch.randn(2, head.input_dim, 4, 5)
    z = head(maps.permute(0, 2, 3, 1))
    assert torch.allclose(z[1, 2, 3], head(maps[1, :, 2, 3]), atol=1e-6)


def test_tokens_count_as_one_batch_in_training(name: str, build: Build) -> None:
    head = build(name).train()
    flat = copy.deepcopy(head)
    x = torch.randn(3, 5, head.input_dim)
    assert torch.equal(head(x).flatten(0, 1), flat(x.flatten(0, 1)))
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
    z = head(x)
    assert torch.equal(head(x), z)
    assert torch.allclose(head(x[:1]), z[:1], atol=1e-6)  # no row sees another
    assert same(state(head), before)


def test_same_seed_gives_the_same_head(name: str, build: Build) -> None:
    heads = []
    for _ in range(2):
        torch.manual_seed(3)
        heads.append(build(name))
    assert same(state(heads[0]), state(heads[1]))


def test_nothing_frozen_ever_trains(name: str, build: Build) -> None:
    head = build(name)
    before = state(head)
    head.requires_grad_(True)
    trained(head)
    moving = {n for n, _ in head.named_parameters()}
    for path, module in head.named_modules():
        if isinstance(module, _BatchNorm):
            moving |= {f"{path}.{n}" for n, _ in module.named_buffers()}
    for key, value in state(head).items():
        assert torch.equal(value, before[key]) == (key not in moving), key
    if describe_head(name).defaults.get("freeze"):
        assert any(before[key].ndim == 2 for key in before.keys() - moving)


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
