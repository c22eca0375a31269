"""Putting another head into a model.

Everything is resolved, built and checked before the model is touched, so that a refused swap leaves
it bit-identical; the change itself is a handful of assignments that `restore` undoes. The EMA copy
is built anew and loaded, never deep-copied, so that the two share no storage.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from headplug.errors import DimensionError, OptionError, SlotError
from headplug.heads import create_head, describe_head
from headplug.hosts import HeadSlot, describe, dims, find_slots, find_twin, submodule

ANCHOR = "ema_anchor"


@dataclass(frozen=True)
class SwapReport:
    """What a swap does, or would do.

    Attributes:
        slot: The slot as it was.
        paths: Every path that gets the new head.
        twin_paths: Every path that gets its EMA copy.
        old: The old head's name.
        new: The new head's config.
        output_dim: Width of the new projection.
        trainable: Trained parameters of the head, before and after.
        frozen: Values in the head that are not trained, buffers included, before and after.
        notes: What the user should know.
    """

    slot: HeadSlot
    paths: tuple[str, ...]
    twin_paths: tuple[str, ...]
    old: str
    new: Mapping[str, Any]
    output_dim: int
    trainable: tuple[int, int]
    frozen: tuple[int, int]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The same as plain containers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """A few lines to print."""
        slot = self.slot
        lines = [
            f"{', '.join(self.paths)}: {self.old} ({slot.input_dim} > {slot.output_dim}) becomes "
            f"{self.new.get('name')} ({slot.input_dim} > {self.output_dim})",
            f"parameters trained: {self.trainable[0]:,} before, {self.trainable[1]:,} after; "
            f"not trained: {self.frozen[0]:,} before, {self.frozen[1]:,} after",
        ]
        if self.twin_paths:
            lines.append(f"EMA twin: {', '.join(self.twin_paths)}")
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])


@dataclass
class Swap:
    """A swap that was made; as a context manager it is undone at the end of the block.

    Attributes:
        report: What was changed.
        head: The new head.
        twin: Its EMA copy, if the slot has one.
    """

    report: SwapReport
    head: nn.Module
    twin: nn.Module | None
    _model: nn.Module = field(repr=False)
    _places: dict[str, tuple[nn.Module, nn.Module]] = field(default_factory=dict, repr=False)
    _groups: list[tuple[dict[str, Any], list[Any]]] = field(default_factory=list, repr=False)
    _states: list[tuple[Optimizer, dict[Any, Any]]] = field(default_factory=list, repr=False)

    def restore(self) -> None:
        """Puts the old head and its twin back, the very modules, and the optimiser's groups.

        Raises:
            SlotError: The head was changed again since; nothing is touched then.
        """
        for path, (_, new) in self._places.items():
            if submodule(self._model, path) is not new:
                raise SlotError(
                    f"{path} no longer holds the head of this swap; restore the later one."
                )
        for path, (old, _) in self._places.items():
            _assign(self._model, path, old)
        for group, params in self._groups:
            group["params"] = params
        for optimizer, state in self._states:
            optimizer.state.update(state)
        self._places, self._groups, self._states = {}, [], []

    def __enter__(self) -> Swap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()


def swap_head(
    model: nn.Module,
    head: str | Mapping[str, Any] | nn.Module,
    slot: str | HeadSlot | None = None,
    dry_run: bool = False,
    *,
    twin: str | None = "auto",
    optimizer: Optimizer | None = None,
    **options: Any,
) -> Swap:
    """Replaces the projection head of a model, and its EMA twin with it.

    Swap before the optimiser is built, or pass the optimiser, so that the new parameters are
    trained.

    Args:
        model: A lightly, solo-learn or plain PyTorch model.
        head: A registered name, a mapping (`head.config`), or a head that is already built. By
            name, the input width is the slot's, and so is the output width unless `output_dim` is
            given.
        slot: Path of the head, where the model has several or none that is known.
        dry_run: Check everything and report, but change nothing.
        twin: Path of the EMA copy; "auto" finds it; None says that there is none.
        optimizer: One that already holds the old head's parameters: the new ones take their place.
        options: Options of the head, as in `create_head`.

    Returns:
        A `Swap` with `report`, `head` and `restore()`.

    Raises:
        SlotError: No head, several heads, or an unclear twin; or the optimiser was built before.
        DimensionError: The new head does not fit the backbone, or what depends on the old width.
        UnknownNameError, OptionError: As `create_head` does.

    >>> model = nn.Sequential()
    >>> model.backbone, model.projector = nn.Linear(4, 8), nn.Linear(8, 3)
    >>> swap = swap_head(model, "simclr_plain", activation="tanh")
    >>> print(swap.report)
    projector: Linear (8 > 3) becomes simclr_plain (8 > 3)
    parameters trained: 27 before, 99 after; not trained: 0 before, 0 after
    >>> swap.restore()
    >>> model.projector
    Linear(in_features=8, out_features=3, bias=True)
    """
    _refuse_wrapped(model)
    place = _resolve(model, slot, twin)
    old = submodule(model, place.path)
    old_twin = submodule(model, place.twin) if place.twin else None
    new = _build(head, place, options)
    output_dim = _check_dims(new, place)
    places = dict.fromkeys((place.path, *place.aliases), (old, new))
    notes: list[str] = []
    new_twin = None
    if old_twin is not None:
        new_twin = build_twin(new)
        if hasattr(new, ANCHOR):
            notes.append("the head has no parameters; an empty frozen one lets EMA updates run.")
        _settle(new_twin, old_twin, model)
        paths = [p for p, m in model.named_modules(remove_duplicate=False) if m is old_twin]
        places |= dict.fromkeys(paths, (old_twin, new_twin))
    _settle(new, old, model)
    if output_dim != place.output_dim:
        notes.append(
            f"the projection changes from {place.output_dim} to {output_dim} features: queues and "
            "losses outside the model that are made for the old width must follow."
        )
    optimizers = [optimizer] if optimizer is not None else []
    groups = [_group_of(o, old) for o in optimizers]
    if not optimizers:
        _refuse_trained(model, old, place.path)
    trainable, frozen = zip(_count(old), _count(new), strict=True)
    report = SwapReport(
        slot=place,
        paths=tuple(p for p, (o, _) in places.items() if o is old),
        twin_paths=tuple(p for p, (o, _) in places.items() if o is old_twin),
        old=str(getattr(old, "name", "") or type(old).__name__),
        new=dict(getattr(new, "config", {"name": type(new).__name__})),
        output_dim=output_dim,
        trainable=trainable,
        frozen=frozen,
        notes=tuple(notes),
    )
    swap = Swap(report, new, new_twin, model)
    if dry_run:
        return swap
    swap._places = places
    for path, (_, module) in places.items():
        _assign(model, path, module)
    for held, group in zip(optimizers, groups, strict=True):
        _replace_in_optimizer(swap, held, group, old, new)
    return swap


def _resolve(model: nn.Module, slot: str | HeadSlot | None, twin: str | None) -> HeadSlot:
    if isinstance(slot, HeadSlot):
        twin = slot.twin if twin == "auto" else twin
        slot = slot.path
    if slot is None:
        found = [s for s in find_slots(model) if s.role == "projection"]
        if len(found) != 1:
            listing = "; ".join(str(s) for s in found)
            tops = ", ".join(n for n, _ in model.named_children())
            raise SlotError(
                f"the model has {len(found) or 'no'} known projection heads"
                + (f": {listing}. " if found else f"; its modules are {tops or 'none'}. ")
                + "Name the one to swap: slot='path.of.the.head'."
            )
        place = found[0]
    else:
        submodule(model, slot)  # an unknown path is the first thing to say
        found = find_slots(model) if twin == "auto" else []
        place = next((s for s in found if slot in (s.path, *s.aliases)), None) or _describe_named(
            model, slot, twin, [s for s in found if s.role != "projection"]
        )
        copied = next((s for s in found if s.twin == slot), None)
        if copied is not None:
            raise SlotError(
                f"{slot!r} is the EMA twin of {copied.path!r}; it is replaced with it. "
                f"Use slot={copied.path!r}."
            )
    if twin != "auto":
        if twin is not None and dims(model, twin) != (place.input_dim, place.output_dim):
            raise DimensionError(
                f"twin={twin!r} has widths {dims(model, twin)}, the head {place.path!r} "
                f"{(place.input_dim, place.output_dim)}; a twin has the same."
            )
        place = HeadSlot(**{**place.__dict__, "twin": twin})
    return place


def _describe_named(
    model: nn.Module, slot: str, twin: str | None, behind: list[HeadSlot]
) -> HeadSlot:
    roles = {s.path: s.role for s in behind}
    return describe(
        model, slot, twin=find_twin(model, slot) if twin == "auto" else None, roles=roles
    )


def _build(
    head: str | Mapping[str, Any] | nn.Module, place: HeadSlot, options: dict[str, Any]
) -> nn.Module:
    if isinstance(head, nn.Module):
        if options:
            raise OptionError(
                f"options ({', '.join(options)}) go with a name, not with a built head."
            )
        return head
    given = {**head, **options} if isinstance(head, Mapping) else {"name": head, **options}
    if given.setdefault("input_dim", place.input_dim) != place.input_dim:
        raise _misfit(str(given.get("name")), given["input_dim"], place)
    name = given.get("name")
    if isinstance(name, str) and describe_head(name).defaults.get("output_dim") is not None:
        given.setdefault("output_dim", place.output_dim)
    # The draw is undone, so that the rest of a seeded run is the one without the swap.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return create_head(given)


def _misfit(name: str, width: int, place: HeadSlot) -> DimensionError:
    return DimensionError(
        f"the head {name!r} takes {width} features, but the backbone gives {place.input_dim} at "
        f"{place.path!r}. Build it with input_dim={place.input_dim}."
    )


def _check_dims(new: nn.Module, place: HeadSlot) -> int:
    widths = dims(nn.ModuleDict({"head": new}), "head")
    if widths is None:
        raise DimensionError(
            f"the widths of {type(new).__name__} are unknown; set its attributes input_dim and "
            "output_dim."
        )
    if widths[0] != place.input_dim:
        raise _misfit(type(new).__name__, widths[0], place)
    if widths[1] != place.output_dim and place.dependents:
        listing = "; ".join(f"{d.path} ({d.kind}, made for {d.width})" for d in place.dependents)
        raise DimensionError(
            f"the new head gives {widths[1]} features, but these follow the old "
            f"{place.output_dim}: {listing}. Keep output_dim={place.output_dim}, or rebuild them "
            f"for {widths[1]} first."
        )
    return widths[1]


def build_twin(head: nn.Module) -> nn.Module:
    """The EMA copy of a head: equal, frozen, sharing no storage with it.

    A head without parameters gets an empty frozen one, and so does its copy, because EMA updates
    (lightly's `update_momentum` among them) refuse an empty list.

    Raises:
        SlotError: The head is of a class that cannot be built or copied a second time.
    """
    config = getattr(head, "config", None)
    if not list(head.parameters()):
        head.register_parameter(ANCHOR, nn.Parameter(torch.empty(0), False))
    try:
        if config is None:
            twin = copy.deepcopy(head)
        else:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                twin = create_head(config)
        if hasattr(head, ANCHOR):
            twin.register_parameter(ANCHOR, nn.Parameter(torch.empty(0), False))
        twin.load_state_dict(head.state_dict())
    except Exception as error:
        raise SlotError(
            f"no EMA twin of {type(head).__name__} can be built ({error}). Register the head and "
            "pass its name, so that it can be built twice."
        ) from error
    return twin.requires_grad_(False)


def _settle(new: nn.Module, old: nn.Module, model: nn.Module) -> None:
    """Gives the new module the device, dtype and mode of the old one."""
    like = next((t for m in (old, model) for t in _tensors(m) if t.is_floating_point()), None)
    if like is not None:
        new.to(like.device, like.dtype)
    new.train(old.training)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _count(module: nn.Module) -> tuple[int, int]:
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return trained, sum(t.numel() for t in _tensors(module)) - trained


def _assign(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _refuse_wrapped(model: nn.Module) -> None:
    kinds = [type(m).__name__ for m in model.modules()]
    for kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
        if kind in kinds:
            raise SlotError(
                f"the model is already wrapped in {kind}, which keeps its own list of parameters. "
                "Swap the head first, then wrap."
            )


def _refuse_trained(model: nn.Module, old: nn.Module, path: str) -> None:
    trainer = model.__dict__.get("_trainer")  # the property of Lightning raises where there is none
    for optimizer in getattr(trainer, "optimizers", []):
        if _holding(optimizer, old):
            raise SlotError(
                f"the trainer's optimiser already holds the parameters of {path!r}, so a new head "
                "would not be trained. Swap before trainer.fit(), or pass "
                "optimizer=trainer.optimizers[0]."
            )


def _holding(optimizer: Optimizer, old: nn.Module) -> list[dict[str, Any]]:
    ids = {id(p) for p in old.parameters()}
    return [g for g in optimizer.param_groups if any(id(p) in ids for p in g["params"])]


def _group_of(optimizer: Optimizer, old: nn.Module) -> dict[str, Any]:
    groups = _holding(optimizer, old)
    if len(groups) != 1:
        raise SlotError(
            f"the optimiser holds the old head's parameters in {len(groups)} groups; one is needed "
            "to know where the new ones go. Build the optimiser after the swap."
        )
    return groups[0]


def _replace_in_optimizer(
    swap: Swap, optimizer: Optimizer, group: dict[str, Any], old: nn.Module, new: nn.Module
) -> None:
    ids = {id(p) for p in old.parameters()}
    params = group["params"]
    first = next(i for i, p in enumerate(params) if id(p) in ids)
    keep = [p for p in params if id(p) not in ids]
    swap._groups.append((group, params))
    swap._states.append(
        (
            optimizer,
            {p: optimizer.state.pop(p) for p in params if id(p) in ids and p in optimizer.state},
        )
    )
    group["params"] = [
        *keep[:first],
        *(p for p in new.parameters() if p.requires_grad),
        *keep[first:],
    ]
