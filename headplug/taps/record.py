"""What taps have read, by the names of a request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from headplug.errors import TapError, unknown
from headplug.taps.calls import Calls
from headplug.taps.options import Tap, shaped
from headplug.taps.points import Asked, Point, flat
from headplug.taps.recorder import drain_last


class Taps(Mapping[str, Any]):
    """What was read, by the names of the request.

    A point gives a list with one entry per call of its module, or what its `calls` says; a glob, a
    regular expression or a class gives a mapping of the points that it matched and that were
    reached. These have their own names too.
    """

    def __init__(self, request: Any, asked: Asked) -> None:
        self._request = request
        self._asked = asked
        self.points = flat(asked)
        self._number = {point: number for number, point in enumerate(self.points)}
        inner = (p for p in asked.values() if isinstance(p, dict))
        self._by_name = {n: p for points in inner for n, p in points.items()}
        self._by_name |= {n: p for n, p in asked.items() if isinstance(p, Point)}
        self.clear()

    def __getitem__(self, name: str | int) -> Any:
        """What was read at a point.

        Raises:
            UnknownNameError: It was not asked for.
            TapError: It was never reached, or what it gave was changed in place since.
        """
        return self._read(name, Calls.value)

    def __contains__(self, name: object) -> bool:
        return name in self._asked or name in self._by_name

    def __iter__(self) -> Iterator[str]:
        names: dict[str, None] = {}
        for name, points in self._asked.items():
            names |= dict.fromkeys(points if isinstance(points, dict) else (name,))
        return iter(names)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        seen = ", ".join(f"{n}: {self._calls[self._number[self._by_name[n]]].seen}" for n in self)
        return f"Taps({seen} calls)"

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
        found: dict[str, Any] = {}
        for name, points in self._asked.items():
            value = self[name]
            found |= value if isinstance(points, dict) else {name: value}
        depth = {self.points[number]: place for place, number in enumerate(self._reached)}
        return dict(sorted(found.items(), key=lambda item: depth[self._by_name[item[0]]]))

    def gradient(self, name: str | int) -> Any:
        """The gradient of what was backpropagated, in the place of what was read.

        Gradients are those of the whole output or input, before pooling; they add up over several
        backward passes, as `Tensor.grad` does, and are scaled where a GradScaler scales the loss.
        A call that needed no gradient has None.

        Raises:
            UnknownNameError: The point was not asked for.
            TapError: It was asked for without gradients=True, or no gradient has come to it.
        """
        return self._read(name, Calls.gradient)

    def clear(self) -> None:
        """Forgets what was read, e.g. after a training step, and goes on reading."""
        drain_last()
        self._calls = [Calls(point) for point in self.points]
        self._reached: list[int] = []

    def seen(self, point: Point) -> int:
        """How often a point has been reached."""
        return self._calls[self._number[point]].seen

    def keep(self, number: int, value: Any, copy: bool = False) -> None:
        """Takes what a call gives at a point, or a copy of it."""
        calls = self._calls[number]
        if not calls.seen:
            self._reached.append(number)
        calls.keep(value, copy)

    def _read(self, name: Any, read: Callable[[Calls], Any]) -> Any:
        drain_last()
        if name not in self and isinstance(name, int):
            name = Tap(name).name
        points = self._asked.get(name, self._by_name.get(name))
        if points is None:
            known = [str(known) for known in self]
            raise unknown("tap", str(name), known, "Only points that were asked for can be read.")
        if isinstance(points, Point):
            return read(self._calls[self._number[points]])
        found = {n: self._calls[self._number[p]] for n, p in points.items()}
        reached = {n: read(calls) for n, calls in found.items() if calls.seen}
        if not reached:
            raise TapError(
                f"none of the {len(found)} modules that {name!r} stands for was reached inside the "
                "block. Call the model in it; list_taps(model, x) shows what a forward pass calls."
            )
        return reached
