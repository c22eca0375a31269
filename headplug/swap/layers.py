"""Single layers and tensors of another width, drawn as they were drawn at first.

What a layer is stays: its class, options, dtype, device, mode, and which of its weights train. Its
values are new, by the initialisation of its own class. What no rule fits raises `Unknown`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrizations import weight_norm as parametrised

from headplug.hosts.modules import tensors
from headplug.hosts.twins import detached_copy

M = TypeVar("M", bound=nn.Module)
PARAMETRISED = "parametrizations.weight."
WEIGHT_NORM: dict[tuple[str, ...], Callable[..., nn.Module]] = {  # names of length and direction
    ("weight_g", "weight_v"): nn.utils.weight_norm,
    (f"{PARAMETRISED}original0", f"{PARAMETRISED}original1"): parametrised,
}
DERIVED = ("num_groups", "num_channels")  # IterNorm works them out from its width


class Unknown(Exception):  # noqa: N818 - becomes the reason of a refusal
    """Something that no rule fits."""


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a norm over features."""
    return isinstance(module, nn.Linear | nn.LayerNorm | nn.RMSNorm | _BatchNorm)


def linear(old: nn.Linear, fan_in: int, fan_out: int) -> nn.Module:
    """A linear layer of other widths, weight norm and unit rows included.

    Raises:
        Unknown: It holds its weights in a way of its own.
    """
    if any(is_lazy(t) for t in tensors(old)):
        raise Unknown("it has not seen a batch yet and has no width")
    held = [*old.named_parameters(), *old.named_buffers()]
    names = tuple(sorted(n for n, _ in held if n != "bias"))
    if names == ("weight",):
        plain = detached_copy(old)
        plain.in_features, plain.out_features = fan_in, fan_out
        _empty(plain, "weight", fan_out, fan_in)
        _empty(plain, "bias", fan_out)
        plain.reset_parameters()
        if unit(old.weight, 1):
            plain.weight.data = F.normalize(plain.weight.data, dim=1)
        return like(plain, old)
    normed = WEIGHT_NORM.get(names)
    kind = type(old).__bases__[0] if normed is parametrised else type(old)
    rule = old.parametrizations["weight"][0] if normed is parametrised else None  # type: ignore[index]
    if normed is None or kind is not nn.Linear or not isinstance(rule, _WeightNorm | None):
        raise Unknown(f"its layer {type(old).__name__} holds {' and '.join(names) or 'no weight'}")
    with warnings.catch_warnings():  # the host uses the older one, however deprecated
        warnings.simplefilter("ignore", FutureWarning)
        new = normed(nn.Linear(fan_in, fan_out, bias=old.bias is not None))
    length, was = new.get_parameter(names[0]), old.get_parameter(names[0])
    if was.shape != (old.out_features, 1):
        raise Unknown(f"its layer {type(old).__name__} is normalised along another axis")
    if not was.is_meta and (was == was[0]).all():
        length.data.fill_(was[0].item())  # a length that was set, for all rows
    return like(new, old)


def norm_width(layer: nn.Module) -> int:
    """The number of features that a norm is made for."""
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return layer.normalized_shape[-1]
    return int(layer.num_features)  # type: ignore[arg-type]


def norm(old: nn.Module, width: int) -> nn.Module:
    """A norm over another number of features, as before its first batch."""
    new = detached_copy(old)
    own = [*new.named_parameters(recurse=False), *new.named_buffers(recurse=False)]
    for name, tensor in own:
        if tensor.ndim:  # not the count of batches
            _empty(new, name, *tensor.shape[:-1], width)
    if isinstance(new, nn.LayerNorm | nn.RMSNorm):
        new.normalized_shape = (*new.normalized_shape[:-1], width)
    else:
        new.num_features = width  # type: ignore[assignment]
    new.reset_parameters()  # type: ignore[operator]
    return like(new, old)


def whitening(old: nn.Module, width: int) -> nn.Module:
    """A whitening layer of another width: its class takes that first, and keeps its options."""
    options = [o for o in inspect.signature(type(old)).parameters if o not in DERIVED]
    return like(type(old)(width, **{o: getattr(old, o) for o in options[1:]}), old)


