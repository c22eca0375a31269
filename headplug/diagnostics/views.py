"""What several views of the same samples say: how close they are, how spread, how separable.

Views are features `(N, q, D)`: q augmented versions of each of N samples, at one tap. Sums run in
float64 over blocks of samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headplug.device import pick_device
from headplug.diagnostics.blocks import (
    CHUNK,
    Source,
    Taps,
    as_features,
    blocks,
    chosen,
    same_samples,
)
from headplug.diagnostics.scatter import check_several, check_views, lidar
from headplug.diagnostics.spectrum import undefined
from headplug.errors import DataError

PAIRS = 2**22  # distances at a time

VIEW_DEFINITIONS = {
    "alignment": (
        "Wang and Isola (arXiv 2005.10242): mean squared distance between two views of a sample, "
        "features on the unit sphere; over all pairs of views."
    ),
    "uniformity": (
        "Wang and Isola (arXiv 2005.10242): log of the mean of exp(-2 d^2), d the distance between "
        "two samples in the same view, features on the unit sphere; the mean over views."
    ),
    "lidar": (
        "LiDAR (arXiv 2312.04000): exp of the entropy of p = l / sum(l) + 1e-7, l the eigenvalues "
        "of Sw^-1/2 Sb Sw^-1/2; Sb the covariance of the samples' mean views (over n - 1), Sw that "
        "of views around them (over n (q - 1)) plus 1e-4 on the diagonal; features as they are."
    ),
}


@torch.no_grad()
def alignment(views: Tensor, *, power: float = 2.0, normalise: bool = True) -> float:
    """Mean distance between views of the same sample, to a power (Wang and Isola, 2005.10242).

    Args:
        views: `(N, q, D)`, q of two or more; all pairs of views count.
        power: Of the distance; 2 in the paper.
        normalise: Whether to put features on the unit sphere first, as the paper does.

    Raises:
        DataError: Views are of another shape, not finite, or zero and so on no sphere.

    >>> round(alignment(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])), 6)
    2.0
    """
    views = check_views(views)
    check_several(views.shape[1])
    total = 0.0
    for part in views.split(max(1, CHUNK // views[0].numel())):
        rows = _sphere(part) if normalise else part.double()
        for i, j in combinations(range(rows.shape[1]), 2):
            total += float((rows[:, i] - rows[:, j]).norm(dim=1).pow(power).sum())
    return total / (len(views) * views.shape[1] * (views.shape[1] - 1) / 2)


@torch.no_grad()
def uniformity(views: Tensor, *, t: float = 2.0, normalise: bool = True) -> float:
    """Log of the mean Gaussian potential of pairs of samples (Wang and Isola, 2005.10242).

    Args:
        views: `(N, D)`, or `(N, q, D)`: then the mean over the q views. The time is quadratic in N;
            10,000 samples estimate it well.
        t: Sharpness of the potential; 2 in the paper.
        normalise: Whether to put features on the unit sphere first, as the paper does.

    Raises:
        DataError: Features are of another shape, not finite, zero and so on no sphere, or of one
            sample.

    >>> round(uniformity(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])), 4)  # exp(-2 * 2^2)
    -8.0
    """
    views = as_features(views, "views")
    views = views[:, None] if views.ndim == 2 else views
    views = check_views(views)
    if len(views) < 2:
        raise DataError("uniformity takes two samples or more, not one.")
    return sum(_potential(view, t, normalise) for view in views.unbind(1)) / views.shape[1]


def describe_views(views: Tensor) -> dict[str, Any]:
    """Alignment, uniformity and LiDAR of views `(N, q, D)`; see `VIEW_DEFINITIONS`.

    Returns:
        `samples`, `views`, `dim`, `alignment`, `uniformity`, `lidar`, and `why`: for each that is
        None or limited by too few samples, the reason.

    Raises:
        DataError: The views are of another shape, fewer than two, or not finite.

    >>> describe_views(torch.ones(4, 2, 3))["why"]["lidar"]
    'the features are the same for all samples.'
    """
    views = check_views(views)
    check_several(views.shape[1])
    why: dict[str, str] = {}
    count, several, dim = views.shape
    row = {
        "samples": count,
        "views": several,
        "dim": dim,
        "alignment": undefined(why, "alignment", partial(alignment, views)),
        "uniformity": undefined(why, "uniformity", partial(uniformity, views)),
        "lidar": undefined(why, "lidar", partial(lidar, views)),
    }
    if row["lidar"] and count <= dim:
        why["lidar"] = f"{count} samples let it be {count - 1} at most; take more than {dim}."
    return row | {"why": why}


def diagnose_views(
    stores: Sequence[Taps],
    taps: Sequence[str] | None = None,
    *,
    device: str | torch.device = "auto",
) -> list[dict[str, Any]]:
    """The same at every tap, from stores of the same samples, each seen in another view.

    Args:
        stores: Two or more, e.g. what `extract_features` gives with different augmentations.
        taps: Which; left out, all of the first store.
        device: "auto" takes a GPU where there is one. Views of one tap at a time are held there.

    Returns:
        A dict of plain values a tap: `tap` and what `describe_views` gives.

    Raises:
        DataError: The stores are of different samples, or features cannot be used; the message
            names the tap.
        UnknownNameError: A store lacks a tap.

    >>> h = torch.randn(50, 4)
    >>> diagnose_views([{"h": h}, {"h": h + 0.1}])[0]["tap"]
    'h'
    """
    place = pick_device(device)
    check_several(len(stores))
    for other in stores[1:]:
        same_samples(stores[0], other)
    rows = []
    for first in chosen(stores[0], taps):
        sources = [first, *(chosen(store, [first.tap])[0] for store in stores[1:])]
        rows.append({"tap": first.tap, **describe_views(_stacked(sources, place))})
    return rows


def _stacked(sources: list[Source], device: torch.device) -> Tensor:
    """Views `(N, q, D)` of one tap."""
    widths = sorted({source.shape[1] for source in sources})
    if len(widths) > 1:
        raise DataError(f"{sources[0]} have {widths} features in different views.")
    found: Iterable[Tensor] = (torch.stack(part, 1) for part in blocks(sources, device))
    return torch.cat(list(found))


def _potential(rows: Tensor, t: float, normalise: bool) -> float:
    rows = _sphere(rows) if normalise else rows.double()
    squares = rows.square().sum(1)
    size = max(1, PAIRS // len(rows))
    total = 0.0
    for start in range(0, len(rows), size):
        stop = min(start + size, len(rows))
        inner = rows[start:stop] @ rows[start:].T  # each pair once
        distances = (squares[start:stop, None] + squares[start:] - 2 * inner).clamp(min=0)
        potential = distances.mul_(-t).exp_()
        total += float(potential.triu(1).sum())
    if total == 0:
        raise DataError("samples are too far apart for float64; give features of a smaller scale.")
    return math.log(total / (len(rows) * (len(rows) - 1) / 2))


def _sphere(x: Tensor) -> Tensor:
    x = x.double()
    zero = int((x.abs().amax(-1) == 0).sum())
    if zero:
        raise DataError(f"{zero} feature vectors are zero, so they have no place on the sphere.")
    return F.normalize(x, dim=-1, eps=0.0)
