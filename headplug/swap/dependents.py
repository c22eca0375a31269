"""What follows the width of a projection, made anew for another width.

Structure decides, not the method's name: the layers that receive the projection are drawn again by
their own classes; in a prediction head also those that give the projection's width back, in a head
whose output is compared with the projection only those; queues and centres are drawn again in their
layout. All else of a dependent is copied. A module in the model is replaced, so that `restore` puts
the very old one back; one that the user's script holds (`outside`) has to stay the same object, and
what is in it is exchanged. What cannot be made is refused with the reason, before anything is
touched.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headplug.errors import DimensionError, HeadplugError
from headplug.heads import ProjectionHead, create_head
from headplug.heads.parameters import FrozenBatchNorm
from headplug.hosts import Dependent, HeadSlot
from headplug.hosts.modules import inside, parent, value_at
from headplug.hosts.twins import copy_frozen, detached_copy
from headplug.swap import layers
from headplug.swap.changes import Change, InPlace
from headplug.swap.layers import Unknown
from headplug.swap.outside import OUTSIDE, SIZES, belonging, beside, dependents_outside

TRIED = ("prediction", "prototypes", "next layer", OUTSIDE)  # what maps (batch, width)
Chain = list[tuple[str, nn.Module]]


class Ends(NamedTuple):
    """At which ends of a dependent the width of the projection is."""

    takes: bool
    gives: bool


def rebuild_all(
    model: nn.Module, slot: HeadSlot, width: int, outside: Sequence[nn.Module] = ()
) -> list[Change]:
    """Everything that follows a slot's width, made for another one; nothing is changed yet.

    Args:
        model: The model.
        slot: The head that is swapped.
        width: Width of the new projection.
        outside: Modules of the user's script that may follow it too.

    Raises:
        DimensionError: Something cannot be made; the message names all that cannot, and why.
    """
    made: list[Change] = []
    refused = []
    both = beside(model, slot, outside)
    found = [(model, d) for d in belonging(model, slot, outside)]
    for root, dependent in [*found, *((both, d) for d in dependents_outside(both, slot))]:
        try:
            new = rebuild(root, dependent, width)
        except DimensionError as error:
            refused.append(str(error))
            continue
        if parent(dependent.path) == OUTSIDE:
            old = value_at(root, dependent.path)
            made.append(InPlace(root, (dependent.path,), old, new, True, vars(new)))
            continue
        made.append(Change.at(root, dependent.path, new, follows=True))
        if dependent.twin:
            twin = layers.like(copy_frozen(new), value_at(root, dependent.twin))
            made.append(Change.at(root, dependent.twin, twin, follows=True))
    if refused:
        raise DimensionError(
            f"the new head gives {width} features instead of {slot.output_dim}, and not all that "
            f"depends on it can follow: {'; '.join(refused)}. Keep output_dim={slot.output_dim}, "
            f"or first put there what is made for {width}."
        )
    return made


def rebuild(root: nn.Module, dependent: Dependent, width: int) -> Any:
    """What is at a dependent's path, for a projection of another width; the model stays as it is.

    Args:
        root: The model.
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
    try:
        if dependent.limit is not None and width > dependent.limit:
            raise Unknown(f"{dependent.limit} is the widest it works with here")
        return _remade(value_at(root, dependent.path), dependent, width)
    except (Unknown, HeadplugError, AssertionError, ValueError) as reason:
        raise DimensionError(
            f"{dependent.path} ({dependent.kind}, made for {dependent.width}): "
            f"{str(reason).rstrip('.') or type(reason).__name__}"
        ) from None


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


def _remade(old: Any, dependent: Dependent, width: int) -> Any:
    before, kind = dependent.width, dependent.kind
    if kind == "projection":
        raise Unknown("it has a width of its own")
    if kind == "tensor":
        raise Unknown("nothing but its shape says that it belongs to the projection")
    if isinstance(old, int):
        return width
    if isinstance(old, Tensor):
        return layers.resized(old, before, width, average=kind == "loss centre")
    gives = _gives(old)  # whether the width comes out again, too
    ends = Ends(
        takes=kind != "clusters",
        gives={
            "prediction": True,
            "clusters": True,
            "next layer": gives is None,
            OUTSIDE: gives in (None, before),
        }.get(kind, False),
    )
    if isinstance(old, ProjectionHead):
        return _built_again(old, width, ends)
    if isinstance(old, nn.TransformerEncoder):
        return layers.transformer(old, before, width)
    if kind == "whitening":
        return layers.whitening(old, width)
    new = _resized(old, dependent, width, ends)
    if kind in TRIED:
        _try_out(old, new, before, width, ends.gives)
    return new


def _built_again(old: ProjectionHead, width: int, ends: Ends) -> nn.Module:
    """One of headplug's heads in another width, with all that does not touch it (frozen layers)."""
    names = [n for n, changes in zip(("input_dim", "output_dim"), ends, strict=True) if changes]
    new = layers.like(create_head({**old.config, **dict.fromkeys(names, width)}), old)
    shapes = {name: tensor.shape for name, tensor in new.state_dict().items()}
    kept = {n: t for n, t in old.state_dict().items() if shapes.get(n) == t.shape}
    new.load_state_dict(kept, strict=False)
    return new


