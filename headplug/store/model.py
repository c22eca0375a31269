"""A model that gives rows of features for batches of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headplug.errors import DataError, OptionError, RunError
from headplug.store.fingerprint import Fingerprint, of_model, of_request
from headplug.taps.modes import evaluating
from headplug.taps.options import Pool, Tap, requested
from headplug.taps.points import Layout, Point, flat
from headplug.taps.reading import Reader


class TappedModel:
    """A model, and what is read of it.

    Args:
        model, at, pool, dtype, transform: As `extract_features` takes them.

    Raises:
        HeadplugError: As `extract_features` says.
    """

    def __init__(
        self,
        model: nn.Module,
        at: Any,
        pool: Pool,
        dtype: torch.dtype,
        transform: Callable[[Tensor], Tensor] | None,
    ) -> None:
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise OptionError(f"dtype is one of torch's floats, e.g. torch.float16, not {dtype!r}.")
        self.layout = Layout(model)
        if self.layout.sharded and dist.get_world_size() > 1:
            raise RunError(
                "FSDP spreads the model's weights over the processes, which then must all run the "
                "same number of batches. Load the checkpoint into the plain model on each process."
            )
        default = Tap("", 0, pool, False, False, None, None, False)
        self.asked = self.layout.resolve(requested(at, default))
        self.points = flat(self.asked)
        self.dtype, self.transform = dtype, transform
        tensors = (*model.parameters(), *model.buffers())
        self.device = next((t.device for t in tensors), torch.device("cpu"))

    def fingerprint(self) -> Fingerprint:
        """Of the model and of what is read of it."""
        request = of_request(self.points, self.dtype, self.transform, self.device.type)
        return {**of_model(self.layout.root), **request}

    @contextmanager
    def open(self) -> Iterator[Callable[[Tensor], dict[str, Tensor]]]:
        """Gives a function that makes rows of a batch of images, by tap in depth order."""
        asked = {
            name: _checking(points)
            if isinstance(points, Point)
            else {n: _checking(p) for n, p in points.items()}
            for name, points in self.asked.items()
        }
        with (
            evaluating(self.layout.model),
            Reader(self.layout, None, asked, compiled=True) as reader,
        ):
            yield partial(self._rows, reader)

    def arrived(self) -> torch.cuda.Event | None:
        """When the rows given so far are on the CPU; None if they are."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _rows(self, reader: Reader, images: Tensor) -> dict[str, Tensor]:
        x = images.to(self.device, non_blocking=True)
        found = reader(x if self.transform is None else self.transform(x)).by_depth()
        return {point: self._kept(point, value, len(images)) for point, value in found.items()}

    def _kept(self, point: str, value: Any, count: int) -> Tensor:
        """Rows as the store has them, perhaps still on their way from the GPU."""
        if not isinstance(value, Tensor):
            raise DataError(
                f"{point!r} gives a {type(value).__name__}, not a tensor; name a part of it, "
                f"e.g. '{point}:output[0]', or a module inside it."
            )
        if value.ndim < 2 or len(value) != count:
            raise DataError(
                f"{point!r} gives shape {tuple(value.shape)} for {count} images; only what has a "
                "row per image can be kept. Tap a module outside it instead."
            )
        rows = value.to(self.dtype).to("cpu", non_blocking=value.is_cuda).contiguous()
        # a part of a larger tensor would keep all of it in memory
        return rows if rows.untyped_storage().nbytes() <= rows.nbytes else rows.clone()


def _checking(point: Point) -> Point:
    """The point, its own pooling function checked where it is called."""
    pool = point.how.pool
    if not callable(pool):
        return point

    def checked(x: Tensor) -> Tensor:
        rows = pool(x)
        if not isinstance(rows, Tensor) or rows.ndim < 2 or len(rows) != len(x):
            shape = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise DataError(
                f"pool made {shape} of {tuple(x.shape)} at {point.name!r}; it must give "
                f"({len(x)}, D)."
            )
        return rows

    return point._replace(how=replace(point.how, pool=checked))
