"""From the arguments of a swap to the one slot that they mean."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from torch import nn

from headplug.errors import DimensionError, OptionError, SlotError
from headplug.hosts import HeadSlot, find_slots, plain_role, slot_at
from headplug.hosts.modules import dims, named_modules, submodule
from headplug.hosts.twins import find_original


def resolve(model: nn.Module, slot: str | HeadSlot | None, twin: str | None) -> HeadSlot:
    """The slot that is meant, with its EMA twin settled.

    Args:
        model: The model.
        slot: As in `swap_head`.
        twin: As in `swap_head`.

    Raises:
        SlotError: There is no head or several, the path names a copy, or the twin is unclear; the
            message names the argument that settles it.
        UnknownNameError: The model has no such module.
        DimensionError: The twin has other widths than the head.

    >>> model = nn.ModuleDict({"a": nn.Linear(8, 4), "projector": nn.Linear(4, 2)})
    >>> resolve(model, None, "auto").path, resolve(model, "a", "auto").path
    ('projector', 'a')
    """
    if isinstance(slot, HeadSlot):
        twin = slot.twin if twin == "auto" and slot.twin else twin
        slot = slot.path
    place = _only_head(model, twin) if slot is None else slot_at(model, slot)
    if slot is not None and (original := find_original(model, place.path)):
        raise SlotError(
            f"{slot!r} is the EMA twin of {original!r} and is replaced with it. Use "
            f"slot={original!r}."
        )
    if twin == "auto":
        if place.maybe_twins:
            raise _unclear(place)
        return place
    if twin is None:
        return replace(place, twin=None)
    copied = submodule(model, twin)
    if copied is submodule(model, place.path):
        raise SlotError(f"slot and twin name the same module, {place.path!r}; a twin is a copy.")
    if dims(copied) != (place.input_dim, place.output_dim):
        raise DimensionError(
            f"twin={twin!r} has widths {dims(copied)}, the head {place.path!r} "
            f"{(place.input_dim, place.output_dim)}; a twin has the same."
        )
    return replace(place, twin=twin)


def _only_head(model: nn.Module, twin: str | None) -> HeadSlot:
    slots = find_slots(model)
    found = [s for s in slots if s.role == "projection"]
    found = [s for s in found if twin not in (s.path, *s.aliases)]
    if len(found) == 1:
        return found[0]
    if found and {s.path for s in found} == {found[0].path, *found[0].maybe_twins}:
        raise _unclear(found[0])
    if found:
        raise SlotError(
            f"the model has {len(found)} known projection heads: {'; '.join(map(str, found))}. "
            f"Name the one to swap: slot={found[0].path!r}."
        )
    for path, module in named_modules(model):
        if plain_role(path, module) == "projection":
            slot_at(model, path)  # says that it has no widths
    with suppress(SlotError):
        if any(s.path == "it" for s in find_slots(nn.ModuleDict({"it": model}))):
            raise OptionError(
                f"this {type(model).__name__} is a head itself; pass the model that holds it."
            )
    tops = ", ".join(n for n, _ in model.named_children()) or "none"
    other = f" It has {'; '.join(map(str, slots))}." if slots else ""
    raise SlotError(
        f"the model has no known projection heads; its modules are {tops}.{other} Name the one to "
        "swap: slot='path.of.the.head'. A bare backbone (DirectCLR's, say) has none."
    )


def _unclear(place: HeadSlot) -> SlotError:
    path, other = place.path, place.maybe_twins[0]
    return SlotError(
        f"{path} and {', '.join(place.maybe_twins)} are alike and nothing shows which is the EMA "
        "copy (its parameters should have requires_grad=False, the head's not). Say so: "
        f"slot={path!r}, twin={other!r}; or slot={other!r}, twin={path!r}; or twin=None if they "
        "are independent."
    )
