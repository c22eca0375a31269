"""Hooks that are on for the span of a block and that other threads, copies and compilers respect.

A hook sees the calls of the thread that placed it, and none of a backward pass. A copy of a hooked
model has hooks that do nothing. Code that torch.compile made before runs eagerly meanwhile, because
it would skip them silently.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from headplug.taps.points import Layout, Point

Keep = Callable[[Point, Any], None]


@contextmanager
def hooks(layout: Layout, points: Iterable[Point], keep: Keep) -> Iterator[None]:
    """Calls `keep(point, value)` whenever a point is reached while the block runs.

    Args:
        layout: Of the model that will run.
        points: Where to place hooks, in this order.
        keep: What to do with what is read; it may raise to end the forward pass.
    """
    with ExitStack() as stack:
        if layout.compiled:
            stack.enter_context(_EAGERLY)
        for point in points:
            hook = _Hook(point, keep)
            if point.takes_input:
                handle = point.module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                handle = point.module.register_forward_hook(hook)
            stack.callback(handle.remove)
        yield


class _Hook:
    """Hands what one module receives or returns to `keep`."""

    def __init__(self, point: Point, keep: Keep) -> None:
        self.point = point
        self.keep = keep
        self.thread = threading.get_ident()

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], last: Any) -> None:
        """Called with the module's output last, or before it with its keyword arguments."""
        backward = torch._C._current_graph_task_id() != -1  # activation checkpointing runs it again
        if backward or threading.get_ident() != self.thread:
            return
        if self.point.takes_input:
            last = args[0] if args else next(iter(last.values()), None)
        self.keep(self.point, last)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Spent, ()  # what deepcopy and pickle make of it


class _Spent:
    """The hook in a copy of a tapped model: it does nothing and holds nothing."""

    def __call__(self, *_: Any) -> None:
        pass


class _Eagerly:
    """Runs compiled code eagerly as long as a block is open, in whatever thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.blocks = 0

    def __enter__(self) -> None:
        with self.lock:
            if not self.blocks:
                self.stance = torch.compiler.set_stance("force_eager")
            self.blocks += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.blocks -= 1
            if not self.blocks:
                self.stance.__exit__(None, None, None)


_EAGERLY = _Eagerly()
