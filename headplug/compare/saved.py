"""What a finished run of `headplug compare` leaves: its model, backbone and head, as trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from headplug.checkpoints import below, read_state_dict
from headplug.compare.backbones import build_backbone
from headplug.errors import CheckpointError
from headplug.heads import create_head
from headplug.swap import ANCHOR

WEIGHTS, RECORD, CONFIG = "model.safetensors", "run.json", "config.json"
HEAD = "projection_head."


def is_run(folder: Path) -> bool:
    """Whether it is the folder of a finished run."""
    return all(p.is_file() for p in (folder / WEIGHTS, folder / RECORD, folder.parent / CONFIG))


def load_run(
    folder: Path, shape: tuple[int, int, int], draft: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and the run's record.

    Args:
        folder: Of the run.
        shape: Of the images that it will get; the stem depends on it, as in training.
        draft: Without the weights.

    Raises:
        CheckpointError: The weights do not fit images of that shape.
    """
    record = _record(folder)
    config = json.loads((folder.parent / CONFIG).read_text("utf-8"))["config"]
    model = nn.Sequential()
    model.backbone = build_backbone(config["backbone"], shape, config["stem"])
    model.projection_head = create_head(record["head_config"])
    if not draft:
        try:
            model.load_state_dict(_weights(folder))
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise CheckpointError(
                f"the weights of {folder} do not fit images of {shape}: {reason} They were trained "
                f"on {config['data']!r}, --image-size {config['image_size']}."
            ) from None
    return model, record


def trained_head(folder: Path) -> nn.Module:
    """The head of a finished run, with its weights."""
    head = create_head(_record(folder)["head_config"])
    head.load_state_dict(below(_weights(folder), HEAD.rstrip(".")))
    return head


def _record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / RECORD).read_text("utf-8"))
    return record


def _weights(folder: Path) -> dict[str, Any]:
    """Of backbone and head, without what a swap needs in training."""
    state = read_state_dict(folder / WEIGHTS)
    return {key: value for key, value in state.items() if not key.endswith(f".{ANCHOR}")}
