from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from headplug import FeatureStore
from headplug.diagnostics import cka, linear_cka, similarity
from headplug.errors import DataError, UnknownNameError


def kernels(x, y):
    return [t.double().numpy() @ t.double().numpy().T for t in (x, y)]


def biased(a, b):
    h = np.eye(len(a)) - 1 / len(a)
    return np.trace(a @ h @ b @ h)


def unbiased(a, b):
    """Song et al. (2012), equation 5."""
    n = len(a)
    a, b = (m - np.diag(np.diag(m)) for m in (a, b))
    one = np.ones(n)
    middle = (one @ a @ one) * (one @ b @ one) / ((n - 1) * (n - 2))
    return np.trace(a @ b) + middle - 2 / (n - 2) * (one @ a @ b @ one)


def oracle(x, y, debiased):
    hsic = unbiased if debiased else biased
    a, b = kernels(x, y)
    return hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b))


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("shapes", [(120, 30, 20), (30, 50, 20), (30, 40, 60), (6, 3, 3)])
def test_cka_equals_the_formula_on_kernels(make, shapes, debiased, many_blocks):
    n, d, e = shapes
    x, y = make(n, d), make(n, e, seed=1)
    y[:, : min(d, e)] += x[:, : min(d, e)]
    expected = oracle(x, y, debiased)
    assert linear_cka(x, y, debiased=debiased) == pytest.approx(expected, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_does_not_see_rotation_scale_or_shift(make, debiased):
    x = make(80, 12)
    q = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0))).Q
    assert linear_cka(x, 1e-3 * x @ q + 5, debiased=debiased) == pytest.approx(1.0, abs=1e-5)


def test_debiased_cka_of_independent_features_is_near_zero():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(200, 100, generator=generator) for _ in range(2))
    assert linear_cka(x, y) > 0.3
    assert abs(linear_cka(x, y, debiased=True)) < 0.05


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("room", [2**31, 1])
def test_all_pairs_of_a_store_however_many_passes_they_take(
    make, debiased, room, monkeypatch, many_blocks
):
    store = {"a": make(40, 8), "b": make(40, 12, seed=1), "c": make(40, 50, seed=2)}
    if room == 1:
        monkeypatch.setattr(similarity, "ROOM", room)
    rows = cka(store, debiased=debiased)
    assert [(row["tap"], row["other"]) for row in rows] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert json.loads(json.dumps(rows)) == rows
    for row in rows:
        expected = oracle(store[row["tap"]], store[row["other"]], debiased)
        assert row["cka"] == pytest.approx(expected, rel=1e-8, abs=1e-10)
        assert row["debiased"] is debiased
        assert row["samples"] == 40


def test_the_pairs_of_one_pass_fit_into_memory(monkeypatch):
    widths = [3, 5, 8]
    pairs = [(i, j) for i in range(3) for j in range(i, 3)]
    monkeypatch.setattr(similarity, "ROOM", 8 * 50)
    groups = list(similarity._groups(pairs, widths))
    assert [pair for group in groups for pair in group] == pairs
    sizes = [sum(widths[i] * widths[j] for i, j in group) for group in groups]
    assert sizes == [48, 25, 40, 64]  # the last fits nowhere, and goes alone


def test_two_runs_are_compared_by_the_ids_of_their_samples(make, many_blocks):
    x, y = make(40, 8), make(40, 12, seed=1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    first = FeatureStore.from_tensors({"h": x, "z": y})
    second = FeatureStore.from_tensors({"h": x[order] * 2, "z": y[order].relu()}, ids=order)
    rows = cka(first, second)
    assert [(r["tap"], r["other"]) for r in rows] == [(a, b) for a in "hz" for b in "hz"]
    assert rows[0]["cka"] == pytest.approx(1.0)
    assert rows[3]["cka"] == pytest.approx(oracle(y, y.relu(), False))
    assert [row["tap"] for row in cka(first, second, taps=["z"])] == ["z"]


def test_mixed_stores_are_refused(make):
    x = make(20, 4)
    first = FeatureStore.from_tensors({"h": x})
    with pytest.raises(DataError, match=r"mixed stores: one has 20 samples, the other 15, and 15 "):
        cka(first, FeatureStore.from_tensors({"h": x[:15]}))
    names = FeatureStore.from_tensors({"h": x}, ids=[f"{i}.png" for i in range(20)])
    with pytest.raises(DataError, match=r"0 ids are in both \(0 is in the first only; '0\.png'"):
        cka(first, names)
    with pytest.raises(DataError, match="numbers of samples differ: 'h' 20, 'h' 15"):
        cka({"h": x}, {"h": x[:15]})
    with pytest.raises(UnknownNameError, match="no tap is called 'z'"):
        cka(first, taps=["h", "z"])


def test_what_is_undefined_is_none_with_the_reason_or_an_error(make):
    x, constant = make(20, 4), torch.full((20, 4), 0.1)
    [row] = cka({"h": x, "z": constant})
    assert row["cka"] is None
    assert row["why"]["cka"] == "the features at 'z' are the same for all samples."
    with pytest.raises(DataError, match="'y' are the same"):
        linear_cka(x, constant)
    with pytest.raises(DataError, match=r"3 samples; debiased CKA needs four or more"):
        linear_cka(x[:3], x[:3], debiased=True)
    with pytest.raises(DataError, match="'z' hold NaN"):
        cka({"h": x, "z": x.clone().fill_(torch.nan)})
