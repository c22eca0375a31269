"""Images as uint8 tensors, by batch: all in memory where they fit, else decoded when asked for.

A batch is one indexing call, so that a data loader hands over lists of indices and collates
nothing. Every image is opened before training starts: one that cannot be read is named then, not
hours later.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from headplug.errors import DataError
from headplug.progress import progress

if TYPE_CHECKING:
    from PIL.Image import Image

    from headplug.compare.data.sources import Source

RESIDENT_LIMIT = 4 * 2**30
"""Bytes that one decoded split may take in memory."""
BLOCK = 100
"""Images that a thread decodes at a time."""
BAD_SHARE = 0.01
"""Share of a split's images that may be unreadable and left out; one image always may."""


class Images(torch.utils.data.Dataset[Any]):
    """The images of one split.

    Args:
        labels: Class indices, `(N,)`, int64.
        shape: `(C, H, W)` of every image.
        rows: Where they are in the data, ascending, `(N,)`, int64; left out, these are all of it.
    """

    def __init__(
        self, labels: Tensor, shape: tuple[int, int, int], rows: Tensor | None = None
    ) -> None:
        self.labels = labels
        self.shape = shape
        self.rows = torch.arange(len(labels)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | list[int] | Tensor) -> tuple[Tensor, Any, Any]:
        """Image, label and index; for a list or a tensor of B indices, a batch of each.

        Returns:
            uint8 `(C, H, W)`, int, int; or uint8 `(B, C, H, W)`, int64 `(B,)`, int64 `(B,)`.

        Raises:
            IndexError: There is no such image, or the index is no integer.
            DataError: An image cannot be decoded any more.
        """
        rows = torch.as_tensor(index)
        if rows.numel():
            if rows.dtype in (torch.bool, torch.float32, torch.float64) or rows.ndim > 1:
                raise IndexError(f"index images by integers, not by {rows.dtype} {rows.shape}.")
            if not -len(self) <= int(rows.min()) <= int(rows.max()) < len(self):
                raise IndexError(f"index {index} is out of range for {len(self)} images.")
        rows = rows.long() % max(len(self), 1)
        if rows.ndim:
            return self._pixels(rows), self.labels[rows], rows
        row = int(rows)
        return self._pixels(rows[None])[0], int(self.labels[row]), row

    def tensor(self) -> Tensor:
        """All images, uint8 `(N, C, H, W)`; not a copy where they are in memory already.

        Raises:
            DataError: They take more than `RESIDENT_LIMIT` bytes.
        """
        raise NotImplementedError

    def _pixels(self, rows: Tensor) -> Tensor:
        raise NotImplementedError


class ResidentImages(Images):
    """Images in memory.

    Args:
        pixels: uint8, `(N, C, H, W)`.
        labels: Class indices, `(N,)`, int64.
        rows: As `Images` takes them.

    >>> images = ResidentImages(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.arange(5))
    >>> pixels, labels, index = images[[4, 0]]
    >>> pixels.shape, labels
    (torch.Size([2, 3, 8, 8]), tensor([4, 0]))
    """

    def __init__(self, pixels: Tensor, labels: Tensor, rows: Tensor | None = None) -> None:
        _, c, h, w = pixels.shape
        super().__init__(labels, (c, h, w), rows)
        self._all = pixels

    def tensor(self) -> Tensor:
        """All images, uint8 `(N, C, H, W)`; not a copy."""
        return self._all

    def _pixels(self, rows: Tensor) -> Tensor:
        return self._all.index_select(0, rows)  # several times faster than self._all[rows]


class LazyImages(Images):
    """Images that are decoded and resized when asked for; data loader workers can share the work.

    Args:
        source: Where they are.
        rows: Which of the source's images, `(N,)`, int64.
        labels: Their class indices, `(N,)`, int64.
        shape: `(C, H, W)` to bring them to.
    """

    def __init__(
        self, source: Source, rows: Tensor, labels: Tensor, shape: tuple[int, int, int]
    ) -> None:
        super().__init__(labels, shape, rows)
        self._source = source

    def tensor(self) -> Tensor:
        """All images, decoded now: uint8 `(N, C, H, W)`.

        Raises:
            DataError: They take more than `RESIDENT_LIMIT` bytes, or cannot be decoded any more.
        """
        size = len(self) * math.prod(self.shape)
        if size > RESIDENT_LIMIT:
            raise DataError(
                f"{len(self):,} images of shape {self.shape} {_too_big(size)}. Take a smaller "
                "image_size, or a limit on the number of images."
            )
        return self._pixels(torch.arange(len(self)))

    def _pixels(self, rows: Tensor) -> Tensor:
        out = torch.empty((len(rows), *self.shape), dtype=torch.uint8)
        for slot, row in zip(out.numpy(), self.rows[rows], strict=True):
            try:
                with self._source.open(int(row)) as image:
                    slot[...] = to_pixels(image, self.shape)
            except Exception as error:
                raise DataError(
                    f"{self._source.where(row)} cannot be decoded ({_reason(error)}). "
                    "Replace or delete it."
                ) from error
        return out


