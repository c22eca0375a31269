"""A head's training step against the module of solo-learn's own method, on the CPU.

solo-learn lives beside other versions of its libraries, so the pairs are timed in a process of its
own, for which this file is also the script. Methods are made as the tests of the heads' sources
make them: release 1.0.2 of `make .solo/ready`, or a clone that SOLO_LEARN_HOME names.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headplug import describe_head, list_heads

ROOT = Path(__file__).resolve().parents[2]
SIZES = (512, 128, 512, 300)  # hidden, output, predictor's hidden, prototypes
ROWS, PAIRS = 256, 15
OF_SOLO = [n for n in list_heads() if describe_head(n).source.startswith("solo.")]


@pytest.fixture(scope="module")
def found(cpu):
    """What the script prints: by head, the seconds of both sides in turn."""
    clone = os.environ.get("SOLO_LEARN_HOME")
    version, home = ("main", Path(clone)) if clone else ("release", ROOT / ".solo")
    if not (home / "solo").is_dir():
        pytest.skip("no solo-learn: `make .solo/ready`, or set SOLO_LEARN_HOME to a clone")
    folders = [home, ROOT, ROOT / "adapters", ROOT / "benchmarks"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", __file__, version]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {"version": version, **json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize("name", OF_SOLO)
def test_head_against_solo_learn(name, found, benchmark, noted):
    if name not in found:
        pytest.skip(f"solo-learn {found['version']} has no equal module; set SOLO_LEARN_HOME")
    benchmark.extra_info["solo_learn"] = found["version"]
    ratio = noted(found[name]["ours"], found[name]["peer"])
    benchmark.pedantic(lambda: None)
    assert ratio < 1.2


def main(version):
    import torch
    from solo.methods import METHODS

    spec = importlib.util.spec_from_file_location("sources", ROOT / "tests/heads/test_sources.py")
    sources = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sources)
    torch.set_num_threads(1)
    out = {}
    for name in OF_SOLO:
        method, _, part = sources.SOURCES[name].removeprefix("solo.methods.").partition(":")
        if method not in METHODS:
            continue
        for variant in ({}, *sources.VARIANTS.get(method, [])):
            model = sources.method_of(version, method, SIZES, **variant)
            source = model.get_submodule(part.partition(".")[2])
            head = sources.like(name, source)
            alike = sources.shapes(head.solo_state_dict()) == sources.shapes(source.state_dict())
            if alike and trained_by(head) == trained_by(source):
                out[name] = in_pairs(step_of(head), step_of(source, head.input_dim))
                break
    return out


def trained_by(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def step_of(head, width=None):
    """Forward, backward and SGD with momentum on random features."""
    import torch
    from measure import rotated

    width = width or head.input_dim
    trained = [p for p in head.train().parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9) if trained else None
    inputs = rotated(lambda: torch.randn(ROWS, width, requires_grad=True))
    several = isinstance(head, torch.nn.ModuleList)

    def step():
        x = next(inputs)
        z = [one(x) for one in head] if several else head(x)
        if not isinstance(z, torch.Tensor):
            z = torch.cat(list(z), dim=-1)
        z.square().mean().backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        x.grad = None

    return step


def in_pairs(ours, peer):
    """CPU seconds of both, in turn."""
    spent = {ours: [], peer: []}
    for i in range(3 + PAIRS):
        for side in (ours, peer) if i % 2 else (peer, ours):
            started = time.process_time()
            side()
            spent[side].append(time.process_time() - started)
    return {"ours": spent[ours][3:], "peer": spent[peer][3:]}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
