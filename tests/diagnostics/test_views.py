from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
import torch

from headplug import FeatureStore
from headplug.diagnostics import (
    LiDAR,
    alignment,
    describe_views,
    diagnose_views,
    lidar,
    uniformity,
    views,
)
from headplug.errors import DataError, DimensionError, OptionError


def some_views(n, q, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, 1, d, generator=generator) * torch.logspace(0, -1, d)
    return base + 0.3 * torch.randn(n, q, d, generator=generator) + 0.5


def sphere(x):
    x = x.double().numpy()
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("power", [2, 1])
@pytest.mark.parametrize("q", [2, 4])
def test_alignment_follows_its_definition(q, power, many_blocks):
    x = some_views(30, q, 5)
    for normalise, y in ((True, sphere(x)), (False, x.double().numpy())):
        pairs = [
            np.linalg.norm(y[:, i] - y[:, j], axis=1) ** power for i, j in combinations(range(q), 2)
        ]
        found = alignment(x, power=power, normalise=normalise)
        assert found == pytest.approx(np.mean(pairs), rel=1e-10)


def test_uniformity_is_that_of_its_authors(monkeypatch):
    x = some_views(50, 2, 5)
    monkeypatch.setattr(views, "PAIRS", 333)

    def authors(y, t):
        return torch.pdist(torch.as_tensor(y)).pow(2).mul(-t).exp().mean().log().item()

    y = sphere(x)
    expected = (authors(y[:, 0], 2) + authors(y[:, 1], 2)) / 2
    assert uniformity(x) == pytest.approx(expected, rel=1e-10)
    assert uniformity(x[:, 0], t=3) == pytest.approx(authors(y[:, 0], 3), rel=1e-10)
    raw = uniformity(x[:, 0], normalise=False)
    assert raw == pytest.approx(authors(x[:, 0].double(), 2), rel=1e-10)


def numpys_lidar(x, delta, eps, entropy_rank):
    x = x.double().numpy()
    n, q, d = x.shape
    means = x.mean(1)
    between = np.cov(means.T)
    rest = (x - means[:, None]).reshape(-1, d)
    within = rest.T @ rest / (n * (q - 1)) + delta * np.eye(d)
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    spectrum = np.clip(np.linalg.eigvalsh(root @ between @ root), 0, None)
    return entropy_rank(spectrum, eps)


@pytest.mark.parametrize(("delta", "eps"), [(1e-4, 1e-7), (0.1, 1e-5)])
@pytest.mark.parametrize("shape", [(60, 2, 8), (40, 5, 12), (10, 3, 20)])
def test_lidar_follows_its_definition(shape, delta, eps, entropy_rank, many_blocks):
    x = some_views(*shape)
    expected = numpys_lidar(x, delta, eps, entropy_rank)
    assert lidar(x, delta=delta, eps=eps) == pytest.approx(expected, rel=1e-6)


def test_streamed_and_merged_lidar_is_the_same():
    x = some_views(50, 3, 6)
    one, two = LiDAR(6), LiDAR(6)
    for part in x[:20].split(7):
        one.update(part)
    two.update(x[20:] + 0)
    one.merge(two)
    assert one.value() == pytest.approx(lidar(x), rel=1e-9)


def test_lidar_counts_the_directions_that_tell_samples_apart():
    generator = torch.Generator().manual_seed(0)
    informative = torch.randn(500, 1, 4, generator=generator).expand(-1, 8, -1)
    noise = torch.randn(500, 8, 12, generator=generator)
    x = torch.cat([informative + 0.1 * torch.randn(500, 8, 4, generator=generator), noise], 2)
    assert lidar(x) == pytest.approx(4, abs=0.5)
    assert torch.linalg.matrix_rank(x.flatten(0, 1)) == 16


def test_stores_of_views_are_described_tap_by_tap(many_blocks):
    x, y = some_views(40, 2, 6), some_views(40, 2, 3, seed=1)
    stores = [FeatureStore.from_tensors({"h": x[:, i], "z": y[:, i]}) for i in range(2)]
    rows = diagnose_views(stores)
    assert [row["tap"] for row in rows] == ["h", "z"]
    assert json.loads(json.dumps(rows)) == rows
    for row, these in zip(rows, (x, y), strict=True):
        assert {k: v for k, v in row.items() if k != "tap"} == describe_views(these)
        assert row["lidar"] == pytest.approx(lidar(these))
        assert row["why"] == {}
    assert (rows[0]["samples"], rows[0]["views"], rows[0]["dim"]) == (40, 2, 6)


def test_mixed_or_single_views_are_refused():
    x = some_views(40, 2, 6)
    first = FeatureStore.from_tensors({"h": x[:, 0]})
    with pytest.raises(DataError, match="mixed stores: one has 40 samples, the other 30"):
        diagnose_views([first, FeatureStore.from_tensors({"h": x[:30, 1]})])
    with pytest.raises(DataError, match=r"'h' have \[4, 6\] features in different views"):
        diagnose_views([first, FeatureStore.from_tensors({"h": x[:, 1, :4]})])
    with pytest.raises(DataError, match="two views of each sample or more, not 1"):
        diagnose_views([first])
    with pytest.raises(DataError, match="two views of each sample or more, not 1"):
        lidar(x[:, :1])
    with pytest.raises(DataError, match=r"\(N, q, D\), not \(40, 6\)"):
        alignment(x[:, 0])
    with pytest.raises(DataError, match="NaN or infinity"):
        describe_views(x * torch.nan)
    with pytest.raises(DimensionError, match=r"LiDAR takes \(n, q, 5\), not \(40, 2, 6\)"):
        LiDAR(5).update(x)
    with pytest.raises(OptionError, match="delta must be above 0"):
        lidar(x, delta=0)
    with pytest.raises(DataError, match="two samples or more"):
        uniformity(x[:1])


def test_what_is_undefined_is_none_with_the_reason():
    x = some_views(10, 2, 20)
    assert "9 at most; take more than 20" in describe_views(x)["why"]["lidar"]
    same = describe_views(x[:, :1].expand(-1, 3, -1))
    assert same["lidar"] is None
    assert "the views of each sample are the same" in same["why"]["lidar"]
    assert same["alignment"] == 0.0
    collapsed = describe_views(torch.full((10, 2, 4), 0.1))
    assert "the same for all samples" in collapsed["why"]["lidar"]
    assert collapsed["uniformity"] == pytest.approx(0.0, abs=1e-12)
    x[3, 1] = 0
    zero = describe_views(x)
    assert zero["alignment"] is zero["uniformity"] is None
    assert "1 feature vectors are zero" in zero["why"]["alignment"]
    json.dumps([same, collapsed, zero], allow_nan=False)
    with pytest.raises(DataError, match="too far apart"):
        uniformity(1e3 * torch.eye(3), normalise=False)
