"""Describes solo-learn's methods as slots: a table, read without importing solo-learn.

The table serves solo-learn main (1.0.6) and the release 1.0.2 alike. A method is recognised by the
class in `solo.methods` that the model is, or is derived from.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import nn

from headplug.errors import SlotError
from headplug.hosts import Dependent, HeadSlot, describe, slots_by_role


class Method(NamedTuple):
    """Where a method keeps its projector, its EMA copy and what is made for the projector's width.

    Attributes:
        dependents: Attributes of the method that follow the width of the projection.
        twin: Path of the momentum projector.
        path: Path of the projector.
    """

    dependents: tuple[str, ...] = ()
    twin: str | None = None
    path: str = "projector"


EMA = "momentum_projector"
METHODS = {
    "simclr": Method(),
    "supcon": Method(),
    "barlow_twins": Method(),
    "vicreg": Method(),
    "vibcreg": Method(),
    "wmse": Method(("whitening",)),
    "simsiam": Method(("predictor",)),
    "nnsiam": Method(("predictor", "queue")),
    "nnclr": Method(("predictor", "queue")),
    "byol": Method(("predictor",), EMA),
    "nnbyol": Method(("predictor", "queue"), EMA),
    "mocov2plus": Method(("queue",), EMA),
    "mocov3": Method(("predictor",), EMA),
    "ressl": Method(("queue",), EMA),
    "swav": Method(("prototypes",)),
    "deepclusterv2": Method(("prototypes",)),
    "dino": Method(("head.last_layer",), "momentum_head.mlp", "head.mlp"),
    "all4one": Method(("predictor", "predictor2", "transformer_encoder", "queue"), EMA),
}
REFUSED = {
    "mae": "it trains a decoder and has no projector",
    "linear": "it trains a classifier and has no projector",
    "base": "the base class has no projector",
}


class SoloAdapter:
    """Recognises solo-learn's methods by their classes."""

    name = "solo-learn"

    def recognises(self, model: nn.Module) -> bool:
        """Whether the model is one of solo-learn's methods."""
        return _method(model) is not None

    def find_slots(self, model: nn.Module) -> list[HeadSlot]:
        """The projector of the method.

        Raises:
            SlotError: The method has no projector, or is not known.
        """
        name = str(_method(model))
        if name not in METHODS:
            if own := slots_by_role(model):  # a method of the user's on solo-learn's base class
                return own
            reason = REFUSED.get(name, f"headplug knows {', '.join(METHODS)}")
            raise SlotError(
                f"solo-learn's {name!r} cannot take another projection head: {reason}. "
                "Read its features with tap() and a module's path instead."
            )
        return [self.describe(model, METHODS[name].path)]

    def describe(self, model: nn.Module, path: str) -> HeadSlot:
        """The slot at a path; for the method's projector by the table.

        Raises:
            SlotError: The projector holds what a swap would lose.
        """
        slot = describe(model, path)
        method = METHODS.get(str(_method(model)))
        if method is None or path != method.path:
            return slot
        if any(type(m).__name__ == "IterNorm" for m in model.get_submodule(path).modules()):
            raise SlotError(
                "this vibcreg keeps its whitening (IterNorm) inside the projector, where a swap "
                "would lose it. Build the method with iternorm=False."
            )
        paths = dict(model.named_modules(remove_duplicate=False))
        held = {*paths, *dict(model.named_buffers())}
        return replace(
            slot,
            twin=method.twin if method.twin in paths else None,
            maybe_twins=(),
            dependents=tuple(
                Dependent(p, p.rpartition(".")[2], slot.output_dim)
                for p in method.dependents
                if p in held
            ),
        )


def _method(model: nn.Module) -> str | None:
    """The module of the nearest class in `solo.methods`, e.g. "byol"."""
    names = (c.__module__ for c in type(model).__mro__ if c.__module__.startswith("solo.methods."))
    return next((n.rpartition(".")[2] for n in names), None)


adapter = SoloAdapter()
