from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from headplug import create_head, describe_head
from headplug.errors import HeadplugError


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    """The same random numbers in every test, and none taken from the others."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@functools.cache
def needs_weights(name: str) -> bool:
    """Whether a head refuses to train until it has pretrained weights."""
    head = create_head(name, input_dim=20, **narrow(name))
    try:
        head.train()(torch.rand(8, 20))
    except HeadplugError as error:
        return "weights=" in str(error)
    return False


def narrow(name: str) -> dict[str, Any]:
    """Small values for the sizes that are numbers by default: some presets have 151 million."""
    widths = {o: v for o, v in describe_head(name).defaults.items() if o.endswith("_dim")}
    small = {o: 12 for o, v in widths.items() if isinstance(v, int)}
    if "num_blocks" in describe_head(name).defaults:
        small["num_blocks"] = 2
    return {**small, **{o: [12, 7] for o, v in widths.items() if isinstance(v, list)}}


@pytest.fixture
def build() -> Callable[..., nn.Module]:
    """Builds any registered head, narrow and ready to train.

    A head that needs pretrained weights gets those of `nn.Linear(input_dim, 16)`.
    """

    def make(name: str, input_dim: int = 20, **options: Any) -> nn.Module:
        if needs_weights(name):
            options.setdefault("weights", nn.Linear(input_dim, 16))
        return create_head(name, **{"input_dim": input_dim, **narrow(name), **options})

    return make
