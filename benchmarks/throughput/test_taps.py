"""What taps cost, and what early exit saves, on a ResNet-18 at 64 pixels."""

import pytest
import timm
import torch
from torchvision.models.feature_extraction import create_feature_extractor

from headplug import features, tap

STAGES = ["layer1", "layer2", "layer3", "layer4", "global_pool"]


class Hooked:
    """As surgeon-pytorch's Inspect does it: hooks that are placed once and fill a dictionary."""

    def __init__(self, model, names):
        self.model = model
        self.found = {}
        for name in names:
            model.get_submodule(name).register_forward_hook(
                lambda module, args, out, name=name: self.found.update({name: out})
            )

    def __call__(self, x):
        self.found.clear()
        return self.model(x), dict(self.found)


@pytest.fixture(scope="module")
def models():
    """Ours, the same with plain hooks, and torchvision's extractor of it."""
    torch.manual_seed(0)
    model, hooked = (timm.create_model("resnet18", num_classes=0).eval() for _ in range(2))
    return {
        "ours": model,
        "hooks": Hooked(hooked, STAGES),
        "torchvision": create_feature_extractor(model, STAGES),
    }


@pytest.fixture(scope="module")
def model(models):
    return models["ours"]


@pytest.fixture(scope="module")
def x():
    return torch.randn(8, 3, 64, 64)


@torch.no_grad()
def plain(model, x):
    return model(x)


@torch.no_grad()
def tapped(model, x):
    with tap(model, *STAGES) as taps:
        model(x)
    return taps


@pytest.mark.guard
def test_five_taps_against_the_bare_forward(model, x, against):
    assert against(lambda: tapped(model, x), lambda: plain(model, x)) < 1.15


@pytest.mark.parametrize("peer", ["hooks", "torchvision"])
def test_five_taps_against_peers(peer, models, x, against):
    assert against(lambda: tapped(models["ours"], x), lambda: plain(models[peer], x)) < 1.15


def test_five_taps_in_one_block_against_hooks(models, x, against):
    """As a training loop has it: both are placed once."""
    with tap(models["ours"], *STAGES) as taps:

        def in_block():
            taps.clear()
            plain(models["ours"], x)

        assert against(in_block, lambda: plain(models["hooks"], x)) < 1.1


@pytest.mark.parametrize("stage", STAGES[:4])
def test_early_exit_against_the_whole_forward(stage, model, x, against):
    against(lambda: features(model, x, at=stage), lambda: plain(model, x))


@pytest.mark.guard
@pytest.mark.parametrize("stage", STAGES[:3])
def test_early_exit_against_torchvisions_pruned_graph(stage, model, x, against):
    pruned = create_feature_extractor(model, [stage])
    assert against(lambda: features(model, x, at=stage), lambda: plain(pruned, x)) < 1.2


def test_stages_against_timm(model, x, against):
    @torch.no_grad()
    def timms():
        model.forward_intermediates(x, intermediates_only=True)

    assert against(lambda: features(model, x, at=STAGES[:4]), timms) < 1.2
