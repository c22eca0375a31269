from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, make_blobs
from torch import Tensor, nn

from headplug import create_head
from headplug.errors import CheckpointError, DataError, DimensionError, OptionError
from headplug.heads.rbf import (
    RADIALS,
    RBFHead,
    RBFLayer,
    k_means,
    scale_normalized_separation,
    squared_distances,
)

Array = np.ndarray
PHI: dict[str, Callable[[Array], Array]] = {  # of the scaled distance, as the papers write them
    "gaussian": lambda r: np.exp(-(r**2)),
    "inverse_quadratic": lambda r: 1 / (1 + r**2),
    "inverse_multiquadric": lambda r: 1 / np.sqrt(1 + r**2),
    "multiquadric": lambda r: np.sqrt(1 + r**2),
    "thin_plate": lambda r: np.where(r > 0, r**2 * np.log(np.where(r > 0, r, 1)), 0),
}
each_radial = pytest.mark.parametrize("radial", list(PHI))


def numpy_state(module: nn.Module) -> dict[str, Array]:
    return {k: v.detach().double().numpy() for k, v in module.state_dict().items()}


def layer_by_hand(x: Array, state: dict[str, Array], radial: str, normalize: bool) -> Array:
    r = np.linalg.norm(x[:, None] - state["kernels_centers"], axis=-1)
    phi = PHI[radial](np.exp(state["log_shapes"]) * r)
    if normalize:
        phi = phi / (1e-9 + phi.sum(1, keepdims=True))
    return phi @ state["weights"].T


def head_by_hand(head: RBFHead, x: Array, training: bool) -> Array:
    """The head from the names and values of its weights."""
    layers: dict[int, dict[str, Array]] = {}
    for key, value in numpy_state(head).items():
        _, index, name = key.split(".")
        layers.setdefault(int(index), {})[name] = value
    for index in sorted(layers):
        own = layers[index]
        if "log_shapes" in own:
            x = layer_by_hand(x, own, head.radial, head.normalize)
        elif "running_mean" in own:
            mean, var = own["running_mean"], own["running_var"]
            if training:
                mean, var = x.mean(0), x.var(0)
            x = (x - mean) / np.sqrt(var + 1e-5) * own["weight"] + own["bias"]
        else:
            x = x @ own["weight"].T + own.get("bias", 0)
    return x


def reaching(head: RBFHead, x: Tensor) -> list[tuple[RBFLayer, Tensor]]:
    """Every RBF layer with what reaches it in training mode."""
    found = []
    with torch.no_grad():
        for layer in copy.deepcopy(head.layers).train():
            if isinstance(layer, RBFLayer):
                found.append((layer, x))
            x = layer(x)
    return found


def quantisation_error(layer: RBFLayer, rows: Tensor) -> float:
    return torch.cdist(rows, layer.kernels_centers).min(1).values.square().mean().item()


@each_radial
@pytest.mark.parametrize("normalize", [True, False])
def test_layer_is_numpys(radial: str, normalize: bool) -> None:
    layer = RBFLayer(6, 9, 4, radial, normalize)
    with torch.no_grad():
        layer.log_shapes.add_(0.5)  # thin-plate values of both signs
    x = torch.randn(20, 6)
    expected = layer_by_hand(x.double().numpy(), numpy_state(layer), radial, normalize)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(layer(x).detach(), expected, atol=3e-6 * scale)
    exact = layer.double()(x.double()).detach()
    np.testing.assert_allclose(exact, expected, atol=1e-12 * scale)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 4, "normalize": True, "radial": "inverse_multiquadric"},
        {"num_layers": 3, "norm": "batch", "output_norm": "batch", "hidden_dim": 7},
        {"norm": "batch", "radial": "multiquadric"},
    ],
)
def test_head_is_numpys(options: dict[str, Any], training: bool) -> None:
    head = RBFHead(6, 5, num_kernels=9, **options)
    x = torch.randn(24, 6)
    head(x + 1)  # running statistics of their own
    expected = head_by_hand(head, x.double().numpy(), training)
    z = head.train(training)(x).detach()
    np.testing.assert_allclose(z, expected, atol=2e-5 * np.abs(expected).max())


