from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeClassifier, RidgeClassifierCV, RidgeCV
from sklearn.preprocessing import StandardScaler

from headplug.errors import OptionError
from headplug.probing.ridge import RidgeSetting, fit_ridge, ridge_grid

SIZES = [(400, 16), (60, 150), (90, 60)]  # float32 in part; of samples; float64


def standardized(*features):
    scaler = StandardScaler().fit(features[0].double().numpy())
    return [scaler.transform(t.double().numpy()) for t in features]


def targets_of(kind, x, y):
    """Labels, and the numbers that least squares is fitted to."""
    if kind == "classes":
        return y, 2.0 * np.eye(5)[y.numpy()] - 1
    if kind == "multilabel":
        labels = torch.stack([y == 1, y > 2, x[:, 0] > 2], 1)
        return labels, 2.0 * labels.numpy() - 1
    numbers = torch.stack([x[:, 0] * 3 + 100, x[:, 1] ** 2], 1)
    return numbers, numbers.double().numpy()


@pytest.mark.parametrize(("count", "dim"), SIZES)
@pytest.mark.parametrize("kind", ["classes", "multilabel", "regression"])
def test_every_penalty_equals_sklearn(blobs, count, dim, kind):
    (x, y), (queries, _) = blobs(count, dim, 5), blobs(300, dim, 5, seed=1)
    labels, numbers = targets_of(kind, x, y)
    grid = ridge_grid()
    models = fit_ridge(x, labels, grid)
    predicted = models.predict(queries)
    z, zq = standardized(x, queries)
    for i, s in enumerate(grid):
        ridge = Ridge(alpha=s.penalty * count).fit(z, numbers)
        np.testing.assert_allclose(models.weight[i].numpy(), ridge.coef_, rtol=1e-3, atol=2e-6)
        np.testing.assert_allclose(models.bias[i].numpy(), ridge.intercept_, rtol=1e-5, atol=1e-6)
        if kind == "classes":
            classifier = RidgeClassifier(alpha=s.penalty * count).fit(z, y.numpy())
            assert (predicted[i].numpy() == classifier.predict(zq)).mean() > 0.99
        else:
            scale = np.abs(numbers).max()
            np.testing.assert_allclose(
                predicted[i].numpy(), ridge.predict(zq), rtol=1e-3, atol=1e-4 * scale
            )


@pytest.mark.parametrize(("count", "dim"), [(64, 5), (24, 40), (2, 3)])
@pytest.mark.parametrize("kind", ["classes", "multilabel", "regression"])
def test_left_out_predictions_equal_refits_without_each_sample(blobs, count, dim, kind):
    x, y = blobs(count, dim, 5)
    y[0] = 4
    labels, numbers = targets_of(kind, x, y)
    grid = [RidgeSetting(p) for p in (1e-4, 1e-2, 1.0, 30.0)]
    models = fit_ridge(x, labels, grid)
    (z,) = standardized(x)
    for i, s in enumerate(grid):
        for n in range(count):
            rest = np.arange(count) != n
            refit = Ridge(alpha=s.penalty * count).fit(z[rest], numbers[rest])
            expected = refit.predict(z[n : n + 1])[0]
            if kind != "classes":
                scale = np.abs(numbers).max()
                np.testing.assert_allclose(
                    models.left_out[i, n].numpy(), expected, rtol=1e-3, atol=1e-3 * scale
                )
                continue
            got = int(models.left_out[i, n])
            assert expected[got] > expected.max() - 1e-3


@pytest.mark.parametrize(("count", "dim"), SIZES)
def test_the_choice_of_penalty_is_that_of_sklearn(blobs, count, dim):
    """Of its cross-validated ridge, which leaves one out in closed form too."""
    x, y = blobs(count, dim, 5)
    grid = ridge_grid()
    (z,) = standardized(x)
    numbers = targets_of("regression", x, y)[0]
    alphas = [s.penalty * count for s in grid]
    # the intercept is refitted by us, and the column of ones penalised by nobody
    peer = RidgeCV(alphas, store_cv_results=True).fit(z, numbers.double().numpy())
    ours = (fit_ridge(x, numbers, grid).left_out - numbers).square()
    np.testing.assert_allclose(
        ours.permute(1, 2, 0).numpy(), peer.cv_results_, rtol=2e-2, atol=1e-4 * ours.max()
    )
    assert alphas[int(ours.mean(dim=(1, 2)).argmin())] == peer.alpha_
    classifier = RidgeClassifierCV(alphas, store_cv_results=True).fit(z, y.numpy())
    accuracy = (fit_ridge(x, y, grid).left_out == y).double().mean(1)
    # scikit-learn's scores by alpha are not kept, its squared errors are
    best = classifier.cv_results_.mean(axis=(0, 1)).argmin()
    assert accuracy[best] > accuracy.max() - 0.05


def test_a_weak_penalty_keeps_the_digits_where_features_are_more_than_samples(blobs):
    """As by NumPy in float64, from the hat matrix of the standardised features."""
    (x, _), count = blobs(60, 150), 60
    x = x * torch.logspace(-2, 2, 150) + 100
    y = x[:, :2].double().numpy() + np.random.default_rng(0).normal(size=(count, 2))
    (z,) = standardized(x)
    gram = z @ z.T
    hat = gram @ np.linalg.inv(gram + 1e-6 * count * np.eye(count)) + 1 / count
    rest = (1 - np.diag(hat))[:, None]
    expected = y - (y - y.mean(0) - (hat - 1 / count) @ (y - y.mean(0))) / rest
    models = fit_ridge(x, torch.from_numpy(y), [RidgeSetting(1e-6)])
    np.testing.assert_allclose(models.left_out[0].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_float32_is_as_good_where_it_is_used(blobs):
    """Correlated features with means far from zero, and the weakest penalty that it is used for."""
    x, y = blobs(3000, 64)
    x = x @ torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) + 1000
    single, double = (fit_ridge(t, y, [RidgeSetting(1e-4)]) for t in (x, x.double()))
    assert float((single.weight - double.weight).norm() / double.weight.norm()) < 2e-3
    assert (single.left_out == double.left_out).double().mean() > 0.998
    assert (single.predict(x) == double.predict(x)).double().mean() > 0.998


def test_blocks_of_rows_change_nothing(blobs, monkeypatch):
    from headplug.probing import models

    x, y = blobs(500)
    whole = fit_ridge(x, y, ridge_grid())
    monkeypatch.setattr(models, "BLOCK", 20 * 37)
    parts = fit_ridge(x, y, ridge_grid())
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-4, atol=1e-6)
    assert torch.equal(parts.left_out, whole.left_out)


def test_bad_penalties_are_refused(blobs):
    with pytest.raises(OptionError, match="positive number, not 0"):
        fit_ridge(*blobs(50), [RidgeSetting(0.0)])
    with pytest.raises(OptionError, match="take ridge_grid"):
        fit_ridge(*blobs(50), [])
