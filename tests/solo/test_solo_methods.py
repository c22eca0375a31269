"""Swapping heads in real solo-learn methods.

solo-learn's release 1.0.2 needs other versions of its libraries than the rest, so this file also
runs as a script, in a process of its own: `python test_solo_methods.py GROUP`, with the overlay
`.solo` first on PYTHONPATH (or, for main, a clone) and one JSON object as the last line of its
output. The checks are made there; what they gave is asserted here.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest

H, HID, O, P, BATCH = 512, 24, 16, 20, 8  # noqa: E741 - solo-learn's own letters
AE = 12
WIDTH = 24  # another output width

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
             "queue_size": 32, "epoch_queue_starts": 15, "freeze_prototypes_epochs": 0},
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
    "swav": ["proj_output_dim", "prototypes"],
    "deepclusterv2": ["proj_output_dim", "prototypes"],
    "dino": ["head.last_layer"],
    "all4one": ["predictor", "predictor2", "queue", "transformer_encoder"],
}
TOO_WIDE = {  # a width that the method cannot take, and why
    "wmse": (8, "whitening (whitening, made for 4): 7 is the widest"),
    "all4one": (20, "transformer_encoder (transformer, made for 16): its 8 attention heads"),
}
EMA = ("byol", "nnbyol", "mocov2plus", "mocov3", "ressl", "dino", "all4one")
MAIN_ONLY = ("supcon", "vibcreg", "mocov3", "all4one")
NEEDS_SHIMS = ["wmse", "byol", "nnbyol", "mocov2plus", "ressl", "dino"]  # see `apply_shims`
RELEASED = [m for m in OPTIONS if m not in (*MAIN_ONLY, *NEEDS_SHIMS)] + NEEDS_SHIMS
WITH_LARS = ["simclr", "byol", "swav"]
NOT_RESUMED = {"deepclusterv2": "local_memory_index"}  # not by solo-learn itself, for this buffer
LOST = {  # keys that a checkpoint may lack without solo-learn minding: a twin's, a dependent's
    "byol": ["momentum_projector.layers.output.weight", "predictor.0.weight"],
    "nnclr": ["queue"],
    "dino": ["head.last_layer.weight_v", "momentum_head.last_layer.weight_v"],
}
TRAINED_ON_MAIN = ["simclr", "byol", "dino", "swav", "mocov3", "vibcreg", "all4one"]


# the tests


@pytest.fixture(scope="module")
def on_release(run_on_solo: Callable[[str, str], dict[str, Any]]) -> dict[str, Any]:
    return run_on_solo(__file__, "release")


@pytest.fixture(scope="module")
def on_main(run_on_solo: Callable[[str, str], dict[str, Any]]) -> dict[str, Any]:
    return run_on_solo(__file__, "main")


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
    if method in TOO_WIDE:
        width, reason = TOO_WIDE[method]
        for words in ("DimensionError", f"gives {width} features instead of {output_dim}", reason):
            assert words in found["refusal"]
        for other in set(DEPENDENTS[method]) - {reason.partition(" ")[0]}:
            assert f"{other} (" not in found["refusal"]
    if method in EMA:
        assert f"slot='{found['path']}'" in found["copy_refused"]


def assert_width(found: dict[str, Any], method: str) -> None:
    """With another width, all but the projector is as solo-learn itself builds it."""
    twins = ["momentum_head.last_layer"] if method == "dino" else []
    assert sorted(found["rebuilt"]) == sorted([*DEPENDENTS.get(method, []), *twins])
    for key in ("keys", "tensors", "modules", "numbers", "unit", "pairs", "groups", "options"):
        ours, fresh = found[key]
        assert ours == fresh, key
    normed = {"queue", "prototypes", "head.last_layer"} & set(found["rebuilt"])
    if (method, found["version"]) != ("swav", "release"):  # the release leaves their lengths free
        assert any(found["unit"][0].values()) is bool(normed)
    assert found["spread"] == []
    for check in ("untouched", "twins_equal", "random_state_kept", "restored"):
        assert found[check], check


def assert_training(found: dict[str, Any], method: str) -> None:
    """Two real steps train the new head and nothing that is frozen."""
    assert found["steps"] == 2
    assert found["finite"]
    assert found["unmoved"] == []
    assert found["embedding_kept"]
    assert found["ema_updates"] == (2 if method in EMA else 0)
    assert found["ema_exact"]
    assert "trainer's optimiser already exists" in str(found["refused_in_fit"])
    assert found["restored"]


def assert_memory(found: dict[str, Any], method: str) -> None:
    """What solo-learn registers when training starts has the new width as well."""
    memory = {"swav": {"queue": [2, 32, WIDTH]},
              "deepclusterv2": {"local_memory_embeddings": [2, 2 * BATCH, WIDTH]}}  # fmt: skip
    assert found["memory"].items() >= memory.get(method, {}).items()


def assert_resumed(found: dict[str, Any], method: str) -> None:
    """A run that was interrupted ends as one that was not, and takes no other head's weights."""
    if method in NOT_RESUMED:
        assert set(found["resumed"]) == {found["stock"]}
        assert NOT_RESUMED[method] in found["stock"]
    else:
        assert found["resumed"]
        assert not any(found["resumed"])  # nothing is unlike
    asked = "CheckpointError: the checkpoint has"
    assert found["other head"].startswith(f"{asked} another head than this run asks for")
    assert "(there and here): activation: 'tanh' and 'relu'. " in found["other head"]
    assert found["no head"].startswith(f"{asked} the head 'ae_embedding', this run asks for none.")
    assert list(found["lost"]) == LOST.get(method, [])
    for key, said in found["lost"].items():
        assert f"that go with its head: {key!r} has shape None" in said


