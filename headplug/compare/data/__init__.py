"""Image data sets by a short spec, the same everywhere: checked, brought to one shape, in uint8.

Nothing is standardised or augmented here. What training would trip over later (a class with one
image, a test class that nobody trains on, damaged files) is refused at once, by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headplug.compare.data.images import Images, read_images
from headplug.compare.data.parquet import ParquetSource, shards
from headplug.compare.data.sources import FolderSource, Source, digits
from headplug.compare.data.torchvision_data import torchvision_splits
from headplug.errors import DataError, UnknownNameError
from headplug.heads.base import positive

FORMS = (
    "Data can be: digits; torchvision:NAME, e.g. torchvision:CIFAR10; an image folder with "
    "train/<class>/*.png and test/<class>/*.png; a folder with Hugging Face's train.parquet and "
    "test.parquet."
)
SPLITS = {"train": ("train",), "test": ("test", "val", "validation", "valid")}
"""The names of a split in folders, best first."""
GREYSCALE = {"1", "L", "LA", "I;16", "I;16B", "I;16L"}
"""Pillow's modes without colour."""


@dataclass(frozen=True)
class ImageData:
    """A data set ready for training.

    Attributes:
        train: The images to train on; none if that split was not asked for.
        test: The images to measure on; the same.
        classes: The name of each class index.
        name: What to call the data set.
        fingerprint: Changes with the data, the chosen images and their shape, not with the place.
    """

    train: Images
    test: Images
    classes: list[str]
    name: str
    fingerprint: str


def load_data(
    spec: str,
    *,
    image_size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    to_train: bool = True,
    splits: Sequence[str] = ("train", "test"),
    show_progress: bool = True,
) -> ImageData:
    """Loads a data set.

    All images get one shape. They are RGB, unless every image of a sample (256 from each split) is
    greyscale.

    Args:
        spec: `digits`, `torchvision:NAME`, or a folder: of images (`train/<class>/*.png`, and the
            same in `test/` or `val/`), or of Hugging Face image parquet files (`train.parquet` or
            `train-*.parquet` shards, and the same for `test` or `validation`).
        image_size: Resize the shorter side to this and crop the centre to a square. Left out,
            images keep their size if all of the sample have the same; else the median shorter side
            is taken, and 224 at most.
        limit: Take at most this many random images of each split, as many of each class as far as
            there are.
        seed: Draws the images if there is a limit.
        to_train: Whether there have to be two classes and two images of each, as training needs.
        splits: Those whose images are read. Of the other one only labels and a sample are looked
            at, so that shape, classes and fingerprint are the same.
        show_progress: Whether to show a progress bar.

    Raises:
        UnknownNameError: The spec names nothing that exists.
        DataError: The data set cannot be used; the message says what was found.
        OptionError: `image_size` or `limit` is not a positive integer.

    >>> data = load_data("digits")
    >>> len(data.train), len(data.test), data.train.shape, len(data.classes)
    (1437, 360, (1, 8, 8), 10)
    """
    for option, value in {"image_size": image_size, "limit": limit}.items():
        if value is not None:
            positive(option, value)
    name, sources = _open(spec)
    for source in sources.values():
        if not len(source.labels):
            raise DataError(f"{source.title} holds no labelled images. {FORMS}")
    classes, labels = _classes(sources["train"], sources["test"], to_train)
    if to_train:
        _check_counts(sources["train"].title, labels["train"], classes)
    if to_train and limit is not None and limit < 2 * len(classes):
        raise DataError(
            f"limit={limit} leaves fewer than 2 images for each of {len(classes)} classes; "
            f"take at least {2 * len(classes)}."
        )
    shape = _shape(list(sources.values()), image_size)

    identity = hashlib.sha256(json.dumps([classes, shape]).encode())
    images: dict[str, Images] = {}
    for number, (split, source) in enumerate(sources.items()):
        rows = _subset(labels[split], limit, np.random.default_rng([seed % 2**64, number]))
        targets = labels[split][rows]
        read = slice(None if split in splits else 0)
        images[split] = read_images(
            source, rows[read], targets[read], shape, show_progress=show_progress
        )
        identity.update(f"{split} {source.identity}".encode())
        identity.update(rows.astype("<i8").tobytes() + targets.astype("<i8").tobytes())
    if to_train and "train" in splits:
        _check_counts(sources["train"].title, images["train"].labels.numpy(), classes)
    return ImageData(images["train"], images["test"], classes, name, identity.hexdigest()[:16])


