"""The autoencoder-embedding head: a frozen, pretrained first layer in a two-layer projector."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from headplug.checkpoints import Weights, read_embedding
from headplug.errors import DimensionError, HeadplugError
from headplug.heads.base import ACTIVATIONS, ProjectionHead, choose, positive

EMBEDDING = "layers.embedding"


class AEEmbeddingHead(ProjectionHead):
    """A pretrained autoencoder's embedding layer, an activation, and a trained linear layer.

    From arXiv 2408.14514. The embedding layer is that of a shallow autoencoder trained on the same
    images (`headplug.pretrain_autoencoder`, `headplug pretrain-ae`); frozen, it is a buffer, so
    that neither weight decay nor EMA nor `requires_grad_` changes a bit of it. Without pretrained
    weights the head refuses to train; loading a state dict that has them counts as giving them.

    Args:
        input_dim: Width of the representation; it must be the autoencoder's hidden width.
        embedding_dim: Width of the embedding; left out, that of `weights`, or 256 without any.
        output_dim: Width of the projection.
        activation: relu, silu, gelu, sigmoid, tanh or identity.
        freeze: Whether the embedding layer stays as it is; or the paths of the layers that do.
        weights: Where the embedding layer comes from: see `headplug.checkpoints.read_embedding`.

    Raises:
        DimensionError: The weights have other widths than asked for.
        CheckpointError: The weights cannot be read.

    >>> layer = nn.Linear(512, 256)  # stands for a trained embedding layer
    >>> head = AEEmbeddingHead(512, output_dim=64, weights=layer)
    >>> head(torch.rand(8, 512)).shape, [name for name, _ in head.named_parameters()]
    (torch.Size([8, 64]), ['layers.output.weight', 'layers.output.bias'])
    """

    name = "ae_embedding"
    other_keys: Mapping[str, str] = MappingProxyType(
        {"0.": "layers.embedding.", "2.": "layers.output."}
    )  # the authors'
    pretrained: Tensor

    def __init__(
        self,
        input_dim: int,
        embedding_dim: int | None = None,
        output_dim: int = 128,
        activation: str = "tanh",
        freeze: bool | str | Sequence[str] = True,
        weights: Weights | None = None,
    ) -> None:
        super().__init__(input_dim, output_dim)
        pretrained = None if weights is None else read_embedding(weights)
        if embedding_dim is None:
            embedding_dim = 256 if pretrained is None else pretrained[0].shape[0]
        self.embedding_dim = positive("embedding_dim", embedding_dim)
        self.activation = activation
        self.layers = nn.Sequential(
            OrderedDict(
                embedding=nn.Linear(input_dim, embedding_dim),
                activation=choose("activation", activation, ACTIVATIONS)(),
                output=nn.Linear(embedding_dim, output_dim),
            )
        )
        self.register_buffer("pretrained", torch.zeros(()))  # tells those who load the state dict
        self._is_pretrained = False
        if pretrained is not None:
            self._fill(*pretrained)
        self.freeze_layers(EMBEDDING if freeze is True else freeze)

    @classmethod
    def from_autoencoder(
        cls,
        source: Weights,
        output_dim: int = 128,
        activation: str = "tanh",
        freeze: bool | str | Sequence[str] = True,
    ) -> AEEmbeddingHead:
        """A head whose widths and embedding layer are those of a trained autoencoder.

        Args:
            source: A file, folder, state dict, module or pair of tensors; see
                `headplug.checkpoints.read_embedding` for all forms.
            output_dim: Width of the projection.
            activation: As in the constructor.
            freeze: As in the constructor.

        Raises:
            CheckpointError: The source holds no embedding layer, or would have to be unpickled.
        """
        weight, bias = read_embedding(source)
        embedding_dim, input_dim = weight.shape
        return cls(input_dim, embedding_dim, output_dim, activation, freeze, weights=(weight, bias))

    @property
    def freeze(self) -> bool | list[str]:
        """What is frozen, as the constructor takes it."""
        return self.frozen == (EMBEDDING,) or list(self.frozen)

    @property
    def embedding(self) -> nn.Linear:
        """The layer that comes from the autoencoder."""
        return cast("nn.Linear", self.get_submodule(EMBEDDING))

    def project(self, x: Tensor) -> Tensor:
        """The head on `(batch, input_dim)`.

        Raises:
            HeadplugError: It is in training mode and was never given pretrained weights.
        """
        if self.training and not self._is_pretrained:
            raise HeadplugError(
                "this ae_embedding head has no pretrained embedding layer and will not train. "
                f"Pretrain one: `headplug pretrain-ae --data DATA --hidden-dim {self.input_dim} "
                f"--latent-dim {self.embedding_dim} --out ae.safetensors`, then pass "
                "weights='ae.safetensors' (or build the head with "
                "AEEmbeddingHead.from_autoencoder)."
            )
        return super().project(x)

    def _fill(self, weight: Tensor, bias: Tensor) -> None:
        layer = self.embedding
        if layer.weight.shape != weight.shape:
            (out, width), (out_asked, width_asked) = weight.shape, layer.weight.shape
            leave = "" if out == out_asked else ", or leave embedding_dim out to take this one's"
            raise DimensionError(
                f"the autoencoder's embedding layer maps {width} features to {out}, the head was "
                f"asked for {width_asked} to {out_asked}. Pretrain one with `headplug pretrain-ae "
                f"--hidden-dim {width_asked} --latent-dim {out_asked}`{leave}."
            )
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
            self.pretrained.fill_(1)
        self._is_pretrained = True

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        self.translate(state, prefix)
        own = self.embedding.state_dict()
        given = {n: state.get(f"{prefix}layers.embedding.{n}") for n in own}
        fits = all(getattr(given[n], "shape", None) == own[n].shape for n in own)
        mark = prefix + "pretrained"
        if fits:  # weights from elsewhere come without the mark; only ours can say "not yet"
            state.setdefault(mark, torch.ones(()))
            self._is_pretrained = bool(state[mark])
        super()._load_from_state_dict(state, prefix, *args)


PRESETS: dict[str, dict[str, Any]] = {
    "ae_embedding": {
        "builder": AEEmbeddingHead,
        "summary": "frozen embedding layer of a pretrained autoencoder, activation, linear layer",
        "paper": "arXiv 2408.14514",
    }
}
