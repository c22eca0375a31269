"""Models that solo-learn's runs left: a checkpoint, and args.json beside it that says of what.

With solo-learn importable the whole method is built anew, with the head that it was trained with;
without it the backbone alone, where torchvision has it.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from headplug.checkpoints import read_state_dict
from headplug.errors import CheckpointError, HeadplugError
from headplug.models import LoadedModel
from headplug.strip import strip_backbone
from headplug.usercode import safely
from headplug.weights import fill

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATISTICS = {  # what solo-learn standardises with; other data sets as ImageNet
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261)),
}


def load_run(path: Path) -> LoadedModel:
    """The model of a checkpoint of solo-learn's.

    Args:
        path: The checkpoint, in the folder where the run wrote args.json.

    Raises:
        CheckpointError: args.json does not say what to build, or the weights do not fit.
    """
    file = path.parent / "args.json"
    try:
        args = json.loads(file.read_text("utf-8"))
        method = args["method"]
        backbone = args.get("backbone") or args["encoder"]
        name = backbone["name"] if isinstance(backbone, dict) else str(backbone)
        data = args["data"]["dataset"] if isinstance(args.get("data"), dict) else args["dataset"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is not one of solo-learn's ({type(error).__name__}: {error}). Move the "
            "checkpoint elsewhere, or name its backbone: --backbone torchvision:resnet18."
        ) from None
    mean, std = STATISTICS.get(data, IMAGENET)
    if find_spec("solo") is not None:
        model = _method(method, args, path)
        return LoadedModel(model, f"solo-learn's {method} ({name}) of {path}", mean, std)
    small = data in ("cifar10", "cifar100")
    return LoadedModel(
        _backbone(name, small, path),
        f"the backbone {name} of {path}, without its heads, because solo-learn is not installed",
        mean,
        std,
    )


def _method(name: str, args: dict[str, Any], path: Path) -> nn.Module:
    from solo.methods import METHODS

    from headplug_solo.patch import arm

    arm()
    kind = METHODS[name]
    options: dict[str, Any] = {**args}
    if isinstance(args.get("backbone"), dict):  # main; the release takes arguments
        from omegaconf import OmegaConf

        options = {"cfg": OmegaConf.create(args)}
    try:
        model: nn.Module = kind.load_from_checkpoint(
            path, map_location="cpu", strict=False, **safely(kind), **options
        )
    except HeadplugError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"solo-learn cannot load {path}: {' '.join(str(error).split())[:300]}. Name its "
            "backbone to read that alone: --backbone torchvision:resnet18."
        ) from error
    state = read_state_dict(path)
    fill(model, {k: v for k, v in state.items() if k in model.state_dict()}, path)
    return model


def _backbone(name: str, small: bool, path: Path) -> nn.Module:
    from torchvision import models

    if name not in ("resnet18", "resnet50"):
        raise CheckpointError(
            f"{path} has the backbone {name!r}, which solo-learn itself builds: pip install "
            "solo-learn, or name it as timm does: --backbone timm:NAME."
        )
    backbone: Any = models.get_model(name)
    backbone.fc = nn.Identity()
    if small:
        backbone.conv1 = nn.Conv2d(3, 64, 3, 1, 2, bias=False)  # with its padding of two
        backbone.maxpool = nn.Identity()
    fill(backbone, strip_backbone(path), path)
    model = nn.Sequential()
    model.backbone = backbone
    return model
