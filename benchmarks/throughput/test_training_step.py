"""A whole step of SSL training with a head of headplug, against lightly's own head in its place.

Two views forward, the loss, backward, SGD, and in BYOL the momentum copy. Images are random and on
the device; augmentation is no part of it. On a CPU a ResNet-18 sees 32 pixels.
"""

import measure
import pytest
import timm
import torch
from methods import build, stepper

from headplug import swap_head

# hidden and output widths: of lightly's documentation for a ResNet-18, and of the papers
SMALL = {"simclr": (512, 128), "byol": (1024, 256), "barlow_twins": (2048, 2048)}
LARGE = {"simclr": (2048, 128), "byol": (4096, 256), "barlow_twins": (8192, 8192)}
BACKBONES = ["resnet18", "resnet50", "vit_small_patch16_224"]
PAPERS = ["ae_embedding", "reweighting"]
OTHERS = ["rbf", "directclr", "simclr_plain", "low_rank", "whitening"]


def pytest_generate_tests(metafunc):
    """A GPU has time for every backbone and head; a laptop for the smallest, and few heads."""
    full, cases = metafunc.config.getoption("full"), []
    for method in SMALL:
        known = [method, *PAPERS]
        if metafunc.function is test_compiled_training_step:
            cases += [(method, "resnet50", head, "bfloat16") for head in known[:2] * full]
        elif full:
            for backbone in BACKBONES:
                cases += [(method, backbone, head, "float32") for head in known]
                cases += [(method, backbone, head, "bfloat16") for head in known + OTHERS]
        else:
            heads = known + OTHERS[:2] * (method == "simclr")
            cases += [(method, "resnet18", head, "float32") for head in heads]
    names = ["method", "backbone", "head", "dtype"]
    metafunc.parametrize(names, cases, ids=["-".join(case) for case in cases])


@pytest.fixture
def batch(full):
    return 256 if full else 16


@pytest.fixture
def layout(full):
    """What convolutions like best: at 32 pixels a CPU loses a third by the other one."""
    return torch.channels_last if full else torch.contiguous_format


@pytest.fixture
def views(full, batch, layout, device):
    """Endless pairs of batches, for each side its own."""
    side = 224 if full else 32

    def images():
        return torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=layout)

    return lambda: measure.rotated(lambda: (images(), images()))


@pytest.fixture
def models(method, backbone, head, full, layout, device):
    """The same method twice, with a head of headplug and with lightly's own."""
    hidden_dim, output_dim = (LARGE if full else SMALL)[method]
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        network = timm.create_model(backbone, num_classes=0)
        made.append(build(method, network, network.num_features, hidden_dim, output_dim))
    options = {
        method: {"hidden_dim": hidden_dim},
        "ae_embedding": {"weights": torch.nn.Linear(network.num_features, 256)},
        "directclr": {"output_dim": 360},
        "whitening": {"output_dim": 64},
    }
    swap_head(made[0], head, **options.get(head, {}))
    return [model.to(device, memory_format=layout) for model in made]


def bound(method, head):
    """The method's own head costs what lightly's does, and the papers' heads no more."""
    return 1.15 if head in (method, *PAPERS) else float("inf")


def test_training_step(method, head, dtype, models, views, batch, full, against):
    ours, peer = (stepper(model, views(), dtype) for model in models)
    rounds = {"rounds": 11, "budget": 2} if full else {"rounds": 7}
    ratio = against(ours, peer, samples=batch, dtype=dtype, **rounds)
    assert ours().isfinite()
    assert peer().isfinite()
    assert ratio < bound(method, head)


def test_compiled_training_step(method, head, dtype, models, views, batch, against):
    ours, peer = (stepper(model, views(), dtype, compiled=True) for model in models)
    eager = [stepper(model, views(), dtype) for model in models]
    ratio = against(ours, peer, samples=batch, dtype=dtype, rounds=11, budget=2, eager=eager)
    assert ratio < bound(method, head)
