"""What a comparison says, in sentences and in one table, for the terminal and the page alike.

No sentence says more than its interval allows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from headplug.compare.figures import mean
from headplug.errors import DataError
from headplug.probing.table import ON_TEST

Results = Mapping[str, Any]
Table = tuple[Sequence[tuple[str, str]], Sequence[Sequence[str]]]  # (group, label) of columns; rows
KEYS = ("accuracy", "low", "high")


def answer(results: Results) -> list[str]:
    """The outcome in plain sentences, names in backticks; the first one says what to use.

    Args:
        results: The mapping of results.json, schema 1.

    Raises:
        DataError: The results have another schema.
    """
    check(results)
    summary = results.get("summary") or {}
    best, gain, default = (summary.get(key) for key in ("best", "gain", "default_head"))
    if not best:
        return ["No head finished, so there is nothing to compare."]
    head = best["head"]
    score = (
        f"{best['accuracy']:.1%} accuracy (95% interval {best['low']:.1%} to {best['high']:.1%})"
    )
    where = f"`{best['tap']}`: {score} with a {best['probe']} probe"
    lead = f"Use the head `{head}` and read features at {where}."
    if head == default and len(ranked(results)) == 1:
        lead, verdict = f"Read features at {where}.", ""
    elif head == default:
        lead = f"Keep the default head `{head}` and read features at {where}."
        on_test = best.get("selected_on") == ON_TEST
        place = "On the test images" if on_test else "On held-out train"
        verdict = f"{place} it came first of {len(ranked(results))} heads."
    elif gain is None:
        verdict = f"The default head `{default}` has no finished run: the gain over it is unknown."
    else:
        against = f"{_points(gain)} against the default head `{gain['over']}`"
        if gain["low"] > 0:
            verdict = f"That is {against}: the interval excludes 0, a clear gain."
        elif gain["high"] < 0:
            lead = (
                f"Keep the default head `{gain['over']}`. Selected was `{head}`, read at {where}."
            )
            verdict = f"That is {against}: the interval excludes 0, a clear loss."
        else:
            lead = f"No clear difference. The head that came first is `{head}`, read at {where}."
            verdict = f"That is {against}: the interval includes 0, so no gain is shown."
    gap = _of_head(results, head).get("gap")
    layers = []
    if gap:
        zero = "includes" if gap["low"] <= 0 <= gap["high"] else "excludes"
        layers = [
            f"With this head, `pre_projection` scores {_points(gap)} against `projection`: the "
            f"interval {zero} 0."
        ]
    if best.get("selected_on") == ON_TEST:
        layers.append("Settings were chosen on the test images: accuracies on new ones are lower.")
    rows = (row for run in results["runs"] for row in run["taps"])
    tested = next((row["n_test"] for row in rows if "n_test" in row), results["data"]["test"])
    basis = f"Measured on {tested:,} test images"
    if best.get("selected_on"):
        basis += f"; head and layer selected on: {best['selected_on']}"
    most = _most_seeds(results)
    trust = f"Means over {most} seeds."
    if most == 1:
        trust = (
            "One seed: the intervals cover the choice of test images, not training luck. Repeat "
            "with more seeds before you rely on a small difference."
        )
    return [lead, *filter(None, [verdict]), *layers, f"{basis}.", trust]


def results_table(results: Results) -> str:
    """The comparison as plain text for a terminal: one row per head, best first.

    Args:
        results: The mapping of results.json, schema 1.

    Returns:
        Two blocks of at most about 100 columns: accuracy before and after the head; the best layer
        and the costs.

    Raises:
        DataError: The results have another schema.
    """
    tables = "\n\n".join(_text(*table) for table in head_tables(results) if len(table[0]) > 1)
    return f"Accuracies in per cent, mean over seeds, 95% interval in brackets.\n\n{tables}"


def head_tables(results: Results) -> tuple[Table, Table]:
    """Accuracy before and after each head; its best layer and its costs.

    Raises:
        DataError: The results have another schema.
    """
    check(results)
    summary = results.get("summary") or {}
    probe = summary.get("probe", "linear")
    ran = dict.fromkeys(row["probe"] for run in results["runs"] for row in run["taps"])
    others = [name for name in ran if name != probe]
    costs = {
        ("training", "images/s"): ("train_images_per_s", 0),
        ("head parameters", "trained"): ("head_params_trainable", 0),
        ("head parameters", "frozen"): ("head_params_frozen", 0),
        ("head step", "ms"): ("head_step_ms", 2),
    }
    first = [(tap, name) for tap in ("pre_projection", "projection") for name in (probe, *others)]
    accuracies, layers = [], []
    for head in ranked(results):
        runs = [run for run in results["runs"] if run["head"] == head]
        best = _of_head(results, head)

        def at(tap: str | None, name: str, runs: Any = runs) -> str:
            found = [
                r for run in runs for r in run["taps"] if (r["tap"], r["probe"]) == (tap, name)
            ]
            keys = KEYS if name == probe else KEYS[:1]
            return score({key: mean(row.get(key) for row in found) for key in keys})

        notes = ["default"] if head == summary.get("default_head") else []
        if len(runs) < _most_seeds(results):
            notes.append(f"{len(runs)} of {_most_seeds(results)} seeds")
        name = f"{head} ({', '.join(notes)})" if notes else head
        gap = best.get("gap") or {}
        difference = score({**gap, "accuracy": gap.get("mean")}, form="+.1f")
        accuracies.append([name, *(at(*point) for point in first), difference])
        spent = [number(mean(run.get(key) for run in runs), n) for key, n in costs.values()]
        tap = best.get("tap")
        layers.append([name, tap or "-", score(best), *(at(tap, o) for o in others), *spent])
    second = [("best layer", label) for label in ("tap", probe, *others)]
    return (
        _filled([("", "head"), *first, ("before - after", "points")], accuracies),
        _filled([("", "head"), *second, *costs], layers),
    )


def _filled(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> Table:
    """A table without the columns that nothing stands in."""
    if not rows:
        return columns, rows
    kept = [i for i, cells in enumerate(zip(*rows, strict=True)) if set(cells) != {"-"}]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def ranked(results: Results) -> list[str]:
    """The heads with a finished run, in the summary's order: best on held-out train first."""
    heads = dict.fromkeys(
        entry["head"] for entry in (results.get("summary") or {}).get("heads", [])
    )
    return list(heads | dict.fromkeys(run["head"] for run in results["runs"]))


