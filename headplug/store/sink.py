"""Where finished shards go: to files, written by a thread meanwhile, or to memory.

A bounded number of shards waits for the disk, so that memory is bounded too, and what goes wrong
with one is raised in the caller at the next batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headplug.errors import DataError
from headplug.store.fingerprint import Fingerprint
from headplug.store.ids import Ids, join_ids, with_ids
from headplug.store.shards import LABELS, shard_path, write_shard

WAITING = 1  # shards, besides the one that is being written


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
