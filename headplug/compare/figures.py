"""The report's figures as inline SVG: no file, no script, no font of their own.

Colours leave matplotlib as CSS variables, so one drawing serves a light and a dark page. At most
`len(COLOURS)` heads are told apart, by colour and marker, because more cannot be; the others of a
large sweep are thin grey lines, and the page's tables name them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from headplug.probing.table import labelled

# Okabe and Ito's colour-blind safe palette without its yellow and black: (on light, on dark)
COLOURS = (
    ("#0072b2", "#56a9e0"),
    ("#d55e00", "#f58a3c"),
    ("#009e73", "#2cc79b"),
    ("#cc79a7", "#e39cc3"),
    ("#e69f00", "#f2bb3f"),
    ("#56b4e9", "#9ad6fa"),
    ("#6a4fb3", "#b3a0f0"),
)
MARKERS = ("o", "s", "^", "D", "v", "<", ">")
GLYPHS = "●■▲◆▼◄►"  # the same markers in the page's legend
_GREY, _INK, _RULE = "#8a8a8b", "#111112", "#d8d8d9"  # stand-ins, found again in the SVG
_VARIABLES = {_GREY: "--grey", _INK: "--ink", _RULE: "--rule"} | {
    light: f"--c{i}" for i, (light, _) in enumerate(COLOURS)
}

Runs = Sequence[Mapping[str, Any]]


class Look(NamedTuple):
    """How one head is drawn."""

    colour: str
    marker: str
    dodge: float


def looks(ranked: Sequence[str], default: str | None) -> dict[str, Look]:
    """A look for each head that is told apart: the first of `ranked`, and the default head.

    >>> list(looks(["byol", "simclr"], "simclr"))
    ['byol', 'simclr']
    """
    named = list(ranked[: len(COLOURS)])
    if default in ranked and default not in named:
        named[-1] = str(default)
    middle = (len(named) - 1) / 2
    return {
        head: Look(COLOURS[i][0], MARKERS[i], 0.05 * (i - middle)) for i, head in enumerate(named)
    }


def depth(runs: Runs) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """Where the taps stand on the depth axis.

    Taps inside a head, those between `pre_projection` and `projection`, differ between heads; they
    share that stretch of the axis by their relative depth.

    Args:
        runs: Runs of results.json, their taps in depth order.

    Returns:
        The position of each shared tap, and of each `(head, tap)` inside a head.

    >>> row = lambda tap: {"tap": tap}
    >>> taps = [row("pre_projection"), row("projection_head.layers.0"), row("projection")]
    >>> depth([{"head": "a", "taps": taps}])
    ({'pre_projection': 0.0, 'projection': 1.5}, {('a', 'projection_head.layers.0'): 0.75})
    """
    shared: dict[str, float] = {}
    inner: dict[str, dict[str, None]] = {}
    for run in runs:
        order = list(dict.fromkeys(row["tap"] for row in run["taps"]))
        inside: list[str] = []
        if "pre_projection" in order and "projection" in order:
            inside = order[order.index("pre_projection") + 1 : order.index("projection")]
        inner.setdefault(run["head"], {}).update(dict.fromkeys(inside))
        shared.update(dict.fromkeys(tap for tap in order if tap not in inside))
    stretch = 1 + min(max(map(len, inner.values()), default=0), 4) / 2
    x = 0.0
    for tap in shared:
        shared[tap] = x
        x += stretch if tap == "pre_projection" else 1
    start = shared.get("pre_projection", 0.0)
    return shared, {
        (head, tap): start + stretch * (i + 1) / (len(taps) + 1)
        for head, taps in inner.items()
        for i, tap in enumerate(taps)
    }


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are there, or None.

    >>> mean([1.0, None, 3.0])
    2.0
    """
    finite = [value for value in values if value is not None and np.isfinite(value)]
    return float(np.mean(finite)) if finite else None


