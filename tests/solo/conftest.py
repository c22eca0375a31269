"""Real runs of solo-learn's own scripts, each in a process of its own, on a handful of images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CLONE = os.environ.get("SOLO_LEARN_HOME", "")
CIFAR = Path("scripts", "pretrain", "cifar")
H, AE, O = 512, 12, 8  # noqa: E741 - widths: features, embedding, projection

# What a user's machine has and this one lacks (a GPU, torchmetrics < 0.12), the same random state
# at the start of every epoch, and a record of what each rank trained.
SHIM = """
import atexit, gc, json, os, sys
if os.environ.get("WITHOUT_HEADPLUG"):
    sys.path[:] = [p for p in sys.path if not p.endswith("adapters")]
class Late:
    def find_spec(self, name, path=None, target=None):
        if name == "solo":
            sys.meta_path.remove(self)
            import random, numpy, torch, torchmetrics.metric
            torch.Tensor.cuda = lambda self, *_, **__: self
            for kind in (torch.Tensor, torch.nn.Module):
                kind.to = on_cpu(kind.to)
            init = torchmetrics.metric.Metric.__init__
            def without(self, compute_on_step=None, **k): init(self, **k)
            if not os.environ.get("NEW_TORCHMETRICS"):
                torchmetrics.metric.Metric.__init__ = without
            iterate = torch.utils.data.DataLoader.__iter__
            def seeded(self):
                torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
                return iterate(self)
            torch.utils.data.DataLoader.__iter__ = seeded
            if "RECORD" in os.environ:
                atexit.register(record)
        return None
def on_cpu(to):
    return lambda self, *a, **k: self if a and a[0] == "cuda:0" else to(self, *a, **k)
def record():
    import torch
    rank = os.environ.get("LOCAL_RANK", "0")
    models = [o for o in gc.get_objects() if hasattr(type(o), "momentum_pairs")
              or hasattr(type(o), "learnable_params")]
    state = {k: [str(type(m.projector).__name__), float(sum(p.double().sum() for p in
             m.projector.parameters()))] for m in models for k in [type(m).__name__]}
    with open(os.path.join(os.environ["RECORD"], rank + ".json"), "w") as file:
        json.dump({"argv": sys.argv[:1], "heads": state}, file)
sys.meta_path.insert(0, Late())
"""


class Work:
    """A folder with images, an autoencoder and what runs leave, and the means to start them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        generator = torch.Generator().manual_seed(0)
        save_images(folder)
        self.embedding = torch.randn(AE, H, generator=generator) / 20
        torch.save({"embedding.weight": self.embedding, "embedding.bias": torch.zeros(AE)},
                   folder / "ae.pt")  # fmt: skip
        (folder / "shim").mkdir()
        (folder / "shim" / "sitecustomize.py").write_text(SHIM)

    def run(self, *command: str, **environment: str) -> Any:
        paths = [self.folder / "shim", ROOT, ROOT / "adapters"]
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(map(str, paths)),
                "PYTHONWARNINGS": "ignore",
                "OMP_NUM_THREADS": "1",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )

    def pretrain(
        self,
        name: str,
        out: str,
        *options: str,
        launch: tuple[str, ...] = (),
        configs: Path = CIFAR,
        devices: int = 1,
        fails: bool = False,
        **environment: str,
    ) -> Any:
        """One run of main_pretrain.py."""
        command = self.pretraining(name, out, *options, configs=configs, devices=devices)
        done = self.run(*launch, *command, **environment)
        assert (done.returncode != 0) == fails, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    def pretraining(
        self, name: str, out: str, *options: str, configs: Path = CIFAR, devices: int = 1
    ) -> list[str]:
        """The command line of a run, with the overrides that a small machine needs."""
        return [
            str(Path(CLONE, "main_pretrain.py")),
            *("--config-path", str(configs), "--config-name", f"{name}.yaml"),
            *[o for o in options if o.startswith("--")],
            *("data.dataset=custom", "data.num_workers=0", "optimizer.batch_size=8"),
            *(f"data.train_path={self.folder / 'train'}", f"data.val_path={self.folder / 'val'}"),
            *("accelerator=cpu", "precision=32", "sync_batchnorm=False", "wandb.enabled=False"),
            *(f"devices='{devices}'", f"strategy={'ddp' if devices > 1 else 'auto'}"),
            *("method_kwargs.proj_hidden_dim=16", f"method_kwargs.proj_output_dim={O}"),
            *("max_epochs=1", f"checkpoint.dir={self.folder / out}", "+enable_progress_bar=False"),
            *("+limit_train_batches=2", "+limit_val_batches=1", "+num_sanity_val_steps=0"),
            *("+enable_model_summary=False", "auto_resume.enabled=False"),
            *[o for o in options if not o.startswith("--")],
        ]

    def evaluate(self, script: str, *arguments: str, **environment: str) -> Any:
        """One run of another script of solo-learn's, through the launcher."""
        return self.run("-m", "headplug_solo", str(Path(CLONE, script)), *arguments, **environment)

    def read(self, out: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """args.json and the last checkpoint of every run under a folder, oldest first."""
        found = sorted((self.folder / out).glob("*/*/args.json"), key=os.path.getmtime)
        return [
            (json.loads(a.read_text()), torch.load(self.last(a.parent), weights_only=True))
            for a in found
        ]

    @staticmethod
    def last(folder: Path) -> Path:
        return max(folder.glob("*.ckpt"), key=os.path.getmtime)

    def records(self, out: str) -> list[dict[str, Any]]:
        """What the ranks of a run wrote at their end."""
        files = sorted((self.folder / out).glob("*.json"))
        return [json.loads(f.read_text()) for f in files]


def save_images(folder: Path) -> None:
    """Scanned digits as 32 x 32 RGB images: four per class and split."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits, labels = load_digits(return_X_y=True)
    for label in range(5):
        for i, digit in enumerate(digits[labels == label][:8].reshape(-1, 8, 8)):
            path = folder / ("train", "val")[i // 4] / f"class{label}" / f"{i % 4}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = Image.fromarray((digit * 15).astype("uint8"))
            grey.resize((32, 32)).convert("RGB").save(path)


@pytest.fixture(scope="module")
def work() -> Iterator[Work]:
    with tempfile.TemporaryDirectory() as folder:  # gigabytes of checkpoints: nothing is kept
        yield Work(Path(folder).resolve())
