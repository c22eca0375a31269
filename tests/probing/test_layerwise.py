from __future__ import annotations

from collections import Counter

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifierCV
from sklearn.preprocessing import StandardScaler

from headplug.errors import DataError, OptionError, UnknownNameError
from headplug.probing import LayerReport, LinearSetting, layerwise, probe_layers
from headplug.probing.data import multilabel_split, stratified_split
from headplug.probing.protocols import PROTOCOLS
from headplug.probing.tasks import views

PROBES = ("knn", "linear", "ridge")


@pytest.fixture(scope="module")
def digits(store):
    data = load_digits()
    x, y = torch.tensor(data.data).float(), torch.tensor(data.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    projection = x @ torch.randn(64, 2, generator=generator)
    train, test = order[:1200], order[1200:]
    return [store({"projection": projection[i], "pixels": x[i]}, y[i]) for i in (train, test)]


@pytest.fixture(scope="module")
def report(digits):
    return probe_layers(*digits, device="cpu")


@pytest.fixture
def small(store, blobs):
    return store({"h": blobs(80)[0]}, blobs(80)[1]), store({"h": blobs(40)[0]}, blobs(40)[1])


def test_pixels_of_digits_are_told_apart_and_win(report):
    accuracy = {(r["tap"], r["probe"]): r["accuracy"] for r in report.rows}
    assert list(accuracy) == [(t, p) for t in ("projection", "pixels") for p in PROBES]
    assert accuracy["pixels", "knn"] > 0.97
    assert accuracy["pixels", "linear"] > 0.93
    assert accuracy["pixels", "ridge"] > 0.9  # scikit-learn's own ridge gets 0.926 on this split
    assert all(accuracy["projection", p] < 0.7 for p in PROBES)
    assert report.best["tap"] == "pixels"


def test_ridge_with_its_choice_is_as_accurate_as_sklearns(report, digits):
    train, test = digits
    scaler = StandardScaler().fit(train["pixels"].numpy())
    oracle = RidgeClassifierCV([10.0**e for e in range(-1, 4)])
    oracle.fit(scaler.transform(train["pixels"].numpy()), train.labels.numpy())
    expected = oracle.score(scaler.transform(test["pixels"].numpy()), test.labels.numpy())
    got = next(r for r in report.rows if (r["tap"], r["probe"]) == ("pixels", "ridge"))
    assert abs(got["accuracy"] - expected) < 0.01


def test_rows_say_how_they_came_about(report, digits):
    for row, grid, hits in zip(report.rows, report.grids, report.outcomes, strict=True):
        assert row["low"] < row["accuracy"] < row["high"]
        assert row["selected_on"] == "20% of train, held out"
        assert row["n_test"] == len(digits[1].labels)
        assert hits.shape == (1, len(digits[1].labels))
        assert hits.double().mean().item() == pytest.approx(row["accuracy"])
        assert row["setting"] == grid["settings"][grid["chosen"]]
        assert row["val_accuracy"] == max(grid["values"]) == grid["values"][grid["chosen"]]
    assert {s["dim"] for s in report.spectra} == {2, 64}


def test_choice_of_settings_never_sees_test_labels(report, digits, store):
    train, test = digits
    shuffled = test.labels[torch.randperm(len(test.labels))]
    other = probe_layers(train, store(dict(test), shuffled), device="cpu")
    for one, two in zip(report.rows, other.rows, strict=True):
        assert one["setting"] == two["setting"]
        assert one["val_accuracy"] == two["val_accuracy"]
        assert two["accuracy"] < 0.3
    assert other.best["tap"] == "pixels"


def test_same_seed_same_report_and_nothing_global_changes(report, digits):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    torch.set_flush_denormal(False)
    again = probe_layers(*digits, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() is torch.float32
    assert (torch.tensor([1e-40]) * 1.0).item() != 0.0  # denormals are still there
    assert again.rows == report.rows
    assert again.spectra == report.spectra


def test_another_default_dtype_and_autocast_change_nothing(small):
    expected = probe_layers(*small, device="cpu").rows
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            got = probe_layers(*small, device="cpu").rows
            assert torch.is_autocast_enabled("cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert got == expected


def test_labels_may_be_any_integers(small, store):
    train, test = small
    names = torch.tensor([-5, 3, 70, 1000])
    renamed = [store(dict(s), names[s.labels]) for s in small]
    got = probe_layers(*renamed, device="cpu")
    expected = probe_layers(train, test, device="cpu")
    assert got.rows == expected.rows
    for one, two in zip(got.outcomes, expected.outcomes, strict=True):
        assert torch.equal(one, two)


def test_settings_fit_the_number_of_samples_without_a_warning(small, recwarn):
    row = probe_layers(*small, probes="knn", device="cpu").rows[0]
    assert row["setting"]["k"] <= 50
    assert not [w for w in recwarn if "k=" in str(w.message)]


def test_probes_are_run_in_the_order_asked(small):
    rows = probe_layers(*small, probes=["ridge", "knn", "ridge"], device="cpu").rows
    assert [r["probe"] for r in rows] == ["ridge", "knn"]


def test_a_setting_that_overflows_never_wins(small):
    bad, good = LinearSetting(1e4, 1e4), LinearSetting(1e-9)
    with pytest.warns(UserWarning, match="overflowed"):
        report = probe_layers(*small, {"linear": [bad, good]}, device="cpu")
    assert report.rows[0]["setting"]["lr"] == 1e-9
    assert report.grids[0]["values"][0] is None


def test_a_class_of_one_sample_stays_in_train_and_the_rows_say_so(store, blobs):
    x, y = blobs(60)
    y[0] = 4
    rows = probe_layers(store({"h": x}, y), store({"h": x}, y), "knn", device="cpu").rows
    assert rows[0]["selected_on"] == "20% of train, held out (classes of one sample are not)"


def test_constant_tap_is_probed_with_a_warning_and_finite_numbers(store, blobs, tmp_path):
    x, y = blobs(80)
    both = store({"h": x, "collapsed": torch.full((80, 3), 0.1)}, y)
    with pytest.warns(UserWarning, match="'collapsed' is constant"):
        report = probe_layers(both, both, device="cpu")
    most = max(Counter(y.tolist()).values()) / len(y)
    assert all(r["accuracy"] <= most for r in report.rows if r["tap"] == "collapsed")
    assert report.best["tap"] == "h"
    report.plot(tmp_path / "layers.png")
    LayerReport.load(report.save(tmp_path / "report.json"))  # JSON without NaN


def change(small, store, which, **new):
    parts = list(small)
    i = ("train", "test").index(which)
    old = parts[i]
    parts[i] = store({**old, **new.pop("features", {})}, new.get("labels", old.labels))
    return parts


def test_unusable_input_is_refused_before_any_probe_runs(small, store, monkeypatch):
    monkeypatch.setattr(layerwise, "Trial", None)
    train, test = small
    nan = torch.full((80, 2), torch.nan)
    cases = [
        (
            change(small, store, "train", labels=train.labels * 0),
            "all training samples are of class 0",
        ),
        (change(small, store, "test", labels=test.labels + 2), "classes that train lacks"),
        (change(small, store, "train", features={"h": nan}), "tap 'h' of train: 80 of 80 samples"),
        (
            change(small, store, "test", features={"h": test["h"][:9]}),
            "'h' of test: 9 samples, but 40",
        ),
        (change(small, store, "test", features={"z": test["h"]}), r"only test has \['z'\]"),
        (
            change(small, store, "test", features={"h": test["h"][:, :5]}),
            "train has 16 .* test has 5",
        ),
        (change(small, store, "train", labels=None), "train features have no labels"),
        (change(small, store, "test", labels=test.labels.float()), "are classes .* regression"),
        (change(small, store, "train", labels=torch.arange(80)), "single sample"),
        ([store({}, train.labels), store({}, test.labels)], "no taps"),
    ]
    for (one, two), message in cases:
        with pytest.raises(DataError, match=message):
            probe_layers(one, two, device="cpu")


def test_unknown_probes_and_impossible_fractions_are_refused(small):
    with pytest.raises(UnknownNameError, match=r"no probe is called 'lineer'. Closest: linear"):
        probe_layers(*small, probes=("lineer",))
    with pytest.raises(OptionError, match="at least one probe"):
        probe_layers(*small, probes=())
    for fraction in (0.0, 1.0, -1):
        with pytest.raises(OptionError, match="between 0 and 1"):
            probe_layers(*small, held_out=fraction)


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.99])
def test_split_is_stratified_complete_and_leaves_every_class_on_both_sides(fraction):
    labels = torch.tensor([0] * 100 + [1] * 10 + [2] * 2 + [3])
    fit, held = stratified_split(labels, fraction)
    assert torch.equal(torch.cat([fit, held]).sort().values, torch.arange(113))
    assert set(labels[fit].tolist()) == {0, 1, 2, 3}
    assert set(labels[held].tolist()) == {0, 1, 2}
    share = int((labels[held] == 0).sum())
    assert share == min(max(round(100 * fraction), 1), 99)


@pytest.mark.parametrize(("fraction", "gain"), [(0.2, 1.4), (0.5, 2.5)])
def test_split_of_labels_leaves_each_on_both_sides_in_its_proportion(fraction, gain):
    off = random = 0.0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        count = int(torch.randint(20, 200, (), generator=generator))
        chances = torch.rand(25, generator=generator) ** 3
        labels = torch.rand(count, 25, generator=generator) < chances
        labels[:, 0] = torch.arange(count) < 2
        totals = labels.sum(0)
        fit, held = multilabel_split(labels, fraction, seed)
        assert torch.equal(torch.cat([fit, held]).sort().values, torch.arange(count))
        assert torch.equal(held, multilabel_split(labels, fraction, seed)[1])
        assert not torch.equal(held, multilabel_split(labels, fraction, seed + 1)[1])
        assert abs(len(held) - fraction * count) <= 0.05 * count + 12
        there = labels[held].sum(0)
        assert ((there > 0) & (there < totals))[totals > 1].all()
        off += float((there - fraction * totals).abs().sum())
        drawn = stratified_split(torch.zeros(count).long(), fraction, seed)[1]
        random += float((labels[drawn].sum(0) - fraction * totals).abs().sum())
    assert random > gain * off


def test_labels_without_two_samples_cannot_be_held_out():
    with pytest.raises(DataError, match="no label has two samples"):
        multilabel_split(torch.eye(3).bool(), 0.2)


def test_a_rare_label_is_held_out_too(store):
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.stack([x[:, 0] > 0, torch.arange(60) < 2], dim=1).long()
    both = store({"h": x}, labels)
    for seed in range(4):
        _, _, [task] = views(both, both, None, PROTOCOLS["headplug"], seed)
        assert labels[task.held, 1].sum() == 1
        assert len(task.held) == 12
