from __future__ import annotations

import warnings

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from headplug.errors import DataError, DimensionError, OptionError
from headplug.probing import KNNSetting, knn, knn_grid, knn_predict


@pytest.fixture(scope="module")
def data(blobs):
    return *blobs(900), *blobs(300, seed=1)


def lightly_predict(bank, labels, queries, setting):
    from lightly.utils.benchmarking.knn import knn_predict as oracle

    bank, queries = (torch.nn.functional.normalize(x, dim=1) for x in (bank, queries))
    return oracle(queries, bank.T, labels, 4, setting.k, setting.temperature)[:, 0]


def test_whole_grid_equals_lightly_and_sklearn_setting_by_setting(data):
    bank, labels, queries, _ = data
    grid = knn_grid()
    together = knn_predict(bank, labels, queries, grid)
    assert together.shape == (30, 300)
    for row, s in zip(together, grid, strict=True):
        if s.temperature is None:
            model = KNeighborsClassifier(s.k).fit(bank.numpy(), labels.numpy())
            expected = torch.from_numpy(model.predict(queries.numpy()))
        else:
            expected = lightly_predict(bank, labels, queries, s)
        assert torch.equal(row, expected), s
        assert torch.equal(row, knn_predict(bank, labels, queries, [s])[0]), s


def test_uniform_votes_on_cosine_equal_sklearn(data):
    bank, labels, queries, _ = data
    model = KNeighborsClassifier(15, metric="cosine").fit(bank.numpy(), labels.numpy())
    got = knn_predict(bank, labels, queries, [KNNSetting(15, "cosine")])[0]
    assert torch.equal(got, torch.from_numpy(model.predict(queries.numpy())))


def test_order_of_settings_does_not_matter(data):
    bank, labels, queries, _ = data
    grid = knn_grid((1, 7, 30), (0.07, 0.5))
    forwards = knn_predict(bank, labels, queries, grid)
    backwards = knn_predict(bank, labels, queries, grid[::-1])
    assert torch.equal(forwards, backwards.flip(0))


def test_splitting_the_bank_and_the_queries_changes_nothing(data, monkeypatch):
    bank, labels, queries, _ = data
    whole = knn_predict(bank, labels, queries, knn_grid())
    monkeypatch.setattr(knn, "BANK", 70)  # smaller than the largest k, too
    monkeypatch.setattr(knn, "CELLS", 70 * knn.ROWS)
    assert torch.equal(knn_predict(bank, labels, queries, knn_grid()), whole)


def test_equal_votes_go_to_the_lowest_class():
    bank = torch.tensor([[0.0], [2.0]])
    for labels in ([3, 1], [1, 3]):
        got = knn_predict(
            bank, torch.tensor(labels), torch.ones(1, 1), [KNNSetting(2, "euclidean")]
        )
        assert got.item() == 1


def test_k_above_the_bank_is_clamped_with_a_warning_that_names_both(data):
    bank, labels, queries, _ = data
    with pytest.warns(UserWarning, match=r"k=200 .* 50 samples"):
        got = knn_predict(bank[:50], labels[:50], queries, [KNNSetting(200, "cosine", 0.1)])
    expected = knn_predict(bank[:50], labels[:50], queries, [KNNSetting(50, "cosine", 0.1)])
    assert torch.equal(got, expected)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_features_of_any_size_give_the_same_classes(data, scale):
    bank, labels, queries, _ = data
    expected = knn_predict(bank, labels, queries, knn_grid())
    same = (
        (knn_predict(bank * scale, labels, queries * scale, knn_grid()) == expected).float().mean()
    )
    assert same > 0.999


def test_low_temperatures_do_not_overflow(data):
    bank, labels, queries, _ = data
    sharp, nearest = knn_predict(
        bank, labels, queries, [KNNSetting(20, temperature=1e-6), KNNSetting(1, temperature=1.0)]
    )
    assert torch.equal(sharp, nearest)


def test_half_precision_and_zero_rows_are_accepted(data):
    bank, labels, queries, _ = data
    got = knn_predict(bank.half(), labels, torch.zeros_like(queries).half(), [KNNSetting(3)])
    assert ((got >= 0) & (got < 4)).all()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (KNNSetting(0), "k must be a positive integer"),
        (KNNSetting(3, "manhattan"), "no distance is called 'manhattan'"),
        (KNNSetting(3, "cosine", 0.0), "temperature must be a positive number"),
        (KNNSetting(3, "euclidean", 0.1), "distances; leave it out"),
    ],
)
def test_impossible_settings_are_refused(data, setting, message):
    with pytest.raises(OptionError, match=message):
        knn_predict(*data[:3], [setting])


def test_wrong_shapes_and_labels_are_refused(data):
    bank, labels, queries, _ = data
    with pytest.raises(DimensionError, match="16 features a sample and the queries 5"):
        knn_predict(bank, labels, queries[:, :5], [KNNSetting(1)])
    with pytest.raises(DataError, match="one label a sample"):
        knn_predict(bank, labels[:-1], queries, [KNNSetting(1)])
    with pytest.raises(DataError, match="integers"):
        knn_predict(bank, labels.float(), queries, [KNNSetting(1)])
    with pytest.raises(DataError, match="from 0 to 2"):
        knn_predict(bank, labels, queries, [KNNSetting(1)], num_classes=3)
    with pytest.raises(DataError, match="at row 2"):
        knn_predict(
            bank.index_fill(0, torch.tensor(2), torch.nan), labels, queries, [KNNSetting(1)]
        )


def test_no_warning_without_cause(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        knn_predict(*data[:3], knn_grid())
