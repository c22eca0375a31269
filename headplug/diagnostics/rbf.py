"""Scale-Normalized Separation of every layer of radial basis functions in a head or a model."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from headplug.errors import OptionError, SlotError
from headplug.heads.rbf import scale_normalized_separation


@torch.no_grad()
def separation(
    model: nn.Module, widths: Literal["authors", "kernel"] = "authors"
) -> list[dict[str, Any]]:
    """Scale-Normalized Separation (SNS, arXiv 2606.21590) of each RBF layer, without labels.

    See `headplug.heads.rbf.scale_normalized_separation`. The paper takes that of the last layer.

    Args:
        model: A head, or a model that has one; layers are known by the parameters
            `kernels_centers` and `log_shapes`, the authors' too.
        widths: A kernel's width: "authors" has `exp(log_shapes)`, as their code; "kernel" its
            inverse, the width that a layer's kernels really have, since it multiplies distances by
            `exp(log_shapes)`.

    Returns:
        A dict a layer, first to last: `layer` (its path), `sns`, `kernels`, `features`, `widths`,
        and `why`, if `sns` is None.

    Raises:
        SlotError: There is no RBF layer.
        OptionError: `widths` is neither.

    >>> from headplug import create_head
    >>> [row] = separation(create_head("rbf", input_dim=8, output_dim=4, num_kernels=16))
    >>> row["layer"], row["kernels"], 0 < row["sns"] < 0.37
    ('layers.1', 16, True)
    """
    if widths not in ("authors", "kernel"):
        raise OptionError(f"widths is 'authors' or 'kernel', not {widths!r}.")
    rows = []
    for path, layer in model.named_modules():
        centers, shapes = (getattr(layer, n, None) for n in ("kernels_centers", "log_shapes"))
        if not (isinstance(centers, Tensor) and isinstance(shapes, Tensor)):
            continue
        sigmas = (shapes if widths == "authors" else -shapes).double().exp()
        count, dim = centers.shape
        sns, why = None, "the layer has one kernel."
        if count > 1:
            value = scale_normalized_separation(centers.double(), sigmas)
            finite = bool(value.isfinite())
            sns, why = (float(value), "") if finite else (None, "its parameters are not finite.")
        row = {"layer": path, "sns": sns, "kernels": count, "features": dim, "widths": widths}
        rows.append(row | {"why": {"sns": why} if why else {}})
    if not rows:
        raise SlotError(
            f"{type(model).__name__} has no RBF layer, and only those have a separation; "
            "create_head('rbf', ...) makes a head with one."
        )
    return rows
