"""What taps have read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from headplug.errors import TapError, unknown
from headplug.taps.options import Tap, shaped
from headplug.taps.points import Point, flat
from headplug.taps.pooling import pooled


class Taps(Mapping[str, Any]):
    """What was read, by the names of the request.

    A point gives a list with one entry per call of its module, or what its `calls` says; a glob, a
    regular expression or a class gives a mapping of the points that it matched.
    """

    def __init__(self, request: Any, asked: Mapping[str, Sequence[Point]]) -> None:
        self._request = request
        self._asked = asked
        self._points = {p.name: p for p in flat(asked)}
        self.settle: Callable[[], None] | None = None  # brings what is still on its way
        self._copied: Any = None
        self.clear()

    def __getitem__(self, name: str | int) -> Any:
        """What was read at a point.

        Raises:
            UnknownNameError: It was not asked for.
            TapError: It was never reached, or what it gave was changed in place since.
        """
        return self._by_point(name, self._value)

    def __contains__(self, name: object) -> bool:
        return name in self._points or name in self._asked

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def read(self) -> Any:
        """Everything in the shape of the request: one for one point, a list, or a mapping.

        Raises:
            TapError: As indexing does.
        """
        return shaped(self._request, self.__getitem__)

    def by_depth(self) -> dict[str, Any]:
        """Every point by its name, in the order in which they were first reached.

        Raises:
            TapError: As indexing does.
        """
        found = {name: self[name] for name in self}
        return {
            p.name: found[p.name]
            for p in sorted(self._points.values(), key=self._first.__getitem__)
        }

    def gradient(self, name: str | int) -> Any:
        """The gradient of what was backpropagated, in the place of what was read.

        Gradients are those of the whole output or input, before pooling; they add up over several
        backward passes, as `Tensor.grad` does.

        Raises:
            UnknownNameError: The point was not asked for.
            TapError: It was asked for without gradients=True, or no gradient has come to it.
        """
        return self._by_point(name, self._gradient)

    def clear(self) -> None:
        """Forgets what was read, e.g. after a training step, and goes on reading."""
        if self.settle:
            self.settle()
        points = self._points.values()
        self._seen = dict.fromkeys(points, 0)
        self._first: dict[Point, int] = {}
        self._values: dict[Point, list[tuple[int, Any, list[int]]]] = {p: [] for p in points}
        self._gradients: dict[tuple[Point, int], Tensor] = {}

    def calls(self, point: Point) -> int:
        """How often a point has been reached."""
        return self._seen[point]

    def keep(self, point: Point, value: Any, copy: bool = False) -> None:
        """Takes what a call of a point's module gives, or a copy of it."""
        call = self._seen[point]
        self._seen[point] = call + 1
        self._first.setdefault(point, len(self._first))
        calls = point.how.calls
        if isinstance(calls, int) and call != calls:
            return
        if point.how.gradients:
            tree_map_only(Tensor, partial(self._watch, point, call), value)
        value = tree_map_only(Tensor, partial(self._taken, point, copy), value)
        if calls == "last":
            self._values[point].clear()
        self._values[point].append((call, value, _versions(value)))

    def _taken(self, point: Point, copy: bool, t: Tensor) -> Tensor:
        """A tensor as the options of a point want it."""
        how, given = point.how, t
        if how.detach:
            t = t.detach()
        if how.pool is not None:
            try:
                t = pooled(t, how.pool, point.form)
            except TapError as error:
                raise TapError(f"{point.name!r}: {error}") from None
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
        host = torch.empty_like(t, device="cpu", pin_memory=True)
        host = host.copy_(t, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(t.device))
        return host

    def _watch(self, point: Point, call: int, t: Tensor) -> Tensor:
        if t.requires_grad:  # the graph must not keep what was read alive
            t.register_hook(partial(_arrived, WeakMethod(self._add), point, call))
        return t

    def _add(self, point: Point, call: int, gradient: Tensor) -> None:
        if (point, call) in self._gradients:
            gradient = self._gradients[point, call] + gradient
        self._gradients[point, call] = gradient.detach()

    def _by_point(self, name: Any, read: Callable[[Point], Any]) -> Any:
        if name not in self and isinstance(name, int):
            name = Tap(name).name
        if name in self._points:
            return read(self._points[name])
        if name in self._asked:
            return {p.name: read(p) for p in self._asked[name]}
        known = [str(known) for known in self]
        raise unknown("tap", str(name), known, "Only points that were asked for can be read.")

    def _value(self, point: Point) -> Any:
        kept = self._kept(point)
        if self._copied is not None:
            self._copied.synchronize()
        if any(_versions(value) != versions for _, value, versions in kept):
            raise TapError(
                f"what was read at {point.name!r} has since been changed in place, as by "
                "ReLU(inplace=True) or '+=', so it is no longer what passed there. Pass "
                "clone=True to tap()."
            )
        return _chosen(point, [value for _, value, _ in kept])

    def _gradient(self, point: Point) -> Any:
        if not point.how.gradients:
            raise TapError(f"{point.name!r} was read without gradients=True; pass it to tap().")
        calls = [call for call, _, _ in self._kept(point)]
        found = [self._gradients.get((point, call)) for call in calls]
        if any(g is None for g in found):
            raise TapError(
                f"no gradient has come to {point.name!r} in call {calls[found.index(None)]}: no "
                "backward pass has run, the loss does not depend on it, it needs no gradient, or "
                "it was run in code that torch.compile made inside the block."
            )
        return _chosen(point, found)

    def _kept(self, point: Point) -> list[tuple[int, Any, list[int]]]:
        if self.settle:
            self.settle()
        kept = self._values[point]
        if not kept and (seen := self._seen[point]):
            raise TapError(
                f"{point.name!r} was reached {seen} times, so there is no call {point.how.calls}."
            )
        if not kept:
            raise never_reached(point.name)
        return kept


def never_reached(name: str) -> TapError:
    """Says why nothing may have been read at a point."""
    return TapError(
        f"{name!r} was never reached. Its module was not called inside the block (in the block's "
        "own thread), or it was run in a way that skips hooks: module.forward(x), or a function "
        "compiled by torch.compile. Call modules as module(x); list_taps(model, x) shows which "
        "ones the model's own forward calls."
    )


def _arrived(add: WeakMethod[Any], point: Point, call: int, gradient: Tensor) -> None:
    if method := add():
        method(point, call, gradient)


def _chosen(point: Point, values: list[Any]) -> Any:
    """What the `calls` of a point makes of those that were kept."""
    if point.how.calls == "all":
        return values
    if point.how.calls != "cat":
        return values[0]
    if not all(isinstance(v, Tensor) for v in values):
        raise TapError(
            f"{point.name!r} gives a {type(values[0]).__name__}, which cannot be joined; name a "
            f"part of it: '{point.path}:output[0]'."
        )
    return torch.cat(values)


def _versions(value: Any) -> list[int]:
    tensors = (t for t in tree_leaves(value) if isinstance(t, Tensor))
    return [0 if t.is_inference() else t._version for t in tensors]


def _shares(a: Tensor, b: Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
