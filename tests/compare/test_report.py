"""The report says what the results say, no more, and opens in a real browser."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from headplug.compare import figures
from headplug.compare.report import answer, results_table, write_report
from headplug.errors import DataError

HEADS = {  # name: (accuracy before the head, after it, layers inside)
    "ae_embedding[embedding_dim=128]": (0.951, 0.918, 5),
    "simclr": (0.939, 0.871, 3),
    "reweighting[kappa=1.05]": (0.927, 0.902, 0),
}
BACKBONE = ("input", "backbone.layer1", "backbone.layer2", "backbone.layer3", "backbone.layer4")


def run_of(head: str, seed: int) -> dict:
    before, after, layers = HEADS.get(head, (0.90, 0.86, 2))
    rng = np.random.default_rng([*head.encode(), seed])
    inside = [f"projection_head.layers.{i}" for i in range(layers)]
    levels = [*np.linspace(0.70, before - 0.01, len(BACKBONE)), before]
    levels += [*np.linspace(before, after, layers + 2)[1:-1], after]
    taps = []
    for tap, level in zip(
        (*BACKBONE, "pre_projection", *inside, "projection"), levels, strict=True
    ):
        for probe, cost in (("knn", 0.02), ("linear", 0.0), ("ridge", 0.01)):
            accuracy = float(level - cost + rng.normal(0, 0.004))
            taps.append(
                {
                    "tap": tap,
                    "probe": probe,
                    "setting": {"k": 20} if probe == "knn" else {"lr": 0.1, "weight_decay": 0.0},
                    "accuracy": accuracy,
                    "low": accuracy - 0.022,
                    "high": accuracy + 0.018,
                    "val_accuracy": accuracy + 0.01,
                    "selected_on": "20% of train, held out",
                    "n_test": 360,
                }
            )
    spectra = [
        {
            "tap": tap,
            "dim": dim,
            "rankme": 31.2,
            "effective_rank": 28.0,
            "singular_values": (40 * np.exp(-np.arange(dim) / scale)).tolist(),
        }
        for tap, dim, scale in (
            ("pre_projection", 512, 900 * (before - 0.86)),
            ("projection", 128, 60 * (after - 0.7)),
        )
    ]
    return {
        "head": head,
        "head_config": {"name": head.split("[")[0], "input_dim": 512, "output_dim": 128},
        "seed": seed,
        "train_images_per_s": 900.0 + seed,
        "head_params_trainable": 328_576,
        "head_params_frozen": 65_664,
        "head_step_ms": 1.234,
        "train_seconds": 50.0,
        "losses": (2 + 3 * np.exp(-np.arange(20) / 5) - before + rng.normal(0, 0.02, 20)).tolist(),
        "taps": taps,
        "spectra": spectra,
    }


def results_of(heads=tuple(HEADS), seeds=(0, 1), gain=(0.012, 0.004, 0.020)) -> dict:
    """Realistic results; `gain` is (mean, low, high) or None."""
    runs = [run_of(head, seed) for head in heads for seed in seeds]
    rows = []
    for head in heads:
        best = [
            row
            for run in runs
            for row in run["taps"]
            if (run["head"], row["tap"], row["probe"]) == (head, "pre_projection", "linear")
        ]
        means = {k: float(np.mean([row[k] for row in best])) for k in ("accuracy", "low", "high")}
        rows.append({"head": head, "tap": "pre_projection", **means})
        after = [r["accuracy"] for run in runs for r in run["taps"][-2:-1] if run["head"] == head]
        gap = means["accuracy"] - float(np.mean(after))
        rows[-1]["gap"] = {"mean": gap, "low": gap - 0.02, "high": gap + 0.02}
    best = max(rows, key=lambda row: row["accuracy"])
    return {
        "schema": 1,
        "command": "headplug compare --heads simclr,ae_embedding,reweighting --data digits",
        "created": "2026-11-22T10:00:00Z",
        "config": {
            "data": "digits", "backbone": "resnet18", "recipe": "simclr", "epochs": 20,
            "batch_size": 256, "standardize": False, "limit": None, "default_head": "simclr",
        },
        "versions": {"headplug": "0.1.0", "torch": "2.15.0"},
        "machine": {"cpu": "a processor", "cores": 2, "gpu": None},
        "seeds": list(seeds),
        "data": {"name": "digits", "train": 1437, "test": 360, "classes": 10, "shape": [1, 8, 8]},
        "runs": runs,
        "summary": {
            "probe": "linear",
            "default_head": "simclr",
            "best": {**best, "probe": "linear", "selected_on": "20% of train, held out"},
            "gain": gain and {
                "over": "simclr",
                **dict(zip(("mean", "low", "high"), gain, strict=True)),
                "method": "paired bootstrap over test images and seeds",
            },
            "heads": rows,
        },
        "definitions": {"rankme": "The exponential of the entropy of the singular values."},
    }  # fmt: skip


class Page(HTMLParser):
    """The text, the attributes, and whether each tag is closed in order."""

    VOID = frozenset({"meta", "link", "br", "wbr", "img", "hr", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(self.html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture
def page(tmp_path):
    """Writes a report and parses it."""
    return lambda results: Page(write_report(results, tmp_path / "run" / "report.html"))


def test_a_clear_gain_says_use_this_head_and_layer(page):
    lead, verdict, *rest = answer(results_of(gain=(0.012, 0.004, 0.020)))
    assert lead.startswith(
        "Use the head `ae_embedding[embedding_dim=128]` and read features at `pre_projection`: 95."
    )
    assert "+1.2 points (95% interval +0.4 to +2.0)" in verdict
    assert verdict.endswith("excludes 0, a clear gain.")
    assert rest[-1] == "Means over 2 seeds."
    assert verdict.replace("`", "") in page(results_of(gain=(0.012, 0.004, 0.020))).text


def test_an_interval_over_zero_is_no_clear_difference():
    lead, verdict, *_ = answer(results_of(gain=(0.012, -0.004, 0.028)))
    assert lead.startswith("No clear difference.")
    assert "-0.4 to +2.8" in verdict
    assert verdict.endswith("includes 0, so no gain is shown.")


def test_a_head_selected_but_worse_on_test_is_not_recommended():
    lead, verdict, *_ = answer(results_of(gain=(-0.02, -0.03, -0.01)))
    assert lead.startswith("Keep the default head `simclr`.")
    assert verdict.endswith("excludes 0, a clear loss.")


def test_the_default_head_may_come_first():
    results = results_of(heads=("simclr", "reweighting[kappa=1.05]"), gain=None)
    lead, verdict, *_ = answer(results)
    assert lead.startswith("Keep the default head `simclr` and read features at `pre_projection`")
    assert verdict == "On held-out train it came first of 2 heads."
    alone = answer(results_of(heads=("simclr",), gain=None))
    assert alone[0].startswith("Read features at `")
    assert not any("came first" in sentence for sentence in alone)


def test_without_the_default_head_no_gain_is_claimed():
    lead, verdict, *_ = answer(results_of(heads=("ae_embedding[embedding_dim=128]",), gain=None))
    assert lead.startswith("Use the head `ae_embedding[embedding_dim=128]`")
    assert "the gain over it is unknown" in verdict


def test_one_seed_says_what_the_interval_leaves_out():
    assert "not training luck" in answer(results_of(seeds=(0,)))[-1]
    assert not any("training luck" in sentence for sentence in answer(results_of(seeds=(0, 1))))


@pytest.mark.parametrize(("low", "word"), [(0.01, "excludes"), (-0.01, "includes")])
def test_the_layer_sentence_follows_its_interval(low, word):
    results = results_of()
    results["summary"]["heads"][0]["gap"] = {"mean": 0.03, "low": low, "high": 0.05}
    assert answer(results)[2].endswith(f"against `projection`: the interval {word} 0.")


def test_the_tables_hold_the_numbers_of_the_results(page):
    results = results_of()
    rows = page(results).rows

    def mean_of(tap, probe, key="accuracy"):
        return 100 * np.mean(
            [
                row[key]
                for run in results["runs"]
                for row in run["taps"]
                if (run["head"], row["tap"], row["probe"]) == ("simclr", tap, probe)
            ]
        )

    before, after = next(row for row in rows if row[0] == "simclr (default)"), rows[0]
    assert after[1:4] == ["pre_projection", "projection", "before - after"]
    for column, tap in ((1, "pre_projection"), (4, "projection")):
        low, high = mean_of(tap, "linear", "low"), mean_of(tap, "linear", "high")
        assert before[column] == f"{mean_of(tap, 'linear'):.1f} [{low:.1f}, {high:.1f}]"
        others = [f"{mean_of(tap, probe):.1f}" for probe in ("knn", "ridge")]
        assert before[column + 1 : column + 3] == others
    costs = [row for row in rows if row[0] == "simclr (default)"][1]
    assert costs[1] == "pre_projection"
    assert costs[5:] == ["900", "328,576", "65,664", "1.23"]
    run, row = results["runs"][3], results["runs"][3]["taps"][4]
    full = [run["head"], "1", row["tap"], row["probe"], "lr=0.1, weight_decay=0.0"]
    shown = next(cells for cells in rows if cells[:5] == full)
    assert shown[5].startswith(f"{100 * row['accuracy']:.1f} [")
    assert shown[6:] == [f"{100 * row['val_accuracy']:.1f}", "20% of train, held out"]


def test_the_text_table_shows_the_same_numbers_best_head_first(page):
    results = results_of()
    lines = results_table(results).splitlines()
    cells = [re.split(r"  +", line) for line in lines]
    assert [row for row in cells if row[0] in ("simclr (default)",)] == [
        row for row in page(results).rows if row[0] == "simclr (default)"
    ]
    names = [row[0].split("[")[0] for row in cells if row[0].startswith(("ae", "sim", "rew"))]
    assert names == ["ae_embedding", "simclr (default)", "reweighting"] * 2
    assert max(map(len, lines)) <= 120


def test_hostile_names_are_text_and_stay_text(page):
    bad = '<script>alert("1")</script>&amp;$x$'
    results = results_of(heads=("simclr", bad), seeds=(0,))
    results["failed"] = [{"head": bad, "seed": 1, "error": bad}]
    results["config"][bad] = bad
    for row in results["runs"][1]["taps"]:
        row["selected_on"] = bad
        if row["tap"] == "input":
            row["tap"] = bad
    parsed = page(results)
    assert parsed.count("script") == 0
    assert "<script" not in parsed.html
    assert parsed.text.count(bad) > 10


def test_the_page_loads_nothing_and_runs_nothing(page):
    parsed = page(results_of())
    assert parsed.count("script") == parsed.count("link") == parsed.count("img") == 0
    links = [a[key] for _, a in parsed.tags for key in ("src", "href", "xlink:href") if key in a]
    assert links  # the markers of the figures
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"@import|url\((?!#)", parsed.html)


def test_ids_occur_once_and_every_reference_has_one(page):
    parsed = page(results_of())
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', parsed.html)) <= set(ids)


def test_figures_follow_the_colour_scheme_of_the_page(page):
    parsed = page(results_of())
    for svg in re.findall(r"<svg.*?</svg>", parsed.html, flags=re.DOTALL):
        assert "var(--c0)" in svg
        assert not re.search(r"(?:fill|stroke): #", svg)
    used = set(re.findall(r"var\((--\w+)\)", parsed.html))
    light, dark = re.findall(r":root\{(.*?)\}", parsed.html, flags=re.DOTALL)
    assert used <= set(re.findall(r"--\w+", light))
    assert set(re.findall(r"--\w+", light)) == set(re.findall(r"--\w+", dark))


def test_the_same_results_give_the_same_page_after_json(page):
    assert page(results_of()).html == page(json.loads(json.dumps(results_of()))).html


def test_failed_runs_stand_above_the_tables(page):
    results = results_of()
    results["runs"].pop()
    results["failed"] = [{"head": "reweighting[kappa=1.05]", "seed": 1, "error": "loss is nan"}]
    text = page(results).text
    assert text.index("reweighting[kappa=1.05], seed 1: loss is nan") < text.index("Head by head")
    assert "reweighting[kappa=1.05] (1 of 2 seeds)" in text


def test_a_run_where_every_head_failed_is_still_a_page(page):
    results = results_of()
    results |= {
        "runs": [],
        "summary": None,
        "failed": [{"head": "simclr", "seed": 0, "error": "x"}],
    }
    parsed = page(results)
    assert "No head finished" in parsed.text
    assert parsed.count("svg") == parsed.count("table") == 0
    assert "Head by head" not in parsed.text
    assert "simclr, seed 0: x" in parsed.text
    assert "pre_projection" in results_table(results)


def test_one_tap_one_probe_and_nothing_optional(page):
    results = results_of(heads=("simclr",), seeds=(0,), gain=None)
    run = results["runs"][0]
    run["taps"] = [r for r in run["taps"] if (r["tap"], r["probe"]) == ("pre_projection", "ridge")]
    for key in ("val_accuracy", "selected_on"):
        run["taps"][0].pop(key)
    for key in ("spectra", "losses", "train_seconds", "head_step_ms"):
        run.pop(key)
    results["summary"]["heads"][0].pop("gap")
    results["summary"]["probe"] = "ridge"
    parsed = page(results)
    assert parsed.count("svg") == 1
    assert "Accuracy of the ridge probe" in parsed.text
    assert len(parsed.rows[2]) == 2  # projection and the difference were not measured


def test_a_sweep_tells_the_best_and_the_default_apart_and_counts_the_rest(page):
    heads = [f"mlp[hidden_dim={width}]" for width in range(100, 123)]
    parsed = page(results_of(heads=(*heads, "simclr"), seeds=(0,)))
    assert "17 others, in the tables" in parsed.text
    assert list(figures.looks(heads, None)) == heads[:7]
    assert list(figures.looks([*heads, "simclr"], "simclr")) == [*heads[:6], "simclr"]


def test_inner_layers_lie_between_the_taps_all_heads_share():
    shared, inside = figures.depth([run_of(head, 0) for head in HEADS])
    assert list(shared) == [*BACKBONE, "pre_projection", "projection"]
    assert list(shared.values()) == sorted(shared.values())
    start, end = shared["pre_projection"], shared["projection"]
    assert all(start < x < end for x in inside.values())
    deep = [x for (head, _), x in inside.items() if head.startswith("ae_")]
    assert len(deep) == 5
    assert np.allclose(np.diff([start, *deep, end]), (end - start) / 6)


def test_other_schemas_are_refused(tmp_path):
    for write in (answer, results_table, lambda r: write_report(r, tmp_path / "report.html")):
        with pytest.raises(DataError, match=r"schema 2, from headplug 9\.0"):
            write({"schema": 2, "versions": {"headplug": "9.0"}})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def browser(tmp_path):
    """Opens a file in headless Chromium and returns what it prints."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip("no Chromium; on Debian: apt-get update && apt-get install -y chromium")

    def open_page(path: Path, *options: str) -> str:
        quiet = ("background-networking", "component-update", "sync", "gpu", "quic")
        done = subprocess.run(
            [
                found, "--headless", "--no-sandbox", "--no-first-run", "--hide-scrollbars",
                *(f"--disable-{name}" for name in quiet),
                f"--user-data-dir={tmp_path / 'profile'}", *options, path.as_uri(),
            ],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        return done.stdout

    return open_page


def test_a_real_browser_shows_the_answer_and_the_figures(browser, tmp_path):
    from PIL import Image

    path = write_report(results_of(), tmp_path / "report.html")
    dom = browser(path, "--dump-dom")
    seen = Page(write(tmp_path / "dom.html", dom))
    for sentence in answer(results_of()):
        assert sentence.replace("`", "") in seen.text
    assert seen.count("svg") == 4
    assert "pre_projection" in dom[dom.index("<svg") :]

    shot = tmp_path / "shot.png"
    browser(path, f"--screenshot={shot}", "--window-size=1200,2400")
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert pixels.shape == (2400, 1200, 3)
    for half in np.array_split(pixels, 4):  # neither the text nor the figures are missing
        assert half.std() > 5
    blue = np.abs(pixels.astype(int) - [0x00, 0x72, 0xB2]).sum(-1) < 12
    assert blue[1000:].sum() > 300  # the first head's lines, in its own colour


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "probes", [["knn"], ["ridge"], ["knn", "ridge"], ["knn", "linear", "ridge"]]
)
def test_the_table_has_a_column_for_each_probe_that_ran_and_no_other(probes):
    some = copy.deepcopy(results_of())
    for run in some["runs"]:
        run["taps"] = [row for row in run["taps"] if row["probe"] in probes]
    some["summary"]["probe"] = "linear" if "linear" in probes else probes[0]
    header = results_table(some).splitlines()[3].split()
    for probe in ("knn", "linear", "ridge"):
        assert header.count(probe) == 2 * (probe in probes)
