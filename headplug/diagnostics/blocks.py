"""Features of taps in blocks of rows: aligned, checked, and small whatever the number of samples.

A store on disk is read part by part; two stores may be cut differently. Whatever is wrong with
features is said with the name of their tap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from headplug.errors import DataError, unknown

CHUNK = 2**22  # values in float64 at a time: 32 MiB
LARGE = 2.0**200  # sums of fourth powers of it, and of its inverse, are well inside float64


class Taps(Protocol):
    """Features by tap: a `FeatureStore`, or a mapping to tensors."""

    def __getitem__(self, tap: str, /) -> Any:
        """Features of a tap: a tensor, or what can be made one."""

    def __iter__(self) -> Iterator[str]:
        """The taps."""


class Source(NamedTuple):
    """Features of one tap of a store.

    Attributes:
        store: The store.
        tap: The tap.
        scale: What rows are multiplied by, a power of two.
    """

    store: Taps
    tap: str
    scale: float = 1.0

    def __str__(self) -> str:
        return f"the features at {self.tap!r}"

    @property
    def shape(self) -> tuple[int, int]:
        """Number of samples and of features.

        Raises:
            DataError: They are not `(N, D)`, or of a single sample.
        """
        shapes = getattr(self.store, "shapes", None)
        shape = tuple(shapes[self.tap] if shapes else self._features.shape)
        if len(shape) != 2 or not shape[1]:
            raise DataError(
                f"{self} must have shape (N, D), not {shape}; pool or flatten them first, e.g. "
                "extract_features(..., pool='gap')."
            )
        if shape[0] < 2:
            raise DataError(f"{self} are of {shape[0]} sample; what varies needs two or more.")
        return shape

    def whole(self) -> Tensor:
        """All rows `(N, D)`, checked."""
        return self.checked(self._features, 0)

    def parts(self) -> Iterator[Tensor]:
        """The rows in parts as they are stored, not checked."""
        parts = getattr(self.store, "parts", None)
        found = parts(self.tap) if parts else [self._features]
        return (part for part in found if len(part))

    @property
    def _features(self) -> Tensor:
        return as_features(self.store[self.tap], str(self))

    def checked(self, rows: Tensor, start: int) -> Tensor:
        """Rows as floats.

        Args:
            rows: `(n, D)`.
            start: Number of the first.

        Raises:
            DataError: They hold NaN or infinity, or are complex.
        """
        if rows.is_complex():
            raise DataError(f"{self} are complex; give real numbers, e.g. torch.view_as_real.")
        rows = rows.detach()
        rows = rows if rows.is_floating_point() else rows.double()
        if not rows.sum().isfinite():  # finite rows can sum to infinity in float16
            wrong = ~rows.isfinite().all(1)
            if wrong.any():
                raise DataError(
                    f"{self} hold NaN or infinity, first in row "
                    f"{start + int(wrong.int().argmax())}. Leave such samples out, or look for a "
                    "model that diverged."
                )
        return rows if self.scale == 1 else rows * self.scale


def as_features(features: Any, what: str = "features") -> Tensor:
    """What can be made a tensor, such as a NumPy array, as one.

    Raises:
        DataError: It cannot.
    """
    try:
        return torch.as_tensor(features)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{what} must be a tensor, not {type(features).__name__}: {error}"
        ) from None


def levelled(source: Source) -> Source:
    """A tap whose features are scaled if they are too large, or too small, to be squared.

    Only those in float64 can be.
    """
    if next(source.parts()).dtype != torch.float64:
        return source
    top = max(float(part.abs().amax()) for part in source.parts())
    if not top or not math.isfinite(top) or 1 / LARGE < top < LARGE:
        return source
    return source._replace(scale=2.0 ** -max(math.frexp(top)[1], -1000))


def chosen(store: Taps, taps: Sequence[str] | None) -> list[Source]:
    """The taps of a store that are asked for, or all.

    Raises:
        UnknownNameError: One is not there.
        DataError: There is none.
    """
    known = list(store)
    for tap in taps or ():
        if tap not in known:
            raise unknown("tap", str(tap), known)
    found = [Source(store, tap) for tap in (known if taps is None else taps)]
    if not found:
        raise DataError("there is no tap to look at; name one that the store has.")
    return found


def blocks(
    sources: Sequence[Source], device: torch.device | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of several taps, block after block, as floats.

    Raises:
        DataError: Numbers of samples differ, or rows cannot be used.
    """
    shapes = [source.shape for source in sources]
    counts = {count for count, _ in shapes}
    if len(counts) > 1:
        found = ", ".join(f"{s.tap!r} {n}" for s, (n, _) in zip(sources, shapes, strict=True))
        raise DataError(f"numbers of samples differ: {found}; all must be of the same samples.")
    size = max(1, CHUNK // max(width for _, width in shapes))
    queues = [source.parts() for source in sources]
    held = [next(queue) for queue in queues]
    start, count = 0, counts.pop()
    while True:
        rows = min(size, *(len(part) for part in held))
        yield tuple(
            source.checked(part[:rows], start).to(device)
            for source, part in zip(sources, held, strict=True)
        )
        start += rows
        if start >= count:
            return
        held = [
            part[rows:] if len(part) > rows else next(queue)
            for part, queue in zip(held, queues, strict=True)
        ]


@torch.no_grad()
def narrowed(source: Source, device: torch.device | None = None) -> Source:
    """A tap with more features than samples, given as many as samples instead; others as they are.

    The inner products of its rows stay, and with them whatever depends on features through these
    alone: singular values, CKA, the weights of features after a layer. So no D x D matrix is
    needed. By QR of the transpose, which loses no digits; the rows are held in float64.
    """
    count, width = source.shape
    if width <= count:
        return source
    rows = source.whole().to(device, torch.float64)
    return Source({source.tap: torch.linalg.qr(rows.T, mode="r").R.T.contiguous()}, source.tap)


def same_samples(first: Taps, second: Taps) -> None:
    """Checks that two stores are of the same samples, as far as they have ids.

    Raises:
        DataError: They are not; the message says what differs.
    """
    found = (getattr(store, "ids", None) for store in (first, second))
    one, two = (i.tolist() if isinstance(i, Tensor) else i for i in found)
    if one is None or two is None:
        return
    if one == two:
        return
    mine, theirs = set(one), set(two)
    lone = [f"{i!r} is in the first only" for i in one if i not in theirs][:1]
    lone += [f"{i!r} is in the second only" for i in two if i not in mine][:1]
    raise DataError(
        f"mixed stores: one has {len(one)} samples, the other {len(two)}, and {len(mine & theirs)} "
        f"ids are in both ({'; '.join(lone)}). Extract both from the same data set, "
        "with the same ids."
    )
