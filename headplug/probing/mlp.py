"""A probe with one hidden layer, for every setting of a grid at once.

The hidden layers of all settings lie side by side, so that the features are multiplied once for the
whole grid; the second layers are one batched product. The optimiser is AdamW: with it one learning
rate suits features of any tap, where plain SGD needs another for each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from headplug.errors import OptionError
from headplug.heads.base import positive
from headplug.probing.data import Targets, as_targets, check_features, mean_and_std
from headplug.probing.linear import batches, report_lost
from headplug.probing.losses import derivative
from headplug.probing.models import Kind, normalized, number, plainly, predictions
from headplug.probing.sgd import started


class MLPSetting(NamedTuple):
    """One way to train.

    Attributes:
        lr: Learning rate of `torch.optim.AdamW` at the start; it falls to zero along half a cosine.
        weight_decay: As in `torch.optim.AdamW`.
        hidden_dim: Units of the hidden layer.
    """

    lr: float
    weight_decay: float = 0.01
    hidden_dim: int = 256


def mlp_grid(
    lrs: Sequence[float] = (3e-4, 1e-3, 3e-3),
    weight_decays: Sequence[float] = (0.01, 1.0),
    hidden_dims: Sequence[int] = (256,),
) -> list[MLPSetting]:
    """Every width with every learning rate with every weight decay.

    >>> len(mlp_grid())
    6
    """
    return [MLPSetting(lr, wd, h) for h in hidden_dims for lr in lrs for wd in weight_decays]


class _Layers(NamedTuple):
    """Of S settings with the same H: `(S, H, D)`, `(S, H)`, `(S, K, H)`, `(S, K)`."""

    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor

    def hidden(self, z: Tensor) -> Tensor:
        """`(S, B, H)` of `(B, D)`."""
        flat = torch.addmm(self.bias1.flatten(), z, self.weight1.flatten(0, 1).T)
        return flat.relu_().view(len(z), *self.bias1.shape).transpose(0, 1)

    def scores(self, hidden: Tensor) -> Tensor:
        """`(S, B, K)` of `(S, B, H)`."""
        return torch.baddbmm(self.bias2[:, None], hidden, self.weight2.transpose(1, 2))


@dataclass(frozen=True, eq=False)
class MLPModels:
    """Networks with one hidden layer, one a setting.

    Attributes:
        kind: Of the targets: "classes", "multilabel" or "regression".
        mean: Of the training features `(D,)`.
        std: Of the training features `(D,)`.
        layers: Weight `(H, D)` and bias `(H,)`, weight `(K, H)` and bias `(K,)` of each setting,
            for standardised features and, in regression, standardised numbers.
        target_mean: Of the numbers to predict `(K,)`; zeros where the targets are none.
        target_std: Of the same; ones.
    """

    kind: Kind
    mean: Tensor
    std: Tensor
    layers: tuple[tuple[Tensor, ...], ...]
    target_mean: Tensor
    target_std: Tensor

    @property
    def finite(self) -> Tensor:
        """Whether each setting's weights are finite numbers `(S,)`."""
        return torch.stack(
            [torch.stack([t.sum() for t in own]).sum().isfinite() for own in self.layers]
        )

    def scores(self, features: Tensor) -> Tensor:
        """What the networks make of a few rows `(S, B, K)`."""
        with plainly(self.mean.device):
            z = normalized(features, "standard", self.mean, self.std)
            found = []
            for own in self.layers:
                one = _Layers(*(t[None] for t in own))
                found.append(one.scores(one.hidden(z)))
            return torch.cat(found) * self.target_std + self.target_mean

    def predict(self, features: Tensor) -> Tensor:
        """Predictions of every setting, as `LinearModels.predict` gives them.

        Raises:
            DimensionError: The features have another width than those it was fitted on.
            DataError: The features cannot be used.
        """
        widest = max(len(own[0]) for own in self.layers)
        shape = (len(self.layers), len(self.target_mean) + widest, len(self.mean))
        return predictions(self.kind, features, shape, self.finite, self.scores)


