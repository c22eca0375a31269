from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.preprocessing import StandardScaler

from headplug.errors import OptionError
from headplug.probing import RidgeSetting, fit_ridge, ridge_grid


@pytest.mark.parametrize(("count", "dim"), [(400, 16), (60, 150)])
@pytest.mark.parametrize("classes", [2, 5])
def test_every_penalty_equals_sklearn(blobs, count, dim, classes):
    (x, y), (queries, _) = blobs(count, dim, classes), blobs(300, dim, classes, seed=1)
    grid = ridge_grid()
    models = fit_ridge(x, y, grid)
    predicted = models.predict(queries)
    scaler = StandardScaler().fit(x.double().numpy())
    z, zq = (scaler.transform(t.double().numpy()) for t in (x, queries))
    targets = 2.0 * np.eye(classes)[y.numpy()] - 1
    for i, s in enumerate(grid):
        ridge = Ridge(alpha=s.penalty * count).fit(z, targets)
        np.testing.assert_allclose(
            models.weight[:, :, i].numpy(), ridge.coef_.T, rtol=2e-4, atol=1e-6
        )
        np.testing.assert_allclose(
            models.bias[:, i].numpy(), ridge.intercept_, rtol=1e-5, atol=1e-6
        )
        classifier = RidgeClassifier(alpha=s.penalty * count).fit(z, y.numpy())
        assert (predicted[i].numpy() == classifier.predict(zq)).mean() > 0.99


def test_blocks_of_rows_change_nothing(blobs, monkeypatch):
    from headplug.probing import data

    x, y = blobs(500)
    whole = fit_ridge(x, y, ridge_grid())
    monkeypatch.setattr(data, "CHUNK", 16 * 37)
    torch.testing.assert_close(fit_ridge(x, y, ridge_grid()).weight, whole.weight)


def test_constant_and_repeated_features_give_no_nan(blobs):
    x, y = blobs(200)
    models = fit_ridge(torch.cat([x, x, torch.full((200, 1), 0.1)], 1), y, ridge_grid())
    assert models.finite.all()


def test_penalty_must_be_positive(blobs):
    with pytest.raises(OptionError, match="positive number, not 0"):
        fit_ridge(*blobs(50), [RidgeSetting(0.0)])
