"""Both sides in one process, taking turns, on one thread, by CPU time.

Such a ratio moves little on a busy machine. `pytest benchmarks --benchmark-only` prints times and
ratios; the ratios also stand in `extra_info` of pytest-benchmark's JSON (`--benchmark-json=FILE`).
"""

import gc
import shlex
import statistics
import sys
import time

import pytest
import torch

from headplug.compare.machine import machine, versions

RATIOS = pytest.StashKey()


def pytest_configure(config):
    config.stash[RATIOS] = []


def pytest_benchmark_update_machine_info(config, machine_info):
    command = shlex.join(["pytest", *sys.argv[1:]])
    machine_info.update(machine=machine(), versions=versions(), command=command)


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[RATIOS]
    if rows:
        terminalreporter.section("time of ours over the peer's: median [quartiles] of pairs")
        for name, ratio, low, high in rows:
            terminalreporter.write_line(f"{ratio:6.2f} [{low:.2f}, {high:.2f}]  {name}")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def against(benchmark, one_thread, request):
    """Times `ours` with pytest-benchmark and its ratio to `peer` in interleaved pairs."""

    def run(ours, peer, rounds=31):
        rounds = rounds if benchmark.enabled else min(rounds, 7)  # guards, in the test suite
        for _ in range(3 if rounds > 3 else 1):
            ours()
            peer()
        gc.collect()
        ratios = []
        for i in range(rounds):
            pair = (ours, peer) if i % 2 else (peer, ours)
            spent = {}
            for side in pair:
                started = time.process_time()
                side()
                spent[side] = time.process_time() - started
            ratios.append(spent[ours] / spent[peer])
        low, middle, high = statistics.quantiles(ratios, n=4)
        benchmark.extra_info.update(ratio=middle, ratio_low=low, ratio_high=high, pairs=rounds)
        request.config.stash[RATIOS].append((request.node.name, middle, low, high))
        benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
        return middle

    return run
