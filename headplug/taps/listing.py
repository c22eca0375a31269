"""The points that a model has, with what each costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headplug.taps.block import Block
from headplug.taps.modes import eagerly, untouched
from headplug.taps.points import Layout, Point, is_called
from headplug.taps.reading import finish, noting


def list_taps(model: nn.Module, example_input: Any) -> list[dict[str, Any]]:
    """The points of a model, found by one forward pass that leaves no trace in it.

    Args:
        model: Any module. It runs in eval mode; modes, buffers and torch's random state are as
            before after it.
        example_input: One batch.

    Returns:
        A row per module that was called, in the order of their first calls: `name` (the shared name
        where there is one), `path`, `type`, `shape` (of the last output; None if not a tensor),
        `calls`, and `cost`: the share of the forward pass's floating-point operations, in 0 to 1,
        that has been done when its last call returns. Matrix products, convolutions and attention
        count, as in torch's `FlopCounterMode`.

    Raises:
        TapError: The model is wrapped in DataParallel, exported or scripted.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> rows = list_taps(model, torch.rand(1, 4))
    >>> [(row["path"], row["shape"], row["cost"]) for row in rows]
    [('0', (1, 8), 0.5), ('1', (1, 8), 0.5), ('2', (1, 4), 1.0)]
    """
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    layout = Layout(model)
    names = {p.path: p.name for p in layout.shared.values() if not p.takes_input}
    paths: dict[nn.Module, str] = {}  # the first of each
    for path, module in layout.modules.items():
        if is_called(module):
            paths.setdefault(module, path)
    points = [
        Point(names.get(path, path), path, module, takes_input)
        for module, path in paths.items()
        for takes_input in (True, False)
    ]
    rows: dict[str, dict[str, Any]] = {}
    counter = FlopCounterMode(display=False)

    def keep(number: int, value: Any) -> None:
        name, path, module, takes_input, *_ = points[number]
        new = {"name": name, "path": path, "type": type(module).__name__, "shape": None, "calls": 0}
        row = rows.setdefault(path, new)
        if takes_input:
            row["calls"] += 1
        else:
            row["shape"] = tuple(value.shape) if isinstance(value, Tensor) else None
            row["cost"] = counter.get_total_flops()

    with (
        untouched(layout.root),
        Block(points, keep).open(),
        noting(layout.backbones.values()) as given,
        eagerly(),
        torch.no_grad(),
        counter,
    ):
        out = layout.root(example_input) if is_called(layout.root) else None
        finish(layout, example_input, out, lambda path: path not in rows, given)
    total = counter.get_total_flops()
    return [row | {"cost": row["cost"] / total if total else 0.0} for row in rows.values()]
