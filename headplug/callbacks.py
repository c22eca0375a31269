"""Swapping a head from a Lightning trainer, and finding it again in the checkpoint.

The callback serves `lightning.pytorch` and `pytorch_lightning` alike: it derives from the Callback
of whichever is loaded, because a trainer calls all hooks of its own kind.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from headplug.errors import CheckpointError, HeadplugError
from headplug.hosts.modules import submodule
from headplug.swap import Swap, swap_head
from headplug.swap.plan import plan_swap

KEY = "headplug"
NAMESPACES = ("lightning.pytorch", "pytorch_lightning")


def _bases() -> tuple[type, ...]:
    """The Callback classes of the Lightning packages that are loaded; else of one installed."""
    loaded = [n for n in NAMESPACES if n in sys.modules]
    found = loaded or [n for n in NAMESPACES if find_spec(n.partition(".")[0])][:1]
    if not found:
        raise HeadplugError("headplug.callbacks needs Lightning: pip install lightning")
    return tuple(dict.fromkeys(import_module(name).Callback for name in found))


class HeadSwap(*_bases()):  # type: ignore[misc]
    """Swaps the head of the model before its optimiser is built, and records it in checkpoints.

    A model that has that head already is left as it is, so that one trainer may fit, validate and
    test, and another may go on. A checkpoint of another head is refused in one sentence.

    Args:
        head: As in `headplug.swap_head`.
        slot: As in `headplug.swap_head`.
        options: Options of the head, and `twin` and `outside` of `headplug.swap_head`.

    Raises:
        HeadplugError: When the trainer starts: what `swap_head` refuses.
        CheckpointError: When the trainer resumes: the checkpoint has another head.

    >>> callbacks = [HeadSwap("simclr_plain", hidden_dim=64)]
    """

    def __init__(
        self, head: str | Mapping[str, Any] | nn.Module, slot: str | None = None, **options: Any
    ) -> None:
        self.head = head
        self.slot = slot
        self.options = options
        self.swap: Swap | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Swaps now, or right after the module's own `configure_model` if that makes the head."""
        configure, load = pl_module.configure_model, pl_module.on_load_checkpoint

        def configure_model() -> None:
            configure()
            self._apply(pl_module)

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            self._check(trainer, checkpoint)
            load(checkpoint)

        pl_module.configure_model = configure_model
        pl_module.on_load_checkpoint = on_load_checkpoint

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leaves the module's own methods as they were."""
        for name in ("configure_model", "on_load_checkpoint"):
            vars(pl_module).pop(name, None)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Adds `{"head": config, "slot": path, "twin": path}` to the list under "headplug"."""
        checkpoint[KEY] = _records(checkpoint) + self._record()

    @staticmethod
    def load_from_checkpoint(model_class: Any, path: Any, **arguments: Any) -> Any:
        """`model_class.load_from_checkpoint`, with the head that the checkpoint was saved with.

        Args:
            model_class: A LightningModule's class.
            path: Of the checkpoint.
            arguments: What `model_class.load_from_checkpoint` takes besides.

        Raises:
            HeadplugError: The recorded head does not fit the model.
        """
        own = vars(model_class).get("on_load_checkpoint")
        load = model_class.on_load_checkpoint

        def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
            for record in _records(checkpoint):
                twin = record.get("twin", "auto")
                swap_head(self, record["head"], slot=record.get("slot"), twin=twin)
            load(self, checkpoint)

        model_class.on_load_checkpoint = on_load_checkpoint
        try:
            return model_class.load_from_checkpoint(path, **arguments)
        finally:
            if own is None:
                del model_class.on_load_checkpoint
            else:
                model_class.on_load_checkpoint = own

    def _apply(self, pl_module: nn.Module) -> None:
        if self.swap is not None and _at(pl_module, self.swap) is self.swap.head:
            return
        plan = plan_swap(pl_module, self.head, self.slot, **self.options)
        present = submodule(pl_module, plan.slot.path)
        if getattr(present, "config", None) == plan.report.new:
            twin = plan.slot.twin and submodule(pl_module, plan.slot.twin)
            self.swap = Swap(plan.report, present, twin or None)
        else:
            plan.carry_out()
            self.swap = Swap(plan.report, plan.head, plan.twin, plan)

    def _record(self) -> list[dict[str, Any]]:
        if self.swap is None:
            return []
        report = self.swap.report
        return [{"head": dict(report.new), "slot": report.slot.path, "twin": report.slot.twin}]

    def _check(self, trainer: Any, checkpoint: Mapping[str, Any]) -> None:
        """Refuses a checkpoint of another head, before Lightning lists its keys."""
        here = [r for c in trainer.callbacks if isinstance(c, HeadSwap) for r in c._record()]
        there = _records(checkpoint)
        if {r["slot"]: r for r in here} != {r.get("slot"): r for r in there}:
            saved = f"with {_words(there)}" if there else "without HeadSwap"
            advice = "Ask for the same head" if there else "Resume without the callback"
            raise CheckpointError(
                f"the checkpoint was saved {saved}, this run has {_words(here)}. {advice}, or "
                "start anew."
            )


def _at(model: nn.Module, swap: Swap) -> nn.Module:
    return submodule(model, swap.report.slot.path)


def _records(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The swaps that a checkpoint tells of; solo-learn's tell of one."""
    found = checkpoint.get(KEY, [])
    return [dict(found)] if isinstance(found, Mapping) else list(found)


def _words(records: Sequence[Mapping[str, Any]]) -> str:
    return " and ".join(
        f"the head {r['head']} at {r.get('slot')!r}"
        + (f", EMA twin {r['twin']!r}" if r.get("twin") else "")
        for r in records
    )
