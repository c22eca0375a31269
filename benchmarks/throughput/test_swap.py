"""What headplug costs before the first step: its import, its command line, a swap."""

import os
import statistics
import subprocess
import sys
import warnings

import measure
import pytest
import timm
import torch
from lightly.models.modules import SimCLRProjectionHead
from methods import build, stepper

from headplug import swap_head

CHILD = """
import sys, time
import torch
alone = time.process_time()
{code}
print(alone, time.process_time())
"""
HELP = """
from headplug.cli import main
sys.argv[1:] = ["--help"]
try:
    main()
except SystemExit:
    pass
"""


@pytest.mark.parametrize("code", ["import headplug", HELP], ids=["import", "help"])
def test_start_against_importing_torch(code, benchmark):
    """CPU time of fresh processes, each until torch is there and until it is done."""
    if not benchmark.enabled:
        pytest.skip("nothing is timed with --benchmark-disable")
    # compiled modules are kept, as pip does: the first process may have to write them
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command, seconds = [sys.executable, "-c", CHILD.format(code=code)], []

    def start():
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        seconds.append([float(word) for word in done.stdout.split()[-2:]])

    benchmark.pedantic(start, rounds=3)
    alone, both = (1000 * statistics.median(times) for times in zip(*seconds, strict=True))
    low, ratio, high = statistics.quantiles((b / a for a, b in seconds), n=4)
    benchmark.extra_info.update(
        ms=both, peer_ms=alone, ratio=ratio, ratio_low=low, ratio_high=high, pairs=len(seconds)
    )
    assert ratio < 1.2


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def model(request, device):
    """SimCLR as lightly's documentation has it."""
    torch.manual_seed(0)
    network = timm.create_model(request.param, num_classes=0)
    width = network.num_features
    return build("simclr", network, width, width, 128).to(device)


@pytest.fixture
def swap(model):
    """A swap and its undoing."""
    width = model.projection_head.layers[0].in_features
    return lambda **options: swap_head(model, "simclr", hidden_dim=width, **options).restore()


@pytest.mark.parametrize("dry_run", [False, True], ids=["swap", "dry_run"])
def test_swap_and_restore_against_doing_it_by_hand(dry_run, swap, model, device, against):
    """By hand nothing is checked, and nobody looks for optimisers that hold the old head."""
    old = model.projection_head
    width = old.layers[0].in_features

    def by_hand():
        model.projection_head = SimCLRProjectionHead(width, width, 128).to(device)
        model.projection_head = old

    against(lambda: swap(dry_run=dry_run), by_hand, rounds=9, dtype=None)
    assert model.projection_head is old


def test_swap_and_restore_against_one_training_step(swap, model, full, device, against):
    batch, side = (256, 224) if full else (16, 32)
    views = measure.rotated(lambda: torch.randn(2, batch, 3, side, side, device=device))
    step = stepper(model, views)
    with warnings.catch_warnings():  # that the optimiser is there already
        warnings.simplefilter("ignore")
        against(swap, step, rounds=5, dtype=None)
