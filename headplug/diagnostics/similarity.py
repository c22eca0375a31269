"""How alike the features of two taps are: linear centred kernel alignment, streamed.

A first pass takes the means, a second the products of centred features in float64, so that neither
the number of samples nor a large mean matters. Pairs that together would need too much memory are
divided over several passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

from headplug.device import pick_device
from headplug.diagnostics.blocks import (
    Source,
    Taps,
    as_features,
    blocks,
    chosen,
    levelled,
    narrowed,
    same_samples,
)
from headplug.diagnostics.moments import ROOM, add_product, check_room, mirrored
from headplug.errors import DataError

Pair = tuple[int, int]


def cka(
    first: Taps,
    second: Taps | None = None,
    *,
    taps: Sequence[str] | None = None,
    debiased: bool = False,
    device: str | torch.device = "auto",
) -> list[dict[str, Any]]:
    """Linear CKA of all pairs of taps of a store, or of the taps of two runs on the same samples.

    Args:
        first: A `FeatureStore`, or features `(N, D)` by tap.
        second: Another one, e.g. of another run; each tap of the first is compared with each of it.
        taps: Which; left out, all that a store has.
        debiased: Take the unbiased estimate of HSIC; see `linear_cka`.
        device: "auto" takes a GPU where there is one.

    Returns:
        A dict a pair: `tap`, `other`, `cka`, `samples`, `debiased`, and `why`, if it is None.

    Raises:
        DataError: The stores hold different samples, or features cannot be used; the message names
            the tap.
        UnknownNameError: There is no such tap.

    >>> h = torch.randn(20, 3)
    >>> cka({"h": h, "z": 2 * h})[0]["cka"] > 0.9999
    True
    """
    sources = chosen(first, taps)
    count = len(sources)
    if second is None:
        pairs = list(combinations(range(count), 2))
    else:
        same_samples(first, second)
        sources += chosen(second, taps)
        pairs = list(product(range(count), range(count, len(sources))))
    rows: list[dict[str, Any]] = []
    for (i, j), value in zip(pairs, _ckas(sources, pairs, debiased, device), strict=True):
        failed = isinstance(value, str)
        rows.append(
            {
                "tap": sources[i].tap,
                "other": sources[j].tap,
                "cka": None if failed else value,
                "samples": sources[i].shape[0],
                "debiased": debiased,
                "why": {"cka": value} if failed else {},
            }
        )
    return rows


def linear_cka(x: Tensor, y: Tensor, *, debiased: bool = False) -> float:
    """Linear centred kernel alignment (Kornblith et al., arXiv 1905.00414).

    `HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y))` of the kernels `x x^T` and `y y^T`. It is 1 for
    features that are each other's rotation, scaled and shifted.

    Args:
        x: `(N, D)`.
        y: `(N, E)` of the same samples.
        debiased: Take the unbiased HSIC of Song et al. (2012), for which independent features have
            0 on average and not about D / N; it can be below 0. Otherwise `||X^T Y||_F^2` of the
            centred features.

    Raises:
        DataError: Features are not matrices of the same finite samples, too wide or constant; or
            debiased, fewer than four.

    >>> x = torch.randn(50, 4)
    >>> round(linear_cka(x, 3 * x + 1), 4)
    1.0
    """
    x, y = as_features(x, "x"), as_features(y, "y")
    sources = [Source({"x": x}, "x"), Source({"y": y}, "y")]
    (value,) = _ckas(sources, [(0, 1)], debiased, x.device)
    if isinstance(value, str):
        raise DataError(value)
    return value


@torch.no_grad()
def _ckas(
    sources: list[Source], pairs: list[Pair], debiased: bool, device: str | torch.device
) -> list[float | str]:
    """CKA of each pair, or why there is none."""
    place = pick_device(device)
    count = sources[0].shape[0]
    if debiased and count < 4:
        raise DataError(f"{sources[0]} are of {count} samples; debiased CKA needs four or more.")
    for source in sources:
        side = min(source.shape)
        check_room(side, side, source)
    sources = [narrowed(levelled(source), place) for source in sources]
    means = [torch.zeros(s.shape[1], dtype=torch.float64, device=place) for s in sources]
    for found in blocks(sources, place):
        for mean, rows in zip(means, found, strict=True):
            mean += rows.sum(0, dtype=torch.float64) / count
    own = [(i, i) for i in range(len(sources))]
    hsic: dict[Pair, float] = {}
    flat: set[int] = set()
    for group in _groups(own + pairs, [s.shape[1] for s in sources]):
        values, squares = _hsics(sources, means, group, debiased, place)
        hsic |= values
        rounding = torch.finfo(torch.float32).eps ** 2 * count
        flat |= {i for i, total in squares.items() if total <= rounding * means[i].square().sum()}
    out: list[float | str] = []
    for i, j in pairs:
        constant = [str(sources[k]) for k in (i, j) if k in flat]
        if constant:
            out.append(f"{constant[0]} are the same for all samples.")
        elif min(hsic[i, i], hsic[j, j]) <= 0:
            out.append("too few samples: a debiased HSIC is not above 0.")
        else:
            out.append(hsic[i, j] / hsic[i, i] ** 0.5 / hsic[j, j] ** 0.5)
    return out


def _groups(pairs: list[Pair], widths: list[int]) -> Iterator[list[Pair]]:
    """Pairs that fit into memory together."""
    group: list[Pair] = []
    size = 0
    for i, j in pairs:
        own = 8 * widths[i] * widths[j]
        if group and size + own > ROOM:
            yield group
            group, size = [], 0
        group.append((i, j))
        size += own
    yield group


def _hsics(
    sources: list[Source],
    means: list[Tensor],
    pairs: list[Pair],
    debiased: bool,
    device: torch.device,
) -> tuple[dict[Pair, float], dict[int, Tensor]]:
    """HSIC of each pair, all times the same factor, and the squared length of each tap."""
    used = sorted({i for pair in pairs for i in pair})
    sums = {(i, j): torch.outer(means[i], means[j]).zero_() for i, j in pairs}
    zero = torch.zeros((), dtype=torch.float64, device=device)
    crossed = dict.fromkeys(pairs, zero)
    totals = dict.fromkeys(used, zero)
    for found in blocks([sources[i] for i in used], device):
        rows = {i: block.double() - means[i] for i, block in zip(used, found, strict=True)}
        lengths = {i: x.square().sum(1) for i, x in rows.items()}
        for i, j in pairs:
            add_product(sums[i, j], rows[i], None if i == j else rows[j])
            crossed[i, j] = crossed[i, j] + lengths[i] @ lengths[j]
        totals = {i: total + lengths[i].sum() for i, total in totals.items()}
    n = sources[0].shape[0]
    values = {}
    for (i, j), total in sums.items():
        value = (mirrored(total) if i == j else total).square().sum()
        if debiased:  # Song et al.'s estimate, written for centred features
            value = value - n / (n - 2) * crossed[i, j]
            value = value + totals[i] * totals[j] / ((n - 1) * (n - 2))
        values[i, j] = float(value)
    return values, totals
