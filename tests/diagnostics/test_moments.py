from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from headplug.diagnostics import Moments
from headplug.diagnostics import moments as module
from headplug.errors import DataError, DimensionError


def numpys(x, y=None):
    x = x.double().numpy()
    y = x if y is None else y.double().numpy()
    return (x - x.mean(0)).T @ (y - y.mean(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_covariance_in_batches_of_any_size_equals_numpys(make, dtype):
    x = make(300, 20).to(dtype)
    moments = Moments(20)
    for part in x.split([1, 0, 2, 97, 200]):
        moments.update(part)
    expected = np.cov(x.double().numpy().T)
    np.testing.assert_allclose(moments.covariance.numpy(), expected, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(moments.mean.numpy(), x.double().mean(0).numpy(), rtol=1e-13)
    assert moments.count == 300


def test_a_mean_far_above_the_deviation_costs_no_digits():
    x = torch.randn(1000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = numpys(x)
    moments = Moments(5)
    for part in (x + 1e8).split(64):
        moments.update(part)
    np.testing.assert_allclose(moments.second.numpy(), exact, rtol=1e-6, atol=1e-5)


def test_cross_moments_equal_numpys_and_merge(make):
    x, y = make(200, 12), make(200, 7, seed=1)
    whole, one, two, empty = (Moments(12, 7) for _ in range(4))
    whole.update(x, y)
    one.update(x[:50], y[:50])
    two.update(x[50:], y[50:])
    one.merge(two)
    one.merge(empty)
    empty.merge(one)
    for moments in (whole, one, empty):
        np.testing.assert_allclose(moments.second.numpy(), numpys(x, y), rtol=1e-10, atol=1e-9)
        np.testing.assert_allclose(moments.other_mean.numpy(), y.double().mean(0).numpy())
        assert moments.count == 200


def test_merging_processes_is_as_good_as_one(make):
    x = make(301, 9)
    whole, parts = Moments(9), [Moments(9) for _ in range(3)]
    whole.update(x)
    for part, rows in zip(parts, x.split(101), strict=True):
        part.update(rows)
    parts[0].merge(parts[1])
    parts[0].merge(pickle.loads(pickle.dumps(parts[2])))
    torch.testing.assert_close(parts[0].covariance, whole.covariance, rtol=1e-11, atol=1e-12)


def test_halving_the_symmetric_product_changes_nothing(make, monkeypatch):
    x = make(100, 37)
    monkeypatch.setattr(module, "LEAF", 4)
    moments = Moments(37)
    moments.update(x)
    np.testing.assert_allclose(moments.second.numpy(), numpys(x), rtol=1e-10, atol=1e-10)


def test_input_is_left_as_it_was():
    x = torch.rand(5, 3, dtype=torch.float64)
    before = x.clone()
    Moments(3).update(x)
    assert torch.equal(x, before)


def test_what_does_not_fit_is_refused(make):
    moments = Moments(4)
    with pytest.raises(DimensionError, match=r"\(n, 4\), not \(5, 3\)"):
        moments.update(torch.rand(5, 3))
    with pytest.raises(DimensionError, match=r"\(n, 4\), not"):
        moments.update(torch.rand(5, 4), torch.rand(5, 4))
    with pytest.raises(DataError, match="NaN or infinity"):
        moments.update(torch.full((2, 4), torch.nan))
    assert moments.count == 0
    assert not moments.mean.any()
    with pytest.raises(DataError, match="two samples or more, not 0"):
        _ = moments.covariance
    with pytest.raises(DimensionError, match="do not merge"):
        moments.merge(Moments(5))
    with pytest.raises(DataError, match=r"100000 x 100000 in float64, 74\.5 GiB.*pool them"):
        Moments(100_000)
