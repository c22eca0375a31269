"""What the names of points stand for: patterns, classes, feature indices, inputs and parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import timm
import torch
import torchvision
from lightly.models.modules import MaskedVisionTransformerTIMM, SimCLRProjectionHead
from torch import nn

from headplug import features, tap
from headplug.errors import TapError, UnknownNameError
from headplug.taps import Tap


class Pair(NamedTuple):
    cls: torch.Tensor
    patches: torch.Tensor


class Encoder(nn.Module):
    """Takes several arguments and returns what `kind` says."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x, mask, *, scale=1.0):
        cls, patches = x[:, 0] * scale, x[:, 1:] * mask
        if self.kind == "mapping":
            return {"cls": cls, "patches": patches, "keys": patches}
        if self.kind == "dataclass":
            return Both(cls, patches)
        return Pair(cls, patches) if self.kind == "named" else (cls, patches)


@dataclass
class Both:
    cls: torch.Tensor
    patches: torch.Tensor


class Model(nn.Module):
    def __init__(self, kind="tuple"):
        super().__init__()
        self.encoder = Encoder(kind)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.encoder(x, torch.tensor(2.0), scale=torch.tensor(3.0))


X = torch.arange(24.0).view(2, 3, 4)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=0).eval()


def simclr(backbone, width):
    class SimCLR(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = backbone
            self.projection_head = SimCLRProjectionHead(width, 16, 8)

        def forward(self, x):
            return self.projection_head(self.backbone(x).flatten(1))

    return SimCLR().eval()


def test_a_regular_expression_matches_whole_paths(resnet):
    x = torch.rand(1, 3, 32, 32)
    assert list(features(resnet, x, r"re:layer[23]")) == ["layer2", "layer3"]
    assert list(features(resnet, x, r"re:layer1\.0\.(conv1|bn1)")) == [
        "layer1.0.conv1",
        "layer1.0.bn1",
    ]
    inputs = features(resnet, x, r"re:(?:layer)[23]:input")
    assert list(inputs) == ["layer2:input", "layer3:input"]
    assert torch.equal(inputs["layer2:input"], features(resnet, x, "layer1"))
    with pytest.raises(TapError, match=r"'re:layer\(' is not a regular expression: "):
        features(resnet, x, "re:layer(")
    with pytest.raises(UnknownNameError, match="no tap is called 're:layer'"):
        features(resnet, x, "re:layer")


def test_a_class_means_its_modules_at_or_below_a_path(resnet):
    x = torch.rand(1, 3, 32, 32)
    model = simclr(resnet, resnet.num_features)
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert list(features(model, x, ":BatchNorm2d")) == norms
    assert list(features(model, x, "backbone:BatchNorm2d")) == norms
    found = features(model, x, "backbone.layer1:BatchNorm2d:input")
    assert list(found) == [f"{n}:input" for n in norms if n.startswith("backbone.layer1.")]
    convs = features(model, x, "backbone.layer[12].**:Conv2d")
    assert all(n.startswith(("backbone.layer1.", "backbone.layer2.")) for n in convs)
    linear = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    assert list(features(model, x, "projection:Linear")) == linear
    with pytest.raises(UnknownNameError, match=r"class of module.*'BatchNorm1'.*BatchNorm2d"):
        features(resnet, x, "layer1:BatchNorm1")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("index", [0, 1, -1])
def test_feature_indices_are_timms(name, index):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    x = torch.rand(1, 3, *model.default_cfg["input_size"][1:])
    (expected,) = model.forward_intermediates(
        x, indices=[index], intermediates_only=True, output_fmt="NCHW"
    )
    found = features(model, x, index)
    if found.ndim == 3:  # timm makes maps of patch tokens
        found = features(model, x, Tap(index, pool="tokens"))
        expected = expected.flatten(2).transpose(1, 2)
    assert torch.equal(found, expected)
    assert torch.equal(features(model, x, f":{index}"), features(model, x, index))
    with tap(model, index) as taps:
        model(x)
    assert torch.equal(taps[index][0], features(model, x, index))


def test_feature_indices_of_a_backbone_and_of_timms_extractor(resnet):
    x = torch.rand(1, 3, 32, 32)
    model = simclr(resnet, resnet.num_features)
    assert torch.equal(features(model, x, 1), features(resnet, x, 1))
    assert torch.equal(features(model, x, "backbone:-1"), features(resnet, x, -1))
    vit = timm.create_model("test_vit", num_classes=0).eval()
    masked = MaskedVisionTransformerTIMM(vit)
    images = torch.rand(1, 3, *vit.default_cfg["input_size"][1:])
    assert torch.equal(features(masked, images, 1), features(masked, images, "vit.blocks.1"))
    extractor = timm.create_model("test_convnext", features_only=True).eval()
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(features(extractor, x, 1), extractor(x)[1])


def test_a_feature_index_that_is_not_there(resnet):
    x = torch.rand(1, 3, 32, 32)
    with pytest.raises(TapError, match=r"there is no feature 9; the model has 0 to 4: .*layer4"):
        features(resnet, x, 9)
    with pytest.raises(TapError, match="nothing in the model has timm's feature_info"):
        features(torchvision.models.resnet18(), x, 0)
    with pytest.raises(UnknownNameError, match="'nothing'"):
        features(resnet, x, "nothing:2")


def test_inputs_by_position_and_by_name():
    model = Model()
    mask, scale = torch.tensor(2.0), torch.tensor(3.0)
    at = ["encoder:input", "encoder:input[1]", "encoder:input[mask]", "encoder:input[scale]"]
    for found, given in zip(features(model, X, at), [X, mask, mask, scale], strict=True):
        assert torch.equal(found, given)
    assert torch.equal(features(model, X, "encoder:input[-1]"), scale)
    with pytest.raises(TapError, match=r"'encoder:input\[7\]': the call has only 0, 1, 2"):
        features(model, X, "encoder:input[7]")
    with pytest.raises(TapError, match=r"'encoder:input\[msk\]': the call has only x, mask, scale"):
        features(model, X, "encoder:input[msk]")


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("tuple", "0", "1"),
        ("named", "cls", "patches"),
        ("named", "0", "-1"),
        ("mapping", "cls", "patches"),
        ("mapping", "cls", "keys"),
        ("mapping", "0", "1"),
        ("dataclass", "cls", "patches"),
    ],
)
def test_parts_of_outputs(kind, first, second):
    found = features(Model(kind), X, [f"encoder:output[{first}]", f"encoder:output[{second}]"])
    assert torch.equal(found[0], X[:, 0] * 3)
    assert torch.equal(found[1], X[:, 1:] * 2)
    whole = features(Model(kind), X, "encoder:output")
    assert type(whole) is {"tuple": tuple, "named": Pair, "mapping": dict, "dataclass": Both}[kind]


