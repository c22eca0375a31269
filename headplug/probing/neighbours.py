"""The nearest samples of a bank, which may be spread over several processes.

Memory stays bounded whatever the size of bank and queries: blocks thick enough to keep the matrix
product fast meet the bank piece by piece, and there is no second copy of the bank. Near duplicates,
tight clusters, features that have collapsed, half precision and features of any size keep their
neighbours and distances: all is done relative to the middle of the bank, and again in float64 where
float32 cannot tell the samples apart. Small integers and binary features are summed without
rounding, so that samples at the same distance tie. CPU and GPU run the same code.
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
from headplug.probing.data import chunks

DISTANCES = ("cosine", "euclidean")
ROWS = 256  # queries a block at least; thinner blocks cost up to 1.5 times as much
CELLS = 2**22  # distances held at a time: 16 MiB
PIECE = CELLS // ROWS  # bank samples at a time, at most
VALUES = 2**23  # of their features: 32 MiB
CLOSE = 2.0**-8  # of a squared length; a product loses the digits of smaller squared distances
SAME = 2.0**-48  # of a squared length; float32 features hold no smaller squared distances


class Part(NamedTuple):
    """What every process must know of one process's bank and queries.

    Attributes:
        size: Number of bank samples.
        queries: Number of queries.
        widths: Features a sample.
        peak: Largest absolute value.
        middles: About the middle of the bank for each distance, or nothing without samples.
    """

    size: int
    queries: int
    widths: set[int]
    peak: float
    middles: dict[str, Tensor]

    @classmethod
    def of(cls, bank: Tensor, queries: Tensor) -> Part:
        """Of features `(N, D)` and `(M, D)`, of which there may be none."""
        some = [x for x in (bank, queries) if len(x)]
        few = bank[:: len(bank) // 256 + 1].double()
        return cls(
            size=len(bank),
            queries=len(queries),
            widths={x.shape[1] for x in some},
            peak=max((abs(float(end)) for x in some for end in x.aminmax()), default=0.0),
            middles={d: _vectors(few, d).median(0).values.cpu() for d in DISTANCES if len(few)},
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
            raise DataError("the bank has no samples, on any process; give it one at least.")
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
        largest = max(parts, key=lambda p: p.size).middles  # a mean of several would break ties
        self._middles = {**largest, "euclidean": largest["euclidean"] * self._factor}

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
            room = queries.new_empty(len(mine), len(self._middles[distance]), dtype=torch.float32)
            blocks = [b for b in self._place(room, mine, distance, 1).split(thick) if len(b)]
            found = [(b.new_empty(len(b), 0), b.new_empty(len(b), 0).long()) for b in blocks]
            for first, piece in self._pieces(distance, queries):
                for i, block in enumerate(blocks):
                    gap, index = _smallest(block, piece, k)
                    gap = torch.cat([found[i][0], gap], 1)
                    index = torch.cat([found[i][1], index + first], 1)
                    gap, order = gap.sort(dim=1, stable=True)
                    found[i] = gap[:, :k], index.gather(1, order[:, :k])
            if blocks:
                gap, index = (torch.cat(x) for x in zip(*found, strict=True))
                far = gap / 2 if distance == "cosine" else gap.sqrt_().div_(self._factor)
                yield slice(start, start + len(mine)), far, index

    def _pieces(self, distance: str, like: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The whole bank piece by piece, each with the index of its first sample.

        A piece is where the one before was.
        """
        me, before = dist.get_rank(self._group) if self._group else 0, 0
        most = min(self._step, max(part.size for part in self._parts))
        room = like.new_empty(most, len(self._middles[distance]), dtype=torch.float32)
        for rank, part in enumerate(self._parts):
            for first in range(0, part.size, self._step):
                piece = room[: part.size - first]
                if rank == me:
                    self._place(piece, self._own[first : first + len(piece)], distance)
                if self._group:
                    dist.broadcast(piece, group_src=rank, group=self._group)
                yield before + first, piece
            before += part.size

    def _place(self, room: Tensor, features: Tensor, distance: str, side: int = 0) -> Tensor:
        """In float32, relative to the middle and small enough for no square to overflow."""
        middle, parts = self._middles[distance].to(room.device), chunks(features)
        for to, rows in zip(room.split(len(parts[0])), parts, strict=True):
            wide = rows.to(room.device).double() * self._factor
            to.copy_(_vectors(wide, distance, side) - middle)
        return room


def _vectors(features: Tensor, distance: str, side: int = 0) -> Tensor:
    """What is apart by the distance, or for the cosine by the root of twice one minus it.

    That is the features, or unit vectors in two more dimensions, in which a row of zeros points: of
    a bank (side 0) in one, of queries (side 1) in the other. So it is at right angles to all.
    """
    if distance == "euclidean":
        return features
    length = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    aside = F.one_hot(torch.tensor([side]), 2).to(length)
    return torch.cat([features * length.clamp_min(1e-150).reciprocal(), (length == 0) * aside], 1)


def _smallest(queries: Tensor, piece: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` smallest squared distances of each query and their indices, in order of index.

    One more than `k` is returned where there is one.
    """
    length = _squared(queries)
    gap, index = _lowest(_gaps(queries, piece), k)
    gap += length[:, None]
    tight = gap.amax(1) < CLOSE * length
    if tight.any():
        some, most = queries[tight].double(), length[tight, None]
        again = _gaps(some, piece.double()) + _squared(some)[:, None]
        gap[tight], index[tight] = _lowest(again.float().clamp_(min=SAME * most), k)
    # a difference keeps the digits that the product lost
    close = gap < CLOSE * length[:, None]
    for pairs in close.nonzero().split(max(1, CELLS // 8 // piece.shape[1])):
        row, column = pairs.unbind(1)
        gap[row, column] = _squared(queries[row] - piece[index[row, column]])
    index, order = index.sort(dim=1)
    return gap.gather(1, order), index


def _gaps(queries: Tensor, piece: Tensor) -> Tensor:
    """Squared distances less the squared lengths of the queries."""
    with torch.autocast(queries.device.type, enabled=False):
        return torch.addmm(_squared(piece), queries, piece.T, alpha=-2)


def _squared(rows: Tensor) -> Tensor:
    return rows.square().sum(1)  # exact for small integers, which the square of a norm is not


def _lowest(gaps: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` smallest of each row, one more where there is one, and their columns.

    Where the last place is shared, the lowest columns take it.
    """
    count = gaps.shape[1]
    wanted = min(k + 1, count)
    gap, index = _topk(gaps, wanted)
    last = gap.amax(1, keepdim=True)
    tied = (gap == last).sum(1) > 1
    if count > k and tied.any():
        some, last = gaps[tied], last[tied]
        rank = torch.arange(count, device=gaps.device, dtype=torch.float32)
        rank = rank.where(some == last, torch.inf).masked_fill_(some < last, -1)
        index[tied] = _topk(rank, wanted)[1]
        gap[tied] = some.gather(1, index[tied])
    return gap, index


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