def read_images(
    source: Source,
    rows: np.ndarray,
    labels: np.ndarray,
    shape: tuple[int, int, int],
    *,
    show_progress: bool = True,
) -> Images:
    """Reads the chosen images of a split: decoded to memory if they fit, else opened only.

    At most `BAD_SHARE` of the images (and always one) may be unreadable: they are left out with a
    warning that names the first three.

    Args:
        source: The split.
        rows: Which images, ascending, `(N,)`.
        labels: Their class indices, `(N,)`.
        shape: `(C, H, W)` to bring them to.
        show_progress: Whether to show a progress bar.

    Raises:
        DataError: More images are unreadable; or they do not fit and can only be read in order.
    """
    size = len(rows) * math.prod(shape)
    fits = size <= RESIDENT_LIMIT
    if not fits and not source.random_access:
        raise DataError(
            f"{source.title}: {len(rows):,} images of shape {shape} {_too_big(size)}. Take a "
            "smaller image_size or a limit, or unpack them to an image folder: those are read when "
            "needed."
        )
    pixels = torch.empty((len(rows), *shape) if fits else 0, dtype=torch.uint8)
    array = pixels.numpy()

    def visit(position: int, image: Image) -> None:
        if fits:
            array[position] = to_pixels(image, shape)

    what = f"{'decode' if fits else 'check'} {source.title} (x{BLOCK} images)"
    bad = _sweep(source, rows, visit, what, show_progress)
    kept = torch.ones(len(rows), dtype=torch.bool)
    if bad:
        kept[list(bad)] = False
        _report(source, {int(rows[i]): reason for i, reason in sorted(bad.items())}, len(rows))
        pixels = pixels[kept] if fits else pixels
    targets, places = (torch.from_numpy(a.astype(np.int64))[kept] for a in (labels, rows))
    if fits:
        return ResidentImages(pixels, targets, places)
    return LazyImages(source, places, targets, shape)


def to_pixels(image: Image, shape: tuple[int, int, int]) -> np.ndarray:
    """One image as uint8 `(C, H, W)`: the largest centred part of that aspect ratio, resized.

    For a square this is: the shorter side resized, the longer one cropped at the centre. JPEG files
    of more than twice the size are decoded at a fraction of it, which is several times faster.

    Raises:
        DataError: The image holds 32-bit values, whose range is unknown.
    """
    from PIL import Image, ImageOps

    channels, height, width = shape
    mode = "L" if channels == 1 else "RGB"
    image.draft(None, (2 * width, 2 * height))
    if image.mode.startswith("I;16"):  # Pillow would clip these at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise DataError(f"mode {image.mode}, whose range of values is unknown")
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height))
    array = np.asarray(image)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def _sweep(
    source: Source,
    rows: np.ndarray,
    visit: Callable[[int, Image], None],
    what: str,
    show: bool,
) -> dict[int, str]:
    """Opens every image in threads; returns why, by position, for those that failed."""

    def block(start: int, openers: Sequence[Callable[[], Image]]) -> dict[int, str]:
        bad = {}
        for position, opener in enumerate(openers, start):
            try:
                with opener() as image:
                    visit(position, image)
            except Exception as error:  # decoders raise all sorts on damaged files
                bad[position] = _reason(error)
        return bad

    bad: dict[int, str] = {}
    workers = min(16, os.cpu_count() or 1)
    with (
        ThreadPoolExecutor(workers) as pool,
        progress(what, -(-len(rows) // BLOCK), show=show) as advance,
    ):
        stream = source.stream(rows)
        starts = range(0, len(rows), BLOCK)
        jobs = (pool.submit(block, start, list(islice(stream, BLOCK))) for start in starts)
        for result in _ahead(jobs, 2 * workers):
            bad.update(result)
            advance("")
    return bad


def _ahead(jobs: Iterator[Future[dict[int, str]]], depth: int) -> Iterator[dict[int, str]]:
    """The jobs' results in order, with no more than `depth` of them submitted and not yet read."""
    waiting: deque[Future[dict[int, str]]] = deque(islice(jobs, depth))
    while waiting:
        yield waiting.popleft().result()
        waiting.extend(islice(jobs, 1))


def _report(source: Source, bad: dict[int, str], total: int) -> None:
    """Warns of the unreadable images, or refuses the split."""
    named = "; ".join(f"{source.where(row)} ({why})" for row, why in list(bad.items())[:3])
    more = "; ..." if len(bad) > 3 else ""
    found = f"{source.title}: {len(bad)} of {total:,} images cannot be read: {named}{more}."
    allowed = max(1, int(total * BAD_SHARE))
    if len(bad) > allowed or len(bad) == total:
        raise DataError(f"{found} At most {allowed} may be left out; replace or delete them.")
    warnings.warn(f"{found} They are left out.", stacklevel=4)


def _too_big(size: int) -> str:
    gib, allowed = size / 2**30, RESIDENT_LIMIT / 2**30
    return f"take {gib:.3g} GiB decoded, more than the {allowed:.3g} GiB allowed"


def _reason(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":  # its own text holds an address
        return "not an image that Pillow knows"
    return " ".join(str(error).split())[:120] or type(error).__name__
