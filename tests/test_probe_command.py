"""`headplug probe` and `headplug report`, as typed."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from headplug import FeatureStore, LayerReport, cli, probe_layers
from headplug.evaluation import evaluate


@pytest.fixture
def headplug(monkeypatch, capsys):
    """Runs the command line in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["headplug", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Two models' features of the same samples; the second model's are worse."""
    folder = tmp_path_factory.mktemp("stored")
    generator = torch.Generator().manual_seed(0)
    labels = {"train": torch.arange(160) % 4, "test": torch.arange(120) % 4}
    for name, noise in (("good", 0.7), ("bad", 3.0)):
        for split, y in labels.items():
            x = torch.eye(4)[y].repeat(1, 3)
            x = x + noise * torch.randn(x.shape, generator=generator)
            taps = {"pre_projection": x, "projection": x[:, :3].contiguous()}
            write(FeatureStore.from_tensors(taps, labels=y), folder / name / split)
    return folder


def write(store, folder):
    """A store on disk with the features of one in memory."""
    from headplug import extract_features

    class Given(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pre_projection, self.projection = torch.nn.Identity(), torch.nn.Identity()

        def forward(self, both):
            return self.projection(self.pre_projection(both[:, :12])[:, :3])

    both = torch.cat([store["pre_projection"], store["projection"]], 1)
    loader = [(both, store.labels)]
    extract_features(Given(), loader, ["pre_projection", "projection"], out=folder, pool="flat")


def test_probes_of_stored_features_are_those_of_python(headplug, stored, tmp_path):
    code, out, err = headplug("probe", stored / "good", "--out", tmp_path / "run", "--json")
    assert code == 0, err
    results = json.loads(out)
    stores = [FeatureStore.open(stored / "good" / split) for split in ("train", "test")]
    expected = probe_layers(*stores)
    (run,) = results["runs"]
    assert run["taps"] == json.loads(json.dumps(expected.rows))
    assert run["about"]["protocol"] == "headplug"
    assert results == json.loads((tmp_path / "run" / "results.json").read_text())
    assert (tmp_path / "run" / "layers.png").stat().st_size > 10_000
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Every setting of the knn probe" in page
    best = expected.best
    assert f"Read features at <code>{best['tap']}</code>" in page
    assert f"with a {best['probe']} probe" in page
    assert f"Best: {best['tap']}, {best['probe']} " in expected.table()


def test_the_table_the_whole_setting_and_the_paths_are_printed(headplug, stored, tmp_path):
    code, out, err = headplug(
        "probe", stored / "good", "--protocol", "lightly", "--at", "projection", "--shots", "5",
        "--select-on", "test", "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    assert "pre_projection" not in out
    assert "linear 5-shot*" in out
    assert "Chosen on the test samples" in out
    for line in ("lr: 0.05", "epochs: 90", "batch_size: 128", "k: 200", "temperature: 0.1"):
        assert f"  {line}\n" in out
    assert f"{tmp_path}/run/report.html" in out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "the test samples themselves" in page
    assert "Settings were chosen on the test images" in page
    assert "Accuracy of the linear* probe" in page
    assert "held-out train" not in page
    honest = tmp_path / "honest"
    assert headplug("probe", stored / "good", "--at", "projection", "--out", honest)[0] == 0
    code, _, err = headplug("report", tmp_path / "run", honest)
    assert code == 1
    assert "chosen on the test samples, of others on held-out" in err


def test_several_runs_are_compared_on_the_same_test_images(headplug, stored, tmp_path):
    for name in ("good", "bad"):
        assert headplug("probe", stored / name, "--out", tmp_path / name)[0] == 0
    code, out, err = headplug(
        "report", tmp_path / "bad", tmp_path / "good", "--out", tmp_path / "both"
    )
    assert code == 0, err
    assert "Use the head `good`" in out
    assert "a clear gain" in out
    merged = json.loads((tmp_path / "both" / "results.json").read_text())
    hits = [
        torch.tensor(run["taps"][0]["accuracy"]) for run in merged["runs"]
    ]  # bad, good: the order they were named in
    assert hits[1] > hits[0]
    assert (tmp_path / "both" / "report.html").is_file()
    code, out, _ = headplug("report", tmp_path / "good")
    assert code == 0
    assert "Read features at" in out


def test_runs_of_the_same_name_are_told_apart_and_other_images_refused(headplug, stored, tmp_path):
    stores = [FeatureStore.open(stored / "good" / split) for split in ("train", "test")]
    for name in ("a", "b"):
        evaluate(stored / "good", tmp_path / name, name="same", probes="knn", device="cpu")
    code, out, err = headplug(
        "report", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c", "--json"
    )
    assert code == 0, err
    heads = [run["head"] for run in json.loads(out)["runs"]]
    assert heads == [f"same ({tmp_path}/{name})" for name in "ab"]
    other = tmp_path / "other"
    write(stores[0], other / "train")
    write(stores[0], other / "test")
    evaluate(other, tmp_path / "d", name="other", probes="knn", device="cpu")
    code, _, err = headplug("report", tmp_path / "a", tmp_path / "d")
    assert code == 1
    assert "different images" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--protocol", "lightley"], "Closest: lightly"),
        (["--probes", "knn,lineer"], "Closest: linear"),
        (["--select-on", "tests"], "Closest: test"),
        (["--shots", "five"], "--shots takes numbers"),
        (["--shots", "0"], "positive"),
        (["--at", "nowhere"], "nowhere"),
        (["--shots", "100"], "Ask for fewer shots"),
    ],
)
def test_mistakes_cost_one_line_and_leave_nothing(headplug, stored, tmp_path, arguments, words):
    code, out, err = headplug("probe", stored / "good", *arguments, "--out", tmp_path / "run")
    assert code in (1, 2)
    assert out == ""
    assert words in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_half_a_folder_is_named(headplug, stored, tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "train").symlink_to(stored / "good" / "train")
    code, _, err = headplug("probe", tmp_path / "half")
    assert code == 2
    assert "has the features of train and none of test" in err
    code, _, err = headplug("probe", tmp_path / "no" / "folder")
    assert code == 2
    assert "there is no file or folder" in err
    code, _, err = headplug("report", tmp_path / "nothing")
    assert code == 2
    assert "headplug probe" in err


def test_a_saved_report_of_the_run_reads_again(stored, tmp_path):
    report, _ = evaluate(stored / "good", tmp_path / "run", name="x", probes="ridge", device="cpu")
    again = LayerReport.load(report.save(tmp_path / "report.json"))
    assert again.table() == report.table()
    assert again.profile == report.profile
    assert again.profile["slope"] > 0
