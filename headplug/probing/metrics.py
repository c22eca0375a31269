"""One number for predictions, by the kind of what was to be predicted.

Each takes the predictions of many settings at once, and how often each sample counts, so that a
bootstrap is the same computation with other counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headplug.errors import DataError
from headplug.probing.data import Targets

METRICS = {"classes": "accuracy", "multilabel": "mAP", "regression": "r2"}
DEFINITIONS = {
    "accuracy": "Share of the samples whose class is predicted.",
    "mAP": (
        "Mean over the labels that occur of the average precision: precision at the rank of each "
        "positive sample, ties counted whole, as scikit-learn's average_precision_score."
    ),
    "r2": (
        "Mean over the numbers to predict of 1 - (sum of squared errors / sum of squares around "
        "their mean), as scikit-learn's r2_score."
    ),
}


def score(predicted: Tensor, targets: Targets, counts: Tensor | None = None) -> Tensor:
    """The metric of each setting, in float64; -inf for a setting that diverged.

    Args:
        predicted: Classes `(S, M)`, below 0 where a setting diverged, or numbers `(S, M, K)`, NaN
            where it did.
        targets: Of the M samples.
        counts: How often each sample counts, for B resamples `(B, M)`; left out, once.

    Returns:
        `(S,)`, or `(S, B)` with counts.

    Raises:
        DataError: No label occurs, or no number varies.

    >>> score(torch.tensor([[0, 1, 0], [1, 1, 1]]), Targets("classes", torch.tensor([0, 1, 0]), 2))
    tensor([1.0000, 0.3333], dtype=torch.float64)
    """
    weights = torch.ones(1, len(targets)) if counts is None else counts
    weights = weights.to(predicted.device, torch.float64)
    if targets.kind == "classes":
        lost = (predicted < 0).any(dim=1)
        found = (predicted == targets.values).double() @ weights.T / weights.sum(1)
    else:
        lost = torch.isnan(predicted).flatten(1).any(dim=1)
        measure = _average_precision if targets.kind == "multilabel" else _r2
        found = torch.stack([measure(p, targets.values, weights) for p in predicted.nan_to_num()])
    found = found.masked_fill(lost[:, None], -torch.inf)
    return found[:, 0] if counts is None else found


def _average_precision(scores: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Mean average precision `(B,)` of scores `(M, K)`."""
    found = []
    for k in range(truth.shape[1]):
        order = scores[:, k].argsort(descending=True, stable=True)
        ranked = scores[order, k]
        last = torch.searchsorted(-ranked, -ranked, right=True) - 1  # of the equal scores
        weight = weights[:, order]
        positive = weight * truth[order, k]
        precision = positive.cumsum(1)[:, last] / weight.cumsum(1)[:, last].clamp(min=1e-300)
        found.append((positive * precision).sum(1) / positive.sum(1))
    return _mean(torch.stack(found), "no label occurs among these samples")


def _r2(predicted: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Mean coefficient of determination `(B,)` of predictions `(M, K)`."""
    truth = truth.double()
    mean = weights @ truth / weights.sum(1, keepdim=True)
    spread = weights @ truth.square() - weights.sum(1, keepdim=True) * mean.square()
    around = weights @ (truth - truth.mean(0)).square()
    spread = spread.masked_fill(spread <= 1e-12 * around, torch.nan)
    errors = weights @ (predicted.double() - truth).square()
    return _mean((1 - errors / spread).T, "the numbers to predict are all the same")


def _mean(values: Tensor, nothing: str) -> Tensor:
    """Over the first axis, of the finite ones."""
    if torch.isnan(values).all():  # of every resample too
        raise DataError(f"{nothing}, so there is nothing to measure; take other test samples.")
    return values.nanmean(0)
