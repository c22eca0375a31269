"""Seeing the calls of a module, whoever makes them and whatever has compiled the code around it.

For the span of a block a tapped module has a `forward` of its own, which passes calls on and tells
listeners. So `module(x)` and `module.forward(x)` are seen alike (lightly's training loops use both,
and `backbone.encode(x)`), each once. Code that torch.compile made checks that the module has no
`forward` of its own: it is compiled once more inside the block, and valid again after it. Compiled
code only puts aside what it sees. Copies and pickles of a module are as if there were no block.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

METHODS = ("forward", "forward_features", "encode", "decode")
RECORDER = "_headplug_recorder"


class Listener(Protocol):
    """Wants to know of the calls of a module.

    Attributes:
        takes_input: Whether it wants what the module receives, not what it returns.
        only_last: Whether the last call makes the others worthless.
        thread: The one whose calls it wants; compiled code does not tell which it ran in.
    """

    takes_input: bool
    only_last: bool
    thread: int

    def hear(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, live: bool) -> None:
        """Takes a call.

        Args:
            args: What the module received, where the input is wanted.
            kwargs: The same, by name.
            out: What it returned, where that is wanted.
            live: Whether the call is going on; compiled code tells of its calls later.
        """


class Recorder:
    """Tells listeners of the calls of one module.

    It is kept for the module from block to block, so that compiled code stays valid.

    Attributes:
        listeners: Who wants to know; see `change`.
        own: Methods that the module itself had in place of its class's.
        handles: Hooks around those of others, if there are any.
        stop: Called by compiled code after each call, to end a forward pass early.
    """

    def __init__(self) -> None:
        self.listeners: Sequence[Listener] = ()
        self.own: dict[str, Any] = {}
        self.handles: list[Any] = []
        self.stop: Callable[[bool], None] | None = None
        self._threads: set[int] = set()  # that are in a call
        self._hooked: set[int] = set()  # that are about to make one, with hooks after it
        self._busy = False  # compiled code is
        self._inputs = self._outputs = self._only_last = False
        self._last_input: Any = None
        self._last_output: Any = None

    def call(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Makes a call and tells of it."""
        if torch.compiler.is_compiling():
            return self._compiled(method, args, kwargs)
        thread = threading.get_ident()
        if thread in self._threads or _in_backward():
            return method(*args, **kwargs)
        hooked = thread in self._hooked
        self._hooked.discard(thread)
        self._threads.add(thread)
        try:
            drain()
            self._tell(thread, True, args, kwargs, None)
            out = method(*args, **kwargs)
            drain()
            if not hooked:
                self._tell(thread, False, args, kwargs, out)
            return out
        finally:
            self._threads.discard(thread)

    def before_forward(self, *_: Any) -> None:
        """A hook: others come after the forward, and may change what it returns."""
        if not torch.compiler.is_compiling():
            self._hooked.add(threading.get_ident())

    def after_hooks(self, module: nn.Module, args: Any, out: Any) -> None:
        """A hook, the last: the caller gets this."""
        if not torch.compiler.is_compiling() and not _in_backward():
            self._tell(threading.get_ident(), False, args, {}, out)

    def change(self, listeners: Sequence[Listener]) -> None:
        """Has other listeners from now on."""
        self.listeners = listeners
        sides = {listener.takes_input for listener in listeners}
        self._inputs, self._outputs = True in sides, False in sides
        self._only_last = all(listener.only_last for listener in listeners)

    def __reduce__(self) -> tuple[Any, ...]:
        return Recorder, ()  # the copy of a module that copies all it has is not listened to

    def settle(self) -> None:
        """Tells of the last call of compiled code, where only that is wanted."""
        for side, call in ((True, self._last_input), (False, self._last_output)):
            if call is not None:
                self._tell(None, side, *call)
        self._last_input = self._last_output = None

    def _tell(
        self, thread: int | None, takes_input: bool, args: Any, kwargs: Any, out: Any
    ) -> None:
        for listener in self.listeners:
            if listener.takes_input == takes_input and thread in (None, listener.thread):
                listener.hear(args, kwargs, out, live=thread is not None)

    def _compiled(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """The same as torch.compile sees it; what is put aside is copied, as it may be changed."""
        if self._busy:
            return method(*args, **kwargs)
        self._busy = True
        try:
            if self._inputs:
                self._put_aside(True, (_copied(args), _copied(kwargs), None))
            out = method(*args, **kwargs)
            if self._outputs:
                self._put_aside(False, ((), {}, _copied(out)))
            return out
        finally:
            self._busy = False

    def _put_aside(self, takes_input: bool, call: Any) -> None:
        if not self._only_last:
            _heap.top = _Aside(_heap.top, self, takes_input, call)
        elif takes_input:
            self._last_input = call
        else:
            self._last_output = call
        if self.stop is not None:
            self.stop(takes_input)


class _Aside:
    """A call that compiled code has put aside, and the one before it.

    A chain, because torch.compile would compile anew for each length of a list.
    """

    def __init__(self, before: Any, recorder: Any, takes_input: bool, call: Any) -> None:
        self.before = before
        self.recorder = recorder
        self.takes_input = takes_input
        self.call = call


class _Heap:
    def __init__(self) -> None:
        self.top = _Aside(None, None, False, None)


_heap = _Heap()
_lock = threading.RLock()
_recorders: WeakKeyDictionary[nn.Module, Recorder] = WeakKeyDictionary()
_active: dict[nn.Module, Recorder] = {}


def drain() -> None:
    """Tells of what compiled code has put aside, in the order of the calls."""
    if _heap.top.before is None:
        return
    with _lock:
        calls = []
        while _heap.top.before is not None:
            calls.append(_heap.top)
            _heap.top = _heap.top.before
        for aside in reversed(calls):
            aside.recorder._tell(None, aside.takes_input, *aside.call)


def drain_last() -> None:
    """The same, with the last calls of modules of which only those are wanted.

    When it returns, all has been told, also what another thread was telling of.
    """
    with _lock:
        drain()
        for recorder in list(_active.values()):
            recorder.settle()


@contextmanager
def listening(listeners: Mapping[nn.Module, list[Listener]]) -> Iterator[None]:
    """Tells listeners of the calls of modules while the block runs."""
    with _lock:
        for module, new in listeners.items():
            recorder = _active.get(module) or _install(module)
            recorder.change([*recorder.listeners, *new])
    try:
        yield
    finally:
        drain_last()
        with _lock:
            for module, gone in listeners.items():
                recorder = _active[module]
                recorder.change([x for x in recorder.listeners if x not in gone])
                if not recorder.listeners:
                    _remove(module)


def recorder_of(module: nn.Module) -> Recorder:
    """The recorder of a module that is being listened to."""
    return _active[module]


def _install(module: nn.Module) -> Recorder:
    recorder = _active[module] = _recorders.setdefault(module, Recorder())
    own = vars(module)
    own[RECORDER] = recorder
    for name, passing in _PASSING.items():
        if hasattr(module, name):
            if name in own:
                recorder.own[name] = own[name]
            own[name] = MethodType(passing, module)
    own["__getstate__"] = MethodType(_state, module)  # copy and pickle look here first
    if module._forward_hooks:
        recorder.handles = [
            module.register_forward_pre_hook(recorder.before_forward),
            module.register_forward_hook(recorder.after_hooks),
        ]
    return recorder


def _remove(module: nn.Module) -> None:
    recorder, own = _active.pop(module), vars(module)
    for name in (RECORDER, "__getstate__", *_PASSING):
        own.pop(name, None)
    own.update(recorder.own)
    recorder.own = {}
    while recorder.handles:
        recorder.handles.pop().remove()


def _state(self: nn.Module) -> Any:
    """What a copy or a pickle of a tapped module gets: its state outside the block."""
    recorder, state = vars(self)[RECORDER], type(self).__getstate__(self)
    ours = (RECORDER, "__getstate__", *_PASSING)
    ids = {handle.id for handle in recorder.handles}
    for hooks in ("_forward_pre_hooks", "_forward_hooks"):
        state[hooks] = OrderedDict((k, v) for k, v in state[hooks].items() if k not in ids)
    return {k: v for k, v in state.items() if k not in ours} | recorder.own


def _passing_on(name: str) -> Callable[..., Any]:
    def passing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        recorder: Recorder = vars(self)[RECORDER]
        if name in recorder.own:
            return recorder.call(recorder.own[name], args, kwargs)
        return recorder.call(partial(getattr(type(self), name), self), args, kwargs)

    return passing


_PASSING = {name: _passing_on(name) for name in METHODS}


def _in_backward() -> bool:
    """Where checkpointing runs forward again."""
    return bool(torch._C._current_graph_task_id() != -1)


def _copied(value: Any) -> Any:
    return tree_map_only(Tensor, Tensor.clone, value)
