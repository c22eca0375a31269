"""Norm layers that also decorrelate: full whitening, and iterative normalisation in groups.

Both take `(batch, width)` and stand where `nn.BatchNorm1d(width)` would: statistics of the batch in
training, running ones in evaluation or when `fixed`. They compute in float32 (float64 if the input
is), whatever autocast says, and keep their running statistics in float32 under `.half()`, because a
rounded covariance need not be one. Statistics are per process: nothing is gathered in distributed
training.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from headplug.errors import DataError, DimensionError
from headplug.heads.base import positive, probability


class _Decorrelation(nn.Module, ABC):
    """What the two layers share: precision, running statistics, and checks of the batch."""

    fixed = False  # True: use the running statistics always, and never change them

    def __init__(self, width: int, eps: float, momentum: float) -> None:
        super().__init__()
        self.width = positive("width", width)
        self.eps = probability("eps", eps)
        self.momentum = probability("momentum", momentum)

    @abstractmethod
    def normalise(self, x: Tensor, update: bool) -> Tensor:
        """Decorrelates `(batch, width)`, with the batch's statistics if they are to be learnt."""

    def forward(self, x: Tensor) -> Tensor:
        """Decorrelates `(batch, width)`; the type is the input's, or float32 under autocast.

        Raises:
            DimensionError: The input has another shape.
            DataError: A training batch cannot be normalised.
        """
        if x.ndim != 2 or x.shape[1] != self.width:
            raise DimensionError(
                f"{type(self).__name__}({self.width}) takes (batch, {self.width}); the input has "
                f"shape {tuple(x.shape)}. Fold leading dimensions into the batch, or build it with "
                f"width={x.shape[-1]}."
            )
        update = self.training and not self.fixed
        if update and x.shape[0] < 2:
            raise DataError(
                f"{type(self).__name__} needs at least 2 rows in training; the batch has "
                f"{x.shape[0]}. Use a larger batch (drop_last=True drops a lone last one), or call "
                "eval()."
            )
        device = x.device.type
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        if not torch.amp.is_autocast_available(device):
            return self.normalise(exact, update).to(x.dtype)
        kept = exact.dtype if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            return self.normalise(exact, update).to(kept)

    def follow(self, running: Tensor, value: Tensor) -> None:
        """Moves a running statistic towards a batch's."""
        with torch.no_grad():
            running.copy_(self.momentum * value + (1.0 - self.momentum) * running)

    def extra_repr(self) -> str:
        """The settings, for `print(layer)`."""
        return f"{self.width}, eps={self.eps}, momentum={self.momentum}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        exact = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self.named_buffers(recurse=False):
            if name.startswith("running_") and torch.finfo(buffer.dtype).bits < 32:
                setattr(self, name, exact[name].to(buffer.device))
        return self


