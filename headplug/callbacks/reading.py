"""How features of a model in training are read, and of what data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from headplug.errors import DataError
from headplug.store.extract import extract_features
from headplug.taps.modes import untouched

BATCH_SIZE = 256  # for a data set that comes without a loader


def opened(what: str, given: Any) -> Any:
    """Something that can be read again and again.

    Args:
        what: Which data they are.
        given: A data set, an iterable of batches, or a function that makes one of these.

    Raises:
        DataError: It can be read once.
    """
    made = isinstance(given, Dataset) or hasattr(given, "__iter__") or not callable(given)
    data = given if made else given()
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size=BATCH_SIZE)
    if hasattr(data, "__next__"):
        raise DataError(
            f"the {what} data of LayerProbe are a {type(data).__name__}, which can be read once; "
            "pass a DataLoader, a list of batches, or a function that gives one of them."
        )
    return data


@contextmanager
def reading(trainer: Any, pl_module: Any) -> Iterator[Callable[..., Any]]:
    """Gives `extract_features` of a model in training, as its trainer would validate it."""
    cast = partial(_cast, dtype=pl_module.dtype)
    with untouched(pl_module), trainer.precision_plugin.val_step_context():
        yield partial(extract_features, pl_module, transform=cast)


def _cast(images: Tensor, dtype: torch.dtype) -> Tensor:
    return images.to(dtype) if images.is_floating_point() else images
