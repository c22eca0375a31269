"""Where images come from: one split, with its labels known and its images not yet decoded.

A source opens an image by row, or streams the images of ascending rows in order; the second needs no
more memory than what is being read. Whatever cannot be used is refused with a message that says what
was found.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headplug.errors import DataError, unknown

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = {"train": ("train", "trainval"), "test": ("test", "val", "validation", "valid")}
"""The names that a split goes by, best first."""
SUFFIXES = frozenset(".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())
CACHE = "~/.cache/headplug/torchvision"


class Source:
    """One split before decoding.

    Attributes:
        title: What to call it in messages.
        labels: As the data has them: int64, `(N,)`.
        names: The name of each label.
        contents: Lines that change when the data changes; they identify it.
        random_access: Whether `open` works.
    """

    random_access = True

    def __init__(
        self, title: str, labels: Any, names: dict[int, str], contents: Iterable[str] = ()
    ) -> None:
        self.title = title
        self.labels = _checked(np.asarray(labels), title)
        self.names = names
        self.contents = list(contents)

    def open(self, row: int) -> Image:
        """The image of a row, perhaps not yet decoded."""
        raise NotImplementedError

    def stream(self, rows: np.ndarray) -> Iterator[Callable[[], Image]]:
        """For each of the ascending rows, a function that opens its image."""
        return (partial(self.open, int(row)) for row in rows)

    def where(self, row: int) -> str:
        """What to call a row in messages."""
        return f"image {row} of {self.title}"


class ArraySource(Source):
    """Greyscale images in an array.

    Args:
        title: What to call them.
        images: uint8, `(N, H, W)`.
        labels: Integers, `(N,)`.
    """

    def __init__(self, title: str, images: np.ndarray, labels: np.ndarray) -> None:
        super().__init__(title, labels, {int(i): str(i) for i in np.unique(labels)})
        self._images = images

    def open(self, row: int) -> Image:
        """The image of a row."""
        from PIL import Image

        return Image.fromarray(self._images[row])


class FolderSource(Source):
    """Images in `root/<class>/`, at any depth; hidden folders and other files are passed over.

    Args:
        root: The folder of the split.
    """

    def __init__(self, root: Path) -> None:
        names = sorted(d.name for d in root.iterdir() if d.is_dir() and d.name[0] != ".")
        self._paths: list[str] = []
        labels: list[int] = []
        contents: list[str] = []
        for label, name in enumerate(names):
            for path in _image_files(root / name):
                self._paths.append(path)
                labels.append(label)
                contents.append(f"{os.path.relpath(path, root)} {os.path.getsize(path)}")
        super().__init__(str(root), np.array(labels, int), dict(enumerate(names)), contents)

    def open(self, row: int) -> Image:
        """The image of a row; only its header is read."""
        from PIL import Image

        return Image.open(self._paths[row])

    def where(self, row: int) -> str:
        """The file."""
        return self._paths[row]


class ParquetSource(Source):
    """Encoded images in Hugging Face's parquet layout, read row group by row group.

    Args:
        title: What to call them.
        files: The shards, in order.
    """

    random_access = False
    images = ("image", "img")
    targets = ("label", "fine_label")

    def __init__(self, title: str, files: list[Path]) -> None:
        self._files = files
        labels, names = [], {}
        for file in files:
            with _parquet(file) as parquet:
                schema = parquet.schema_arrow
                self._image = self._column(file, schema, self.images, ".bytes")
                target = self._column(file, schema, self.targets)
                column = parquet.read([target])[target]
            if column.null_count:
                raise DataError(f"{file}: {column.null_count} rows have no {target}. Remove them.")
            labels.append(_checked(column.to_numpy(), f"column {target!r} of {file}"))
            names.update(_class_names(schema, target))
        self._starts = np.cumsum([0, *map(len, labels)])
        joined = np.concatenate(labels)
        names = {int(i): names.get(int(i), str(i)) for i in np.unique(joined)}
        super().__init__(title, joined, names, (f"{f.name} {f.stat().st_size}" for f in files))

    def stream(self, rows: np.ndarray) -> Iterator[Callable[[], Image]]:
        """For each of the ascending rows, a function that opens its image.

        Raises:
            DataError: A file is damaged.
        """
        for file, start in zip(self._files, self._starts, strict=False):
            with _parquet(file) as parquet:
                for group in range(parquet.num_row_groups):
                    stop = start + parquet.metadata.row_group(group).num_rows
                    if len(_between(rows, start, stop)):
                        options = {"row_groups": [group], "columns": [self._image]}
                        at = start
                        for batch in parquet.iter_batches(batch_size=256, **options):
                            for encoded in _encoded(
                                batch, _between(rows, at, at + len(batch)) - at
                            ):
                                yield partial(_open_bytes, encoded)
                            at += len(batch)
                    start = stop

    def where(self, row: int) -> str:
        """File and row within it."""
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return f"{self._files[shard]} row {row - self._starts[shard]}"

    @staticmethod
    def _column(file: Path, schema: Any, names: tuple[str, ...], part: str = "") -> str:
        """The first of the names that the file has, with its `part` as a field or in the name."""
        for name in names:
            if name + part in schema.names:
                return name + part
            if part and name in schema.names:
                kind = schema.field(name).type
                if part[1:] in {kind.field(i).name for i in range(kind.num_fields)}:
                    return name + part
        raise DataError(
            f"{file} has no column {' or '.join(repr(n + part) for n in names)}; "
            f"it has: {', '.join(f'{field.name} ({field.type})' for field in schema)}."
        )


class TorchvisionSource(Source):
    """A split of a torchvision data set.

    Args:
        title: What to call it.
        dataset: Gives pairs of a PIL image and an integer.
    """

    def __init__(self, title: str, dataset: Any) -> None:
        from PIL.Image import Image

        first, label = dataset[0] if len(dataset) else (None, None)
        if first is not None and not (isinstance(first, Image) and np.ndim(label) == 0):
            raise DataError(
                f"{title} gives pairs of {type(first).__name__} and {type(label).__name__}; images "
                "with one class each are needed. Choose a classification data set."
            )
        kept = (getattr(dataset, name, None) for name in ("targets", "labels", "_labels"))
        labels = next((np.asarray(k) for k in kept if np.shape(k) == (len(dataset),)), None)
        if labels is None or (len(dataset) and labels[0] != label):
            labels = np.asarray([dataset[i][1] for i in range(len(dataset))])
        classes = getattr(dataset, "classes", ())
        names = {int(i): str(i) for i in np.unique(labels)} if labels.dtype.kind in "iu" else {}
        if len(classes) > max(names, default=0):
            names = {i: c if isinstance(c, str) else str(c[0]) for i, c in enumerate(classes)}
        super().__init__(title, labels, names, [type(dataset).__name__])
        self._dataset = dataset

    def open(self, row: int) -> Image:
        """The image of a row."""
        image: Image = self._dataset[row][0]
        return image


def digits() -> dict[str, Source]:
    """scikit-learn's digits, 1,437 to train and 360 to test, stratified; the split is fixed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    split = train_test_split(
        np.arange(len(images)), test_size=0.2, stratify=data.target, random_state=0
    )
    return {
        name: ArraySource(f"digits {name}", images[rows], data.target[rows])
        for name, rows in zip(("train", "test"), map(np.sort, split), strict=True)
    }


