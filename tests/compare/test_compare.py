"""The main job on real digits: it trains, probes, resumes, refuses and reports."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from headplug import FeatureStore, HeadplugError, features, probe_layers
from headplug.compare import Plan, compare
from headplug.compare.data import load_data
from headplug.compare.digest import answer
from headplug.compare.recipes import RECIPES
from headplug.diagnostics import describe
from headplug.errors import DimensionError, OptionError, RunError, UnknownNameError
from headplug.files import load_tensors
from headplug.models import load_model

SMALL = {
    "data": "digits",
    "backbone": "test_resnet",
    "limit": 200,
    "epochs": 2,
    "batch_size": 64,
    "ae_epochs": 2,
}
COMMAND = [
    sys.executable, "-m", "headplug.cli", "compare", "--backbone", "test_resnet", "--limit", "200",
    "--epochs", "4", "--batch-size", "64", "--ae-epochs", "3",
]  # fmt: skip


def quiet(line: str) -> None:
    """Takes the place of print."""


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until a running process has written a file."""
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists()


def rows(results: dict, head: str, seed: int = 0) -> dict:
    run = next(r for r in results["runs"] if (r["head"], r["seed"]) == (head, seed))
    return {(r["tap"], r["probe"]): r for r in run["taps"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    plan = Plan(**SMALL, seeds=(0, 1), out=str(tmp_path_factory.mktemp("runs")))
    return plan, compare(plan, say=quiet)


def test_results_hold_every_head_seed_tap_and_probe(finished):
    plan, results = finished
    on_disk = json.loads((plan.folder / "results.json").read_text())
    assert on_disk == results
    assert results["schema"] == 1
    assert {(r["head"], r["seed"]) for r in results["runs"]} == {
        (h, s) for h in plan.heads for s in plan.seeds
    }
    for run in results["runs"]:
        taps = list(dict.fromkeys(r["tap"] for r in run["taps"]))
        assert taps.index("pre_projection") < taps.index("projection") == len(taps) - 1
        assert taps[0].startswith("backbone.")
        assert {r["probe"] for r in run["taps"]} == {"knn", "linear", "ridge"}
        assert all(0 <= r["low"] <= r["accuracy"] <= r["high"] <= 1 for r in run["taps"])
        assert run["train_images_per_s"] > 0
        assert run["head_step_ms"] > 0
        assert len(run["losses"]) == plan.epochs


def test_features_are_far_better_than_chance_before_and_after_the_head(finished):
    _, results = finished
    for head in ("simclr", "ae_embedding", "reweighting"):
        found = rows(results, head)
        for tap in ("pre_projection", "projection"):
            for probe in ("knn", "linear", "ridge"):
                assert found[tap, probe]["accuracy"] > 0.4, (head, tap, probe)  # chance is 0.1


def test_a_finished_run_is_a_model_with_the_features_that_were_probed(finished):
    plan, results = finished
    images = load_data(plan.data, limit=plan.limit).train.tensor()
    for run in results["runs"]:
        folder = plan.folder / f"{run['head']}-seed{run['seed']}"
        loaded = load_model(str(folder), shape=(1, 8, 8))
        found = features(loaded.model.eval(), images / 255, ["pre_projection", "projection"])
        spectra = {s["tap"]: s for s in run["spectra"]}
        for tap, x in zip(("pre_projection", "projection"), found, strict=True):
            assert describe(x)["rankme"] == pytest.approx(spectra[tap]["rankme"], rel=1e-3)
            assert describe(x)["norm"] == pytest.approx(spectra[tap]["norm"], rel=1e-3)
    with pytest.raises(OptionError, match="leave --backbone out"):
        load_model(str(folder), shape=(1, 8, 8), backbone="timm:test_resnet")


def test_inner_layers_of_the_head_are_read(finished):
    _, results = finished
    taps = {tap for tap, _ in rows(results, "ae_embedding")}
    assert {"projection_head.layers.embedding", "projection_head.layers.activation"} <= taps


def test_parameter_counts_are_those_of_the_papers_heads(finished):
    _, results = finished
    runs = {r["head"]: r for r in results["runs"]}
    width = runs["reweighting"]["head_config"]["input_dim"]
    assert runs["reweighting"]["head_params_trainable"] == 0
    assert runs["reweighting"]["head_params_frozen"] == width
    ae = runs["ae_embedding"]
    assert ae["head_params_trainable"] == 256 * 128 + 128
    assert ae["head_params_frozen"] == width * 256 + 256


def test_heads_of_one_seed_start_from_the_same_backbone_and_batches(tmp_path):
    losses = []
    for head in ("identity", "reweighting"):  # kappa = 1 is the identity
        plan = Plan(**SMALL, heads=(head,), out=str(tmp_path / head),
                    **({"kappas": (1.0,)} if head == "reweighting" else {}))  # fmt: skip
        losses.append(compare(plan, say=quiet)["runs"][0]["losses"])
    assert losses[0] == losses[1]


def test_frozen_embedding_comes_from_the_autoencoder_untouched(finished):
    from safetensors.torch import load_file

    plan, _ = finished
    model = load_file(plan.folder / "ae_embedding-seed0" / "model.safetensors")
    (path,) = (plan.folder / "autoencoders").glob("*.safetensors")
    for part in ("weight", "bias"):
        trained = model[f"projection_head.layers.embedding.{part}"]
        assert torch.equal(trained, load_file(path)[f"encoder.embedding.{part}"])


def test_finished_runs_are_not_repeated_and_heads_can_be_added(finished):
    plan, first = finished
    said = []
    more = Plan(**SMALL, heads=("simclr", "identity"), seeds=(0,), out=plan.out)
    results = compare(more, say=said.append)
    assert len(said) == 1
    assert "identity" in said[0]
    assert rows(results, "simclr") == rows(first, "simclr")
    assert {r["head"] for r in results["runs"]} == {*plan.heads, "identity"}  # earlier ones stay


def test_another_setting_in_the_same_folder_is_refused(finished):
    plan, _ = finished
    with pytest.raises(RunError, match=r"epochs 2 there, 3 now.*--out"):
        compare(Plan(**{**SMALL, "epochs": 3}, out=plan.out), say=quiet)


def test_sweeps_make_one_run_per_value_and_leave_other_heads_alone():
    plan = Plan(**SMALL, widths=(32, 64), activations=("relu", "tanh"), kappas=(1.01, 1.1))
    labels = [c.label for c in plan.choices]
    assert len(labels) == 4 + 4 + 2
    assert "ae_embedding[embedding_dim=32,activation=tanh]" in labels
    assert "simclr[hidden_dim=64,activation=relu]" in labels
    assert "reweighting[kappa=1.1]" in labels
    assert len({c.slug for c in plan.choices}) == len(labels)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_recipe_trains_its_default_head_and_a_head_without_parameters(recipe, tmp_path):
    plan = Plan(
        **{**SMALL, "epochs": 1}, recipe=recipe, widths=(64,), output_dims=(16,),
        heads=(RECIPES[recipe].default_head, "reweighting"), probes=("ridge",), out=str(tmp_path),
    )  # fmt: skip
    results = compare(plan, say=quiet)
    assert not results["failed"]
    assert len(results["runs"]) == 2
    assert all(torch.tensor(r["losses"]).isfinite().all() for r in results["runs"])


def test_interrupted_run_resumes_to_the_same_result(tmp_path):
    """Killed with SIGKILL after its first checkpoint, it ends where an uninterrupted run ends."""
    arguments = [*COMMAND, "--heads", "simclr_plain", "--probes", "ridge", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = subprocess.run(
        [*arguments, "--out", str(tmp_path / "whole")],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    folder = tmp_path / "killed"
    checkpoint = folder / "simclr_plain-seed0" / "checkpoint.ckpt"
    process = subprocess.Popen([*arguments, "--out", str(folder)], env=environment)
    wait_for(checkpoint, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = load_tensors(checkpoint)["headplug"]["losses"]
    assert 1 <= len(done) < 4
    assert not (folder / "simclr_plain-seed0" / "run.json").exists()
    resumed = subprocess.run(
        [*arguments, "--out", str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    ours, theirs = (json.loads(p.stdout)["runs"][0] for p in (resumed, whole))
    assert ours["losses"] == theirs["losses"]
    assert ours["losses"][: len(done)] == done
    assert len(ours["losses"]) == 4
    assert ours["taps"] == theirs["taps"]


def test_loss_that_is_no_number_stops_with_step_and_checkpoint(tmp_path):
    plan = Plan(**SMALL, heads=("simclr_plain",), lr=1e30, out=str(tmp_path))
    with pytest.raises(RunError, match=r"not a finite number at step \d+.*--lr.*none saved"):
        compare(plan, say=quiet)
    assert not list(tmp_path.rglob("run.json"))
    assert not list(tmp_path.rglob("*.partial"))
    lower = Plan(**SMALL, heads=("simclr_plain",), lr=0.01, out=str(tmp_path))
    assert compare(lower, say=quiet)["runs"]  # nothing was finished, so the folder is free


def test_checkpoint_kept_after_a_bad_loss_is_finite(tmp_path):
    """The rate is such that the first epochs are sound."""
    options = {**SMALL, "epochs": 6}
    plan = Plan(**options, heads=("identity",), lr=1e6, out=str(tmp_path))
    with pytest.raises(RunError, match="holds the last good epoch"):
        compare(plan, say=quiet)
    state = load_tensors(tmp_path / "identity-seed0" / "checkpoint.ckpt")
    tensors = [t for t in state["state_dict"].values() if t.is_floating_point()]
    assert all(t.isfinite().all() for t in tensors)
    assert torch.tensor(state["headplug"]["losses"]).isfinite().all()


def test_one_failed_head_is_reported_and_the_others_finish(tmp_path, monkeypatch):
    from headplug.heads import HEADS

    class Broken(torch.nn.Module):
        def __init__(self, input_dim: int, output_dim: int = 8) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(input_dim, output_dim)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * float("nan")

    monkeypatch.setattr(HEADS, "_entries", dict(HEADS._entries))
    HEADS.register("broken", Broken)
    plan = Plan(**{**SMALL, "epochs": 1}, heads=("broken", "simclr_plain"), out=str(tmp_path))
    results = compare(plan, say=quiet)
    assert [f["head"] for f in results["failed"]] == ["broken"]
    assert [r["head"] for r in results["runs"]] == ["simclr_plain"]
    assert "broken" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"heads": ("simclir",)}, UnknownNameError, "simclr"),
        ({"recipe": "simclrr"}, UnknownNameError, "simclr"),
        ({"activations": ("rleu",)}, OptionError, "relu"),
        ({"epochs": 0}, OptionError, "epochs"),
        ({"seeds": ()}, OptionError, "seeds"),
        ({"heads": ("byol", "byol")}, OptionError, "once"),
        ({"stem": "tiny"}, OptionError, "small"),
        ({"heads": ("simclr",), "kappas": (1.1,)}, OptionError, "none of the heads"),
        ({"kappas": (0.5,)}, OptionError, "kappa"),
        ({"precision": "fp16"}, OptionError, "16-mixed"),
        ({"lr": -1.0}, OptionError, "positive"),
        ({"probes": ("knm",)}, UnknownNameError, "knn"),
        ({"protocol": "moko"}, UnknownNameError, "moco"),
    ],
)
def test_plan_refuses_before_anything_is_computed(options, error, words):
    with pytest.raises(error, match=words):
        Plan(**{**SMALL, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backbone": "resnet81"}, "resnet18"),
        ({"batch_size": 512}, "batch"),
        ({"data": "didgits"}, "digits"),
    ],
)
def test_job_refuses_with_the_next_thing_to_type(options, words, tmp_path):
    with pytest.raises(HeadplugError, match=words):
        compare(Plan(**{**SMALL, **options}, out=str(tmp_path / "run")), say=quiet)
    assert not list(tmp_path.rglob("results.json"))


def test_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot write"):
        compare(Plan(**SMALL, out=str(tmp_path / "file" / "run")), say=quiet)


@pytest.mark.slow
def test_two_processes_train_together(tmp_path):
    """`--devices 2` starts torchrun with gloo; both processes share every batch's loss."""
    out = tmp_path / "run"
    done = subprocess.run(
        [*COMMAND, "--heads", "simclr_plain,ae_embedding", "--devices", "2", "--batch-size", "32",
         "--epochs", "2", "--probes", "ridge", "--out", str(out)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["config"]["devices"] == 2
    assert rows(results, "ae_embedding")["pre_projection", "ridge"]["accuracy"] > 0.4
    assert done.stdout.count("pre_projection") < 10  # one process talks


def test_parquet_folder_and_vision_transformer(tmp_path):
    """Another kind of data and of backbone, end to end."""
    import io

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 20)):
        images, labels = [], []
        for i in range(count):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            pixels[..., i % 2] //= 4  # the class is a colour
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "png")
            images.append({"bytes": buffer.getvalue(), "path": f"{i}.png"})
            labels.append(i % 2)
        pq.write_table(pa.table({"image": images, "label": labels}), tmp_path / f"{split}.parquet")
    plan = Plan(
        data=str(tmp_path), backbone="test_vit", heads=("simclr_plain",), epochs=1, batch_size=16,
        standardize=True, out=str(tmp_path / "run"),
    )  # fmt: skip
    found = rows(compare(plan, say=quiet), "simclr_plain")
    assert found["pre_projection", "ridge"]["n_test"] == 20
    assert any(tap.startswith("backbone.blocks") for tap, _ in found)


def test_probes_are_the_protocols_unless_named():
    assert Plan().probes == ("knn", "linear", "ridge")
    assert Plan(protocol="ae").probes == ("linear",)
    assert Plan(protocol="ae", probes=("knn",)).probes == ("knn",)
    plans = [Plan(), Plan(protocol="dino"), Plan(pretrained=True), Plan(stem="default")]
    assert len({plan.fingerprint for plan in plans}) == 4


def test_a_protocol_gives_what_probe_layers_gives_with_it(tmp_path):
    options = {**SMALL, "epochs": 1, "heads": ("simclr_plain",), "seeds": (42,)}
    plan = Plan(**options, protocol="ae", out=str(tmp_path))
    results = compare(plan, say=quiet)
    data = load_data("digits", limit=SMALL["limit"])
    model = load_model(str(plan.folder_of(plan.choices[0], 42)), shape=(1, 8, 8)).model.eval()
    train, test = (
        FeatureStore.from_tensors(
            {"pre_projection": features(model, images.tensor() / 255, "pre_projection")},
            images.labels,
        )
        for images in (data.train, data.test)
    )
    (expected,) = probe_layers(train, test, protocol="ae", seed=42).rows
    found = rows(results, "simclr_plain", 42)["pre_projection", "linear"]
    assert found["n_test"] == expected["n_test"] == 40  # 20% of the test images
    assert abs(found["accuracy"] - expected["accuracy"]) <= 1 / 40  # floats, by another batch
    assert {probe for _, probe in rows(results, "simclr_plain", 42)} == {"linear"}
    assert "Measured on 40 test images" in " ".join(answer(results))


def test_pretrained_backbones_start_from_the_weights_that_timm_finds(tmp_path, monkeypatch):
    """timm reads a cache of the Hub's form; with an empty one the error says what to do."""
    import timm
    from huggingface_hub import constants
    from safetensors.torch import save_file

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    plan = Plan(
        **{**SMALL, "epochs": 1}, pretrained=True, heads=("simclr_plain",), probes=("ridge",),
        lr=1e-9, out=str(tmp_path / "run"),
    )  # fmt: skip
    with pytest.raises(OptionError, match=r"weights of test_resnet cannot be had.*--pretrained"):
        compare(plan, say=quiet)
    assert not plan.folder.exists()

    model = timm.create_model("test_resnet")
    repo = tmp_path / "hub" / f"models--{model.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    save_file(model.state_dict(), repo / "snapshots" / "abc" / "model.safetensors")
    (run,) = compare(plan, say=quiet)["runs"]
    assert plan.stem == "default"  # a small one would have a new first convolution
    for moment in ("mean", "std"):  # what the weights were trained on, of one channel
        of_timm = sum(model.pretrained_cfg[moment]) / 3
        assert run[f"image_{moment}"] == pytest.approx([of_timm])
    folder = plan.folder_of(plan.choices[0], 0)
    trained = dict(load_model(str(folder), shape=(1, 8, 8)).model.backbone.named_parameters())
    for name, weight in model.named_parameters():
        if not name.startswith(("fc.", "conv1.0")):  # the first layer is summed over colours
            assert torch.allclose(trained[name], weight, atol=1e-6), name


def test_plan_names_its_folder_after_what_it_does():
    assert Plan(data="/data/cifar10/").folder == Path("runs/cifar10-resnet18-simclr")


def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, "--epochs", "500", "--heads", "simclr_plain", "--out", str(tmp_path)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        # a shell that starts the tests in the background makes them ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        wait_for(tmp_path / "simclr_plain-seed0" / "checkpoint.ckpt", process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "the same command goes on" in err
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("*.partial"))


def test_head_that_does_not_fit_the_backbone_is_refused_before_any_training(tmp_path):
    plan = Plan(**SMALL, heads=("simclr", "directclr"), out=str(tmp_path / "run"))
    with pytest.raises(DimensionError, match=r"output_dim=360 .* input_dim=96"):
        compare(plan, say=quiet)
    assert not (tmp_path / "run").exists()


def test_prototypes_are_refused_as_a_head(tmp_path):
    with pytest.raises(OptionError, match="gives list and cannot stand before a loss"):
        Plan(heads=("deepcluster_v2_prototypes_solo",), out=str(tmp_path))


def test_centres_of_an_rbf_head_start_from_the_backbones_features(tmp_path):
    from headplug.compare.data import load_data
    from headplug.compare.run import Runner

    plan = Plan(**{**SMALL, "limit": 400}, heads=("rbf",), out=str(tmp_path))
    runner = Runner(plan, load_data("digits", limit=400))
    first, again, other = (runner._model(plan.choices[0], seed, None) for seed in (0, 0, 1))
    state = first.state_dict()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in state.items())
    assert not torch.equal(
        state["projection_head.layers.1.kernels_centers"],
        other.state_dict()["projection_head.layers.1.kernels_centers"],
    )
    images = runner.data.train[torch.arange(64)][0]
    with torch.no_grad():
        hidden = first.projection_head.layers[0](first.backbone.train()(runner.views.plain(images)))
        kernels = first.projection_head.layers[1].kernels(hidden)
    assert kernels.max(1).values.median() > 0.1  # every row is near a centre


def test_plan_does_not_warn_of_a_width_that_is_none_of_the_backbones(recwarn):
    Plan(heads=("reweighting",))
    assert not [w for w in recwarn if "kappa" in str(w.message)]
