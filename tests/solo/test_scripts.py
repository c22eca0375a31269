"""From solo-learn's own CIFAR configs to an evaluation, and what taps read on its methods.

The runs are one epoch of solo-learn's scripts on scanned digits. This file is also the script that
places the taps, `test_scripts.py VERSION`, since the release needs libraries of its own.
"""

from __future__ import annotations

import functools
import json
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

AE, HID, O, WIDTH = 12, 16, 8, 24  # noqa: E741 - embedding, hidden, projection, another projection

# per config of solo-learn: the method's name and class, its small sizes, the path of its projector
# and that of the EMA copy, and a weight behind the projector with the projector's width last
CONFIGS: dict[str, Any] = {
    "simclr": ("simclr", [], "projector", None, None),
    "barlow": ("barlow_twins", [], "projector", None, None),
    "byol": ("byol", ["pred_hidden_dim=16"], "projector", "momentum_projector",
             "predictor.0.weight"),
    "mocov3": ("mocov3", ["pred_hidden_dim=16"], "projector", "momentum_projector",
               "predictor.0.weight"),
    "swav": ("swav", ["num_prototypes=20", "queue_size=16"], "projector", None,
             "prototypes.weight_v"),
    "dino": ("dino", ["num_prototypes=20"], "head.mlp", "momentum_head.mlp",
             "head.last_layer.weight_v"),
}  # fmt: skip

# what a method's own `z` is, beside the raw output of its projector, and how often a step calls it
OUTPUTS = {
    "main": {
        "simclr": ("raw", 2), "barlow_twins": ("raw", 2), "wmse": ("raw", 2), "byol": ("raw", 2),
        "mocov3": ("raw", 2), "nnclr": ("normalised", 2), "mocov2plus": ("normalised", 2),
        "swav": ("normalised", 2), "dino": ("prototypes", 2), "all4one": ("raw", 4),
    },
    "release": {
        "simclr": ("raw", 2), "nnclr": ("raw", 2), "swav": ("normalised", 2), "wmse": ("none", 2),
        "ressl": ("none", 1), "dino": ("none", 2),
    },
}  # fmt: skip


# the scripts of main


@pytest.fixture(scope="module")
def trained(work: Any, solo_home: Callable[[str], Path]) -> Callable[[str], Any]:
    """One epoch from a shipped config with the AE head, at the config's width and at another."""
    solo_home("main")

    @functools.cache
    def train(config: str) -> Any:
        method, sizes, *_ = CONFIGS[config]
        done = work.pretrain(
            config, config, "--multirun", "+headplug=ae_embedding", "headplug.head.weights=ae.pt",
            f"headplug.head.output_dim={O},{WIDTH}", *[f"method_kwargs.{size}" for size in sizes],
        )  # fmt: skip
        runs = sorted(work.read(config), key=lambda run: run[0]["headplug"]["head"]["output_dim"])
        assert [args["method"] for args, _ in runs] == [method] * 2
        return done.stdout, runs

    return train


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_a_shipped_config_trains_with_the_frozen_embedding(
    work: Any, trained: Any, config: str
) -> None:
    said, runs = trained(config)
    _, _, path, twin, behind = CONFIGS[config]
    for width, (_, checkpoint) in zip((O, WIDTH), runs, strict=True):
        assert f"becomes ae_embedding (512 > {width})" in said
        assert checkpoint["global_step"] == 2
        state = checkpoint["state_dict"]
        assert all(bool(torch.isfinite(v).all()) for v in state.values())
        for head in filter(None, (path, twin)):
            assert torch.equal(state[f"{head}.layers.embedding.weight"], work.embedding)
            assert state[f"{head}.layers.output.weight"].shape == (width, AE)
        if behind:
            assert state[behind].shape[1] == width
        (optimizer,) = checkpoint["optimizer_states"]
        kept = [s["momentum_buffer"] for s in optimizer["state"].values()]
        assert any(b.shape == (width, AE) and b.abs().sum() > 0 for b in kept)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_a_run_records_its_whole_head(trained: Any, config: str) -> None:
    from headplug import create_head

    for width, (args, checkpoint) in zip((O, WIDTH), trained(config)[1], strict=True):
        block = args["headplug"]
        (record,) = checkpoint["headplug"]
        assert {k: record[k] for k in ("slot", "weights_sha256")}.items() <= block.items()
        assert record["head"].items() <= block["head"].items()
        assert block["slot"] == CONFIGS[config][2]
        assert len(block["weights_sha256"]) == 64
        head = create_head({k: v for k, v in block["head"].items() if k != "weights"})
        assert (head.input_dim, head.output_dim) == (512, width)


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_the_backbone_of_a_run_is_stripped_for_torchvision(
    work: Any, trained: Any, config: str
) -> None:
    from torchvision.models import resnet18

    from headplug.strip import save_backbone

    _, (_, (_, checkpoint)) = trained(config)
    path = work.last(wider(work, config))
    weights = save_backbone(path, work.folder / "backbone.safetensors")
    missing, unexpected = resnet18().load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    for key, value in weights.items():
        assert torch.equal(value, checkpoint["state_dict"][f"backbone.{key}"])


