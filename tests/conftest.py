"""What several parts of the suite share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
OVERLAY = ROOT / ".solo"
CLONE = Path(os.environ.get("SOLO_LEARN_HOME") or ROOT / "no clone")
MISSING = {
    "release": "solo-learn 1.0.2 is not in .solo; `make .solo/ready` (part of `make test`) puts it "
    "there",
    "main": "set SOLO_LEARN_HOME to a clone of solo-learn main: "
    "git clone https://github.com/vturrisi/solo-learn",
}


@pytest.fixture(scope="session")
def solo_home() -> Callable[[str], Path]:
    """Where a version of solo-learn is, "release" or "main"; skips the test where it is not."""

    def home(version: str) -> Path:
        folder = {"release": OVERLAY, "main": CLONE}[version]
        if not (folder / "solo").is_dir():
            pytest.skip(MISSING[version])
        return folder

    return home


@pytest.fixture(scope="session")
def run_on_solo(solo_home: Callable[[str], Path]) -> Callable[[str, str], dict[str, Any]]:
    """Runs a test file as a script on a version of solo-learn, "release" or "main".

    The release needs other versions of its libraries than the rest, hence a process of its own. The
    file gets the version as its argument and prints one JSON object as the last line.
    """

    def run(file: str, version: str) -> dict[str, Any]:
        home = solo_home(version)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, [home, ROOT, ROOT / "adapters"])),
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, file, version],
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    return run
