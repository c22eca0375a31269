"""Models by a short name, for the command line: from a library, from your code, from a checkpoint.

| name | stands for |
|---|---|
| `timm:resnet50`, `torchvision:resnet18` | the library's model without its classifier |
| `package.module:callable` | what your function, class or object of that name gives |
| `run/last.ckpt` | what a checkpoint holds |

A checkpoint of solo-learn has args.json beside it, which says what to build. Another one holds
weights without an architecture, so the backbone has to be named; a whole model with its heads comes
from the code that builds it. Weights must fit exactly, and nothing is ever unpickled.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from headplug.checkpoints import read_state_dict
from headplug.errors import CheckpointError, HeadplugError, OptionError, UnknownNameError, unknown
from headplug.weights import CLASSIFIERS, backbone_in, channels, fill, guess, is_small, plain

LIBRARIES = ("timm", "torchvision")
SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class LoadedModel:
    """A model, and what is known of it.

    Attributes:
        model: The model.
        source: What it is and where its weights are from, in one line.
        mean: What images in [0, 1] are to be standardised with, by channel; empty if unknown.
        std: The same.
    """

    model: nn.Module
    source: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


def load_model(
    name: str,
    *,
    shape: Shape = (3, 224, 224),
    weights: str | Path | None = None,
    backbone: str | None = None,
    pretrained: bool = False,
) -> LoadedModel:
    """Builds a model by its name and fills it.

    Args:
        name: See the table of this module; a name alone is timm's.
        shape: Channels, height and width of the images that it will get.
        weights: A checkpoint to fill a library's model or yours with.
        backbone: The architecture in a checkpoint that does not tell it, e.g. torchvision:resnet18;
            or PATH=ARCHITECTURE, where the checkpoint holds several backbones.
        pretrained: Whether a library's model gets the library's weights, if no others are given.

    Returns:
        The model with its weights. A backbone that comes from a checkpoint is at `backbone`, as in
        the model that it was trained in.

    Raises:
        UnknownNameError: There is no such file, model, module or object.
        CheckpointError: The weights do not fit, cannot be read safely, or do not tell what they
            are of.
        OptionError: The object gives no module, or the model cannot take such images.

    >>> load_model("timm:test_resnet", shape=(3, 32, 32)).source
    'timm:test_resnet with random weights'
    """
    path = Path(name).expanduser()
    if path.is_dir() and (path / "args.json").is_file():
        path = max(path.glob("*.ckpt"), key=os.path.getmtime, default=path / "*.ckpt")
    if path.is_file() or path.suffix in SUFFIXES:
        return _from_checkpoint(path, backbone, shape)
    library, colon, rest = name.partition(":")
    if colon and library not in LIBRARIES:
        return _from_code(library, rest, weights)
    if weights is None:
        return _from_library(name, shape, pretrained=pretrained)
    model = _filled(name, shape, backbone_in(read_state_dict(weights), weights), weights)
    return LoadedModel(model, f"{name} with the weights of {weights}")


def _from_library(
    name: str, shape: Shape, *, pretrained: bool = False, small: bool = False
) -> LoadedModel:
    library, _, rest = name.rpartition(":")
    build = _torchvision if library == "torchvision" else _timm
    try:
        model, mean, std = build(rest, shape, pretrained, small)
    except HeadplugError:
        raise
    except Exception as error:
        if not pretrained:
            raise
        raise OptionError(
            f"the pretrained weights of {name} cannot be had ({' '.join(str(error).split())[:200]})"
            ". The first use needs the network; or pass --weights FILE, or --random."
        ) from error
    kind = "the library's pretrained" if pretrained else "random"
    full = name if library else f"timm:{name}"
    return LoadedModel(model, f"{full} with {kind} weights", mean, std)


def _filled(name: str, shape: Shape, weights: Mapping[str, Tensor], where: object) -> nn.Module:
    shape = (channels(weights), *shape[1:])
    model = _from_library(name, shape, small=is_small(weights)).model
    fill(model, weights, where)
    return model


def _timm(name: str, shape: Shape, pretrained: bool, small: bool) -> Any:
    from headplug.compare.backbones import build_backbone

    model: Any = build_backbone(name, shape, "small" if small else "default")
    if not pretrained:
        return model, (), ()
    import timm

    size: dict[str, Any] = {"img_size": shape[1:]} if hasattr(model, "patch_embed") else {}
    model = timm.create_model(name, pretrained=True, num_classes=0, **size)
    config = model.pretrained_cfg
    return model, tuple(config["mean"]), tuple(config["std"])


def _torchvision(name: str, shape: Shape, pretrained: bool, small: bool) -> Any:
    from torchvision import models

    if name not in models.list_models():
        raise unknown("torchvision model", name, models.list_models())
    weights: Any = models.get_model_weights(name).DEFAULT if pretrained else None
    model: Any = models.get_model(name, weights=weights)
    for classifier in CLASSIFIERS:
        if hasattr(model, classifier):
            setattr(model, classifier, nn.Identity())
    if small and hasattr(model, "maxpool"):
        model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
    how = weights.transforms() if pretrained else None
    return model, tuple(how.mean) if how else (), tuple(how.std) if how else ()


def _from_code(module: str, name: str, weights: str | Path | None) -> LoadedModel:
    """What an object in the user's code gives; a LightningModule's class loads checkpoints."""
    from importlib import import_module

    sys.path.insert(0, os.getcwd())
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not module.startswith(error.name):
            raise
        raise UnknownNameError(
            f"there is no module {module!r} in {os.getcwd()} or installed. A model is timm:NAME, "
            "torchvision:NAME, MODULE:CALLABLE or a checkpoint."
        ) from None
    finally:
        sys.path.remove(os.getcwd())
    for part in name.split("."):
        if not hasattr(found, part):
            public = [key for key in vars(found) if not key.startswith("_")]
            raise unknown(f"object in {module}", name, public)
        found = getattr(found, part)
    text = f"{module}:{name}"
    if weights is not None and inspect.isclass(found) and hasattr(found, "load_from_checkpoint"):
        return LoadedModel(_from_lightning(found, weights), f"{text} loaded from {weights}")
    model = found if isinstance(found, nn.Module) else _called(found, text)
    if weights is None:
        return LoadedModel(model, text)
    state = read_state_dict(weights)
    whole = state.keys() >= model.state_dict().keys()
    fill(model, state if whole else plain(state), weights)
    return LoadedModel(model, f"{text} with the weights of {weights}")


def _called(found: Any, text: str) -> nn.Module:
    try:
        model = found()
    except TypeError as error:
        raise OptionError(
            f"{text} cannot be called without arguments ({error}); name a function that builds the "
            "model."
        ) from error
    if not isinstance(model, nn.Module):
        raise OptionError(f"{text} gives a {type(model).__name__}, not a torch module.")
    return model


def _from_lightning(kind: Any, weights: str | Path) -> nn.Module:
    """A LightningModule with its hyper-parameters and the heads that HeadSwap recorded."""
    from headplug.callbacks import HeadSwap

    if not Path(weights).is_file():
        raise UnknownNameError(f"there is no file {str(weights)!r}; check the path.")
    try:
        model: nn.Module = HeadSwap.load_from_checkpoint(
            kind, weights, map_location="cpu", **safely(kind)
        )
    except HeadplugError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{kind.__name__}.load_from_checkpoint cannot load {weights}: "
            f"{' '.join(str(error).split())[:300]}. Name a function that builds the model instead; "
            "its weights are then loaded by name."
        ) from error
    return model


def safely(kind: Any) -> dict[str, Any]:
    """What makes a LightningModule's `load_from_checkpoint` unpickle nothing; torch's default."""
    base = next((c for c in kind.__mro__ if c.__name__ == "LightningModule"), kind)
    taken = inspect.signature(base.load_from_checkpoint).parameters
    return {"weights_only": True} if "weights_only" in taken else {}


def _from_checkpoint(path: Path, backbone: str | None, shape: Shape) -> LoadedModel:
    if not path.is_file():
        raise UnknownNameError(f"there is no file {str(path)!r}; check the path.")
    if (path.parent / "args.json").is_file() and backbone is None:
        from headplug_solo.saved import load_run

        return load_run(path)
    state = read_state_dict(path)
    part, equals, architecture = (backbone or "").rpartition("=")
    weights = backbone_in(state, path, part if equals else None)
    if backbone is None:
        raise CheckpointError(
            f"{path} holds weights, but not what they are of{guess(weights)}. Name the backbone, "
            "e.g. --backbone torchvision:resnet18 or --backbone timm:vit_small_patch16_224, which "
            "leaves the heads aside; or name the code that builds the whole model: headplug "
            f"extract MODULE:CALLABLE --weights {path}."
        )
    model = nn.Sequential()
    model.backbone = _filled(architecture, shape, weights, path)
    return LoadedModel(model, f"the backbone of {path}, {architecture}")
