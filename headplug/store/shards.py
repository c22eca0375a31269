"""The files of a feature store.

A store is a folder of safetensors shards and an index that is written last, so that an unfinished
store is never read. A shard alone tells what it belongs to and whether it is whole: its metadata
hold the fingerprint of the extraction and a checksum of each tensor. Same features, same bytes.
"""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headplug.errors import CheckpointError, RunError
from headplug.files import atomic
from headplug.store.fingerprint import Fingerprint

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

INDEX = "store.json"
SCHEMA = 3
LABELS, IDS, NAMES = ":labels", ":ids", ":names"  # no tap can be called so
GRACE = 10.0  # seconds that the loader's workers may outlive a killed process, and its lock
AGAIN = "Run the same extraction again: it recomputes only what is damaged or missing."


class Shard:
    """One file, of which nothing is read but its header until a tensor is asked for.

    Args:
        path: The file.

    Attributes:
        fingerprint: Of the extraction that wrote it.
        points: Its taps.
        shapes: Shape of each tensor; the first number is the shard's samples.
        samples: How many it holds.

    Raises:
        CheckpointError: It is missing, truncated, another shard's copy, or its header is damaged.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self.path = path
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["headplug"])
                self.shapes = {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
            counts = {shape[0] for name, shape in self.shapes.items() if name != NAMES}
            self.fingerprint: Fingerprint = about["fingerprint"]
            self.points: list[str] = about["points"]
            self.samples: int = about["samples"]
            self._sums: dict[str, int] = about["crc32"]
            if not _checked(about) or self._sums.keys() != self.shapes.keys():
                raise ValueError("its header is damaged")
            if counts != {self.samples} or about["shard"] != shard_number(path.name):
                raise ValueError(f"it is a copy of shard {about['shard']}")
        except Exception as error:  # safetensors and json have types of their own
            raise self.damaged(error) from None
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
            raise self.damaged(error) from None
        if name not in self._checked:
            if _crc(_bytes(tensor)) != self._sums[name]:
                raise self.damaged(f"the checksum of {name.lstrip(':')!r} differs")
            self._checked.add(name)
        return tensor

    def verify(self) -> None:
        """Compares all tensors with their checksums.

        Raises:
            CheckpointError: One differs.
        """
        for name in self.shapes:
            self.tensor(name)

    def damaged(self, why: object) -> CheckpointError:
        """The error that names the file."""
        return CheckpointError(f"the shard {self.path} is missing or damaged ({why}). {AGAIN}")


def write_shard(path: Path, tensors: Mapping[str, Tensor], fingerprint: Fingerprint) -> None:
    """Writes a shard, whole or not at all, and returns when the disk has it.

    Raises:
        RunError: It cannot be written.
    """
    from safetensors.torch import save_file

    points = [name for name in tensors if name not in (LABELS, IDS, NAMES)]
    about = _with_check(
        {
            "fingerprint": fingerprint,
            "shard": shard_number(path.name),
            "points": points,
            "samples": len(tensors[points[0]]),
            "crc32": {k: _crc(_bytes(v)) for k, v in tensors.items()},
        }
    )
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
    files = [
        {"file": s.path.name, "bytes": s.path.stat().st_size, "samples": s.samples} for s in shards
    ]
    index = _with_check(
        {
            "schema": SCHEMA,
            "points": shards[0].points,
            "fingerprint": fingerprint,
            "shards": files,
        }
    )
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
        reason = f"its schema is {index['schema']}, and {SCHEMA} can be read"
        if index["schema"] == SCHEMA:
            if _checked(index):
                return index
            reason = "its checksum differs"
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
                raise shard.damaged("it belongs to another store")
            found = {"bytes": path.stat().st_size, "samples": shard.samples}
            if unlike := [f"{v} {k}, not {entry[k]}" for k, v in found.items() if v != entry[k]]:
                raise shard.damaged(f"it has {unlike[0]}")
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
    """Makes the folder, and finds out whether it can be written to.

    Raises:
        RunError: It cannot be written to.
    """
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error}. Choose another folder.") from None


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keeps others from writing to a folder for the block, and removes what a kill left there.

    Raises:
        RunError: Another process is writing there, or it cannot be written to.
    """
    prepare(folder)
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if handle is not None:
            _lock(handle, folder)
        for pattern in (".shard-*.partial", f".{INDEX}.*.partial", ".tmp??????"):  # safetensors'
            for partial in folder.glob(pattern):
                partial.unlink(missing_ok=True)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    until = time.monotonic() + GRACE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise RunError(
                    f"another process is writing to {folder}. Wait until it is done, or name "
                    "another folder with out=..."
                ) from None
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return


def _with_check(about: dict[str, Any]) -> dict[str, Any]:
    return {**about, "check": _crc(json.dumps(about).encode())}


def _checked(about: dict[str, Any]) -> bool:
    return about == _with_check({k: v for k, v in about.items() if k != "check"})


def _crc(content: Any) -> int:
    return zlib.crc32(content)


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _to_disk(path: Path) -> None:
    """A rename that outlives a power cut must not be of bytes that did not."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
