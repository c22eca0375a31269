"""Putting another head into a model.

Everything is resolved, built and checked before the model is touched, so that a refused swap leaves
it bit-identical; the change itself is a handful of assignments that `restore` undoes. The EMA copy
shares no storage with the head, and what follows the head's width is made anew if that changes.
What is drawn takes nothing from the random state, so that the rest of a seeded run is the one
without the swap.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from headplug.errors import DimensionError, OptionError, SlotError
from headplug.heads import create_head, describe_head
from headplug.hosts import HeadSlot
from headplug.hosts.modules import dims, tensors
from headplug.hosts.twins import ANCHOR, anchor, build_twin, copy_frozen
from headplug.swap.changes import Change, put_all
from headplug.swap.dependents import rebuild_all, with_tail
from headplug.swap.groups import Exchange, alive, holders
from headplug.swap.report import SwapReport, make_report
from headplug.swap.resolve import resolve

STALE = (
    "an optimiser that is already built will not train the new parameters of {paths}: pass it, "
    "optimizer=..., or build it after the swap."
)
WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


@dataclass
class Swap:
    """A swap that was made; as a context manager it is undone at the end of the block.

    Attributes:
        report: What was changed.
        head: The new head.
        twin: Its EMA copy, if the slot has one.
    """

    report: SwapReport
    head: nn.Module
    twin: nn.Module | None
    _changes: list[Change] = field(default_factory=list, repr=False)
    _exchange: Exchange | None = field(default=None, repr=False)

    def restore(self) -> None:
        """Puts the very old modules, tensors and numbers back, and the optimiser's groups.

        Raises:
            SlotError: The head or the optimiser was changed again since; nothing is touched then.
        """
        for change in self._changes:
            if not change.intact:
                raise SlotError(
                    f"{change.paths[0]} no longer holds what this swap put there; restore the "
                    "later one first."
                )
        if self._exchange and not self._exchange.intact:
            raise SlotError(
                "the optimiser's groups were changed since this swap; restore the later one first."
            )
        for change in self._changes:
            change.take_out()
        if self._exchange:
            self._exchange.undo()
        self._changes, self._exchange = [], None

    def __enter__(self) -> Swap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def swap_head(
    model: nn.Module,
    head: str | Mapping[str, Any] | nn.Module,
    slot: str | HeadSlot | None = None,
    dry_run: bool = False,
    *,
    twin: str | None = "auto",
    optimizer: Optimizer | None = None,
    outside: nn.Module | Sequence[nn.Module] = (),
    **options: Any,
) -> Swap:
    """Replaces the projection head of a model, and its EMA twin with it.

    Swap before the optimiser is built, or pass the optimiser, so that the new parameters are
    trained; where neither is so, a warning says it, and the report too. With another `output_dim`,
    what follows the old one (predictor, prototypes, queues) is made anew, and starts untrained: in
    the model as new modules, in `outside` inside the same ones, which your script holds.

    Args:
        model: A lightly, solo-learn or plain PyTorch model.
        head: A registered name, a mapping (`head.config`), or a head that is already built. By
            name, the input width is the slot's, and so is the output width unless `output_dim` is
            given.
        slot: Path of the head, where the model has several or none that is known.
        dry_run: Check everything and report, but change nothing.
        twin: Path of the EMA copy; "auto" finds it; None says that there is none.
        optimizer: One that already holds the old head's parameters: the new ones take their place.
        outside: What is not in the model and may be made for the width of the projection: a loss
            with a memory bank or a centre, prototypes, a predictor.
        options: Options of the head, as in `create_head`.

    Returns:
        A `Swap` with `report`, `head` and `restore()`.

    Raises:
        SlotError: No head, several heads, or an unclear twin; or the optimiser was built before.
        DimensionError: The new head does not fit the backbone, or something that depends on its
            output cannot be made for the new width.
        UnknownNameError, OptionError: As `create_head` does.

    >>> model = nn.Sequential()
    >>> model.backbone, model.projector = nn.Linear(4, 8), nn.Linear(8, 3)
    >>> swap = swap_head(model, "simclr_plain", activation="tanh")
    >>> print(swap.report)
    projector: Linear (8 > 3) becomes simclr_plain (8 > 3)
    parameters trained: 27 before, 99 after; not trained: 0 before, 0 after
    >>> swap.restore()
    >>> model.projector
    Linear(in_features=8, out_features=3, bias=True)
    """
    place = resolve(model, slot, twin)
    _refuse_wrapped(model)
    beside = [outside] if isinstance(outside, nn.Module) else list(outside)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        new = _build(head, place, options)
        output_dim = _check_dims(new, place)
        changes = _changes(model, place, new, output_dim)
        if output_dim != place.output_dim:
            changes += rebuild_all(model, place, output_dim, beside)
    exchange = _check_optimizers(model, changes, optimizer)

    report = make_report(place, new, output_dim, changes, beside)
    groups = optimizer.param_groups if optimizer is not None else None
    others = [o for o in alive() if o.param_groups is not groups]
    in_use = optimizer is None and bool(holders(others, model.parameters()))
    if stale := _stale(changes, others, in_use):
        note = STALE.format(paths=stale)
        warnings.warn(note, stacklevel=2)
        report = replace(report, notes=(*report.notes, note))
    swap = Swap(report, new, changes[1].new if place.twin else None)
    if dry_run:
        return swap
    for change in changes:
        if not change.follows:
            _settle(change, model)
    for name in place.calls:
        if not hasattr(new, name):
            setattr(new, name, _do_nothing)
    if swap.twin is not None:
        anchor(new)
        anchor(swap.twin)
    put_all(changes)
    if exchange:
        exchange.do()
    swap._changes, swap._exchange = changes, exchange
    return swap


def _changes(model: nn.Module, place: HeadSlot, new: nn.Module, output_dim: int) -> list[Change]:
    """The head, with the method's own last layer, and its twin; nothing is done yet."""
    head = with_tail(model, place, new, output_dim)
    changes = [Change.at(model, place.path, head)]
    if place.twin:
        changes.append(Change.at(model, place.twin, copy_frozen(head)))
    return changes


def _build(
    head: str | Mapping[str, Any] | nn.Module, place: HeadSlot, options: dict[str, Any]
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
        width = describe_head(name).signature.parameters.get("output_dim")
        if width is not None and width.default is not None:  # None: the input's, unless asked for
            given.setdefault("output_dim", place.output_dim)
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


def _check_optimizers(
    model: nn.Module, changes: list[Change], optimizer: Optimizer | None
) -> Exchange | None:
    groups = optimizer.param_groups if optimizer is not None else None
    for trainer in _trainers(model):
        others = [o for o in getattr(trainer, "optimizers", []) if o.param_groups is not groups]
        if stale := _stale(changes, others, optimizer is None and bool(others)):
            raise SlotError(
                "the trainer's optimiser already exists and would not train the new parameters of "
                f"{stale}. Swap before trainer.fit(), or pass optimizer=trainer.optimizers[0]."
            )
    if optimizer is None:
        return None
    ids = {id(p) for g in optimizer.param_groups for p in g["params"]}
    return Exchange(optimizer, [move for c in changes for move in c.moves(ids)])


def _stale(changes: list[Change], others: list[Optimizer], in_use: bool) -> str:
    """What optimisers will not train: what they hold the old of, or all where they are in use."""
    paths = [repr(c.paths[0]) for c in changes if holders(others, c.gone) or (in_use and c.trains)]
    return " and ".join(paths)


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


__all__ = ["ANCHOR", "Swap", "SwapReport", "build_twin", "swap_head"]
