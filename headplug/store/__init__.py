"""Features on disk or in memory, by tap.

A store that was opened from disk costs memory for a tap only when the tap is asked for; in memory
it is the same thing. `headplug.store.shards` keeps the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headplug.errors import DataError, unknown
from headplug.progress import progress
from headplug.store.shards import Writer, read_shards
from headplug.taps import read
from headplug.taps.modes import evaluating
from headplug.taps.points import Layout, flat

Pool = Callable[[Tensor], Tensor]


class FeatureStore:
    """Features `(N, D)` of several taps of the same N samples, with their labels.

    Iterating gives the taps; the length is the number of samples.

    Args:
        features: For each tap its features, in parts that follow each other.
        labels: `(N,)` integers.

    Attributes:
        points: The taps, in depth order where they were extracted from a model.
        labels: `(N,)` integers.

    Raises:
        DataError: There is no tap, a tap is not `(N, D)`, or the number of labels differs.

    >>> h = torch.rand(6, 4)
    >>> store = FeatureStore.from_tensors({"pre_projection": h}, labels=torch.arange(6))
    >>> store["pre_projection"].shape, len(store)
    (torch.Size([6, 4]), 6)
    """

    def __init__(self, features: Mapping[str, Sequence[Tensor]], labels: Tensor) -> None:
        if not features:
            raise DataError("a feature store needs at least one tap.")
        for point, parts in features.items():
            shapes = [tuple(p.shape) for p in parts]
            rows = sum(s[0] for s in shapes if s)
            if {len(s) for s in shapes} != {2} or len({s[1:] for s in shapes}) > 1:
                found = ", ".join(sorted({str(s) for s in shapes}))
                raise DataError(f"the features at {point!r} must be (N, D), not {found}.")
            if rows != len(labels):
                raise DataError(
                    f"{point!r} has {rows} samples, but there are {len(labels)} labels."
                )
        self._features = {point: list(parts) for point, parts in features.items()}
        self.points = list(features)
        self.labels = labels

    @classmethod
    def from_tensors(cls, features: Mapping[str, Any], labels: Any) -> FeatureStore:
        """A store of tensors or arrays that are already there.

        Args:
            features: For each tap `(N, D)` numbers.
            labels: `(N,)` integers.

        Raises:
            DataError: A tap is not `(N, D)`, or the labels are not as many integers.
        """
        parts = {p: [_tensor(f"the features at {p!r}", v)] for p, v in features.items()}
        return cls(parts, _labels(labels))

    @classmethod
    def open(cls, folder: str | Path) -> FeatureStore:
        """Reads a folder that `extract_features` finished writing.

        Raises:
            CheckpointError: The folder has no index, or the index or a shard is missing or damaged.
        """
        return cls(*read_shards(Path(folder)))

    def __getitem__(self, point: str) -> Tensor:
        if point not in self._features:
            raise unknown("tap", str(point), self.points, "store.points lists what was extracted.")
        parts = self._features[point]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        dims = ", ".join(f"{p}: {self._features[p][0].shape[1]}" for p in self.points)
        return f"FeatureStore({len(self)} samples; {dims})"


def gap(x: Tensor) -> Tensor:
    """Vectors `(B, C)`: the mean over the positions of maps and tokens.

    Args:
        x: Maps `(B, C, H, W)`, or `(B, H, W, C)` where they are square and can be told; tokens
            `(B, N, C)`, of which special ones count like the others; vectors `(B, C)`.

    >>> gap(torch.ones(2, 8, 7, 7)).shape, gap(torch.ones(2, 7, 7, 8)).shape
    (torch.Size([2, 8]), torch.Size([2, 8]))
    """
    if x.ndim == 3:
        return x.mean(dim=1)
    if x.ndim == 4 and x.shape[1] == x.shape[2] != x.shape[3]:  # channels last, as in Swin
        return x.mean(dim=(1, 2))
    return x.flatten(2).mean(dim=2) if x.ndim > 3 else x.reshape(len(x), -1)


def extract_features(
    model: nn.Module,
    loader: Iterable[Any],
    at: Sequence[str],
    out: str | Path | None = None,
    *,
    pool: Pool = gap,
    transform: Callable[[Tensor], Tensor] | None = None,
    shard_size: int = 16384,
    show_progress: bool = False,
) -> FeatureStore:
    """Runs a model over a loader once and keeps what the taps see.

    Args:
        model: Any module; it runs in eval mode without autograd, and is left in the mode it had.
        loader: Yields `(images, labels, ...)`.
        at: Points, see `headplug.taps.points`; a glob stands for all that it matches.
        out: A folder to write to; left out, the store is in memory.
        pool: Makes vectors `(B, D)` of what a tap gives; by default the mean over positions.
        transform: Applied to each batch on the model's device, e.g. a normalisation.
        shard_size: Samples per file.
        show_progress: Whether to show a progress bar.

    Returns:
        The store, float32, samples in the order of the loader, taps in depth order.

    Raises:
        UnknownNameError: A point matches nothing.
        SlotError: `pre_projection` or `projection` of a model without one projection head.
        TapError: A point was not reached.
        DataError: The loader is empty or does not yield images and labels; or a tap, or `pool`,
            gives something else than a row per image.
        RunError: `out` holds a store already, or cannot be written.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    >>> batches = [(torch.rand(5, 4), torch.arange(5)), (torch.rand(3, 4), torch.arange(3))]
    >>> extract_features(model, batches, at=["0", "1"])
    FeatureStore(8 samples; 0: 8, 1: 8)
    """
    layout = Layout(model)
    points = flat(layout.resolve([at] if isinstance(at, str) else list(at)))
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    writer = Writer(None if out is None else Path(out), shard_size)
    total = length_hint(loader) or None
    with evaluating(model), progress("features", total, show=show_progress) as advance:
        for batch in loader:
            images, labels = _checked(batch)
            x = images.to(device, non_blocking=True)
            found = read(layout, points, x if transform is None else transform(x))
            writer.add({p: _vectors(p, v, pool, len(labels)) for p, v in found.items()}, labels)
            advance("")
    return FeatureStore(*writer.finish())


def _checked(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch."""
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise DataError(
            f"the loader must yield (images, labels), not a {type(batch).__name__}; wrap it."
        )
    images, labels = batch[0], _labels(batch[1])
    if not isinstance(images, Tensor):
        raise DataError(
            f"the loader must yield a tensor of images first, not a {type(images).__name__}; use a "
            "transform that gives one view of an image."
        )
    if len(images) != len(labels):
        raise DataError(f"the loader yields {len(images)} images with {len(labels)} labels.")
    return images, labels


def _vectors(point: str, value: Any, pool: Pool, count: int) -> Tensor:
    if not isinstance(value, Tensor):
        raise DataError(
            f"{point!r} gives a {type(value).__name__}, not a tensor; tap a module inside it "
            "instead."
        )
    if value.shape[:1] != (count,):
        raise DataError(
            f"{point!r} gives shape {tuple(value.shape)} for {count} images; only what has a row "
            "per image can be kept. Tap a module outside it instead."
        )
    vectors = pool(value)
    if not isinstance(vectors, Tensor) or vectors.ndim != 2 or len(vectors) != count:
        shape = tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
        raise DataError(
            f"pool made {shape} of {tuple(value.shape)} at {point!r}; it must give ({count}, D)."
        )
    return vectors.float().cpu()


def _labels(labels: Any) -> Tensor:
    found = _tensor("the labels", labels)
    if found.ndim != 1 or found.is_floating_point() or found.is_complex():
        kind = str(found.dtype).removeprefix("torch.")
        raise DataError(
            f"labels must be integers (N,), not {kind} {tuple(found.shape)}; convert them first."
        )
    return found.long().cpu()


def _tensor(what: str, values: Any) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{what} cannot be made a tensor: {error}.") from None
