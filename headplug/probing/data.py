"""What every probe asks of features and labels: checked once, split fairly, standardised alike.

Nothing here draws from the global random state or keeps a second copy of the features in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headplug.errors import DataError

CHUNK = 2**23  # values converted to float64 at a time: 64 MiB


def check_features(features: Tensor) -> Tensor:
    """The features as floats `(N, D)`, or an error that says what is wrong with them.

    Raises:
        DataError: They are not a matrix, are empty, or hold NaN or infinity.
    """
    if features.ndim != 2 or not features.numel():
        raise DataError(
            f"features must have shape (N, D), not {tuple(features.shape)}; pool or flatten them "
            "first."
        )
    features = features.detach()
    if not features.is_floating_point():
        features = features.float()
    finite = torch.isfinite(features).all(dim=1)
    if not finite.all():
        bad = len(finite) - int(finite.sum())
        raise DataError(
            f"{bad} of {len(features)} samples hold NaN or infinity, the first at row "
            f"{int(finite.int().argmin())}. Leave them out, or look for a model that diverged."
        )
    return features


def check_labels(labels: Tensor, count: int, num_classes: int | None = None) -> tuple[Tensor, int]:
    """The labels `(N,)` as int64, and the number of classes.

    Args:
        labels: Class indices from 0.
        count: Number of samples that must have a label.
        num_classes: Left out, the highest label plus one.

    Raises:
        DataError: Their number, type or range is wrong.
    """
    if labels.ndim != 1 or len(labels) != count:
        raise DataError(
            f"there are {count} samples and labels of shape {tuple(labels.shape)}; give one label "
            "a sample."
        )
    if labels.is_floating_point() or labels.is_complex():
        raise DataError(f"labels must be integers, not {labels.dtype}; use labels.long().")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        raise DataError(
            f"labels run from {low} to {high}, but must be class indices from 0"
            f"{'' if num_classes is None else f' to {num_classes - 1}'}; see torch.unique(labels, "
            "return_inverse=True)."
        )
    return labels.long(), high + 1 if num_classes is None else num_classes


def chunks(features: Tensor) -> tuple[Tensor, ...]:
    """The rows in blocks small enough to convert to float64 one after another."""
    return torch.split(features, max(1, CHUNK // features.shape[1]))


def mean_and_std(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature, in float64 `(D,)`.

    The deviation is the population's, as in scikit-learn's StandardScaler. A feature that varies by
    less than float32 can resolve counts as constant and gets a deviation of 1, so that dividing by
    it makes zeros and no NaN.

    >>> mean_and_std(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))[1]
    tensor([1., 1.], dtype=torch.float64)
    """
    count = len(features)
    mean = features.new_zeros(features.shape[1], dtype=torch.float64)
    for block in chunks(features):
        mean += block.double().sum(0) / count
    variance = torch.zeros_like(mean)
    for block in chunks(features):
        variance += (block.double() - mean).square().sum(0) / count
    std = variance.sqrt()
    constant = std <= torch.finfo(torch.float32).eps * mean.abs()
    return mean, std.masked_fill(constant, 1.0)


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
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator, device="cpu")
    held = []
    for c in labels.unique().tolist():
        members = order[labels.cpu()[order] == c]
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
