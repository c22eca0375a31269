"""What every projection head has: dims, a config that rebuilds it, and a check of its input."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from headplug.errors import DimensionError, OptionError, unknown

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}


def make_activation(name: str) -> nn.Module:
    """The activation of that name.

    Raises:
        OptionError: There is none; the message lists them.
    """
    if name not in ACTIVATIONS:
        raise OptionError(str(unknown("activation", str(name), ACTIVATIONS)))
    return ACTIVATIONS[name]()


class ProjectionHead(nn.Module):
    """Base of the heads: maps `(..., input_dim)` to `(..., output_dim)` through `self.layers`.

    A subclass stores each constructor argument under its own name; `config` is read from there.
    Inputs with more than two dimensions (tokens, maps with channels last) are folded into one
    batch, so that batch norm takes its statistics over all positions.

    Args:
        input_dim: Width of the representation `h`.
        output_dim: Width of the projection `z`.

    Raises:
        OptionError: A width is not a positive integer.
    """

    name = ""
    layers: nn.Module

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.input_dim = positive("input_dim", input_dim)
        self.output_dim = positive("output_dim", output_dim)

    @property
    def config(self) -> dict[str, Any]:
        """What makes `create_head` build this head again, without its weights."""
        options = inspect.signature(type(self)).parameters
        return {"name": self.name, **{o: getattr(self, o) for o in options if o != "weights"}}

    def forward(self, x: Tensor) -> Tensor:
        """Projects `x` of shape `(..., input_dim)`.

        Raises:
            DimensionError: The last dimension is not `input_dim`.
        """
        if x.shape[-1] != self.input_dim:
            raise DimensionError(
                f"the head {self.name!r} takes {self.input_dim} features in the last dimension; "
                f"the input has shape {tuple(x.shape)}. Pool or flatten it, or build the head with "
                f"input_dim={x.shape[-1]}."
            )
        if x.ndim <= 2:
            return self.project(x)
        z: Tensor = self.project(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return z

    def project(self, x: Tensor) -> Tensor:
        """The head itself, on `(batch, input_dim)`."""
        z: Tensor = self.layers(x)
        return z

    def extra_repr(self) -> str:
        """The config, for `print(head)`."""
        return ", ".join(f"{k}={v!r}" for k, v in self.config.items())


def positive(name: str, value: int) -> int:
    """A width, checked.

    Raises:
        OptionError: It is not a positive integer.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{name} must be a positive integer, not {value!r}.")
    return value
