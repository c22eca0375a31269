"""Describes models built with lightly's parts as slots, without importing lightly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from headplug.errors import SlotError
from headplug.hosts import (
    BEHIND,
    INSTEAD,
    Dependent,
    HeadSlot,
    describe,
    plain_role,
    slots_by_role,
)
from headplug.hosts.modules import named_modules, parent

ROLES = {
    "SwaVPrototypes": "prototypes",
    "SMoGPrototypes": "prototypes",
    "VicRegLLocalProjectionHead": "local projection",
}
STATES = {"center": "loss centre", "group_features": "prototypes"}
HEADLESS = {  # the method that a part belongs to, and what it does there in place of a projector
    "AIMPredictionHead": ("AIM", "predicts the pixels of the next patch"),
    "DirectCLRLoss": ("DirectCLR", "compares the backbone's own features, {loss_dim} of them"),
    "IJEPAPredictor": ("I-JEPA", "predicts the features of hidden patches"),
    "IJEPAPredictorTIMM": ("I-JEPA", "predicts the features of hidden patches"),
    "PixioDecoderTIMM": ("Pixio", "is the decoder of hidden patches"),
    "MAEDecoder": ("MAE", "is the decoder of hidden patches"),
    "MAEDecoderTIMM": ("MAE", "is the decoder of hidden patches"),
    "MaskedVisionTransformerDecoder": ("MAE or Pixio", "is the decoder of hidden patches"),
}
CAPI = ("CAPIProjectionHead", "CAPIPredictorTIMM", "CAPILoss")
LOOP_CALLS = ("cancel_last_layer_gradients",)


class LightlyAdapter:
    """Recognises lightly's heads by their classes, whatever their attributes are called."""

    name = "lightly"

    def recognises(self, model: nn.Module) -> bool:
        """Whether any part of the model is lightly's."""
        return any(_kinds(m) for m in model.modules())

    def find_slots(self, model: nn.Module) -> list[HeadSlot]:
        """The slots of the model.

        Raises:
            SlotError: The method has no projector.
        """
        slots = [_completed(model, s) for s in slots_by_role(model, _role, _width)]
        if any(s.role == "projection" for s in slots):
            return slots
        for path, module in named_modules(model):
            if reason := _headless(module):
                method, does = reason
                raise SlotError(
                    f"{method} has no projection head to swap: {path!r} "
                    f"({type(module).__name__}) {does.format_map(vars(module))}. {INSTEAD}"
                )
        return slots

    def describe(self, model: nn.Module, path: str) -> HeadSlot:
        """The slot at a path that the user names."""
        return _completed(model, describe(model, path, _role, _width))


def _kinds(module: nn.Module) -> list[str]:
    """The names of the classes of lightly's that the module is, or is derived from."""
    return [c.__name__ for c in type(module).__mro__ if c.__module__.startswith("lightly.")]


def _headless(module: nn.Module) -> tuple[str, str] | None:
    """The method without a projector that a module belongs to, and what the module does there."""
    return next((HEADLESS[k] for k in _kinds(module) if k in HEADLESS), None)


def _role(path: str, module: nn.Module) -> str | None:
    kinds = _kinds(module)
    if not kinds:
        return None
    if _headless(module) or kinds[0] == "CAPIPredictorTIMM":  # it is in front of the head
        return ""
    if kinds[0] in ROLES:
        return ROLES[kinds[0]]
    if kinds[0].endswith("PredictionHead"):
        return "prediction"
    if not kinds[0].endswith("ProjectionHead"):
        return None
    # lightly's own projection heads also serve as predictors; only the name tells
    named = plain_role(path, module)
    return named if named in BEHIND else "projection"


def _width(module: nn.Module) -> tuple[str, int | None] | None:
    """Kind and width of lightly's modules that are made for one width of the projection."""
    kinds = _kinds(module)
    if not kinds:
        return None
    if kinds[0] == "Whitening2d":
        return "whitening", int(module.num_features)  # type: ignore[arg-type]
    if kinds[0] == "TiCoLoss":
        return "loss state", None if module.C is None else len(module.C)  # type: ignore[arg-type]
    size = getattr(module, "size", None)  # MemoryBankModule and all that derive from it
    if "MemoryBankModule" in kinds and isinstance(size, tuple | list) and len(size) == 2:
        return "memory bank", int(size[1])
    for name, kind in STATES.items():
        state = getattr(module, name, None)
        if isinstance(state, Tensor) and state.ndim:
            return kind, state.shape[-1]
    return None


def _completed(model: nn.Module, slot: HeadSlot) -> HeadSlot:
    """Adds what the training loop calls on the head, and how wide whitening can get."""
    head = model.get_submodule(slot.path)
    return replace(
        slot,
        calls=tuple(name for name in LOOP_CALLS if hasattr(head, name)),
        dependents=(
            *(replace(d, limit=_limit(model, d)) for d in slot.dependents),
            *_partners(model, slot),
        ),
    )


def _partners(model: nn.Module, slot: HeadSlot) -> Iterator[Dependent]:
    """CAPI's other head: both are trained, and the loss compares their clusters."""
    if slot.role != "projection" or not any({*_kinds(m)} & {*CAPI} for m in model.modules()):
        return
    own = (slot.role, slot.input_dim, slot.output_dim)
    for other in slots_by_role(model, _role, _width):
        if other.path != slot.path and (other.role, other.input_dim, other.output_dim) == own:
            yield Dependent(other.path, "clusters", slot.output_dim)


def _limit(model: nn.Module, dependent: Dependent) -> int | None:
    """W-MSE whitens slices of the batch, with at least twice as many rows as features."""
    size = getattr(model.get_submodule(parent(dependent.path)), "w_size", None)
    return size // 2 if dependent.kind == "whitening" and size else None


adapter = LightlyAdapter()
