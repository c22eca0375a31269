"""What the calls of one module give at one point, as its options want it."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy as copy_of
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from headplug.errors import TapError
from headplug.taps.points import Point
from headplug.taps.pooling import pooled


class Kept(NamedTuple):
    """What one call gave; `versions` tell whether it has been changed in place since."""

    call: int
    value: Any
    versions: list[int]


class Calls:
    """What was read at one point.

    Args:
        point: The point.

    Attributes:
        seen: How often its module was called.
    """

    def __init__(self, point: Point) -> None:
        self.point = point
        self.seen = 0
        self._kept: list[Kept] = []
        self._gradients: dict[int, Tensor] = {}
        self._copied: list[Any] = []  # CUDA events after copies that may be under way

    def keep(self, value: Any, copy: bool) -> None:
        """Takes what a call gives, or a copy of it."""
        how, call = self.point.how, self.seen
        self.seen += 1
        if isinstance(how.calls, int) and call != how.calls:
            return
        if how.calls == "last":
            self._kept.clear()
            self._gradients.clear()
        value = mapped(partial(self._taken, call, copy), value)
        self._kept.append(Kept(call, value, _versions(value)))

    def value(self) -> Any:
        """What was read.

        Raises:
            TapError: Nothing, or it was changed in place since.
        """
        kept = self._found()
        while self._copied:
            self._copied.pop().synchronize()
        if any(_versions(k.value) != k.versions for k in kept):
            raise TapError(
                f"what was read at {self.point.name!r} has since been changed in place, as by "
                "ReLU(inplace=True) or '+=', so it is no longer what passed there. Pass "
                "clone=True to tap()."
            )
        return self._chosen([k.value for k in kept])

    def gradient(self) -> Any:
        """The gradients that have come to what was read; None for calls without one.

        Raises:
            TapError: None has come, or they were not asked for.
        """
        name = self.point.name
        if not self.point.how.gradients:
            raise TapError(f"{name!r} was read without gradients=True; pass it to tap().")
        found = [self._gradients.get(k.call) for k in self._found()]
        if not any(g is not None for g in found):
            raise TapError(
                f"no gradient has come to {name!r}: no backward pass has run, the loss does not "
                "depend on it, it needs no gradient, or it ran in code that torch.compile made."
            )
        return self._chosen(found)

    def _taken(self, call: int, copy: bool, t: Tensor) -> Tensor:
        """A tensor as the options want it."""
        how, given = self.point.how, t
        if how.gradients and t.requires_grad:  # the graph must not keep what was read alive
            t.register_hook(partial(_arrived, WeakMethod(self._add), call))
        if how.detach:
            t = t.detach()
        if how.pool is not None:
            try:
                t = pooled(t, how.pool, self.point.form)
            except TapError as error:
                raise TapError(f"{self.point.name!r}: {error}") from None
        if how.dtype is not None and t.is_floating_point():
            t = t.to(how.dtype)
        if how.device is not None:
            t = self._moved(t, torch.device(how.device))
        # a tensor of inference mode does not tell when it is changed
        wanted = copy or how.clone or t.is_inference()
        return t.clone() if wanted and _shares(t, given) else t

    def _moved(self, t: Tensor, device: torch.device) -> Tensor:
        if not (t.is_cuda and device.type == "cpu"):
            return t.to(device)
        host = torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True)
        self._copied.append(torch.cuda.current_stream(t.device).record_event())
        return host

    def _add(self, call: int, gradient: Tensor) -> None:
        if not any(k.call == call for k in self._kept):
            return
        gradient = gradient.detach()
        if self.point.how.device is not None:
            gradient = self._moved(gradient, torch.device(self.point.how.device))
        before = self._gradients.get(call)
        self._gradients[call] = gradient if before is None else before + gradient

    def _found(self) -> list[Kept]:
        name, calls = self.point.name, self.point.how.calls
        if not self.seen:
            raise TapError(
                f"{name!r} was never reached. Its module was not called inside the block (in the "
                "block's own thread, and since clear()), or only its weights were used: by a "
                "function, or in an exported or captured graph. list_taps(model, x) shows what "
                "the model's own forward calls."
            )
        if not self._kept:
            raise TapError(f"{name!r} was reached {self.seen} times, so there is no call {calls}.")
        return self._kept

    def _chosen(self, values: list[Any]) -> Any:
        """What `calls` makes of those that were kept."""
        if self.point.how.calls == "all":
            return values
        if self.point.how.calls != "cat":
            return values[0]
        if not all(isinstance(v, Tensor) for v in values):
            raise TapError(
                f"{self.point.name!r} gives a {type(values[0]).__name__}, which cannot be joined; "
                f"name a part of it: '{self.point.path}:output[0]'."
            )
        try:
            return torch.cat(values)
        except RuntimeError as error:
            shapes = ", ".join(str(tuple(v.shape)) for v in values)
            raise TapError(
                f"the calls at {self.point.name!r} gave shapes {shapes}, which cannot be joined; "
                "pool='gap' makes vectors of them."
            ) from error


def mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A value with all its tensors replaced; dataclasses are opened, too."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if is_dataclass(leaf) and not isinstance(leaf, type):
            new = copy_of(leaf)
            for field in fields(leaf):
                object.__setattr__(new, field.name, mapped(function, getattr(leaf, field.name)))
            return new
        return leaf

    return one(value) if isinstance(value, Tensor) else tree_map(one, value)


def _arrived(add: WeakMethod[Any], call: int, gradient: Tensor) -> None:
    if method := add():
        method(call, gradient)


def _versions(value: Any) -> list[int]:
    found: list[int] = []

    def add(t: Tensor) -> Tensor:
        found.append(0 if t.is_inference() else t._version)
        return t

    mapped(add, value)
    return found


def _shares(a: Tensor, b: Tensor) -> bool:
    if a is b or a.layout != torch.strided:
        return a is b
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
