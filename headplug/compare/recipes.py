"""How the self-supervised methods differ: their loss, what stands behind the head, the EMA copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headplug.errors import unknown


@dataclass(frozen=True)
class Recipe:
    """One method.

    Attributes:
        loss: Builds lightly's loss; its argument says whether several processes share the batch.
        default_head: The head that the method was published with.
        predictor: Name of the prediction head behind the projection, if there is one.
        hidden: The predictor's hidden width for a width of the projection.
        lr: Default learning rate of SGD for 256 images a step. Only SimCLR's is a paper's (arXiv
            2408.14514); the redundancy losses are large sums and overflow at the same rate.
        ema: Momentum of the target network at the start, if there is one; it rises to 1.
        paper: Where it comes from.
    """

    loss: Callable[[bool], Any]
    default_head: str
    paper: str
    predictor: str | None = None
    hidden: Callable[[int], int] = lambda width: width
    lr: float = 0.3
    ema: float | None = None


def _simclr(distributed: bool) -> Any:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=0.5, gather_distributed=distributed)


def _barlow_twins(distributed: bool) -> Any:
    from lightly.loss import BarlowTwinsLoss

    return BarlowTwinsLoss(gather_distributed=distributed)


def _vicreg(distributed: bool) -> Any:
    from lightly.loss import VICRegLoss

    return VICRegLoss(gather_distributed=distributed)


def _cosine(distributed: bool) -> Any:
    from lightly.loss import NegativeCosineSimilarity

    return NegativeCosineSimilarity()


RECIPES = {
    "simclr": Recipe(_simclr, "simclr", "arXiv 2002.05709"),
    "barlow_twins": Recipe(_barlow_twins, "barlow_twins", "arXiv 2103.03230", lr=0.1),
    "vicreg": Recipe(_vicreg, "vicreg", "arXiv 2105.04906", lr=0.1),
    "simsiam": Recipe(
        _cosine,
        "simsiam",
        "arXiv 2011.10566",
        "simsiam_predictor",
        lambda width: max(width // 4, 1),
    ),
    "byol": Recipe(
        _cosine, "byol", "arXiv 2006.07733", "byol_predictor", lambda width: 4096, ema=0.996
    ),
}


def recipe(name: str) -> Recipe:
    """The method of that name.

    Raises:
        UnknownNameError: There is none.
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]
