"""k-nearest-neighbour prediction for a whole grid of settings at the price of one.

Finding the neighbours is nearly all of the work, so each distance is searched once, for the
largest k, and every k, temperature and vote rule reads the same list.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headplug.errors import DataError, OptionError, unknown
from headplug.heads.base import positive
from headplug.probing.data import Targets, as_targets, check_features
from headplug.probing.neighbours import CELLS, DISTANCES, ROWS, Bank, Part
from headplug.ranks import Team

CPU = torch.device("cpu")
VOTES = ("equal", "exp", "inverse")


class KNNSetting(NamedTuple):
    """One way to vote.

    ========= ======================= ======================================================
    votes     weight of a neighbour   the same as
    ========= ======================= ======================================================
    "equal"   1                       scikit-learn's `weights="uniform"`
    "exp"     `exp(s / temperature)`  arXiv 1805.01978; lightly's `knn_predict`; solo-learn's
                                      `WeightedKNNClassifier` and DINO on the cosine
    "inverse" `1 / (d + temperature)` scikit-learn's `weights="distance"` (at 0); solo-learn on the
                                      Euclidean distance (1e-5); stable-pretraining (0.07)
    ========= ======================= ======================================================

    `s` is the cosine similarity and `d` the distance: the Euclidean one, or `1 - s`. Where a
    neighbour is at distance 0 and the temperature is 0, only such neighbours vote.

    Attributes:
        k: Number of neighbours.
        distance: "cosine" or "euclidean".
        votes: "equal", "exp" (on the cosine alone) or "inverse".
        temperature: A positive number for "exp"; 0 or more for "inverse", where None is 0.
    """

    k: int
    distance: str = "cosine"
    votes: str = "equal"
    temperature: float | None = None


def knn_grid(
    ks: Sequence[int] = (1, 5, 10, 20, 50, 200),
    temperatures: Sequence[float] = (0.05, 0.07, 0.1, 0.5),
    distances: Sequence[str] = DISTANCES,
    votes: Sequence[str] = VOTES,
) -> list[KNNSetting]:
    """Every k with every distance and vote rule, and "exp" with every temperature.

    Raises:
        OptionError: No distance or vote rule has that name.

    >>> len(knn_grid())
    48
    >>> knn_grid([20], [0.07], votes=["exp"])
    [KNNSetting(k=20, distance='cosine', votes='exp', temperature=0.07)]
    """
    for distance in distances:
        _named("distance", distance, DISTANCES)
    for rule in votes:
        _named("vote rule", rule, VOTES)
    rules = [("cosine", "exp", t) for t in temperatures] + [
        (distance, rule, None) for distance in DISTANCES for rule in ("equal", "inverse")
    ]
    return [
        KNNSetting(k, distance, rule, t)
        for distance, rule, t in rules
        if distance in distances and rule in votes
        for k in ks
    ]


@torch.no_grad()
def knn_predict(
    bank: Tensor,
    labels: Tensor | Targets,
    queries: Tensor,
    settings: Iterable[KNNSetting],
    *,
    num_classes: int | None = None,
    group: Any = None,
) -> Tensor:
    """What the nearest neighbours of the queries say, for every setting.

    Features are used as they are: normalised for the cosine, not standardised. Of classes with
    equal votes the lowest index wins, as in scikit-learn; of samples whose distances come out the
    same to the last bit the lower index is the nearer one.

    With `group` every process calls this with its own part of the bank and its own queries; either
    may be empty on some, of shape `(0, D)`. Each process gets what one process with the whole bank
    would give for its queries, up to the rounding of float32. No process holds more than a piece of
    the others' features. Bad input on one ends with an error on all.

    Args:
        bank: Features with known labels `(N, D)`.
        labels: Their classes, labels or numbers; see `as_targets`.
        queries: Features to predict for `(M, D)`; M may be 0. The bank may be on another device.
        settings: The grid.
        num_classes: Left out, the highest label plus one.
        group: Processes of torch.distributed that share the work, such as
            `torch.distributed.group.WORLD`.

    Returns:
        On the queries' device, one row a setting: winning classes `(S, M)`; for several labels the
        share of the votes that each got `(S, M, K)`; for numbers the weighted mean `(S, M, K)`. A k
        above the bank's size is clamped, with a warning.

    Raises:
        DimensionError: Bank and queries differ in width.
        DataError: Features or labels cannot be used.
        OptionError: A setting has an impossible value, or there is none.
        RunError: Another process of the group failed.

    >>> bank, labels = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([0, 0, 1])
    >>> settings = [KNNSetting(1), KNNSetting(3, votes="exp", temperature=0.1)]
    >>> knn_predict(bank, labels, torch.tensor([[0.1, 1.0]]), settings)
    tensor([[1],
            [1]])
    """

    def own() -> _Own:
        grid = list(settings)
        for name, given in (("bank", bank), ("queries", queries), ("labels", labels)):
            if not isinstance(given, Tensor | Targets):
                raise DataError(
                    f"the {name} must be a tensor, not {type(given).__name__}; see torch.as_tensor."
                )
        for features in (bank, queries):
            if features.is_complex():
                raise DataError(f"features must be real numbers, not {features.dtype}.")
            if features.shape[:1] != (0,):
                check_features(features)
        if not grid:
            raise OptionError("there is no setting to predict with; see knn_grid().")
        for setting in grid:
            _check(setting)
        targets = as_targets(labels, len(bank), num_classes).to(CPU) if len(bank) else None
        return _Own(Part.of(bank, queries), targets, grid)

    found = Team(group).each(own)
    if any(o.settings != found[0].settings for o in found):
        raise OptionError("the processes ask for different settings; give all of them the same.")
    whole = Bank(bank, [o.part for o in found], group)
    targets = _joined([o.targets for o in found if o.targets]).to(queries.device)
    grid = _clamped(found[0].settings, whole.size)
    values = None if targets.kind == "classes" else targets.dense()
    out = queries.new_empty(
        len(grid),
        len(queries),
        *([] if values is None else [targets.outputs]),
        dtype=torch.long if values is None else torch.float32,
    )
    for distance in DISTANCES:
        mine = [(i, s) for i, s in enumerate(grid) if s.distance == distance]
        if not mine:
            continue
        mine.sort(key=lambda pair: (*_rule(pair), pair[1].k))
        largest = max(s.k for _, s in mine)
        run = max(ROWS, CELLS // max(largest, targets.outputs))
        for rows, far, index in whole.nearest(queries, largest, distance, run):
            said = targets.values[index] if values is None else index
            far = far.double() if values is None else far  # the last digits may decide
            for (votes, temperature), same in groupby(mine, _rule):
                order, ks = zip(*((i, s.k) for i, s in same), strict=True)
                weights = _weights(far, votes, temperature)
                results = _outcomes(said, values, targets.outputs, weights, ks)
                for i, result in zip(order, results, strict=True):
                    out[i, rows] = result
    return out


class _Own(NamedTuple):
    """What one process tells the others."""

    part: Part
    targets: Targets | None
    settings: list[KNNSetting]


def _rule(pair: tuple[int, KNNSetting]) -> tuple[str, float]:
    return pair[1].votes, pair[1].temperature or 0.0


def _weights(far: Tensor, votes: str, temperature: float) -> Tensor:
    """Relative to the nearest neighbour, which changes no outcome and cannot overflow."""
    if votes == "exp":
        return ((far[:, :1] - far) / temperature).exp_()
    if votes == "inverse":
        far = far + temperature
        return (far[:, :1] / far).nan_to_num_(nan=1.0)  # 0 / 0: a duplicate
    return torch.ones_like(far)


def _outcomes(
    said: Tensor, values: Tensor | None, outputs: int, weights: Tensor, ks: Sequence[int]
) -> Iterator[Tensor]:
    """For each k, in ascending order, winning classes `(M,)` or means `(M, K)`.

    A k goes on from where the smaller one stopped.

    Args:
        said: Classes of the neighbours `(M, largest k)`, or their rows in `values`.
        values: What is averaged `(N, K)`, or None for classes.
        outputs: Number of classes, or K.
        weights: Of the neighbours `(M, largest k)`.
        ks: Numbers of neighbours.
    """
    votes = weights.new_zeros(len(said), outputs)
    winner = said[:, :1]
    for start, k in pairwise([0, *ks]):
        new, weight = said[:, start:k], weights[:, start:k]
        if values is None:
            votes.scatter_add_(1, new, weight)
            winner = _winner(votes, torch.cat([winner, new], 1))
            yield winner.squeeze(1)
            continue
        if k > start:
            votes += F.embedding_bag(new, values, mode="sum", per_sample_weights=weight)
        yield votes / weights[:, :k].sum(1, keepdim=True)


def _winner(votes: Tensor, able: Tensor) -> Tensor:
    """The class with the most votes `(M, 1)`, which is among those that are `able` `(M, A)`."""
    outputs = votes.shape[1]
    if outputs <= able.shape[1]:
        return votes.argmax(dim=1, keepdim=True)
    own = votes.gather(1, able)
    best = able.where(own == own.amax(1, keepdim=True), outputs)
    return best.amin(1, keepdim=True)


def _joined(found: list[Targets]) -> Targets:
    """The targets of all processes, one after the other."""
    kinds = sorted({t.kind if t.kind == "classes" else f"{t.outputs} {t.kind}" for t in found})
    if len(kinds) > 1:
        raise DataError(
            f"the processes give labels of different kinds: {' and '.join(kinds)}; give all of "
            "them the same."
        )
    values = torch.cat([t.values for t in found])
    return replace(found[0], values=values, outputs=max(t.outputs for t in found))


def _check(setting: KNNSetting) -> None:
    positive("k", setting.k)
    _named("distance", setting.distance, DISTANCES)
    _named("vote rule", setting.votes, VOTES)
    t = setting.temperature
    if setting.votes == "equal" and t is not None:
        raise OptionError(
            f'equal votes have no temperature, not even {t!r}; add votes="exp" or votes="inverse", '
            "or leave it out."
        )
    if setting.votes == "exp" and setting.distance != "cosine":
        raise OptionError(
            f'votes="exp" weighs cosine similarities, not {setting.distance} distances; take '
            'votes="inverse" or distance="cosine".'
        )
    if setting.votes == "exp" and not (t is not None and math.isfinite(t) and t > 0):
        raise OptionError(f'votes="exp" needs a positive temperature such as 0.07, not {t!r}.')
    if t is not None and not (math.isfinite(t) and t >= 0):
        raise OptionError(
            f"the temperature of inverse votes is added to distances and must be 0 or more, not "
            f"{t!r}."
        )


def _named(kind: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise OptionError(str(unknown(kind, str(name), known)))


def _clamped(settings: Sequence[KNNSetting], size: int) -> list[KNNSetting]:
    over = sorted({s.k for s in settings if s.k > size})
    if over:
        warnings.warn(
            f"k={' and '.join(map(str, over))} is more than the bank's {size} samples; all {size} "
            "vote.",
            stacklevel=4,
        )
    return [s._replace(k=min(s.k, size)) for s in settings]
