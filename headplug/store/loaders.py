"""What samples there are, and how to read those that are wanted.

A DataLoader over a data set with a length names its samples, so that any of them can be read alone:
`Listed` takes the names from its sampler and reads with a loader made like it. Anything else that
can be iterated (`Stream`) has to be read from its start.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from operator import length_hint
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from headplug.errors import DataError
from headplug.ranks import Team
from headplug.store.batches import Batch, Ids, distinct, parse
from headplug.store.fingerprint import Fingerprint, digest

SAMPLED = 8  # samples that stand for all in a fingerprint
EMPTY = "the loader is empty: there is nothing to extract."


class Listed:
    """The samples of a DataLoader over a data set with a length, in the order of their indices.

    Args:
        loader: The DataLoader.
        indices: Of the samples that it would give, perhaps some of them twice.
        ranks: The processes that share the work; their samples are united.
        shard_size: About how many samples a shard holds: as many as fill whole batches.

    Attributes:
        shards: Indices of each shard, ascending, each index once.

    Raises:
        DataError: There is none.
    """

    def __init__(
        self, loader: DataLoader[Any], indices: Iterable[int], ranks: Team, shard_size: int
    ) -> None:
        own = torch.tensor(list(indices), dtype=torch.int64, device="cpu")
        ids = torch.cat(ranks.each(lambda: own)).unique()
        if not len(ids):
            raise DataError(EMPTY)
        size = loader.batch_size or getattr(loader.batch_sampler or loader.sampler, "batch_size", 0)
        self._batch_size = int(size or 64)
        self._loader, self._ids, self._ranks = loader, ids, ranks
        self._rows = max(1, shard_size // self._batch_size) * self._batch_size
        self.shards = ids.split(self._rows)

    def fingerprint(self) -> Fingerprint:
        """Of the indices, of a few samples as the loader gives them, and of how they are cut."""
        count = min(SAMPLED, len(self._ids))
        ends = (0, len(self._ids) - 1)  # a half default dtype would miss them
        places = torch.linspace(*ends, count, dtype=torch.float64, device="cpu").long()
        # in a worker where the user has workers: files opened here would be shared with those
        workers = min(1, self._loader.num_workers)
        with same_random_state(None):
            random.seed(0)
            numpy.random.seed(0)
            torch.manual_seed(0)
            (some,) = self._load([self._ids[places].tolist()], workers)
        kind = type(self._loader.dataset).__qualname__
        data = digest(kind, self._ids, some)
        return {"data": data, "samples": len(self._ids), "shard": self._rows}

    def todo(self, whole: Container[int]) -> list[int]:
        """This process's share of the shards that are not there."""
        left = [number for number in range(len(self.shards)) if number not in whole]
        return left[self._ranks.rank :: self._ranks.size]

    def count(self, whole: Container[int]) -> int:
        """How many samples this process is to read."""
        return sum(len(self.shards[number]) for number in self.todo(whole))

    def batches(self, whole: Container[int]) -> Iterator[Batch]:
        """The batches of this process's share; no batch is of two shards.

        Raises:
            DataError: The loader does not give what can be used.
        """
        todo = self.todo(whole)

        def cut() -> Iterator[tuple[int, bool, Tensor]]:
            for number in todo:
                batches = self.shards[number].split(self._batch_size)
                for i, ids in enumerate(batches, 1):
                    yield number, i == len(batches), ids

        loaded = self._load((ids.tolist() for *_, ids in cut()), self._loader.num_workers)
        for (number, last, ids), batch in zip(cut(), loaded, strict=True):
            images, labels, _ = parse(batch)
            if len(images) != len(ids):
                raise DataError(
                    f"the loader made a batch of {len(images)} of {len(ids)} samples; does its "
                    "collate_fn drop some? Leave them out with torch.utils.data.Subset instead."
                )
            yield Batch(number, last, images, labels, ids)

    def example(self) -> Tensor:
        """One image, `(1, ...)`."""
        (batch,) = self._load([self._ids[:1].tolist()], 0)
        return parse(batch)[0]

    def _load(self, batches: Iterable[list[int]], workers: int) -> DataLoader[Any]:
        """A loader made like the user's, of other batches."""
        given = self._loader
        alone = given.batch_sampler is None  # the data set itself makes batches of lists
        cut: dict[str, Any] = {"batch_sampler": batches}
        if alone:
            cut = {"sampler": batches, "batch_size": None}
        return DataLoader(
            given.dataset,
            **cut,
            num_workers=workers,
            collate_fn=given.collate_fn,
            pin_memory=given.pin_memory,
            timeout=given.timeout,
            worker_init_fn=given.worker_init_fn,
            multiprocessing_context=given.multiprocessing_context,
            prefetch_factor=given.prefetch_factor,
            generator=torch.Generator().manual_seed(0),  # the user's own stays as it is
        )


