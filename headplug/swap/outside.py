"""What the user's script holds beside the model, and may be made for the width of its projection.

What is passed (`outside`) follows. What only seems to be made for that width is named and left as
it is: it may have the width by chance, or belong to another model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import suppress

from torch import Tensor, nn

from headplug.errors import DimensionError, OptionError, SlotError
from headplug.hosts import BEHIND, Dependent, HeadSlot, find_slots, slot_at
from headplug.hosts.modules import (
    dims,
    inside,
    parent,
    paths_of,
    submodule,
    tensors,
    value_at,
)
from headplug.hosts.twins import copies_of, equal
from headplug.swap.changes import Change, InPlace
from headplug.swap.groups import alive
from headplug.swap.layers import is_layer, norm_width

OUTSIDE = "outside"
TOGETHER = (
    "Put both into one model and swap there: "
    "swap_head(nn.ModuleDict({'model': model, 'ema': copy}), ...)."
)
COPIED = "there seems to be an EMA copy of {!r} outside the model, which keeps the old head: {}. "
SIZES = ("input_dim", "num_features", "size")  # attributes that say the width of what comes in


def checked(model: nn.Module, slot: HeadSlot, outside: object) -> list[nn.Module]:
    """What was passed as `outside`, as a list.

    Raises:
        OptionError: It is not a module, or a sequence of them.
        SlotError: It holds an EMA copy of the head, which has to change with the head.
    """
    passed = [outside] if isinstance(outside, nn.Module) else outside
    if not isinstance(passed, Sequence) or not all(isinstance(m, nn.Module) for m in passed):
        raise OptionError(
            f"outside takes modules that your script holds, not {shown(outside)}: "
            "outside=[criterion]."
        )
    own = set(model.modules())
    for module in passed:
        for path, copy in copies_of(submodule(model, slot.path), module).items():
            if copy not in own:
                where = f"the {type(module).__name__} in outside"
                raise SlotError(
                    f"{where} {f'has at {path!r}' if path else 'is'} a copy of {slot.path!r}, it "
                    f"seems its EMA twin, which has to change with the head. {TOGETHER}"
                )
    return list(passed)


def shown(value: object) -> str:
    """A value in a few words, for a message: a module or a class has a long repr."""
    text = repr(value)
    return text if len(text) < 40 and not isinstance(value, nn.Module) else type(value).__name__


def copies_beside(model: nn.Module, slot: HeadSlot, around: Sequence[object]) -> list[str]:
    """Frozen and equal copies of a head in other models: what an EMA copy is before training."""
    if slot.twin:
        return []
    head, known = submodule(model, slot.path), set(model.modules())
    return [
        f"{type(root).__name__}{f' at {path!r}' if path else ''}"
        for root in _roots(around)
        if known.isdisjoint(root.modules())
        for path, copy in copies_of(head, root).items()
        if equal(head, copy) and not any(p.requires_grad for p in copy.parameters())
    ]


def belonging(
    model: nn.Module, slot: HeadSlot, outside: Sequence[nn.Module]
) -> Iterator[Dependent]:
    """What follows a slot in the model; where heads are rivals for it, what was passed.

    Raises:
        DimensionError: Nothing tells which of several heads something is made for.
    """
    passed = {m for module in outside for m in module.modules()}
    unclear: dict[str, Dependent] = {}
    said = False
    for dependent in slot.dependents:
        value = value_at(model, dependent.path)
        module = isinstance(value, nn.Module)
        holder = dependent.path if module else parent(dependent.path)
        if dependent.rivals and model.get_submodule(holder) not in passed:
            unclear[holder] = dependent
            continue
        said |= bool(dependent.rivals)
        yield dependent
    if unclear and not said:
        names = ", ".join(f"{d.path} ({d.kind})" for d in unclear.values())
        rivals = ", ".join(dict.fromkeys(repr(r) for d in unclear.values() for r in d.rivals))
        pass_it = [
            f"Pass what belongs to {slot.path!r}: outside=[model.{h}]." for h in unclear if h
        ]
        raise DimensionError(
            f"{names} may be made for {slot.path!r} or for {rivals}, which has the same width "
            f"{slot.output_dim}. {(pass_it or [''])[0]} Or keep output_dim={slot.output_dim}."
        )


def beside(model: nn.Module, slot: HeadSlot, outside: Sequence[nn.Module]) -> nn.Module:
    """The head beside the modules that were passed, so that a host tells what they are."""
    known = _parts(model, slot)
    both = nn.Module()
    both.head = submodule(model, slot.path)
    both.add_module(OUTSIDE, nn.ModuleList(m for m in outside if known.isdisjoint(m.modules())))
    return both


def dependents_outside(both: nn.Module, slot: HeadSlot) -> list[Dependent]:
    """What follows the slot's width among the modules passed; what only mentions it, too."""
    modules = [f"{OUTSIDE}.{name}" for name in both.get_submodule(OUTSIDE)._modules]
    if not modules:
        return []
    found = _known(both)
    known = {path for path in modules for d in found if path == d.path or inside(d.path, path)}
    return [
        *found,
        *(
            Dependent(path, OUTSIDE, slot.output_dim)
            for path in modules
            if path not in known and _mentions(value_at(both, path), slot.output_dim)
        ),
    ]


