"""The command line: what it prints, its exit codes, and that no traceback reaches the user."""

import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from headplug import (
    Autoencoder,
    FeatureStore,
    describe_head,
    features,
    list_heads,
    probe_layers,
)
from headplug.cli import main
from headplug.compare.data import load_data
from headplug.models import load_model


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


def test_data_for_extraction_need_no_lightning():
    code = "import headplug.extraction, sys; print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


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
        (["compare", "--protocol", "moko"], "moco"),
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
    for command in ("heads", "taps", "extract", "pretrain-ae", "compare", "report"):
        assert command in out + err


# ---- features ------------------------------------------------------------------------------------


def test_taps_tells_what_each_point_costs(headplug):
    code, out, _ = headplug("taps", "torchvision:resnet18", "--image-size", "32")
    assert code == 0
    header, *rows = out.splitlines()
    assert header.split() == ["path", "type", "shape", "calls", "cost", "so", "far"]
    assert rows[-1].endswith("100%")


def test_extract_keeps_features_and_does_nothing_twice(headplug, tmp_path):
    command = (
        "extract", "timm:test_resnet", "--random", "--limit", "100", "--at", "layer[12]",
        "--at", "global_pool", "--out", str(tmp_path / "f"), "--batch-size", "32",
    )  # fmt: skip
    code, out, err = headplug(*command, "--split", "train", "--json")
    assert code == 0, err
    (store,) = json.loads(out)["stores"]
    assert store["computed"] == 100
    code, out, err = headplug(*command)
    assert code == 0, err
    assert "test_resnet with random weights" in err
    assert "digits: 8 x 8 pixels, values in [0, 1], not standardised" in err
    assert "train: 100 samples, float32, already there" in out
    assert "test: 100 samples, float32, " in out
    assert out.splitlines()[1].split() == ["layer1", "100", "x", "32"]
    found = {split: FeatureStore.open(tmp_path / "f" / split) for split in ("train", "test")}
    assert store["taps"] == {tap: list(shape) for tap, shape in found["train"].shapes.items()}
    report = probe_layers(found["train"], found["test"], probes=("ridge",))
    assert max(row["accuracy"] for row in report.rows) > 0.3
    code, _, err = headplug(*command, "--pool", "flat")
    assert code == 1
    assert "another extraction: the pooling (gap there, flat now)" in err
    assert "(out, --out)" in err
    code, _, err = headplug(*command, "--normalize", "0.25/0.5")
    assert "the transform (values in [0, 1], not standardised" in err
    assert "there, standardised with mean 0.25 and deviation 0.5 " in err
    code, _, err = headplug(*command, "--limit", "50")
    assert "the number of samples (100 there, 50 now) changed" in err
    assert "random" not in err


def test_extract_keeps_the_rows_of_the_data_and_standardises_as_asked(headplug, tmp_path):
    """One image for fewer than all classes; ids, labels and features are those of their rows."""
    code, _, err = headplug(
        "extract", "timm:test_resnet", "--random", "--at", "conv1", "--pool", "flat",
        "--limit", "7", "--split", "train", "--out", str(tmp_path), "--normalize", "0.25/0.5",
    )  # fmt: skip
    assert code == 0, err
    assert "standardised with mean 0.25 and deviation 0.5" in err
    store = FeatureStore.open(tmp_path / "train")
    data = load_data("digits", show_progress=False).train
    assert len(store) == 7
    assert store.ids.tolist() != list(range(7))
    assert torch.equal(store.labels, data.labels[store.ids])
    torch.manual_seed(0)
    model = load_model("timm:test_resnet", shape=data.shape).model.eval()
    x = (data[store.ids][0] / 255 - 0.25) / 0.5
    torch.testing.assert_close(store["conv1"], features(model, x, "conv1", pool="flat"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("timm:resnet81",), "Closest: resnet18"),
        (("torchvision:resnet81",), "Closest: resnet18"),
        (("hf-hub:somebody/resnet18",), "hf-hub:timm/NAME"),
        (("timm:test_resnet", "--at", "laier1"), "Closest: layer1"),
        (("timm:test_resnet", "--at", "nothing"), "headplug taps timm:test_resnet shows all"),
        (("timm:test_resnet", "--batch-size", "0"), "batch_size must be a positive integer"),
        (("timm:test_resnet", "--workers", "-1"), "workers must be 0 or more, not -1"),
        (("timm:test_resnet", "--limit", "0"), "limit must be a positive integer, not 0"),
        (("timm:test_resnet", "--image-size", "0"), "image_size must be a positive integer"),
        (("timm:test_resnet", "--pool", "gab"), "pool is one of flat, gap"),
        (("timm:test_resnet", "--dtype", "float46"), "Closest: float16"),
        (("timm:test_resnet", "--split", "tset"), "Closest: test"),
        (("timm:test_resnet", "--device", "gpu"), "use auto, cpu or cuda"),
        (("timm:test_resnet", "--normalize", "imagnet"), "imagenet. Or give MEAN/STD"),
        (("timm:test_resnet", "--normalize", "0.5"), "Or give MEAN/STD"),
        (("timm:test_resnet", "--normalize", "0.5,0.5/0.1"), "as many means as deviations"),
        (("timm:test_resnet", "--normalize", "0.5/0"), "and these above 0"),
        (("timm:test_resnet", "--normalize", "nan/1"), "and these above 0"),
    ],
)
def test_extract_finds_mistakes_before_it_looks_for_data(headplug, tmp_path, options, words):
    at = () if "--at" in options else ("--at", "layer1")
    code, _, err = headplug(
        "extract", *options, *at, "--random", "--out", str(tmp_path / "x"), "--data", "/not/there"
    )
    assert code == 2
    assert words in err
    assert "list_taps" not in err
    assert not list(tmp_path.iterdir())


