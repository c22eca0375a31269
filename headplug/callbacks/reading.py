"""How features of a model in training are read, and of what data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from headplug.errors import DataError
from headplug.probing.data import check_finite
from headplug.store import FeatureStore
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


def usable(stores: Mapping[str, FeatureStore]) -> tuple[list[FeatureStore], str]:
    """The same stores without the taps that are not finite in all of them, if any tap is.

    Args:
        stores: By what data they are of, all of the same taps.

    Returns:
        And what was left out, and why; "" if nothing was.

    >>> features = {"a": torch.zeros(2, 1), "b": torch.full((2, 1), torch.nan)}
    >>> usable({"train": FeatureStore.from_tensors(features)})[0]
    [FeatureStore(2 samples; a: 1)]
    """
    given = list(stores.values())
    lost: dict[str, str] = {}
    for what, store in stores.items():
        for tap in store.points:
            try:
                check_finite(store[tap])
            except DataError as error:
                lost.setdefault(tap, f"in {what}, {error}")
    kept = [tap for tap in given[0].points if tap not in lost]
    if not (lost and kept):
        return given, ""
    found = [FeatureStore.from_tensors({t: s[t] for t in kept}, s.labels, s.ids) for s in given]
    return found, f" for {', '.join(map(repr, lost))}: {next(iter(lost.values()))}"


def _cast(images: Tensor, dtype: torch.dtype) -> Tensor:
    return images.to(dtype) if images.is_floating_point() else images
