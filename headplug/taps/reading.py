"""Running a model batch by batch, no further than its points need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from headplug.taps.hooks import Block, Reached, hooks
from headplug.taps.points import Layout, Point, flat
from headplug.taps.record import Taps


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
        asked: Mapping[str, Sequence[Point]],
        *,
        grad: bool = False,
        compiled: bool = False,
    ) -> None:
        self._layout = layout
        self._taps = Taps(request, asked)
        self._points = flat(asked)
        self._grad = grad
        self._compiler = _compiler_of(layout) if compiled else None

    def __enter__(self) -> Reader:
        layout, compiler = self._layout, self._compiler
        with ExitStack() as stack:
            traced = compiler is not None
            self._block = stack.enter_context(hooks(layout, self._points, self._keep, traced))
            backbones = () if traced else layout.backbones.values()
            self._ran = stack.enter_context(noting(backbones))
            if not layout.sharded:
                self._block.needs = _counted([p.how.calls for p in self._points])
            self._run = _stopping(self._block, layout.model if layout.sharded else layout.root)
            if compiler:
                self._run = compiler(self._run)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def __call__(self, x: Any) -> Taps:
        """What the points give for one batch, until the next one."""
        self._taps.clear()
        self._ran.clear()
        with torch.set_grad_enabled(self._grad):
            out = self._run(x)
            self._block.drain()
            if not all(map(self._taps.seen, self._points)):
                with suppress(Reached):
                    finish(self._layout, x, out, self._missing, self._ran)
        return self._taps

    def _keep(self, point: Point, value: Any) -> None:
        # what runs from here on may change it in place
        self._taps.keep(point, value, copy=not self._block.is_last)

    def _missing(self, path: str) -> bool:
        return any(
            f"{p.path}.".startswith(f"{path}.") for p in self._points if not self._taps.seen(p)
        )


def finish(
    layout: Layout, x: Any, out: Any, missing: Callable[[str], bool], ran: set[nn.Module]
) -> None:
    """Runs the head after the model where the model's own forward leaves it to a training step.

    Args:
        layout: Of the model.
        x: The batch.
        out: What the model returned for it.
        missing: Whether something at or below a path is still wanted.
        ran: The backbones that ran; an own forward may run the EMA copy, or none.
    """
    head = layout.head
    if not head or not missing(head.path):
        return
    if (own := layout.own_backbone) and own not in ran:
        out = own(x)
    if isinstance(out, Tensor) and out.ndim > 1:
        h = out.flatten(1)
        if h.shape[1] == head.input_dim:
            layout.shared["projection"].module(h)


@contextmanager
def noting(modules: Iterable[nn.Module]) -> Iterator[set[nn.Module]]:
    """Notes which of some modules run."""
    ran: set[nn.Module] = set()
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_hook(lambda module, *_: ran.add(module))
            stack.callback(handle.remove)
        yield ran


def _counted(calls: Sequence[Any]) -> dict[int, int]:
    """How many calls to wait for at each point; empty if one wants them all."""
    if not all(isinstance(call, int) for call in calls):
        return {}
    return {number: call + 1 for number, call in enumerate(calls)}


def _stopping(block: Block, model: nn.Module) -> Callable[[Any], Any]:
    """Runs a model until all that a block needs has been read."""

    def run(x: Any) -> Any:
        block.left = dict(block.needs)
        try:
            return model(x)
        except Reached:
            return None

    return run


def _compiler_of(layout: Layout) -> Callable[[Any], Any] | None:
    """The compiler that was used on a model as a whole, with its options."""
    wrapper: Any = layout.model
    whole = hasattr(wrapper, "dynamo_ctx") and [c.holder for c in layout.compiled] == [wrapper]
    if not whole or len(layout.backbones) > 1:  # then hooks tell which backbone ran
        return None

    def compiler(run: Any) -> Any:
        # compiled code belongs to a code object: one of its own for every reader
        own = FunctionType(run.__code__.replace(), {}, None, None, run.__closure__)
        own.__globals__.update(run.__globals__)
        return wrapper.dynamo_ctx(own)

    return compiler
