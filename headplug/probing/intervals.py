"""How sure a number is, and whether two differ.

Where there is no exact interval, samples are drawn anew (bootstrap), the same ones for both sides
of a difference, since both met the same samples. Random numbers come from generators of their own
with a fixed seed, so that the same outcomes give the same interval.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from headplug.errors import DataError
from headplug.probing.data import Targets
from headplug.probing.metrics import score

DRAWS = 2000
RESAMPLES = 500  # for metrics that are no mean over samples
Z95 = 1.959963984540054  # quantile of the normal distribution that leaves 2.5% above


def wilson_interval(accuracy: float, count: float) -> tuple[float, float]:
    """95% interval of an accuracy over `count` independent samples (Wilson 1927).

    It covers the choice of test samples only, not that of the seed or of the training data. Unlike
    a bootstrap's it does not shrink to a point where every sample is right.

    >>> low, high = wilson_interval(0.9, 100)
    >>> round(low, 3), round(high, 3)
    (0.826, 0.945)
    """
    spread = Z95**2 / count
    middle = (accuracy + spread / 2) / (1 + spread)
    half = math.sqrt(accuracy * (1 - accuracy) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(values: Any) -> tuple[float, float]:
    """95% bootstrap interval of the mean of `(R, M)`: R repeats and M samples, both drawn anew.

    Args:
        values: Hits or differences of M samples, of each of R seeds or draws of training samples.

    >>> bootstrap([[1, 1, 1, 1]])
    (1.0, 1.0)
    """
    return quantiles(_means(values))


def score_interval(value: float, resampled: Any, targets: Targets) -> tuple[float, float]:
    """95% interval of a metric that is no mean over samples, from its spread over resamples.

    Percentiles of the resamples cover too little where samples are few: a resample repeats samples,
    which makes its mean average precision (mAP) too high, and above a high value there is no room.

    mAP gets Wilson's interval around the value less the bootstrap's estimate of its bias, with the
    number of samples for which a share has the bootstrap's variance (Korn and Graubard 1998,
    "Confidence intervals for proportions with small expected number of positive counts estimated
    from survey data"), at most that of all positive labels, so that it does not shrink to a point
    where all are ranked right. R² gets a normal interval of log(1 - R²), with the bootstrap's
    standard error. Both stretch it as Student's t does, for the degrees of freedom of the variance:
    the positive samples of a label, by their harmonic mean, less one; or the samples less one.

    Over simulated test sets of 50 to 500 samples (labels of 5 to 50%; errors of normal, skewed and
    heavy-tailed distributions), 90 to 99% of the intervals of mAP hold what infinitely many samples
    would give, and 89 to 96% of those of R² (least: 50 samples with skewed errors); of percentiles,
    31 to 94% and 84 to 96%.

    Args:
        value: On the samples themselves.
        resampled: On each resample `(B,)`; NaN where there was nothing to measure.
        targets: Of the samples: labels or numbers.

    >>> truth = torch.tensor([[True], [False]]).repeat(20, 1)
    >>> low, high = score_interval(1.0, [1.0, 1.0], Targets("multilabel", truth, 1))
    >>> round(low, 3), high
    (0.821, 1.0)
    """
    found = np.asarray(resampled, dtype=np.float64)
    found = found[~np.isnan(found)]
    if targets.kind == "multilabel":
        middle = min(1.0, max(0.0, 2 * value - float(found.mean())))
        spread, most = float(found.var()), float(targets.values.sum())
        count = min(most, middle * (1 - middle) / spread) if spread else most
        low, high = wilson_interval(middle, max(count, 1.0) / _stretch(targets) ** 2)
    else:
        logs = np.log(np.maximum(1 - np.append(found, value), 1e-12))
        half = Z95 * _stretch(targets) * float(logs[:-1].std())
        low, high = (1 - math.exp(logs[-1] + side * half) for side in (1, -1))
    return min(low, value), max(high, value)


def bootstrap_scores(predicted: Tensor, targets: Targets) -> Tensor:
    """The metric of `(S, M, K)` predictions on resampled samples, the same for each `(S, B)`.

    It is NaN for resamples without any label, or in which no number varies; a warning says so if
    they are many.

    Raises:
        DataError: See `headplug.probing.metrics.score`.
    """
    generator = torch.Generator().manual_seed(0)
    count, found = len(targets), []
    for _ in range(0, RESAMPLES, 50):
        drawn = torch.randint(count, (50, count), generator=generator, device="cpu")
        counts = torch.zeros(50, count, device="cpu").scatter_add_(
            1, drawn, torch.ones(50, count, device="cpu")
        )
        found.append(score(predicted, targets, counts).cpu())
    out = torch.cat(found, dim=1)
    missing = int(out[0].isnan().sum())
    if missing > RESAMPLES / 20:
        warnings.warn(
            f"an interval rests on {RESAMPLES - missing} of {RESAMPLES} resamples, as the others "
            "have nothing to measure: too few test samples, or too rare a label.",
            stacklevel=3,
        )
    return out


class Difference(NamedTuple):
    """What one side has over the other on the same samples.

    Attributes:
        value: The difference of the metric.
        low: Of its 95% interval, by a paired bootstrap.
        high: Of the same.
        p: Of the hypothesis that there is none, two-sided.
        test: How p was found.
    """

    value: float
    low: float
    high: float
    p: float
    test: str


def paired_hits(ours: Any, theirs: Any) -> Difference:
    """The difference of two accuracies on the same samples.

    Args:
        ours: Hits of M samples `(M,)`, or of R repeats `(R, M)`.
        theirs: The same of the other side; one repeat stands against each of several.

    Returns:
        If both have one repeat, p of McNemar's exact test (1947) and the interval of a paired
        bootstrap, widened to that of the test (Clopper and Pearson 1934, of the share won among the
        samples that differ, whose number is taken as given); on which side of 0 an end lies the
        test decides, so that 0 is excluded where p < 0.05 and nowhere else. Otherwise of a normal
        distribution with the bootstrap's spread.

    Raises:
        DataError: The numbers of repeats, or of samples, do not go together.

    >>> round(paired_hits([1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]).p, 6)
    0.03125
    """
    a, b = (np.atleast_2d(np.asarray(side, dtype=np.float64)) for side in (ours, theirs))
    if a.shape[1] != b.shape[1] or (len(a) != len(b) and 1 not in (len(a), len(b))):
        raise DataError(
            f"hits of {a.shape} and {b.shape} (repeats, samples) cannot be paired; take the same "
            "samples and the same number of draws."
        )
    difference = a - b
    if len(difference) == 1:
        won, lost = int((difference > 0).sum()), int((difference < 0).sum())
        least, most = -_most(lost, won) / a.shape[1], _most(won, lost) / a.shape[1]
        low, high = bootstrap(difference)
        low = least if low <= 0 < least else min(low, least)
        high = most if most < 0 <= high else max(high, most)
        p = _sign_test(won, lost)
        return Difference(float(difference.mean()), low, high, p, "McNemar's exact test")
    return _difference(float(difference.mean()), _means(difference), 1.0)


def paired_scores(predicted: Tensor, targets: Targets) -> Difference:
    """The same for two rows of `(2, M, K)` predictions and a metric that is no mean over samples.

    Less the bootstrap's estimate of bias, its spread stretched, as in `score_interval`.

    Raises:
        DataError: See `headplug.probing.metrics.score`.
    """
    ours, theirs = score(predicted, targets).tolist()
    resampled = bootstrap_scores(predicted, targets)
    most = 1.0 if targets.kind == "multilabel" else math.inf
    differences = (resampled[0] - resampled[1]).numpy()
    return _difference(ours - theirs, differences, most, _stretch(targets))


def holm(ps: Sequence[float]) -> list[float]:
    """p-values that hold for all of several tests together (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    out, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        out[i] = highest
    return out


def _sign_test(won: int, lost: int) -> float:
    """Two-sided exact binomial test of even chances."""
    return min(1.0, 2 * _tail(min(won, lost), won + lost)(0.5))


def _most(won: int, lost: int) -> float:
    """The most that can be won, less what is lost then, by a one-sided exact test at 2.5%."""
    if not lost:
        return float(won)
    tail = _tail(won, won + lost)
    low, high = 0.0, 1.0
    for _ in range(50):  # the first is 0.5, as of the sign test
        middle = (low + high) / 2
        low, high = (low, middle) if tail(middle) < 0.025 else (middle, high)
    return (2 * low - 1) * (won + lost)


def _tail(most: int, total: int) -> Callable[[float], float]:
    """The binomial probability of at most so many of `total`, by the chance of each."""
    count = np.arange(most + 1)
    logs = np.cumsum(np.log(np.append(1.0, (total - count[:-1]) / count[1:])))

    def tail(chance: float) -> float:
        rest = (total - count) * math.log1p(-chance)
        return float(np.exp(logs + count * math.log(chance) + rest).sum())

    return tail


def _difference(
    value: float, resampled: np.ndarray, most: float, stretch: float = 1.0
) -> Difference:
    """With p of a normal distribution, which several tests together need: it has no least value.

    The interval stays within `most` of 0.
    """
    middle = 2 * value - float(np.nanmean(resampled))
    spread = stretch * float(np.nanstd(resampled))
    p = math.erfc(abs(middle) / spread / math.sqrt(2)) if spread else float(value == 0)
    low, high = (min(most, max(-most, middle + side * Z95 * spread)) for side in (-1, 1))
    return Difference(value, low, high, p, "the bootstrap's spread")


def _stretch(targets: Targets) -> float:
    """What Student's t adds to a normal interval, to first order (Abramowitz and Stegun 26.7.5)."""
    freedom = len(targets) - 1.0
    if targets.kind == "multilabel":
        positive = targets.values.sum(0).double()
        freedom = 1 / float((1 / positive[positive > 0]).mean()) - 1
    return 1 + (Z95**2 + 1) / (4 * max(freedom, 1.0))


def _means(values: Any) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(0)
    repeats, samples = values.shape
    if repeats == 1:  # counts of each value tell the same as a list of samples
        kinds, counts = np.unique(values, return_counts=True)
        found: np.ndarray = rng.multinomial(samples, counts / samples, size=DRAWS) @ kinds / samples
        return found
    means = np.empty(DRAWS)
    for i in range(DRAWS):
        of_sample = values[rng.integers(repeats, size=repeats)].mean(axis=0)
        means[i] = of_sample[rng.integers(samples, size=samples)].mean()
    return means


def quantiles(values: Any) -> tuple[float, float]:
    """The ends of the middle 95% of some values."""
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)
