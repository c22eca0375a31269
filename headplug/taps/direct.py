"""Calls that go past a module's hooks: `head.forward(x)`, `backbone.encode(x)`.

The training loops of lightly's DINOv2, iBOT, MAE and CAPI call modules so. For the span of a block
the class of such a module passes these calls on to the hooks of the module; other modules of the
class, copies and compiled code notice nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import CodeType
from typing import Any

import torch
from torch import nn

from headplug.taps.points import Point

METHODS = ("forward", "forward_features", "encode")
Hook = Callable[[nn.Module, tuple[Any, ...], Any], None]

_call = nn.Module._call_impl.__code__
CALLS = {_call, *(c for c in _call.co_consts if isinstance(c, CodeType))}  # what runs hooks
_lock = threading.RLock()
_watched: dict[nn.Module, list[tuple[Point, Hook]]] = {}
_running = threading.local()


@contextmanager
def direct_calls(hooks: Sequence[tuple[Point, Hook]]) -> Iterator[None]:
    """Lets hooks see the direct calls of their modules' methods while the block runs.

    Args:
        hooks: Each with its point. Modules of torch's own classes are left out.
    """
    with ExitStack() as stack:
        for pair in hooks:
            module = pair[0].module
            if not type(module).__module__.startswith("torch."):
                for name in METHODS:
                    stack.enter_context(_passing_on(type(module), name))
                _watched.setdefault(module, []).append(pair)
                stack.callback(_forget, module, pair)
        yield


def _forget(module: nn.Module, pair: tuple[Point, Hook]) -> None:
    _watched[module].remove(pair)
    if not _watched[module]:
        del _watched[module]


@contextmanager
def _passing_on(kind: type, name: str) -> Iterator[None]:
    """One method of a class, wrapped; blocks in other threads may need it longer."""
    with _lock:
        method: Any = getattr(kind, name, None)
        if hasattr(method, "_blocks"):
            method._blocks += 1
        elif method:
            method = _passing(method)
            method._own = name in vars(kind)
            method._blocks = 1
            setattr(kind, name, method)
    try:
        yield
    finally:
        with _lock:
            if method:
                method._blocks -= 1
            if method and not method._blocks:
                delattr(kind, name)
                if method._own:
                    setattr(kind, name, method.__wrapped__)


def _passing(method: Any) -> Any:
    @wraps(method)
    def passing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or self not in _watched:
            return method(self, *args, **kwargs)
        running = vars(_running).setdefault("modules", set())
        if self in running:  # a method that calls another one of its own module
            return method(self, *args, **kwargs)
        running.add(self)
        try:
            if sys._getframe(1).f_code in CALLS:
                return method(self, *args, **kwargs)
            hooks = list(_watched[self])
            for point, hook in hooks:
                if point.takes_input:
                    hook(self, args, kwargs)
            out = method(self, *args, **kwargs)
            for point, hook in hooks:
                if not point.takes_input:
                    hook(self, args, out)
            return out
        finally:
            running.discard(self)

    return passing