def forgotten(model: nn.Module, slot: HeadSlot) -> list[str]:
    """What seems to be made for the slot's width and is not known to follow it, with its class.

    In the model, what starts with a layer of that width; outside it, what is of a known kind.
    """
    return [*_unknown_in(model, slot), *_alive_beside(model, slot)]


def _unknown_in(model: nn.Module, slot: HeadSlot) -> Iterator[str]:
    if slot.input_dim == slot.output_dim:  # it may as well take the representation
        return
    known = _parts(model, slot).union(*(_parts(model, s) for s in find_slots(model)))
    for module in _apart(model, known):
        widths = dims(module)
        if widths and widths[1] == slot.input_dim:  # it is in front of the head
            continue
        first = next((m for m in module.modules() if m._parameters), module)
        takes = first.in_features if isinstance(first, nn.Linear) else None
        if takes is None and is_layer(first):
            takes = norm_width(first)
        if takes == slot.output_dim:
            yield f"{paths_of(model, module)[0]} ({type(module).__name__})"


def _alive_beside(model: nn.Module, slot: HeadSlot) -> Iterator[str]:
    known = set(model.modules())
    for root in _roots(alive(nn.Module, Change)):
        for module in _apart(root, known):
            with suppress(SlotError):
                if any(s.role not in BEHIND for s in find_slots(nn.ModuleDict({"it": module}))):
                    continue  # another model, with a head of its own
                both = beside(model, slot, [module])
                made = [d for d in _known(both) if _mentions(value_at(both, d.path), d.width)]
                if made:
                    yield f"{type(module).__name__} ({made[0].kind})"


def _roots(around: Sequence[object]) -> Iterator[nn.Module]:
    """The modules among some objects that are no part of another, and no part of a swap."""
    everything = [o for o in around if isinstance(o, nn.Module)]
    parts = {id(p) for m in everything for p in (vars(m).get("_modules") or {}).values()}
    swaps = (o for o in around if isinstance(o, Change))  # they keep what they took out
    parts |= {id(c.new) if isinstance(c, InPlace) else id(c.old) for c in swaps}
    for root in everything:
        if id(root) not in parts and "_modules" in vars(root):  # not one that is being made
            yield root


def _parts(model: nn.Module, slot: HeadSlot) -> set[nn.Module]:
    """The modules of a head, of its EMA copy, and of what is known to follow it."""
    paths = [slot.path, slot.twin, *(p for d in slot.dependents for p in (d.path, d.twin))]
    values = [value_at(model, path) for path in paths if path]
    return {m for value in values if isinstance(value, nn.Module) for m in value.modules()}


def _known(both: nn.Module) -> list[Dependent]:
    return [d for d in slot_at(both, "head").dependents if inside(d.path, OUTSIDE)]


def _apart(root: nn.Module, known: Set[nn.Module]) -> Iterator[nn.Module]:
    """A module, or the largest parts of it that are called and share nothing with those known."""
    called = not isinstance(root, nn.ModuleList | nn.ModuleDict)
    if called and known.isdisjoint(root.modules()):
        yield root
    elif root not in known:
        for part in root.children():
            yield from _apart(part, known)


def _mentions(module: nn.Module, width: int) -> bool:
    plain = (v for m in module.modules() for v in vars(m).values() if isinstance(v, Tensor))
    return any(width in t.shape for t in (*tensors(module), *plain)) or any(
        getattr(m, name, None) == width for m in module.modules() for name in SIZES
    )
