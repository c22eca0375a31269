from __future__ import annotations

import numpy as np
import pytest
import torch


def _features(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * torch.logspace(-2, 1, d) + 3


@pytest.fixture
def make():
    return _features


@pytest.fixture(params=[(500, 40), (300, 300), (40, 90)], ids=["tall", "square", "wide"])
def features(request):
    return _features(*request.param)


@pytest.fixture
def many_blocks(monkeypatch):
    """Cuts everything into blocks of a few rows."""
    from headplug.diagnostics import blocks, scatter, views

    for module in (blocks, scatter, views):
        monkeypatch.setattr(module, "CHUNK", 700)


@pytest.fixture
def entropy_rank():
    """exp of the entropy of shares, as a literal NumPy formula."""

    def rank(values, eps):
        p = values / values.sum() + eps
        p = p[p > 0]
        return np.exp(-(p * np.log(p)).sum())

    return rank
