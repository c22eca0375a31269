"""Reading, keeping and training autoencoders; when a head with their embedding may train."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from headplug.autoencoder import Autoencoder, pretrain_autoencoder
from headplug.checkpoints import read_embedding
from headplug.errors import (
    CheckpointError,
    DataError,
    DimensionError,
    HeadplugError,
    OptionError,
    RunError,
    UnknownNameError,
)
from headplug.heads.ae_embedding import AEEmbeddingHead


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Layers this small are only slowed down by threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ae() -> Any:  # so that a type checker takes `encoder.embedding` for what it is
    torch.manual_seed(1)
    return Autoencoder((3, 4, 4), latent_dim=6, hidden_dim=10)


def holds_embedding(source: Any, ae: Any) -> bool:
    """Whether a head built from `source` has exactly the embedding layer of `ae`."""
    head: Any = AEEmbeddingHead.from_autoencoder(source, output_dim=4)
    assert (head.input_dim, head.embedding_dim, head.output_dim) == (10, 6, 4)
    assert head.train()(torch.rand(5, 10)).shape == (5, 4)
    layer, embedding = head.layers.embedding, ae.encoder.embedding
    return torch.equal(layer.weight, embedding.weight) and torch.equal(layer.bias, embedding.bias)


def fit(images: Any, **options: Any) -> Autoencoder:
    options = {"latent_dim": 3, "hidden_dim": 8, "epochs": 3, "batch_size": 8, "lr": 0.01} | options
    return pretrain_autoencoder(images, device="cpu", show_progress=False, **options)


def pixels(count: int = 40, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, *(shape or (3, 4, 4))), generator=generator).byte()


def same(a: Autoencoder, b: Autoencoder) -> bool:
    """Whether two autoencoders agree to the last bit, history included."""
    x, y = a.state_dict(), b.state_dict()
    equal = x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    return equal and a.config == b.config and a.history == b.history


# --- forms that are read ----------------------------------------------------------------------


def test_lightning_checkpoint_of_the_authors_code_is_read(ae: Any, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Authors(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self, epochs: int, learning_rate: float, weight_decay: float) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.hparams["log_n_samples"] = 10
            self.model = copy.deepcopy(ae)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss = nn.functional.mse_loss(self.model(batch[0]), batch[0])
            self.log("val_loss", loss)
            return loss

        def configure_optimizers(self) -> dict[str, Any]:
            adam = torch.optim.Adam(self.parameters(), lr=1e-2)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, factor=0.5)
            return {
                "optimizer": adam,
                "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"},
            }

    module = Authors(epochs=100, learning_rate=1e-4, weight_decay=0.0)
    best = lightning.callbacks.ModelCheckpoint(tmp_path, "best", "val_loss", save_last=True)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[best],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    images = torch.utils.data.TensorDataset(torch.rand(8, 3, 4, 4))
    trainer.fit(module, torch.utils.data.DataLoader(images, batch_size=8))
    trainer.save_checkpoint(tmp_path / "epoch.ckpt")

    content = torch.load(tmp_path / "epoch.ckpt", weights_only=False)
    assert {"callbacks", "loops", "lr_schedulers", "optimizer_states"} <= set(content)
    names = {"epochs", "learning_rate", "weight_decay", "log_n_samples"}
    assert set(content["hyper_parameters"]) == names
    assert "model.encoder.embedding.weight" in content["state_dict"]
    assert not torch.equal(module.model.encoder.embedding.weight, ae.encoder.embedding.weight)
    for name in ("epoch.ckpt", "best.ckpt", "last.ckpt"):
        assert holds_embedding(tmp_path / name, module.model)


def pythae_folder(folder: Path, state: dict[str, Tensor], name: str = "AEConfig") -> Path:
    """What `save` of pythae 0.1.2 writes (compared with the real package by hand)."""
    folder.mkdir()
    torch.save({"model_state_dict": copy.deepcopy(state)}, folder / "model.pt")
    config = {"name": name, "input_dim": [3, 4, 4], "latent_dim": 6}
    config |= {"uses_default_encoder": True, "uses_default_decoder": True}
    (folder / "model_config.json").write_text(json.dumps(config))
    environment = {"name": "EnvironmentConfig", "python_version": "3.11"}
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("part", ["", "model.pt"])
def test_pythae_folder_and_file_are_read(
    ae: Any, tmp_path: Path, part: str, kind: Callable[[Path], Any]
) -> None:
    folder = pythae_folder(tmp_path / "final_model", ae.state_dict())
    assert holds_embedding(kind(folder / part), ae)


def test_pythae_vae_is_read_for_its_mean_layer(ae: Any, tmp_path: Path) -> None:
    log_var = nn.Linear(10, 6)
    state = ae.state_dict()
    state |= {f"encoder.log_var.{k}": v for k, v in log_var.state_dict().items()}
    assert holds_embedding(pythae_folder(tmp_path / "vae", state, "VAEConfig"), ae)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("prefix", ["", "encoder.", "module.encoder."])
def test_bare_state_dicts_are_read(ae: Any, tmp_path: Path, prefix: str, legacy: bool) -> None:
    state = {prefix + name: value for name, value in ae.encoder.state_dict().items()}
    assert holds_embedding(state, ae)
    torch.save(state, tmp_path / "state.pt", _use_new_zipfile_serialization=not legacy)
    assert holds_embedding(tmp_path / "state.pt", ae)
    save_file(state, tmp_path / "state.safetensors")
    assert holds_embedding(tmp_path / "state.safetensors", ae)


def test_modules_and_pairs_are_read(ae: Any) -> None:
    layer = ae.encoder.embedding
    for source in (ae, ae.encoder, layer, (layer.weight, layer.bias), layer.state_dict()):
        assert holds_embedding(source, ae)


def test_headplugs_own_file_is_read(ae: Any, tmp_path: Path) -> None:
    ae.save(tmp_path / "ae.safetensors")
    assert holds_embedding(tmp_path / "ae.safetensors", ae)
    assert holds_embedding(str(tmp_path / "ae.safetensors"), ae)


def test_double_and_half_weights_become_float32(ae: Any) -> None:
    for dtype in (torch.float64, torch.float16):
        weight, bias = read_embedding(copy.deepcopy(ae).to(dtype))
        assert (weight.dtype, bias.dtype) == (torch.float32, torch.float32)
        torch.testing.assert_close(weight, ae.encoder.embedding.weight.detach(), rtol=0, atol=2e-4)


def test_what_is_read_shares_no_storage_with_its_source(ae: Any) -> None:
    layer = ae.encoder.embedding
    weight, bias = read_embedding((layer.weight, layer.bias))
    weight += 1
    bias += 1
    assert not torch.equal(layer.weight, weight)
    assert not torch.equal(layer.bias, bias)


# --- forms that are refused -------------------------------------------------------------------


class Bomb:
    """An object that creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def bombs(folder: Path, state: dict[str, Tensor], target: Path) -> Iterator[Path]:
    """Files that hold real weights and a bomb, in each of the forms that could be unpickled."""
    bomb = Bomb(target)
    for name in ("model.pt", "model.ckpt", "model.bin", "model.safetensors"):
        torch.save({"state_dict": state, "hyper_parameters": bomb}, folder / name)
        yield folder / name
    legacy = folder / "legacy.pt"
    torch.save({"state_dict": state, "x": bomb}, legacy, _use_new_zipfile_serialization=False)
    yield legacy
    plain = folder / "plain.pkl"
    plain.write_bytes(pickle.dumps({"state_dict": state, "x": bomb}))
    yield plain


