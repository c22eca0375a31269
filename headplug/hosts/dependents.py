"""What is made for the width of a head's output, and is no longer right when that changes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.parameter import is_lazy

from headplug.hosts.modules import dims, named_modules, parent, submodule, value_at
from headplug.hosts.twins import find_twin

BEHIND = ("prediction", "prototypes")  # roles whose input is the projection
TENSORS_BEHIND = {"queue": "queue", "bank": "queue", "proto": "prototypes", "cent": "loss centre"}
WidthOf = Callable[[nn.Module], tuple[str, int | None] | None]


@dataclass(frozen=True)
class Dependent:
    """Something whose shape follows the output of a head.

    Attributes:
        path: The module or tensor in the model.
        kind: What it is: "prediction", "prototypes", "memory bank", "queue", "loss centre", ...
        width: The width of the projection that it is made for.
        twin: Path of its EMA copy, if it has one.
        limit: The largest width that it can be made for, if there is one.
        rivals: Other heads of that width which it may belong to as well; the user has to say.
    """

    path: str
    kind: str
    width: int
    twin: str | None = None
    limit: int | None = None
    rivals: tuple[str, ...] = ()


def find_dependents(
    model: nn.Module,
    path: str,
    roles: Mapping[str, str],
    width_of: WidthOf,
    copies: Collection[str | None],
) -> tuple[Dependent, ...]:
    """What is made for the output of the head at a path, with its EMA copies.

    Args:
        model: The model.
        path: The head.
        roles: Role by path, of all heads of the model.
        width_of: As in `slots_by_role`.
        copies: Paths that hold the head's EMA copy, or may.
    """
    own = dims(submodule(model, path))
    rivals = _rivals(model, path, roles, copies)
    found = {
        d.path: replace(
            d,
            twin=_copy_of(model, d, roles),
            rivals=tuple(p for p in rivals if _unclear(d, path, p)),
        )
        for d in _behind(model, path, roles, width_of)
        if own and d.width == own[1] and not any(_nearer(d.path, p, path) for p in rivals)
    }
    twins = {d.twin for d in found.values()}
    return tuple(d for d in found.values() if d.path not in twins)


def _rivals(
    model: nn.Module, path: str, roles: Mapping[str, str], copies: Collection[str | None]
) -> list[str]:
    """Other heads of that output width, which a dependent may belong to; not the EMA copies."""
    own = dims(submodule(model, path))
    return [
        p
        for p, role in roles.items()
        if not {role, roles[path]} & set(BEHIND) and p != path and p not in copies
        if own and (d := dims(submodule(model, p))) and d[1] == own[1]
    ]


def _nearer(path: str, other: str, head: str) -> bool:
    """Whether a path has more words of one head's path than of another's.

    >>> _nearer("criterion_local.bank", "head_local", "head_global")
    True
    """
    words, others, own = (set(re.split(r"[._]", p.lower())) for p in (path, other, head))
    return len(words & (others - own)) > len(words & (own - others))


def _unclear(dependent: Dependent, path: str, other: str) -> bool:
    """Whether nothing tells which of two heads it is made for; its place in a chain does."""
    beside = dependent.kind != "next layer"
    return beside and not _nearer(dependent.path, path, other)


def _copy_of(model: nn.Module, dependent: Dependent, roles: Mapping[str, str]) -> str | None:
    """The EMA copy of a dependent, which follows it."""
    if dependent.kind == "projection" or not isinstance(value_at(model, dependent.path), nn.Module):
        return None
    return find_twin(model, dependent.path, [p for p, r in roles.items() if r == dependent.kind])[0]


def _behind(
    model: nn.Module, path: str, roles: Mapping[str, str], width_of: WidthOf
) -> Iterator[Dependent]:
    """What may follow the output of the head at a path, with the width it is made for."""
    own = dims(submodule(model, path))
    others = {p: (r, d) for p, r in roles.items() if p != path and (d := dims(submodule(model, p)))}
    if roles[path] == "prediction":  # the loss compares its output with the projection
        yield from (Dependent(p, r, d[1]) for p, (r, d) in others.items() if r == "projection")
    if roles[path] in BEHIND or own is None:
        return
    yield from (Dependent(p, r, d[0]) for p, (r, d) in others.items() if r in BEHIND)
    for p, module in named_modules(model):
        if made := width_of(module):
            yield Dependent(p, made[0], own[1] if made[1] is None else made[1])
    holder = model.get_submodule(parent(path))
    if isinstance(holder, nn.Sequential):
        names = list(holder._modules)
        for name in names[names.index(path.rpartition(".")[2]) + 1 :]:
            module = holder.get_submodule(name)
            behind = dims(module)
            norm = getattr(module, "num_features", None)
            if width := behind[0] if behind else norm:
                yield Dependent(f"{parent(path)}.{name}".lstrip("."), "next layer", width)
            if behind:
                break
    while path:  # tensors that the modules around the head hold themselves
        path = parent(path)
        around = model.get_submodule(path)
        own_tensors = [
            *around.named_parameters(recurse=False),
            *around.named_buffers(recurse=False),
        ]
        for name, tensor in own_tensors:
            kind = next((k for w, k in TENSORS_BEHIND.items() if w in name.lower()), None)
            if (kind or tensor.ndim == 2) and not is_lazy(tensor) and own[1] in tensor.shape:
                yield Dependent(f"{path}.{name}".lstrip("."), kind or "tensor", own[1])
