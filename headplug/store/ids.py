"""What samples are called: integers, or strings where a loader gives such, e.g. file names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from headplug.errors import DataError
from headplug.store.shards import IDS, NAMES

Ids = Tensor | list[str]


class Holder(Protocol):
    """Has the ids of some samples among its tensors."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of each tensor."""

    def tensor(self, name: str) -> Tensor:
        """One of them."""


def as_ids(ids: Any, count: int) -> Ids | None:
    """Integers as int64 `(count,)`, or strings, as they are; None if it is something else."""
    if isinstance(ids, tuple | list) and ids and all(isinstance(i, str) for i in ids):
        return list(ids) if len(ids) == count else None
    try:
        found = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        return None
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    return found.long().cpu().clone() if whole and found.shape == (count,) else None


def with_ids(tensors: Mapping[str, Tensor], ids: Ids) -> dict[str, Tensor]:
    """The tensors of a block with its ids among them."""
    if isinstance(ids, Tensor):
        return {**tensors, IDS: ids}
    text = bytearray(json.dumps(ids).encode())
    return {**tensors, NAMES: torch.frombuffer(text, dtype=torch.uint8)}


def ids_of(block: Holder) -> Ids:
    """The ids of a block's samples, as they are in it."""
    if IDS in block.shapes:
        return block.tensor(IDS)
    names: list[str] = json.loads(block.tensor(NAMES).numpy().tobytes())
    return names


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


def in_order(parts: Sequence[Ids]) -> tuple[Ids, Tensor | None]:
    """The ids in order, each once, and where each is; None where that is the order of the parts."""
    ids = join_ids(parts)
    if isinstance(ids, list):
        first: dict[str, int] = {}
        for place, name in enumerate(ids):
            first.setdefault(name, place)
        known = sorted(first)
        order = [first[name] for name in known]
        return known, None if order == list(range(len(ids))) else torch.tensor(order, device="cpu")
    if bool((ids[1:] > ids[:-1]).all()):
        return ids, None
    ids, places = ids.sort(stable=True)
    new = torch.ones(len(ids), dtype=torch.bool, device="cpu")
    new[1:] = ids[1:] != ids[:-1]
    return ids[new], places[new]
