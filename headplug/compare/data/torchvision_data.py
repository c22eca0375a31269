"""torchvision's classification data sets by name, kept in one cache folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headplug.compare.data.sources import Source, integer_labels
from headplug.errors import DataError, unknown

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = {"train": ("train", "trainval"), "test": ("test", "val", "valid")}
"""The names that torchvision gives to a split, best first."""


class TorchvisionSource(Source):
    """A split of a torchvision data set.

    Args:
        title: What to call it.
        dataset: Gives pairs of a PIL image and an integer.

    Raises:
        DataError: It gives something else.
    """

    def __init__(self, title: str, dataset: Any) -> None:
        from PIL import Image

        image: Any
        label: Any
        image, label = dataset[0] if len(dataset) else (None, None)
        if len(dataset) and not (isinstance(image, Image.Image) and np.ndim(label) == 0):
            raise DataError(
                f"{title} holds pairs of {type(image).__name__} and {type(label).__name__}, not "
                "images with one class each. Choose a data set for classification."
            )
        kept = (np.asarray(getattr(dataset, k, None)) for k in ("targets", "labels", "_labels"))
        known = (k for k in kept if k.shape == (len(dataset),) and (not k.size or k[0] == label))
        found = next(known, None)
        if found is None:
            found = np.asarray([dataset[i][1] for i in range(len(dataset))])
        labels = integer_labels(found, title)
        classes = getattr(dataset, "classes", [])
        names = {
            int(i): _name(classes[i]) if i < len(classes) else str(i) for i in np.unique(labels)
        }
        super().__init__(title, labels, names)
        self._dataset = dataset

    def open(self, row: int) -> Image:
        """The image of a row."""
        image: Image = self._dataset[row][0]
        return image


def torchvision_splits(name: str, hint: str) -> dict[str, Source]:
    """Train and test of a data set, downloaded to `~/.cache/headplug/torchvision` if need be.

    Args:
        name: Its class in `torchvision.datasets`.
        hint: A sentence for the message when there is none.

    Raises:
        UnknownNameError: torchvision has no such data set with a train and a test split.
        DataError: It cannot be downloaded, or is not one of images with a class each.
    """
    from inspect import isclass, signature

    from torchvision import datasets

    parameters = {
        key: set(signature(kind).parameters)
        for key, kind in vars(datasets).items()
        if isclass(kind) and issubclass(kind, datasets.VisionDataset)
    }
    known = [key for key, taken in parameters.items() if taken & {"train", "split"}]
    if name not in known:
        raise unknown("torchvision data set with train and test", name, known, hint)
    root = Path("~/.cache/headplug/torchvision").expanduser()
    download = {"download": True} if "download" in parameters[name] else {}
    build = partial(getattr(datasets, name), root, **download)
    splits: dict[str, Source] = {}
    for split, values in SPLITS.items():
        choices: list[dict[str, Any]] = [{"split": value} for value in values]
        if "train" in parameters[name]:
            choices = [{"train": split == "train"}]
        try:
            root.mkdir(parents=True, exist_ok=True)
            with redirect_stdout(sys.stderr):  # torchvision prints; stdout is for results
                dataset = _first_valid(build, choices)
        except Exception as error:
            raise DataError(
                f"torchvision cannot provide {name} ({' '.join(str(error).split())[:200]}). The "
                f"first use needs the network; without it, copy the data set's files to {root} "
                f"from a machine that has them, or use a folder. {hint}"
            ) from error
        splits[split] = TorchvisionSource(f"{name} {split}", dataset)
    return splits


def _first_valid(build: Callable[..., Any], choices: list[dict[str, Any]]) -> Any:
    """The data set with the first options that it knows; it rejects others by a ValueError."""
    for choice in choices[:-1]:
        try:
            return build(**choice)
        except ValueError:
            continue
    return build(**choices[-1])


def _name(entry: Any) -> str:
    return entry if isinstance(entry, str) else str(entry[0])  # ImageNet lists synonyms
