"""What an earlier extraction left in a folder, and whether it is the one that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from headplug.errors import CheckpointError, RunError
from headplug.store.fingerprint import Fingerprint, differences
from headplug.store.shards import AGAIN, Shard, read_index, shard_number


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
    prints = [shard.fingerprint for shard in shards.values()]
    listed: list[str] = []
    try:
        index = read_index(folder)
        prints.append(index["fingerprint"])
        listed = [entry["file"] for entry in index["shards"]]
    except CheckpointError:  # not finished, or the index has to be written anew
        pass
    for there in prints:
        if there != fingerprint:
            unlike = differences(there, fingerprint)
            raise RunError(
                f"{folder} holds the features of another extraction: {' and '.join(unlike)} "
                f"{'differ' if len(unlike) > 1 else 'is not the same'}. Name another folder with "
                "out=..., ask for the same again, or delete this one."
            )
    for number, shard in list(shards.items()):
        try:
            shard.verify()
        except CheckpointError as error:
            damaged.append(str(error))
            del shards[number]
    there_now = {shard.path.name for shard in shards.values()}
    missing = [n for n in listed if n not in there_now and not (folder / n).exists()]
    damaged += [f"the shard {folder / name} is missing. {AGAIN}" for name in missing]
    return Left(set(shards), damaged, bool(listed) and there_now >= set(listed))
