"""What each registered head looks like: one row per head, read from the head itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from headplug.heads import create_head
from headplug.heads.base import positive
from headplug.heads.layers import layers
from headplug.heads.parameters import FrozenBatchNorm, count
from headplug.registry import Entry


def describe_layers(head: nn.Module) -> str:
    """The layers of a head in order: `L+` a linear layer with bias, `L-` one without, `BN`, `BN0`.

    `BN0` is batch norm without scale and shift, `LN` layer norm; blocks stand in brackets, repeats
    are counted.

    >>> describe_layers(create_head("simsiam", input_dim=8, hidden_dim=4, output_dim=4))
    'L- BN ReLU L- BN ReLU L- BN0'
    """
    return " ".join(_counted(_spell(m) for _, m in layers(head) if _acts(m))) or type(head).__name__


def describe_dims(head: nn.Module) -> str:
    """The widths that a representation passes through, e.g. "512-2048-128"."""
    outs = [m.out_features for _, m in layers(head) if hasattr(m, "out_features")]
    ends = [getattr(head, "input_dim", "?"), *outs]
    if not outs:
        ends.append(getattr(head, "output_dim", "?"))
    return "-".join(map(str, ends))


def summarise(entry: Entry, input_dim: int) -> dict[str, Any]:
    """One head as a row: what it is, and its size behind a representation of some width.

    Returns:
        `name`, `layers`, `dims`, `params_trainable`, `params_frozen`, `paper`, `summary`, `source`,
        `defaults`. For a head that cannot be built from `input_dim` alone `layers` says why, `dims`
        is empty and the numbers are None.

    Raises:
        OptionError: `input_dim` is not a positive integer.
    """
    positive("input_dim", input_dim)
    row: dict[str, Any] = {"name": entry.name}
    try:
        with torch.device("meta"):
            head = create_head(entry.name, input_dim=input_dim)
    except Exception as error:  # whatever a third party's head needs
        row |= {"layers": f"({str(error).partition('. ')[0]})", "dims": ""}
        row |= {"params_trainable": None, "params_frozen": None}
    else:
        row |= {"layers": describe_layers(head), "dims": describe_dims(head)}
        row["params_trainable"], row["params_frozen"] = count(head)
    return row | {k: getattr(entry, k) for k in ("paper", "summary", "source", "defaults")}


def _acts(layer: nn.Module) -> bool:
    return not (isinstance(layer, nn.Dropout) and layer.p == 0)


def _spell(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return "L-" if layer.bias is None else "L+"
    if isinstance(layer, _BatchNorm | FrozenBatchNorm):
        return "BN0" if layer.weight is None else "BN"
    if isinstance(layer, nn.LayerNorm):
        return "LN"
    if inner := [_spell(m) for _, m in layers(layer) if _acts(m)]:
        return f"[{' '.join(inner)}]"
    return type(layer).__name__


def _counted(words: Iterator[str]) -> Iterator[str]:
    for word, same in itertools.groupby(words):
        n = len(list(same))
        yield word if n == 1 else f"{n}x{word}"
