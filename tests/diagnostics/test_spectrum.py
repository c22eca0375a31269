from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from headplug.diagnostics import Moments, Spectrum, SpectrumOptions, definitions
from headplug.errors import DataError, OptionError


def svd(x, centred):
    x = x.double().numpy()
    return np.linalg.svd(x - x.mean(0) * centred, compute_uv=False)


def test_singular_values_equal_numpys(features, many_blocks):
    found = Spectrum.of(features)
    for centred, got in ((True, found.centred), (False, found.raw)):
        expected = svd(features, centred)
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-7, atol=2e-7 * expected[0])


def test_fewer_streamed_samples_than_features_have_as_many_singular_values(make):
    x = make(10, 30)
    moments = Moments(30)
    moments.update(x)
    for got, expected in (
        (Spectrum(moments).centred, svd(x, True)),
        (Spectrum(moments).raw, svd(x, False)),
    ):
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-7, atol=2e-7 * expected[0])


@pytest.mark.parametrize("of", ["singular", "eigen"])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("eps", [1e-7, 1e-5, 0.0])
def test_rankme_follows_its_switches(features, entropy_rank, of, centred, eps):
    values = svd(features, centred) ** (2 if of == "eigen" else 1)
    found = Spectrum.of(features).rankme(of, centred, eps)
    assert found == pytest.approx(entropy_rank(values, eps), rel=1e-5)


def test_ranks_follow_their_definitions(features, entropy_rank):
    s = svd(features, True)
    covariance = np.linalg.eigvalsh(np.cov(features.double().numpy().T))
    found = Spectrum.of(features)
    assert found.effective_rank() == pytest.approx(entropy_rank(s, 0.0), rel=1e-5)
    assert found.effective_rank("eigen") == pytest.approx(entropy_rank(s**2, 0.0), rel=1e-5)
    ratio = covariance.sum() ** 2 / (covariance**2).sum()
    assert found.participation_ratio() == pytest.approx(ratio, rel=1e-6)
    assert found.stable_rank() == pytest.approx(covariance.sum() / covariance.max(), rel=1e-6)
    known = s[: min(len(features) - 1, features.shape[1])]
    assert found.rank == len(known)
    assert found.condition_number() == pytest.approx(known[0] / known[-1], rel=1e-3)


@pytest.mark.parametrize(("ranks", "weights"), [((6, 100), "1/rank"), ((2, 30), "equal")])
def test_alpha_req_is_the_slope_of_a_weighted_fit(features, ranks, weights):
    values = svd(features, True) ** 2
    last = min(ranks[1], features.shape[1], len(features) - 1)
    j = np.arange(ranks[0], last + 1)
    x, y = np.log(j), np.log(values[ranks[0] - 1 : last])
    w = 1 / j if weights == "1/rank" else np.ones(len(j))
    slope, constant = np.polyfit(x, y, 1, w=np.sqrt(w))
    residual = (w * (y - slope * x - constant) ** 2).sum()
    total = (w * (y - np.average(y, weights=w)) ** 2).sum()
    found = Spectrum.of(features).alpha_req(ranks, weights)
    assert found.slope == pytest.approx(slope, rel=1e-4)
    assert found.r2 == pytest.approx(1 - residual / total, rel=1e-4)
    assert (found.first, found.last) == (ranks[0], last)


def test_alpha_req_finds_the_exponent_that_was_put_in():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(400, 128, generator=generator, dtype=torch.float64)
    base = torch.linalg.qr(base - base.mean(0)).Q
    falling = torch.arange(1, 129, dtype=torch.float64) ** -0.6
    found = Spectrum.of(base * falling).alpha_req()
    assert -found.slope == pytest.approx(1.2, abs=1e-9)
    assert found.r2 == pytest.approx(1.0)
    assert Spectrum.of(base).numbers()["alpha"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rank_of_low_rank_features(dtype):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-3, 4, (600, 20), generator=generator).double()
    x = whole @ torch.randint(-2, 3, (20, 100), generator=generator).double()
    found = Spectrum.of((x + 7).to(dtype))  # integers, exact in every type
    assert found.rank == 20
    assert found.condition_number() < 100


def test_white_features_have_full_rank_and_a_line_has_rank_one():
    generator = torch.Generator().manual_seed(0)
    white = Spectrum.of(torch.randn(4000, 16, generator=generator))
    assert white.effective_rank() > 15.9
    assert white.condition_number() < 1.2
    line = torch.randn(100, 1, generator=generator) @ torch.randn(1, 16, generator=generator)
    found = Spectrum.of(line)
    assert found.rankme() == pytest.approx(1.0, abs=1e-4)
    assert found.effective_rank() == pytest.approx(1.0, abs=1e-4)
    assert found.participation_ratio() == pytest.approx(1.0, abs=1e-4)


def test_numbers_are_plain_and_say_what_they_are(make):
    options = SpectrumOptions(rankme_centred=True, rankme_of="eigen", alpha_ranks=(1, 10), limit=5)
    spectrum = Spectrum.of(make(200, 30))
    found = spectrum.numbers(options)
    assert json.loads(json.dumps(found)) == found
    assert found["rankme"] == spectrum.rankme("eigen", centred=True)
    assert found["alpha_ranks"] == [1, 10]
    assert found["singular_values"][0] == 1.0
    assert len(found["singular_values"]) == 5
    assert found["options"]["rankme_of"] == "eigen"
    assert found["why"] == {}
    assert "eigenvalues of the second moment" in definitions(options)["rankme"]
    assert "minus their mean" in definitions(options)["rankme"]
    assert "ranks 1 to 10" in definitions(options)["alpha"]
    missing = set(found) - set(definitions()) - {"options", "why", "alpha_r2", "alpha_ranks"}
    assert not missing


def test_what_is_undefined_is_none_with_the_reason():
    found = Spectrum.of(torch.eye(4)).numbers()
    assert found["alpha"] is None
    assert found["alpha_ranks"] is None
    assert "set alpha_ranks" in found["why"]["alpha"]
    white = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
    flat = Spectrum.of(white).numbers(SpectrumOptions(alpha_ranks=(1, 3)))
    assert flat["alpha"] == pytest.approx(0.0, abs=1e-12)
    assert flat["alpha_r2"] is None
    assert "equal" in flat["why"]["alpha_r2"]


@pytest.mark.parametrize(
    "options",
    [
        {"rankme_of": "values"},
        {"rankme_eps": -1},
        {"alpha_ranks": (0, 10)},
        {"alpha_ranks": (5, 6)},
        {"alpha_weights": "rank"},
        {"limit": 0},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(OptionError, match=str(*options.values()).strip("()")):
        SpectrumOptions(**options)


def test_moments_that_overflow_have_no_spectrum():
    moments = Moments(2)
    moments.update(1e200 * torch.eye(2, dtype=torch.float64))
    with pytest.raises(DataError, match="too large to be squared"):
        Spectrum(moments)


def test_one_sample_has_no_spectrum():
    with pytest.raises(DataError, match="1 sample"):
        Spectrum.of(torch.rand(1, 4))
