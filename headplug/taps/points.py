"""What the names of taps stand for.

`backbone`, `pre_projection` (what the head receives), `projection` (what it returns) and
`projection.hidden1`, `projection.hidden2`, ... (what it computes on the way, after norm and
activation) mean the same on every host and for every head. Besides them a point is a module path or
a glob of paths, in which `*` stays within one level and `**` crosses levels; the ending `:input`
means what a module receives. Wrappers (DistributedDataParallel, torch.compile) leave no mark in a
name, so names outlive the wrapping.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from types import FunctionType
from typing import NamedTuple

from torch import nn

from headplug.errors import SlotError, TapError, unknown
from headplug.heads.layers import hidden_paths
from headplug.hosts import HeadSlot, find_slots
from headplug.hosts.twins import COPY_WORDS

HEAD_POINTS = ("pre_projection", "projection")
SHARED = ("backbone", *HEAD_POINTS)
BACKBONES = ("backbone", "encoder", "student_backbone", "backbone_model")


class Point(NamedTuple):
    """One point of one model.

    Attributes:
        name: What results are called: as asked, or the path that a glob matched.
        path: Where the module is.
        module: The module to hook.
        takes_input: Whether its input is read instead of its output.
    """

    name: str
    path: str
    module: nn.Module
    takes_input: bool


class Layout:
    """The places of a model that points can name, looked up once for many batches.

    Attributes:
        root: The model without its wrappers.
        modules: Every module below the root by path.
        compiled: Whether torch.compile was used on the model or a part of it.

    Raises:
        TapError: The model is wrapped in DataParallel.
    """

    def __init__(self, model: nn.Module) -> None:
        every = list(model.modules())
        if any(isinstance(m, nn.DataParallel) for m in every):
            raise TapError(
                "DataParallel runs copies of the model, and hooks see a part of the batch in each. "
                "Tap model.module, or use DistributedDataParallel."
            )
        self.compiled = any(map(_is_compiled, every))
        self.root, self._prefix = _unwrapped(model)
        # a compiled module has the path of the one inside it, which runs either way
        self.modules = {
            _plain(path): module for path, module in self.root.named_modules(remove_duplicate=False)
        }
        del self.modules[""]

    @cached_property
    def head(self) -> HeadSlot | None:
        """The projection head, if there is exactly one; looking for it takes a while."""
        return self._found[0]

    @cached_property
    def shared(self) -> dict[str, Point]:
        """The points that all hosts share, as far as this model has them."""
        found = {}
        if path := next((p for p in BACKBONES if p in self.modules), None):
            found["backbone"] = Point("backbone", path, self.modules[path], False)
        if self.head:
            module = self.modules[path := _plain(self.head.path)]
            for name in HEAD_POINTS:
                found[name] = Point(name, path, module, name == "pre_projection")
            for i, hidden in enumerate(hidden_paths(module)):
                inner = f"{path}.{_plain(hidden)}"
                name = f"projection.hidden{i + 1}"
                found[name] = Point(name, inner, self.modules[inner], False)
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

    def resolve(self, asked: Sequence[str]) -> dict[str, list[Point]]:
        """The points that each name stands for, in the order asked.

        Raises:
            UnknownNameError: A name matches nothing; the message shows the closest ones.
            SlotError: `pre_projection` or `projection` of a model without one projection head.
            TapError: There is no name, one is not a string or ends in something else than
                ":input", or it means a module that is never called (a ModuleList).
        """
        if not asked:
            raise TapError(f"name at least one point, for example: {', '.join(self.names()[:6])}.")
        return {name: self._resolve(name) for name in asked}

    def names(self) -> list[str]:
        """All names but globs and inputs."""
        return [*self.shared, *(p for p in self.modules if p not in self.shared)]

    def _resolve(self, name: str) -> list[Point]:
        if not isinstance(name, str):
            raise TapError(f"a point is a string, not {name!r}.")
        path, colon, ending = name.partition(":")
        if colon and ending != "input":
            raise TapError(f"{name!r}: after ':' only 'input' can follow.")
        path = _plain(path.removeprefix(self._prefix))
        if _is_shared(path) and path not in self.modules and path in self.shared:
            shared = self.shared[path]
            if not colon:
                return [shared]
            path = path if shared.takes_input else shared.path
        if path in self.modules:
            if not _callable(self.modules[path]):
                raise TapError(
                    f"{name!r} is a {type(self.modules[path]).__name__}, which is never called. "
                    f"Name what is in it: '{path}.*'."
                )
            return [Point(name, path, self.modules[path], bool(colon))]
        points = [
            Point(p + colon + ending, p, module, bool(colon))
            for p, module in self.modules.items()
            if _matches(path.split("."), p.split(".")) and _callable(module)
        ]
        if not points and _is_shared(path):
            points = [p for n, p in self.shared.items() if n not in SHARED and fnmatchcase(n, path)]
        if not points and name in HEAD_POINTS:
            raise SlotError(
                f"{name!r} needs one projection head: {self._found[1]} Name a module by its path "
                "instead: 'path:input' for what it receives, 'path' for what it returns."
            )
        if not points:
            levels = " In a glob '*' stays within one level and '**' crosses levels."
            hint = "list_taps(model, x) shows all." + (levels if "*" in name else "")
            raise unknown("tap", name, self.names(), hint)
        return points


def _words(path: str) -> set[str]:
    return set(re.split(r"[._]", path))


def _is_shared(path: str) -> bool:
    return path in SHARED or path.startswith("projection.")


def flat(resolved: Mapping[str, Sequence[Point]]) -> list[Point]:
    """All points, each once."""
    return list(dict.fromkeys(p for points in resolved.values() for p in points))


def _unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """What DistributedDataParallel and torch.compile wrap, and the start of paths to it."""
    prefix = ""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model, prefix = model.module, prefix + "module."
        elif "_orig_mod" in model._modules:
            model, prefix = model._orig_mod, prefix + "_orig_mod."  # type: ignore[assignment]
        else:
            return model, prefix


def _plain(path: str) -> str:
    if "_orig_mod" not in path:
        return path
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile was used on the module, its call or one of its methods."""
    return any(
        type(value) is FunctionType and hasattr(value, "_torchdynamo_orig_callable")
        for value in vars(module).values()
    )


def _callable(module: nn.Module) -> bool:
    return getattr(module.forward, "__name__", "") != nn.Module.forward.__name__


def _matches(pattern: list[str], path: list[str]) -> bool:
    if not pattern or not path:
        return not path and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _matches(pattern[1:], path) or _matches(pattern, path[1:])
    return fnmatchcase(path[0], pattern[0]) and _matches(pattern[1:], path[1:])