def test_extract_tells_when_images_do_not_suit_the_model(headplug, tmp_path):
    out = ("--out", str(tmp_path / "x"), "--limit", "3")
    code, _, err = headplug("extract", "torchvision:vit_b_16", "--random", "--at", "encoder", *out)
    assert code == 2
    assert "takes images of 224 x 224 pixels, and these have 8 x 8; pass --image-size 224" in err
    code, _, err = headplug("extract", "timm:test_vit", "--random", *out)
    assert code == 2
    assert "multiples of 16 pixels, and these have 8 x 8; pass --image-size 160" in err
    code, _, err = headplug(
        "extract", "timm:test_resnet", "--random", "--at", "layer1", *out, "--normalize", "0,0/1,1"
    )
    assert code == 2
    assert "with 2 means, but the model takes 1 channel." in err


def test_weights_for_a_library_model_keep_what_the_library_standardises_with(headplug, tmp_path):
    torch.manual_seed(0)
    for name in ("timm:test_resnet", "torchvision:resnet18"):
        model = load_model(name, shape=(3, 32, 32)).model
        torch.save(model.state_dict(), tmp_path / "w.pth")
        loaded = load_model(name, weights=tmp_path / "w.pth")
        assert len(loaded.mean) == len(loaded.std) == 3
        assert load_model(name).mean == ()
        state = loaded.model.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert loaded.mean == (0.485, 0.456, 0.406)
    code, _, err = headplug(
        "extract", "torchvision:resnet18", "--weights", str(tmp_path / "w.pth"), "--at", "layer1",
        "--limit", "3", "--split", "test", "--out", str(tmp_path / "x"), "--image-size", "32",
    )  # fmt: skip
    assert code == 0, err
    assert "digits: 32 x 32 pixels, standardised with mean 0.485/0.456/0.406" in err


def test_taps_takes_names_of_the_hub_and_models_of_any_channels(headplug, tmp_path, monkeypatch):
    (tmp_path / "grey_code.py").write_text(
        "from torch import nn\n"
        "class Grey(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Conv2d(1, 2, 3), nn.ReLU())\n"
        "def lazy():\n"
        "    import not_installed\n"
    )
    (tmp_path / "lacking_code.py").write_text("import not_installed.part\n")
    monkeypatch.chdir(tmp_path)
    code, out, err = headplug("taps", "grey_code:Grey", "--image-size", "8", "--json")
    assert code == 0, err
    assert json.loads(out)[0]["shape"] == [1, 2, 6, 6]
    code, out, err = headplug(
        "taps", "hf-hub:timm/test_resnet.r160_in1k", "--image-size", "32", "--json"
    )
    assert code == 0, err
    assert "layer1" in {row["path"] for row in json.loads(out)}
    for name in ("lacking_code:model", "grey_code:lazy"):
        code, _, err = headplug("taps", name)
        assert code == 1
        assert "imports what is not there: No module named 'not_installed'" in err
        assert "pip install" not in err


