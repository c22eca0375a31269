"""Prototypes: what sits behind a projector and gives a score per cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headplug.errors import DimensionError, OptionError
from headplug.heads.base import ProjectionHead, positive, probability
from headplug.heads.dino import WeightNormedHead, WeightNormLinear, unit


def _linear(input_dim: int, output_dim: int, bias: bool, weight_norm: bool) -> nn.Module:
    if weight_norm:
        return WeightNormLinear(input_dim, output_dim, bias).unit_rows(trainable=False)
    return nn.Linear(input_dim, output_dim, bias)


class PrototypesHead(WeightNormedHead):
    """One or several sets of prototypes: linear layers without activation, called `heads`.

    From SwAV (arXiv 2006.09882), whose appendix has DeepCluster-v2, too. The input must have
    length one. Rows of length one then make the scores cosines: call `normalize()` before each
    step as lightly does, or use `weight_norm` as solo-learn does.

    Args:
        input_dim: Width of the normalised projection.
        output_dim: Number of prototypes. A list makes several sets, and the output a list.
        n_steps_frozen_prototypes: For how many steps they stay as they are; `forward` then needs
            `step`.
        bias: Whether the scores have one.
        weight_norm: Whether rows keep length one by themselves.
        trainable: Whether gradients reach them; otherwise they start with length one and are set
            from outside, e.g. by k-means.

    Raises:
        OptionError: An option has an impossible value.

    >>> z = torch.nn.functional.normalize(torch.rand(8, 128))
    >>> PrototypesHead(128, 512)(z).shape, [p.shape[1] for p in PrototypesHead(128, [64, 96])(z)]
    (torch.Size([8, 512]), [64, 96])
    """

    name = "swav_prototypes"

    def __init__(
        self,
        input_dim: int,
        output_dim: int | Sequence[int] = 3000,
        n_steps_frozen_prototypes: int = 0,
        bias: bool = True,
        weight_norm: bool = False,
        trainable: bool = True,
    ) -> None:
        sizes = list(output_dim) if isinstance(output_dim, Sequence) else [output_dim]
        super().__init__(input_dim, sum(positive("output_dim", n) for n in sizes))
        if n_steps_frozen_prototypes > 0 and not trainable:
            raise OptionError(
                "prototypes with trainable=False stay as they are at every step: leave "
                f"n_steps_frozen_prototypes={n_steps_frozen_prototypes} out."
            )
        self.other_keys = {"": "heads.0."}
        if isinstance(output_dim, Sequence):
            self.output_dim = sizes  # type: ignore[assignment]
            self.other_keys = {"": "heads."}
        self.n_steps_frozen_prototypes = n_steps_frozen_prototypes
        self.bias = bias
        self.weight_norm = weight_norm
        self.trainable = trainable
        self.heads = nn.ModuleList(_linear(input_dim, n, bias, weight_norm) for n in sizes)
        if not trainable:
            self.normalize()
            self.requires_grad_(False)

    def __iter__(self) -> Iterator[nn.Module]:
        """The sets' linear layers, as solo-learn's DeepCluster-v2 goes through them."""
        return iter(self.heads)

    def forward(self, x: Tensor, step: int | None = None) -> Tensor | list[Tensor]:  # type: ignore[override]
        """The scores, `(..., output_dim)`, of `x`, `(..., input_dim)`.

        Args:
            x: Projections of length one.
            step: The training step, counted from 0; needed with `n_steps_frozen_prototypes`.

        Returns:
            A tensor, or a list of tensors if `output_dim` is one.

        Raises:
            DimensionError: The last dimension is not `input_dim`.
            OptionError: `step` is missing in training.
        """
        self._hold(step)
        rows = self.fold(x)
        logits = [self.unfold(head(rows), x) for head in self.heads]
        return logits[0] if isinstance(self.output_dim, int) else logits

    @torch.no_grad()
    def normalize(self) -> None:
        """Gives every prototype length one, in place; weight-normed and frozen ones stay."""
        for name, weight in self.named_parameters():
            if name.endswith(".weight"):
                weight.copy_(unit(weight))

    def _hold(self, step: int | None) -> None:
        steps = self.n_steps_frozen_prototypes
        if steps > 0 and step is None and self.training:
            raise OptionError(
                f"n_steps_frozen_prototypes={steps} needs the training step: call "
                "prototypes(x, step=step), counted from 0."
            )
        if steps > 0 and step is not None:
            for name, parameter in self.named_parameters():
                if not name.endswith(".weight_g"):
                    parameter.requires_grad_(step >= steps)


class CAPIHead(WeightNormedHead):
    """L2 normalisation, then a linear layer whose rows are prototypes, called `layer`.

    From CAPI (arXiv 2502.08769): the student's head has `weight_norm`, the teacher's has none.

    Args:
        input_dim: Width of the patch features.
        output_dim: Number of clusters.
        bias: Whether the scores have one.
        weight_norm: Whether rows keep length one.

    Raises:
        OptionError: A width is not a positive integer.

    >>> CAPIHead(384, output_dim=1024)(torch.rand(2, 196, 384)).shape
    torch.Size([2, 196, 1024])
    """

    name = "capi"

    def __init__(
        self,
        input_dim: int,
        output_dim: int = 16384,
        bias: bool = False,
        weight_norm: bool = False,
    ) -> None:
        super().__init__(input_dim, output_dim)
        self.bias = bias
        self.weight_norm = weight_norm
        self.layer = _linear(input_dim, output_dim, bias, weight_norm)

    def project(self, x: Tensor) -> Tensor:
        """The head on `(batch, input_dim)`."""
        z: Tensor = self.layer(unit(x))
        return z


class SMoGPrototypesHead(ProjectionHead):
    """Group features that follow the projections assigned to them; scores are cosines.

    From SMoG (arXiv 2207.06167). In each step take `get_updated_group_features`, through which
    gradients flow, give them to `forward`, then keep them with `set_group_features`. They start at
    random; pass `weights={"group_features": tensor}` to `create_head`, or set them, for a better
    start.

    Args:
        input_dim: Width of the projection.
        output_dim: Number of groups.
        beta: How much of a group's feature is kept in an update.

    Raises:
        OptionError: A width is not a positive integer, or `beta` not in [0, 1).

    >>> head = SMoGPrototypesHead(128, output_dim=50)
    >>> z = torch.rand(8, 128)
    >>> updated = head.get_updated_group_features(z)
    >>> head.set_group_features(updated)
    >>> head(z, updated, temperature=0.2).shape, head.assign_groups(z).shape
    (torch.Size([8, 50]), torch.Size([8]))
    """

    name = "smog_prototypes"
    group_features: Tensor

    def __init__(self, input_dim: int, output_dim: int = 300, beta: float = 0.99) -> None:
        super().__init__(input_dim, output_dim)
        self.beta = probability("beta", beta)
        groups = torch.rand(output_dim, input_dim)
        self.group_features = nn.Parameter(groups, requires_grad=False)

    def forward(
        self, x: Tensor, group_features: Tensor | None = None, temperature: float = 0.1
    ) -> Tensor:
        """Cosines between projections and groups, divided by the temperature.

        Args:
            x: Projections, `(..., input_dim)`.
            group_features: Groups, `(output_dim, input_dim)`, instead of the head's own.
            temperature: Divides the cosines.

        Raises:
            DimensionError: The last dimension is not `input_dim`.
        """
        groups = self.group_features if group_features is None else group_features
        cosines = unit(self.fold(x)) @ unit(groups).t()
        return self.unfold(cosines / temperature, x)

    def get_updated_group_features(self, x: Tensor) -> Tensor:
        """The groups moved to the mean of the projections nearest to them; the head's own stay.

        Args:
            x: Projections, `(batch, input_dim)`.
        """
        assigned = self.assign_groups(x)
        updated = self.group_features.detach().clone()
        for group in assigned.unique():
            mean = x[assigned == group].mean(dim=0)
            updated[group] = self.beta * self.group_features[group] + (1 - self.beta) * mean
        return updated

    def set_group_features(self, x: Tensor) -> None:
        """Replaces the groups, without gradients.

        Args:
            x: Groups, `(output_dim, input_dim)`.

        Raises:
            DimensionError: They have another shape.
        """
        if x.shape != self.group_features.shape:
            raise DimensionError(
                f"the head {self.name!r} has group features of shape "
                f"{tuple(self.group_features.shape)}, not {tuple(x.shape)}; build it with "
                f"output_dim={x.shape[0]} and input_dim={x.shape[-1]} to use these."
            )
        self.group_features.data = x.detach().to(self.group_features)

    @torch.no_grad()
    def assign_groups(self, x: Tensor) -> Tensor:
        """The index of the nearest group, `(...)`, of projections `(..., input_dim)`."""
        return self(x).argmax(dim=-1)  # type: ignore[no-any-return]


PRESETS: dict[str, dict[str, Any]] = {
    "swav_prototypes": {
        "builder": PrototypesHead,
        "summary": "SwAV's prototypes, behind its normalised projection",
        "paper": "arXiv 2006.09882",
        "source": "lightly.models.modules.heads:SwaVPrototypes",
    },
    "swav_prototypes_solo": {
        "builder": PrototypesHead,
        "summary": "SwAV's prototypes as in solo-learn: weight-normed, without bias",
        "paper": "arXiv 2006.09882",
        "source": "solo.methods.swav:SwAV.prototypes",
        "preset": {"bias": False, "weight_norm": True},
    },
    "deepcluster_v2_prototypes_solo": {
        "builder": PrototypesHead,
        "summary": "DeepCluster-v2's three sets of prototypes, set by k-means",
        "paper": "arXiv 2006.09882",
        "source": "solo.methods.deepclusterv2:DeepClusterV2.prototypes",
        "preset": {"output_dim": [3000, 3000, 3000], "bias": False, "trainable": False},
    },
    "capi": {
        "builder": CAPIHead,
        "summary": "CAPI's head for patches: L2 norm and a linear layer of prototypes",
        "paper": "arXiv 2502.08769",
        "source": "lightly.models.modules.heads:CAPIProjectionHead",
    },
    "smog_prototypes": {
        "builder": SMoGPrototypesHead,
        "summary": "SMoG's group features, moved by momentum instead of gradients",
        "paper": "arXiv 2207.06167",
        "source": "lightly.models.modules.heads:SMoGPrototypes",
    },
}
