"""What the calls of one module give at one point, as its options want it."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

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
        self._copied: Any = None  # the CUDA event after the last copy

    def keep(self, value: Any, copy: bool) -> None:
        """Takes what a call gives, or a copy of it."""
        how, call = self.point.how, self.seen
        self.seen += 1
        if isinstance(how.calls, int) and call != how.calls:
            return
        take = partial(self._taken, call, copy)
        value = take(value) if isinstance(value, Tensor) else tree_map_only(Tensor, take, value)
        if how.calls == "last":
            self._kept.clear()
        self._kept.append(Kept(call, value, _versions(value)))

    def value(self) -> Any:
        """What was read.

        Raises:
            TapError: Nothing, or it was changed in place since.
        """
        kept = self._found()
        if self._copied is not None:
            self._copied.synchronize()
        if any(_versions(k.value) != k.versions for k in kept):
            raise TapError(
                f"what was read at {self.point.name!r} has since been changed in place, as by "
                "ReLU(inplace=True) or '+=', so it is no longer what passed there. Pass "
                "clone=True to tap()."
            )
        return self._chosen([k.value for k in kept])

    def gradient(self) -> Any:
        """The gradients that have come to what was read.

        Raises:
            TapError: None have come, or they were not asked for.
        """
        name = self.point.name
        if not self.point.how.gradients:
            raise TapError(f"{name!r} was read without gradients=True; pass it to tap().")
        calls = [k.call for k in self._found()]
        for call in calls:
            if call not in self._gradients:
                raise TapError(
                    f"no gradient has come to {name!r} in call {call}: no backward pass has run, "
                    "the loss does not depend on it, it needs no gradient, or it was run in code "
                    "that torch.compile made inside the block."
                )
        return self._chosen([self._gradients[call] for call in calls])

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
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(t.device))
        return host

    def _add(self, call: int, gradient: Tensor) -> None:
        if call in self._gradients:
            gradient = self._gradients[call] + gradient
        self._gradients[call] = gradient.detach()

    def _found(self) -> list[Kept]:
        name, calls = self.point.name, self.point.how.calls
        if not self.seen:
            raise TapError(
                f"{name!r} was never reached. Its module was not called inside the block (in the "
                "block's own thread), or it was run in a way that skips hooks: module.forward(x), "
                "or a function compiled by torch.compile. Call modules as module(x); "
                "list_taps(model, x) shows which ones the model's own forward calls."
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
        return torch.cat(values)


def _arrived(add: WeakMethod[Any], call: int, gradient: Tensor) -> None:
    if method := add():
        method(call, gradient)


def _versions(value: Any) -> list[int]:
    tensors = (value,) if isinstance(value, Tensor) else tree_leaves(value)
    return [0 if t.is_inference() else t._version for t in tensors if isinstance(t, Tensor)]


def _shares(a: Tensor, b: Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
