"""What a host library tells the core: where the heads of a model are.

An adapter describes slots and performs no surgery; it is found through the entry-point group
`headplug.adapters` and recognises a model by the classes of its modules, without importing the
host. The walk that finds heads, twins and dependents is here once; an adapter gives it two small
functions.
"""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Protocol

from torch import nn

from headplug.errors import SlotError, unknown
from headplug.heads import ProjectionHead

ROLE_BY_NAME = {
    "projection_head": "projection",
    "projector": "projection",
    "projection": "projection",
    "proj_head": "projection",
    "prediction_head": "prediction",
    "predictor": "prediction",
    "prototypes": "prototypes",
}
BEHIND = ("prediction", "prototypes")  # roles whose input is the projection
COPY_WORDS = ("momentum", "ema", "teacher", "student", "target", "online", "key", "query", "anchor")


@dataclass(frozen=True)
class Dependent:
    """A module whose shape follows the output of a head.

    Attributes:
        path: Where it is in the model.
        kind: What it is: "prediction", "prototypes", "memory bank", "loss".
        width: The width of the projection that it is made for.
    """

    path: str
    kind: str
    width: int


@dataclass(frozen=True)
class HeadSlot:
    """A place in a model that holds a head.

    Attributes:
        path: Where the head is, as in `model.get_submodule(path)`.
        role: "projection", "prediction", "prototypes" or "local projection".
        input_dim: Width of its input.
        output_dim: Width of its output.
        twin: Path of its EMA copy, if it has one.
        dependents: What is made for its output.
        aliases: Other paths of the same module.
    """

    path: str
    role: str
    input_dim: int
    output_dim: int
    twin: str | None = None
    dependents: tuple[Dependent, ...] = ()
    aliases: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line: path, role, dims, twin."""
        twin = f", EMA twin {self.twin}" if self.twin else ""
        return f"{self.path} ({self.role}, {self.input_dim} > {self.output_dim}{twin})"


class HostAdapter(Protocol):
    """What a package offers under the entry-point group `headplug.adapters`."""

    name: str

    def recognises(self, model: nn.Module) -> bool:
        """Whether the model is built with this host's parts."""

    def find_slots(self, model: nn.Module) -> list[HeadSlot]:
        """The slots of such a model.

        Raises:
            SlotError: The model is known to have no head, or it is unclear which copy is trained.
        """


RoleOf = Callable[[nn.Module], str | None]
WidthOf = Callable[[nn.Module], tuple[str, int] | None]


@functools.cache
def adapters() -> tuple[HostAdapter, ...]:
    """The installed adapters; one that fails to load is named in a warning and left out."""
    found: list[HostAdapter] = []
    for point in metadata.entry_points(group="headplug.adapters"):
        try:
            found.append(point.load())
        except Exception as error:
            warnings.warn(
                f"skipped the adapter {point.value!r}: {type(error).__name__}: {error}",
                stacklevel=2,
            )
    return tuple(found)


def find_slots(model: nn.Module) -> list[HeadSlot]:
    """Finds the heads of a model.

    Heads are recognised by their classes (lightly's, solo-learn's, headplug's own) or, in a plain
    PyTorch model, by an attribute called projection_head, projector, projection or proj_head.

    Args:
        model: Any module that holds a projection head.

    Returns:
        The slots in the order of the model's modules; EMA copies appear as `twin` of theirs.

    Raises:
        SlotError: Two copies of a head are there and nothing shows which one is trained.

    >>> model = nn.ModuleDict({"backbone": nn.Identity(), "projector": nn.Linear(8, 4)})
    >>> print(*find_slots(model))
    projector (projection, 8 > 4)
    """
    for adapter in adapters():
        if adapter.recognises(model):
            return adapter.find_slots(model)
    return slots_by_role(model)


def slots_by_role(
    model: nn.Module, role_of: RoleOf = lambda m: None, width_of: WidthOf = lambda m: None
) -> list[HeadSlot]:
    """Describes every module that has a role, pairs EMA twins and lists dependents.

    Args:
        model: The model.
        role_of: The role of a module of the host's, or None.
        width_of: For other modules made for the projection's width (queues, losses): kind and
            width.

    Raises:
        SlotError: As in `find_slots`.
    """
    roles = {p: r for p, m in named_modules(model) if (r := role_of(m) or _plain_role(p, m))}
    roles = {p: r for p, r in roles.items() if not _inside(p, roles) and dims(model, p)}
    twins = {p: find_twin(model, p, roles) for p in roles}
    taken = set(twins.values())
    return [
        describe(model, p, r, twins[p], roles, width_of) for p, r in roles.items() if p not in taken
    ]


