"""Features on disk or in memory, by tap.

A store on disk is a folder of safetensors shards, written as they come, and an index that is
written last; reading it maps the shards into memory. In memory it is the same thing without the
folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headplug.errors import CheckpointError, DataError, RunError, unknown
from headplug.files import atomic
from headplug.progress import progress
from headplug.taps import evaluating, features, resolve_points

INDEX = "store.json"
Pool = Callable[[Tensor], Tensor]


class FeatureStore:
    """Features `(N, D)` of several taps of the same N samples, with their labels.

    Attributes:
        points: The taps, in depth order.
        labels: `(N,)` integers.

    >>> h = torch.rand(6, 4)
    >>> store = FeatureStore.from_tensors({"pre_projection": h}, labels=torch.arange(6))
    >>> store["pre_projection"].shape, len(store)
    (torch.Size([6, 4]), 6)
    """

    def __init__(self, features: Mapping[str, Tensor], labels: Tensor) -> None:
        for point, values in features.items():
            if values.ndim != 2 or len(values) != len(labels):
                raise DataError(
                    f"the features at {point!r} have shape {tuple(values.shape)}; with "
                    f"{len(labels)} labels they must have shape ({len(labels)}, D)."
                )
        self._features = dict(features)
        self.points = list(features)
        self.labels = labels

    @classmethod
    def from_tensors(cls, features: Mapping[str, Any], labels: Any) -> FeatureStore:
        """A store of tensors or arrays that are already there.

        Raises:
            DataError: A tap is not `(N, D)`, or the number of labels differs.
        """
        return cls(
            {k: torch.as_tensor(v) for k, v in features.items()}, torch.as_tensor(labels).long()
        )

    @classmethod
    def open(cls, folder: str | Path) -> FeatureStore:
        """Reads a folder that `extract_features` finished writing.

        Raises:
            CheckpointError: The folder has no index, or a shard is missing or damaged.
        """
        from safetensors import safe_open

        folder = Path(folder)
        if not (folder / INDEX).is_file():
            raise CheckpointError(
                f"{folder} holds no finished feature store (no {INDEX}); extract again."
            )
        index = json.loads((folder / INDEX).read_text())
        parts: dict[str, list[Tensor]] = {k: [] for k in (*index["points"], "labels")}
        for name in index["shards"]:
            try:
                with safe_open(folder / name, "pt") as shard:
                    for key, tensors in parts.items():
                        tensors.append(shard.get_tensor(key))
            except Exception as error:
                raise CheckpointError(
                    f"the shard {folder / name} is missing or damaged: {error}"
                ) from None
        joined = {k: v[0] if len(v) == 1 else torch.cat(v) for k, v in parts.items()}
        labels = joined.pop("labels")
        return cls(joined, labels)

    def __getitem__(self, point: str) -> Tensor:
        if point not in self._features:
            raise unknown("tap", point, self.points, "store.points lists what was extracted.")
        return self._features[point]

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        dims = ", ".join(f"{p}: {self._features[p].shape[1]}" for p in self.points)
        return f"FeatureStore({len(self)} samples; {dims})"


def gap(x: Tensor) -> Tensor:
    """Vectors: the mean over positions of maps `(B, C, H, W)` and of tokens `(B, N, C)`."""
    if x.ndim == 4:
        return x.mean(dim=(2, 3))
    return x.mean(dim=1) if x.ndim == 3 else x.flatten(1)


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
        at: Points, see `headplug.taps`; a glob stands for all that it matches.
        out: A folder to write to; left out, the store is in memory.
        pool: Makes vectors `(B, D)` of what a tap gives; by default the mean over positions.
        transform: Applied to each batch on the model's device, e.g. a normalisation.
        shard_size: Samples per file.
        show_progress: Whether to show a progress bar.

    Returns:
        The store, float32, in the order of the loader.

    Raises:
        UnknownNameError: A point matches nothing.
        DataError: The loader is empty or yields no labels, or a tap gives no tensor.
        RunError: `out` holds a store already, or cannot be written.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    >>> batches = [(torch.rand(5, 4), torch.arange(5)), (torch.rand(3, 4), torch.arange(3))]
    >>> extract_features(model, batches, at=["0", "1"])
    FeatureStore(8 samples; 0: 8, 1: 8)
    """
    at = [at] if isinstance(at, str) else list(at)
    points = [p.name for ps in resolve_points(model, at).values() for p in ps]
    parameter = next((t for t in (*model.parameters(), *model.buffers())), torch.empty(0))
    writer = _Writer(points, None if out is None else Path(out), shard_size)
    total = len(loader) if isinstance(loader, Sized) else None
    with evaluating(model), progress("features", total, show=show_progress) as advance:
        for batch in loader:
            if not isinstance(batch, tuple | list) or len(batch) < 2:
                raise DataError(
                    f"the loader must yield (images, labels), not a {type(batch).__name__}; wrap "
                    "it."
                )
            x = batch[0].to(parameter.device, non_blocking=True)
            found = features(model, x if transform is None else transform(x), points)
            writer.add([_vectors(p, v, pool) for p, v in zip(points, found, strict=True)], batch[1])
            advance("")
    return writer.finish()


def _vectors(point: str, value: Any, pool: Pool) -> Tensor:
    if not isinstance(value, Tensor):
        raise DataError(
            f"{point!r} gives a {type(value).__name__}, not a tensor; tap a module inside it "
            "instead."
        )
    return pool(value).float().cpu()


class _Writer:
    """Gathers batches and writes a shard whenever enough have come."""

    def __init__(self, points: list[str], folder: Path | None, shard_size: int) -> None:
        if folder is not None and (folder / INDEX).exists():
            raise RunError(
                f"{folder} holds a finished feature store; read it with FeatureStore.open(), or "
                "name another folder."
            )
        self.points = points
        self.folder = folder
        self.shard_size = shard_size
        self.batches: list[list[Tensor]] = []
        self.shards: list[str] = []

    def add(self, values: list[Tensor], labels: Any) -> None:
        """Takes one batch."""
        self.batches.append([*values, torch.as_tensor(labels).long().cpu()])
        if self.folder and sum(len(b[-1]) for b in self.batches) >= self.shard_size:
            self._flush(self.folder)

    def finish(self) -> FeatureStore:
        """Writes the rest and the index, and opens the store."""
        if self.folder is None:
            return self._joined()
        if self.batches:
            self._flush(self.folder)
        if not self.shards:
            raise DataError("the loader is empty: there is nothing to extract.")
        with atomic(self.folder / INDEX) as partial:
            partial.write_text(
                json.dumps({"schema": 1, "points": self.points, "shards": self.shards})
            )
        return FeatureStore.open(self.folder)

    def _joined(self) -> FeatureStore:
        if not self.batches:
            raise DataError("the loader is empty: there is nothing to extract.")
        *values, labels = (torch.cat(parts) for parts in zip(*self.batches, strict=True))
        return FeatureStore(dict(zip(self.points, values, strict=True)), labels)

    def _flush(self, folder: Path) -> None:
        from safetensors.torch import save_file

        store = self._joined()
        name = f"shard-{len(self.shards):05d}.safetensors"
        tensors = {p: store[p].contiguous() for p in self.points}
        with atomic(folder / name) as partial:
            save_file({**tensors, "labels": store.labels}, partial)
        self.shards.append(name)
        self.batches = []
