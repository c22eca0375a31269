"""A training step of a head: forward, backward, SGD with momentum, on 256 rows of 512 features.

Peers are lightly's own classes with our head's options; test_solo_heads.py has those of solo-learn.
"""

import copy
import importlib
import inspect

import pytest
import torch
from measure import graphed, rotated

from headplug import MLPHead, create_head, describe_head, list_heads

ROWS, WIDTH = 256, 512
SMALL = {"hidden_dim": 512, "output_dim": 128, "num_blocks": 2}
ENTRIES = [describe_head(name) for name in list_heads()]
OF_LIGHTLY = [e.name for e in ENTRIES if e.source.startswith("lightly.")]
GUARDED = ("simclr", "byol", "barlow_twins")
OF_SOLO = [e.name for e in ENTRIES if e.source.startswith("solo.") and e.builder is MLPHead]
OF_PAPERS = ["ae_embedding", "reweighting"]


class Step:
    """Called: one training step of a head, on inputs in turn."""

    def __init__(self, head, device, rows=ROWS, precision="float32"):
        self.head = head.to(device).train()
        trained = [p for p in head.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9) if trained else None
        self.inputs = rotated(lambda: torch.randn(rows, WIDTH, device=device, requires_grad=True))
        self.half = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")

    def __call__(self):
        self.of(self.head, next(self.inputs))

    def of(self, head, x):
        with self.half:
            loss = head(x).square().mean()
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        x.grad = None

    def compiled(self):
        """The same, with the head compiled."""
        torch._dynamo.reset()  # all heads share one forward, which is compiled a few times only
        head = torch.compile(self.head)
        return lambda: self.of(head, next(self.inputs))

    def graphed(self):
        """The same, as one CUDA graph into which each input is copied."""
        x = next(self.inputs).detach().clone().requires_grad_()
        replay = graphed(lambda: self.of(self.head, x))

        def step():
            with torch.no_grad():
                x.copy_(next(self.inputs))
            replay()

        return step


def small(name):
    """A preset with widths that a CPU trains in milliseconds."""
    taken = describe_head(name).signature.parameters
    options = {k: v for k, v in SMALL.items() if k in taken}
    if name == "reweighting":  # it keeps the width of its input
        del options["output_dim"]
    if name == "ae_embedding":
        options["weights"] = torch.nn.Linear(WIDTH, SMALL["hidden_dim"])
    return create_head(name, input_dim=WIDTH, **options)


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


def peer_of(head):
    """lightly's own head, for the papers' heads the one that they replace, or bare layers."""
    if head.name in OF_SOLO:
        return copy.deepcopy(head.layers)
    return of_lightly(small("simclr") if head.name in OF_PAPERS else head)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.guard] * (n in GUARDED)) for n in OF_LIGHTLY]
)
def test_head_against_lightly(name, against, device):
    head = small(name)
    steps = Step(head, device), Step(of_lightly(head), device)
    assert against(*steps, samples=ROWS) < 1.2


def pytest_generate_tests(metafunc):
    if "shown" in metafunc.fixturenames:
        every = metafunc.config.getoption("full")
        names = OF_LIGHTLY + OF_SOLO + OF_PAPERS if every else [*GUARDED, *OF_PAPERS]
        metafunc.parametrize("shown", names)


@pytest.mark.parametrize("rows", [32, 2048])
def test_head_with_rows(rows, shown, against, device):
    head = small(shown)
    against(Step(head, device, rows), Step(peer_of(head), device, rows), samples=rows)


def test_head_in_bfloat16(shown, against, device):
    head = small(shown)
    steps = [Step(h, device, precision="bfloat16") for h in (head, peer_of(head))]
    against(*steps, samples=ROWS, dtype="bfloat16")


def test_compiled_head(shown, against, device, full):
    """Against the peer's, compiled too."""
    if shown not in OF_PAPERS and not full:
        pytest.skip("compiling all takes minutes; add --full")
    head = small(shown)
    ours, peer = Step(head, device), Step(peer_of(head), device)
    against(ours.compiled(), peer.compiled(), samples=ROWS, eager=(ours, peer))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_head_as_cuda_graph(precision, shown, against, cuda, device):
    """Against the same step without one."""
    step = Step(small(shown), device, precision=precision)
    against(step.graphed(), step, samples=ROWS, dtype=precision, eager=(step, step))


def ours(name, device, **options):
    return Step(create_head(name, input_dim=WIDTH, **options), device)


@pytest.mark.guard
@pytest.mark.parametrize("embedding_dim", [128, 256, 512])
def test_ae_head_against_the_papers_default(embedding_dim, against, device):
    """The frozen first layer saves its weight gradient and its update."""
    weights = torch.nn.Linear(WIDTH, embedding_dim)
    head = ours("ae_embedding", device, weights=weights, output_dim=128, activation="relu")
    peer = ours("simclr_plain", device, hidden_dim=embedding_dim, output_dim=128)
    bound = 1 if device.type == "cpu" else 1.2
    assert against(head, peer, samples=ROWS) < bound


@pytest.mark.parametrize("name", OF_PAPERS)
def test_papers_heads_against_simclr(name, against, device):
    """lightly's, 2048 wide."""
    options = {"weights": torch.nn.Linear(WIDTH, 256)} if name == "ae_embedding" else {}
    peer = of_lightly(create_head("simclr", input_dim=WIDTH))
    against(ours(name, device, **options), Step(peer, device), samples=ROWS)
