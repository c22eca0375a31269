"""What a fitted linear probe is, and what probes share: normalising, blocks of rows, predictions.

Everything is float32 on the device of the model, whatever the features are (half precision,
memory-mapped, on another device): rows are converted a block at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from headplug.errors import DimensionError, OptionError
from headplug.probing.data import check_features

BLOCK = 2**19  # values at a time: 2 MiB of float32, which stay in the cache

Normalize = Literal["standard", "l2", "none"]
STANDARD: Normalize = "standard"
Kind = Literal["classes", "multilabel", "regression"]


@contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """Without autograd and autocast, whatever the caller has switched on."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def blocks(count: int, per_row: int) -> Iterator[slice]:
    """The rows in blocks of at most `BLOCK` values."""
    size = max(1, BLOCK // per_row)
    return (slice(start, start + size) for start in range(0, count, size))


def normalized(
    rows: Tensor, how: Normalize, mean: Tensor, std: Tensor, room: Tensor | None = None
) -> Tensor:
    """Rows as a probe sees them: (x - mean) / std, in `room` if that is given, x / ‖x‖ or x.

    They are in float32.
    """
    rows = rows.to(mean.device, torch.float32)
    if how == "standard":
        return torch.addcmul(-mean / std, rows, 1 / std, out=room)
    return F.normalize(rows, dim=1) if how == "l2" else rows


@dataclass(frozen=True, eq=False)
class LinearModels:
    """Linear models, one a setting.

    Attributes:
        kind: Of the targets: "classes", "multilabel" or "regression".
        normalize: Of each setting: "standard" (with `mean` and `std`), "l2" (to length 1), "none".
        mean: Of the training features `(D,)`.
        std: Of the training features `(D,)`.
        weight: `(S, K, D)`, for normalised features.
        bias: `(S, K)`.
    """

    kind: Kind
    normalize: tuple[Normalize, ...]
    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def finite(self) -> Tensor:
        """Whether each setting's weights are finite numbers `(S,)`."""
        return torch.isfinite(self.weight.sum(dim=(1, 2)) + self.bias.sum(dim=1))

    def scores(self, features: Tensor) -> Tensor:
        """What the models make of a few rows `(S, B, K)`."""
        with plainly(self.weight.device):
            parts = []
            for how, some in by_normalization(self.normalize).items():
                z = normalized(features, how, self.mean, self.std)
                weight, bias = self.weight[some], self.bias[some]
                flat = torch.addmm(bias.flatten(), z, weight.flatten(0, 1).T)
                parts.append(flat.view(len(z), *bias.shape))
            order = [i for some in by_normalization(self.normalize).values() for i in some]
            found = parts[0] if len(parts) == 1 else torch.cat(parts, 1)[:, _inverse(order)]
            return found.transpose(0, 1)

    def predict(self, features: Tensor) -> Tensor:
        """Predictions of every setting.

        Returns:
            Of classes their indices `(S, N)`; -1 for a setting whose weights are not finite. Of
            labels scores `(S, N, K)` (above 0: more likely than not), of numbers the numbers
            `(S, N, K)`; NaN for such a setting.

        Raises:
            DimensionError: The features have another width than those it was fitted on.
            DataError: The features cannot be used.
        """
        return predictions(self.kind, features, self.weight.shape, self.finite, self.scores)


def predictions(
    kind: Kind,
    features: Tensor,
    shape: Sequence[int],
    finite: Tensor,
    scores: Callable[[Tensor], Tensor],
) -> Tensor:
    """Predictions of many rows, see `LinearModels.predict`.

    Args:
        kind: Of the targets.
        features: `(N, D)`.
        shape: `(S, K, D)`, of the models.
        finite: Which settings have anything to say `(S,)`.
        scores: Makes `(S, B, K)` of `(B, D)`.

    Raises:
        DimensionError: The features have another width.
        DataError: The features cannot be used.
    """
    features = check_features(features)
    settings, outputs, width = shape
    if features.shape[1] != width:
        raise DimensionError(
            f"the probe was fitted on {width} features a sample and is given {features.shape[1]}; "
            "take both from the same tap."
        )
    parts = [
        decided(kind, scores(features[rows]))
        for rows in blocks(len(features), width + settings * outputs)
    ]
    return without_lost(kind, torch.cat(parts, dim=1), finite)


def decided(kind: Kind, scores: Tensor) -> Tensor:
    """Of `(S, B, K)` scores the predictions: the best class `(S, B)`, or the scores."""
    return scores.argmax(dim=2) if kind == "classes" else scores


def without_lost(kind: Kind, predicted: Tensor, finite: Tensor) -> Tensor:
    """Predictions, with -1 or NaN for settings that have none."""
    if kind == "classes":
        return predicted.where(finite[:, None], -1)
    return predicted.where(finite[:, None, None], math.nan)


def by_normalization(normalize: Sequence[Normalize]) -> dict[Normalize, list[int]]:
    """The numbers of the settings that see the features alike."""
    return {
        how: [i for i, n in enumerate(normalize) if n == how] for how in dict.fromkeys(normalize)
    }


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def number(name: str, value: float, *, zero: bool) -> float:
    """A finite number above zero, or at least zero, checked.

    Raises:
        OptionError: It is none.
    """
    good = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    if not good or value < 0 or (value == 0 and not zero):
        kind = "a finite number, 0 or above" if zero else "a positive number"
        raise OptionError(f"{name} must be {kind}, not {value!r}.")
    return value
