"""What several processes of torch.distributed that share a piece of work must tell each other.

Only picklable objects travel, through a gloo group of its own, so that it works beside NCCL and
never mixes with the collective calls of a training loop. Work that fails on one process ends with
an error on all of them: none is left waiting.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from headplug.errors import RunError

T = TypeVar("T")
PATIENCE = timedelta(days=1)
"""How long a process waits for another one that still works and has not failed."""
MEETING = timedelta(minutes=10)
"""How long it waits for the others to begin."""


class Team:
    """The processes that share the work; one alone by default.

    Args:
        group: Of gloo, if there are several.

    Attributes:
        rank: Which of them this one is.
        size: How many there are.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank = dist.get_rank(group) if group else 0
        self.size = dist.get_world_size(group) if group else 1

    def each(self, work: Callable[[], T]) -> list[T]:
        """What the work gives on every process, by rank.

        Raises:
            RunError: It failed on another process, or that process has ended.
            Exception: Whatever it raised on this one.
        """
        if not self._group:
            return [work()]
        own: Exception | None = None
        result: Any = None
        try:
            result = work()
        except Exception as error:
            own = error
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, (result, own and _said(own)), group=self._group)
        except RuntimeError as error:
            if own is None:
                raise RunError(
                    f"another of the {self.size} processes has ended ({_said(error)}). Its own "
                    "output says why; then run the same again."
                ) from error
        if own is not None:
            raise own
        failed = [(rank, why) for rank, (_, why) in enumerate(found) if why]
        if failed:
            raise RunError(f"process {failed[0][0]} of {self.size} failed: {failed[0][1]}")
        return [value for value, _ in found]

    def own(self, work: Callable[[], T]) -> T:
        """What the work gives on this process, once it has succeeded on all.

        Raises:
            RunError: It failed on another process.
        """
        kept: list[T] = []
        self.each(lambda: kept.append(work()))
        return kept[0]

    def first(self, work: Callable[[], T]) -> T:
        """What the work gives on the first process, for all of them.

        Raises:
            RunError: It failed there.
        """
        return self.each(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]


@contextmanager
def team(distributed: bool = True) -> Iterator[Team]:
    """The processes of torch.distributed, where it is initialised; else, or if asked, one alone.

    Raises:
        RunError: A launcher started several processes, but torch.distributed is not initialised.
    """
    if not distributed:
        yield Team()
        return
    if not (dist.is_available() and dist.is_initialized()):
        started = int(os.environ.get("WORLD_SIZE") or 1)
        if started > 1:
            raise RunError(
                f"WORLD_SIZE says that {started} processes were started, but they do not know each "
                "other and would all do the same work. Call "
                "torch.distributed.init_process_group('gloo') first to share it, or pass "
                "distributed=False in the one process that is to do it."
            )
        yield Team()
        return
    if dist.get_world_size() == 1:
        yield Team()
        return
    try:
        meeting = dist.new_group(backend="gloo", timeout=MEETING)
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
    except RuntimeError as error:
        raise RunError(
            f"the other processes do not take part ({_said(error)}). Make the call on "
            "every one of them, or pass distributed=False where one alone calls it."
        ) from error
    try:
        yield Team(group)
    finally:
        dist.destroy_process_group(group)
        dist.destroy_process_group(meeting)


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
