"""How many directions features really use, and how their sizes fall: label-free, from one spectrum.

Definitions in the literature differ by an order of magnitude on the same features, so each one here
is stated, its switches are named, and every result says which were used.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headplug.diagnostics.blocks import Source, as_features, blocks, levelled, narrowed
from headplug.diagnostics.moments import Moments
from headplug.diagnostics.options import LEAST, Kind, SpectrumOptions, Weights
from headplug.errors import DataError

NOISE = torch.finfo(torch.float32).eps ** 2  # of the largest eigenvalue


class PowerLaw(NamedTuple):
    """A line fitted to logarithms: `log y = slope * log x + c`.

    Attributes:
        slope: The exponent.
        r2: Share of the (weighted) variance of log y that it explains; None if there is none.
        first: First rank of the fit, from 1.
        last: Last rank of the fit.
    """

    slope: float
    r2: float | None
    first: int
    last: int


class Spectrum:
    """Singular values of features `(N, D)`, and what is made of them.

    They are roots of the eigenvalues of a float64 second moment. Those below 1.2e-7 of the largest,
    which float32 features cannot resolve, are rounding noise: they come out as 0.

    Args:
        moments: Of the features.

    Attributes:
        centred: Of the features minus their mean, largest first, float64 `(min(N, D),)`.
        raw: Of the features as they are.

    Raises:
        DataError: There are fewer than two samples, or their squares are too large for float64.

    >>> Spectrum.of(torch.tensor([[3.0, 0.0], [0.0, 4.0]])).raw
    tensor([4., 3.], dtype=torch.float64)
    """

    def __init__(self, moments: Moments) -> None:
        if moments.count < 2:
            raise DataError(f"a spectrum needs two samples or more, not {moments.count}.")
        second = moments.second
        if not second.isfinite().all():
            raise DataError("the features are too large to be squared; divide them by a number.")
        mean = moments.mean
        self.centred = _roots(second)[: moments.count]
        self.raw = _roots(second.addr_(mean, mean, alpha=moments.count))[: moments.count]
        if self.centred[0] <= torch.finfo(torch.float32).eps * self.raw[0]:
            self.centred = torch.zeros_like(self.centred)  # constant, but for rounding

    @classmethod
    def of(cls, features: Tensor) -> Spectrum:
        """Of features `(N, D)`, where they are.

        Raises:
            DataError: They are no matrix of two finite rows or more, or too large.
        """
        features = as_features(features)
        source = levelled(Source({"features": features}, "features"))
        found = cls(moments_of(source, features.device))
        found.centred, found.raw = found.centred / source.scale, found.raw / source.scale
        return found

    @property
    def rank(self) -> int:
        """How many centred singular values are not zero."""
        return int(self.centred.count_nonzero())

    @property
    def _eigenvalues(self) -> Tensor:
        """Of the covariance, over the largest."""
        return (self.centred / self.centred[0]).square()

    def rankme(self, of: Kind = "singular", centred: bool = False, eps: float = 1e-7) -> float:
        """RankMe (Garrido et al., arXiv 2210.02885): `exp(-Σ p log p)`, `p = s / Σ s + eps`.

        As its paper has it, features keep their mean; one that dominates them pulls it towards 1.
        It is 0 if all features are zero.

        >>> round(Spectrum.of(torch.eye(4)).rankme(), 3)
        4.0
        """
        return _exp_entropy(self.centred if centred else self.raw, of, eps)

    def effective_rank(self, of: Kind = "singular") -> float:
        """Effective rank (Roy and Vetterli, EUSIPCO 2007) of the centred features.

        `exp(-Σ p log p)` with `p = s / Σ s`; 0 if the features are constant.

        >>> round(Spectrum.of(torch.eye(4)).effective_rank(), 3)
        3.0
        """
        return _exp_entropy(self.centred, of, 0.0)

    def participation_ratio(self) -> float:
        """`(Σ λ)^2 / Σ λ^2` of the covariance's eigenvalues λ; 0 if the features are constant."""
        values = self._eigenvalues
        return float(values.sum() ** 2 / values.square().sum()) if self.rank else 0.0

    def stable_rank(self) -> float:
        """`Σ λ / λ_1` of the covariance's eigenvalues λ; 0 if the features are constant."""
        return float(self._eigenvalues.sum()) if self.rank else 0.0

    def condition_number(self) -> float:
        """The largest over the smallest centred singular value that is not zero.

        Zeros (`rank` says how many there are not) are left out: with them it would be infinite.

        Raises:
            DataError: All are zero.
        """
        if not self.rank:
            raise DataError("the features are constant.")
        return float(self.centred[0] / self.centred[self.rank - 1])

    def alpha_req(
        self,
        ranks: tuple[int, int] = (6, 100),
        weights: Weights = "1/rank",
    ) -> PowerLaw:
        """Alpha-ReQ (Agrawal et al., NeurIPS 2022): how fast the covariance's eigenvalues fall.

        The least-squares line through `log λ_j` against `log j`; its slope is minus alpha.

        Args:
            ranks: First and last j, from 1; the last is cut to the eigenvalues that are not zero.
            weights: Of each j in the fit.

        Raises:
            DataError: There are fewer than three eigenvalues in the range.
        """
        first, last = ranks[0], min(ranks[1], self.rank)
        if last - first + 1 < LEAST:
            raise DataError(
                f"only {max(0, last - first + 1)} eigenvalues of ranks {ranks[0]} to {ranks[1]} "
                f"are not zero, and a line needs {LEAST}; set alpha_ranks."
            )
        j = torch.arange(first, last + 1, dtype=torch.float64, device=self.centred.device)
        values = self._eigenvalues[first - 1 : last]
        slope, r2 = fit_line(j.log(), values.log(), 1 / j if weights == "1/rank" else None)
        return PowerLaw(slope, r2, first, last)

    def numbers(self, options: SpectrumOptions | None = None) -> dict[str, Any]:
        """All of the above as plain values; see `definitions`.

        What is undefined for these features is None, and the mapping `why` says why.
        """
        o = options or SpectrumOptions()
        why: dict[str, str] = {}
        alpha = undefined(why, "alpha", partial(self.alpha_req, o.alpha_ranks, o.alpha_weights))
        if alpha and alpha.r2 is None:
            why["alpha_r2"] = "the eigenvalues are equal, so there is nothing to explain."
        top = self.centred[0] if self.rank else 1.0
        return {
            "rank": self.rank,
            "rankme": self.rankme(o.rankme_of, o.rankme_centred, o.rankme_eps),
            "effective_rank": self.effective_rank(o.effective_rank_of),
            "participation_ratio": self.participation_ratio(),
            "stable_rank": self.stable_rank(),
            "alpha": -alpha.slope if alpha else None,
            "alpha_r2": alpha.r2 if alpha else None,
            "alpha_ranks": [alpha.first, alpha.last] if alpha else None,
            "condition_number": undefined(why, "condition_number", self.condition_number),
            "singular_values": (self.centred[: o.limit] / top).tolist(),
            "options": asdict(o) | {"alpha_ranks": list(o.alpha_ranks)},
            "why": why,
        }


