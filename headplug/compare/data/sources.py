"""Where images come from: one split, with its labels known and its images not yet decoded.

A source opens an image by row, or streams the images of ascending rows in order; the second needs
no more memory than what is being read. Labels that cannot be used are refused with what was found.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headplug.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Source:
    """One split before decoding.

    Args:
        title: What to call it in messages.
        labels: As the data has them, `(N,)`.
        names: The name of each label.
        contents: Lines that change when the data changes and not with its place; else the title.

    Raises:
        DataError: The labels are not integers of at least 0.
    """

    random_access = True
    """Whether `open` works; if not, only `stream` does."""

    def __init__(
        self,
        title: str,
        labels: Any,
        names: dict[int, str],
        contents: Iterable[str] | None = None,
    ) -> None:
        self.title = title
        self.labels = integer_labels(labels, title)
        self.names = names
        digest = hashlib.sha256()
        for line in [title] if contents is None else contents:
            digest.update(f"{line}\n".encode(errors="surrogateescape"))
        self.identity = digest.hexdigest()

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
        for label, name in enumerate(names):
            self._paths += _image_files(root / name)
            labels += [label] * (len(self._paths) - len(labels))
        contents = (f"{os.path.relpath(path, root)} {_size(path)}" for path in self._paths)
        super().__init__(str(root), np.array(labels, int), dict(enumerate(names)), contents)

    def open(self, row: int) -> Image:
        """The image of a row; only its header is read."""
        from PIL import Image

        return Image.open(self._paths[row])

    def where(self, row: int) -> str:
        """The file."""
        return self._paths[row]


def digits() -> dict[str, Source]:
    """scikit-learn's digits, 1,437 to train and 360 to test; the stratified split is fixed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    rows = np.arange(len(images))
    train, test = train_test_split(rows, test_size=0.2, stratify=data.target, random_state=0)
    return {
        name: ArraySource(f"digits {name}", images[rows], data.target[rows])
        for name, rows in {"train": np.sort(train), "test": np.sort(test)}.items()
    }


def integer_labels(labels: Any, where: str) -> np.ndarray:
    """The labels as int64.

    Raises:
        DataError: They are not integers of at least 0.
    """
    array = np.asarray(labels)
    if array.size and (array.ndim != 1 or array.dtype.kind not in "iu"):
        raise DataError(
            f"the labels of {where} are not integers but {array.dtype} of shape {array.shape}, "
            f"e.g. {array.ravel()[:1].tolist()[0]!r}. Give each image one class index."
        )
    if array.size and array.min() < 0:
        raise DataError(
            f"{int((array < 0).sum())} labels of {where} are negative, the first at row "
            f"{int((array < 0).argmax())}: images without a class. Choose a labelled split."
        )
    return array.astype(np.int64)


def _image_files(folder: Path) -> Iterator[str]:
    for parent, inner, files in os.walk(folder, followlinks=True):
        inner[:] = sorted(name for name in inner if name[0] != ".")
        for name in sorted(files):
            if name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES:
                yield os.path.join(parent, name)


def _size(path: str) -> int:
    """Bytes, or -1 for a link to nowhere, which is reported as unreadable later."""
    try:
        return os.path.getsize(path)
    except OSError:
        return -1
