"""Describes models built with lightly's parts as slots, without importing lightly."""

from __future__ import annotations

from torch import Tensor, nn

from headplug.errors import SlotError
from headplug.hosts import HeadSlot, slots_by_role

ROLES = {
    "SwaVPrototypes": "prototypes",
    "SMoGPrototypes": "prototypes",
    "VicRegLLocalProjectionHead": "local projection",
}
STATES = {"center": "loss centre", "group_features": "prototypes", "C": "loss state"}
DECODERS = {  # what these are trained with predicts pixels or tokens; there is no projector
    "AIMPredictionHead": "AIM",
    "MAEDecoder": "MAE",
    "MAEDecoderTIMM": "MAE",
    "IJEPAPredictor": "I-JEPA",
    "IJEPAPredictorTIMM": "I-JEPA",
}


class LightlyAdapter:
    """Recognises lightly's heads by their classes, whatever their attributes are called."""

    name = "lightly"

    def recognises(self, model: nn.Module) -> bool:
        """Whether any part of the model is lightly's."""
        return any(_kind(m) for m in model.modules())

    def find_slots(self, model: nn.Module) -> list[HeadSlot]:
        """The slots of the model.

        Raises:
            SlotError: The method has no projector; or two copies of a head are there and nothing
                shows which one is trained.
        """
        for path, module in model.named_modules():
            if method := DECODERS.get(_kind(module)):
                raise SlotError(
                    f"{method} has no projection head to swap: {path!r} ({_kind(module)}) is its "
                    "decoder. Read its features with tap(), or name another module: slot='path'."
                )
        return slots_by_role(model, _role, _width)


def _kind(module: nn.Module) -> str:
    """The name of the class of lightly's that the module is, or is derived from."""
    names = (c.__name__ for c in type(module).__mro__ if c.__module__.startswith("lightly."))
    return next(names, "")


def _role(module: nn.Module) -> str | None:
    kind = _kind(module)
    if kind in ROLES:
        return ROLES[kind]
    if kind.endswith("PredictionHead"):
        return "prediction"
    return "projection" if kind.endswith("ProjectionHead") else None


def _width(module: nn.Module) -> tuple[str, int] | None:
    """Kind and width of lightly's modules that are made for one width of the projection."""
    if not _kind(module):
        return None
    size = getattr(module, "size", None)  # MemoryBankModule and all that derive from it
    if isinstance(size, list | tuple) and len(size) == 2:
        return "memory bank", int(size[1])
    for name, kind in STATES.items():
        state = getattr(module, name, None)
        if isinstance(state, Tensor) and state.ndim:
            return kind, state.shape[-1]
    return None


adapter = LightlyAdapter()
