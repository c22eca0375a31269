from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lightly.models.modules.heads_timm import AIMPredictionHead
from torch import Tensor, nn

from headplug import create_head, describe_head
from headplug.errors import OptionError, UnknownNameError
from headplug.heads.residual import ResidualHead

LIGHTLY_NAMES = {"dropout": "proj_drop"}
CASES: list[dict[str, Any]] = [
    {"input_dim": 20, "output_dim": 9, "hidden_dim": 16, "num_blocks": 12},
    {"input_dim": 7, "output_dim": 5, "hidden_dim": 6, "num_blocks": 1, "mlp_ratio": 1.7},
    {"input_dim": 16, "output_dim": 16, "hidden_dim": 8, "num_blocks": 3, "dropout": 0.3},
]


@pytest.fixture
def head() -> ResidualHead:
    return create_head("residual", input_dim=6, output_dim=4, hidden_dim=5)


def pair(options: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Our head and lightly's, each built after the same seed."""
    torch.manual_seed(5)
    ours = create_head("aim", **options)
    torch.manual_seed(5)
    return ours, AIMPredictionHead(**{LIGHTLY_NAMES.get(k, k): v for k, v in options.items()})


def assert_equal_states(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def train(head: nn.Module, x: Tensor) -> list[Tensor]:
    """Three steps with SGD; all outputs and input gradients."""
    torch.manual_seed(7)  # of dropout
    optimiser = torch.optim.SGD(head.parameters(), lr=0.1)
    seen = []
    for _ in range(3):
        x = x.detach().clone().requires_grad_()
        z = head.train()(x)
        optimiser.zero_grad()
        z.cos().sum().backward()
        optimiser.step()
        seen += [z.detach(), x.grad]
    return seen


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("shape", [(8,), (4, 3)])
def test_training_is_lightlys_to_the_last_bit(
    options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    ours, theirs = pair(options)
    assert_equal_states(ours, theirs)
    x = torch.randn(*shape, options["input_dim"])
    assert all(map(torch.equal, train(ours, x), train(theirs, x)))
    grads = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in grads)
    assert_equal_states(ours, theirs)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("into_ours", [True, False])
def test_weights_load_in_both_directions(into_ours: bool) -> None:
    ours, theirs = pair(CASES[0])
    source, target = (theirs, ours) if into_ours else (ours, theirs)
    with torch.no_grad():
        for tensor in source.state_dict().values():
            tensor.add_(0.1)
    target.load_state_dict(source.state_dict(), strict=True)
    x = torch.randn(8, 20)
    assert all(map(torch.equal, train(ours, x), train(theirs, x)))


def test_lightlys_head_is_found_in_a_whole_model() -> None:
    ours, theirs = pair(CASES[1])
    model = nn.ModuleDict({"backbone": nn.Linear(3, 7), "projection_head": theirs})
    with torch.no_grad():
        theirs.blocks[0].weight.add_(1)
    loaded = create_head("aim", weights=model.state_dict(), **CASES[1])
    assert_equal_states(loaded, theirs)
    assert not torch.equal(loaded.blocks[0].weight, ours.blocks[0].weight)


def test_bare_keys_load_and_return() -> None:
    head, other = (ResidualHead(6, 4, 5) for _ in range(2))
    bare = head.blocks.state_dict()
    assert head.solo_state_dict().keys() == bare.keys()
    other.load_state_dict(bare, strict=True)
    assert_equal_states(other, head)


def test_defaults_are_lightlys() -> None:
    ours = describe_head("aim").defaults
    theirs = inspect.signature(AIMPredictionHead).parameters
    for option in ("hidden_dim", "num_blocks", "mlp_ratio", "dropout"):
        assert ours[option] == theirs[LIGHTLY_NAMES.get(option, option)].default
    assert theirs["act_layer"].default is nn.GELU
    assert ours["activation"] == "gelu"
    with torch.device("meta"):  # 400 million parameters
        heads = create_head("aim", input_dim=768), AIMPredictionHead(768, 588)
    shapes = [{k: v.shape for k, v in h.state_dict().items()} for h in heads]
    assert shapes[0] == shapes[1]


def test_output_is_that_of_numpy(head: ResidualHead) -> None:
    w = {k: v.double().numpy() for k, v in head.state_dict().items()}

    def norm(x: np.ndarray, at: str) -> np.ndarray:
        centred = x - x.mean(1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
        return scaled * w[f"{at}.weight"] + w[f"{at}.bias"]

    def gelu(x: np.ndarray) -> np.ndarray:
        return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2

    x = torch.randn(8, 6)
    y = x.double().numpy() @ w["blocks.0.weight"].T
    for b in ("blocks.1", "blocks.2"):
        hidden = gelu(norm(y, f"{b}.norm") @ w[f"{b}.mlp.fc1.weight"].T)
        y = y + hidden @ w[f"{b}.mlp.fc2.weight"].T
    expected = norm(y, "blocks.3") @ w["blocks.4.weight"].T
    np.testing.assert_allclose(head(x).detach().numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_parameter_count_is_the_sum_by_hand(bias: bool) -> None:
    head = ResidualHead(20, 9, 16, num_blocks=3, mlp_ratio=2.5, bias=bias)
    block = 2 * 16 + 2 * 16 * 40 + bias * (40 + 16)
    expected = 20 * 16 + 3 * block + 2 * 16 + 16 * 9 + bias * (16 + 9)
    assert sum(p.numel() for p in head.parameters()) == expected


def test_blocks_are_listed_once_and_also_called_layers(head: ResidualHead) -> None:
    assert head.layers is head.blocks
    assert head.get_submodule("layers.1.mlp.act") is head.blocks[1].mlp.act
    assert all(k.startswith("blocks.") for k in head.state_dict())
    assert "layers" not in dict(head.named_modules(remove_duplicate=False))


def test_blocks_do_not_share_their_activation(head: ResidualHead) -> None:
    assert head.blocks[1].mlp.act is not head.blocks[2].mlp.act  # a tap must tell them apart


@pytest.mark.parametrize("what", ["blocks.1", "blocks.*.mlp.fc1", True])
def test_frozen_layers_keep_their_weights(what: bool | str, head: ResidualHead) -> None:
    before = {k: v.clone() for k, v in head.state_dict().items()}
    frozen = create_head("residual", input_dim=6, output_dim=4, hidden_dim=5, freeze=what)
    frozen.load_state_dict(before)
    trained = [n for n, _ in frozen.named_parameters()]
    optimiser = torch.optim.SGD(frozen.parameters() if trained else [torch.zeros(1)], lr=0.1)
    frozen(torch.randn(8, 6).requires_grad_()).cos().sum().backward()
    optimiser.step()
    for key, value in frozen.state_dict().items():
        assert torch.equal(value, before[key]) == (key not in trained), key
    assert len(trained) < len(before)


def test_norms_do_not_decay(head: ResidualHead) -> None:
    decay, spared = head.param_groups(0.1)
    assert {p.ndim for p in decay["params"]} == {2}
    assert {p.ndim for p in spared["params"]} == {1}
    assert len(spared["params"]) == 2 * 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))])
