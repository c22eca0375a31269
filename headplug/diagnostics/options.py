"""What each number means, and the switches where the literature has several definitions.

Definitions differ by an order of magnitude on the same features, so each is stated here once, and
every result says which options were used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headplug.errors import OptionError

Kind = Literal["singular", "eigen"]
Weights = Literal["1/rank", "equal"]
LEAST = 3  # points that a line is fitted to


@dataclass(frozen=True)
class SpectrumOptions:
    """Where definitions in the literature differ.

    Attributes:
        rankme_of: "singular" values of the features, as its paper, or "eigen"values of their
            second moment, as some code has it.
        rankme_centred: Whether features have their mean subtracted first; its paper does not.
        rankme_eps: Added to each share p.
        effective_rank_of: The same choice for the effective rank, of the centred features.
        alpha_ranks: First and last eigenvalue of alpha-ReQ's fit, from 1; the last is cut to those
            that are not zero. 6 to 100 is the range of the authors' library reptrix (5 to 99,
            counted from 0) at its first call.
        alpha_weights: Of the eigenvalue of rank j in that fit: "1/rank", as that library, or
            "equal".
        limit: How many singular values to list at most.

    Raises:
        OptionError: One of them has an impossible value.
    """

    rankme_of: Kind = "singular"
    rankme_centred: bool = False
    rankme_eps: float = 1e-7
    effective_rank_of: Kind = "singular"
    alpha_ranks: tuple[int, int] = (6, 100)
    alpha_weights: Weights = "1/rank"
    limit: int = 512

    def __post_init__(self) -> None:
        for kind in (self.rankme_of, self.effective_rank_of):
            if kind not in ("singular", "eigen"):
                raise OptionError(f"a rank is of 'singular' or 'eigen' values, not {kind!r}.")
        if not 0 <= self.rankme_eps < 1:
            raise OptionError(f"rankme_eps must be from 0 to below 1, not {self.rankme_eps!r}.")
        first, last = self.alpha_ranks
        if not 1 <= first <= last - LEAST + 1:
            raise OptionError(
                f"alpha_ranks are first and last from 1, {LEAST} or more, not {self.alpha_ranks}."
            )
        if self.alpha_weights not in ("1/rank", "equal"):
            raise OptionError(f"alpha_weights is '1/rank' or 'equal', not {self.alpha_weights!r}.")
        if self.limit < 1:
            raise OptionError(f"limit must be 1 or more, not {self.limit!r}.")


def definitions(options: SpectrumOptions | None = None) -> dict[str, str]:
    """What each number means, one sentence a key, with the options that were used."""
    o = options or SpectrumOptions()
    values = {
        "singular": "singular values of the features",
        "eigen": "eigenvalues of the second moment of the features",
    }
    mean = "minus their mean" if o.rankme_centred else "as they are, not centred"
    first, last = o.alpha_ranks
    return {
        "rank": "Singular values of the features minus their mean above 1.2e-7 of the largest.",
        "rankme": (
            f"RankMe (arXiv 2210.02885): exp of the entropy of p = s / sum(s) + {o.rankme_eps:g}, "
            f"s the {values[o.rankme_of]} {mean}."
        ),
        "effective_rank": (
            "Effective rank (Roy and Vetterli 2007): exp of the entropy of p = s / sum(s), s the "
            f"{values[o.effective_rank_of]} minus their mean."
        ),
        "participation_ratio": "sum(l)^2 / sum(l^2), l the eigenvalues of the covariance.",
        "stable_rank": "sum(l) / max(l), l the eigenvalues of the covariance.",
        "alpha": (
            "alpha-ReQ: l_j ~ j^-alpha, l_j the eigenvalues of the covariance in falling order; "
            f"least squares in log-log over ranks {first} to {last} that are not zero, weights "
            f"{o.alpha_weights}; alpha_r2 is that of this fit, alpha_ranks what it used."
        ),
        "condition_number": (
            "Largest over smallest non-zero singular value of the features minus their mean."
        ),
        "singular_values": (
            "Singular values of the features minus their mean, divided by the largest."
        ),
    }
