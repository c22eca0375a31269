"""What the user's script holds beside the model, and may be made for the width of its projection.

What is passed (`outside`) follows. What only seems to be made for that width is named and left as
it is: it may have the width by chance, or belong to another model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import suppress

from torch import Tensor, nn

from headplug.errors import SlotError
from headplug.hosts import BEHIND, Dependent, HeadSlot, find_slots, slot_at
from headplug.hosts.modules import dims, inside, paths_of, submodule, tensors, value_at
from headplug.swap.changes import Change, InPlace
from headplug.swap.groups import alive
from headplug.swap.layers import is_layer, norm_width

OUTSIDE = "outside"
SIZES = ("input_dim", "num_features", "size")  # attributes that say the width of what comes in


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
    everything = alive(nn.Module)
    parts = {id(p) for m in everything for p in (vars(m).get("_modules") or {}).values()}
    for change in alive(Change):  # what swaps took out, and keep for `restore`
        parts |= {id(change.new)} if isinstance(change, InPlace) else {id(change.old)}
    for root in everything:
        if id(root) in parts or "_modules" not in vars(root):  # one that is being made
            continue
        for module in _apart(root, known):
            with suppress(SlotError):
                both = beside(model, slot, [module])
                if any(inside(s.path, OUTSIDE) and s.role not in BEHIND for s in find_slots(both)):
                    continue  # another model, with a head of its own
                made = [d for d in _known(both) if _mentions(value_at(both, d.path), d.width)]
                if made:
                    yield f"{type(module).__name__} ({made[0].kind})"


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
