from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from headplug import FeatureStore, extract_features
from headplug.diagnostics import DEFINITIONS, Spectrum, describe, diagnose
from headplug.errors import DataError, UnknownNameError


def test_units_and_norms_follow_their_definitions(many_blocks):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 10, generator=generator).relu()
    x[:, 2] = 0
    x[:, 5] = 1.5
    x[:, 7] = -2 + 2e-10 * torch.arange(600)  # rounds to the same or the next number
    x[1:, 8], x[:-1, 9] = 0, 0  # alive for one sample
    x[0, 8], x[-1, 9] = -1, 1
    found = describe(x)
    assert found["dead_units"] == pytest.approx(0.1)
    assert found["constant_units"] == pytest.approx(0.3)
    array = x.double().numpy()
    assert found["norm"] == pytest.approx(np.linalg.norm(array, axis=1).mean())
    share = (array.mean(0) ** 2).sum() / (array**2).sum(1).mean()
    assert found["mean_share"] == pytest.approx(share)
    assert (found["samples"], found["dim"]) == (600, 10)


def test_rows_hold_the_numbers_of_each_tap_in_plain_types(make, many_blocks):
    tall, wide = make(50, 20), make(50, 80, seed=1)
    rows = diagnose({"h": tall, "z": wide}, device="cpu")
    assert [row["tap"] for row in rows] == ["h", "z"]
    assert json.loads(json.dumps(rows)) == rows
    for row, x in zip(rows, (tall, wide), strict=True):
        spectrum = Spectrum.of(x)
        assert row["rankme"] == pytest.approx(spectrum.rankme())
        assert row["effective_rank"] == pytest.approx(spectrum.effective_rank())
        assert {**describe(x, row["tap"]), "tap": row["tap"]}.keys() == row.keys()
    assert rows[0]["why"] == {}
    assert "50 samples can show 49 directions of 80" in rows[1]["why"]["rank"]
    explained = set(DEFINITIONS) | {"alpha_r2", "alpha_ranks", "options", "why"}
    assert set(rows[0]) - explained == {"tap", "samples", "dim"}


def test_a_store_on_disk_with_shuffled_samples_gives_what_memory_gives(tmp_path, many_blocks):
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(12, 30), torch.nn.ReLU(), torch.nn.Linear(30, 8)
    )
    images = torch.rand(90, 3, 2, 2)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    batches = [(images[i], torch.zeros(len(i)), i) for i in order.split(16)]
    store = extract_features(model, batches, at=["2", "3"], out=tmp_path / "s", dtype=torch.float32)
    with torch.no_grad():
        memory = {"2": model[:3](images), "3": model(images)}
    for row, expected in zip(diagnose(store), diagnose(memory), strict=True):
        for key in ("rankme", "effective_rank", "condition_number", "dead_units", "norm"):
            assert row[key] == pytest.approx(expected[key], rel=1e-4), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64])
def test_other_types_are_taken_as_they_are(dtype):
    x = torch.randint(0, 20, (100, 6), generator=torch.Generator().manual_seed(0))
    assert describe(x.to(dtype)) == describe(x.double())


@pytest.mark.parametrize("shape", [(90, 20), (20, 90)])
@pytest.mark.parametrize("power", [530, -565])  # about 1e160 and 1e-170
def test_doubles_too_large_or_small_to_be_squared_give_what_others_give(make, shape, power):
    x = make(*shape).double()
    found, expected = describe(x * 2.0**power), describe(x)
    assert found.pop("norm") == pytest.approx(expected.pop("norm") * 2.0**power)
    assert found.pop("singular_values") == pytest.approx(expected.pop("singular_values"))
    plain = {"why": expected.pop("why"), "options": expected.pop("options")}
    assert found == {k: pytest.approx(v) for k, v in expected.items()} | plain
    raw = Spectrum.of(x * 2.0**power).raw * 2.0**-power
    torch.testing.assert_close(raw, Spectrum.of(x).raw)


def test_numpy_arrays_are_taken_as_tensors_are(make):
    x = make(40, 6)
    assert describe(x.numpy()) == describe(x)
    assert diagnose({"h": x.numpy()}) == diagnose({"h": x})
    with pytest.raises(DataError, match="'h' must be a tensor, not str"):
        diagnose({"h": "features"})


@pytest.mark.parametrize(("value", "raw_rank"), [(0.0, 0.0), (0.1, 1.0), (1e6, 1.0), (1e-30, 1.0)])
@pytest.mark.parametrize("shape", [(50, 8), (8, 50)])
def test_constant_features_have_no_centred_rank_and_no_nan(shape, value, raw_rank):
    found = describe(torch.full(shape, value))
    assert found["effective_rank"] == found["stable_rank"] == found["participation_ratio"] == 0.0
    assert found["rankme"] == pytest.approx(raw_rank, abs=1e-4)
    assert set(found["singular_values"]) == {0.0}
    assert found["constant_units"] == 1.0
    assert found["dead_units"] == (value == 0)
    assert found["condition_number"] is None
    assert found["why"]["rank"] == "the features are the same for all samples."
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_bad_features_are_refused_by_the_name_of_their_tap(many_blocks):
    good, bad = torch.rand(400, 4), torch.rand(400, 4)
    bad[313, 2] = torch.inf
    with pytest.raises(DataError, match=r"the features at 'z' hold NaN.*row 313\."):
        diagnose({"h": good, "z": bad})
    with pytest.raises(DataError, match=r"'map' must have shape \(N, D\), not \(5, 3, 2, 2\)"):
        diagnose(FeatureStore.from_tensors({"map": torch.rand(5, 3, 2, 2)}))
    with pytest.raises(DataError, match="'h' are of 1 sample"):
        describe(torch.rand(1, 4), "h")
    with pytest.raises(DataError, match=r"'h' are complex"):
        describe(torch.rand(4, 4).to(torch.complex64), "h")
    with pytest.raises(DataError, match=r"'wide' need a matrix of 20000 x 20000.*3\.0 GiB.*pool"):
        describe(torch.zeros(1, 1).expand(20_000, 30_000), "wide")
    with pytest.raises(UnknownNameError, match="Closest: projection"):
        diagnose({"projection": good}, ["projecton"])
    with pytest.raises(DataError, match="no tap"):
        diagnose({})


def test_nothing_is_hidden_in_the_callers_tensor():
    x = torch.rand(30, 5, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    describe(x)
    assert torch.equal(x, before)
    assert x.grad is None
