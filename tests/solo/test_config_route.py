"""The head in a solo-learn config: real runs of solo-learn's own scripts.

Each run is a process, since that is what is under test: Hydra's plugins, Lightning's other ranks,
`headplug-solo`. Several tests look at one run. This file is also the script that some of them run:
`test_config_route.py GROUP FOLDER`.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
OVERLAY = ROOT / ".solo"
CLONE = os.environ.get("SOLO_LEARN_HOME", "")
H, AE, O = 512, 12, 8  # noqa: E741 - widths: features, embedding, projection

needs_release = pytest.mark.skipif(
    not (OVERLAY / "solo").is_dir(),
    reason="solo-learn 1.0.2 is not in .solo; `make .solo/ready` (part of `make test`) puts it "
    "there",
)
needs_main = pytest.mark.skipif(
    not (Path(CLONE) / "solo").is_dir() or not CLONE,
    reason="set SOLO_LEARN_HOME to a clone of solo-learn main: "
    "git clone https://github.com/vturrisi/solo-learn",
)


@pytest.fixture(scope="module")
def sweep(work: Any) -> Any:
    """Two heads in one sweep of the group, which gives the autoencoder to both."""
    done = work.pretrain(
        "simclr", "sweep", "--multirun", "+headplug=ae_embedding,reweighting",
        "+headplug.head.weights=ae.pt", "auto_resume.enabled=True",
    )  # fmt: skip
    return done, work.read("sweep")


@needs_main
@pytest.mark.slow
def test_the_group_brings_heads_also_when_it_is_swept(work: Any, sweep: Any) -> None:
    done, ((_, first), (_, second)) = sweep
    assert "becomes ae_embedding (512 > 8)" in done.stdout
    assert "becomes reweighting (512 > 512)" in done.stdout
    assert torch.equal(first["state_dict"]["projector.layers.embedding.weight"], work.embedding)
    assert [k for k in second["state_dict"] if "projector" in k] == ["projector.reweights"]
    assert "is an autoencoder's and not used for 'reweighting'" in done.stdout


@needs_main
@pytest.mark.slow
def test_the_whole_head_is_in_args_json_and_in_the_checkpoint(work: Any, sweep: Any) -> None:
    from headplug import create_head

    _, runs = sweep
    (block, other) = (args["headplug"] for args, _ in runs)
    records = [checkpoint["headplug"] for _, checkpoint in runs]
    assert [[{**b, "twin": None}] for b in (plain(block), plain(other))] == [
        [plain(r) for r in found] for found in records
    ]
    assert block["slot"] == "projector"
    assert block["head"].items() >= {
        "name": "ae_embedding", "input_dim": H, "output_dim": O, "embedding_dim": AE,
        "activation": "tanh", "weights": str(work.folder / "ae.pt"),
    }.items()  # fmt: skip
    assert other["head"] == create_head("reweighting", input_dim=H).config


def plain(block: dict[str, Any]) -> dict[str, Any]:
    """A block or record without the file of weights, which the checkpoint replaces."""
    return {**block, "head": {k: v for k, v in block["head"].items() if k != "weights"}}


@needs_main
@pytest.mark.slow
def test_no_run_resumes_one_with_another_head(work: Any, sweep: Any) -> None:
    stock = work.pretrain("simclr", "sweep", "auto_resume.enabled=True")
    assert "Resuming" not in sweep[0].stdout  # reweighting, after ae_embedding
    assert "Resuming" not in stock.stdout  # stock, after both


@needs_main
@pytest.mark.slow
def test_a_resumed_run_ends_like_one_that_was_not_interrupted(work: Any) -> None:
    head = ("+headplug=ae_embedding", "headplug.head.weights=ae.pt")
    options = ("auto_resume.enabled=True", "max_epochs=2", "+checkpoint.keep_prev=True")
    work.pretrain("simclr", "through", *head, *options)
    (whole,) = (work.folder / "through" / "simclr").iterdir()
    part = work.folder / "resumed" / "simclr" / "part"
    shutil.copytree(whole, part, ignore=shutil.ignore_patterns("*-ep=1.ckpt"))
    done = work.pretrain("simclr", "resumed", *head, *options)
    assert "Resuming from previous checkpoint" in done.stdout
    ((_, resumed),) = (r for r in work.read("resumed") if r[1]["epoch"] == 1)
    through = torch.load(work.last(whole), weights_only=True)
    for key, value in through["state_dict"].items():
        assert torch.equal(resumed["state_dict"][key], value), key
    again = f"+resume_from_checkpoint='{work.last(part)}'"
    done = work.pretrain("simclr", "no", again, "+headplug=reweighting", fails=True)
    assert "the checkpoint has another head than this run asks for" in done.stderr
    assert "name: 'ae_embedding' and 'reweighting'" in done.stderr


@needs_main
@pytest.mark.slow
def test_every_rank_that_lightning_starts_is_swapped(work: Any) -> None:
    (work.folder / "ranks").mkdir()
    head = ("+headplug=ae_embedding", "headplug.head.weights=ae.pt")
    small = ("method_kwargs.pred_hidden_dim=16", "hydra.job.chdir=True", "hydra.run.dir=elsewhere")
    done = work.pretrain(
        "byol", "byol", *head, *small, devices=2, RECORD=str(work.folder / "ranks")
    )  # fmt: skip
    assert done.stdout.count("becomes ae_embedding") == 1  # said once
    ranks = [r["heads"]["BYOL"] for r in work.records("ranks")]
    assert len(ranks) == 2
    assert ranks[0][0] == "AEEmbeddingHead"
    assert ranks[0] == ranks[1]  # the trained weights too
    ((_, checkpoint),) = work.read("byol")
    for head_path in ("projector", "momentum_projector"):
        weight = checkpoint["state_dict"][f"{head_path}.layers.embedding.weight"]
        assert torch.equal(weight, work.embedding)


@needs_main
@pytest.mark.slow
def test_the_block_in_a_yaml_file_works_under_torchrun_and_the_launcher(work: Any) -> None:
    (work.folder / "torchrun").mkdir()
    configs = work.folder / "cifar"
    shutil.copytree(Path(CLONE, "scripts", "pretrain", "cifar"), configs)
    with (configs / "nnclr.yaml").open("a") as file:
        file.write(f"headplug:\n  head: {{name: ae_embedding, weights: {work.folder}/ae.pt}}\n")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    small = ("method_kwargs.queue_size=16", "method_kwargs.pred_hidden_dim=16")
    work.pretrain(
        "nnclr", "nnclr", *small, configs=configs, devices=2,
        launch=(*launch, "-m", "headplug_solo"), RECORD=str(work.folder / "torchrun"),
    )  # fmt: skip
    ranks = [r["heads"]["NNCLR"] for r in work.records("torchrun")]
    assert [name for name, _ in ranks] == ["AEEmbeddingHead"] * 2
    ((args, _),) = work.read("nnclr")
    assert args["headplug"]["head"]["name"] == "ae_embedding"


@needs_main
@pytest.mark.slow
def test_layers_are_probed_on_every_rank_on_resume_and_in_a_sweep(work: Any) -> None:
    layers = (
        "+headplug.probe.taps=[backbone,projection]",
        "+headplug.probe.max_fraction_of_time=null",
    )
    options = ("max_epochs=2", "+checkpoint.keep_prev=True", "auto_resume.enabled=True")
    done = work.pretrain(
        "simclr", "probed", "+headplug.head=reweighting", *layers, *options, devices=2
    )
    assert done.stdout.count("headplug: LayerProbe reads backbone, projection") == 1
    (whole,) = (work.folder / "probed" / "simclr").iterdir()
    through = history(work.last(whole))
    assert [row["epoch"] for row in through] == [0, 1]
    assert through[-1].keys() >= {
        f"probe/{tap}/{name}"
        for tap in ("backbone", "projection")
        for name in ("knn_accuracy", "rankme")
    }
    assert "probe" not in json.loads((whole / "args.json").read_text())["headplug"]
    work.last(whole).unlink()

    done = work.pretrain(
        "simclr", "probed", "--multirun", "+headplug.head=reweighting,null", *layers, *options
    )
    assert done.stdout.count("Resuming from previous checkpoint") == 1
    runs = [history(work.last(a.parent)) for a in work.folder.glob("probed/simclr/*/args.json")]
    assert sorted([row["epoch"] for row in run] for run in runs) == [[0], [0, 1], [0, 1]]
    assert sum(run[0] == through[0] for run in runs) == 2
    logged = [
        f for f in work.folder.rglob("metrics.csv") if "probe/backbone/rankme" in f.read_text()
    ]
    assert len(logged) == 3


def history(path: Path) -> list[dict[str, Any]]:
    """What a LayerProbe left in a checkpoint."""
    state = torch.load(path, weights_only=True)
    found: list[dict[str, Any]] = state["callbacks"]["LayerProbe(probe)"]["history"]
    return found


@needs_main
@pytest.mark.slow
def test_a_misspelt_key_stops_the_run_with_one_sentence(work: Any) -> None:
    done = work.pretrain("simclr", "misspelt", "+headplug.haed=reweighting", fails=True)
    assert "no key under `headplug:` is called 'haed'. Closest: head." in done.stderr
    assert "Traceback" not in done.stderr
    assert not (work.folder / "misspelt").exists()


@needs_main
@pytest.mark.slow
def test_a_script_that_imports_solo_learn_within_its_main_is_swapped_too(work: Any) -> None:
    script = work.folder / "late.py"
    script.write_text(
        "import sys, hydra\n"
        f"sys.path.insert(0, {CLONE!r})\n"
        "@hydra.main(version_base='1.2')\n"
        "def main(cfg):\n"
        "    import main_pretrain\n"
        "    main_pretrain.main.__wrapped__(cfg)\n"
        "main()\n"
    )
    configs = str(Path(CLONE, "scripts", "pretrain", "cifar"))
    command = work.pretraining("simclr", "late", "+headplug.head.name=simcrl", configs=configs)
    done = work.run(str(script), *command[1:])
    assert done.returncode != 0
    assert "no head is called 'simcrl'. Closest: simclr" in done.stderr
    assert "Traceback" not in done.stderr
    command = work.pretraining("simclr", "late", "+headplug=reweighting", configs=configs)
    done = work.run(str(script), *command[1:])
    assert "`headplug:` must hold a block, not 'reweighting'" in done.stderr


@needs_main
@pytest.mark.slow
def test_main_knn_sees_the_trained_projector_through_the_launcher(work: Any, sweep: Any) -> None:
    folder = knn_folder(work)
    arguments = (
        str(Path(CLONE, "main_knn.py")), "--pretrained_checkpoint_dir", str(folder),
        "--dataset", "custom",
        "--train_data_path", str(work.folder / "train"), "--num_workers", "0",
        "--val_data_path", str(work.folder / "val"), "--feature_type", "projector",
        "--k", "2", "--temperature", "0.1", "--distance_function", "cosine",
    )  # fmt: skip
    done = work.run("-m", "headplug_solo", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "becomes ae_embedding (512 > 8)" in done.stdout
    assert "acc@1=" in done.stdout
    done = work.run("-m", "headplug_solo", *arguments, NEW_TORCHMETRICS="1")
    assert "pip install 'torchmetrics<0.12'" in done.stderr


def knn_folder(work: Any) -> Path:
    """The AE run of the sweep, whose autoencoder is gone."""
    (run,) = (
        a.parent
        for a in (work.folder / "sweep").glob("*/*/args.json")
        if "ae_embedding" in a.read_text()
    )
    folder = work.folder / "knn"
    if not folder.exists():
        shutil.copytree(run, folder)
        args = (folder / "args.json").read_text()
        (folder / "args.json").write_text(args.replace(f"{work.folder}/ae.pt", "/gone/ae.pt"))
    return folder


@pytest.fixture(scope="module")
def loads(work: Any, sweep: Any) -> dict[str, Any]:
    paths = paths_with(work, CLONE)
    folder = str(knn_folder(work))
    done = work.run("-m", "headplug_solo", __file__, "loads", folder, PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def paths_with(work: Any, solo: Path | str) -> str:
    folders = [work.folder / "shim", solo, ROOT, ROOT / "adapters"]
    return os.pathsep.join(map(str, folders))


@needs_main
@pytest.mark.slow
def test_a_loaded_projector_is_the_checkpoints(loads: dict[str, Any]) -> None:
    assert loads["loaded"] == "equal"
    assert loads["without a block in args.json"] == "equal"
    assert loads["pickled"] == "equal"


@needs_main
@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_is_refused(loads: dict[str, Any]) -> None:
    assert "'projector.layers.output.weight' has shape None" in loads["key missing"]
    assert "activation: 'tanh' and 'relu'" in loads["other head"]
    assert "the checkpoint has solo-learn's own head" in loads["stock"]


@needs_main
@pytest.mark.slow
def test_a_swap_in_python_and_the_callback_leave_the_same_record(loads: dict[str, Any]) -> None:
    assert loads["python"] == ["reweighting", "reweighting"]
    assert loads["python loaded"] == loads["callback loaded"] == "equal"
    assert loads["resumed"] == ["", ""]
    assert loads["mapping"] == "equal"
    assert "no record of it: 'projector." in loads["python unrecorded"]


@needs_main
@pytest.mark.slow
def test_a_swap_leaves_backbone_and_random_state_as_they_are(loads: dict[str, Any]) -> None:
    assert loads["same backbone"]
    assert loads["same random state"]
    assert loads["own subclass"] == "ReweightingHead"
    assert loads["main module"] == ["__main__", True, "loads"]
    assert "it trains a classifier and has no projector" in loads["linear"]


@needs_main
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "words", "line"),
    [
        ("unknown", "no head is called 'ae_embeding'", "name=ae_embeding"),
        ("option", "no option is called 'kapa'. Closest: kappa", "headplug.head.kapa=1.0"),
        ("width", "Build it with input_dim=512", "headplug.head.input_dim=2048"),
        ("weights", "maps 128 features to 3", "/narrow.pt"),
        ("no weights", "then add headplug.head.weights=", "name=ae_embedding"),
        ("mae", "it trains a decoder and has no projector", "name=reweighting"),
    ],
)
def test_a_head_that_cannot_be_is_refused_with_the_line_to_change(
    loads: dict[str, Any], mistake: str, words: str, line: str
) -> None:
    said, _, asked = loads["refused"][mistake].partition("\nThe config asks for headplug.head.")
    assert words in said
    assert line in f"headplug.head.{asked}"


@needs_main
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("unknown", "no tap is called 'bakbone'. Closest: backbone"),
        ("no projector", "'pre_projection' needs one projection head"),
        ("head taken", "no tap is called 'projection.hidden7'"),
    ],
)
def test_taps_that_the_model_lacks_are_refused_as_it_is_made(
    loads: dict[str, Any], mistake: str, words: str
) -> None:
    assert words in loads["refused taps"][mistake]
    assert "The config asks for" not in loads["refused taps"][mistake]
    assert loads["probed as said"] == ["backbone", "projection"]


@needs_main
@pytest.mark.slow
def test_the_head_of_a_yaml_file_can_be_taken_back(loads: dict[str, Any]) -> None:
    assert loads["no head"] == ["Sequential", False]


@needs_release
@pytest.mark.slow
def test_the_release_takes_its_block_from_the_command_line_on_every_rank(work: Any) -> None:
    (work.folder / "release").mkdir()
    block = work.folder / "head.yaml"
    block.write_text("headplug:\n  head: {name: ae_embedding, weights: ae.pt}\n")
    done = work.run(
        "-m", "headplug_solo", "--headplug", str(block), "--headplug=head.activation=relu",
        "--headplug=probe.taps=[backbone, projection]", "--headplug", "probe.probes=knn",
        __file__, "release", str(work.folder),
        PYTHONPATH=paths_with(work, OVERLAY), RECORD=str(work.folder / "release"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    ranks = [r["heads"]["SimCLR"] for r in work.records("release")]
    assert len(ranks) == 2
    assert ranks[0][0] == "AEEmbeddingHead"
    assert ranks[0] == ranks[1]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["head"]["activation"] == "relu"
    assert found["loaded"] == "equal"
    assert found["probed"] == pytest.approx(found["by hand"])
    assert len(found["by hand"]) == 2


def test_other_hydra_applications_are_left_alone(work: Any) -> None:
    app = work.folder / "app.py"
    app.write_text(
        "import hydra, sys\n"
        "@hydra.main(version_base='1.2', config_path=None)\n"
        "def main(cfg):\n"
        "    heavy = {'torch', 'headplug', 'headplug_solo'} & set(sys.modules)\n"
        "    print(cfg, sorted(heavy), sys.argv)\n"
        "main()\n"
    )
    for options in (("+a=1",), ("--info", "searchpath"), ("--help",), ("+headplug=reweighting",)):
        with_plugin, without = (
            work.run(str(app), *options, WITHOUT_HEADPLUG=off) for off in ("", "1")
        )
        assert with_plugin.returncode == without.returncode
        assert with_plugin.stdout == without.stdout
    assert with_plugin.stdout.startswith("{'headplug': 'reweighting'} []")  # a word like any other


@pytest.mark.parametrize("methods", ["", "METHODS = ['a']", "METHODS = {'a': int}"])
def test_another_package_called_solo_is_left_alone(work: Any, methods: str) -> None:
    package = work.folder / "another" / "solo" / "methods"
    package.mkdir(parents=True, exist_ok=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text(f"Y = 1\n{methods}\n")
    app = package.parents[1] / "app.py"
    for top, inside in (("import solo.methods\n", ""), ("", "    import solo.methods\n")):
        app.write_text(
            f"import hydra\n{top}"
            "@hydra.main(version_base='1.2')\n"
            f"def main(cfg):\n{inside}"
            "    print(cfg, solo.methods.Y)\n"
            "main()\n"
        )
        done = work.run(str(app), "+headplug=word")
        assert done.stdout == "{'headplug': 'word'} 1\n", done.stderr[-3000:]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"headplg": {"head": "byol"}}, "the config has the key 'headplg'"),
        ({"HeadPlug": {"head": "byol"}}, "write `headplug:`"),
        ({"method_kwargs": {"headplug": {}}}, "stands under `method_kwargs:`"),
        ({"headplug": {"haed": "byol"}}, "Closest: head."),
        ({"headplug": {"name": "byol"}}, "stand under `head:`"),
        ({"headplug": {}}, "must say which head"),
        ({"headplug": {"head": {"kappa": 2}}}, "a block with `name:`"),
        ({"headplug": "byol"}, "must hold a block, not 'byol'"),
        ({"headplug": {"head": "byol", "slot": 3}}, "must be the path of a module"),
        ({"headplug": {"prob": {}}}, "Closest: probe."),
        ({"headplug": {"head": {"name": "???"}}}, "cannot be read"),
        ({"headplug": {"head": {"name": "${nowhere}"}}}, "cannot be read"),
        ({"headplug": {"head": {"name": "byol", "weights": "ae.pt"}, "weights_sha256": "0"}},
         "is not the file that the config was written for"),
    ],
)  # fmt: skip
def test_mistakes_in_the_block_are_named(
    config: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headplug_solo.config import read_block
    from omegaconf import OmegaConf

    from headplug.errors import HeadplugError

    monkeypatch.chdir(tmp_path)
    Path("ae.pt").write_bytes(b"weights")
    with pytest.raises(HeadplugError) as caught:
        read_block(OmegaConf.create(config))
    assert words in str(caught.value)


def test_a_block_is_read_with_its_weights_from_where_the_user_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headplug_solo.config import ENVIRONMENT, read_block
    from omegaconf import OmegaConf

    monkeypatch.chdir(tmp_path)
    Path("ae.pt").write_bytes(b"weights")
    config = OmegaConf.create(
        {"file": "ae.pt", "headplug": {"head": {"name": "ae_embedding", "weights": "${file}"}}}
    )
    block = read_block(config)
    assert block is not None
    assert block["head"]["weights"] == str(tmp_path / "ae.pt")
    assert len(block["weights_sha256"]) == 64
    assert read_block(config, loading=True) == {"head": {"name": "ae_embedding"}}
    assert read_block(OmegaConf.create({"headplug": None, "head": 1})) is None
    assert read_block(OmegaConf.create({"headplug": {"head": None}})) is None
    assert read_block(None) is None
    monkeypatch.setenv(ENVIRONMENT, json.dumps({"head": "byol"}))
    assert read_block(None) == {"head": {"name": "byol"}}
    with pytest.raises(ValueError, match="Leave --headplug out"):
        read_block(config)


CUSTOM = {"dataset": "custom", "train_path": "t", "val_path": "v"}


@pytest.mark.parametrize(
    ("probe", "data", "words"),
    [
        (5, CUSTOM, "`headplug.probe` must hold a block, not 5"),
        ({"at": "backbone"}, CUSTOM, "no key under `headplug.probe:` is called 'at'"),
        ({"every_n_epoch": 2}, CUSTOM, "Closest: every_n_epochs"),
        ({"every_n_epochs": 0}, CUSTOM, "every_n_epochs must be a positive integer"),
        ({"seed": "x"}, CUSTOM, "`headplug.probe.seed` cannot be 'x'"),
        ({"taps": 5}, CUSTOM, "`headplug.probe.taps` cannot be 5"),
        ({"probes": ["kn"]}, CUSTOM, "no probe is called 'kn'"),
        ({}, {}, "this run does not say where they are"),
        ({}, {**CUSTOM, "no_labels": True}, "this run has no_labels=True"),
        ({}, {**CUSTOM, "val_path": None}, "needs validation images, and this run has none"),
    ],
)
def test_a_probe_that_cannot_be_is_refused_before_the_trainer_is_there(
    probe: Any, data: Any, words: str
) -> None:
    from headplug_solo.config import read_block, read_probe
    from headplug_solo.layers import Images, layer_probe
    from omegaconf import OmegaConf

    from headplug.errors import HeadplugError

    block = {"headplug": {"probe": probe}, "data": data, "optimizer": {"batch_size": 2}}
    config = OmegaConf.create(block)
    assert read_block(config) is None
    with pytest.raises(HeadplugError) as caught:
        layer_probe(read_probe(config) or {}, Images.of(config, {}))
    assert words in str(caught.value)


def test_diagnostics_alone_need_no_validation_images_and_cifar_brings_its_own() -> None:
    from headplug_solo.config import read_block, read_probe
    from headplug_solo.layers import Images, layer_probe
    from omegaconf import OmegaConf

    probe = {"probes": [], "taps": "h", "seed": None}
    both = OmegaConf.create({"headplug": {"head": "byol", "probe": probe}})
    assert read_block(both) == {"head": {"name": "byol"}}
    options = read_probe(both)
    assert options == {"probes": [], "taps": "h"}
    none = Images.of(None, {"dataset": "custom", "train_dir": "t", "val_dir": None})
    assert layer_probe(options, none).at == "h"
    assert Images.of(None, {"dataset": "cifar10"}).has_val
    assert read_probe(OmegaConf.create({"headplug": {"probe": None}})) is None
    assert read_probe(None) is None


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "usage: headplug-solo"),
        (["--help"], 0, "usage: headplug-solo"),
        (["no.py"], 2, "there is no script 'no.py'"),
        (["--headplug"], 2, "--headplug needs a value"),
        (["--headplug", "no.yaml", __file__], 2, "there is no such file"),
        (["--headplug", "head={", __file__], 2, "cannot be read"),
        ([__file__, "--headplug=head: byol"], 2, "there is no such file"),
    ],
)
def test_the_launcher_says_what_to_type(
    arguments: list[str],
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from headplug_solo.launch import main

    monkeypatch.setattr(sys, "argv", ["headplug-solo", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == code
    assert words in "".join(capsys.readouterr())


def test_a_script_under_the_launcher_is_the_main_module(work: Any) -> None:
    script = work.folder / "s.py"
    script.write_text(
        "import os, sys\n"
        "print(sys.argv, __name__, sys.path[0] == os.path.dirname(os.path.realpath(__file__)))\n"
    )
    done = work.run("-m", "headplug_solo", "s.py", "--a", "b")
    assert (done.returncode, done.stdout) == (0, "['s.py', '--a', 'b'] __main__ True\n")
    done = work.run("-m", "headplug_solo", "--headplug=head=byol", "s.py")
    assert done.returncode == 2
    assert "s.py made no solo-learn method, so --headplug changed nothing" in done.stderr
    assert "Traceback" not in done.stderr


# the scripts


def attempt(load: Any, expected: dict[str, Any]) -> str:
    """ "equal", or what the refusal says."""
    from headplug.errors import HeadplugError

    try:
        state = load().projector.state_dict()
    except HeadplugError as error:
        return str(error)
    theirs = {k.removeprefix("projector."): v for k, v in expected.items() if "projector." in k}
    same = state.keys() == theirs.keys() and all(torch.equal(state[k], theirs[k]) for k in state)
    return "equal" if same else "unequal"


def script_loads(folder: Path) -> dict[str, Any]:
    """What main_knn.py and main_umap.py do first, and what can go wrong there."""
    import numpy as np
    from omegaconf import OmegaConf
    from solo.methods import METHODS
    from solo.methods.simclr import SimCLR

    args = json.loads((folder / "args.json").read_text())
    checkpoint = torch.load(next(folder.glob("*.ckpt")), weights_only=True)
    state = checkpoint["state_dict"]
    bare = {k: v for k, v in args.items() if k != "headplug"}

    def load(args: Any, **changes: Any) -> Any:
        torch.save({**checkpoint, **changes}, folder / "changed.tmp")
        config = OmegaConf.create(copy.deepcopy(args))
        path = folder / "changed.tmp"
        return METHODS["simclr"].load_from_checkpoint(path, strict=False, cfg=config)

    other = copy.deepcopy(args)
    other["headplug"]["head"]["activation"] = "relu"
    missing = {k: v for k, v in state.items() if k != "projector.layers.output.weight"}
    found: dict[str, Any] = {
        "main module": [__name__, sys.modules["__main__"].run_script is run_script, sys.argv[1]],
        "loaded": attempt(lambda: load(args), state),
        "without a block in args.json": attempt(lambda: load(bare), state),
        "pickled": attempt(lambda: pickle.loads(pickle.dumps(load(args))), state),
        "key missing": attempt(lambda: load(args, state_dict=missing), state),
        "other head": attempt(lambda: load(other), state),
        "stock": attempt(lambda: load(args, headplug=None), state),
    }

    from headplug import swap_head
    from headplug.callbacks import HeadSwap

    def in_python(block: Any) -> tuple[dict[str, Any], dict[str, Any], Any]:
        model = SimCLR(OmegaConf.create({**copy.deepcopy(bare), "headplug": block}))
        swap_head(model, "reweighting")
        saved: dict[str, Any] = {"state_dict": model.state_dict()}
        model.on_save_checkpoint(saved)
        return saved, model.state_dict(), model

    def callback_loads(saved: dict[str, Any]) -> Any:
        load(bare, **saved)  # leaves the file
        config = OmegaConf.create(copy.deepcopy(bare))
        path = folder / "changed.tmp"
        return HeadSwap.load_from_checkpoint(METHODS["simclr"], path, strict=False, cfg=config)

    (saved, weights, model), (other_saved, _, _) = in_python(None), in_python({"head": "byol"})
    found["python"] = [s["headplug"][0]["head"]["name"] for s in (saved, other_saved)]
    found["python loaded"] = attempt(lambda: load(bare, **saved), weights)
    found["callback loaded"] = attempt(lambda: callback_loads(saved), weights)
    found["python unrecorded"] = attempt(lambda: load(bare, **{**saved, "headplug": None}), weights)
    found["mapping"] = attempt(lambda: load(args, headplug=args["headplug"]), state)
    (record,) = saved["headplug"]
    for older in ([record], {k: v for k, v in record.items() if k != "twin"}):
        resumed = model.on_load_checkpoint({"state_dict": weights, "headplug": older})
        found.setdefault("resumed", []).append(resumed or "")

    class Own(SimCLR):  # type: ignore[misc]
        """A user's subclass, made after everything else."""

    def build(cls: Any, block: Any) -> tuple[Any, list[Any]]:
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        config = OmegaConf.create({**copy.deepcopy(bare), "headplug": block})
        model = cls(config)
        return model, [torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)]

    stock, before = build(SimCLR, None)
    swapped, after = build(Own, {"head": "reweighting"})
    found["own subclass"] = type(swapped.projector).__name__
    found["same random state"] = (
        torch.equal(before[0], after[0])
        and before[1] == after[1]
        and str(before[2]) == str(after[2])
    )
    theirs = stock.backbone.state_dict()
    found["same backbone"] = all(
        torch.equal(v, theirs[k]) for k, v in swapped.backbone.state_dict().items()
    )
    config = OmegaConf.create({**bare, "headplug": {"head": None}})
    found["no head"] = [type(SimCLR(config).projector).__name__, "headplug" in config]
    narrow = folder / "narrow.pt"
    torch.save({"embedding.weight": torch.rand(3, 128), "embedding.bias": torch.zeros(3)}, narrow)
    found["refused"] = {
        name: attempt(lambda block=block: build(SimCLR, {"head": block})[0], {})
        for name, block in {
            "unknown": {"name": "ae_embeding"},
            "option": {"name": "reweighting", "kapa": 1.0},
            "width": {"name": "simclr", "input_dim": 2048},
            "weights": {"name": "ae_embedding", "weights": str(narrow)},
            "no weights": {"name": "ae_embedding"},
        }.items()
    }
    masked = {
        "backbone": {"name": "vit_tiny", "kwargs": {"img_size": 32, "patch_size": 16}},
        "method_kwargs": {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
        "headplug": {"head": "reweighting"},
    }
    mae = OmegaConf.create({**bare, **masked, "method": "mae"})
    found["refused"]["mae"] = attempt(lambda: METHODS["mae"](mae), {})
    linear = OmegaConf.create({**bare, "headplug": {"head": "reweighting"}})
    found["linear"] = attempt(lambda: METHODS["linear"](stock.backbone, cfg=linear), {})
    bakbone = {"probe": {"taps": ["bakbone"]}}
    seventh = {"head": "reweighting", "probe": {"taps": "projection.hidden7"}}
    mae = OmegaConf.create({**bare, **masked, "method": "mae", "headplug": {"probe": {}}})
    found["refused taps"] = {
        "unknown": attempt(lambda: build(SimCLR, bakbone)[0], {}),
        "no projector": attempt(lambda: METHODS["mae"](mae), {}),
        "head taken": attempt(lambda: build(SimCLR, seventh)[0], {}),
    }
    probed, _ = build(SimCLR, {"probe": {"taps": ["backbone", "projection"]}})
    found["probed as said"] = list(probed._layer_probe_of_headplug[0]["taps"])
    return found


def script_release(folder: Path) -> dict[str, Any]:
    """A user's training script for release 1.0.2, on two processes."""
    import pytorch_lightning as pl
    from solo.methods import METHODS

    arguments: dict[str, Any] = {
        "encoder": "resnet18", "num_classes": 5, "max_epochs": 1, "batch_size": 4,
        "backbone_args": {"cifar": False, "zero_init_residual": False}, "optimizer": "sgd",
        "lars": False, "lr": 0.1, "weight_decay": 0.0, "classifier_lr": 0.1,
        "exclude_bias_n_norm": False, "accumulate_grad_batches": 1,
        "extra_optimizer_args": {"momentum": 0.9}, "scheduler": "none", "min_lr": 0.0,
        "warmup_start_lr": 0.0, "warmup_epochs": 0, "num_large_crops": 2, "num_small_crops": 0,
        "proj_hidden_dim": 16, "proj_output_dim": O, "temperature": 0.2, "dataset": "custom",
        "data_dir": folder, "train_dir": "train", "val_dir": "val", "num_workers": 0,
    }  # fmt: skip
    pl.seed_everything(0)
    model = METHODS["simclr"](**arguments)
    views = torch.rand(16, 2, 3, 8, 8)
    data = [(i, list(x), i % 5) for i, x in enumerate(views)]
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp_find_unused_parameters_false",
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4))  # type: ignore[arg-type]
    path = folder / "release.ckpt"
    trainer.save_checkpoint(path)
    if trainer.global_rank:
        return {}
    (probed,) = trainer.callbacks[0].history
    (folder / "ae.pt").rename(folder / "ae.gone")
    state = torch.load(path, weights_only=True)["state_dict"]
    model_class = METHODS["simclr"]
    loaded = attempt(lambda: model_class.load_from_checkpoint(path, **arguments), state)
    (folder / "ae.gone").rename(folder / "ae.pt")
    by_hand = {
        f"probe/{row['tap']}/knn_accuracy": row["accuracy"] for row in layers_of(model, folder).rows
    }
    return {
        "head": model.headplug["head"],
        "loaded": loaded,
        "probed": {name: probed[name] for name in by_hand},
        "by hand": by_hand,
    }


def layers_of(model: Any, folder: Path) -> Any:
    """A report of a model's layers on the images as they are."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    from headplug import extract_features, probe_layers

    plain = transforms.Compose([
        transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.228, 0.224, 0.225)),
    ])  # fmt: skip
    stores = [
        extract_features(
            model,
            torch.utils.data.DataLoader(ImageFolder(folder / part, plain), batch_size=8),
            ["backbone", "projection"],
            distributed=False,
        )
        for part in ("train", "val")
    ]
    return probe_layers(*stores, probes="knn", device="cpu")


def run_script(group: str, folder: str) -> None:
    scripts = {"loads": script_loads, "release": script_release}
    print(json.dumps(scripts[group](Path(folder))), flush=True)


if __name__ == "__main__":
    run_script(*sys.argv[1:])
