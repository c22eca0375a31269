"""Vectors from maps and tokens.

| name | maps `(B, C, H, W)` or `(B, H, W, C)` | tokens `(B, N, C)` |
|---|---|---|
| flat | all values | all values |
| gap | the mean over positions | the mean over patch tokens |
| cls | - | the first token |
| cls+gap | - | both, joined |
| tokens | `(B, H * W, C)` | the patch tokens `(B, N - special, C)` |

Vectors `(B, C)` stay as they are. How many special tokens (class, distillation, registers) come
first, and whether channels come last, is read from the model that the point belongs to: timm's
`num_prefix_tokens` and `output_fmt`, or a `cls_token` or `class_token`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headplug.errors import OptionError, TapError

POOLS = ("flat", "gap", "cls", "cls+gap", "tokens")


class Form(NamedTuple):
    """What shapes mean at a point.

    Attributes:
        special: Tokens in front that are no patches.
        channels_last: Whether maps that are not square are `(B, H, W, C)`.
    """

    special: int = 0
    channels_last: bool = False


PLAIN = Form()


def check_pool(pool: Any) -> None:
    """Refuses what is no pooling.

    Raises:
        OptionError: It is neither a known name nor callable.
    """
    if not (pool is None or callable(pool) or (isinstance(pool, str) and pool in POOLS)):
        raise OptionError(f"pool is one of {', '.join(POOLS)} or a callable, not {pool!r}.")


def form_of(modules: Iterable[nn.Module]) -> Form:
    """What shapes mean, as the modules around a point say, from the outermost to the nearest."""
    special, channels_last = 0, False
    for module in modules:
        count = getattr(module, "num_prefix_tokens", None)
        token = getattr(module, "cls_token", getattr(module, "class_token", None))
        if isinstance(count, int) or token is not None:
            special = count if isinstance(count, int) else 1
        if kind := getattr(module, "output_fmt", None):
            channels_last = str(kind).endswith("NHWC")
    return Form(special, channels_last)


def pooled(x: Tensor, pool: str | Callable[[Tensor], Tensor], form: Form = PLAIN) -> Tensor:
    """Pools what a point gives.

    Args:
        x: Maps, tokens or vectors, the batch first.
        pool: A name of the table above, or a callable.
        form: What shapes mean at the point.

    Raises:
        TapError: There is no class token to take.

    >>> x = torch.arange(12.0).view(1, 3, 4)  # a class token and two patches
    >>> pooled(x, "gap", Form(special=1)), pooled(x, "cls", Form(special=1))
    (tensor([[6., 7., 8., 9.]]), tensor([[0., 1., 2., 3.]]))
    """
    if callable(pool):
        return pool(x)
    if x.ndim < 3:
        return x
    if pool == "flat":
        return x.flatten(1)
    if pool == "cls":
        return _class_token(x, form)
    patches = _patches(x, form)
    if pool == "tokens":
        return patches
    mean = patches.mean(1)
    return mean if pool == "gap" else torch.cat([_class_token(x, form), mean], dim=1)


def _class_token(x: Tensor, form: Form) -> Tensor:
    if x.ndim != 3 or not form.special:
        kind = "tokens without a class token" if x.ndim == 3 else "maps"
        raise TapError(f"pool='cls' cannot be had: {tuple(x.shape)} are {kind}; take 'gap'.")
    return x[:, 0]


def _patches(x: Tensor, form: Form) -> Tensor:
    """Positions `(B, N, C)` without special tokens."""
    if x.ndim == 3:
        return x[:, form.special :]
    return x.flatten(1, 2) if _channels_last(x, form) else x.flatten(2).transpose(1, 2)


def _channels_last(x: Tensor, form: Form) -> bool:
    if x.ndim != 4:
        return False
    first, second = x.shape[1] == x.shape[2], x.shape[2] == x.shape[3]
    return first if first != second else form.channels_last  # squares tell by themselves
