"""Stored features for other tools: a torch Dataset, and Arrow or parquet tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from headplug.errors import DataError
from headplug.files import atomic

if TYPE_CHECKING:
    import pyarrow

    from headplug.store.features import FeatureStore

ID, LABEL = "id", "label"


class FeatureDataset(Dataset[tuple[Any, ...]]):
    """Samples of a store, read when asked for.

    An index gives one sample; a list or a tensor of B indices, a slice or a mask `(N,)` gives a
    batch of each in one go, as a DataLoader with `sampler=BatchSampler(...), batch_size=None` asks
    for it.

    Args:
        store: The store.
        points: Its taps that are read.

    >>> from headplug import FeatureStore
    >>> store = FeatureStore.from_tensors({"h": torch.rand(6, 4)}, labels=torch.arange(6))
    >>> h, labels = store.dataset("h")[[4, 0]]
    >>> h.shape, labels
    (torch.Size([2, 4]), tensor([4, 0]))
    """

    def __init__(self, store: FeatureStore, points: Sequence[str]) -> None:
        self.store = store
        self.points = list(points)
        self._held: dict[tuple[str, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> tuple[Any, ...]:
        """Features of each tap, and the label if there are labels.

        Returns:
            Tensors `(...)` and a label; for B indices tensors `(B, ...)` and labels `(B,)`.

        Raises:
            IndexError: There is no such sample.
            DataError: The index is something else.
        """
        places = self._places(index)
        batch = places.reshape(-1)
        if len(batch) and not -len(self) <= int(batch.min()) <= int(batch.max()) < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples.")
        batch = batch % max(len(self), 1)
        found = [self.store._rows(point, batch, self._held) for point in self.points]
        if self.store.labels is not None:
            found.append(self.store.labels[batch])
        return tuple(found) if places.ndim else tuple(t[0] for t in found)

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, ...]]:
        """What a DataLoader with a batch size asks for: samples, read together."""
        return list(zip(*(t.unbind() for t in self[indices]), strict=True))

    def _places(self, index: Any) -> Tensor:
        """An index as int64, `()` or `(B,)`."""
        try:
            given = range(*index.indices(len(self))) if isinstance(index, slice) else index
            places = torch.as_tensor(given).cpu()
        except (TypeError, ValueError, RuntimeError):
            places = torch.tensor(0.5, device="cpu")
        if places.shape == (len(self),) and places.dtype == torch.bool:
            return places.nonzero().flatten()
        numbers = not (places.is_floating_point() or places.is_complex())
        if places.ndim > 1 or places.dtype == torch.bool or (places.numel() and not numbers):
            raise DataError(
                "samples are read by an integer, a list of them, a slice or a mask of "
                f"{len(self)} booleans, not by {index!r:.80}."
            )
        return places.long()

    def __getstate__(self) -> dict[str, Any]:  # spawned workers map the files themselves
        return {**self.__dict__, "_held": {}}


def to_arrow(store: FeatureStore) -> pyarrow.Table:
    """The table of `FeatureStore.to_arrow`."""
    import pyarrow

    return pyarrow.Table.from_batches(list(_batches(store)))


def to_parquet(store: FeatureStore, path: Path) -> None:
    """The file of `FeatureStore.to_parquet`."""
    from pyarrow.parquet import ParquetWriter

    batches = _batches(store)
    first = next(batches)
    with atomic(path) as partial, ParquetWriter(partial, first.schema) as writer:
        writer.write_batch(first)
        for batch in batches:
            writer.write_batch(batch)


def _batches(store: FeatureStore) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow

    if clash := {ID, LABEL} & set(store.points):
        raise DataError(
            f"a tap is called {min(clash)!r}, as a column of the table is. Extract it under a path "
            "with a glob, or use store.numpy()."
        )
    start = 0
    for parts in zip(*map(store.parts, store.points), strict=True):
        stop = start + len(parts[0])
        ids = store.ids[start:stop]
        columns = {ID: pyarrow.array(ids if isinstance(ids, list) else ids.numpy())}
        if store.labels is not None:
            columns[LABEL] = _column(store.labels[start:stop])
        columns |= {point: _column(part) for point, part in zip(store.points, parts, strict=True)}
        yield pyarrow.record_batch(columns)
        start = stop


def _column(values: Tensor) -> Any:
    """An Arrow array, of fixed-size lists for each dimension after the first."""
    import pyarrow

    values = values.float() if values.dtype == torch.bfloat16 else values
    column = pyarrow.array(values.reshape(-1).numpy())
    for size in reversed(values.shape[1:]):
        column = pyarrow.FixedSizeListArray.from_arrays(column, size)
    return column
