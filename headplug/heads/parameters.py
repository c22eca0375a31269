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

from headplug.errors import unknown


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
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            value = getattr(norm, name)
            self.register_buffer(name, None if value is None else value.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `(batch, features)` or `(batch, features, ...)` with the fixed statistics."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


def freeze(module: nn.Module, what: bool | str | Sequence[str]) -> list[str]:
    """Turns weights into buffers: no optimiser, EMA update or `requires_grad_` moves them again.

    State dicts keep their keys. Frozen batch norm keeps its statistics, too. Freeze before the
    optimiser is built.

    Args:
        module: A head.
        what: True for everything, or paths (or globs) of layers or single weights: "layers.0",
            "layers.0.bias", ["layers.*"].

    Returns:
        The paths; "*" for everything.

    Raises:
        UnknownNameError: A path matches nothing; the module is left as it was.

    >>> head = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> freeze(head, "0")
    ['0']
    >>> [name for name, _ in head.named_parameters()]
    ['2.weight', '2.bias']
    """
    if isinstance(what, bool):
        patterns = ["*"] if what else []
    else:
        patterns = [what] if isinstance(what, str) else list(what)
    paths = [p for p, _ in module.named_modules() if p]
    names = [*paths, *dict(module.named_parameters()), *dict(module.named_buffers())]
    chosen = {p: [n for n in names if fnmatchcase(n, p)] for p in patterns}
    for pattern, matched in chosen.items():
        if not matched and names and pattern != "*":
            raise unknown("layer", pattern, names, "print(head) shows them.")
    for matched in chosen.values():
        for name in matched:
            if name in paths:
                _freeze_module(module, name)
            else:
                _freeze_weight(module, name)
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


def _freeze_module(root: nn.Module, path: str) -> None:
    for inner, layer in list(root.get_submodule(path).named_modules()):
        where = ".".join(filter(None, [path, inner]))
        if isinstance(layer, _BatchNorm):
            holder, _, name = where.rpartition(".")
            root.get_submodule(holder)._modules[name] = FrozenBatchNorm(layer)
            continue
        if hasattr(layer, "fixed"):  # our own layers with statistics
            layer.fixed = True
        for name, _ in list(layer.named_parameters(recurse=False)):
            _freeze_weight(root, f"{where}.{name}")


def _freeze_weight(root: nn.Module, path: str) -> None:
    holder, _, name = path.rpartition(".")
    layer = root.get_submodule(holder)
    weight = layer._parameters.pop(name, None)
    if weight is not None:
        layer.register_buffer(name, weight.detach())
