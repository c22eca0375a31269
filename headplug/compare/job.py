"""Doing a plan: every run in a folder of its own, then the results and the report.

runs/digits-resnet18-simclr/
    config.json                 what was asked for
    autoencoders/*.safetensors  pretrained once for each width
    simclr-seed0/               one run, see run.py
    results.json  report.html   rewritten after every run
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from headplug.compare.data import ImageData, load_data
from headplug.compare.machine import head_step_ms, machine, versions
from headplug.compare.plan import Plan
from headplug.compare.processes import is_first, wait
from headplug.compare.recipes import recipe
from headplug.compare.report import write_report
from headplug.compare.run import Runner
from headplug.compare.saved import RECORD, trained_head
from headplug.compare.summary import hits_of, summarize
from headplug.errors import HeadplugError, RunError
from headplug.files import write_json
from headplug.probing import DEFINITIONS

Say = Callable[[str], None]


def compare(plan: Plan, say: Say = print, command: str = "") -> dict[str, Any]:
    """Trains, reads and probes every head of a plan, and writes results.json and report.html.

    Runs that are finished are not repeated and a run that was interrupted goes on after its last
    whole epoch. A run that fails is recorded, and the others go on.

    Args:
        plan: What to do.
        say: Told a line when a run is done.
        command: What was typed, for the record.

    Returns:
        The content of results.json; on processes other than the first, an empty mapping.

    Raises:
        RunError: The folder holds another comparison or cannot be written, or every run failed.
        HeadplugError: Data or backbone cannot be used.
    """
    first = is_first()
    data = load_data(plan.data, image_size=plan.image_size, limit=plan.limit, show_progress=first)
    failed: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    with torch.random.fork_rng():
        runner = Runner(plan, data)
        _claim(plan, data)
        for choice, seed in plan.runs:
            folder = plan.folder_of(choice, seed)
            if (folder / RECORD).is_file():
                continue
            try:
                line = f"done: {choice.label}, seed {seed}: {runner(choice, seed, folder)}"
            except HeadplugError as error:
                failed.append({"head": choice.label, "seed": seed, "error": str(error)})
                line = f"failed: {choice.label}, seed {seed}: {error}"
            wait()
            if first:
                say(line)
                results = _write_results(plan, data, failed, command)
        if first and not results:  # all were finished before
            results = _write_results(plan, data, failed, command)
    if first and not results["runs"]:
        raise RunError(f"every run failed; the first: {failed[0]['error']}")
    return results


def _claim(plan: Plan, data: ImageData) -> None:
    """Refuses a folder that holds a comparison with other settings."""
    path = plan.folder / "config.json"
    asked = {"fingerprint": plan.fingerprint, "data": data.fingerprint}
    if path.is_file():
        there = json.loads(path.read_text("utf-8"))
        same = {k: there.get(k) for k in asked} == asked
        if not same and not any(plan.folder.glob(f"*/{RECORD}")):
            _forget(plan.folder)
        elif not same:
            old, new = there["config"], plan.shared
            differ = [
                f"{k} {old.get(k)!r} there, {v!r} now" for k, v in new.items() if old.get(k) != v
            ]
            raise RunError(
                f"{plan.folder} holds another comparison ({', '.join(differ) or 'other data'}). "
                "Name another folder with --out, or delete this one."
            )
    if is_first():
        write_json(path, {**asked, "config": plan.config})


def _forget(folder: Path) -> None:
    """Removes what an attempt with other settings left, of which nothing was finished."""
    if is_first():
        left = [*folder.glob("*/checkpoint.ckpt"), *folder.glob("autoencoders/*")]
        for path in left:
            path.unlink()


def _write_results(
    plan: Plan, data: ImageData, failed: list[dict[str, Any]], command: str
) -> dict[str, Any]:
    """Gathers all finished runs in the folder and writes results.json and report.html."""
    planned = [plan.folder_of(c, s) for c, s in plan.runs]
    earlier = sorted(p.parent for p in plan.folder.glob(f"*/{RECORD}"))
    folders: dict[tuple[str, int], Path] = {}
    runs: list[dict[str, Any]] = []
    for folder in dict.fromkeys([*planned, *earlier]):
        if (folder / RECORD).is_file():
            run = json.loads((folder / RECORD).read_text("utf-8"))
            folders[run["head"], run["seed"]] = folder
            runs.append(run)
    times = head_step_ms(
        {label: trained_head(f) for (label, _), f in folders.items()}, plan.batch_size
    )
    default = recipe(plan.recipe).default_head
    labels = [run["head"] for run in runs]
    results = {
        "schema": 1,
        "command": command,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": {**plan.config, "default_head": default},
        "versions": versions(),
        "machine": machine(),
        "seeds": sorted({run["seed"] for run in runs}),
        "data": {
            "name": data.name,
            "train": len(data.train),
            "test": len(data.test),
            "classes": len(data.classes),
            "shape": list(data.train.shape),
            "fingerprint": data.fingerprint,
        },
        "runs": [{**run, "head_step_ms": times[run["head"]]} for run in runs],
        "failed": failed,
        "summary": summarize(
            runs,
            hits_of(runs),
            default_head=next((n for n in labels if n.partition("[")[0] == default), default),
            probes=list(plan.probes),
        ),
        "definitions": DEFINITIONS,
    }
    if runs:
        write_json(plan.folder / "results.json", results)
        write_report(results, plan.folder / "report.html")
    return results
