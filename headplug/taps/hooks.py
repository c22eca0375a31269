"""Hooks that are on for the span of a block and that other threads, copies and compilers respect.

A hook sees the calls of the thread that placed it, and none of a backward pass. A copy of a hooked
model has hooks that do nothing.

torch.compile takes hooks into the code that it makes while they are there, and never looks again.
So what it makes inside a block has them: there they only put what they see on a list, which is
emptied outside the compiled code. Code from before the block would skip them silently, so it runs
eagerly meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from headplug.errors import TapError
from headplug.taps.direct import direct_calls
from headplug.taps.points import SHARED, Layout, Point
from headplug.taps.wrappers import Compiled, has_run

Keep = Callable[[Point, Any], None]


class Reached(Exception):  # noqa: N818 - not an error
    """Ends a forward pass that has gone far enough."""


class Block:
    """What the hooks of one block share.

    Args:
        points: Where the hooks are.
        keep: What to do with what is read.

    Attributes:
        on: Whether the block is open; compiled code looks at it too.
        needs: Calls after which each point has been read, by its number; empty to read all.
        left: How many of them are still to come in this forward pass.
    """

    def __init__(self, points: Sequence[Point], keep: Keep) -> None:
        self.points = points
        self.keep = keep
        self.on = True
        self.thread = threading.get_ident()
        self.needs: dict[int, int] = {}
        self.left: dict[int, int] = {}
        self._pending: list[tuple[int, Any]] = []

    def take(self, number: int, value: Any) -> None:
        """Receives what a hook sees, and ends the forward pass if it was the last to be read."""
        if torch.compiler.is_compiling():
            if isinstance(value, Tensor):  # copied, because later code may change it in place
                value = value.clone()
            else:
                value = tree_map_only(Tensor, Tensor.clone, value)
            self._pending.append((number, value))
        else:
            self.drain()
            self.keep(self.points[number], value)
        if self.needs:
            self.left[number] -= 1
            if max(self.left.values()) <= 0:
                raise Reached

    def close(self) -> None:
        """Ends the block; what it fed may be forgotten from now on."""
        self.on = False
        self.drain()
        self.keep = _ignore

    @property
    def is_last(self) -> bool:
        """Whether the call that is being read is the last one needed."""
        return bool(self.needs) and sum(max(n, 0) for n in self.left.values()) == 1

    def drain(self) -> None:
        """Hands over what compiled code has put aside."""
        if self._pending:
            pending, self._pending = self._pending, []
            for number, value in pending:
                self.keep(self.points[number], value)


def _ignore(point: Point, value: Any) -> None:
    pass


@contextmanager
def hooks(
    layout: Layout, points: Sequence[Point], keep: Keep, traced: bool = False
) -> Iterator[Block]:
    """Calls `keep(point, value)` whenever a point is reached while the block runs.

    Args:
        layout: Of the model that will run.
        points: Where to place hooks, in this order.
        keep: What to do with what is read.
        traced: Whether the caller compiles what it runs anew, and drains the block itself.
    """
    block = Block(points, keep)
    placed = [_Hook(block, number, point) for number, point in enumerate(points)]
    with ExitStack() as stack:
        for hook in placed:
            module = hook.point.module
            if hook.point.takes_input:
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                handle = module.register_forward_hook(hook)
            stack.callback(handle.remove)
        if not layout.compiled:
            shared = (h for h in placed if h.point.how.name.partition(":")[0] in SHARED)
            stack.enter_context(direct_calls([(h.point, h) for h in shared]))
        elif not traced and (_needs_tensors(points) or has_run(layout.model, layout.compiled)):
            stack.enter_context(_EAGERLY)
        elif not traced:
            stack.enter_context(_draining(layout.compiled, block))
        try:
            yield block
        finally:
            block.close()


class _Hook:
    """Hands what one module receives or returns to its block."""

    def __init__(self, block: Block, number: int, point: Point) -> None:
        self.block = block
        self.number = number
        self.point = point

    def __call__(self, module: nn.Module, args: tuple[Any, ...], last: Any) -> None:
        """Called with the module's output last, or before it with its keyword arguments."""
        block = self.block
        if not block.on:
            return
        if not torch.compiler.is_compiling():
            backward = torch._C._current_graph_task_id() != -1  # checkpointing runs it again
            if backward or threading.get_ident() != block.thread:
                return
        point = self.point
        if point.takes_input:
            last = _received(point, module, args, last)
        elif point.key is not None:
            last = _part(point, last)
        block.take(self.number, last)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Spent, ()  # what deepcopy and pickle make of it


class _Spent:
    """The hook in a copy of a tapped model: it does nothing and holds nothing."""

    def __call__(self, *_: Any) -> None:
        pass


def _received(point: Point, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
    """An argument of a call; by default the first."""
    key = point.key or 0
    if isinstance(key, str):
        import inspect

        given: Any = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    else:
        given = dict(enumerate([*args, *kwargs.values()]))
        key = key + len(given) if key < 0 else key
    if key not in given:
        if point.key is None:
            return None
        raise TapError(f"{point.how.name!r}: the call has only {', '.join(map(str, given))}.")
    return given[key]


def _part(point: Point, value: Any) -> Any:
    """A part of a tuple, list, mapping or object that a module returns."""
    key: Any = point.key
    try:
        if not isinstance(value, Tensor):
            named = isinstance(key, str) and hasattr(value, key)
            return getattr(value, key) if named else value[key]
    except (LookupError, TypeError):
        pass
    kind = type(value).__name__
    if isinstance(value, Mapping):
        there = f"a {kind} with {', '.join(map(str, value))}"
    elif isinstance(value, Sequence):
        there = f"a {kind} of {len(value)}"
    else:
        there = f"a {kind}, which has no parts"
    raise TapError(f"{point.how.name!r}: {point.path} returns {there}.")


def _needs_tensors(points: Sequence[Point]) -> bool:
    """Whether hooks need what only an eager run gives: the tensors themselves."""
    return any(p.how.gradients or isinstance(p.key, str) for p in points)


@contextmanager
def _draining(compiled: Sequence[Compiled], block: Block) -> Iterator[None]:
    """Hands over what compiled functions have put aside whenever one returns."""

    def draining(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        finally:
            block.drain()

    for one in compiled:
        vars(one.holder)[one.attribute] = partial(draining, one.function)
    try:
        yield
    finally:
        for one in compiled:
            vars(one.holder)[one.attribute] = one.function


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
