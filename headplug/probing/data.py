"""What every probe asks of features and labels: checked once, split fairly, standardised alike.

Nothing here draws from the global random state or keeps a second copy of the features in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from headplug.errors import DataError

CHUNK = 2**18  # values at a time: they stay in the cache


def check_features(features: Tensor) -> Tensor:
    """The features as floats `(N, D)`, or an error that says what is wrong with them.

    Raises:
        DataError: They are no real matrix, are empty, or hold NaN or infinity.
    """
    if not isinstance(features, Tensor) or features.is_complex():
        what = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise DataError(f"features are a tensor of real numbers, not {what}; see torch.as_tensor.")
    if features.ndim != 2 or not features.numel():
        raise DataError(
            f"features must have shape (N, D), not {tuple(features.shape)}; pool or flatten them "
            "first."
        )
    features = features.detach()
    if not features.is_floating_point():
        features = features.float()
    check_finite(features)
    return features


def check_finite(features: Tensor) -> None:
    """Refuses features `(N, ...)` that hold NaN or infinity.

    Raises:
        DataError: They do.
    """
    if torch.isfinite(features.sum(dtype=torch.promote_types(features.dtype, torch.float32))):
        return  # one pass; a sum that only overflows is looked at more closely
    finite = torch.isfinite(features).flatten(1).all(dim=1)
    if not finite.all():
        bad = len(finite) - int(finite.sum())
        raise DataError(
            f"{bad} of {len(features)} samples hold NaN or infinity, the first at row "
            f"{int(finite.int().argmin())}. Leave them out, or look for a model that diverged."
        )


@dataclass(frozen=True, eq=False)
class Targets:
    """What probes are to predict of each sample, in the form that every probe takes.

    Attributes:
        kind: "classes" (one of several), "multilabel" (any of several) or "regression".
        values: Class indices from 0 `(N,)`, int64; or `(N, K)`, bool; or `(N, K)`, floats.
        outputs: Number of classes, of labels, or of numbers to predict.
    """

    kind: Literal["classes", "multilabel", "regression"]
    values: Tensor
    outputs: int

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Tensor | slice) -> Targets:
        return replace(self, values=self.values[rows])

    def to(self, device: torch.device) -> Targets:
        """The same on another device."""
        return replace(self, values=self.values.to(device))

    def dense(self) -> Tensor:
        """As numbers to fit `(N, K)`, float32: 1 or 0 for each class or label; else the values."""
        if self.kind != "classes":
            return self.values.float()
        out = torch.zeros(len(self), self.outputs, dtype=torch.float32, device=self.values.device)
        return out.scatter_(1, self.values[:, None], 1.0)


def as_targets(labels: Tensor | Targets, count: int, num_classes: int | None = None) -> Targets:
    """Checked targets of `count` samples.

    Args:
        labels: `(N,)` integers are classes, `(N, K)` integers or bools of 0 and 1 are labels of
            which any may hold, floats `(N,)` or `(N, K)` are numbers to predict.
        count: Number of samples that must have one.
        num_classes: Of classes; left out, the highest label plus one.

    Raises:
        DataError: Their number, type or range is wrong.

    >>> as_targets(torch.tensor([0, 2]), 2).outputs
    3
    >>> as_targets(torch.tensor([[0, 1], [1, 1]]), 2).kind
    'multilabel'
    """
    if not isinstance(labels, Tensor | Targets):
        raise DataError(
            f"labels are a tensor of numbers, not a {type(labels).__name__}; see torch.as_tensor."
        )
    values = labels.values if isinstance(labels, Targets) else labels.detach()
    if values.ndim not in (1, 2) or len(values) != count or not values.numel():
        raise DataError(
            f"there are {count} samples and labels of shape {tuple(values.shape)}; give one label "
            "a sample, or a row of labels."
        )
    if isinstance(labels, Targets):
        return labels
    if values.is_complex():
        raise DataError(f"labels must be real numbers, not {values.dtype}.")
    if values.is_floating_point():
        if not torch.isfinite(values).all():
            raise DataError("labels hold NaN or infinity; leave those samples out.")
        values = values[:, None] if values.ndim == 1 else values
        return Targets("regression", values, values.shape[1])
    low, high = int(values.min()), int(values.max())
    values = values.long() if values.dtype == torch.bool and values.ndim == 1 else values
    if values.ndim == 2:
        if low < 0 or high > 1:
            raise DataError(
                f"labels of shape {tuple(values.shape)} must be 0 or 1, not {low} to {high}; for "
                "classes give one index a sample, for numbers to predict use labels.float()."
            )
        return Targets("multilabel", values.bool(), values.shape[1])
    if low < 0 or (num_classes is not None and high >= num_classes):
        raise DataError(
            f"labels run from {low} to {high}, but must be class indices from 0"
            f"{'' if num_classes is None else f' to {num_classes - 1}'}; see torch.unique(labels, "
            "return_inverse=True)."
        )
    return Targets("classes", values.long(), high + 1 if num_classes is None else num_classes)


def chunks(features: Tensor) -> tuple[Tensor, ...]:
    """The rows in blocks small enough to convert to float64 one after another."""
    return torch.split(features, max(1, CHUNK // features.shape[1]))


def mean_and_std(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature, in float64 `(D,)`.

    The deviation is the population's, as in scikit-learn's StandardScaler. A feature that varies by
    less than float32 can resolve counts as constant and gets a deviation of 1, so that dividing by
    it makes zeros and no NaN. Values are summed relative to about their mean, in float32 within a
    block of rows.

    >>> mean_and_std(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))[1]
    tensor([1., 1.], dtype=torch.float64)
    """
    kind = torch.promote_types(features.dtype, torch.float32)
    count, shift = len(features), features[:256].double().mean(0).to(kind)
    total, squares = torch.zeros(2, features.shape[1], dtype=torch.float64, device=shift.device)
    for block in chunks(features):
        x = block.to(kind) - shift
        total += x.sum(0)
        squares += x.square_().sum(0)
    offset = total / count
    mean = shift.double() + offset
    return mean, deviation(squares / count - offset.square(), mean)


