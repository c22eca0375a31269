"""Residual MLP heads: blocks that add to what they read, as in transformers, without attention."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from headplug.errors import OptionError
from headplug.heads.base import ACTIVATIONS, ProjectionHead, choose, positive, probability


class ResidualBlock(nn.Module):
    """`x + mlp(norm(x))` on `(batch, width)`, with layer norm and one hidden layer.

    Names and order of the weights are those of a ViT block's MLP in timm and lightly.

    Args:
        width: Of input and output.
        hidden_dim: Width of the hidden layer.
        activation: The layer behind it.
        dropout: Probability with which a hidden or an output value is set to zero in training.
        bias: Whether the linear layers have one.
    """

    def __init__(
        self, width: int, hidden_dim: int, activation: nn.Module, dropout: float, bias: bool
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(width, hidden_dim, bias=bias),
                act=activation,
                drop1=nn.Dropout(dropout),
                fc2=nn.Linear(hidden_dim, width, bias=bias),
                drop2=nn.Dropout(dropout),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Adds the MLP of the normalised input to the input."""
        y: Tensor = self.mlp(self.norm(x))
        return x + y


class ResidualHead(ProjectionHead):
    """A linear layer, residual blocks, layer norm, and a linear layer.

    The decoder of AIM (arXiv 2401.08541), equal to lightly's `AIMPredictionHead` in weights, keys,
    outputs and gradients. It sees no norm over the batch, so any batch size and tokens will do.

    Args:
        input_dim: Width of the representation.
        output_dim: Width of the projection.
        hidden_dim: Width that the blocks keep; left out, that of the input.
        num_blocks: Number of blocks.
        mlp_ratio: Width of a block's hidden layer over `hidden_dim`.
        dropout: In the blocks.
        activation: relu, silu, gelu, sigmoid, tanh or identity.
        bias: Whether linear layers have a bias.

    Raises:
        OptionError: An option has an impossible value.

    >>> head = ResidualHead(512, 64, num_blocks=1)
    >>> [name for name, _ in head.blocks.named_children()], head.blocks[1].mlp.fc1
    (['0', '1', '2', '3'], Linear(in_features=512, out_features=2048, bias=False))
    """

    name = "residual"
    other_keys: Mapping[str, str] = MappingProxyType(
        {"": "blocks."}
    )  # those of a bare `nn.Sequential`

    def __init__(
        self,
        input_dim: int,
        output_dim: int = 128,
        hidden_dim: int | None = None,
        num_blocks: int = 2,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        activation: str = "gelu",
        bias: bool = False,
    ) -> None:
        super().__init__(input_dim, output_dim)
        self.hidden_dim = positive("hidden_dim", input_dim if hidden_dim is None else hidden_dim)
        self.num_blocks = positive("num_blocks", num_blocks)
        if not 1 <= self.hidden_dim * mlp_ratio <= sys.maxsize:  # not, so that nan is refused
            raise OptionError(
                f"mlp_ratio must make the hidden layer of a block at least one wide, not "
                f"{mlp_ratio!r} times hidden_dim={self.hidden_dim}."
            )
        self.mlp_ratio = mlp_ratio
        self.dropout = probability("dropout", dropout)
        self.activation = activation
        self.bias = bias
        make_activation = choose("activation", activation, ACTIVATIONS)
        width, wide = self.hidden_dim, int(self.hidden_dim * mlp_ratio)
        self.blocks = nn.Sequential(
            nn.Linear(input_dim, width, bias=bias),
            *(
                ResidualBlock(width, wide, make_activation(), dropout, bias)
                for _ in range(num_blocks)
            ),
            nn.LayerNorm(width),
            nn.Linear(width, output_dim, bias=bias),
        )

    @property
    def layers(self) -> nn.Sequential:  # type: ignore[override]  # a name for it, not a second entry
        """The blocks, under the name that other heads give their layers."""
        return self.blocks


PRESETS: dict[str, dict[str, Any]] = {
    "residual": {
        "builder": ResidualHead,
        "summary": "a small projector of AIM's residual MLP blocks, without batch norm",
        "paper": "arXiv 2401.08541",
    },
    "aim": {
        "builder": ResidualHead,
        "summary": "AIM's deep decoder, from each patch's features to the next patch's pixels",
        "paper": "arXiv 2401.08541",
        "source": "lightly.models.modules.heads_timm:AIMPredictionHead",
        "preset": {"output_dim": 3 * 14 * 14, "hidden_dim": 2048, "num_blocks": 12},
    },
}
