"""Ridge classification along a whole path of penalties, from one eigendecomposition.

Closed form: there is no step size, no order of samples and nothing random, which makes it the probe
to compare taps with when hyper-parameters of the others are in doubt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headplug.errors import OptionError
from headplug.probing.data import check_features, check_labels, chunks, mean_and_std
from headplug.probing.linear import LinearModels


class RidgeSetting(NamedTuple):
    """One penalty.

    Attributes:
        penalty: λ of mean squared error + λ ‖W‖². Scikit-learn's `alpha` is λ times the number of
            samples.
    """

    penalty: float


def ridge_grid() -> list[RidgeSetting]:
    """Half-decades from nearly least squares (1e-4) to strongly shrunk (30).

    >>> len(ridge_grid())
    12
    """
    return [RidgeSetting(float(f"{m}e{e}")) for e in range(-4, 2) for m in (1, 3)]


@torch.no_grad()
def fit_ridge(
    features: Tensor,
    labels: Tensor,
    settings: Sequence[RidgeSetting],
    *,
    num_classes: int | None = None,
) -> LinearModels:
    """Fits targets of 1 for the class and -1 for the others by penalised least squares.

    Features are standardised by the training mean and deviation, targets centred (an intercept that
    is not penalised), all in float64. Equals scikit-learn's `RidgeClassifier(alpha=λ N)` behind a
    `StandardScaler`. The decomposition is of the smaller of `(D, D)` and `(N, N)`.

    Args:
        features: Training features `(N, D)`.
        labels: Their classes `(N,)`.
        settings: The path of penalties.
        num_classes: Left out, the highest label plus one.

    Returns:
        The classifiers, in float32.

    Raises:
        DataError: Features or labels cannot be used.
        OptionError: A penalty is not a positive number.

    >>> x = torch.tensor([[0.0], [1.0], [4.0], [5.0]])
    >>> fit_ridge(x, torch.tensor([0, 0, 1, 1]), [RidgeSetting(0.1)]).predict(x)
    tensor([[0, 0, 1, 1]])
    """
    features = check_features(features)
    labels, classes = check_labels(labels, len(features), num_classes)
    for s in settings:
        if not (math.isfinite(s.penalty) and s.penalty > 0):
            raise OptionError(f"the penalty of ridge must be a positive number, not {s.penalty!r}.")
    count, width = features.shape
    mean, std = mean_and_std(features)
    middle = 2 * labels.bincount(minlength=classes).double() / count - 1
    if width <= count:  # W = V (Λ + λ)⁻¹ Vᵀ (Zᵀ Y / N) with Zᵀ Z / N = V Λ Vᵀ
        gram = features.new_zeros(width, width, dtype=torch.float64)
        cross = features.new_zeros(width, classes, dtype=torch.float64)
        for rows, owners in zip(
            chunks(features), labels.split(len(chunks(features)[0])), strict=True
        ):
            z = (rows.double() - mean) / std
            gram.addmm_(z.T, z, alpha=1 / count)
            cross.addmm_(z.T, _targets(owners, classes) - middle, alpha=1 / count)
        values, left = torch.linalg.eigh(gram)
        right = left.T @ cross
    else:  # W = Zᵀ U (Λ + λ)⁻¹ Uᵀ (Y / N) with Z Zᵀ / N = U Λ Uᵀ
        z = (features.double() - mean) / std
        values, u = torch.linalg.eigh(z @ z.T / count)
        left, right = z.T @ u, u.T @ (_targets(labels, classes) - middle) / count
    penalties = torch.tensor([s.penalty for s in settings], dtype=torch.float64, device=left.device)
    shrunk = right[:, :, None] / (values.clamp(min=0)[:, None] + penalties)[:, None, :]
    weight = (left @ shrunk.flatten(1)).unflatten(1, shrunk.shape[1:])
    return LinearModels(
        mean.float(), std.float(), weight.float(), middle.float()[:, None].expand(-1, len(settings))
    )


def _targets(labels: Tensor, classes: int) -> Tensor:
    return F.one_hot(labels, classes).double().mul_(2).sub_(1)
