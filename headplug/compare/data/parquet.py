"""Images in Hugging Face's parquet files, read row group by row group.

Memory stays at one row group of encoded images, and groups without a wanted row are not read.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headplug.compare.data.sources import Source, integer_labels
from headplug.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES = ("image", "img")
LABELS = ("label", "fine_label")


class ParquetSource(Source):
    """One split: columns `image` (a struct with `bytes`, or flat `image.bytes`) and `label`.

    `img` and `fine_label`, as the CIFAR files on the Hub have them, will do as well. Classes get
    the names that the files' Hugging Face metadata holds.

    Args:
        title: What to call it.
        files: Its shards, in order.

    Raises:
        DataError: A file is damaged, lacks a column, or has labels that are no class indices.
    """

    random_access = False

    def __init__(self, title: str, files: list[Path]) -> None:
        labels, known = [], {}
        for file in files:
            with _opened(file) as parquet:
                schema = parquet.schema_arrow
                _image_column(file, schema)
                target = next((name for name in LABELS if name in schema.names), None)
                if target is None:
                    raise _missing(file, schema, LABELS)
                column = parquet.read(columns=[target])[target]
            if column.null_count:
                raise DataError(f"{file}: {column.null_count} rows have no {target}. Remove them.")
            labels.append(integer_labels(column.to_numpy(), f"{file}, column {target!r},"))
            known.update(_class_names(schema, target))
        self._files = files
        self._starts = np.cumsum([0, *map(len, labels)])
        joined = np.concatenate(labels)
        names = {int(i): known.get(int(i), str(i)) for i in np.unique(joined)}
        super().__init__(title, joined, names, (f"{f.name} {f.stat().st_size}" for f in files))

    def stream(self, rows: np.ndarray) -> Iterator[Callable[[], Image]]:
        """For each of the ascending rows, a function that opens its image.

        Raises:
            DataError: A file is damaged.
        """
        for file, start in zip(self._files, self._starts, strict=False):
            with _opened(file) as parquet:
                name = _image_column(file, parquet.schema_arrow)
                for group in range(parquet.num_row_groups):
                    stop = start + parquet.metadata.row_group(group).num_rows
                    if len(_within(rows, start, stop)):
                        for encoded in _encoded(parquet, group, name, rows - start):
                            yield partial(_open, encoded)
                    start = stop

    def where(self, row: int) -> str:
        """File and row within it."""
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return f"{self._files[shard]} row {row - self._starts[shard]}"


def shards(folder: Path, name: str) -> list[Path]:
    """The parquet files of a split: `name.parquet`, or else all `name-*.parquet`; perhaps none.

    Raises:
        DataError: The names promise more files (`-00000-of-00005`) than there are.
    """
    whole = folder / f"{name}.parquet"
    files = [whole] if whole.is_file() else sorted(folder.glob(f"{name}-*.parquet"))
    numbers = (re.search(r"-of-(\d+)$", file.stem) for file in files)
    promised = max((int(match[1]) for match in numbers if match), default=0)
    if len(files) < promised:
        raise DataError(
            f"{folder} holds {len(files)} of {promised} {name} files; fetch the others."
        )
    return files


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            yield parquet
    except (pyarrow.ArrowException, OSError) as error:
        why = " ".join(str(error).split())[:150]
        raise DataError(f"{file} is not a readable parquet file ({why}). Fetch it anew.") from error


def _encoded(parquet: Any, group: int, name: str, wanted: np.ndarray) -> Iterator[bytes | None]:
    """The encoded images of one row group; `wanted` counts rows from its start."""
    for batch in parquet.iter_batches(batch_size=256, row_groups=[group], columns=[name]):
        column = batch.column(0)
        if hasattr(column, "field"):  # a struct; flatten() keeps its nulls
            (column,) = column.flatten()
        yield from column.take(_within(wanted, 0, len(batch))).to_pylist()
        wanted = wanted - len(batch)


def _open(encoded: bytes | None) -> Image:
    from PIL import Image

    if encoded is None:
        raise DataError("the row holds no bytes")
    return Image.open(io.BytesIO(encoded))


def _image_column(file: Path, schema: Any) -> str:
    for name in IMAGES:
        if f"{name}.bytes" in schema.names:
            return f"{name}.bytes"
        if name in schema.names:
            kind = schema.field(name).type
            if "bytes" in {kind.field(i).name for i in range(kind.num_fields)}:
                return f"{name}.bytes"
    raise _missing(file, schema, tuple(f"{name}.bytes" for name in IMAGES))


def _missing(file: Path, schema: Any, names: tuple[str, ...]) -> DataError:
    found = ", ".join(f"{field.name} ({field.type})" for field in schema)
    return DataError(
        f"{file} has no column {' or '.join(names)}; it has {found or 'none'}. Rename the columns."
    )


def _class_names(schema: Any, target: str) -> dict[int, str]:
    """The names in Hugging Face's metadata, if there are any."""
    try:
        about = json.loads(schema.metadata[b"huggingface"])
        return dict(enumerate(about["info"]["features"][target]["names"]))
    except (KeyError, TypeError, ValueError):
        return {}


def _within(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Those of the ascending rows in `[start, stop)`."""
    return rows[slice(*np.searchsorted(rows, [start, stop]))]
