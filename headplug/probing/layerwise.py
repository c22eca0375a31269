"""Every probe at every tap, with settings chosen without a look at the test labels.

Everything is checked before the first probe runs. Settings are chosen on a held-out part of train,
the same for every probe, so that probes compare there too; the probe is then fitted to all of train
and meets the test samples once. A protocol may say otherwise; every row says what was done. The
caller's random state, grad mode, default type and device stay as they are.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headplug.device import pick_device
from headplug.diagnostics import describe, weight_profile
from headplug.errors import DataError, OptionError, unknown
from headplug.probing.probes import PROBES, probes_of
from headplug.probing.protocols import PROTOCOLS, SELECT_ON, ProbeProtocol
from headplug.probing.report import LayerReport
from headplug.probing.table import AFTER, BEFORE
from headplug.probing.tasks import Features, Task, View, check_taps, few, views
from headplug.probing.trial import Outcome, Trial
from headplug.progress import progress
from headplug.ranks import team


@torch.no_grad()
def probe_layers(
    train: Features,
    test: Features,
    probes: str | Sequence[str] | Mapping[str, Any] | None = None,
    *,
    tasks: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    shots: int | Sequence[int] = (),
    draws: int = 5,
    protocol: str | ProbeProtocol = "headplug",
    select_on: str | None = None,
    held_out: float | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    distributed: bool = False,
    show_progress: bool = False,
) -> LayerReport:
    """Probes the features of every tap and reports what each probe reaches on the test samples.

    Labels `(N,)` of integers are classes (accuracy), `(N, K)` of 0 and 1 are labels of which any
    may hold (mean average precision), floats are numbers to predict (R²). Of settings that do
    equally well the first is taken. A tap whose features are all the same is probed like any other,
    with a warning: its rows show what guessing gives.

    Args:
        train: Features to fit on and to choose settings on, e.g. a `FeatureStore`.
        test: Features to report on, of the same taps.
        probes: Any of "knn", "linear", "ridge", "logistic" and "mlp"; or a mapping of names of your
            own to lists of settings, or to `headplug.probing.Probe`s. Left out, the protocol's.
        tasks: Other labels than the stores' own, by name: of the train and of the test samples.
        shots: Also with so many training samples of each class, for classes only.
        draws: How many times these are drawn; the rows are means over the draws.
        protocol: Whose way to evaluate; `headplug.probing.PROTOCOLS` has all, and printing one
            shows its whole setting.
        select_on: "held-out" part of train, or "test", which every output then says.
        held_out: Part of train that settings are chosen on, of each class or label alike. A class
            of one sample is not held out.
        seed: Of the part held out, of the draws and of the order of training.
        device: "auto" takes a GPU where there is one.
        distributed: Whether all processes of torch.distributed make this call and share the taps;
            each gets the whole report.
        show_progress: Whether to show a progress bar.

    Raises:
        DataError: Labels are missing, of one class, unseen in training or too few; taps, widths or
            numbers of samples differ; features are not finite. The message names the tap.
        UnknownNameError: There is no such probe or protocol.
        OptionError: A part, a number of shots or the combination is impossible.
        RunError: It failed on another process.

    >>> class Store(dict):
    ...     points, labels = ["h"], torch.tensor([0, 1]).repeat(20)
    >>> store = Store(h=torch.eye(2).repeat(20, 1))
    >>> probe_layers(store, store, ["ridge"], device="cpu")
    LayerReport(1 taps, best 'h' with ridge: 100.0 [91.2, 100.0])
    """
    shots = [shots] if isinstance(shots, int) else list(shots)

    def prepare() -> _Work:
        rule = rule_of(protocol, select_on, held_out)
        asked = rule.probes if probes is None else probes_of(probes, {**PROBES, **rule.probes})
        check_counts(shots=shots, draws=[draws])
        if not isinstance(seed, int):
            raise OptionError(f"seed must be a whole number, not {seed!r}.")
        known, queries, found = views(train, test, tasks, rule, seed)
        if shots and any(task.train.kind != "classes" for task in found):
            raise OptionError("shots are samples of each class, and these labels are no classes.")
        check_taps(known, queries, found)
        place = pick_device(device)
        todo = [task.to(place) for task in found]
        drawn = {task.name: {n: few(task, n, draws, seed) for n in shots} for task in todo}
        ids = getattr(test, "ids", None)
        return _Work(replace(rule, probes=asked), known, queries, todo, drawn, place, seed, ids)

    with team(distributed) as ranks:
        work = ranks.own(prepare)
        sums = set(ranks.each(work.check_sum))
        if len(sums) > 1:
            raise DataError(
                f"the {ranks.size} processes were given different labels or taps; with "
                "distributed=True all make the same call. Gather the features on each first."
            )
        taps, count = work.known.points, len(work.known.points) * len(work.rule.probes)
        mine = taps[ranks.rank :: ranks.size]
        with progress("probes", count, show=show_progress) as advance:
            parts = ranks.each(lambda: {tap: work.at(tap, advance) for tap in mine})
        profile = ranks.first(work.profile)
    found = {tap: of_tap for part in parts for tap, of_tap in part.items()}
    outcomes = [outcome for tap in taps for outcome in found[tap][1]]
    return LayerReport(
        rows=[outcome.row for outcome in outcomes],
        spectra=[found[tap][0] for tap in taps],
        grids=[outcome.grid for outcome in outcomes],
        profile=profile,
        about={
            "protocol": protocol if isinstance(protocol, str) else "own",
            **work.rule.config,
            "seed": seed,
            "draws": draws if shots else None,
            "test_samples": {t.name: _check_sum(t.test.values, work.ids) for t in work.tasks},
        },
        outcomes=[outcome.result for outcome in outcomes],
        answers={task.name: task.test.to(torch.device("cpu")) for task in work.tasks},
    )


class _Work(NamedTuple):
    """All that is to be done, checked."""

    rule: ProbeProtocol
    known: View
    queries: View
    tasks: Sequence[Task]
    drawn: Mapping[str, Mapping[int, Sequence[Tensor]]]
    place: torch.device
    seed: int
    ids: Any  # of the test samples

    def check_sum(self) -> int:
        """Tells whether processes were given the same."""
        labels = [t.values for task in self.tasks for t in (task.train, task.test)]
        return zlib.crc32(repr([list(self.known.points), *map(_check_sum, labels)]).encode())

    def profile(self) -> dict[str, Any]:
        """How the head weights features, where both of its sides are there."""
        if not {BEFORE, AFTER} <= set(self.known.points):
            return {}
        return weight_profile(*(self.known[tap].to(self.place) for tap in (BEFORE, AFTER)))

    def at(self, tap: str, advance: Callable[..., None]) -> tuple[dict[str, Any], list[Outcome]]:
        """What the features of a tap are like, and what every probe makes of them."""
        x, queries = self.known[tap].to(self.place), self.queries[tap].to(self.place)
        about = {"tap": tap, **describe(x, tap)}
        if about["effective_rank"] == 0:
            warnings.warn(
                f"tap {tap!r} is constant; its rows show what guessing gives.", stacklevel=2
            )
        found = []
        held = [x[task.held] for task in self.tasks]
        with torch.autocast(self.place.type, enabled=False):
            for name, probe in self.rule.probes.items():
                for task, own in zip(self.tasks, held, strict=True):
                    trial = Trial(tap, name, probe, task, self.rule, self.seed, x, own, queries)
                    found.append(trial.whole())
                    found += [trial.few(n, rows) for n, rows in self.drawn[task.name].items()]
                advance(tap)
        return about, found


def check_counts(**given: Sequence[int]) -> None:
    """Refuses what does not count.

    Raises:
        OptionError: A number is not positive and whole.
    """
    for name, values in given.items():
        for value in values:
            if not isinstance(value, int) or value < 1:
                raise OptionError(f"{name} must be positive whole numbers, not {value!r}.")


def rule_of(
    protocol: str | ProbeProtocol, select_on: str | None, held_out: float | None
) -> ProbeProtocol:
    """A protocol, with another way to choose settings if one is asked for.

    Raises:
        UnknownNameError: There is no such protocol.
        OptionError: There is no such way, or the part is impossible.
    """
    if isinstance(protocol, str):
        if protocol not in PROTOCOLS:
            raise unknown("protocol", protocol, PROTOCOLS)
        protocol = PROTOCOLS[protocol]
    if select_on is not None:
        if select_on not in SELECT_ON:
            raise OptionError(str(unknown("way to select", select_on, SELECT_ON)))
        protocol = replace(protocol, select_on=select_on)
    if held_out is not None:
        if not isinstance(held_out, float) or not 0 < held_out < 1:
            raise OptionError(f"held_out must lie between 0 and 1, not at {held_out!r}.")
        protocol = replace(protocol, held_out=held_out)
    return protocol


def _check_sum(values: Tensor, ids: Any = None) -> int:
    """Tells samples apart by their labels, and by their ids where there are some."""
    named = ids.tolist() if isinstance(ids, Tensor) else ids
    return zlib.crc32(repr(named).encode(), zlib.crc32(values.cpu().contiguous().numpy().tobytes()))
