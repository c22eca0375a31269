"""The parameter groups of an optimiser, when modules take the place of others."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from headplug.errors import SlotError

Named = list[tuple[str, nn.Parameter]]
T = TypeVar("T")


class Move(NamedTuple):
    """Parameters that leave an optimiser, and those that come where they were.

    Attributes:
        path: Where in the model they are, for messages.
        gone: Those that leave.
        come: Those that come, with the names that some optimisers keep.
    """

    path: str
    gone: list[nn.Parameter]
    come: Named


class Exchange:
    """Parameters that leave an optimiser for those of new modules; done and undone as a whole.

    The new ones take the place of the old in the same group, with its learning rate and weight
    decay. The state of those that leave (momentum) is kept for `undo`.

    Args:
        optimizer: The optimiser.
        moves: What leaves, and what comes for it.

    Raises:
        SlotError: What leaves for something is not in one group.
    """

    def __init__(self, optimizer: Optimizer, moves: Sequence[Move]) -> None:
        self.optimizer = optimizer
        self._gone = {id(p): (p, move) for move in moves for p in move.gone}
        for move in moves:
            homes = holders([optimizer], move.gone)
            if move.come and len(homes) != 1:
                raise SlotError(
                    f"the optimiser holds the parameters of {move.path!r} in {len(homes) or 'no'} "
                    "groups; one is needed to know where the new ones go. Build the optimiser "
                    "after the swap."
                )
        self._saved: list[tuple[int, dict[str, list[Any]], list[Any]]] = []
        self._came: list[Tensor] = []
        self._state: dict[Tensor, Any] = {}

    @property
    def intact(self) -> bool:
        """Whether the groups are still as `do` left them."""
        groups = self.optimizer.param_groups
        return all(
            index < len(groups) and _same(groups[index]["params"], after)
            for index, _, after in self._saved
        )

    def do(self) -> None:
        """Exchanges the parameters; the lists are changed in place."""
        seen = {id(p) for g in self.optimizer.param_groups for p in g["params"]}
        for index, group in enumerate(self.optimizer.param_groups):
            if not any(id(p) in self._gone for p in group["params"]):
                continue
            keys = [key for key in ("params", "param_names") if key in group]
            before: dict[str, list[Any]] = {key: list(group[key]) for key in keys}
            names = before.get("param_names", [""] * len(before["params"]))
            kept: Named = []
            for name, parameter in zip(names, before["params"], strict=True):
                if id(parameter) not in self._gone:
                    kept.append((name, parameter))
                    continue
                coming = [(n, p) for n, p in self._gone[id(parameter)][1].come if id(p) not in seen]
                kept += coming  # at the first of those that leave; the rest has seen them
                seen |= {id(p) for _, p in coming}
                self._came += [p for _, p in coming]
            for key, i in {"param_names": 0, "params": 1}.items():
                if key in before:
                    group[key][:] = [pair[i] for pair in kept]
            self._saved.append((index, before, list(group["params"])))
        state = self.optimizer.state
        self._state = {p: state.pop(p) for p, _ in self._gone.values() if p in state}

    def undo(self) -> None:
        """Puts the parameters and their state back; the state of the new ones is dropped."""
        for parameter in self._came:
            self.optimizer.state.pop(parameter, None)
        for index, before, _ in self._saved:  # by index: load_state_dict makes new groups
            for key, values in before.items():
                self.optimizer.param_groups[index][key][:] = values
        self.optimizer.state.update(self._state)
        self._saved, self._came, self._state = [], [], {}


def holders(
    optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]
) -> list[dict[str, Any]]:
    """The parameter groups that hold any of some parameters."""
    ids = {id(p) for p in parameters}
    groups = (g for o in optimizers for g in o.param_groups)
    return [g for g in groups if any(id(p) in ids for p in g["params"])]


def alive(*kinds: type[T]) -> list[T]:
    """Every object of some classes, or of those derived from them, in this process."""
    return [o for o in gc.get_objects() if issubclass(type(o), kinds)]


def _same(a: list[Any], b: list[Any]) -> bool:
    return [id(p) for p in a] == [id(p) for p in b]
