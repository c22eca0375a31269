"""Diagnostics on made-up features: 8,000 rows of 256 features, float32."""

import numpy as np
import pytest
import torch

from headplug.diagnostics import Spectrum, describe, linear_cka, weight_profile


@pytest.fixture(scope="module")
def features(cpu):
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(256, 256, generator=generator)).Q
    return torch.randn(8000, 256, generator=generator) * torch.logspace(0, -3, 256) @ rotation + 1


def test_spectra_against_numpys_svd(features, against, benchmark):
    x = features.numpy().astype(np.float64)

    def peer():
        return [np.linalg.svd(x - x.mean(0) * c, compute_uv=False) for c in (1, 0)]

    found = Spectrum.of(features)
    errors = [
        abs(ours.numpy() / theirs - 1).max()
        for ours, theirs in zip((found.centred, found.raw), peer(), strict=True)
    ]
    benchmark.extra_info["relative_error"] = max(errors)
    assert max(errors) < 1e-6
    against(lambda: Spectrum.of(features), peer, rounds=7, dtype=None)


def test_all_numbers_of_a_tap_against_scikit_learns_full_pca(features, against):
    """The peer has the singular values alone, the way reptrix has them: one SVD, in float32."""
    from sklearn.decomposition import PCA

    x = features.numpy()
    against(
        lambda: describe(features),
        lambda: PCA(svd_solver="full").fit(x),
        rounds=7,
        dtype=None,
    )


def test_cka_against_the_formula_on_kernels(features, against, benchmark):
    x, y = features[:2000], features[:2000, :128].relu()

    def peer():
        centred = (t.double() - t.double().mean(0) for t in (x, y))
        k, l = (t @ t.T for t in centred)  # noqa: E741 # the usual names
        return ((k * l).sum() / (k.square().sum() * l.square().sum()).sqrt()).item()

    benchmark.extra_info["difference"] = abs(linear_cka(x, y) - peer())
    assert linear_cka(x, y) == pytest.approx(peer(), rel=1e-9)
    against(lambda: linear_cka(x, y), peer, rounds=7, dtype=None)


def test_weight_profile_against_numpys_svd(features, against):
    after = features.relu()
    h, z = (t.numpy().astype(np.float64) for t in (features, after))

    def peer():
        u, s, _ = np.linalg.svd(h - h.mean(0), full_matrices=False)
        return s, np.linalg.norm((z - z.mean(0)).T @ u, axis=0)

    against(lambda: weight_profile(features, after), peer, rounds=5, dtype=None)
