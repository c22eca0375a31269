from __future__ import annotations

import numpy as np
import pytest
import torch

from headplug.errors import DataError
from headplug.probing import DEFINITIONS, effective_rank, rankme, singular_values, spectrum
from headplug.probing import data as probing_data


def entropy_rank(s, eps):
    p = s / s.sum() + eps
    p = p[p > 0]
    return np.exp(-(p * np.log(p)).sum())


@pytest.fixture(params=[(500, 40), (40, 90)], ids=["tall", "wide"])
def features(request):
    generator = torch.Generator().manual_seed(0)
    n, d = request.param
    return torch.randn(n, d, generator=generator) * torch.logspace(-2, 1, d) + 3


@pytest.mark.parametrize("centred", [True, False])
def test_singular_values_equal_numpys(features, centred):
    x = features.double().numpy()
    expected = np.linalg.svd(x - x.mean(0) * centred, compute_uv=False)
    got = singular_values(features, centred=centred).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-7, atol=2e-7 * expected[0])


def test_ranks_follow_their_definitions(features):
    x = features.double().numpy()
    raw = np.linalg.svd(x, compute_uv=False)
    centred = np.linalg.svd(x - x.mean(0), compute_uv=False)
    assert rankme(features) == pytest.approx(entropy_rank(raw, 1e-7), rel=1e-5)
    assert effective_rank(features) == pytest.approx(entropy_rank(centred, 0.0), rel=1e-5)
    assert rankme(features) < effective_rank(features)  # the mean of 3 pulls one of them down


def test_spectrum_holds_the_same_numbers_in_plain_types(features):
    found = spectrum(features, limit=10)
    assert found["rankme"] == rankme(features)
    assert found["effective_rank"] == effective_rank(features)
    assert found["dim"] == features.shape[1]
    assert len(found["singular_values"]) == 10
    assert found["singular_values"][0] == 1.0
    assert set(found) - {"dim"} == set(DEFINITIONS)


def test_blocks_of_rows_change_nothing(features, monkeypatch):
    whole = singular_values(features)
    monkeypatch.setattr(probing_data, "CHUNK", 7 * features.shape[1])
    torch.testing.assert_close(singular_values(features), whole)


@pytest.mark.parametrize(("value", "raw_rank"), [(0.0, 0.0), (0.1, 1.0), (1e6, 1.0), (1e-30, 1.0)])
def test_constant_features_have_no_centred_rank_and_no_nan(value, raw_rank):
    found = spectrum(torch.full((50, 8), value))
    assert found["effective_rank"] == 0.0
    assert found["rankme"] == pytest.approx(raw_rank, abs=1e-4)
    assert found["singular_values"] == [0.0] * 8


def test_white_features_have_full_rank_and_a_line_has_rank_one():
    generator = torch.Generator().manual_seed(0)
    assert effective_rank(torch.randn(4000, 16, generator=generator)) > 15.9
    line = torch.randn(100, 1, generator=generator) @ torch.randn(1, 16, generator=generator)
    assert rankme(line) == pytest.approx(1.0, abs=1e-4)
    assert effective_rank(line) == pytest.approx(1.0, abs=1e-4)


def test_features_that_are_no_finite_matrix_are_refused():
    with pytest.raises(DataError, match=r"shape \(N, D\), not \(2, 3, 4\)"):
        rankme(torch.zeros(2, 3, 4))
    with pytest.raises(DataError, match="NaN or infinity"):
        effective_rank(torch.tensor([[1.0, torch.inf]]))