def transformer(old: nn.TransformerEncoder, before: int, after: int) -> nn.TransformerEncoder:
    """A transformer of another width, with as many heads, and a hidden width in proportion.

    Raises:
        Unknown: The width is not a multiple of the number of heads.
    """
    first = old.layers[0]
    assert isinstance(first, nn.TransformerEncoderLayer)
    heads = first.self_attn.num_heads
    if after % heads:
        raise Unknown(f"its {heads} attention heads need a multiple of {heads}")
    layer = nn.TransformerEncoderLayer(
        after,
        heads,
        first.linear1.out_features * after // before,
        first.dropout.p,
        first.activation,
        first.norm1.eps,
        first.self_attn.batch_first,
        first.norm_first,
        first.linear1.bias is not None,
    )
    last = None if old.norm is None else norm(old.norm, after)
    new = nn.TransformerEncoder(layer, old.num_layers, last, old.enable_nested_tensor)
    return like(new, old)


def resized(old: Tensor, before: int, after: int, *, average: bool = False) -> Tensor:
    """A tensor of another width, drawn as the old one seems to have been drawn.

    Constant stays constant, unit vectors stay unit vectors, and what lies within the bounds of a
    linear layer's weight is drawn as one; the rest is normal, with the spread of the old.

    Args:
        old: The tensor.
        before: The width, which is the size of one axis; if of several, of unit vectors' axis.
        after: Its new size.
        average: Whether it is a running mean, which starts at zero again.

    Raises:
        Unknown: It is unclear which axis is meant.

    >>> resized(torch.ones(1, 3), 3, 2)
    tensor([[1., 1.]])
    """
    axes = [i for i, size in enumerate(old.shape) if size == before]
    if len(axes) > 1:
        axes = [i for i in axes if unit(old, i)] or axes
    if len(axes) != 1:
        raise Unknown(f"its shape {tuple(old.shape)} has {len(axes)} axes of that width")
    shape = [after if i == axes[0] else size for i, size in enumerate(old.shape)]
    new = _drawn(old, shape, axes[0], before, after)
    if average and new.numel() == after:
        new = torch.zeros(shape)
    new = new.to(old.device, old.dtype)
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _drawn(old: Tensor, shape: list[int], axis: int, before: int, after: int) -> Tensor:
    if old.is_meta or not old.numel():
        return torch.zeros(shape)
    values = old.detach().float()
    lowest, highest = values.aminmax()
    if lowest == highest:
        return torch.full(shape, float(lowest))
    if unit(old, axis):
        return F.normalize(torch.randn(shape), dim=axis)
    if isinstance(old, nn.Parameter) and old.ndim == 2 and values.abs().max() <= before**-0.5:
        return torch.empty(shape).uniform_(-(after**-0.5), after**-0.5)
    return torch.randn(shape) * values.std()


def unit(tensor: Tensor, axis: int) -> bool:
    """Whether the vectors along an axis have length one, by the precision of bfloat16."""
    if tensor.is_meta or not tensor.numel():
        return False
    lengths = tensor.detach().float().norm(dim=axis)
    return torch.allclose(lengths, torch.ones_like(lengths), atol=1e-2)


def like(new: M, old: nn.Module) -> M:
    """Gives a module the device, dtype, mode and flags of another with the same names."""
    flags = {n: p.requires_grad for n, p in old.named_parameters()}
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(flags.get(name, True))
    held = next((t for t in tensors(old) if t.is_floating_point()), None)
    if held is not None:
        new.to(held.device, held.dtype)
    return new.train(old.training)


def _empty(layer: nn.Module, name: str, *shape: int) -> None:
    """Makes room for a tensor that `reset_parameters` is about to fill."""
    old = getattr(layer, name)
    if old is not None:
        new = torch.empty(shape)
        own = isinstance(old, nn.Parameter)
        setattr(layer, name, nn.Parameter(new, old.requires_grad) if own else new)