def drawn(runs: Runs, look: Mapping[str, Look]) -> Iterator[tuple[str, str]]:
    """The caption and the SVG of every figure that the runs have numbers for."""
    present = {row["probe"] for run in runs for row in run["taps"]}
    for probe in [probe for probe in ("linear", "knn") if probe in present] or sorted(present):
        text = (
            f"Accuracy of the {probe} probe at every layer, from the input to the projection. Mean "
            f"over seeds; the bars are the interval over test images."
        )
        yield text, accuracy_by_depth(runs, probe, look)
    if any(s.get("singular_values") for run in runs for s in run.get("spectra") or ()):
        text = (
            "Feature spectrum: solid at {}, dashed at {}. A curve that falls early means features "
            "in few directions."
        )
        yield text.format(*_ends(runs)), spectrum(runs, look)
    for probe, grids in _grids(runs).items():
        head = runs[0]["head"] if not look else next(iter(look))
        mine = [grid for grid, of_head in grids if of_head == head]
        if mine:
            text = (
                f"Every setting of the {probe} probe at every layer, for {head}, where they are "
                "chosen; the mark is the choice."
            )
            yield text, heat(mine, probe)
    if any(run.get("losses") for run in runs):
        text = "Training loss, one line per run. Losses of different heads do not compare."
        yield text, losses(runs, look)


def accuracy_by_depth(runs: Runs, probe: str, look: Mapping[str, Look]) -> str:
    """Accuracy in per cent of one probe at every tap, the mean over seeds; one line per head."""
    shared, inside = depth(runs)

    def draw(ax: Any) -> None:
        for head, of_head in _by_head(runs, look):
            rows: dict[float, list[Mapping[str, Any]]] = {}
            for row in (row for run in of_head for row in run["taps"] if row["probe"] == probe):
                place = (head, row["tap"])
                x = inside[place] if place in inside else shared[row["tap"]]
                rows.setdefault(x, []).append(row)
            xs = sorted(rows)
            at, low, high = (
                100 * _array(mean(row.get(key) for row in rows[x]) for x in xs)
                for key in ("accuracy", "low", "high")
            )
            dodged = np.array(xs) + (look[head].dodge if head in look else 0.0)
            ax.plot(dodged, at, **_line(head, look))
            if head in look:
                ax.vlines(dodged, low, high, color=look[head].colour, linewidth=1.1, alpha=0.6)
        if inside:
            span = shared["pre_projection"], shared["projection"]
            ax.axvspan(*span, color=_RULE, alpha=0.35, linewidth=0)
            ax.text(
                sum(span) / 2, 1.02, "inside the head", transform=ax.get_xaxis_transform(),
                ha="center", fontsize=8.5, color=_INK,
            )  # fmt: skip
        names = [tap.removeprefix("backbone.") for tap in shared]
        ax.set_xticks(list(shared.values()), names, rotation=35, ha="right", rotation_mode="anchor")
        ax.set_ylabel("accuracy, %")

    return _svg(draw, f"Accuracy of the {probe} probe by depth")


