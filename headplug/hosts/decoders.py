"""Models that are trained to give their input back, and so have no projection head.

Widths decide where they can: a layer that gives the pixels of one patch, behind a backbone that
takes patches. Where they cannot, an attribute that is called a decoder does.
"""

from __future__ import annotations

import math
import re

from torch import nn

from headplug.hosts.modules import dims, inside, named_modules, parent


def why_headless(model: nn.Module) -> str | None:
    """Why a model has no projection head, if its parts show that it is a masked autoencoder.

    >>> model = nn.ModuleDict({"patches": nn.Conv2d(3, 32, 8, 8), "out": nn.Linear(32, 192)})
    >>> why_headless(model)
    "'out' (Linear) gives the 192 pixels of a patch"
    """
    top = [(p, m) for p, m in named_modules(model) if p.count(".") < 2]  # deeper: the backbone's
    patches = [
        (path, module)
        for path, module in named_modules(model)
        if isinstance(module, nn.Conv2d)
        and module.in_channels <= 4
        and 1 not in module.kernel_size
        and module.kernel_size == module.stride
    ]
    for path, module in top:
        for where, patch in patches:
            pixels = patch.in_channels * math.prod(patch.kernel_size)
            ends = [dims(model.get_submodule(p)) for p in {path, parent(path)} if p]  # is it last?
            gives = {last[1] if last else None for last in ends}
            if gives == {pixels} and pixels != patch.out_channels and not inside(where, path):
                return f"{path!r} ({type(module).__name__}) gives the {pixels:,} pixels of a patch"
    for path, module in top:
        if "decoder" in re.split(r"[._]", path) and any(True for _ in module.parameters()):
            return f"{path!r} ({type(module).__name__}) seems to give the input back"
    return None
