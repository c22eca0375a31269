"""`headplug extract`: a model and a data set by name, a feature store for each split.

What is typed is checked before anything is loaded: options, then names of the model and its points,
then data, which can take long. Samples have the ids that they have in the data: their row in the
split, and in a folder of images the place of their path in the order of all. Under torchrun every
process does its share, see `headplug.store`.
"""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset

from headplug.compare.data import load_data
from headplug.compare.data.images import Images
from headplug.device import pick_device
from headplug.errors import OptionError, unknown
from headplug.heads.base import positive
from headplug.models import LoadedModel, image_channels, load_model
from headplug.store import extract_features
from headplug.taps.options import Tap, requested
from headplug.taps.points import Layout
from headplug.usual import usual_points

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SPLITS = {"train": ["train"], "test": ["test"], "all": ["train", "test"]}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


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
        at: Points, see `headplug.taps.points`; none for those of `headplug.usual`.
        split: train, test or all.
        pool: gap, flat, cls, cls+gap or tokens, see `headplug.taps.pooling`.
        dtype: float32, float16 or bfloat16.
        normalize: auto (what the model's library or run used, if that is known), imagenet, none, or
            mean and deviation of values in [0, 1] by channel: "0.49,0.48,0.45/0.2,0.2,0.2".
        batch_size: Images a step, on each device.
        workers: Processes that decode images.
        device: auto, cpu, cuda, ...
        image_size: Resize images to squares of this side.
        limit: Take at most this many images of each split; they keep their ids.
        weights: A checkpoint, see `headplug.models`.
        backbone: What is in a checkpoint that does not tell it, see `headplug.models`.
        pretrained: Whether a library's model gets the library's weights, if there are no others.
        show_progress: Whether to show a progress bar.

    Returns:
        `model` and `images` (what they are, in a line), and `stores`: for each split its `split`,
        `folder`, `samples`, `taps` (shapes by name), `dtype`, `computed` (images that the model
        saw) and `images_per_s`.

    Raises:
        OptionError, UnknownNameError: An option cannot be.
        HeadplugError: As `load_model`, `load_data` and `extract_features` do.
    """
    for name, value, known in (("split", split, SPLITS), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise unknown(name, value, known)
    for name, count in (("batch_size", batch_size), ("image_size", image_size), ("limit", limit)):
        if count is not None:
            positive(name, count)
    if workers < 0:
        raise OptionError(f"workers must be 0 or more, not {workers}.")
    how = Tap("", 0, pool, False, False, None, None, False)
    wanted = statistics(normalize)
    place = pick_device(device)
    given = {"weights": weights, "backbone": backbone, "pretrained": pretrained}
    with _processes() as (rank, local):
        loaded = _load(model, (3, image_size or 224, image_size or 224), draft=True, **given)
        layout = Layout(loaded.model, _listing(model, weights, backbone))
        layout.resolve(requested(list(at) or usual_points(layout), how))
        images = load_data(
            data,
            image_size=image_size,
            limit=limit,
            to_train=False,
            splits=SPLITS[split],
            show_progress=show_progress and rank == 0,
        )
        shape = images.train.shape
        loaded = _load(model, shape, **given) if loaded.draft else loaded
        if place.type == "cuda" and place.index is None:
            place = torch.device("cuda", local)
        net = loaded.model.to(place)
        prepare = Prepare(image_channels(net, shape[0]), *wanted or (loaded.mean, loaded.std))
        points = list(at)
        if not at:
            noise = torch.randint(256, (1, *shape), generator=torch.Generator().manual_seed(0))
            points = usual_points(Layout(net), prepare(noise.to(place)), pool)
        stores = []
        for name in SPLITS[split]:
            samples: Images = getattr(images, name)
            batches = BatchSampler(samples.rows.tolist(), batch_size, drop_last=False)
            with _counting(net) as seen:
                started = time.perf_counter()
                store = extract_features(
                    net,
                    DataLoader(
                        ByRow(samples), batch_size=None, sampler=batches, num_workers=workers
                    ),
                    points,
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
    seen_as = f"{images.name}: {shape[1]} x {shape[2]} pixels, {prepare}"
    return {"model": loaded.source, "images": seen_as, "stores": stores}


def statistics(text: str) -> Statistics | None:
    """Mean and deviation of images, by name or as numbers; None for what is known of the model.

    Raises:
        UnknownNameError: It is neither.
        OptionError: There are not as many means as positive deviations.

    >>> statistics("0.5,0.4,0.3/0.2,0.2,0.2")
    ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
    """
    names: dict[str, Statistics | None] = {"auto": None, "imagenet": IMAGENET, "none": ((), ())}
    if text in names:
        return names[text]
    try:
        mean, std = (tuple(map(float, part.split(","))) for part in text.split("/"))
    except ValueError:
        hint = "Or give MEAN/STD by channel, e.g. 0.49,0.48,0.45/0.2,0.2,0.2."
        raise unknown("normalize", text, names, hint) from None
    if len(mean) != len(std) or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise OptionError(
            f"normalize={text!r} must have as many means as deviations, and these above 0."
        )
    return mean, std


class ByRow(Dataset[Any]):
    """Images by the rows that they have in the data, of which a limit leaves some out.

    Args:
        images: They.
    """

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Images uint8 `(B, C, H, W)` and labels `(B,)` of B rows."""
        places = torch.searchsorted(self.images.rows, torch.tensor(rows))
        return self.images[places][:2]


@dataclass(frozen=True)
class Prepare:
    """Makes of uint8 images what a model takes.

    Attributes:
        channels: Greyscale images are repeated to as many.
        mean: Subtracted from values in [0, 1], for each channel or for all; empty for none.
        std: What is then divided by.

    Raises:
        OptionError: There are means for other channels.
    """

    channels: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.mean) not in (0, 1, self.channels):
            raise OptionError(
                f"images are standardised with {len(self.mean)} means, but the model takes "
                f"{self.channels} channel{'s' * (self.channels > 1)}. Pass --normalize with a mean "
                "and a deviation for each."
            )

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


def _load(name: str, shape: tuple[int, int, int], **options: Any) -> LoadedModel:
    """A model whose random weights are the same when this goes on, and on all processes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load_model(name, shape=shape, **options)


def _listing(model: str, weights: Path | None, backbone: str | None) -> str:
    """The command that lists the points of a model."""
    words = ["headplug", "taps", model]
    for option, value in (("--weights", weights), ("--backbone", backbone)):
        words += [option, str(value)] if value else []
    return shlex.join(words)


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