class Whitening(_Decorrelation):
    """Makes the covariance of a batch the identity, by a Cholesky factor (W-MSE, arXiv 2007.06346).

    The centred batch is multiplied by the inverse factor of `(1 - eps) * cov + eps * I`, with the
    unbiased covariance, as in solo-learn's and lightly's `Whitening2d`; gradients go through the
    factor. No weights. Training and evaluation cost the cube of the width.

    A batch of at most `width` rows has a singular covariance, which only `eps` repairs: its output
    is then uncorrelated as far as the rows allow. Features far larger than `1 / sqrt(eps)` need a
    larger batch or `eps`. Where the factorisation fails, on the CPU an error says so; elsewhere,
    and in compiled graphs, asking would stall the device at each step, so the output is nan.

    Args:
        width: Number of features.
        eps: Share of the identity in the covariance; 0, as in W-MSE, needs a batch larger than
            `width` and no feature that depends on others.
        momentum: Weight of a batch in the running statistics.

    Raises:
        OptionError: An option has an impossible value.

    >>> z = Whitening(4)(torch.randn(64, 4) * torch.tensor([1, 2, 3, 4]))
    >>> torch.allclose(z.T.cov(), torch.eye(4), atol=1e-2)
    True
    """

    running_mean: Tensor
    running_covariance: Tensor

    def __init__(self, width: int, eps: float = 1e-3, momentum: float = 0.1) -> None:
        super().__init__(width, eps, momentum)
        self.register_buffer("running_mean", torch.empty(width))
        self.register_buffer("running_covariance", torch.empty(width, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gives the statistics their first values, also after `to_empty`."""
        self.running_mean.zero_()
        nn.init.eye_(self.running_covariance)

    def normalise(self, x: Tensor, update: bool) -> Tensor:
        """Solves with the factor for the centred batch."""
        mean = x.mean(0) if update else self.running_mean
        centred = x - mean
        if update:
            if self.eps == 0 and x.shape[0] <= self.width:  # rounding may hide it from the factor
                raise self.singular(f"a batch of {x.shape[0]} rows")
            covariance = centred.T @ centred / (x.shape[0] - 1)
            factor = self.factor(covariance, f"a batch of {x.shape[0]} rows")
            self.follow(self.running_mean, mean)
            self.follow(self.running_covariance, covariance)
        else:
            covariance = self.running_covariance.to(centred.dtype)
            factor = self.factor(covariance, "with its running statistics")
        z: Tensor = torch.linalg.solve_triangular(factor, centred.T, upper=False)
        return z.T.clone(memory_format=torch.contiguous_format)  # no view: hooks may follow

    def factor(self, covariance: Tensor, what: str) -> Tensor:
        """The lower Cholesky factor of a covariance, mixed with the identity.

        Args:
            covariance: `(width, width)`.
            what: It is of, in words.

        Raises:
            DataError: There is none.
        """
        identity = torch.eye(self.width, dtype=covariance.dtype, device=covariance.device)
        factor: Tensor
        failed: Tensor
        factor, failed = torch.linalg.cholesky_ex((1 - self.eps) * covariance + self.eps * identity)
        if not torch.compiler.is_compiling() and failed.device.type == "cpu" and failed:
            raise self.singular(what, float(covariance.diagonal().max()))
        return factor.masked_fill(failed > 0, torch.nan)

    def singular(self, what: str, variance: float | None = None) -> DataError:
        """The error for a covariance without a factor: why, and what to do.

        Args:
            what: Was to be whitened.
            variance: The largest of a feature, if known.
        """
        asked = f"Whitening({self.width}, eps={self.eps:g}) cannot whiten {what}: "
        if variance is not None and not math.isfinite(variance):
            return DataError(f"{asked}there are nan or inf. Look for them in the layers before it.")
        largest = "" if variance is None else f" (the largest variance is {variance:.3g})"
        small = self.eps < 1e-3 and (variance or 0) < 100
        return DataError(
            f"{asked}the covariance is singular{largest}. Use more than {self.width} rows, fewer "
            f"features, or {'eps=0.001' if small else 'batch norm before it'}."
        )


class IterNorm(_Decorrelation):
    """Decorrelates groups of features by Newton's iteration (arXiv 1904.03441), then scales them.

    Equal to solo-learn's `IterNorm(width, num_groups, T=iterations, dim=2)`, the last layer of its
    VIbCReg projector (arXiv 2109.00783): the same weights, statistics and outputs; gradients are
    those of autograd, so that it compiles and exports. The more iterations, the nearer is the
    covariance within a group to the identity.

    Args:
        width: Number of features.
        num_groups: At most so many groups, where that divides the width; one that does not divide
            it makes groups smaller and more.
        iterations: Of Newton's method.
        eps: Added to the variances.
        momentum: Weight of a batch in the running statistics.

    Raises:
        OptionError: An option has an impossible value.

    >>> IterNorm(256).running_wm.shape, IterNorm(100).running_wm.shape
    (torch.Size([64, 4, 4]), torch.Size([50, 2, 2]))
    """

    no_decay: ClassVar = ("weight", "bias")
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_wm: Tensor

    def __init__(
        self,
        width: int,
        num_groups: int = 64,
        iterations: int = 5,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__(width, eps, momentum)
        self.iterations = positive("iterations", iterations)
        size = (width - 1) // positive("num_groups", num_groups) + 1
        while width % size:
            size //= 2
        self.num_groups = width // size
        self.weight = nn.Parameter(torch.empty(1, width))
        self.bias = nn.Parameter(torch.empty(1, width))
        self.register_buffer("running_mean", torch.empty(self.num_groups, size, 1))
        self.register_buffer("running_wm", torch.empty(self.num_groups, size, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gives weights and statistics their first values, also after `to_empty`."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.running_mean.zero_()
        size = self.running_wm.shape[-1]
        self.running_wm.copy_(torch.eye(size, device=self.running_wm.device))

    def normalise(self, x: Tensor, update: bool) -> Tensor:
        """Multiplies each group by its whitening matrix, then scales and shifts."""
        grouped = x.T.contiguous().view(*self.running_mean.shape[:2], x.shape[0])
        mean = grouped.mean(-1, keepdim=True) if update else self.running_mean
        centred = grouped - mean
        if update:
            matrix = self.whitening_matrix(centred)
            self.follow(self.running_mean, mean)
            self.follow(self.running_wm, matrix)
        else:
            matrix = self.running_wm.to(centred.dtype)
        z = torch.bmm(matrix, centred).view(self.width, x.shape[0]).T.contiguous()
        return z * self.weight + self.bias

    def whitening_matrix(self, centred: Tensor) -> Tensor:
        """The inverse square roots of the groups' covariances, approximately.

        Args:
            centred: `(groups, features, batch)`.
        """
        groups, size, rows = centred.shape
        identity = torch.eye(size, dtype=centred.dtype, device=centred.device)
        identity = identity.expand(groups, size, size)
        covariance = torch.baddbmm(
            identity, centred, centred.transpose(1, 2), beta=self.eps, alpha=1.0 / rows
        )
        trace = (covariance * identity).sum((1, 2), keepdim=True)
        scale = trace.reciprocal()
        scaled = covariance * scale
        root = 1.5 * identity - 0.5 * scaled  # the first step, from the identity
        for _ in range(self.iterations - 1):
            cube = torch.bmm(torch.bmm(root, root), root)
            root = torch.baddbmm(root, cube, scaled, beta=1.5, alpha=-0.5)
        return root * scale.sqrt()

    def extra_repr(self) -> str:
        """The settings, for `print(layer)`."""
        return f"{super().extra_repr()}, num_groups={self.num_groups}, iterations={self.iterations}"
