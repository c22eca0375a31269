"""Reading the points of a model while a block runs."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from headplug.errors import TapError
from headplug.taps.points import Point
from headplug.taps.recorder import Listener, listening

Keep = Callable[[int, Any], None]


class Reached(BaseException):
    """Ends a forward pass that has gone far enough; no model catches it."""


class ReachedCompiled(Exception):  # noqa: N818 - not an error
    """The same in compiled code, where torch.compile knows only such exceptions."""


class Block:
    """Hands what points give to `keep(number, value)`.

    Args:
        points: What to read.
        keep: What to do with it; the number is that of the point.

    Attributes:
        needs: How many calls each point takes, if the forward pass is to end after them.
    """

    def __init__(self, points: Sequence[Point], keep: Keep) -> None:
        self.points = points
        self.keep = keep
        self.thread = threading.get_ident()
        self.needs: list[int] = []
        self.start()

    def start(self) -> None:
        """Counts anew."""
        self._left = list(self.needs)
        self._unread = len(self.needs)

    def is_last(self, number: int) -> bool:
        """Whether the call that is being read at a point is the last one needed at all."""
        return self._unread == 1 and self._left[number] == 1

    def count(self, number: int) -> None:
        """Ends the forward pass if this call was the last one needed."""
        if self.needs:
            self._left[number] -= 1
            if self._left[number] == 0:
                self._unread -= 1
            if self._unread == 0:
                raise ReachedCompiled if torch.compiler.is_compiling() else Reached

    @contextmanager
    def open(self) -> Iterator[None]:
        """Reads while the block runs; calls that come last may be handed over at its end."""
        listeners: dict[Any, list[Listener]] = {}
        for number, point in enumerate(self.points):
            listeners.setdefault(point.module, []).append(_Reading(self, number, point))
        try:
            with listening(listeners):
                yield
        finally:
            self.keep = _ignore  # what it fed may be forgotten


class _Reading:
    """One point of a block."""

    def __init__(self, block: Block, number: int, point: Point) -> None:
        self.takes_input = point.takes_input
        self.only_last = point.how.calls == "last"
        self.thread = block.thread
        self._block = block
        self._number = number
        self._point = point

    def hear(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, live: bool) -> None:
        """Takes a call of the point's module."""
        point = self._point
        if point.takes_input:
            out = _received(point, args, kwargs)
        elif point.key is not None:
            out = _part(point, out)
        self._block.keep(self._number, out)
        if live:
            self._block.count(self._number)


def _received(point: Point, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An argument of a call; by default the first."""
    given: dict[Any, Any] = dict(enumerate([*args, *kwargs.values()]))
    key = point.key or 0
    if isinstance(key, str):
        signature = inspect.signature(type(point.module).forward)
        given = {**signature.bind(point.module, *args, **kwargs).arguments, **kwargs}
        del given[next(iter(signature.parameters))]
    elif key < 0:
        key += len(given)
    if point.key is None:
        return given.get(0)
    if key not in given:
        raise TapError(f"{point.name!r}: the call has only {', '.join(map(str, given))}.")
    return given[key]


def _part(point: Point, value: Any) -> Any:
    """A part of a tuple, list, mapping or object that a module returns."""
    key: Any = point.key
    kind = type(value).__name__
    if isinstance(value, Mapping):
        for name in (key, str(key)):
            if name in value:
                return value[name]
        keys = list(value.values()) if isinstance(key, int) else []  # by place, as in HuggingFace's
        if keys and -len(keys) <= key < len(keys):
            return keys[key]
        there = f"a {kind} with {', '.join(map(repr, value))}"
    elif isinstance(key, str) and hasattr(value, key) and not isinstance(value, Tensor):
        return getattr(value, key)
    elif isinstance(value, Sequence):
        if isinstance(key, int) and -len(value) <= key < len(value):
            return value[key]
        there = f"a {kind} of {len(value)}"
    else:
        there = f"a {kind}, which has no such part"
    raise TapError(f"{point.name!r}: {point.path} returns {there}.")


def _ignore(number: int, value: Any) -> None:
    pass
