"""What is to be predicted of which samples: checked whole before any probe runs.

A protocol may take the samples to fit on from test; rows of a store then stand for it (`View`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from headplug.errors import DataError, OptionError
from headplug.probing.data import (
    Targets,
    as_targets,
    check_features,
    multilabel_split,
    shuffled_classes,
    stratified_split,
)
from headplug.probing.protocols import ProbeProtocol

STORES = "labels"  # the task of the stores' own labels


class Features(Protocol):
    """Features by tap, with labels: what `FeatureStore` offers."""

    @property
    def points(self) -> Sequence[str]:
        """Tap names in depth order."""

    @property
    def labels(self) -> Tensor | None:
        """Of each sample `(N,)` or `(N, K)`."""

    def __getitem__(self, point: str, /) -> Tensor:
        """Features of one tap `(N, D)`."""


@dataclass(frozen=True)
class View:
    """Some rows of a store, or all.

    Attributes:
        name: What to call it in messages.
        store: The features.
        rows: Which `(N,)`, or None for all.
    """

    name: str
    store: Features
    rows: Tensor | None = None

    @property
    def points(self) -> Sequence[str]:
        """Tap names in depth order."""
        return self.store.points

    def __getitem__(self, tap: str) -> Tensor:
        features = check_features(self.store[tap])
        return features if self.rows is None else features[self.rows]


@dataclass(frozen=True, eq=False)
class Task:
    """What to predict.

    Attributes:
        name: Of the task.
        train: Targets of the training samples; classes as indices into `values`.
        test: Of the test samples, alike.
        fit: Rows of train to fit on while settings are chosen.
        held: Rows of train to choose them on.
        basis: The latter, in words.
        values: The labels of the classes, ascending, if there are classes.
    """

    name: str
    train: Targets
    test: Targets
    fit: Tensor
    held: Tensor
    basis: str
    values: Tensor | None

    def to(self, device: torch.device) -> Task:
        """The same on another device."""
        moved = {k: getattr(self, k).to(device) for k in ("train", "test", "fit", "held")}
        return replace(self, **moved)


def views(
    train: Features,
    test: Features,
    tasks: Mapping[str, Any] | None,
    rule: ProbeProtocol,
    seed: int,
) -> tuple[View, View, list[Task]]:
    """The samples to learn from and to report on, and what to predict of them.

    Raises:
        DataError: Labels are missing, of one class, of different kinds, or unseen in training.
        OptionError: There is no task.
    """
    if tasks is not None and not tasks:
        raise OptionError("tasks= names none; leave it out for the stores' own labels.")
    given: Mapping[str, Any] = tasks or {STORES: (train.labels, test.labels)}
    for name, both in given.items():
        if not isinstance(both, tuple | list) or len(both) != 2:
            raise OptionError(
                f"tasks[{name!r}] must be a pair: labels of the train and of the test samples."
            )
    if not rule.resplit:
        known, asked = View("train", train), View("test", test)
        return known, asked, [_task(n, a, b, rule, seed) for n, (a, b) in given.items()]
    count = len(_given("test", next(iter(given.values()))[1]))
    sizes = [int(part * count) for part in rule.resplit]
    sizes[0] += count - sum(sizes)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")
    learn, report = order[: sizes[0] + sizes[1]], order[sizes[0] + sizes[1] :]
    cut = torch.arange(len(learn), device="cpu").split(sizes[:2])
    found = []
    for name, (_, answers) in given.items():
        labels = _given("test", answers)
        task = _task(name, labels[learn], labels[report], rule, seed)
        basis = f"{rule.resplit[1]:.0%} of the test samples, which are divided anew"
        found.append(replace(task, fit=cut[0], held=cut[1], basis=basis))
    return View("test", test, learn), View("test", test, report), found


def check_taps(known: View, asked: View, todo: Sequence[Task]) -> None:
    """Raises what is wrong with any tap, before any is probed.

    Raises:
        DataError: Taps, widths or numbers of samples differ, or features cannot be used.
    """
    if not known.points:
        raise DataError("the training features have no taps; extract at least one.")
    one, other = set(known.points), set(asked.points)
    if one != other:
        raise DataError(
            f"taps differ: only train has {sorted(one - other)}, only test has "
            f"{sorted(other - one)}. Extract both with the same `at=`."
        )
    for tap in known.points:
        widths = []
        for view, count in ((known, len(todo[0].train)), (asked, len(todo[0].test))):
            try:
                features = view[tap]
            except (DataError, IndexError) as error:
                raise DataError(f"tap {tap!r} of {view.name}: {error}") from None
            if len(features) != count:
                raise DataError(
                    f"tap {tap!r} of {view.name}: {len(features)} samples, but {count} labels; "
                    "extract them in one pass over the same loader."
                )
            widths.append(features.shape[1])
        if widths[0] != widths[1]:
            raise DataError(
                f"tap {tap!r}: train has {widths[0]} features a sample and test has {widths[1]}; "
                "extract both from the same model and image size."
            )


def few(task: Task, shots: int, draws: int, seed: int) -> list[Tensor]:
    """For each draw the rows of train with so many samples of each class.

    They are drawn from the samples that settings are not chosen on.

    Raises:
        DataError: A class has fewer.
    """
    labels = task.train.values[task.fit]
    counts = labels.bincount(minlength=task.train.outputs)
    if int(counts.min()) < shots:
        assert task.values is not None
        raise DataError(
            f"task {task.name!r}: {shots} samples of each class are asked for, but class "
            f"{int(task.values[counts.argmin()])} has {int(counts.min())} that settings are not "
            "chosen on. Ask for fewer shots, or hold out less."
        )
    found = []
    for draw in range(draws):
        members = shuffled_classes(labels, 1000 * seed + draw)
        found.append(task.fit[torch.cat([rows[:shots] for rows in members])])
    return found


def _task(name: str, train: Any, test: Any, rule: ProbeProtocol, seed: int) -> Task:
    where = "" if name == STORES else f"task {name!r}: "
    labels = [_given(f"{where}the {what}", y) for what, y in (("train", train), ("test", test))]
    known, asked = (as_targets(y - y.min() if _is_classes(y) else y, len(y)) for y in labels)
    if known.kind != asked.kind or (known.kind != "classes" and known.outputs != asked.outputs):
        raise DataError(
            f"{where}the train labels are {known.kind} {tuple(labels[0].shape)} and the test "
            f"labels {asked.kind} {tuple(labels[1].shape)}; give both in the same form."
        )
    basis = f"{rule.held_out:.0%} of train, held out"
    if known.kind == "classes":
        return _classes(name, where, labels, basis, rule, seed)
    try:
        if known.kind == "multilabel":
            fit, held = multilabel_split(known.values, rule.held_out, seed)
        else:
            fit, held = stratified_split(torch.zeros(len(known)).long(), rule.held_out, seed)
    except DataError as error:
        raise DataError(f"{where}{error}") from None
    if known.kind == "regression":  # in units of train, which changes no R²
        mean, std = known.values.double().mean(0), known.values.double().std(0, correction=0)
        std = std.masked_fill(std == 0, 1)
        known, asked = (replace(t, values=(t.values.double() - mean) / std) for t in (known, asked))
    for what, part in (("held-out", known[held]), ("test", asked)):
        values = part.values.double()
        if float(values.max() - values.min() if known.kind == "regression" else values.max()) == 0:
            nothing = (
                "no label occurs" if known.kind == "multilabel" else "all numbers are the same"
            )
            raise DataError(
                f"{where}{nothing} in the {len(part)} {what} samples, so nothing can be measured "
                "there; take more of them (held_out=), or another seed."
            )
    return Task(name, known, asked, fit, held, basis, None)


def _classes(
    name: str, where: str, labels: Sequence[Tensor], basis: str, rule: ProbeProtocol, seed: int
) -> Task:
    """Classes by any integers, as indices of those in train."""
    values, index = labels[0].unique(return_inverse=True)
    if len(values) == 1:
        raise DataError(
            f"{where}all training samples are of class {int(values[0])}; a probe needs two or more."
        )
    unseen = sorted(set(labels[1].tolist()) - set(values.tolist()))
    if unseen:
        raise DataError(
            f"{where}test samples are of {len(unseen)} classes that train lacks, e.g. "
            f"{unseen[:5]}; add such samples to train or leave them out of test."
        )
    known = Targets("classes", index, len(values))
    asked = Targets("classes", torch.searchsorted(values, labels[1]), len(values))
    fit, held = stratified_split(index, rule.held_out, seed)
    if bool((index.bincount() == 1).any()):
        basis += " (classes of one sample are not)"
    return Task(name, known, asked, fit, held, basis, values)


def _given(what: str, labels: Any) -> Tensor:
    """Labels on the CPU; bools `(N,)` are two classes."""
    if labels is None:
        raise DataError(f"{what} features have no labels, which probes need; give labels=...")
    try:
        found = torch.as_tensor(labels).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise DataError(
            f"{what} labels are no numbers; map them to integers, e.g. by their place in the "
            "sorted list of names."
        ) from None
    return found.long() if found.dtype == torch.bool and found.ndim == 1 else found


def _is_classes(labels: Tensor) -> bool:
    return labels.ndim == 1 and not labels.is_floating_point() and bool(labels.numel())
