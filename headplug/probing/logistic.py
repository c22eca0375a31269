"""Logistic regression along a whole path of penalties, to a stated distance from the optimum.

Nothing is random and there is no step size. All penalties are solved together by L-BFGS on all
samples, in coordinates in which the curvature at zero is about the same in every direction (the
eigenvectors of the covariance), which a weak penalty on correlated features needs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from headplug.errors import DataError, OptionError
from headplug.heads.base import positive
from headplug.probing.data import Targets, as_targets, check_features, mean_and_std
from headplug.probing.lbfgs import MEMORY, minimize
from headplug.probing.losses import derivative, losses
from headplug.probing.models import STANDARD, LinearModels, blocks, normalized, number, plainly

VALUES = 2**27  # of memory for L-BFGS: more settings than fit are solved in turns
SETTLING = 6  # steps of Newton's method for the biases
NEVER = -1e30  # the score of a class that no training sample has


class LogisticSetting(NamedTuple):
    """One penalty.

    Attributes:
        penalty: λ of cross-entropy + λ/2 ‖W‖².
        of: Which cross-entropy: the "mean" over the N samples or their "sum", where λ is 1 over
            scikit-learn's `C` (with two classes 2 / C: it then gives one of them no weights).
    """

    penalty: float
    of: str = "mean"


def logistic_grid() -> list[LogisticSetting]:
    """Decades from 1e-6 to 10.

    >>> len(logistic_grid())
    8
    """
    return [LogisticSetting(float(f"1e{e}")) for e in range(-6, 2)]


@dataclass(frozen=True, eq=False)
class LogisticModels(LinearModels):
    """Linear models fitted by logistic regression, one a penalty.

    Attributes:
        gap: What the objective of each is above its minimum, at most `(S,)`.
    """

    gap: Tensor


def fit_logistic(
    features: Tensor,
    labels: Tensor | Targets,
    settings: Sequence[LogisticSetting],
    *,
    num_classes: int | None = None,
    tol: float = 1e-4,
    max_iter: int = 1000,
) -> LogisticModels:
    """Minimises cross-entropy + λ/2 ‖W‖² for each penalty λ; the bias is not penalised.

    Softmax over classes, also over two; for labels the sum of independent sigmoid cross-entropies.
    Features are standardised by the training mean and deviation. The bound on what is left is the
    duality gap at the probabilities of the model, mixed with as much of another distribution as
    makes their mean that of the labels; it is ‖gradient‖² / 2λ once the bias is optimal. Arithmetic
    is in float32, which reaches gaps of about 1e-6.

    Args:
        features: Training features `(N, D)`.
        labels: Classes or labels, see `headplug.probing.data.as_targets`.
        settings: The path of penalties.
        num_classes: Left out, the highest label plus one. A class without samples is never
            predicted.
        tol: The gap to reach, in nats.
        max_iter: Passes over the data, at most.

    Returns:
        The models. A warning names settings that stopped before they reached `tol`; their `gap`
        says how far they came.

    Raises:
        DataError: Features or labels cannot be used, or no label varies.
        OptionError: There is no penalty, one is not a positive number, or the labels are numbers.

    >>> x = torch.tensor([[0.0], [1.0], [4.0], [5.0]])
    >>> models = fit_logistic(x, torch.tensor([0, 0, 1, 1]), [LogisticSetting(0.1)])
    >>> models.predict(x), bool(models.gap < 1e-4)
    (tensor([[0, 0, 1, 1]]), True)
    """
    features = check_features(features)
    targets = as_targets(labels, len(features), num_classes).to(features.device)
    if targets.kind == "regression":
        raise OptionError(
            "logistic regression needs classes or labels, and these are numbers; use ridge, or "
            "labels.long()."
        )
    if not settings:
        raise OptionError("there are no settings; take logistic_grid(), or [LogisticSetting(0.1)].")
    for s in settings:
        number(f"penalty in {s}", s.penalty, zero=False)
        if s.of not in ("mean", "sum"):
            raise OptionError(f"of is mean or sum, not {s.of!r}.")
    number("tol", tol, zero=False)
    count = len(features)
    positive("max_iter", max_iter)
    with plainly(features.device):
        present, constant = _varying(targets)
        problem = _Problem(features, replace(targets, values=constant[0], outputs=len(present)))
        penalties = problem.mean.new_tensor(
            [s.penalty / (count if s.of == "sum" else 1) for s in settings]
        )
        weight = problem.mean.new_zeros(len(settings), targets.outputs, features.shape[1])
        bias = constant[1].repeat(len(settings), 1)
        gaps = []
        size = max(1, VALUES // (2 * MEMORY * problem.size))
        for first in range(0, len(settings), size):
            some = penalties[first : first + size]
            found, gap = problem.solve(some, tol, max_iter)
            weight[first : first + size, present], bias[first : first + size, present] = found
            gaps.append(gap)
    gap = torch.cat(gaps)
    short = [(s, f"{g:.1e}") for s, g in zip(settings, gap.tolist(), strict=True) if not g <= tol]
    if short:
        warnings.warn(
            f"logistic regression stopped before its gap was {tol:g}: "
            f"{', '.join(f'{s} at {g}' for s, g in short)}. Take a larger tol, max_iter or "
            "penalty.",
            stacklevel=2,
        )
    normalize = (STANDARD,) * len(settings)
    return LogisticModels(targets.kind, normalize, problem.mean, problem.std, weight, bias, gap)


class _Problem:
    """The objective on some data, in the eigenvectors of the covariance.

    Args:
        features: `(N, D)`.
        targets: Of which every output varies.
    """

    def __init__(self, features: Tensor, targets: Targets) -> None:
        self.features, self.targets, self.outputs = features, targets, targets.outputs
        self.mean, self.std = (t.float() for t in mean_and_std(features))
        count, width = features.shape
        self.parts = list(blocks(count, width + 16 * self.outputs))
        self.room = self.mean.new_empty(min(count, self.parts[0].stop), width)
        if width <= count:
            gram = torch.zeros(width, width, dtype=torch.float64, device=features.device)
            for rows in self.parts:
                z = self._z(rows)
                gram += z.T @ z
            self.values, basis = torch.linalg.eigh(gram / count)
        else:  # weights lie in the span of the samples
            z = normalized(features, "standard", self.mean, self.std).double()
            self.values, u = torch.linalg.eigh(z @ z.T / count)
            kept = self.values > 1e-10 * self.values[-1]
            self.values, basis = self.values[kept], z.T @ u[:, kept]
            basis = basis / (self.values * count).sqrt()
        self.basis, self.values = basis.float(), self.values.clamp(min=0).float()
        self.size = self.outputs * (len(self.values) + 1)
        classes = targets.kind == "classes"
        self.share = self.mean.new_zeros(self.outputs)  # π, the mean of the targets
        self.towards = self.mean.new_zeros(self.outputs, width)  # the mean of target times z
        for rows in self.parts:
            y = targets[rows].dense()
            self.share += y.sum(0) / count
            self.towards += y.T @ self._z(rows) / count
        # the best biases without weights
        self.start = self.share.log() if classes else self.share.logit()
        self.curvature = 1 / self.outputs if classes else 0.25  # of the loss, at zero
        self.scale = 1 if classes else self.outputs  # losses are means over labels

    def solve(
        self, penalties: Tensor, tol: float, max_iter: int
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Weights `(S, K, D)`, biases `(S, K)` and gaps `(S,)`."""
        curvature = torch.cat([self.values, self.values.new_ones(1)]) * self.curvature
        curvature = curvature.repeat(len(penalties), 1)
        curvature[:, :-1] += penalties[:, None]
        scale = curvature.sqrt()[:, None]

        def unfolded(point: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
            inner = point.view(len(some), self.outputs, -1) / scale[some]
            return inner[:, :, :-1] @ self.basis.T, inner[:, :, -1]

        def evaluate(point: Tensor, some: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            weight, bias = unfolded(point, some)
            loss, to_weight, to_bias = self._loss(weight, bias)
            lam = penalties[some, None, None]
            to_weight += lam * weight
            value = loss + (lam / 2 * weight.square()).sum((1, 2))
            left = (to_weight.square() / (2 * lam)).sum((1, 2))
            inner = torch.cat([to_weight @ self.basis, to_bias[:, :, None]], 2) / scale[some]
            return value, inner.flatten(1), left

        every = torch.arange(len(penalties), device=scale.device)
        start = scale.new_zeros(len(every), self.outputs, len(self.values) + 1)
        start[:, :, -1] = scale[:, :, -1] * self.start
        point = minimize(evaluate, start.flatten(1), tol / 4, max_iter)
        weight, bias = unfolded(point, every)
        bias = self._settled(weight, bias)
        return (weight, bias), self._gap(weight, bias, penalties)

    def _settled(self, weight: Tensor, bias: Tensor) -> Tensor:
        """The best biases for weights, by Newton's method: the bound is loose without them."""
        for _ in range(SETTLING):
            slope = self.mean.new_zeros(bias.shape, dtype=torch.float64)
            curve = slope[:, :, None] * slope[:, None]
            for rows in self.parts:
                p = torch.einsum("bd,skd->sbk", self._z(rows), weight).add_(bias[:, None])
                p = p.softmax(2) if self.targets.kind == "classes" else p.sigmoid_()
                slope += (p - self.targets[rows].dense()).sum(1) / len(self.features)
                if self.targets.kind == "classes":
                    curve -= p.transpose(1, 2) @ p / len(self.features)
                    curve += p.sum(1).diag_embed() / len(self.features)
                else:
                    curve += (p * (1 - p)).sum(1).diag_embed() / len(self.features)
            curve.diagonal(dim1=1, dim2=2).add_(1e-12)  # where all probabilities are 0 or 1
            if self.targets.kind == "classes":  # which do not change when all biases do
                curve += 1 / self.outputs
            change = torch.linalg.solve(curve, slope)
            bias = bias - change.clamp(-1, 1).nan_to_num(0).float()
            if change.abs().max() < 1e-4:  # its square is what is left
                break
        return bias

    def _z(self, rows: slice) -> Tensor:
        """Standardised, until the next are asked for."""
        some = self.features[rows]
        return normalized(some, "standard", self.mean, self.std, self.room[: len(some)])

    def _loss(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss `(S,)`, in float64, and its gradients."""
        shape = (self.outputs, len(weight))
        flat, start = weight.transpose(0, 1).flatten(0, 1), bias.T.flatten()
        total = flat.new_zeros(len(weight), dtype=torch.float64)
        to_weight, to_bias = torch.zeros_like(flat), torch.zeros_like(start)
        count = len(self.features)
        for rows in self.parts:
            z, values = self._z(rows), self.targets.values[rows]
            scores = torch.addmm(start[:, None], flat, z.T).view(*shape, -1)
            total += losses(self.targets.kind, scores, values) * (len(z) / count)
            d = derivative(self.targets.kind, scores, None, values).flatten(0, 1)
            to_weight.addmm_(d, z, alpha=self.scale / count)
            to_bias.add_(d.sum(1), alpha=self.scale / count)
        gradient = to_weight.unflatten(0, shape).transpose(0, 1)
        return total * self.scale, gradient, to_bias.view(shape).T

    def _gap(self, weight: Tensor, bias: Tensor, penalty: Tensor) -> Tensor:
        """Primal less dual objective, at probabilities that are moved to the mean of the targets.

        With probabilities q of mean q̄ and targets of mean π, (1 - ε) q + ε r has the mean π for
        a distribution r, the same for every sample, if ε is large enough.
        """
        loss, to_weight, to_bias = self._loss(weight, bias)
        mean = self.share + to_bias
        part = 1 - (self.share / mean).amin(1)
        if self.targets.kind == "multilabel":
            part = torch.maximum(part, 1 - ((1 - self.share) / (1 - mean)).amin(1))
        part = part.clamp(0, 1).double()
        if self.targets.kind == "classes":
            bias = bias - bias.mean(1, keepdim=True)
        against = (bias * to_bias).double().sum(1)
        entropy = loss - (weight * to_weight).double().sum((1, 2)) - against
        product = to_weight + self.towards
        moved = to_weight + penalty[:, None, None] * weight - part[:, None, None].float() * product
        rest = part * (entropy + (weight * product).double().sum((1, 2)))
        return rest + against + moved.double().square().sum((1, 2)) / (2 * penalty.double())


def _varying(targets: Targets) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The outputs that training samples differ in, the targets of these, and biases of the rest.

    Raises:
        DataError: There are none.
    """
    values = targets.values
    if targets.kind == "classes":
        present = values.bincount(minlength=targets.outputs).nonzero().squeeze(1)
        bias = values.new_full((targets.outputs,), NEVER, dtype=torch.float32)
        return present, (torch.searchsorted(present, values), bias)
    share = targets.dense().mean(0)
    present = ((share > 0) & (share < 1)).nonzero().squeeze(1)
    if not len(present):
        raise DataError("each label is the same for all samples; there is nothing to fit.")
    return present, (values[:, present], torch.where(share > 0, -NEVER, NEVER))
