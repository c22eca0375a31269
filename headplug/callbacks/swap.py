"""Swapping a head from a Lightning trainer, and finding it again in the checkpoint.

What a trainer asks the callbacks too late, or not at all (`save_weights_only=True`), goes through
hooks of the module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from torch import nn

from headplug.callbacks.lightning import callback_bases
from headplug.errors import CheckpointError, SlotError, UnknownNameError
from headplug.hosts.modules import submodule
from headplug.hosts.twins import equal
from headplug.swap import Swap, ensure_head, restore_heads
from headplug.swap.plan import plan_swap
from headplug.swap.records import KEY, misfit, recorded, records, refuse_unrecorded, unlike


class HeadSwap(*callback_bases()):  # type: ignore[misc]
    """Swaps the head of the model before its optimiser is built, and records it in checkpoints.

    A model that has that head already is left as it is, so that one trainer may fit, validate and
    test, and another may go on. A checkpoint of another head is refused in one sentence. Callbacks
    that copy the model (averages of weights) go behind it.

    Args:
        head: As in `headplug.swap_head`.
        slot: As in `headplug.swap_head`.
        options: Options of the head, and `twin` and `outside` of `headplug.swap_head`.

    Raises:
        HeadplugError: When the trainer starts: what `swap_head` refuses.
        SlotError: When the trainer starts: an earlier callback has copied the model, or swapped
            that head.
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
        with suppress(SlotError, UnknownNameError):  # the same comes again if it is not made later
            self._apply(trainer, pl_module)
        _add(pl_module, "configure_model", after=partial(self._apply, trainer, pl_module))
        _add(pl_module, "on_load_checkpoint", before=partial(_check, pl_module))
        if not isinstance(vars(pl_module).get("on_save_checkpoint"), _Hook):  # it stays
            _add(pl_module, "on_save_checkpoint", after=partial(_record, pl_module))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leaves the module's own methods as they were, but for the record of its head."""
        for name in ("configure_model", "on_load_checkpoint"):
            vars(pl_module).pop(name, None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leaves the module's own methods as they were."""
        self.teardown(trainer, pl_module, "")

    @staticmethod
    def load_from_checkpoint(model_class: Any, path: Any, **arguments: Any) -> Any:
        """`model_class.load_from_checkpoint`, with the heads that the checkpoint was saved with.

        Args:
            model_class: A LightningModule's class.
            path: Of the checkpoint.
            arguments: What `model_class.load_from_checkpoint` takes besides.

        Raises:
            CheckpointError: The head cannot be built again, or is not the model's and not recorded.
            HeadplugError: The recorded head does not fit the model.
        """
        if getattr(model_class, "restores_heads", False):  # a host that does all this itself
            return model_class.load_from_checkpoint(path, **arguments)
        own = vars(model_class).get("on_load_checkpoint")
        load = model_class.on_load_checkpoint

        def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
            if not restore_heads(self, checkpoint) and arguments.get("strict") is not False:
                refuse_unrecorded(self, checkpoint["state_dict"])
            load(self, checkpoint)

        model_class.on_load_checkpoint = on_load_checkpoint
        try:
            return model_class.load_from_checkpoint(path, **arguments)
        finally:
            if own is None:
                del model_class.on_load_checkpoint
            else:
                model_class.on_load_checkpoint = own

    def _apply(self, trainer: Any, pl_module: nn.Module) -> None:
        if self.swap is not None and _at(pl_module, self.swap) is self.swap.head:
            return
        plan = plan_swap(pl_module, self.head, self.slot, **self.options)
        if not plan.done:
            self._refuse_late(trainer, pl_module, plan.slot.path)
        self.swap = ensure_head(plan)

    def _refuse_late(self, trainer: Any, pl_module: nn.Module, path: str) -> None:
        """Refuses what another callback would silently go on with, or undo."""
        for other in trainer.callbacks:
            if isinstance(other, HeadSwap) and other is not self and other.swap is not None:
                if submodule(pl_module, path) is other.swap.head:
                    raise SlotError(f"two HeadSwap callbacks swap {path!r}; leave one of them out.")
                continue
            held = [
                m for v in vars(other).values() if isinstance(v, nn.Module) for m in v.modules()
            ]
            copies = [m for m in held if type(m) is type(pl_module) and m is not pl_module]
            if any(equal(submodule(m, path), submodule(pl_module, path)) for m in copies):
                name = type(other).__name__
                raise SlotError(
                    f"{name} has copied the model already, with the head that is to go. Put "
                    f"HeadSwap first: callbacks=[HeadSwap(...), {name}(...)]."
                )


class _Hook:
    """A method of a module with more done; a copy of the module, or a pickle, has it alone."""

    def __init__(self, own: Callable[..., Any], *steps: Callable[..., Any]) -> None:
        self.own = own
        self.steps = steps

    def __call__(self, *given: Any) -> None:
        for step in self.steps:
            step(*given)

    __code__ = __call__.__code__  # by which Lightning tells that a method is not its own

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (self.own,)


def _add(
    module: Any,
    name: str,
    before: Callable[..., None] | None = None,
    after: Callable[..., None] | None = None,
) -> None:
    own = getattr(module, name, None)
    if own is not None:  # Lightning 1 has no `configure_model`
        setattr(module, name, _Hook(own, *filter(None, (before, own, after))))


def _record(pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
    checkpoint[KEY] = records(pl_module)


def _check(pl_module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Refuses a checkpoint of another head, before Lightning lists its keys."""
    here, there = records(pl_module), recorded(checkpoint)
    if not there and not misfit(pl_module, checkpoint["state_dict"], [r["slot"] for r in here]):
        return
    if unlike(there, here):
        saved = f"with {_words(there)}" if there else "without HeadSwap"
        advice = "Ask for the same head" if there else "Resume without the callback"
        raise CheckpointError(
            f"the checkpoint was saved {saved}, this run has {_words(here)}. {advice}, or "
            "start anew."
        )


def _at(model: nn.Module, swap: Swap) -> nn.Module:
    return submodule(model, swap.report.slot.path)


def _words(found: Sequence[Mapping[str, Any]]) -> str:
    return " and ".join(
        f"the head {r['head']} at {r.get('slot')!r}"
        + (f", EMA twin {r['twin']!r}" if r.get("twin") else "")
        for r in found
    )
