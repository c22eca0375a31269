"""The command line: what it prints, its exit codes, and that no traceback reaches the user."""

import json
import subprocess
import sys

import pytest
import torch

from headplug import Autoencoder, describe_head, list_heads
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


def test_heads_prints_the_zoo_with_layers_dims_parameters_and_paper(headplug):
    code, out, _ = headplug("heads", "simclr*")
    assert code == 0
    header, *rows = out.splitlines()
    assert header.split() == ["name", "layers", "dims", "parameters", "paper"]
    assert [row.split()[0] for row in rows] == ["simclr", "simclr_plain", "simclr_v2"]
    assert "L- BN ReLU L- BN " in rows[0]
    assert " 512-2048-128 " in rows[0]
    assert " 1,315,072 " in rows[0]
    assert rows[0].endswith("arXiv 2002.05709")
    assert all(row.index("arXiv") == header.index("paper") for row in rows)


def test_heads_counts_frozen_weights_apart_and_takes_a_width(headplug):
    code, out, _ = headplug("heads", "[ar]e*", "--input-dim", "2048")
    assert code == 0
    assert "32,896 (+524,544 fixed)" in out  # 2048 x 256 + 256
    assert "0 (+2,048 fixed)" in out


def test_heads_shows_one_whole(headplug):
    code, out, _ = headplug("heads", "byol")
    assert code == 0
    for part in (
        "2006.07733",
        "hidden_dim=4096",
        "BYOLProjectionHead",
        "L- BN ReLU L+",
        "3,154,176",
    ):
        assert part in out


def test_heads_gives_json_of_all_and_of_one(headplug):
    _, out, _ = headplug("heads", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert list(rows) == list_heads()
    for name, row in rows.items():
        entry = describe_head(name)
        assert row["defaults"] == json.loads(json.dumps(entry.defaults))
        assert isinstance(row["params_trainable"], int)
        assert row["dims"].startswith("512-")
        assert row["layers"]
    _, out, _ = headplug("heads", "byol", "--json")
    assert json.loads(out) == [rows["byol"]]


@pytest.mark.parametrize(("arguments", "words"), [
    (("byo",), "Closest: byol"),
    (("byol", "--input-dim", "0"), "input_dim must be a positive integer"),
])  # fmt: skip
def test_heads_refuses_what_is_not_there(headplug, arguments, words):
    code, out, err = headplug("heads", *arguments)
    assert code == 2
    assert words in err
    assert out == ""


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
