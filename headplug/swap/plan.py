"""What a swap would change: resolved, built and checked, while the model stays as it is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from headplug.errors import DimensionError, OptionError, SlotError
from headplug.heads import create_head, describe_head
from headplug.heads.loading import part_at
from headplug.hosts import HeadSlot
from headplug.hosts.modules import dims, tensors
from headplug.hosts.twins import anchor, copy_frozen
from headplug.swap.changes import Change, put_all
from headplug.swap.dependents import rebuild_all, with_tail
from headplug.swap.groups import Exchange, holders
from headplug.swap.outside import forgotten
from headplug.swap.report import FORGOTTEN, SwapReport, make_report
from headplug.swap.resolve import resolve

WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


@dataclass(frozen=True)
class Plan:
    """A swap that is checked and not made yet.

    Attributes:
        model: The model.
        slot: Where the head goes.
        head: The new head.
        changes: All that is replaced: the head, its EMA copy, and what follows them.
        exchange: What becomes of the optimiser's groups, if one was passed.
        report: What is changed.
    """

    model: nn.Module
    slot: HeadSlot
    head: nn.Module
    changes: Sequence[Change]
    exchange: Exchange | None
    report: SwapReport

    @property
    def twin(self) -> nn.Module | None:
        """The new head's EMA copy, if the slot has one."""
        return self.changes[1].new if self.slot.twin else None

    def carry_out(self) -> None:
        """Makes all changes, or none.

        Raises:
            SlotError: The model does not let itself be changed.
        """
        for change in self.changes:
            if not change.follows:
                _settle(change, self.model)
        for name in self.slot.calls:
            if not hasattr(self.head, name):
                setattr(self.head, name, _do_nothing)
        if self.twin is not None:
            anchor(self.head)
            anchor(self.twin)
        put_all(self.changes)
        if self.exchange:
            self.exchange.do()


def plan_swap(
    model: nn.Module,
    head: str | Mapping[str, Any] | nn.Module,
    slot: str | HeadSlot | None = None,
    twin: str | None = "auto",
    optimizer: Optimizer | None = None,
    outside: nn.Module | Sequence[nn.Module] = (),
    **options: Any,
) -> Plan:
    """Everything that `swap_head`, with these arguments, is going to do.

    Raises:
        HeadplugError: What `swap_head` refuses.
    """
    place = resolve(model, slot, twin)
    _refuse_wrapped(model)
    passed = [outside] if isinstance(outside, nn.Module) else list(outside)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        new = _build(head, place, options, named=slot is not None)
        output_dim = _check_dims(new, place)
        _check_needs(new, place)
        changes = _changes(model, place, new, output_dim)
        if output_dim != place.output_dim:
            changes += rebuild_all(model, place, output_dim, passed)
    exchange = _check_optimizers(model, changes, optimizer)
    unasked = output_dim != place.output_dim and not passed and not place.complete
    if left := forgotten(model, place) if unasked else []:
        warnings.warn(FORGOTTEN.format(place.output_dim, output_dim, ", ".join(left)), stacklevel=3)
    report = make_report(place, new, output_dim, changes, passed, left)
    return Plan(model, place, new, changes, exchange, report)


def stale(changes: Sequence[Change], others: Sequence[Optimizer], in_use: bool) -> str:
    """Paths of what optimisers will not train: what they hold the old of; or all, if in use."""
    paths = [
        repr(change.paths[0])
        for change in changes
        if (change.trained and holders(others, change.gone)) or (in_use and change.trains)
    ]
    return " and ".join(paths)


def _changes(model: nn.Module, place: HeadSlot, new: nn.Module, output_dim: int) -> list[Change]:
    """The head, with the method's own last layer, and its twin; nothing is done yet."""
    head = with_tail(model, place, new, output_dim)
    changes = [Change.at(model, place.path, head)]
    if place.twin:
        changes.append(Change.at(model, place.twin, copy_frozen(head)))
    return changes


