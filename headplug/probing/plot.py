"""A LayerReport as a picture: values by depth, singular spectra, and a heat map a grid."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headplug.errors import OptionError, RunError
from headplug.probing.table import labelled, title

if TYPE_CHECKING:
    from headplug.probing.report import LayerReport

FORMATS = ("png", "svg", "pdf", "jpg", "webp")


def drawn(report: LayerReport) -> Any:
    """The picture as a matplotlib `Figure`; pyplot is left alone.

    Raises:
        RunError: matplotlib is missing.
    """
    grids = _grids(report)
    lines = 1 + math.ceil(len(grids) / 2)
    figure = library("matplotlib.figure").Figure(
        figsize=(11, 4.2 + 3.4 * (lines - 1)), layout="constrained"
    )
    axes = figure.subplots(lines, 2, squeeze=False)
    _by_depth(axes[0, 0], report)
    _spectra(axes[0, 1], report)
    places = list(axes[1:].flat)
    for place, (name, mine) in zip(places, grids.items(), strict=False):
        _heat(figure, place, name, mine)
    for place in places[len(grids) :]:
        place.set_axis_off()
    return figure


def format_of(path: Path) -> str:
    """The format that a file's ending names.

    Raises:
        OptionError: There is no such format.
    """
    kind = path.suffix.lstrip(".").lower()
    if kind not in FORMATS:
        raise OptionError(f"{path} must end in one of {', '.join(FORMATS)}.")
    return kind


def library(name: str) -> Any:
    """A package that only pictures and tables need.

    Raises:
        RunError: It is missing.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise RunError(f"this needs {package}, which is missing: pip install {package}.") from error


def _by_depth(place: Any, report: LayerReport) -> None:
    taps = [s["tap"] for s in report.spectra]
    several = len({row["task"] for row in report.rows}) > 1
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in report.rows:
        name = f"{row['task']}: {title(row)}" if several else title(row)
        lines.setdefault(name, []).append(row)
    place.set_prop_cycle(
        color=library("matplotlib").colormaps["tab20" if len(lines) > 10 else "tab10"].colors
    )
    for name, mine in lines.items():
        values = [100 * row[row["metric"]] for row in mine]
        below = [max(0.0, v - 100 * row["low"]) for v, row in zip(values, mine, strict=True)]
        above = [max(0.0, 100 * row["high"] - v) for v, row in zip(values, mine, strict=True)]
        where = [taps.index(row["tap"]) for row in mine]
        place.errorbar(where, values, (below, above), marker="o", capsize=3, label=name)
    place.set_xticks(range(len(taps)), taps, rotation=30, ha="right")
    metrics = dict.fromkeys(row["metric"] for row in report.rows)
    place.set_ylabel(f"{' / '.join(metrics)} in %, 95% interval")
    if any(name.endswith("*") for name in lines):
        place.set_title("* settings chosen on the test samples", fontsize="medium")
    place.legend(fontsize="x-small", ncols=2)


def _spectra(place: Any, report: LayerReport) -> None:
    for s in report.spectra:
        values = [v if v > 0 else math.nan for v in s["singular_values"]]
        name = f"{s['tap']}, rankme {s['rankme']:.1f}"
        place.plot(range(1, len(values) + 1), values, label=name)
    place.set_yscale("log")
    place.set_xlabel("index")
    place.set_ylabel("singular value / largest, centred")
    place.legend()


def _grids(report: LayerReport) -> dict[str, list[dict[str, Any]]]:
    """The grids of each probe with several settings, of the first task with all samples."""
    found: dict[str, list[dict[str, Any]]] = {}
    for grid in report.grids:
        first = grid["task"] == report.grids[0]["task"] and grid["shots"] is None
        if first and len(grid["settings"]) > 1:
            mark = "*" * (report.about.get("select_on") == "test")
            found.setdefault(f"{grid['probe']}{mark}", []).append(grid)
    return found


def _heat(figure: Any, place: Any, name: str, grids: list[dict[str, Any]]) -> None:
    values = [[math.nan if v is None else 100 * v for v in g["values"]] for g in grids]
    image = place.imshow(values, aspect="auto", interpolation="nearest")
    named, labels = labelled(grids[0]["settings"])
    step = math.ceil(len(labels) / 30)
    place.set_xlabel(named, fontsize="small")
    place.set_xticks(range(0, len(labels), step), labels[::step], rotation=90, fontsize="xx-small")
    place.set_yticks(range(len(grids)), [g["tap"] for g in grids], fontsize="small")
    chosen = [g["chosen"] for g in grids]
    place.plot(chosen, range(len(grids)), "o", mfc="none", mec="red", label="chosen")
    place.set_title(f"{name}: every setting, where they were chosen", fontsize="medium")
    figure.colorbar(image, ax=place, label="%")
