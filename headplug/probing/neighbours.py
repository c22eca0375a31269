"""The nearest samples of a bank, which may be spread over several processes.

Memory stays bounded whatever the size of bank and queries: blocks thick enough to keep the matrix
product fast meet the bank piece by piece, and there is no second copy of the bank. Near duplicates,
half precision and features of any size keep their distances. CPU and GPU run the same code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from headplug.errors import DataError, DimensionError

ROWS = 256  # queries a block at least; thinner blocks cost up to 1.5 times as much
CELLS = 2**22  # distances held at a time: 16 MiB
PIECE = CELLS // ROWS  # bank samples at a time, at most
VALUES = 2**23  # of their features: 32 MiB
CLOSE = 2.0**-10  # of a squared length; a product loses the digits of smaller squared distances


class Part(NamedTuple):
    """What every process must know of one process's bank and queries.

    Attributes:
        size: Number of bank samples.
        queries: Number of queries.
        widths: Features a sample.
        peak: Largest absolute value.
        middle: About the mean of the bank `(D,)`, or None without samples.
    """

    size: int
    queries: int
    widths: set[int]
    peak: float
    middle: Tensor | None

    @classmethod
    def of(cls, bank: Tensor, queries: Tensor) -> Part:
        """Of features `(N, D)` and `(M, D)`, of which there may be none."""
        some = [x for x in (bank, queries) if len(x)]
        return cls(
            size=len(bank),
            queries=len(queries),
            widths={x.shape[1] for x in some},
            peak=max((abs(float(end)) for x in some for end in x.aminmax()), default=0.0),
            middle=bank[:: len(bank) // 1024 + 1].double().mean(0).cpu() if len(bank) else None,
        )


class Bank:
    """The samples to search, of which this process holds its own.

    Args:
        own: This process's samples `(N, D)`; they may stay on the CPU if the queries are on a GPU.
        parts: What is known of every process, by rank.
        group: The processes, or None for this one alone.

    Attributes:
        size: Number of samples of all processes; indices run on from rank to rank.

    Raises:
        DimensionError: Bank and queries, or the processes, differ in width.
        DataError: There is no sample on any process.
    """

    def __init__(self, own: Tensor, parts: Sequence[Part], group: Any = None) -> None:
        self.size = sum(p.size for p in parts)
        if not self.size:
            raise DataError("no process has a sample in its bank; give some to one at least.")
        widths = sorted({width for p in parts for width in p.widths})
        if len(widths) > 1:
            raise DimensionError(
                f"bank and queries have {' and '.join(map(str, widths))} features a sample; take "
                "both from the same tap."
            )
        self._own, self._parts, self._group, self._width = own, parts, group, widths[0]
        self._run = max(ROWS, VALUES // self._width)
        self._step = min(PIECE, self._run)
        # a power of two is exact
        self._factor = 2.0 ** min(126, -math.frexp(max(p.peak for p in parts))[1])
        middles = [p.middle * (p.size / self.size) for p in parts if p.middle is not None]
        self._middle = torch.stack(middles).sum(0) * self._factor

    def nearest(
        self, queries: Tensor, k: int, distance: str, rows: int
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The nearest samples to this process's queries, some queries at a time.

        They are in order of distance, and of index where it comes out the same to the last bit.

        Args:
            queries: Features `(M, D)`. Every process must go through all that is yielded.
            k: Number of neighbours, at most the bank's size.
            distance: "cosine", which is one minus the similarity, or "euclidean".
            rows: Number of queries at a time, at most.

        Yields:
            Which rows they are, distances `(rows, k)` and indices `(rows, k)`.
        """
        rows = min(rows, self._run)
        thick = max(ROWS, CELLS // min(self.size, self._step))
        for start in range(0, max(p.queries for p in self._parts), rows):
            mine = queries[start : start + rows]
            blocks = [self._placed(b, distance, queries) for b in mine.split(thick) if len(b)]
            found = [(b.new_empty(len(b), 0), b.new_empty(len(b), 0).long()) for b in blocks]
            for first, piece in self._pieces(distance, queries):
                for i, block in enumerate(blocks):
                    gap, index = _smallest(block, piece, k, distance)
                    gap = torch.cat([found[i][0], gap], 1)
                    index = torch.cat([found[i][1], index + first], 1)
                    gap, order = gap.sort(dim=1, stable=True)
                    found[i] = gap[:, :k], index.gather(1, order[:, :k])
            if blocks:
                gap, index = (torch.cat(x) for x in zip(*found, strict=True))
                far = gap if distance == "cosine" else gap.sqrt_().div_(self._factor)
                yield slice(start, start + len(mine)), far, index

    def _pieces(self, distance: str, like: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The whole bank piece by piece, each with the index of its first sample."""
        me, before = dist.get_rank(self._group) if self._group else 0, 0
        for rank, part in enumerate(self._parts):
            for first in range(0, part.size, self._step):
                count = min(self._step, part.size - first)
                if rank == me:
                    piece = self._placed(self._own[first : first + count], distance, like)
                else:
                    piece = like.new_empty(count, self._width, dtype=torch.float32)
                if self._group:
                    dist.broadcast(piece, group_src=rank, group=self._group)
                yield before + first, piece
            before += part.size

    def _placed(self, features: Tensor, distance: str, like: Tensor) -> Tensor:
        """In float32, with a length near 1, so that no square leaves its range."""
        wide = features.to(like.device, torch.promote_types(features.dtype, torch.float32))
        if distance == "cosine":
            largest = torch.linalg.vector_norm(wide, torch.inf, dim=1, keepdim=True)
            placed = (wide / largest.clamp_min_(torch.finfo(wide.dtype).tiny)).float()
            return F.normalize(placed, dim=1, out=placed)
        # distances from another origin are the same, but lose fewer digits
        return (wide * self._factor).float().sub_(self._middle.to(like.device, torch.float32))


def _smallest(queries: Tensor, piece: Tensor, k: int, distance: str) -> tuple[Tensor, Tensor]:
    """The `k` smallest gaps of each query and their indices, in order of index.

    A gap is one minus the cosine, or the squared Euclidean distance. One more than `k` is returned
    where there is one.
    """
    cosine = distance == "cosine"
    offset = piece.new_ones(1) if cosine else _squared(piece)
    length = queries.new_ones(1, 1) if cosine else _squared(queries)[:, None]
    with torch.autocast(queries.device.type, enabled=False):
        gaps = torch.addmm(offset, queries, piece.T, alpha=-1.0 if cosine else -2.0)
    wanted = min(k + 1, len(piece))
    gap, index = _topk(gaps, wanted)
    # where the last place is shared, the lowest indices take it
    last = gap.amax(1, keepdim=True)
    tied = (gap == last).sum(1) > 1
    if len(piece) > k and tied.any():
        some, last = gaps[tied], last[tied]
        rank = torch.arange(len(piece), device=gaps.device, dtype=torch.float32)
        rank = rank.where(some == last, torch.inf).masked_fill_(some < last, -1)
        index[tied] = _topk(rank, wanted)[1]
        gap[tied] = some.gather(1, index[tied])
    if not cosine:
        gap += length
    # a difference keeps the digits that the product lost
    for pairs in (gap < CLOSE * length).nonzero().split(max(1, CELLS // 8 // piece.shape[1])):
        row, column = pairs.unbind(1)
        apart = _squared(queries[row] - piece[index[row, column]])
        gap[row, column] = apart / 2 if cosine else apart
    index, order = index.sort(dim=1)
    return gap.gather(1, order), index


def _squared(rows: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return length.square_()


def _topk(gaps: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` smallest of each row and their columns, in any order.

    The row is folded; only the `k` columns with the smallest minima can hold them. On a CPU that is
    twice to four times as fast as `torch.topk` on a row of 10,000.
    """
    count = gaps.shape[1]
    height = math.isqrt(count // k)
    if height < 2:
        return gaps.topk(k, dim=1, largest=False, sorted=False)
    width = count // height
    folded = gaps[:, : height * width].unflatten(1, (height, width))
    best = folded.amin(1).topk(k, dim=1, largest=False, sorted=False).indices
    every = torch.arange(count, device=gaps.device)
    columns = (best[:, None] + every[: height * width : width, None]).flatten(1)
    columns = torch.cat([columns, every[height * width :].expand(len(gaps), -1)], 1)
    gap, where = gaps.gather(1, columns).topk(k, dim=1, largest=False, sorted=False)
    return gap, columns.gather(1, where)
