from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from lightly.loss.wmse_loss import Whitening2d
from sklearn.decomposition import PCA
from torch import Tensor, nn

from headplug import MLPHead
from headplug.errors import DataError, DimensionError, OptionError
from headplug.heads.parameters import freeze, param_groups
from headplug.heads.whitening import IterNorm, Whitening

LAYERS = pytest.mark.parametrize("layer", [Whitening, IterNorm])
CLONE = Path(os.environ.get("SOLO_LEARN_HOME", "")) / "solo" / "utils" / "whitening.py"
with_solo = pytest.mark.skipif(
    not CLONE.is_file(),
    reason="set SOLO_LEARN_HOME to a clone of solo-learn main: "
    "git clone https://github.com/vturrisi/solo-learn",
)


@pytest.fixture(scope="module")
def solo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("solo_whitening", CLONE)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


def source(width: int) -> Callable[[int], Tensor]:
    """Draws batches of features of unlike scale that depend on each other."""
    turn = torch.linalg.qr(torch.randn(width, width)).Q
    scales = torch.linspace(0.5, 3, width)
    return lambda rows: scales * torch.randn(rows, width) @ turn + torch.arange(width) / width


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in layer.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def moved(layer: nn.Module, width: int = 12) -> nn.Module:
    """After some training, so that nothing has its first value."""
    draw = source(width)
    for _ in range(5):
        layer.train()(draw(32))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    return layer


def covariance(z: Tensor) -> np.ndarray:
    return np.cov(z.detach().double().numpy(), rowvar=False)


# ---- full whitening ----


def numpy_whitening(x: Tensor, eps: float) -> np.ndarray:
    """solo-learn's `Whitening2d`, in float64 and with an explicit inverse."""
    a = x.detach().double().numpy()
    cov = (1 - eps) * np.cov(a, rowvar=False) + eps * np.eye(a.shape[1])
    return (a - a.mean(0)) @ np.linalg.inv(np.linalg.cholesky(cov)).T


@pytest.mark.parametrize(("rows", "width", "eps"), [(64, 12, 0.0), (64, 12, 1e-3), (8, 12, 0.1)])
def test_whitening_is_numpys(rows: int, width: int, eps: float) -> None:
    x = source(width)(rows)
    z = Whitening(width, eps)(x)
    np.testing.assert_allclose(z.numpy(), numpy_whitening(x, eps), atol=2e-5)


@pytest.mark.parametrize(("rows", "eps"), [(64, 0.0), (64, 1e-2), (8, 0.1)])
def test_whitening_is_lightlys_in_both_modes(rows: int, eps: float) -> None:
    draw = source(12)
    ours = Whitening(12, eps, momentum=0.01)
    theirs = Whitening2d(12, momentum=0.01, eps=eps)
    for _ in range(3):
        x = draw(rows)
        z, grad = gradient(ours, x)
        their_z, their_grad = gradient(theirs, x)
        torch.testing.assert_close(z, their_z, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grad, their_grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean.flatten())
    torch.testing.assert_close(ours.running_covariance, theirs.running_variance)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), atol=1e-5, rtol=1e-5)


@with_solo
@pytest.mark.filterwarnings("ignore:torch.triangular_solve")
@pytest.mark.parametrize(("rows", "eps"), [(64, 0.0), (64, 1e-2), (8, 0.1)])
def test_whitening_is_solo_learns(rows: int, eps: float, solo: ModuleType) -> None:
    x = source(12)(rows)
    z, grad = gradient(Whitening(12, eps), x)
    their_z, their_grad = gradient(solo.Whitening2d(12, eps), x)
    torch.testing.assert_close(z, their_z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad, their_grad, atol=1e-5, rtol=1e-4)


def gradient(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    z = layer(x)
    z.cos().sum().backward()
    return z.detach(), x.grad


def test_whitening_differs_from_scikit_learns_by_a_rotation() -> None:
    x = source(12)(256)
    z = Whitening(12, eps=0)(x).double().numpy()
    theirs = PCA(whiten=True).fit_transform(x.double().numpy())
    assert np.abs(covariance(torch.from_numpy(z)) - np.eye(12)).max() < 1e-3
    rotation, *_ = np.linalg.lstsq(z, theirs, rcond=None)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(12), atol=1e-4)
    np.testing.assert_allclose(z @ rotation, theirs, atol=1e-4)


