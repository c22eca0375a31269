r"""What the names of taps stand for.

`backbone`, `pre_projection` (what the head receives), `projection` (what it returns) and
`projection.hidden1`, `projection.hidden2`, ... (what it computes on the way, after norm and
activation) mean the same on every host and for every head. Besides them a point is one of

| name | stands for |
|---|---|
| `backbone.layer4` | a module by its path |
| `backbone.layer*`, `backbone.**.conv1` | what matches; `*` stays in a level, `**` crosses them |
| `re:backbone\.layer[34]` | all whose whole path matches the regular expression |
| `backbone:BatchNorm2d`, `:Linear` | all modules of a class at or below a path, or in the model |
| `2`, `:-1`, `backbone:2` | a stage by timm's feature index, of the model or of a part of it |

and its ending says what is read there: `:input` the first thing that the module receives,
`:input[1]`, `:input[mask]` another by position or name, `:output[0]`, `:output[key]` a part of a
tuple or mapping that it returns; without an ending, all that it returns. Wrappers
(DistributedDataParallel, FSDP, torch.compile) leave no mark in a name, so names outlive wrapping.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import NamedTuple, NoReturn

import torch
from torch import nn

from headplug.errors import SlotError, TapError, unknown
from headplug.heads.layers import hidden_paths
from headplug.hosts import HeadSlot, find_slots
from headplug.hosts.modules import inside
from headplug.hosts.twins import COPY_WORDS
from headplug.taps.names import Name
from headplug.taps.options import Tap
from headplug.taps.pooling import PLAIN, Form, form_of
from headplug.taps.wrappers import compiled_in, is_sharded, plain, tappable, unwrapped

HEAD_POINTS = ("pre_projection", "projection")
SHARED = ("backbone", *HEAD_POINTS)
BACKBONES = ("backbone", "encoder", "student_backbone", "backbone_model")


class Point(NamedTuple):
    """One point of one model.

    Attributes:
        name: What was asked for, or the path that a pattern matched, with its ending.
        path: Where the module is.
        module: The module.
        takes_input: Whether what it receives is read instead of what it returns.
        key: The part of that to read; None is the first input, or the whole output.
        how: Its options.
        form: What shapes mean there.
    """

    name: str
    path: str
    module: nn.Module
    takes_input: bool = False
    key: int | str | None = None
    how: Tap = Tap("")
    form: Form = PLAIN


Asked = Mapping[str, Point | dict[str, Point]]
"""By the names of a request one point, or all that a pattern stands for."""


class Layout:
    """The places of a model that points can name, looked up once for many batches.

    Args:
        model: The model.
        listing: What shows all points, for messages.

    Attributes:
        model: The model as given.
        root: The model without its wrappers.
        modules: Every module below the root by path.
        compiled: The modules on which torch.compile was used.
        sharded: Whether FSDP keeps the weights in parts.

    Raises:
        TapError: The model is wrapped in DataParallel, exported or scripted.
    """

    def __init__(self, model: nn.Module, listing: str = "list_taps(model, x)") -> None:
        self.model, self._listing = model, listing
        named = tappable(model)
        every = list({id(module): module for module in named.values()}.values())
        self.compiled = compiled_in(every)
        self.sharded = is_sharded(every)
        self.root, self._prefix = unwrapped(model)
        # a compiled module has the path of the one inside it, which runs either way
        start = len(self._prefix)
        self.modules = {
            plain(path[start:]): module
            for path, module in named.items()
            if len(path) > start and path.startswith(self._prefix)
        }

    @cached_property
    def head(self) -> HeadSlot | None:
        """The projection head, if there is exactly one; looking for it takes a while."""
        return self._found[0]

    @cached_property
    def shared(self) -> dict[str, Point]:
        """The points that all hosts share, as far as this model has them."""
        found = {}
        if path := next((p for p in BACKBONES if p in self.modules), None):
            found["backbone"] = Point("backbone", path, self.modules[path])
        elif own := self.own_backbone:
            path = next(p for p, module in self.backbones.items() if module is own)
            found["backbone"] = Point("backbone", path, own)
        if self.head:
            module = self.modules[path := plain(self.head.path)]
            for name in HEAD_POINTS:
                found[name] = Point(name, path, module, name == "pre_projection")
            for i, hidden in enumerate(hidden_paths(module)):
                inner = f"{path}.{plain(hidden)}"
                name = f"projection.hidden{i + 1}"
                found[name] = Point(name, inner, self.modules[inner])
        return found

    @cached_property
    def backbones(self) -> dict[str, nn.Module]:
        """Every backbone by path, EMA copies too."""
        return {
            path: module
            for path, module in self.modules.items()
            if any(name in path.rpartition(".")[2] for name in ("backbone", "encoder"))
            and _words(path) - COPY_WORDS in ({"backbone"}, {"encoder"})
        }

    @property
    def own_backbone(self) -> nn.Module | None:
        """The backbone that is named like the head: `student_backbone` for `student_head`."""
        own = _words(self.head.path) & COPY_WORDS if self.head else set()
        return next((m for p, m in self.backbones.items() if _words(p) & COPY_WORDS == own), None)

    @cached_property
    def _found(self) -> tuple[HeadSlot | None, str]:
        """The projection head, or why there is none."""
        try:
            slots = [s for s in find_slots(self.root) if s.role == "projection"]
        except SlotError as error:
            return None, str(error)
        if len(slots) == 1:
            return slots[0], ""
        if not slots:
            return None, f"none is found in this {type(self.root).__name__}."
        return None, f"there are {len(slots)}, {', '.join(s.path for s in slots)}."

    def resolve(self, asked: Mapping[str, Tap]) -> Asked:
        """The points that each name of a request stands for, in the order asked.

        Raises:
            UnknownNameError: A name matches nothing; the message shows the closest ones.
            SlotError: `pre_projection` or `projection` of a model without one projection head.
            TapError: There is no name, one has an ending that means nothing, or it means a module
                that is never called (a ModuleList) or a feature index that is not there.
        """
        if not asked:
            raise TapError(f"name at least one point, for example: {', '.join(self.names()[:6])}.")
        return {name: self._resolve(tap) for name, tap in asked.items()}

    def names(self) -> list[str]:
        """The shared names and all paths."""
        return [*self.shared, *(p for p in self.modules if p not in self.shared)]

    def _resolve(self, tap: Tap) -> Point | dict[str, Point]:
        whole = tap.name in self.modules  # a path may have a colon in it
        asked = Name(tap.name) if whole else Name.parse(tap.name)
        path = asked.path if asked.regex else self._own(asked.path)
        exact = asked.kind is None and not asked.regex and self._is_exact(path)
        if asked.stage is not None:
            matched, exact = {"": self._feature(path, asked.stage)}, True
        elif asked.kind is not None:
            matched = self._of_class(path, asked.kind)
        elif asked.regex:
            matched = {p: p for p in self.modules if re.fullmatch(path, p)}
        else:
            matched = self._named(path)
        called = {n: p for n, p in matched.items() if is_called(self.modules[p])}
        if not called and matched:
            one = next(iter(matched.values()))
            raise TapError(
                f"{tap.name!r} is a {type(self.modules[one]).__name__}, which is never called. "
                f"Name what is in it: '{one}.*'."
            )
        if not called:
            self._refuse(tap.name, path)
        takes_input = asked.side == "input" or (path == "pre_projection" and not asked.side)

        def point(name: str, at: str) -> Point:
            form = self._form(at, takes_input) if tap.pool else PLAIN
            how = replace(tap, point="")
            return Point(name, at, self.modules[at], takes_input, asked.key, how, form)

        if exact:
            return point(tap.name, *called.values())
        return {name + asked.ending: point(name + asked.ending, at) for name, at in called.items()}

    def _own(self, path: str) -> str:
        """A path without wrappers; one that starts with a shared name, from there."""
        path = plain(path.removeprefix(self._prefix))
        first, dot, rest = path.partition(".")
        if dot and first == "backbone" and first not in self.modules and first in self.shared:
            return f"{self.shared[first].path}.{rest}"
        return path

    def _is_exact(self, path: str) -> bool:
        return path in self.modules or (_is_shared(path) and path in self.shared)

    def _named(self, path: str) -> dict[str, str]:
        """The paths that a path, a shared name or a glob stands for, by what they are called."""
        if path in self.modules:
            return {path: path}
        if _is_shared(path) and path in self.shared:
            return {path: self.shared[path].path}
        found = {p: p for p in self.modules if _matches(path.split("."), p.split("."))}
        if not found and _is_shared(path):
            hidden = (n for n in self.shared if n not in SHARED and fnmatchcase(n, path))
            found = {n: self.shared[n].path for n in hidden}
        return found

    def _below(self, path: str) -> list[str]:
        """The paths at or below those that a name stands for; all for an empty name."""
        tops = self._named(path).values()
        return [p for p in self.modules if not path or any(p == t or inside(p, t) for t in tops)]

    def _of_class(self, path: str, kind: str) -> dict[str, str]:
        below = self._below(path)
        found = [p for p in below if kind in (c.__name__ for c in type(self.modules[p]).__mro__)]
        if below and not found:
            known = {type(self.modules[p]).__name__ for p in below}
            raise unknown("class of module", kind, sorted(known), f"In {path or 'the model'}.")
        return {p: p for p in found}

    def _feature(self, path: str, index: int) -> str:
        """The path of a stage, by its index in timm's feature_info."""
        below = self._below(path)
        if path and not below:
            self._refuse(path, path)
        places = ({} if path else {"": self.root}) | {p: self.modules[p] for p in below}
        found = ((p, i) for p, m in places.items() if (i := getattr(m, "feature_info", None)))
        place, info = next(found, ("", None))
        if info is None:
            raise TapError(
                f"feature index {index}: nothing in {path or 'the model'} has timm's feature_info. "
                f"Name a module by its path; {self._listing} shows all."
            )
        names: list[str] = [entry["module"] for entry in getattr(info, "info", info)]
        if not -len(names) <= index < len(names):
            raise TapError(
                f"there is no feature {index}; {place or 'the model'} has 0 to {len(names) - 1}: "
                f"{', '.join(names)}."
            )
        name = names[index]
        start = f"{place}." if place else ""  # timm's own extractors write _ or put a model around
        for full in (name, name.replace(".", "_"), f"model.{name}"):
            if start + full in self.modules:
                return start + full
        raise TapError(
            f"feature {index} of {place or 'the model'} is {name!r} by timm's feature_info, where "
            f"there is no module. Name one by its path; {self._listing} shows all."
        )

    def _form(self, path: str, takes_input: bool) -> Form:
        """What shapes mean at a path, from the module there and those around it."""
        parts = path.split(".")
        around = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        return form_of([self.root, *(self.modules[p] for p in around)], takes_input)

    def _refuse(self, name: str, path: str) -> NoReturn:
        if path in HEAD_POINTS:
            raise SlotError(
                f"{name!r} needs one projection head: {self._found[1]} Name a module by its path "
                "instead: 'path:input' for what it receives, 'path' for what it returns."
            )
        levels = " In a glob '*' stays within one level and '**' crosses levels."
        hint = f"{self._listing} shows all." + (levels if "*" in name else "")
        raise unknown("tap", name, self.names(), hint)


def flat(asked: Asked) -> list[Point]:
    """All points, each once."""
    each = (p.values() if isinstance(p, dict) else (p,) for p in asked.values())
    return list(dict.fromkeys(p for points in each for p in points))


def _words(path: str) -> set[str]:
    return set(re.split(r"[._]", path))


def _is_shared(path: str) -> bool:
    return path in SHARED or path.startswith("projection.")


def is_called(module: nn.Module) -> bool:
    """Whether a module has a forward that can be seen."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return getattr(module.forward, "__name__", "") != nn.Module.forward.__name__


def _matches(pattern: list[str], path: list[str]) -> bool:
    if not pattern or not path:
        return not path and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _matches(pattern[1:], path) or _matches(pattern, path[1:])
    return fnmatchcase(path[0], pattern[0]) and _matches(pattern[1:], path[1:])
