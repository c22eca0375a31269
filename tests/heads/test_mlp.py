from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import erf, expit
from torch import Tensor, nn

from headplug import MLPHead, create_head, describe_head, list_heads
from headplug.errors import DimensionError, OptionError
from headplug.heads.layers import hidden_paths
from headplug.heads.mlp import NORMS as ALL_NORMS

PRESETS = [name for name in list_heads() if describe_head(name).builder is MLPHead]
NORMS = ["batch", "batch_no_affine", "layer", "none"]
ACTIVATIONS = {  # in NumPy
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * expit(x),
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "sigmoid": expit,
    "tanh": np.tanh,
    "identity": lambda x: x,
}


def has_bias(bias: bool | None, norm: str) -> bool:
    return norm == "none" if bias is None else bias


def count_by_hand(config: dict[str, Any]) -> int:
    """Weights, whether they train or not."""
    scales = {"batch": 2, "layer": 2, "batch_no_affine": 0, "none": 0}
    scales |= {"iternorm": 2, "whitening": 0}
    hidden = [config["hidden_dim"]] * (config["num_layers"] - 1)
    widths = [config["input_dim"], *hidden, config["output_dim"]]
    weights = sum(a * b for a, b in itertools.pairwise(widths))
    inner = has_bias(config["bias"], config["norm"]) + scales[config["norm"]]
    outer = config["output_bias"]
    if outer is None:
        outer = has_bias(config["bias"], config["output_norm"])
    outer = bool(outer) + scales[config["output_norm"]]
    return weights + inner * sum(hidden) + outer * config["output_dim"]


def count(head: nn.Module) -> int:
    statistics = ("running_", "num_batches_tracked")
    weights = {
        k: v for k, v in head.state_dict().items() if not k.split(".")[-1].startswith(statistics)
    }
    return sum(v.numel() for v in weights.values())


def by_hand(head: MLPHead, x: Tensor) -> Any:
    """The head's output in float64 NumPy; batch norm takes the statistics of the batch."""
    state = {k: v.numpy().astype(float) for k, v in head.state_dict().items()}
    kinds = {"linear": head.norm, "output": head.output_norm}
    z, layer = x.numpy().astype(float), itertools.count()
    for i in range(head.num_layers):
        at = next(layer)
        z = z @ state[f"layers.{at}.weight"].T + state.get(f"layers.{at}.bias", 0)
        last = i == head.num_layers - 1
        norm = kinds["output" if last else "linear"]
        if norm != "none":
            at, axis = next(layer), 1 if norm == "layer" else 0
            z = (z - z.mean(axis, keepdims=True)) / np.sqrt(z.var(axis, keepdims=True) + 1e-5)
            z = z * state.get(f"layers.{at}.weight", 1) + state.get(f"layers.{at}.bias", 0)
        if not last:
            next(layer)
            z = ACTIVATIONS[head.activation](z)
    return z


