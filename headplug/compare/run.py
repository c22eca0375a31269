"""One run: a head and a seed, trained, read at every layer and probed.

Its folder holds run.json (the record) and model.safetensors (backbone and head); checkpoint.ckpt
until it is finished. run.json is written last, so that it says that the other is there.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from headplug.autoencoder import Autoencoder, pretrain_autoencoder
from headplug.compare.augment import Views, statistics
from headplug.compare.backbones import as_pretrained, build_backbone, stages
from headplug.compare.data import ImageData
from headplug.compare.plan import HeadChoice, Plan
from headplug.compare.processes import is_first, wait
from headplug.compare.recipes import recipe
from headplug.compare.saved import HEAD, RECORD, WEIGHTS
from headplug.compare.summary import as_record, headline
from headplug.compare.train import EpochBatches, SSLModel, train
from headplug.device import pick_device
from headplug.files import atomic, write_json
from headplug.heads import AEEmbeddingHead, create_head, describe_head
from headplug.heads.parameters import count
from headplug.probing import LayerReport, probe_layers
from headplug.store import FeatureStore, extract_features


class Runner:
    """Does the runs of a plan on its data.

    Args:
        plan: The plan.
        data: Its images.

    Raises:
        UnknownNameError, OptionError: The backbone does not exist or cannot take the images, or
            these do not fill a batch.
        DimensionError: A head does not fit the backbone's width.
    """

    def __init__(self, plan: Plan, data: ImageData) -> None:
        self.plan, self.data = plan, data
        EpochBatches(len(data.train), plan.batch_size, world_size=plan.devices * plan.nodes)
        backbone = self._backbone(0)
        self.width = int(backbone.num_features)  # type: ignore[arg-type]
        for choice in plan.choices:
            choice.check(self.width)
        moments = self._moments(backbone)
        channels = data.train.shape[0]
        self.views = Views(
            data.train.shape, *(moments or (torch.zeros(channels), torch.ones(channels)))
        )
        given = [m.tolist() for m in moments] if moments else ((), ())
        self.seen = dict(zip(("image_mean", "image_std"), given, strict=True))

    def __call__(self, choice: HeadChoice, seed: int, folder: Path) -> str:
        """Does one run, or goes on with it.

        Returns:
            A line on how it went, on the first process.

        Raises:
            RunError: The loss stopped being finite, or the folder cannot be written.
        """
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
        if not is_first():  # the features of all layers are kept once, not by each process
            return ""
        learned, tested = self._features(model)
        report = probe_layers(
            learned,
            tested,
            probes=list(self.plan.probes),
            protocol=self.plan.protocol,
            seed=seed,
            show_progress=True,
        )
        trainable, frozen = count(model.projection_head)
        record: dict[str, Any] = {
            "head": choice.label,
            "head_config": model.projection_head.config,
            "seed": seed,
            "train_images_per_s": model.images / model.seconds,
            "train_seconds": model.seconds,
            "head_params_trainable": trainable,
            "head_params_frozen": frozen,
            "losses": model.losses,
            **self.seen,
            **as_record(report),
        }
        if autoencoder is not None:
            losses = [epoch["val_loss"] for epoch in autoencoder.history]
            record["autoencoder"] = {"val_mse": min(losses), "epochs": len(losses)}
        _finish(folder, model, record)
        return f"{record['train_images_per_s']:.0f} images/s, {_before_and_after(report)}"

    def _moments(self, backbone: nn.Module) -> tuple[Tensor, Tensor] | None:
        """Mean and deviation of each channel that images are normalised with, if they are."""
        if (
            self.plan.standardize
        ):  # of at most 10,000 images, so that they need not all be in memory
            total = len(self.data.train)
            rows = torch.linspace(0, total - 1, min(total, 10_000)).long()
            return statistics(self.data.train[rows][0])
        if self.plan.standardize is None and self.plan.pretrained:
            return as_pretrained(backbone, self.data.train.shape[0])
        return None

    def _model(self, choice: HeadChoice, seed: int, autoencoder: Autoencoder | None) -> SSLModel:
        options = {**choice.options, "input_dim": self.width}
        if autoencoder is not None:
            options["weights"] = autoencoder
        backbone = self._backbone(seed)
        with _seeded(seed):
            head = create_head(options)
            if hasattr(head, "init_centers"):
                head.init_centers(self._first_features(backbone), seed)  # type: ignore[operator]
            model = SSLModel(
                backbone, head, recipe(self.plan.recipe), self.views, self.plan.rate, seed
            )
        return model.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def _first_features(self, backbone: nn.Module) -> Tensor:
        """What the untrained backbone gives for some training images, spread over the data."""
        total = len(self.data.train)
        rows = torch.linspace(0, total - 1, min(total, 2048)).long()
        batches = (self.data.train[r][0] for r in rows.split(512))
        backbone = copy.deepcopy(backbone).train()  # batch statistics, as in the first step
        return torch.cat([backbone(self.views.plain(images)) for images in batches])

    def _backbone(self, seed: int) -> nn.Module:
        with _seeded(seed):
            return build_backbone(
                self.plan.backbone, self.data.train.shape, self.plan.stem, self.plan.pretrained
            )

    def _autoencoder(self, choice: HeadChoice) -> Autoencoder | None:
        """The pretrained autoencoder that a head needs, from the folder if it is there."""
        if describe_head(choice.options["name"]).builder is not AEEmbeddingHead:
            return None
        latent = choice.options.get("embedding_dim", 256)
        path = self.plan.folder / "autoencoders" / f"latent{latent}-hidden{self.width}.safetensors"
        if not path.is_file() and is_first():
            pretrain_autoencoder(
                self.data.train.tensor(),
                latent,
                self.width,
                epochs=self.plan.ae_epochs,
                resume=path.with_suffix(".partial.pt"),
            ).save(path)
        wait()
        return Autoencoder.load(path)

    def _features(self, model: SSLModel) -> tuple[FeatureStore, FeatureStore]:
        """Train and test features at every stage, before, inside and after the head."""
        inner = [f"{HEAD}{p}" for p, _ in model.projection_head.named_modules() if "." in p]
        at = [f"backbone.{s}" for s in stages(model.backbone)]
        at += ["pre_projection", *inner[:-1], "projection"]
        model.to(pick_device())
        found = []
        for images in (self.data.train, self.data.test):
            batches = BatchSampler(SequentialSampler(images), 512, drop_last=False)
            loader = DataLoader(
                images, batch_size=None, sampler=batches, num_workers=self.plan.workers
            )
            found.append(
                extract_features(
                    model,
                    loader,
                    at,
                    transform=self.views.plain,
                    distributed=False,
                    show_progress=True,
                )
            )
        model.cpu()
        # A ResNet's last stage, averaged, is the representation itself: once is enough.
        learned = found[0]
        at = [
            p
            for p in at
            if not (p.startswith("backbone.") and _close(learned[p], learned["pre_projection"]))
        ]
        rows = (self.data.train.rows, self.data.test.rows)
        train, test = (
            FeatureStore.from_tensors({p: s[p] for p in at}, s.labels, ids)
            for s, ids in zip(found, rows, strict=True)
        )
        return train, test


def _finish(folder: Path, model: SSLModel, record: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    state = model.state_dict()
    weights = {k: v.contiguous() for k, v in state.items() if k.startswith(("backbone.", HEAD))}
    with atomic(folder / WEIGHTS) as partial:
        save_file(weights, partial, metadata={"head": json.dumps(record["head_config"])})
    write_json(folder / RECORD, record)
    (folder / "checkpoint.ckpt").unlink(missing_ok=True)


def _before_and_after(report: LayerReport) -> str:
    probe = headline([r["probe"] for r in report.rows])
    found = {r["tap"]: r["accuracy"] for r in report.rows if r["probe"] == probe}
    before, after = found["pre_projection"], found["projection"]
    return f"{probe} accuracy {before:.1%} before the head, {after:.1%} after it"


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
