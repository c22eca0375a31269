from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headplug import MLPHead, create_head, describe_head, list_heads
from headplug.errors import OptionError

WITH_SOURCE = [name for name in list_heads() if describe_head(name).source]
PRESETS = [name for name in list_heads() if describe_head(name).builder is MLPHead]
WIDTHS = [(32, 48, 24), (24, 40, 40), (7, 5, 3)]  # input, hidden, output

# Where a preset is, on purpose, not lightly's default: a later version of the same method, whose
# values lightly's docstrings give in words.
LATER_VERSIONS = {
    "moco_v3": {"hidden_dim": 4096, "output_dim": 256, "num_layers": 3, "batch_norm": True},
    "simclr_v2": {"num_layers": 3},
}

# lightly's heads that are no preset but the same builder with options.
BY_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("VicRegLLocalProjectionHead", {"num_layers": 3, "norm": "layer"}),
    ("SMoGProjectionHead", {"output_norm": "batch_no_affine"}),
    ("SMoGPredictionHead", {}),
    ("LeJEPAProjectionHead", {"num_layers": 3}),
]


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def lightly_class(name: str) -> type[nn.Module]:
    module, _, cls = describe_head(name).source.partition(":")
    found: type[nn.Module] = getattr(importlib.import_module(module), cls)
    return found


def lightly_options(cls: type[nn.Module], head: nn.Module) -> dict[str, Any]:
    """A head's layers and norm in lightly's words, where its class has words for them."""
    values = {"num_layers": head.num_layers, "batch_norm": head.norm == "batch"}
    return {k: v for k, v in values.items() if k in inspect.signature(cls).parameters}


def pair(
    cls: type[nn.Module], name: str, widths: tuple[int, int, int], **options: Any
) -> tuple[nn.Module, nn.Module]:
    """Our head and lightly's, each built after the same seed."""
    dims = dict(zip(("input_dim", "hidden_dim", "output_dim"), widths, strict=True))
    torch.manual_seed(5)
    ours = create_head(name, **dims, **options)
    torch.manual_seed(5)
    return ours, cls(**dims, **lightly_options(cls, ours))


