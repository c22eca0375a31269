"""What the probes found at every tap: rows to read, to plot, to save and to load again.

Rows and spectra are plain dicts of plain values, so that JSON, pandas and other reports take them
as they are.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from headplug.errors import DataError, RunError, UnknownNameError
from headplug.files import atomic, write_json
from headplug.probing.spectrum import DEFINITIONS

SCHEMA = 1
Z95 = 1.959963984540054  # quantile of the normal distribution that leaves 2.5% above


def wilson_interval(accuracy: float, count: int) -> tuple[float, float]:
    """95% interval of an accuracy over `count` independent samples (Wilson 1927).

    It covers the choice of test samples only, not that of the seed or of the training data.

    >>> low, high = wilson_interval(0.9, 100)
    >>> round(low, 3), round(high, 3)
    (0.826, 0.945)
    """
    spread = Z95**2 / count
    middle = (accuracy + spread / 2) / (1 + spread)
    half = math.sqrt(accuracy * (1 - accuracy) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(repr=False, eq=False)
class LayerReport:
    """Accuracies and spectra by tap.

    Attributes:
        rows: One dict a tap and probe, taps in depth order: tap, probe, setting (a dict), accuracy
            in [0, 1], low and high (95% Wilson interval over the test samples), val_accuracy (of
            the setting, on the samples held out), selected_on, n_test.
        spectra: One dict a tap, of its training features: tap, dim, rankme, effective_rank,
            singular_values; see `headplug.probing.DEFINITIONS`.
        predictions: Predicted label of each test sample by (tap, probe); not saved.
    """

    rows: list[dict[str, Any]]
    spectra: list[dict[str, Any]]
    predictions: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    @property
    def best(self) -> dict[str, Any]:
        """The row with the highest `val_accuracy`; the earlier tap on a tie."""
        return max(self.rows, key=lambda row: row["val_accuracy"])

    def __repr__(self) -> str:
        best = self.best
        return (
            f"LayerReport({len(self.spectra)} taps, best {best['tap']!r} with {best['probe']}: "
            f"{_percent(best)})"
        )

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Test accuracies with intervals by tap and probe, and the ranks, as plain text."""
        probes = list(dict.fromkeys(row["probe"] for row in self.rows))
        cells = {(row["tap"], row["probe"]): _percent(row) for row in self.rows}
        lines = [["tap", "dim", *probes, "rankme", "effective rank"]]
        for s in self.spectra:
            found = [cells[s["tap"], probe] for probe in probes]
            ranks = [f"{s['rankme']:.1f}", f"{s['effective_rank']:.1f}"]
            lines.append([s["tap"], str(s["dim"]), *found, *ranks])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in lines
        ]
        best = self.best
        text += [
            "",
            f"Accuracy in % on {best['n_test']} test samples, 95% Wilson interval over them.",
            f"Settings, and the best tap, chosen on: {best['selected_on']}.",
            f"Best: {best['tap']}, {best['probe']} {_spell(best['setting'])}: {_percent(best)}.",
            DEFINITIONS["rankme"],
            DEFINITIONS["effective_rank"],
        ]
        return "\n".join(text)

    def plot(self, path: str | Path) -> Path:
        """Draws accuracy by depth (left) and singular spectra (right) into an image file.

        Args:
            path: The file; its ending names the format: png, svg, pdf.

        Returns:
            The path.

        Raises:
            RunError: matplotlib is missing, or the file cannot be written.
        """
        figure = _library("matplotlib.figure").Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        taps = [s["tap"] for s in self.spectra]
        for probe in dict.fromkeys(row["probe"] for row in self.rows):
            mine = [row for row in self.rows if row["probe"] == probe]
            values = [100 * row["accuracy"] for row in mine]
            below = [100 * max(0.0, row["accuracy"] - row["low"]) for row in mine]
            above = [100 * max(0.0, row["high"] - row["accuracy"]) for row in mine]
            left.errorbar(
                range(len(taps)), values, (below, above), marker="o", capsize=3, label=probe
            )
        left.set_xticks(range(len(taps)), taps, rotation=30, ha="right")
        left.set_ylabel("test accuracy in %, 95% interval")
        left.legend()
        for s in self.spectra:
            values = [v if v > 0 else math.nan for v in s["singular_values"]]
            right.plot(
                range(1, len(values) + 1), values, label=f"{s['tap']}, rankme {s['rankme']:.1f}"
            )
        right.set_yscale("log")
        right.set_xlabel("index")
        right.set_ylabel("singular value / largest, centred")
        right.legend()
        path = Path(path)
        with atomic(path) as partial:
            figure.savefig(partial, format=path.suffix.lstrip(".") or "png", dpi=150)
        return path

    def to_pandas(self) -> Any:
        """The rows as a `pandas.DataFrame`, one a tap and probe.

        Raises:
            RunError: pandas is missing.
        """
        return _library("pandas").DataFrame(self.rows)

    def save(self, path: str | Path) -> Path:
        """Writes rows, spectra and their definitions as JSON, whole or not at all.

        Raises:
            RunError: The file cannot be written.
        """
        content = {
            "schema": SCHEMA,
            "rows": self.rows,
            "spectra": self.spectra,
            "definitions": DEFINITIONS,
        }
        write_json(path, content)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> LayerReport:
        """Reads what `save` wrote; predictions are not in it.

        Raises:
            UnknownNameError: There is no such file.
            DataError: It was not written by `save`.
        """
        path = Path(path)
        if not path.is_file():
            raise UnknownNameError(f"there is no file {str(path)!r}; check the path.")
        try:
            content = json.loads(path.read_text("utf-8"))
            if content["schema"] != SCHEMA:
                raise DataError(
                    f"{path} has schema {content['schema']!r}; this version reads {SCHEMA}."
                )
            return cls(content["rows"], content["spectra"])
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{path} was not written by LayerReport.save(): {type(error).__name__}: {error}."
            ) from error


def _percent(row: Mapping[str, Any]) -> str:
    return f"{100 * row['accuracy']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def _spell(setting: Mapping[str, Any]) -> str:
    return "(" + ", ".join(f"{k}={v}" for k, v in setting.items() if v is not None) + ")"


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise RunError(f"this needs {package}, which is missing: pip install {package}.") from error
