"""What an earlier extraction left in a folder, and whether it is the one that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from headplug.errors import CheckpointError, RunError
from headplug.store.fingerprint import Fingerprint, differences
from headplug.store.shards import AGAIN, Shard, read_index, read_store, shard_number


class Left(NamedTuple):
    """What there is.

    Attributes:
        whole: Numbers of the shards that need no more work.
        damaged: Why others have to be made anew.
        finished: Whether nothing is left to do.
    """

    whole: set[int]
    damaged: list[str]
    finished: bool


def look(folder: Path, fingerprint: Fingerprint) -> Left:
    """Compares what is in a folder with what is asked for, and reads every byte of it.

    Args:
        folder: Of the store.
        fingerprint: Of the extraction that is asked for.

    Raises:
        RunError: The folder holds another extraction; the message says what differs.
    """
    shards: dict[int, Shard] = {}
    damaged: list[str] = []
    for path in sorted(folder.glob("shard-*.safetensors")):
        if (number := shard_number(path.name)) is not None:
            try:
                shards[number] = Shard(path)
            except CheckpointError as error:
                damaged.append(str(error))
    listed: list[str] | None = None
    try:
        index = read_index(folder)
        _same(index["fingerprint"], fingerprint, folder)
        listed = [entry["file"] for entry in index["shards"]]
    except CheckpointError:  # not finished, or the index has to be written anew
        for shard in shards.values():
            _same(shard.fingerprint, fingerprint, shard.path)
    for number, shard in list(shards.items()):
        try:
            if shard.fingerprint != fingerprint:
                raise shard.damaged("it belongs to another store")
            shard.verify()
        except CheckpointError as error:
            damaged.append(str(error))
            del shards[number]
    missing = [name for name in listed or [] if not (folder / name).exists()]
    damaged += [f"the shard {folder / name} is missing. {AGAIN}" for name in missing]
    return Left(set(shards), damaged, listed is not None and not damaged and _opens(folder))


def _opens(folder: Path) -> bool:
    try:
        read_store(folder)
    except CheckpointError:
        return False
    return True


def _same(there: Fingerprint, here: Fingerprint, where: Path) -> None:
    if unlike := differences(there, here):
        random = ""
        if there.get("data") != here["data"]:
            random = (
                " A data set that draws random numbers, e.g. for crops, gives other samples each "
                "time: take a transform without them."
            )
        raise RunError(
            f"{where} holds the features of another extraction: {' and '.join(unlike)} "
            f"{'differ' if len(unlike) > 1 else 'changed'}. Name another folder with out=..., ask "
            f"for the same again, or delete it.{random}"
        )
