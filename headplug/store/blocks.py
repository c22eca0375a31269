"""Parts of a store: some samples with all of their taps, in a file or in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from headplug.errors import DataError
from headplug.store.batches import Ids, join_ids

LABELS, IDS, NAMES = ":labels", ":ids", ":names"
RESERVED = (LABELS, IDS, NAMES, "__metadata__")  # the last is safetensors' own
"""What no tap can be called."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What features can be kept as; NumPy and Arrow have no other."""


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
        return [name for name in self.tensors if name not in RESERVED]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of each tensor."""
        return {name: tuple(t.shape) for name, t in self.tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """Features of a tap, or labels or ids."""
        return self.tensors[name]


def nameable(points: Iterable[Any]) -> None:
    """Checks that taps are called by strings that a store does not need for itself.

    Raises:
        DataError: They are not.
    """
    for point in points:
        if not isinstance(point, str) or point in RESERVED:
            why = "which a store needs for itself" if point in RESERVED else "which is no string"
            raise DataError(f"a tap is called {point!r}, {why}; give it another name.")


def named(dtypes: Iterable[torch.dtype]) -> str:
    """Types, for messages.

    >>> named([torch.float32, torch.float16])
    'float32, float16'
    """
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def with_ids(tensors: Mapping[str, Tensor], ids: Ids) -> dict[str, Tensor]:
    """The tensors of a block with its ids among them."""
    if isinstance(ids, Tensor):
        return {**tensors, IDS: ids}
    text = bytearray(json.dumps(ids).encode())
    return {**tensors, NAMES: torch.frombuffer(text, dtype=torch.uint8)}


def ids_of(block: Block) -> Ids:
    """The ids of a block's samples, as they are in it."""
    if IDS in block.shapes:
        return block.tensor(IDS)
    names: list[str] = json.loads(block.tensor(NAMES).numpy().tobytes())
    return names


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
            is_tap = name not in RESERVED
            what = f"{name!r} has" if is_tap else f"there are {name.lstrip(':')} of"
            if is_tap and len(shape) < 2:
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
