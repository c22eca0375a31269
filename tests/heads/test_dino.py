from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightly.models.modules.heads import DINOProjectionHead, DINOv2ProjectionHead
from lightly.models.utils import update_momentum
from torch import Tensor, nn

from headplug import create_head
from headplug.errors import OptionError
from headplug.heads.dino import DINOHead, WeightNormLinear, unit

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")  # lightly uses it

NAMES = {"dino": DINOProjectionHead, "dino_v2": DINOv2ProjectionHead}
WIDTHS = [(20, 32, 12, 24), (7, 5, 3, 40), (33, 33, 65, 1)]  # input, hidden, bottleneck, output


def seeded(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    """What is built after a fixed seed, and the generator's state behind it."""
    torch.manual_seed(5)
    return make(), torch.get_rng_state()


def pair(name: str, widths: tuple[int, ...] = WIDTHS[0], **options: Any) -> list[nn.Module]:
    """Our head and lightly's, each built after the same seed."""
    dims = dict(
        zip(("input_dim", "hidden_dim", "bottleneck_dim", "output_dim"), widths, strict=True)
    )
    theirs = {**options, "batch_norm": options.get("norm") == "batch"}
    theirs.pop("norm", None)
    heads = [lambda: create_head(name, **dims, **options), lambda: NAMES[name](**dims, **theirs)]
    (a, after_a), (b, after_b) = map(seeded, heads)
    assert torch.equal(after_a, after_b)
    return [a, b]


def assert_equal_states(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def assert_trains_alike(
    ours: nn.Module, theirs: nn.Module, width: int, epochs: int | None = None
) -> None:
    """Outputs, gradients and state are equal, bit for bit, over three steps of an optimiser."""
    named = [dict(head.named_parameters()) for head in (ours, theirs)]
    trained = [[n for n, p in parameters.items() if p.requires_grad] for parameters in named]
    assert trained[0] == trained[1]
    assert list(named[0]) == list(named[1])  # optimisers and EMA updates go by order
    sgd = [
        torch.optim.SGD(h.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
        for h in (ours, theirs)
    ]
    for epoch in range(3):
        x = torch.randn(16, width)
        results = []
        for head, optimiser in zip((ours, theirs), sgd, strict=True):
            optimiser.zero_grad()
            given = x.clone().requires_grad_()
            z = head.train()(given)
            z.cos().sum().backward()
            if epochs is not None:
                head.cancel_last_layer_gradients(epoch)
            results.append((z, given.grad, {n: p.grad for n, p in head.named_parameters()}))
            optimiser.step()
        (z, x_grad, grads), (z2, x_grad2, grads2) = results
        assert torch.equal(z, z2)
        assert torch.equal(x_grad, x_grad2)
        for key, grad in grads.items():
            other = grads2[key]
            assert (grad is None) == (other is None), key
            assert grad is None or torch.equal(grad, other), key
        assert_equal_states(ours, theirs)
        assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("bias", [True, False])
class TestWeightNormLinear:
    def make(self, bias: bool) -> list[nn.Module]:
        old = lambda: nn.utils.weight_norm(nn.Linear(20, 9, bias=bias))  # noqa: E731
        (a, after_a), (b, after_b) = seeded(lambda: WeightNormLinear(20, 9, bias)), seeded(old)
        assert torch.equal(after_a, after_b)
        return [a, b]

    def test_it_is_torchs_weight_norm(self, bias: bool) -> None:
        ours, theirs = self.make(bias)
        assert_equal_states(ours, theirs)
        assert torch.equal(ours.weight, theirs.weight)
        assert_trains_alike(ours, theirs, 20)

    def test_it_trades_weights_with_torchs_new_weight_norm(self, bias: bool) -> None:
        ours, _ = self.make(bias)
        new = nn.utils.parametrizations.weight_norm(nn.Linear(20, 9, bias=bias))
        ours.load_state_dict(new.state_dict())
        x = torch.randn(4, 20)
        assert torch.equal(ours(x), new(x))
        with torch.no_grad():
            ours.weight_g.mul_(2)
        new.load_state_dict(ours.state_dict())
        assert torch.equal(ours(x), new(x))

    def test_a_fresh_one_can_be_copied_where_torchs_cannot(self, bias: bool) -> None:
        ours, theirs = self.make(bias)
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(theirs)
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert_equal_states(twin, ours)
            twin.unit_rows(trainable=True)
            assert not torch.equal(twin.weight_g, ours.weight_g)

    def test_its_lengths_do_not_decay(self, bias: bool) -> None:
        head = create_head("dino_v2", input_dim=6, output_dim=5, hidden_dim=4, bottleneck_dim=3)
        head.last_layer = WeightNormLinear(3, 5, bias)
        decayed = {id(p) for p in head.param_groups(0.1)[0]["params"]}
        assert id(head.last_layer.weight_v) in decayed
        assert id(head.last_layer.weight_g) not in decayed


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
class TestLightlyParity:
    def test_same_seed_gives_lightlys_weights_and_training(
        self, name: str, widths: tuple[int, ...], norm: str
    ) -> None:
        ours, theirs = pair(name, widths, norm=norm)
        assert_equal_states(ours, theirs)
        assert_trains_alike(ours, theirs, widths[0])

    @pytest.mark.parametrize("into_ours", [True, False])
    def test_weights_load_in_both_directions(
        self, name: str, widths: tuple[int, ...], norm: str, into_ours: bool
    ) -> None:
        ours, theirs = pair(name, widths, norm=norm)
        source, target = (theirs, ours) if into_ours else (ours, theirs)
        with torch.no_grad():
            for tensor in source.state_dict().values():
                tensor.add_(1)
        target.load_state_dict(source.state_dict(), strict=True)
        assert_trains_alike(ours, theirs, widths[0])


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_lightlys(name: str) -> None:
    with torch.device("meta"):
        ours = create_head(name, input_dim=2048)
        theirs = NAMES[name](input_dim=2048)
    for head in (ours, theirs):
        layers = 2 * (2048**2 + 2048) + 2048 * 256 + 256
        assert sum(p.numel() for p in head.parameters()) == layers + 65536 * (256 + 1)
    assert {n: (p.shape, p.requires_grad) for n, p in ours.named_parameters()} == {
        n: (p.shape, p.requires_grad) for n, p in theirs.named_parameters()
    }


@pytest.mark.parametrize("name", NAMES)
def test_tokens_give_lightlys_output(name: str) -> None:
    ours, theirs = pair(name)
    tokens = torch.randn(3, 7, 20)
    assert torch.equal(ours(tokens), theirs(tokens))
    assert torch.equal(ours(tokens.mT.contiguous().mT), theirs(tokens))


@pytest.mark.parametrize("epochs", [-1, 0, 1, 2, 5])
@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_last_layer_is_held_in_early_epochs_as_in_lightly(
    epochs: int, norm_last_layer: bool
) -> None:
    ours, theirs = pair("dino", freeze_last_layer=epochs, norm_last_layer=norm_last_layer)
    before = ours.last_layer.weight_v.detach().clone()
    assert_trains_alike(ours, theirs, 20, epochs)
    assert torch.equal(ours.last_layer.weight_v, before) == (epochs == 5)


def test_rows_of_the_last_layer_keep_length_one_in_training() -> None:
    head = create_head("dino", input_dim=20, output_dim=24, hidden_dim=32, bottleneck_dim=12)
    optimiser = torch.optim.AdamW(head.param_groups(0.5), lr=0.1)
    before = head.last_layer.weight_v.detach().clone()
    for _ in range(5):
        head(torch.randn(8, 20)).cos().sum().backward()
        optimiser.step()
    assert torch.equal(head.last_layer.weight_g, torch.ones(24, 1))
    assert not torch.allclose(head.last_layer.weight_v, before, atol=0.01)
    assert torch.allclose(head.last_layer.weight.norm(dim=1), torch.ones(24))


@pytest.mark.parametrize("name", NAMES)
def test_a_copied_teacher_follows_its_student_as_lightlys_does(name: str) -> None:
    ours, theirs = pair(name)
    students, teachers = [ours, theirs], [copy.deepcopy(ours), pair(name)[1]]
    assert_equal_states(*teachers)
    for student, teacher in zip(students, teachers, strict=True):
        torch.manual_seed(1)
        optimiser = torch.optim.SGD(student.parameters(), lr=1.0)
        for _ in range(3):
            student(torch.randn(8, 20)).cos().sum().backward()
            optimiser.step()
            update_momentum(student, teacher, m=0.9)
    assert_equal_states(*students)
    assert_equal_states(*teachers)
    assert not torch.equal(teachers[0].last_layer.weight_v, ours.last_layer.weight_v)


@pytest.mark.parametrize("new_names", [False, True])
@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("host", ["lightly", "solo"])
def test_weights_are_found_in_whole_checkpoints(
    host: str, file: bool, new_names: bool, tmp_path: Path
) -> None:
    dims = {"input_dim": 20, "output_dim": 24, "hidden_dim": 32, "bottleneck_dim": 12}
    student, teacher = (create_head("dino", **dims).state_dict() for _ in range(2))
    names = ("student_head", "teacher_head") if host == "lightly" else ("head", "momentum_head")
    state = {"backbone.conv1.weight": torch.rand(3, 3)}
    for name, weights in zip(names, (student, teacher), strict=True):
        for key, value in weights.items():
            if host == "solo":
                key = key.replace("layers.", "mlp.")
            if new_names:
                key = key.replace("weight_g", "parametrizations.weight.original0")
                key = key.replace("weight_v", "parametrizations.weight.original1")
            state[f"{name}.{key}"] = value
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
    source = tmp_path / "last.ckpt" if file else state
    head = create_head("dino", **dims, weights=source)
    for key, value in head.state_dict().items():
        assert torch.equal(value, student[key]), key
    assert not head.last_layer.weight_g.requires_grad


def test_solo_learns_names_are_given_back() -> None:
    head = create_head("dino_solo", input_dim=8, output_dim=6, hidden_dim=5, bottleneck_dim=4)
    keys = [f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    assert list(head.solo_state_dict()) == [*keys, "last_layer.weight_g", "last_layer.weight_v"]


@pytest.mark.parametrize("num_layers", [1, 2, 5])
@pytest.mark.parametrize("norm", ["none", "batch", "batch_no_affine", "layer"])
@pytest.mark.parametrize("bias", [None, True, False])
def test_depth_norm_and_bias_combine(num_layers: int, norm: str, bias: bool | None) -> None:
    head = DINOHead(6, 9, 5, 4, num_layers, norm=norm, bias=bias)
    linear = [m for m in head.layers if isinstance(m, nn.Linear)]
    assert [m.out_features for m in linear] == [5] * (num_layers - 1) + [4]
    assert all(m.bias is None or not m.bias.any() for m in linear)
    assert [m.bias is not None for m in linear] == [
        *[norm == "none" if bias is None else bias] * (num_layers - 1),
        True if bias is None else bias,
    ]
    assert head(torch.randn(8, 6)).shape == (8, 9)


@pytest.mark.parametrize("init", ["quantile", "torch"])
def test_weights_are_normal_with_deviation_two_hundredths(init: str) -> None:
    weight = DINOHead(300, 2, 400, 3, init=init).layers[0].weight
    assert weight.mean().abs() < 3 * 0.02 / 300  # far beyond the error of 120,000 draws
    assert abs(weight.std() - 0.02) < 2e-4
    inside = (weight.abs() < 0.02).float().mean()
    assert abs(inside - 0.6827) < 0.006


@pytest.mark.parametrize("name", [*NAMES, "dino_solo"])
def test_input_to_the_last_layer_has_length_one(name: str) -> None:
    head = create_head(name, input_dim=20, output_dim=24, hidden_dim=64, bottleneck_dim=12)
    seen: list[Tensor] = []
    head.last_layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = head(torch.randn(8, 20))
        assert logits.dtype == dtype
        assert logits.abs().max() <= 1.01  # cosines
        lengths = seen.pop().float().norm(dim=1)
        assert torch.allclose(lengths, torch.ones(8), atol=1e-6 + torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_of_zeros_stays_finite_in_every_precision(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 8, dtype=dtype, requires_grad=True)
    z = unit(x)
    assert not z.any()
    z.sum().backward()
    assert not x.grad.isnan().any()
    head = DINOHead(8, 5, 6, 4).to(dtype)
    assert not head(torch.zeros(3, 8, dtype=dtype)).any()  # biases are zero


def test_convolutional_backbones_can_have_synchronised_batch_norm() -> None:
    head = DINOHead(8, 5, 6, 4, norm="batch")
    keys = list(head.state_dict())
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(head)
    assert [type(m) for m in synced.layers].count(nn.SyncBatchNorm) == 2
    assert list(synced.state_dict()) == keys


def test_a_frozen_last_layer_has_nothing_to_train() -> None:
    head = create_head(
        "dino_v2", input_dim=8, output_dim=5, hidden_dim=6, bottleneck_dim=4, freeze="last_layer"
    )
    assert [n for n, _ in head.named_parameters() if "last" in n] == []
    head(torch.randn(3, 8)).sum().backward()
    head.cancel_last_layer_gradients(0)
    assert head.layers[0].weight.grad is not None


@pytest.mark.parametrize("option", ["output_dim", "hidden_dim", "bottleneck_dim", "num_layers"])
@pytest.mark.parametrize("value", [0, -3, True, 2.0])
def test_widths_and_depth_must_be_positive_integers(option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{option} must be a positive integer, not {value!r}"):
        DINOHead(**{"input_dim": 6, "output_dim": 5, option: value})


@pytest.mark.parametrize(("option", "value"), [("norm", "bach"), ("init", "quantil")])
def test_unknown_names_are_refused_with_the_closest(option: str, value: str) -> None:
    with pytest.raises(OptionError, match=f"no {option} is called '{value}'. Closest: "):
        DINOHead(6, 5, 4, 3, **{option: value})
