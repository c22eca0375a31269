"""What every projection head has: dims, a config that rebuilds it, and a check of its input."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from headplug.errors import DimensionError, OptionError, unknown

T = TypeVar("T")
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
}


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
    recipe: Mapping[str, Any] | None = None  # the config, where the constructor does not show it
    layers: nn.Module

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.input_dim = positive("input_dim", input_dim)
        self.output_dim = positive("output_dim", output_dim)

    @property
    def config(self) -> dict[str, Any]:
        """What makes `create_head` build this head again, without its weights.

        Raises:
            OptionError: The class does not store a constructor argument.
        """
        if self.recipe is not None:
            return dict(self.recipe)
        options = [o for o in inspect.signature(type(self)).parameters if o != "weights"]
        for option in options:
            if not hasattr(self, option):
                raise OptionError(
                    f"{type(self).__name__} takes {option!r} and must store it as `self.{option}`."
                )
        return {"name": self.name, **{o: getattr(self, o) for o in options}}

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
        z = self.project(x.reshape(-1, self.input_dim))
        return z.reshape(*x.shape[:-1], self.output_dim)

    def project(self, x: Tensor) -> Tensor:
        """The head itself, on `(batch, input_dim)`."""
        z: Tensor = self.layers(x)
        return z

    def extra_repr(self) -> str:
        """The config, for `print(head)`."""
        return ", ".join(f"{k}={v!r}" for k, v in self.config.items())


def choose(kind: str, name: str, table: Mapping[str, T]) -> T:
    """What a table holds under a name, in small letters or large ("ReLU").

    Raises:
        OptionError: Nothing; the message lists the names.
    """
    if not isinstance(name, str) or name.lower() not in table:
        raise OptionError(str(unknown(kind, str(name), table)))
    return table[name.lower()]


def positive(name: str, value: int) -> int:
    """A width, checked.

    Raises:
        OptionError: It is not a positive integer.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{name} must be a positive integer, not {value!r}.")
    return value
