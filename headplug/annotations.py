"""Type annotations as rules for options: whether a value keeps one, and how to say it in words."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type, as far as options need it.

    An integer is a float, a truth value is no number, and a list may stand for any sequence.

    >>> fits(3, float), fits(True, int), fits([1, 2], tuple[int, int]), fits("3", int | None)
    (True, False, True, False)
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(value, args[0])
    if origin in (Union, types.UnionType):
        return any(fits(value, a) for a in args)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    kind = origin or hint
    if kind in (int, float):
        allowed = (int, float) if kind is float else int
        return isinstance(value, allowed) and not isinstance(value, bool)
    if not inspect.isclass(kind):
        return True
    if issubclass(kind, Sequence) and not issubclass(kind, (str, bytes)):  # JSON has lists only
        if isinstance(value, str) or not isinstance(value, Sequence):
            return False
        if kind is tuple and args and args[-1] is not Ellipsis:
            return len(value) == len(args) and all(map(fits, value, args))
        return all(fits(v, a) for v in value for a in args[:1])
    try:
        return isinstance(value, kind)
    except TypeError:  # protocols, typed dicts, Any
        return True


def spell(hint: Any) -> str:
    """An annotation in words.

    >>> spell(bool | Sequence[str] | Literal["x"] | None)
    "bool, list of str, 'x' or None"
    """
    kind, args = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return spell(args[0])
    if kind is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(repr(a) for a in args)
    if kind in (Union, types.UnionType):
        *others, last = map(spell, args)
        return f"{', '.join(others)} or {last}"
    if hint is type(None):
        return "None"
    name = "list" if kind is Sequence else getattr(kind or hint, "__name__", str(hint))
    return f"{name} of {' and '.join(map(spell, args))}" if args else name


def unquoted(value: Any, hint: Any) -> str:
    """What to type instead of a number or truth value that stands in quotes, as a sentence.

    >>> unquoted("64", int), unquoted("True", bool), unquoted("many", int)
    (' Write 64 without quotes.', ' Write True without quotes.', '')
    """
    try:
        plain = json.loads(value.lower())
    except (AttributeError, ValueError):
        return ""
    return f" Write {plain!r} without quotes." if fits(plain, hint) else ""
