from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from lightly.loss import NTXentLoss
from lightly.loss.directclr_loss import DirectCLRLoss
from torch import Tensor, nn

from headplug import create_head, describe_head
from headplug.errors import DimensionError, OptionError
from headplug.heads.identity import SliceHead


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_default_is_the_papers_width() -> None:
    head = create_head("directclr", input_dim=2048)
    assert (head.input_dim, head.output_dim) == (2048, 360)
    assert describe_head("directclr").paper == "arXiv 2110.09348"


@pytest.mark.parametrize("output_dim", [1, 5, 12])
def test_output_is_numpys_slice_and_the_rest_gets_no_gradient(output_dim: int) -> None:
    head = create_head("directclr", input_dim=12, output_dim=output_dim)
    x = torch.randn(4, 3, 12, generator=generator(0), requires_grad=True)
    z = head(x)
    np.testing.assert_array_equal(z.detach().numpy(), x.detach().numpy()[..., :output_dim])
    z.sum().backward()
    expected = np.zeros((4, 3, 12), np.float32)
    expected[..., :output_dim] = 1
    np.testing.assert_array_equal(x.grad.numpy(), expected)


@pytest.mark.parametrize("loss_dim", [1, 24, 64])
def test_ntxent_on_the_head_is_lightlys_directclr_loss_on_the_representation(
    loss_dim: int,
) -> None:
    head = create_head("directclr", input_dim=64, output_dim=loss_dim)
    views = [torch.randn(16, 64, generator=generator(s)) for s in (1, 2)]

    def step(loss_of: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        h = [v.clone().requires_grad_() for v in views]
        loss = loss_of(*h)
        return loss, list(torch.autograd.grad(loss, h))

    ours, our_grads = step(lambda a, b: NTXentLoss(temperature=0.1)(head(a), head(b)))
    theirs, their_grads = step(DirectCLRLoss(loss_dim=loss_dim, temperature=0.1))
    assert torch.equal(ours, theirs)
    assert all(map(torch.equal, our_grads, their_grads))


@pytest.mark.parametrize(
    ("input_dim", "options", "advice"),
    [
        (256, {}, "at most 256, e.g. output_dim=45"),
        (8, {"output_dim": 9}, "at most 8, e.g. output_dim=1"),
    ],
)
def test_more_features_than_there_are_is_refused_with_both_widths(
    input_dim: int, options: dict[str, int], advice: str
) -> None:
    asked = options.get("output_dim", 360)
    message = rf"'directclr'.*output_dim={asked} .*input_dim={input_dim}\..*{advice}"
    with pytest.raises(DimensionError, match=message):
        create_head("directclr", input_dim=input_dim, **options)


@pytest.mark.parametrize("output_dim", [0, -1])
def test_width_must_be_positive(output_dim: int) -> None:
    with pytest.raises(OptionError, match="output_dim must be a positive integer"):
        SliceHead(8, output_dim)


def test_head_has_no_weights_and_may_be_frozen_all_the_same() -> None:
    head = create_head("directclr", input_dim=8, output_dim=3, freeze=True)
    assert head.state_dict() == {}
    assert list(head.parameters()) == []
    assert head.param_groups(0.1) == []
    assert create_head(head.config).config == head.config


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))])
def test_copies_do_the_same(copied: Callable[[nn.Module], nn.Module]) -> None:
    head = SliceHead(8, 3)
    x = torch.randn(5, 8, generator=generator(0))
    assert torch.equal(copied(head)(x), head(x))
    assert copied(head).config == head.config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_type_of_the_input_is_kept(dtype: torch.dtype) -> None:
    x = torch.randn(5, 8, generator=generator(0)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        z = SliceHead(8, 3)(x)
    assert z.dtype == dtype
    assert torch.equal(z, x[:, :3])


def test_exports_with_a_dynamic_batch() -> None:
    head = SliceHead(8, 3)
    shapes = {"x": {0: torch.export.Dim("batch", min=2)}}
    exported = torch.export.export(head, (torch.randn(4, 8),), dynamic_shapes=shapes).module()
    x = torch.randn(7, 8, generator=generator(0))
    assert torch.equal(exported(x), x[:, :3])
