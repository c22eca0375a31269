"""Which weights of a head train, and which of those decay.

Both work on any module, so that a head from another package can be frozen like ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headplug.errors import OptionError, unknown

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class FrozenBatchNorm(nn.Module):
    """Batch norm whose scale, shift and statistics never change, under batch norm's own names.

    Args:
        norm: The layer whose values it takes.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        for name in ("weight", "bias", *STATISTICS):
            value = getattr(norm, name)
            self.register_buffer(name, None if value is None else value.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `(batch, features)` or `(batch, features, ...)` with the fixed statistics."""
        of_batch = self.running_mean is None  # batch norm that tracks no statistics has no others
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, of_batch, eps=self.eps
        )


def freeze(module: nn.Module, what: bool | str | Sequence[str]) -> list[str]:
    """Turns weights into buffers: no optimiser, EMA update or `requires_grad_` moves them again.

    State dicts keep their keys. Frozen batch norm keeps its statistics, too, and a tied weight is
    frozen wherever it is used. Freeze before the optimiser is built.

    Args:
        module: A head.
        what: True for everything, or paths (or globs) of layers or single weights: "layers.0",
            "layers.0.bias", ["layers.*"].

    Returns:
        The paths; "*" for everything.

    Raises:
        UnknownNameError: A path matches nothing; the module is left as it was.
        OptionError: What it matches has no weights, as an activation; the same.

    >>> head = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> freeze(head, "0")
    ['0']
    >>> [name for name, _ in head.named_parameters()]
    ['2.weight', '2.bias']
    """
    if isinstance(what, bool):
        patterns = ["*"] if what else []
    else:
        patterns = [what] if isinstance(what, str) else list(dict.fromkeys(what))
    layers = dict(module.named_modules(remove_duplicate=False))  # "" is the module itself
    weights = dict(module.named_parameters(remove_duplicate=False))
    buffers = [n for n, _ in module.named_buffers(remove_duplicate=False)]
    fixed = [n for n in buffers if not n.endswith(STATISTICS)]  # may be frozen again
    known = [*layers, *weights, *fixed]
    matched: list[str] = []
    for pattern in patterns:
        found = [name for name in known if pattern and fnmatchcase(name, pattern)]
        if not found:
            hint = "freeze='*' freezes the whole head; print(head) shows its layers."
            raise unknown("layer", pattern, filter(None, known), hint)
        if pattern != "*" and not any(_inside(n, found) for n in [*weights, *buffers]):
            holders = {name.rpartition(".")[0] for name in [*weights, *buffers]}
            owners = [path for path in layers if path and path in holders]
            raise OptionError(
                f"{pattern!r} has no weights to freeze; these layers have: {', '.join(owners)}."
            )
        matched += found
    _freeze(
        module,
        {id(layer) for path, layer in layers.items() if _inside(path, matched)},
        {id(weight) for path, weight in weights.items() if _inside(path, matched)},
    )
    return patterns


def param_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimiser: weights that decay, and those that must not.

    Biases, the scales and shifts of norms (all that has one dimension), and what a layer lists in
    its attribute `no_decay` are spared, as is customary since arXiv 1708.03888; frozen weights are
    left out. Empty groups are, too.

    Args:
        module: A head.
        weight_decay: For the weights that decay.

    >>> head = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    >>> [(len(g["params"]), g["weight_decay"]) for g in param_groups(head, 0.1)]
    [(1, 0.1), (3, 0.0)]
    """
    spared = {
        id(p)
        for layer in module.modules()
        for name, p in layer.named_parameters(recurse=False)
        if p.ndim <= 1 or name in getattr(layer, "no_decay", ())
    }
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in spared], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in spared], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def count(module: nn.Module) -> tuple[int, int]:
    """How many weights of a module are trained, and how many are fixed.

    Fixed weights may be buffers; running statistics and flags (buffers without dimensions) do not
    count.

    >>> count(nn.BatchNorm1d(8)), count(nn.Linear(8, 2).requires_grad_(False))
    ((16, 0), (0, 18))
    """
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    fixed: list[Tensor] = [p for p in module.parameters() if not p.requires_grad]
    fixed += [
        b
        for n, b in module.named_buffers()
        if b.ndim and not n.split(".")[-1].startswith("running_")
    ]
    return trained, sum(t.numel() for t in fixed)


def _inside(path: str, matched: Sequence[str]) -> bool:
    return any(not m or f"{path}.".startswith(f"{m}.") for m in matched)


def _freeze(module: nn.Module, layers: set[int], weights: set[int]) -> None:
    """Fixes layers and weights, given by their ids, wherever the module holds them."""
    norms: dict[int, FrozenBatchNorm] = {}
    values: dict[int, Tensor] = {}
    for layer in list(module.modules()):
        if id(layer) in layers and hasattr(layer, "fixed"):  # our own layers with statistics
            layer.fixed = True  # type: ignore[assignment]
        for name, child in layer._modules.items():
            if id(child) in layers and isinstance(child, _BatchNorm):
                layer._modules[name] = norms.setdefault(id(child), FrozenBatchNorm(child))
        for name, weight in list(layer._parameters.items()):
            if weight is not None and id(weight) in weights:
                del layer._parameters[name]
                layer.register_buffer(name, values.setdefault(id(weight), weight.detach()))
