"""A LayerReport as plain text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headplug.diagnostics import DEFINITIONS as DIAGNOSTICS
from headplug.probing.metrics import DEFINITIONS

if TYPE_CHECKING:
    from headplug.probing.report import LayerReport

RANKS = {"rankme": "rankme", "effective_rank": "effective rank"}
UNITS = {"accuracy": "Accuracy in %", "mAP": "Mean average precision in %", "r2": "R² in %"}
BEFORE, AFTER = "pre_projection", "projection"
ON_TEST = "the test samples themselves"


def table(report: LayerReport) -> str:
    """Values with intervals by tap and probe, the ranks, and how all of it came about."""
    text = []
    gaps = report.gaps
    tasks = list(dict.fromkeys(row["task"] for row in report.rows))
    for task in tasks:
        if len(tasks) > 1:
            text.append(f"{task}:")
        rows = [row for row in report.rows if row["task"] == task]
        own = [gap for gap in gaps if gap["task"] == task]
        for few in (False, True):
            mine = [row for row in rows if (row["shots"] is not None) == few]
            if mine:
                text += [*aligned(_cells(mine, own, () if few else report.spectra)), ""]
        grids = [grid for grid in report.grids if grid["task"] == task and grid["shots"] is None]
        best, draws = report.best_by_task[task], report.about.get("draws")
        text += _below(rows, best, own, grids, draws)
    if report.about:
        text.append(
            f"Protocol: {report.about['protocol']} ({report.about['source']}); report.setting is "
            "all of it."
        )
    if report.profile.get("slope") is not None:
        text.append(
            f"Feature weights after the head go with their weight before it to the power of "
            f"{report.profile['slope']:.2f} (R² {report.profile['slope_r2']:.2f}, "
            f"{report.profile['fitted']} features; 1 leaves them alone, 2 squares them: arXiv "
            "2403.11391)."
        )
    used = dict.fromkeys(row["metric"] for row in report.rows)
    text += [f"{metric}: {DEFINITIONS[metric]}" for metric in used if metric != "accuracy"]
    return "\n".join([*text, *(DIAGNOSTICS[rank] for rank in RANKS)])


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns aligned with spaces, the first to the left.

    >>> aligned([["a", "b"], ["long", "1"]])
    ['a     b', 'long  1']
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]


def percent(row: Mapping[str, Any]) -> str:
    """A row's value with its interval, in per cent."""
    value = row[row["metric"]]
    return f"{100 * value:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def title(row: Mapping[str, Any]) -> str:
    """A row's probe, with the number of shots and a mark if it was chosen on test."""
    shots = "" if row["shots"] is None else f" {row['shots']}-shot"
    return f"{row['probe']}{shots}{'*' * (row['selected_on'] == ON_TEST)}"


def labelled(settings: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """What differs between settings, and how each is short to be called by it.

    >>> labelled([{"lr": 0.1, "momentum": 0.9}, {"lr": 1.0, "momentum": 0.9}])
    ('lr', ['0.1', '1.0'])
    """
    varying = [k for k in settings[0] if len({str(s[k]) for s in settings}) > 1]
    labels = [" ".join(str(s[k]) for k in varying if s[k] is not None) for s in settings]
    return ", ".join(varying), labels


def _cells(
    rows: Sequence[Mapping[str, Any]],
    gaps: Sequence[Mapping[str, Any]],
    spectra: Sequence[Mapping[str, Any]],
) -> list[list[str]]:
    """A line a tap, with its ranks where there are any, and what the head costs."""
    titles = {title(row): (row["probe"], row["shots"]) for row in rows}
    ranks = {s["tap"]: [f"{s[rank]:.1f}" for rank in RANKS] for s in spectra}
    dims = {s["tap"]: [str(s["dim"])] for s in spectra}
    cells = {(row["tap"], title(row)): percent(row) for row in rows}
    lines = [["tap", *["dim"][: len(dims)], *titles, *list(RANKS.values())[: 2 * len(ranks)]]]
    for tap in dict.fromkeys(row["tap"] for row in rows):
        found = [cells[tap, name] for name in titles]
        lines.append([tap, *dims.get(tap, ()), *found, *ranks.get(tap, ())])
    of = {(gap["probe"], gap["shots"]): gap for gap in gaps}
    if gaps:
        mine = [of[key] for key in titles.values()]
        empty = [""] * (len(lines[0]) - len(mine) - 1)
        before, after = empty[:1], empty[1:]
        lines.append([f"{BEFORE} - {AFTER}", *before, *map(_points, mine), *after])
        lines.append(["p, Holm", *before, *(f"{gap['p']:.2g}" for gap in mine), *after])
    return lines


def _points(gap: Mapping[str, Any]) -> str:
    low, value, high = (100 * gap[k] for k in ("low", "value", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _below(
    rows: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any],
    gaps: Sequence[Mapping[str, Any]],
    grids: Sequence[Mapping[str, Any]],
    draws: int | None,
) -> list[str]:
    """What the numbers of a task are, and which is best."""
    bases = "; ".join(dict.fromkeys(row["selected_on"] for row in rows))
    tests = " and ".join(dict.fromkeys(gap["test"] for gap in gaps))
    lines = [f"{UNITS[best['metric']]} on {best['n_test']} test samples, 95% interval over them."]
    if draws:
        lines.append(f"Shots: mean over {draws} draws of training samples, interval over both.")
    if any(row["selected_on"] == ON_TEST for row in rows):
        lines.append("* Chosen on the test samples: higher than on new ones.")
    if tests:
        lines.append(
            f"Differences: the same test samples on both sides; p by {tests}, for all {len(gaps)} "
            "together (Holm)."
        )
    edges = [grid for grid in grids if _at_edge(grid)]
    if edges:
        named = ", ".join(f"{grid['probe']} at {grid['tap']}" for grid in edges[:6])
        more = f" and {len(edges) - 6} more" if len(edges) > 6 else ""
        lines.append(f"Chosen at the end of its grid, try a wider one: {named}{more}.")
    lines += [
        f"Settings, and the best tap, chosen on: {bases}.",
        f"Best: {best['tap']}, {title(best)} {_spell(best['setting'])}: {percent(best)}.",
    ]
    return lines


def _at_edge(grid: Mapping[str, Any]) -> bool:
    """Whether the chosen learning rate or penalty is the last of several, and others did worse."""
    chosen, values = grid["settings"][grid["chosen"]], grid["values"]
    for key in ("lr", "penalty"):
        tried = sorted({s[key] for s in grid["settings"] if key in s})
        if len(tried) > 2 and chosen[key] in (tried[0], tried[-1]):
            inner = tried[1] if chosen[key] == tried[0] else tried[-2]
            near = [v for v, s in zip(values, grid["settings"], strict=True) if s[key] == inner]
            best = max((v for v in near if v is not None), default=-math.inf)
            return bool(values[grid["chosen"]] > best)
    return False


def _spell(setting: Mapping[str, Any]) -> str:
    return "(" + ", ".join(f"{k}={v}" for k, v in setting.items() if v is not None) + ")"