def test_default_whitening_gives_the_identity_in_training_and_on_fresh_data() -> None:
    draw = source(16)
    layer = Whitening(16)
    for _ in range(60):
        z = layer(draw(512))
    assert np.abs(covariance(z) - np.eye(16)).max() < 5e-3  # the share of eps in it
    assert z.mean(0).abs().max() < 1e-4
    fresh = layer.eval()(draw(20_000))
    assert np.abs(covariance(fresh) - np.eye(16)).max() < 0.1
    assert fresh.mean(0).abs().max() < 0.1


def test_running_statistics_follow_the_batches_with_unbiased_covariance() -> None:
    draw = source(5)
    layer, mean, cov = Whitening(5, momentum=0.25), np.zeros(5), np.eye(5)
    for _ in range(4):
        x = draw(9)
        layer(x)
        mean = 0.25 * x.double().numpy().mean(0) + 0.75 * mean
        cov = 0.25 * np.cov(x.double().numpy(), rowvar=False) + 0.75 * cov
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, atol=1e-6)
    np.testing.assert_allclose(layer.running_covariance.numpy(), cov, atol=2e-5)


def test_whitening_does_not_see_scale_or_shift() -> None:
    x = source(6)(64)
    layer = Whitening(6, eps=0)
    torch.testing.assert_close(layer(3 * x + 5), layer(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize(("rows", "width"), [(8, 12), (64, 256), (12, 12)])
def test_default_eps_trains_with_fewer_rows_than_features(
    scale: float, rows: int, width: int
) -> None:
    x = scale * torch.randn(rows, width)
    z, grad = gradient(Whitening(width), x)
    assert z.abs().max() < 10
    assert scale * grad.norm() < 10 * rows**0.5


def test_singular_covariance_is_refused_with_what_to_do() -> None:
    with pytest.raises(DataError, match=r"eps=0\) .*8 rows: .*singular.*more than 12 .*eps=0\.001"):
        Whitening(12, eps=0)(torch.randn(8, 12))
    constant = torch.randn(64, 12).index_fill(1, torch.tensor([3]), 1.0)
    with pytest.raises(DataError, match=r"64 rows: .*singular.*largest variance is .*eps=0\.001"):
        Whitening(12, eps=0)(constant)
    with pytest.raises(DataError, match=r"singular.*variance is .*e\+10.*or batch norm before it"):
        Whitening(64)(1e5 * torch.randn(32, 64))
    layer = Whitening(2, eps=0).eval()
    layer.running_covariance.fill_(1.0)
    with pytest.raises(DataError, match=r"cannot whiten with its running statistics: .*singular"):
        layer(torch.randn(8, 2))


def test_refused_batch_leaves_the_statistics_alone() -> None:
    layer = moved(Whitening(12))
    before = state(layer)
    for bad in (torch.full((32, 12), torch.nan), 1e6 * torch.randn(4, 12), torch.randn(1, 12)):
        with pytest.raises(DataError):
            layer(bad)
    assert same(state(layer), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(value: float) -> None:
    x = torch.randn(32, 4)
    x[3, 2] = value
    with pytest.raises(DataError, match=r"a batch of 32 rows: there are nan or inf"):
        Whitening(4)(x)


def test_compiled_failure_gives_nan() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Whitening(64), fullgraph=True, backend="eager")
    assert compiled(1e5 * torch.randn(32, 64)).isnan().any()


# ---- iterative normalisation ----


def numpy_iternorm(x: Tensor, size: int, steps: int = 5, eps: float = 1e-5) -> np.ndarray:
    """Newton's iteration for the inverse square root, group by group, in float64."""
    a = x.detach().double().numpy()
    parts = []
    for part in np.split(a, a.shape[1] // size, axis=1):
        centred = part - part.mean(0)
        sigma = centred.T @ centred / len(a) + eps * np.eye(size)
        scaled, root = sigma / np.trace(sigma), np.eye(size)
        for _ in range(steps):
            root = 1.5 * root - 0.5 * root @ root @ root @ scaled
        parts.append(centred @ (root / np.sqrt(np.trace(sigma))).T)
    return np.concatenate(parts, axis=1)


GROUPS = [(128, 2), (256, 4), (2048, 32), (100, 2), (1000, 8), (192, 3), (65, 1), (7, 1), (64, 1)]


@pytest.mark.parametrize(("width", "size"), GROUPS)
def test_iternorm_is_numpys_group_by_group(width: int, size: int) -> None:
    layer = IterNorm(width)
    assert layer.running_mean.shape == (width // size, size, 1)
    assert layer.running_wm.shape == (width // size, size, size)
    assert layer.weight.shape == layer.bias.shape == (1, width)
    x = torch.randn(32, width) @ torch.randn(width, width) / width**0.5 + 1
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    expected = numpy_iternorm(x, size) * layer.weight.detach().numpy()
    expected += layer.bias.detach().numpy()
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-4)


@with_solo
@pytest.mark.filterwarnings("ignore:.*custom_fwd")
@pytest.mark.parametrize("width", [w for w, _ in GROUPS])
def test_iternorm_is_solo_learns(width: int, solo: ModuleType) -> None:
    ours, theirs = IterNorm(width), solo.IterNorm(width, num_groups=64, T=5, dim=2)
    assert same(state(ours), state(theirs))
    with torch.no_grad():
        theirs.weight.normal_()
        theirs.bias.normal_()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for _ in range(3):
        x = torch.randn(64, width) @ torch.randn(width, width) / width**0.5 + 1
        (z, grad), (their_z, their_grad) = gradient(ours, x), gradient(theirs, x)
        assert torch.equal(z, their_z)
        assert (grad - their_grad).norm() <= 2e-6 * their_grad.norm()
        assert same(state(ours), state(theirs))
    for name in ("weight", "bias"):
        assert torch.equal(getattr(ours, name).grad, getattr(theirs, name).grad)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_iternorm_decorrelates_within_groups_in_training_and_on_fresh_data() -> None:
    draw = source(16)
    layer = IterNorm(16, num_groups=4, iterations=9)
    for _ in range(60):
        z = layer(draw(512))
    fresh = layer.eval()(draw(20_000))
    for group in range(4):
        inside = slice(4 * group, 4 * group + 4)
        assert np.abs(covariance(z[:, inside]) - np.eye(4)).max() < 1e-2
        assert np.abs(covariance(fresh[:, inside]) - np.eye(4)).max() < 0.1
    assert np.abs(covariance(z) - np.eye(16)).max() > 0.05  # only within groups


def test_iternorms_scale_and_shift_do_not_decay() -> None:
    groups = param_groups(nn.Sequential(nn.Linear(4, 12), IterNorm(12)), 0.1)
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.1), (3, 0.0)]


# ---- both ----


@LAYERS
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_finite_differences(layer: Any, training: bool) -> None:
    norm = moved(layer(6), 6).double()
    x = source(6)(9).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: copy.deepcopy(norm).train(training)(x), (x,))


@LAYERS
def test_float32_gradients_are_near_float64s(layer: Any) -> None:
    norm, x = layer(48), source(48)(128)
    _, grad = gradient(norm, x)
    _, exact = gradient(copy.deepcopy(norm).double(), x.double())
    assert (grad - exact).norm() < 1e-4 * exact.norm()


@LAYERS
def test_evaluation_sees_rows_alone_and_changes_nothing(layer: Any) -> None:
    norm = moved(layer(12)).eval()
    before, x = state(norm), source(12)(8)
    z = norm(x)
    torch.testing.assert_close(torch.cat([norm(row[None]) for row in x]), z, atol=1e-5, rtol=1e-5)
    assert norm(x[:0]).shape == (0, 12)
    assert same(state(norm), before)


@LAYERS
def test_fixed_layer_uses_and_keeps_its_statistics_in_training(layer: Any) -> None:
    norm, x = moved(layer(12)), source(12)(32)
    expected = copy.deepcopy(norm).eval()(x)
    model = nn.Sequential(norm)
    freeze(model, True)
    before = state(model)
    assert norm.fixed
    assert list(model.parameters()) == []
    assert torch.equal(model.train()(x), expected)
    assert torch.equal(model(x[:1]), copy.deepcopy(model).eval()(x[:1]))  # one row will do
    assert same(state(model), before)
    assert before.keys() == {f"0.{k}" for k in layer(12).state_dict()}


@LAYERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_round_the_statistics(layer: Any, dtype: torch.dtype) -> None:
    norm = layer(12)
    exact = copy.deepcopy(norm)
    x = source(12)(32).to(dtype)  # what a linear layer gives under autocast
    with torch.autocast("cpu", dtype):
        z = norm(x)
    assert z.dtype == torch.float32
    assert torch.equal(z, exact(x.float()))
    assert same(state(norm), state(exact))


@LAYERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_type_of_the_input_is_kept_without_autocast(layer: Any, dtype: torch.dtype) -> None:
    norm = moved(layer(12)).to(dtype)
    for training in (True, False):
        z = norm.train(training)(source(12)(32).to(dtype))
        assert z.dtype == dtype
        assert z.isfinite().all()


@LAYERS
def test_statistics_stay_exact_in_half_precision(layer: Any) -> None:
    norm = moved(layer(12))
    before = {k: v for k, v in state(norm).items() if k.startswith("running")}
    norm.half().bfloat16()
    assert len(before) == 2
    assert all(torch.equal(norm.state_dict()[k], v) for k, v in before.items())
    assert all(p.dtype == torch.bfloat16 for p in norm.parameters())
    assert {b.dtype for b in norm.double().buffers()} == {torch.float64}
    assert {b.device.type for b in norm.to("meta", torch.half).buffers()} == {"meta"}


@LAYERS
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_train_on_alike_and_share_nothing(
    layer: Any, copied: Callable[[nn.Module], nn.Module]
) -> None:
    norm = moved(layer(12))
    twin, x = copied(norm), source(12)(32)
    assert torch.equal(twin(x), norm(x))
    assert same(state(twin), state(norm))
    pairs = zip(norm.state_dict().values(), twin.state_dict().values(), strict=True)
    assert all(a.data_ptr() != b.data_ptr() for a, b in pairs)


@LAYERS
@pytest.mark.parametrize("assign", [True, False])
def test_layer_made_on_the_meta_device_takes_a_state_dict(layer: Any, assign: bool) -> None:
    norm, x = moved(layer(12)).eval(), source(12)(8)
    with torch.device("meta"):
        empty = layer(12).eval()
        assert empty(torch.empty(3, 12)).shape == (3, 12)
        assert empty.train()(torch.empty(3, 12)).shape == (3, 12)
    empty = empty.eval() if assign else empty.eval().to_empty(device="cpu")
    empty.load_state_dict(norm.state_dict(), assign=assign)
    assert torch.equal(empty(x), norm(x))


@LAYERS
def test_reset_gives_a_layer_from_the_meta_device_its_first_values(layer: Any) -> None:
    with torch.device("meta"):
        empty = layer(12)
    empty = empty.to_empty(device="cpu")
    for tensor in empty.state_dict().values():
        tensor.detach().fill_(torch.nan)
    empty.reset_parameters()
    assert same(state(empty), state(layer(12)))
    assert torch.equal(layer(12).eval()(torch.eye(12)), torch.eye(12))  # nothing learnt yet


@LAYERS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_compiles_and_exports_as_one_graph(layer: Any, training: bool, autocast: bool) -> None:
    norm = moved(layer(12)).train(training)
    x = source(12)(9)
    eager, example = copy.deepcopy(norm), source(12)(4)
    torch._dynamo.reset()
    compiled = torch.compile(norm, fullgraph=True, backend="eager")
    shapes = {"x": {0: torch.export.Dim("batch", min=2)}}
    exported = torch.export.export(copy.deepcopy(eager), (example,), dynamic_shapes=shapes).module()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = eager(x)
        assert torch.equal(compiled(x), expected)
    torch.testing.assert_close(exported(x), expected)
    assert same(state(norm), state(eager))  # the statistics, too
    torch.testing.assert_close(dict(exported.named_buffers()), dict(eager.named_buffers()))


@LAYERS
def test_it_stands_where_batch_norm_does(layer: Any) -> None:
    head = MLPHead(20, 12)
    head.layers[1] = layer(20)
    head.layers.append(layer(12))
    before = state(head)
    optimiser = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(3):
        x = torch.randn(8, 20, requires_grad=True)
        z = head(x)
        (z * torch.randn_like(z)).sum().backward()
        optimiser.step()
    assert x.grad.isfinite().all()
    assert not any(torch.equal(v, before[k]) for k, v in state(head).items())
    assert head(torch.randn(4, 5, 20)).shape == (4, 5, 12)


@LAYERS
@pytest.mark.parametrize("rows", [0, 1])
def test_batches_without_a_covariance_are_refused(layer: Any, rows: int) -> None:
    name = layer.__name__
    with pytest.raises(DataError, match=rf"{name} needs at least 2 rows.*has {rows}\..*drop_last"):
        layer(4)(torch.randn(rows, 4))


@LAYERS
@pytest.mark.parametrize("shape", [(8, 5), (4,), (2, 3, 4), (2, 4, 3, 3)])
def test_other_shapes_are_refused_with_both_widths(layer: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(DimensionError, match=rf"\(batch, 4\); .*width={shape[-1]}\b"):
        layer(4)(torch.randn(shape))


@LAYERS
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width must be a positive integer"),
        ({"width": 4, "eps": 1.0}, r"eps must be a number in \[0, 1\)"),
        ({"width": 4, "momentum": -0.1}, r"momentum must be a number in \[0, 1\)"),
    ],
)
def test_impossible_options_are_refused(layer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        layer(**options)
    with pytest.raises(OptionError, match="num_groups must be a positive integer"):
        IterNorm(8, num_groups=0)
