"""The parameter groups of an optimiser, when one module takes the place of another."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from headplug.errors import SlotError


class Exchange:
    """Parameters that leave an optimiser for those of a new module; done and undone as a whole.

    The new ones take the place of the old in the same group, with its learning rate and weight
    decay. The state of those that leave (momentum) is kept for `undo`.

    Args:
        optimizer: The optimiser.
        path: Path of the head, for messages and for the names that some optimisers keep.
        old: The head that leaves.
        new: The head that comes.
        old_twin: The EMA copy that leaves; nothing takes its place, because it is not trained.

    Raises:
        SlotError: The old head's parameters are not in one group.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        path: str,
        old: nn.Module,
        new: nn.Module,
        old_twin: nn.Module | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.path = path
        self.new = new
        holding = holders([optimizer], old)
        if len(holding) != 1:
            raise SlotError(
                f"the optimiser holds the parameters of {path!r} in {len(holding) or 'no'} groups; "
                "one is needed to know where the new ones go. Build the optimiser after the swap."
            )
        self._home = holding[0]
        self._gone = [p for m in (old, old_twin) if m is not None for p in m.parameters()]
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
        gone = {id(p) for p in self._gone}
        held = {id(p) for g in self.optimizer.param_groups for p in g["params"]}
        for index, group in enumerate(self.optimizer.param_groups):
            leave = [i for i, p in enumerate(group["params"]) if id(p) in gone]
            if not leave:
                continue
            come = self.new.named_parameters() if group is self._home else ()
            coming = [(n, p) for n, p in come if p.requires_grad and id(p) not in held]
            self._came += [p for _, p in coming]
            entries: dict[str, list[Any]] = {
                "params": [p for _, p in coming],
                "param_names": [f"{self.path}.{n}" for n, _ in coming],
            }
            before = {key: list(group[key]) for key in entries if key in group}
            for key, values in before.items():
                kept = [v for i, v in enumerate(values) if i not in leave]
                kept[leave[0] : leave[0]] = entries[key]
                group[key][:] = kept
            self._saved.append((index, before, list(group["params"])))
        state = self.optimizer.state
        self._state = {p: state.pop(p) for p in self._gone if p in state}

    def undo(self) -> None:
        """Puts the parameters and their state back; the state of the new ones is dropped."""
        for parameter in self._came:
            self.optimizer.state.pop(parameter, None)
        for index, before, _ in self._saved:  # by index: load_state_dict makes new groups
            for key, values in before.items():
                self.optimizer.param_groups[index][key][:] = values
        self.optimizer.state.update(self._state)
        self._saved, self._came, self._state = [], [], {}


def holders(optimizers: Iterable[Optimizer], module: nn.Module) -> list[dict[str, Any]]:
    """The parameter groups that hold any parameter of a module."""
    ids = {id(p) for p in module.parameters()}
    groups = (g for o in optimizers for g in o.param_groups)
    return [g for g in groups if any(id(p) in ids for p in g["params"])]


def alive() -> list[Optimizer]:
    """Every optimiser of this process."""
    return [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]


def _same(a: list[Any], b: list[Any]) -> bool:
    return [id(p) for p in a] == [id(p) for p in b]
