"""Results of several runs as one, so that their heads are compared on the same test images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headplug.compare.digest import check
from headplug.compare.summary import hits_of, summarize
from headplug.errors import DataError, OptionError, UnknownNameError


def read_results(run: Path) -> dict[str, Any]:
    """The results of a run.

    Args:
        run: Its folder, or the results.json in it.

    Raises:
        UnknownNameError: There is none.
        OptionError: It is not JSON.
        DataError: It has another schema.
    """
    path = run / "results.json" if run.is_dir() else run
    if not path.is_file():
        raise UnknownNameError(
            f"there is no {path}; give the folder that headplug compare or headplug probe wrote."
        )
    try:
        results: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise OptionError(f"{path} is not JSON: {error}.") from None
    check(results)
    return results


def merge(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One results mapping of several; heads of the same name are told apart by their run's.

    Args:
        parts: Results by what to call them.

    Raises:
        DataError: They are of different test images, or none of the runs was finished.
    """
    first = next(iter(parts.values()))
    if len(parts) == 1:
        return dict(first)
    runs: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for part in parts.values():
        for head in {run["head"] for run in part["runs"]}:
            seen[head] = seen.get(head, 0) + 1
    for name, part in parts.items():
        for run in part["runs"]:
            label = run["head"] if seen[run["head"]] == 1 else f"{run['head']} ({name})"
            runs.append({**run, "head": label, "config": part["config"]})
    if not runs:
        raise DataError("none of these has a finished run.")
    if not all("test_samples" in run.get("about", ()) for run in runs):
        raise DataError("some of these runs are of an older headplug; run them again to compare.")
    ways = {run["about"]["select_on"] for run in runs}
    if len(ways) > 1:
        raise DataError(
            "settings of some of these runs were chosen on the test samples, of others on held-out "
            "train; probe all in the same way to compare them."
        )
    tested = {json.dumps(run["about"]["test_samples"], sort_keys=True): run for run in runs}
    if len(tested) > 1:
        one, other = (run["head"] for run in list(tested.values())[:2])
        raise DataError(
            f"{one!r} and {other!r} were tested on different images, so their accuracies do not "
            "compare. Probe both on the same data (the same --data and --limit)."
        )
    probes = [p for p in _probes(runs[0]) if all(p in _probes(run) for run in runs)]
    if not probes:
        raise DataError("the runs have no probe in common; run the same probes on each.")
    default = first["summary"]["default_head"]
    deciding = first["summary"]["probe"]
    return {
        **first,
        "command": None,
        "config": {"runs": list(parts)},
        "seeds": sorted({run["seed"] for run in runs}),
        "runs": runs,
        "failed": [failure for part in parts.values() for failure in part["failed"]],
        "summary": summarize(
            runs,
            hits_of(runs),
            default_head=default if seen.get(default) == 1 else runs[0]["head"],
            probes=probes,
            probe=deciding if deciding in probes else None,
        ),
    }


def _probes(run: Mapping[str, Any]) -> Sequence[str]:
    return list(dict.fromkeys(row["probe"] for row in run["taps"]))
