"""A linear probe for every learning rate and weight decay of a grid, trained in one pass.

The weights of all settings lie side by side, so that a batch costs one matrix product for the whole
grid, forwards and backwards; the gradient of the softmax is written out and nothing is recorded for
autograd. No global state is touched: probabilities are kept above the smallest that matter, which
keeps denormal numbers (several times slower on a CPU) out of every product.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from headplug.errors import DimensionError, OptionError, RunError
from headplug.heads.base import positive
from headplug.probing.data import check_features, check_labels, chunks, mean_and_std

MOMENTUM = 0.9
FLOOR = 1e-20  # of a probability; far below float32's resolution next to 1, far above denormals


class LinearSetting(NamedTuple):
    """One way to train.

    Attributes:
        lr: Learning rate at the start, per batch mean; it falls to zero along a half cosine.
        weight_decay: As in `torch.optim.SGD`, of the weights and the bias.
    """

    lr: float
    weight_decay: float = 0.0


def linear_grid(
    lrs: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    weight_decays: Sequence[float] = (0.0, 1e-3, 1e-2),
) -> list[LinearSetting]:
    """Every learning rate with every weight decay.

    >>> len(linear_grid())
    18
    """
    return [LinearSetting(lr, wd) for lr in lrs for wd in weight_decays]


@dataclass(frozen=True, eq=False)
class LinearModels:
    """Linear classifiers, one a setting, on features standardised alike.

    Attributes:
        mean: Of the training features, subtracted first `(D,)`.
        std: Of the training features, divided by next `(D,)`.
        weight: `(D, C, S)`, for standardised features.
        bias: `(C, S)`.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def finite(self) -> Tensor:
        """Whether each setting's weights are finite numbers `(S,)`."""
        return torch.isfinite(self.weight.sum(dim=(0, 1)) + self.bias.sum(dim=0))

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Predicted classes `(S, N)`; -1 everywhere for a setting that is not finite.

        Raises:
            DimensionError: The features have another width than those it was fitted on.
            DataError: The features cannot be used.
        """
        features = check_features(features)
        if features.shape[1] != len(self.weight):
            raise DimensionError(
                f"the probe was fitted on {len(self.weight)} features a sample and is given "
                f"{features.shape[1]}; take both from the same tap."
            )
        flat = self.weight.flatten(1)
        parts = []
        for block in chunks(features):
            z = block.float().sub(self.mean).div_(self.std)
            scores = torch.addmm(self.bias.flatten(), z, flat).unflatten(1, self.bias.shape)
            parts.append(scores.argmax(dim=1))
        return torch.cat(parts).T.where(self.finite[:, None], -1)


@torch.no_grad()
def fit_linear(
    features: Tensor,
    labels: Tensor,
    settings: Sequence[LinearSetting],
    *,
    num_classes: int | None = None,
    epochs: int = 100,
    max_steps: int = 1500,
    batch_size: int = 512,
    seed: int = 0,
) -> LinearModels:
    """Trains one softmax classifier a setting, all on the same batches.

    Each equals `torch.optim.SGD(momentum=0.9)` on an `nn.Linear` that starts at zero, with
    `CosineAnnealingLR` over all steps, on features standardised by the training mean and deviation.
    Lightly's `LinearClassifier` is the same without standardisation and weight decay. Each epoch is
    one `torch.randperm` of a CPU generator with the seed, cut by `tensor_split` into the fewest
    batches of at most `batch_size`. `max_steps` bounds the time on large data: 1500 steps of 512
    are 15 epochs of 50,000 samples.

    Args:
        features: Training features `(N, D)`.
        labels: Their classes `(N,)`.
        settings: The grid.
        num_classes: Left out, the highest label plus one.
        epochs: Passes over the data, at most.
        max_steps: Batches, at most.
        batch_size: Samples a batch, at most.
        seed: Of the order of the samples.

    Returns:
        The classifiers. A warning names settings whose weights overflowed; they predict -1.

    Raises:
        DataError: Features or labels cannot be used.
        OptionError: A setting or a size has an impossible value.
        RunError: The weights of every setting overflowed.

    >>> x = torch.tensor([[0.0], [1.0], [4.0], [5.0]])
    >>> fit_linear(x, torch.tensor([0, 0, 1, 1]), [LinearSetting(0.1)]).predict(x)
    tensor([[0, 0, 1, 1]])
    """
    features = check_features(features)
    labels, classes = check_labels(labels, len(features), num_classes)
    for name, value in {"epochs": epochs, "max_steps": max_steps, "batch_size": batch_size}.items():
        positive(name, value)
    for s in settings:
        if not (math.isfinite(s.lr) and s.lr > 0 and math.isfinite(s.weight_decay)):
            raise OptionError(f"lr must be positive and both values finite in {s}.")
    count, width = features.shape
    mean, std = (t.float() for t in mean_and_std(features))
    grid = torch.tensor(list(settings), dtype=torch.float32, device=features.device)
    lr, decay = grid.repeat(classes, 1).T  # settings are innermost: softmax runs along vectors
    both = features.new_zeros(width + 1, len(lr), dtype=torch.float32)
    weight, bias = both[:-1], both[-1]
    velocity = torch.zeros_like(both)
    per_epoch = math.ceil(count / batch_size)
    steps = min(epochs * per_epoch, max_steps)
    minus_one = weight.new_tensor(-1.0)

    batches = _batches(count, per_epoch, seed, features.device)
    for step, index in enumerate(islice(batches, steps)):
        z = features[index].float().sub_(mean).div_(std)
        scores = torch.addmm(bias, z, weight).view(len(z), classes, len(settings))
        gradient = scores.softmax(dim=1).clamp_(min=FLOOR)
        target = labels[index, None, None].expand(-1, 1, len(settings))
        gradient.scatter_add_(1, target, minus_one.expand_as(target))
        gradient = gradient.flatten(1)
        velocity[:-1].addmm_(z.T, gradient, beta=MOMENTUM, alpha=1 / len(z))
        velocity[-1].mul_(MOMENTUM).add_(gradient.mean(0))
        velocity.addcmul_(both, decay)
        both.addcmul_(velocity, lr, value=-(1 + math.cos(math.pi * step / steps)) / 2)

    shape = (classes, len(settings))
    models = LinearModels(mean, std, weight.unflatten(1, shape), bias.view(shape))
    _report_overflow(models, settings)
    return models


def _batches(count: int, per_epoch: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator, device="cpu")
        yield from order.to(device).tensor_split(per_epoch)


def _report_overflow(models: LinearModels, settings: Sequence[LinearSetting]) -> None:
    lost = [s for s, kept in zip(settings, models.finite.tolist(), strict=True) if not kept]
    if len(lost) == len(settings):
        raise RunError(
            f"the weights overflowed with every setting of {lost}; lower lr * weight_decay."
        )
    if lost:
        warnings.warn(f"left out, because their weights overflowed: {lost}.", stacklevel=3)