def assert_whole(found: dict[str, Any]) -> None:
    """DINO's head with its prototypes, which its loss has a centre for."""
    assert (
        "head.last_layer, which MLPHead does not have. Set freeze_last_layer=0" in found["frozen"]
    )
    assert found["untouched"]
    assert found["with a last layer"] == "DINOHead"
    assert found["centre"] == [1, WIDTH]
    assert_training(found["training"], "dino")
    assert found["training"]["moved"]


@pytest.mark.slow
@pytest.mark.parametrize("method", RELEASED)
def test_released_methods_are_described_and_swapped(on_release: Any, method: str) -> None:
    assert_structure(on_release[method], method)


@pytest.mark.slow
def test_every_released_method_is_tested(on_release: Any) -> None:
    assert set(on_release["METHODS"]) == {*RELEASED, "base", "linear"}


@pytest.mark.slow
def test_released_methods_without_a_projector_are_refused(on_release: Any) -> None:
    assert "trains a classifier and has no projector" in on_release["linear"]
    assert "no projector" in on_release["base"]
    assert on_release["own method"] == ["projector", "momentum_projector", ["predictor"]]


@pytest.mark.slow
@pytest.mark.parametrize("method", RELEASED)
def test_released_methods_train_with_the_new_head(on_release: Any, method: str) -> None:
    assert_training(on_release[f"{method}, training"], method)
    assert on_release[f"{method}, training"]["moved"]


@pytest.mark.slow
@pytest.mark.parametrize("method", RELEASED)
def test_released_methods_take_another_width(on_release: Any, method: str) -> None:
    assert_width(on_release[f"{method}, width"], method)
    assert_training(on_release[f"{method}, other width"], method)
    assert_memory(on_release[f"{method}, other width"], method)


@pytest.mark.slow
@pytest.mark.parametrize("method", RELEASED)
def test_released_methods_resume(on_release: Any, method: str) -> None:
    assert_resumed(on_release[f"{method}, resumed"], method)


@pytest.mark.slow
def test_the_release_resumes_no_run_with_another_head(on_release: Any) -> None:
    found = on_release["auto resume"]
    assert found["resumed"] == [None, None, None, "reweighting", "stock"]
    recorded, none = found["recorded"]
    assert recorded["head"]["name"] == "reweighting"
    assert recorded["head"]["input_dim"] == H
    assert none is None


@pytest.mark.slow
def test_the_whole_head_of_the_released_dino_is_swapped(on_release: Any) -> None:
    assert_whole(on_release["whole dino"])


