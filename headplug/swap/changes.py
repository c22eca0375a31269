"""One thing that a swap replaces, and how it is put in and taken out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from headplug.errors import SlotError
from headplug.hosts.modules import assign, paths_of, value_at
from headplug.swap.groups import Move


@dataclass(frozen=True)
class Change:
    """A module, tensor or number that comes for another, at every path that leads to it.

    Attributes:
        root: The model that holds it.
        paths: Every path that leads to it; the first is what messages name.
        old: What is there.
        new: What comes.
        follows: Whether it is the old one in another width, parameter for parameter.
    """

    root: nn.Module
    paths: tuple[str, ...]
    old: Any
    new: Any
    follows: bool = False

    @classmethod
    def at(cls, root: nn.Module, path: str, new: Any, follows: bool = False) -> Change:
        """What a path leads to is to be replaced."""
        old = value_at(root, path)
        shared = paths_of(root, old) if isinstance(old, nn.Module | Tensor) else ()
        return cls(root, shared or (path,), old, new, follows)

    @property
    def gone(self) -> list[nn.Parameter]:
        """The parameters that leave."""
        return list(_parameters(self.old).values())

    @property
    def trained(self) -> bool:
        """Whether there are trained parameters in what leaves, or in what comes."""
        return self.trains or any(p.requires_grad for p in self.gone)

    @property
    def trains(self) -> bool:
        """Whether there are trained parameters in what comes."""
        return any(p.requires_grad for p in _parameters(self.new).values())

    def moves(self, held: Collection[int]) -> list[Move]:
        """What leaves an optimiser, by the ids of the parameters that it holds, and what comes."""
        path, new = self.paths[0], _parameters(self.new)
        if not self.follows:
            come = [(_joined(path, n), p) for n, p in new.items() if p.requires_grad]
            return [Move(path, self.gone, come)]
        return [
            Move(_joined(path, n), [old], [(_joined(path, n), new[n])] if n in new else [])
            for n, old in _parameters(self.old).items()
            if id(old) in held
        ]

    @property
    def intact(self) -> bool:
        """Whether the new module is still where it was put."""
        if not isinstance(self.new, nn.Module):
            return True
        return set(self.paths) <= set(paths_of(self.root, self.new))

    def put(self) -> None:
        """Puts the new one in, at all paths or at none.

        Raises:
            SlotError: The model does not let itself be changed.
        """
        done: list[str] = []
        try:
            for path in self.paths:
                assign(self.root, path, self.new)
                done.append(path)
        except Exception as error:
            for changed in done:
                assign(self.root, changed, self.old)
            raise SlotError(f"the model does not let {path!r} be replaced: {error}") from error

    def take_out(self) -> None:
        """Puts the very old one back."""
        for path in self.paths:
            assign(self.root, path, self.old)


@dataclass(frozen=True)
class InPlace(Change):
    """A change of a module that the user's script holds: it stays, what is in it is exchanged.

    Attributes:
        content: What the new module holds, `vars(new)`.
    """

    content: Any = None

    @property
    def intact(self) -> bool:
        """Whether the module still holds what was put in."""
        return vars(self.old) is self.content

    def put(self) -> None:
        """Exchanges what the old and the new module hold; a second time undoes it."""
        held = vars(self.old)
        object.__setattr__(self.old, "__dict__", vars(self.new))
        object.__setattr__(self.new, "__dict__", held)

    def take_out(self) -> None:
        """Exchanges it back."""
        self.put()


def put_all(changes: Sequence[Change]) -> None:
    """Makes all changes, or none.

    Raises:
        SlotError: The model does not let itself be changed; it is as it was then.
    """
    done: list[Change] = []
    try:
        for change in changes:
            change.put()
            done.append(change)
    except SlotError:
        for change in done:
            change.take_out()
        raise


def _parameters(value: Any) -> dict[str, nn.Parameter]:
    if isinstance(value, nn.Module):
        return dict(value.named_parameters())
    return {"": value} if isinstance(value, nn.Parameter) else {}


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}".strip(".")
