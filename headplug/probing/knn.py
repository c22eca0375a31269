"""k-nearest-neighbour classification for a whole grid of settings at the price of one.

Finding the neighbours is nearly all of the work, so each distance is searched once, for the
largest k, and every k, temperature and vote rule reads the same list. Memory stays bounded whatever
the size of bank and queries, in blocks thick enough to keep the matrix product fast.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headplug.errors import DimensionError, OptionError, unknown
from headplug.heads.base import positive
from headplug.probing.data import check_features, check_labels

DISTANCES = ("cosine", "euclidean")
ROWS = 256  # queries a block at least; thinner blocks cost up to 1.5 times as much
CELLS = 2**24  # similarities held at a time: 64 MiB
BANK = CELLS // ROWS  # bank rows a block at most


class KNNSetting(NamedTuple):
    """One way to vote.

    Attributes:
        k: Number of neighbours.
        distance: "cosine" or "euclidean".
        temperature: With a number `T`, a neighbour at cosine similarity `s` weighs `exp(s / T)`
            (arXiv 1805.01978, as lightly's `knn_predict` and solo-learn's `main_knn`). With None
            every neighbour weighs the same, as in scikit-learn's `KNeighborsClassifier`.
    """

    k: int
    distance: str = "cosine"
    temperature: float | None = None


def knn_grid(
    ks: Sequence[int] = (1, 5, 10, 20, 50, 200),
    temperatures: Sequence[float] = (0.05, 0.07, 0.1, 0.5),
) -> list[KNNSetting]:
    """Every k with every temperature on cosine similarity, and with equal votes on the distance.

    >>> len(knn_grid())
    30
    """
    weighted = [KNNSetting(k, "cosine", t) for k in ks for t in temperatures]
    return weighted + [KNNSetting(k, "euclidean") for k in ks]


@torch.no_grad()
def knn_predict(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    settings: Sequence[KNNSetting],
    *,
    num_classes: int | None = None,
) -> Tensor:
    """Classes of the queries by a vote of their nearest neighbours, for every setting.

    Features are used as they are: normalised for the cosine, not standardised. When classes have
    equal votes the lowest class index wins, as in scikit-learn. Which of several equally distant
    samples counts as the k-th neighbour is left to `torch.topk`.

    Args:
        bank: Features with known classes `(N, D)`.
        labels: Their classes `(N,)`.
        queries: Features to classify `(M, D)`, on the bank's device.
        settings: The grid.
        num_classes: Left out, the highest label plus one.

    Returns:
        Predicted classes `(S, M)`, one row a setting. A k above the bank's size is clamped, with a
        warning.

    Raises:
        DimensionError: Bank and queries differ in width.
        DataError: Features or labels cannot be used.
        OptionError: A setting has an impossible value.

    >>> bank, labels = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([0, 0, 1])
    >>> settings = [KNNSetting(1), KNNSetting(3, temperature=0.1)]
    >>> knn_predict(bank, labels, torch.tensor([[0.1, 1.0]]), settings)
    tensor([[1],
            [1]])
    """
    bank, queries = check_features(bank), check_features(queries)
    labels, classes = check_labels(labels, len(bank), num_classes)
    if bank.shape[1] != queries.shape[1]:
        raise DimensionError(
            f"the bank has {bank.shape[1]} features a sample and the queries "
            f"{queries.shape[1]}; take both from the same tap."
        )
    settings = [_checked(s, len(bank)) for s in settings]
    out = torch.empty(len(settings), len(queries), dtype=torch.long, device=queries.device)
    for distance in DISTANCES:
        mine = [(i, s) for i, s in enumerate(settings) if s.distance == distance]
        if not mine:
            continue
        largest = max(s.k for _, s in mine)
        for rows, near, index in _neighbours(bank, queries, largest, distance):
            votes = _Votes(near, labels[index], classes)
            order = sorted(mine, key=lambda pair: (pair[1].temperature or 0.0, pair[1].k))
            for temperature, group in groupby(order, key=lambda pair: pair[1].temperature):
                votes.start(temperature)
                for i, s in group:
                    out[i, rows] = votes.winner(s.k)
    return out


class _Votes:
    """Votes of ever more neighbours, so that a k goes on from where the smaller one stopped."""

    def __init__(self, near: Tensor, labels: Tensor, classes: int) -> None:
        self.near, self.labels = near, labels
        self.counts = near.new_empty(len(near), classes)

    def start(self, temperature: float | None) -> None:
        self.counts.zero_()
        self.used = 0
        if temperature is None:
            self.weights = torch.ones_like(self.near)
        else:  # relative to the nearest, which changes no winner and cannot overflow
            self.weights = ((self.near - self.near[:, :1]) / temperature).exp_()

    def winner(self, k: int) -> Tensor:
        new = slice(self.used, k)
        self.counts.scatter_add_(1, self.labels[:, new], self.weights[:, new])
        self.used = k
        return self.counts.argmax(dim=1)


def _neighbours(
    bank: Tensor, queries: Tensor, k: int, distance: str
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For blocks of queries: their rows, and nearness and index of the `k` nearest, in order."""
    bank, queries, offset = _comparable(bank, queries, distance)
    block = max(ROWS, CELLS // min(len(bank), BANK))
    for start in range(0, len(queries), block):
        part = queries[start : start + block]
        values = part.new_empty(len(part), 0)
        index = values.long()
        for first in range(0, len(bank), BANK):
            piece = slice(first, first + BANK)
            near = torch.addmm(offset[piece], part, bank[piece].T)
            new, where = near.topk(min(k, near.shape[1]), dim=1)
            values, index = torch.cat([values, new], 1), torch.cat([index, where + first], 1)
            if first:  # merge with what earlier pieces gave
                values, best = values.topk(min(k, values.shape[1]), dim=1)
                index = index.gather(1, best)
        yield slice(start, start + len(part)), values, index


def _comparable(bank: Tensor, queries: Tensor, distance: str) -> tuple[Tensor, Tensor, Tensor]:
    """Both in float32, and an offset `(N,)`: product plus offset is larger for nearer samples."""
    # by a power of two, which is exact, so that no square leaves the range of float32
    scale = -torch.frexp(bank.abs().amax().float()).exponent
    bank, queries = (torch.ldexp(x.float(), scale) for x in (bank, queries))
    if distance == "cosine":
        bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
        return bank, queries, bank.new_zeros(len(bank))
    middle = bank.mean(0)  # distances do not change, but lose fewer digits
    bank, queries = bank - middle, queries - middle
    return bank, queries, bank.square().sum(1).mul_(-0.5)


def _checked(setting: KNNSetting, size: int) -> KNNSetting:
    positive("k", setting.k)
    if setting.distance not in DISTANCES:
        raise OptionError(str(unknown("distance", setting.distance, DISTANCES)))
    t = setting.temperature
    if t is not None and not (math.isfinite(t) and t > 0):
        raise OptionError(f"temperature must be a positive number or None, not {t!r}.")
    if t is not None and setting.distance != "cosine":
        raise OptionError(
            f"a temperature weighs cosine similarities, not {setting.distance} distances; leave it "
            'out or take distance="cosine".'
        )
    if setting.k > size:
        warnings.warn(
            f"k={setting.k} is more than the bank's {size} samples; all {size} vote.", stacklevel=3
        )
        return setting._replace(k=size)
    return setting