def describe(
    model: nn.Module,
    path: str,
    role: str = "projection",
    twin: str | None = None,
    roles: Mapping[str, str] | None = None,
    width_of: WidthOf = lambda m: None,
) -> HeadSlot:
    """The slot at a path.

    Raises:
        UnknownNameError: The model has no such module.
        SlotError: The widths of the module cannot be read.
    """
    module = submodule(model, path)
    widths = dims(model, path)
    if widths is None:
        raise SlotError(
            f"{path!r} is a {type(module).__name__} without linear layers, so its widths are "
            "unknown. Pass a head that is already built."
        )
    dependents: tuple[Dependent, ...] = ()
    if role == "projection":
        behind = [
            Dependent(p, r, inside[0])
            for p, r in (roles or {}).items()
            if r in BEHIND and p != path and (inside := dims(model, p)) and inside[0] == widths[1]
        ]
        others = [
            Dependent(p, *made)
            for p, m in named_modules(model)
            if (made := width_of(m)) and made[1] == widths[1]
        ]
        dependents = (*behind, *others)
    aliases = tuple(
        p for p, m in model.named_modules(remove_duplicate=False) if m is module and p != path
    )
    return HeadSlot(path, role, *widths, twin, dependents, aliases)


def find_twin(model: nn.Module, path: str, among: Mapping[str, str] | None = None) -> str | None:
    """The EMA copy of the module at a path, told by structure and `requires_grad`.

    Args:
        model: The model.
        path: The head that is trained.
        among: Paths that come into question; left out, every module.

    Returns:
        The path of the copy, or None if there is none or the module itself is frozen.

    Raises:
        SlotError: Several modules could be the copy, or two are trained and named like a pair.
    """
    module = submodule(model, path)
    same = [
        (p, m)
        for p, m in named_modules(model)
        if (among is None or p in among)
        and m is not module
        and not p.startswith(path + ".")
        and not path.startswith(p + ".")
        and _structure(m) == _structure(module)
    ]
    if not _trains(module) or not _structure(module)[1]:
        return None
    frozen = [p for p, m in same if not _trains(m)]
    if len(frozen) > 1:  # two pairs of equal heads: global and local
        likeness = {p: difflib.SequenceMatcher(None, p, path).ratio() for p in frozen}
        best = max(likeness.values())
        frozen = [p for p in frozen if likeness[p] == best]
    if len(frozen) == 1:
        return frozen[0]
    pair = [p for p, _ in same if any(w in f"{p}.{path}".lower() for w in COPY_WORDS)]
    if frozen or pair:
        names = ", ".join(frozen or pair)
        raise SlotError(
            f"{path} and {names} are alike and nothing shows which is the EMA copy (its parameters "
            f"should have requires_grad=False). Say so: slot={path!r}, "
            f"twin={(frozen or pair)[0]!r}, or twin=None if they are independent."
        )
    return None


def dims(model: nn.Module, path: str) -> tuple[int, int] | None:
    """Widths of a module: its own attributes, or those of its first and last linear layer."""
    module = submodule(model, path)
    if isinstance(getattr(module, "input_dim", None), int) and hasattr(module, "output_dim"):
        return module.input_dim, module.output_dim  # type: ignore[return-value]
    linear = [
        m for m in module.modules() if hasattr(m, "in_features") and hasattr(m, "out_features")
    ]
    return (linear[0].in_features, linear[-1].out_features) if linear else None  # type: ignore[return-value]


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module but the root, once, with its first path."""
    return [(p, m) for p, m in model.named_modules() if p]


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at a path.

    Raises:
        UnknownNameError: There is none; the message shows the closest paths.
    """
    paths: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if not path or path not in paths:
        raise unknown("module", path, [p for p in paths if p], "print(model) shows them all.")
    return paths[path]


def _plain_role(path: str, module: nn.Module) -> str | None:
    parents, _, last = path.rpartition(".")
    by_name = None if "." in parents else ROLE_BY_NAME.get(last)  # deeper ones belong to a backbone
    if isinstance(module, ProjectionHead):
        return by_name or ("prediction" if module.name.endswith("_predictor") else "projection")
    return by_name


def _inside(path: str, others: Mapping[str, str]) -> bool:
    return any(path.startswith(o + ".") for o in others)


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _structure(module: nn.Module) -> tuple[type, list[tuple[str, tuple[int, ...]]]]:
    return type(module), [(n, tuple(p.shape)) for n, p in module.named_parameters()]
