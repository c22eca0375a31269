"""Vectors from maps and tokens.

| name | maps `(B, C, H, W)` or `(B, H, W, C)` | tokens `(B, N, C)` |
|---|---|---|
| flat | all values | all values |
| gap | the mean over positions | the mean over patch tokens |
| cls | - | the first token |
| cls+gap | - | both, joined |
| tokens | `(B, H * W, C)` | the patch tokens `(B, N - special, C)` |

Vectors `(B, C)` stay as they are. How many special tokens (class, distillation, registers) come
first is read from the model that the point belongs to: timm's `num_prefix_tokens`, or a `cls_token`
or `class_token`; where the number of tokens is that of the patches, there are none. Which axis of a
map has the channels shows in the width of the point's own layers, and where that does not tell, in
timm's `output_fmt`; else channels come first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headplug.errors import OptionError, TapError

POOLS = ("flat", "gap", "cls", "cls+gap", "tokens")


class Form(NamedTuple):
    """What shapes mean at a point.

    Attributes:
        special: Tokens in front that are no patches.
        patches: How many patches there are, if that is fixed.
        width: How many channels there are; None if no layer tells.
        channels_last: Whether the model says that its maps are `(B, H, W, C)`.
    """

    special: int = 0
    patches: int | None = None
    width: int | None = None
    channels_last: bool = False


PLAIN = Form()
WIDTHS = {  # attributes of layers that tell how many channels come in, and go out
    True: ("in_channels", "in_features", "num_features", "num_channels", "normalized_shape"),
    False: ("out_channels", "out_features", "num_features", "num_channels", "normalized_shape"),
}


def check_pool(pool: Any) -> None:
    """Refuses what is no pooling.

    Raises:
        OptionError: It is neither a known name nor callable.
    """
    if not (pool is None or callable(pool) or (isinstance(pool, str) and pool in POOLS)):
        raise OptionError(f"pool is one of {', '.join(POOLS)} or a callable, not {pool!r}.")


def form_of(modules: Sequence[nn.Module], takes_input: bool = False) -> Form:
    """What shapes mean at a point.

    Args:
        modules: The modules around it, from the outermost to its own.
        takes_input: Whether the input of the last one is meant.
    """
    special, channels_last = 0, False
    patches: int | None = None
    module: Any
    for module in modules:
        count = getattr(module, "num_prefix_tokens", None)
        token = getattr(module, "cls_token", getattr(module, "class_token", None))
        if isinstance(count, int) or isinstance(token, Tensor):
            special = count if isinstance(count, int) else 1
            patches = getattr(getattr(module, "patch_embed", None), "num_patches", None)
            if patches is None and hasattr(module, "seq_length"):  # torchvision's
                patches = module.seq_length - special
        if kind := getattr(module, "output_fmt", None):
            channels_last = str(kind).endswith("NHWC")
    for module in reversed(modules):  # an activation has the width of the layers around it
        if widths := [w for m in module.modules() if (w := _width(m, takes_input))]:
            return Form(special, patches, widths[0 if takes_input else -1], channels_last)
    return Form(special, patches, None, channels_last)


def _width(layer: nn.Module, takes_input: bool) -> int | None:
    for name in WIDTHS[takes_input]:
        value = getattr(layer, name, None)
        value = value[-1] if isinstance(value, tuple) and value else value
        if isinstance(value, int):
            return value
    return None


def pooled(x: Tensor, pool: str | Callable[[Tensor], Tensor], form: Form = PLAIN) -> Tensor:
    """Pools what a point gives.

    Args:
        x: Maps, tokens or vectors, the batch first.
        pool: A name of the table above, or a callable.
        form: What shapes mean at the point.

    Raises:
        TapError: There is no class token to take, or the callable gives no tensor.

    >>> x = torch.arange(12.0).view(1, 3, 4)  # a class token and two patches
    >>> pooled(x, "gap", Form(special=1)), pooled(x, "cls", Form(special=1))
    (tensor([[6., 7., 8., 9.]]), tensor([[0., 1., 2., 3.]]))
    """
    if callable(pool):
        made = pool(x)
        if not isinstance(made, Tensor):
            raise TapError(f"pool must make a tensor of {tuple(x.shape)}, not {made!r:.80}.")
        return made
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
    if x.ndim != 3 or not _special(x, form):
        kind = "tokens without a class token" if x.ndim == 3 else "maps"
        raise TapError(f"pool='cls' cannot be had: {tuple(x.shape)} are {kind}; take 'gap'.")
    return x[:, 0]


def _special(x: Tensor, form: Form) -> int:
    """How many of the tokens are special; none where there are as many as patches."""
    return 0 if x.shape[1] == form.patches else form.special


def _patches(x: Tensor, form: Form) -> Tensor:
    """Positions `(B, N, C)` without special tokens."""
    if x.ndim == 3:
        return x[:, _special(x, form) :]
    return x.flatten(1, -2) if _channels_last(x, form) else x.flatten(2).transpose(1, 2)


def _channels_last(x: Tensor, form: Form) -> bool:
    first, last = x.shape[1] == form.width, x.shape[-1] == form.width
    return last if first != last else form.channels_last
