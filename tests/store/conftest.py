"""A small model, its data, and what is compared."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from headplug import FeatureStore

AT = ["backbone.0", "backbone.3", "pre_projection", "projection"]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 3),
            nn.AdaptiveAvgPool2d(1),
        )
        self.projection_head = nn.Sequential(nn.Linear(6, 5), nn.Dropout(), nn.Linear(5, 2))
        self.forwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        return self.projection_head(self.backbone(x).flatten(1))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def at() -> list[str]:
    return list(AT)


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def data() -> TensorDataset:
    return TensorDataset(torch.randn(23, 1, 8, 8), torch.randperm(23))


@pytest.fixture
def loader(data: TensorDataset) -> DataLoader[Any]:
    return DataLoader(data, batch_size=5)


@pytest.fixture
def by_hand() -> Callable[[nn.Module, torch.Tensor], dict[str, torch.Tensor]]:
    """What each point of `AT` gives, averaged over positions."""

    def run(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
        model = model.eval()
        with torch.no_grad():
            first = model.backbone[0](x)
            second = model.backbone[3](model.backbone[1](first).relu())
            h = second.mean((2, 3))
            values = [first.mean((2, 3)), h, h, model.projection_head(h)]
            return dict(zip(AT, values, strict=True))

    return run


@pytest.fixture
def assert_equal() -> Callable[[FeatureStore, FeatureStore], None]:
    """Two stores hold the same, bit for bit."""

    def check(a: FeatureStore, b: FeatureStore) -> None:
        assert a.points == b.points
        assert list(a.ids) == list(b.ids)
        assert (a.labels is None) == (b.labels is None)
        if a.labels is not None and b.labels is not None:
            assert torch.equal(a.labels, b.labels)
        assert all(torch.equal(a[p], b[p]) for p in a.points)

    return check


@pytest.fixture
def files() -> Callable[[Path], dict[str, bytes]]:
    """The bytes of every file in a folder."""
    return lambda folder: {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture
def python() -> Callable[..., str]:
    """Runs code in a process of its own, on one thread, and gives what it printed."""

    def run(code: str, *arguments: object, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