@pytest.mark.parametrize(
    ("kind", "there"),
    [
        ("tuple", "returns a tuple of 2"),
        ("mapping", "returns a dict with 'cls', 'patches', 'keys'"),
    ],
)
def test_a_part_that_is_not_there_says_which_are(kind, there):
    with pytest.raises(TapError, match=rf"'encoder:output\[token\]': encoder {there}"):
        features(Model(kind), X, "encoder:output[token]")


@pytest.mark.parametrize("key", ["cls", "0"])
def test_a_tensor_has_no_parts(key):
    with pytest.raises(TapError, match="0 returns a Tensor, which has no such part"):
        features(nn.Sequential(nn.Linear(4, 2)), X[:, 0], f"0:output[{key}]")


def test_one_name_in_two_ways_needs_two_names():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    x = X[:, 0]
    with pytest.raises(TapError, match=r"'0' is asked for in two ways; give them names"):
        features(model, x, ["0", Tap("0", dtype=torch.float64)])
    every, one = features(model, x, ["*", Tap("0", dtype=torch.float64)])
    assert (every["0"].dtype, one.dtype) == (torch.float32, torch.float64)
    shadowed = features(model, x, {"1": "0", "all": "*"})
    assert torch.equal(shadowed["1"], shadowed["all"]["0"])
    assert not torch.equal(shadowed["1"], shadowed["all"]["1"])
    assert list(features(model, x, {"0": "[0]"})["0"]) == ["0"]  # a pattern gives a mapping
    found = features(model, x, {"as it is": "0", "double": Tap("0", dtype=torch.float64)})
    assert torch.equal(found["as it is"].double(), found["double"])
    assert list(features(model, x, {"all": "*", "one": "0"})["all"]) == ["0", "1"]


def test_options_reach_into_dataclasses():
    model, x = Model("dataclass"), X.clone().requires_grad_()
    with tap(model, "encoder", calls="last", detach=True, dtype=torch.float64) as taps:
        model(x)
    found = taps["encoder"]
    assert type(found) is Both
    assert found.cls.dtype == torch.float64
    assert not found.patches.requires_grad
    with tap(model, "encoder", calls="last") as taps:
        model(X).patches.add_(1)
    with pytest.raises(TapError, match="changed in place"):
        taps["encoder"]


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_feature_indices_of_every_kind_of_timms_extractor(name):
    model = timm.create_model(name, features_only=True).eval()
    x = torch.rand(1, 3, 160, 160)
    assert features(model, x, -1).shape[0] == 1
    assert features(model, x, 0) is not None


def test_patterns_leave_out_what_is_not_called():
    model = torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32).eval()
    x = torch.rand(2, 3, 32, 32)
    found = features(model, x, "encoder:Linear")  # MultiheadAttention never calls its out_proj
    assert list(found) == [
        f"encoder.layers.encoder_layer_{i}.mlp.{j}" for i in (0, 1) for j in (0, 3)
    ]
    assert "heads.head" in features(model, x, "**")
    with pytest.raises(TapError, match=r"none of the 2 modules that '\*\*.out_proj' stands for"):
        features(model, x, "**.out_proj")


class Student(nn.Module):
    """No attribute is called backbone, and there is no forward, as in lightly's examples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.student_backbone = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.student_head = SimCLRProjectionHead(6, 6, 2)


def test_shared_names_start_paths_and_work_without_a_forward():
    model, x = Student().eval(), torch.rand(3, 4)
    h = model.student_backbone(x)
    found = features(model, x, ["backbone", "backbone.0", "backbone:ReLU", "pre_projection"])
    assert torch.equal(found[0], h)
    assert torch.equal(found[1], model.student_backbone[0](x))
    assert list(found[2]) == ["student_backbone.1"]
    assert torch.equal(found[3], h)
    assert torch.equal(features(model, x, "projection"), model.student_head(h))
    with pytest.raises(TapError, match="Bare has no forward, and no backbone is found in it"):
        features(type("Bare", (nn.Module,), {"__init__": bare})(), x, "part")


def bare(self):
    nn.Module.__init__(self)
    self.part = nn.Linear(4, 2)


def test_the_head_gets_what_the_backbone_gives_not_what_the_model_returns():
    class Classifier(Student):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x):
            return self.fc(self.student_backbone(x))

    model, x = Classifier().eval(), torch.rand(3, 4)
    assert torch.equal(features(model, x, "pre_projection"), model.student_backbone(x))


def test_a_path_with_a_colon_in_it():
    model = nn.ModuleDict({"layer:1": nn.Linear(4, 2)})
    with tap(model, "layer:1") as taps:
        out = model["layer:1"](X[:, 0])
    assert torch.equal(taps["layer:1"][0], out)
