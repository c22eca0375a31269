"""The layers of a head in order, whoever wrote it: ours, lightly's, a bare Sequential."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

CONTAINERS = (nn.Sequential, nn.ModuleList)
WEIGHTS = ("weight", "weight_v")  # the second is that of a weight-normed layer


def layers(head: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers of a head with their paths, in order; containers are opened, blocks are not.

    >>> head = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 2)))
    >>> [name for name, _ in layers(head)]
    ['0', '1.0', '1.1']
    """
    for name, layer in head.named_children():
        if type(layer) in CONTAINERS:
            yield from layers(layer, f"{path}{name}.")
        else:
            yield path + name, layer


def hidden_paths(head: nn.Module) -> list[str]:
    """Paths of what a head computes on its way: the last layer before each next linear or block.

    The first is the hidden layer after its norm and activation; the last one feeds the output
    layer. They are the same whether or not there are norms between.

    >>> hidden_paths(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)))
    ['2']
    """
    found: list[str] = []
    previous = None
    for path, layer in layers(head):
        if previous is not None and _starts(layer):
            found.append(previous)
        previous = path
    return found


def _starts(layer: nn.Module) -> bool:
    """Whether a layer mixes features, so that what came before it is a representation."""
    if hasattr(layer, "running_mean"):  # a norm, whatever the shape of its weight
        return False
    weights = (getattr(layer, name, None) for name in WEIGHTS)
    return any(w is not None and w.ndim > 1 for w in weights) or any(layer.children())