def torchvision(name: str, hint: str) -> dict[str, Source]:
    """Both splits of a torchvision data set, downloaded to `~/.cache/headplug` if need be.

    Raises:
        UnknownNameError: torchvision has no such data set with a train and a test split.
        DataError: It cannot be downloaded, or is not one of images with a class each.
    """
    from inspect import isclass, signature

    from torchvision import datasets

    options = {
        key: signature(kind).parameters
        for key, kind in vars(datasets).items()
        if isclass(kind) and issubclass(kind, datasets.VisionDataset)
    }
    known = [key for key, taken in options.items() if {"train", "split"} & set(taken)]
    if name not in known:
        raise unknown("torchvision data set with train and test", name, known, hint)
    root = Path(CACHE).expanduser()
    download = {"download": True} if "download" in options[name] else {}
    splits: dict[str, Source] = {}
    for split, values in SPLITS.items():
        choices: list[dict[str, Any]] = [{"split": value} for value in values]
        if "train" in options[name]:
            choices = [{"train": split == "train"}]
        build = partial(getattr(datasets, name), root, **download)
        splits[split] = TorchvisionSource(f"{name} {split}", _first_valid(name, build, choices))
    return splits


def _first_valid(name: str, build: Callable[..., Any], choices: list[dict[str, Any]]) -> Any:
    """The data set with the first choice of options that it accepts (it rejects by ValueError)."""
    failure: Exception | None = None
    root = Path(CACHE).expanduser()
    for choice in choices:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with redirect_stdout(sys.stderr):  # torchvision prints; stdout is for results
                return build(**choice)
        except ValueError as error:
            failure = error
        except Exception as error:
            failure = error
            break
    raise DataError(
        f"torchvision cannot provide {name} ({_short(failure)}). It needs the network the first time; "
        f"without one, copy its files to {root} from a machine that has them, or give a folder."
    ) from failure


def _image_files(folder: Path) -> Iterator[str]:
    for parent, inner, files in os.walk(folder, followlinks=True):
        inner[:] = sorted(name for name in inner if name[0] != ".")
        for name in sorted(files):
            if name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield os.path.join(parent, name)


def shards(folder: Path, name: str) -> list[Path]:
    """The parquet files of a split: `name.parquet`, or else all `name-*.parquet`.

    Raises:
        DataError: Some of `name-00000-of-00005.parquet` and so on are missing.
    """
    whole = folder / f"{name}.parquet"
    files = [whole] if whole.is_file() else sorted(folder.glob(f"{name}-*.parquet"))
    numbered = [re.search(r"-of-(\d+)$", file.stem) for file in files]
    promised = max((int(match[1]) for match in numbered if match), default=0)
    if len(files) < promised:
        raise DataError(
            f"{folder} holds {len(files)} of {promised} {name} files; fetch the others."
        )
    return files


def _parquet(file: Path) -> Any:
    return _Parquet(file)


def _between(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
    return rows[slice(*np.searchsorted(rows, [start, stop]))]