def spectrum(runs: Runs, look: Mapping[str, Look]) -> str:
    """Singular values over the largest one at two taps, one solid and one dashed."""

    def draw(ax: Any) -> None:
        for head, of_head in _by_head(runs, look):
            for tap, dash in zip(_ends(runs), ("-", "--"), strict=True):
                curves = [
                    _array(s["singular_values"]) / max(s["singular_values"])
                    for run in of_head
                    for s in run.get("spectra") or ()
                    if s["tap"] == tap and s.get("singular_values") and max(s["singular_values"])
                ]
                if curves:
                    length = min(map(len, curves))
                    curve = np.mean([c[:length] for c in curves], axis=0)
                    curve[curve < 1e-7] = np.nan  # rounding error, not features
                    line = _line(head, look) | {"linestyle": dash, "markevery": max(1, length // 6)}
                    ax.plot(np.arange(1, length + 1), curve, **line)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_xlabel("index of the singular value")
        ax.set_ylabel("size, largest = 1")

    return _svg(draw, "Feature spectrum before and after the head")


def heat(grids: Sequence[Mapping[str, Any]], probe: str) -> str:
    """Accuracy in per cent of every setting (columns) at every tap (rows) of one run."""

    def draw(ax: Any) -> None:
        values = [100 * _array(grid["values"]) for grid in grids]
        mesh = ax.pcolormesh(np.stack(values), edgecolor="none", rasterized=False)
        ax.figure.colorbar(mesh, ax=ax, label="accuracy, %")
        rows = np.arange(len(grids)) + 0.5
        chosen = np.array([grid["chosen"] for grid in grids]) + 0.5
        ax.plot(
            chosen, rows, "o", markersize=5, markerfacecolor="none", markeredgecolor=COLOURS[1][0]
        )
        names = [str(grid["tap"]).removeprefix("backbone.") for grid in grids]
        ax.set_yticks(rows, names, fontsize=8.5)
        named, labels = labelled(grids[0]["settings"])
        step = -(-len(labels) // 12)
        ax.set_xticks(
            np.arange(0, len(labels), step) + 0.5, labels[::step], rotation=90, fontsize=7
        )
        ax.set_xlabel(named)
        ax.grid(visible=False)

    return _svg(draw, f"Every setting of the {probe} probe")


def losses(runs: Runs, look: Mapping[str, Look]) -> str:
    """The training loss of every run, by epoch."""

    def draw(ax: Any) -> None:
        for head, of_head in _by_head(runs, look):
            for run in of_head:
                curve = _array(run.get("losses") or ())
                line = _line(head, look) | {"markevery": max(1, len(curve) // 6)}
                ax.plot(np.arange(1, len(curve) + 1), curve, **line)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("epoch")
        ax.set_ylabel("training loss")

    return _svg(draw, "Training loss by epoch", height=2.3)


def _ends(runs: Runs) -> tuple[str, str]:
    """Before the head and after it; without a head the first tap and the last."""
    taps = list(dict.fromkeys(row["tap"] for run in runs for row in run["taps"]))
    both = ("pre_projection", "projection")
    return both if set(both) <= set(taps) else (taps[0], taps[-1])


def _grids(runs: Runs) -> dict[str, list[tuple[Mapping[str, Any], str]]]:
    """By probe the grids with several settings, of the first seed of each head, with the head."""
    found: dict[str, list[tuple[Mapping[str, Any], str]]] = {}
    first = {run["head"]: run for run in reversed(runs)}
    for head, run in first.items():
        for grid in run.get("grids") or ():
            if len(grid["settings"]) > 1 and grid["shots"] is None:
                found.setdefault(grid["probe"], []).append((grid, head))
    return found


def _by_head(runs: Runs, look: Mapping[str, Look]) -> list[tuple[str, Runs]]:
    # those told apart come last, on top of the grey ones
    heads = sorted(dict.fromkeys(run["head"] for run in runs), key=lambda head: head in look)
    return [(head, [run for run in runs if run["head"] == head]) for head in heads]


def _line(head: str, look: Mapping[str, Look]) -> dict[str, Any]:
    if head not in look:
        return {"color": _GREY, "linewidth": 0.8, "alpha": 0.55}
    colour, marker, _ = look[head]
    return {"color": colour, "marker": marker, "linewidth": 1.6, "markersize": 4.5}


def _array(values: Iterable[float | None]) -> Any:
    return np.array(list(values), dtype=float)  # None becomes nan


def _svg(draw: Callable[[Any], None], label: str, height: float = 3.2) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": label,  # the same results give the same page
        "text.parse_math": False,  # a $ in a tap's name is a $
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": _RULE,
        "grid.linewidth": 0.6,
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    file = io.StringIO()
    with rc_context(settings):
        figure = Figure(figsize=(5.0, height), layout="constrained")
        draw(figure.subplots())
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    box = re.search(r'viewBox="[^"]+"', svg)
    body = svg[svg.index("</defs>") + len("</defs>") :]  # the first one sets styles for the page
    body = re.sub(r' id="[\w.]+_\d+"', "", body)  # would occur once per figure
    body = body.replace("xlink:href", "href")
    body = re.sub(r"#[0-9a-f]{6}\b", lambda found: _variable(found[0]), body)
    return f'<svg {box[0] if box else ""} role="img" aria-label="{escape(label)}">{body}'


def _variable(colour: str) -> str:
    return f"var({_VARIABLES[colour]})" if colour in _VARIABLES else colour
