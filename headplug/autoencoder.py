"""The shallow autoencoder of arXiv 2408.14514: its layers, its pretraining, its file.

The layers carry pythae's names, so that files of the paper's authors load here and ours load there.
Training keeps the images on the device where they fit and draws batches by index, which costs a
fraction of a data loader's time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headplug.checkpoints import read_state_dict
from headplug.device import pick_device
from headplug.errors import CheckpointError, DataError, OptionError, RunError
from headplug.files import atomic, load_tensors
from headplug.heads.base import positive
from headplug.progress import progress

FORMAT = "headplug.autoencoder"


class Autoencoder(nn.Module):
    """input -> hidden -> embedding -> hidden -> input, with ReLU inside and a sigmoid at the end.

    Args:
        input_shape: Shape of one image, e.g. (3, 32, 32), or its number of values.
        latent_dim: Width of the embedding.
        hidden_dim: Width of the hidden layers. The embedding layer becomes the first layer of a
            head behind a backbone, so this must be the backbone's feature width.

    Raises:
        OptionError: A width is not a positive integer.

    >>> ae = Autoencoder((3, 8, 8), latent_dim=16, hidden_dim=64)
    >>> x = torch.rand(2, 3, 8, 8)
    >>> ae(x).shape, ae.encode(x).shape
    (torch.Size([2, 3, 8, 8]), torch.Size([2, 16]))
    """

    def __init__(
        self, input_shape: Sequence[int] | int, latent_dim: int = 256, hidden_dim: int = 512
    ) -> None:
        super().__init__()
        shape = (input_shape,) if isinstance(input_shape, int) else tuple(input_shape)
        self.input_shape = tuple(positive("input_shape", n) for n in shape)
        self.latent_dim = positive("latent_dim", latent_dim)
        self.hidden_dim = positive("hidden_dim", hidden_dim)
        width = math.prod(self.input_shape)
        self.encoder = _Half(_block(width, hidden_dim, nn.ReLU()))
        self.encoder.embedding = nn.Linear(hidden_dim, latent_dim)
        self.decoder = _Half(
            _block(latent_dim, hidden_dim, nn.ReLU()), _block(hidden_dim, width, nn.Sigmoid())
        )
        self.history: list[dict[str, float]] = []

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "input_shape": list(self.input_shape),
            "latent_dim": self.latent_dim,
            "hidden_dim": self.hidden_dim,
        }

    def encode(self, x: Tensor) -> Tensor:
        """Embeds images `(batch, *input_shape)` with values in [0, 1] as `(batch, latent_dim)`."""
        embedding: Tensor = self.encoder(x.flatten(1))
        return embedding

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructs images: same shape as `x`, values in [0, 1]."""
        out: Tensor = self.decoder(self.encode(x))
        return out.reshape(-1, *self.input_shape)

    def save(self, path: str | Path) -> None:
        """Writes weights and configuration to a safetensors file, whole or not at all.

        Raises:
            OptionError: The name does not end in .safetensors.
            RunError: The file cannot be written.
        """
        if Path(path).suffix != ".safetensors":
            raise OptionError(f"name the file {Path(path).stem}.safetensors, not {str(path)!r}.")
        from safetensors.torch import save_file

        tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        about = {
            "format": FORMAT,
            "config": json.dumps(self.config),
            "history": json.dumps(self.history),
        }
        with atomic(path) as partial:
            save_file(tensors, partial, metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> Autoencoder:
        """Reads a file that `save` wrote.

        Raises:
            UnknownNameError: There is no such file.
            CheckpointError: It is damaged or was not written by `save`.
        """
        from safetensors import safe_open

        state = read_state_dict(path)
        about: dict[str, str] = {}
        if Path(path).suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
        if about.get("format") != FORMAT:
            raise CheckpointError(
                f"{path} was not written by Autoencoder.save(). To use its embedding layer alone, "
                "pass the path to AEEmbeddingHead.from_autoencoder()."
            )
        try:
            ae = cls(**json.loads(about["config"]))
            ae.load_state_dict(state)
            ae.history = json.loads(about["history"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"the description in {path} does not fit its weights ({type(error).__name__}); "
                "pretrain again."
            ) from error
        return ae


def pretrain_autoencoder(
    images: Any,
    latent_dim: int = 256,
    hidden_dim: int = 512,
    *,
    epochs: int = 100,
    batch_size: int = 100,
    lr: float = 1e-4,
    validation: float = 0.1,
    seed: int = 42,
    device: str | torch.device = "auto",
    resume: str | Path | None = None,
    show_progress: bool = True,
) -> Autoencoder:
    """Trains the autoencoder as the paper does and returns the epoch with the best validation loss.

    Mean squared error, Adam without weight decay, the learning rate halved after ten epochs without
    progress, on images that are neither augmented nor standardised (arXiv 2408.14514).

    Args:
        images: A tensor `(N, ...)` of uint8, or of floats in [0, 1]; or a dataset of such tensors
            or of PIL images, with or without labels, all of one shape.
        latent_dim: Width of the embedding.
        hidden_dim: Width of the hidden layers: the feature width of the backbone it is meant for.
        epochs: Passes over the training part.
        batch_size: Images a step.
        lr: Adam's learning rate.
        validation: Fraction held out to choose the epoch.
        seed: Of the split, the initialisation and the order.
        device: "auto" takes a GPU where there is one.
        resume: A file that holds the state after each epoch; the same call goes on from it, and
            removes it at the end.
        show_progress: Whether to show a progress bar.

    Returns:
        The autoencoder on the CPU, in eval mode; `history` has train and validation loss per epoch.

    Raises:
        DataError: Images are missing, of several shapes, out of [0, 1] or not finite.
        OptionError: An option has an impossible value.
        RunError: The loss stopped being finite.

    >>> ae = pretrain_autoencoder(torch.rand(50, 64), 8, 16, epochs=1, show_progress=False)
    >>> ae.encode(torch.rand(3, 64)).shape, len(ae.history)
    (torch.Size([3, 8]), 1)
    """
    for name, value in {"epochs": epochs, "batch_size": batch_size}.items():
        positive(name, value)
    if not (0 < lr < math.inf):
        raise OptionError(f"lr must be a positive number, not {lr!r}.")
    if not 0 < validation < 1:
        raise OptionError(f"validation must lie between 0 and 1, not at {validation!r}.")
    data: Tensor = _images(images)
    place = pick_device(device)
    data = _resident(data, place)

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator).to(data.device)
    held = max(1, round(len(data) * validation))
    train, val = order[held:], order[:held]
    if not len(train):
        raise DataError(f"{len(data)} images are too few to hold out {held} for validation.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # leaves the generators of GPUs alone
        ae = Autoencoder(tuple(data.shape[1:]), latent_dim, hidden_dim)
    ae.to(place)
    optimizer = torch.optim.Adam(ae.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=10)
    best = {k: v.clone() for k, v in ae.state_dict().items()}
    asked = {
        **ae.config, "images": len(data), "batch_size": batch_size, "lr": lr, "seed": seed,
        "validation": validation,
    }  # fmt: skip

    if resume is not None and Path(resume).is_file():
        state = load_tensors(resume)
        if not isinstance(state, dict) or state.get("asked") != asked:
            raise RunError(
                f"{resume} belongs to another pretraining; delete it or name another file."
            )
        ae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"])
        best, ae.history = state["best"], state["history"]

    with progress("autoencoder", epochs, done=len(ae.history), show=show_progress) as advance:
        for epoch in range(len(ae.history), epochs):
            shuffled = train[torch.randperm(len(train), generator=generator).to(train.device)]
            train_loss = _epoch(ae, data, shuffled, batch_size, optimizer)
            with torch.no_grad():
                val_loss = _epoch(ae, data, val, max(batch_size, 1000))
            if not math.isfinite(train_loss + val_loss):
                raise RunError(
                    f"the autoencoder's loss is {train_loss} in epoch {epoch}, and {val_loss} in "
                    f"validation; lower lr ({lr})."
                )
            schedule.step(val_loss)
            if val_loss < min((h["val_loss"] for h in ae.history), default=math.inf):
                best = {k: v.clone() for k, v in ae.state_dict().items()}
            ae.history.append({"train_loss": train_loss, "val_loss": val_loss})
            if resume is not None:
                state = {
                    "asked": asked, "model": ae.state_dict(), "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(), "generator": generator.get_state(),
                    "best": best, "history": ae.history,
                }  # fmt: skip
                with atomic(resume) as partial:
                    torch.save(state, partial)
            advance(f"val MSE {val_loss:.4f}")
    ae.load_state_dict(best)
    if resume is not None:
        Path(resume).unlink(missing_ok=True)
    return ae.cpu().eval()


class _Half(nn.Module):
    """Blocks called `layers`, then, in the encoder, a linear layer called `embedding`."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.embedding: nn.Linear | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x if self.embedding is None else self.embedding(x)


def _block(fan_in: int, fan_out: int, act: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(fan_in, fan_out), act)


def _epoch(
    ae: Autoencoder,
    data: Tensor,
    order: Tensor,
    batch_size: int,
    optimizer: torch.optim.Optimizer | None = None,
) -> float:
    """One pass; returns the mean loss per image, which is the only synchronisation with a GPU."""
    total = torch.zeros((), device=next(ae.parameters()).device)
    for index in order.split(batch_size):
        x = data[index].to(total.device, non_blocking=True)
        if x.dtype == torch.uint8:
            x = x.float().div_(255)
        loss = F.mse_loss(ae(x), x)
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        total += loss.detach() * len(index)
    return float(total / len(order))


def _images(images: Any) -> Any:
    """Any accepted form as one tensor of uint8, or of floats in [0, 1]."""
    if not isinstance(images, Tensor):
        if not (hasattr(images, "__getitem__") and hasattr(images, "__len__")):
            raise DataError(
                f"images must be a tensor or a dataset, not a {type(images).__name__}; of a "
                "loader, pass its dataset."
            )
        each = [_pixels(images[i]) for i in range(len(images))]
        shapes = {tuple(t.shape) for t in each}
        if len(shapes) > 1:
            raise DataError(
                f"the images have {len(shapes)} shapes, e.g. {sorted(shapes)[:3]}: resize."
            )
        images = torch.stack(each) if each else torch.empty(0)
    if images.ndim < 2 or not images.numel():
        raise DataError(f"images must have shape (N, ...), not {tuple(images.shape)}.")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise DataError(f"images must be uint8 or floats in [0, 1], not {images.dtype}.")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise DataError(
            f"images must lie in [0, 1] and not be standardised; these run from {low:.3g} to "
            f"{high:.3g}."
        )
    return images.to(torch.float32)


def _pixels(item: Any) -> Any:
    import numpy as np

    image = item[0] if isinstance(item, tuple | list) and len(item) else item
    if isinstance(image, Tensor):
        return image
    if not hasattr(image, "convert"):
        raise DataError(
            f"an image must be a tensor or a PIL image, not a {type(image).__name__}; pass a "
            "tensor (N, C, H, W) or a dataset of images."
        )
    grey = image.mode in ("1", "L", "LA", "I;16")
    array = torch.from_numpy(np.array(image.convert("L" if grey else "RGB")))
    return array if grey else array.permute(2, 0, 1)


def _resident(data: Tensor, device: torch.device) -> Tensor:
    """The data on the device if it takes at most half of the memory that is free there."""
    if device.type == "cuda" and data.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        return data.pin_memory()
    return data.to(device)
