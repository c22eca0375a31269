from __future__ import annotations

import json

import pytest
import torch

from headplug.errors import DataError, RunError, UnknownNameError
from headplug.probing import DEFINITIONS, LayerReport, probe_layers


@pytest.fixture(scope="module")
def report(store, blobs):
    (x, y), (q, a) = blobs(200), blobs(100, seed=1)
    taps = [store({"deep": x[:, :1], "wide": x}, y), store({"deep": q[:, :1], "wide": q}, a)]
    return probe_layers(*taps, probes=("knn", "ridge"), device="cpu")


def test_json_round_trip_keeps_rows_and_spectra(report, tmp_path):
    path = report.save(tmp_path / "new" / "report.json")
    loaded = LayerReport.load(path)
    assert loaded.rows == report.rows
    assert loaded.spectra == report.spectra
    assert loaded.grids == report.grids
    assert loaded.about == report.about
    assert loaded.gaps == report.gaps
    assert all(map(torch.equal, loaded.outcomes, report.outcomes))
    assert loaded.table() == report.table()
    assert json.loads(path.read_text())["definitions"] == DEFINITIONS


def test_files_that_are_no_report_are_refused(tmp_path):
    with pytest.raises(UnknownNameError, match="no file"):
        LayerReport.load(tmp_path / "none.json")
    for text in ("{", "[]", "{}", '{"schema": 1}', '{"schema": 99, "rows": [], "spectra": []}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError, match=r"bad\.json"):
            LayerReport.load(tmp_path / "bad.json")


def test_a_file_that_cannot_be_written_leaves_nothing_behind(report, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        report.save(tmp_path / "file" / "report.json")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_table_shows_every_accuracy_with_its_interval_and_the_definitions(report):
    lines = report.table().splitlines()
    assert lines[0].split()[:4] == ["tap", "dim", "knn", "ridge"]
    assert len({len(line) for line in lines[:3]}) == 1
    for row in report.rows:
        line = next(text for text in lines if text.startswith(row["tap"] + " "))
        low, mid, high = (f"{100 * row[k]:.1f}" for k in ("low", "accuracy", "high"))
        assert f"{mid} [{low}, {high}]" in line
    assert DEFINITIONS["rankme"] in lines
    assert "20% of train, held out" in report.table()
    assert str(report) == report.table()
    assert "best 'wide'" in repr(report)


def test_ties_go_to_the_earlier_tap():
    rows = [
        {"tap": t, "val_accuracy": v, "task": "labels", "shots": None, "metric": "accuracy"}
        for t, v in (("a", 0.1), ("b", 0.9), ("c", 0.9))
    ]
    assert LayerReport(rows, []).best["tap"] == "b"


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plot_draws_an_image_and_leaves_pyplot_alone(report, tmp_path, ending):
    import matplotlib.pyplot as plt

    path = report.plot(tmp_path / f"layers.{ending}")
    assert path.stat().st_size > 5000
    assert plt.get_fignums() == []


def test_plot_and_pandas_agree_with_the_rows(report):
    frame = report.to_pandas()
    assert frame["accuracy"].tolist() == [r["accuracy"] for r in report.rows]
