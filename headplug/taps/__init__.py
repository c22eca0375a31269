"""Reading features at named points of a model.

Hooks live for the span of a `with` block and are gone after it, whatever happens. Every call of a
module keeps its own tensor, because SSL steps call a head once per view. A point that matches
nothing, or that was never reached, is an error, never a stale tensor. `headplug.taps.points` says
how points are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from headplug.errors import TapError, unknown
from headplug.taps.hooks import hooks
from headplug.taps.modes import untouched
from headplug.taps.points import Layout, Point, flat


class Taps(Mapping[str, list[Any]]):
    """What was read, by point: a list with one entry per call of the module.

    Indexing with a glob that was asked for gives a mapping of the points it matched.
    """

    def __init__(
        self, asked: Mapping[str, Sequence[Point]], detach: bool = False, clone: bool = False
    ) -> None:
        self._asked = asked
        self._detach = detach
        self._clone = clone
        self._values: dict[str, list[Any]] = {p.name: [] for p in flat(asked)}
        self._versions: dict[str, list[list[int]]] = {name: [] for name in self._values}

    def _keep(self, point: Point, value: Any) -> None:
        def taken(t: Tensor) -> Tensor:
            t = t.detach() if self._detach else t
            # a tensor of inference mode does not tell when it is changed
            return t.clone() if self._clone or t.is_inference() else t

        value = tree_map_only(Tensor, taken, value)
        self._values[point.name].append(value)
        self._versions[point.name].append(_versions(value))

    def __getitem__(self, name: str) -> Any:
        if name not in self._values:
            if name in self._asked:
                return {p.name: self[p.name] for p in self._asked[name]}
            raise unknown(
                "tap", str(name), self._values, "Only points that were asked for can be read."
            )
        values = self._values[name]
        if not values:
            raise _never_reached(name)
        if [_versions(value) for value in values] != self._versions[name]:
            raise TapError(
                f"what was read at {name!r} has since been changed in place, as by "
                "ReLU(inplace=True) or '+=', so it is no longer what passed there. Pass "
                "clone=True to tap()."
            )
        return values

    def __contains__(self, name: object) -> bool:
        return name in self._values or name in self._asked

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def clear(self) -> None:
        """Forgets what was read, e.g. after a training step, and goes on reading."""
        for name in self._values:
            self._values[name] = []
            self._versions[name] = []


@contextmanager
def tap(
    model: nn.Module, *points: str, detach: bool = False, clone: bool = False
) -> Iterator[Taps]:
    """Reads what modules receive (their first argument) or return while the block runs.

    It sees the calls of its own thread, and not the second forward of activation checkpointing. A
    copy made of the model inside the block is not tapped.

    Args:
        model: Any module. Where torch.compile was used on it or its parts, all compiled code runs
            eagerly inside the block, because hooks that come after compilation would be skipped
            silently.
        points: Names, paths or globs, see `headplug.taps.points`.
        detach: Cut the tensors from the graph; left as they are, losses may act on them.
        clone: Copy what is read, where later modules change it in place (`ReLU(inplace=True)`,
            `+=`).

    Yields:
        A mapping from point to the list of what was read, one entry per call. It may be read inside
        the block and after it, and holds its tensors until `clear()`.

    Raises:
        UnknownNameError: A point matches nothing; the message shows the closest names.
        SlotError: `pre_projection` or `projection` of a model without one projection head.
        TapError: There is no point, or the model is wrapped in DataParallel; or, on reading, a
            point was never reached, or what it gave was changed in place since.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> with tap(model, "1", "2") as taps:
    ...     _ = model(torch.rand(3, 4)), model(torch.rand(5, 4))
    >>> [t.shape[0] for t in taps["1"]], taps["2"][1].shape
    ([3, 5], torch.Size([5, 2]))
    """
    layout = Layout(model)
    asked = layout.resolve(points)
    taps = Taps(asked, detach, clone)
    with hooks(layout, flat(asked), taps._keep):
        yield taps


def features(model: nn.Module, x: Any, at: Any, *, grad: bool = False) -> Any:
    """The features of one batch, computing no more of the model than they need.

    Where the model's own `forward` does not call the head (as in lightly's Lightning models), the
    head is called on the flattened output.

    Args:
        model: Any module, in the mode (train or eval) that it is in; it runs without its wrappers
            (DistributedDataParallel, torch.compile).
        x: One batch, as the model takes it.
        at: A point, a list of points, or a mapping from your names to points.
        grad: Keep the graph; without it no autograd state is made.

    Returns:
        A tensor, a list or a dict, as `at` is; for a glob a dict of what it matched. A module that
        is called several times gives its first output.

    Raises:
        UnknownNameError: A point matches nothing.
        SlotError: `pre_projection` or `projection` of a model without one projection head.
        TapError: A point was not reached.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> features(model, torch.rand(3, 4), at="1").shape
    torch.Size([3, 8])
    """
    layout = Layout(model)
    names = [at] if isinstance(at, str) else list(at.values() if isinstance(at, Mapping) else at)
    asked = layout.resolve(names)
    found = read(layout, flat(asked), x, grad=grad)

    def one(name: str) -> Any:
        points = asked[name]
        if [p.name for p in points] == [name]:
            return found[name]
        return {p.name: found[p.name] for p in points}

    if isinstance(at, str):
        return one(at)
    if isinstance(at, Mapping):
        return {key: one(name) for key, name in at.items()}
    return [one(name) for name in names]


def read(layout: Layout, points: Sequence[Point], x: Any, *, grad: bool = False) -> dict[str, Any]:
    """What each point's first call gives, by name, in the order in which they are reached.

    Args:
        layout: Of the model.
        points: What to read; the forward pass ends at the last of them.
        x: One batch.
        grad: Keep the graph.

    Raises:
        TapError: A point was not reached.
    """
    found: dict[str, Any] = {}

    def keep(point: Point, value: Any) -> None:
        if point.name in found:
            return
        if len(found) == len(points) - 1:
            found[point.name] = value
            raise _Reached
        # what runs from here on may change it in place
        found[point.name] = tree_map_only(Tensor, Tensor.clone, value)

    def missing(path: str) -> bool:
        return any(f"{p.path}.".startswith(f"{path}.") for p in points if p.name not in found)

    with (
        torch.set_grad_enabled(grad),
        hooks(layout, points, keep),
        suppress(_Reached),
    ):
        _forward(layout, x, missing)
    for point in points:
        if point.name not in found:
            raise _never_reached(point.name)
    return found


def list_taps(model: nn.Module, example_input: Any) -> list[dict[str, Any]]:
    """The points of a model, found by one forward pass that leaves no trace in it.

    Args:
        model: Any module. It runs in eval mode; modes, buffers and torch's random state are as
            before after it.
        example_input: One batch.

    Returns:
        A row per module that was called, in the order of their first calls: `name` (the shared name
        where there is one), `path`, `type`, `shape` (of the last output; None if not a tensor),
        `calls`.

    Raises:
        TapError: The model is wrapped in DataParallel.

    >>> rows = list_taps(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.rand(1, 4))
    >>> [(row["path"], row["shape"]) for row in rows]
    [('0', (1, 8)), ('1', (1, 8))]
    """
    layout = Layout(model)
    names = {p.path: p.name for p in layout.shared.values() if not p.takes_input}
    paths: dict[nn.Module, str] = {}  # the first of each
    for path, module in layout.modules.items():
        paths.setdefault(module, path)
    rows: dict[str, dict[str, Any]] = {}

    def keep(point: Point, value: Any) -> None:
        path, kind = point.path, type(point.module).__name__
        new = {"name": point.name, "path": path, "type": kind, "shape": None, "calls": 0}
        row = rows.setdefault(path, new)
        if point.takes_input:
            row["calls"] += 1
        else:
            row["shape"] = tuple(value.shape) if isinstance(value, Tensor) else None

    points = [
        Point(names.get(path, path), path, module, takes_input)
        for module, path in paths.items()
        for takes_input in (True, False)
    ]
    with untouched(layout.root), hooks(layout, points, keep):
        _forward(layout, example_input, lambda path: path not in rows)
    return list(rows.values())


class _Reached(Exception):  # noqa: N818 - not an error
    """Ends a forward pass that has gone far enough."""


def _forward(layout: Layout, x: Any, missing: Callable[[str], bool]) -> None:
    """Runs the model, then its head where the model's own forward leaves that to a training step.

    Args:
        layout: Of the model.
        x: One batch.
        missing: Whether something at or below a path is still wanted.
    """
    ran: set[nn.Module] = set()
    with ExitStack() as stack:
        for backbone in layout.backbones.values():
            handle = backbone.register_forward_hook(lambda module, *_: ran.add(module))
            stack.callback(handle.remove)
        out = layout.root(x)
    head = layout.head
    if head and missing(head.path) and (own := layout.own_backbone) and own not in ran:
        out = own(x)  # the model's own forward runs the EMA copy
    if head and isinstance(out, Tensor) and out.ndim > 1 and missing(head.path):
        h = out.flatten(1)
        if h.shape[1] == head.input_dim:
            layout.shared["projection"].module(h)


def _never_reached(name: str) -> TapError:
    return TapError(
        f"{name!r} was never reached. Its module was not called inside the block (in the block's "
        "own thread), or it was run in a way that skips hooks: module.forward(x), or a function "
        "compiled by torch.compile. Call modules as module(x); list_taps(model, x) shows which "
        "ones the model's own forward calls."
    )


def _versions(value: Any) -> list[int]:
    tensors = (t for t in tree_leaves(value) if isinstance(t, Tensor))
    return [0 if t.is_inference() else t._version for t in tensors]
