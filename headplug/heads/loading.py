"""Finding the weights of one head in the state dict of a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headplug.checkpoints import WRAPPERS, read_state_dict
from headplug.errors import CheckpointError

USUAL = (  # what hosts call the head that trains; in some, `projection_head` is its EMA twin
    "student_projection_head",
    "anchor_projection_head",
    "projection_head",
    "projector",
    "student_head",
    "head",
    "prediction_head",
    "predictor",
    "prototypes",
)


def read_head(source: Any, head: nn.Module) -> dict[str, Tensor]:
    """The weights of one head in a state dict that may hold a whole model.

    The head is found by the names and shapes of its weights, under our names, lightly's
    (`layers.0.weight`) or solo-learn's (`0.weight`), at any prefix; where several places fit, the
    one whose path has a head's usual name is taken: see `USUAL`.

    Args:
        source: A path that `read_state_dict` reads, a state dict or a checkpoint that wraps one, or
            a module.
        head: The head that the weights are for.

    Returns:
        What `head.load_state_dict` accepts.

    Raises:
        UnknownNameError: The file does not exist.
        CheckpointError: It cannot be read safely, or no place or several places fit.
    """
    where = type(source).__name__
    if isinstance(source, str | Path):
        where, source = str(source), read_state_dict(source)
    elif isinstance(source, nn.Module):
        source = source.state_dict()
    if not isinstance(source, Mapping):
        raise CheckpointError(
            f"cannot read a head from a {where}; pass a path, a state dict or a module."
        )
    for key in WRAPPERS:
        source = source[key] if isinstance(source.get(key), Mapping) else source
    own = {k: tuple(v.shape) for k, v in head.state_dict().items()}
    places = {prefix: _translated(source, prefix, head) for prefix in _prefixes(source)}
    fits = [p for p, found in places.items() if {k: _shape(v) for k, v in found.items()} == own]
    if not fits:
        raise CheckpointError(f"{where} has no weights that fit this head: {_nearest(places, own)}")
    fits = [p for p in fits if not any(p != q and p.startswith(q) for q in fits)]  # its `layers.`
    named = [[p for p in fits if name in p.split(".")] for name in USUAL]
    first, *rivals = next(filter(None, named), fits)
    if any(not torch.equal(places[r][k], places[first][k]) for r in rivals for k in own):
        raise CheckpointError(
            f"{where} has several heads that fit: {', '.join(map(repr, [first, *rivals]))}. Pass "
            "the state dict of one: weights={k.removeprefix(PREFIX): v for k, v in state.items() "
            "if k.startswith(PREFIX)}."
        )
    return places[first]


def _prefixes(state: Mapping[str, Any]) -> list[str]:
    """Every place in a model where a head may lie, outermost first: "", "model.", ..."""
    dots = [(key, i + 1) for key in state for i, letter in enumerate(key) if letter == "."]
    return list(dict.fromkeys(["", *(key[:end] for key, end in dots)]))


def _translated(state: Mapping[str, Any], prefix: str, head: nn.Module) -> dict[str, Any]:
    found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    translate = getattr(head, "translate", None)
    if translate is not None:
        translate(found)
    return found


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _nearest(places: Mapping[str, Mapping[str, Any]], own: Mapping[str, Any]) -> str:
    """What keeps the likeliest place in a state dict from fitting."""
    if not own:
        return "it has none of its own."

    def likeness(prefix: str) -> tuple[int, int, bool, int]:
        common = own.keys() & places[prefix].keys()
        fitting = sum(_shape(places[prefix][k]) == own[k] for k in common)
        usual = any(name in prefix.split(".") for name in USUAL)
        return fitting, len(common), usual, -len(places[prefix])

    prefix = max(places, key=likeness)
    found = places[prefix]
    if not own.keys() & found.keys():
        wanted, there = (", ".join(list(keys)[:3]) or "nothing" for keys in (own, places[""]))
        return f"it should have {wanted}, ... and has {there}, ..."
    below = f" below {prefix!r}" if prefix else ""
    for key, shape in own.items():
        if key not in found:
            return f"there is no {key!r}{below}."
        if _shape(found[key]) != shape:
            return f"{key!r}{below} has shape {_shape(found[key])}, the head's {shape}."
    return f"there is also {next(k for k in found if k not in own)!r}{below}."
