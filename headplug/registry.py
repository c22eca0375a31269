"""A registry of named builders that knows nothing of what they build.

Names are added by one explicit call and never replaced by accident; options are checked by name and
type against the builder's signature before it runs, so that none is silently ignored; third parties
add entries through an entry-point group, which stays unread until a name that is not here is looked
up, or all names are listed.
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
import re
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from headplug.annotations import fits, spell, unquoted
from headplug.errors import OptionError, unknown

Builder = Callable[..., Any]


@dataclass(frozen=True, repr=False)
class Entry:
    """One registered name; `print` shows all that a user can set.

    Attributes:
        name: What users type.
        builder: The class or function that builds it.
        summary: One line on what it is.
        paper: Where it comes from, e.g. "arXiv 2002.05709".
        preset: Values that replace the builder's own defaults.
        source: What it must equal, where there is such a thing: "package.module:Class", or
            "package.module:Class.attribute" for a part of a class.
        finish: What every entry of the registry goes through once built; see `Registry`.
    """

    name: str
    builder: Builder
    summary: str = ""
    paper: str = ""
    preset: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    finish: Builder | None = None

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        """The parameters of builder and finish, with the preset's values as their defaults."""
        own = _parameters(self.builder)
        rest = [p for p in own if p.kind is p.VAR_KEYWORD]
        parameters = [
            p.replace(kind=p.KEYWORD_ONLY, default=self.preset.get(p.name, p.default))
            for p in [*own, *self.shared]
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        return inspect.Signature([*parameters, *rest])

    @functools.cached_property
    def shared(self) -> list[inspect.Parameter]:
        """What finish takes besides what was built and its name.

        A builder that takes any option gets them all itself.
        """
        own = _parameters(self.builder)
        if self.finish is None or any(p.kind is p.VAR_KEYWORD for p in own):
            return []
        names = {p.name for p in own}
        return [p for p in _parameters(self.finish)[2:] if p.name not in names]

    @property
    def open_ended(self) -> bool:
        """Whether the builder takes options that its signature does not name."""
        return any(p.kind is p.VAR_KEYWORD for p in self.signature.parameters.values())

    @property
    def required(self) -> list[str]:
        """Options that must be given."""
        parameters = self.signature.parameters.values()
        return [p.name for p in parameters if p.default is p.empty and p.kind is p.KEYWORD_ONLY]

    @property
    def defaults(self) -> dict[str, Any]:
        """Every option that has a default, with its value for this entry."""
        parameters = self.signature.parameters.values()
        own = {p.name: p.default for p in parameters if p.default is not p.empty}
        return {**own, **self.preset}

    def __repr__(self) -> str:
        options = [f"{o} (required)" for o in self.required]
        options += [f"{o}={value!r}" for o, value in self.defaults.items()]
        rows = {"paper": self.paper, "equals": self.source, "options": ", ".join(options)}
        about = f"{self.name}: {self.summary}" if self.summary else self.name
        return "\n".join([about, *(f"  {row:8} {text}" for row, text in rows.items() if text)])

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuses options that the builder lacks or that are of another type.

        Raises:
            OptionError: It names the option, its value and what is possible.
        """
        parameters = self.signature.parameters
        for name, value in options.items():
            if name not in parameters:
                if self.open_ended:
                    continue
                raise OptionError(f"{self.name}: {unknown('option', name, parameters)}")
            hint, default = parameters[name].annotation, parameters[name].default
            if hint is inspect.Parameter.empty or (value is None and default is None):
                continue
            if not fits(value, hint):
                raise OptionError(
                    f"{self.name}: {name} must be {spell(hint)}, not {value!r} "
                    f"({type(value).__name__}).{unquoted(value, hint)}"
                )

    def bind(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All options with defaults filled in.

        Raises:
            OptionError: One is unknown, missing or of the wrong type; the message names it.
        """
        self.check(options)
        missing = [name for name in self.required if name not in options]
        if missing:
            raise OptionError(
                f"{self.name}: {', '.join(missing)} must be given, e.g. {missing[0]}=512."
            )
        return {**self.defaults, **options}

    def build(self, options: Mapping[str, Any]) -> Any:
        """Calls the builder, and finish on what it returns, with options that `bind` returned."""
        last = {p.name for p in self.shared}
        built = self.builder(**{k: v for k, v in options.items() if k not in last})
        if self.finish is not None:
            self.finish(built, self.name, **{k: v for k, v in options.items() if k in last})
        return built


class Registry:
    """Entries of one kind, by name.

    Args:
        kind: What the entries are, for messages: "head".
        group: Entry-point group through which other packages add theirs. An entry point leads to a
            class, which is registered under the entry point's name, to a function, which is
            called, or to a module, whose import registers.
        listing: How a user lists the names, for messages.
        finish: Called on everything that is built, with its name and those of its options that the
            builder does not take itself; so every entry has them.

    >>> shapes = Registry("shape")
    >>> _ = shapes.register("square", lambda side=1: side**2, summary="a square")
    >>> shapes.build("square", {"side": 3})
    9
    """

    def __init__(
        self,
        kind: str,
        group: str | None = None,
        listing: str = "",
        finish: Builder | None = None,
    ) -> None:
        self.kind = kind
        self.group = group
        self.listing = listing
        self.finish = finish
        self._entries: dict[str, Entry] = {}
        self._loaded = False

    def register(
        self,
        name: str,
        builder: Builder | None = None,
        *,
        summary: str = "",
        paper: str = "",
        preset: Mapping[str, Any] | None = None,
        source: str = "",
        overwrite: bool = False,
    ) -> Any:
        """Adds an entry, directly or as a decorator.

        Args:
            name: The new name: lower-case letters, digits, `_`, `-`, `.`.
            builder: What builds it. Left out, a decorator is returned.
            summary: One line on what it is.
            paper: Where it comes from, e.g. "arXiv 2002.05709".
            preset: Values that replace the builder's own defaults.
            source: What it must equal; see `Entry`.
            overwrite: Replace an entry of the same name.

        Raises:
            OptionError: The name is malformed or taken, the builder cannot be called, or the preset
                sets an unknown option or a value of the wrong type.
        """
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
        fixed = types.MappingProxyType(dict(preset or {}))
        if builder is None:
            return functools.partial(
                self.register,
                name,
                summary=summary,
                paper=paper,
                preset=fixed,
                source=source,
                overwrite=overwrite,
            )
        if not callable(builder):
            raise OptionError(f"the builder of {name!r} must be a class or function: {builder!r}.")
        entry = Entry(name, builder, summary, paper, fixed, source, self.finish)
        try:
            entry.check(fixed)
        except OptionError as error:
            raise OptionError(f"the preset of {error}") from None
        self._entries[name] = entry
        return builder

    def get(self, name: str) -> Entry:
        """The entry of that name.

        Raises:
            UnknownNameError: There is none; the message shows the closest names.
        """
        if name not in self._entries:
            self._load()
        if name not in self._entries:
            raise unknown(self.kind, str(name), self._entries, self.listing)
        return self._entries[name]

    def names(self, pattern: str = "*") -> list[str]:
        """Names that match a glob, in natural order (`v2` before `v10`)."""
        self._load()
        return sorted((n for n in self._entries if fnmatch.fnmatchcase(n, pattern)), key=_natural)

    def build(self, name: str, options: Mapping[str, Any]) -> Any:
        """Checks the options and calls the builder.

        Raises:
            UnknownNameError: There is no such entry.
            OptionError: An option is unknown, missing or of the wrong type.
        """
        entry = self.get(name)
        return entry.build(entry.bind(options))

    def _load(self) -> None:
        if self._loaded or self.group is None:
            return
        self._loaded = True
        for point in metadata.entry_points(group=self.group):
            try:
                found = point.load()
                if inspect.isclass(found):
                    if all(entry.builder is not found for entry in self._entries.values()):
                        summary = (found.__doc__ or "").strip().partition("\n")[0]
                        self.register(point.name, found, summary=summary)
                elif callable(found):
                    found()
            except Exception as error:  # whatever a foreign package does wrong, ours goes on
                warnings.warn(
                    f"skipped the {self.kind} {point.name!r} of another package "
                    f"({point.value!r}): {type(error).__name__}: {error}",
                    stacklevel=3,
                )


def _parameters(builder: Builder) -> list[inspect.Parameter]:
    try:
        signature = inspect.signature(builder, eval_str=True)
    except Exception:  # an annotation that means nothing at run time: types go unchecked
        signature = inspect.signature(builder)
    return list(signature.parameters.values())


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]