def _resized(old: nn.Module, dependent: Dependent, after: int, ends: Ends) -> nn.Module:
    before = dependent.width
    try:
        new = detached_copy(old)
    except Exception as error:
        raise Unknown(f"it cannot be copied ({error})") from error
    within = [p for p, m in new.named_modules() if layers.is_layer(m)]
    changed = [
        _resize_state(module, dependent, after, ends)
        for path, module in new.named_modules()
        if not any(not layer or path == layer or inside(path, layer) for layer in within)
    ]
    for chain in _chains(new, before):
        for path, layer in _made(chain, before, after, ends):
            changed.append(True)
            if not path:
                return layer
            holder, _, name = path.rpartition(".")
            setattr(new.get_submodule(holder), name, layer)
    if not any(changed) and dependent.kind != "loss state":
        raise Unknown(f"nothing in this {type(old).__name__} shows that width")
    return new


def _resize_state(module: nn.Module, dependent: Dependent, after: int, ends: Ends) -> bool:
    """Follows the width in what a module holds itself: queues, centres, sizes; says whether."""
    before, changed = dependent.width, False
    held = {**vars(module), **module._parameters, **module._buffers}
    new: Any
    for name, value in held.items():
        if isinstance(value, Tensor) and before in value.shape:
            if _is_torchs(module) or isinstance(module, FrozenBatchNorm):
                raise Unknown(f"it has a {type(module).__name__} of that width")
            first_batch = dependent.kind == "loss state"  # its loss makes it then
            average = "cent" in name or dependent.kind == "loss centre"
            new = None if first_batch else layers.resized(value, before, after, average=average)
        elif (name in SIZES and ends.takes) or (
            name == "output_dim" and (ends.gives or not _gives(module))
        ):
            if isinstance(value, int) and value == before:
                new = after
            elif isinstance(value, tuple | list) and list(value[-1:]) == [before]:
                new = type(value)([*value[:-1], after])
            else:
                continue
        else:
            continue
        setattr(module, name, new)
        changed = True
    return changed


def _is_torchs(module: nn.Module) -> bool:
    """Whether a module is, or derives from, a layer of torch's, and not just a container."""
    kinds = [c.__module__ for c in type(module).__mro__ if c is not nn.Module]
    return any(k.startswith("torch.nn.modules.") and "container" not in k for k in kinds)


def _gives(module: nn.Module) -> int | None:
    """The width of the last linear layer."""
    found = [m.out_features for m in module.modules() if isinstance(m, nn.Linear)]
    return found[-1] if found else None


def _chains(module: nn.Module, width: int) -> Iterator[Chain]:
    """The linear layers and norms in order; one list for each branch, if all take the width."""
    whole = [(p, m) for p, m in module.named_modules() if layers.is_layer(m)]
    starts = [
        f"{path}.{i}".lstrip(".")
        for path, branch in module.named_modules()
        if isinstance(branch, nn.ModuleList)
        for i in range(len(branch))
    ]
    branches = [[(p, m) for p, m in whole if p == s or inside(p, s)] for s in starts]
    linear = [[m for _, m in branch if isinstance(m, nn.Linear)] for branch in branches]
    parallel = all(found and found[0].in_features == width for found in linear)
    if parallel and sum(map(len, branches)) == len(whole):
        yield from branches
    else:
        yield whole


def _made(chain: Chain, before: int, after: int, ends: Ends) -> Iterator[tuple[str, nn.Module]]:
    """New layers for those at the ends of a chain that have the old width."""
    linear = [i for i, (_, layer) in enumerate(chain) if isinstance(layer, nn.Linear)]
    first, last = (linear[0], linear[-1]) if linear else (len(chain), len(chain))
    for i, (path, layer) in enumerate(chain):
        takes, gives = ends.takes and i <= first, ends.gives and i >= last
        if isinstance(layer, nn.Linear):
            fan_in = after if takes and layer.in_features == before else layer.in_features
            fan_out = after if gives and layer.out_features == before else layer.out_features
            if (fan_in, fan_out) != (layer.in_features, layer.out_features):
                yield path, layers.linear(layer, fan_in, fan_out)
        elif (takes or gives) and layers.norm_width(layer) == before:
            yield path, layers.norm(layer, after)


def _try_out(old: nn.Module, new: nn.Module, before: int, after: int, both_ends: bool) -> None:
    """Runs copies on zeros: what is new must run where the old one does, to the same width."""
    gave, gives = _output(old, before), _output(new, after)
    if isinstance(gave, int) and gives != (after if both_ends and gave == before else gave):
        raise Unknown(f"its {type(old).__name__} does not run with {after} features: {gives}")


def _output(module: nn.Module, width: int) -> Any:
    """The width of what a module gives, None if that is not one tensor, or what it says."""
    try:
        given = detached_copy(module).to("cpu", torch.float).eval()(torch.zeros(2, width))
    except Exception as error:
        return str(error)
    return given.shape[-1] if isinstance(given, Tensor) and given.ndim else None