def _open(spec: str) -> tuple[str, dict[str, Source]]:
    """The data set's name and its two splits."""
    if spec == "digits":
        return spec, digits()
    if spec.startswith("torchvision:"):
        name = spec.removeprefix("torchvision:")
        return name, torchvision_splits(name, FORMS)
    folder = Path(spec).expanduser()
    if not folder.exists():
        place = next(parent for parent in folder.absolute().parents if parent.is_dir())
        raise UnknownNameError(
            f"there is no data at {spec!r}. {place} holds {_held(place)}. {FORMS}"
        )
    if not folder.is_dir():
        raise DataError(f"{spec} is a file; give the folder it is in. {FORMS}")
    return folder.resolve().name, {split: _split(folder, split) for split in SPLITS}


def _split(folder: Path, split: str) -> Source:
    """A split of an image or parquet folder under the first of its names that is there."""
    for name in SPLITS[split]:
        if files := shards(folder, name):
            return ParquetSource(f"{folder.name} {split}", files)
    for name in SPLITS[split]:
        if (folder / name).is_dir():
            return FolderSource(folder / name)
    raise DataError(
        f"{folder} has no {split} split: add {split}.parquet, or {split}/<class>/*.png. "
        f"It holds {_held(folder)}. {FORMS}"
    )


def _held(folder: Path) -> str:
    """The first entries of a folder, for messages."""
    return (
        _some(sorted(entry.name for entry in folder.iterdir() if entry.name[0] != ".")) or "nothing"
    )


def _classes(
    train: Source, test: Source, to_train: bool
) -> tuple[list[str], dict[str, np.ndarray]]:
    """The class names, and each split's labels as indices into them; matched by name."""
    classes = [train.names[key] for key in sorted(train.names)]
    if to_train and len(classes) < 2:
        raise DataError(
            f"{train.title} has a single class ({_some(classes)}); at least two are needed."
        )
    index = {name: i for i, name in enumerate(classes)}
    labels = {}
    for split, source in {"train": train, "test": test}.items():
        keys, inverse = np.unique(source.labels, return_inverse=True)
        names = [source.names[int(key)] for key in keys]
        if strange := [name for name in names if name not in index]:
            raise DataError(
                f"{source.title} has classes that {train.title} has not: {_some(strange)}. Train "
                f"has: {_some(classes)}. Add them there or remove them from {split}."
            )
        labels[split] = np.array([index[name] for name in names])[inverse]
    return classes, labels


def _check_counts(title: str, labels: np.ndarray, classes: list[str]) -> None:
    counts = np.bincount(labels, minlength=len(classes))
    few = [f"{name} ({n})" for name, n in zip(classes, counts, strict=True) if n < 2]
    if few:
        raise DataError(
            f"{title} has fewer than 2 images in {len(few)} of {len(classes)} classes: "
            f"{_some(few)}. Add images or remove the class from every split."
        )


def _shape(sources: list[Source], image_size: int | None) -> tuple[int, int, int]:
    """`(C, H, W)` for all images, from a sample: eight runs of 32 neighbours in each split."""
    sizes: list[tuple[int, int]] = []
    modes: set[str] = set()
    failure: Exception | None = None
    for source in sources:
        starts = np.linspace(0, max(len(source.labels) - 32, 0), 8, dtype=int)
        rows = np.unique(starts[:, None] + np.arange(32))
        for opener in source.stream(rows[rows < len(source.labels)]):
            try:
                with opener() as image:
                    sizes.append(image.size)
                    modes.add(image.mode)
            except Exception as error:  # counted and named when all images are read
                failure = error
    if not sizes:
        raise DataError(
            f"none of the sampled images of {sources[0].title} can be read ({failure})."
        ) from failure
    channels = 1 if modes <= GREYSCALE else 3
    if image_size is not None:
        return channels, image_size, image_size
    if len(set(sizes)) == 1:
        return channels, sizes[0][1], sizes[0][0]
    side = min(224, int(np.median([min(size) for size in sizes])))
    return channels, side, side


def _subset(labels: np.ndarray, limit: int | None, rng: np.random.Generator) -> np.ndarray:
    """Ascending rows of at most `limit` images, one of each class in turn until that many."""
    if limit is None or limit >= len(labels):
        return np.arange(len(labels))
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    _, first, inverse = np.unique(labels[order], return_index=True, return_inverse=True)
    turn = np.arange(len(order)) - first[inverse]
    return np.sort(order[np.argsort(turn, kind="stable")[:limit]])


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)})" if len(names) > 8 else "")
