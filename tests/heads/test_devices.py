"""On a GPU that need not be there: its tensors have shapes and a place, and nothing to read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from headplug import list_heads


def on_a_gpu(head: nn.Module) -> nn.Module:
    """The head with every tensor exchanged, as no tensor can be moved there."""
    for module in head.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda:0")
                    trained = isinstance(tensor, nn.Parameter)
                    held[name] = nn.Parameter(new, tensor.requires_grad) if trained else new
    return head


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", list_heads())
def test_a_head_mixes_no_devices_and_never_waits_for_the_gpu(
    name: str, training: bool, build: Callable[..., nn.Module]
) -> None:
    """A fake tensor refuses both: to meet one of the CPU, and to give its numbers to Python."""
    head = build(name)
    with FakeTensorMode():
        z = on_a_gpu(head).train(training)(torch.randn(8, head.input_dim, device="cuda:0"))
        tensors = z if isinstance(z, (list, tuple)) else [z]
        assert {t.device for t in tensors} == {torch.device("cuda:0")}


def test_what_that_test_would_find() -> None:
    """That a fake tensor does refuse."""
    with FakeTensorMode():
        x = torch.randn(3, device="cuda:0")
        with pytest.raises(RuntimeError, match="device"):
            x + torch.randn(3)
        with pytest.raises(Exception, match="local_scalar"):
            x.sum().item()
