"""A linear probe for every learning rate, weight decay and normalisation, trained in one pass.

Settings that see the features alike share every matrix product, see `headplug.probing.sgd`. No
global state is touched, and the features are not copied: a batch is normalised when it is read.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from headplug.errors import DimensionError, OptionError, RunError
from headplug.probing.data import Targets, as_targets, check_features, mean_and_std
from headplug.probing.losses import losses
from headplug.probing.models import (
    LinearModels,
    Normalize,
    blocks,
    by_normalization,
    normalized,
    number,
    plainly,
)
from headplug.probing.sgd import JointSGD, LinearTraining

__all__ = ["LinearModels", "LinearSetting", "LinearTraining", "fit_linear", "linear_grid"]


class LinearSetting(NamedTuple):
    """One way to train.

    Attributes:
        lr: Learning rate at the start, per batch mean.
        weight_decay: As in `torch.optim.SGD`, of the weights and the bias.
        normalize: What the probe sees of the features: "standard" (each less its mean in training,
            divided by its standard deviation), "l2" (each sample scaled to length 1) or "none".
    """

    lr: float
    weight_decay: float = 0.0
    normalize: Normalize = "standard"


def linear_grid(
    lrs: Sequence[float] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    weight_decays: Sequence[float] = (0.0, 1e-3, 1e-2),
    normalize: Sequence[Normalize] = ("standard",),
) -> list[LinearSetting]:
    """Every normalisation with every learning rate with every weight decay.

    >>> len(linear_grid())
    18
    """
    return [LinearSetting(lr, wd, how) for how in normalize for lr in lrs for wd in weight_decays]


def fit_linear(
    features: Tensor,
    labels: Tensor | Targets,
    settings: Sequence[LinearSetting],
    *,
    num_classes: int | None = None,
    training: LinearTraining = LinearTraining(),  # noqa: B008 - it is frozen
    validation: tuple[Tensor, Tensor | Targets] | None = None,
    seed: int = 0,
) -> LinearModels:
    """Trains one linear model a setting, all on the same batches.

    Each equals `torch.optim.SGD` on an `nn.Linear` with torch's scheduler, on features normalised
    as the setting says; the loss is softmax cross-entropy for classes, sigmoid cross-entropy (the
    mean over labels) for labels and the mean squared error for numbers. Each epoch is one
    `torch.randperm` of a CPU generator with the seed, cut by `tensor_split` into the fewest batches
    of at most `batch_size`, so that none is much smaller than the others.

    Args:
        features: Training features `(N, D)`.
        labels: What to predict, see `headplug.probing.data.as_targets`.
        settings: The grid.
        num_classes: Left out, the highest label plus one.
        training: How all settings are trained.
        validation: Features and labels that `training.keep_best` needs.
        seed: Of the order of the samples and of the weights at the start.

    Returns:
        The models. A warning names settings whose weights overflowed; they predict -1 or NaN.

    Raises:
        DataError: Features or labels cannot be used.
        DimensionError: The validation features have another width.
        OptionError: A setting has an impossible value, or `validation` and `keep_best` are not
            given together.
        RunError: The weights of every setting overflowed.

    >>> x = torch.tensor([[0.0], [1.0], [4.0], [5.0]])
    >>> fit_linear(x, torch.tensor([0, 0, 1, 1]), [LinearSetting(0.1)]).predict(x)
    tensor([[0, 0, 1, 1]])
    """
    features = check_features(features)
    targets = as_targets(labels, len(features), num_classes).to(features.device)
    check_settings(settings)
    if training.keep_best != (validation is not None):
        raise OptionError(
            "LinearTraining(keep_best=True) and validation=(features, labels) go together; give "
            "both or neither."
        )
    per_epoch = math.ceil(len(features) / training.batch_size)
    steps = training.steps(per_epoch)
    with plainly(features.device):
        mean, std = mean_and_std(features)
        joint = Joint(settings, training, targets, mean, std, per_epoch, steps, seed)
        held = None if validation is None else _held(validation, targets, features.shape[1])
        order = batches(len(features), per_epoch, seed, features.device)
        most = math.ceil(len(features) / per_epoch)
        batch = [t.new_empty(most, *t.shape[1:]) for t in (features, targets.values)]
        for step, index in enumerate(islice(order, steps), 1):
            rows, values = (some[: index.shape[0]] for some in batch)
            torch.index_select(features, 0, index, out=rows)
            torch.index_select(targets.values, 0, index, out=values)
            joint.step(rows, values)
            if held and (step % per_epoch == 0 or step == steps):
                joint.validate(*held)
        return joint.models()


class Joint:
    """A linear probe of all settings on one tap, while it is trained.

    Args:
        settings: The grid.
        training: How.
        targets: Of which kind, how many outputs, on which device.
        mean: Of the training features `(D,)`.
        std: Of the training features `(D,)`.
        per_epoch: Steps an epoch.
        steps: Steps in all.
        seed: Of the weights at the start.
    """

    def __init__(
        self,
        settings: Sequence[LinearSetting],
        training: LinearTraining,
        targets: Targets,
        mean: Tensor,
        std: Tensor,
        per_epoch: int,
        steps: int,
        seed: int,
    ) -> None:
        self.settings, self.kind = settings, targets.kind
        self.mean, self.std = mean.float(), std.float()
        self.some = by_normalization([s.normalize for s in settings])
        self.sgd = {
            how: JointSGD(
                [settings[i][:2] for i in some],
                training,
                targets.kind,
                len(mean),
                targets.outputs,
                per_epoch,
                steps,
                seed,
                mean.device,
            )
            for how, some in self.some.items()
        }

    def step(self, rows: Tensor, values: Tensor) -> None:
        """One batch of features `(B, D)` with the values of its targets."""
        for how, sgd in self.sgd.items():
            sgd.step(normalized(rows, how, self.mean, self.std), values)

    def validate(self, features: Tensor, targets: Targets) -> None:
        """Ends an epoch: settings that do better than ever on these samples keep their weights."""
        for how, sgd in self.sgd.items():
            total = torch.zeros_like(sgd.best)
            for rows in blocks(len(features), features.shape[1] + len(sgd.weight)):
                z = normalized(features[rows], how, self.mean, self.std)
                found = losses(self.kind, sgd.scores(z), targets.values[rows].to(z.device))
                total += found * len(z) / len(features)
            sgd.validated(total)

    def models(self, what: str = "") -> LinearModels:
        """The models as they are now.

        Args:
            what: How messages begin.

        Raises:
            RunError: The weights of every setting overflowed.
        """
        first = next(iter(self.sgd.values()))
        count, (outputs, _) = len(self.settings), first.shape
        weight = first.weight.new_empty(count, outputs, len(self.mean))
        bias = weight.new_empty(count, outputs)
        for how, some in self.some.items():
            weight[some], bias[some] = self.sgd[how].result()
        normalize = tuple(s.normalize for s in self.settings)
        models = LinearModels(self.kind, normalize, self.mean, self.std, weight, bias)
        report_lost(models.finite, self.settings, what)
        return models


def check_settings(settings: Sequence[LinearSetting]) -> None:
    """Raises what is wrong with a grid.

    Raises:
        OptionError: It is empty, or a value is impossible.
    """
    if not settings:
        raise OptionError("there are no settings; take linear_grid(), or [LinearSetting(0.1)].")
    for s in settings:
        number(f"lr in {s}", s.lr, zero=False)
        number(f"weight_decay in {s}", s.weight_decay, zero=True)
        if s.normalize not in ("standard", "l2", "none"):
            raise OptionError(f'normalize is "standard", "l2" or "none", not {s.normalize!r}.')


def report_lost(
    finite: Tensor, settings: Sequence[object], what: str = "", stacklevel: int = 4
) -> None:
    """Names the settings whose weights overflowed.

    Raises:
        RunError: All did.
    """
    lost = [s for s, kept in zip(settings, finite.tolist(), strict=True) if not kept]
    if len(lost) == len(settings):
        raise RunError(
            f"{what}the weights overflowed with every setting of {lost}; lower lr or weight_decay."
        )
    if lost:
        message = f"{what}left out, because their weights overflowed: {lost}."
        warnings.warn(message, stacklevel=stacklevel)


def _held(
    validation: tuple[Tensor, Tensor | Targets], targets: Targets, width: int
) -> tuple[Tensor, Targets]:
    features = check_features(validation[0])
    if features.shape[1] != width:
        raise DimensionError(
            f"the validation features have {features.shape[1]} values a sample and the training "
            f"features {width}; take both from the same tap."
        )
    classes = targets.outputs if targets.kind == "classes" else None
    held = as_targets(validation[1], len(features), classes)
    if (held.kind, held.outputs) != (targets.kind, targets.outputs):
        raise OptionError(
            f"the training labels are {targets.kind} with {targets.outputs} outputs, the validation"
            f" labels {held.kind} with {held.outputs}; give both alike."
        )
    return features, held


def batches(count: int, per_epoch: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Row numbers of one batch after another, epoch by epoch, see `fit_linear`."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator, device="cpu")
        yield from order.to(device).tensor_split(per_epoch)