@pytest.mark.slow
@pytest.mark.parametrize("method", OPTIONS)
def test_methods_of_main_are_described_and_swapped(on_main: Any, method: str) -> None:
    assert_structure(on_main[method], method)


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED_ON_MAIN)
def test_methods_of_main_train_with_the_new_head(on_main: Any, method: str) -> None:
    assert_training(on_main[f"{method}, training"], method)
    assert on_main[f"{method}, training"]["moved"]


@pytest.mark.slow
@pytest.mark.parametrize("method", OPTIONS)
def test_methods_of_main_take_another_width(on_main: Any, method: str) -> None:
    assert_width(on_main[f"{method}, width"], method)
    assert_training(on_main[f"{method}, other width"], method)
    assert_memory(on_main[f"{method}, other width"], method)


@pytest.mark.slow
@pytest.mark.parametrize("method", OPTIONS)
def test_methods_of_main_resume(on_main: Any, method: str) -> None:
    assert_resumed(on_main[f"{method}, resumed"], method)


@pytest.mark.slow
def test_the_whole_head_of_dino_is_swapped(on_main: Any) -> None:
    assert_whole(on_main["whole dino"])


@pytest.mark.slow
@pytest.mark.parametrize("head", ["ae_embedding", "reweighting"])
@pytest.mark.parametrize("method", WITH_LARS)
def test_frozen_and_free_heads_train_with_lars(on_main: Any, method: str, head: str) -> None:
    found = on_main[f"{method}, {head}, lars"]
    assert_training(found, method)
    assert found["optimizer"] == "LARS"
    assert bool(found["moved"]) is (head == "ae_embedding" or method in DEPENDENTS)


@pytest.mark.slow
def test_the_iternorm_of_vibcreg_stays_at_the_end_of_its_projector(on_main: Any) -> None:
    found = on_main["vibcreg with iternorm"]
    assert found["same width"] == found["fresh, same width"]
    assert found["new width"] == found["fresh, new width"]
    assert found["swapped again"] == ["IterNorm"]
    assert found["dims"] == [H, 96]
    assert found["restored"]
    assert_training(found["training"], "vibcreg")


@pytest.mark.slow
def test_what_main_has_without_a_projector_is_refused(on_main: Any) -> None:
    assert set(on_main["METHODS"]) == {*OPTIONS, "base", "linear", "mae"}
    assert "trains a decoder and has no projector" in on_main["mae"]


# the script


def unchanged(model: Any) -> Callable[[], bool]:
    """Says whether a model still has the same modules, tensors, values and numbers."""
    import torch

    modules = dict(model.named_modules(remove_duplicate=False))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    held = {k: id(v) for k, v in (*model.named_parameters(), *model.named_buffers())}
    width = getattr(model, "proj_output_dim", None)

    def same() -> bool:
        now = dict(model.named_modules(remove_duplicate=False))
        after = model.state_dict()
        return (
            list(now) == list(modules)
            and all(now[p] is m for p, m in modules.items())
            and list(after) == list(state)
            and all(torch.equal(after[k], v) for k, v in state.items())
            and held == {k: id(v) for k, v in (*model.named_parameters(), *model.named_buffers())}
            and width == getattr(model, "proj_output_dim", None)
        )

    return same


def check_structure(model: Any, name: str) -> dict[str, Any]:
    """What the slot is, and whether swaps keep to their promises."""
    import torch

    from headplug import find_slots, swap_head
    from headplug.errors import HeadplugError

    (slot,) = find_slots(model)
    random = torch.get_rng_state()
    same = unchanged(model)

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
        "refusal": refusal(output_dim=TOO_WIDE[name][0]) if name in TOO_WIDE else None,
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


def width_of(name: str) -> int:
    return 6 if name == "wmse" else WIDTH


