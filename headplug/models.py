"""Models by a short name, for the command line: from a library, from your code, from a checkpoint.

| name | stands for |
|---|---|
| `timm:resnet50`, `torchvision:resnet18` | the library's model without its classifier |
| `hf-hub:timm/resnet50.a1_in1k` | the same, as timm is called on the Hugging Face Hub |
| `package.module:callable` | what your function, class or object of that name gives |
| `run/last.ckpt` | what a checkpoint holds |
| `runs/NAME/simclr-seed0` | backbone and head of a run of `headplug compare` |

A checkpoint of solo-learn has args.json beside it, which says what to build. Another one holds
weights without an architecture, so the backbone has to be named; a whole model with its heads comes
from the code that builds it. Weights must fit exactly, and nothing is ever unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from headplug.checkpoints import read_state_dict
from headplug.compare.saved import WEIGHTS, is_run, load_run
from headplug.errors import CheckpointError, HeadplugError, OptionError, UnknownNameError, unknown
from headplug.usercode import from_code
from headplug.weights import CLASSIFIERS, backbone_in, channels, fill, guess, is_small

LIBRARIES = ("timm", "torchvision")
HUB = ("hf-hub:", "hf_hub:")
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
        draft: Whether it has the architecture's names, but neither its weights nor its final shape.
    """

    model: nn.Module
    source: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    draft: bool = False


def load_model(
    name: str,
    *,
    shape: Shape = (3, 224, 224),
    weights: str | Path | None = None,
    backbone: str | None = None,
    pretrained: bool = False,
    draft: bool = False,
) -> LoadedModel:
    """Builds a model by its name and fills it.

    Args:
        name: See the table of this module; a name alone is timm's.
        shape: Channels, height and width of the images that it will get.
        weights: A checkpoint to fill a library's model or yours with.
        backbone: The architecture in a checkpoint that does not tell it, e.g. torchvision:resnet18;
            or PATH=ARCHITECTURE, where the checkpoint holds several backbones.
        pretrained: Whether a library's model gets the library's weights, if no others are given.
        draft: Whether a library's model shall do without weights, as long as the images are not
            known; other models are as they will be.

    Returns:
        The model with its weights. A backbone that comes from a checkpoint is at `backbone`, as in
        the model that it was trained in.

    Raises:
        UnknownNameError: There is no such file, model, module or object.
        CheckpointError: The weights do not fit, cannot be read safely, or do not tell what they
            are of.
        OptionError: The object gives no module, or the model cannot take such images.
        RunError: Your module imports what is not installed.

    >>> load_model("timm:test_resnet", shape=(3, 32, 32)).source
    'timm:test_resnet with random weights'
    """
    path = Path(name).expanduser()
    if path.is_dir() and (path / "args.json").is_file():
        path = max(path.glob("*.ckpt"), key=os.path.getmtime, default=path / "*.ckpt")
    if is_run(path):
        path /= WEIGHTS
    if path.is_file() or path.suffix in SUFFIXES:
        return _from_checkpoint(path, backbone, shape, draft)
    if name.startswith(HUB):
        name = _from_hub(name)
    library, colon, rest = name.partition(":")
    if colon and library not in LIBRARIES:
        return LoadedModel(*from_code(library, rest, weights))
    if weights is None:
        found = _from_library(name, shape, pretrained=pretrained, draft=draft)
        return found if pretrained else replace(found, mean=(), std=())
    state = backbone_in(read_state_dict(weights), weights)
    found = _filled(name, shape, state, weights, draft)
    return replace(found, source=f"{name} with the weights of {weights}")


def image_channels(model: nn.Module, given: int) -> int:
    """How many channels a model takes of images that have some.

    Raises:
        OptionError: They have others.
    """
    takes = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), given)
    if takes != given and given != 1:
        raise OptionError(f"the model takes images of {takes} channels, and these have {given}.")
    return takes


def _from_hub(name: str) -> str:
    """The name that timm itself has for a model on the Hub."""
    owner, _, rest = name.partition(":")[2].partition("/")
    if owner != "timm":
        raise UnknownNameError(
            f"of the Hub hf-hub:timm/NAME is taken, not {name!r}. Write a function that returns "
            f"timm.create_model({name!r}, pretrained=True, num_classes=0), and name it as "
            "MODULE:CALLABLE."
        )
    return f"timm:{rest}"