def test_pickle_bombs_are_refused_and_do_not_go_off(ae: Any, tmp_path: Path) -> None:
    target = tmp_path / "touched"
    for path in bombs(tmp_path, ae.state_dict(), target):
        with pytest.raises(CheckpointError, match=path.name):
            AEEmbeddingHead.from_autoencoder(path)
        with pytest.raises(CheckpointError):
            Autoencoder.load(path)
        with pytest.raises(CheckpointError):
            fit(pixels(), resume=path)
        assert path.is_file()
    assert not target.exists()
    pickle.loads((tmp_path / "plain.pkl").read_bytes())
    assert target.exists()  # the bombs were live


def test_refusal_of_a_pickle_does_not_repeat_torchs_advice_to_unpickle(tmp_path: Path) -> None:
    torch.save({"encoder": Bomb(tmp_path / "touched")}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError) as caught:
        AEEmbeddingHead.from_autoencoder(tmp_path / "model.pt")
    assert "can still be loaded" not in str(caught.value)
    assert "\x1b" not in str(caught.value)  # nor its bold type


def test_folder_with_a_pickled_encoder_alone_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "custom"
    folder.mkdir()
    (folder / "encoder.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "touched")))
    with pytest.raises(HeadplugError, match=r"model\.pt"):
        AEEmbeddingHead.from_autoencoder(folder)
    with pytest.raises(CheckpointError, match="unpickle"):
        AEEmbeddingHead.from_autoencoder(folder / "encoder.pkl")
    assert not (tmp_path / "touched").exists()


def test_pickled_module_is_refused_with_the_way_out(ae: Any, tmp_path: Path) -> None:
    torch.save(ae, tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match=r"never unpickles.*torch\.save\(model\.state_dict"):
        AEEmbeddingHead.from_autoencoder(tmp_path / "whole.pt")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", ["ae.safetensors", "ae.pt"])
def test_truncated_files_are_refused(ae: Any, tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    if path.suffix == ".pt":
        torch.save(ae.state_dict(), path)
    else:
        ae.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=name):
        AEEmbeddingHead.from_autoencoder(path)
    with pytest.raises(CheckpointError, match=name):
        Autoencoder.load(path)


@pytest.mark.parametrize("name", ["noise.safetensors", "noise.pt", "noise.ckpt"])
def test_random_bytes_are_refused(tmp_path: Path, name: str) -> None:
    for seed in range(5):
        (tmp_path / name).write_bytes(np.random.default_rng(seed).bytes(2000))
        with pytest.raises(CheckpointError, match=name):
            AEEmbeddingHead.from_autoencoder(tmp_path / name)


def test_random_bytes_are_not_called_more_than_tensors(tmp_path: Path) -> None:
    (tmp_path / "noise.pt").write_bytes(np.random.default_rng(0).bytes(2000))
    with pytest.raises(CheckpointError) as caught:
        AEEmbeddingHead.from_autoencoder(tmp_path / "noise.pt")
    assert "holds more than tensors" not in str(caught.value)


def test_missing_file_is_named() -> None:
    with pytest.raises(UnknownNameError, match="nowhere"):
        AEEmbeddingHead.from_autoencoder("nowhere.safetensors")
    with pytest.raises(UnknownNameError, match="nowhere"):
        Autoencoder.load("nowhere.safetensors")


def test_another_networks_file_is_refused_with_its_keys(tmp_path: Path) -> None:
    resnet = pytest.importorskip("torchvision.models").resnet18()
    save_file(resnet.state_dict(), tmp_path / "resnet.safetensors")
    with pytest.raises(CheckpointError, match=r"no layers named 'embedding' \(keys: .*layer1\.0"):
        AEEmbeddingHead.from_autoencoder(tmp_path / "resnet.safetensors")
    with pytest.raises(CheckpointError, match=r"not written by Autoencoder\.save"):
        Autoencoder.load(tmp_path / "resnet.safetensors")


def test_two_embedding_layers_are_ambiguous(ae: Any) -> None:
    state = {f"{m}.{k}": v for m in ("online", "ema") for k, v in ae.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"online\.encoder\.embedding") as caught:
        AEEmbeddingHead.from_autoencoder(state)
    assert "ema.encoder.embedding" in str(caught.value)


def test_other_widths_than_asked_for_are_named(ae: Any) -> None:
    with pytest.raises(DimensionError, match=r"10 features to 6.*12 to 6"):
        AEEmbeddingHead(12, weights=ae)
    with pytest.raises(DimensionError, match=r"10 features to 6.*10 to 5"):
        AEEmbeddingHead(10, embedding_dim=5, weights=ae)
    assert AEEmbeddingHead(10, weights=ae).embedding_dim == 6


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_weights_that_are_not_finite_are_refused(ae: Any, part: str, value: float) -> None:
    getattr(ae.encoder.embedding, part).data.flatten()[3] = value
    with pytest.raises(CheckpointError, match="not finite"):
        AEEmbeddingHead.from_autoencoder(ae)


@pytest.mark.parametrize(
    "source",
    [
        (torch.rand(6, 10), torch.rand(5)),
        (torch.rand(6, 10, 1), torch.rand(6)),
        (torch.rand(6, 10), None),
        (torch.rand(6, 10),),
        nn.Linear(10, 6, bias=False),
        nn.Embedding(10, 6),
        {},
        42,
        None,
    ],
)
def test_things_without_weight_and_bias_are_refused(source: Any) -> None:
    with pytest.raises(CheckpointError):
        AEEmbeddingHead.from_autoencoder(source)


# --- a head without pretrained weights --------------------------------------------------------


def trains(head: nn.Module) -> bool:
    try:
        head.train()(torch.rand(4, 10))
    except HeadplugError:
        return False
    return True


@pytest.mark.parametrize("freeze", [True, False])
def test_untrained_head_refuses_to_train_and_says_how_to_pretrain(freeze: bool) -> None:
    head = AEEmbeddingHead(10, 6, 4, freeze=freeze)
    with pytest.raises(HeadplugError, match="headplug pretrain-ae") as caught:
        head(torch.rand(4, 10))
    assert "--hidden-dim 10" in str(caught.value)
    assert "--latent-dim 6" in str(caught.value)
    assert head.eval()(torch.rand(4, 10)).shape == (4, 4)
    assert not trains(head)  # eval mode did not lift the refusal


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("freeze", [True, False])
def test_state_dict_of_a_pretrained_head_makes_a_head_ready(
    ae: Any, freeze: bool, marked: bool, wrap: bool
) -> None:
    source: nn.Module = AEEmbeddingHead.from_autoencoder(ae, 4, freeze=freeze)
    head: nn.Module = AEEmbeddingHead(10, 6, 4, freeze=freeze)
    if wrap:
        source, head = nn.Sequential(nn.ReLU(), source), nn.Sequential(nn.ReLU(), head)
    state = source.state_dict()
    if not marked:
        state = {k: v for k, v in state.items() if "pretrained" not in k}
    head.load_state_dict(state)
    assert trains(head)
    x = torch.rand(3, 10)
    assert torch.equal(head(x), source(x))
    assert head.state_dict().keys() == source.state_dict().keys()


def test_state_dict_survives_a_file_and_moves_between_frozen_and_trained(
    ae: Any, tmp_path: Path
) -> None:
    source = AEEmbeddingHead.from_autoencoder(ae, 4)
    torch.save(source.state_dict(), tmp_path / "head.pt")
    head: Any = AEEmbeddingHead(10, 6, 4, freeze=False)
    head.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    assert trains(head)
    assert torch.equal(head.layers.embedding.weight, ae.encoder.embedding.weight)


def test_state_dict_of_an_untrained_head_does_not_make_a_head_ready(ae: Any) -> None:
    untrained = AEEmbeddingHead(10, 6, 4).state_dict()
    head = AEEmbeddingHead(10, 6, 4)
    head.load_state_dict(untrained)
    assert not trains(head)
    ready = AEEmbeddingHead.from_autoencoder(ae, 4)
    ready.load_state_dict(untrained)
    assert not trains(ready)  # its weights are now the random ones


def test_part_of_a_state_dict_without_the_embedding_changes_nothing(ae: Any) -> None:
    output = {k: v for k, v in AEEmbeddingHead(10, 6, 4).state_dict().items() if "output" in k}
    head, ready = AEEmbeddingHead(10, 6, 4), AEEmbeddingHead.from_autoencoder(ae, 4)
    head.load_state_dict(output, strict=False)
    ready.load_state_dict(output, strict=False)
    assert not trains(head)
    assert trains(ready)


def test_failed_load_does_not_make_a_head_ready(ae: Any) -> None:
    head = AEEmbeddingHead(10, 5, 4)  # narrower than the autoencoder
    with pytest.raises(RuntimeError, match="size mismatch"):
        head.load_state_dict(AEEmbeddingHead.from_autoencoder(ae, 4).state_dict())
    assert not trains(head)


def test_loading_leaves_the_callers_state_dict_alone(ae: Any) -> None:
    state = AEEmbeddingHead.from_autoencoder(ae, 4).state_dict()
    del state["pretrained"]
    names = list(state)
    AEEmbeddingHead(10, 6, 4).load_state_dict(state)
    assert list(state) == names


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_readiness_and_weights(
    ae: Any, duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    ready = AEEmbeddingHead.from_autoencoder(ae, 4)
    twin = duplicate(ready)
    assert trains(twin)
    x = torch.rand(3, 10)
    assert torch.equal(twin(x), ready(x))
    assert not trains(duplicate(AEEmbeddingHead(10, 6, 4)))


# --- the file ---------------------------------------------------------------------------------


def test_saved_autoencoder_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    ae = fit(pixels(), epochs=4)
    path = tmp_path / "new" / "folder" / "ae.safetensors"
    ae.save(path)
    back = Autoencoder.load(path)
    assert len(back.history) == 4
    assert same(ae, back)
    back.save(path)  # over itself
    assert same(ae, Autoencoder.load(str(path)))
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"config": "{}", "history": "[]"},
        {"config": '{"input_shape": [3, 4, 4], "latent_dim": 7}', "history": "[]"},
    ],
)
def test_file_whose_description_is_damaged_is_refused(
    ae: Any, tmp_path: Path, about: dict[str, str]
) -> None:
    about = {"format": "headplug.autoencoder", **about}
    save_file(ae.state_dict(), tmp_path / "ae.safetensors", metadata=about)
    with pytest.raises(CheckpointError, match=r"ae\.safetensors"):
        Autoencoder.load(tmp_path / "ae.safetensors")