def _build(
    head: str | Mapping[str, Any] | nn.Module,
    place: HeadSlot,
    options: dict[str, Any],
    named: bool,
) -> nn.Module:
    if isinstance(head, nn.Module):
        if options:
            raise OptionError(
                f"options ({', '.join(options)}) go with a name, not with a built head."
            )
        return head
    given = {**head, **options} if isinstance(head, Mapping) else {"name": head, **options}
    if given.setdefault("input_dim", place.input_dim) != place.input_dim:
        raise _misfit(str(given.get("name")), given["input_dim"], place)
    name = given.get("name")
    if isinstance(name, str):
        entry = describe_head(name)
        width = entry.signature.parameters.get("output_dim")
        if width is not None and width.default is not None:  # None: the input's, unless asked for
            given.setdefault("output_dim", place.output_dim)
        if named and given.get("weights") and "weights" in (p.name for p in entry.shared):
            given["weights"] = part_at(given["weights"], place.path)  # not of a head like it
    return create_head(given)


def _misfit(name: str, width: int, place: HeadSlot) -> DimensionError:
    return DimensionError(
        f"the head {name!r} takes {width} features, but {place.path!r}, which it is to replace, "
        f"takes {place.input_dim}. Build it with input_dim={place.input_dim}."
    )


def _check_dims(new: nn.Module, place: HeadSlot) -> int:
    widths = dims(new)
    if widths is None:
        raise DimensionError(
            f"the widths of {type(new).__name__} are unknown; set its attributes input_dim and "
            "output_dim."
        )
    if widths[0] != place.input_dim:
        raise _misfit(type(new).__name__, widths[0], place)
    return widths[1]


def _check_needs(new: nn.Module, place: HeadSlot) -> None:
    for name, remedy in place.needs:
        if not hasattr(new, name):
            raise SlotError(
                f"the training loop uses {place.path}.{name}, which {type(new).__name__} does not "
                f"have. {remedy}"
            )


def _check_optimizers(
    model: nn.Module, changes: Sequence[Change], optimizer: Optimizer | None
) -> Exchange | None:
    groups = optimizer.param_groups if optimizer is not None else None
    for trainer in _trainers(model):
        others = [o for o in getattr(trainer, "optimizers", []) if o.param_groups is not groups]
        if paths := stale(changes, others, optimizer is None and bool(others)):
            raise SlotError(
                "the trainer's optimiser already exists and would not train the new parameters of "
                f"{paths}. Swap before trainer.fit(), or pass optimizer=trainer.optimizers[0]."
            )
    if optimizer is None:
        return None
    ids = {id(p) for g in optimizer.param_groups for p in g["params"]}
    return Exchange(optimizer, [move for c in changes for move in c.moves(ids)])


def _refuse_wrapped(model: nn.Module) -> None:
    wholes = [getattr(t, "model", None) for t in _trainers(model)]
    modules = [*model.modules(), *(m for m in wholes if isinstance(m, nn.Module))]
    for kind in {c.__name__ for m in modules for c in type(m).__mro__}.intersection(WRAPPERS):
        raise SlotError(
            f"the model is already wrapped in {kind}, which keeps its own list of parameters. "
            "Swap the head first, then wrap."
        )


def _trainers(model: nn.Module) -> Iterator[Any]:
    """The Lightning trainers that a model is attached to and that still exist."""
    for module in model.modules():
        with suppress(ReferenceError):  # Lightning 1 keeps a weak reference
            trainer = vars(module).get("_trainer")  # the property raises where there is none
            if getattr(trainer, "optimizers", None):
                yield trainer


def _settle(change: Change, model: nn.Module) -> None:
    """Gives a new head the device, dtype and mode of the old one."""
    old: nn.Module = change.old
    around = [*old.parameters(), *model.parameters(), *tensors(old)]
    dtype = next((t.dtype for t in around if t.is_floating_point()), None)
    device = next((t.device for t in (*tensors(old), *tensors(model))), None)
    change.new.to(device, dtype).train(old.training)


def _do_nothing(*_: Any, **__: Any) -> None:
    """What a training loop calls on a head that has no such method."""
