"""Swapping heads in real solo-learn methods.

solo-learn's release 1.0.2 needs other versions of its libraries than the rest, so this file also
runs as a script, in a process of its own: `python test_solo_methods.py GROUP`, with the overlay
`.solo` first on PYTHONPATH (or, for main, a clone) and one JSON object as the last line of its
output. The checks are made there; what they gave is asserted here.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
OVERLAY = ROOT / ".solo"
CLONE = os.environ.get("SOLO_LEARN_HOME", "")

H, HID, O, P, BATCH = 512, 24, 16, 20, 8  # noqa: E741 - solo-learn's own letters
AE = 12

# per method: its options, the dependents of its projector, its EMA twin
OPTIONS: dict[str, dict[str, Any]] = {
    "simclr": {"temperature": 0.2},
    "supcon": {"temperature": 0.2},
    "barlow_twins": {"lamb": 0.005, "scale_loss": 0.1},
    "vicreg": {"sim_loss_weight": 25.0, "var_loss_weight": 25.0, "cov_loss_weight": 1.0},
    "vibcreg": {"sim_loss_weight": 25.0, "var_loss_weight": 25.0, "cov_loss_weight": 1.0,
                "iternorm": False},
    "wmse": {"whitening_iters": 1, "whitening_size": 8, "whitening_eps": 0.0, "proj_output_dim": 4},
    "simsiam": {"pred_hidden_dim": P},
    "nnsiam": {"pred_hidden_dim": P, "queue_size": 32},
    "nnclr": {"pred_hidden_dim": P, "queue_size": 32, "temperature": 0.2},
    "byol": {"pred_hidden_dim": P},
    "nnbyol": {"pred_hidden_dim": P, "queue_size": 32},
    "mocov2plus": {"temperature": 0.2, "queue_size": 32},
    "mocov3": {"pred_hidden_dim": P, "temperature": 0.2},
    "ressl": {"temperature_q": 0.1, "temperature_k": 0.04, "queue_size": 32},
    "swav": {"num_prototypes": 30, "sk_iters": 3, "sk_epsilon": 0.05, "temperature": 0.1,
             "queue_size": 32, "epoch_queue_starts": 15, "freeze_prototypes_epochs": 1},
    "deepclusterv2": {"num_prototypes": [5, 5], "temperature": 0.1, "kmeans_iters": 2},
    "dino": {"num_prototypes": 30, "use_bn_in_head": False, "norm_last_layer": True,
             "clip_grad": 0.0, "freeze_last_layer": 0, "student_temperature": 0.1,
             "teacher_temperature": 0.07, "warmup_teacher_temperature": 0.04,
             "warmup_teacher_temperature_epochs": 1},
    "all4one": {"temperature": 0.2, "pred_hidden_dim": P, "queue_size": 32},
}  # fmt: skip
DEPENDENTS: dict[str, list[str]] = {
    "wmse": ["whitening"],
    "simsiam": ["predictor"],
    "nnsiam": ["predictor", "queue"],
    "nnclr": ["predictor", "queue"],
    "byol": ["predictor"],
    "nnbyol": ["predictor", "queue"],
    "mocov2plus": ["queue"],
    "mocov3": ["predictor"],
    "ressl": ["queue"],
    "swav": ["prototypes"],
    "deepclusterv2": ["prototypes"],
    "dino": ["head.last_layer"],
    "all4one": ["predictor", "predictor2", "queue", "transformer_encoder"],
}
EMA = ("byol", "nnbyol", "mocov2plus", "mocov3", "ressl", "dino", "all4one")
MAIN_ONLY = ("supcon", "vibcreg", "mocov3", "all4one")
NEEDS_SHIMS = ["wmse", "byol", "nnbyol", "mocov2plus", "ressl", "dino"]  # see `apply_shims`
RELEASED = [m for m in OPTIONS if m not in (*MAIN_ONLY, *NEEDS_SHIMS)] + NEEDS_SHIMS
TRAINED_ON_MAIN = ["simclr", "byol", "dino", "swav", "mocov3", "vibcreg", "all4one"]


# the tests


def run(group: str, home: Path) -> dict[str, Any]:
    """Runs this file as a script and returns what it found."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(home), str(ROOT), str(ROOT / "adapters")]),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, __file__, group],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


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
def on_release() -> dict[str, Any]:
    return run("release", OVERLAY)


@pytest.fixture(scope="module")
def on_main() -> dict[str, Any]:
    return run("main", Path(CLONE))


