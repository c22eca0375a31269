"""What an object's own code changes while it is used: state, not what it was told to do.

An extraction that goes on in a fresh process must be known as the same one although the first had
used its model and its transform, and be another one whenever an option is. So code is read, and
nothing is run: what a call writes is state, all else is an option.
"""

from __future__ import annotations

import dis
import inspect
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from enum import Enum
from functools import lru_cache
from logging import Logger
from pathlib import PurePath
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

CALLED = ("forward", "__call__")
FILLING = {
    *("add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem"),
    *("popleft", "remove", "setdefault", "update"),
}
TOLD = (type, ModuleType, Logger, PurePath)  # what its repr tells whole
FROZEN = "<frozen"
LOADS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_NAME")
INSTALLED = tuple({sysconfig.get_path(n) for n in ("stdlib", "platstdlib", "purelib", "platlib")})


def is_installed(what: FunctionType | ModuleType | type) -> bool:
    """Whether it is a library's, whose code changes only with its version."""
    if isinstance(what, FunctionType):
        file = what.__code__.co_filename
    else:
        name = what.__name__ if isinstance(what, ModuleType) else what.__module__
        missing = "" if name == "__main__" else FROZEN  # built in
        file = getattr(sys.modules.get(name), "__file__", None) or missing
    return file.startswith((*INSTALLED, FROZEN))


def methods(kind: type) -> list[FunctionType]:
    """What a call of an object runs, as far as its class tells.

    These are forward and __call__, your versions of what a library's base class has, which that
    calls (e.g. training_step), and all that they name in turn.
    """
    there = _members(kind)
    hooks = [n for n, found in there.items() if len({is_installed(f) for f in found}) == 2]
    todo, found = [*CALLED, *hooks], dict[str, list[FunctionType]]()
    while todo:
        name = todo.pop()
        if name in there and name not in found and name != "__init__":
            found[name] = there[name]
            todo += [n for function in there[name] for n in names(function.__code__)]
    return [function for group in found.values() for function in group]


def written(kind: type) -> set[str]:
    """The attributes of an object that its calls set or fill: counters and caches.

    Besides, a library's private ones that it sets after the start, e.g. Lightning's `_trainer`.
    """
    members = _members(kind).items()
    libraries = [f for n, group in members if n != "__init__" for f in group if is_installed(f)]
    private = {n for f in libraries for n in writes(f.__code__) if n.startswith("_")}
    return private.union(*(writes(function.__code__) for function in methods(kind)))


def names(code: CodeType) -> list[str]:
    """All attributes and globals that code names, also in functions inside it."""
    return list(dict.fromkeys(name for part in _parts(code) for name in part.co_names))


@lru_cache(4096)
def writes(code: CodeType) -> frozenset[str]:
    """The attributes and globals that code sets, or puts something into."""
    found: set[str] = set()
    for part in _parts(code):
        steps = [*dis.get_instructions(part)]
        for i, step in enumerate(steps):
            filled: dis.Instruction | None = None
            if step.opname in ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL"):
                filled = step
            elif step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
                filled = _container(steps[:i])
            elif step.opname in LOADS[:2] and step.argval in FILLING:
                filled = steps[i - 1]
            if filled and filled.opname in ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", *LOADS):
                found.add(filled.argval)
    return frozenset(found)


def attributes(what: object) -> dict[str, Any]:
    """What is set on an object, also in slots."""
    found: dict[str, Any] = {}
    for kind in type(what).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(what, name):
                found[name] = getattr(what, name)
    return {**found, **getattr(what, "__dict__", {})}


def is_constant(what: Any, depth: int = 4) -> bool:
    """Whether it is plain values, or an object of such, e.g. a namespace of options."""
    kinds = bool | int | float | str | bytes | Tensor | torch.dtype | FunctionType | nn.Module
    if what is None or isinstance(what, kinds | Enum | PurePath | type):
        return True
    if hasattr(what, "__array_interface__"):
        return True
    if isinstance(what, dict):
        inside = [*what, *what.values()]
    elif isinstance(what, list | tuple | set | frozenset):
        inside = [*what]
    else:
        inside = [] if isinstance(what, TOLD) else [*attributes(what).values()]
        if not inside:  # e.g. a lock
            return False
    return depth > 0 and all(is_constant(item, depth - 1) for item in inside)


def _members(kind: type) -> dict[str, list[FunctionType]]:
    """The functions of a class and its bases, by name."""
    found: dict[str, list[FunctionType]] = {}
    for base in kind.__mro__:
        for name, member in vars(base).items() if base not in (nn.Module, object) else ():
            parts: list[Any] = [member]
            if isinstance(member, property):
                parts = [member.fget, member.fset]
            parts = [inspect.unwrap(getattr(part, "__func__", part)) for part in parts]
            found.setdefault(name, []).extend(f for f in parts if isinstance(f, FunctionType))
    return found


def _parts(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts(constant)


def _container(steps: Sequence[dis.Instruction]) -> dis.Instruction | None:
    """What was loaded to be indexed, told by how high the stack is afterwards."""
    augmented = bool(steps) and steps[-1].opname in ("SWAP", "ROT_THREE")  # its value is on top
    height = 0
    step: dis.Instruction
    for step in reversed(steps):
        if height == 1 + augmented and step.opname not in ("NOP", "EXTENDED_ARG"):
            return step
        height += dis.stack_effect(step.opcode, step.arg, jump=False)
    return None
