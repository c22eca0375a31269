"""The files of a feature store.

A store is a folder of safetensors shards and an index that is written last, so that an unfinished
store is never read. A shard alone tells what it belongs to and whether it is whole: its metadata
hold the fingerprint of the extraction and a checksum of each tensor. Same features, same bytes.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headplug.errors import CheckpointError, RunError
from headplug.files import atomic
from headplug.store.fingerprint import Fingerprint

INDEX = "store.json"
SCHEMA = 2
LABELS, IDS, NAMES = ":labels", ":ids", ":names"  # no tap can be called so
AGAIN = "Run the same extraction again: it recomputes only what is damaged or missing."


class Shard:
    """One file, of which nothing is read but its header until a tensor is asked for.

    Args:
        path: The file.

    Attributes:
        fingerprint: Of the extraction that wrote it.
        points: Its taps.
        shapes: Shape of each tensor; the first number is the shard's samples.

    Raises:
        CheckpointError: It is missing, truncated, or its header is damaged.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self.path = path
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["headplug"])
                self.shapes = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
            body = {k: v for k, v in about.items() if k != "check"}
            if about["check"] != _crc(json.dumps(body).encode()):
                raise ValueError("its header is damaged")
            self.fingerprint: Fingerprint = about["fingerprint"]
            self.points: list[str] = about["points"]
            self._sums: dict[str, int] = about["crc32"]
            if self._sums.keys() != self.shapes.keys():
                raise ValueError("its header is damaged")
        except Exception as error:  # safetensors and json have types of their own
            raise self._damaged(error) from None
        self._checked: set[str] = set()

    def tensor(self, name: str) -> Tensor:
        """A tensor, mapped into memory; compared with its checksum when it is first read.

        Raises:
            CheckpointError: The shard is missing or damaged.
        """
        from safetensors import safe_open

        try:
            with safe_open(self.path, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except Exception as error:
            raise self._damaged(error) from None
        if name not in self._checked:
            if _crc(_bytes(tensor)) != self._sums[name]:
                raise self._damaged(f"the checksum of {name.lstrip(':')!r} differs")
            self._checked.add(name)
        return tensor

    def verify(self) -> None:
        """Compares all tensors with their checksums.

        Raises:
            CheckpointError: One differs.
        """
        for name in self.shapes:
            self.tensor(name)

    def _damaged(self, why: object) -> CheckpointError:
        return CheckpointError(f"the shard {self.path} is missing or damaged ({why}). {AGAIN}")


def write_shard(path: Path, tensors: Mapping[str, Tensor], fingerprint: Fingerprint) -> None:
    """Writes a shard, whole or not at all, and returns when the disk has it.

    Raises:
        RunError: It cannot be written.
    """
    from safetensors.torch import save_file

    about: dict[str, Any] = {
        "fingerprint": fingerprint,
        "points": [name for name in tensors if name not in (LABELS, IDS, NAMES)],
        "crc32": {k: _crc(_bytes(v)) for k, v in tensors.items()},
    }
    about["check"] = _crc(json.dumps(about).encode())
    with atomic(path) as partial:
        # one entry, because safetensors writes several in an order that changes
        save_file(dict(tensors), partial, metadata={"headplug": json.dumps(about)})
        _to_disk(partial)


def write_index(folder: Path, shards: Sequence[Shard], fingerprint: Fingerprint) -> None:
    """Writes the index of a finished store.

    Args:
        folder: Of the store.
        shards: All of them.
        fingerprint: Of the extraction.

    Raises:
        RunError: It cannot be written.
    """
    index = {
        "schema": SCHEMA,
        "points": shards[0].points,
        "fingerprint": fingerprint,
        "shards": [{"file": s.path.name, "bytes": s.path.stat().st_size} for s in shards],
    }
    with atomic(folder / INDEX) as partial:
        partial.write_text(json.dumps(index, indent=1) + "\n", "utf-8")
        _to_disk(partial)


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a store.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{folder} holds no finished feature store (no {INDEX}). Run the same extraction again "
            "to finish it."
        )
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text("utf-8"))
        if index["schema"] == SCHEMA and index["points"] and index["shards"]:
            return index
        reason = f"its schema is {index['schema']}, and {SCHEMA} can be read"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise CheckpointError(
        f"{folder / INDEX} cannot be used ({reason}). Run the same extraction again to write it "
        "anew."
    )


def read_store(folder: Path) -> list[Shard]:
    """The shards of a finished store; all of them are there and have their size.

    Raises:
        CheckpointError: There is no finished store, or shards are missing, truncated or another
            store's; the message names them.
    """
    index = read_index(folder)
    shards, damaged = [], []
    for entry in index["shards"]:
        path = folder / entry["file"]
        try:
            shard = Shard(path)
            if shard.fingerprint != index["fingerprint"]:
                raise shard._damaged("it belongs to another store")
            if (size := path.stat().st_size) != entry["bytes"]:
                raise shard._damaged(f"it has {size} bytes, not {entry['bytes']}")
            for name in {IDS, NAMES, LABELS} & shard.shapes.keys():  # read at once anyway
                shard.tensor(name)
            shards.append(shard)
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointError("\n".join(damaged))
    return shards


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard is."""
    return folder / f"shard-{number:05d}.safetensors"


def shard_number(name: str) -> int | None:
    """Which shard a file is; None if it is none."""
    match = re.fullmatch(r"shard-(\d{5,})\.safetensors", name)
    return int(match[1]) if match else None


def prepare(folder: Path) -> None:
    """Makes the folder, finds out whether it can be written to, and removes what a kill left.

    Raises:
        RunError: It cannot be written to.
    """
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        for pattern in (".shard-*.partial", f".{INDEX}.*.partial", ".tmp??????"):  # safetensors'
            for partial in folder.glob(pattern):
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error}. Choose another folder.") from None


def _crc(content: Any) -> int:
    return zlib.crc32(content)


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _to_disk(path: Path) -> None:
    """A rename that outlives a power cut must not be of bytes that did not."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
