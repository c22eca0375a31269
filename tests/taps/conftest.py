"""Scripts on two processes of torch.distributed."""

import subprocess
import sys

import pytest


@pytest.fixture
def on_two_processes(tmp_path):
    """Runs a script that gets its rank and a file to meet at, and says "fine" at its end."""

    def run(script):
        path = tmp_path / "script.py"
        path.write_text(script)
        ranks = [
            subprocess.Popen(
                [sys.executable, path, str(rank), tmp_path / "meet"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        said = [process.communicate(timeout=180)[0] for process in ranks]
        assert [process.returncode for process in ranks] == [0, 0], said
        assert all("fine" in text for text in said)

    return run
