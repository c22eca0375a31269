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
from headplug.hosts.modules import dims, submodule, tensors
from headplug.hosts.twins import anchor, copy_frozen
from headplug.swap.changes import Change, put_all
from headplug.swap.dependents import rebuild_all, with_tail
from headplug.swap.groups import Exchange, alive, holders
from headplug.swap.outside import COPIED, TOGETHER, checked, copies_beside, forgotten, shown
from headplug.swap.records import config_of, mark
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
        untrained: Paths of what no optimiser that exists already will train.
    """

    model: nn.Module
    slot: HeadSlot
    head: nn.Module
    changes: Sequence[Change]
    exchange: Exchange | None
    report: SwapReport
    untrained: str = ""

    @property
    def twin(self) -> nn.Module | None:
        """The new head's EMA copy, if the slot has one."""
        return self.changes[1].new if self.slot.twin else None

    @property
    def done(self) -> bool:
        """Whether the model has an equal head in that place already."""
        head = self.changes[0]
        return head.old is head.new or config_of(head.old) == self.report.new

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
        self.record(self.changes[0].new)
        if self.exchange:
            self.exchange.do()

    def record(self, head: nn.Module) -> None:
        """Marks a head as the one that this plan is about."""
        mark(head, head=dict(self.report.new), slot=self.slot.path, twin=self.slot.twin)


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
    _check_types(model, head, slot, twin, optimizer)
    place = resolve(model, slot, twin)
    around = alive(nn.Module, Optimizer, Change)  # one walk, for all that looks beyond the model
    _refuse_wrapped(model, place, around)
    passed = checked(model, place, outside)
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
    if copied := copies_beside(model, place, around):
        note = COPIED.format(place.path, ", ".join(copied)) + TOGETHER
        warnings.warn(note, stacklevel=3)
        report = report.with_note(note)
    others = [o for o in around if isinstance(o, Optimizer)]
    return Plan(
        model, place, new, changes, exchange, report, _untrained(model, changes, optimizer, others)
    )


def _check_types(
    model: object, head: object, slot: object, twin: object, optimizer: object
) -> None:
    if not isinstance(model, nn.Module):
        raise OptionError(f"the model comes first, not {shown(model)}: swap_head(model, 'byol').")
    if not isinstance(head, str | Mapping | nn.Module):
        raise OptionError(
            f"a head is a name, a mapping or a module that is built already, not {shown(head)}."
        )
    if not isinstance(slot, str | HeadSlot | None):
        raise OptionError(f"slot is the path of the head, not {shown(slot)}: slot='projector'.")
    if not isinstance(twin, str | None):
        raise OptionError(f"twin is the path of the EMA copy, or None, not {shown(twin)}.")
    if not isinstance(optimizer, Optimizer | None):
        raise OptionError(
            f"optimizer is one optimiser that is built already, not {shown(optimizer)}. For "
            "several, pass the one that trains the head."
        )


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


def _untrained(
    model: nn.Module,
    changes: Sequence[Change],
    optimizer: Optimizer | None,
    everyone: Sequence[Optimizer],
) -> str:
    groups = optimizer.param_groups if optimizer is not None else None
    others = [o for o in everyone if o.param_groups is not groups]
    in_use = optimizer is None and bool(holders(others, model.parameters()))
    return stale(changes, others, in_use)


def _refuse_wrapped(model: nn.Module, place: HeadSlot, around: Sequence[object]) -> None:
    head = submodule(model, place.path)
    wrappers = [m for m in around if isinstance(m, nn.Module) and _wrapper(m)]
    kinds = {_wrapper(m) for m in (*model.modules(), *(w for w in wrappers if head in w.modules()))}
    for kind in filter(None, kinds):
        raise SlotError(
            f"the model is already wrapped in {kind}, which keeps its own list of parameters. "
            "Swap the head first, then wrap."
        )


def _wrapper(module: nn.Module) -> str | None:
    return next((c.__name__ for c in type(module).__mro__ if c.__name__ in WRAPPERS), None)


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
