"""What taps have read, by the names of a request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from headplug.errors import unknown
from headplug.taps.calls import Calls
from headplug.taps.options import Tap, shaped
from headplug.taps.points import Point, flat


class Taps(Mapping[str, Any]):
    """What was read, by the names of the request.

    A point gives a list with one entry per call of its module, or what its `calls` says; a glob, a
    regular expression or a class gives a mapping of the points that it matched.
    """

    def __init__(self, request: Any, asked: Mapping[str, Sequence[Point]]) -> None:
        self._request = request
        self._asked = asked
        self.settle: Callable[[], None] | None = None  # brings what is still on its way
        self.clear()

    def __getitem__(self, name: str | int) -> Any:
        """What was read at a point.

        Raises:
            UnknownNameError: It was not asked for.
            TapError: It was never reached, or what it gave was changed in place since.
        """
        return self._each(name, Calls.value)

    def __contains__(self, name: object) -> bool:
        return name in self._calls or name in self._asked

    def __iter__(self) -> Iterator[str]:
        return iter(self._calls)

    def __len__(self) -> int:
        return len(self._calls)

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
        reached = dict.fromkeys(self._reached)
        return {name: self[name] for name in (reached | dict.fromkeys(self))}

    def gradient(self, name: str | int) -> Any:
        """The gradient of what was backpropagated, in the place of what was read.

        Gradients are those of the whole output or input, before pooling; they add up over several
        backward passes, as `Tensor.grad` does.

        Raises:
            UnknownNameError: The point was not asked for.
            TapError: It was asked for without gradients=True, or no gradient has come to it.
        """
        return self._each(name, Calls.gradient)

    def clear(self) -> None:
        """Forgets what was read, e.g. after a training step, and goes on reading."""
        if self.settle:
            self.settle()
        self._calls = {p.name: Calls(p) for p in flat(self._asked)}
        self._reached: list[str] = []

    def seen(self, point: Point) -> int:
        """How often a point has been reached."""
        return self._calls[point.name].seen

    def keep(self, point: Point, value: Any, copy: bool = False) -> None:
        """Takes what a call of a point's module gives, or a copy of it."""
        calls = self._calls[point.name]
        if not calls.seen:
            self._reached.append(point.name)
        calls.keep(value, copy)

    def _each(self, name: Any, read: Callable[[Calls], Any]) -> Any:
        if self.settle:
            self.settle()
        if name not in self and isinstance(name, int):
            name = Tap(name).name
        if name in self._calls:
            return read(self._calls[name])
        if name in self._asked:
            return {p.name: read(self._calls[p.name]) for p in self._asked[name]}
        known = [str(known) for known in self]
        raise unknown("tap", str(name), known, "Only points that were asked for can be read.")
