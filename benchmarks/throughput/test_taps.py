"""What taps cost, and what early exit saves, on a ResNet-18 at 64 pixels."""

import pytest
import timm
import torch

from headplug import features, tap

STAGES = ["layer1", "layer2", "layer3", "layer4", "global_pool"]


@pytest.fixture(scope="module")
def model():
    return timm.create_model("resnet18", num_classes=0).eval()


@pytest.fixture(scope="module")
def x():
    return torch.randn(8, 3, 64, 64)


def test_five_taps_against_none(model, x, against):
    def plain():
        with torch.no_grad():
            model(x)

    def tapped():
        with torch.no_grad(), tap(model, *STAGES) as taps:
            model(x)
        return taps

    assert against(tapped, plain) < 1.15


@pytest.mark.parametrize("stage", STAGES[:4])
def test_early_exit_against_the_whole_forward(stage, model, x, against):
    def whole():
        with torch.no_grad():
            model(x)

    against(lambda: features(model, x, at=stage), whole)


def test_stages_against_timm(model, x, against):
    def timms():
        with torch.no_grad():
            model.forward_intermediates(x, intermediates_only=True)

    against(lambda: features(model, x, at=STAGES[:4]), timms)
