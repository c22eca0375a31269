"""Every MLP head: one builder, and a table of the published recipes.

Layers lie in one `nn.Sequential` called `layers`, in lightly's order, so that state dicts and seeds
carry over from lightly's heads and back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn

from headplug.heads.base import ACTIVATIONS, ProjectionHead, choose, positive, probability

Norm = Literal["batch", "batch_no_affine", "layer", "none"]
NORMS: dict[str, Callable[[int], list[nn.Module]]] = {
    "batch": lambda width: [nn.BatchNorm1d(width)],
    "batch_no_affine": lambda width: [nn.BatchNorm1d(width, affine=False)],
    "layer": lambda width: [nn.LayerNorm(width)],
    "none": lambda width: [],
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
        norm: After every hidden layer: batch, batch_no_affine, layer or none.
        output_norm: The same after the last layer.
        bias: Whether linear layers have a bias; left out, those do that no norm follows, as in
            lightly.
        output_bias: The same for the last layer; left out, `bias` counts. "frozen" gives it one
            that is never trained, as in solo-learn's SimSiam.
        dropout: Probability with which an activation is set to zero in training.

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
        make_activation = choose("activation", activation, ACTIVATIONS)
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

    @property
    def linear_layers(self) -> list[nn.Linear]:
        """The linear layers, first to last."""
        return [m for m in self.layers if isinstance(m, nn.Linear)]


def _preset(
    summary: str, paper: str, source: str, hidden_dim: int | None, output_dim: int, **options: Any
) -> dict[str, Any]:
    return {
        "builder": MLPHead,
        "summary": summary,
        "paper": f"arXiv {paper}",
        "source": f"lightly.models.modules.heads:{source}" if source else "",
        "preset": {"hidden_dim": hidden_dim, "output_dim": output_dim, **options},
    }


PRESETS: dict[str, dict[str, Any]] = {
    "mlp": {"builder": MLPHead, "summary": "the builder of every MLP head here, with plain defaults"},
    "simclr": _preset(
        "SimCLR's projector as in lightly: batch norm after both layers",
        "2002.05709", "SimCLRProjectionHead", 2048, 128, output_norm="batch",
    ),
    "simclr_plain": _preset(
        "linear, activation, linear: the papers' and solo-learn's SimCLR projector",
        "2002.05709", "", None, 128, norm="none",
    ),
    "simclr_v2": _preset(
        "SimCLR v2's deeper projector, with batch norm after all three layers",
        "2006.10029", "SimCLRProjectionHead", 2048, 128, num_layers=3, output_norm="batch",
    ),
    "moco_v2": _preset(
        "MoCo v2's projector, without norm",
        "2003.04297", "MoCoProjectionHead", 2048, 128, norm="none",
    ),
    "moco_v3": _preset(
        "MoCo v3's projector: three layers, batch norm after each",
        "2104.02057", "MoCoProjectionHead", 4096, 256, num_layers=3, output_norm="batch",
    ),
    "byol": _preset("BYOL's projector", "2006.07733", "BYOLProjectionHead", 4096, 256),
    "byol_predictor": _preset(
        "BYOL's predictor, behind its projector", "2006.07733", "BYOLPredictionHead", 4096, 256,
    ),
    "simsiam": _preset(
        "SimSiam's projector: three layers, the last norm without scale and shift",
        "2011.10566", "SimSiamProjectionHead", 2048, 2048, num_layers=3,
        output_norm="batch_no_affine",
    ),
    "simsiam_predictor": _preset(
        "SimSiam's bottleneck predictor", "2011.10566", "SimSiamPredictionHead", 512, 2048,
    ),
    "barlow_twins": _preset(
        "Barlow Twins' wide projector", "2103.03230", "BarlowTwinsProjectionHead", 8192, 8192,
        num_layers=3,
    ),
    "vicreg": _preset(
        "VICReg's wide expander", "2105.04906", "VICRegProjectionHead", 8192, 8192, num_layers=3,
    ),
    "nnclr": _preset(
        "NNCLR's projector: three layers, batch norm after each",
        "2104.14548", "NNCLRProjectionHead", 2048, 256, num_layers=3, output_norm="batch",
    ),
    "nnclr_predictor": _preset(
        "NNCLR's predictor", "2104.14548", "NNCLRPredictionHead", 4096, 256,
    ),
    "swav": _preset(
        "SwAV's projector; normalise its output before the prototypes",
        "2006.09882", "SwaVProjectionHead", 2048, 128,
    ),
    "tico": _preset("TiCo's projector", "2206.10698", "TiCoProjectionHead", 4096, 256),
    "msn": _preset(
        "MSN's projector: three layers with GELU",
        "2204.07141", "MSNProjectionHead", 2048, 256, num_layers=3, activation="gelu",
    ),
    "densecl": _preset(
        "DenseCL's projector, for vectors and for maps with channels last",
        "2011.09157", "DenseCLProjectionHead", 2048, 128, norm="none",
    ),
}  # fmt: skip
