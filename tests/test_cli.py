"""The command line: what it prints, its exit codes, and that no traceback reaches the user."""

import json
import subprocess
import sys

import pytest
import torch

from headplug import Autoencoder
from headplug.cli import main


@pytest.fixture
def headplug(monkeypatch, capsys):
    """Runs a command in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["headplug", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


def test_installed_script_answers():
    done = subprocess.run(
        [sys.executable, "-m", "headplug.cli", "heads", "*moco*"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "moco_v2" in done.stdout
    assert "moco_v3" in done.stdout


def test_heads_lists_shows_one_and_gives_json(headplug):
    code, out, _ = headplug("heads", "simclr*")
    assert code == 0
    assert out.index("simclr_plain") < out.index("simclr_v2")
    code, out, _ = headplug("heads", "byol")
    assert "2006.07733" in out
    assert "hidden_dim=4096" in out
    code, out, _ = headplug("heads", "byol", "--json")
    assert json.loads(out)[0]["defaults"]["output_dim"] == 256


def test_taps_of_a_timm_model(headplug):
    code, out, _ = headplug("taps", "timm:test_resnet", "--image-size", "32", "--json")
    rows = {r["path"]: r for r in json.loads(out)}
    assert code == 0
    assert rows["layer1"]["shape"][0] == 1


def test_pretrain_ae_writes_a_file_that_a_head_takes(headplug, tmp_path):
    path = tmp_path / "ae.safetensors"
    code, out, _ = headplug(
        "pretrain-ae", "--data", "digits", "--latent-dim", "8", "--hidden-dim", "16",
        "--epochs", "2", "--limit", "100", "--out", str(path),
    )  # fmt: skip
    assert code == 0
    assert "validation MSE" in out
    ae = Autoencoder.load(path)
    assert ae.config == {"input_shape": [1, 8, 8], "latent_dim": 8, "hidden_dim": 16}
    assert ae(torch.rand(1, 1, 8, 8)).shape == (1, 1, 8, 8)
    assert list(tmp_path.iterdir()) == [path]


def test_compare_prints_table_answer_and_paths_and_report_prints_them_again(headplug, tmp_path):
    out_folder = str(tmp_path / "run")
    code, out, err = headplug(
        "compare", "--backbone", "test_resnet", "--limit", "200", "--epochs", "1",
        "--batch-size", "64", "--heads", "simclr_plain,reweighting", "--out", out_folder,
    )  # fmt: skip
    assert code == 0, err
    assert "pre_projection" in out
    assert "report.html" in out
    assert "done: reweighting, seed 0" in err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["command"].startswith("headplug compare --backbone test_resnet")
    (tmp_path / "run" / "report.html").unlink()
    code, again, _ = headplug("report", out_folder)
    assert code == 0
    assert again.splitlines()[:12] == out.splitlines()[:12]
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["heads", "simclir"], "simclr"),
        (["taps", "timm:resnet81"], "resnet18"),
        (["compare", "--heads", "byoll"], "byol"),
        (["compare", "--data", "cifar11"], "digits"),
        (["compare", "--backbone", "resnet_18"], "resnet18"),
        (["compare", "--recipe", "simclrs"], "simclr"),
        (["compare", "--seeds", "a,b"], "--seeds"),
        (["compare", "--activation", "rleu"], "relu"),
        (["compare", "--epochs", "many"], "--epochs"),
        (["compare", "--hedas", "simclr"], "--hedas"),
        (["pretrain-ae", "--out", "ae.pt"], ".safetensors"),
        (["pretrain-ae"], "--out"),
        (["pretrain-ae", "--out", "ae.safetensors", "--device", "gpu"], "cuda"),
        (["report", "no/such/run"], "compare"),
        (["comapre"], "comapre"),
    ],
)
def test_mistakes_give_one_line_and_exit_code_2(headplug, arguments, words):
    code, _, err = headplug(*arguments)
    assert code == 2
    assert words in err
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_failure_gives_exit_code_1(headplug, tmp_path):
    (tmp_path / "results.json").write_text('{"schema": 99, "runs": []}')
    code, _, err = headplug("report", str(tmp_path))
    assert code == 1
    assert "schema" in err


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["headplug", "--debug", "heads", "simclir"])
    with pytest.raises(LookupError):
        main()


def test_no_arguments_and_help_show_the_commands(headplug):
    code, out, err = headplug("--help")
    assert code == 0
    for command in ("heads", "taps", "pretrain-ae", "compare", "report"):
        assert command in out + err
