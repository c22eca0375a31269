"""The files of a feature store.

A store is a folder of safetensors shards, written as samples come, and an index that is written
last, so that an unfinished store is never read. Reading maps the shards into memory.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headplug.errors import CheckpointError, DataError, RunError
from headplug.files import atomic

INDEX = "store.json"
SCHEMA = 1
LABELS = ":labels"  # no tap can be called so
Parts = dict[str, list[Tensor]]


class Writer:
    """Gathers batches and writes a shard whenever enough have come.

    Args:
        folder: Where to write; None keeps all in memory.
        shard_size: Samples per shard.

    Raises:
        RunError: The folder holds a finished store, or cannot be written.
    """

    def __init__(self, folder: Path | None, shard_size: int) -> None:
        if folder is not None:
            _check(folder)
        self.folder = folder
        self.shard_size = shard_size
        self.features: Parts = {}
        self.labels: list[Tensor] = []
        self.shards: list[str] = []

    def add(self, features: Mapping[str, Tensor], labels: Tensor) -> None:
        """Takes one batch: features `(B, D)` by tap, and labels `(B,)`."""
        for point, values in features.items():
            self.features.setdefault(point, []).append(values)
        self.labels.append(labels)
        if self.folder and sum(map(len, self.labels)) >= self.shard_size:
            self._flush(self.folder)

    def finish(self) -> tuple[Parts, Tensor]:
        """Writes what is left and the index.

        Returns:
            The parts of each tap's features, and the labels.

        Raises:
            DataError: No batch came.
            RunError: The folder cannot be written.
        """
        if not self.features:
            raise DataError("the loader is empty: there is nothing to extract.")
        if self.folder is None:
            joined = {point: [torch.cat(parts)] for point, parts in self.features.items()}
            return joined, torch.cat(self.labels)
        if self.labels:
            self._flush(self.folder)
        index = {"schema": SCHEMA, "points": list(self.features), "shards": self.shards}
        with atomic(self.folder / INDEX) as partial:
            partial.write_text(json.dumps(index))
        return read_shards(self.folder)

    def _flush(self, folder: Path) -> None:
        from safetensors.torch import save_file

        tensors = {point: torch.cat(parts) for point, parts in self.features.items()}
        name = f"shard-{len(self.shards):05d}.safetensors"
        with atomic(folder / name) as partial:
            save_file({**tensors, LABELS: torch.cat(self.labels)}, partial)
        self.shards.append(name)
        self.features = {point: [] for point in self.features}
        self.labels = []


def read_shards(folder: Path) -> tuple[Parts, Tensor]:
    """The parts of each tap's features, mapped into memory, and the labels.

    Raises:
        CheckpointError: The folder has no index, or the index or a shard is missing or damaged.
    """
    from safetensors import safe_open

    index = _read_index(folder)
    parts: Parts = {key: [] for key in (*index["points"], LABELS)}
    for name in index["shards"]:
        try:
            with safe_open(folder / name, "pt") as shard:
                for key, tensors in parts.items():
                    tensors.append(shard.get_tensor(key))
        except Exception as error:
            raise CheckpointError(
                f"the shard {folder / name} is missing or damaged ({error}); delete {folder} and "
                "extract again."
            ) from None
    labels = torch.cat(parts.pop(LABELS))
    return parts, labels


def _read_index(folder: Path) -> dict[str, Any]:
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} holds no finished feature store (no {INDEX}); extract again."
        )
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text())
        if index["schema"] == SCHEMA and index["points"] and index["shards"]:
            return index
        reason = f"its schema is {index['schema']}, and {SCHEMA} can be read"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise CheckpointError(f"{folder / INDEX} cannot be used ({reason}); extract again.")


def _check(folder: Path) -> None:
    """Finds out before the work whether its result can be written."""
    if (folder / INDEX).exists():
        raise RunError(
            f"{folder} holds a finished feature store; read it with FeatureStore.open(), or name "
            "another folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error}. Choose another folder.") from None