def assert_equal_states(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def step(head: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    z = head.train()(x)
    z.cos().sum().backward()
    return z, x.grad, {n: p.grad for n, p in head.named_parameters()}


def assert_trains_alike(ours: nn.Module, theirs: nn.Module) -> None:
    x = torch.randn(16, ours.input_dim)
    (z, x_grad, grads), (z2, x_grad2, grads2) = step(ours, x), step(theirs, x)
    assert torch.equal(z, z2)
    assert torch.equal(x_grad, x_grad2)
    assert grads.keys() == grads2.keys()
    assert all(torch.equal(grads[n], grads2[n]) for n in grads)
    assert_equal_states(ours, theirs)  # the running statistics, too
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("name", WITH_SOURCE)
class TestLightlyParity:
    def test_same_seed_gives_lightlys_weights_and_training_step(
        self, name: str, widths: tuple[int, int, int]
    ) -> None:
        ours, theirs = pair(lightly_class(name), name, widths)
        assert_equal_states(ours, theirs)
        assert_trains_alike(ours, theirs)

    @pytest.mark.parametrize("into_ours", [True, False])
    def test_weights_load_in_both_directions(
        self, name: str, widths: tuple[int, int, int], into_ours: bool
    ) -> None:
        ours, theirs = pair(lightly_class(name), name, widths)
        source, target = (theirs, ours) if into_ours else (ours, theirs)
        with torch.no_grad():
            for tensor in source.state_dict().values():
                tensor.add_(1)
        target.load_state_dict(source.state_dict(), strict=True)
        assert_trains_alike(ours, theirs)


@pytest.mark.parametrize(("cls", "options"), BY_OPTIONS)
def test_options_make_lightlys_other_mlps(cls: str, options: dict[str, Any]) -> None:
    heads = importlib.import_module("lightly.models.modules.heads")
    ours, theirs = pair(getattr(heads, cls), "mlp", (32, 48, 24), **options)
    assert_equal_states(ours, theirs)
    assert_trains_alike(ours, theirs)


@pytest.mark.parametrize("name", WITH_SOURCE)
def test_defaults_are_lightlys_save_for_later_versions(name: str) -> None:
    head = create_head(name, input_dim=8, hidden_dim=8, output_dim=8)
    cls = lightly_class(name)
    ours = {**describe_head(name).defaults, **lightly_options(cls, head)}
    differing = {
        option: ours[option]
        for option, parameter in inspect.signature(cls).parameters.items()
        if option != "input_dim" and ours[option] != parameter.default
    }
    assert differing == LATER_VERSIONS.get(name, {})


@pytest.mark.parametrize("name", WITH_SOURCE)
def test_default_layers_have_lightlys_shapes(name: str) -> None:
    cls = lightly_class(name)
    with torch.device("meta"):  # Barlow Twins' has 151 million parameters
        ours = create_head(name, input_dim=2048)
        dims = {"hidden_dim": ours.hidden_dim, "output_dim": ours.output_dim}
        asked = dims if name in LATER_VERSIONS else {}
        theirs = cls(input_dim=2048, **asked, **lightly_options(cls, ours))
    shapes = [{k: v.shape for k, v in h.state_dict().items()} for h in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert [str(m) for m in ours.layers] == [str(m) for m in theirs.layers]


def count_by_hand(config: dict[str, Any]) -> int:
    norms = {"batch": 2, "layer": 2, "batch_no_affine": 0, "none": 1}  # none: the linear's bias
    hidden = [config["hidden_dim"]] * (config["num_layers"] - 1)
    widths = [config["input_dim"], *hidden, config["output_dim"]]
    weights = sum(a * b for a, b in itertools.pairwise(widths))
    inner = norms[config["norm"]] * sum(hidden)
    return weights + inner + norms[config["output_norm"]] * config["output_dim"]


@pytest.mark.parametrize("input_dim", [512, 2048])
@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_is_the_sum_by_hand(name: str, input_dim: int) -> None:
    with torch.device("meta"):
        head = create_head(name, input_dim=input_dim)
    assert sum(p.numel() for p in head.parameters()) == count_by_hand(head.config)


@pytest.mark.parametrize(
    ("name", "input_dim", "count"),
    [
        ("byol", 2048, 2048 * 4096 + 2 * 4096 + 4096 * 256 + 256),
        ("barlow_twins", 2048, 2048 * 8192 + 8192**2 + 4 * 8192 + 8192**2 + 8192),
        ("simclr", 512, 512 * 2048 + 2 * 2048 + 2048 * 128 + 2 * 128),
        ("simclr_plain", 512, 512 * 512 + 512 + 512 * 128 + 128),
        ("moco_v2", 512, 512 * 2048 + 2048 + 2048 * 128 + 128),
        ("simsiam", 2048, 3 * 2048**2 + 2 * 2 * 2048),
    ],
)
def test_parameter_count_of_known_heads(name: str, input_dim: int, count: int) -> None:
    with torch.device("meta"):
        head = create_head(name, input_dim=input_dim)
    assert sum(p.numel() for p in head.parameters()) == count


@pytest.mark.parametrize("num_layers", [1, 2, 5])
@pytest.mark.parametrize("norm", ["batch", "batch_no_affine", "layer", "none"])
@pytest.mark.parametrize("output_norm", ["batch", "batch_no_affine", "layer", "none"])
def test_depth_and_norms_combine(num_layers: int, norm: str, output_norm: str) -> None:
    head = MLPHead(6, 4, 5, num_layers, norm=norm, output_norm=output_norm)
    assert sum(isinstance(m, nn.Linear) for m in head.layers) == num_layers
    assert sum(p.numel() for p in head.parameters()) == count_by_hand(head.config)
    assert head(torch.randn(8, 6)).shape == (8, 4)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("relu", torch.relu),
        ("silu", nn.functional.silu),
        ("gelu", nn.functional.gelu),
        ("sigmoid", torch.sigmoid),
        ("tanh", torch.tanh),
        ("identity", lambda x: x),
    ],
)
def test_head_without_norm_is_linear_activation_linear(activation: str, function: Any) -> None:
    head = MLPHead(6, 4, 5, norm="none", activation=activation)
    x = torch.randn(8, 6)
    first, last = head.layers[0], head.layers[-1]
    expected = function(x @ first.weight.T + first.bias) @ last.weight.T + last.bias
    assert torch.allclose(head(x), expected, atol=1e-6)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize(
    ("option", "value", "closest"),
    [
        ("activation", "rellu", "relu"),
        ("norm", "bach", "batch"),
        ("output_norm", "layers", "layer"),
        ("activation", ["relu"], "relu"),
    ],
)
def test_unknown_activation_or_norm_is_refused_even_where_it_has_no_layer(
    num_layers: int, option: str, value: Any, closest: str
) -> None:
    with pytest.raises(OptionError, match=f"no {option} is called.*{closest}"):
        MLPHead(6, 4, num_layers=num_layers, **{option: value})


@pytest.mark.parametrize("option", ["input_dim", "output_dim", "hidden_dim", "num_layers"])
@pytest.mark.parametrize("value", [0, -3, 2.0, True, "8"])
def test_widths_and_depth_must_be_positive_integers(option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{option} must be a positive integer, not {value!r}"):
        MLPHead(**{"input_dim": 6, option: value})