def assert_structure(found: dict[str, Any], method: str) -> None:
    """The slot is right, a swap leaves no trace when refused or undone."""
    dino = method == "dino"
    twin = "momentum_head.mlp" if dino else "momentum_projector"
    output_dim = OPTIONS[method].get("proj_output_dim", O)
    assert found["path"] == ("head.mlp" if dino else "projector")
    assert found["dims"] == [H, output_dim]
    assert found["twin"] == (twin if method in EMA else None)
    assert sorted(found["dependents"]) == DEPENDENTS.get(method, [])
    for check in ("in_place", "twin_equal", "random_state_kept", "restored", "untouched"):
        assert found[check], check
    if method in DEPENDENTS:
        assert "DimensionError" in found["refusal"]
        for words in (*DEPENDENTS[method], f"made for {output_dim}", f"gives {output_dim - 2}"):
            assert words in found["refusal"]
    else:
        assert found["refusal"] is None
    if method in EMA:
        assert f"slot='{found['path']}'" in found["copy_refused"]


def assert_training(found: dict[str, Any], method: str) -> None:
    """Two real steps train the new head and nothing that is frozen."""
    assert found["steps"] == 2
    assert found["finite"]
    assert found["moved"]
    assert found["unmoved"] == []
    assert found["embedding_kept"]
    assert found["ema_updates"] == (2 if method in EMA else 0)
    assert found["ema_exact"]
    assert "trainer's optimiser already holds" in str(found["refused_in_fit"])
    assert found["restored"]


@needs_release
@pytest.mark.slow
@pytest.mark.parametrize("method", RELEASED)
def test_released_methods_are_described_and_swapped(on_release: Any, method: str) -> None:
    assert_structure(on_release[method], method)


@needs_release
@pytest.mark.slow
def test_every_released_method_is_tested(on_release: Any) -> None:
    assert set(on_release["METHODS"]) == {*RELEASED, "base", "linear"}


@needs_release
@pytest.mark.slow
def test_released_methods_without_a_projector_are_refused(on_release: Any) -> None:
    assert "trains a classifier and has no projector" in on_release["linear"]
    assert "no projector" in on_release["base"]
    assert on_release["own method"] == ["projector", "momentum_projector", ["predictor"]]


@needs_release
@pytest.mark.slow
@pytest.mark.parametrize("method", RELEASED)
def test_released_methods_train_with_the_new_head(on_release: Any, method: str) -> None:
    assert_training(on_release[f"{method}, training"], method)


@needs_release
@pytest.mark.slow
def test_a_wider_projection_trains_where_nothing_depends_on_it(on_release: Any) -> None:
    for method in ("simclr", "barlow_twins", "vicreg"):
        assert_training(on_release[f"{method}, other width"], method)


@needs_main
@pytest.mark.slow
@pytest.mark.parametrize("method", OPTIONS)
def test_methods_of_main_are_described_and_swapped(on_main: Any, method: str) -> None:
    assert_structure(on_main[method], method)


@needs_main
@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED_ON_MAIN)
def test_methods_of_main_train_with_the_new_head(on_main: Any, method: str) -> None:
    assert_training(on_main[f"{method}, training"], method)


@needs_main
@pytest.mark.slow
def test_what_main_has_without_a_projector_is_refused(on_main: Any) -> None:
    assert set(on_main["METHODS"]) == {*OPTIONS, "base", "linear", "mae"}
    assert "trains a decoder and has no projector" in on_main["mae"]
    assert "iternorm=False" in on_main["vibcreg with iternorm"]


# the script