def check_width(name: str, build: Callable[..., Any]) -> dict[str, Any]:
    """What a swap to another width makes, beside what solo-learn itself builds for that width."""
    import torch
    from torch import nn

    from headplug import find_slots, swap_head

    torch.manual_seed(0)
    model, fresh = build(name), build(name, proj_output_dim=width_of(name))
    (slot,) = find_slots(model)
    same, random = unchanged(model), torch.get_rng_state()
    options = {"hidden_dim": HID, "output_dim": width_of(name)}
    swap_head(model, "simclr_plain", dry_run=True, **options)
    untouched = same()
    swap = swap_head(model, "simclr_plain", **options)
    rebuilt = [p for p in swap.report.rebuilt if p != "proj_output_dim"]
    heads = tuple(f"{path}." for path in (slot.path, slot.twin) if path)
    pair = (model, fresh)

    def tensors(of: Any) -> dict[str, Any]:
        held = (*of.named_parameters(), *of.named_buffers())
        return {n: t for n, t in held if not n.startswith(heads)}

    def followers(of: Any) -> dict[str, Any]:
        return {n: t for n, t in tensors(of).items()
                if any(n == p or n.startswith(f"{p}.") for p in rebuilt)}  # fmt: skip

    def value(of: Any, path: str) -> Any:
        holder, _, last = path.rpartition(".")
        return getattr(of.get_submodule(holder), last)

    def groups(of: Any) -> list[Any]:
        own = {id(p) for h in heads for p in of.get_submodule(h[:-1]).parameters()}
        return [
            [list(p.shape) for p in g["params"] if id(p) not in own] for g in of.learnable_params
        ]

    spread = []
    for key, old in followers(fresh).items():
        new = followers(model)[key].detach()
        if new.is_floating_point() and new.numel() > 100:
            if not 0.8 < float((new.std() + 1e-9) / (old.std() + 1e-9)) < 1.25:
                spread.append([key, float(new.std()), float(old.std())])
            if old.ndim == 2 and new.abs().max() > 1.2 * old.abs().max():
                spread.append([key, float(new.abs().max()), float(old.abs().max())])
    found = {
        "version": "release" if build is released else "main",
        "rebuilt": list(swap.report.rebuilt),
        "keys": [list(tensors(m)) for m in pair],
        "tensors": [{n: [list(t.shape), str(t.dtype), t.requires_grad, t.is_leaf]
                     for n, t in tensors(m).items()} for m in pair],
        "modules": [{p: repr(value(m, p)) for p in rebuilt
                     if isinstance(value(m, p), nn.Module)} for m in pair],
        "numbers": [getattr(m, "proj_output_dim", None) for m in pair],
        "unit": [{n: [i for i in range(t.ndim) if unit(t, i)]
                  for n, t in followers(m).items()} for m in pair],
        "pairs": [[len(list(a.parameters())) == len(list(b.parameters()))
                   for a, b in getattr(m, "momentum_pairs", [])] for m in pair],
        "groups": [groups(m) for m in pair],
        "options": [[{k: v for k, v in g.items() if k != "params"} for g in m.learnable_params]
                    for m in pair],
        "spread": spread,
        "untouched": untouched,
        "twins_equal": all(
            torch.equal(a, b) and a is not b and not b.requires_grad
            for d in find_slots(model)[0].dependents if d.twin
            for a, b in zip(model.get_submodule(d.path).parameters(),
                            model.get_submodule(d.twin).parameters(), strict=True)
        ),
        "random_state_kept": torch.equal(torch.get_rng_state(), random),
    }  # fmt: skip
    swap.restore()
    return {**found, "restored": same()}


def unit(tensor: Any, axis: int) -> bool:
    lengths = tensor.detach().float().norm(dim=axis)
    return bool(tensor.ndim > 1 and ((lengths - 1).abs() < 1e-5).all())


def views(batches: int) -> Any:
    """A loader of what solo-learn trains on: index, two views, label."""
    import torch

    class Views(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return batches * BATCH

        def __getitem__(self, index: int) -> Any:
            views = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(index))
            return index, list(views), index % 5

    return torch.utils.data.DataLoader(Views(), batch_size=BATCH)


