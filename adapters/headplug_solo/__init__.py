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
from headplug.hosts.modules import inside, parent


class Method(NamedTuple):
    """Where a method keeps its projector, its EMA copy and what is made for the projector's width.

    Attributes:
        dependents: Attributes of the method that follow the width of the projection.
        twin: Path of the momentum projector.
        path: Path of the projector.
        uses: Options of the method that, above zero, make it use an attribute of the head.
    """

    dependents: tuple[str, ...] = ()
    twin: str | None = None
    path: str = "projector"
    uses: tuple[tuple[str, str], ...] = ()


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
    "swav": Method(("prototypes", "proj_output_dim")),
    "deepclusterv2": Method(("prototypes", "proj_output_dim")),
    "dino": Method(("head.last_layer",), "momentum_head.mlp", "head.mlp"),
    "all4one": Method(("predictor", "predictor2", "transformer_encoder", "queue"), EMA),
}
# where a user may name a larger head: DINO's with its last layer, whose output is the prototypes'
WHOLE = {
    "dino": Method(
        ("dino_loss_func.center",),
        "momentum_head",
        "head",
        uses=(("freeze_last_layer", "last_layer"),),
    )
}
KINDS = {
    "predictor": "prediction",
    "predictor2": "prediction",
    "prototypes": "prototypes",
    "head.last_layer": "prototypes",
    "queue": "queue",
    "whitening": "whitening",
    "transformer_encoder": "transformer",
    "proj_output_dim": "number",
    "dino_loss_func.center": "loss centre",
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
        path = METHODS[name].path
        if not _has(model, path) and name in WHOLE:  # another whole head is there
            path = WHOLE[name].path
        return [self.describe(model, path)]

    def describe(self, model: nn.Module, path: str) -> HeadSlot:
        """The slot at a path; for the method's heads by the tables."""
        slot = describe(model, path)
        name = str(_method(model))
        method = next(
            (m[name] for m in (METHODS, WHOLE) if name in m and m[name].path == path), None
        )
        if method is None:
            return slot
        twin = method.twin if _has(model, method.twin) else None
        return replace(
            slot,
            twin=twin,
            maybe_twins=(),
            dependents=tuple(
                Dependent(
                    p, KINDS[p], slot.output_dim, _beside(model, p, path, twin), _limit(model, p)
                )
                for p in method.dependents
                if _has(model, p)
            ),
            needs=tuple(
                (attribute, f"Set {option}=0 (in a config: method_kwargs.{option}=0).")
                for option, attribute in method.uses
                if getattr(model, option) > 0
            ),
            tail=_tail(model, path),
            complete=True,  # its losses are functions
        )


def _has(model: nn.Module, path: str | None) -> bool:
    if path is None:
        return False
    holder, _, name = path.rpartition(".")
    return hasattr(model.get_submodule(holder), name)


def _beside(model: nn.Module, dependent: str, path: str, twin: str | None) -> str | None:
    """The EMA copy of a dependent that lies beside the head: in DINO, both are parts of one."""
    if twin is None or not parent(path) or not inside(dependent, parent(path)):
        return None
    return f"{parent(twin)}.{dependent.removeprefix(parent(path) + '.')}"


def _limit(model: nn.Module, dependent: str) -> int | None:
    """W-MSE whitens slices of the batch, which must have more rows than features."""
    return int(model.whitening_size) - 1 if dependent == "whitening" else None  # type: ignore[arg-type]


def _tail(model: nn.Module, path: str) -> str | None:
    """VIbCReg's IterNorm, at the end of its projector."""
    last = next(reversed(model.get_submodule(path)._modules.items()), ("", None))
    return f"{path}.{last[0]}" if type(last[1]).__name__ == "IterNorm" else None


def _method(model: nn.Module) -> str | None:
    """The module of the nearest class in `solo.methods`, e.g. "byol"."""
    names = (c.__module__ for c in type(model).__mro__ if c.__module__.startswith("solo.methods."))
    return next((n.rpartition(".")[2] for n in names), None)


adapter = SoloAdapter()
