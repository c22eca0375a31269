"""One process's share of an extraction: rows of features, and where finished shards of them go.

They go to files, written by a thread meanwhile, or to memory. A bounded number of shards waits for
the disk, so that memory is bounded too, and what goes wrong with one is raised in the caller at the
next batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headplug.errors import DataError, RunError
from headplug.progress import progress
from headplug.ranks import Team
from headplug.store.batches import Batch, Ids, join_ids
from headplug.store.blocks import LABELS, ids_of, with_ids
from headplug.store.fingerprint import Fingerprint
from headplug.store.loaders import Listed, Stream
from headplug.store.model import TappedModel
from headplug.store.shards import Shard, shard_path, write_shard

WAITING = 1  # shards, besides the one that is being written


class Work:
    """One process's share of the shards.

    Args:
        model: What computes rows.
        samples: What there is to read.
        sink: Takes the shards.
        whole: Numbers of the shards that are there.
        ranks: The processes that share the work.
    """

    def __init__(
        self,
        model: TappedModel,
        samples: Listed | Stream,
        sink: Sink,
        whole: set[int],
        ranks: Team,
    ) -> None:
        self.model, self.samples, self.sink, self.whole = model, samples, sink, whole
        self.ranks = ranks
        self.made: dict[int, dict[str, Tensor]] = {}

    def __call__(self, show: bool) -> dict[int, dict[str, Tensor]]:
        """Does it.

        Returns:
            By number the shards that were made (their tensors, where no folder takes them) or met.
        """
        listed = isinstance(self.samples, Listed)
        total = self.samples.count(self.whole)
        what = "features" if listed else "features (batches)"
        with (
            self.model.open() as rows_of,
            self.sink as sink,
            progress(what, total, show=show) as advance,
        ):
            parts: dict[str, list[Tensor]] = {}
            ids: list[Ids] = []
            number = 0
            for batch, images in self._batches():
                found = {} if images is None else rows_of(images)
                if batch is None:
                    continue
                number, last, _, labels, names = batch
                ids.append(names)
                if labels is not None:
                    parts.setdefault(LABELS, []).append(labels)
                if number not in self.whole:
                    for point, rows in found.items():
                        parts.setdefault(point, []).append(rows)
                sink.check()
                advance("", len(names) if listed else 1)
                if last:
                    self._end(number, parts, ids)
                    parts, ids = {}, []
            if ids:
                self._end(number, parts, ids)
        return {**self.made, **sink.kept}

    def _batches(self) -> Iterator[tuple[Batch | None, Tensor | None]]:
        """Batches, and what to run the model on, if anything.

        Where FSDP spreads the weights, all processes run it as long as one has to.
        """
        batches = self.samples.batches(self.whole)
        if not self.model.in_step:
            for batch in batches:
                yield batch, None if batch.shard in self.whole else batch.images
            return
        some = self.ranks.each(self.samples.example)
        example = next(image for image in some if image is not None)
        taken: list[Batch] = []

        def take() -> tuple[bool, bool]:
            self.sink.check()
            taken[:] = islice(batches, 1)
            return bool(taken), any(batch.shard not in self.whole for batch in taken)

        while True:
            there, runs = zip(*self.ranks.each(take), strict=True)
            if not any(there):
                return
            own = taken[0] if taken else None
            yield own, (own.images if own else example) if any(runs) else None

    def _end(self, number: int, parts: dict[str, list[Tensor]], ids: list[Ids]) -> None:
        """Hands over a shard; one that is there must be of the same samples."""
        self.made[number] = {}
        if number not in self.whole:
            self.sink.put(number, parts, ids, self.model.arrived())
        elif self.sink.folder is not None:
            there, here = ids_of(Shard(shard_path(self.sink.folder, number))), join_ids(ids)
            if list(there) != list(here):
                raise RunError(
                    f"the loader gives other samples, or in another order, than when shard {number}"
                    f" in {self.sink.folder} was written. Seed it as it was then, or name another "
                    "folder."
                )


class Sink:
    """Takes shards and writes them in the background; on leaving the block all are there.

    Args:
        folder: Where to write; None keeps them.
        fingerprint: Of the extraction.

    Attributes:
        kept: The tensors of each shard by number, where there is no folder.
    """

    def __init__(self, folder: Path | None, fingerprint: Fingerprint) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.kept: dict[int, dict[str, Tensor]] = {}
        self._thread = ThreadPoolExecutor(1, "headplug-writer")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=True)  # a shard that is whole is kept, whatever happened
        if failed is None:
            self._settle(0)

    def put(
        self,
        number: int,
        parts: Mapping[str, Sequence[Tensor]],
        ids: Sequence[Ids],
        arrived: torch.cuda.Event | None = None,
    ) -> None:
        """Takes a shard, in the parts that its batches gave; waits if too many others do.

        Args:
            number: Of the shard.
            parts: Features of each tap, and labels.
            ids: Of the samples.
            arrived: When copies from the GPU that are under way are there.

        Raises:
            RunError: An earlier one could not be written.
            DataError: An earlier one does not fit its dtype.
        """
        self._waiting.append(self._thread.submit(self._finish, number, parts, ids, arrived))
        self._settle(WAITING + 1)

    def check(self) -> None:
        """Raises what went wrong with an earlier shard, without waiting for any."""
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft().result()

    def _settle(self, left: int) -> None:
        while len(self._waiting) > left:
            self._waiting.popleft().result()

    def _finish(
        self, number: int, parts: Mapping[str, Sequence[Tensor]], ids: Sequence[Ids], arrived: Any
    ) -> None:
        if arrived is not None:
            arrived.synchronize()
        tensors = {}
        count = sum(map(len, ids))
        for name, values in parts.items():
            what = "the labels" if name == LABELS else f"the features at {name!r}"
            if sum(map(len, values)) != count:
                raise DataError(f"{what} are missing in some batches and there in others.")
            if len(shapes := {tuple(v.shape[1:]) for v in values}) > 1:
                raise DataError(
                    f"{what} have shapes {' and '.join(map(str, sorted(shapes)))} for one sample "
                    "in different batches; only one shape can be kept. Pool them, or resize the "
                    "images."
                )
            tensors[name] = torch.cat(list(values))
            if tensors[name].dtype == torch.float16 and tensors[name].isinf().any():
                raise DataError(
                    f"{name!r} has values beyond float16, whose largest is 65504; take "
                    "dtype=torch.bfloat16 or float32."
                )
        tensors = with_ids(tensors, join_ids(ids))
        if self.folder is None:
            self.kept[number] = tensors
        else:
            write_shard(shard_path(self.folder, number), tensors, self.fingerprint)