def score(row: Mapping[str, Any], form: str = ".1f") -> str:
    """A share in per cent, with its 95% interval where there is one.

    >>> score({"accuracy": 0.95, "low": 0.93, "high": 0.97}), score({"accuracy": 0.5}), score({})
    ('95.0 [93.0, 97.0]', '50.0', '-')
    """
    value, low, high = (row.get(key) for key in KEYS)
    if value is None:
        return "-"
    interval = "" if low is None or high is None else f" [{100 * low:{form}}, {100 * high:{form}}]"
    return f"{100 * value:{form}}{interval}"


def number(value: float | None, decimals: int) -> str:
    """A number with thousands separators, or a dash.

    >>> number(65536, 0), number(None, 2)
    ('65,536', '-')
    """
    return "-" if value is None else f"{value:,.{decimals}f}"


def check(results: Results) -> None:
    """Refuses results that this version cannot read.

    Raises:
        DataError: The results have another schema.
    """
    if results.get("schema") != 1:
        version = (results.get("versions") or {}).get("headplug", "unknown")
        raise DataError(
            f"a report needs results of schema 1; these say schema {results.get('schema')!r}, from "
            f"headplug {version}. Install that version, or run `headplug compare` again."
        )


def _most_seeds(results: Results) -> int:
    """How many runs the head with the most of them has."""
    return max(Counter(run["head"] for run in results["runs"]).values(), default=0)


def _of_head(results: Results, head: str) -> Mapping[str, Any]:
    rows = (results.get("summary") or {}).get("heads") or ()
    return next((row for row in rows if row["head"] == head), {})


def _points(gap: Mapping[str, float]) -> str:
    mid, low, high = (100 * gap[key] for key in ("mean", "low", "high"))
    return f"{mid:+.1f} points (95% interval {low:+.1f} to {high:+.1f})"


def _text(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces, with a line of group names above the labels."""
    cells = [[label for _, label in columns], *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    groups = ""
    for group, members in groupby(range(len(columns)), key=lambda i: columns[i][0]):
        own = list(members)
        room = sum(widths[i] for i in own) + 2 * (len(own) - 1)
        widths[own[-1]] += max(0, len(group) - room)
        groups += group.ljust(max(room, len(group)) + 2)
    lines = ["  ".join(map(str.ljust, row, widths)) for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in [groups, *lines])
