"""What a swap does, or would do, in numbers and words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from headplug.heads.parameters import count
from headplug.hosts import HeadSlot
from headplug.swap.changes import Change
from headplug.swap.records import config_of

FORGOTTEN = (
    "this seems to be made for {} features, and the projection now has {}: {}. If the loss of this "
    "model uses it, pass it: outside=[...]."
)


@dataclass(frozen=True)
class SwapReport:
    """What a swap does, or would do.

    Attributes:
        slot: The slot as it was.
        paths: Every path that gets the new head.
        twin_paths: Every path that gets its EMA copy.
        old: The old head's name.
        new: The new head's config; `{"class": name}` if it has none.
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

    def with_note(self, note: str) -> SwapReport:
        """The same with one more thing that the user should know."""
        return replace(self, notes=(*self.notes, note))

    def as_dict(self) -> dict[str, Any]:
        """The same as plain containers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """A few lines to print."""
        slot = self.slot
        lines = [
            f"{', '.join(self.paths)}: {self.old} ({slot.input_dim} > {slot.output_dim}) becomes "
            f"{self.new.get('name') or self.new['class']} ({slot.input_dim} > {self.output_dim})",
            f"parameters trained: {self.trainable[0]:,} before, {self.trainable[1]:,} after; "
            f"not trained: {self.frozen[0]:,} before, {self.frozen[1]:,} after",
        ]
        if self.twin_paths:
            lines.append(f"EMA twin: {', '.join(self.twin_paths)}")
        if self.rebuilt:
            lines.append(f"made anew for {self.output_dim} features: {', '.join(self.rebuilt)}")
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])


def make_report(
    place: HeadSlot,
    new: nn.Module,
    output_dim: int,
    changes: Sequence[Change],
    outside: Sequence[nn.Module],
    left: Sequence[str],
) -> SwapReport:
    """What putting a new head in the place of the old one changes; nothing is changed by it.

    Args:
        place: The slot.
        new: The new head.
        output_dim: Width of the new projection.
        changes: Everything that is replaced: the head, its EMA copy, and what follows them.
        outside: Modules of the user's script that may follow, too.
        left: What was found that may have to follow, and was not passed.
    """
    old: nn.Module = changes[0].old
    trainable, frozen = zip(count(old), count(new), strict=True)
    follow = [c for c in changes if c.follows]
    return SwapReport(
        slot=place,
        paths=changes[0].paths,
        twin_paths=changes[1].paths if place.twin else (),
        old=str(getattr(old, "name", "") or type(old).__name__),
        new=config_of(new),
        output_dim=output_dim,
        trainable=trainable,
        frozen=frozen,
        rebuilt=tuple(c.paths[0] for c in follow),
        notes=(
            *_notes(changes[0].root, place, old, new),
            *_notes_on_width(changes[0].root, place, output_dim, follow, outside, left),
        ),
    )


def _notes(model: nn.Module, place: HeadSlot, old: nn.Module, new: nn.Module) -> Iterator[str]:
    if place.twin and not list(new.parameters()):
        yield "the head has no parameters; an empty frozen one lets EMA updates run."
    for name in place.calls:
        if not hasattr(new, name):
            yield f"{name}() of the old head does nothing on the new one."
    if _hooked(old):
        yield "hooks that were registered on the old head are not on the new one."
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if not name.startswith("_") and _holds(value, old):
                yield (
                    f"{path or 'the model'} also keeps the old head in {name!r}, outside "
                    "its modules; that stays as it is."
                )


def _notes_on_width(
    model: nn.Module,
    place: HeadSlot,
    output_dim: int,
    follow: Sequence[Change],
    outside: Sequence[nn.Module],
    left: Sequence[str],
) -> Iterator[str]:
    if output_dim == place.output_dim:
        return
    if left:
        yield FORGOTTEN.format(place.output_dim, output_dim, ", ".join(left))
    elif not (place.complete or outside or follow):
        yield (
            f"the projection changes from {place.output_dim} to {output_dim} features. What your "
            "script holds for the old width (prototypes, a predictor, a loss with a memory bank or "
            "a centre) fails at the first batch unless you pass it: outside=[...]."
        )
    held = {id(m) for c in follow if isinstance(c.old, nn.Module) for m in c.old.modules()}
    for module in outside:
        if not any(id(m) in held for m in module.modules()):
            yield (
                f"the {type(module).__name__} in outside holds nothing of {place.output_dim} "
                "features and stays as it is."
            )
    for change in follow:
        if isinstance(change.old, nn.Module) and any(_hooked(m) for m in change.old.modules()):
            yield f"hooks that were registered in {change.paths[0]} are not on what comes for it."


def _hooked(module: nn.Module) -> bool:
    """Whether others than torch itself put hooks on a module."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not type(h).__module__.startswith("torch.") for h in hooks)


def _holds(value: Any, module: nn.Module, depth: int = 3) -> bool:
    """Whether plain containers, nested a few times, hold a module."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if depth and isinstance(value, list | tuple | set):
        return any(_holds(v, module, depth - 1) for v in value)
    return value is module
