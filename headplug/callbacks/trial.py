"""What is wrong with data and probes, as far as a batch of each data set can tell.

Training is long; what it would end on is better said before it starts.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headplug.errors import DataError
from headplug.probing.data import Targets, as_targets
from headplug.probing.probes import probes_of

SAMPLES = 12


def try_labels(found: Mapping[str, Tensor | None], probes: Any) -> None:
    """Refuses labels that probes cannot be fitted to.

    Whether there are two classes or more, and train has all of test, takes all labels to see.

    Args:
        found: Of a batch, by what data they are of.
        probes: As `probe_layers` takes them.

    Raises:
        DataError: They are missing, no labels, or differ in kind.
        OptionError: A setting is impossible, or a probe does not take labels of that kind.
    """
    forms = {}
    for what, labels in found.items():
        if labels is None:
            raise DataError(
                f"the {what} data of LayerProbe have no labels, which probes need; let each "
                "batch be (images, labels)."
            )
        forms[what] = _form(what, labels)
    if len(set(forms.values())) > 1:
        said = " and ".join(f"the {what} labels are {_words(*f)}" for what, f in forms.items())
        raise DataError(f"{said}; give LayerProbe both in the same form.")
    for kind, outputs in set(forms.values()):
        _try_probes(probes, kind, outputs)


def _form(what: str, labels: Tensor) -> tuple[Any, int]:
    """Kind of labels, and how many a sample has."""
    if labels.ndim == 1 and not labels.is_floating_point():
        return "classes", 1  # from whatever number
    try:
        targets = as_targets(labels, len(labels))
    except DataError as error:
        raise DataError(f"the {what} data of LayerProbe: {error}") from None
    return targets.kind, targets.outputs


def _words(kind: str, outputs: int) -> str:
    forms = {"classes": "(N,) integers", "multilabel": f"(N, {outputs}) of 0 and 1"}
    return f"{kind}, {forms.get(kind, f'(N, {outputs}) floats')}"


def _try_probes(probes: Any, kind: Any, outputs: int) -> None:
    """Fits every probe to a few made-up samples, for a step where it takes steps."""
    x = torch.eye(SAMPLES, dtype=torch.float32, device="cpu")
    values = torch.arange(SAMPLES, device="cpu") % 2
    if kind != "classes":
        values = values[:, None].expand(-1, outputs)
        values = values.bool() if kind == "multilabel" else values.float()
    targets = Targets(kind, values, 2 if kind == "classes" else outputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for probe in probes_of(probes).values():
            short = replace(probe, training=replace(probe.training, max_steps=1))
            pair = (x, targets) if probe.training.keep_best else None
            short.fit(x, targets, validation=pair)(x)
