"""Both sides in one process, taking turns, on one thread, by CPU time.

Such a ratio moves little on a busy machine. `pytest benchmarks --benchmark-only` prints times and
ratios; the ratios also stand in `extra_info` of pytest-benchmark's JSON (`--benchmark-json=FILE`).
"""

import gc
import statistics
import time

import pytest
import torch

RATIOS = pytest.StashKey()


def pytest_configure(config):
    config.stash[RATIOS] = []


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
        for _ in range(3):
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
