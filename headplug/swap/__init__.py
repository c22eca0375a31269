"""Putting another head into a model.

Everything is resolved, built and checked before the model is touched, so that a refused swap leaves
it bit-identical; the change itself is a handful of assignments that `restore` undoes. The EMA copy
shares no storage with the head, and what follows the head's width is made anew if that changes.
What is drawn takes nothing from the random state, so that the rest of a seeded run is the one
without the swap.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from headplug.errors import CheckpointError, SlotError
from headplug.hosts import HeadSlot
from headplug.hosts.modules import submodule
from headplug.hosts.twins import ANCHOR, build_twin
from headplug.swap.plan import Plan, plan_swap
from headplug.swap.records import config_of, recorded
from headplug.swap.report import SwapReport

STALE = (
    "an optimiser that is already built will not train the new parameters of {paths}: pass it, "
    "optimizer=..., or build it after the swap."
)


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
    _plan: Plan | None = field(default=None, repr=False)

    def restore(self) -> None:
        """Puts the very old modules, tensors and numbers back, and the optimiser's groups.

        Raises:
            SlotError: The head or the optimiser was changed again since; nothing is touched then.
        """
        if self._plan is None:
            return
        changes, exchange = self._plan.changes, self._plan.exchange
        for change in changes:
            if not change.intact:
                raise SlotError(
                    f"{change.paths[0]} no longer holds what this swap put there; restore the "
                    "later one first."
                )
        if exchange and not exchange.intact:
            raise SlotError(
                "the optimiser's groups were changed since this swap; restore the later one first."
            )
        for change in changes:
            change.take_out()
        if exchange:
            exchange.undo()
        self._plan = None

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
        outside: What may be made for the width of the projection and is not in the model, or is
            there under a name that does not tell: a loss with a memory bank or a centre,
            prototypes, a predictor. Left out, what seems to be such is named in a warning.
        options: Options of the head, as in `create_head`.

    Returns:
        A `Swap` with `report`, `head` and `restore()`.

    Raises:
        SlotError: No head, several heads, or an unclear twin; or the optimiser was built before;
            or the training loop uses an attribute that the new head lacks; or `outside` holds an
            EMA copy of the head.
        DimensionError: The new head does not fit the backbone, or something that depends on its
            output cannot be made for the new width.
        UnknownNameError, OptionError: As `create_head` does; or an argument is of a wrong kind.

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
    plan = plan_swap(model, head, slot, twin=twin, optimizer=optimizer, outside=outside, **options)
    report = plan.report
    if plan.untrained:
        note = STALE.format(paths=plan.untrained)
        warnings.warn(note, stacklevel=2)
        report = report.with_note(note)
    swap = Swap(report, plan.head, plan.twin)
    if not dry_run:
        plan.carry_out()
        swap._plan = plan
    return swap


def ensure_head(plan: Plan) -> Swap:
    """Carries a plan out, unless the model has an equal head in that place already."""
    if plan.done:
        present = [change.old for change in plan.changes[:2]]
        plan.record(present[0])
        return Swap(plan.report, present[0], present[1] if plan.slot.twin else None)
    plan.carry_out()
    return Swap(plan.report, plan.head, plan.twin, plan)


def restore_heads(model: nn.Module, checkpoint: Mapping[str, Any]) -> list[Swap]:
    """Puts the heads that a checkpoint tells of into a model, which then takes its weights.

    Args:
        model: The model as it was before its heads were swapped, or with some of them swapped.
        checkpoint: Of a run with `headplug.callbacks.HeadSwap`, or of solo-learn.

    Raises:
        CheckpointError: A head was built by hand, so that only its class is known.
        HeadplugError: What `swap_head` refuses.
    """
    swaps = []
    for record in recorded(checkpoint):
        head = {k: v for k, v in record["head"].items() if k != "weights"}  # they are in there
        slot: str | None = record.get("slot")
        if "name" in head:
            plan = plan_swap(model, head, slot, twin=record.get("twin", "auto"))
            swaps.append(ensure_head(plan))
        elif not slot or config_of(submodule(model, slot)) != head:
            raise CheckpointError(
                f"the head at {slot!r} was a {head.get('class')} built by hand, which a checkpoint "
                "cannot build again. Put it into the model in its __init__; or register the head "
                "and swap it in by its name: register_head()."
            )
    return swaps


__all__ = [
    "ANCHOR",
    "Swap",
    "SwapReport",
    "build_twin",
    "ensure_head",
    "restore_heads",
    "swap_head",
]
