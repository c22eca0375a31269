"""`headplug extract`: a model and a data set by name, a feature store for each split.

Under torchrun every process does its share, see `headplug.store`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from headplug.compare.data import load_data
from headplug.device import pick_device
from headplug.errors import OptionError, unknown
from headplug.models import load_model
from headplug.store import extract_features

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SPLITS = {"train": ["train"], "test": ["test"], "all": ["train", "test"]}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def extract(
    model: str,
    data: str,
    out: Path,
    at: Sequence[str],
    *,
    split: str = "all",
    pool: str = "gap",
    dtype: str = "float32",
    normalize: str = "auto",
    batch_size: int = 256,
    workers: int = 0,
    device: str = "auto",
    image_size: int | None = None,
    limit: int | None = None,
    weights: Path | None = None,
    backbone: str | None = None,
    pretrained: bool = True,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Extracts features of a data set's splits to `out/train` and `out/test`.

    Args:
        model: See `headplug.models`.
        data: See `headplug.compare.data.load_data`.
        out: Folder of the stores; what is there already is not done again.
        at: Points, see `headplug.taps.points`.
        split: train, test or all.
        pool: gap, flat, cls, cls+gap or tokens, see `headplug.taps.pooling`.
        dtype: float32, float16 or bfloat16.
        normalize: auto (what the model's library or run used, if that is known), imagenet or none.
        batch_size: Images a step, on each device.
        workers: Processes that decode images.
        device: auto, cpu, cuda, ...
        image_size: Resize images to squares of this side.
        limit: Take at most this many images of each split.
        weights: A checkpoint, see `headplug.models`.
        backbone: What is in a checkpoint that does not tell it, see `headplug.models`.
        pretrained: Whether a library's model gets the library's weights, if there are no others.
        show_progress: Whether to show a progress bar.

    Returns:
        `model` and `images` (what they are, in a line), and `stores`: for each split its `split`,
        `folder`, `samples`, `taps` (shapes by name), `dtype`, `computed` (images that the model
        saw) and `images_per_s`.

    Raises:
        HeadplugError: As `load_model`, `load_data` and `extract_features` do.
    """
    for name, value, known in (
        ("split", split, SPLITS),
        ("dtype", dtype, DTYPES),
        ("normalize", normalize, ("auto", "imagenet", "none")),
    ):
        if value not in known:
            raise unknown(name, value, known)
    with _processes() as (rank, local):
        images = load_data(data, image_size=image_size, limit=limit, show_progress=rank == 0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # random weights are the same when this goes on, and everywhere
            loaded = load_model(
                model,
                shape=images.train.shape,
                weights=weights,
                backbone=backbone,
                pretrained=pretrained,
            )
        place = pick_device(device)
        if place.type == "cuda" and place.index is None:
            place = torch.device("cuda", local)
        net = loaded.model.to(place)
        mean, std = {"auto": (loaded.mean, loaded.std), "imagenet": IMAGENET, "none": ((), ())}[
            normalize
        ]
        prepare = Prepare(_channels(net, images.train.shape[0]), tuple(mean), tuple(std))
        stores = []
        for name in SPLITS[split]:
            samples = getattr(images, name)
            batches = BatchSampler(SequentialSampler(samples), batch_size, drop_last=False)
            with _counting(net) as seen:
                started = time.perf_counter()
                store = extract_features(
                    net,
                    DataLoader(samples, batch_size=None, sampler=batches, num_workers=workers),
                    list(at),
                    out / name,
                    pool=pool,
                    dtype=DTYPES[dtype],
                    transform=prepare,
                    show_progress=show_progress,
                )
                seconds = time.perf_counter() - started
            stores.append(
                {
                    "split": name,
                    "folder": str(out / name),
                    "samples": len(store),
                    "taps": store.shapes,
                    "dtype": dtype,
                    "computed": (computed := _total(seen)),
                    "images_per_s": computed / seconds,
                }
            )
    return {"model": loaded.source, "images": f"{images.name}: {prepare}", "stores": stores}


@dataclass(frozen=True)
class Prepare:
    """Makes of uint8 images what a model takes.

    Attributes:
        channels: Greyscale images are repeated to as many.
        mean: Subtracted from values in [0, 1], by channel; empty for none.
        std: What is then divided by.
    """

    channels: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __call__(self, images: Tensor) -> Tensor:
        """Floats `(B, C, H, W)` from uint8 `(B, C, H, W)` or `(B, 1, H, W)`."""
        x = (images.float() / 255).expand(-1, self.channels, -1, -1)
        if not self.mean:
            return x
        shape = (1, -1, 1, 1)
        return (x - x.new_tensor(self.mean).view(shape)) / x.new_tensor(self.std).view(shape)

    def __str__(self) -> str:
        """What is done, in words."""
        if not self.mean:
            return "values in [0, 1], not standardised"
        numbers = ("/".join(f"{v:.3g}" for v in values) for values in (self.mean, self.std))
        return "standardised with mean {} and deviation {}".format(*numbers)


def _channels(model: nn.Module, given: int) -> int:
    """How many channels a model takes of images that have some."""
    takes = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), given)
    if takes != given and given != 1:
        raise OptionError(f"the model takes images of {takes} channels, and these have {given}.")
    return takes


@contextmanager
def _counting(model: nn.Module) -> Iterator[list[int]]:
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        yield seen
    finally:
        handle.remove()


def _total(seen: Sequence[int]) -> int:
    """How many images all processes computed."""
    count = torch.tensor(sum(seen))
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
    return int(count)


@contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """This process's rank and local rank; those that torchrun started get to know each other."""
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    if several:
        dist.init_process_group("gloo")
    try:
        yield int(os.environ.get("RANK") or 0), int(os.environ.get("LOCAL_RANK") or 0)
    finally:
        if several:
            dist.destroy_process_group()