def check_structure(model: Any) -> dict[str, Any]:
    """What the slot is, and whether swaps keep to their promises."""
    import torch

    from headplug import find_slots, swap_head
    from headplug.errors import HeadplugError

    (slot,) = find_slots(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()

    def same() -> bool:
        now = dict(model.named_modules(remove_duplicate=False))
        after = model.state_dict()
        return (
            list(now) == list(modules)
            and all(now[p] is m for p, m in modules.items())
            and list(after) == list(state)
            and all(torch.equal(after[k], v) for k, v in state.items())
        )

    def refusal(**arguments: Any) -> str | None:
        try:
            swap_head(model, "simclr_plain", **arguments).restore()
        except HeadplugError as error:
            return f"{type(error).__name__}: {error}"
        return None

    found: dict[str, Any] = {
        "path": slot.path,
        "dims": [slot.input_dim, slot.output_dim],
        "twin": slot.twin,
        "dependents": [d.path for d in slot.dependents],
        "refusal": refusal(output_dim=slot.output_dim - 2),
        "copy_refused": refusal(slot=slot.twin) if slot.twin else None,
    }
    found["untouched"] = same()
    swap = swap_head(model, "simclr_plain", hidden_dim=HID)
    found["in_place"] = model.get_submodule(slot.path) is swap.head
    if slot.twin:
        twin = model.get_submodule(slot.twin)
        ours, theirs = swap.head.state_dict(), twin.state_dict()
        found["twin_equal"] = (
            twin is swap.twin
            and all(torch.equal(ours[k], theirs[k]) for k in ours)
            and not any(p.requires_grad for p in twin.parameters())
            and all(a is not b for a, b in model.momentum_pairs)
        )
    else:
        found["twin_equal"] = swap.twin is None
    found["random_state_kept"] = torch.equal(torch.get_rng_state(), random)
    swap.restore()
    found["restored"] = same()
    return found


def check_training(model: Any, pl: Any, **options: Any) -> dict[str, Any]:
    """Two steps under the host's own trainer, with the frozen AE layer in the head."""
    import torch

    from headplug import swap_head
    from headplug.errors import SlotError

    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(AE, H, generator=generator) / 20
    bias = torch.randn(AE, generator=generator)
    old = dict(model.named_modules(remove_duplicate=False))
    swap = swap_head(model, "ae_embedding", weights=(weight, bias), **options)
    start = {n: p.detach().clone() for n, p in swap.head.named_parameters()}
    found: dict[str, Any] = {"ema_updates": 0, "ema_exact": True, "refused_in_fit": None}
    losses: list[Any] = []

    if hasattr(model, "momentum_updater"):
        update = model.momentum_updater.update
        followed = swap.report.slot.twin.partition(".")[0]

        def watched(online: Any, momentum: Any) -> None:
            before = [p.detach().clone() for p in momentum.parameters()]
            tau = model.momentum_updater.cur_tau
            update(online, momentum)
            if momentum is not model.get_submodule(followed):
                return
            found["ema_updates"] += 1
            rows = zip(before, momentum.parameters(), online.parameters(), strict=True)
            exact = all(torch.equal(now, tau * was + (1 - tau) * o) for was, now, o in rows)
            found["ema_exact"] = found["ema_exact"] and exact

        model.momentum_updater.update = watched

    class Watch(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_start(self, trainer: Any, module: Any) -> None:
            try:
                swap_head(module, "simclr_plain")
            except SlotError as error:
                found["refused_in_fit"] = str(error)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"] if isinstance(outputs, dict) else outputs)

    class Views(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 2 * BATCH

        def __getitem__(self, index: int) -> Any:
            views = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(index))
            return index, list(views), index % 5

    # DeepClusterV2 has no assignments in its first epoch, so that its loss is none (nan)
    epochs = 2 if hasattr(model, "kmeans_iters") else 1
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Watch()],
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(Views(), batch_size=BATCH))

    moved = {n: not torch.equal(p, start[n]) for n, p in swap.head.named_parameters()}
    kept = [
        torch.equal(h.embedding.weight, weight) and torch.equal(h.embedding.bias, bias)
        for h in (swap.head, swap.twin)
        if h is not None
    ]
    swap.restore()
    now = dict(model.named_modules(remove_duplicate=False))
    return {
        **found,
        "steps": len(losses) // epochs,
        "finite": all(bool(torch.isfinite(loss).all()) for loss in losses[-2:]),
        "moved": [n for n, yes in moved.items() if yes],
        "unmoved": [n for n, yes in moved.items() if not yes and not n.endswith("bias")],
        "embedding_kept": all(kept),
        "restored": all(now[p] is m for p, m in old.items() if p in now),
    }


def released(name: str) -> Any:
    """A method of release 1.0.2 with tiny dims."""
    from solo.methods import METHODS

    arguments: dict[str, Any] = {
        "encoder": "resnet18", "num_classes": 5, "max_epochs": 1, "batch_size": BATCH,
        "backbone_args": {"cifar": True, "zero_init_residual": False}, "optimizer": "sgd",
        "lars": False, "lr": 0.1, "weight_decay": 0.0, "classifier_lr": 0.1,
        "exclude_bias_n_norm": False, "accumulate_grad_batches": 1,
        "extra_optimizer_args": {"momentum": 0.9}, "scheduler": "none", "min_lr": 0.0,
        "warmup_start_lr": 0.0, "warmup_epochs": 0, "num_large_crops": 2, "num_small_crops": 0,
        "base_tau_momentum": 0.9, "final_tau_momentum": 1.0, "momentum_classifier": False,
        "proj_hidden_dim": HID, "proj_output_dim": O,
    }  # fmt: skip
    return METHODS[name](**{**arguments, **OPTIONS[name]})


