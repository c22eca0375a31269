"""Running a model for its features so that it is afterwards as it was before."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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
    """Eval mode without autograd; buffers, frozen parameters and random state are put back.

    What a forward keeps in plain attributes of modules stays.
    """
    held: list[tuple[Any, str, Tensor]] = [
        (tensors, name, tensor)
        for module in model.modules()
        for tensors in (module._buffers, module._parameters)
        for name, tensor in tensors.items()
        if tensor is not None and not tensor.is_meta
        if tensors is module._buffers or _frozen(tensor)
    ]
    values = {id(tensor): tensor.detach().clone() for *_, tensor in held}
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(list(devices)):
        try:
            yield
        finally:
            for tensors, name, tensor in held:
                value = values[id(tensor)]
                tensors[name] = tensor if torch.equal(tensor, value) else tensor.copy_(value)


def _frozen(parameter: Tensor) -> bool:
    """Whether it is no optimiser's, and holds its numbers itself: no shard, no quantised weight."""
    return not parameter.requires_grad and type(parameter.data) is Tensor


class _Eagerly:
    """Runs compiled code eagerly as long as a block is open, in whatever thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.blocks = 0
        self.stance: Any = None

    def __enter__(self) -> None:
        with self.lock:
            if not self.blocks and "torch._dynamo" in sys.modules:
                self.stance = torch.compiler.set_stance("force_eager")
            self.blocks += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.blocks -= 1
            if not self.blocks and self.stance:
                self.stance.__exit__(None, None, None)
                self.stance = None


_EAGERLY = _Eagerly()


def eagerly() -> _Eagerly:
    """No compiled code runs while the block does: one batch is not worth compiling for."""
    return _EAGERLY
