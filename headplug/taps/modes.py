"""Running a model for its features so that it is afterwards as it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the block; every module then gets its own mode back."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode without autograd; buffers and random state are put back afterwards."""
    state = [
        (module._buffers, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(list(devices)):
        try:
            yield
        finally:
            for buffers, name, buffer, value in state:
                buffers[name] = buffer if torch.equal(buffer, value) else buffer.copy_(value)