class Stream:
    """Samples in the order in which any iterable gives them in batches.

    Args:
        loader: The iterable; its first batch is read at once. Empty ones are passed over.
        ranks: The processes that share the work, each iterating over its own part.
        shard_size: How many samples fill a shard; the batch that fills it ends it.

    Raises:
        DataError: There is none; or several processes iterate, and their samples have no ids.
    """

    def __init__(self, loader: Iterable[Any], ranks: Team, shard_size: int) -> None:
        self._ranks, self._size = ranks, shard_size
        self._kind, self._total = type(loader).__qualname__, length_hint(loader) or None
        self._rest = (parsed for parsed in map(parse, loader) if len(parsed[0]))
        self._parts = ranks.each(self._look)
        if not any(part for part, _ in self._parts):
            raise DataError(EMPTY)

    def _look(self) -> tuple[str, int | None]:
        """A digest of the first batch, empty if there is none; and how many there are, if known."""
        self._first = list(islice(self._rest, 1))
        if not self._first:
            return "", 0
        if self._first[0][2] is None and self._ranks.size > 1:
            raise DataError(
                f"{self._ranks.size} processes iterate over a {self._kind} whose samples have no "
                "ids, so nothing tells which of them two processes share. Let it give (images, "
                "labels, ids), pass a DataLoader over a data set with a length, or call from one "
                "process with distributed=False."
            )
        return digest(self._first), self._total

    def fingerprint(self) -> Fingerprint:
        """Of each process's first batch and number of batches, and of how samples are cut."""
        counts: list[Any] = [count for _, count in self._parts]
        return {
            "data": digest(self._kind, self._parts),
            "batches": None if None in counts else sum(counts),
            "shard": self._size,
            "processes": self._ranks.size,
        }

    def example(self) -> Tensor | None:
        """One image, `(1, ...)`; None where this process has none."""
        return self._first[0][0][:1] if self._first else None

    def count(self, whole: Container[int]) -> int | None:
        """How many batches there are, as far as that is known."""
        return self._total

    def batches(self, whole: Container[int]) -> Iterator[Batch]:
        """All batches, also those of shards that are there.

        Raises:
            DataError: The loader does not give what can be used.
        """
        number, rows, seen = self._ranks.rank, 0, 0
        given: list[Ids] = []
        for images, labels, ids in chain(self._first, self._rest):
            if seen and bool(given) == (ids is None):
                raise DataError("the ids are missing in some batches and there in others.")
            if ids is None:
                ids = torch.arange(seen, seen + len(images), device="cpu")
            else:
                given.append(ids)
                distinct(given[-2:])  # at once for most; all of them at the end
            seen, rows = seen + len(images), rows + len(images)
            full = rows >= self._size
            yield Batch(number, full, images, labels, ids)
            if full:
                number, rows = number + self._ranks.size, 0
        if given:
            distinct(given)


def open_loader(loader: Any, ranks: Team, shard_size: int) -> Listed | Stream:
    """The samples of whatever can be iterated.

    Raises:
        DataError: It cannot be, not by several processes, or holds nothing.
    """
    indices = ranks.own(lambda: _indices(loader))
    if all(ranks.each(lambda: indices is not None)):
        return Listed(loader, indices or [], ranks, shard_size)
    return Stream(loader, ranks, shard_size)


@contextmanager
def same_random_state(loader: Any) -> Iterator[None]:
    """After the block Python, NumPy, torch's CPU and the loader's generators are as before it."""
    sampler = getattr(loader, "sampler", None)
    inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    owners = (loader, sampler, inner)
    own = {
        id(g): g for o in owners if isinstance(g := getattr(o, "generator", None), torch.Generator)
    }
    states = [(generator, generator.get_state()) for generator in own.values()]
    python, numpys = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(numpys)
            for generator, state in states:
                generator.set_state(state)


def _indices(loader: Any) -> list[int] | None:
    """The indices that a DataLoader's sampler gives; None where it has none, or not such."""
    if not hasattr(loader, "__iter__"):
        raise DataError(
            f"a {type(loader).__name__} cannot be iterated; pass a DataLoader, or any iterable of "
            "batches."
        )
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    if type(loader).__iter__ is not DataLoader.__iter__:
        return None  # it makes something else of them
    plain = type(loader.batch_sampler) is BatchSampler  # drop_last is for training steps
    items = loader.sampler if plain or loader.batch_sampler is None else loader.batch_sampler
    found: list[int] = []
    item: Any
    try:
        for item in items:
            if plain:
                found.append(operator.index(item))
            else:
                found.extend(map(operator.index, item))
    except TypeError:  # keys, or a data set whose items are batches
        return None
    return found
