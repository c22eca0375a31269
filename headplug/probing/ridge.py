"""Ridge regression along a whole path of penalties, from one eigendecomposition.

Closed form: there is no step size, no order of samples and nothing random, which makes it the probe
to compare taps with when hyper-parameters of the others are in doubt. The same decomposition gives
what each training sample would be predicted as by a fit without it, so that choosing the penalty
needs no held-out part.

Large products are in float32, and summed in float64, where that cannot be seen: with at least two
samples a feature and penalties from 1e-4 on, which is over a hundred times the rounding error of
the correlations. Otherwise residual and 1 - leverage are small differences, and all is in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from headplug.errors import OptionError
from headplug.probing.data import (
    Targets,
    as_targets,
    check_features,
    deviation,
    mean_and_std,
)
from headplug.probing.models import STANDARD, LinearModels, blocks, decided, number, plainly

WEAK = 1e-4  # penalties below it need float64
PANEL = 128  # features times the rest at a time; thinner products are no faster


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


@dataclass(frozen=True, eq=False)
class RidgeModels(LinearModels):
    """Linear models fitted by least squares, one a penalty.

    Attributes:
        left_out: What `predict` would give for each training sample if the probe were fitted to all
            others (normalised alike, with the same λ N): `(S, N)` of classes, else `(S, N, K)`.
    """

    left_out: Tensor


def fit_ridge(
    features: Tensor,
    labels: Tensor | Targets,
    settings: Sequence[RidgeSetting],
    *,
    num_classes: int | None = None,
) -> RidgeModels:
    """Fits numbers, or 1 for the class or label and -1 for the others, by penalised least squares.

    Features are standardised by the training mean and deviation, targets centred (an intercept that
    is not penalised). Equals scikit-learn's `Ridge(alpha=λ N)`, and its `RidgeClassifier`, behind a
    `StandardScaler`. The decomposition is of the smaller of `(D, D)` and `(N, N)`; the left-out
    predictions are y - residual / (1 - leverage), as in Allen's PRESS (1974).

    Args:
        features: Training features `(N, D)`.
        labels: What to predict, see `headplug.probing.data.as_targets`.
        settings: The path of penalties.
        num_classes: Left out, the highest label plus one.

    Returns:
        The models, in float32, with the left-out predictions of the training samples.

    Raises:
        DataError: Features or labels cannot be used.
        OptionError: There is no penalty, or one is not a positive number.

    >>> x = torch.tensor([[0.0], [1.0], [4.0], [5.0]])
    >>> models = fit_ridge(x, torch.tensor([0, 0, 1, 1]), [RidgeSetting(0.1)])
    >>> models.predict(x), models.left_out
    (tensor([[0, 0, 1, 1]]), tensor([[0, 0, 1, 1]]))
    """
    features = check_features(features)
    count, width = features.shape
    targets = as_targets(labels, count, num_classes).to(features.device)
    if not settings:
        raise OptionError("there are no settings; take ridge_grid(), or [RidgeSetting(0.1)].")
    for s in settings:
        number(f"penalty in {s}", s.penalty, zero=False)
    with plainly(features.device):
        middle = _numbers(targets).mean(0, dtype=torch.float64)
        if width > count:
            found = _by_samples(features, targets, middle)
        else:
            enough = count >= 2 * width and min(s.penalty for s in settings) >= WEAK
            single = enough and features.dtype != torch.float64
            found = _by_features(
                features, targets, middle, torch.float32 if single else torch.float64
            )
        penalties = middle.new_tensor([s.penalty for s in settings])
        shrink = 1 / (found.values[:, None] + penalties)  # (R, S)
        inner = torch.einsum("rk,rs->rsk", found.right, shrink)
        weight = torch.einsum("dr,rsk->skd", found.left, inner)
        return RidgeModels(
            targets.kind,
            (STANDARD,) * len(settings),
            found.mean.float(),
            found.std.float(),
            weight.float(),
            middle.float().expand(len(settings), -1),
            _left_out(found, targets, middle, shrink, inner),
        )


class _Decomposed(NamedTuple):
    """The second moments of standardised features and their products with the targets.

    Attributes:
        mean: `(D,)`.
        std: `(D,)`.
        values: Eigenvalues Λ `(R,)`.
        left, right: W = left (Λ + λ)⁻¹ right, `(D, R)` and `(R, K)`.
        rows: Gives of some samples A `(B, R)`, where A (Λ + λ)⁻¹ right is what is fitted, and Q,
            where Q (Λ + λ)⁻¹ 1 is the leverage.
    """

    mean: Tensor
    std: Tensor
    values: Tensor
    left: Tensor
    right: Tensor
    rows: Callable[[slice], tuple[Tensor, Tensor]]


def _by_features(
    features: Tensor, targets: Targets, middle: Tensor, dtype: torch.dtype
) -> _Decomposed:
    """W = V (Λ + λ)⁻¹ Vᵀ (Zᵀ Y / N) with Zᵀ Z / N = V Λ Vᵀ, all from one pass over the features.

    They are shifted to about their mean before they are multiplied, so that nothing cancels; sums
    over blocks are in float64. Of the symmetric product only the upper half is made.
    """
    count, width = features.shape
    shift = features[:256].double().mean(0).to(features.dtype)
    products = middle.new_zeros(width, width + targets.outputs)
    total = middle.new_zeros(width)
    parts = list(blocks(count, width + targets.outputs))
    block = middle.new_empty(min(count, parts[0].stop), width + targets.outputs, dtype=dtype)
    for rows in parts:
        both = block[: len(targets[rows])]
        x, y = both.split([width, targets.outputs], 1)
        x.copy_(features[rows]).sub_(shift)
        y.copy_(_numbers(targets[rows]) - middle)
        total += x.sum(0)
        for first, panel in zip(range(0, width, PANEL), x.split(PANEL, 1), strict=True):
            products[first : first + PANEL, first:] += panel.T @ both[:, first:]
    gram, cross = products.split([width, targets.outputs], 1)
    offset = total / count
    mean = shift.double() + offset
    covariance = gram.div_(count).addr_(offset, offset, alpha=-1)
    std = deviation(covariance.diagonal(), mean)
    values, vectors = torch.linalg.eigh(covariance.div_(std).div_(std[:, None]), UPLO="U")
    left = vectors / count**0.5
    projection = left / std[:, None]
    start, projection = (-offset @ projection).to(dtype), projection.to(dtype)

    def rows_of(rows: slice) -> tuple[Tensor, Tensor]:
        a = torch.addmm(start, features[rows].to(dtype) - shift.to(dtype), projection)
        return a, a.square()

    right = left.T @ (cross / std[:, None])
    return _Decomposed(mean, std, values.clamp(min=0), left, right, rows_of)


def _by_samples(features: Tensor, targets: Targets, middle: Tensor) -> _Decomposed:
    """W = Zᵀ U (Λ + λ)⁻¹ Uᵀ (Y / N) with Z Zᵀ / N = U Λ Uᵀ."""
    count = len(features)
    mean, std = mean_and_std(features.double())
    z = (features.double() - mean) / std
    values, u = torch.linalg.eigh(z @ z.T / count)
    values = values.clamp(min=0)
    right = u.T @ (_numbers(targets) - middle) / count
    return _Decomposed(
        mean,
        std,
        values,
        z.T @ u,
        right,
        lambda rows: (u[rows] * values * count, u[rows].square() * values),
    )


def _left_out(
    found: _Decomposed, targets: Targets, middle: Tensor, shrink: Tensor, inner: Tensor
) -> Tensor:
    """Predictions y - residual / (1 - leverage), a block of samples at a time."""
    count, (_, settings, outputs) = len(targets), inner.shape
    if targets.kind == "classes":
        left_out = targets.values.new_empty(count, settings)
    else:
        left_out = middle.new_empty(count, settings, outputs, dtype=torch.float32)
    for rows in blocks(count, 2 * len(inner) + settings * outputs):
        a, q = found.rows(rows)
        y = (_numbers(targets[rows]) - middle).to(a.dtype)[:, None]
        fitted = (a @ inner.flatten(1).to(a.dtype)).view(-1, settings, outputs)
        rest = 1 - 1 / count - (shrink.T.to(a.dtype) @ q.T).T  # faster than thin columns
        out = torch.lerp(y, fitted, rest.reciprocal_()[:, :, None]).add_(middle)
        left_out[rows] = decided(targets.kind, out)
    return left_out.transpose(0, 1)


def _numbers(targets: Targets) -> Tensor:
    if targets.kind == "regression":
        return targets.values.double()
    return targets.dense().mul_(2).sub_(1)