def check_training(
    model: Any, pl: Any, head: str = "ae_embedding", **options: Any
) -> dict[str, Any]:
    """Two steps under the host's own trainer, with the frozen AE layer in the head."""
    import torch

    from headplug import swap_head
    from headplug.errors import SlotError

    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(AE, H, generator=generator) / 20
    bias = torch.randn(AE, generator=generator)
    old = dict(model.named_modules(remove_duplicate=False))
    embedding = {"weights": (weight, bias)} if head == "ae_embedding" else {}
    swap = swap_head(model, head, **embedding, **options)
    followers = tuple(f"{path}." for path in (*swap.report.paths, *swap.report.rebuilt))
    trained = {
        n: p for n, p in model.named_parameters() if n.startswith(followers) and p.requires_grad
    }
    start = {n: p.detach().clone() for n, p in trained.items()}
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

    # DeepClusterV2 has no assignments in its first epoch, so that its loss is none (nan)
    epochs = 2 if hasattr(model, "kmeans_iters") else 1
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Watch()],
    )  # fmt: skip
    trainer.fit(model, views(2))

    moved = {n: not torch.equal(p, start[n]) for n, p in trained.items()}
    kept = [
        torch.equal(h.embedding.weight, weight) and torch.equal(h.embedding.bias, bias)
        for h in (swap.head, swap.twin)
        if h is not None and embedding
    ]
    memory = {n: list(b.shape) for n, b in model.named_buffers()}
    swap.restore()
    now = dict(model.named_modules(remove_duplicate=False))
    return {
        **found,
        "steps": len(losses) // epochs,
        "finite": all(bool(torch.isfinite(loss).all()) for loss in losses[-2:]),
        "moved": [n for n, yes in moved.items() if yes],
        "unmoved": [n for n, yes in moved.items() if not yes and not n.endswith("bias")],
        "embedding_kept": all(kept),
        "memory": {n: memory[n] for n in ("queue", "local_memory_embeddings") if n in memory},
        "optimizer": type(trainer.optimizers[0]).__name__.removeprefix("Lightning"),
        "restored": all(now[p] is m for p, m in old.items() if p in now),
    }


def check_resuming(build: Callable[..., Any], names: list[str], pl: Any) -> dict[str, Any]:
    """Each method with a head from a block `headplug:`, saved after an epoch and taken up again."""
    import os
    import tempfile
    from pathlib import Path

    import torch
    from headplug_solo.config import ENVIRONMENT
    from headplug_solo.patch import arm

    arm()

    class Keep(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            torch.manual_seed(trainer.global_step)  # dropout, shuffling in W-MSE

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(folder / "half.ckpt")

    def fit(name: str, seed: int, head: Any, **resume: Any) -> Any:
        torch.manual_seed(seed)
        if head:
            os.environ[ENVIRONMENT] = json.dumps({"head": head})
        # its queue is made as training starts, too late for a checkpoint
        options = {"queue_size": 0} if name == "swav" else {}
        try:
            model = build(name, steady=True, **options)
        finally:
            os.environ.pop(ENVIRONMENT, None)
        if hasattr(model, "pos_enc"):  # the first step makes a buffer of it
            model.pos_enc(torch.zeros(BATCH, 5, (head or {}).get("output_dim", O)))
        trainer = pl.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[Keep()],
        )  # fmt: skip
        trainer.fit(model, views(2 if name == "deepclusterv2" else 1), **resume)
        schedules = [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs]
        optimizers = [o.state_dict() for o in trainer.optimizers]
        return [model.state_dict(), optimizers, schedules, trainer.global_step]

    def resume(name: str, head: Any, without: str | None = None) -> Any:
        """What a run gives that takes up the last one, or why it does not."""
        if without:
            checkpoint = torch.load(folder / "half.ckpt", weights_only=True)
            del checkpoint["state_dict"][without]
            torch.save(checkpoint, folder / "lost.ckpt")
        try:
            return fit(name, 1, head, ckpt_path=folder / ("lost.ckpt" if without else "half.ckpt"))
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights = {"embedding.weight": torch.randn(AE, H) / 20, "embedding.bias": torch.zeros(AE)}
        torch.save(weights, folder / "ae.pt")
        same = {"name": "ae_embedding", "weights": str(folder / "ae.pt")}
        for name in names:
            rows: dict[str, Any] = {"resumed": []}
            wider = {**same, "output_dim": width_of(name)}
            both = build is of_main or name in ("simclr", "byol")
            for head in (same, wider) if both else (wider,):
                through, resumed = fit(name, 0, head), resume(name, head)
                failed = isinstance(resumed, str)
                rows["resumed"].append(resumed if failed else unlike(through, resumed))
            rows["other head"] = resume(name, {**head, "activation": "relu"})
            rows["no head"] = resume(name, None)
            rows["lost"] = {key: resume(name, head, key) for key in LOST.get(name, ())}
            if failed:
                fit(name, 0, None)
                rows["stock"] = resume(name, None)
            found[f"{name}, resumed"] = rows
    return found