def fit_mlp(
    features: Tensor,
    labels: Tensor | Targets,
    settings: Sequence[MLPSetting],
    *,
    num_classes: int | None = None,
    epochs: int = 20,
    max_steps: int = 1500,
    batch_size: int = 256,
    seed: int = 0,
) -> MLPModels:
    """Trains Linear, ReLU, Linear with each setting, all on the same batches.

    Each equals `torch.optim.AdamW` with `CosineAnnealingLR` over all steps, from `nn.Linear`'s
    uniform start, on standardised features; losses and batches are those of `fit_linear`. Numbers
    to predict are standardised as well.

    Args:
        features: Training features `(N, D)`.
        labels: What to predict, see `headplug.probing.data.as_targets`.
        settings: The grid.
        num_classes: Left out, the highest label plus one.
        epochs: Passes over the data, at most.
        max_steps: Batches, at most.
        batch_size: Samples a batch, at most.
        seed: Of the order of the samples and of the weights at the start.

    Returns:
        The networks. A warning names settings whose weights overflowed; they predict -1 or NaN.

    Raises:
        DataError: Features or labels cannot be used.
        OptionError: A setting or a size has an impossible value.
        RunError: The weights of every setting overflowed.

    >>> x = torch.tensor([[0.0], [1.0], [4.0], [5.0]])
    >>> fit_mlp(x, torch.tensor([0, 0, 1, 1]), [MLPSetting(0.01)]).predict(x)
    tensor([[0, 0, 1, 1]])
    """
    features = check_features(features)
    targets = as_targets(labels, len(features), num_classes).to(features.device)
    for name, value in {"epochs": epochs, "max_steps": max_steps, "batch_size": batch_size}.items():
        positive(name, value)
    if not settings:
        raise OptionError("there are no settings; take mlp_grid(), or [MLPSetting(0.001)].")
    for s in settings:
        number(f"lr in {s}", s.lr, zero=False)
        number(f"weight_decay in {s}", s.weight_decay, zero=True)
        positive(f"hidden_dim in {s}", s.hidden_dim)
    per_epoch = math.ceil(len(features) / batch_size)
    steps = min(epochs * per_epoch, max_steps)
    with plainly(features.device):
        mean, std = (t.float() for t in mean_and_std(features))
        middle, spread = mean.new_zeros(targets.outputs), mean.new_ones(targets.outputs)
        values = targets.values
        if targets.kind == "regression":
            exact = mean_and_std(values)
            values = ((values - exact[0]) / exact[1]).float()
            middle, spread = (t.float() for t in exact)
        groups: dict[int, list[MLPSetting]] = {}
        for s in settings:
            groups.setdefault(s.hidden_dim, []).append(s)
        nets = [
            _Training(some, targets, len(mean), steps, seed, mean.device)
            for some in groups.values()
        ]
        order = batches(len(features), per_epoch, seed, features.device)
        for index in islice(order, steps):
            z = normalized(features.index_select(0, index), "standard", mean, std)
            for net in nets:
                net.step(z, values.index_select(0, index))
    found = {h: iter(net.each()) for h, net in zip(groups, nets, strict=True)}
    layers = tuple(next(found[s.hidden_dim]) for s in settings)
    models = MLPModels(targets.kind, mean, std, layers, middle, spread)
    report_lost(models.finite, settings, stacklevel=3)
    return models


class _Training:
    """The networks of settings with the same hidden width, and their optimiser."""

    def __init__(
        self,
        settings: Sequence[MLPSetting],
        targets: Targets,
        width: int,
        steps: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.kind = targets.kind
        first = started("linear", settings[0].hidden_dim, width, seed)
        second = started("linear", targets.outputs, settings[0].hidden_dim, seed + 1)
        start = (t.to(device).expand(len(settings), *t.shape) for t in (*first, *second))
        self.layers = _Layers(*(t.clone(memory_format=torch.contiguous_format) for t in start))
        self.gradients = _Layers(*(torch.zeros_like(t) for t in self.layers))
        groups = []
        for i, s in enumerate(settings):
            own = [t[i] for t in self.layers]
            for t, gradient in zip(own, self.gradients, strict=True):
                t.grad = gradient[i]
            groups.append({"params": own, "lr": s.lr, "weight_decay": s.weight_decay})
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def step(self, z: Tensor, values: Tensor) -> None:
        """One batch of standardised features `(B, D)`, with the values of its targets."""
        hidden = self.layers.hidden(z)  # (S, B, H)
        scores = self.layers.scores(hidden).permute(2, 0, 1)
        d = derivative(self.kind, scores.contiguous(), None, values).permute(1, 2, 0) / len(z)
        back = (d @ self.layers.weight2).mul_(hidden > 0)
        torch.sum(d, 1, out=self.gradients.bias2)
        torch.bmm(d.transpose(1, 2), hidden, out=self.gradients.weight2)
        torch.sum(back, 1, out=self.gradients.bias1)
        flat = back.transpose(0, 1).flatten(1)  # (B, S * H)
        torch.mm(flat.T, z, out=self.gradients.weight1.view(-1, z.shape[1]))
        self.optimizer.step()
        self.schedule.step()

    def each(self) -> list[tuple[Tensor, ...]]:
        """The layers of one setting after another."""
        return [tuple(t[i] for t in self.layers) for i in range(len(self.layers.bias2))]
