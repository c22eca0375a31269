"""Doing a plan: one folder per run, each finished or resumable, then the results and the report.

runs/digits-resnet18-simclr/
    config.json                 what was asked for
    autoencoders/*.safetensors  pretrained once for each width
    simclr-seed0/               run.json, hits.npz, model.safetensors; checkpoint.ckpt until
    then results.json  report.html   rewritten after every run
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from headplug.autoencoder import Autoencoder, pretrain_autoencoder
from headplug.checkpoints import read_state_dict
from headplug.compare.augment import Views, statistics
from headplug.compare.backbones import build_backbone, stages
from headplug.compare.data import ImageData, load_data
from headplug.compare.machine import head_step_ms, machine, versions
from headplug.compare.plan import HeadChoice, Plan
from headplug.compare.recipes import recipe
from headplug.compare.report import write_report
from headplug.compare.summary import summarize
from headplug.compare.train import SSLModel, train
from headplug.device import pick_device
from headplug.errors import HeadplugError, RunError
from headplug.files import atomic
from headplug.heads import AEEmbeddingHead, create_head, describe_head
from headplug.probing import DEFINITIONS, probe_layers
from headplug.store import FeatureStore, extract_features
from headplug.swap import ANCHOR

Say = Callable[[str], None]


def compare(plan: Plan, say: Say = print, command: str = "") -> dict[str, Any]:
    """Trains, reads and probes every head of a plan, and writes results.json and report.html.

    Runs that are finished are not repeated and a run that was interrupted goes on after its last
    whole epoch. A run that fails is recorded, and the others go on.

    Args:
        plan: What to do.
        say: Told a line when something is done.
        command: What was typed, for the record.

    Returns:
        The content of results.json.

    Raises:
        RunError: The folder holds another comparison or cannot be written, or every run failed.
        HeadplugError: Data or backbone cannot be used.
    """
    data = load_data(
        plan.data, image_size=plan.image_size, limit=plan.limit, show_progress=_is_first()
    )
    with torch.random.fork_rng():
        job = _Job(plan, data, say, command)
        return job.run()


class _Job:
    """One comparison under way."""

    def __init__(self, plan: Plan, data: ImageData, say: Say, command: str) -> None:
        self.plan, self.data, self.command = plan, data, command
        self.say = say if _is_first() else lambda line: None
        self.recipe = recipe(plan.recipe)
        self.width = int(self._backbone(0).num_features)  # type: ignore[arg-type]
        self.failed: list[dict[str, Any]] = []
        mean, std = statistics(data.train.tensor(), plan.standardize)
        self.views = Views(data.train.shape, mean, std)

    def run(self) -> dict[str, Any]:
        self._claim_folder()
        for seed in self.plan.seeds:
            for choice in self.plan.choices:
                folder = self._folder(choice, seed)
                try:
                    if not (folder / "run.json").is_file():
                        self._run_one(choice, seed, folder)
                except HeadplugError as error:
                    self.failed.append({"head": choice.label, "seed": seed, "error": str(error)})
                    self.say(f"failed: {choice.label}, seed {seed}: {error}")
                if _is_first():
                    results = self._results()
                _wait()
        if not _is_first():
            return {}
        if not results["runs"]:
            raise RunError(f"every run failed; the first: {self.failed[0]['error']}")
        return results

    def _run_one(self, choice: HeadChoice, seed: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        autoencoder = self._autoencoder(choice)
        model = self._model(choice, seed, autoencoder)
        train(
            model,
            self.data.train,
            epochs=self.plan.epochs,
            batch_size=self.plan.batch_size,
            checkpoint=folder / "checkpoint.ckpt",
            label=f"{choice.label}, seed {seed}",
            devices=self.plan.devices,
            nodes=self.plan.nodes,
            precision=self.plan.precision,
            workers=self.plan.workers,
        )
        if not _is_first():
            return
        stores = self._features(model)
        report = probe_layers(*stores, probes=list(self.plan.probes), seed=seed)
        head = model.projection_head
        trainable = sum(p.numel() for p in head.parameters() if p.requires_grad)
        every = sum(t.numel() for t in (*head.parameters(), *head.buffers()))
        record: dict[str, Any] = {
            "head": choice.label,
            "head_config": head.config,
            "seed": seed,
            "train_images_per_s": model.images / model.seconds,
            "train_seconds": model.seconds,
            "head_params_trainable": trainable,
            "head_params_frozen": every - trainable,
            "losses": model.losses,
            "taps": report.rows,
            "spectra": report.spectra,
        }
        if autoencoder is not None:
            best = min(autoencoder.history, key=lambda h: h["val_loss"])
            record["autoencoder"] = {
                "val_mse": best["val_loss"], "epochs": len(autoencoder.history),
            }  # fmt: skip
        labels = stores[1].labels
        hits = {f"{t}|{p}": (v == labels).numpy() for (t, p), v in report.predictions.items()}
        self._finish(folder, model, hits, record)
        probe = self.plan.probes[-1]
        last = {r["tap"]: r["accuracy"] for r in report.rows if r["probe"] == probe}
        self.say(
            f"done: {choice.label}, seed {seed}: {record['train_images_per_s']:.0f} images/s, "
            f"{probe} accuracy {last['pre_projection']:.1%} before the head, "
            f"{last['projection']:.1%} after"
        )

    def _finish(
        self, folder: Path, model: SSLModel, hits: Mapping[str, Any], record: Mapping[str, Any]
    ) -> None:
        """Writes a run; run.json comes last, since it says that the others are there."""
        from safetensors.torch import save_file

        kept = ("backbone.", "projection_head.")
        weights = {k: v.contiguous() for k, v in model.state_dict().items() if k.startswith(kept)}
        with atomic(folder / "model.safetensors") as partial:
            save_file(weights, partial, metadata={"head": json.dumps(record["head_config"])})
        with atomic(folder / "hits.npz") as partial, partial.open("wb") as file:
            np.savez_compressed(file, **hits)
        _write_json(folder / "run.json", record)
        (folder / "checkpoint.ckpt").unlink(missing_ok=True)

    def _model(self, choice: HeadChoice, seed: int, autoencoder: Autoencoder | None) -> SSLModel:
        backbone = self._backbone(seed)
        options = {**choice.options, "input_dim": self.width}
        if autoencoder is not None:
            options["weights"] = autoencoder
        with _seeded(seed):
            head = create_head(options)
            model = SSLModel(backbone, head, self.recipe, self.views, self.plan.rate, seed)
        return model.to(memory_format=torch.channels_last)

    def _backbone(self, seed: int) -> nn.Module:
        with _seeded(seed):
            return build_backbone(self.plan.backbone, self.data.train.shape, self.plan.stem)

    def _autoencoder(self, choice: HeadChoice) -> Autoencoder | None:
        """The pretrained autoencoder that a head needs, from the folder if it is there."""
        if describe_head(choice.options["name"]).builder is not AEEmbeddingHead:
            return None
        latent = choice.options.get("embedding_dim", 256)
        path = self.plan.folder / "autoencoders" / f"latent{latent}-hidden{self.width}.safetensors"
        if not path.is_file() and _is_first():
            ae = pretrain_autoencoder(
                self.data.train.tensor(),
                latent,
                self.width,
                epochs=self.plan.ae_epochs,
                resume=path.with_suffix(".partial.pt"),
            )
            ae.save(path)
            self.say(f"done: autoencoder {latent}, validation MSE {_best_mse(ae):.4f}")
        _wait()
        return Autoencoder.load(path)

    def _features(self, model: SSLModel) -> tuple[FeatureStore, FeatureStore]:
        """Train and test features at every stage, before, inside and after the head."""
        head = dict(model.projection_head.named_modules())
        inner = [p for p in head if p.startswith("layers.") and p.count(".") == 1][:-1]
        at = [f"backbone.{s}" for s in stages(model.backbone)] + ["pre_projection"]
        at += [f"projection_head.{p}" for p in inner] + ["projection"]
        model.to(pick_device())
        found = []
        for images in (self.data.train, self.data.test):
            batches = BatchSampler(SequentialSampler(images), 512, drop_last=False)
            loader = DataLoader(
                images, batch_size=None, sampler=batches, num_workers=self.plan.workers
            )
            found.append(extract_features(model, loader, at, transform=self.views.plain))
        model.cpu()
        return found[0], found[1]

    def _results(self) -> dict[str, Any]:
        """Gathers what is finished, of this plan, and writes results.json and report.html."""
        folders = {
            (c.label, s): self._folder(c, s)
            for c in self.plan.choices
            for s in self.plan.seeds
            if (self._folder(c, s) / "run.json").is_file()
        }
        runs = [json.loads((f / "run.json").read_text()) for f in folders.values()]
        hits = {}
        for key, folder in folders.items():
            with np.load(folder / "hits.npz") as file:
                hits[key] = {tuple(name.rsplit("|", 1)): file[name] for name in file.files}
        heads = {
            r["head"]: _trained_head(f, r) for f, r in zip(folders.values(), runs, strict=True)
        }
        times = head_step_ms(heads, self.plan.batch_size)
        for run in runs:
            run["head_step_ms"] = times[run["head"]]
        default = self.recipe.default_head
        labels = [c.label for c in self.plan.choices]
        results = {
            "schema": 1,
            "command": self.command,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "config": {**self.plan.config, "default_head": default},
            "versions": versions(),
            "machine": machine(),
            "seeds": list(self.plan.seeds),
            "data": {
                "name": self.data.name,
                "train": len(self.data.train),
                "test": len(self.data.test),
                "classes": len(self.data.classes),
                "shape": list(self.data.train.shape),
                "fingerprint": self.data.fingerprint,
            },
            "runs": runs,
            "failed": self.failed,
            "summary": summarize(
                runs,
                hits,
                default_head=next((n for n in labels if n.partition("[")[0] == default), labels[0]),
                probes=list(self.plan.probes),
            ),
            "definitions": DEFINITIONS,
        }
        _write_json(self.plan.folder / "results.json", results)
        write_report(results, self.plan.folder / "report.html")
        return results

    def _folder(self, choice: HeadChoice, seed: int) -> Path:
        return self.plan.folder / f"{choice.slug}-seed{seed}"

    def _claim_folder(self) -> None:
        """Refuses a folder that holds a comparison with other settings."""
        path = self.plan.folder / "config.json"
        asked = {"fingerprint": self.plan.fingerprint, "data": self.data.fingerprint}
        if path.is_file():
            there = json.loads(path.read_text())
            if {k: there.get(k) for k in asked} != asked:
                config = self.plan.config
                differ = ", ".join(
                    f"{k} {v!r} there, {config[k]!r} now"
                    for k, v in there["config"].items()
                    if k in config and v != config[k]
                )
                raise RunError(
                    f"{self.plan.folder} holds another comparison ({differ or 'other data'}). Name "
                    "another folder with --out, or delete this one."
                )
        if _is_first():
            _write_json(path, {**asked, "config": self.plan.config})
        _wait()


def _trained_head(folder: Path, run: Mapping[str, Any]) -> nn.Module:
    """The head of a finished run."""
    prefix = "projection_head."
    state = read_state_dict(folder / "model.safetensors")
    head = create_head(run["head_config"])
    ours = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    head.load_state_dict({k: v for k, v in ours.items() if k != ANCHOR})
    return head


def _best_mse(ae: Autoencoder) -> float:
    return min(h["val_loss"] for h in ae.history)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _is_first() -> bool:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0


def _wait() -> None:
    """Until the other processes are here, if there are any."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic(path) as partial:
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", "utf-8")
