"""What follows the width of a projection, made anew for another width.

Structure decides, not the method's name: the layers that receive the projection are built again by
their own classes, with those classes' initialisation; in a prediction head also those that give
the projection's width back; queues are drawn again in their layout. All else of a dependent is
copied. What cannot be made is refused with the reason, before the model is touched.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from headplug.errors import DimensionError, HeadplugError
from headplug.heads import ProjectionHead, create_head
from headplug.hosts import Dependent, HeadSlot
from headplug.hosts.modules import paths_of, value_at
from headplug.hosts.twins import detached_copy

SIZES = ("output_dim", "num_features", "size")  # attributes that say a width
Chain = list[tuple[str, nn.Module]]


def rebuild(model: nn.Module, dependent: Dependent, width: int) -> Any:
    """What is at a dependent's path, for a projection of another width; the model stays as it is.

    Args:
        model: The model.
        dependent: What to make again.
        width: Width of the new projection.

    Returns:
        A module, a tensor or a number, to be put at the dependent's path.

    Raises:
        DimensionError: It cannot be made for that width; the message says why.

    >>> model = nn.ModuleDict({"predictor": nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))})
    >>> rebuild(model, Dependent("predictor", "prediction", 8), 6)
    Sequential(
      (0): Linear(in_features=6, out_features=4, bias=True)
      (1): Linear(in_features=4, out_features=6, bias=True)
    )
    """
    old = value_at(model, dependent.path)
    try:
        if dependent.limit is not None and width > dependent.limit:
            raise _Unknown(f"{dependent.limit} is the widest it works with here")
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return _remade(old, dependent, width)
    except (_Unknown, HeadplugError, AssertionError, ValueError) as reason:
        raise DimensionError(
            f"{dependent.path} ({dependent.kind}, made for {dependent.width}): "
            f"{str(reason).rstrip('.') or type(reason).__name__}"
        ) from None


def rebuild_all(model: nn.Module, slot: HeadSlot, width: int) -> dict[Dependent, Any]:
    """Everything that follows a slot's width, made for another one.

    Raises:
        DimensionError: Something cannot be; the message names all that cannot, and why.
    """
    made, refused = {}, []
    for dependent in slot.dependents:
        try:
            made[dependent] = rebuild(model, dependent, width)
        except DimensionError as error:
            refused.append(str(error))
    if refused:
        raise DimensionError(
            f"the new head gives {width} features instead of {slot.output_dim}, and not all that "
            f"depends on it can follow: {'; '.join(refused)}. Keep output_dim={slot.output_dim}, "
            f"or first put there what is made for {width}."
        )
    return made


@dataclass(frozen=True)
class Change:
    """One thing that a swap replaces.

    Attributes:
        paths: Every path that leads to it; the first is what messages name.
        old: What is there: a module, a tensor or a number.
        new: What comes.
    """

    paths: tuple[str, ...]
    old: Any
    new: Any

    @classmethod
    def at(cls, model: nn.Module, path: str, new: Any) -> Change:
        """What a path leads to is to be replaced, at all paths that lead there."""
        old = value_at(model, path)
        return cls(paths_of(model, old) if isinstance(old, nn.Module) else (path,), old, new)

    @property
    def gone(self) -> list[nn.Parameter]:
        """The parameters that leave."""
        return [p for _, p in _parameters(self.old)]

    @property
    def come(self) -> list[tuple[str, nn.Parameter]]:
        """The trained parameters that come, with their names in the model."""
        names = ((".".join(filter(None, [self.paths[0], n])), p) for n, p in _parameters(self.new))
        return [(name, p) for name, p in names if p.requires_grad]


def _parameters(value: Any) -> list[tuple[str, nn.Parameter]]:
    if isinstance(value, nn.Module):
        return list(value.named_parameters())
    return [("", value)] if isinstance(value, nn.Parameter) else []


def with_tail(model: nn.Module, slot: HeadSlot, head: nn.Module, width: int) -> nn.Module:
    """A new head, with the method's own last layer behind it where the slot has one.

    Raises:
        DimensionError: That layer cannot be made for the head's width.
    """
    if slot.tail is None:
        return head
    tail = rebuild(model, Dependent(slot.tail, "whitening", slot.output_dim), width)
    both = nn.Sequential(OrderedDict(head=head, tail=tail))
    both.input_dim, both.output_dim = slot.input_dim, width  # type: ignore[assignment]
    return both


class _Unknown(Exception):  # noqa: N818 - becomes the reason of a refusal
    """A dependent that no rule fits."""


def _remade(old: Any, dependent: Dependent, width: int) -> Any:
    before, both_ends = dependent.width, dependent.kind == "prediction"
    if dependent.kind in ("projection", "loss state"):
        raise _Unknown("it has its own say in the width")
    if isinstance(old, int):
        return width
    if isinstance(old, Tensor):
        return _tensor(old, before, width)
    if isinstance(old, ProjectionHead):
        widths = {"input_dim": width, **({"output_dim": width} if both_ends else {})}
        return create_head({**old.config, **widths})
    if isinstance(old, nn.TransformerEncoder):
        return _transformer(old, before, width)
    if type(old).__name__ == "IterNorm":  # solo-learn's; it derives its groups from the width
        same = {name: getattr(old, name) for name in ("T", "dim", "eps", "momentum", "affine")}
        return type(old)(width, **same)
    return _resized(old, before, width, both_ends)


def _resized(old: nn.Module, before: int, after: int, both_ends: bool) -> nn.Module:
    new = detached_copy(old)
    changed = [_resize_state(m, before, after) for m in new.modules() if not _is_layer(m)]
    for chain in _chains(new):
        for path, layer in _made(chain, before, after, both_ends):
            changed.append(True)
            if not path:
                return layer
            holder, _, name = path.rpartition(".")
            setattr(new.get_submodule(holder), name, layer)
    if not any(changed):
        raise _Unknown(f"nothing in this {type(old).__name__} shows that width")
    return new


def _chains(module: nn.Module) -> Iterator[Chain]:
    """The linear layers and norms of a module in order, one list for each parallel branch."""
    branches = [
        f"{path}.{i}".lstrip(".")
        for path, branch in module.named_modules()
        if isinstance(branch, nn.ModuleList)
        for i in range(len(branch))
    ]
    for start in branches or [""]:
        inside = module.get_submodule(start).named_modules()
        yield [(f"{start}.{p}".strip("."), m) for p, m in inside if _is_layer(m)]


def _made(
    chain: Chain, before: int, after: int, both_ends: bool
) -> Iterator[tuple[str, nn.Module]]:
    """New layers for those at the ends of a chain that have the old width."""
    linear = [i for i, (_, layer) in enumerate(chain) if isinstance(layer, nn.Linear)]
    if not linear:
        return
    for i, (path, layer) in enumerate(chain):
        takes, gives = i <= linear[0], both_ends and i >= linear[-1]
        if isinstance(layer, nn.Linear):
            fan_in = after if takes and layer.in_features == before else layer.in_features
            fan_out = after if gives and layer.out_features == before else layer.out_features
            if (fan_in, fan_out) != (layer.in_features, layer.out_features):
                yield path, _linear(layer, fan_in, fan_out)
        elif (takes or gives) and _norm_width(layer) == before:
            yield path, _norm(layer, after)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.LayerNorm | _BatchNorm)


def _linear(old: nn.Linear, fan_in: int, fan_out: int) -> nn.Linear:
    if is_parametrized(old):
        raise _Unknown("its weights are parametrised")
    new = nn.Linear(fan_in, fan_out, bias=old.bias is not None)
    if hasattr(old, "weight_g"):
        with warnings.catch_warnings():  # the host uses it, however deprecated
            warnings.simplefilter("ignore", FutureWarning)
            new = nn.utils.weight_norm(new)
        if new.weight_g.shape == old.weight_g.shape:
            new.weight_g.data.copy_(old.weight_g)  # type: ignore[operator, arg-type]
    elif _unit(old.weight, 1):
        new.weight.data = F.normalize(new.weight.data, dim=1)
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(getattr(old, name).requires_grad)
    return new


def _norm_width(layer: nn.Module) -> int:
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[-1]
    return int(layer.num_features)  # type: ignore[arg-type]


def _norm(old: nn.Module, width: int) -> nn.Module:
    if isinstance(old, nn.LayerNorm):
        bias = old.bias is not None
        return nn.LayerNorm(width, old.eps, elementwise_affine=old.elementwise_affine, bias=bias)
    assert isinstance(old, _BatchNorm)
    return type(old)(width, old.eps, old.momentum, old.affine, old.track_running_stats)


def _transformer(old: nn.TransformerEncoder, before: int, after: int) -> nn.Module:
    first = old.layers[0]
    assert isinstance(first, nn.TransformerEncoderLayer)
    heads = first.self_attn.num_heads
    if after % heads:
        raise _Unknown(f"its {heads} attention heads need a multiple of {heads}")
    layer = nn.TransformerEncoderLayer(
        after,
        heads,
        first.linear1.out_features * after // before,
        first.dropout.p,
        first.activation,
        first.norm1.eps,
        first.self_attn.batch_first,
        first.norm_first,
    )
    return nn.TransformerEncoder(layer, old.num_layers)


def _resize_state(module: nn.Module, before: int, after: int) -> bool:
    """Follows the width in what a module holds itself: queues, centres, sizes; says whether."""
    own = [*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)]
    wide = [(name, tensor) for name, tensor in own if before in tensor.shape]
    for name, tensor in wide:
        setattr(module, name, _tensor(tensor, before, after))
    for name in SIZES:
        size = getattr(module, name, None)
        if size == before:
            setattr(module, name, after)
        elif isinstance(size, tuple) and size[-1:] == (before,):
            setattr(module, name, (*size[:-1], after))
        else:
            continue
        wide.append((name, torch.empty(0)))
    return bool(wide)


def _tensor(old: Tensor, before: int, after: int) -> Tensor:
    """Drawn as the old one was: as a linear layer's weight, of unit length, zero, or normal."""
    axes = [i for i, size in enumerate(old.shape) if size == before]
    if len(axes) != 1:
        raise _Unknown(f"its shape {tuple(old.shape)} has {len(axes)} axes of that width")
    shape = [after if i == axes[0] else size for i, size in enumerate(old.shape)]
    if isinstance(old, nn.Parameter) and old.ndim == 2 and axes == [1]:
        new = nn.Linear(after, shape[0], bias=False).weight.detach()
    else:
        new = torch.randn(shape) if old.count_nonzero() else torch.zeros(shape)
    if _unit(old, axes[0]):
        new = F.normalize(new, dim=axes[0])
    new = new.to(old.device, old.dtype)
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _unit(tensor: Tensor, axis: int) -> bool:
    """Whether vectors along an axis have length one."""
    lengths = tensor.detach().float().norm(dim=axis)
    return torch.allclose(lengths, torch.ones_like(lengths), atol=1e-3)