@pytest.fixture(scope="module")
def unswapped(work: Any, solo_home: Callable[[str], Path]) -> dict[str, dict[str, Any]]:
    """All configs without another head: without headplug, with it, and with its block emptied."""
    solo_home("main")

    def train(out: str, *options: str, **environment: str) -> dict[str, Any]:
        runs = [
            work.pretraining(c, out, *[f"method_kwargs.{size}" for size in CONFIGS[c][1]], *options)
            for c in CONFIGS
        ]
        file = work.folder / f"{out}.json"
        file.write_text(json.dumps(runs))
        done = work.run(__file__, "train", str(file), **environment)
        assert done.returncode == 0, done.stderr[-3000:]
        plugged = done.stdout.splitlines()[-1] == "with headplug"
        assert plugged is not bool(environment)
        return {args["method"]: (args, checkpoint) for args, checkpoint in work.read(out)}

    return {
        "without": train("without", WITHOUT_HEADPLUG="1"),
        "with": train("with"),
        "empty": train("empty", "+headplug.head=null"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_an_unswapped_run_is_plain_solo_learns_to_the_bit(unswapped: Any, config: str) -> None:
    args, plain = unswapped["without"][CONFIGS[config][0]]
    apart = dict.fromkeys(("checkpoint", "wandb_run_id"))
    for way in ("with", "empty"):
        ours, checkpoint = unswapped[way][CONFIGS[config][0]]
        assert {**ours, **apart} == {**args, **apart}
        assert checkpoint.keys() == plain.keys()
        assert unlike(checkpoint["state_dict"], plain["state_dict"]) == []
        assert unlike(checkpoint["optimizer_states"], plain["optimizer_states"]) == []


def unlike(one: Any, other: Any) -> list[str]:
    """Where two checkpoints differ, to the bit."""
    found: list[str] = methods().unlike(one, other)
    return found


@pytest.mark.slow
def test_main_linear_trains_a_classifier_on_the_backbone_of_a_swapped_run(
    work: Any, trained: Any
) -> None:
    _, (_, (_, checkpoint)) = trained("byol")
    path = str(work.last(wider(work, "byol"))).replace("=", "\\=")
    done = work.evaluate(
        "main_linear.py", "--config-path", "scripts/linear/imagenet-100", "--config-name",
        "byol.yaml", f"pretrained_feature_extractor={path}", "+data.num_classes=5",
        "data.dataset=custom", f"data.train_path={work.folder / 'train'}",
        f"data.val_path={work.folder / 'val'}", "data.format=image_folder", "data.num_workers=0",
        "optimizer.batch_size=8", "max_epochs=1", "accelerator=cpu", "devices='1'",
        "strategy=auto", "precision=32", "sync_batchnorm=False", "wandb.enabled=False",
        "auto_resume.enabled=False", "+enable_progress_bar=False",
        f"checkpoint.dir={work.folder / 'evaluated'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ((_, linear),) = work.read("evaluated")
    assert linear["global_step"] == 2
    assert "headplug" not in linear
    pretrained = checkpoint["state_dict"]
    for key, value in linear["state_dict"].items():
        if key.startswith("backbone."):
            assert torch.equal(value, pretrained[key]), key


@pytest.mark.slow
def test_main_knn_scores_the_projector_of_a_run_with_much_rebuilt(work: Any, trained: Any) -> None:
    trained("dino")
    done = work.evaluate(
        "main_knn.py", "--pretrained_checkpoint_dir", str(wider(work, "dino")), "--dataset",
        "custom", "--train_data_path", str(work.folder / "train"), "--val_data_path",
        str(work.folder / "val"), "--num_workers", "0", "--feature_type", "backbone", "projector",
        "--k", "2", "--temperature", "0.1", "--distance_function", "cosine",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"becomes ae_embedding (512 > {WIDTH})" in done.stdout
    assert done.stdout.count("acc@1=") == 2


@pytest.mark.slow
def test_main_umap_draws_the_features_of_a_swapped_run(work: Any, trained: Any) -> None:
    for module in ("umap", "wandb", "seaborn"):  # what the script imports
        pytest.importorskip(module)
    trained("dino")
    done = work.evaluate(
        "main_umap.py", "--pretrained_checkpoint_dir", str(wider(work, "dino")), "--dataset",
        "custom", "--train_data_path", str(work.folder / "train"), "--val_data_path",
        str(work.folder / "val"), "--num_workers", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"becomes ae_embedding (512 > {WIDTH})" in done.stdout
    for split in ("train", "val"):
        assert (work.folder / f"im100_{split}_umap.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_a_sweep_on_two_ranks_swaps_on_both(work: Any, solo_home: Callable[[str], Path]) -> None:
    solo_home("main")
    done = work.pretrain(
        "simclr", "ranks", "--multirun", "+headplug=reweighting,ae_embedding",
        "+headplug.head.weights=ae.pt", devices=2,
    )  # fmt: skip
    assert done.stdout.count("is an autoencoder's and not used for 'reweighting'") == 2  # each rank
    found = [checkpoint["headplug"][0]["head"]["name"] for _, checkpoint in work.read("ranks")]
    assert found == ["reweighting", "ae_embedding"]


@pytest.mark.slow
def test_a_sweep_whose_jobs_run_in_other_processes_swaps_there(
    work: Any, solo_home: Callable[[str], Path]
) -> None:
    solo_home("main")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs hydra-joblib-launcher")
    work.pretrain(
        "simclr", "joblib", "--multirun", "+headplug=reweighting,simclr_plain",
        "hydra/launcher=joblib", "hydra.launcher.n_jobs=2",
    )  # fmt: skip
    found = [checkpoint["headplug"][0]["head"]["name"] for _, checkpoint in work.read("joblib")]
    assert sorted(found) == ["reweighting", "simclr_plain"]


def wider(work: Any, config: str) -> Path:
    """The folder of the run with the other width."""
    folders = (work.folder / config).glob("*/*/args.json")
    return next(a.parent for a in folders if f'"output_dim": {WIDTH}' in a.read_text())


# the taps


@pytest.fixture(scope="module")
def on_main(run_on_solo: Callable[[str, str], dict[str, Any]]) -> dict[str, Any]:
    return run_on_solo(__file__, "main")


@pytest.fixture(scope="module")
def on_release(run_on_solo: Callable[[str, str], dict[str, Any]]) -> dict[str, Any]:
    return run_on_solo(__file__, "release")


def assert_taps(found: dict[str, Any], z: str, calls: int) -> None:
    """The shared names mean the same on every method, whatever the method itself calls `z`."""
    for state in ("stock", "swapped"):
        at = found[state]
        assert at["feats"], "pre_projection is not the method's `feats`"
        assert at["raw"], "projection is not the head's own output"
        assert at["z"] == z
        assert {"backbone", "projection", "projection.hidden1"} <= set(at["listed"])
        assert at["calls"] == [calls] * 3
        assert at["in step"], "projection is not the head's own output in a training step"
        assert at["in the graph"]


@pytest.mark.slow
@pytest.mark.parametrize("method", OUTPUTS["main"])
def test_taps_on_methods_of_main(on_main: dict[str, Any], method: str) -> None:
    assert_taps(on_main[method], *OUTPUTS["main"][method])


@pytest.mark.slow
@pytest.mark.parametrize("method", OUTPUTS["release"])
def test_taps_on_released_methods(on_release: dict[str, Any], method: str) -> None:
    assert_taps(on_release[method], *OUTPUTS["release"][method])


def read_taps(model: Any, pl: Any) -> dict[str, Any]:
    """What the shared names give on `model(x)` and in the middle of a Lightning step."""
    from headplug import features, find_slots, list_taps, tap

    x = torch.rand(4, 3, 8, 8)
    points = ("pre_projection", "projection", "projection.hidden1")
    head = model.get_submodule(find_slots(model)[0].path)
    model.eval()
    with torch.no_grad():
        out = model(x)
        raw = head(out["feats"])
    h, projection = features(model, x, points[:2])
    found: dict[str, Any] = {
        "feats": torch.equal(h, out["feats"]),
        "raw": torch.equal(projection, raw),
        "z": meaning(out.get("z"), raw),
        "listed": [row["name"] for row in list_taps(model, x)],
    }

    class Middle(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            self.tap = tap(module, *points)
            self.taps = self.tap.__enter__()

        def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
            self.tap.__exit__(None, None, None)
            found["calls"] = [len(self.taps[p]) for p in points]
            rows = list(zip(self.taps["pre_projection"], self.taps["projection"], strict=True))
            found["in step"] = all(torch.allclose(head(h), z, atol=1e-6) for h, z in rows)
            found["in the graph"] = any(z.requires_grad for _, z in rows)

    views = torch.rand(8, 2, 3, 8, 8)
    data = [(i, list(x), i % 5) for i, x in enumerate(views)]
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Middle()],
    )  # fmt: skip
    model.train()
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=8))  # type: ignore[arg-type]
    return found


def meaning(z: Any, raw: torch.Tensor) -> str:
    if z is None:
        return "none"
    if z.shape != raw.shape:
        return "prototypes"
    if torch.equal(z, raw):
        return "raw"
    unit = torch.nn.functional.normalize(raw, dim=-1)
    return "normalised" if torch.allclose(z, unit, atol=1e-6) else "unknown"


def methods() -> Any:
    """What test_solo_methods.py defines."""
    file = Path(__file__).with_name("test_solo_methods.py")
    return SimpleNamespace(**runpy.run_path(str(file)))


def read_methods(version: str) -> dict[str, Any]:
    from headplug import swap_head

    built = methods()
    if version == "release":
        import pytorch_lightning as pl

        built.apply_shims(pl)
        build = built.released
    else:
        import lightning.pytorch as pl  # type: ignore[no-redef]

        build = built.of_main
    found: dict[str, Any] = {}
    for name in OUTPUTS[version]:
        torch.manual_seed(0)
        found[name] = {"stock": read_taps(build(name), pl)}
        model = build(name)
        swap_head(model, "simclr", hidden_dim=HID, output_dim=built.width_of(name))
        found[name]["swapped"] = read_taps(model, pl)
    return found


def train_all(file: str) -> str:
    """Runs one command line after another, each as a main module, as solo-learn's users do."""
    for command in json.loads(Path(file).read_text()):
        sys.argv, sys.path[0] = command, str(Path(command[0]).parent)
        runpy.run_path(command[0], run_name="__main__")
    return "with headplug" if "headplug_solo" in sys.modules else "without headplug"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1] == "train":
        print(train_all(sys.argv[2]))
    else:
        print(json.dumps(read_methods(sys.argv[1])))
