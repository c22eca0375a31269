from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, r2_score

from headplug.errors import DataError
from headplug.probing.data import Targets
from headplug.probing.metrics import score

M = 60


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["once", "resampled"])
def counts(request):
    """How often each sample counts, as a resample and as repeated rows."""
    if request.param == "once":
        return None, np.arange(M)
    rows = np.random.default_rng(0).integers(M, size=M)
    return torch.tensor(np.bincount(rows, minlength=M)[None]), rows


def test_accuracy_is_scikit_learns(counts):
    weights, rows = counts
    truth, predicted = random(M).gt(0).long(), random(3, M, seed=1).gt(0).long()
    got = score(predicted, Targets("classes", truth, 2), weights).flatten()
    expected = [accuracy_score(truth[rows], p[rows]) for p in predicted]
    assert got.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("steps", [None, 4])
def test_mean_average_precision_is_scikit_learns_with_and_without_ties(counts, steps):
    weights, rows = counts
    truth, predicted = random(M, 3).gt(0.5), random(2, M, 3, seed=1)
    if steps:
        predicted = (predicted * steps).round() / steps
    got = score(predicted, Targets("multilabel", truth, 3), weights).flatten()
    expected = [average_precision_score(truth[rows], p[rows], average="macro") for p in predicted]
    assert got.tolist() == pytest.approx(expected)


def test_r2_is_scikit_learns_far_from_zero_too(counts):
    weights, rows = counts
    truth = random(M, 3) + torch.tensor([0.0, 100.0, -1000.0])
    predicted = truth + random(2, M, 3, seed=1)
    got = score(predicted, Targets("regression", truth.double(), 3), weights).flatten()
    expected = [r2_score(truth[rows].double(), p[rows].double()) for p in predicted]
    assert got.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_setting_that_diverged_scores_below_everything():
    classes = torch.stack([torch.zeros(M).long(), torch.full((M,), -1)])
    assert score(classes, Targets("classes", torch.zeros(M).long(), 1)).tolist() == [1, -torch.inf]
    truth = random(M, 2)
    numbers = torch.stack([torch.full((M, 2), torch.nan), truth])
    assert score(numbers, Targets("regression", truth, 2)).tolist() == [-torch.inf, 1]


def test_labels_that_never_occur_and_constant_numbers_do_not_count():
    truth = random(M, 2).gt(0)
    truth[:, 1] = False
    predicted = random(1, M, 2, seed=1)
    one = score(predicted[..., :1], Targets("multilabel", truth[:, :1], 1))
    assert torch.equal(score(predicted, Targets("multilabel", truth, 2)), one)
    with pytest.raises(DataError, match="no label occurs"):
        score(predicted, Targets("multilabel", truth & False, 2))
    with pytest.raises(DataError, match="all the same"):
        score(predicted, Targets("regression", torch.full((M, 2), 0.1), 2))
