"""Parts of a store: some samples with all of their taps, in a file or in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from headplug.errors import DataError
from headplug.store.ids import ids_of, in_order, with_ids
from headplug.store.shards import IDS, LABELS, NAMES


class Block(Protocol):
    """Some samples of a store: a file, or tensors in memory."""

    @property
    def points(self) -> Sequence[str]:
        """Its taps."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of each tensor, with the number of samples in front."""

    def tensor(self, name: str) -> Tensor:
        """Features of a tap, or `LABELS`, `IDS` or `NAMES`."""


class Loose:
    """A block in memory.

    Args:
        tensors: By tap.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)

    @property
    def points(self) -> Sequence[str]:
        """Its taps."""
        return [name for name in self.tensors if name not in (LABELS, IDS, NAMES)]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of each tensor."""
        return {name: tuple(t.shape) for name, t in self.tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """Features of a tap, or labels or ids."""
        return self.tensors[name]


def joined(blocks: Sequence[Loose]) -> Loose:
    """One block of all, its samples in the order of their ids; takes their tensors from them.

    Raises:
        DataError: They do not fit together.
    """
    check(blocks)
    ids, order = in_order([ids_of(block) for block in blocks])
    names = [name for name in blocks[0].tensors if name not in (IDS, NAMES)]
    tensors = {}
    for name in names:
        whole = torch.cat([block.tensors.pop(name) for block in blocks])
        tensors[name] = whole if order is None else whole[order]
    return Loose(with_ids(tensors, ids))


def check(blocks: Sequence[Block]) -> None:
    """Checks that the blocks hold the same taps, in one shape, of as many samples as labels.

    Raises:
        DataError: They do not.
    """
    points, first = blocks[0].points, blocks[0].shapes
    if not points:
        raise DataError("a feature store needs at least one tap.")
    for block in blocks:
        shapes = block.shapes
        count = next(iter(shapes.get(points[0], ())), 0)
        for name, shape in shapes.items():
            what = f"{name!r} has" if name in points else f"there are {name.lstrip(':')} of"
            if name in points and len(shape) < 2:
                raise DataError(
                    f"the features at {name!r} must be (N, D) or (N, ...), not {shape}."
                )
            if name != NAMES and shape[0] != count:
                raise DataError(
                    f"{points[0]!r} has {count} samples, but {what} {shape[0]}; all must be of the "
                    "same samples."
                )
            if name != NAMES and shape[1:] != first.get(name, ())[1:]:
                raise DataError(
                    f"{what} shape {shape[1:]} in some samples and {first.get(name, ())[1:]} in "
                    "others; only one shape can be kept. Pool them, or resize the images."
                )
        if shapes.keys() != first.keys():
            raise DataError("some samples have labels or ids and others have none.")