def test_unwritable_places_are_refused_and_nothing_is_left(ae: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file" / "ae.safetensors", Path("/proc/nonexistent/ae.safetensors")):
        with pytest.raises(RunError, match="cannot write"):
            ae.save(path)
        with pytest.raises(RunError, match="cannot write"):
            fit(pixels(), resume=path)
        assert not path.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@contextmanager
def full_disk(folder: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where one may be mounted."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def short_files(folder: Path) -> Iterator[Path]:
    """No file may grow past 64 KiB: writing fails half-way, without any special right."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("trouble", [full_disk, short_files])
def test_full_disk_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, trouble: Callable[[Path], Any]
) -> None:
    big, small = Autoencoder(3000, 8, 64), Autoencoder(30, 8, 16)  # 1.5 MB and 9 kB
    with trouble(tmp_path) as folder:
        path = folder / "ae.safetensors"
        with pytest.raises(RunError, match="cannot write"):
            big.save(path)
        assert os.listdir(folder) == []
        small.save(path)
        with pytest.raises(RunError, match="cannot write"):
            big.save(path)
        assert os.listdir(folder) == [path.name]
        assert same(Autoencoder.load(path), small)


@pytest.mark.parametrize("trouble", [full_disk, short_files])
def test_full_disk_stops_a_resumable_run_and_leaves_no_half_state(
    tmp_path: Path, trouble: Callable[[Path], Any]
) -> None:
    with trouble(tmp_path) as folder:
        with pytest.raises(RunError, match="cannot write"):
            fit(torch.rand(10, 3000), hidden_dim=64, resume=folder / "state.pt")
        assert os.listdir(folder) == []


# --- images -----------------------------------------------------------------------------------


def test_uint8_and_floats_give_the_same_autoencoder() -> None:
    images = pixels()
    assert same(fit(images), fit(images.float() / 255))
    assert same(fit(images), fit(images.double() / 255))


@pytest.mark.parametrize("labelled", [True, False])
def test_pil_datasets_give_the_same_autoencoder_as_their_tensor(labelled: bool) -> None:
    pil = pytest.importorskip("PIL.Image")
    images = pixels(40, 3, 4, 5)
    pictures = [pil.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    dataset = [(picture, 7) for picture in pictures] if labelled else pictures
    assert same(fit(dataset), fit(images))


def test_grey_pil_images_and_tensor_datasets_are_taken() -> None:
    pil = pytest.importorskip("PIL.Image")
    grey = pixels(20, 4, 5)
    assert same(fit([pil.fromarray(image.numpy()) for image in grey]), fit(grey))
    labels = torch.zeros(20)
    assert same(fit(torch.utils.data.TensorDataset(grey, labels)), fit(grey))


def test_palette_pictures_are_read_as_colours_or_refused() -> None:
    pil = pytest.importorskip("PIL.Image")
    colours = [pil.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels(20)]
    indexed = [picture.convert("P", palette=pil.Palette.ADAPTIVE) for picture in colours]
    try:
        ae = fit(indexed)
    except DataError:
        return
    assert same(ae, fit([picture.convert("RGB") for picture in indexed]))


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.randn(20, 3, 4, 4), "standardised"),
        (torch.rand(20, 3, 4, 4) * 255, "standardised"),
        (torch.full((20, 4), math.nan), r"\[0, 1\]"),
        (torch.randint(0, 255, (20, 4)), "uint8"),
        (torch.rand(20), r"\(N, \.\.\.\)"),
        (torch.empty(0, 3, 4, 4), r"\(N, \.\.\.\)"),
        ([], r"\(N, \.\.\.\)"),
        (torch.rand(1, 4), "too few"),
        ([torch.rand(3, 4, 4), torch.rand(3, 5, 5)], "2 shapes"),
        ([(torch.rand(3, 4, 4), 0), (torch.rand(1, 4, 4), 1)], "2 shapes"),
        ([{"image": torch.rand(3, 4, 4), "label": 0}] * 20, "dict"),
        (["cat.png"] * 20, "str"),
        (
            torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(20, 4))),
            "DataLoader",
        ),
    ],
)
def test_images_that_cannot_be_used_are_refused(images: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        fit(images)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"latent_dim": -1},
        {"hidden_dim": 2.5},
        {"validation": 0.0},
        {"validation": 1.0},
        {"validation": math.nan},
        {"lr": -1.0},
        {"lr": math.nan},
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        fit(pixels(), **options)


def test_loss_that_explodes_is_an_error_that_names_the_rate() -> None:
    with pytest.raises(RunError, match=r"lower lr \(1e\+38\)"):
        fit(pixels(), lr=1e38)


# --- runs -------------------------------------------------------------------------------------


def test_result_is_in_eval_mode_and_the_callers_images_are_untouched() -> None:
    images = pixels()
    before = images.clone()
    ae = fit(images)
    assert not ae.training
    assert torch.equal(images, before)
    assert all(set(epoch) == {"train_loss", "val_loss"} for epoch in ae.history)


def test_seed_alone_decides_the_result_and_global_random_state_is_untouched() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy()
    first = fit(pixels(), seed=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state(legacy=False)["state"]["key"], before[1])
    torch.manual_seed(99)
    assert same(fit(pixels(), seed=3), first)
    assert not same(fit(pixels(), seed=4), first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_global_random_state_of_the_gpu_is_untouched() -> None:
    torch.cuda.manual_seed(0)
    before = torch.cuda.get_rng_state()
    pretrain_autoencoder(pixels(), 3, 8, epochs=1, device="cuda", show_progress=False)
    assert torch.equal(torch.cuda.get_rng_state(), before)


@contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Ctrl-C before the optimiser's n-th step."""
    seen = 0

    def count(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == step:
            raise KeyboardInterrupt

    handle = register_optimizer_step_pre_hook(count)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        handle.remove()


# 36 images for training in batches of 8: five steps an epoch
@pytest.mark.parametrize("steps", [(1,), (6,), (13,), (7, 1, 12)])
def test_interrupted_runs_resume_to_the_same_bits(tmp_path: Path, steps: tuple[int, ...]) -> None:
    state = tmp_path / "state.pt"
    options = {"epochs": 5, "lr": 0.3}  # so high that the best epoch is not the last
    expected = fit(pixels(), **options)
    losses = [epoch["val_loss"] for epoch in expected.history]
    assert losses[-1] > min(losses)
    for step in steps:
        with interrupted_at(step):
            fit(pixels(), resume=state, **options)
    assert same(fit(pixels(), resume=state, **options), expected)
    assert os.listdir(tmp_path) == []  # nothing is left of the state


def test_plateau_rule_survives_an_interruption(tmp_path: Path) -> None:
    options = {"epochs": 30, "lr": 1e-7}  # no progress: the rate halves in epochs 12 and 23
    with interrupted_at(5 * 11):
        fit(pixels(), resume=tmp_path / "state.pt", **options)
    assert same(fit(pixels(), resume=tmp_path / "state.pt", **options), fit(pixels(), **options))


def test_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    script = """
        import os, signal, sys, torch
        from torch.optim.optimizer import register_optimizer_step_pre_hook
        from headplug.autoencoder import pretrain_autoencoder
        steps = 0
        def die(*_):
            global steps
            steps += 1
            if steps == 13:
                os.kill(os.getpid(), signal.SIGKILL)
        register_optimizer_step_pre_hook(die)
        pretrain_autoencoder(
            torch.load("images.pt"), 3, 8, epochs=5, batch_size=8, lr=0.01, device="cpu",
            resume="state.pt", show_progress=False,
        )
    """
    torch.save(pixels(), tmp_path / "images.pt")
    path = os.pathsep.join(filter(None, sys.path))
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    state = tmp_path / "state.pt"
    assert len(torch.load(state, weights_only=True)["history"]) == 2
    assert same(fit(pixels(), epochs=5, resume=state), fit(pixels(), epochs=5))


def test_interrupt_while_the_state_is_written_keeps_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state.pt"
    write, calls = torch.save, 0

    def half(content: Any, path: Path) -> None:
        nonlocal calls
        calls += 1
        write(content, path)
        if calls == 3:
            os.truncate(path, path.stat().st_size // 2)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(KeyboardInterrupt):
            fit(pixels(), epochs=5, resume=state)
    assert os.listdir(tmp_path) == [state.name]
    assert len(torch.load(state, weights_only=True)["history"]) == 2
    assert same(fit(pixels(), epochs=5, resume=state), fit(pixels(), epochs=5))


@pytest.mark.parametrize(
    "changed",
    [
        {"latent_dim": 4},
        {"hidden_dim": 9},
        {"batch_size": 9},
        {"lr": 0.02},
        {"seed": 1},
        {"validation": 0.2},
    ],
)
def test_state_of_another_run_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    state = tmp_path / "state.pt"
    with interrupted_at(6):
        fit(pixels(), resume=state)
    content = state.read_bytes()
    with pytest.raises(RunError, match=r"state\.pt.*another"):
        fit(pixels(), resume=state, **changed)
    with pytest.raises(RunError, match=r"state\.pt.*another"):
        fit(pixels(39), resume=state)
    assert state.read_bytes() == content


def test_file_that_is_no_state_is_refused_and_kept(ae: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for content in (ae.state_dict(), [1, 2], torch.rand(3)):
        torch.save(content, path)
        before = path.read_bytes()
        with pytest.raises(HeadplugError, match=r"model\.pt"):
            fit(pixels(), resume=path)
        assert path.read_bytes() == before
