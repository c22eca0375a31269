"""Finding the weights of one head in the state dict of a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headplug.checkpoints import below, opened, unwrapped
from headplug.errors import CheckpointError

USUAL = {  # what hosts call the head that trains; in some, `projection_head` is its EMA twin
    "projector": (
        "student_projection_head",
        "anchor_projection_head",
        "projection_head",
        "projector",
        "student_head",
        "head",
    ),
    "predictor": ("prediction_head", "predictor"),
    "prototypes": ("prototypes",),
}


def read_head(source: Any, head: nn.Module, name: str = "") -> dict[str, Tensor]:
    """The weights of one head in a state dict that may hold a whole model.

    The head is found by the names and shapes of its weights, under our names, lightly's
    (`layers.0.weight`) or solo-learn's (`0.weight`), at any prefix; where several places fit, the
    one whose path has a head's usual name is taken: see `USUAL`. A predictor's and prototypes'
    names come first for a head that is called so.

    Args:
        source: A path that `read_state_dict` reads, a state dict or a checkpoint that wraps one, or
            a module.
        head: The head that the weights are for.
        name: What it is called, e.g. "byol_predictor".

    Returns:
        What `head.load_state_dict` accepts.

    Raises:
        UnknownNameError: The file does not exist.
        CheckpointError: It cannot be read safely, or no place or several places fit.
    """
    where, source = opened(source)
    if not isinstance(source, Mapping):
        raise CheckpointError(
            f"cannot read a head from a {where}; pass a path, a state dict or a module."
        )
    source = unwrapped(source)
    own = {k: tuple(v.shape) for k, v in head.state_dict().items()}
    places = {prefix: _translated(source, prefix, head) for prefix in _prefixes(source)}
    fits = [p for p, found in places.items() if {k: _shape(v) for k, v in found.items()} == own]
    if not fits:
        why = _nearest(places, own)
        raise CheckpointError(f"{where} has no weights that fit {name or 'this head'}: {why}")
    fits = [p for p in fits if not any(p != q and p.startswith(q) for q in fits)]  # its `layers.`
    kinds = sorted(USUAL, key=lambda kind: kind not in name)
    named = [[p for p in fits if n in p.split(".")] for kind in kinds for n in USUAL[kind]]
    first, *rivals = next(filter(None, named), fits)
    if any(not torch.equal(places[r][k], places[first][k]) for r in rivals for k in own):
        raise CheckpointError(
            f"{where} has several heads that fit: {', '.join(map(repr, [first, *rivals]))}. Pass "
            "the state dict of one: weights={k.removeprefix(PREFIX): v for k, v in state.items() "
            "if k.startswith(PREFIX)}."
        )
    return places[first]


def part_at(source: Any, path: str) -> Any:
    """The part of a model's weights that lies at a path; all, where there is none.

    Raises:
        UnknownNameError, CheckpointError: As `read_head` does.
    """
    _, state = opened(source)
    if not isinstance(state, Mapping):
        return source
    return below(unwrapped(state), path) or source


def _prefixes(state: Mapping[str, Any]) -> list[str]:
    """Every place in a model where a head may lie, outermost first: "", "model.", ..."""
    dots = [(key, i + 1) for key in state for i, letter in enumerate(key) if letter == "."]
    return list(dict.fromkeys(["", *(key[:end] for key, end in dots)]))


def _translated(state: Mapping[str, Any], prefix: str, head: nn.Module) -> dict[str, Any]:
    found = below(state, prefix.rstrip("."))
    translate = getattr(head, "translate", None)
    if translate is not None:
        translate(found)
    return found


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _nearest(places: Mapping[str, Mapping[str, Any]], own: Mapping[str, Any]) -> str:
    """What keeps the likeliest place in a state dict from fitting, and what to do."""
    if not own:
        return "it has none of its own; leave `weights` out."

    def likeness(prefix: str) -> tuple[int, int, bool, int]:
        common = own.keys() & places[prefix].keys()
        fitting = sum(_shape(places[prefix][k]) == own[k] for k in common)
        usual = any(n in prefix.split(".") for names in USUAL.values() for n in names)
        return fitting, len(common), usual, -len(places[prefix])

    prefix = max(places, key=likeness)
    found = places[prefix]
    if not own.keys() & found.keys():
        parts = [key for key, value in places[""].items() if _has_tensors(value)]
        hint = f" Pass a part of it: weights=checkpoint[{parts[0]!r}]." if parts else ""
        return f"it should have {_first(own)} and has {_first(places[''])}.{hint}"
    return (
        f"{_misfit(found, own, f' below {prefix!r}' if prefix else '')}. Build the head that was "
        "trained: `headplug heads` lists layers and widths."
    )


def _misfit(found: Mapping[str, Any], own: Mapping[str, Any], below: str) -> str:
    """The first weight that is missing, of another shape, or too many."""
    for key, shape in own.items():
        if key not in found:
            return f"there is no {key!r}{below}"
        if _shape(found[key]) != shape:
            return f"{key!r}{below} has shape {_shape(found[key])}, the head's {shape}"
    return f"there is also {next(k for k in found if k not in own)!r}{below}"


def _first(keys: Mapping[str, Any]) -> str:
    return ", ".join([*list(keys)[:3], *(["..."] if len(keys) > 3 else [])]) or "nothing"


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())
