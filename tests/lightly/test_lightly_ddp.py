"""A lightly model with a swapped head on two processes, stopped and resumed, by Lightning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = '''
"""usage: script FOLDER EPOCHS [CHECKPOINT]: BYOL as in lightly's examples, on two processes."""
import copy
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import nn

from headplug.callbacks import HeadSwap

H, Z = 16, 8


class BYOL(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, H), nn.BatchNorm1d(H), nn.ReLU())
        self.projection_head = BYOLProjectionHead(H, 24, Z)
        self.prediction_head = BYOLPredictionHead(Z, 24, Z)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity()

    def training_step(self, batch, index):
        update_momentum(self.backbone, self.backbone_momentum, m=0.9)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
        first, second = batch
        p = [self.prediction_head(self.projection_head(self.backbone(x))) for x in batch]
        with torch.no_grad():
            z = [self.projection_head_momentum(self.backbone_momentum(x)) for x in batch]
        return (self.criterion(p[0], z[1]) + self.criterion(p[1], z[0])) / 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


class Views(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        return tuple(torch.randn(2, 12, generator=torch.Generator().manual_seed(i)))


if __name__ == "__main__":
    folder, epochs, *checkpoint = sys.argv[1:]
    torch.manual_seed(0)
    autoencoder = nn.Linear(H, 6)  # stands for a trained embedding layer
    model = BYOL()
    swap = HeadSwap("ae_embedding", weights=autoencoder)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=int(epochs), logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        use_distributed_sampler=True, callbacks=[swap],
    )
    loader = torch.utils.data.DataLoader(Views(), batch_size=8)
    trainer.fit(model, loader, ckpt_path=checkpoint[0] if checkpoint else None)
    trainer.save_checkpoint(Path(folder) / f"{epochs}{'-resumed' if checkpoint else ''}.ckpt")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    torch.save({"state": state, "weight": autoencoder.weight.detach()},
               Path(folder) / f"rank{trainer.global_rank}.pt")
'''


def run(script: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, str(script), str(script.parent), *arguments],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_frozen_embedding_head_trains_on_two_processes_and_resumes(tmp_path: Path) -> None:
    script = tmp_path / "byol.py"
    script.write_text(SCRIPT)
    run(script, "2")
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    first, second = (r["state"] for r in ranks)
    parameters = [k for k in first if "running" not in k and "batches" not in k]
    assert all(torch.equal(first[k], second[k]) for k in parameters)
    for head in ("projection_head", "projection_head_momentum"):
        embedding = first[f"{head}.layers.embedding.weight"]
        assert torch.equal(embedding, ranks[0]["weight"])
    output = "layers.output.weight"
    online, target = (first[f"projection_head{m}.{output}"] for m in ("", "_momentum"))
    assert online.isfinite().all()
    assert not torch.equal(online, target)
    run(script, "1")
    run(script, "2", str(tmp_path / "1.ckpt"))
    whole, resumed = (
        torch.load(tmp_path / name, weights_only=True)["state_dict"]
        for name in ("2.ckpt", "2-resumed.ckpt")
    )
    assert all(torch.equal(v, resumed[k]) for k, v in whole.items())
