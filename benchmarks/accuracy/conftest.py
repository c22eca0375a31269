"""What the benchmarks of accuracy share: plans that are run, their rows, a table at the end.

All that they measure stands in `extra_info` of pytest-benchmark's JSON: settings as plain values,
and `rows`, one flat mapping for each head, tap and probe, with shares in [0, 1].
"""

from statistics import fmean

import pytest
import torch

from headplug.compare import Plan, compare
from headplug.compare.summary import hits_of, summary_rows
from headplug.errors import HeadplugError

LAPTOP = {"backbone": "test_resnet", "epochs": 5, "batch_size": 128, "ae_epochs": 20}
# A small stem is for digits: on 32 x 32 pixels it takes ten times as long.
DIGITS = {**LAPTOP, "stem": "auto", "limit": 500}
PHOTOS = {**LAPTOP, "stem": "default", "limit": 4000, "epochs": 10}
GPU = {"backbone": "resnet18", "epochs": 100, "batch_size": 512, "precision": "bf16-mixed"}
KEPT = (
    "backbone",
    "pretrained",
    "stem",
    "recipe",
    "epochs",
    "batch_size",
    "precision",
    "ae_epochs",
)
COLUMNS = (("accuracy", "low", "high", ".1f"), ("gain", "gain_low", "gain_high", "+.1f"))
SHOWN = pytest.StashKey()


def pytest_configure(config):
    config.stash[SHOWN] = []


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[SHOWN]:
        terminalreporter.section("accuracy and gain over the default head, % [95% interval]")
        for line in config.stash[SHOWN]:
            terminalreporter.write_line(line)


@pytest.fixture
def sized(pytestconfig, full):
    """Settings of a plan of the asked size."""
    data, seeds = (pytestconfig.getoption(name) for name in ("data", "seeds"))
    size = GPU if full else DIGITS if data == "digits" else PHOTOS
    return {"data": data, "seeds": list(range(seeds)), **size}


@pytest.fixture
def compared(benchmark, device, tmp_path):
    """Times `compare` of all plans, one after the other, and gives the results of each."""

    def run(*every):
        if device.type == "cpu" and torch.cuda.is_available():
            pytest.skip("compare takes a GPU that is there; hide it with CUDA_VISIBLE_DEVICES=''")
        found = benchmark.pedantic(lambda: told(every, tmp_path), rounds=1)
        if isinstance(found, str):
            pytest.fail(found, pytrace=False)
        failed = [one for results in found for one in results["failed"]]
        assert not failed
        config, data = found[-1]["config"], found[-1]["data"]
        benchmark.extra_info.update({key: config[key] for key in KEPT})
        benchmark.extra_info.update(
            data=data["name"],
            images=data["train"],
            test_images=data["test"],
            classes=data["classes"],
            seeds=config["seeds"],
            lr=found[-1]["lr"],
            protocol=config["protocol"],
        )
        return found

    return run


def told(every, folder):
    """The results of all plans, or what is wrong with one of them."""
    try:
        plans = [Plan(**{"out": str(folder), **options}) for options in every]
        return [{**compare(p, say=lambda line: None), "lr": p.rate} for p in plans]
    except HeadplugError as error:
        return str(error)


@pytest.fixture
def recorded(benchmark, request):
    """Puts what came of runs at some taps, or at all, into `extra_info`; makes the last table."""

    def rows_of(runs, default_head, taps=()):
        speeds = {}
        for run in runs:
            speeds.setdefault(run["head"], []).append(run["train_images_per_s"])
        if taps:
            runs = [at(run, taps) for run in runs]
        rows = [
            {**row, "train_images_per_s": fmean(speeds[row["head"]])}
            for row in summary_rows(hits_of(runs), default_head)
        ]
        benchmark.extra_info.update(default_head=default_head, rows=rows)
        lines = request.config.stash[SHOWN]
        lines.append(f"{request.node.name}:")
        for row in rows:
            if row["tap"] in ("pre_projection", "projection"):
                texts = [written(row, *column) for column in COLUMNS]
                where = f"{row['head']}, {row['probe']} at {row['tap']}"
                lines.append(f"{'  '.join(texts)}  {where}")
        return rows

    return rows_of


def at(run, taps):
    """A run as if only these taps had been probed."""
    kept = [i for i, row in enumerate(run["taps"]) if row["tap"] in taps]
    return {**run, **{key: [run[key][i] for i in kept] for key in ("taps", "hits")}}


def written(row, name, low, high, form):
    """A share with its interval in per cent, or as much space."""
    if row[name] is None:
        return " " * 21
    value, low, high = (f"{100 * row[key]:{form}}" for key in (name, low, high))
    return f"{value:>5} [{low:>5}, {high:>5}]".ljust(21)
