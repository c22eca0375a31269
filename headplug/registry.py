"""A registry of named builders that knows nothing of what they build.

Names are added by one explicit call and never replaced by accident; options are checked by name and
type against the builder's signature before it runs, so that none is silently ignored; third parties
add entries through an entry-point group, which is read when a name is first looked up.
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
import re
import types
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal, TypeVar

from headplug.errors import OptionError, unknown

Builder = Callable[..., Any]
B = TypeVar("B", bound=Builder)


@dataclass(frozen=True)
class Entry:
    """One registered name.

    Attributes:
        name: What users type.
        builder: The class or function that builds it.
        summary: One line on what it is.
        paper: Where it comes from, e.g. "arXiv 2002.05709".
        preset: Values that replace the builder's own defaults.
        source: The class it must equal, as "package.module:Class", where there is one.
    """

    name: str
    builder: Builder = field(repr=False)
    summary: str = ""
    paper: str = ""
    preset: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        """The builder's parameters, with the preset's values as their defaults."""
        parameters = [
            p if p.kind is p.VAR_KEYWORD
            else p.replace(kind=p.KEYWORD_ONLY, default=self.preset.get(p.name, p.default))
            for p in inspect.signature(self.builder).parameters.values()
            if p.kind is not p.VAR_POSITIONAL
        ]  # fmt: skip
        return inspect.Signature(parameters)

    @property
    def defaults(self) -> dict[str, Any]:
        """Every option that has a default, with its value for this entry."""
        parameters = self.signature.parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    def bind(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All options with defaults filled in, or an `OptionError` that names the wrong one."""
        parameters = self.signature.parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            for name in options:
                if name not in parameters:
                    error = unknown("option", name, parameters)
                    raise OptionError(f"{self.name}: {error}")
        missing = [
            n for n, p in parameters.items()
            if p.default is p.empty and n not in options and p.kind is p.KEYWORD_ONLY
        ]  # fmt: skip
        if missing:
            raise OptionError(
                f"{self.name}: {', '.join(missing)} must be given, e.g. {missing[0]}=512."
            )
        target = self.builder.__init__ if inspect.isclass(self.builder) else self.builder
        hints = typing.get_type_hints(target)
        for name, value in options.items():
            if name in hints and not _fits(value, hints[name]):
                raise OptionError(
                    f"{self.name}: {name} must be {_spell(hints[name])}, not {value!r} "
                    f"({type(value).__name__})."
                )
        return {**self.defaults, **options}


class Registry:
    """Entries of one kind, by name.

    Args:
        kind: What the entries are, for messages: "head".
        group: Entry-point group through which other packages add theirs. Each entry point names a
            module (whose import registers) or a callable (which is called).
        listing: How a user lists the names, for messages.

    >>> shapes = Registry("shape")
    >>> _ = shapes.register("square", lambda side=1: side**2, summary="a square")
    >>> shapes.build("square", {"side": 3})
    9
    """

    def __init__(self, kind: str, group: str | None = None, listing: str = "") -> None:
        self.kind = kind
        self.group = group
        self.listing = listing
        self._entries: dict[str, Entry] = {}
        self._loaded = False

    def register(
        self, name: str, builder: B | None = None, *, overwrite: bool = False, **about: Any
    ) -> Any:
        """Adds an entry, directly or as a decorator.

        Args:
            name: The new name: lower-case letters, digits, `_`, `-`, `.`.
            builder: What builds it. Left out, a decorator is returned.
            overwrite: Replace an entry of the same name.
            about: The other fields of `Entry`.

        Raises:
            OptionError: The name is malformed or taken, or the preset names an unknown option.
        """
        if builder is None:
            return lambda b: self.register(name, b, overwrite=overwrite, **about)
        if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9][a-z0-9_.\-]*", name):
            raise OptionError(
                f"{name!r} cannot name a {self.kind}: use lower-case letters, digits, '_', '-', "
                "'.'."
            )
        if name in self._entries and not overwrite:
            raise OptionError(
                f"the {self.kind} {name!r} is already registered by "
                f"{self._entries[name].builder!r}; take another name or pass overwrite=True."
            )
        entry = Entry(name=name, builder=builder, **about)
        for option in entry.preset:
            if option not in entry.signature.parameters:
                raise OptionError(
                    f"the preset of {name!r} sets {option!r}, which {builder!r} lacks."
                )
        self._entries[name] = entry
        return builder

    def get(self, name: str) -> Entry:
        """The entry of that name.

        Raises:
            UnknownNameError: There is none; the message shows the closest names.
        """
        self._load()
        if name not in self._entries:
            raise unknown(self.kind, str(name), self._entries, self.listing)
        return self._entries[name]

    def names(self, pattern: str = "*") -> list[str]:
        """Names that match a glob, in natural order (`v2` before `v10`)."""
        self._load()
        return sorted(fnmatch.filter(self._entries, pattern), key=_natural)

    def build(self, name: str, options: Mapping[str, Any]) -> Any:
        """Checks the options and calls the builder."""
        entry = self.get(name)
        return entry.builder(**entry.bind(options))

    def _load(self) -> None:
        if self._loaded or self.group is None:
            return
        self._loaded = True
        for point in metadata.entry_points(group=self.group):
            try:
                found = point.load()
                if callable(found):
                    found()
            except Exception as error:  # whatever a foreign package does wrong, ours goes on
                warnings.warn(
                    f"skipped {point.value!r} ({self.group}): {type(error).__name__}: {error}",
                    stacklevel=3,
                )


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type, as far as options need it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Sequence):
        inner = args[0] if args else Any
        return (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and all(_fits(v, inner) for v in value)
        )
    if origin is not None:
        return isinstance(value, origin) if inspect.isclass(origin) else True
    return isinstance(value, hint) if inspect.isclass(hint) else True


def _spell(hint: Any) -> str:
    """An annotation in words."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_spell(a) for a in args)
    if hint is type(None):
        return "None"
    return str(getattr(hint, "__name__", hint)) if not args else str(hint)
