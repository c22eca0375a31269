"""The points of a model that are read where none are named."""

from __future__ import annotations

import torch

from headplug.compare.backbones import stages
from headplug.errors import OptionError
from headplug.taps import features
from headplug.taps.modes import eagerly, untouched
from headplug.taps.options import Pool
from headplug.taps.points import HEAD_POINTS, Layout


def usual_points(
    layout: Layout, images: torch.Tensor | None = None, pool: Pool | None = "gap"
) -> list[str]:
    """The stages of a model's backbone, and before, inside and after its head if it has one.

    Args:
        layout: Of the model.
        images: A batch as the model takes it. With it a model without a head is run on that, and
            stages that are not reached are left out. Where the last one does not give the model's
            own output (a norm or a convolution follows), a module that does is the last point.
        pool: How points are pooled, which decides whether they give the same.

    Raises:
        OptionError: The model has no modules inside it.

    >>> from headplug.models import load_model
    >>> layout = Layout(load_model("timm:test_convnext", shape=(3, 32, 32)).model)
    >>> usual_points(layout, torch.rand(1, 3, 32, 32))
    ['stages.0', 'stages.1', 'stages.2', 'stages.3', 'head']
    """
    shared = dict(layout.shared)
    backbone = shared.pop("backbone", None)
    inner = stages(backbone.module if backbone else layout.root)
    found = [f"{backbone.path}.{name}" if backbone else name for name in inner]
    if shared:
        hidden = [name for name in shared if name not in HEAD_POINTS]
        return [*found, HEAD_POINTS[0], *hidden, HEAD_POINTS[1]]
    if backbone:
        found.append("backbone")
    if images is not None:
        found = _to_the_end(layout, images, found, pool)
    if not found:
        raise OptionError(
            f"a {type(layout.root).__name__} has no modules inside it whose output could be read. "
            "Wrap it, nn.Sequential(model), and read it --at 0."
        )
    return found


def _to_the_end(
    layout: Layout, images: torch.Tensor, found: list[str], pool: Pool | None
) -> list[str]:
    """The points that are reached, and one of the model's output, nearest the root, if none is."""
    given: dict[str, object] = {}
    hooks = [
        module.register_forward_hook(lambda *call, path=path: given.update({path: call[2]}))
        for path, module in layout.modules.items()
    ]
    try:
        with untouched(layout.root), eagerly():
            out = layout.root(images)
    except Exception:  # extraction, which may need less of the model, tells if it cannot
        return found
    finally:
        for hook in hooks:
            hook.remove()
    paths = {name: layout.shared[name].path if name in layout.shared else name for name in found}
    found = [name for name, path in paths.items() if path in given] or found
    same = [path for path, value in given.items() if value is out]
    if not same or not isinstance(out, torch.Tensor) or (found and paths[found[-1]] in same):
        return found
    last = min(same, key=lambda path: path.count("."))
    if found:
        with untouched(layout.root):
            stage, own = features(layout.root, images, [found[-1], last], pool=pool)
        # relative to the largest: outputs of random weights can be tiny
        if stage.shape == own.shape and (stage - own).abs().max() <= 1e-4 * own.abs().max():
            return found
    return [*found, last]
