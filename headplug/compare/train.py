"""One training run: a backbone and a head, an SSL loss, Lightning underneath.

Batches are drawn from (seed, epoch) and views from (seed, step), so that runs with the same seed
see the same images whatever their head, and a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from headplug.compare.augment import Views
from headplug.compare.recipes import Recipe
from headplug.errors import OptionError, RunError
from headplug.files import atomic, load_tensors
from headplug.heads import create_head
from headplug.progress import progress
from headplug.swap import build_twin


class SSLModel(pl.LightningModule):
    """A backbone, a projection head and what the recipe puts behind it.

    Args:
        backbone: Maps images to `(batch, input_dim)`.
        head: The projection head.
        recipe: The method.
        views: Makes two views of a batch.
        lr: Learning rate of SGD at the start; it falls to a fiftieth along a cosine.
        seed: Of batches and views.
    """

    _bad_step: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        recipe: Recipe,
        views: Views,
        lr: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection_head = head
        self.recipe = recipe
        self.views = views
        self.lr = lr
        self.seed = seed
        self.criterion: nn.Module | None = None
        self.losses: list[float] = []
        self.images = 0
        self.seconds = 0.0
        if recipe.predictor is not None:
            width = int(head.output_dim)  # type: ignore[arg-type]
            self.prediction_head = create_head(
                recipe.predictor, input_dim=width, output_dim=width, hidden_dim=recipe.hidden(width)
            )
        if recipe.ema is not None:
            self.backbone_momentum = copy.deepcopy(backbone).requires_grad_(False)
            self.projection_head_momentum = build_twin(head)
        self.register_buffer("_bad_step", torch.tensor(-1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Projections of normalised images."""
        z: Tensor = self.projection_head(self.backbone(x))
        return z

    def setup(self, stage: str) -> None:
        """Builds the loss, which must know how many processes there are."""
        self.criterion = self.recipe.loss(self.trainer.world_size > 1)

    def on_train_epoch_start(self) -> None:
        """Starts the clock."""
        self._sum = torch.zeros((), device=self.device)
        self._count = 0
        self._started = time.perf_counter()

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], index: int) -> Tensor:
        """The loss of a batch of uint8 images `(batch, C, H, W)`."""
        torch.manual_seed((self.seed * 1_000_003 + self.global_step) * 1009 + self.global_rank)
        first, second = self.views(batch[0])
        loss = self._loss(first, second)
        # The first step with a bad loss is kept on the device; reading it would wait for the
        # device.
        bad = ~loss.detach().isfinite() & (self._bad_step < 0)
        self._bad_step = torch.where(bad, self.global_step, self._bad_step)
        self._sum += loss.detach()
        self._count += 1
        self.images += len(first) * self.trainer.world_size
        if index % 50 == 0:
            self._check_finite()
        return loss

    def end_epoch(self) -> None:
        """Records the loss and the time of the epoch; comes before its checkpoint.

        Raises:
            RunError: A loss, a weight or a running statistic is not finite.
        """
        state = [t for t in self.state_dict().values() if t.is_floating_point() and t.numel()]
        sound = torch.stack([t.isfinite().all() for t in state]).all()
        self._bad_step = torch.where(
            sound | (self._bad_step >= 0), self._bad_step, self.global_step
        )
        self._check_finite()
        self.losses.append(float(self._sum / max(self._count, 1)))
        self.seconds += time.perf_counter() - self._started

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what a resumed run must know."""
        checkpoint["headplug"] = {
            "losses": self.losses, "images": self.images, "seconds": self.seconds,
        }  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes it back."""
        for name, value in checkpoint["headplug"].items():
            setattr(self, name, value)

    def configure_optimizers(self) -> Any:
        """SGD with momentum 0.9 and weight decay 1e-5, cosine per epoch, as in arXiv 2408.14514."""
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, self.lr, momentum=0.9, weight_decay=1e-5)
        epochs = int(self.trainer.max_epochs or 1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, self.lr / 50)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _loss(self, first: Tensor, second: Tensor) -> Tensor:
        criterion = self.criterion
        assert criterion is not None  # setup() ran
        z = [self(first), self(second)]
        if self.recipe.predictor is None:
            loss: Tensor = criterion(*z)
            return loss
        target = [v.detach() for v in z]
        if self.recipe.ema is not None:
            self._update_twin()
            with torch.no_grad():
                target = [self._twin(first), self._twin(second)]
        p = [self.prediction_head(v) for v in z]
        symmetric: Tensor = (criterion(p[0], target[1]) + criterion(p[1], target[0])) / 2
        return symmetric

    def _twin(self, x: Tensor) -> Tensor:
        z: Tensor = self.projection_head_momentum(self.backbone_momentum(x))
        return z

    def _update_twin(self) -> None:
        from lightly.models.utils import update_momentum

        share = self.global_step / max(float(self.trainer.estimated_stepping_batches), 1.0)
        m = 1 - (1 - float(self.recipe.ema or 0)) * (math.cos(math.pi * share) + 1) / 2
        update_momentum(self.backbone, self.backbone_momentum, m)
        update_momentum(self.projection_head, self.projection_head_momentum, m)

    def _check_finite(self) -> None:
        step = int(self.trainer.strategy.reduce(self._bad_step, reduce_op="max"))
        if step >= 0:
            raise RunError(
                f"the loss is not a finite number at step {step} (epoch {self.current_epoch}, "
                f"learning rate {self.lr:.3g}); try a lower --lr."
            )