def shaken(head: MLPHead) -> MLPHead:
    """The head with other scales and shifts than ones and zeros."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    return head


@pytest.mark.parametrize("input_dim", [512, 2048])
@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_is_the_sum_by_hand(name: str, input_dim: int) -> None:
    with torch.device("meta"):
        head = create_head(name, input_dim=input_dim)
    options = {o: getattr(head, o) for o in ("hidden_dim", "num_layers", "norm", "output_norm")}
    options |= {o: getattr(head, o) for o in ("input_dim", "output_dim", "bias", "output_bias")}
    assert count(head) == count_by_hand(options)


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


@pytest.mark.parametrize("num_layers", [1, 2, 4])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("output_norm", NORMS)
def test_depth_and_norms_combine(num_layers: int, norm: Any, output_norm: Any) -> None:
    head = shaken(MLPHead(6, 4, 5, num_layers, norm=norm, output_norm=output_norm))
    assert len(head.linear_layers) == num_layers
    assert count(head) == count_by_hand(head.config)
    x = torch.randn(8, 6)
    assert np.allclose(head(x).detach().numpy(), by_hand(head, x), atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_activation_is_what_its_name_says(activation: str, norm: Any) -> None:
    head = shaken(MLPHead(6, 4, 5, num_layers=3, norm=norm, activation=activation))
    x = torch.randn(8, 6)
    assert np.allclose(head(x).detach().numpy(), by_hand(head, x), atol=1e-4)


@pytest.mark.parametrize("bias", [True, False, None])
@pytest.mark.parametrize("output_bias", [True, False, None, "frozen"])
@pytest.mark.parametrize(("norm", "output_norm"), [("batch", "none"), ("none", "batch_no_affine")])
def test_biases_are_where_they_were_asked_for(
    bias: Any, output_bias: Any, norm: Any, output_norm: Any
) -> None:
    options = {"norm": norm, "output_norm": output_norm, "bias": bias, "output_bias": output_bias}
    head = shaken(MLPHead(6, 4, 5, num_layers=3, **options))
    inner = has_bias(bias, norm)
    outer = has_bias(bias, output_norm) if output_bias is None else bool(output_bias)
    assert [m.bias is not None for m in head.linear_layers] == [inner, inner, outer]
    assert count(head) == count_by_hand(head.config)
    x = torch.randn(8, 6)
    assert np.allclose(head(x).detach().numpy(), by_hand(head, x), atol=1e-4)


def test_frozen_output_bias_is_the_only_weight_that_does_not_train() -> None:
    head = MLPHead(6, 4, 5, output_bias="frozen", output_norm="batch_no_affine")
    (fixed,) = [n for n, p in head.named_parameters() if not p.requires_grad]
    assert fixed == "layers.3.bias"
    before = {n: p.clone() for n, p in head.named_parameters()}
    optimiser = torch.optim.SGD(head.parameters(), lr=0.1, weight_decay=0.1)
    head(torch.randn(8, 6)).cos().sum().backward()
    optimiser.step()
    unmoved = [n for n, p in head.named_parameters() if torch.equal(p, before[n])]
    assert unmoved == [fixed]


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_follows_each_activation_and_keeps_its_mean(probability: float) -> None:
    head = MLPHead(6, 4, 2000, 3, norm="layer", activation="sigmoid", dropout=probability)
    assert [i for i, m in enumerate(head.layers) if isinstance(m, nn.Dropout)] == [3, 7]
    x = torch.randn(8, 6)
    kept = head.layers[:3](x)
    dropped = head.layers[:4](x)  # a sigmoid is never zero: zeros come from dropout
    assert (dropped == 0).float().mean().item() == pytest.approx(probability, abs=0.02)
    there = dropped != 0
    assert torch.allclose(dropped[there], kept[there] / (1 - probability))


def test_dropout_acts_in_training_only_and_adds_no_weights() -> None:
    options: dict[str, Any] = {"hidden_dim": 50, "norm": "none"}
    plain, head = MLPHead(6, 4, **options), MLPHead(6, 4, dropout=0.5, **options)
    assert not any(isinstance(m, nn.Dropout) for m in plain.layers)
    weights = list(plain.state_dict().values())
    assert [w.shape for w in weights] == [w.shape for w in head.state_dict().values()]
    head.load_state_dict(dict(zip(head.state_dict(), weights, strict=True)))
    x = torch.randn(8, 6)
    assert torch.equal(head.eval()(x), plain(x))
    assert not torch.equal(head.train()(x), plain(x))


@pytest.mark.parametrize("value", [1, 1.0, -0.1, float("nan"), True, "0.5"])
def test_dropout_must_be_a_probability_below_one(value: Any) -> None:
    with pytest.raises(OptionError, match=r"dropout must be a number in \[0, 1\), not"):
        MLPHead(6, 4, dropout=value)


@pytest.mark.parametrize("widths", [(8, 8, 8), (6, 9, 4), (9, 4, 7)])
def test_orthogonal_init_gives_every_matrix_singular_values_of_one(
    widths: tuple[int, int, int],
) -> None:
    head = MLPHead(widths[0], widths[2], widths[1], num_layers=3, init="orthogonal")
    for layer in head.linear_layers:
        values = np.linalg.svd(layer.weight.detach().numpy().astype(float), compute_uv=False)
        assert np.allclose(values, 1, atol=1e-5)


def test_orthogonal_preset_is_a_fixed_rotation() -> None:
    head = create_head("orthogonal", input_dim=12, output_dim=12)
    x = torch.randn(8, 12)
    assert list(head.parameters()) == []
    assert torch.allclose(torch.cdist(head(x), head(x)), torch.cdist(x, x), atol=1e-4)


def test_low_rank_preset_is_linear_of_that_rank() -> None:
    head = create_head("low_rank", input_dim=12, hidden_dim=3, output_dim=10)
    matrix = head(torch.eye(12))
    assert np.linalg.matrix_rank(matrix.detach().numpy(), tol=1e-5) == 3
    x = torch.randn(8, 12)
    assert torch.allclose(head(x), x @ matrix, atol=1e-5)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("bias", "yes"), ("bias", 1), ("output_bias", "forzen"), ("output_bias", 0),
        ("init", "orthogonl"), ("dropout", "0.5"),
    ],
)  # fmt: skip
def test_options_of_another_kind_are_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"mlp: {option} must be .*not {value!r}"):
        create_head("mlp", input_dim=6, **{option: value})


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize(
    ("option", "value", "closest"),
    [
        ("activation", "rellu", "relu"),
        ("norm", "bach", "batch"),
        ("output_norm", "layers", "layer"),
        ("activation", ["relu"], "relu"),
        ("init", "orthogonl", "orthogonal"),
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


@pytest.mark.parametrize("option", ["bias", "output_bias"])
@pytest.mark.parametrize("value", ["forzen", 2, []])
def test_unknown_bias_is_refused(option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"bias must be .* {re.escape(repr(value))}"):
        MLPHead(6, 4, **{option: value})


@pytest.mark.parametrize("norm", ALL_NORMS)
def test_norms_add_no_hidden_layer_to_tap(norm: Any) -> None:
    head = MLPHead(6, 4, hidden_dim=8, num_layers=3, norm=norm, output_norm=norm)
    paths = hidden_paths(head)
    assert [type(head.get_submodule(path)) for path in paths] == [nn.ReLU, nn.ReLU]


def test_map_with_channels_first_is_told_how_to_put_them_last() -> None:
    head = MLPHead(6, 4)
    maps = torch.randn(2, 6, 3, 3)
    with pytest.raises(DimensionError, match=r"Put channels last \(x\.movedim\(1, -1\)\), pool"):
        head(maps)
    assert head(maps.movedim(1, -1)).shape == (2, 3, 3, 4)
    with pytest.raises(DimensionError, match=r"\)\. Pool or flatten it"):
        head(torch.randn(6, 5))
