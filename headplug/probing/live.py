"""Linear probes on all taps of a model while it runs: nothing is stored.

One pass of a loader through the frozen model trains every setting on every tap, as DINOv2's
evaluation does. With features that fit on disk `extract_features` and `fit_linear` are faster, as
the model then runs once rather than once an epoch; this is for augmented images, and for data whose
features do not fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headplug.device import pick_device
from headplug.errors import DataError, OptionError
from headplug.probing.data import Targets, as_targets, check_features, deviation
from headplug.probing.linear import Joint, LinearModels, LinearSetting, check_settings
from headplug.probing.models import plainly
from headplug.probing.sgd import LinearTraining
from headplug.store.batches import parse
from headplug.taps.modes import evaluating
from headplug.taps.options import Pool, Tap, requested
from headplug.taps.points import Layout
from headplug.taps.reading import Reader


def fit_linear_on(
    model: nn.Module,
    loader: Iterable[Any],
    at: Any,
    settings: Sequence[LinearSetting],
    *,
    training: LinearTraining = LinearTraining(epochs=10),  # noqa: B008 - it is frozen
    pool: Pool = "gap",
    num_classes: int | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
) -> dict[str, LinearModels]:
    """Trains `fit_linear`'s models for every tap on what a model gives for a loader's batches.

    The batches are the loader's (`training.batch_size` says nothing here), an epoch is one pass
    over it. A first pass without training finds the mean and deviation that settings with
    normalize="standard" need, and the number of classes; there is none if no setting standardises
    and `num_classes` is given, or labels are no classes. With a loader that gives the same batches
    each time the models are those of `fit_linear` on stored features.

    Args:
        model: Any module; it runs in eval mode without autograd, where it is, and is left in the
            mode it had.
        loader: Gives `(images, labels, ...)`, and has a length.
        at: Points, see `headplug.taps.points`: one, a list of them or a mapping from names of your
            own to them; a pattern stands for all that it matches.
        settings: The grid, the same on every tap.
        training: How all are trained.
        pool: Makes `(B, D)` of what a tap gives, see `extract_features`.
        num_classes: Left out, the highest label of the first pass plus one.
        seed: Of the weights at the start.
        device: Where the probes are trained; "auto" is where the model is.

    Returns:
        By tap in depth order the models; warnings name settings whose weights overflowed.

    Raises:
        UnknownNameError: A point matches nothing.
        SlotError: `pre_projection` or `projection` of a model without one projection head.
        TapError: A point was not reached.
        DataError: A batch has no labels, or a tap gives something else than a finite row per image.
        OptionError: The loader has no length, a setting has an impossible value, or `training`
            keeps the best epoch, which needs stored features.
        RunError: The weights of every setting of a tap overflowed.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    >>> batches = [(torch.rand(5, 4), torch.arange(5))] * 3
    >>> models = fit_linear_on(model, batches, ["0", "1"], [LinearSetting(0.1)])
    >>> models["1"].predict(torch.rand(2, 8)).shape
    torch.Size([1, 2])
    """
    check_settings(settings)
    if training.keep_best:
        raise OptionError(
            "keep_best needs validation features; store them with extract_features and use "
            "fit_linear."
        )
    try:
        per_epoch = len(loader)  # type: ignore[arg-type]
    except TypeError:
        raise OptionError("the loader has no length; give a DataLoader or a list.") from None
    layout = Layout(model)
    asked = layout.resolve(requested(at, Tap("", 0, pool, False, False, None, None, False)))
    tensors = (*model.parameters(), *model.buffers())
    home = next((t.device for t in tensors), torch.device("cpu"))
    place = home if device == "auto" else pick_device(device)
    steps = training.steps(per_epoch)
    cuda = [d for d in {home, place} if d.type == "cuda"]
    with (
        torch.random.fork_rng(cuda),
        evaluating(layout.model),
        Reader(layout, None, asked, compiled=True) as reader,
    ):
        standard = any(s.normalize == "standard" for s in settings)
        first = next(_read(reader, loader, home, place, num_classes), None)
        if first is None:
            raise DataError("the loader is empty.")
        targets = first[1]
        moments = {tap: _Moments(rows) for tap, rows in first[0].items()}
        if standard or (num_classes is None and targets.kind == "classes"):
            outputs = 0
            for found, some in _read(reader, loader, home, place, num_classes):
                outputs = max(outputs, some.outputs)
                for tap, rows in found.items():
                    moments[tap].add(rows)
            targets = Targets(targets.kind, targets.values, outputs)
        joints = {
            tap: Joint(settings, training, targets, *m.result(), per_epoch, steps, seed)
            for tap, m in moments.items()
        }
        classes = targets.outputs if targets.kind == "classes" else None
        done, before = 0, -1
        while done < steps:
            if done == before:
                raise DataError("the loader gives batches only once; give a DataLoader or a list.")
            before = done
            for found, some in _read(reader, loader, home, place, classes):
                if done == steps:
                    break
                done += 1
                with plainly(place):
                    for tap, rows in found.items():
                        joints[tap].step(rows, some.values)
    return {tap: joint.models(f"tap {tap!r}: ") for tap, joint in joints.items()}


def _read(
    reader: Reader,
    loader: Iterable[Any],
    home: torch.device,
    place: torch.device,
    num_classes: int | None,
) -> Iterator[tuple[dict[str, Tensor], Targets]]:
    """Rows by tap and targets, batch by batch."""
    for batch in loader:
        images, labels, _ = parse(batch)
        if labels is None:
            raise DataError("the loader yields no labels; make it yield (images, labels).")
        found = {}
        for tap, rows in reader(images.to(home, non_blocking=True)).by_depth().items():
            if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != len(images):
                shape = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
                raise DataError(
                    f"tap {tap!r} gives {shape} for {len(images)} images; a probe needs a row for "
                    'each, e.g. with pool="gap" or pool="flat".'
                )
            try:
                found[tap] = check_features(rows.to(place))
            except DataError as error:
                raise DataError(f"tap {tap!r}: {error}") from None
        yield found, as_targets(labels, len(images), num_classes).to(place)


class _Moments:
    """Mean and deviation of rows that come in batches, relative to the mean of the first."""

    def __init__(self, rows: Tensor) -> None:
        self.shift = rows.double().mean(0)
        self.total, self.squares, self.count = torch.zeros_like(self.shift), 0 * self.shift, 0

    def add(self, rows: Tensor) -> None:
        x = rows.double() - self.shift
        self.total += x.sum(0)
        self.squares += x.square_().sum(0)
        self.count += len(rows)

    def result(self) -> tuple[Tensor, Tensor]:
        """Zeros and ones if nothing was added."""
        if not self.count:
            return torch.zeros_like(self.shift), torch.ones_like(self.shift)
        offset = self.total / self.count
        mean = self.shift + offset
        return mean, deviation(self.squares / self.count - offset.square(), mean)
