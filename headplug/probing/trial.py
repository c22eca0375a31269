"""One probe at one tap for one task: its setting chosen, then fitted, then put to the test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headplug.probing.data import Targets
from headplug.probing.intervals import (
    bootstrap,
    bootstrap_scores,
    score_interval,
    wilson_interval,
)
from headplug.probing.metrics import METRICS, score
from headplug.probing.probes import Predict, Probe
from headplug.probing.protocols import ProbeProtocol
from headplug.probing.table import ON_TEST
from headplug.probing.tasks import Task


class Outcome(NamedTuple):
    """What came of it: a row, a grid, and hits `(R, M)` or predictions `(M, K)`."""

    row: dict[str, Any]
    grid: dict[str, Any]
    result: Tensor


class Trial(NamedTuple):
    """A probe at a tap, for a task; the same samples held out as for every other."""

    tap: str
    name: str
    probe: Probe
    task: Task
    rule: ProbeProtocol
    seed: int
    features: Tensor
    held: Tensor  # of these the ones that settings are chosen on
    queries: Tensor

    def whole(self) -> Outcome:
        """With all training samples."""
        task, x = self.task, self.features
        probe, basis = self.probe.up_to(len(task.fit)), task.basis
        parted = self.rule.resplit is not None or probe.training.keep_best  # fit and held, apart
        on_test = self.rule.select_on == "test"
        rows = task.fit if parted or not on_test else slice(None)
        predict = self._fit(probe, x[rows], task.train[rows])
        if on_test:
            predicted, basis = predict(self.queries), ON_TEST
            values = score(predicted, task.test)
        else:
            values = self._held(predict)
        chosen = int(values.argmax())
        if not on_test:
            if not parted:
                predict = self._fit(probe.only(chosen), x, task.train)
            predicted = predict(self.queries)
        result = predicted[chosen if len(predicted) > 1 else 0]
        if task.test.kind == "classes":
            result = (result == task.test.values)[None]
        return self._outcome(probe, values, chosen, result, basis)

    def few(self, shots: int, rows: Sequence[Tensor]) -> Outcome:
        """With a few training samples of each class, drawn several times."""
        task, probe = self.task, self.probe.up_to(len(rows[0]))
        values, hits = [], []
        for of_draw in rows:
            predict = self._fit(probe, self.features[of_draw], task.train[of_draw])
            predicted = predict(self.queries)
            hits.append(predicted == task.test.values)
            on_test = self.rule.select_on == "test"
            values.append(score(predicted, task.test) if on_test else self._held(predict))
        mean = torch.stack(values).mean(0)
        chosen = int(mean.argmax())
        basis = ON_TEST if on_test else task.basis
        return self._outcome(probe, mean, chosen, torch.stack(hits)[:, chosen], basis, shots)

    def _fit(self, probe: Probe, features: Tensor, targets: Targets) -> Predict:
        held = (self.held, self.task.train[self.task.held]) if probe.training.keep_best else None
        return probe.fit(features, targets, seed=self.seed, validation=held)

    def _held(self, predict: Predict) -> Tensor:
        return score(predict(self.held), self.task.train[self.task.held])

    def _outcome(
        self,
        probe: Probe,
        values: Tensor,
        chosen: int,
        result: Tensor,
        basis: str,
        shots: int | None = None,
    ) -> Outcome:
        test, metric = self.task.test, METRICS[self.task.test.kind]
        result = result.cpu()
        if test.kind != "classes":
            test = test.to(result.device)
            value = float(score(result[None], test)[0])
            low, high = score_interval(value, bootstrap_scores(result[None], test)[0], test)
        else:
            value = float(result.double().mean())
            alone = len(result) == 1
            low, high = wilson_interval(value, len(test)) if alone else bootstrap(result)
        which = {"tap": self.tap, "task": self.task.name, "probe": self.name, "shots": shots}
        settings = [s._asdict() for s in probe.settings]
        row = {
            **which,
            "setting": settings[chosen],
            "metric": metric,
            metric: value,
            "low": low,
            "high": high,
            f"val_{metric}": float(values[chosen]),
            "selected_on": basis,
            "n_test": len(test),
        }
        grid = {**which, "settings": settings, "chosen": chosen}
        grid["values"] = [v if math.isfinite(v) else None for v in values.tolist()]
        return Outcome(row, grid, result)
