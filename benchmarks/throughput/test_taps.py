"""What taps cost and what early exit saves: a ResNet-18 at 64 pixels; in full, ResNet-50 at 224."""

import pytest
import timm
import torch
from measure import rotated
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
def models(full, device):
    """Ours, the same with plain hooks, and torchvision's extractor of it."""
    name = "resnet50" if full else "resnet18"
    model, hooked = (timm.create_model(name, num_classes=0).eval().to(device) for _ in range(2))
    return {
        "ours": model,
        "hooks": Hooked(hooked, STAGES),
        "torchvision": create_feature_extractor(model, STAGES),
    }


@pytest.fixture(scope="module")
def model(models):
    return models["ours"]


@pytest.fixture(scope="module")
def images(full, device):
    size = (128, 3, 224, 224) if full else (8, 3, 64, 64)
    return rotated(lambda: torch.randn(size, device=device))


@torch.no_grad()
def plain(model, images):
    return model(next(images))


@torch.no_grad()
def tapped(model, images):
    with tap(model, *STAGES) as taps:
        model(next(images))
    return taps


@pytest.mark.guard
def test_five_taps_against_the_bare_forward(model, images, against):
    assert against(lambda: tapped(model, images), lambda: plain(model, images)) < 1.15


@pytest.mark.parametrize("peer", ["hooks", "torchvision"])
def test_five_taps_against_peers(peer, models, images, against):
    assert (
        against(lambda: tapped(models["ours"], images), lambda: plain(models[peer], images)) < 1.15
    )


def test_five_taps_in_one_block_against_hooks(models, images, against):
    """As a training loop has it: both are placed once."""
    with tap(models["ours"], *STAGES) as taps:

        def in_block():
            taps.clear()
            plain(models["ours"], images)

        assert against(in_block, lambda: plain(models["hooks"], images)) < 1.1


@pytest.mark.parametrize("stage", STAGES[:4])
def test_early_exit_against_the_whole_forward(stage, model, images, against):
    against(lambda: features(model, next(images), at=stage), lambda: plain(model, images))


@pytest.mark.guard
@pytest.mark.parametrize("stage", STAGES[:3])
def test_early_exit_against_torchvisions_pruned_graph(stage, model, images, against):
    pruned = create_feature_extractor(model, [stage])
    assert (
        against(lambda: features(model, next(images), at=stage), lambda: plain(pruned, images))
        < 1.2
    )


def test_stages_against_timm(model, images, against):
    @torch.no_grad()
    def timms():
        model.forward_intermediates(next(images), intermediates_only=True)

    assert against(lambda: features(model, next(images), at=STAGES[:4]), timms) < 1.2
