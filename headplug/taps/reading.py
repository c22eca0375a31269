"""Running a model batch by batch, no further than its points need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from headplug.errors import TapError
from headplug.taps.block import Block, Reached, ReachedCompiled
from headplug.taps.modes import eagerly
from headplug.taps.points import Asked, Layout, is_called
from headplug.taps.record import Taps
from headplug.taps.recorder import drain_last, recorder_of


class Reader:
    """Reads the points of a request from one batch after another; a context manager.

    The forward pass ends at the deepest point, unless one wants every call of its module, or FSDP
    has to gather the weights of all layers in step.

    Args:
        layout: Of the model.
        request: What to read, in whatever shape the results shall have.
        asked: The points of the request by name.
        grad: Keep the graph.
        compiled: What torch.compile was used on as a whole is compiled once more, as far as the
            points need it. Otherwise, and where parts of the model are compiled, all runs eagerly.
    """

    def __init__(
        self,
        layout: Layout,
        request: Any,
        asked: Asked,
        *,
        grad: bool = False,
        compiled: bool = False,
    ) -> None:
        self._layout = layout
        self._taps = Taps(request, asked)
        self._block = Block(self._taps.points, self._keep)
        self._grad = grad
        self._compiler = _compiler_of(layout) if compiled else None

    def __enter__(self) -> Reader:
        layout, block = self._layout, self._block
        run = _stopping(block, layout.model if layout.sharded else layout.root)
        with ExitStack() as stack:
            stack.enter_context(block.open())
            if not layout.sharded:
                block.needs = _counted([p.how.calls for p in block.points])
            if self._compiler:
                run = self._compiler(run)
                stack.enter_context(_stops(block))
            elif layout.compiled:
                stack.enter_context(eagerly())
            self._run = run
            backbones = () if self._compiler else layout.backbones.values()
            self._given = stack.enter_context(noting(backbones))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)
        del self._block, self._run

    def __call__(self, x: Any) -> Taps:
        """What the points give for one batch, until the next one.

        Raises:
            TapError: The model has no forward.
        """
        self._taps.clear()
        self._given.clear()
        self._block.start()
        with torch.set_grad_enabled(self._grad):
            out = None
            with suppress(Reached):
                out = self._run(x) if is_called(self._layout.root) else None
            drain_last()
            if not all(map(self._taps.seen, self._taps.points)):
                with suppress(Reached):
                    finish(self._layout, x, out, self._missing, self._given)
        return self._taps

    def _keep(self, number: int, value: Any) -> None:
        # what runs from here on may change it in place
        self._taps.keep(number, value, copy=not self._block.is_last(number))

    def _missing(self, path: str) -> bool:
        left = (p for p in self._taps.points if not self._taps.seen(p))
        return any(f"{p.path}.".startswith(f"{path}.") for p in left)


def finish(
    layout: Layout,
    x: Any,
    out: Any,
    missing: Callable[[str], bool],
    given: Mapping[nn.Module, Any],
) -> None:
    """Runs what the model's own forward leaves to a training step: the backbone, the head.

    Args:
        layout: Of the model.
        x: The batch.
        out: What the model returned for it.
        missing: Whether something at or below a path is still wanted.
        given: What each backbone that ran returned; an own forward may run the EMA copy, or none.

    Raises:
        TapError: The model has neither a forward nor a backbone that is known.
    """
    own, head, has_forward = layout.own_backbone, layout.head, is_called(layout.root)
    if own is None and not has_forward:
        raise TapError(
            f"{type(layout.root).__name__} has no forward, and no backbone is found in it. Call "
            "what you train with inside a block of tap()."
        )
    wanted = head is not None and missing(head.path)
    if own is not None and (wanted or not has_forward):
        out = given[own] if own in given else own(x)
    if wanted and head and isinstance(out, Tensor) and out.ndim > 1:
        h = out.flatten(1)
        if h.shape[1] == head.input_dim:
            layout.shared["projection"].module(h)


@contextmanager
def noting(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Any]]:
    """Notes what some modules return."""
    given: dict[nn.Module, Any] = {}
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_hook(lambda m, _, out: given.update({m: out}))
            stack.callback(handle.remove)
        yield given


def _counted(calls: Sequence[Any]) -> list[int]:
    """How many calls to wait for at each point; empty if one wants them all."""
    return [call + 1 for call in calls] if all(isinstance(c, int) for c in calls) else []


def _stopping(block: Block, model: nn.Module) -> Callable[[Any], Any]:
    """Runs a model until all that a block needs has been read."""

    def run(x: Any) -> Any:
        block.start()
        try:
            return model(x)
        except ReachedCompiled:
            return None

    return run


@contextmanager
def _stops(block: Block) -> Iterator[None]:
    """Lets compiled code count the calls of a block's modules."""
    numbers: dict[nn.Module, tuple[list[int], list[int]]] = {}
    for number, point in enumerate(block.points):
        numbers.setdefault(point.module, ([], []))[int(point.takes_input)].append(number)
    for module, sides in numbers.items():
        recorder_of(module).stop = partial(_count, block, sides)
    try:
        yield
    finally:
        for module in numbers:
            recorder_of(module).stop = None


def _count(block: Block, numbers: Sequence[Sequence[int]], takes_input: bool) -> None:
    for number in numbers[1 if takes_input else 0]:
        block.count(number)


def _compiler_of(layout: Layout) -> Callable[[Any], Any] | None:
    """The compiler that was used on a model as a whole, with its options."""
    wrapper: Any = layout.model
    whole = hasattr(wrapper, "dynamo_ctx") and layout.compiled == [wrapper]
    if not whole or len(layout.backbones) > 1:  # then hooks tell which backbone ran
        return None

    def compiler(run: Any) -> Any:
        # compiled code belongs to a code object: one of its own for every reader
        code = run.__code__.replace()
        return wrapper.dynamo_ctx(FunctionType(code, run.__globals__, closure=run.__closure__))

    return compiler
