"""Which layer is best, while the model trains: probes and diagnostics at its taps, logged.

A run leaves the training bit for bit as it would have been: weights, buffers, the mode of each
module, random state and the order of the training samples. Its cost is bounded. Under several
processes each reads a share of the samples, the first one says whether there is time for a run, and
all have its numbers, so that callbacks that watch them act alike. What can be wrong with the
request is said when the trainer starts, as far as a batch of each data set can tell.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from headplug.callbacks.budget import Budget
from headplug.callbacks.lightning import callback_bases
from headplug.callbacks.once import once
from headplug.callbacks.reading import opened, reading, usable
from headplug.callbacks.trial import try_labels
from headplug.diagnostics import DEFINITIONS, diagnose
from headplug.errors import DataError, OptionError, unknown
from headplug.heads.base import positive
from headplug.probing import LayerReport, Probe, probe_layers
from headplug.probing.probes import probes_of
from headplug.ranks import team
from headplug.store.loaders import Listed, Stream, open_loader, same_random_state
from headplug.taps.points import HEAD_POINTS

DIAGNOSTICS = [name for name in DEFINITIONS if name != "singular_values"]

Data = Iterable[Any] | Dataset[Any]
Row = Mapping[str, Any]


class LayerProbe(*callback_bases()):  # type: ignore[misc]
    """Reads features every few epochs or steps, probes them and logs what that gives.

    Every logger of the trainer gets `probe/TAP/PROBE_accuracy`, `probe/TAP/DIAGNOSTIC` and, where
    both sides of the head are read, `probe/gap/PROBE`, the accuracy before the head minus that
    behind it. `trainer.callback_metrics` has them too, for `ModelCheckpoint` and `EarlyStopping`;
    between two runs they stay what they were, so count an EarlyStopping's patience in its own
    checks, and give it `strict=False` if it checks before the first run. With Lightning 1 put it
    behind LayerProbe.

    Images reach the model as the loaders give them, on its device, in its dtype and with the
    precision of the trainer's validation, but not through `on_after_batch_transfer`.

    Training goes on bit for bit as without it, with two exceptions. A data set with a random
    generator of its own that training reads in this process too (`num_workers=0`) draws more from
    it: give LayerProbe a copy. And what a forward keeps in plain attributes of modules, neither
    buffers nor parameters, stays as a run leaves it.

    What is wrong with the request or the data raises, at the latest in the first run. A tap whose
    features hold NaN or infinity is warned of and logged as NaN, and so are all in a later run that
    can use none, as of a model that diverged; training goes on, and an EarlyStopping that watches
    such a number stops, as `check_finite` says.

    Args:
        train: Samples with labels that probes are fitted to: a DataLoader, any iterable of batches
            that `extract_features` takes, a Dataset (read in batches of 256 by this process), or a
            function that gives one of these when the trainer starts. Shuffling, repeats and a
            distributed sampler's padding do not matter: each sample counts once.
        test: Samples with labels that accuracies are of, given likewise. Take a part of the
            training data if a checkpoint is chosen by them. Not read, nor are labels, if there are
            no probes.
        at: Points, see `headplug.taps.points`.
        probes: As in `probe_layers`, or () for none.
        diagnostics: Of the training samples' features: any of `headplug.diagnostics.DEFINITIONS`
            that is a number. One that cannot be told is logged as NaN.
        every_n_epochs: Runs come at the end of every so many epochs; of each, if this and
            `every_n_steps` are left out.
        every_n_steps: Runs come after every so many optimiser steps instead.
        max_fraction_of_time: Of the whole time of training, runs included, that runs may take. The
            first run always comes; later ones are left out where there is no time, and a warning
            says once what they cost. None for no bound.
        seed: Of the probes.
        name: Starts the names that are logged; two LayerProbes in one trainer need two.

    Attributes:
        history: A dict a run of this fit: epoch, step (optimiser steps done), seconds, and all that
            was logged. It goes on when a checkpoint is resumed.
        report: The whole `LayerReport` of the last run in this process that was not NaN, of the
            taps that were not, if there are probes.

    Raises:
        UnknownNameError: There is no such probe or diagnostic; or, when the trainer starts, a point
            matches nothing.
        OptionError: An option has an impossible value; or, when the trainer starts, a probe does
            not take such labels or has an impossible setting.
        SlotError: When the trainer starts: `pre_projection` or `projection` of a model without one
            projection head.
        TapError: When the trainer starts: a point is never reached.
        DataError: When the trainer starts: labels are missing or of different kinds, or the data
            are not as said above. In the first run: what else `probe_layers` refuses.
        RunError: The model is spread over processes by FSDP, or another process failed.

    >>> data = torch.utils.data.TensorDataset(torch.rand(64, 8), torch.arange(64) % 4)
    >>> probe = LayerProbe(data, data, at=("backbone", "projection"), every_n_epochs=5)
    >>> callbacks = [probe]  # of a Trainer; then monitor="probe/backbone/knn_accuracy" works
    """

    def __init__(
        self,
        train: Data | Callable[[], Data],
        test: Data | Callable[[], Data] | None = None,
        at: Any = ("backbone", *HEAD_POINTS),
        probes: str | Sequence[str] | Mapping[str, Probe] = ("knn",),
        diagnostics: Sequence[str] = ("rankme",),
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        max_fraction_of_time: float | None = 0.1,
        *,
        seed: int = 0,
        name: str = "probe",
    ) -> None:
        if None not in (every_n_epochs, every_n_steps):
            raise OptionError("runs come every_n_epochs or every_n_steps; leave one of them out.")
        self._option = "every_n_epochs" if every_n_steps is None else "every_n_steps"
        every = every_n_epochs if every_n_steps is None else every_n_steps
        self._every = positive(self._option, 1 if every is None else every)
        self.at = list(at) if isinstance(at, tuple) else at
        self.probes, self.diagnostics = probes, _known(diagnostics)
        if not (probes or self.diagnostics):
            raise OptionError("name at least one probe or one diagnostic.")
        if probes and probes_of(probes) and test is None:
            raise OptionError("probes need test data; pass them, or probes=() for none.")
        self._given = {"train": train, "test": test} if probes else {"train": train}
        self.seed, self.name = seed, name
        self._budget = Budget(max_fraction_of_time)
        self._said: set[str] = set()
        self.history: list[dict[str, Any]] = []
        self.report: LayerReport | None = None

    @property
    def state_key(self) -> str:
        """Tells the states of two LayerProbes in one checkpoint apart."""
        return f"LayerProbe({self.name})"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {"history": list(self.history), "budget": {**vars(self._budget)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it back."""
        self.history = list(state_dict["history"])
        self._budget = Budget(**{**state_dict["budget"], "fraction": self._budget.fraction})

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Starts anew; what a checkpoint holds comes after this."""
        if stage == "fit":
            self.history, self.report = [], None
            self._budget = Budget(self._budget.fraction)
            self._said.clear()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Reads a batch of each data set, to find what is wrong with them or with the points."""
        labels: dict[str, Tensor | None] = {}
        with same_random_state(None), team() as ranks:
            self._data = {what: opened(what, given) for what, given in self._given.items()}
            for what, data in self._data.items():
                with same_random_state(data):
                    samples = open_loader(data, ranks, 1)
                    labels |= ranks.own(partial(self._try, trainer, pl_module, what, samples))
            if self.probes:
                ranks.own(lambda: try_labels(labels, self.probes))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the clock; after a resume, callbacks see the last run's numbers again."""
        self._mark, self._step = time.perf_counter(), trainer.global_step
        if self.history:
            self._show(trainer, pl_module, self.history[-1])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Runs, where runs are counted in steps; batches whose gradients accumulate are none."""
        if self._option == "every_n_steps":
            before, self._step = self._step, trainer.global_step
            if self._step // self._every > before // self._every:
                self._due(trainer, pl_module, trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Runs, where runs are counted in epochs."""
        if self._option == "every_n_epochs" and (trainer.current_epoch + 1) % self._every == 0:
            # the trainer itself logs what belongs to an epoch at the last batch's place
            last = max(trainer.fit_loop.epoch_loop._batches_that_stepped - 1, 0)
            self._due(trainer, pl_module, last)

    def _due(self, trainer: Any, pl_module: Any, place: int) -> None:
        """Runs if there is time; logs at a place on the loggers' axis."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)  # what is still computed is training
        start, budget = time.perf_counter(), self._budget
        budget.around += start - self._mark
        budget.due += 1
        self._mark = start
        if budget.fraction is not None and not trainer.strategy.broadcast(budget.allows()):
            if trainer.is_global_zero:
                advice = budget.advice(self._option, self._every)
                with once(self._said):
                    warnings.warn(f"LayerProbe {self.name!r}: {advice}", stacklevel=2)
            return
        values = self._values(trainer, pl_module)
        self._mark = time.perf_counter()
        budget.add(self._mark - start)
        when = {"epoch": int(trainer.current_epoch), "step": int(trainer.global_step)}
        self.history.append({**when, "seconds": budget.last, **values})
        self._show(trainer, pl_module, values)
        for logger in trainer.loggers:
            logger.log_metrics({**values, "epoch": trainer.current_epoch}, step=place)
            logger.save()

    def _values(self, trainer: Any, pl_module: Any) -> dict[str, float]:
        """What a run finds, on every process; NaN where it cannot use features."""

        def work() -> tuple[dict[str, float], str]:
            try:
                return self._run(trainer, pl_module)
            except DataError as error:
                if not self.history:
                    raise
                return dict.fromkeys(self._logged(self.history[-1]), math.nan), f": {error}"

        with once(self._said), team() as ranks:
            values, why = ranks.each(work)[0]
            if why and trainer.is_global_zero:
                said = f"LayerProbe {self.name!r} is NaN at step {trainer.global_step}{why}"
                warnings.warn(said, stacklevel=2)
        return values

    def _run(self, trainer: Any, pl_module: Any) -> tuple[dict[str, float], str]:
        """What is to be logged, and where and why it is NaN."""
        with same_random_state(None):
            with reading(trainer, pl_module) as read:
                stores = [read(data, self.at) for data in self._data.values()]
            taps = stores[0].points
            stores, why = usable(dict(zip(self._data, stores, strict=True)))
            if not self.probes:
                return self._named(taps, [], diagnose(stores[0], device=pl_module.device)), why
            train, test = stores
            self.report = probe_layers(
                train, test, self.probes, seed=self.seed, device=pl_module.device, distributed=True
            )
        return self._named(taps, self.report.rows, self.report.spectra), why

    def _named(
        self, taps: Sequence[str], rows: Sequence[Row], spectra: Sequence[Row]
    ) -> dict[str, float]:
        """The numbers of a run by the names that they are logged under; NaN for other taps."""
        probes = {row["probe"]: f"{row['probe']}_{row['metric']}" for row in rows}
        by_tap: dict[str, dict[str, float]] = {tap: {} for tap in taps}
        for row in rows:
            by_tap[row["tap"]][probes[row["probe"]]] = row[row["metric"]]
        for row in spectra:
            told = {d: math.nan if row[d] is None else float(row[d]) for d in self.diagnostics}
            by_tap[row["tap"]] |= told
        nothing = dict.fromkeys([*probes.values(), *self.diagnostics], math.nan)
        by_tap = {tap: nothing | numbers for tap, numbers in by_tap.items()}
        found = {f"{self.name}/{tap}/{n}": v for tap in taps for n, v in by_tap[tap].items()}
        if by_tap.keys() >= set(HEAD_POINTS):
            before, behind = (by_tap[tap] for tap in HEAD_POINTS)
            found |= {f"{self.name}/gap/{p}": before[n] - behind[n] for p, n in probes.items()}
        return found

    def _show(self, trainer: Any, pl_module: Any, values: dict[str, Any]) -> None:
        """Lets other callbacks see the numbers, as Lightning's own LearningRateMonitor does."""
        found = self._logged(values)
        device = pl_module.device
        trainer.callback_metrics.update(
            {n: torch.tensor(v, device=device) for n, v in found.items()}
        )

    def _logged(self, row: Mapping[str, Any]) -> dict[str, float]:
        return {n: v for n, v in row.items() if n.startswith(f"{self.name}/")}

    def _try(
        self, trainer: Any, pl_module: Any, what: str, samples: Listed | Stream
    ) -> dict[str, Tensor | None]:
        """Reads the points for one batch, and gives its labels; nothing where there is none."""
        batch = next(samples.batches(()), None)
        if batch is None:
            return {}
        with reading(trainer, pl_module) as read:
            read([(batch.images, batch.labels)], self.at, distributed=False)
        return {what: batch.labels}


def _known(diagnostics: str | Sequence[str]) -> list[str]:
    names = [diagnostics] if isinstance(diagnostics, str) else list(diagnostics)
    for name in names:
        if name not in DIAGNOSTICS:
            raise unknown("diagnostic", str(name), DIAGNOSTICS)
    return names
