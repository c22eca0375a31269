"""timm backbones, with a stem for small images."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from headplug.errors import OptionError, RunError, unknown

SMALL = 64  # pixels; below, a stem that divides the resolution by four leaves too little


def build_backbone(
    name: str, shape: tuple[int, int, int], stem: str = "auto", pretrained: bool = False
) -> nn.Module:
    """A timm model without classifier, for images of one shape.

    Args:
        name: Its name in timm.
        shape: (channels, height, width) of the images.
        stem: "small" makes a ResNet's first convolution 3x3 with stride 1 (a deep stem keeps its
            layers) and drops the pooling behind it, as is usual on CIFAR (arXiv 2002.05709,
            appendix B.9); "default" changes nothing; "auto" is small up to 64 pixels, where the
            model allows.
        pretrained: Whether it gets timm's weights; a new first convolution has none.

    Returns:
        A module from `(batch, *shape)` to `(batch, num_features)`.

    Raises:
        UnknownNameError: timm has no such model.
        OptionError: The stem cannot be made small, the model cannot take such images, or its
            weights cannot be had.
    """
    import timm

    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models(), "timm.list_models('*') shows all.")
    channels, height, width = shape
    options: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
    model: Any
    try:
        model = timm.create_model(name, **options)
        if is_sized(model):  # made for one size of image: make it for this one
            options["img_size"] = (height, width)
            if max(height, width) <= SMALL and stem != "default":
                options["patch_size"] = max(min(height, width) // 8, 1)
            model = timm.create_model(name, **options)
    except Exception as error:
        raise OptionError(
            f"timm cannot build {name!r} for images of shape {shape}: {error}. Try image_size=224."
        ) from error
    if pretrained:
        try:
            model = timm.create_model(name, pretrained=True, **options)
        except Exception as error:
            raise OptionError(
                f"timm's weights of {name} cannot be had ({' '.join(str(error).split())[:200]}). "
                'The first use needs the network: run `python -c "import timm; '
                f"timm.create_model('{name}', pretrained=True)\"` where there is one and copy "
                "~/.cache/huggingface (or what HF_HOME names); or start from random weights, "
                "without --pretrained. `timm.list_pretrained()` shows which models have weights."
            ) from error
    small = stem == "small" or (stem == "auto" and max(height, width) <= SMALL)
    if small and hasattr(model, "conv1") and hasattr(model, "maxpool"):
        deep = isinstance(model.conv1, nn.Sequential)
        first: Any = model.conv1[0] if deep else model.conv1
        if deep:
            first.stride = (1, 1)
        else:
            model.conv1 = nn.Conv2d(channels, first.out_channels, 3, 1, 1, bias=False)
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    elif stem == "small" and not is_sized(model):
        raise OptionError(
            f"stem='small' is known for ResNets and vision transformers, not for {name!r}."
        )
    if not isinstance(model, nn.Module):
        raise RunError(f"timm returned a {type(model).__name__} for {name!r}.")
    return model


def is_sized(model: nn.Module) -> bool:
    """Whether a timm model is made for one size of image, as most vision transformers are."""
    return hasattr(model, "patch_embed") and "img_size" in signature(type(model)).parameters


def stages(backbone: nn.Module) -> list[str]:
    """Paths of at most six stages, spread evenly over the depth.

    They are those that timm tells of; else the parts that have parts of their own, or the blocks of
    the longest sequence.
    """
    info = getattr(backbone, "feature_info", None)
    entries = info if isinstance(info, list) else getattr(info, "info", [])
    known = dict(backbone.named_modules())
    found = [e["module"] for e in entries if e["module"] in known]
    if not found:
        parts = backbone.named_children()
        found = [
            n for n, part in parts if [*part.children()] and any(True for _ in part.parameters())
        ]
    if len(found) < 2:
        rows = {n: m for n, m in known.items() if isinstance(m, nn.Sequential | nn.ModuleList)}
        longest = max(rows, key=lambda name: len(rows[name]), default=None)
        if longest is not None:
            found = [f"{longest}.{n}".lstrip(".") for n, _ in rows[longest].named_children()]
    if len(found) <= 6:
        return found
    return [found[round((i + 1) * len(found) / 6) - 1] for i in range(6)]


def as_pretrained(model: nn.Module, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation `(channels,)` of the images that a timm model's weights were trained on.

    With another number of channels than three, the average for each.
    """
    config: Any = model.pretrained_cfg
    mean, std = (torch.tensor(config[key]) for key in ("mean", "std"))
    if channels != len(mean):
        mean, std = (m.mean().expand(channels).clone() for m in (mean, std))
    return mean, std
