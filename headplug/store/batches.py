"""What a batch of a loader holds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from headplug.errors import DataError
from headplug.store.ids import Ids, as_ids


class Batch(NamedTuple):
    """A batch, the number of the shard that it belongs to, and whether it completes that."""

    shard: int
    last: bool
    images: Tensor
    labels: Tensor | None
    ids: Ids


def parse(batch: Any) -> tuple[Tensor, Tensor | None, Ids | None]:
    """Images, labels and ids of a batch.

    Args:
        batch: `images`, or a tuple or list of them, labels and ids, of which the last may be left
            out.

    Returns:
        Images `(B, ...)`; labels `(B,)` or `(B, K)`, int64 or floats, or None; ids, int64 `(B,)` or
        strings, or None if the third entry is neither.

    Raises:
        DataError: The batch is something else.
    """
    parts = list(batch) if isinstance(batch, tuple | list) else [batch]
    images = parts[0] if parts else None
    if isinstance(batch, tuple | list) and not isinstance(images, Tensor):
        raise DataError(
            f"the loader must yield a tensor of images first, not a {type(images).__name__}; use a "
            "transform that gives one view of an image."
        )
    if not isinstance(images, Tensor):
        raise DataError(
            f"the loader must yield (images, labels), not a {type(batch).__name__}; wrap it."
        )
    labels = as_labels(parts[1]) if len(parts) > 1 and parts[1] is not None else None
    if images.ndim == 0 or (labels is not None and len(images) != len(labels)):
        count = "one image without a batch" if images.ndim == 0 else f"{len(images)} images"
        with_labels = "" if labels is None else f" with {len(labels)} labels"
        raise DataError(f"the loader yields {count}{with_labels}.")
    ids = as_ids(parts[2], len(images)) if len(parts) > 2 else None
    return images, labels, ids


def as_labels(labels: Any) -> Tensor:
    """Labels `(N,)` or `(N, K)` as a tensor of int64 or floats on the CPU, a copy.

    Raises:
        DataError: They are not numbers, or of another shape.
    """
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"the labels cannot be made a tensor: {error}.") from None
    if found.ndim not in (1, 2) or found.is_complex():
        kind = str(found.dtype).removeprefix("torch.")
        raise DataError(
            f"labels must be (N,) or (N, K), integers or floats, not {kind} {tuple(found.shape)}."
        )
    found = found.detach().cpu()
    return found.clone() if found.is_floating_point() else found.long().clone()
