"""A training step of a head: forward, backward, SGD with momentum, on 256 rows of 512 features."""

import importlib

import pytest
import torch

from headplug import create_head, describe_head, list_heads

BATCH, WIDTH = 256, 512
SOURCED = [n for n in list_heads() if describe_head(n).source]


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


def ours(name, **options):
    return stepper(create_head(name, input_dim=WIDTH, **options))


@pytest.mark.parametrize("name", SOURCED)
def test_head_against_lightly(name, against):
    entry = describe_head(name)
    module, _, kind = entry.source.partition(":")
    peer_class = getattr(importlib.import_module(module), kind)
    dims = {"input_dim": WIDTH, "hidden_dim": 512, "output_dim": 128}
    peer = peer_class(**dims, **_layers(peer_class, entry))
    head = create_head(name, **dims)
    assert against(stepper(head), stepper(peer)) < 1.2


def _layers(peer_class, entry):
    import inspect

    taken = inspect.signature(peer_class).parameters
    given = {
        "num_layers": entry.defaults["num_layers"],
        "batch_norm": entry.defaults["norm"] == "batch",
    }
    return {k: v for k, v in given.items() if k in taken}


@pytest.mark.parametrize("embedding_dim", [128, 256, 512])
def test_ae_head_against_the_papers_default(embedding_dim, against):
    """The frozen first layer saves its weight gradient and its update."""
    weights = torch.nn.Linear(WIDTH, embedding_dim)
    head = ours("ae_embedding", weights=weights, output_dim=128, activation="relu")
    against(head, ours("simclr_plain", hidden_dim=embedding_dim, output_dim=128))


@pytest.mark.parametrize("name", ["ae_embedding", "reweighting"])
def test_papers_heads_against_simclr(name, against):
    options = {"weights": torch.nn.Linear(WIDTH, 256)} if name == "ae_embedding" else {}
    against(ours(name, **options), ours("simclr"))
