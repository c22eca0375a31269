"""A training step of a head: forward, backward, SGD with momentum, on 256 rows of 512 features.

Peers are built as their library builds them: lightly's own class with our head's options, or for
solo-learn, whose methods write the layers down in place, a bare Sequential of the same layers.
"""

import copy
import importlib
import inspect

import pytest
import torch

from headplug import MLPHead, create_head, describe_head, list_heads

BATCH, WIDTH = 256, 512
SMALL = {"hidden_dim": 512, "output_dim": 128, "num_blocks": 2}
ENTRIES = [describe_head(name) for name in list_heads()]
OF_LIGHTLY = [e.name for e in ENTRIES if e.source.startswith("lightly.")]
GUARDED = ("simclr", "byol", "barlow_twins")
OF_SOLO = [e.name for e in ENTRIES if e.source.startswith("solo.") and e.builder is MLPHead]


def stepper(head):
    head.train()
    trained = [p for p in head.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9) if trained else None
    x = torch.randn(BATCH, WIDTH, requires_grad=True)

    def step():
        head(x).square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        x.grad = None

    return step


def small(name):
    """A preset with widths that a CPU trains in milliseconds."""
    taken = describe_head(name).signature.parameters
    return create_head(name, input_dim=WIDTH, **{k: v for k, v in SMALL.items() if k in taken})


def of_lightly(head):
    """lightly's own head with the options of ours."""
    module, _, kind = describe_head(head.name).source.partition(":")
    peer = getattr(importlib.import_module(module), kind)
    options = {
        **vars(head),
        "batch_norm": getattr(head, "norm", "") == "batch",
        "use_bias": bool(getattr(head, "bias", True)),
        "n_prototypes": head.output_dim,
        "num_clusters": head.output_dim,
        "group_features": torch.rand(head.output_dim, head.input_dim),
    }
    if kind == "MMCRProjectionHead":  # it counts the hidden layers
        options["num_layers"] -= 1
    taken = inspect.signature(peer).parameters
    built = peer(**{k: v for k, v in options.items() if k in taken})
    if kind != "SMoGPrototypes":
        return built

    class Called(torch.nn.Module):  # as SMoG's training step calls it
        def forward(self, x):
            return built(x, built.group_features)

    return Called()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.guard] * (n in GUARDED)) for n in OF_LIGHTLY]
)
def test_head_against_lightly(name, against):
    head = small(name)
    assert against(stepper(head), stepper(of_lightly(head))) < 1.2


@pytest.mark.parametrize("name", OF_SOLO)
def test_head_against_bare_layers_as_in_solo_learn(name, against):
    head = small(name)
    assert against(stepper(head), stepper(copy.deepcopy(head.layers))) < 1.2


def ours(name, **options):
    return stepper(create_head(name, input_dim=WIDTH, **options))


@pytest.mark.guard
@pytest.mark.parametrize("embedding_dim", [128, 256, 512])
def test_ae_head_against_the_papers_default(embedding_dim, against):
    """The frozen first layer saves its weight gradient and its update."""
    weights = torch.nn.Linear(WIDTH, embedding_dim)
    head = ours("ae_embedding", weights=weights, output_dim=128, activation="relu")
    assert against(head, ours("simclr_plain", hidden_dim=embedding_dim, output_dim=128)) < 1


@pytest.mark.parametrize("name", ["ae_embedding", "reweighting"])
def test_papers_heads_against_simclr(name, against):
    options = {"weights": torch.nn.Linear(WIDTH, 256)} if name == "ae_embedding" else {}
    against(ours(name, **options), ours("simclr"))
