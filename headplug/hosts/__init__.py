"""What a host library tells the core: where the heads of a model are.

An adapter describes slots and performs no surgery; it is found through the entry-point group
`headplug.adapters` and recognises a model by the classes of its modules, without importing the
host. The walk that finds heads, twins and dependents is here once; an adapter gives it two small
functions.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Protocol

from torch import nn

from headplug.errors import SlotError
from headplug.heads import ProjectionHead
from headplug.hosts.decoders import why_headless
from headplug.hosts.dependents import BEHIND, Dependent, WidthOf, find_dependents
from headplug.hosts.modules import dims, inside, named_modules, paths_of, submodule
from headplug.hosts.twins import find_twin

ROLE_BY_NAME = {
    "projection_head": "projection",
    "projector": "projection",
    "projection": "projection",
    "proj_head": "projection",
    "local_projection_head": "local projection",
    "prediction_head": "prediction",
    "predictor": "prediction",
    "prototypes": "prototypes",
    "last_layer": "prototypes",
}
INSTEAD = "Read its features with tap(), or name another module: slot='path'."


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
        maybe_twins: Paths that may be its EMA copy, where that is unclear; `swap_head` asks then.
        calls: Methods that the host's training loop calls on the head; a new head that lacks them
            gets ones that do nothing.
        needs: Attributes of the head that the host's training loop uses; for each, what to change
            where a new head lacks it.
        tail: Path of a module at the end of the head that belongs to the method and must follow
            whatever head comes (a whitening layer).
        complete: Whether the host keeps nothing for the width outside the model.
    """

    path: str
    role: str
    input_dim: int
    output_dim: int
    twin: str | None = None
    dependents: tuple[Dependent, ...] = ()
    aliases: tuple[str, ...] = ()
    maybe_twins: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    needs: tuple[tuple[str, str], ...] = ()
    tail: str | None = None
    complete: bool = False

    @property
    def sure(self) -> bool:
        """Whether its EMA copy, and what follows its width, are beyond doubt."""
        return not self.maybe_twins and not any(d.rivals for d in self.dependents)

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
            SlotError: The model is known to have no head; the message says why.
        """

    def describe(self, model: nn.Module, path: str) -> HeadSlot:
        """The slot at a path that the user names and `find_slots` does not show.

        Raises:
            SlotError: The widths of the module there cannot be read.
        """


RoleOf = Callable[[str, nn.Module], str | None]


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
        SlotError: The model is known to have no head (a masked autoencoder, say).

    >>> model = nn.ModuleDict({"backbone": nn.Identity(), "projector": nn.Linear(8, 4)})
    >>> print(*find_slots(model))
    projector (projection, 8 > 4)
    """
    host = _host(model)
    slots = host.find_slots(model) if host else slots_by_role(model)
    if all(s.role in BEHIND for s in slots) and (reason := why_headless(model)):
        raise SlotError(
            f"a model that is trained by reconstruction (MAE, SimMIM, ...) has no projection head "
            f"to swap: {reason}. {INSTEAD}"
        )
    return slots


def slot_at(model: nn.Module, path: str) -> HeadSlot:
    """The slot at a path, whether `find_slots` shows it or not.

    Raises:
        UnknownNameError: The model has no such module.
        SlotError: The widths of the module cannot be read.
    """
    submodule(model, path)
    with suppress(SlotError):  # a model without a known head may still have the named one
        for slot in find_slots(model):
            if path in (slot.path, *slot.aliases):
                return slot
    found: HeadSlot = getattr(_host(model), "describe", describe)(model, path)
    return found


def slots_by_role(
    model: nn.Module, role_of: RoleOf = lambda p, m: None, width_of: WidthOf = lambda m: None
) -> list[HeadSlot]:
    """Describes every module that has a role, pairs EMA twins and lists dependents.

    Args:
        model: The model.
        role_of: The role of a module of the host's, from its path and itself; "" where it surely
            has none, None where names may tell.
        width_of: For other modules made for the projection's width (queues, losses): kind and
            width; None for a width that is settled by the first batch.
    """
    roles = _roles(model, role_of)
    slots = [_describe(model, path, roles, width_of) for path in roles]
    copies = [submodule(model, s.twin) for s in slots if s.twin]
    return [s for s in slots if all(submodule(model, s.path) is not c for c in copies)]


def describe(
    model: nn.Module,
    path: str,
    role_of: RoleOf = lambda p, m: None,
    width_of: WidthOf = lambda m: None,
) -> HeadSlot:
    """The slot at a path; a module whose role is unknown is taken for a projection head.

    Args:
        model: The model.
        path: Any module with linear layers, or with attributes `input_dim` and `output_dim`.
        role_of: As in `slots_by_role`.
        width_of: As in `slots_by_role`.

    Raises:
        UnknownNameError: The model has no such module.
        SlotError: The widths of the module cannot be read.
    """
    module = submodule(model, path)
    if dims(module) is None:
        raise SlotError(
            f"{path!r} is a {type(module).__name__} whose widths are unknown: it has no linear "
            f"layers. Say them: model.{path}.input_dim = 512; model.{path}.output_dim = 512."
        )
    path = paths_of(model, module)[0]
    return _describe(model, path, _roles(model, role_of, path), width_of)


def _host(model: nn.Module) -> HostAdapter | None:
    return next((a for a in adapters() if a.recognises(model)), None)


def _roles(model: nn.Module, role_of: RoleOf, named: str | None = None) -> dict[str, str]:
    """Role by path, without what lies inside a head; a named path is a head, what holds it none."""
    roles: dict[str, str] = {}
    first = {module: path for path, module in named_modules(model)}
    for path, module in model.named_modules(remove_duplicate=False):
        if not path or first[module] in roles or (named and inside(named, path)):
            continue
        role = role_of(path, module)
        if role is None:
            role = plain_role(path, module)
        if path == named:
            role = role or "projection"
        if role and dims(module) and not any(inside(first[module], head) for head in roles):
            roles[first[module]] = role
    return roles


def plain_role(path: str, module: nn.Module) -> str | None:
    """The role of a module of no known host, by its name and by headplug's own classes."""
    by_name = ROLE_BY_NAME.get(path.rpartition(".")[2])
    if path.count(".") > 1:  # deeper ones belong to a backbone
        by_name = None
    if by_name or not isinstance(module, ProjectionHead):
        return by_name
    return "prediction" if module.name.endswith("_predictor") else "projection"


def _describe(model: nn.Module, path: str, roles: dict[str, str], width_of: WidthOf) -> HeadSlot:
    module = submodule(model, path)
    widths = dims(module)
    assert widths is not None  # `_roles` keeps none else
    twin, maybe = find_twin(model, path, roles)
    return HeadSlot(
        path,
        roles[path],
        *widths,
        twin=twin,
        dependents=find_dependents(model, path, roles, width_of, (twin, *maybe)),
        aliases=tuple(p for p in paths_of(model, module) if p != path),
        maybe_twins=maybe,
    )


__all__ = [
    "BEHIND",
    "INSTEAD",
    "Dependent",
    "HeadSlot",
    "HostAdapter",
    "adapters",
    "describe",
    "find_slots",
    "plain_role",
    "slot_at",
    "slots_by_role",
]
