"""Pretraining the shallow autoencoder of arXiv 2408.14514, on patches of photographs.

The peers are the paper's way (Lightning, each image through PIL), the same with tensors, and a
plain loop. All train with the same widths, batches and epochs, and none writes to disk; each side's
error on patches that it has not seen stands in `extra_info`.
"""

import os
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import transforms

from headplug import Autoencoder, pretrain_autoencoder

SIDE, LATENT, HIDDEN, BATCH, RATE = 32, 256, 512, 100, 1e-4
TEST = 500
BOUNDS = {"lightning_and_pil": 0.9, "lightning": 1, "loop": 1.25}


class Pictures(Dataset):
    """As the paper's code reads an image."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.transform = transforms.Compose(
            [transforms.Resize((SIDE, SIDE)), transforms.ToTensor()]
        )

    def __len__(self):
        return len(self.arrays)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.arrays[index])), 0


def lightning(train, held, epochs, device):
    """The paper's training, with our layers, which equal pythae's.

    Loaders work in processes of their own only where time is not that of this process.
    """
    import lightning.pytorch as pl  # here, so that the other tests need not wait for it

    class Paper(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Autoencoder((3, SIDE, SIDE), LATENT, HIDDEN)

        def loss(self, batch, name):
            loss = F.mse_loss(self.model(batch[0]), batch[0])
            self.log(name, loss)
            return loss

        def training_step(self, batch):
            return self.loss(batch, "train_loss")

        def validation_step(self, batch):
            self.loss(batch, "val_loss")

        def configure_optimizers(self):
            adam = torch.optim.Adam(self.parameters(), RATE)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, patience=10, factor=0.5)
            return {
                "optimizer": adam,
                "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"},
            }

    cuda = device.type == "cuda"
    options = {"batch_size": BATCH, "num_workers": min(8, os.cpu_count()) if cuda else 0}
    module = Paper()
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="gpu" if cuda else "cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(train, shuffle=True, **options), DataLoader(held, **options))
    return module.model


def loop(train, held, epochs, device):
    """The same by hand, with a fused optimiser, on floats that lie on the device."""
    model = Autoencoder((3, SIDE, SIDE), LATENT, HIDDEN).to(device)
    adam = torch.optim.Adam(model.parameters(), RATE, fused=True)
    for _ in range(epochs):
        for index in torch.randperm(len(train), device=device).split(BATCH):
            x = train[index]
            loss = F.mse_loss(model(x), x)
            adam.zero_grad()
            loss.backward()
            adam.step()
        with torch.no_grad():
            for x in held.split(BATCH):
                F.mse_loss(model(x), x).item()
    return model


@pytest.fixture(scope="module")
def epochs(full):
    return 3 if full else 1


@pytest.fixture(scope="module")
def patches(full):
    """uint8 `(count, 32, 32, 3)`; the last 500 are for the test."""
    draw, photos = np.random.default_rng(0).integers, load_sample_images().images
    found = []
    for _ in range(20_500 if full else 1500):
        photo = photos[draw(len(photos))]
        y, x = (draw(n - SIDE) for n in photo.shape[:2])
        found.append(photo[y : y + SIDE, x : x + SIDE])
    return np.stack(found)


@pytest.fixture(scope="module")
def pixels(patches):
    """The same as `(count, 3, 32, 32)`."""
    return torch.from_numpy(patches).permute(0, 3, 1, 2).contiguous()


@pytest.fixture
def ours(pixels, epochs, device):
    options = {"epochs": epochs, "batch_size": BATCH, "lr": RATE, "device": device}
    images = pixels[:-TEST]
    return lambda: pretrain_autoencoder(images, LATENT, HIDDEN, show_progress=False, **options)


@pytest.fixture
def peers(patches, pixels, epochs, device):
    floats, held = pixels[:-TEST].float() / 255, (len(patches) - TEST) // 10
    resident = floats.to(device)

    def parts(of, data):
        return of(data[held:]), of(data[:held])

    return {
        "lightning_and_pil": lambda: lightning(*parts(Pictures, patches[:-TEST]), epochs, device),
        "lightning": lambda: lightning(*parts(TensorDataset, floats), epochs, device),
        "loop": lambda: loop(*parts(torch.Tensor, resident), epochs, device),
    }


@pytest.mark.parametrize(
    "peer", [pytest.param(n, marks=[pytest.mark.guard] * (n == "loop")) for n in BOUNDS]
)
def test_pretraining(peer, ours, peers, pixels, epochs, benchmark, against):
    trained = {}

    def keeping(name, fit):
        return lambda: trained.update({name: fit()})

    pair = keeping("mse", ours), keeping("peer_mse", peers[peer])
    ratio = against(*pair, samples=epochs * (len(pixels) - TEST), rounds=5)
    test = pixels[-TEST:].float() / 255
    with torch.no_grad():
        errors = {name: F.mse_loss(ae.cpu()(test), test).item() for name, ae in trained.items()}
    benchmark.extra_info.update(errors)
    assert errors["mse"] == pytest.approx(errors["peer_mse"], rel=0.1)
    assert ratio < BOUNDS[peer]


def test_pretraining_against_its_matrix_products_alone(ours, pixels, epochs, device, cpu, against):
    """A GPU has long done them when the next one is asked for."""
    widths = [3 * SIDE**2, HIDDEN, LATENT, HIDDEN, 3 * SIDE**2]
    rows = [torch.randn(BATCH, n, device=device) for n in widths]
    weights = [torch.randn(n, m, device=device) for n, m in pairwise(widths)]
    count = len(pixels) - TEST

    def products():
        for step in range(epochs * count // BATCH):
            for i, weight in enumerate(weights):
                rows[i] @ weight
                if step % 10:  # a tenth is validation
                    rows[i].T @ rows[i + 1]
                    if i:
                        rows[i + 1] @ weight.T

    assert against(ours, products, samples=epochs * count, rounds=5) < 1.7