def check_auto_resume(pl: Any) -> dict[str, Any]:
    """What the release's scripts do: make a method, look for a run to resume, train, save."""
    import os
    import tempfile
    from argparse import Namespace
    from pathlib import Path

    from headplug_solo.config import ENVIRONMENT
    from headplug_solo.patch import arm
    from solo.utils.auto_resumer import AutoResumer
    from solo.utils.checkpointer import Checkpointer

    arm()
    names = ("batch_size", "dataset", "encoder", "max_epochs", "method", "project", "entity")
    found: dict[str, Any] = {"resumed": [], "recorded": []}
    with tempfile.TemporaryDirectory() as folder:
        for head in ("reweighting", "simclr_plain", None, "reweighting", None):
            arguments = Namespace(name="run", **dict.fromkeys(names))
            if head:
                os.environ[ENVIRONMENT] = json.dumps({"head": head})
            model = released("simclr")
            os.environ.pop(ENVIRONMENT, None)
            path = AutoResumer(folder).find_checkpoint(arguments)
            found["resumed"].append(path and path.parent.parent.name)
            if path or head == "simclr_plain":
                continue
            logdir = Path(folder, head or "stock")
            trainer = pl.Trainer(
                max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False,
                callbacks=[Checkpointer(arguments, logdir)],
            )  # fmt: skip
            trainer.fit(model, views(1))
            (file,) = logdir.glob("*/args.json")
            found["recorded"].append(json.loads(file.read_text()).get("headplug"))
    return found


def check_whole(build: Callable[..., Any], pl: Any) -> dict[str, Any]:
    """DINO's head and prototypes as one."""
    from headplug import swap_head

    model = build("dino", freeze_last_layer=1)
    same = unchanged(model)
    found: dict[str, Any] = {"frozen": refusal(model, slot="head"), "untouched": same()}
    with swap_head(model, "dino", slot="head") as swap:
        found["with a last layer"] = type(swap.head).__name__
    model = build("dino")
    with swap_head(model, "simclr_plain", slot="head", output_dim=WIDTH):
        found["centre"] = list(model.dino_loss_func.center.shape)
    found["training"] = check_training(model, pl, slot="head", output_dim=WIDTH)
    return found


