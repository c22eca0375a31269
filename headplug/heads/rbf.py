"""Radial-basis-function network heads, their initialisation from data, and their separation.

Parameters carry the authors' names, so that their checkpoints load. Distances are taken in float32
at least, without a tensor of batch x kernels x features, and have a finite gradient everywhere.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headplug.errors import DataError, DimensionError, OptionError
from headplug.heads.base import ProjectionHead, choose, positive
from headplug.heads.mlp import Norm, stack

TINY = torch.finfo(torch.float32).tiny
RADIALS: dict[str, Callable[[Tensor], Tensor]] = {  # of the square of the scaled distance
    "gaussian": lambda s: torch.exp(-s),
    "inverse_quadratic": lambda s: 1 / (1 + s),
    "inverse_multiquadric": lambda s: torch.rsqrt(1 + s),
    "multiquadric": lambda s: torch.sqrt(1 + s),
    "thin_plate": lambda s: 0.5 * s * s.clamp_min(TINY).log(),
}


def squared_distances(x: Tensor, centers: Tensor) -> Tensor:
    """Squared Euclidean distances, in the type of the arguments.

    Both are shifted by the centres' mean, which changes no distance and keeps its digits where the
    features have an offset.

    Args:
        x: `(rows, features)`.
        centers: `(kernels, features)`.

    Returns:
        `(rows, kernels)`, never negative.

    >>> squared_distances(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[25.,  0.]])
    """
    shift = centers.detach().mean(0)
    x, centers = x - shift, centers - shift
    squares = x.square().sum(1, keepdim=True) + centers.square().sum(1)
    return (squares - 2 * x @ centers.T).clamp_min(0)


class RBFLayer(nn.Module):
    """Kernels around learned centres, mixed linearly: `weights @ phi(exp(log_shapes) * r)`.

    `r` is the Euclidean distance to a centre. The parameters, with the names and shapes that the
    authors of arXiv 2606.21590 take from the package PytorchRBFLayer: `weights` (out_features,
    num_kernels), `kernels_centers` (num_kernels, in_features), `log_shapes` (num_kernels,).

    They start as there (Xavier, uniform in [-1, 1], normal with deviation 0.1), save that the
    shapes start around 1 / sqrt(in_features) instead of 1: with a few hundred features and shapes
    of 1, every Gaussian is zero in float32, and the layer is a constant without gradient.

    Args:
        in_features: Width of the input.
        num_kernels: Number of centres.
        out_features: Width of the output.
        radial: gaussian, inverse_quadratic, inverse_multiquadric, multiquadric or thin_plate
            (r^2 log r, the authors' "tps").
        normalize: Whether kernel values are divided by their sum plus 1e-9. Meant for kernels
            that are positive; the sum of thin-plate values can come near zero.

    Raises:
        OptionError: A width is not a positive integer, or no radial has that name.

    >>> RBFLayer(512, 256, 128)(torch.rand(8, 512)).shape
    torch.Size([8, 128])
    """

    no_decay: ClassVar = ("kernels_centers", "log_shapes")
    weights: Tensor
    kernels_centers: Tensor
    log_shapes: Tensor

    def __init__(
        self,
        in_features: int,
        num_kernels: int,
        out_features: int,
        radial: str = "gaussian",
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.in_features = positive("in_features", in_features)
        self.num_kernels = positive("num_kernels", num_kernels)
        self.out_features = positive("out_features", out_features)
        choose("radial", radial, RADIALS)
        self.radial = radial.lower()
        self.normalize = normalize
        self.weights = nn.Parameter(torch.empty(out_features, num_kernels))
        self.kernels_centers = nn.Parameter(torch.empty(num_kernels, in_features))
        self.log_shapes = nn.Parameter(torch.empty(num_kernels))
        nn.init.uniform_(self.kernels_centers, -1, 1)
        nn.init.normal_(self.log_shapes, -0.5 * math.log(in_features), 0.1)
        nn.init.xavier_uniform_(self.weights)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(batch, in_features)` to `(batch, out_features)`."""
        return F.linear(self.kernels(x).to(x.dtype), self.weights)

    def kernels(self, x: Tensor) -> Tensor:
        """Kernel values `(batch, num_kernels)` before they are mixed; at least float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with _no_autocast(x):
            squares = squared_distances(x.to(wide), self.kernels_centers.to(wide))
            values = RADIALS[self.radial](squares * torch.exp(2 * self.log_shapes.to(wide)))
            if self.normalize:
                values = values / (values.sum(1, keepdim=True) + 1e-9)
        return values

    @torch.no_grad()
    def init_centers(self, rows: Tensor, seed: int = 0) -> None:
        """Sets centres and shapes from data, in place; see `RBFHead.init_centers`.

        Args:
            rows: Inputs of this layer, `(rows, in_features)`.
            seed: Of k-means.

        Raises:
            DataError: Fewer rows differ than there are kernels.
        """
        rows = rows.float()
        distinct = len(rows.unique(dim=0))
        if distinct < self.num_kernels:
            raise DataError(
                f"only {distinct} of the {len(rows)} rows that reach an RBF layer differ; its "
                f"{self.num_kernels} kernels need as many. Pass more features, or take fewer "
                "kernels."
            )
        if "kernels_centers" in self._parameters:
            self.kernels_centers.copy_(k_means(rows, self.num_kernels, seed))
        if "log_shapes" in self._parameters:
            near = min(len(rows), max(2, 2 * len(rows) // self.num_kernels))
            squares = squared_distances(self.kernels_centers.float(), rows)
            widths = squares.topk(near, largest=False).values.mean(1)
            self.log_shapes.copy_(-0.5 * widths.clamp_min(1e-6 * widths.mean()).log())

    def extra_repr(self) -> str:
        """The options, for `print`."""
        return (
            f"{self.in_features}, {self.num_kernels}, {self.out_features}, "
            f"radial={self.radial!r}, normalize={self.normalize}"
        )


class RBFHead(ProjectionHead):
    """Linear layers with a network of radial basis functions behind each but the last.

    From arXiv 2606.21590, whose authors recommend three Gaussian RBF layers. Take their results
    with care: with their initial shapes and 2048 features every Gaussian is zero, and their
    published logs show it (the training loss of all their Gaussian SimCLR runs is log(2 * 2048 -
    1), that of a constant output). Here it starts alive; better, start it from data, before the
    optimiser's first step:

        head.init_centers(features(model, images, at="pre_projection"))

    Args:
        input_dim: Width of the representation.
        output_dim: Width of the projection.
        hidden_dim: Width of the layers between; left out, that of the input.
        num_layers: Number of linear layers, one more than of RBF layers.
        num_kernels: Centres in every RBF layer; the paper uses 128 to 512.
        radial: gaussian, inverse_quadratic, inverse_multiquadric, multiquadric or thin_plate
            (the authors' "tps").
        normalize: Whether a layer's kernel values are divided by their sum.
        norm: Before every RBF layer: batch, batch_no_affine, layer or none.
        output_norm: After the last layer; the authors' projection head with batch norm has it
            here, too, their prediction head has not.

    Raises:
        OptionError: An option has an impossible value.

    >>> RBFHead(512, 128, num_layers=2).layers
    Sequential(
      (0): Linear(in_features=512, out_features=512, bias=True)
      (1): RBFLayer(512, 256, 512, radial='gaussian', normalize=True)
      (2): Linear(in_features=512, out_features=128, bias=True)
    )
    """

    name = "rbf"
    layers: nn.Sequential

    def __init__(
        self,
        input_dim: int,
        output_dim: int = 128,
        hidden_dim: int | None = None,
        num_layers: int = 4,
        num_kernels: int = 256,
        radial: str = "gaussian",
        normalize: bool = True,
        norm: Norm = "none",
        output_norm: Norm = "none",
    ) -> None:
        super().__init__(input_dim, output_dim)
        if positive("num_layers", num_layers) < 2:
            raise OptionError("num_layers must be at least 2: an RBF layer lies between two.")
        self.hidden_dim = positive("hidden_dim", input_dim if hidden_dim is None else hidden_dim)
        self.num_layers = num_layers
        self.num_kernels = num_kernels
        self.radial = radial
        self.normalize = normalize
        self.norm = norm
        self.output_norm = output_norm
        widths = [self.hidden_dim] * (num_layers - 1)
        kernels = [RBFLayer(w, num_kernels, w, radial, normalize) for w in widths]  # authors' order
        self.layers = stack(
            [input_dim, *widths, output_dim], lambda width: kernels.pop(0), norm, output_norm
        )

    @property
    def rbf_layers(self) -> list[RBFLayer]:
        """The RBF layers, first to last."""
        return [m for m in self.layers if isinstance(m, RBFLayer)]

    @torch.no_grad()
    def init_centers(self, features: Tensor, seed: int = 0) -> None:
        """Sets the centres and shapes of every RBF layer from data, first to last.

        A layer's centres come from k-means on what reaches it in training mode, the layers before
        it already set. A kernel's shape is one over its width: the root mean square distance from
        its centre to the 2 * rows / num_kernels nearest rows (those of its own and of a
        neighbouring cluster, on average), but no less than a thousandth of what is usual in the
        layer. Frozen centres and shapes stay.

        Parameters keep their identity, so an optimiser that holds them stays valid. Mode, running
        statistics and global generators are left alone; after an error, so are the weights. Make a
        momentum copy of the head afterwards, or load it again:
        `twin.load_state_dict(head.state_dict())`. The same holds for processes that train together.

        Args:
            features: Representations, `(..., input_dim)`; a few thousand rows are enough.
            seed: The same one gives the same centres, on one kind of device.

        Raises:
            DimensionError: The features have another width.
            DataError: Values are not finite, or there are fewer different rows than kernels.
            OptionError: All centres and shapes are frozen.
        """
        x = self._checked(features)
        layers = copy.deepcopy(self.layers).train()  # an error or batch norm changes only the copy
        with _no_autocast(x):
            for layer in layers:
                if isinstance(layer, RBFLayer):
                    layer.init_centers(x, seed)
                x = layer(x)
        ready = [m for m in layers if isinstance(m, RBFLayer)]
        for layer, found in zip(self.rbf_layers, ready, strict=True):
            layer.load_state_dict(found.state_dict())

    def separation(self) -> float:
        """Scale-Normalized Separation of the last RBF layer, as its authors take it.

        They read `exp(log_shapes)` as a kernel's width, although it is the layer's factor on
        distances, one over the width. For the widths, call `scale_normalized_separation` with
        `torch.exp(-layer.log_shapes)`.

        Raises:
            OptionError: The layer has one kernel only.
        """
        layer = self.rbf_layers[-1]
        with torch.no_grad():
            shapes = layer.log_shapes.float().exp()
            return scale_normalized_separation(layer.kernels_centers.float(), shapes).item()

    def _checked(self, features: Tensor) -> Tensor:
        """Features as rows of the first layer's type, on its device."""
        trained = {name.rpartition(".")[2] for name, _ in self.named_parameters()}
        if trained.isdisjoint(RBFLayer.no_decay):
            raise OptionError(
                "all centres and shapes of this head are frozen; call init_centers before "
                "freezing: head.init_centers(features); head.freeze_layers(...)."
            )
        if features.shape[-1:] != (self.input_dim,):
            raise DimensionError(
                f"init_centers takes {self.input_dim} features in the last dimension, as the head "
                f"does; these have shape {tuple(features.shape)}."
            )
        rows = features.detach().reshape(-1, self.input_dim)
        if len(rows) < max(2, self.num_kernels):
            raise DataError(
                f"init_centers needs at least {max(2, self.num_kernels)} rows, one per kernel; "
                f"there are {len(rows)}. Pass more features, or build the head with fewer kernels."
            )
        wrong = int((~rows.isfinite()).any(1).sum())
        if wrong:
            raise DataError(
                f"{wrong} of {len(rows)} rows have values that are not finite; drop them: "
                "features[features.isfinite().all(-1)]."
            )
        return rows.to(cast("nn.Linear", self.layers[0]).weight)


def scale_normalized_separation(centers: Tensor, sigmas: Tensor) -> Tensor:
    """How well kernels are spread for their widths (SNS, arXiv 2606.21590); needs no labels.

    The mean of `d^2 exp(-d^2)` over all pairs of different kernels, where `d = |ci - cj| /
    sqrt((si^2 + sj^2 + 1e-8) features)`. It lies in [0, 1/e]: 1/e where all pairs are at d = 1,
    near 0 where kernels coincide or do not meet. The paper reports that higher values go with
    better representations.

    Args:
        centers: `(kernels, features)`.
        sigmas: Widths, `(kernels,)`.

    Returns:
        A scalar with a gradient.

    Raises:
        DimensionError: The shapes do not fit each other.
        OptionError: There are fewer than two kernels.

    >>> scale_normalized_separation(torch.tensor([[0.0], [2.0]]), torch.tensor([2.0, 2.0])).item()
    0.303265...
    """
    if centers.ndim != 2 or sigmas.shape != centers.shape[:1]:
        raise DimensionError(
            f"centers must be (kernels, features) and sigmas (kernels,), not "
            f"{tuple(centers.shape)} and {tuple(sigmas.shape)}."
        )
    count, features = centers.shape
    if count < 2:
        raise OptionError(f"separation is one of pairs of kernels; there is only {count}.")
    scales = sigmas.square()[:, None] + sigmas.square() + 1e-8
    squares = squared_distances(centers, centers) / (scales * features)
    energies = squares * torch.exp(-squares)
    pairs = ~torch.eye(count, dtype=torch.bool, device=centers.device)
    return energies[pairs].mean()


@torch.no_grad()
def k_means(rows: Tensor, k: int, seed: int = 0, steps: int = 100) -> Tensor:
    """Lloyd's algorithm after k-means++ seeding, on the rows' device, with a generator of its own.

    A cluster that loses its rows moves to the row farthest from its centre.

    Args:
        rows: `(rows, features)`, at least k of them, in float32.
        k: Number of centres.
        seed: The same one gives the same centres, on one kind of device.
        steps: Most steps taken; it stops when no row changes its cluster.

    Returns:
        Centres, `(k, features)`.

    >>> k_means(torch.tensor([[0.0], [1.0], [10.0], [11.0]]), 2).sort(0).values
    tensor([[ 0.5000],
            [10.5000]])
    """
    noise = torch.Generator(rows.device).manual_seed(seed)
    nearest = rows.new_full((len(rows),), torch.inf)
    chance, chosen = torch.ones_like(nearest), []
    for _ in range(k):  # the fastest of clocks that run at rates `chance` is a draw by `chance`
        clock = torch.empty_like(chance).exponential_(generator=noise)
        chosen.append((chance / clock).argmax())
        chance = nearest = torch.minimum(nearest, (rows - rows[chosen[-1]]).square().sum(1))
    centers = rows[torch.stack(chosen)]
    clusters = None
    for _ in range(steps):
        before, (nearest, clusters) = clusters, squared_distances(rows, centers).min(1)
        if before is not None and torch.equal(before, clusters):
            break
        members = F.one_hot(clusters, k).to(rows)
        counts = members.sum(0)
        centers = members.T @ rows / counts.clamp_min(1)[:, None]
        empty = counts == 0
        centers[empty] = rows[nearest.topk(int(empty.sum())).indices]
    return centers


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    device = x.device.type
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


PRESETS: dict[str, dict[str, Any]] = {
    "rbf": {
        "builder": RBFHead,
        "summary": "three Gaussian RBF layers; their centres give a quality without labels",
        "paper": "arXiv 2606.21590",
    },
    "rbf_predictor": {
        "builder": RBFHead,
        "summary": "RBF predictor for BYOL and SimSiam: batch norm, one Gaussian RBF layer",
        "paper": "arXiv 2606.21590",
        "preset": {"num_layers": 2, "norm": "batch"},
    },
}
