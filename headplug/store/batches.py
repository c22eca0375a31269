"""What a batch of a loader holds: images, labels, and what its samples are called.

Samples are called by integers, or by strings where a loader gives such, or paths, e.g. file names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from headplug.errors import DataError

Ids = Tensor | list[str]


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
        why = f"the labels cannot be made a tensor: {error}."
        words = numpy.ravel(numpy.asarray(labels, dtype=object))[:1]
        if any(isinstance(word, str) for word in words):
            why = (
                f"labels must be numbers, not strings such as {str(words[0])!r}: map each to an "
                "integer, or leave them out."
            )
        raise DataError(why) from None
    if found.ndim not in (1, 2) or found.is_complex():
        kind = str(found.dtype).removeprefix("torch.")
        raise DataError(
            f"labels must be (N,) or (N, K), integers or floats, not {kind} {tuple(found.shape)}."
        )
    found = found.detach().cpu()
    return found.clone() if found.is_floating_point() else found.long().clone()


def as_ids(ids: Any, count: int) -> Ids | None:
    """Integers as int64 `(count,)`, or strings or paths as strings; None if it is other things."""
    if isinstance(ids, numpy.ndarray) and ids.dtype.kind in "UO":
        ids = ids.tolist()
    if isinstance(ids, tuple | list) and ids and all(isinstance(i, str | PurePath) for i in ids):
        return list(map(str, ids)) if len(ids) == count else None
    try:
        found = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        return None
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    return found.long().cpu().clone() if whole and found.shape == (count,) else None


def join_ids(parts: Sequence[Ids]) -> Ids:
    """The ids of several parts, all integers or all strings, as one.

    Raises:
        DataError: They are not.
    """
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(tensors) == len(parts):
        return torch.cat(tensors)
    if tensors:
        raise DataError("ids must be all integers or all strings; some samples have the other.")
    return [name for part in parts for name in part]


def distinct(parts: Sequence[Ids]) -> None:
    """Checks that no id of several parts is there twice.

    Raises:
        DataError: One is.
    """
    ids = join_ids(parts)
    different = len(set(ids) if isinstance(ids, list) else ids.unique())
    if different < len(ids):
        raise DataError(
            f"ids must differ: {len(ids)} samples have {different}. The third entry of a batch is "
            "taken as their ids; leave it out if it is something else."
        )
