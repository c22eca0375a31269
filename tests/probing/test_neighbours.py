"""Which neighbours are found, in which order and at which distance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from headplug.probing import KNNSetting, knn_grid, knn_predict, neighbours
from headplug.probing.neighbours import Bank, Part

DISTANCES = ("cosine", "euclidean")


@pytest.fixture(scope="module")
def data(blobs):
    return *blobs(900), *blobs(300, seed=1)


def nearest(bank, queries, k, distance):
    found = Bank(bank, [Part.of(bank, queries)]).nearest(queries, k, distance, rows=10_000)
    _, far, index = zip(*found, strict=True)
    return torch.cat(far), torch.cat(index)


def exact(bank, queries, distance):
    bank, queries = bank.double().numpy(), queries.double().numpy()
    if distance == "cosine":
        bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    far = np.linalg.norm(queries[:, None] - bank, axis=2)
    return torch.from_numpy(far**2 / 2 if distance == "cosine" else far)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("k", [1, 7, 60, 899, 900])
def test_neighbours_and_distances_equal_float64(data, distance, k):
    bank, _, queries, _ = data
    far, index = nearest(bank, queries, k, distance)
    expected = exact(bank, queries, distance)
    lowest, order = expected.sort(dim=1, stable=True)
    assert (index == order[:, :k]).float().mean() > 0.9998  # float32 takes a few for equal
    torch.testing.assert_close(far.double(), lowest[:, :k], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("rows", "piece"), [(256, 70), (64, 256), (7, 333), (1, 900)])
def test_splitting_the_bank_and_the_queries_changes_nothing(
    data, monkeypatch, distance, rows, piece
):
    bank, _, queries, _ = data
    far, index = nearest(bank, queries, 100, distance)
    for name, value in (("ROWS", rows), ("PIECE", piece), ("CELLS", rows * piece), ("VALUES", 1)):
        monkeypatch.setattr(neighbours, name, value)
    if rows < piece:
        monkeypatch.setattr(neighbours, "VALUES", piece * bank.shape[1])
    again, same = nearest(bank, queries, 100, distance)
    assert (index == same).float().mean() > 0.999  # but for the rounding of products
    torch.testing.assert_close(far, again, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("piece", [16384, 64, 50])
@pytest.mark.parametrize("distance", DISTANCES)
def test_equally_near_samples_come_in_order_of_their_index(monkeypatch, distance, piece):
    monkeypatch.setattr(neighbours, "PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    distinct = torch.cat([torch.eye(4), -torch.eye(4)])  # products with them are exact
    which = torch.arange(640)[torch.randperm(640, generator=generator)] % 8
    queries = torch.randn(30, 4, generator=generator)
    whole = exact(distinct, queries, distance)[:, which].sort(dim=1, stable=True).indices
    for k in (1, 5, 79, 80, 200, 639, 640):  # a sample has 80 twins
        far, index = nearest(distinct[which], queries, k, distance)
        assert torch.equal(index, whole[:, :k]), k
        assert (far.diff(dim=1) >= 0).all()


@pytest.mark.parametrize(("low", "high", "dim"), [(0, 2, 3), (0, 2, 40), (-3, 4, 5), (0, 17, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8])
def test_exact_ties_of_integers_go_to_the_lowest_index(low, high, dim, dtype):
    points = np.random.default_rng(0).integers(low, high, (700, dim))
    bank, queries = (torch.from_numpy(x).to(dtype) for x in (points[:500], points[500:]))
    squares = ((points[500:, None] - points[:500]) ** 2).sum(2)
    order = np.argsort(squares, axis=1, kind="stable")
    assert (np.diff(np.sort(squares, axis=1)) == 0).any(axis=1).all()  # every query has ties
    for k in (1, 7, 500):
        far, index = nearest(bank, queries, k, "euclidean")
        assert (index.numpy() == order[:, :k]).all()
        np.testing.assert_allclose(far, np.sqrt(np.sort(squares, axis=1))[:, :k], rtol=1e-6)


def test_binary_digits_are_told_apart_as_by_scikit_learn():
    digits, labels = load_digits(return_X_y=True)
    digits = (digits > 7).astype(np.float64)
    peer = KNeighborsClassifier(1, algorithm="brute").fit(digits[:1000], labels[:1000])
    bank, queries = torch.from_numpy(digits).float().split([1000, 797])
    labels = torch.from_numpy(labels[:1000])
    found = knn_predict(bank, labels, queries, [KNNSetting(1, "euclidean")])[0]
    assert found.tolist() == peer.predict(digits[1000:]).tolist()


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30, 1e30])
def test_constant_features_leave_the_choice_to_the_index(distance, value):
    bank, queries = torch.full((500, 4), value), torch.full((9, 4), value)
    _, index = nearest(bank, queries, 20, distance)
    assert torch.equal(index, torch.arange(20).expand(9, 20))


@pytest.mark.parametrize("scale", [1e-42, 1e-25, 1e-3, 1e25, 1e37])
def test_features_of_any_size_keep_neighbours_and_votes(data, scale):
    bank, labels, queries, _ = data
    grid = knn_grid((1, 5, 200))
    bank, queries = bank * 0.1, queries * 0.1  # the largest stays in range
    expected = knn_predict(bank, labels, queries, grid)
    scaled = (bank.double() * scale).float(), labels, (queries.double() * scale).float()
    same = (knn_predict(*scaled, grid) == expected).float().mean()
    assert same > (0.99 if scale < 1e-40 else 0.999)  # subnormals have few digits


def test_cosine_takes_each_row_for_itself(data):
    bank, _, queries, _ = data
    _, expected = nearest(bank, queries, 50, "cosine")
    sizes = torch.logspace(-30, 30, 900)[torch.randperm(900)]
    _, index = nearest(bank * sizes[:, None], queries * sizes[:300, None], 50, "cosine")
    assert (index == expected).float().mean() > 0.999


def test_a_query_far_from_the_bank_spoils_neither_itself_nor_others(data):
    bank, _, queries, _ = data
    _, expected = nearest(bank, queries, 20, "euclidean")
    far = torch.cat([queries, queries[:1] * 1e12])
    distances, index = nearest(bank, far, 20, "euclidean")
    assert torch.isfinite(distances).all()
    assert (index[:300] == expected).float().mean() > 0.9


def test_distances_survive_an_origin_far_away(data):
    bank, _, queries, _ = data
    bank, queries = bank + 5000, queries + 5000
    far, _ = nearest(bank, queries, 20, "euclidean")
    lowest = exact(bank, queries, "euclidean").sort(dim=1).values[:, :20]
    torch.testing.assert_close(far.double(), lowest, rtol=1e-4, atol=0)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("apart", [0.03, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("piece", [16384, 300])
def test_tight_clusters_keep_the_order_of_their_samples(monkeypatch, distance, apart, piece):
    monkeypatch.setattr(neighbours, "PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 64, generator=generator)
    X = centres[torch.arange(1200) % 5] + apart * torch.randn(1200, 64, generator=generator)
    far, index = nearest(X[:1000], X[1000:], 20, distance)
    lowest, order = exact(X[:1000], X[1000:], distance).sort(dim=1)
    lost = max(1e-4, 1e-6 / apart)  # of a difference that float32 features hold
    assert (index == order[:, :20]).float().mean() > 1 - 2 * lost
    torch.testing.assert_close(far.double(), lowest[:, :20], rtol=lost, atol=0)


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e5])
def test_collapsed_features_keep_their_neighbours_on_the_cosine(data, offset):
    bank, _, queries, _ = data
    direction = torch.randn(16, generator=torch.Generator().manual_seed(1))
    bank, queries = bank + offset * direction, queries + offset * direction
    far, index = nearest(bank, queries, 20, "cosine")
    lowest, order = exact(bank, queries, "cosine").sort(dim=1, stable=True)
    assert (index == order[:, :20]).float().mean() > 0.999
    torch.testing.assert_close(far.double(), lowest[:, :20], rtol=1e-4, atol=0)
    blank = torch.zeros(2, 16)
    far, index = nearest(torch.cat([blank, bank]), torch.cat([queries, blank]), 902, "cosine")
    torch.testing.assert_close(far[:300, -2:], torch.ones(300, 2))
    assert torch.equal(index[:300, -2:].sort(dim=1).values, torch.arange(2).expand(300, 2))
    torch.testing.assert_close(far[300:], torch.ones(2, 902))


@pytest.mark.parametrize(("distance", "mean"), [("cosine", 1e5), ("euclidean", 1e8)])
def test_float64_features_keep_what_float32_could_not_hold(data, distance, mean):
    bank, _, queries, _ = (x.double() for x in data)
    bank, queries = bank + mean, queries + mean
    far, index = nearest(bank, queries, 20, distance)
    lowest, order = exact(bank, queries, distance).sort(dim=1)
    assert (index == order[:, :20]).float().mean() > 0.999
    torch.testing.assert_close(far.double(), lowest[:, :20], rtol=1e-4, atol=0)


def test_one_sample_far_away_spoils_no_other(data):
    bank, _, queries, _ = data
    far, index = nearest(torch.cat([bank[:1] * 1e12, bank]), queries, 20, "euclidean")
    expected, order = nearest(bank, queries, 20, "euclidean")
    assert (index == order + 1).float().mean() > 0.999
    torch.testing.assert_close(far, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("apart", [0.0, 1e-5, 1e-4, 1e-3, 1e-2])
def test_near_duplicates_keep_the_digits_of_their_distance(data, distance, apart):
    bank, _, queries, _ = data
    generator = torch.Generator().manual_seed(0)
    close = queries + apart * torch.randn(queries.shape, generator=generator)
    bank = torch.cat([bank, close])
    far, index = nearest(bank, queries, 1, distance)
    assert torch.equal(index[:, 0], torch.arange(900, 1200))
    expected = exact(bank, queries, distance).gather(1, index)
    # float32 holds the features themselves to 1e-7
    rtol = 0.2 if apart < 1e-4 else 0.02 if apart < 1e-3 else 2e-3
    torch.testing.assert_close(far.double(), expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double, torch.int8])
def test_other_types_give_what_their_values_give_in_float32(data, dtype):
    bank, labels, queries, _ = data
    bank, queries = (x.mul(4).to(dtype) for x in (bank, queries))
    expected = knn_predict(bank.float(), labels, queries.float(), knn_grid())
    got = knn_predict(bank, labels, queries, knn_grid())
    assert (got == expected).float().mean() > 0.999
    with torch.autocast("cpu"):
        assert torch.equal(knn_predict(bank, labels, queries, knn_grid()), got)


def test_zero_rows_are_at_cosine_distance_one():
    bank = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    far, index = nearest(bank, torch.tensor([[2.0, 0.0], [0.0, 0.0]]), 3, "cosine")
    assert index.tolist() == [[1, 0, 2], [0, 1, 2]]
    assert far.tolist() == [[0, 1, 2], [1, 1, 1]]


def test_the_bank_and_the_callers_state_stay_as_they_are(data):
    bank, labels, queries, _ = data
    kept = [x.clone() for x in (bank, labels, queries)]
    state = torch.get_rng_state()
    knn_predict(bank.requires_grad_(), labels, queries, [KNNSetting(3), KNNSetting(3, "euclidean")])
    bank.requires_grad_(False)
    assert all(torch.equal(a, b) for a, b in zip(kept, (bank, labels, queries), strict=True))
    assert torch.equal(state, torch.get_rng_state())