def moments_of(source: Source, device: torch.device | None = None) -> Moments:
    """Of the features of a tap; of as many as there are samples where these are fewer.

    Raises:
        DataError: The features cannot be used.
    """
    source = narrowed(source, device)
    parts = blocks([source], device)
    (block,) = next(parts)
    moments = Moments(source.shape[1], device=block.device)
    moments.update(block)
    for (block,) in parts:
        moments.update(block)
    return moments


def fit_line(x: Tensor, y: Tensor, weights: Tensor | None = None) -> tuple[float, float | None]:
    """Slope and R^2 of the weighted least-squares line through `(K,)` points.

    R^2 is None where y does not vary.
    """
    weights = torch.ones_like(x) if weights is None else weights
    weights = weights / weights.sum()
    x = x - (weights * x).sum()
    y = y - (weights * y).sum()
    slope = (weights * x * y).sum() / (weights * x.square()).sum()
    total = (weights * y.square()).sum()
    if total <= 1e-24:
        return float(slope), None
    return float(slope), float(1 - (weights * (y - slope * x).square()).sum() / total)


def undefined(why: dict[str, str], key: str, compute: Any) -> Any:
    """What a function returns; None where it is undefined, and why is noted."""
    try:
        return compute()
    except DataError as error:
        why[key] = str(error)
        return None


def _roots(gram: Tensor) -> Tensor:
    values = torch.linalg.eigvalsh(gram).flip(0)
    return torch.where(values > NOISE * values[0].clamp(min=0), values, 0.0).sqrt()


def _exp_entropy(values: Tensor, of: Kind, eps: float) -> float:
    if not values[0]:
        return 0.0
    values = values / values[0]
    values = values.square() if of == "eigen" else values
    total = values.sum()
    return math.exp(float(torch.special.entr(values / total + eps).sum()))