SCRIPT = """
import sys, lightning, torch
from torch import nn
from torchvision.models import resnet18
from headplug.callbacks import HeadSwap
from lightly.models.modules import SimCLRProjectionHead

class Module(lightning.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(*list(resnet18().children())[:-1], nn.Flatten())
        self.projection_head = SimCLRProjectionHead(512, 16, width)
    def forward(self, x):
        return self.projection_head(self.backbone(x))

def build():
    print("built")
    return Module(8)

number = 3
"""


def test_extract_reads_checkpoints_and_code(headplug, tmp_path, monkeypatch):
    """lightly's kind of Lightning module, as its class, as a function, and its backbone alone."""
    (tmp_path / "user_code.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("user_code")
    model = module.Module(width=6).eval()
    callback = module.HeadSwap("simclr_plain", hidden_dim=12, output_dim=6)
    callback.setup(SimpleNamespace(callbacks=[callback]), model, "fit")
    content = {
        "state_dict": model.state_dict(),
        "hyper_parameters": {"width": 6},
        "pytorch-lightning_version": "2.6.0",
    }
    model.on_save_checkpoint(content)
    torch.save(content, "last.ckpt")

    x = load_data("digits", limit=40, show_progress=False).train[list(range(40))][0]
    x = (x.float() / 255).expand(-1, 3, -1, -1)
    options = ("--limit", "40", "--image-size", "8", "--split", "train")
    at = ("--at", "backbone.4", "--at", "pre_projection", "--at", "projection")
    code, _, err = headplug(
        "extract", "user_code:Module", "--weights", "last.ckpt", *at, "--out", "whole", *options
    )
    assert code == 0, err
    store = FeatureStore.open("whole/train")
    for tap in store.points:
        expected = features(model, x, tap, pool="gap")
        torch.testing.assert_close(store[tap], expected, rtol=1e-4, atol=1e-5)
    assert store.shapes["projection"] == (40, 6)

    code, _, err = headplug(
        "extract", "last.ckpt", "--backbone", "torchvision:resnet18", "--at", "backbone",
        "--at", "backbone.layer*", "--out", "alone", *options,
    )  # fmt: skip
    assert code == 0, err
    alone = FeatureStore.open("alone/train")
    assert alone.points[-1] == "backbone"
    torch.testing.assert_close(alone["backbone"], store["pre_projection"], rtol=1e-4, atol=1e-5)
    state = {f"module.{k}": v for k, v in module.resnet18().state_dict().items()}  # as DDP saves
    torch.save(state, "ddp.pth")
    code, out, err = headplug("taps", "ddp.pth", "--backbone", "torchvision:resnet18", "--json")
    assert code == 0, err
    code, out, err = headplug("taps", "user_code:build", "--image-size", "32", "--json")
    assert code == 0, err
    assert "built" in err
    assert json.loads(out)
    code, out, err = headplug("taps", "last.ckpt", "--backbone", "timm:resnet18", "--json")
    assert code == 0, err
    assert "backbone.layer4" in {row["path"] for row in json.loads(out)}

    for arguments, words in (
        (("last.ckpt",), ["not what they are of", "ResNet-18", "--backbone torchvision:resnet18"]),
        (("last.ckpt", "--backbone", "torchvision:resnet50"), ["do not fit ResNet", "missing"]),
        (("none.ckpt",), ["there is no file 'none.ckpt'"]),
        (("user_code:build", "--weights", "last.ckpt"), ["do not fit Module", "projection_head"]),
        (("user_code:biuld",), ["no object in user_code is called 'biuld'", "build"]),
        (("user_cod:build",), ["there is no module 'user_cod'"]),
        (("user_code:number",), ["cannot be called"]),
        (("user_code:nn.Linear",), ["cannot be called without arguments"]),
    ):
        code, out, err = headplug(
            "extract", *arguments, "--at", "1", "--out", "x", "--image-size", "8", "--limit", "20"
        )
        assert code in (1, 2)
        assert err.startswith("error: ") or "\nerror: " in err, err
        assert all(word in err for word in words), err
        assert "Traceback" not in err
    assert not list(tmp_path.glob("x/*/*"))
