from __future__ import annotations

import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch

from headplug import create_head
from headplug.diagnostics import weight_profile, weight_profiles
from headplug.errors import DataError, OptionError, UnknownNameError


def rotation(d, generator):
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q


def white(n, d, generator):
    """Exactly white samples: mean 0, covariance 1."""
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(x - x.mean(0)).Q * n**0.5


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def uneven(generator):
    """Features whose axes have weights from 1 down to 0.01."""
    return white(200, 20, generator) * torch.logspace(0, -2, 20, dtype=torch.float64)


def numpys(h, z):
    h, z = (t.double().numpy() - t.double().numpy().mean(0) for t in (h, z))
    u, s, _ = np.linalg.svd(h, full_matrices=False)
    return s, np.linalg.norm(z.T @ u, axis=0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.float16, 0.02)]
)
@pytest.mark.parametrize("layers", [1, 2])
def test_balanced_linear_layers_have_the_slope_of_theory(generator, layers, dtype, tolerance):
    d = 16
    sizes = torch.logspace(0, -1.5, d, dtype=torch.float64).diag()
    turns = [rotation(d, generator) for _ in range(layers + 2)]
    first, *others = (b @ sizes @ a.T for a, b in pairwise(turns))
    torch.testing.assert_close(first @ first.T, others[0].T @ others[0])  # balanced
    h = white(400, d, generator) @ first.T
    z = h
    for weight in others:
        z = z @ weight.T
    found = weight_profile((h + 3).to(dtype), (z - 2).to(dtype))
    assert found["slope"] == pytest.approx(1 + layers, abs=tolerance)
    assert found["slope_r2"] > 0.999
    if dtype != torch.float16:
        assert found["fitted"] == found["features"] == d


def test_a_linear_network_trained_on_the_spectral_contrastive_loss_has_slope_two(generator):
    """Not built but trained, from a balanced start: arXiv 2403.11391, over the white population."""
    d = 6
    agreement = torch.linspace(1, 0.3, d, dtype=torch.float64).diag()  # of two views, by feature
    first = 0.3 * torch.randn(d, d, generator=generator, dtype=torch.float64)
    turn, sizes, _ = torch.linalg.svd(first)
    second = rotation(d, generator) @ sizes.diag() @ turn.T
    for _ in range(2000):
        w = second @ first
        slope = 4 * (w @ w.T @ w - w @ agreement)  # of -2 E[z . z+] + E[(z . z')^2]
        first, second = first - 0.01 * second.T @ slope, second - 0.01 * slope @ first.T
    h = white(100, d, generator) @ first.T
    found = weight_profile(h, h @ second.T)
    assert found["fitted"] == d
    assert found["weights_before"][-1] < 0.8  # the weights did become unequal
    assert found["slope"] == pytest.approx(2.0, abs=0.02)
    assert found["slope_r2"] > 0.999


def test_a_layer_that_rotates_shifts_or_scales_has_slope_one(uneven, generator):
    for z in (uneven, 3 * uneven @ rotation(20, generator) + 5):
        found = weight_profile(uneven, z)
        assert found["slope"] == pytest.approx(1.0, abs=1e-9)
        assert found["slope_r2"] == pytest.approx(1.0)
        np.testing.assert_allclose(found["weights_after"], found["weights_before"], rtol=1e-9)


def test_a_random_linear_head_keeps_the_slope_near_one(uneven, generator):
    z = uneven @ torch.randn(20, 400, generator=generator, dtype=torch.float64)
    assert weight_profile(uneven, z)["slope"] == pytest.approx(1.0, abs=0.05)


def test_a_reweighting_head_divides_each_weight_by_a_power(uneven):
    head = create_head("reweighting", input_dim=20, kappa=1.3).double()
    with torch.no_grad():
        found = weight_profile(uneven, head(uneven))
    ratio = np.array(found["weights_after"]) / np.array(found["weights_before"])
    np.testing.assert_allclose(ratio, 1.3 ** -np.arange(20.0), rtol=1e-5)
    step = 2 * np.log(10) / 19  # of the logarithm of the weights before
    assert found["slope"] == pytest.approx(1 + np.log(1.3) / step, rel=1e-5)


@pytest.mark.parametrize("shapes", [(100, 30, 50), (30, 50, 20), (30, 20, 50), (30, 40, 60)])
def test_weights_equal_those_of_numpys_svd(make, shapes, many_blocks):
    n, d, e = shapes
    h, z = make(n, d), make(n, e, seed=1)
    before, after = numpys(h, z)
    count = min(n - 1, d)
    found = weight_profile(h, z)
    assert found["features"] == count
    np.testing.assert_allclose(found["weights_before"], before[:count] / before[0], rtol=1e-6)
    expected = after[:count] / after[:count].max()
    np.testing.assert_allclose(found["weights_after"], expected, rtol=1e-4)
    slope = np.polyfit(np.log(before[:count]), np.log(after[:count]), 1)[0]
    assert found["slope"] == pytest.approx(slope, rel=1e-3)


def test_cutoff_leaves_out_small_weights_on_either_side(uneven):
    found = weight_profile(uneven, uneven, cutoff=0.1, limit=5)
    assert found["fitted"] == 10
    assert found["cutoff"] == 0.1
    assert len(found["weights_before"]) == len(found["weights_after"]) == 5
    assert weight_profile(uneven, uneven.half())["cutoff"] == torch.finfo(torch.float16).eps
    with pytest.raises(OptionError, match="between 0 and 1, not at 2"):
        weight_profile(uneven, uneven, cutoff=2)


def test_pairs_of_a_store(uneven):
    store = {"a": uneven, "b": 2 * uneven, "c": uneven.relu()}
    rows = weight_profiles(store)
    assert [(row["before"], row["after"]) for row in rows] == [("a", "b"), ("b", "c")]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    [row] = weight_profiles(store, [("a", "c")])
    expected = weight_profile(uneven, uneven.relu())
    assert {k: row[k] for k in expected} == expected
    with pytest.raises(UnknownNameError, match="no tap is called 'd'"):
        weight_profiles(store, [("a", "d")])
    for pair in (("a", "b", "c"), "ab"):
        with pytest.raises(OptionError, match=r"a pair is \(tap before, tap after\), not"):
            weight_profiles(store, [pair])


def test_what_has_no_slope_says_why(uneven):
    constant = torch.full((200, 4), 0.1)
    for pair, reason in [
        ((constant, uneven), "'before' are the same for all samples"),
        ((uneven, constant), "'after' are the same for all samples"),
        ((uneven[:, :2], uneven), "2 features .* a line needs 3"),
        ((white(200, 5, torch.Generator()), uneven), "different weights"),
    ]:
        found = weight_profile(*pair)
        assert found["slope"] is found["slope_r2"] is None
        assert re.search(reason, found["why"]["slope"])
        json.dumps(found, allow_nan=False)


def test_features_of_other_samples_are_refused(uneven):
    with pytest.raises(DataError, match="numbers of samples differ: 'before' 200, 'after' 100"):
        weight_profile(uneven, uneven[:100])
    with pytest.raises(DataError, match="'after' hold NaN or infinity, first in row 3"):
        weight_profile(uneven, uneven.clone().index_fill_(0, torch.tensor(3), torch.nan))
