"""No head, tap or probe has become clearly slower than its peer."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_guarded_benchmarks_hold_their_bounds():
    """In a process of their own: CPU time on one thread, in interleaved pairs."""
    command = ["-m", "pytest", "benchmarks/throughput", "-m", "guard", "--benchmark-disable", "-q"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
