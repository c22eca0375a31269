"""What every projection head has: dims, a config that rebuilds it, and a check of its input."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor, nn

from headplug.errors import DimensionError, OptionError, unknown
from headplug.heads import parameters

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
    inherent: tuple[str, ...] = ()  # what the recipe freezes by itself
    other_keys: Mapping[str, str] = MappingProxyType(
        {"": "layers."}
    )  # solo-learn's key prefixes: ours
    layers: nn.Module

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.input_dim = positive("input_dim", input_dim)
        self.output_dim = positive("output_dim", output_dim)
        self.frozen: tuple[str, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        """What makes `create_head` build this head again, without its weights.

        Raises:
            OptionError: The class does not store a constructor argument.
        """
        frozen = {"freeze": list(self.frozen)} if self.frozen != self.inherent else {}
        if self.recipe is not None:
            return {**self.recipe, **frozen}
        init = self.__init__  # type: ignore[misc] # FSDP2 gives the class another signature
        options = [o for o in inspect.signature(init).parameters if o != "weights"]
        for option in options:
            if not hasattr(self, option):
                raise OptionError(
                    f"{type(self).__name__} takes {option!r} and must store it as `self.{option}`."
                )
        return {"name": self.name, **frozen, **{o: getattr(self, o) for o in options}}

    def forward(self, x: Tensor) -> Tensor:
        """Projects `x` of shape `(..., input_dim)`.

        Raises:
            DimensionError: The last dimension is not `input_dim`.
        """
        return self.unfold(self.project(self.fold(x)), x)

    def fold(self, x: Tensor) -> Tensor:
        """`x` of shape `(..., input_dim)` as `(batch, input_dim)`.

        Raises:
            DimensionError: The last dimension is not `input_dim`.
        """
        if x.shape[-1] != self.input_dim:
            first = x.ndim > 2 and x.shape[1] == self.input_dim
            raise DimensionError(
                f"the head {self.name!r} takes {self.input_dim} features in the last dimension; "
                f"the input has shape {tuple(x.shape)}. "
                f"{'Put channels last (x.movedim(1, -1)), pool' if first else 'Pool'} or flatten "
                f"it, or build the head with input_dim={x.shape[-1]}."
            )
        return x if x.ndim == 2 else x.reshape(-1, self.input_dim)

    def unfold(self, z: Tensor, x: Tensor) -> Tensor:
        """The result for `fold(x)` with the leading dims of `x`."""
        return z if x.ndim == 2 else z.reshape(*x.shape[:-1], z.shape[-1])

    def project(self, x: Tensor) -> Tensor:
        """The head itself, on `(batch, input_dim)`."""
        z: Tensor = self.layers(x)
        return z

    def freeze_layers(self, what: bool | str | Sequence[str] = True) -> None:
        """Fixes layers for good: their weights become buffers, under the same keys.

        Args:
            what: True for the whole head, or paths or globs of layers or single weights, e.g.
                "layers.0".

        Raises:
            UnknownNameError: A path matches nothing; the message shows the closest ones.
            OptionError: What it matches has no weights.
        """
        chosen = parameters.freeze(self, what)
        self.frozen += tuple(p for p in chosen if p not in self.frozen)

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups for an optimiser; biases, norms and their like do not decay.

        See `headplug.heads.parameters.param_groups`.

        Args:
            weight_decay: For the weights that decay.
        """
        return parameters.param_groups(self, weight_decay)

    def extra_repr(self) -> str:
        """The config, for `print(head)`."""
        return ", ".join(f"{k}={v!r}" for k, v in self.config.items())

    def solo_state_dict(self) -> dict[str, Tensor]:
        """The weights under solo-learn's names: bare `0.weight`, where ours say `layers.0.weight`.

        The other direction needs no call: `load_state_dict` reads both.
        """
        state = self.state_dict()
        for theirs, ours in self.other_keys.items():
            state = {_rename(k, ours, theirs): v for k, v in state.items()}
        return state

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        self.translate(state, prefix)
        super()._load_from_state_dict(state, prefix, *args)

    def translate(self, state: dict[str, Any], prefix: str = "") -> None:
        """Renames another library's keys below a prefix to ours, in place."""
        own = self.state_dict().keys()
        for key in [k for k in state if k.startswith(prefix)]:
            name = key.removeprefix(prefix)
            if name not in own:
                renamed = (_rename(name, theirs, ours) for theirs, ours in self.other_keys.items())
                if found := next((n for n in renamed if n in own), None):
                    state[prefix + found] = state.pop(key)


def _rename(key: str, old: str, new: str) -> str:
    return new + key.removeprefix(old) if key.startswith(old) else key


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


def probability(name: str, value: float) -> float:
    """A probability below one, checked.

    Raises:
        OptionError: It is not in [0, 1).
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise OptionError(f"{name} must be a number in [0, 1), not {value!r}.")
    return value
