"""From a pretraining checkpoint to the backbone alone, under its library's own key names.

What training added around the backbone is taken off the names: the module's path, DDP's and
torch.compile's prefixes, lightly's `vit.`, and the numbers that a ResNet's layers have after
`nn.Sequential(*list(resnet.children())[:-1])`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from headplug.checkpoints import below, plain_name, read_state_dict
from headplug.errors import CheckpointError, unknown
from headplug.files import atomic

USUAL = ("backbone", "encoder")  # the trained backbone, if nothing else claims to be it
ONLINE = ("student_backbone", "anchor_backbone", "online_backbone")
COPIES = ("momentum", "ema", "teacher", "target", "key")
RESNET = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
WRAPPERS = ("module.", "_orig_mod.", "model.")


def strip_backbone(
    source: str | Path | Mapping[str, Any], path: str | None = None
) -> dict[str, Tensor]:
    """The backbone's weights from a checkpoint of a whole model.

    Args:
        source: A file that `headplug.checkpoints.read_state_dict` reads (Lightning's `.ckpt`, what
            `torch.save` wrote, safetensors), or a state dict.
        path: Path of the backbone in the model; left out, `backbone` or `encoder`.

    Returns:
        The state dict, under the names of torchvision's or timm's model.

    Raises:
        UnknownNameError: The file does not exist, or has no module at that path.
        CheckpointError: The file cannot be read safely, or holds no backbone or several.

    >>> import torch
    >>> weights = {"backbone.conv1.weight": torch.ones(1), "projector.0.weight": torch.ones(2)}
    >>> list(strip_backbone(weights))
    ['conv1.weight']
    """
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    state = source if isinstance(source, Mapping) else read_state_dict(source)
    state = {_unwrapped(str(k)): v for k, v in state.items() if isinstance(v, Tensor)}
    path = _unwrapped(path) if path else _find(state, where)
    found = below(state, path)
    if not found:
        raise unknown("module in the checkpoint", path, _tops(state), "Name it: --backbone PATH.")
    inner = below(found, "vit")  # lightly's masked ViTs keep a mask token beside the ViT
    return _named(inner or found)


def save_backbone(
    source: str | Path, out: str | Path, path: str | None = None
) -> dict[str, Tensor]:
    """Writes the backbone of a checkpoint to a `.safetensors` file, whole or not at all.

    Raises:
        UnknownNameError, CheckpointError: As `strip_backbone` does.
        RunError: The file cannot be written.
    """
    from safetensors.torch import save_file

    weights = strip_backbone(source, path)
    own = {k: v.detach().contiguous().clone() for k, v in weights.items()}  # no shared storage
    with atomic(out) as partial:
        save_file(own, partial, metadata={"format": "pt"})
    return weights


def _unwrapped(key: str) -> str:
    """A key without what DDP, torch.compile and Lightning wrappers put in front or between."""
    return plain_name(key, WRAPPERS)


def _tops(state: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(k.partition(".")[0] for k in state))


def _find(state: Mapping[str, Any], where: str) -> str:
    tops = _tops(state)
    online = [t for t in tops if t in ONLINE]
    usual = [t for t in tops if t in USUAL]
    if len(usual) == 1 and not online:
        return usual[0]
    candidates = [t for t in tops if "backbone" in t or "encoder" in t]
    trained = [t for t in candidates if not any(word in t for word in COPIES)]
    if not usual and len(trained) == 1:
        return trained[0]
    if candidates:
        raise CheckpointError(
            f"{where} has several backbones: {', '.join(candidates)}; one is trained, another its "
            f"EMA copy. Say which you want: --backbone {candidates[0]}."
        )
    raise CheckpointError(
        f"{where} has no module called backbone or encoder; it has "
        f"{', '.join(tops[:8]) or 'none'}. Name the one you want: --backbone PATH."
    )


def _named(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """ResNet layers that `nn.Sequential` numbered get their names back."""
    tops = set(_tops(state))
    blocks = any(re.match(r"4\.0\.conv1\.", k) for k in state)
    if not (blocks and tops <= RESNET.keys()):
        return state
    return {
        RESNET[top] + dot + rest: v
        for k, v in state.items()
        for top, dot, rest in [k.partition(".")]
    }