def of_main(name: str, **options: Any) -> Any:
    """A method of main, from a config as its own scripts make it."""
    from omegaconf import OmegaConf
    from solo.methods import METHODS

    config = {
        "method": name,
        "backbone": {"name": "resnet18", "kwargs": {}},
        "data": {"dataset": "cifar10", "num_classes": 5, "num_large_crops": 2,
                 "num_small_crops": 0},
        "max_epochs": 1,
        "optimizer": {"name": "sgd", "batch_size": BATCH, "lr": 0.1, "weight_decay": 0.0,
                      "classifier_lr": 0.1, "kwargs": {"momentum": 0.9}},
        "scheduler": {"name": "none"},
        "momentum": {"base_tau": 0.9, "final_tau": 1.0, "classifier": False},
        "method_kwargs": {"proj_hidden_dim": HID, "proj_output_dim": O, **OPTIONS.get(name, {}),
                          **options},
    }  # fmt: skip
    return METHODS[name](OmegaConf.create(config))


def refusal(model: Any) -> str:
    from headplug import swap_head
    from headplug.errors import SlotError

    try:
        swap_head(model, "simclr_plain")
    except SlotError as error:
        return str(error)
    return "not refused"


def group_release() -> dict[str, Any]:
    import pytorch_lightning as pl
    import torch
    from solo.methods import METHODS
    from torch import nn

    from headplug import find_slots

    class Own(METHODS["base"]):  # type: ignore[misc]
        """A user's method on solo-learn's base class."""

    found: dict[str, Any] = {"METHODS": list(METHODS)}
    for name in RELEASED:
        if name == NEEDS_SHIMS[0]:
            apply_shims(pl)
        torch.manual_seed(0)
        model = released(name)
        found[name] = check_structure(model)
        found[f"{name}, training"] = check_training(model, pl)
        if name not in DEPENDENTS:
            again = check_training(released(name), pl, output_dim=O + 4)
            found[f"{name}, other width"] = again
    own = Own.__new__(Own)
    nn.Module.__init__(own)
    own.encoder = nn.Linear(4, H)
    found["base"] = refusal(own)
    own.projector = nn.Linear(H, O)
    own.momentum_projector = copy.deepcopy(own.projector).requires_grad_(False)
    own.predictor = nn.Linear(O, O)
    slot = find_slots(own)[0]
    found["own method"] = [slot.path, slot.twin, [d.path for d in slot.dependents]]
    linear = METHODS["linear"].__new__(METHODS["linear"])
    nn.Module.__init__(linear)
    linear.encoder, linear.classifier = nn.Linear(4, H), nn.Linear(H, 5)
    found["linear"] = refusal(linear)
    return found


def apply_shims(pl: Any) -> None:
    """What 1.0.2 needs on current libraries, with or without headplug."""
    import torch
    from solo.methods.base import BaseMomentumMethod
    from solo.methods.dino import DINO

    end = BaseMomentumMethod.on_train_batch_end

    def on_train_batch_end(
        self: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        end(self, outputs, batch, batch_idx, dataloader_idx)

    BaseMomentumMethod.on_train_batch_end = on_train_batch_end
    DINO.clip_gradients = pl.LightningModule.clip_gradients
    torch.cholesky = torch.linalg.cholesky


def group_main() -> dict[str, Any]:
    import lightning.pytorch as pl
    import torch
    from solo.methods import METHODS

    found: dict[str, Any] = {"METHODS": list(METHODS)}
    for name in OPTIONS:
        torch.manual_seed(0)
        model = of_main(name)
        found[name] = check_structure(model)
        if name in TRAINED_ON_MAIN:
            found[f"{name}, training"] = check_training(model, pl)
    found["vibcreg with iternorm"] = refusal(of_main("vibcreg", iternorm=True, proj_output_dim=64))
    mae = METHODS["mae"]
    model = mae.__new__(mae)
    torch.nn.Module.__init__(model)
    model.backbone, model.decoder = torch.nn.Linear(4, H), torch.nn.Linear(H, 4)
    found["mae"] = refusal(model)
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    groups = {"release": group_release, "main": group_main}
    print(json.dumps(groups[sys.argv[1]]()))