def test_copies_do_the_same(copied: Callable[[nn.Module], nn.Module], head: ResidualHead) -> None:
    x = torch.randn(8, 6)
    assert torch.equal(copied(head)(x), head(x))
    assert copied(head).config == head.config


@pytest.mark.parametrize("training", [True, False])
def test_compiles_and_exports_with_a_dynamic_batch(training: bool, head: ResidualHead) -> None:
    head.train(training)
    x = torch.randn(7, 6)
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    shapes = {"x": {0: torch.export.Dim("batch", min=2)}}
    exported = torch.export.export(head, (torch.randn(4, 6),), dynamic_shapes=shapes).module()
    assert torch.equal(compiled(x), head(x))
    assert torch.allclose(exported(x), head(x), atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_batch_of_one_is_fine(training: bool, head: ResidualHead) -> None:
    x = torch.randn(3, 6)
    assert torch.allclose(head.train(training)(x[:1]), head(x)[:1], atol=1e-6)


@pytest.mark.parametrize("name", ["input_dim", "output_dim", "hidden_dim", "num_blocks"])
@pytest.mark.parametrize("value", [0, 2.0, True])
def test_widths_and_depth_must_be_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{name} must be a positive integer, not {value!r}"):
        ResidualHead(**{"input_dim": 6, name: value})


@pytest.mark.parametrize("ratio", [0.0, 0.1, -2.0, float("nan"), float("inf")])
def test_empty_hidden_layer_is_refused(ratio: float) -> None:
    with pytest.raises(OptionError, match=f"mlp_ratio.*not {ratio!r} times hidden_dim=6"):
        create_head("residual", input_dim=6, mlp_ratio=ratio)


def test_unknown_activation_and_dropout_of_one_are_refused() -> None:
    with pytest.raises(OptionError, match=r"no activation is called 'gelo'\. Closest: gelu"):
        ResidualHead(6, activation="gelo")
    with pytest.raises(OptionError, match=r"dropout must be a number in \[0, 1\)"):
        ResidualHead(6, dropout=1.0)
    with pytest.raises(UnknownNameError, match=r"no layer is called 'blocks\.9'"):
        create_head("residual", input_dim=6, freeze="blocks.9")
