"""The backbone of real checkpoints, loaded strictly into the library that it came from."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import timm
import torch
import torchvision
from lightly.models.modules import BYOLProjectionHead, MaskedVisionTransformerTIMM
from safetensors.torch import load_file
from torch import Tensor, nn

from headplug.cli import main
from headplug.errors import CheckpointError, UnknownNameError
from headplug.strip import save_backbone, strip_backbone


class BYOL(pl.LightningModule):
    """As in lightly's examples: the children of a ResNet in a Sequential, and momentum copies."""

    def __init__(self) -> None:
        super().__init__()
        resnet = torchvision.models.resnet18()
        self.backbone = nn.Sequential(*list(resnet.children())[:-1])
        self.projection_head = BYOLProjectionHead(512, 16, 8)
        self.backbone_momentum = copy.deepcopy(self.backbone).requires_grad_(False)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        for copied in (self.backbone_momentum, self.projection_head_momentum):
            for tensor in copied.state_dict().values():
                tensor.zero_()

    def training_step(self, batch: Tensor) -> Tensor:
        return self.projection_head(self.backbone(batch).flatten(1)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loads(model: nn.Module, weights: dict[str, Tensor], missing: set[str]) -> None:
    """The weights are all that a model needs but for what is missing, and are its values after."""
    result = model.load_state_dict(weights, strict=False)
    assert set(result.missing_keys) == missing
    assert result.unexpected_keys == []
    for key, value in weights.items():
        assert torch.equal(model.state_dict()[key], value)


FC = {"fc.weight", "fc.bias"}


def test_lightning_checkpoint_of_lightlys_sequential_loads_into_torchvision(tmp_path: Path) -> None:
    model = BYOL()
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader([torch.rand(3, 32, 32)] * 4, batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    weights = save_backbone(tmp_path / "last.ckpt", tmp_path / "backbone.safetensors")
    written = load_file(tmp_path / "backbone.safetensors")
    assert written.keys() == weights.keys()
    resnet = torchvision.models.resnet18()
    loads(resnet, written, FC)
    resnet.fc = nn.Identity()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(resnet.eval()(x), model.eval().backbone(x).flatten(1))


def test_momentum_copy_is_taken_when_named() -> None:
    model = BYOL()
    weights = strip_backbone(model.state_dict(), "backbone_momentum")
    assert set(weights) == set(torchvision.models.resnet18().state_dict()) - FC
    assert all((w == 0).all() for w in weights.values())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("name", ["backbone", "encoder"])
def test_wrappers_leave_no_mark(prefix: str, name: str) -> None:
    resnet = torchvision.models.resnet18()
    state = {f"{prefix}{name}.{k}": v for k, v in resnet.state_dict().items()}
    state[f"{prefix}projector.0.weight"] = torch.ones(3)
    loads(torchvision.models.resnet18(), strip_backbone(state), set())
    loads(torchvision.models.resnet18(), strip_backbone(state, prefix + name), set())


def test_compiled_part_leaves_no_mark() -> None:
    model = nn.Module()
    model.backbone = torch.compile(torchvision.models.resnet18())
    loads(torchvision.models.resnet18(), strip_backbone(model.state_dict()), set())


def test_lightlys_masked_vit_loads_into_timm() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    model = nn.Module()
    model.backbone = MaskedVisionTransformerTIMM(copy.deepcopy(vit))
    loads(vit, strip_backbone(model.state_dict()), set())


def test_torchvision_and_timm_names_stay_as_they_are() -> None:
    for model in (torchvision.models.resnet18(), timm.create_model("convnext_atto")):
        state = {f"backbone.{k}": v for k, v in model.state_dict().items()}
        assert strip_backbone(state).keys() == model.state_dict().keys()


def test_numbered_layers_of_another_network_stay_as_they_are() -> None:
    model = nn.Module()
    model.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    assert list(strip_backbone(model.state_dict()))[:2] == ["0.weight", "0.bias"]


def test_online_and_momentum_backbones_under_other_names_must_be_chosen() -> None:
    state = {f"{n}.conv1.weight": torch.ones(1) for n in ("anchor_backbone", "backbone")}
    with pytest.raises(CheckpointError, match=r"anchor_backbone, backbone.*--backbone"):
        strip_backbone(state)
    assert list(strip_backbone(state, "anchor_backbone")) == ["conv1.weight"]


def test_single_trained_backbone_is_found_under_other_names() -> None:
    state = {f"{n}.conv1.weight": torch.ones(1) for n in ("student_backbone", "teacher_backbone")}
    state["student_backbone.conv1.weight"] = torch.zeros(1)
    assert strip_backbone(state)["conv1.weight"] == 0


def test_no_backbone_and_wrong_paths_show_what_there_is(tmp_path: Path) -> None:
    state = {"net.conv1.weight": torch.ones(1), "projector.0.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"it has net, projector.*--backbone"):
        strip_backbone(state)
    with pytest.raises(UnknownNameError, match="Closest: net"):
        strip_backbone(state, "nett")
    with pytest.raises(UnknownNameError, match="no file"):
        strip_backbone(tmp_path / "nothing.ckpt")


def test_command_writes_the_file_or_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {f"backbone.{k}": v for k, v in torchvision.models.resnet18().state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")

    def run(out: str) -> tuple[int, str]:
        command = ["headplug", "strip", str(tmp_path / "last.ckpt"), "-o", str(tmp_path / out)]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), "".join(capsys.readouterr())

    code, text = run("backbone.safetensors")
    assert code == 0
    assert "122 tensors" in text
    loads(torchvision.models.resnet18(), load_file(tmp_path / "backbone.safetensors"), set())
    code, text = run("backbone.pt")
    assert code == 2
    assert "must end in .safetensors" in text
    assert not (tmp_path / "backbone.pt").exists()