def _from_library(
    name: str,
    shape: Shape,
    *,
    pretrained: bool = False,
    small: bool = False,
    draft: bool = False,
) -> LoadedModel:
    library, _, rest = name.rpartition(":")
    build = _torchvision if library == "torchvision" else _timm
    pretrained = pretrained and not draft
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
    if not draft:
        _check_size(name, model, shape)
    kind = "the library's pretrained" if pretrained else "random"
    full = name if library else f"timm:{name}"
    return LoadedModel(model, f"{full} with {kind} weights", tuple(mean), tuple(std), draft)


def _check_size(name: str, model: Any, shape: Shape) -> None:
    """Refuses images that a vision transformer cannot cut into patches."""
    size, wanted = getattr(model, "image_size", None), ""  # torchvision's take one size
    if size and shape[1:] != (size, size):
        wanted = f"of {size} x {size} pixels"
    patches = getattr(model, "patch_embed", None)  # timm's
    pads = getattr(patches, "dynamic_img_pad", True)  # where it has no such option
    sides = getattr(patches, "patch_size", None) if not pads else None
    if isinstance(sides, tuple) and any(s % p for s, p in zip(shape[1:], sides, strict=True)):
        wanted = f"whose sides are multiples of {sides[0]} pixels"
        size = model.pretrained_cfg["input_size"][-1]
    if wanted:
        raise OptionError(
            f"{name} takes images {wanted}, and these have {shape[1]} x {shape[2]}; pass "
            f"--image-size {size}."
        )


def _filled(
    name: str, shape: Shape, weights: Mapping[str, Tensor], where: object, draft: bool
) -> LoadedModel:
    shape = (channels(weights), *shape[1:])
    found = _from_library(name, shape, small=is_small(weights), draft=draft)
    fill(found.model, weights, where, draft=draft)
    return found


def _timm(name: str, shape: Shape, pretrained: bool, small: bool) -> Any:
    from headplug.compare.backbones import build_backbone, is_sized

    model: Any = build_backbone(name, shape, "small" if small else "default")
    if pretrained:
        import timm

        size: dict[str, Any] = {"img_size": shape[1:]} if is_sized(model) else {}
        model = timm.create_model(name, pretrained=True, num_classes=0, **size)
    return model, model.pretrained_cfg["mean"], model.pretrained_cfg["std"]


def _torchvision(name: str, shape: Shape, pretrained: bool, small: bool) -> Any:
    from torchvision import models

    if name not in models.list_models():
        raise unknown("torchvision model", name, models.list_models())
    weights: Any = models.get_model_weights(name).DEFAULT
    model: Any = models.get_model(name, weights=weights if pretrained else None)
    for classifier in CLASSIFIERS:
        if hasattr(model, classifier):
            setattr(model, classifier, nn.Identity())
    if small and hasattr(model, "maxpool"):
        model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
    how = weights.transforms()
    return model, getattr(how, "mean", ()), getattr(how, "std", ())


def _from_checkpoint(path: Path, backbone: str | None, shape: Shape, draft: bool) -> LoadedModel:
    if not path.is_file():
        raise UnknownNameError(f"there is no file {str(path)!r}; check the path.")
    if (path.parent / "args.json").is_file() and backbone is None:
        from headplug_solo import saved

        return saved.load_run(path)
    if is_run(path.parent) and path.name == WEIGHTS:
        if backbone is not None:
            raise OptionError(
                f"{path.parent} is a run of headplug compare, which says what its weights are of; "
                "leave --backbone out."
            )
        model, record = load_run(path.parent, shape, draft)
        mean, std = (tuple(record.get(key, ())) for key in ("image_mean", "image_std"))
        return LoadedModel(model, f"the model of {path.parent}", mean, std, draft)
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
    model.backbone = _filled(architecture, shape, weights, path, draft).model
    return LoadedModel(model, f"the backbone of {path}, {architecture}", draft=draft)
