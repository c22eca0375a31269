"""LiDAR: how many directions tell samples apart, against what augmentations change, streamed.

The scatter of mean views between samples is whitened by that of views within samples; both are
float64 sums, so that groups of views may come in any batches and from several processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headplug.diagnostics.blocks import CHUNK, as_features
from headplug.diagnostics.moments import Moments
from headplug.errors import DataError, DimensionError, OptionError


class LiDAR:
    """Streaming LiDAR (Thilak et al., arXiv 2312.04000), as `VIEW_DEFINITIONS` has it.

    It is at most n - 1 for n samples: the paper takes about 1,000 samples of 50 views.

    Args:
        dim: Number of features.
        delta: Added to the diagonal of the within-sample scatter, in the features' units squared.
        eps: Added to each share p.
        device: Where the sums are.

    Raises:
        OptionError: `delta` is not above 0, or `eps` not from 0 to below 1.
        DataError: Scatter matrices would be too large.

    >>> lidar = LiDAR(4)
    >>> lidar.update(torch.randn(50, 2, 4))
    >>> 1 < lidar.value() <= 4.001
    True
    """

    def __init__(
        self,
        dim: int,
        delta: float = 1e-4,
        eps: float = 1e-7,
        device: torch.device | str = "cpu",
    ) -> None:
        if not delta > 0 or not 0 <= eps < 1:
            raise OptionError(
                f"delta must be above 0 and eps from 0 to below 1, not {delta!r} and {eps!r}."
            )
        self.delta, self.eps = delta, eps
        self._between, self._within = (Moments(dim, device=device) for _ in range(2))
        self._freedom = 0  # n (q - 1)

    @torch.no_grad()
    def update(self, views: Tensor) -> None:
        """Takes in all views `(n, q, D)` of some samples, q of two or more.

        Raises:
            DimensionError: The shape is another.
            DataError: Values are not finite, or there is one view.
        """
        dim = len(self._between.mean)
        if views.ndim != 3 or views.shape[2] != dim:
            raise DimensionError(f"LiDAR takes (n, q, {dim}), not {tuple(views.shape)}.")
        check_several(views.shape[1])
        views = views.to(self._between.mean)
        means = views.mean(1)
        self._between.update(means)
        # their mean is 0 but for rounding, sample by sample
        self._within.update((views - means[:, None]).flatten(0, 1))
        self._freedom += len(views) * (views.shape[1] - 1)

    def merge(self, other: LiDAR) -> None:
        """Takes in the samples of another one, e.g. of another process.

        Raises:
            DimensionError: It is of another width.
        """
        self._between.merge(other._between)
        self._within.merge(other._within)
        self._freedom += other._freedom

    def value(self) -> float:
        """LiDAR of what was taken in.

        Raises:
            DataError: There are fewer than two samples, samples have the same mean view, or no view
                differs from the others.
        """
        between = self._between.covariance
        within = self._within.second / self._freedom
        scale = torch.finfo(torch.float32).eps ** 2 * self._between.mean.square().sum()
        if between.trace() <= scale:
            raise DataError("the features are the same for all samples.")
        if within.trace() <= scale:
            raise DataError("the views of each sample are the same, so nothing lies within.")
        within.diagonal().add_(self.delta)
        root = torch.linalg.cholesky(within)
        half = torch.linalg.solve_triangular(root, between, upper=False)
        whitened = torch.linalg.solve_triangular(root, half.T, upper=False)
        values = torch.linalg.eigvalsh((whitened + whitened.T) / 2).clamp(min=0)
        return float(torch.special.entr(values / values.sum() + self.eps).sum().exp())


def lidar(views: Tensor, *, delta: float = 1e-4, eps: float = 1e-7) -> float:
    """LiDAR of views `(N, q, D)`, see `LiDAR`.

    Raises:
        DataError: There are fewer than two samples or views, they do not differ, or not finite.
        OptionError: As `LiDAR`.
    """
    views = check_views(views)
    found = LiDAR(views.shape[2], delta, eps, views.device)
    for part in views.split(max(1, CHUNK // views[0].numel())):
        found.update(part)
    return found.value()


def check_several(views: int) -> None:
    """Checks that there are two views or more."""
    if views < 2:
        raise DataError(f"this takes two views of each sample or more, not {views}.")


def check_views(views: Tensor) -> Tensor:
    """Views as a tensor, if they are finite `(N, q, D)`."""
    views = as_features(views, "views")
    if views.ndim != 3 or not views.numel():
        raise DataError(f"views must have shape (N, q, D), not {tuple(views.shape)}.")
    if not views.isfinite().all():
        raise DataError("views hold NaN or infinity; leave those samples out.")
    return views
