"""What a swap does, or would do, in numbers and words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from headplug.errors import HeadplugError
from headplug.heads.parameters import count
from headplug.hosts import HeadSlot
from headplug.hosts.modules import paths_of, submodule


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
        frozen: Fixed weights in the head, buffers included, before and after.
        rebuilt: What is made anew for another width of the projection.
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
    rebuilt: tuple[str, ...] = ()
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
        if self.rebuilt:
            lines.append(f"made anew for {self.output_dim} features: {', '.join(self.rebuilt)}")
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])


def make_report(
    model: nn.Module, place: HeadSlot, old: nn.Module, new: nn.Module, output_dim: int
) -> SwapReport:
    """What putting a new head in the place of the old one changes; nothing is changed by it."""
    trainable, frozen = zip(count(old), count(new), strict=True)
    return SwapReport(
        slot=place,
        paths=paths_of(model, old),
        twin_paths=paths_of(model, submodule(model, place.twin)) if place.twin else (),
        old=str(getattr(old, "name", "") or type(old).__name__),
        new=_config(new),
        output_dim=output_dim,
        trainable=trainable,
        frozen=frozen,
        rebuilt=() if output_dim == place.output_dim else tuple(d.path for d in place.dependents),
        notes=tuple(_notes(model, place, old, new, output_dim)),
    )


def _notes(
    model: nn.Module, place: HeadSlot, old: nn.Module, new: nn.Module, output_dim: int
) -> Iterator[str]:
    if place.twin and not list(new.parameters()):
        yield "the head has no parameters; an empty frozen one lets EMA updates run."
    if output_dim != place.output_dim:
        yield (
            f"the projection changes from {place.output_dim} to {output_dim} features: queues and "
            "losses outside the model that are made for the old width must follow."
        )
    for name in place.calls:
        if not hasattr(new, name):
            yield f"{name}() of the old head does nothing on the new one."
    if old._forward_hooks or old._forward_pre_hooks:
        yield "hooks that were registered on the old head are not on the new one."
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if not name.startswith("_") and _holds(value, old):
                yield (
                    f"{path or 'the model'} also keeps the old head in {name!r}, outside "
                    "its modules; that stays as it is."
                )


def _holds(value: Any, module: nn.Module, depth: int = 3) -> bool:
    """Whether plain containers, nested a few times, hold a module."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if depth and isinstance(value, list | tuple | set):
        return any(_holds(v, module, depth - 1) for v in value)
    return value is module


def _config(head: nn.Module) -> dict[str, Any]:
    with suppress(HeadplugError):  # a class that does not store its options has none
        return dict(getattr(head, "config", {"name": type(head).__name__}))
    return {"name": type(head).__name__}
