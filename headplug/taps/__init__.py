"""Reading features at named points of a model.

Nothing is left on the model after a `with` block, whatever happens. Every call of a module keeps
its own tensor, because SSL steps call a head once per view. A point that matches nothing, or that
was never reached, is an error, never a stale tensor. `headplug.taps.points` says how points are
written, `headplug.taps.recorder` how calls are seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from headplug.taps.block import Block
from headplug.taps.listing import list_taps
from headplug.taps.modes import eagerly
from headplug.taps.options import Pool, Tap, requested
from headplug.taps.points import Layout
from headplug.taps.reading import Reader
from headplug.taps.record import Taps

__all__ = ["Tap", "Taps", "features", "list_taps", "tap"]


@contextmanager
def tap(
    model: nn.Module,
    *points: Any,
    calls: str | int = "all",
    pool: Pool | None = None,
    detach: bool = False,
    clone: bool = False,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    gradients: bool = False,
) -> Iterator[Taps]:
    """Reads what modules receive or return while the block runs.

    It sees the calls of its own thread, and not the second forward of activation checkpointing. A
    copy made of the model inside the block is not tapped. A module's input is what comes after
    other hooks on it, its output what its forward returns.

    Args:
        model: Any module. What torch.compile made of it, of its parts or of functions that call it
            is compiled once more for the block, without graph breaks, and is as before after it.
        points: Names, paths, patterns or indices, see `headplug.taps.points`; a `Tap` gives one
            options of its own, a mapping gives names of your own.
        calls: What to keep where a module is called several times: "all" (a list), "last", "cat"
            (one tensor along the batch), or the number of one call, from 0.
        pool: "flat", "gap", "cls", "cls+gap", "tokens", see `headplug.taps.pooling`, or a callable.
        detach: Cut the tensors from the graph; left as they are, losses may act on them.
        clone: Copy what is read, where later modules change it in place (`ReLU(inplace=True)`,
            `+=`).
        dtype: What to convert floating-point tensors to.
        device: Where to move tensors; from a GPU to "cpu" through pinned memory, while the GPU
            goes on computing.
        gradients: Keep the gradients that arrive at the points, for `taps.gradient(name)`; compiled
            code runs eagerly in the block then.

    Yields:
        A mapping from point to what was read; `taps.read()` gives all in the shape of `points`. It
        may be read inside the block and after it, and holds its tensors until `clear()`.

    Raises:
        UnknownNameError: A point matches nothing; the message shows the closest names.
        SlotError: `pre_projection` or `projection` of a model without one projection head.
        OptionError: `calls`, `pool` or `dtype` is none.
        TapError: There is no point, the ending of one means nothing, or the model is wrapped in
            DataParallel, exported or scripted; or, on reading, a point was never reached, or what
            it gave was changed in place since.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> with tap(model, "1", "2") as taps:
    ...     _ = model(torch.rand(3, 4)), model(torch.rand(5, 4))
    >>> [t.shape[0] for t in taps["1"]], taps["2"][1].shape
    ([3, 5], torch.Size([5, 2]))
    >>> with tap(model, {"h": "2:input", "z": Tap("2", gradients=True)}, calls="last") as taps:
    ...     model(torch.rand(3, 4)).sum().backward()
    >>> taps["h"].shape, taps.gradient("z").sum()
    (torch.Size([3, 8]), tensor(6.))
    """
    layout = Layout(model)
    default = Tap("", calls, pool, detach, clone, dtype, device, gradients)
    request = points[0] if len(points) == 1 else list(points)
    taps = Taps(request, layout.resolve(requested(request, default)))
    # in compiled code the gradient inside is nowhere to be had
    stance = eagerly() if any(p.how.gradients for p in taps.points) else nullcontext()
    with Block(taps.points, taps.keep).open(), stance:
        yield taps


def features(
    model: nn.Module,
    x: Any,
    at: Any,
    *,
    grad: bool = False,
    pool: Pool | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Any:
    """The features of one batch, computing no more of the model than they need.

    Where the model's own `forward` does not call the head (as in lightly's Lightning models), the
    head is called on the flattened output.

    Args:
        model: Any module, in the mode (train or eval) that it is in; it runs without its wrappers
            (DistributedDataParallel, torch.compile).
        x: One batch, as the model takes it.
        at: A point or a `Tap`, a list of them, or a mapping from your names to them.
        grad: Keep the graph; without it no autograd state is made.
        pool: "flat", "gap", "cls", "cls+gap", "tokens", see `headplug.taps.pooling`, or a callable.
        dtype: What to convert floating-point features to.
        device: Where to move them.

    Returns:
        A tensor, a list or a dict, as `at` is; for a pattern a dict of what it matched. A module
        that is called several times gives its first output, unless a `Tap` says otherwise.

    Raises:
        UnknownNameError: A point matches nothing.
        SlotError: `pre_projection` or `projection` of a model without one projection head.
        OptionError: `pool` or `dtype` is none.
        TapError: A point was not reached, or as `tap` does.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> features(model, torch.rand(3, 4), at="1").shape
    torch.Size([3, 8])
    """
    layout = Layout(model)
    default = Tap("", 0, pool, False, False, dtype, device, False)
    with Reader(layout, at, layout.resolve(requested(at, default)), grad=grad) as read:
        return read(x).read()