@each_radial
@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_are_those_of_finite_differences(radial: str, normalize: bool) -> None:
    layer = RBFLayer(4, 5, 3, radial, normalize).double()
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        layer.log_shapes.add_(1.5)  # thin-plate values far from a sum of zero
        x[0] = layer.kernels_centers[0]  # a row on a centre
    names = [n for n, _ in layer.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Any:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *layer.parameters()))


@each_radial
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_value_and_gradient_on_a_centre_are_finite(
    radial: str, normalize: bool, dtype: torch.dtype
) -> None:
    layer = RBFLayer(6, 4, 3, radial, normalize).to(dtype)
    x = layer.kernels_centers.detach().clone().requires_grad_()
    distances = squared_distances(x.detach(), layer.kernels_centers.detach()).diagonal()
    assert (distances <= 1e-12 if dtype == torch.float64 else distances <= 0.05).all()
    layer(x).square().sum().backward()
    for value in (layer(x), x.grad, *(p.grad for p in layer.parameters())):
        assert value.isfinite().all()
    at_zero = RADIALS[radial](torch.zeros(3, dtype=dtype)).double().numpy()
    np.testing.assert_array_equal(at_zero, PHI[radial](np.zeros(3)))


@each_radial
def test_kernels_at_zero_distance_have_zero_slope_in_the_input(radial: str) -> None:
    layer = RBFLayer(6, 1, 1, radial)
    x = layer.kernels_centers.detach().clone().requires_grad_()
    layer.kernels(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("radial", ["gaussian", "inverse_multiquadric"])
def test_normalised_kernels_far_from_every_centre_are_finite(radial: str) -> None:
    layer = RBFLayer(6, 4, 3, radial, normalize=True)
    x = torch.full((2, 6), 1e6, requires_grad=True)
    z = layer(x)
    z.sum().backward()
    assert z.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


class TestDistances:
    def test_they_are_numpys_and_never_negative(self) -> None:
        x, centers = torch.randn(50, 30), torch.randn(20, 30)
        x[:20] = centers
        expected = np.square(x.numpy()[:, None].astype(float) - centers.numpy()).sum(-1)
        squares = squared_distances(x, centers)
        np.testing.assert_allclose(squares, expected, rtol=2e-6, atol=1e-4)
        assert (squares >= 0).all()

    def test_an_offset_of_the_features_costs_no_digits(self) -> None:
        x, centers = torch.randn(50, 512) + 100, torch.randn(20, 512) + 100
        expected = np.square(x.numpy()[:, None].astype(float) - centers.numpy()).sum(-1)
        np.testing.assert_allclose(squared_distances(x, centers), expected, rtol=2e-6)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("normalize", [True, False])
    def test_autocast_leaves_the_kernels_in_float32(
        self, dtype: torch.dtype, normalize: bool
    ) -> None:
        layer = RBFLayer(256, 32, 8, normalize=normalize)
        x = torch.randn(16, 256).to(dtype)  # what the linear layer before gives under autocast
        exact = layer.kernels(x.float())
        with torch.autocast("cpu", dtype):
            values, z = layer.kernels(x), layer(x)
        assert values.dtype == torch.float32
        assert torch.equal(values, exact)
        assert z.dtype == dtype
        assert torch.allclose(z.float(), layer(x.float()), atol=0.02 * z.abs().max().item())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_kernels_of_a_cast_layer_are_as_exact_as_its_weights(self, dtype: torch.dtype) -> None:
        layer = RBFLayer(256, 32, 8).to(dtype)
        x = torch.randn(16, 256, dtype=dtype)
        assert layer(x).dtype == dtype
        exact = copy.deepcopy(layer).double().kernels(x.double())
        assert torch.allclose(layer.kernels(x).double(), exact, rtol=1e-5)

    def test_no_tensor_of_batch_times_kernels_times_features_is_kept(self) -> None:
        sizes: list[int] = []
        layer = RBFLayer(40, 24, 8, normalize=True)

        def note(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            layer(torch.randn(32, 40, requires_grad=True))
        assert max(sizes) == 32 * 40


class TestStart:
    def test_a_seed_gives_the_authors_values_in_their_order(self) -> None:
        torch.manual_seed(5)
        head = RBFHead(6, 4, 8, num_layers=3, num_kernels=10)
        torch.manual_seed(5)
        for layer in head.rbf_layers:  # the authors build these first
            assert torch.equal(layer.kernels_centers, torch.empty(10, 8).uniform_(-1, 1))
            shapes = torch.empty(10).normal_(0, 0.1) - math.log(8) / 2
            assert torch.allclose(layer.log_shapes, shapes, atol=1e-6)
            weights = nn.init.xavier_uniform_(torch.empty(8, 10))
            assert torch.equal(layer.weights, weights)
        for index, widths in ((0, (6, 8)), (2, (8, 8)), (4, (8, 4))):
            assert torch.equal(head.layers[index].weight, nn.Linear(*widths).weight)

    @pytest.mark.parametrize("width", [512, 2048])
    def test_wide_gaussians_are_alive_and_would_be_zero_with_shapes_of_one(
        self, width: int
    ) -> None:
        layer = RBFLayer(width, 128, 16)
        h = nn.Linear(width, width)(torch.rand(32, width))
        values = layer.kernels(h)
        assert ((values > 0.1) & (values < 0.99)).all()
        with torch.no_grad():
            layer.log_shapes.add_(math.log(width) / 2)
        assert (layer.kernels(h) == 0).all()

    # SSL parameters of runs in results/imagenet-100 of the authors' code, less ResNet-50's
    # 23,508,032: the layers have these tensors and no others.
    @pytest.mark.parametrize(
        ("count", "widths", "num_layers", "num_kernels"),
        [
            (28491072, (2048, 2048, 128), 2, 128),
            (30064320, (2048, 2048, 128), 2, 512),
            (34260672, (2048, 2048, 128), 3, 256),
            (37932608, (2048, 2048, 128), 4, 128),
        ],
    )
    def test_parameter_counts_are_those_of_published_runs(
        self, count: int, widths: tuple[int, int, int], num_layers: int, num_kernels: int
    ) -> None:
        with torch.device("meta"):
            head = RBFHead(widths[0], widths[2], widths[1], num_layers, num_kernels)
        assert sum(p.numel() for p in head.parameters()) == count - 23508032

    def test_projector_and_predictor_count_as_in_published_byol(self) -> None:
        with torch.device("meta"):
            projector = create_head("rbf", input_dim=2048, hidden_dim=4096, output_dim=256)
            predictor = create_head("rbf_predictor", input_dim=256, hidden_dim=4096, output_dim=256)
        parameters = itertools.chain(projector.parameters(), predictor.parameters())
        assert sum(p.numel() for p in parameters) == 39249984 - 23508032


def authors_state(prefix: str, batch_norm: bool = False) -> dict[str, Tensor]:
    """Names and shapes of the authors' projection head: 6 > 8 > 8 > 4, ten kernels a layer."""
    state: dict[str, Tensor] = {}
    index = 0
    for fan_in, fan_out, kernels in ((6, 8, 10), (8, 8, 10), (8, 4, 0)):
        state[f"{index}.weight"] = torch.randn(fan_out, fan_in)
        if batch_norm:
            index += 1
            for name in ("weight", "bias", "running_mean"):
                state[f"{index}.{name}"] = torch.randn(fan_out)
            state[f"{index}.running_var"] = torch.rand(fan_out)
            state[f"{index}.num_batches_tracked"] = torch.tensor(7)
        else:
            state[f"{index}.bias"] = torch.randn(fan_out)
        if kernels:
            index += 1
            state[f"{index}.weights"] = torch.randn(fan_out, kernels)
            state[f"{index}.kernels_centers"] = torch.randn(kernels, fan_out)
            state[f"{index}.log_shapes"] = torch.randn(kernels)
        index += 1
    return {f"{prefix}layers.{k}": v for k, v in state.items()}


AUTHORS = {"input_dim": 6, "hidden_dim": 8, "output_dim": 4, "num_layers": 3, "num_kernels": 10}
BATCH_NORM = {False: {}, True: {"norm": "batch", "output_norm": "batch"}}


@pytest.mark.parametrize("batch_norm", [False, True])
class TestAuthorsKeys:
    def test_their_state_dict_loads_strictly(self, batch_norm: bool) -> None:
        head = create_head("rbf", **AUTHORS, **BATCH_NORM[batch_norm])
        theirs = authors_state("", batch_norm)
        assert list(head.state_dict()) == list(theirs)
        head.load_state_dict(theirs, strict=True)
        assert all(torch.equal(head.state_dict()[k], theirs[k]) for k in theirs)

    def test_their_checkpoint_is_read_whole(self, batch_norm: bool, tmp_path: Path) -> None:
        theirs = authors_state("projection_head.", batch_norm)
        momentum = authors_state("projection_head_momentum.", batch_norm)
        checkpoint = {
            "epoch": 99,
            "global_step": 12300,
            "pytorch-lightning_version": "2.5.5",
            "state_dict": {"backbone.0.weight": torch.randn(3, 3), **theirs, **momentum},
            "hyper_parameters": {"learning_rate": 0.3, "optimizer": "LARS"},
        }
        torch.save(checkpoint, tmp_path / "last.ckpt")
        options = {**AUTHORS, **BATCH_NORM[batch_norm]}
        head = create_head("rbf", **options, weights=tmp_path / "last.ckpt")
        ours = head.state_dict(prefix="projection_head.")
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
        with pytest.raises(CheckpointError, match=r"kernels_centers|weights"):
            create_head("rbf", **{**options, "num_kernels": 11}, weights=tmp_path / "last.ckpt")


class TestSeparation:
    def test_it_is_the_mean_over_pairs(self) -> None:
        centers, sigmas = torch.randn(12, 5) * 3, torch.rand(12) + 0.2
        c, s = centers.double().numpy(), sigmas.double().numpy()
        energies = []
        for i in range(12):
            for j in range(12):
                if i != j:
                    d = math.dist(c[i], c[j]) / (math.sqrt(s[i] ** 2 + s[j] ** 2 + 1e-8) * 5**0.5)
                    energies.append(d**2 * math.exp(-(d**2)))
        found = scale_normalized_separation(centers, sigmas).item()
        assert found == pytest.approx(np.mean(energies), rel=1e-5)

    def test_its_range_is_reached_at_both_ends(self) -> None:
        corners = torch.eye(4) * 2**0.5 * 2  # 4 apart in 4 dimensions: d = 2 / sqrt(2 s^2)
        sigmas = torch.full((4,), 2**0.5)
        assert scale_normalized_separation(corners, sigmas).item() == pytest.approx(1 / math.e)
        for centers in (corners * 0, corners * 100):
            assert scale_normalized_separation(centers, sigmas).item() == pytest.approx(0, abs=1e-6)

    def test_a_head_gives_that_of_its_last_layer_with_the_factor_as_width(self) -> None:
        head = RBFHead(6, 4, num_layers=3, num_kernels=10)
        with torch.no_grad():
            head.rbf_layers[-1].log_shapes.zero_()
        centers = head.rbf_layers[-1].kernels_centers
        expected = scale_normalized_separation(centers, torch.ones(10)).item()
        assert head.separation() == pytest.approx(expected)
        with torch.no_grad():
            head.rbf_layers[0].kernels_centers.zero_()
        assert head.separation() == pytest.approx(expected)

    def test_a_kernels_distance_to_itself_does_not_count(self) -> None:
        centers = torch.randn(50, 512) * 3  # rounding makes that distance more than zero
        assert scale_normalized_separation(centers, torch.full((50,), 3e-3)).item() == 0

    def test_it_can_be_trained(self) -> None:
        centers = torch.randn(6, 3, requires_grad=True)
        sigmas = torch.ones(6, requires_grad=True)
        scale_normalized_separation(centers, sigmas).backward()
        for tensor in (centers, sigmas):
            assert tensor.grad is not None
            assert tensor.grad.isfinite().all()
            assert tensor.grad.abs().sum() > 0

    @pytest.mark.parametrize("shapes", [((6,), (6,)), ((6, 3), (3,)), ((6, 3), (6, 1))])
    def test_shapes_that_do_not_fit_are_refused(self, shapes: Any) -> None:
        with pytest.raises(DimensionError, match=r"centers must be \(kernels, features\)"):
            scale_normalized_separation(*(torch.ones(shape) for shape in shapes))

    def test_one_kernel_has_no_separation(self) -> None:
        with pytest.raises(OptionError, match="two kernels or more, not 1"):
            RBFHead(6, 4, num_kernels=1).separation()


class TestKMeans:
    @pytest.mark.parametrize("k", [1, 10, 64])
    def test_inertia_is_scikit_learns_within_a_few_percent(self, k: int) -> None:
        data = load_digits().data.astype(np.float32)
        theirs = KMeans(k, n_init=3, random_state=0).fit(data).inertia_
        rows = torch.from_numpy(data)
        centers = k_means(rows, k)
        nearest = torch.cdist(rows.double(), centers.double()).min(1)
        assert nearest.values.square().sum().item() < 1.04 * theirs
        means = torch.stack([rows[nearest.indices == i].mean(0) for i in range(k)])
        assert torch.allclose(centers, means, atol=1e-3)  # it went on until nothing moved

    def test_clusters_that_lie_apart_are_found(self) -> None:
        where = np.random.default_rng(0).normal(size=(12, 20)) * 10
        data, _ = make_blobs(600, centers=where, cluster_std=0.1, random_state=0)
        centers = k_means(torch.from_numpy(data).float(), 12).numpy()
        distances = np.linalg.norm(centers[:, None] - where, axis=-1)
        assert sorted(distances.argmin(1)) == list(range(12))
        assert distances.min(1).max() < 0.2

    def test_as_many_centres_as_rows_are_the_rows(self) -> None:
        rows = torch.randn(30, 4)
        nearest = torch.cdist(rows.double(), k_means(rows, 30).double()).min(1)
        assert sorted(nearest.indices.tolist()) == list(range(30))
        assert nearest.values.max() < 1e-6

    def test_the_seed_alone_decides(self) -> None:
        rows = torch.rand(300, 8)
        first = k_means(rows, 20, seed=1)
        torch.manual_seed(99)
        assert torch.equal(k_means(rows, 20, seed=1), first)
        assert not torch.equal(k_means(rows, 20, seed=2), first)


class TestInitCenters:
    @pytest.mark.parametrize("options", [{"num_layers": 4}, {"num_layers": 3, "norm": "batch"}])
    def test_every_layer_fits_what_reaches_it_once_those_before_are_set(
        self, options: dict[str, Any]
    ) -> None:
        head = RBFHead(10, 4, 12, num_kernels=16, **options)
        features = torch.rand(320, 10)
        before = [quantisation_error(layer, rows) for layer, rows in reaching(head, features)]
        head.init_centers(features)
        for (layer, rows), error in zip(reaching(head, features), before, strict=True):
            spread = rows.var(0).sum().item()
            assert quantisation_error(layer, rows) < 0.9 * min(spread, error)
            clusters = torch.cdist(rows, layer.kernels_centers).argmin(1)
            means = torch.stack([rows[clusters == i].mean(0) for i in range(16)])
            assert torch.allclose(layer.kernels_centers, means, atol=1e-2 * spread**0.5)
            centers = layer.kernels_centers.detach().double()
            distances = torch.cdist(centers, rows.double()).numpy()
            nearest = np.sort(distances, axis=1)[:, : 2 * 320 // 16]
            widths = np.sqrt(np.square(nearest).mean(1))
            np.testing.assert_allclose(layer.log_shapes.exp().detach(), 1 / widths, rtol=1e-3)

    @pytest.mark.parametrize("name", ["rbf", "rbf_predictor"])
    @pytest.mark.parametrize("training", [True, False])
    def test_mode_statistics_generators_and_other_weights_stay(
        self, name: str, training: bool
    ) -> None:
        head = create_head(name, input_dim=10, output_dim=4, num_kernels=16).train(training)
        head.layers[1].train(not training)
        modes = [m.training for m in head.modules()]
        before = {k: v.clone() for k, v in head.state_dict().items()}
        features = torch.rand(100, 10, requires_grad=True)
        random = torch.get_rng_state()
        head.init_centers(features)
        assert torch.equal(torch.get_rng_state(), random)
        assert [m.training for m in head.modules()] == modes
        moved = {k for k, v in head.state_dict().items() if not torch.equal(v, before[k])}
        assert {k.rpartition(".")[2] for k in moved} == {"kernels_centers", "log_shapes"}
        assert features.grad is None
        assert all(p.requires_grad and p.is_leaf for p in head.parameters())

    def test_an_optimiser_built_before_trains_the_new_values(self) -> None:
        head = RBFHead(10, 4, num_kernels=16)
        optimiser = torch.optim.SGD(head.parameters(), lr=0.1)
        features = torch.rand(100, 10)
        head.init_centers(features)
        before = {k: v.clone() for k, v in head.state_dict().items()}
        head(features).square().sum().backward()
        optimiser.step()
        for key, value in head.state_dict().items():
            assert not torch.equal(value, before[key]), key

    def test_same_seed_gives_the_same_head_and_leading_dims_fold(self) -> None:
        heads = [RBFHead(10, 4, num_kernels=16)]
        heads += [copy.deepcopy(heads[0]) for _ in range(2)]
        features = torch.rand(10, 12, 10)
        inputs = (features, features.flatten(0, 1), features)
        for head, x, s in zip(heads, inputs, (3, 3, 4), strict=True):
            head.init_centers(x, seed=s)
        first, same, other = (h.layers[1].kernels_centers for h in heads)
        assert torch.equal(first, same)
        assert not torch.equal(first, other)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_it_takes_features_and_heads_of_any_type(self, dtype: torch.dtype) -> None:
        features = torch.rand(200, 10)
        exact = RBFHead(10, 4, num_kernels=4)
        head = copy.deepcopy(exact).to(dtype)
        exact.init_centers(features)
        with torch.autocast("cpu", torch.bfloat16):
            head.init_centers(features)
        layer, rows = reaching(head, features.to(dtype))[0]
        expected = exact.rbf_layers[0]
        assert layer.kernels_centers.dtype == dtype
        error = torch.cdist(rows.double(), layer.kernels_centers.double()).min(1).values
        best = torch.cdist(rows.double(), expected.kernels_centers.double()).min(1).values
        assert error.square().sum() < 1.1 * best.square().sum()

    def test_wide_deep_heads_start_alive(self) -> None:
        head = RBFHead(512, 16, num_layers=4, num_kernels=32)
        features = torch.rand(256, 512)
        z = [head(features)]
        head.init_centers(features)
        z.append(head(features))
        before, after = ((x.std(0).norm() / x.norm(dim=1).mean()).item() for x in z)
        assert after > 0.1
        assert after > 10 * before

    def test_duplicated_rows_give_finite_shapes(self) -> None:
        layer = RBFLayer(3, 4, 2)
        rows = torch.cat([torch.ones(100, 3), -torch.rand(10, 3)])
        layer.init_centers(rows)
        widths = torch.exp(-layer.log_shapes)
        assert widths.min() >= 0.999e-3 * widths.square().mean().sqrt()
        assert layer(rows).isfinite().all()

    def test_frozen_centres_and_shapes_stay(self) -> None:
        frozen = ["layers.1", "layers.3.kernels_centers"]
        head = create_head(
            "rbf", input_dim=10, output_dim=4, num_layers=4, num_kernels=16, freeze=frozen
        )
        before = {k: v.clone() for k, v in head.state_dict().items()}
        head.init_centers(torch.rand(100, 10))
        moved = {k for k, v in head.state_dict().items() if not torch.equal(v, before[k])}
        assert moved == {"layers.3.log_shapes", "layers.5.kernels_centers", "layers.5.log_shapes"}

    @pytest.mark.parametrize("freeze", [True, "layers.1"])
    def test_a_head_without_free_centres_is_refused(self, freeze: bool | str) -> None:
        head = create_head("rbf", input_dim=10, num_kernels=16, freeze=freeze)
        with pytest.raises(OptionError, match=r"frozen.*head.init_centers.*freeze_layers"):
            head.init_centers(torch.rand(100, 10))

    @pytest.mark.parametrize("shape", [(100, 9), (10, 100), (100,), ()])
    def test_features_of_another_width_are_refused(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(DimensionError, match=r"takes 10 features.*have shape \("):
            RBFHead(10, 4, num_kernels=16).init_centers(torch.rand(shape))

    @pytest.mark.parametrize(("kernels", "rows", "needed"), [(16, 15, 16), (16, 0, 16), (1, 1, 2)])
    def test_too_few_rows_are_refused(self, kernels: int, rows: int, needed: int) -> None:
        with pytest.raises(DataError, match=f"at least {needed} rows for {kernels} .* are {rows}"):
            RBFHead(10, 4, num_kernels=kernels).init_centers(torch.rand(rows, 10))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_values_that_are_not_finite_are_refused_with_their_count(self, bad: float) -> None:
        features = torch.rand(100, 10)
        features[3, 1] = features[3, 2] = features[50, 0] = bad
        with pytest.raises(DataError, match="2 of 100 rows have values that are not finite"):
            RBFHead(10, 4, num_kernels=16).init_centers(features)

    def test_an_error_on_the_way_changes_nothing(self) -> None:
        head = RBFHead(10, 4, num_layers=3, num_kernels=16)
        with torch.no_grad():
            head.layers[2].weight.zero_()  # all rows are the same behind it
        before = {k: v.clone() for k, v in head.state_dict().items()}
        with pytest.raises(
            DataError, match="only 1 of the 100 rows that reach an RBF layer differ"
        ):
            head.init_centers(torch.rand(100, 10))
        assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())


def test_centres_and_shapes_do_not_decay() -> None:
    head = RBFHead(6, 4, num_kernels=10)
    decayed, spared = head.param_groups(0.1)
    names = {id(p): n for n, p in head.named_parameters()}
    assert [names[id(p)] for p in decayed["params"]] == [
        "layers.0.weight", "layers.1.weights", "layers.2.weight",
    ]  # fmt: skip
    assert {"layers.1.kernels_centers", "layers.1.log_shapes"} < {
        names[id(p)] for p in spared["params"]
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_exports_and_compiles_under_autocast(dtype: torch.dtype) -> None:
    head = RBFHead(6, 4, num_kernels=10, norm="batch").eval()
    x = torch.randn(8, 6)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = head(x)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(head, fullgraph=True, backend="eager")(x), expected)
        exported = torch.export.export(head, (x,)).module()
        assert torch.equal(exported(x), expected)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("num_layers", 1, "at least 2"),
        ("num_layers", 0, "positive integer"),
        ("num_kernels", 0, "num_kernels must be a positive integer"),
        ("num_kernels", 2.5, "num_kernels must be a positive integer"),
        ("hidden_dim", -1, "hidden_dim must be a positive integer"),
        ("radial", "gausian", "no radial is called 'gausian'. Closest: gaussian"),
        ("radial", "tps", "no radial is called 'tps'"),
        ("norm", "bach", "no norm is called 'bach'"),
    ],
)
def test_impossible_options_are_refused(option: str, value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        RBFHead(6, 4, **{option: value})


@pytest.mark.parametrize("sizes", [(0, 4, 4), (4, 0, 4), (4, 4, 0), (4, 4, True)])
def test_a_layers_sizes_must_be_positive_integers(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(OptionError, match="must be a positive integer"):
        RBFLayer(*sizes)
