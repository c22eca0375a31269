"""Which points are read where none are named: the last one is what the model gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headplug import features
from headplug.errors import OptionError
from headplug.models import load_model
from headplug.taps.points import Layout
from headplug.usual import usual_points


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("timm:test_resnet", "layer4"),  # its pooled output is the model's
        ("timm:regnety_002", "s4"),
        ("timm:test_efficientnet", "global_pool"),
        ("timm:mobilenetv3_small_050", "flatten"),
        ("timm:test_vit", "fc_norm"),
        ("timm:swin_tiny_patch4_window7_224", "head"),
        ("timm:test_convnext", "head"),
        ("torchvision:resnet18", "layer4"),
        ("torchvision:mobilenet_v3_small", "features.12"),
        ("torchvision:densenet121", "classifier"),  # a ReLU follows the last module
        ("torchvision:googlenet", "inception5b"),  # its auxiliary classifiers are not reached
        ("torchvision:swin_t", "flatten"),
    ],
)
def test_the_last_point_is_the_output_of_a_librarys_model_once(name, last):
    torch.manual_seed(0)
    model, x = load_model(name, shape=(3, 64, 64)).model.eval(), torch.rand(2, 3, 64, 64)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    points = usual_points(Layout(model), x[:1])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert points[-1] == last
    with torch.no_grad():
        out = model(x)
    found = features(model, x, points, pool="gap")
    scale = out.abs().max()  # tiny for some random weights
    torch.testing.assert_close(found[-1] / scale, out / scale, rtol=1e-3, atol=1e-5)
    assert found[-2].shape != out.shape or (found[-2] - out).abs().max() > 0.01 * scale


def test_pooling_decides_whether_the_last_stage_is_the_output():
    model, x = load_model("timm:test_resnet", shape=(3, 64, 64)).model, torch.rand(1, 3, 64, 64)
    assert usual_points(Layout(model), x, "flat")[-2:] == ["layer4", "global_pool"]


def test_a_backbone_with_something_behind_it_and_a_model_that_fails():
    model = nn.Sequential()
    model.backbone = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert usual_points(Layout(model), torch.rand(1, 4))[-1] == "backbone"
    assert usual_points(Layout(model), torch.rand(1, 5))[-1] == "backbone"
    model.norm = nn.LayerNorm(4)
    assert usual_points(Layout(model), torch.rand(1, 4))[-2:] == ["backbone", "norm"]
    with pytest.raises(OptionError, match=r"Conv2d has no modules inside it.*nn.Sequential"):
        usual_points(Layout(nn.Conv2d(1, 1, 1)))
