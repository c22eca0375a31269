"""The head that is none."""

from __future__ import annotations

from typing import Any

from torch import nn

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
    }
}
