"""The shards of a feature store: safetensors files.

A shard alone tells what it belongs to and whether it is whole: its metadata hold the fingerprint of
the extraction and a checksum of each tensor. Same features, same bytes.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from headplug.errors import CheckpointError
from headplug.files import atomic
from headplug.store.blocks import NAMES, RESERVED, Block
from headplug.store.fingerprint import Fingerprint

T = TypeVar("T")
AGAIN = "Run the same extraction again: it recomputes only what is damaged or missing."


class DamagedError(CheckpointError):
    """Shards that are missing or damaged; its argument says which and why."""

    def __str__(self) -> str:
        """With what to do."""
        return f"{self.args[0]} {AGAIN}"


def damage(use: Callable[[T], object], items: Iterable[T]) -> str:
    """Uses items in turn; a line for each that is damaged."""
    found = []
    for item in items:
        try:
            use(item)
        except DamagedError as error:
            found.append(error.args[0])
    return "\n".join(found)


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
        DamagedError: It is missing, truncated, another shard's copy, or its header is.
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
            if not is_checked(about) or self._sums.keys() != self.shapes.keys():
                raise ValueError("its header is damaged")
            if counts != {self.samples} or about["shard"] != shard_number(path.name):
                raise ValueError(f"it is a copy of shard {about['shard']}")
        except Exception as error:  # safetensors and json have types of their own
            raise self.damaged(error) from None
        self._checked: set[str] = set()

    def tensor(self, name: str) -> Tensor:
        """A tensor, mapped into memory; compared with its checksum when it is first read.

        Raises:
            DamagedError: The shard is.
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

    def damaged(self, why: object) -> DamagedError:
        """The error that names the file."""
        return DamagedError(f"the shard {self.path} is missing or damaged ({why}).")


def read_all(block: Block) -> None:
    """Reads every tensor of a block, which compares those of a shard with their checksums.

    Raises:
        DamagedError: One differs.
    """
    for name in block.shapes:
        block.tensor(name)


def write_shard(path: Path, tensors: Mapping[str, Tensor], fingerprint: Fingerprint) -> None:
    """Writes a shard, whole or not at all, and returns when the disk has it.

    Raises:
        RunError: It cannot be written.
    """
    from safetensors.torch import save_file

    points = [name for name in tensors if name not in RESERVED]
    about = with_check(
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
        to_disk(partial)


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard is."""
    return folder / f"shard-{number:05d}.safetensors"


def shard_number(name: str) -> int | None:
    """Which shard a file is; None if it is none."""
    match = re.fullmatch(r"shard-(\d{5,})\.safetensors", name)
    return int(match[1]) if match else None


def with_check(about: dict[str, Any]) -> dict[str, Any]:
    """What a file tells of itself, with a checksum of that."""
    return {**about, "check": _crc(json.dumps(about).encode())}


def is_checked(about: dict[str, Any]) -> bool:
    """Whether that checksum is right."""
    return about == with_check({k: v for k, v in about.items() if k != "check"})


def _crc(content: Any) -> int:
    return zlib.crc32(content)


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def to_disk(path: Path) -> None:
    """Waits for the disk: a rename that outlives a power cut must not be of bytes that did not."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
