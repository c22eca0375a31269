"""`headplug probe`: every probe at every tap, of stored features or of a model by name.

runs/probe-NAME/
    features/        of a model: its feature stores, kept so that nothing is computed twice
    results.json     the numbers, in the form that `headplug compare` has, so that runs compare
    layers.png       the picture of `LayerReport.plot`
    report.html
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from headplug.compare.machine import machine, versions
from headplug.compare.report import write_report
from headplug.compare.summary import as_record, hits_of, summarize
from headplug.errors import DataError, UnknownNameError
from headplug.files import write_json
from headplug.probing import DEFINITIONS, LayerReport, probe_layers
from headplug.probing.layerwise import check_counts, rule_of
from headplug.probing.probes import PROBES, probes_of
from headplug.probing.table import title
from headplug.store import FeatureStore
from headplug.store.folder import INDEX

SPLITS = ("train", "test")


def is_stores(source: str) -> bool:
    """Whether it is a folder with the stores of both splits, as `headplug extract` makes it.

    Raises:
        UnknownNameError: It is a folder with one of them, or a path to nothing.
    """
    folder = Path(source)
    if not folder.exists() and os.sep in source and ":" not in source and not folder.suffix:
        raise UnknownNameError(f"there is no file or folder {source!r}; check the path.")
    there = [split for split in SPLITS if (folder / split / INDEX).is_file()]
    if len(there) == 1:
        (missing,) = set(SPLITS) - set(there)
        raise UnknownNameError(
            f"{source} has the features of {there[0]} and none of {missing}; run headplug extract "
            "--split all."
        )
    return bool(there)


def check_options(
    probes: Sequence[str] | None,
    protocol: str,
    select_on: str | None,
    held_out: float | None,
    shots: Sequence[int],
) -> dict[str, Any]:
    """The same, for `probe_layers`; wrong ones are found before any data are read.

    Raises:
        UnknownNameError, OptionError: There is no such thing.
    """
    rule = rule_of(protocol, select_on, held_out)
    if probes is not None:
        probes_of(probes, {**PROBES, **rule.probes})
    check_counts(shots=shots)
    return {
        "probes": probes,
        "protocol": protocol,
        "select_on": select_on,
        "held_out": held_out,
        "shots": shots,
    }


def evaluate(
    features: Path,
    out: Path,
    *,
    name: str,
    command: str = "",
    config: Mapping[str, Any] | None = None,
    taps: Sequence[str] = (),
    **options: Any,
) -> tuple[LayerReport, dict[str, Any]]:
    """Probes stored features and writes the folder of a run.

    Args:
        features: Folder with the stores `train` and `test`.
        out: The run's folder.
        name: What to call the model, or its head, in tables.
        command: What was typed, for the record.
        config: What else is to be recorded.
        taps: Which of those stored; none for all.
        options: As `probe_layers` takes them.

    Returns:
        The report, and the content of results.json.

    Raises:
        HeadplugError: As `FeatureStore.open` and `probe_layers` do; or the labels are no classes.
    """
    train, test = (FeatureStore.open(features / split) for split in SPLITS)
    for store, split in ((train, "train"), (test, "test")):
        if store.labels is not None and (store.labels.ndim > 1 or store.labels.is_floating_point()):
            raise DataError(
                f"the labels of {features / split} are no classes, which the command needs; in "
                "Python, probe_layers(train, test) takes them."
            )
    known, asked = (_Chosen(store, taps or store.points) for store in (train, test))
    report = probe_layers(known, asked, **options)
    run = {"head": name, "seed": report.about["seed"], **as_record(report)}
    runs = [_plain(run)]
    probes = list(dict.fromkeys(row["probe"] for row in runs[0]["taps"]))
    results = {
        "schema": 1,
        "command": command,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": {
            **(config or {}),
            **{k: report.about[k] for k in ("protocol", "select_on", "held_out", "seed", "draws")},
        },
        "versions": versions(),
        "machine": machine(),
        "seeds": [run["seed"]],
        "data": {
            "name": str((config or {}).get("data", features)),
            "train": len(train),
            "test": len(test),
        },
        "runs": runs,
        "failed": [],
        "summary": summarize(
            runs, hits_of(runs), default_head=name, probes=probes, probe=title(report.best)
        ),
        "definitions": DEFINITIONS,
    }
    write_json(out / "results.json", results)
    write_report(results, out / "report.html")
    report.plot(out / "layers.png")
    return report, results


@dataclass(frozen=True)
class _Chosen:
    """A store with some of its taps."""

    store: FeatureStore
    points: Sequence[str]

    @property
    def labels(self) -> Tensor | None:
        return self.store.labels

    def __getitem__(self, tap: str) -> Tensor:
        return self.store[tap]


def _plain(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run whose probes are called as in the table: with their shots, and a mark if on test."""
    names = [title(row) for row in run["taps"]]
    parts = {
        key: [{**one, "probe": name} for one, name in zip(run[key], names, strict=True)]
        for key in ("taps", "grids")
    }
    return {**run, **parts}
