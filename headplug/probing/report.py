"""What the probes found at every tap: rows to read, to compare, to save and to load again.

Rows, grids and spectra are plain dicts of plain values, so that JSON, pandas and other reports take
them as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headplug import diagnostics
from headplug.errors import DataError, UnknownNameError
from headplug.files import atomic, write_json
from headplug.probing import metrics
from headplug.probing.data import Targets
from headplug.probing.hits import packed, unpacked
from headplug.probing.intervals import Difference, holm, paired_hits, paired_scores
from headplug.probing.protocols import spelled
from headplug.probing.table import AFTER, BEFORE, percent, table, title

SCHEMA = 2
KEPT = ("rows", "spectra", "grids", "profile", "about")
KEY = ("tap", "task", "probe", "shots")


@dataclass(repr=False, eq=False)
class LayerReport:
    """What each probe reaches at each tap, and what the features of the taps are like.

    Attributes:
        rows: One dict a tap, task and probe, taps in depth order: tap, task, probe, shots (None for
            all training samples), setting (a dict), metric ("accuracy", "mAP" or "r2"), its value
            under that name, low and high (95% interval over the test samples: Wilson's for an
            accuracy, else `headplug.probing.intervals.score_interval`'s), its value on the samples
            that the setting was chosen on (under "val_" and the name), selected_on (which these
            are), n_test.
        spectra: One dict a tap, of its training features; see `headplug.diagnostics.DEFINITIONS`.
        grids: One dict a row: every setting with its value on what it was chosen on.
        profile: How the head weights features, `headplug.diagnostics.weight_profile` from
            pre_projection to projection; empty without these taps.
        about: The protocol with its whole setting, and the seed.
        outcomes: A tensor a row: hits `(R, M)` of M test samples in R draws for classes, which are
            saved; else predictions `(M, K)`, which are not.
        answers: By task, the targets of the test samples; not saved.
    """

    rows: list[dict[str, Any]]
    spectra: list[dict[str, Any]]
    grids: list[dict[str, Any]] = field(default_factory=list)
    profile: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    outcomes: list[Tensor] = field(default_factory=list)
    answers: dict[str, Targets] = field(default_factory=dict)

    @property
    def best(self) -> dict[str, Any]:
        """Of the first task, the row that did best where settings are chosen; the earlier tap."""
        return next(iter(self.best_by_task.values()))

    @property
    def best_by_task(self) -> dict[str, dict[str, Any]]:
        """For each task the row that did best where settings are chosen, with all samples."""
        found: dict[str, dict[str, Any]] = {}
        for row in self.rows:
            best = found.setdefault(row["task"], row)
            if row["shots"] is None and _chosen_by(row) > _chosen_by(best):
                found[row["task"]] = row
        return found

    @property
    def gaps(self) -> list[dict[str, Any]]:
        """What every probe finds more before the head than after it ("guillotine" gap).

        One dict a task, probe and shots: these, value, low, high and p, see
        `headplug.probing.intervals.Difference` (p holds for all of a task together: Holm) and test.
        Empty without the taps pre_projection and projection; a saved report has those of classes.
        """
        found = []
        for task in dict.fromkeys(row["task"] for row in self.rows):
            pairs = [
                (row, after)
                for row in self.rows
                for after in self.rows
                if row["tap"] == BEFORE
                and after["tap"] == AFTER
                and row["task"] == task
                and all(row[k] == after[k] for k in KEY[1:])
            ]
            with suppress(DataError):  # what was predicted is not there
                found += self._differences(pairs, self)
        return found

    def row(
        self, tap: str, probe: str, task: str | None = None, shots: int | None = None
    ) -> dict[str, Any]:
        """One row; of the first task if none is named.

        Raises:
            UnknownNameError: There is no such row.
        """
        wanted = (tap, self.rows[0]["task"] if task is None else task, probe, shots)
        for row in self.rows:
            if _key(row) == wanted:
                return row
        there = "; ".join(f"{r['tap']}, {r['probe']}" for r in self.rows[:20])
        raise UnknownNameError(
            f"no row has tap {tap!r}, task {wanted[1]!r}, probe {probe!r}, shots {shots}; there "
            f"are: {there}."
        )

    def paired(
        self,
        ours: Mapping[str, Any],
        theirs: Mapping[str, Any],
        other: LayerReport | None = None,
    ) -> Difference:
        """What one row has over another on the same test samples.

        Samples are told apart by their labels and ids.

        Args:
            ours: A row of this report.
            theirs: A row of this one or of the other.
            other: The report of another head or model, of the same test samples.

        Raises:
            DataError: Test samples or metrics differ, or the outcomes are not there.
        """
        other = other or self
        if ours["metric"] != theirs["metric"] or not self._same_test(ours, theirs, other):
            raise DataError(
                f"the two rows do not compare: {ours['metric']} of {ours['n_test']} samples of "
                f"task {ours['task']!r} here, {theirs['metric']} of {theirs['n_test']} samples of "
                f"task {theirs['task']!r} there; take reports of the same test data."
            )
        a, b = self._outcome(ours), other._outcome(theirs)
        if ours["metric"] == "accuracy":
            return paired_hits(a, b)
        return paired_scores(torch.stack([a, b]), self.answers[ours["task"]])

    def against(self, other: LayerReport) -> list[dict[str, Any]]:
        """What every row has over the same row of another head's or model's report.

        One dict for each row that both have, as `gaps`, with p for all of them together.

        Raises:
            DataError: Test samples differ, no row is in both, or the outcomes are not there.
        """
        there = {_key(row): row for row in other.rows}
        pairs = [(row, there[_key(row)]) for row in self.rows if _key(row) in there]
        if not pairs:
            raise DataError("the reports have no tap and probe in common; probe the same taps.")
        return self._differences(pairs, other)

    def __repr__(self) -> str:
        best = self.best
        return (
            f"LayerReport({len(self.spectra)} taps, best {best['tap']!r} with {title(best)}: "
            f"{percent(best)})"
        )

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Values with intervals by tap and probe, and the ranks, as plain text."""
        return table(self)

    @property
    def setting(self) -> str:
        """The protocol's whole setting, in lines."""
        return spelled(self.about)

    def plot(self, path: str | Path) -> Path:
        """Draws values by depth, singular spectra and the grids into an image file.

        Args:
            path: The file; its ending names the format: png, svg, pdf.

        Returns:
            The path.

        Raises:
            OptionError: There is no such format.
            RunError: matplotlib is missing, or the file cannot be written.
        """
        from headplug.probing.plot import drawn, format_of

        path = Path(path)
        kind = format_of(path)
        with atomic(path) as partial:
            drawn(self).savefig(partial, format=kind, dpi=150)
        return path

    def to_pandas(self) -> Any:
        """The rows as a `pandas.DataFrame`.

        Raises:
            RunError: pandas is missing.
        """
        from headplug.probing.plot import library

        return library("pandas").DataFrame(self.rows)

    @property
    def content(self) -> dict[str, Any]:
        """What `save` writes, as plain values."""
        return {
            "schema": SCHEMA,
            "rows": self.rows,
            "spectra": self.spectra,
            "grids": self.grids,
            "profile": self.profile,
            "about": self.about,
            "hits": [packed(o) if o.dtype == torch.bool else None for o in self.outcomes],
            "definitions": {**metrics.DEFINITIONS, **diagnostics.DEFINITIONS},
        }

    def save(self, path: str | Path) -> Path:
        """Writes all but predictions as JSON, whole or not at all.

        Raises:
            RunError: The file cannot be written.
        """
        write_json(path, self.content)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> LayerReport:
        """Reads what `save` wrote.

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
            kept = {key: content[key] for key in KEPT}
            return cls(**kept, outcomes=[unpacked(h) for h in content["hits"]])
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{path} was not written by LayerReport.save(): {type(error).__name__}: {error}."
            ) from error

    def _differences(
        self, pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], other: LayerReport
    ) -> list[dict[str, Any]]:
        found = [self.paired(ours, theirs, other)._asdict() for ours, theirs in pairs]
        together = holm([d["p"] for d in found])
        return [
            {**{k: ours[k] for k in (*KEY, "metric")}, **d, "p": p}
            for (ours, _), d, p in zip(pairs, found, together, strict=True)
        ]

    def _outcome(self, row: Mapping[str, Any]) -> Tensor:
        places = [i for i, r in enumerate(self.rows) if _key(r) == _key(row)]
        found = [self.outcomes[i] for i in places if i < len(self.outcomes)]
        if not found or not found[0].numel():
            raise DataError(
                f"what the probe said of each test sample at {row['tap']!r} is not there: a saved "
                "report keeps it for classes only. Compare before you save, or probe again."
            )
        return found[0]

    def _same_test(
        self, ours: Mapping[str, Any], theirs: Mapping[str, Any], other: LayerReport
    ) -> bool:
        one, two = (
            (report.about.get("test_samples") or {}).get(row["task"])
            for report, row in ((self, ours), (other, theirs))
        )
        return bool(one == two and ours["n_test"] == theirs["n_test"])


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in KEY)


def _chosen_by(row: Mapping[str, Any]) -> float:
    return float(row[f"val_{row['metric']}"])
