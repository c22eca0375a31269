from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from headplug.errors import DataError, OptionError
from headplug.probing.logistic import LogisticSetting, fit_logistic, logistic_grid

PENALTIES = [LogisticSetting(p) for p in (1e-5, 1e-3, 1e-1, 10.0)]


def objective(weight, bias, z, y, penalty):
    """In float64, with the loss of torch."""
    scores = torch.from_numpy(z) @ weight.double().T + bias.double()
    if y.ndim == 1:
        loss = nn.functional.cross_entropy(scores, y)
    else:
        loss = nn.functional.binary_cross_entropy_with_logits(
            scores, y.double(), reduction="none"
        ).sum(1)
    return float(loss.mean() + penalty / 2 * weight.double().square().sum())


def scikit(z, y, penalty, classes=None):
    """The optimum to ten digits; two classes as a softmax."""
    c = (2 if classes == 2 else 1) / (penalty * len(z))
    fit = LogisticRegression(C=c, tol=1e-10, max_iter=20000).fit(z, y)
    weight, bias = torch.from_numpy(fit.coef_), torch.from_numpy(fit.intercept_)
    if classes == 2:
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    return weight, bias


@pytest.mark.parametrize(("count", "dim", "classes"), [(400, 16, 4), (300, 12, 2), (60, 90, 3)])
def test_every_penalty_reaches_scikit_learns_optimum(blobs, count, dim, classes):
    x, y = blobs(count, dim, classes)
    models = fit_logistic(x, y, PENALTIES, tol=1e-5)
    z = StandardScaler().fit_transform(x.double().numpy())
    assert (models.gap <= 1e-5).all()
    for i, s in enumerate(PENALTIES):
        weight, bias = scikit(z, y.numpy(), s.penalty, classes)
        best = objective(weight, bias, z, y, s.penalty)
        got = objective(models.weight[i], models.bias[i], z, y, s.penalty)
        assert best - 1e-7 < got < best + 1e-5  # the second: the gap says the truth
        assert got - best <= float(models.gap[i]) + 1e-6
        # strong convexity bounds how far the weights can be
        distance = float((models.weight[i].double() - weight).norm())
        assert distance <= (2 * (1e-5 + 1e-7) / s.penalty) ** 0.5


def test_coefficients_are_scikit_learns_where_the_optimum_is_sharp(blobs):
    x, y = blobs(400)
    grid = [LogisticSetting(p) for p in (1e-3, 1e-2, 1e-1, 1.0)]
    models = fit_logistic(x, y, grid, tol=1e-6)
    z = StandardScaler().fit_transform(x.double().numpy())
    for i, s in enumerate(grid):
        weight, bias = scikit(z, y.numpy(), s.penalty)
        np.testing.assert_allclose(models.weight[i].numpy(), weight, atol=3e-3)
        ours = models.bias[i] - models.bias[i].mean()
        np.testing.assert_allclose(ours.numpy(), bias - bias.mean(), atol=3e-3)


def test_labels_are_fitted_one_against_the_rest(blobs):
    x, classes = blobs(400)
    y = torch.stack([classes == 0, classes > 1, x[:, 0] > 3], 1)
    models = fit_logistic(x, y, PENALTIES)
    assert (models.gap <= 1e-4).all()
    z = StandardScaler().fit_transform(x.double().numpy())
    for i, s in enumerate(PENALTIES):
        each = [scikit(z, column.numpy(), s.penalty) for column in y.T]
        weight, bias = (torch.cat(parts) for parts in zip(*each, strict=True))
        best = objective(weight, bias, z, y, s.penalty)
        got = objective(models.weight[i], models.bias[i], z, y, s.penalty)
        assert best - 1e-6 < got <= best + float(models.gap[i]) + 1e-6
    scores = models.predict(x)
    assert scores.shape == (4, 400, 3)
    assert ((scores[1] > 0) == y).double().mean() > 0.8


def test_the_gap_of_an_early_stop_holds_and_is_warned_of(blobs):
    x, y = blobs(300)
    for most in (2, 5, 20):
        with pytest.warns(UserWarning, match=r"gap was 1e-10: .*penalty=1e-05") as caught:
            models = fit_logistic(x, y, PENALTIES, tol=1e-10, max_iter=most)
        assert caught[0].filename == __file__
        z = StandardScaler().fit_transform(x.double().numpy())
        for i, s in enumerate(PENALTIES):
            best = objective(*scikit(z, y.numpy(), s.penalty), z, y, s.penalty)
            got = objective(models.weight[i], models.bias[i], z, y, s.penalty)
            assert got - best <= float(models.gap[i]) + 1e-6


def test_separable_samples_and_tiny_penalties_end_at_the_gap(blobs):
    x, y = blobs(60, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models = fit_logistic(x, y, logistic_grid())
    assert (models.gap <= 1e-4).all()
    assert (models.predict(x)[0] == y).all()
    assert models.finite.all()


def test_a_setting_alone_gives_the_same_as_in_the_path(blobs, monkeypatch):
    from headplug.probing import logistic

    x, y = blobs(300)
    together = fit_logistic(x, y, PENALTIES)
    monkeypatch.setattr(logistic, "VALUES", 1)  # one setting after another
    apart = fit_logistic(x, y, PENALTIES)
    torch.testing.assert_close(apart.weight[2:], together.weight[2:], atol=1e-3, rtol=1e-3)
    assert (apart.predict(x) == together.predict(x)).double().mean() > 0.98


def test_classes_and_labels_without_samples_do_no_harm(blobs):
    x, y = blobs(200, classes=3)
    models = fit_logistic(x, y * 2, PENALTIES, num_classes=7)
    assert set(models.predict(x).unique().tolist()) <= {0, 2, 4}
    assert (models.predict(x) == 2 * fit_logistic(x, y, PENALTIES).predict(x)).all()
    labels = torch.stack([y == 0, y >= 0, y > 9], 1)
    scores = fit_logistic(x, labels, PENALTIES).predict(x)
    assert (scores[:, :, 1] > 0).all()
    assert (scores[:, :, 2] < 0).all()
    with pytest.raises(DataError, match="same for all samples"):
        fit_logistic(x, labels[:, 1:], PENALTIES)


def test_bad_options_are_refused(blobs):
    x, y = blobs(50)
    with pytest.raises(OptionError, match="use ridge"):
        fit_logistic(x, y.float(), PENALTIES)
    with pytest.raises(OptionError, match="positive number, not 0"):
        fit_logistic(x, y, [LogisticSetting(0.0)])
    with pytest.raises(OptionError, match="take logistic_grid"):
        fit_logistic(x, y, [])
    with pytest.raises(OptionError, match="tol must be"):
        fit_logistic(x, y, PENALTIES, tol=0)
