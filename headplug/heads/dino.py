"""Heads of the DINO family: an MLP, a bottleneck of unit length, a weight-normed last layer.

The weight-normed layer keeps the keys, gradients and random numbers of `torch.nn.utils.weight_norm`
(`weight_g`, `weight_v`), which every published checkpoint has, but can be deep-copied and pickled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headplug.heads.base import ProjectionHead, choose, positive
from headplug.heads.mlp import Norm, stack

STD = 0.02
NEW_NAMES = {  # those of torch.nn.utils.parametrizations.weight_norm
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


def unit(x: Tensor) -> Tensor:
    """Rows of length one; a row of zeros stays so in half precision, too, where 1e-12 is zero."""
    return F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)


class WeightNormLinear(nn.Module):
    """A linear layer whose rows have a direction, `weight_v`, and a length, `weight_g`.

    Weight normalisation (arXiv 1602.07868), bit for bit
    `torch.nn.utils.weight_norm(nn.Linear(...))`; the keys of
    `torch.nn.utils.parametrizations.weight_norm` load, too.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        bias: Whether there is one.

    >>> layer = WeightNormLinear(3, 2, bias=False)
    >>> {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    {'weight_g': (2, 1), 'weight_v': (2, 3)}
    """

    no_decay = ("weight_g",)  # a scale, like a norm's
    weight_g: Tensor
    weight_v: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        linear = nn.Linear(in_features, out_features, bias=bias)
        self.register_parameter("bias", linear.bias)
        self.weight_g = nn.Parameter(torch.norm_except_dim(linear.weight.detach()))
        self.weight_v = linear.weight

    @property
    def weight(self) -> Tensor:
        """The rows as they are used, `(out_features, in_features)`."""
        weight: Tensor = torch._weight_norm(self.weight_v, self.weight_g)
        return weight

    def unit_rows(self, trainable: bool) -> WeightNormLinear:
        """Gives every row the length one, for good unless `trainable`."""
        nn.init.ones_(self.weight_g)
        self.weight_g.requires_grad_(trainable)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(..., in_features)` to `(..., out_features)`."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """As `nn.Linear` has it."""
        widths = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{widths}, bias={self.bias is not None}"

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        _use_old_names(state, prefix)
        super()._load_from_state_dict(state, prefix, *args)


class WeightNormedHead(ProjectionHead):
    """Base of the heads with weight-normed layers: both of PyTorch's namings load."""

    def translate(self, state: dict[str, Any], prefix: str = "") -> None:
        """Renames other libraries' keys, and those of PyTorch's newer weight norm, in place."""
        _use_old_names(state, prefix)
        super().translate(state, prefix)


def _use_old_names(state: dict[str, Any], prefix: str) -> None:
    for key in [k for k in state if k.startswith(prefix)]:
        for new, old in NEW_NAMES.items():
            if key.endswith(new):
                state[key.removesuffix(new) + old] = state.pop(key)


def _from_quantiles(weight: Tensor) -> Tensor:
    """Normal numbers from uniform ones: how lightly, solo-learn and older PyTorch draw them."""
    with torch.no_grad():
        return weight.uniform_(-1, 1).erfinv_().mul_(STD * math.sqrt(2)).clamp_(-2, 2)


INITS: dict[str, Callable[[Tensor], Tensor]] = {
    "quantile": _from_quantiles,
    "torch": lambda weight: nn.init.trunc_normal_(weight, std=STD),
}


class DINOHead(WeightNormedHead):
    """An MLP with GELU down to a bottleneck, L2 normalisation, a weight-normed linear layer.

    From DINO (arXiv 2104.14294); iBOT (arXiv 2111.07832) and DINOv2 (arXiv 2304.07193) use it for
    class and patch tokens alike. `head.last_layer` is the last layer, without bias; its rows have
    length one.

    Args:
        input_dim: Width of the representation.
        output_dim: Number of prototypes, which is the width of the loss's softmax.
        hidden_dim: Width of the MLP's hidden layers.
        bottleneck_dim: Width of what is normalised.
        num_layers: Linear layers before the normalisation.
        norm: After every hidden layer: batch, batch_no_affine, layer or none. The papers use batch
            norm with convolutional backbones only.
        bias: Whether the MLP's linear layers have a bias; left out, those do that no norm follows.
        norm_last_layer: Whether the last layer's rows keep length one in training.
        freeze_last_layer: For how many epochs `cancel_last_layer_gradients` acts.
        init: How the MLP's weights, normal with standard deviation 0.02, are drawn: "quantile" as
            lightly's DINO and solo-learn do, "torch" as `nn.init.trunc_normal_` does.

    Raises:
        OptionError: An option has an impossible value.

    >>> head = DINOHead(384, output_dim=1024)
    >>> head(torch.rand(2, 197, 384)).shape
    torch.Size([2, 197, 1024])
    """

    name = "dino"
    other_keys: Mapping[str, str] = MappingProxyType({"mlp.": "layers."})  # solo-learn's
    layers: nn.Sequential

    def __init__(
        self,
        input_dim: int,
        output_dim: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        norm: Norm = "none",
        bias: bool | None = None,
        norm_last_layer: bool = True,
        freeze_last_layer: int = -1,
        init: Literal["quantile", "torch"] = "quantile",
    ) -> None:
        super().__init__(input_dim, output_dim)
        self.hidden_dim = positive("hidden_dim", hidden_dim)
        self.bottleneck_dim = positive("bottleneck_dim", bottleneck_dim)
        self.num_layers = positive("num_layers", num_layers)
        self.norm = norm
        self.bias = bias
        self.norm_last_layer = norm_last_layer
        self.freeze_last_layer = freeze_last_layer
        self.init = init
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        self.layers = stack(widths, lambda width: nn.GELU(), norm, bias=bias)
        draw = choose("init", init, INITS)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                draw(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        last = WeightNormLinear(bottleneck_dim, output_dim, bias=False)
        self.last_layer = last.unit_rows(trainable=not norm_last_layer)

    def project(self, x: Tensor) -> Tensor:
        """The head on `(batch, input_dim)`."""
        z: Tensor = self.last_layer(unit(self.layers(x)))
        return z

    def cancel_last_layer_gradients(self, current_epoch: int) -> None:
        """Drops the last layer's gradients in early epochs; call it between backward and step.

        Args:
            current_epoch: Counted from 0; it acts below `freeze_last_layer`.
        """
        if current_epoch < self.freeze_last_layer:
            for parameter in self.last_layer.parameters():
                parameter.grad = None


PRESETS: dict[str, dict[str, Any]] = {
    "dino": {
        "builder": DINOHead,
        "summary": "DINO's and iBOT's head: MLP, L2 norm, weight-normed last layer",
        "paper": "arXiv 2104.14294",
        "source": "lightly.models.modules.heads:DINOProjectionHead",
    },
    "dino_v2": {
        "builder": DINOHead,
        "summary": "DINOv2's head: as DINO's, with trained lengths in the last layer",
        "paper": "arXiv 2304.07193",
        "source": "lightly.models.modules.heads:DINOv2ProjectionHead",
        "preset": {"norm_last_layer": False, "init": "torch"},
    },
    "dino_solo": {
        "builder": DINOHead,
        "summary": "solo-learn's DINO head with its CIFAR widths; a bias before batch norm",
        "paper": "arXiv 2104.14294",
        "source": "solo.methods.dino:DINO.head",
        "preset": {"output_dim": 4096, "bias": True, "freeze_last_layer": 1},
    },
}
