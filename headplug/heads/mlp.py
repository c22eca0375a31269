"""The builder of every MLP head; `presets.py` has the published recipes.

Layers lie in one `nn.Sequential` called `layers`, in lightly's order, so that state dicts and seeds
carry over from lightly's heads and back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn

from headplug.errors import OptionError
from headplug.heads.base import ACTIVATIONS, ProjectionHead, choose, positive, probability
from headplug.heads.whitening import IterNorm, Whitening

Norm = Literal["batch", "batch_no_affine", "layer", "whitening", "iternorm", "none"]
NORMS: dict[str, Callable[[int], list[nn.Module]]] = {
    "batch": lambda width: [nn.BatchNorm1d(width)],
    "batch_no_affine": lambda width: [nn.BatchNorm1d(width, affine=False)],
    "layer": lambda width: [nn.LayerNorm(width)],
    "whitening": lambda width: [Whitening(width)],
    "iternorm": lambda width: [IterNorm(width)],
    "none": lambda width: [],
}

INITS: dict[str, Callable[[Tensor], Tensor]] = {
    "default": lambda weight: weight,  # as its layer drew it
    "orthogonal": nn.init.orthogonal_,
}


def stack(
    widths: Sequence[int],
    activation: Callable[[int], nn.Module],
    norm: Norm = "none",
    output_norm: Norm = "none",
    bias: bool | None = None,
    output_bias: bool | None = None,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Linear layers of these widths, with norm, activation and dropout between them.

    Args:
        widths: That of the input, of each hidden layer, of the output.
        activation: Makes the activation behind a hidden layer of some width.
        norm: After every hidden layer; a name in `NORMS`.
        output_norm: The same after the last layer.
        bias: Whether linear layers have one; None: those that no norm follows.
        output_bias: The same for the last layer.
        dropout: Probability with which an activation is set to zero in training.

    Raises:
        OptionError: No norm has that name.
    """
    make_norm, make_output_norm = (
        choose("norm", norm, NORMS),
        choose("output_norm", output_norm, NORMS),
    )
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths[:-1]):
        layers.append(nn.Linear(fan_in, fan_out, bias=norm == "none" if bias is None else bias))
        layers += [*make_norm(fan_out), activation(fan_out)]
        layers += [nn.Dropout(dropout)] if dropout else []
    if output_bias is None:
        output_bias = output_norm == "none" if bias is None else bias
    layers.append(nn.Linear(widths[-2], widths[-1], bias=output_bias))
    return nn.Sequential(*layers, *make_output_norm(widths[-1]))


class MLPHead(ProjectionHead):
    """`num_layers` linear layers with norm, activation and dropout between them.

    Args:
        input_dim: Width of the representation.
        output_dim: Width of the projection.
        hidden_dim: Width of the layers between; left out, that of the input.
        num_layers: Number of linear layers.
        activation: relu, silu, gelu, sigmoid, tanh or identity.
        norm: After every hidden layer: batch, batch_no_affine, layer, whitening, iternorm or none;
            see `headplug.heads.whitening` for the two that also decorrelate.
        output_norm: The same after the last layer.
        bias: Whether linear layers have a bias; left out, those do that no norm follows, as in
            lightly.
        output_bias: The same for the last layer; left out, `bias` counts. "frozen" gives it one
            that is never trained, as in solo-learn's SimSiam.
        dropout: Probability with which an activation is set to zero in training.
        init: "default" is PyTorch's; "orthogonal" makes every weight matrix (semi-)orthogonal.

    Raises:
        OptionError: An option has an impossible value.

    >>> MLPHead(512, 128, norm="none").layers
    Sequential(
      (0): Linear(in_features=512, out_features=512, bias=True)
      (1): ReLU()
      (2): Linear(in_features=512, out_features=128, bias=True)
    )
    """

    name = "mlp"
    layers: nn.Sequential

    def __init__(
        self,
        input_dim: int,
        output_dim: int = 128,
        hidden_dim: int | None = None,
        num_layers: int = 2,
        activation: str = "relu",
        norm: Norm = "batch",
        output_norm: Norm = "none",
        bias: bool | None = None,
        output_bias: bool | Literal["frozen"] | None = None,
        dropout: float = 0.0,
        init: Literal["default", "orthogonal"] = "default",
    ) -> None:
        super().__init__(input_dim, output_dim)
        self.hidden_dim = positive("hidden_dim", input_dim if hidden_dim is None else hidden_dim)
        self.num_layers = positive("num_layers", num_layers)
        self.activation = activation
        self.norm = norm
        self.output_norm = output_norm
        self.bias = bias
        self.output_bias = output_bias
        self.dropout = probability("dropout", dropout)
        self.init = init
        if bias not in (None, True, False) or output_bias not in (None, True, False, "frozen"):
            raise OptionError(
                f"bias must be True, False or None, and output_bias one of these or 'frozen', not "
                f"{bias!r} and {output_bias!r}."
            )
        make_activation = choose("activation", activation, ACTIVATIONS)
        draw = choose("init", init, INITS)
        self.layers = stack(
            [input_dim, *[self.hidden_dim] * (num_layers - 1), output_dim],
            lambda width: make_activation(),
            norm,
            output_norm,
            bias,
            None if output_bias is None else bool(output_bias),
            dropout,
        )
        if output_bias == "frozen":
            self.linear_layers[-1].bias.requires_grad_(False)
        for layer in self.linear_layers:
            draw(layer.weight)

    @property
    def linear_layers(self) -> list[nn.Linear]:
        """The linear layers, first to last."""
        return [m for m in self.layers if isinstance(m, nn.Linear)]
