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
from headplug.heads.clustering import TINY, k_means, squared_distances
from headplug.heads.mlp import Norm, stack

RADIALS: dict[str, Callable[[Tensor], Tensor]] = {  # of the square of the scaled distance
    "gaussian": lambda s: torch.exp(-s),
    "inverse_quadratic": lambda s: 1 / (1 + s),
    "inverse_multiquadric": lambda s: torch.rsqrt(1 + s),
    "multiquadric": lambda s: torch.sqrt(1 + s),
    "thin_plate": lambda s: 0.5 * s * s.clamp_min(TINY).log(),
}


class RBFLayer(nn.Module):
    """Kernels around learned centres, mixed linearly: `weights @ phi(exp(log_shapes) * r)`.

    `r` is the Euclidean distance to a centre. The parameters have the names and shapes of the
    package PytorchRBFLayer, as in the code of arXiv 2606.21590: `weights` (out_features,
    num_kernels), `kernels_centers` (num_kernels, in_features), `log_shapes` (num_kernels,). They
    start as there (Xavier; uniform in [-1, 1]; normal with deviation 0.1), save that shapes start
    around 1 / sqrt(in_features) instead of 1: at 1, with some hundred features, every Gaussian is
    zero in float32 and the layer is a constant without gradient.

    Args:
        in_features: Width of the input.
        num_kernels: Number of centres.
        out_features: Width of the output.
        radial: gaussian, inverse_quadratic, inverse_multiquadric, multiquadric or thin_plate
            (r^2 log r, the authors' "tps").
        normalize: Whether kernel values are divided by their sum plus 1e-9. Meant for positive
            kernels; the sum of thin-plate values can come near zero.

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
        normalize: bool = False,
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
        """Kernel values `(batch, num_kernels)` before they are mixed; float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with _no_autocast(x):
            squares = squared_distances(x.to(wide), self.kernels_centers.to(wide))
            values = RADIALS[self.radial](squares * torch.exp(2 * self.log_shapes.to(wide)))
            return values / (values.sum(1, keepdim=True) + 1e-9) if self.normalize else values

    @torch.no_grad()
    def init_centers(self, rows: Tensor, seed: int = 0) -> None:
        """Sets centres and shapes from `(rows, in_features)`; see `RBFHead.init_centers`.

        Raises:
            DataError: Fewer rows differ than there are kernels.
        """
        rows = rows.float()
        distinct = len(rows.unique(dim=0))
        if distinct < self.num_kernels:
            raise DataError(
                f"only {distinct} of the {len(rows)} rows that reach an RBF layer differ; its "
                f"{self.num_kernels} kernels need as many. Pass more features, or build the head "
                "with fewer kernels."
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
        widths = f"{self.in_features}, {self.num_kernels}, {self.out_features}"
        return f"{widths}, radial={self.radial!r}, normalize={self.normalize}"


class RBFHead(ProjectionHead):
    """Linear layers with a network of radial basis functions behind each but the last.

    From arXiv 2606.21590. Its authors recommend three Gaussian RBF layers (`num_layers=4`). Their
    published results do not bear that out: all 72 Gaussian SimCLR runs end at the loss of a
    constant output, as if their kernels start and stay at zero (see `RBFLayer`). Here one layer
    trains from its random start; deeper heads need `init_centers`, and one layer gains from it.

    Weights do not tell `radial` and `normalize`: give those that a checkpoint was trained with.

    Args:
        input_dim: Width of the representation.
        output_dim: Width of the projection.
        hidden_dim: Width of the layers between; left out, that of the input.
        num_layers: Number of linear layers, one more than of RBF layers.
        num_kernels: Centres in every RBF layer; the paper uses 128 to 512.
        radial: gaussian, inverse_quadratic, inverse_multiquadric, multiquadric or thin_plate
            (the authors' "tps").
        normalize: Whether an RBF layer's kernel values are divided by their sum; the authors' code
            does by default.
        norm: Before every RBF layer: batch, batch_no_affine, layer or none.
        output_norm: After the last layer. The authors' projection head with batch norm has it in
            both places, their prediction head only in the first.

    Raises:
        OptionError: An option has an impossible value.

    >>> RBFHead(512, 128).layers
    Sequential(
      (0): Linear(in_features=512, out_features=512, bias=True)
      (1): RBFLayer(512, 256, 512, radial='gaussian', normalize=False)
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
        num_layers: int = 2,
        num_kernels: int = 256,
        radial: str = "gaussian",
        normalize: bool = False,
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
        ready = [RBFLayer(w, num_kernels, w, radial, normalize) for w in widths]  # before linears,
        take = iter(ready)  # as the authors do, so that a seed gives their values
        self.layers = stack(
            [input_dim, *widths, output_dim], lambda width: next(take), norm, output_norm
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
        its centre to the 2 * rows / num_kernels nearest rows (about those of its own and one
        neighbouring cluster), at least a thousandth of the layer's root mean square width. Frozen
        centres and shapes stay.

        Parameters are changed in place, so an optimiser that holds them stays valid. Mode, running
        statistics and global generators are left alone, and after an error the weights, too. A
        momentum copy must be made afterwards or loaded again: `twin.load_state_dict(
        head.state_dict())`; so must the heads of other processes.

        Args:
            features: Representations, `(..., input_dim)`; a few thousand rows are enough.
            seed: The same one gives the same centres on the same kind of device.

        Raises:
            DimensionError: The features have another width.
            DataError: Values are not finite, or fewer rows differ than there are kernels.
            OptionError: All centres and shapes are frozen.

        >>> head = RBFHead(16, 4, num_kernels=8)
        >>> head.init_centers(torch.rand(100, 16))
        """
        x = self._checked(features)
        layers = copy.deepcopy(self.layers).train()  # batch norm, and an error, change only this
        with _no_autocast(x):
            for layer in layers:
                if isinstance(layer, RBFLayer):
                    layer.init_centers(x, seed)
                x = layer(x)
        for old, new in zip(self.layers, layers, strict=True):
            if isinstance(old, RBFLayer):
                old.load_state_dict(new.state_dict())

    def separation(self) -> float:
        """Scale-Normalized Separation of the last RBF layer, as its authors take it.

        They read `exp(log_shapes)` as a kernel's width, although the layer multiplies distances by
        it. For the true widths give `scale_normalized_separation` `torch.exp(-layer.log_shapes)`.

        Raises:
            OptionError: The layer has one kernel only.
        """
        layer = self.rbf_layers[-1]
        with torch.no_grad():
            shapes = layer.log_shapes.float().exp()
            return scale_normalized_separation(layer.kernels_centers.float(), shapes).item()

    def _checked(self, features: Tensor) -> Tensor:
        """The features as rows, where and as the first layer takes them."""
        trained = {name.rpartition(".")[2] for name, _ in self.named_parameters()}
        if trained.isdisjoint(RBFLayer.no_decay):
            raise OptionError(
                "all centres and shapes of this head are frozen; set them first: "
                "head.init_centers(features); head.freeze_layers(...)."
            )
        if features.shape[-1:] != (self.input_dim,):
            raise DimensionError(
                f"init_centers takes {self.input_dim} features in the last dimension, as the head "
                f"does; these have shape {tuple(features.shape)}."
            )
        rows = features.detach().reshape(-1, self.input_dim)
        needed = max(2, self.num_kernels)
        if len(rows) < needed:
            raise DataError(
                f"init_centers needs at least {needed} rows for {self.num_kernels} kernels; there "
                f"are {len(rows)}. Pass more features, or build the head with fewer kernels."
            )
        wrong = int((~rows.isfinite()).any(1).sum())
        if wrong:
            raise DataError(
                f"{wrong} of {len(rows)} rows have values that are not finite; drop them: "
                "features[features.isfinite().all(-1)]."
            )
        return rows.to(cast("nn.Linear", self.layers[0]).weight)


def scale_normalized_separation(centers: Tensor, sigmas: Tensor) -> Tensor:
    """How well kernels are spread for their widths (SNS, arXiv 2606.21590), without labels.

    The mean over all pairs of kernels of `d^2 exp(-d^2)`, with `d = |ci - cj| / sqrt((si^2 + sj^2 +
    1e-8) * features)`. It lies in [0, 1/e]: 1/e where every pair is at d = 1, near 0 where kernels
    coincide or do not meet. The paper reports that higher values go with better representations.

    Args:
        centers: `(kernels, features)`.
        sigmas: Widths, `(kernels,)`.

    Returns:
        A scalar, with a gradient.

    Raises:
        DimensionError: The shapes do not fit each other.
        OptionError: There are fewer than two kernels.

    >>> scale_normalized_separation(torch.tensor([[0.0], [2.0]]), torch.tensor([1.0, 3.0]))
    tensor(0.2681)
    """
    if centers.ndim != 2 or sigmas.shape != centers.shape[:1]:
        raise DimensionError(
            "centers must be (kernels, features) and sigmas (kernels,), not "
            f"{tuple(centers.shape)} and {tuple(sigmas.shape)}."
        )
    kernels, features = centers.shape
    if kernels < 2:
        raise OptionError(f"separation takes two kernels or more, not {kernels}.")
    scales = sigmas.square()[:, None] + sigmas.square() + 1e-8
    squares = squared_distances(centers, centers) / (scales * features)
    energies = squares * torch.exp(-squares)
    return (energies.sum() - energies.trace()) / (kernels * (kernels - 1))


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if available else contextlib.nullcontext()


PRESETS: dict[str, dict[str, Any]] = {
    "rbf": {
        "builder": RBFHead,
        "summary": "a layer of Gaussian kernels; start its centres from data",
        "paper": "arXiv 2606.21590",
    },
    "rbf_predictor": {
        "builder": RBFHead,
        "summary": "predictor of Gaussian kernels behind batch norm, for BYOL and SimSiam",
        "paper": "arXiv 2606.21590",
        "preset": {"norm": "batch"},
    },
}
