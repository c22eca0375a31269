"""LayerProbe on solo-learn's methods, in a process of its own.

The release needs other versions of its libraries than the rest, so this file also runs as a script:
`test_layers_solo.py VERSION`, with solo-learn first on PYTHONPATH and one JSON object as the last
line of its output.
"""

from __future__ import annotations

import json
import random
import runpy
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

METHODS = {"release": ["simclr", "byol"], "main": ["dino"]}
POINTS = ["backbone", "pre_projection", "projection"]


def assert_probed(found: dict[str, Any], version: str) -> None:
    for method in METHODS[version]:
        one = found[method]
        assert one["same"], f"{method}: training differs with the callback"
        assert [row["step"] for row in one["history"]] == [2, 4]
        assert one["history"][-1].items() >= one["by hand"].items()
        assert one["shown"] == pytest.approx(one["by hand"])
        assert one["written"] == pytest.approx(one["by hand"])
        assert one["kept"] == pytest.approx(max(r["probe/gap/knn"] for r in one["history"]))


@pytest.mark.slow
def test_released_methods_are_probed_while_they_train(
    run_on_solo: Callable[[str, str], dict[str, Any]],
) -> None:
    assert_probed(run_on_solo(__file__, "release"), "release")


@pytest.mark.slow
def test_methods_of_main_are_probed_while_they_train(
    run_on_solo: Callable[[str, str], dict[str, Any]],
) -> None:
    assert_probed(run_on_solo(__file__, "main"), "main")


def train(build: Callable[..., Any], pl: Any, views: Any, method: str) -> dict[str, Any]:
    """What training gives with the callback, and whether it is what it gives without."""
    import csv

    import numpy
    import torch

    from headplug import extract_features, probe_layers
    from headplug.callbacks import LayerProbe

    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(40) % 5
    images = torch.rand(40, 3, 8, 8, generator=generator) + labels[:, None, None, None] / 5
    train_data, test_data = (
        torch.utils.data.TensorDataset(images[part], labels[part])
        for part in (slice(0, 25), slice(25, 40))
    )

    def run(folder: Path, *callbacks: Any) -> Any:
        torch.manual_seed(0)
        numpy.random.seed(0)
        random.seed(0)
        model = build(method, steady=True)  # for two epochs
        trainer = pl.Trainer(
            max_epochs=2, accelerator="cpu", logger=pl.loggers.CSVLogger(folder, "", ""),
            enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
            log_every_n_steps=1,
        )  # fmt: skip
        trainer.fit(model, views(2))
        state = [model.state_dict(), [o.state_dict() for o in trainer.optimizers]]
        modules = [
            (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()
        ]
        random_state = [torch.get_rng_state(), list(numpy.random.get_state()[1]), random.random()]
        return model, trainer, [state, modules, random_state]

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        watched = "probe/gap/knn"
        layers = LayerProbe(train_data, test_data, max_fraction_of_time=None)
        keep = pl.callbacks.ModelCheckpoint(folder / "kept", monitor=watched, mode="max")
        _, _, without = run(folder / "without")
        model, trainer, with_it = run(folder / "with", layers, keep)
        with next((folder / "with").rglob("metrics.csv")).open() as file:
            rows = [row for row in csv.DictReader(file) if row.get(watched)]
    stores = [
        extract_features(model, torch.utils.data.DataLoader(d, batch_size=256), POINTS)
        for d in (train_data, test_data)
    ]
    report = probe_layers(*stores, probes=["knn"], device="cpu")
    by_hand = {f"probe/{r['tap']}/knn_accuracy": r["accuracy"] for r in report.rows}
    by_hand |= {f"probe/{r['tap']}/rankme": r["rankme"] for r in report.spectra}
    shown = trainer.callback_metrics
    return {
        "same": equal(without, with_it),
        "history": layers.history,
        "by hand": by_hand,
        "shown": {k: float(shown[k]) for k in by_hand},
        "written": {k: float(rows[-1][k]) for k in by_hand},
        "kept": float(keep.best_model_score),
    }


def equal(one: Any, other: Any) -> bool:
    import torch

    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    own = Path(__file__).resolve().parents[1] / "solo" / "test_solo_methods.py"
    methods = runpy.run_path(str(own))
    if sys.argv[1] == "release":
        import numpy
        import pytorch_lightning as pl

        numpy.Inf = numpy.inf  # for Lightning 1.9's ModelCheckpoint
        methods["apply_shims"](pl)
        make = methods["released"]
    else:
        import lightning.pytorch as pl  # type: ignore[no-redef]

        make = methods["of_main"]
    given = {name: train(make, pl, methods["views"], name) for name in METHODS[sys.argv[1]]}
    print(json.dumps(given))