def deviation(variance: Tensor, mean: Tensor) -> Tensor:
    """The square root of a variance; 1 for what varies by less than float32 can resolve."""
    std = variance.clamp(min=0).sqrt()
    return std.masked_fill(std <= torch.finfo(torch.float32).eps * mean.abs(), 1.0)


def stratified_split(labels: Tensor, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices to fit on and indices held out, each class divided in the same proportion.

    Each class gives at least one sample and keeps at least one; a class of one sample keeps it.

    Args:
        labels: Class of each sample `(N,)`.
        fraction: Of each class to hold out.
        seed: Of the draw.

    Returns:
        Two sorted index tensors on the device of the labels; together they are all of 0 to N - 1.

    Raises:
        DataError: Every class has a single sample.

    >>> fit, held = stratified_split(torch.tensor([0, 0, 0, 0, 1, 1]), 0.25)
    >>> len(fit), len(held)
    (4, 2)
    """
    held = []
    for members in shuffled_classes(labels.cpu(), seed):
        if len(members) > 1:
            share = round(fraction * len(members))
            held.append(members[: min(max(share, 1), len(members) - 1)])
    if not held:
        raise DataError(
            "every class has a single sample, so none can be held out; give two or more."
        )
    out = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    out[torch.cat(held)] = True
    out = out.to(labels.device)
    return (~out).nonzero().squeeze(1), out.nonzero().squeeze(1)


def multilabel_split(labels: Tensor, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The same for labels of which any may hold: each is divided in about the same proportion.

    Samples are dealt by their rarest label, to the side that lacks it most (Sechidis, Tsoumakas and
    Vlahavas 2011, "On the stratification of multi-label data"). Each label of two or more samples
    comes to both sides, unless that took another away.

    Args:
        labels: Which hold for each sample `(N, K)`, bool.
        fraction: Of each label to hold out.
        seed: Of the draw.

    Returns:
        As `stratified_split`.

    Raises:
        DataError: No label has two samples.

    >>> labels = torch.eye(3).repeat(2, 1).bool()
    >>> fit, held = multilabel_split(labels, 0.2)
    >>> labels[held].sum(0)
    tensor([1, 1, 1])
    """
    count, generator = len(labels), torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator, device="cpu")
    own: list[list[int]] = [[] for _ in range(count)]
    members: list[list[int]] = [[] for _ in range(labels.shape[1])]
    for i, k in labels.cpu()[order].nonzero().tolist():
        own[i].append(k)
        members[k].append(i)
    totals = [len(rows) for rows in members]
    if max(totals) < 2:
        raise DataError("no label has two samples, so none can be held out; give more samples.")
    shares = [min(max(fraction * n, 1), n - 1) if n > 1 else 0 for n in totals]
    lacks = [[n - share for n, share in zip(totals, shares, strict=True)], shares]
    room = [(1 - fraction) * count, fraction * count]
    left, on, side = list(totals), [[0] * len(totals), [0] * len(totals)], [-1] * count

    def deal(i: int, to: int) -> None:
        side[i] = to
        room[to] -= 1
        for k in own[i]:
            lacks[to][k] -= 1
            on[to][k] += 1
            left[k] -= 1

    while any(left):
        rarest = min((k for k, n in enumerate(left) if n), key=left.__getitem__)
        for i in members[rarest]:
            if side[i] < 0:
                deal(i, max((0, 1), key=lambda to: (lacks[to][rarest], room[to])))
    for i in range(count):
        if side[i] < 0:
            deal(i, max((0, 1), key=room.__getitem__))
    for k, rows in enumerate(members):  # what was dealt by rarer labels alone
        for i in rows:
            there = side[i]
            spare = all(on[there][o] > 1 or totals[o] == 1 for o in own[i])
            if totals[k] > 1 and not on[1 - there][k] and spare:
                for o in own[i]:
                    on[there][o] -= 1
                    on[1 - there][o] += 1
                side[i] = 1 - there
    out = torch.tensor(side, device="cpu")[order.argsort()].to(labels.device)
    return (out == 0).nonzero().squeeze(1), (out == 1).nonzero().squeeze(1)


def shuffled_classes(labels: Tensor, seed: int) -> tuple[Tensor, ...]:
    """For each class that occurs, ascending, the rows of its samples `(n,)` in random order.

    >>> [sorted(rows.tolist()) for rows in shuffled_classes(torch.tensor([7, 2, 7]), 0)]
    [[1], [0, 2]]
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator, device="cpu").to(labels.device)
    own, places = labels[order].sort(stable=True)
    counts: list[int] = own.unique_consecutive(return_counts=True)[1].tolist()
    return torch.split(order[places], counts)
