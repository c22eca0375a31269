"""The folder of a feature store: shards, and an index.

The index is written last, so that an unfinished store is never read. What an earlier extraction
left is gone on with only if it is the one that is asked for.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from headplug.errors import CheckpointError, RunError
from headplug.files import atomic
from headplug.store.blocks import IDS, LABELS, NAMES
from headplug.store.fingerprint import WORDS, Fingerprint, differences
from headplug.store.shards import (
    DamagedError,
    Shard,
    damage,
    is_checked,
    read_all,
    shard_number,
    shard_path,
    to_disk,
    with_check,
)

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

INDEX = "store.json"
SCHEMA = 3
GRACE = 10.0  # seconds that the loader's workers may outlive a killed process, and its lock


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
    index = with_check(
        {
            "schema": SCHEMA,
            "points": shards[0].points,
            "fingerprint": fingerprint,
            "shards": files,
        }
    )
    with atomic(folder / INDEX) as partial:
        partial.write_text(json.dumps(index, indent=1) + "\n", "utf-8")
        to_disk(partial)


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a store.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    if not (folder / INDEX).is_file():
        inside = sorted(str(path.parent) for path in folder.glob(f"*/{INDEX}"))
        what = "Run the same extraction again to finish it."
        if inside or not folder.is_dir():
            what = f"There is one in {' and '.join(inside)}." if inside else "Check the path."
        raise CheckpointError(f"{folder} holds no finished feature store (no {INDEX}). {what}")
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text("utf-8"))
        reason = f"its schema is {index['schema']}, and {SCHEMA} can be read"
        if index["schema"] == SCHEMA:
            if is_checked(index):
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
    shards = []

    def take(entry: Mapping[str, Any]) -> None:
        path = folder / entry["file"]
        shard = Shard(path)
        if shard.fingerprint != index["fingerprint"]:
            raise shard.damaged("it belongs to another store")
        found = {"bytes": path.stat().st_size, "samples": shard.samples}
        if unlike := [f"{v} {k}, not {entry[k]}" for k, v in found.items() if v != entry[k]]:
            raise shard.damaged(f"it has {unlike[0]}")
        for name in {IDS, NAMES, LABELS} & shard.shapes.keys():  # read at once anyway
            shard.tensor(name)
        shards.append(shard)

    if found := damage(take, index["shards"]):
        raise DamagedError(found)
    return shards


class Left(NamedTuple):
    """What an earlier extraction left.

    Attributes:
        whole: Numbers of the shards that need no more work.
        damaged: A line for each that has to be made anew.
        finished: Whether nothing is left to do.
    """

    whole: set[int]
    damaged: str
    finished: bool


def look(folder: Path, fingerprint: Fingerprint) -> Left:
    """Compares what is in a folder with what is asked for, and reads every byte of it.

    Args:
        folder: Of the store.
        fingerprint: Of the extraction that is asked for.

    Raises:
        RunError: The folder holds another extraction; the message says what differs.
    """
    there = {n for p in folder.glob("shard-*") if (n := shard_number(p.name)) is not None}
    whole: set[int] = set()
    listed: set[int] = set()

    def take(number: int) -> None:
        shard = Shard(shard_path(folder, number))
        if shard.fingerprint != fingerprint:
            raise shard.damaged("it belongs to another store")
        read_all(shard)
        whole.add(number)

    try:
        index = read_index(folder)
        _same(index["fingerprint"], fingerprint, folder)
        listed = {n for e in index["shards"] if (n := shard_number(e["file"])) is not None}
    except CheckpointError:  # not finished, or the index has to be written anew
        for path in (shard_path(folder, number) for number in sorted(there)):
            with suppress(DamagedError):
                _same(Shard(path).fingerprint, fingerprint, path)
    damaged = damage(take, sorted(listed or there))  # others beside a finished store are not its
    return Left(whole, damaged, bool(listed) and not damaged and _opens(folder))


def _opens(folder: Path) -> bool:
    try:
        read_store(folder)
    except CheckpointError:
        return False
    return True


def _same(there: Fingerprint, here: Fingerprint, where: Path) -> None:
    if unlike := differences(there, here):
        random = ""
        if WORDS["data"] in unlike:
            random = (
                " A data set that draws random numbers, e.g. for crops, gives other samples each "
                "time: take a transform without them."
            )
        raise RunError(
            f"{where} holds the features of another extraction: {' and '.join(unlike)} "
            f"{'differ' if len(unlike) > 1 else 'changed'}. Name another folder (out, --out), ask "
            f"for the same again, or delete it.{random}"
        )


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
                    "another folder (out, --out)."
                ) from None
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return
