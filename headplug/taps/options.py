"""How a point is read: which of its calls, pooled or not, where its tensors go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from headplug.errors import OptionError, TapError
from headplug.taps.pooling import check_pool

Pool = str | Callable[[Tensor], Tensor]
CALLS = ("all", "last", "cat")


@dataclass(frozen=True)
class Tap:
    """A point with options of its own; those left out are as for all points of the request.

    Args:
        point: A name, see `headplug.taps.points`, or the index of a timm feature.
        calls: What to keep where a module is called several times: "all", "last", "cat" (one tensor
            along the batch, e.g. over the views of an SSL step), or the number of one call, from 0.
        pool: "flat", "gap", "cls", "cls+gap", "tokens" (see `headplug.taps.pooling`), or a
            callable on a tensor.
        detach: Cut the tensors from the graph.
        clone: Copy what is read, where later modules change it in place.
        dtype: What to convert floating-point tensors to.
        device: Where to move tensors; from a GPU to "cpu" through pinned memory, while the GPU
            goes on computing.
        gradients: Keep the gradients that arrive at the point, for `Taps.gradient`.

    Raises:
        OptionError: An option is none of these.

    >>> Tap("backbone.layer4", pool="gap", calls="last").pool
    'gap'
    """

    point: str | int
    calls: str | int | None = None
    pool: Pool | None = None
    detach: bool | None = None
    clone: bool | None = None
    dtype: torch.dtype | None = None
    device: str | torch.device | None = None
    gradients: bool | None = None

    def __post_init__(self) -> None:
        wrong = type(self.calls) is bool or (
            self.calls < 0 if isinstance(self.calls, int) else self.calls not in (None, *CALLS)
        )
        if wrong:
            raise OptionError(
                f"calls is 'all', 'last', 'cat' or the number of a call from 0, not {self.calls!r}."
            )
        check_pool(self.pool)
        if not (self.dtype is None or isinstance(self.dtype, torch.dtype)):
            raise OptionError(f"dtype is a torch.dtype such as torch.float16, not {self.dtype!r}.")
        if self.device is not None:
            try:
                torch.device(self.device)
            except (RuntimeError, TypeError):
                raise OptionError(
                    f"device is one of torch's, such as 'cpu' or 'cuda', not {self.device!r}."
                ) from None

    @property
    def name(self) -> str:
        """What its results are called, if the request does not say otherwise."""
        return f":{self.point}" if isinstance(self.point, int) else self.point

    def completed(self, default: Tap) -> Tap:
        """With the options of another one where it has none."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return Tap(**{k: getattr(default, k) if v is None else v for k, v in own.items()})


def requested(asked: Any, default: Tap) -> dict[str, Tap]:
    """Every point of a request by the name of its results.

    Args:
        asked: A point or a `Tap`, a mapping from names to them, or a sequence of all these.
        default: Has the options for all.

    Raises:
        TapError: Something else is asked, or one name stands for two readings.
    """
    found: dict[str, Tap] = {}
    for name, one in _flat(asked):
        if isinstance(one, bool) or not isinstance(one, str | int | Tap):
            raise TapError(f"a point is a string, an index or a Tap, not {one!r}.")
        one = one.completed(default) if isinstance(one, Tap) else replace(default, point=one)
        name = one.name if name is None else name
        if found.setdefault(name, one) != one:
            raise TapError(
                f"{name!r} is asked for in two ways; give them names: "
                f"{{'one': Tap({one.point!r}, ...), 'other': Tap({one.point!r}, ...)}}."
            )
    return found


def shaped(asked: Any, read: Callable[[str], Any]) -> Any:
    """What was read, in the shape of the request: one, a list, or a mapping with its names."""
    if isinstance(asked, Mapping):
        return {name: read(name) for name in asked}
    if isinstance(asked, Sequence) and not isinstance(asked, str | bytes):
        return [shaped(one, read) for one in asked]
    return read(asked.name if isinstance(asked, Tap) else Tap(asked).name)


def _flat(asked: Any) -> Iterator[tuple[str | None, Any]]:
    if isinstance(asked, Mapping):
        yield from asked.items()
    elif isinstance(asked, Sequence) and not isinstance(asked, str | bytes):
        for one in asked:
            yield from _flat(one)
    else:
        yield None, asked
