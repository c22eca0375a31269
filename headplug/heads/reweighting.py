"""The fixed reweighting head: an interpretable stand-in for a trained projector."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from headplug.errors import OptionError
from headplug.heads.base import ProjectionHead
from headplug.heads.identity import same_dim


class ReweightingHead(ProjectionHead):
    """Divides feature i by `kappa**i` (arXiv 2403.11391); nothing is trained.

    The weights are a buffer, computed in log space, that stays in float32 under `.half()` and
    autocast. They load from the authors' checkpoints, which call them `reweights`, too.

    Args:
        input_dim: Width of the representation.
        output_dim: Left out, or the same.
        kappa: How fast the weights fall; 1 is the identity. The paper uses 1.01 to 1.05 with 512 to
            2048 features, and 1.2 and 1.5 with supervised losses.

    Raises:
        OptionError: `kappa` is below 1 or not finite.

    >>> ReweightingHead(3, kappa=2.0)(torch.ones(1, 3))
    tensor([[1.0000, 0.5000, 0.2500]])
    """

    name = "reweighting"
    reweights: Tensor

    def __init__(self, input_dim: int, output_dim: int | None = None, kappa: float = 1.05) -> None:
        super().__init__(input_dim, same_dim(self.name, input_dim, output_dim))
        if not 1 <= kappa <= sys.float_info.max:  # not, so that nan is refused
            raise OptionError(f"kappa must be a finite number of at least 1, not {kappa!r}.")
        self.kappa = float(kappa)
        exponents = torch.arange(input_dim, dtype=torch.float64, device="cpu")
        weights = torch.exp(-exponents * math.log(kappa)).float()
        lost = int((weights < torch.finfo(torch.float32).tiny).sum())
        if lost:
            warnings.warn(
                f"kappa={kappa} makes the last {lost} of {input_dim} weights vanish in float32: "
                f"the loss will not see those features. Take kappa nearer to 1 to keep them.",
                stacklevel=2,
            )
        self.register_buffer("reweights", weights.to(torch.get_default_device()))

    def project(self, x: Tensor) -> Tensor:
        """Reweights in float32; the result has the input's type unless autocast is on."""
        z = x * self.reweights
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return z if autocast else z.to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        exact = self.reweights
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.reweights.dtype != exact.dtype:  # .half() would round small weights to zero
            self.reweights = exact.to(self.reweights.device)
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "reweighting": {
        "builder": ReweightingHead,
        "summary": "fixed weights that fall by kappa per feature; nothing is trained",
        "paper": "arXiv 2403.11391",
    }
}
