"""Reading features at named points of a model.

Hooks live for the span of a `with` block and are gone after it, whatever happens. Every call of a
module keeps its own tensor, because SSL steps call a head once per view. A point that matches
nothing, or that was never reached, is an error, never a stale tensor.

Points are written as `backbone`, `pre_projection` (what the head receives) and `projection` (what
it returns) on every host, as a module path, as a glob of paths, and with the ending `:input` for
what a module receives.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headplug.errors import SlotError, TapError, unknown
from headplug.hosts import find_slots

HEAD_POINTS = ("pre_projection", "projection")
ROOT_NAMES = ("backbone", "encoder", "student_backbone", "backbone_model")


class Point(NamedTuple):
    """One resolved point.

    Attributes:
        name: What results are called: as asked, or the path that a glob matched.
        path: The module to hook.
        takes_input: Whether its input is read instead of its output.
    """

    name: str
    path: str
    takes_input: bool


class Taps(Mapping[str, list[Any]]):
    """What was read, by point: a list with one entry per call of the module.

    Indexing with a glob gives a mapping of the points it matched.
    """

    def __init__(self, points: Mapping[str, Sequence[Point]]) -> None:
        self._asked = points
        self._values: dict[str, list[Any]] = {p.name: [] for ps in points.values() for p in ps}
        self._versions: dict[str, list[int]] = {name: [] for name in self._values}

    @property
    def overwritten(self) -> list[str]:
        """Points whose tensors were changed in place after they were read."""
        return [
            name
            for name, values in self._values.items()
            if any(
                isinstance(t, Tensor) and t._version != version
                for t, version in zip(values, self._versions[name], strict=True)
            )
        ]

    def _keep(self, name: str, value: Any, detach: bool, clone: bool) -> None:
        if isinstance(value, Tensor):
            value = value.detach() if detach else value
            value = value.clone() if clone else value
        self._values[name].append(value)
        self._versions[name].append(value._version if isinstance(value, Tensor) else 0)

    def __getitem__(self, name: str) -> Any:
        if name in self._values:
            if name in self.overwritten:
                raise TapError(
                    f"what {name!r} gave was changed in place by a later module, so it is no "
                    "longer what the module returned. Pass clone=True to tap()."
                )
            if not self._values[name]:
                raise TapError(
                    f"{name!r} was never reached: its module was not called inside the block, or "
                    "its .forward() was called directly, which skips hooks. Call the model inside "
                    "the `with`, and modules as module(x)."
                )
            return self._values[name]
        if name in self._asked:
            return {p.name: self[p.name] for p in self._asked[name]}
        raise unknown("tap", name, self._values, "Only points that were asked for can be read.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def clear(self) -> None:
        """Forgets what was read, e.g. after a training step, and goes on reading."""
        for name, values in self._values.items():
            values.clear()
            self._versions[name].clear()


class _Reached(Exception):  # noqa: N818 - not an error
    """Ends a forward pass that has gone far enough."""


@contextmanager
def tap(
    model: nn.Module, *points: str, detach: bool = False, clone: bool = False
) -> Iterator[Taps]:
    """Reads what modules receive or return while the block runs.

    Args:
        model: Any module; one compiled with `torch.compile` runs eagerly inside the block, because
            hooks that come after compilation would be skipped silently.
        points: Names, paths or globs (see the module's description).
        detach: Cut the tensors from the graph; left as they are, losses may act on them.
        clone: Copy what is read, where later modules change it in place (`ReLU(inplace=True)`,
            `+=`).

    Yields:
        A mapping from point to the list of what was read, one entry per call.

    Raises:
        UnknownNameError: A point matches nothing; the message shows the closest names.
        TapError: The model is wrapped in DataParallel; or, on reading, a point was never reached,
            or what it gave was changed in place since.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> with tap(model, "1", "2") as taps:
    ...     _ = model(torch.rand(3, 4)), model(torch.rand(5, 4))
    >>> [t.shape[0] for t in taps["1"]], taps["2"][1].shape
    ([3, 5], torch.Size([5, 2]))
    """
    resolved = resolve_points(model, points)
    with _hooks(model, Taps(resolved), resolved, detach=detach, clone=clone) as taps:
        yield taps


def features(model: nn.Module, x: Any, at: Any, *, grad: bool = False) -> Any:
    """The features of one batch, computing no more of the model than they need.

    Where the model's own `forward` does not call the head (as in lightly's Lightning models), the
    head is called on the flattened output.

    Args:
        model: Any module, in the mode (train or eval) that it is in.
        x: One batch, as the model takes it.
        at: A point, a list of points, or a mapping from your names to points.
        grad: Keep the graph; without it no autograd state is made.

    Returns:
        A tensor, a list or a dict, as `at` is; for a glob a dict of what it matched. A module that
        is called several times gives its first output.

    Raises:
        UnknownNameError: A point matches nothing.
        TapError: A point was not reached.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> features(model, torch.rand(3, 4), at="1").shape
    torch.Size([3, 8])
    """
    if isinstance(at, str):
        asked = [at]
    elif isinstance(at, Mapping):
        asked = list(at.values())
    else:
        asked = list(at)
    resolved = resolve_points(model, asked)
    taps = _run(model, x, resolved, grad)
    if taps.overwritten:  # rare: then, and only then, the price of copies
        taps = _run(model, x, resolved, grad, clone=True)

    def read(point: str) -> Any:
        value = taps[point]
        return {k: v[0] for k, v in value.items()} if isinstance(value, dict) else value[0]

    if isinstance(at, str):
        return read(at)
    if isinstance(at, Mapping):
        return {name: read(point) for name, point in at.items()}
    return [read(point) for point in asked]


def _run(
    model: nn.Module,
    x: Any,
    resolved: Mapping[str, Sequence[Point]],
    grad: bool,
    clone: bool = False,
) -> Taps:
    with (
        torch.set_grad_enabled(grad),
        _hooks(model, Taps(resolved), resolved, stop=True, clone=clone) as taps,
        suppress(_Reached),
    ):
        _call_head(model, model(x), taps, resolved)
    return taps


def list_taps(model: nn.Module, example_input: Any) -> list[dict[str, Any]]:
    """The points of a model, found by one forward pass that leaves no trace in it.

    Args:
        model: Any module. It runs in eval mode; modes, buffers and random state are as before after
            it.
        example_input: One batch.

    Returns:
        A row per module that was called, in the order of their first calls: `name` (the shared name
        where there is one), `path`, `type`, `shape` (of the last output; None if not a tensor),
        `calls`.

    >>> rows = list_taps(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), torch.rand(1, 4))
    >>> [(row["path"], row["shape"]) for row in rows]
    [('0', (1, 8)), ('1', (1, 8))]
    """
    shared = {p.path: p.name for p in _shared_points(model).values() if not p.takes_input}
    rows: dict[str, dict[str, Any]] = {}

    def record(path: str, module: nn.Module) -> Any:
        def before(*_: Any) -> None:
            row = rows.setdefault(
                path,
                {
                    "name": shared.get(path, path),
                    "path": path,
                    "type": type(module).__name__,
                    "shape": None,
                    "calls": 0,
                },
            )
            row["calls"] += 1

        def after(_m: nn.Module, _a: Any, out: Any) -> None:
            rows[path]["shape"] = tuple(out.shape) if isinstance(out, Tensor) else None

        return module.register_forward_pre_hook(before), module.register_forward_hook(after)

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(_eager(model))
        for path, module in model.named_modules():
            if path:
                for handle in record(path, module):
                    stack.callback(handle.remove)
        model(example_input)
    return list(rows.values())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the block; every module then gets its own mode back."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def resolve_points(model: nn.Module, asked: Sequence[str]) -> dict[str, list[Point]]:
    """The modules that points stand for.

    Raises:
        UnknownNameError: A point matches nothing; the message shows the closest names.
        TapError: The model is wrapped in DataParallel.
    """
    if any(isinstance(m, nn.DataParallel) for m in model.modules()):
        raise TapError(
            "DataParallel runs copies of the model whose hooks see a part of the batch each. Tap "
            "model.module, or use DistributedDataParallel."
        )
    paths = [p for p, _ in model.named_modules(remove_duplicate=False) if p]
    shared = _shared_points(model)
    resolved: dict[str, list[Point]] = {}
    for point in asked:
        if not isinstance(point, str):
            raise TapError(f"a point is a string, not {point!r}.")
        path, _, ending = point.partition(":")
        if ending not in ("", "input"):
            raise TapError(f"{point!r}: after ':' only 'input' can follow.")
        if not ending and point in shared:
            resolved[point] = [shared[point]]
            continue
        if path in shared and not shared[path].takes_input:
            path = shared[path].path
        matched = [path] if path in paths else fnmatch.filter(paths, path)
        if not matched:
            if point in HEAD_POINTS:
                raise SlotError(
                    f"{point!r} needs one projection head, and this {type(model).__name__} has "
                    "none or several. Name a module's path instead: 'path:input' or 'path'."
                )
            raise unknown("tap", point, [*shared, *paths], "list_taps(model, x) shows all.")
        exact = matched == [path] and "*" not in point
        suffix = ":input" if ending else ""
        resolved[point] = [Point(point if exact else m + suffix, m, bool(ending)) for m in matched]
    return resolved


def _shared_points(model: nn.Module) -> dict[str, Point]:
    found: dict[str, Point] = {}
    names = dict(model.named_modules(remove_duplicate=False))
    for name in ROOT_NAMES:
        path = next((p for p in (name, f"module.{name}", f"_orig_mod.{name}") if p in names), None)
        if path:
            found["backbone"] = Point("backbone", path, False)
            break
    heads = [s for s in find_slots(model) if s.role == "projection"]
    if len(heads) == 1:
        found["pre_projection"] = Point("pre_projection", heads[0].path, True)
        found["projection"] = Point("projection", heads[0].path, False)
    return found


@contextmanager
def _hooks(
    model: nn.Module,
    taps: Taps,
    resolved: Mapping[str, Sequence[Point]],
    *,
    detach: bool = False,
    clone: bool = False,
    stop: bool = False,
) -> Iterator[Taps]:
    points = {p for ps in resolved.values() for p in ps}
    waiting = {p.name for p in points}

    def keep(point: Point, value: Any) -> None:
        taps._keep(point.name, value, detach, clone)
        waiting.discard(point.name)
        if stop and not waiting:
            raise _Reached

    def hook_input(point: Point) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keep(point, args[0] if args else next(iter(kwargs.values())))

        return hook

    def hook_output(point: Point) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            keep(point, out)

        return hook

    with ExitStack() as stack:
        stack.enter_context(_eager(model))
        for point in points:
            module = model.get_submodule(point.path)
            if point.takes_input:
                handle = module.register_forward_pre_hook(hook_input(point), with_kwargs=True)
            else:
                handle = module.register_forward_hook(hook_output(point))
            stack.callback(handle.remove)
        yield taps


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Runs compiled modules eagerly, since their graphs know nothing of hooks that come later."""
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _call_head(
    model: nn.Module, out: Any, taps: Taps, resolved: Mapping[str, Sequence[Point]]
) -> None:
    """Runs the head on the model's output where the model's own forward leaves that to its loop."""
    slots = [s for s in find_slots(model) if s.role == "projection"]
    if len(slots) != 1 or not isinstance(out, Tensor):
        return
    slot = slots[0]
    unread = [p for ps in resolved.values() for p in ps if not taps._values[p.name]]
    inside = any(p.path == slot.path or p.path.startswith(slot.path + ".") for p in unread)
    if inside and out.flatten(1).shape[1] == slot.input_dim:
        model.get_submodule(slot.path)(out.flatten(1))
