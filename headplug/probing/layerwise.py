"""Every probe at every tap, with hyper-parameters chosen without a look at the test labels.

Everything is checked before the first probe runs; settings are chosen on a stratified held-out part
of the training samples, the probe is then fitted to all of them and meets the test samples once.
The caller's random state, grad mode, default type and device stay as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from headplug.device import pick_device
from headplug.errors import DataError, OptionError, unknown
from headplug.probing.data import check_features, stratified_split
from headplug.probing.knn import knn_grid, knn_predict
from headplug.probing.linear import fit_linear, linear_grid
from headplug.probing.report import LayerReport, wilson_interval
from headplug.probing.ridge import fit_ridge, ridge_grid
from headplug.probing.spectrum import spectrum
from headplug.progress import progress


class Features(Protocol):
    """Features by tap, with labels: what `FeatureStore` offers."""

    @property
    def points(self) -> Sequence[str]:
        """Tap names in depth order."""

    @property
    def labels(self) -> Tensor | None:
        """Class of each sample `(N,)`."""

    def __getitem__(self, point: str, /) -> Tensor:
        """Features of one tap `(N, D)`."""


class _Split(NamedTuple):
    """Samples to fit on and samples to predict."""

    features: Tensor
    labels: Tensor  # indices into the classes
    queries: Tensor
    classes: int


class _Probe(NamedTuple):
    """Its grid for a number of training samples, and its predictions `(S, M)` for settings."""

    grid: Callable[[int], Sequence[Any]]
    predict: Callable[[_Split, Sequence[Any], int], Tensor]


PROBES = {
    "knn": _Probe(
        lambda count: [s for s in knn_grid() if s.k <= count],
        lambda s, grid, seed: knn_predict(
            s.features, s.labels, s.queries, grid, num_classes=s.classes
        ),
    ),
    "linear": _Probe(
        lambda count: linear_grid(),
        lambda s, grid, seed: fit_linear(
            s.features, s.labels, grid, num_classes=s.classes, seed=seed
        ).predict(s.queries),
    ),
    "ridge": _Probe(
        lambda count: ridge_grid(),
        lambda s, grid, seed: fit_ridge(s.features, s.labels, grid, num_classes=s.classes).predict(
            s.queries
        ),
    ),
}


@torch.no_grad()
def probe_layers(
    train: Features,
    test: Features,
    probes: Sequence[str] = ("knn", "linear", "ridge"),
    *,
    held_out: float = 0.2,
    seed: int = 0,
    device: str | torch.device = "auto",
    show_progress: bool = False,
) -> LayerReport:
    """Classifies the features of every tap with every probe and reports test accuracies.

    Grids: kNN with k 1 to 200 on cosine similarity (four temperatures) and Euclidean distance
    (equal votes); linear with six learning rates and three weight decays; ridge with twelve
    penalties. Of settings that do equally well the first in the grid is taken. A tap whose features
    are all the same is probed like any other, with a warning: its rows show what guessing gives.

    Args:
        train: Features to fit on and to choose settings on, e.g. a `FeatureStore`.
        test: Features to report accuracies on, of the same taps.
        probes: Any of "knn", "linear", "ridge".
        held_out: Part of each class of `train` that settings are chosen on. A class of one sample
            is not held out; the rows' `selected_on` then says so.
        seed: Of the part held out and of the order of training.
        device: "auto" takes a GPU where there is one.
        show_progress: Whether to show a progress bar.

    Raises:
        DataError: Labels are missing, of one class, unseen in training or too few; taps, widths or
            numbers of samples differ; features are not finite. The message names the tap.
        UnknownNameError: There is no such probe.
        OptionError: `held_out` is not between 0 and 1, or no probe is named.

    >>> class Store(dict):
    ...     points, labels = ["h"], torch.tensor([0, 1]).repeat(20)
    >>> store = Store(h=torch.eye(2).repeat(20, 1))
    >>> probe_layers(store, store, ["ridge"], device="cpu")
    LayerReport(1 taps, best 'h' with ridge: 100.0 [91.2, 100.0])
    """
    probes = [probes] if isinstance(probes, str) else list(dict.fromkeys(probes))
    for name in probes:
        if name not in PROBES:
            raise unknown("probe", str(name), PROBES)
    if not probes:
        raise OptionError(f"name at least one probe of {', '.join(PROBES)}.")
    if not 0 < held_out < 1:
        raise OptionError(f"held_out must lie between 0 and 1, not at {held_out!r}.")
    values, targets, answers = _labels(train, test)
    _check_taps(train, test, len(targets), len(answers))
    fit, held = stratified_split(targets, held_out, seed)
    selected_on = f"{held_out:.0%} of train, held out"
    if bool((targets.bincount() == 1).any()):
        selected_on += " (classes of one sample are not)"

    place = pick_device(device)
    fit, held, targets = fit.to(place), held.to(place), targets.to(place)
    report = LayerReport([], [])
    total = len(train.points) * len(probes)
    with (
        torch.autocast(place.type, enabled=False),
        progress("probes", total, show=show_progress) as advance,
    ):
        for tap in train.points:
            known, queries = (check_features(store[tap]).to(place) for store in (train, test))
            choosing = _Split(known[fit], targets[fit], known[held], len(values))
            final = _Split(known, targets, queries, len(values))
            report.spectra.append({"tap": tap, **spectrum(known)})
            if report.spectra[-1]["effective_rank"] == 0:
                warnings.warn(
                    f"tap {tap!r} is constant; its rows show what guessing gives.", stacklevel=2
                )
            for name in probes:
                grid = PROBES[name].grid(len(fit))
                scores = _accuracies(PROBES[name].predict(choosing, grid, seed), targets[held])
                chosen = int(scores.argmax())
                predicted = PROBES[name].predict(final, [grid[chosen]], seed)[0].cpu()
                accuracy = float(_accuracies(predicted[None], answers)[0])
                low, high = wilson_interval(accuracy, len(answers))
                report.predictions[tap, name] = values[predicted]
                report.rows.append(
                    {
                        "tap": tap,
                        "probe": name,
                        "setting": grid[chosen]._asdict(),
                        "accuracy": accuracy,
                        "low": low,
                        "high": high,
                        "val_accuracy": float(scores[chosen]),
                        "selected_on": selected_on,
                        "n_test": len(answers),
                    }
                )
                advance(tap)
    return report


def _accuracies(predicted: Tensor, labels: Tensor) -> Tensor:
    """Of each row, in float64; -1 for a setting that overflowed, so that it never wins."""
    hits = (predicted == labels).sum(dim=1).double() / len(labels)
    return hits.masked_fill((predicted < 0).any(dim=1), -1.0)


def _labels(train: Features, test: Features) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct training labels, and both sets of labels as indices into them, on the CPU."""
    given = []
    for what, store in {"train": train, "test": test}.items():
        if store.labels is None:
            raise DataError(
                f"the {what} features have no labels, which probes need; give labels=..."
            )
        labels = store.labels.detach().cpu()
        if labels.ndim != 1 or not len(labels) or labels.is_floating_point():
            raise DataError(
                f"the {what} labels must be integers of shape (N,), not {labels.dtype} of shape "
                f"{tuple(labels.shape)}."
            )
        given.append(labels.long())
    values, targets = given[0].unique(return_inverse=True)
    if len(values) == 1:
        raise DataError(
            f"all training samples are of class {int(values[0])}; a probe needs two or more."
        )
    unseen = sorted(set(given[1].tolist()) - set(values.tolist()))
    if unseen:
        raise DataError(
            f"test samples are of {len(unseen)} classes that train lacks, e.g. {unseen[:5]}; add "
            "such samples to train or leave them out of test."
        )
    return values, targets, torch.searchsorted(values, given[1])


def _check_taps(train: Features, test: Features, train_count: int, test_count: int) -> None:
    """Raises what is wrong with any tap, before any is probed."""
    if not train.points:
        raise DataError("the training features have no taps; extract at least one.")
    if set(train.points) != set(test.points):
        one, other = set(train.points), set(test.points)
        raise DataError(
            f"taps differ: only train has {sorted(one - other)}, only test has "
            f"{sorted(other - one)}. Extract both with the same `at=`."
        )
    for tap in train.points:
        widths = []
        for what, store, count in (("train", train, train_count), ("test", test, test_count)):
            try:
                features = check_features(store[tap])
            except DataError as error:
                raise DataError(f"tap {tap!r} of {what}: {error}") from None
            if len(features) != count:
                raise DataError(
                    f"tap {tap!r} of {what}: {len(features)} samples, but {count} labels; extract "
                    "them in one pass over the same loader."
                )
            widths.append(features.shape[1])
        if widths[0] != widths[1]:
            raise DataError(
                f"tap {tap!r}: train has {widths[0]} features a sample and test has {widths[1]}; "
                "extract both from the same model and image size."
            )
