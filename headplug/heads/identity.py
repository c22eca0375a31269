"""Heads without weights, which pass on the representation or a part of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headplug.errors import DimensionError
from headplug.heads.base import ProjectionHead


class IdentityHead(ProjectionHead):
    """Passes the representation on, so that the loss acts on it directly.

    Args:
        input_dim: Width of the representation.
        output_dim: Left out, or the same.

    Raises:
        DimensionError: `output_dim` differs from `input_dim`.

    >>> import torch
    >>> IdentityHead(4)(torch.ones(2, 4)).shape
    torch.Size([2, 4])
    """

    name = "identity"

    def __init__(self, input_dim: int, output_dim: int | None = None) -> None:
        super().__init__(input_dim, same_dim(self.name, input_dim, output_dim))
        self.layers = nn.Identity()


class SliceHead(ProjectionHead):
    """Passes on the first features only; the loss shapes the others through the backbone.

    DirectCLR (arXiv 2110.09348), whose authors take 360 of a ResNet-50's 2048 features. NT-Xent on
    its output is lightly's `DirectCLRLoss(loss_dim=output_dim)` on the representation.

    Args:
        input_dim: Width of the representation.
        output_dim: How many features the loss sees.

    Raises:
        DimensionError: There are fewer than that.

    >>> import torch
    >>> SliceHead(4, output_dim=2)(torch.arange(8.0).reshape(2, 4))
    tensor([[0., 1.],
            [4., 5.]])
    """

    name = "directclr"

    def __init__(self, input_dim: int, output_dim: int = 360) -> None:
        super().__init__(input_dim, output_dim)
        if output_dim > input_dim:
            raise DimensionError(
                f"the head {self.name!r} passes on the first output_dim={output_dim} features, but "
                f"there are only input_dim={input_dim}. Pass an output_dim of at most {input_dim}, "
                f"e.g. output_dim={max(1, input_dim * 360 // 2048)} for the paper's share."
            )

    def project(self, x: Tensor) -> Tensor:
        """The first `output_dim` columns, as a view."""
        return x[:, : self.output_dim]


def same_dim(name: str, input_dim: int, output_dim: int | None) -> int:
    """The output width of a head that cannot change it.

    Raises:
        DimensionError: Another one was asked for.
    """
    if output_dim not in (None, input_dim):
        raise DimensionError(
            f"the head {name!r} keeps the width of its input: output_dim={output_dim} is not "
            f"possible with input_dim={input_dim}. Leave output_dim out."
        )
    return input_dim


PRESETS: dict[str, dict[str, Any]] = {
    "identity": {
        "builder": IdentityHead,
        "summary": "no head: the loss sees the representation itself",
    },
    "directclr": {
        "builder": SliceHead,
        "summary": "no trained head: the loss sees the first features of the representation",
        "paper": "arXiv 2110.09348",
    },
}
