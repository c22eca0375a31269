"""Means and (cross-)covariances of features that come batch by batch.

Each batch is centred at its own mean and the batches are joined by the pairwise rule of Chan, Golub
and LeVeque (1983), so that a mean far larger than the deviation costs no digits. Products are taken
in float64. Float32 products would take half the time, but give singular values below 0.01 of the
largest to five digits only and those below 0.0001 to two: RankMe, alpha-ReQ and condition numbers
are made of such.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headplug.errors import DataError, DimensionError

LEAF = 256  # width below which both triangles of a symmetric product are computed
ROOM = 2**31  # bytes of the largest matrix: 16,384 x 16,384


def check_room(rows: int, columns: int, where: object = "these features") -> None:
    """Checks that a float64 matrix is small enough to hold and to decompose.

    Raises:
        DataError: It is not.
    """
    size = 8 * rows * columns
    if size > ROOM:
        raise DataError(
            f"{where} need a matrix of {rows} x {columns} in float64, {size / 2**30:.1f} GiB "
            f"(at most {ROOM / 2**30:g}); pool them, e.g. extract_features(..., pool='gap'), or "
            "take fewer samples than features."
        )


def add_product(out: Tensor, x: Tensor, y: Tensor | None = None) -> None:
    """Adds `x.T @ y`; without `y`, `x.T @ x` in the upper triangle only, for half the time."""
    if y is not None or len(out) <= LEAF:
        out.addmm_(x.T, x if y is None else y)
        return
    half = len(out) // 2
    add_product(out[:half, :half], x[:, :half])
    add_product(out[half:, half:], x[:, half:])
    out[:half, half:].addmm_(x[:, :half].T, x[:, half:])


def mirrored(upper: Tensor) -> Tensor:
    """A symmetric matrix of its upper triangle."""
    return upper.triu() + upper.triu(1).T


class Moments:
    """Count, means and centred second moments of features, or of two kinds of the same samples.

    Args:
        dim: Number of features.
        other_dim: Of the second kind, for the cross moment; left out, it is the first with itself.
        device: Where the sums are.

    Attributes:
        count: Number of samples so far.
        mean: Of each feature, float64 `(dim,)`.
        other_mean: Of each feature of the second kind; left out, the same.

    Raises:
        DataError: The matrix of the second moment would be too large.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]])
    >>> one, two = Moments(2), Moments(2)
    >>> one.update(x[:1])
    >>> two.update(x[1:])
    >>> one.merge(two)
    >>> torch.allclose(one.covariance, x.T.cov().double())
    True
    """

    def __init__(
        self, dim: int, other_dim: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self._own = other_dim is None
        columns = dim if other_dim is None else other_dim
        check_room(dim, columns)
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.other_mean = self.mean if self._own else self.mean.new_zeros(columns)
        self._sum = self.mean.new_zeros(dim, columns)

    @property
    def second(self) -> Tensor:
        """`sum((x - mean)^T (y - mean))` over samples, float64 `(dim, other_dim)`."""
        return mirrored(self._sum) if self._own else self._sum.clone()

    @property
    def covariance(self) -> Tensor:
        """The second moment over `count - 1`.

        Raises:
            DataError: There are fewer than two samples.
        """
        if self.count < 2:
            raise DataError(f"a covariance needs two samples or more, not {self.count}.")
        return self.second / (self.count - 1)

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor | None = None) -> None:
        """Takes in some samples, `(n, dim)` and, for a cross moment, `(n, other_dim)`.

        Raises:
            DimensionError: The shapes do not fit.
            DataError: Values are not finite.
        """
        kinds = [x] if y is None else [x, y]
        widths = [len(self.mean)] if self._own else [len(self.mean), len(self.other_mean)]
        shapes = [tuple(kind.shape) for kind in kinds]
        if shapes != [(len(x), width) for width in widths]:
            wanted = " and ".join(f"(n, {width})" for width in widths)
            raise DimensionError(
                f"these moments take {wanted}, not {' and '.join(map(str, shapes))}."
            )
        if not len(x):
            return
        count = self.count + len(x)
        share = len(x) / count
        means = (self.mean, self.other_mean)[: len(kinds)]
        rows, steps = [], []
        for kind, mean in zip(kinds, means, strict=True):
            values = kind.to(mean)
            middle = values.mean(0)
            if not middle.isfinite().all():
                raise DataError("features hold NaN or infinity; leave those samples out.")
            steps.append(middle - mean)
            # the way between the two means is one more row
            way = math.sqrt(self.count * share) * steps[-1]
            rows.append(values.new_empty(len(values) + 1, len(mean)))
            torch.sub(values, middle, out=rows[-1][:-1])
            rows[-1][-1] = way
        add_product(self._sum, *rows)
        for mean, step in zip(means, steps, strict=True):
            mean += share * step
        self.count = count

    def merge(self, other: Moments) -> None:
        """Takes in the samples of another one, e.g. of another process.

        Raises:
            DimensionError: It is of other widths.
        """
        if other._sum.shape != self._sum.shape or other._own != self._own:
            raise DimensionError(
                f"moments of {tuple(self._sum.shape)} and {tuple(other._sum.shape)} do not merge."
            )
        if not other.count:
            return
        count = self.count + other.count
        share = other.count / count
        step = other.mean.to(self.mean) - self.mean
        other_step = step if self._own else other.other_mean.to(self.mean) - self.other_mean
        self._sum += other._sum.to(self.mean)
        self._sum.addr_(step, other_step, alpha=self.count * share)
        self.mean += share * step
        if not self._own:
            self.other_mean += share * other_step
        self.count = count
