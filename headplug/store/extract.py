"""Running a model over a loader once and keeping what its taps see.

The shard is the unit of work. Which samples a shard holds, and in which batches the model meets
them, depends on the loader alone, so the files are the same whatever was interrupted and however
many processes took part; what is finished is neither computed nor, where the loader's samples can
be read one by one, loaded again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headplug.errors import RunError
from headplug.heads.base import positive
from headplug.ranks import Team, team
from headplug.store.blocks import Loose, check, joined
from headplug.store.features import FeatureStore
from headplug.store.fingerprint import Fingerprint, differences
from headplug.store.folder import INDEX, claimed, look, prepare, write_index
from headplug.store.loaders import Stream, open_loader, same_random_state
from headplug.store.model import TappedModel
from headplug.store.shards import Shard, shard_path
from headplug.store.work import Sink, Work
from headplug.taps.options import Pool


def extract_features(
    model: nn.Module,
    loader: Iterable[Any],
    at: Any,
    out: str | Path | None = None,
    *,
    pool: Pool = "gap",
    dtype: torch.dtype = torch.float32,
    transform: Callable[[Tensor], Tensor] | None = None,
    shard_size: int = 4096,
    distributed: bool = True,
    show_progress: bool = False,
) -> FeatureStore:
    """Runs a model over a loader once and keeps what the taps see.

    With `out` an extraction that was interrupted goes on after its last whole shard when it is
    called again, also with another number of processes; one that is finished is checked and
    returned, and shards that are damaged are named in a warning and made anew. Under
    torch.distributed every process calls this, does its share and gets the whole store.

    Args:
        model: Any module; it runs in eval mode without autograd, and is left in the mode it had.
            On several processes all use the first one's buffers meanwhile, as DDP does; what
            fully_shard spreads over them they run together; if one fails, start all again
            before you train on.
        loader: A DataLoader over a data set with a length: each sample that its sampler names is
            read once, in the order of its index, whatever it shuffles, repeats or drops as an
            incomplete batch. Or any iterable of batches: samples are kept in the order of their
            ids, which must differ. A batch is `images`, `(images,)`, `(images, labels)` or
            `(images, labels, ids)`; labels `(B,)` or `(B, K)`, integers or floats; ids integers or
            strings.
        at: Points, see `headplug.taps.points`: one, a list of them or a mapping from your names to
            them; a pattern stands for all that it matches.
        out: A folder to write to; left out, the store is in memory. What is there is gone on with
            if the data are the same: eight samples and the indices are compared, or the first
            batch and the number of batches.
        pool: Makes rows of what a tap gives: "gap", "flat", "cls", "cls+gap", "tokens", see
            `headplug.taps.pooling`, or a callable that gives `(B, D)` or `(B, ...)`.
        dtype: Of the features in the store, e.g. torch.float16 for half the space.
        transform: Applied to each batch on the model's device, e.g. a normalisation.
        shard_size: About how many samples to keep in a file; about three times as many are in
            memory at a time, so take fewer for maps and tokens.
        distributed: Whether the processes of torch.distributed, where it is initialised, share the
            work; False where one of them alone calls this.
        show_progress: Whether to show a progress bar.

    Returns:
        The store, samples in the order of their ids, taps in depth order.

    Raises:
        UnknownNameError: A point matches nothing.
        SlotError: `pre_projection` or `projection` of a model without one projection head.
        TapError: A point was not reached.
        OptionError: `shard_size`, `dtype` or `pool` cannot be.
        DataError: The loader is empty or yields something else than such batches; or a tap, or
            `pool`, gives something else than a row per image.
        RunError: `out` holds features of another extraction (the message says what differs),
            another process writes there, or it cannot be written; another process failed, does
            not take part, or its model or options differ; or the model has no values yet.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    >>> batches = [(torch.rand(5, 4), torch.arange(5)), (torch.rand(3, 4), torch.arange(3))]
    >>> extract_features(model, batches, at=["0", "1"])
    FeatureStore(8 samples; 0: 8, 1: 8)
    """
    folder = None if out is None else Path(out).absolute()
    with (
        torch.inference_mode(False),  # probes may train on what is kept
        torch.no_grad(),
        team(distributed) as ranks,
        same_random_state(loader),
        ExitStack() as stack,
    ):
        _alike(ranks.each(lambda: (str(out), shard_size)))
        tapped = ranks.own(lambda: TappedModel(model, at, pool, dtype, transform))
        if folder is not None and not (folder / INDEX).is_file():
            ranks.first(lambda: prepare(folder))
        samples = open_loader(loader, ranks, positive("shard_size", shard_size))
        fingerprint: Fingerprint = {}
        whole: set[int] = set()
        buffers: AbstractContextManager[None] = nullcontext()
        if folder is not None or ranks.size > 1:
            prints = ranks.each(lambda: {**tapped.fingerprint(), **samples.fingerprint()})
            fingerprint = prints[0]
            buffers = _agreed(prints, tapped.layout.root, ranks)
        if folder is not None:
            left = ranks.first(lambda: look(folder, fingerprint))
            if left.finished:
                return FeatureStore.open(folder)
            whole = left.whole
            if left.damaged and ranks.rank == 0:
                warnings.warn(f"{left.damaged} What is damaged is made anew.", stacklevel=2)
            ranks.first(lambda: stack.enter_context(claimed(folder)))
        work = Work(tapped, samples, Sink(folder, fingerprint), whole, ranks)
        with buffers:
            made = ranks.each(lambda: work(show_progress and ranks.rank == 0))
        blocks = {number: block for part in made for number, block in part.items()}
        if folder is None:
            return FeatureStore([joined([Loose(blocks[n]) for n in sorted(blocks)])])
        numbers = sorted(whole | blocks.keys())
        if isinstance(samples, Stream) and (gone := whole - blocks.keys()):
            raise RunError(
                f"the loader gives fewer samples than when shard {min(gone)} in {folder} was "
                "written. Give it the same data, or name another folder."
            )
        ranks.first(lambda: _finish(folder, numbers, fingerprint))
        return FeatureStore.open(folder)


def _finish(folder: Path, numbers: Sequence[int], fingerprint: Fingerprint) -> None:
    """Writes the index, if all shards are there and fit together."""
    shards = [Shard(shard_path(folder, number)) for number in numbers]
    check(shards)
    write_index(folder, shards, fingerprint)


def _agreed(
    prints: Sequence[Fingerprint], model: nn.Module, ranks: Team
) -> AbstractContextManager[None]:
    """Whether all processes are about to do the same; and the first one's buffers, if they differ.

    Raises:
        RunError: They are not.
    """
    buffers = False
    for rank, other in enumerate(prints):
        same = {**other, "buffers": prints[0]["buffers"]}
        unlike = differences(prints[0], same, ("on process 0", f"on process {rank}"))
        buffers |= other["buffers"] != prints[0]["buffers"]
        if unlike:
            raise RunError(
                f"{' and '.join(unlike)}: process {rank} has others than process 0. Load the same "
                "checkpoint and data set on all of them, and ask for the same."
            )
    return _buffers_of_first(model, ranks) if buffers else nullcontext()


def _alike(asked: Sequence[tuple[str, int]]) -> None:
    """Checks that all processes write to one folder in the same way."""
    for rank, other in enumerate(asked):
        if other != asked[0]:
            raise RunError(
                "all processes must pass the same out and shard_size: process 0 has "
                f"{asked[0][0]} and {asked[0][1]}, process {rank} has {other[0]} and {other[1]}."
            )


@contextmanager
def _buffers_of_first(model: nn.Module, ranks: Team) -> Iterator[None]:
    """Under DDP each process has its own BatchNorm statistics, and the first one's are saved."""
    own = {name: buffer.clone() for name, buffer in model.named_buffers()}
    shared = ranks.first(lambda: {name: buffer.cpu() for name, buffer in own.items()})
    try:
        for name, buffer in model.named_buffers():
            buffer.copy_(shared[name])
        yield
    finally:
        for name, buffer in model.named_buffers():
            buffer.copy_(own[name])
