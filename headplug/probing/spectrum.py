"""How many directions the features of a tap really use: label-free, from their singular values.

Definitions of rank differ by an order of magnitude on the same features, so each one here is
named, stated in `DEFINITIONS` and printed by the reports. Sums run in float64 over blocks of rows,
so that the number of samples matters neither for memory nor for precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headplug.probing.data import check_features, chunks, mean_and_std

EPS = 1e-7

DEFINITIONS = {
    "rankme": (
        "RankMe (arXiv 2210.02885): exp of the entropy of p = s / sum(s) + 1e-7, s the singular "
        "values of the features as they are, not centred."
    ),
    "effective_rank": (
        "Effective rank (Roy and Vetterli 2007): exp of the entropy of p = s / sum(s), s the "
        "singular values of the features minus their mean."
    ),
    "singular_values": "Singular values of the features minus their mean, divided by the largest.",
}


@torch.no_grad()
def singular_values(features: Tensor, *, centred: bool = True) -> Tensor:
    """Singular values of `(N, D)` features, largest first, in float64 `(min(N, D),)`.

    They are roots of the eigenvalues of a Gram matrix, in which those below 1.5e-8 of the largest
    are rounding noise: they come out as 0.

    Args:
        features: One row a sample.
        centred: Whether to subtract the mean of each feature first.

    Raises:
        DataError: The features cannot be used.

    >>> singular_values(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), centred=False)
    tensor([4., 3.], dtype=torch.float64)
    """
    return _both(features)[0 if centred else 1]


def rankme(features: Tensor) -> float:
    """RankMe of `(N, D)` features (Garrido et al., arXiv 2210.02885).

    `exp(-Σ p log p)` with `p = s / Σ s + 1e-7` and `s` the singular values of the features as they
    are. A mean that dominates the features pulls it towards 1; `effective_rank` does not see the
    mean. It is 0 if all features are zero.

    Raises:
        DataError: The features cannot be used.

    >>> round(rankme(torch.eye(4)), 3)
    4.0
    """
    return _exp_entropy(singular_values(features, centred=False), EPS)


def effective_rank(features: Tensor) -> float:
    """Effective rank of `(N, D)` features (Roy and Vetterli, EUSIPCO 2007), of the centred matrix.

    `exp(-Σ p log p)` with `p = s / Σ s` and `s` the singular values of the features minus their
    mean. It is 0 if the features are constant.

    Raises:
        DataError: The features cannot be used.

    >>> round(effective_rank(torch.eye(4)), 3)
    3.0
    """
    return _exp_entropy(singular_values(features), 0.0)


@torch.no_grad()
def spectrum(features: Tensor, limit: int = 512) -> dict[str, Any]:
    """All of the above for `(N, D)` features, from one pass over them.

    Args:
        features: One row a sample.
        limit: How many singular values to list at most.

    Returns:
        `dim`, `rankme`, `effective_rank` and the list `singular_values`; see `DEFINITIONS`.

    Raises:
        DataError: The features cannot be used.
    """
    centred, raw = _both(features)
    top = centred[0] if centred[0] > 0 else 1.0
    return {
        "dim": features.shape[1],
        "rankme": _exp_entropy(raw, EPS),
        "effective_rank": _exp_entropy(centred, 0.0),
        "singular_values": (centred[:limit] / top).tolist(),
    }


def _grams(features: Tensor) -> tuple[Tensor, Tensor]:
    """Gram matrices of the centred and of the raw features, on the shorter side, in float64."""
    count, width = features.shape
    mean, _ = mean_and_std(features)
    if width <= count:
        gram = features.new_zeros(width, width, dtype=torch.float64)
        for block in chunks(features):
            z = block.double() - mean
            gram.addmm_(z.T, z)
        return gram, gram + count * torch.outer(mean, mean)
    z = features.double() - mean
    gram = z @ z.T
    shift = (z @ mean)[:, None]
    return gram, gram + shift + shift.T + mean @ mean


def _both(features: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values of the centred and of the raw features."""
    centred, raw = (_roots(gram) for gram in _grams(check_features(features)))
    if centred[0] <= torch.finfo(torch.float32).eps * raw[0]:  # constant, but for rounding
        centred = torch.zeros_like(centred)
    return centred, raw


def _roots(gram: Tensor) -> Tensor:
    values = torch.linalg.eigvalsh(gram).flip(0)
    noise = torch.finfo(values.dtype).eps * values[0].clamp(min=0)
    return torch.where(values > noise, values, 0.0).sqrt()


def _exp_entropy(values: Tensor, eps: float) -> float:
    total = values.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(values / total + eps).sum().exp())
