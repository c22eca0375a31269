"""How far each augmentation moves features, at every tap, in one pass over the data."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headplug.errors import DataError, OptionError
from headplug.progress import progress
from headplug.store.batches import parse
from headplug.store.loaders import same_random_state
from headplug.store.model import TappedModel
from headplug.taps.options import Pool


@torch.no_grad()
def invariance(
    model: nn.Module,
    loader: Iterable[Any],
    augmentations: Mapping[str, Callable[[Tensor], Tensor]],
    at: Any,
    *,
    pool: Pool = "gap",
    transform: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> list[dict[str, Any]]:
    """How far augmentations move the features of a sample, against another sample's.

    `distance_ratio = E ||h(x) - h(a(x))||^2 / E ||h(x) - h(x')||^2`, x and x' different samples:
    0 for features that do not see the augmentation, 1 for features to which an augmented image is
    as good as another one. The model runs in eval mode and is afterwards as it was.

    Args:
        model: As `extract_features` takes it.
        loader: Batches of images, or of images and more, without random augmentation.
        augmentations: By name, functions from a batch of images, on the model's device, to as many.
        at: Taps, as `extract_features` takes them.
        pool: How features become rows.
        transform: Applied to images after the augmentation, e.g. to normalise them.
        seed: Of what augmentations draw from the generators of Python, NumPy and torch, each by its
            name, whatever others there are. The generators are put back afterwards.
        show_progress: Whether to show a progress bar.

    Returns:
        A dict a tap and augmentation: `tap`, `augmentation`, `distance_ratio`, `cosine` (mean of
        cos(h(x), h(a(x)))), `samples`, and `why`, for what is None.

    Raises:
        OptionError: There is no augmentation.
        DataError: The loader gives no two images, an augmentation changes their number, or features
            are not finite; the message names the tap.
        HeadplugError: As `extract_features`, for what is wrong with the model and its taps.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    >>> batches = [torch.rand(8, 3, 2, 2) for _ in range(2)]
    >>> [row] = invariance(model, batches, {"flip": lambda x: x.flip(-1)}, "1")
    >>> row["tap"], row["augmentation"], row["samples"]
    ('1', 'flip', 16)
    """
    if not augmentations:
        raise OptionError("name at least one augmentation: {'flip': lambda x: x.flip(-1)}.")
    tapped = TappedModel(model, at, pool, torch.float32, transform)
    spread: dict[str, _Spread] = {}
    moved: dict[tuple[str, str], _Moved] = {}
    total = len(loader) if isinstance(loader, Sized) else None
    with (
        tapped.open() as read,
        _drawing(tapped.device, loader, seed),
        progress("invariance", total, show=show_progress) as advance,
    ):
        for number, batch in enumerate(loader):
            images = parse(batch)[0].to(tapped.device)
            plain = _arrived(tapped, read(images))
            for tap, rows in plain.items():
                spread.setdefault(tap, _Spread(rows.shape[1:].numel())).update(tap, rows)
            for name, augment in augmentations.items():
                with _drawing(tapped.device, None, seed, name, number):
                    changed = augment(images.clone())
                if not isinstance(changed, Tensor) or len(changed) != len(images):
                    raise DataError(
                        f"augmentation {name!r} must give {len(images)} images for as many."
                    )
                for tap, rows in _arrived(tapped, read(changed)).items():
                    moved.setdefault((tap, name), _Moved()).update(tap, plain[tap], rows)
            advance("")
    if not spread or next(iter(spread.values())).count < 2:
        raise DataError("the loader gives fewer than two images.")
    return [
        {"tap": tap, "augmentation": name, **moved[tap, name].row(spread[tap])}
        for tap in spread
        for name in augmentations
    ]


@contextmanager
def _drawing(device: torch.device, loader: Any, *seed: Any) -> Iterator[None]:
    """Seeds the global generators, whose state and that of the loader's are put back afterwards."""
    number = random.Random(repr(seed)).getrandbits(32)
    devices = [device] if device.type == "cuda" else []
    with same_random_state(loader), torch.random.fork_rng(devices):
        random.seed(number)
        numpy.random.seed(number)
        torch.default_generator.manual_seed(number)  # torch.manual_seed seeds all other devices too
        if devices:
            torch.cuda.default_generators[device.index].manual_seed(number)
        yield


class _Spread:
    """Mean squared distance of two samples, streamed: twice the variance, over all features."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64, device="cpu")
        self._total = 0.0

    def update(self, tap: str, rows: Tensor) -> None:
        rows = rows.flatten(1).double()
        if not rows.isfinite().all():
            raise DataError(f"the features at {tap!r} hold NaN or infinity.")
        count = self.count + len(rows)
        middle = rows.mean(0)
        step = middle - self._mean
        self._total += float((rows - middle).square().sum())
        self._total += float(step.square().sum()) * self.count * len(rows) / count
        self._mean += step * len(rows) / count
        self.count = count

    @property
    def between(self) -> float:
        """0 where samples differ by no more than rounding does."""
        found = 2 * self._total / (self.count - 1)
        rounding = torch.finfo(torch.float32).eps ** 2 * float(self._mean.square().sum())
        return found if found > rounding else 0.0


class _Moved:
    """Distances and angles between samples and what an augmentation makes of them."""

    def __init__(self) -> None:
        self._distances = self._cosines = 0.0
        self._zero = self._count = 0

    def update(self, tap: str, rows: Tensor, changed: Tensor) -> None:
        one, two = rows.flatten(1).double(), changed.flatten(1).double()
        if one.shape != two.shape:
            raise DataError(
                f"the features at {tap!r} have shape {tuple(rows.shape)} before an augmentation "
                f"and {tuple(changed.shape)} after it; pool them, e.g. pool='gap'."
            )
        distances = (one - two).square().sum(1)
        if not distances.isfinite().all():
            raise DataError(f"the features of augmented images at {tap!r} hold NaN or infinity.")
        self._distances += float(distances.sum())
        self._cosines += float(F.cosine_similarity(one, two, eps=1e-150).sum())
        self._zero += int(((one == 0).all(1) | (two == 0).all(1)).sum())
        self._count += len(one)

    def row(self, spread: _Spread) -> dict[str, Any]:
        """What was found, over how far samples are from each other."""
        between = spread.between
        why = {}
        if not between:
            why["distance_ratio"] = "the features are the same for all samples."
        if self._zero:
            why["cosine"] = f"the features of {self._zero} samples are zero, and have no angle."
        return {
            "distance_ratio": None if not between else self._distances / self._count / between,
            "cosine": None if self._zero else self._cosines / self._count,
            "samples": self._count,
            "why": why,
        }


def _arrived(tapped: TappedModel, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    event = tapped.arrived()
    if event:
        event.synchronize()
    return rows
