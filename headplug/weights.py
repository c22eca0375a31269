"""Weights into models: exactly as they were trained, or not at all, with what differs in words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from headplug.checkpoints import plain_name
from headplug.errors import CheckpointError
from headplug.strip import strip_backbone

CLASSIFIERS = ("fc", "classifier", "heads", "head", "head_dist")
RESNETS = {(2, 2, 2, 2): "18", (3, 4, 6, 3): "34 or 50", (3, 4, 23, 3): "101"}


def fill(model: nn.Module, state: Mapping[str, Any], where: object, *, draft: bool = False) -> None:
    """Loads weights that must be exactly the model's; a classifier may be left over.

    Args:
        model: Changed only if all fits.
        state: By name.
        where: What to call it in messages.
        draft: Only compare names, because the model's shapes are not yet those that it will have.

    Raises:
        CheckpointError: Names or shapes differ; the message says which.
    """
    own = model.state_dict()
    given = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    missing = [k for k in own if k not in given]
    unlike = [k for k in own if k in given and own[k].shape != given[k].shape and not draft]
    left = [k for k in given if k not in own and k.partition(".")[0] not in CLASSIFIERS]
    if missing or unlike or left:
        problems = [
            f"{len(keys)} {what} ({', '.join(map(show, keys[:3]))}{', ...' * (len(keys) > 3)})"
            for what, keys, show in (
                (f"of the model's {len(own)} tensors are missing there", missing, str),
                (
                    "have other shapes",
                    unlike,
                    lambda k: f"{k} {tuple(given[k].shape)} there, {tuple(own[k].shape)} here",
                ),
                ("are not the model's", left, str),
            )
            if keys
        ]
        raise CheckpointError(
            f"the weights of {where} do not fit {type(model).__name__}: {'; '.join(problems)}. "
            "Name the architecture that they were trained in."
        )
    if not draft:
        model.load_state_dict({k: given[k] for k in own})


def backbone_in(
    state: Mapping[str, Any], where: object, part: str | None = None
) -> Mapping[str, Tensor]:
    """The weights of the backbone in a model's; all, if they are a backbone's already.

    Args:
        state: By name.
        where: What to call it in messages.
        part: Path of the backbone.

    Raises:
        CheckpointError: There are several, and none is named.
    """
    try:
        return strip_backbone(state, part)
    except CheckpointError as error:
        if "several backbones" not in str(error):
            return plain(state)
        raise CheckpointError(
            f"{where}{str(error).removeprefix('the state dict')} With its architecture: --backbone "
            "PATH=timm:NAME."
        ) from None


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without what DDP and torch.compile add to its names."""
    return {plain_name(k): v for k, v in state.items()}


def is_small(weights: Mapping[str, Tensor]) -> bool:
    """Whether a ResNet starts with a 3x3 convolution, as is usual for small images."""
    first = weights.get("conv1.weight")
    return first is not None and tuple(first.shape[1:]) == (3, 3, 3)


def channels(weights: Mapping[str, Tensor]) -> int:
    """Of the images that the first convolution takes; 3 if there is none."""
    return next((v.shape[1] for v in weights.values() if v.ndim == 4), 3)


def guess(weights: Mapping[str, Tensor]) -> str:
    """Which ResNet it may be, in words."""
    blocks = {m[0] for k in weights if (m := re.match(r"layer(\d)\.(\d+)\.", k))}
    counts = tuple(sum(b.startswith(f"layer{i}.") for b in blocks) for i in (1, 2, 3, 4))
    return f"; it looks like a ResNet-{RESNETS[counts]}" if counts in RESNETS else ""
