"""Stochastic gradient descent for all settings of a linear probe at once.

The weights of all settings lie side by side, so that a batch costs one matrix product for the whole
grid, forwards and backwards; the derivative of the loss is written out and nothing is recorded for
autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headplug.errors import OptionError
from headplug.heads.base import positive, probability
from headplug.probing.losses import derivative, losses
from headplug.probing.models import Kind, number

Schedule = Literal["cosine", "cosine_epoch", "steps", "constant", "plateau"]
Init = Literal["zeros", "normal", "linear"]
SCHEDULES = ("cosine", "cosine_epoch", "steps", "constant", "plateau")
INITS = ("zeros", "normal", "linear")


@dataclass(frozen=True)
class LinearTraining:
    """How linear probes are trained, whatever their learning rate.

    Attributes:
        epochs: Passes over the data, at most. None for as many as `max_steps` takes.
        max_steps: Batches, at most; it bounds the time on large data: 1500 steps of 512 are 15
            epochs of 50,000 samples. None for no bound.
        batch_size: Samples a batch, at most.
        momentum: As in `torch.optim.SGD`.
        nesterov: As in `torch.optim.SGD`.
        schedule: Of the learning rate. "cosine" and "cosine_epoch" fall to zero along half a
            cosine, step by step or epoch by epoch (`CosineAnnealingLR`); "steps" is multiplied by
            `factor` at each of `milestones` (`MultiStepLR`); "plateau" by `factor` when the mean
            training loss of an epoch has not fallen for more than `patience` epochs
            (`ReduceLROnPlateau`), each setting for itself.
        milestones: Epochs, for "steps".
        factor: For "steps" and "plateau".
        patience: In epochs, for "plateau".
        init: Weights at the start, the same for every setting: "zeros"; "normal", N(0, 0.01²) with
            a bias of 0; "linear", uniform as in `nn.Linear`.
        keep_best: Whether each setting keeps the weights of the epoch with the lowest loss on
            validation samples, rather than the last ones.

    Raises:
        OptionError: A value is impossible, or means nothing with the others.
    """

    epochs: int | None = 100
    max_steps: int | None = 1500
    batch_size: int = 512
    momentum: float = 0.9
    nesterov: bool = False
    schedule: Schedule = "cosine"
    milestones: tuple[int, ...] = ()
    factor: float = 0.1
    patience: int = 10
    init: Init = "zeros"
    keep_best: bool = False

    def __post_init__(self) -> None:
        if self.epochs is not None:
            positive("epochs", self.epochs)
        elif self.max_steps is None:
            raise OptionError("give epochs or max_steps; both are None.")
        positive("batch_size", self.batch_size)
        if self.max_steps is not None:
            positive("max_steps", self.max_steps)
        probability("momentum", self.momentum)
        number("factor", self.factor, zero=False)
        number("patience", self.patience, zero=True)
        for name, value, known in (
            ("schedule", self.schedule, SCHEDULES),
            ("init", self.init, INITS),
        ):
            if value not in known:
                raise OptionError(f"{name} is one of {', '.join(known)}, not {value!r}.")
        if self.nesterov and not self.momentum:
            raise OptionError("nesterov needs a momentum above 0, e.g. momentum=0.9.")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        if bool(self.milestones) != (self.schedule == "steps"):
            raise OptionError(
                f"schedule={self.schedule!r} and milestones={self.milestones} do not go together; "
                'take schedule="steps", milestones=(60, 80) or leave both out.'
            )

    def steps(self, per_epoch: int) -> int:
        """How many batches it takes, of so many an epoch."""
        bounds = (self.epochs and self.epochs * per_epoch, self.max_steps)
        return min(bound for bound in bounds if bound is not None)


class JointSGD:
    """The weights of S settings, and what it takes to train them.

    Args:
        grid: Learning rate and weight decay of each setting.
        training: How.
        kind: Of the targets.
        width: Features a sample, D.
        outputs: Scores a sample, K.
        per_epoch: Steps an epoch.
        steps: Steps in all.
        seed: Of the weights at the start.
        device: Where the features are.
    """

    def __init__(
        self,
        grid: Sequence[tuple[float, float]],
        training: LinearTraining,
        kind: Kind,
        width: int,
        outputs: int,
        per_epoch: int,
        steps: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.training, self.kind = training, kind
        self.per_epoch, self.steps, self.done = per_epoch, steps, 0
        self.shape = (outputs, len(grid))
        start = started(training.init, outputs, width, seed)
        self.weight, self.bias = (
            t.to(device)[:, None].repeat_interleave(len(grid), 1).flatten(0, 1) for t in start
        )
        self.velocity = [torch.zeros_like(t) for t in (self.weight, self.bias)]
        rates = torch.tensor(list(grid), dtype=torch.float32, device=device)
        self.lr, decay = rates.repeat(outputs, 1).T.contiguous()  # rows of the weight: (K, S)
        self.decay = (decay[:, None], decay) if any(s[1] for s in grid) else None
        self.factor, rate = 1.0, -self.lr
        self.rates = (rate[:, None], rate)  # written to, as the weights are
        plateau = training.schedule == "plateau"
        self.plateau = _Plateau(training, rates[:, 0]) if plateau else None
        self.ones, self.room = self.weight.new_ones(0), self.weight.new_empty(2, 0)
        self.best = torch.full_like(rates[:, 0], math.inf)
        # not finite until an epoch's loss is
        nothing = (torch.full_like(t, math.nan) for t in (self.weight, self.bias))
        self.kept = tuple(nothing) if training.keep_best else None

    def scores(self, z: Tensor) -> Tensor:
        """Of normalised features `(B, D)`: `(K, S, B)`."""
        return torch.addmm(self.bias[:, None], self.weight, z.T).view(*self.shape, -1)

    def step(self, z: Tensor, values: Tensor) -> None:
        """Descends once, on normalised features `(B, D)` and the values of their targets."""
        factor = self._factor()
        if factor != self.factor:
            self.factor = factor
            torch.mul(self.lr, -factor, out=self.rates[1])
        self.descend(z, values)
        self.done += 1
        if self.done % self.per_epoch == 0 and self.plateau:
            torch.neg(self.plateau.end_epoch().repeat(self.shape[0]), out=self.rates[1])

    def descend(self, z: Tensor, values: Tensor) -> None:
        """What a step does on the device, at the present rates; no value is read from it."""
        count = z.shape[0]
        if count != self.ones.shape[0]:
            self._fit(count)
        torch.addmm(self.bias[:, None], self.weight, z.T, out=self.flat)
        scores, room = self.cubes
        if self.plateau:
            self.plateau.add(losses(self.kind, scores, values), count)
        d = derivative(self.kind, scores, room, values).flatten(0, 1)
        momentum, nesterov = self.training.momentum, self.training.nesterov
        gradients = [torch.empty_like(v) for v in self.velocity] if nesterov else self.velocity
        kept = 0.0 if nesterov else momentum
        torch.addmm(gradients[0], d, z, beta=kept, alpha=1 / count, out=gradients[0])
        torch.addmv(gradients[1], d, self.ones, beta=kept, alpha=1 / count, out=gradients[1])
        for i, to in enumerate((self.weight, self.bias)):
            gradient, velocity = gradients[i], self.velocity[i]
            if self.decay:
                gradient.addcmul_(to, self.decay[i])
            if nesterov:
                velocity.mul_(momentum).add_(gradient)
                gradient.add_(velocity, alpha=momentum)
            to.addcmul_(gradient, self.rates[i])

    def _fit(self, count: int) -> None:
        """Makes room for a batch of so many samples, once: fresh memory is slow."""
        size = self.bias.shape[0] * count
        if size > self.room.shape[1]:
            self.room = self.room.new_empty(2, size)
        self.cubes = self.room[:, :size].view(2, *self.shape, count).unbind()
        self.flat, self.ones = self.cubes[0].flatten(0, 1), self.bias.new_ones(count)

    def validated(self, loss: Tensor) -> None:
        """Keeps the weights of those settings whose validation loss `(S,)` is the lowest yet."""
        better = loss < self.best
        self.best = loss.where(better, self.best)
        rows = better.repeat(self.shape[0])
        for kept, now in zip(self.kept or (), (self.weight, self.bias), strict=False):
            kept[rows] = now[rows]

    def result(self) -> tuple[Tensor, Tensor]:
        """Weights `(S, K, D)` and biases `(S, K)`."""
        weight, bias = self.kept or (self.weight, self.bias)
        return weight.unflatten(0, self.shape).transpose(0, 1), bias.view(self.shape).T

    def _factor(self) -> float:
        epoch = self.done // self.per_epoch
        match self.training.schedule:
            case "cosine":
                return (1 + math.cos(math.pi * self.done / self.steps)) / 2
            case "cosine_epoch":
                return (1 + math.cos(math.pi * epoch / math.ceil(self.steps / self.per_epoch))) / 2
            case "steps":
                passed = sum(epoch >= m for m in self.training.milestones)
                return float(self.training.factor**passed)
        return 1.0


class _Plateau:
    """`torch.optim.lr_scheduler.ReduceLROnPlateau` with its default threshold, for S settings."""

    def __init__(self, training: LinearTraining, lr: Tensor) -> None:
        self.factor, self.patience = training.factor, training.patience
        self.lr = lr.clone()
        self.best = torch.full_like(lr, math.inf)
        self.bad = torch.zeros_like(lr)
        self.loss, self.count = torch.zeros_like(lr), 0

    def add(self, loss: Tensor, count: int) -> None:
        """The mean loss of a batch."""
        self.loss += loss * count
        self.count += count

    def end_epoch(self) -> Tensor:
        """The rates `(S,)`, lower for settings that have stopped to improve."""
        loss = self.loss / self.count
        better = loss < self.best * (1 - 1e-4)
        self.best = loss.where(better, self.best)
        self.bad = (self.bad + 1).masked_fill(better, 0)
        stuck = self.bad > self.patience
        lower = self.lr * self.factor
        self.lr = lower.where(stuck & (self.lr - lower > 1e-8), self.lr)
        self.bad.masked_fill_(stuck, 0)
        self.loss, self.count = torch.zeros_like(loss), 0
        return self.lr


def started(init: Init, outputs: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weights `(K, D)` and biases `(K,)` at the start, from a generator with the seed."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(outputs, width, dtype=torch.float32, device="cpu")
    bias = torch.zeros(outputs, dtype=torch.float32, device="cpu")
    if init == "normal":
        weight.normal_(0, 0.01, generator=generator)
    elif init == "linear":
        for t in (weight, bias):
            t.uniform_(-(width**-0.5), width**-0.5, generator=generator)
    return weight, bias
