"""Everything that one tap's features say about themselves, for every tap of a store.

Features are read in blocks, so that memory depends on their width and not on their number. Rows are
plain values, as JSON and pandas take them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from headplug.device import pick_device
from headplug.diagnostics.blocks import Source, Taps, as_features, blocks, chosen, levelled
from headplug.diagnostics.moments import Moments, check_room
from headplug.diagnostics.options import SpectrumOptions, definitions
from headplug.diagnostics.spectrum import Spectrum, moments_of
from headplug.progress import progress

DEFINITIONS = definitions() | {
    "dead_units": "Share of features that are zero on all samples, as behind a dead ReLU.",
    "constant_units": (
        "Share of features that vary by no more than float32 can resolve; the dead among them."
    ),
    "norm": "Mean Euclidean length of the features as they are.",
    "mean_share": "Squared length of the mean feature over the mean squared length.",
}


def diagnose(
    store: Taps,
    taps: Sequence[str] | None = None,
    *,
    options: SpectrumOptions | None = None,
    device: str | torch.device = "auto",
    show_progress: bool = False,
) -> list[dict[str, Any]]:
    """What the features of every tap say about themselves, without labels.

    Args:
        store: A `FeatureStore`, or features `(N, D)` by tap, tensors or arrays.
        taps: Which; left out, all.
        options: Where definitions differ; see `SpectrumOptions`.
        device: "auto" takes a GPU where there is one. Sums are in float64, which some GPUs do
            slowly.
        show_progress: Whether to show a progress bar.

    Returns:
        A dict of plain values a tap: `tap` and what `describe` gives.

    Raises:
        DataError: Features are not `(N, D)` of two or more finite samples, or too wide; the message
            names the tap.
        UnknownNameError: There is no such tap.

    >>> [row] = diagnose({"h": torch.eye(4)})
    >>> row["tap"], row["dim"], round(row["effective_rank"], 2)
    ('h', 4, 3.0)
    """
    place = pick_device(device)
    sources = chosen(store, taps)
    rows = []
    with progress("diagnostics", len(sources), show=show_progress) as advance:
        for source in sources:
            rows.append({"tap": source.tap, **_row(source, options, place)})
            advance(source.tap)
    return rows


def describe(
    features: Any, tap: str = "features", options: SpectrumOptions | None = None
) -> dict[str, Any]:
    """What features say about themselves, without labels; see `DEFINITIONS`.

    Args:
        features: `(N, D)`, N of two or more, a tensor or an array; sums are made where they are.
        tap: What to call them in errors.
        options: Where definitions differ.

    Returns:
        Plain values: `samples`, `dim`, `rank`, `rankme`, `effective_rank`, `participation_ratio`,
        `stable_rank`, `alpha`, `alpha_r2`, `alpha_ranks`, `condition_number`, `dead_units`,
        `constant_units`, `norm`, `mean_share`, the list `singular_values`, the `options` used, and
        `why`: for each number that is None, or limited by too few samples, the reason.

    Raises:
        DataError: The features cannot be used; the message names the tap.

    >>> row = describe(torch.zeros(5, 4))
    >>> row["effective_rank"], row["condition_number"], row["why"]["condition_number"]
    (0.0, None, 'the features are constant.')
    """
    found = as_features(features, f"the features at {tap!r}")
    return _row(Source({tap: found}, tap), options, found.device)


@torch.no_grad()
def _row(source: Source, options: SpectrumOptions | None, device: torch.device) -> dict[str, Any]:
    count, dim = source.shape
    source = levelled(source)
    side = min(count, dim)
    check_room(side, side, source)
    moments = Moments(dim, device=device) if dim <= count else None
    low = torch.full((dim,), torch.inf, dtype=torch.float64, device=device)
    high = -low
    norms = squares = torch.zeros((), dtype=torch.float64, device=device)
    mean = torch.zeros_like(low)
    for (block,) in blocks([source], device):
        rows = block.double()
        if moments:
            moments.update(rows)
        low, high = torch.minimum(low, block.amin(0)), torch.maximum(high, block.amax(0))
        lengths = torch.linalg.vector_norm(rows, dim=1)
        norms, squares = norms + lengths.sum(), squares + lengths.square().sum()
        mean += rows.sum(0) / count
    found = Spectrum(moments or moments_of(source, device)).numbers(options)
    if not found["rank"]:
        found["why"]["rank"] = "the features are the same for all samples."
    elif dim >= count:
        found["why"]["rank"] = (
            f"{count} samples can show {count - 1} directions of {dim} at most; take more samples."
        )
    scale = torch.finfo(torch.float32).eps * torch.maximum(low.abs(), high.abs())
    share = None if squares == 0 else float(count * mean.square().sum() / squares)
    if share is None:
        found["why"]["mean_share"] = "all features are zero."
    return {
        "samples": count,
        "dim": dim,
        **found,
        "dead_units": float(((low == 0) & (high == 0)).double().mean()),
        "constant_units": float((high - low <= scale).double().mean()),
        "norm": float(norms / count) / source.scale,
        "mean_share": share,
    }
