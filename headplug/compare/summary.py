"""Which head and which layer win, and by how much, with intervals.

Heads and layers are chosen by accuracy on the held-out part of train; what is reported is accuracy
on test. Intervals come from a bootstrap that draws seeds and test images anew, the same for both
sides of a difference, since all heads see the same test images and share seeds; with one seed from
exact tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headplug.probing import LayerReport
from headplug.probing.hits import unpacked
from headplug.probing.intervals import bootstrap, paired_hits, wilson_interval

METHOD = "paired bootstrap over test images and seeds"
EXACT = "McNemar's exact test over test images"
Hits = Mapping[tuple[str, int], Mapping[tuple[str, str], np.ndarray]]


def summarize(
    runs: Sequence[Mapping[str, Any]],
    hits: Hits,
    *,
    default_head: str,
    probes: Sequence[str],
    probe: str | None = None,
) -> dict[str, Any]:
    """The summary of results.json.

    Args:
        runs: The finished runs.
        hits: For each (head, seed), by (tap, probe), which test images were classified rightly.
        default_head: Label of the head that gains are measured against, whether it ran or not.
        probes: The probes that ran.
        probe: The one that decides; left out, "linear" if it is among them, else the first.

    Returns:
        `probe`, `default_head`, `best`, `gain` (None where the default won or did not run) and one
        entry for each head, best first, with its best layer and the gap between pre_projection and
        projection.
    """
    probe = probe or headline(probes)
    labels = list(dict.fromkeys(r["head"] for r in runs))
    best_of = {label: _best_row(runs, label, probe) for label in labels}
    labels.sort(key=lambda label: -best_of[label]["val_accuracy"])
    if not best_of:
        return {
            "probe": probe,
            "default_head": default_head,
            "best": None,
            "gain": None,
            "heads": [],
        }

    def scores(label: str, tap: str) -> np.ndarray:
        """(seeds, test images) of one head's hits at a tap."""
        return np.stack([h[tap, probe] for (head, _), h in hits.items() if head == label])

    heads = []
    for label in labels:
        tap = best_of[label]["tap"]
        entry = {"head": label, "tap": tap, **_interval(scores(label, tap), "accuracy")}
        taps = {t for t, _ in next(h for (head, _), h in hits.items() if head == label)}
        if {"pre_projection", "projection"} <= taps:
            gap = _difference(scores(label, "pre_projection"), scores(label, "projection"))
            entry["gap"] = _interval(gap, "mean")
        heads.append(entry)
    winner = labels[0]
    best = {
        **{k: heads[0][k] for k in ("head", "tap", "accuracy", "low", "high")},
        "probe": probe,
        "selected_on": best_of[winner]["selected_on"],
    }
    gain = None
    if winner != default_head and default_head in best_of:
        ours, theirs = ((h, (best_of[h]["tap"], probe)) for h in (winner, default_head))
        difference, method = _paired(hits, ours, theirs)
        gain = {"over": default_head, **_interval(difference, "mean"), "method": method}
    return {
        "probe": probe,
        "default_head": default_head,
        "best": best,
        "gain": gain,
        "heads": heads,
    }


def summary_rows(hits: Hits, default_head: str) -> list[dict[str, Any]]:
    """One flat row for each head, tap and probe.

    Args:
        hits: As `summarize` takes them.
        default_head: Label of the head that gains are measured against.

    Returns:
        Mappings of head, tap, probe, accuracy, low, high, and the gain over the default head with
        the same probe at the same tap: gain, gain_low, gain_high. They are None for the default
        head itself and where it has no such tap.
    """
    points = {head: list(found) for (head, _), found in hits.items()}
    rows = []
    for head, point in ((head, point) for head, found in points.items() for point in found):
        values = np.stack([found[point] for (h, _), found in hits.items() if h == head])
        gain: dict[str, float | None] = dict.fromkeys(("mean", "low", "high"))
        if head != default_head and point in points.get(default_head, ()):
            gain |= _interval(_paired(hits, (head, point), (default_head, point))[0], "mean")
        rows.append(
            {
                **dict(zip(("head", "tap", "probe"), (head, *point), strict=True)),
                **_interval(values, "accuracy"),
                "gain": gain["mean"],
                "gain_low": gain["low"],
                "gain_high": gain["high"],
            }
        )
    return rows


def as_record(report: LayerReport) -> dict[str, Any]:
    """What results.json keeps of the probes of one run."""
    content = report.content
    kept = {key: content[key] for key in ("spectra", "grids", "profile", "hits", "about")}
    return {"taps": report.rows, **kept}


def hits_of(runs: Sequence[Mapping[str, Any]]) -> Hits:
    """Which test images each probe classified rightly, out of the runs' records."""
    return {
        (run["head"], run["seed"]): {
            (row["tap"], row["probe"]): unpacked(hits).double().mean(0).numpy()
            for row, hits in zip(run["taps"], run["hits"], strict=True)
        }
        for run in runs
    }


def headline(probes: Sequence[str]) -> str:
    """The probe that decides: "linear" if it ran, else the first."""
    return "linear" if "linear" in probes else probes[0]


def _best_row(runs: Sequence[Mapping[str, Any]], label: str, probe: str) -> dict[str, Any]:
    """The tap with the highest accuracy on held-out train over all seeds; the earlier on a tie."""
    found: dict[str, list[float]] = {}
    selected_on = ""
    for run in runs:
        for row in run["taps"]:
            if run["head"] == label and row["probe"] == probe:
                found.setdefault(row["tap"], []).append(row["val_accuracy"])
                selected_on = row["selected_on"]
    means = {tap: float(np.mean(values)) for tap, values in found.items()}
    tap = max(means, key=lambda t: means[t])
    return {"tap": tap, "val_accuracy": means[tap], "selected_on": selected_on}


def _paired(hits: Hits, *sides: tuple[str, tuple[str, str]]) -> tuple[np.ndarray, str]:
    """(seeds, test images) of what one head at a tap has over another, and how they are paired."""
    seeds = [{s for head, s in hits if head == own} for own, _ in sides]
    shared = sorted(seeds[0] & seeds[1])
    ours, theirs = (
        np.stack([hits[head, s][point] for s in shared or sorted(own)])
        for (head, point), own in zip(sides, seeds, strict=True)
    )
    if not shared:  # then pairs are of test images alone
        ours, theirs = ours.mean(0, keepdims=True), theirs.mean(0, keepdims=True)
    if len(shared) == 1:
        return _difference(ours, theirs), EXACT
    return _difference(ours, theirs), METHOD if shared else "paired bootstrap over test images"


def _difference(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    difference: np.ndarray = ours.astype(float) - theirs.astype(float)
    return difference


def _interval(values: np.ndarray, name: str) -> dict[str, float]:
    """Mean of (seeds, images) and its 95% interval, by bootstrap.

    With one seed: Wilson's of an accuracy, that of McNemar's exact test of a difference.
    """
    mean = float(values.mean())
    if len(values) > 1 or not set(np.unique(values)) <= {-1, 0, 1}:
        low, high = bootstrap(values)
    elif name == "accuracy":
        low, high = wilson_interval(mean, values.shape[1])
    else:
        exact = paired_hits(values, np.zeros_like(values))
        low, high = exact.low, exact.high
    return {name: mean, "low": low, "high": high}
