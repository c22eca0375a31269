"""Both sides in one process, taking turns: CPU time on one thread, or CUDA events.

Such a ratio moves little on a busy machine, and does not see a side that sleeps. `pytest benchmarks
--benchmark-only` prints times and ratios; all numbers also stand in `extra_info` of
pytest-benchmark's JSON (`--benchmark-json=FILE`).
"""

import gc
import shlex
import statistics
import sys
import time

import measure
import pytest
import torch
from threadpoolctl import threadpool_limits

from headplug.compare.machine import machine, versions
from headplug.device import pick_device
from headplug.errors import HeadplugError

RATIOS, CEILINGS = pytest.StashKey(), pytest.StashKey()


def pytest_addoption(parser):
    group = parser.getgroup("headplug")
    group.addoption("--full", action="store_true", help="the sizes of a GPU, not of a laptop")
    group.addoption("--device", default="auto", choices=("auto", "cpu", "cuda"))
    group.addoption("--data", default="digits", help="of accuracy: what `headplug compare` takes")
    group.addoption("--seeds", type=int, default=2, help="of accuracy: how many")
    group.addoption("--fraction", type=float, default=0.02, help="of a paper's grid to run")


def pytest_configure(config):
    config.stash[RATIOS], config.stash[CEILINGS] = [], {}
    if config.getoption("seeds") < 1:
        raise pytest.UsageError("--seeds must be at least 1")
    if not 0 < config.getoption("fraction") <= 1:
        raise pytest.UsageError("--fraction lies above 0 and is at most 1")
    try:
        pick_device(config.getoption("device"))
    except HeadplugError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_benchmark_update_machine_info(machine_info):
    machine_info.update(machine=machine(), versions=versions())


def pytest_benchmark_update_json(config, output_json):
    """What differs from run to run, so that pytest-benchmark compares them without a warning."""
    command = shlex.join(["pytest", *sys.argv[1:]])
    output_json["headplug"] = {"command": command, "ceilings": config.stash[CEILINGS]}


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[RATIOS]
    if rows:
        terminalreporter.section("time of ours over the peer's: median [quartiles] of pairs")
        for name, ratio, low, high in rows:
            terminalreporter.write_line(f"{ratio:6.2f} [{low:.2f}, {high:.2f}]  {name}")


@pytest.fixture(scope="session")
def full(pytestconfig):
    """Whether sizes are those of a GPU."""
    return pytestconfig.getoption("full")


@pytest.fixture(scope="session")
def device(pytestconfig):
    """Where to compute."""
    torch.backends.cudnn.allow_tf32 = False  # float32 is what it says, as in the ceiling
    return pick_device(pytestconfig.getoption("device"))


@pytest.fixture(scope="session")
def cpu(device):
    """For peers that compute on the CPU alone."""
    if device.type != "cpu":
        pytest.skip("the peer computes on the CPU; add --device cpu")


@pytest.fixture(scope="session")
def cuda(device):
    """For what only a GPU has."""
    if device.type != "cuda":
        pytest.skip("needs a GPU: CUDA graphs are captured on one")


@pytest.fixture
def one_thread(monkeypatch):
    """For torch; children and what is not loaded yet read it from the environment."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ceilings(pytestconfig, device, one_thread):
    """What this machine can do at most, measured once."""
    if not pytestconfig.stash[CEILINGS]:
        pytestconfig.stash[CEILINGS].update(measure.ceilings(device))
    return pytestconfig.stash[CEILINGS]


@pytest.fixture
def noted(benchmark, request):
    """Puts the ratios of pairs into `extra_info` and the table at the end, and gives the median."""

    def note(ours, peer):
        ratios = [a / b for a, b in zip(ours, peer, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        benchmark.extra_info.update(
            ratio=middle, ratio_low=low, ratio_high=high, pairs=len(ratios),
            ms=1000 * statistics.median(ours), peer_ms=1000 * statistics.median(peer),
        )  # fmt: skip
        request.config.stash[RATIOS].append((request.node.name, middle, low, high))
        return middle

    return note


@pytest.fixture
def against(benchmark, one_thread, request, device, noted):
    """Times `ours` with pytest-benchmark and its ratio to `peer` in interleaved pairs.

    `samples` are those of a call, for a rate; `dtype` that of its products, None if they are not
    what it spends its time on; `eager` both sides' work where it cannot be counted while it is
    compiled or a graph. Memory, which is not noted then, is that of tensors beyond those there
    before the call. What takes two seconds is not counted, as that takes several times as long.
    """

    def run(ours, peer, *, rounds=31, budget=2, samples=None, dtype="float32", eager=None):
        guarded = not benchmark.enabled  # in the test suite
        rounds = min(rounds, 7) if guarded else rounds
        sides = {"": ours, "peer_": peer}
        for _ in range(3 if rounds > 9 else 1):
            for side in sides.values():
                side()
        gc.collect()
        spent = {name: [] for name in sides}
        until = time.monotonic() + budget
        with threadpool_limits(1):  # NumPy's and SciPy's, now that they are loaded
            for i in range(rounds):
                if i >= min(rounds, 5) and time.monotonic() > until:
                    break
                for name in list(sides)[:: 1 if i % 2 else -1]:
                    spent[name].append(measure.seconds(sides[name], device))
        middle = noted(*spent.values())
        if guarded:
            return middle
        info, ceilings = benchmark.extra_info, request.getfixturevalue("ceilings")
        counts = dict(zip(sides, eager or sides.values(), strict=True))
        for name in sides:
            median = statistics.median(spent[name])
            if samples:
                info[f"{name}samples_per_s"] = samples / median
            if median > 2:
                continue
            work, peak = measure.counted(counts[name], device)
            if peak and not eager:
                info[f"{name}peak_mib"] = peak / 2**20
            if work and dtype:
                info[f"{name}gflop_per_s"] = work / median / 1e9
                info[f"{name}of_matmul_ceiling"] = work / median / ceilings[dtype]
        benchmark.pedantic(measure.waited(ours, device), rounds=3 if info["ms"] < 1000 else 1)
        return middle

    return run
