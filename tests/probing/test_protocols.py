"""Published protocols, few-shot probes, several tasks and kinds of targets, on small real data."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge
from sklearn.metrics import average_precision_score, r2_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from headplug.errors import DataError, OptionError, UnknownNameError
from headplug.probing import (
    PROTOCOLS,
    KNNSetting,
    LayerReport,
    LinearSetting,
    RidgeSetting,
    probe_layers,
)

DATA = load_digits()
X, Y = torch.tensor(DATA.data).float() / 16, torch.tensor(DATA.target)


@pytest.fixture(scope="module")
def pair(store):
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(X), generator=generator)
    head = torch.randn(64, 6, generator=generator)
    taps = {"pre_projection": X, "projection": (X @ head).relu()}
    parts = order[:900], order[900:1500]
    return [store({t: v[rows] for t, v in taps.items()}, Y[rows]) for rows in parts]


def only(pair, store, rows):
    return [store({t: v[rows] for t, v in s.items()}, s.labels[rows]) for s in pair]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_prints_its_whole_setting_and_json_has_it(name):
    rule = PROTOCOLS[name]
    text = str(rule)
    assert rule.source in text
    for probe, about in rule.config["probes"].items():
        assert f"{probe}: {about['kind']}, {len(about['settings'])} settings" in text
        for setting in about["settings"]:
            for value in filter(None, setting.values()):
                shown = f"{value:g}" if isinstance(value, float) else str(value)
                assert shown in text
    assert json.loads(json.dumps(rule.config)) is not None


def test_the_figures_of_protocols_are_their_sources():
    rates = {n: [s.lr for s in PROTOCOLS[n].probes["linear"].settings] for n in PROTOCOLS}
    assert rates["simclr"] == [0.1 * 4096 / 256]
    assert rates["lightly"] == [0.1 * 128 / 256]
    assert rates["dino"] == [0.001 * 1024 / 256]
    assert rates["moco"] == [30]
    published = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]
    assert rates["dinov2"] == pytest.approx([lr * 128 / 256 for lr in published])
    assert len(PROTOCOLS["solo-learn"].probes["knn"].settings) == 8 * 8 + 8
    penalties = [s.penalty for s in PROTOCOLS["simclr"].probes["logistic"].settings]
    assert len(penalties) == 45
    assert (penalties[0], penalties[-1]) == pytest.approx((1e-6, 1e5))


@pytest.mark.parametrize("name", ["moco", "lightly", "solo-learn"])
def test_protocols_run_whole_and_the_report_says_which(pair, store, name, tmp_path):
    small = only(pair, store, slice(0, 200))
    report = probe_layers(*small, protocol=name, device="cpu")
    assert report.about["protocol"] == name
    assert report.about["probes"] == PROTOCOLS[name].config["probes"]
    assert {row["probe"] for row in report.rows} == set(PROTOCOLS[name].probes)
    assert report.row("pre_projection", "linear")["accuracy"] > 0.8
    assert LayerReport.load(report.save(tmp_path / "r.json")).about["source"] in str(
        PROTOCOLS[name]
    )


def test_lightlys_neighbours_are_lightlys(pair):
    from lightly.utils.benchmarking.knn import knn_predict

    train, test = pair
    report = probe_layers(*pair, "knn", protocol="lightly", device="cpu")
    bank, queries = (torch.nn.functional.normalize(s["pre_projection"], dim=1) for s in pair)
    peer = knn_predict(queries, bank.T, train.labels, 10, knn_k=200, knn_t=0.1)[:, 0]
    expected = (peer == test.labels).double().mean().item()
    assert report.row("pre_projection", "knn")["accuracy"] == pytest.approx(expected)


def test_the_ae_protocol_divides_test_and_never_sees_train(pair, store):
    train, test = pair
    nonsense = store({t: torch.zeros_like(v) for t, v in train.items()}, train.labels.flip(0))
    reports = [
        probe_layers(known, test, protocol="ae", device="cpu") for known in (train, nonsense)
    ]
    assert reports[0].rows == reports[1].rows
    for row in reports[0].rows:
        assert row["n_test"] == round(0.2 * len(test.labels))
        assert row["selected_on"] == "10% of the test samples, which are divided anew"
    assert reports[0].best["accuracy"] > 0.2  # one small step at a time, as there


def test_choice_on_test_is_made_there_and_marked_everywhere(pair, tmp_path):
    report = probe_layers(*pair, ("knn", "ridge"), select_on="test", device="cpu")
    for row in report.rows:
        assert row["selected_on"] == "the test samples themselves"
        assert row["val_accuracy"] == row["accuracy"]
    assert "knn*" in report.table()
    assert "Chosen on the test samples: higher than on new ones" in report.table()
    assert "ridge*" in repr(report) or "knn*" in repr(report)
    assert report.about["select_on"] == "test"
    svg = report.plot(tmp_path / "layers.svg").read_text()
    assert "settings chosen on the test samples" in svg
    honest = probe_layers(*pair, ("knn", "ridge"), device="cpu")
    assert "*" not in honest.table()
    for ours, theirs in zip(report.rows, honest.rows, strict=True):
        assert ours["accuracy"] >= theirs["accuracy"]


def test_gaps_and_reports_are_compared_on_the_same_samples(pair, tmp_path):
    report = probe_layers(*pair, ("knn", "ridge"), device="cpu")
    for gap in report.gaps:
        before, after = (
            report.row(tap, gap["probe"])["accuracy"] for tap in ("pre_projection", "projection")
        )
        assert gap["value"] == pytest.approx(before - after)
        assert 0 < gap["low"] < gap["value"] < gap["high"]
        assert gap["p"] < 1e-6
    saved = LayerReport.load(report.save(tmp_path / "r.json"))
    assert [d["value"] for d in report.against(saved)] == [0.0] * 4
    assert [d["p"] for d in report.against(saved)] == [1.0] * 4
    train, test = pair
    other = probe_layers(train, type(test)(dict(test), test.labels.flip(0)), "knn", device="cpu")
    with pytest.raises(DataError, match="take reports of the same test data"):
        report.against(other)
    with pytest.raises(UnknownNameError, match=r"tap 'nowhere'.*pre_projection, knn"):
        report.row("nowhere", "knn")


def test_few_shots_are_few_of_every_class_and_better_with_more(pair):
    report = probe_layers(*pair, ("knn", "ridge"), shots=(1, 10), draws=4, device="cpu")
    for probe in ("knn", "ridge"):
        rows = [report.row("pre_projection", probe, shots=n) for n in (1, 10, None)]
        values = [row["accuracy"] for row in rows]
        assert values == sorted(values)
        assert all(row["low"] < row["accuracy"] < row["high"] for row in rows)
        assert rows[0]["selected_on"] == "20% of train, held out"
    outcomes = dict(zip(map(id, report.rows), report.outcomes, strict=True))
    hits = outcomes[id(report.row("pre_projection", "knn", shots=1))]
    assert hits.shape == (4, 600)
    assert not torch.equal(hits[0], hits[1])
    assert "ridge 10-shot" in report.table()


def test_one_shot_is_scikit_learns_on_the_drawn_samples(pair):
    from headplug.probing.protocols import PROTOCOLS
    from headplug.probing.tasks import few, views

    train, test = pair
    _, _, (task,) = views(train, test, None, PROTOCOLS["headplug"], 0)
    report = probe_layers(
        *pair, {"one": [KNNSetting(1, "euclidean")]}, shots=(3,), draws=2, device="cpu"
    )
    expected = []
    for rows in few(task, 3, 2, 0):
        assert torch.equal(train.labels[rows].bincount(), torch.full((10,), 3))
        oracle = KNeighborsClassifier(1).fit(train["pre_projection"][rows], train.labels[rows])
        expected.append(oracle.score(test["pre_projection"], test.labels))
    got = report.row("pre_projection", "one", shots=3)["accuracy"]
    assert got == pytest.approx(sum(expected) / 2)


def test_tasks_of_every_kind_are_scikit_learns(pair, store):
    train, test = pair
    bits = [torch.stack([s.labels >> i & 1 for i in range(3)], 1) for s in pair]
    sizes = [s["pre_projection"].sum(1) for s in pair]
    tasks = {"digit": (train.labels, test.labels), "bits": tuple(bits), "ink": tuple(sizes)}
    penalty = RidgeSetting(0.01)
    report = probe_layers(*pair, {"r": [penalty]}, tasks=tasks, device="cpu")
    assert [r["metric"] for r in report.rows[:3]] == ["accuracy", "mAP", "r2"]
    scaler = StandardScaler().fit(train["projection"].numpy())
    a, b = (scaler.transform(s["projection"].numpy()) for s in pair)
    oracle = Ridge(alpha=0.01 * len(a))
    scores = oracle.fit(a, 2.0 * bits[0].numpy() - 1).predict(b)
    expected = average_precision_score(bits[1].numpy(), scores)
    assert report.row("projection", "r", "bits")["mAP"] == pytest.approx(expected, abs=1e-4)
    predicted = oracle.fit(a, sizes[0].numpy()).predict(b)
    expected = r2_score(sizes[1].numpy(), predicted)
    assert report.row("projection", "r", "ink")["r2"] == pytest.approx(expected, abs=1e-4)
    assert [r["task"] for r in report.best_by_task.values()] == ["digit", "bits", "ink"]
    assert {g["task"] for g in report.gaps} == set(tasks)
    text = report.table()
    assert "digit:" in text
    assert "Mean average precision in %" in text
    for row in report.rows:
        assert row["low"] <= row[row["metric"]] <= row["high"]


def test_the_caller_is_told_what_cannot_be(pair, store):
    train, test = pair
    with pytest.raises(UnknownNameError, match=r"protocol is called 'lightley'. Closest: lightly"):
        probe_layers(*pair, protocol="lightley")
    with pytest.raises(OptionError, match="held-out"):
        probe_layers(*pair, select_on="heldout")
    with pytest.raises(OptionError, match="shots must be positive"):
        probe_layers(*pair, shots=(0,))
    with pytest.raises(DataError, match=r"500 samples of each class.*class 4 has"):
        probe_layers(*pair, shots=(500,), device="cpu")
    with pytest.raises(OptionError, match="no classes"):
        probe_layers(*pair, tasks={"n": (train.labels.float(), test.labels.float())}, shots=(1,))
    with pytest.raises(DataError, match=r"task 'n': the train labels are classes .* regression"):
        probe_layers(*pair, tasks={"n": (train.labels, test.labels.float())})
    with pytest.raises(OptionError, match="settings of one type"):
        probe_layers(*pair, {"mixed": [KNNSetting(1), LinearSetting(0.1)]})
    with pytest.raises(OptionError, match="tasks= names none"):
        probe_layers(*pair, tasks={})


def test_labels_may_be_bools_and_mistakes_in_them_are_named(pair, store):
    train, _test = pair
    odd = [store(dict(s), s.labels % 2 == 1) for s in pair]
    as_numbers = [store(dict(s), s.labels % 2) for s in pair]
    assert probe_layers(*odd, "knn").rows == probe_layers(*as_numbers, "knn").rows
    assert probe_layers(*pair, "knn", shots=2).rows[1]["shots"] == 2
    with pytest.raises(OptionError, match="must be a pair"):
        probe_layers(*pair, tasks={"n": train.labels})
    with pytest.raises(DataError, match="map them to integers"):
        probe_layers(*pair, tasks={"n": (["a"] * 900, ["b"] * 600)})
    with pytest.raises(OptionError, match="seed must be a whole number"):
        probe_layers(*pair, seed="a")
    rare = torch.zeros(900, 1).long()
    with pytest.raises(
        DataError, match="task 'rare': no label has two samples, so none can be held out"
    ):
        probe_layers(*pair, tasks={"rare": (rare, rare[:600])})
    report = probe_layers(*pair, "knn")
    with pytest.raises(OptionError, match="must end in one of png"):
        report.plot("layers.foo")
    assert report.paired(dict(report.rows[0]), report.rows[0]).value == 0


def test_numbers_far_from_zero_are_predicted_as_well_as_near_it(pair):
    near = [s["pre_projection"].sum(1) for s in pair]
    far = [1e6 + n.double() for n in near]
    reports = [
        probe_layers(*pair, ("linear", "ridge", "mlp"), tasks={"ink": tuple(y)})
        for y in (near, far)
    ]
    for one, two in zip(*(r.rows for r in reports), strict=True):
        assert two["r2"] == pytest.approx(one["r2"], abs=0.01)
    assert reports[0].row("pre_projection", "ridge")["r2"] > 0.99


def test_a_saved_report_keeps_the_gaps_of_classes(pair, tmp_path):
    sizes = tuple(s["pre_projection"].sum(1) for s in pair)
    tasks = {"digit": tuple(s.labels for s in pair), "ink": sizes}
    report = probe_layers(*pair, "ridge", tasks=tasks)
    saved = LayerReport.load(report.save(tmp_path / "r.json"))
    assert {gap["task"] for gap in report.gaps} == {"digit", "ink"}
    assert saved.gaps == [gap for gap in report.gaps if gap["task"] == "digit"]
    with pytest.raises(DataError, match="for classes only"):
        saved.paired(
            saved.row("projection", "ridge", "ink"), saved.row("projection", "ridge", "ink")
        )


def test_a_choice_at_the_end_of_a_grid_is_pointed_out(pair):
    low = [RidgeSetting(p) for p in (1.0, 10.0, 100.0)]
    assert "try a wider one: ridge at" in probe_layers(*pair, {"ridge": low}).table()
    wide = [RidgeSetting(p) for p in (1e-9, 1e-3, 1e-1, 1e9)]
    assert "try a wider one" not in probe_layers(*pair, {"ridge": wide}).table()


SHARED = """
import sys, torch, torch.distributed as dist
from headplug import FeatureStore, probe_layers
dist.init_process_group("gloo", init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=2)
g = torch.Generator().manual_seed(0)
taps = {f"t{i}": torch.randn(300, 4 + i, generator=g) for i in range(3)}
labels = (taps["t2"][:, 0] > 0).long()
store = FeatureStore.from_tensors(taps, labels=labels)
alone = probe_layers(store, store, ("knn", "ridge"), device="cpu")
both = probe_layers(store, store, ("knn", "ridge"), device="cpu", distributed=True)
assert both.rows == alone.rows and both.spectra == alone.spectra and both.grids == alone.grids
assert all(map(torch.equal, both.outcomes, alone.outcomes))
try:
    rolled = labels.roll(int(sys.argv[2]))
    probe_layers(store, store, tasks={"n": (rolled, labels)}, distributed=True)
except Exception as error:
    print(error)
if sys.argv[2] == "1":
    taps["t1"][0, 0] = torch.nan
try:
    probe_layers(FeatureStore.from_tensors(taps, labels=labels), store, "knn", distributed=True)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_processes_share_the_taps_and_end_together(tmp_path):
    script = tmp_path / "shared.py"
    script.write_text(textwrap.dedent(SHARED))
    url = f"file://{tmp_path}/meet"
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), url, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], found
    assert "process 1 of 2 failed: DataError" in found[0][0] or "RunError" in found[0][0]
    assert "tap 't1' of train" in found[1][0]
    assert all("were given different labels" in out for out, _ in found)
