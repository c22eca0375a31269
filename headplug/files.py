"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from headplug.errors import CheckpointError, RunError


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Gives a temporary name beside `path` to write to, and renames it when the block succeeds.

    Raises:
        RunError: The folder cannot be written, or the disk is full.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors lets only its owner read what it writes
        os.replace(partial, path)
    except Exception as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if _is_write_failure(error):
            reason = "the disk is full" if "inline_container" in str(error) else error
            raise RunError(
                f"cannot write {path}: {reason}. Free space or choose another folder."
            ) from error
        raise
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all.

    Raises:
        RunError: It cannot be written.
    """
    with atomic(path) as partial:
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")


def load_tensors(path: str | Path) -> dict[str, Any]:
    """What headplug itself saved with `torch.save`, read without unpickling.

    Raises:
        CheckpointError: The file is damaged.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}); delete it.") from error
    return content


def _is_write_failure(error: Exception) -> bool:
    # torch and safetensors wrap the operating system's errors in types of their own
    wrapped = type(error).__name__ in ("SafetensorError", "RuntimeError")
    signs = (
        "No space left", "os error", "write failed", "Parent directory", "Read-only",
        "inline_container", "iostream",  # what torch.save says when the disk is full
    )  # fmt: skip
    return isinstance(error, OSError) or (wrapped and any(s in str(error) for s in signs))
