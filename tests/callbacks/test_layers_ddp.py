"""LayerProbe on two processes of Lightning's ddp strategy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from headplug import extract_features, probe_layers

SCRIPT = '''
"""usage: script FOLDER: SimCLR as in lightly's examples, on two processes."""
import json
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from headplug.callbacks import LayerProbe

POINTS = ["backbone", "pre_projection", "projection"]


class SimCLR(pl.LightningModule):
    def __init__(self):
        super().__init__()
        layers = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12)
        self.backbone = nn.Sequential(*layers)
        self.projection_head = SimCLRProjectionHead(12, 16, 8)
        self.criterion = NTXentLoss(gather_distributed=True)
        self.side = nn.Identity()
        self.factor = 1.0

    def forward(self, x):
        self.side(x * self.factor)
        return self.projection_head(self.backbone(x))

    def training_step(self, batch, index):
        return self.criterion(*[self(batch[0] + torch.randn_like(batch[0])) for _ in range(2)])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    return TensorDataset(torch.randn(count, 6, generator=generator) + labels[:, None], labels)


class Padded:
    """A loader that is made once the processes know each other, its samples shared and padded."""

    def __call__(self):
        return DataLoader(data(61, 0), batch_size=8, sampler=DistributedSampler(data(61, 0)))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    model = SimCLR()
    test = DataLoader(data(31, 1), batch_size=8, shuffle=True)
    layers = {
        "every": LayerProbe(Padded(), test, max_fraction_of_time=None, name="every"),
        # what the second process finds is not asked
        "first has time": LayerProbe(Padded(), test, every_n_steps=2, name="time"),
        "second has time": LayerProbe(data(61, 0), test, every_n_steps=2, name="no time"),
        "half": LayerProbe(data(61, 0), test, ["backbone", "side"], name="half"),
    }
    keep = pl.callbacks.ModelCheckpoint(folder, monitor="every/gap/knn", mode="max")

    class Clocks(pl.Callback):
        def on_train_start(self, trainer, module):
            own = trainer.global_rank == 0
            layers["first has time"]._budget.fraction = 1.0 if own else 1e-9
            layers["second has time"]._budget.fraction = 1e-9 if own else 1.0
            layers["half"]._budget.fraction = None

        def on_train_epoch_end(self, trainer, module):
            module.factor = float("nan") if trainer.current_epoch else 1.0

    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Clocks(), *layers.values(), keep],
    )
    trainer.fit(model, DataLoader(data(64, 0), batch_size=8))
    found = {
        "history": {k: v.history for k, v in layers.items()},
        "rows": [row["accuracy"] for row in layers["every"].report.rows],
        "best": str(keep.best_model_path),
        "shown": {k: float(v) for k, v in trainer.callback_metrics.items()},
    }
    rank = trainer.global_rank
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    if rank == 0:
        torch.save(model.state_dict(), folder / "model.pt")

    # a list of batches has no ids, so nothing tells which samples two processes share
    batches = [(torch.randn(4, 6), torch.arange(4))]
    refused = {"ids": LayerProbe(batches, batches), "point": LayerProbe(test, test, "b")}
    for what, one in refused.items():
        try:
            trainer.callbacks = [one]
            trainer.fit(SimCLR(), DataLoader(data(64, 0), batch_size=8))
        except Exception as error:
            (folder / f"{what}{rank}.txt").write_text(f"{type(error).__name__}: {error}")
'''


@pytest.mark.slow
def test_two_processes_log_what_one_would_and_skip_together(tmp_path: Path) -> None:
    script = tmp_path / "simclr.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1)]

    def values(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    histories = [{k: values(v) for k, v in rank["history"].items()} for rank in ranks]
    half = [h.pop("half") for h in histories]
    assert repr(half[0]) == repr(half[1])
    side = {"half/side/knn_accuracy", "half/side/rankme"}
    lost = [{n for n, v in row.items() if v != v} for row in half[0]]
    assert lost == [set(), side]
    assert histories[0] == histories[1]
    assert [row["step"] for row in histories[0]["every"]] == [4, 8]
    assert [row["step"] for row in histories[0]["first has time"]] == [2, 4, 6, 8]
    assert [row["step"] for row in histories[0]["second has time"]] == [2]
    for key in ("rows", "best", "shown"):
        assert ranks[0][key] == ranks[1][key], key

    namespace: dict[str, Any] = {"__name__": "script"}
    exec(SCRIPT, namespace)
    model = namespace["SimCLR"]()
    model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    stores = [
        extract_features(
            model, torch.utils.data.DataLoader(namespace["data"](*d)), namespace["POINTS"]
        )
        for d in ((61, 0), (31, 1))
    ]
    assert len(stores[0]) == 61
    report = probe_layers(*stores, probes=["knn"], device="cpu")
    last = histories[0]["every"][-1]
    for row in report.rows:
        assert last[f"every/{row['tap']}/knn_accuracy"] == row["accuracy"]
    for row in report.spectra:
        assert last[f"every/{row['tap']}/rankme"] == pytest.approx(row["rankme"], rel=1e-4)

    said = {p.stem: p.read_text() for p in tmp_path.glob("*.txt")}
    assert all("whose samples have no ids" in said[f"ids{r}"] for r in (0, 1))
    assert all("no tap is called 'b'" in said[f"point{r}"] for r in (0, 1)), said