class EpochBatches(Sampler[list[int]]):
    """Batches of indices, shuffled anew each epoch by (seed, epoch) and shared out over processes.

    Args:
        count: Number of images.
        batch_size: Images a batch, on each process; a last smaller batch is left out.
        seed: Of the order.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        if len(self) < 1:
            raise OptionError(
                f"{count} training images do not fill one batch of {batch_size}"
                + (f" on each of {world_size} processes" if world_size > 1 else "")
                + "; lower --batch-size or use more images."
            )

    def __len__(self) -> int:
        return self.count // (self.batch_size * self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.count, generator=generator)
        every = order.split(self.batch_size)[: len(self) * self.world_size]
        return iter([b.tolist() for b in every[self.rank :: self.world_size]])


class _Checkpoint(pl.Callback):
    """Ends each epoch and replaces the one checkpoint, whole or not at all.

    Lightning calls callbacks before the model's own hook, so the model's part is called from here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, module: SSLModel) -> None:  # type: ignore[override]
        """Saves on the first process; the others take part, as sharded strategies need."""
        module.end_epoch()
        if trainer.world_size == 1:
            with atomic(self.path) as partial:
                trainer.save_checkpoint(partial)
        else:
            trainer.save_checkpoint(self.path)


class _Bar(pl.Callback):
    """Shows every step of the run in one bar."""

    def __init__(self, advance: Callable[[str], None]) -> None:
        self.advance = advance

    def on_train_batch_end(self, trainer: pl.Trainer, module: SSLModel, *_: Any) -> None:  # type: ignore[override]
        """Advances; the loss is shown once an epoch, so that the device is not waited for."""
        self.advance(f"loss {module.losses[-1]:.3f}" if module.losses else "")


def train(
    model: SSLModel,
    images: Any,
    *,
    epochs: int,
    batch_size: int,
    checkpoint: Path,
    label: str,
    devices: int = 1,
    nodes: int = 1,
    precision: Any = "32-true",
    workers: int = 0,
) -> None:
    """Trains to the end, going on from the checkpoint if it is there.

    Raises:
        RunError: The loss stopped being finite; the message names the step and the checkpoint.
        OptionError: The images do not fill a batch.
        KeyboardInterrupt: The user stopped it; the checkpoint holds the last whole epoch.
    """
    trainer = trainer_for(devices, nodes, precision, epochs)
    sampler = EpochBatches(
        len(images), batch_size, model.seed, trainer.global_rank, trainer.world_size
    )
    pinned = trainer.strategy.root_device.type == "cuda"
    loader = DataLoader(
        images, batch_size=None, sampler=sampler, num_workers=workers, pin_memory=pinned,
        persistent_workers=workers > 0,
    )  # fmt: skip
    done = _epochs_done(checkpoint) if checkpoint.is_file() else 0
    sampler.set_epoch(done)  # Lightning iterates once before it says which epoch it resumes at
    steps = len(sampler)
    with progress(label, epochs * steps, done=done * steps, show=trainer.is_global_zero) as advance:
        trainer.callbacks += [_Checkpoint(checkpoint), _Bar(advance)]  # type: ignore[attr-defined]
        try:
            path = str(checkpoint) if done else None
            trainer.fit(model, loader, ckpt_path=path, weights_only=True)
        except SystemExit:
            raise KeyboardInterrupt from None  # Lightning turns Ctrl-C into an exit
        except RunError as error:
            kept = (
                f"{checkpoint} holds the last good epoch" if checkpoint.is_file() else "none saved"
            )
            raise RunError(f"{error} Checkpoint: {kept}.") from None
    if trainer.interrupted:
        raise KeyboardInterrupt


def trainer_for(devices: int, nodes: int, precision: Any, epochs: int) -> pl.Trainer:
    """A silent Lightning trainer for these devices."""
    world = devices * nodes
    strategy: Any = "auto"
    if world > 1:
        from lightning.pytorch.strategies import DDPStrategy

        strategy = DDPStrategy(timeout=timedelta(days=1))  # others wait while the first one probes
    return pl.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        devices=devices,
        num_nodes=nodes,
        precision=precision,
        strategy=strategy,
        sync_batchnorm=world > 1 and torch.cuda.is_available(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


def _epochs_done(checkpoint: Path) -> int:
    return len(load_tensors(checkpoint)["headplug"]["losses"])
