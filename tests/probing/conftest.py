from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


class Store(dict[str, Tensor]):
    """The interface that probes ask of features, and nothing more."""

    def __init__(self, features: dict[str, Tensor], labels: Tensor | None) -> None:
        super().__init__(features)
        self.points = list(features)
        self.labels = labels


@pytest.fixture(scope="session")
def store() -> type[Store]:
    return Store


@pytest.fixture(scope="session")
def blobs() -> Callable[..., tuple[Tensor, Tensor]]:
    """Overlapping classes around fixed centres, with unequal scales and a mean far from zero."""

    def make(n: int, dim: int = 16, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
        centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(classes, (n,), generator=generator)
        noise = torch.randn(n, dim, generator=generator)
        scales = torch.linspace(0.3, 3, dim)
        return (centres[labels] + 1.5 * noise) * scales + 2, labels

    return make
