"""A model that gives rows of features for batches of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from headplug.errors import DataError, OptionError, RunError
from headplug.store.blocks import FLOATS, nameable, named
from headplug.store.fingerprint import Fingerprint, of_model, of_request
from headplug.taps.modes import evaluating
from headplug.taps.options import Pool, Tap, requested
from headplug.taps.points import Layout, Point, flat
from headplug.taps.reading import Reader


class TappedModel:
    """A model, and what is read of it.

    Args:
        model, at, pool, dtype, transform: As `extract_features` takes them.

    Attributes:
        in_step: Whether all processes must run it together, because FSDP spreads its weights.

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
        if dtype not in FLOATS:
            raise OptionError(f"dtype is one of torch's floats {named(FLOATS)}, not {dtype!r}.")
        self.layout = Layout(model)
        self.in_step = self.layout.sharded and dist.get_world_size() > 1
        if self.in_step and "FullyShardedDataParallel" in {
            type(m).__name__ for m in model.modules()
        }:
            raise RunError(
                "FullyShardedDataParallel keeps parts of weights that cannot be compared. Use "
                "fully_shard, its successor, or load the checkpoint into the plain model."
            )
        default = Tap("", 0, pool, False, False, None, None, False)
        self.asked = self.layout.resolve(requested(at, default))
        self.points = flat(self.asked)
        self._named: dict[str, Point] = {}
        for name, one in self.asked.items():
            self._named |= {name: one} if isinstance(one, Point) else one
        nameable(self._named)
        self.dtype, self.transform = dtype, transform
        tensors = (*model.named_parameters(), *model.named_buffers())
        for name, tensor in tensors:
            if is_lazy(tensor):
                raise RunError(
                    f"{name} of the model has no shape before the first batch. Run one through the "
                    "model: model(images)."
                )
            if tensor.is_meta:
                raise RunError(
                    f"{name} of the model is on the meta device, where there are no values. Load "
                    "the weights first: model.load_state_dict(state, assign=True)."
                )
        self.device = next((t.device for _, t in tensors), torch.device("cpu"))

    def fingerprint(self) -> Fingerprint:
        """Of the model and of what is read of it."""
        request = of_request(self.points, self.dtype, self.transform, self.device.type)
        return {**of_model(self.layout.root), **request}

    @contextmanager
    def open(self) -> Iterator[Callable[[Tensor], dict[str, Tensor]]]:
        """Gives a function that makes rows of a batch of images, by tap in depth order."""
        with (
            evaluating(self.layout.model),
            Reader(self.layout, None, self.asked, compiled=True) as reader,
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
        shape = tuple(value.shape)
        if len(shape) < 2 or shape[0] != count:
            if callable(self._named[point].how.pool):
                raise DataError(f"pool made {shape} at {point!r}; it must give ({count}, D).")
            raise DataError(
                f"{point!r} gives shape {shape} for {count} images; only what has a row per image, "
                "(B, D) or (B, ...), can be kept. Tap a module around it instead."
            )
        rows = value.to(self.dtype).contiguous()  # on the GPU: a copy under way is not to be read
        rows = rows.to("cpu", non_blocking=value.is_cuda)
        # a part of a larger tensor would keep all of it in memory
        return rows if rows.untyped_storage().nbytes() <= rows.nbytes else rows.clone()
