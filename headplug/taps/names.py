"""The names of points, taken apart; `headplug.taps.points` says what they stand for."""

from __future__ import annotations

import re
from typing import NamedTuple

from headplug.errors import TapError

SIDE = re.compile(r"(input|output)(?:\[(.+)\])?")
NUMBER = re.compile(r"-?\d+")


class Name(NamedTuple):
    """The parts of a name.

    Attributes:
        path: A path, a shared name or a glob; with `regex` a regular expression.
        ending: How the name ends from the colon of its side on.
        side: "input", "output" or "" for the side that is usual.
        key: Which part of the input or output is meant.
        stage: A feature index.
        kind: The name of a class of modules.
        regex: Whether the path is a regular expression.

    >>> name = Name.parse("backbone:BatchNorm2d:input[1]")
    >>> name.path, name.kind, name.side, name.key
    ('backbone', 'BatchNorm2d', 'input', 1)
    """

    path: str
    ending: str = ""
    side: str = ""
    key: int | str | None = None
    stage: int | None = None
    kind: str | None = None
    regex: bool = False

    @classmethod
    def parse(cls, name: str) -> Name:
        """Takes a name apart.

        Raises:
            TapError: What follows a colon means nothing, or the regular expression is none.
        """
        if name.startswith("re:"):
            return cls._pattern(name)
        path, *endings = name.split(":")
        found = cls(path)
        for ending in endings:
            free = not found.side and (found.kind, found.stage) == (None, None)
            if (side := SIDE.fullmatch(ending)) and not found.side:
                found = found._on(side)
            elif free and NUMBER.fullmatch(ending):
                found = found._replace(stage=int(ending))
            elif free and ending.isidentifier():
                found = found._replace(kind=ending)
            else:
                raise TapError(
                    f"{name!r}: after ':' can follow input, input[1], input[name], output[0], "
                    "output[key], the name of a class such as BatchNorm2d, or a feature index."
                )
        return found

    @classmethod
    def _pattern(cls, name: str) -> Name:
        side = re.search(rf":{SIDE.pattern}$", name)
        path = name[len("re:") : side.start() if side else None]
        try:
            re.compile(path)
        except re.error as error:
            raise TapError(f"{name!r} is not a regular expression: {error}.") from None
        found = cls(path, regex=True)
        return found._on(side) if side else found

    def _on(self, side: re.Match[str]) -> Name:
        key = side[2]
        number = key is not None and NUMBER.fullmatch(key)
        return self._replace(
            side=side[1], key=int(key) if number else key, ending=":" + side[0].lstrip(":")
        )
