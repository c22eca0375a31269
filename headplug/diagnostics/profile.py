"""How a layer weights the features it is given, from one pass over both of its sides.

arXiv 2403.11391 shows for linear networks that training makes a projection head square the weights
that features already have, so that they get less equal with depth. Weights before and after a layer
are measured along the same features, on a log-log scale the relation is a slope: 2 for that theory,
1 for a layer that leaves features alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
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
)
from headplug.diagnostics.moments import Moments, check_room
from headplug.diagnostics.options import LEAST
from headplug.diagnostics.spectrum import fit_line
from headplug.errors import OptionError

FLOOR = 1e-6  # weights below it, over the largest, come out of rounding errors


def weight_profiles(
    store: Taps,
    pairs: Sequence[tuple[str, str]] | None = None,
    *,
    cutoff: float | None = None,
    limit: int = 512,
    device: str | torch.device = "auto",
) -> list[dict[str, Any]]:
    """How the layers between pairs of taps weight features; see `weight_profile`.

    Args:
        store: A `FeatureStore`, or features `(N, D)` by tap.
        pairs: Taps before and after; left out, each tap and the next.
        cutoff: As `weight_profile` takes it.
        limit: The same.
        device: "auto" takes a GPU where there is one.

    Returns:
        A dict a pair: `before`, `after` (the taps) and what `weight_profile` gives.

    Raises:
        DataError, OptionError: As `weight_profile`; the message names the tap. Or a pair is none.
        UnknownNameError: There is no such tap.

    >>> h = torch.randn(50, 3) * torch.tensor([4.0, 2.0, 1.0])
    >>> [row] = weight_profiles({"h": h, "z": h * 3})
    >>> row["before"], row["after"], round(row["slope"], 3)
    ('h', 'z', 1.0)
    """
    place = pick_device(device)
    taps = list(store)
    asked = list(pairwise(taps)) if pairs is None else pairs
    found = []
    for pair in asked:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise OptionError(f"a pair is (tap before, tap after), not {pair!r}.")
        before, after = chosen(store, pair)
        row = _profile(before, after, cutoff, limit, place)
        found.append({"before": before.tap, "after": after.tap, **row})
    return found


def weight_profile(
    before: Tensor, after: Tensor, *, cutoff: float | None = None, limit: int = 512
) -> dict[str, Any]:
    """Weights of features before and after a layer, and the slope of one against the other.

    With centred features `H = U S V^T` before and `Z` after, feature i is the pattern `u_i` over
    the samples. Its weight before is `s_i = ||H^T u_i||`, its weight after `||Z^T u_i||`. The slope
    is that of the least-squares line through their logarithms.

    Args:
        before: `(N, D)`.
        after: `(N, E)` of the same samples.
        cutoff: Features whose weight is below this share of the largest, before or after, are left
            out of the fit; left out, 1e-6, or what their type resolves (0.001 for float16).
        limit: How many weights to list at most.

    Returns:
        Plain values: `slope`, `slope_r2`, `fitted` (features in the fit), `features` (that vary
        before), `cutoff`, the lists `weights_before` and `weights_after` by falling weight before,
        each over the largest, and `why`, if the slope is None.

    Raises:
        DataError: Features are not matrices of the same two or more finite samples, or too wide.
        OptionError: `cutoff` is not between 0 and 1.

    >>> h = torch.randn(50, 3) * torch.tensor([4.0, 2.0, 1.0])
    >>> round(weight_profile(h, h * 3)["slope"], 3)
    1.0
    """
    before, after = as_features(before), as_features(after)
    store = {"before": before, "after": after}
    pair = Source(store, "before"), Source(store, "after")
    return _profile(*pair, cutoff, limit, before.device)


@torch.no_grad()
def _profile(
    before: Source, after: Source, cutoff: float | None, limit: int, device: torch.device
) -> dict[str, Any]:
    if not (cutoff is None or 0 < cutoff < 1):
        raise OptionError(f"cutoff must lie between 0 and 1, not at {cutoff!r}.")
    own, cross, least = _moments(before, after, device)
    cutoff = max(FLOOR, least) if cutoff is None else cutoff
    values, vectors = torch.linalg.eigh(own.second)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    rounding = torch.finfo(torch.float32).eps * own.count**0.5
    constant = values.sum().sqrt() <= rounding * own.mean.norm()
    known = values > FLOOR**2 * values[0]
    if constant:
        known[:] = False
    weights = values[known].sqrt()
    images = (cross.second.T @ vectors[:, known]).norm(dim=0) / weights
    row: dict[str, Any] = {
        "slope": None,
        "slope_r2": None,
        "fitted": 0,
        "features": len(weights),
        "cutoff": cutoff,
        "weights_before": _shares(weights[:limit]),
        "weights_after": _shares(images)[:limit],
        "why": {},
    }
    if not len(weights):
        row["why"]["slope"] = f"{before} are the same for all samples."
        return row
    if images.max() <= rounding * cross.other_mean.norm():
        row["why"]["slope"] = f"{after} are the same for all samples."
        return row
    used = (weights >= cutoff * weights[0]) & (images >= cutoff * images.max())
    row["fitted"] = int(used.sum())
    x, y = weights[used].log(), images[used].log()
    if len(x) < LEAST or x[0] - x[-1] < FLOOR:
        row["why"]["slope"] = (
            f"{len(x)} features have different weights above the cutoff of {cutoff:g} before and "
            f"after, and a line needs {LEAST}."
        )
        return row
    row["slope"], row["slope_r2"] = fit_line(x, y)
    return row


def _moments(before: Source, after: Source, device: torch.device) -> tuple[Moments, Moments, float]:
    """Of the features before, of both, and what the coarser of their types resolves."""
    (count, dim), (_, other) = before.shape, after.shape
    check_room(min(count, dim), min(count, max(dim, other)), before)
    dtypes = [next(source.parts()).dtype for source in (before, after)]
    least = max([0.0, *(torch.finfo(d).eps for d in dtypes if d.is_floating_point)])
    sources = [narrowed(levelled(source), device) for source in (before, after)]
    dim, other = (source.shape[1] for source in sources)
    own, cross = Moments(dim, device=device), Moments(dim, other, device)
    for x, y in blocks(sources, device):
        own.update(x)
        cross.update(x, y)
    return own, cross, least


def _shares(weights: Tensor) -> list[float]:
    top = weights.max() if len(weights) else 0.0
    return (weights / top if top else weights).tolist()
