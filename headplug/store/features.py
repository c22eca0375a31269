"""Features of several taps of the same samples, wherever they are.

Samples come in the order of their ids, each once, however many processes or files they were spread
over. A store on disk costs memory for a tap only when the tap is asked for, and can be read in
parts that are mapped into memory; in memory it is the same thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headplug.errors import DataError, unknown
from headplug.store.batches import as_ids, as_labels
from headplug.store.blocks import (
    FLOATS,
    LABELS,
    Block,
    Loose,
    check,
    ids_of,
    in_order,
    nameable,
    named,
    with_ids,
)
from headplug.store.folder import read_store
from headplug.store.shards import DamagedError, damage, read_all

if TYPE_CHECKING:
    import numpy
    import pyarrow

    from headplug.store.export import FeatureDataset


class FeatureStore:
    """Features `(N, D)`, or `(N, ...)` of any one shape, of several taps of the same N samples.

    Made by `extract_features`, `open` and `from_tensors`. Iterating gives the taps; the length is
    the number of samples; indexing by a tap gives its features in the order of `ids`.

    Args:
        blocks: The samples, in parts; taps are in the order of the first.

    Attributes:
        points: The taps, in depth order where they were extracted from a model.
        ids: What each sample is called, ascending: int64 `(N,)` (for a DataLoader over a data set
            with a length its indices there, else the ids that batches brought, or running numbers),
            or a sorted list of N strings.
        labels: `(N,)` or `(N, K)`, int64 or floats; None where the loader gave none.

    Raises:
        DataError: There is no tap, a tap is not `(N, ...)`, or numbers of samples differ.

    >>> h = torch.rand(6, 4)
    >>> store = FeatureStore.from_tensors({"pre_projection": h}, labels=torch.arange(6))
    >>> store["pre_projection"].shape, len(store)
    (torch.Size([6, 4]), 6)
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.points = list(blocks[0].points)
        self._blocks = list(blocks)
        check(self._blocks)
        self.ids, self._order = in_order([ids_of(block) for block in self._blocks])
        has_labels = LABELS in self._blocks[0].shapes
        self.labels: Tensor | None = self._joined(LABELS) if has_labels else None

    @classmethod
    def from_tensors(
        cls, features: Mapping[str, Any], labels: Any = None, ids: Any = None
    ) -> FeatureStore:
        """A store of tensors or arrays that are already there; samples are sorted by id.

        Args:
            features: For each tap `(N, ...)` numbers.
            labels: `(N,)` or `(N, K)` numbers.
            ids: N different integers or strings; left out, running numbers.

        Raises:
            DataError: A tap is not `(N, ...)` or has a name that a store needs for itself, or
                labels or ids do not fit.
        """
        nameable(features)
        tensors = {}
        for point, values in features.items():
            try:
                tensors[point] = torch.as_tensor(values)
            except (TypeError, ValueError, RuntimeError) as error:
                raise DataError(
                    f"the features at {point!r} cannot be made a tensor: {error}."
                ) from None
            kind = tensors[point].dtype
            if kind.is_complex or (kind.is_floating_point and kind not in FLOATS):
                raise DataError(
                    f"the features at {point!r} are {kind}, which cannot be kept; make them one of "
                    f"{named(FLOATS)}."
                )
        if labels is not None:
            tensors[LABELS] = as_labels(labels)
        count = next((len(t) for t in tensors.values() if t.ndim), 0)
        found = torch.arange(count, device="cpu") if ids is None else as_ids(ids, count)
        if found is None or len(set(found if isinstance(found, list) else found.tolist())) < count:
            raise DataError(f"ids must be {count} different integers or strings.")
        return cls([Loose(with_ids(tensors, found))])

    @classmethod
    def open(cls, folder: str | Path) -> FeatureStore:
        """Reads a folder that `extract_features` finished writing.

        Missing and truncated files are found at once, changed bytes when a tap is first read from
        the file that has them, or by `verify`.

        Raises:
            CheckpointError: The folder has no index, or the index or a shard is missing or damaged.
        """
        return cls(read_store(Path(folder).absolute()))

    def __getitem__(self, point: str) -> Tensor:
        """Features of a tap `(N, ...)`; mapped and not copied where they are in one file.

        Of a store in memory they may be the store's own: `.clone()` what is to be changed in place.

        Raises:
            UnknownNameError: There is no such tap.
            CheckpointError: A shard is damaged.
        """
        self._known(point)
        return self._joined(point)

    def parts(self, point: str) -> Iterator[Tensor]:
        """The same features in parts that follow each other, for work in bounded memory.

        Where the files are in the order of the ids, each part is a file, mapped and not copied.

        Raises:
            UnknownNameError: There is no such tap.
            CheckpointError: A shard is damaged.
        """
        self._known(point)
        if self._order is None:
            return (block.tensor(point) for block in self._blocks)
        size = max(block.shapes[point][0] for block in self._blocks)
        return (
            self._rows(point, part, {})
            for part in torch.arange(len(self), device="cpu").split(size)
        )

    def numpy(self, point: str) -> numpy.ndarray[Any, Any]:
        """Features of a tap as an array `(N, ...)`; bfloat16 becomes float32, which NumPy has.

        Raises:
            UnknownNameError: There is no such tap.
            CheckpointError: A shard is damaged.
        """
        found = self[point]
        array: numpy.ndarray[Any, Any] = (
            found.float() if found.dtype == torch.bfloat16 else found
        ).numpy()
        return array

    def dataset(self, *points: str) -> FeatureDataset:
        """A torch Dataset of `(features, ..., label)`, or without the label where there is none.

        Args:
            points: Taps; left out, all.

        Raises:
            UnknownNameError: There is no such tap.
        """
        from headplug.store.export import FeatureDataset

        for point in points:
            self._known(point)
        return FeatureDataset(self, points or self.points)

    def to_arrow(self) -> pyarrow.Table:
        """A pyarrow table: `id`, `label` if there are any, and a fixed-size list for each tap.

        Raises:
            DataError: A tap is called `id` or `label`.
            CheckpointError: A shard is damaged.
        """
        from headplug.store.export import to_arrow

        return to_arrow(self)

    def to_parquet(self, path: str | Path) -> None:
        """Writes the same table to a parquet file, part by part, whole or not at all.

        Raises:
            DataError: A tap is called `id` or `label`.
            CheckpointError: A shard is damaged.
            RunError: The file cannot be written.
        """
        from headplug.store.export import to_parquet

        to_parquet(self, Path(path))

    def verify(self) -> None:
        """Compares every byte on disk with its checksum.

        Raises:
            CheckpointError: Shards are damaged; the message names all of them.
        """
        if found := damage(read_all, self._blocks):
            raise DamagedError(found)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the features of each tap, `(N, D)` or `(N, ...)`, without reading them."""
        return {p: (len(self), *self._blocks[0].shapes[p][1:]) for p in self.points}

    def __iter__(self) -> Iterator[str]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        dims = ", ".join(f"{p}: {' x '.join(map(str, s[1:]))}" for p, s in self.shapes.items())
        return f"FeatureStore({len(self)} samples; {dims})"

    @cached_property
    def _starts(self) -> Tensor:
        """Where each block starts in the order of the files."""
        counts = [0, *(block.shapes[self.points[0]][0] for block in self._blocks[:-1])]
        return torch.tensor(counts, device="cpu").cumsum(0)

    def _rows(self, point: str, places: Tensor, held: dict[tuple[str, int], Tensor]) -> Tensor:
        """Features of the samples at some places, in any order, without reading the others.

        Args:
            point: A tap.
            places: From 0 to N - 1, `(K,)`.
            held: Keeps what is mapped, for the next call.
        """
        places = places if self._order is None else self._order[places]
        of = torch.searchsorted(self._starts, places, right=True) - 1
        dims = self._blocks[0].shapes[point][1:]
        out: Tensor | None = None
        for number in of.unique().tolist():
            if (point, number) not in held:
                held[point, number] = self._blocks[number].tensor(point)
            tensor = held[point, number]
            out = tensor.new_empty(len(places), *dims) if out is None else out
            here = of == number
            out[here] = tensor[places[here] - self._starts[number]]
        return self[point][:0] if out is None else out

    def _known(self, point: str) -> None:
        if point not in self.points:
            raise unknown("tap", str(point), self.points, "store.points lists what was extracted.")

    def _joined(self, name: str) -> Tensor:
        first, *rest = self._blocks
        out = first.tensor(name)
        if rest:
            out = out.new_empty(sum(b.shapes[name][0] for b in self._blocks), *out.shape[1:])
            start = 0
            for block in self._blocks:  # each is copied while its checksum has it in the cache
                part = block.tensor(name)
                out[start : (start := start + len(part))] = part
        return out if self._order is None else out[self._order]