def unlike(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two checkpoints, or parts of them, differ to the bit."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [path]
    pair = [dict(enumerate(x)) if isinstance(x, list | tuple) else x for x in (one, other)]
    if not all(isinstance(x, dict) for x in pair):
        return [] if one == other else [path]
    ours, theirs = pair
    return [
        row for k in {**ours, **theirs} for row in unlike(ours.get(k), theirs.get(k), f"{path}.{k}")
    ]


def released(name: str, steady: bool = False, **options: Any) -> Any:
    """A method of release 1.0.2 with tiny dims; `steady` as in `of_main`."""
    from solo.methods import METHODS

    arguments: dict[str, Any] = {
        "encoder": "resnet18", "num_classes": 5, "max_epochs": 1 + steady, "batch_size": BATCH,
        "backbone_args": {"cifar": True, "zero_init_residual": False}, "optimizer": "sgd",
        "lars": False, "lr": 0.1, "weight_decay": 0.0, "classifier_lr": 0.1,
        "exclude_bias_n_norm": False, "accumulate_grad_batches": 1,
        "extra_optimizer_args": {"momentum": 0.9}, "scheduler": "none", "min_lr": 0.0,
        "warmup_start_lr": 0.0, "warmup_epochs": 0, "num_large_crops": 2, "num_small_crops": 0,
        "base_tau_momentum": 0.9, "final_tau_momentum": 0.9 if steady else 1.0,
        "momentum_classifier": False,
        "proj_hidden_dim": HID, "proj_output_dim": O,
    }  # fmt: skip
    return METHODS[name](**{**arguments, **OPTIONS[name], **options})


LARS = {"name": "lars", "exclude_bias_n_norm_wd": True, "weight_decay": 1e-4,
        "kwargs": {"eta": 0.02, "clip_lr": True, "exclude_bias_n_norm": True}}  # fmt: skip


def of_main(name: str, lars: bool = False, steady: bool = False, **options: Any) -> Any:
    """A method of main, from a config as its own scripts make it.

    `steady`: two epochs, and an EMA momentum that stays, since solo-learn does not resume it.
    """
    from omegaconf import OmegaConf
    from solo.methods import METHODS

    config = {
        "method": name,
        "backbone": {"name": "resnet18", "kwargs": {}},
        "data": {"dataset": "cifar10", "num_classes": 5, "num_large_crops": 2,
                 "num_small_crops": 0},
        "max_epochs": 1 + steady,
        "optimizer": {"name": "sgd", "batch_size": BATCH, "lr": 0.1, "weight_decay": 0.0,
                      "classifier_lr": 0.1, "kwargs": {"momentum": 0.9},
                      **(LARS if lars else {})},
        "scheduler": {"name": "none"},
        "momentum": {"base_tau": 0.9, "final_tau": 0.9 if steady else 1.0, "classifier": False},
        "method_kwargs": {"proj_hidden_dim": HID, "proj_output_dim": O, **OPTIONS.get(name, {}),
                          **options},
    }  # fmt: skip
    return METHODS[name](OmegaConf.create(config))


def refusal(model: Any, **options: Any) -> str:
    from headplug import swap_head
    from headplug.errors import SlotError

    try:
        swap_head(model, "simclr_plain", **options)
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
        found[name] = check_structure(model, name)
        found[f"{name}, training"] = check_training(model, pl)
        found[f"{name}, width"] = check_width(name, released)
        again = check_training(released(name), pl, output_dim=width_of(name))
        found[f"{name}, other width"] = again
    found["whole dino"] = check_whole(released, pl)
    found["auto resume"] = check_auto_resume(pl)
    found.update(check_resuming(released, RELEASED, pl))
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
        found[name] = check_structure(model, name)
        if name in TRAINED_ON_MAIN:
            found[f"{name}, training"] = check_training(model, pl)
        found[f"{name}, width"] = check_width(name, of_main)
        again = check_training(of_main(name), pl, output_dim=width_of(name))
        found[f"{name}, other width"] = again
    for name in WITH_LARS:
        for head, width in {"ae_embedding": WIDTH, "reweighting": H}.items():
            again = check_training(of_main(name, lars=True), pl, head, output_dim=width)
            found[f"{name}, {head}, lars"] = again
    found["vibcreg with iternorm"] = check_iternorm(pl)
    found["whole dino"] = check_whole(of_main, pl)
    found.update(check_resuming(of_main, list(OPTIONS), pl))
    mae = METHODS["mae"]
    model = mae.__new__(mae)
    torch.nn.Module.__init__(model)
    model.backbone, model.decoder = torch.nn.Linear(4, H), torch.nn.Linear(H, 4)
    found["mae"] = refusal(model)
    return found


def check_iternorm(pl: Any) -> dict[str, Any]:
    """VIbCReg with its whitening layer, which belongs to the method and not to the head."""
    from headplug import find_slots, swap_head

    def last(model: Any) -> list[Any]:
        module = list(model.projector)[-1]
        return [repr(module), {n: list(t.shape) for n, t in module.state_dict().items()}]

    model, fresh = (of_main("vibcreg", iternorm=True, proj_output_dim=z) for z in (64, 96))
    same = unchanged(model)
    found: dict[str, Any] = {"fresh, same width": last(model), "fresh, new width": last(fresh)}
    with swap_head(model, "simclr_plain"):
        found["same width"] = last(model)
    first = swap_head(model, "simclr_plain", output_dim=96)
    found["new width"] = last(model)
    (slot,) = find_slots(model)
    found["dims"] = [slot.input_dim, slot.output_dim]
    second = swap_head(model, "simclr_plain", hidden_dim=5)
    norms = [type(m).__name__ for m in model.projector.modules() if "Iter" in type(m).__name__]
    found["swapped again"] = norms
    second.restore()
    first.restore()
    found["restored"] = same()
    return {**found, "training": check_training(model, pl, output_dim=96)}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    groups = {"release": group_release, "main": group_main}
    print(json.dumps(groups[sys.argv[1]]()))
