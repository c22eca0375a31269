"""LayerProbe under both Lightning namespaces: what it logs, what it leaves alone, what it costs."""

from __future__ import annotations

import copy
import csv
import math
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy
import pytest
import pytorch_lightning
import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from headplug import extract_features, probe_layers
from headplug.callbacks import HeadSwap, LayerProbe
from headplug.diagnostics import describe
from headplug.errors import DataError, OptionError, SlotError, TapError, UnknownNameError
from headplug.probing import LinearSetting

H, Z, CLASSES = 12, 8, 4
NAMESPACES = {"lightning.pytorch": lightning, "pytorch_lightning": pytorch_lightning}
POINTS = ("backbone", "pre_projection", "projection")


def samples(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    centres = torch.randn(CLASSES, 6, generator=torch.Generator().manual_seed(9))
    return TensorDataset(centres[labels] + torch.randn(count, 6, generator=generator), labels)


TRAIN, TEST = samples(48, 0), samples(30, 1)


def backbone() -> nn.Module:
    layers = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, H)
    return nn.Sequential(*layers)


def simclr(pl: Any) -> Any:
    """SimCLR with lightly's parts, a bank of negatives and augmentation from all three generators;
    one of its layers stays in eval mode."""

    class SimCLR(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone()
            self.projection_head = SimCLRProjectionHead(H, 16, Z)
            self.criterion = NTXentLoss(memory_bank_size=(32, Z))
            self.register_buffer("calls", torch.zeros(()))
            self.mean = nn.Parameter(torch.zeros(6), requires_grad=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.mean.data.lerp_(x.detach().mean(0).to(self.mean.dtype), 0.1)
            return self.projection_head(self.backbone(x))

        def on_train_epoch_start(self) -> None:
            self.backbone[3].eval()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            noise = random.random() + numpy.random.rand()
            views = [self(batch[0] + noise * torch.randn_like(batch[0])) for _ in range(2)]
            loss = self.criterion(*views)
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", self(batch[0]).square().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    return SimCLR()


def byol(pl: Any) -> Any:
    """BYOL as lightly's examples have it: EMA copies, no forward of the head."""

    class BYOL(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone()
            self.projection_head = BYOLProjectionHead(H, 16, Z)
            self.prediction_head = BYOLPredictionHead(Z, 16, Z)
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            deactivate_requires_grad(self.backbone_momentum)
            deactivate_requires_grad(self.projection_head_momentum)
            self.criterion = NegativeCosineSimilarity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.prediction_head(self.projection_head(self.backbone(x)))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            update_momentum(self.backbone, self.backbone_momentum, m=0.9)
            update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
            views = [batch[0] + torch.randn_like(batch[0]) for _ in range(2)]
            p = [self(v) for v in views]
            with torch.no_grad():
                z = [self.projection_head_momentum(self.backbone_momentum(v)) for v in views]
            return (self.criterion(p[0], z[1]) + self.criterion(p[1], z[0])) / 2

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad])

    return BYOL()


def compiled(pl: Any) -> Any:
    """SimCLR whose backbone was compiled."""
    model = simclr(pl)
    model.backbone.compile(backend="eager")
    model.projection_head = torch.compile(model.projection_head, backend="eager")
    return model


def compiled_whole(pl: Any) -> Any:
    """BYOL as `Trainer.fit(torch.compile(model))` gets it."""
    return torch.compile(byol(pl), backend="eager")


def loader(data: TensorDataset = TRAIN, **options: Any) -> DataLoader[Any]:
    return DataLoader(data, **{"batch_size": 8, "shuffle": True, **options})


def fit(
    pl: Any, model: Any, *callbacks: Any, ckpt_path: Any = None, data: Any = None, **options: Any
) -> Any:
    options = {"max_epochs": 2, "enable_checkpointing": False, "logger": False, **options}
    trainer = pl.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1, callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.fit(model, *(data or [loader()]), ckpt_path=ckpt_path)
    return trainer


def probe(**options: Any) -> LayerProbe:
    return LayerProbe(TRAIN, TEST, **{"max_fraction_of_time": None, **options})


def built(make: Callable[[Any], Any], pl: Any) -> Any:
    torch.manual_seed(0)
    return make(pl)


def by_hand(model: Any, name: str = "probe") -> dict[str, float]:
    """What is to be logged, from the public functions."""
    stores = [extract_features(model, DataLoader(d, batch_size=256), POINTS) for d in (TRAIN, TEST)]
    report = probe_layers(*stores, probes=["knn"], device="cpu")
    found = {f"{name}/{r['tap']}/knn_accuracy": r["accuracy"] for r in report.rows}
    found |= {f"{name}/{s['tap']}/rankme": s["rankme"] for s in report.spectra}
    before, behind = (found[f"{name}/{tap}/knn_accuracy"] for tap in POINTS[1:])
    return {**found, f"{name}/gap/knn": before - behind}


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if "/" in k}


@pytest.fixture(params=NAMESPACES)
def pl(request: pytest.FixtureRequest) -> Any:
    return NAMESPACES[request.param]


# what it logs


def test_history_logger_and_callback_metrics_have_what_the_functions_give(
    pl: Any, tmp_path: Path
) -> None:
    model, layers = built(simclr, pl), probe()
    logger = pl.loggers.CSVLogger(tmp_path, name="", version="")
    trainer = fit(pl, model, layers, logger=logger)
    expected = by_hand(model)
    assert [(row["epoch"], row["step"]) for row in layers.history] == [(0, 6), (1, 12)]
    assert all(row["seconds"] > 0 for row in layers.history)
    assert numbers(layers.history[-1]) == expected
    shown = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("probe/")}
    assert shown == pytest.approx(expected)
    assert [r["tap"] for r in layers.report.rows] == list(POINTS)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["probe/gap/knn"]]
    assert [(row["epoch"], row["step"]) for row in rows] == [("0", "5"), ("1", "11")]
    assert {k: float(rows[-1][k]) for k in expected} == pytest.approx(expected)


def test_runs_come_after_so_many_optimiser_steps(tmp_path: Path) -> None:
    pl = lightning
    logger = pl.loggers.CSVLogger(tmp_path, name="", version="")
    layers = probe(every_n_steps=2, at="backbone", diagnostics=("rankme", "effective_rank"))
    fit(pl, built(simclr, pl), layers, logger=logger, max_epochs=3, accumulate_grad_batches=2)
    assert [row["step"] for row in layers.history] == [2, 4, 6, 8]  # 3 steps an epoch
    assert [row["epoch"] for row in layers.history] == [0, 1, 1, 2]
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["probe/backbone/effective_rank"]]
    assert [int(row["step"]) for row in rows] == [1, 3, 5, 7]
    assert "probe/gap/knn" not in layers.history[-1]


def test_steps_are_counted_across_what_a_batch_of_several_optimisers_does(pl: Any) -> None:
    class Two(type(simclr(pl))):  # type: ignore[misc]
        automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self(batch[0]).square().mean())
                optimizer.step()

        def configure_optimizers(self) -> Any:
            parts = self.backbone, self.projection_head
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]

    layers = probe(every_n_steps=3, at="backbone")
    fit(pl, Two(), layers, max_epochs=1)
    assert [row["step"] for row in layers.history] == [4, 6, 10, 12]


def test_every_second_epoch(pl: Any) -> None:
    layers = probe(every_n_epochs=2, at="backbone")
    fit(pl, built(simclr, pl), layers, max_epochs=5)
    assert [row["epoch"] for row in layers.history] == [1, 3]


def test_checkpoints_and_early_stopping_watch_it(pl: Any, tmp_path: Path) -> None:
    watched = "probe/backbone/knn_accuracy"
    keep = pl.callbacks.ModelCheckpoint(tmp_path, monitor=watched, mode="max", save_top_k=1)
    stop = pl.callbacks.EarlyStopping(watched, mode="max", patience=2)
    layers = probe()
    model = built(simclr, pl)
    trainer = fit(pl, model, stop, keep, layers, enable_checkpointing=True, max_epochs=12)
    values = [row[watched] for row in layers.history]
    best = values.index(max(values))
    assert len(values) == min(12, best + 3) == trainer.current_epoch
    assert float(keep.best_model_score) == pytest.approx(max(values))
    state = torch.load(keep.best_model_path, weights_only=True)
    assert state["epoch"] == best
    saved = state["callbacks"]["LayerProbe(probe)"]["history"]
    assert [numbers(r) for r in saved] == [numbers(r) for r in layers.history[: best + 1]]
    model.load_state_dict(state["state_dict"])
    assert by_hand(model) == numbers(layers.history[best])


def test_a_checkpoint_every_few_steps_watches_it(tmp_path: Path) -> None:
    pl, watched = lightning, "probe/gap/knn"
    keep = pl.callbacks.ModelCheckpoint(
        tmp_path, monitor=watched, mode="min", save_top_k=-1, every_n_train_steps=3
    )
    layers = probe(every_n_steps=3)
    fit(pl, built(simclr, pl), layers, keep, enable_checkpointing=True)
    scores = {int(Path(p).stem.rpartition("step=")[2]): v for p, v in keep.best_k_models.items()}
    assert {k: float(v) for k, v in scores.items()} == pytest.approx(
        {row["step"]: row[watched] for row in layers.history}
    )


def test_two_of_them_log_side_by_side(tmp_path: Path) -> None:
    pl = lightning
    one, two = probe(), probe(name="small", every_n_steps=4, probes=["knn", "ridge"])
    trainer = fit(pl, built(simclr, pl), one, two)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert {"LayerProbe(probe)", "LayerProbe(small)"} <= state.keys()
    assert (len(one.history), len(two.history)) == (2, 3)
    assert numbers(two.history[-1]).keys() >= {"small/gap/ridge", "small/backbone/ridge_accuracy"}
    assert one.history[-1]["probe/gap/knn"] == two.history[-1]["small/gap/knn"]


# what it leaves alone


class Watch:
    """Notes at every batch whatever may not change."""

    def __new__(cls, pl: Any, seen: list[Any]) -> Any:
        class Own(pl.Callback):  # type: ignore[misc, name-defined]
            def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, i: int) -> None:
                state = {k: v.clone() for k, v in module.state_dict().items()}
                seen.append([batch[0], state, modes(module), *generators()])

        return Own()


def generators() -> list[Any]:
    return [torch.get_rng_state(), numpy.random.get_state()[1:3], random.getstate()]


def modes(module: Any) -> list[bool]:
    return [m.training for m in module.modules()]


def hooks(module: Any) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in module.modules() for kind in kinds)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, numpy.ndarray):
        return bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


TRAININGS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "every epoch": (simclr, {}, {"probes": ["knn", "linear", "ridge"]}),
    "every step": (simclr, {}, {"every_n_steps": 1, "at": ["projection", "backbone.0:input"]}),
    "accumulating": (simclr, {"accumulate_grad_batches": 4}, {"every_n_steps": 1}),
    "bf16-mixed": (simclr, {"precision": "bf16-mixed"}, {"every_n_steps": 2}),
    "bf16-true": (simclr, {"precision": "bf16-true"}, {}),
    "with an EMA copy": (byol, {}, {"every_n_steps": 5}),
    "compiled parts": (compiled, {}, {"every_n_steps": 5}),
    "compiled whole": (compiled_whole, {}, {"every_n_steps": 5}),
}


@pytest.mark.parametrize("case", TRAININGS)
def test_training_is_bit_for_bit_as_without_it(case: str) -> None:
    pl = lightning
    make, trainer_options, options = TRAININGS[case]
    options = {"max_fraction_of_time": None, **options}

    def run(*with_callbacks: bool) -> Any:
        model = built(make, pl)
        random.seed(1)
        numpy.random.seed(1)
        own = loader(generator=torch.Generator().manual_seed(3))

        def drawn() -> TensorDataset:
            torch.rand(1), numpy.random.rand(), random.random()
            return TEST

        # it reads the training's own loader
        layers = [LayerProbe(own, drawn, **options) for _ in with_callbacks]
        seen: list[Any] = []
        validation = DataLoader(TEST, batch_size=8, shuffle=True)  # with a sanity check before
        data = [own, validation] if hasattr(model, "validation_step") else [own]
        trainer = fit(pl, model, *layers, Watch(pl, seen), data=data, **trainer_options)
        end = [o.state_dict() for o in trainer.optimizers]
        return [*seen, end, dict(model.state_dict()), modes(model), hooks(model), generators()], (
            layers[0].history if layers else []
        )

    without, _ = run()
    with_it, history = run(True)
    assert len(history) >= 2
    assert equal(without, with_it)


def test_features_are_read_as_the_trainer_validates(pl: Any) -> None:
    layers, model = probe(), built(simclr, pl)
    fit(pl, model, layers, precision="bf16-mixed")
    assert numbers(layers.history[-1]) != by_hand(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert numbers(layers.history[-1]) == by_hand(model)


def test_a_failure_leaves_modes_and_hooks_as_they_were(pl: Any) -> None:
    class Broken(torch.utils.data.Dataset):  # type: ignore[type-arg]
        reads = 0

        def __len__(self) -> int:
            return 40

        def __getitem__(self, i: int) -> Any:
            self.reads += 1
            if self.reads > 60:
                raise OSError("the disk went away")
            return TRAIN[i]

    model = built(simclr, pl)
    layers = LayerProbe(DataLoader(Broken(), batch_size=8), TEST, max_fraction_of_time=None)
    with pytest.raises(OSError, match="the disk went away"):
        fit(pl, model, layers, max_epochs=3)
    assert len(layers.history) == 1
    model.backbone[3].train()
    assert all(modes(model))
    assert hooks(model) == 0


class Diverging(lightning.Callback):
    """Writes NaN into the head before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            nn.init.constant_(module.projection_head.layers[0].weight, torch.nan)


@pytest.mark.parametrize("probes", ["knn", ()])
def test_a_model_that_diverges_is_logged_as_nan_and_trains_on(probes: Any) -> None:
    layers = probe(probes=probes)
    with pytest.warns(UserWarning, match="'probe' is NaN at step .* NaN or infinity") as said:
        trainer = fit(lightning, built(simclr, lightning), layers, Diverging(7), max_epochs=3)
    first, *others = map(numbers, layers.history)
    assert trainer.global_step == 18
    assert all(map(math.isfinite, first.values()))
    assert [row.keys() for row in others] == [first.keys()] * 2
    assert all(math.isnan(v) for row in others for v in row.values())
    assert sum("is NaN at step" in str(w.message) for w in said) == 1
    assert math.isnan(trainer.callback_metrics["probe/projection/rankme"])
    with pytest.raises(DataError, match="NaN or infinity"):
        fit(lightning, built(simclr, lightning), probe(probes=probes), Diverging(3))


class Spoiling(lightning.Callback):
    """Writes NaN into the head for the time of a run, after some epochs."""

    def __init__(self, *epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.weight = module.projection_head.layers[0].weight
        self.kept = self.weight.detach().clone()
        if trainer.current_epoch in self.epochs:
            nn.init.constant_(self.weight, torch.nan)

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch:
            self.weight.data.copy_(self.kept)


@pytest.mark.parametrize("probes", [["knn", "ridge"], ()])
def test_a_tap_that_is_nan_takes_no_other_with_it(probes: Any) -> None:
    def run(*epochs: int) -> list[dict[str, Any]]:
        random.seed(1)
        numpy.random.seed(1)
        layers = probe(probes=probes)
        fit(lightning, built(simclr, lightning), Spoiling(*epochs), layers, max_epochs=3)
        return [numbers(row) for row in layers.history]

    expected = run()
    for epochs in ((1, 2), (0,)):
        with pytest.warns(UserWarning, match="'probe' is NaN at step") as said:
            found = run(*epochs)
        words = [str(w.message) for w in said if "is NaN" in str(w.message)]
        assert len(words) == 1
        assert f"step {6 * epochs[0] + 6} for 'projection': in train, 48 of 48 samples" in words[0]
        for epoch, (row, other) in enumerate(zip(found, expected, strict=True)):
            assert list(row) == list(other)
            lost = {n for n in row if "/gap/" in n or "/projection/" in n}
            assert {n for n, v in row.items() if math.isnan(v)} == (
                lost if epoch in epochs else set()
            )
            assert all(row[n] == other[n] for n in row.keys() - lost)


def test_what_probes_warn_of_is_said_once() -> None:
    model = built(simclr, lightning)
    nn.init.zeros_(model.backbone[4].weight)
    model.backbone[4].requires_grad_(False)
    layers = probe(at=("backbone.0", "backbone", "projection"))
    with pytest.warns(UserWarning, match="is constant") as said:
        fit(lightning, model, layers, max_epochs=3)
    constant = [str(w.message) for w in said if "is constant" in str(w.message)]
    assert len(layers.history) == 3
    assert [words.split("'")[1] for words in constant] == ["backbone", "projection"]


# where it has to work


@pytest.mark.parametrize(
    ("options", "runs"),
    [
        ({"fast_dev_run": True}, 1),
        ({"limit_train_batches": 2}, 2),
        ({"limit_train_batches": 0}, 0),
        ({"max_steps": 4, "max_epochs": -1}, 1),
        ({"limit_val_batches": 0}, 2),
        ({"val_check_interval": 0.5}, 2),
    ],
)
def test_trainers_of_all_kinds(pl: Any, options: dict[str, Any], runs: int) -> None:
    layers = probe(at="projection")
    fit(pl, built(simclr, pl), layers, data=[loader(), DataLoader(TEST, 8)], **options)
    assert len(layers.history) == runs


def test_a_resumed_run_goes_on_with_history_and_metrics(pl: Any, tmp_path: Path) -> None:
    def run(epochs: int, *others: Any, **options: Any) -> Any:
        layers = probe(every_n_steps=5)
        steady = [DataLoader(TRAIN, batch_size=8)]
        model = built(byol, pl)
        model.training_step = lambda batch, *_: model(batch[0]).square().mean()
        model.backbone[3] = nn.Identity()
        trainer = fit(pl, model, layers, *others, max_epochs=epochs, data=steady, **options)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return layers

    first: dict[str, Any] = {}

    class First(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            first.update({k: float(v) for k, v in trainer.callback_metrics.items() if not first})

    half = run(1).history
    resumed = run(3, First(), ckpt_path=tmp_path / "1.ckpt")
    assert first == pytest.approx(numbers(half[-1]))
    assert resumed.history[: len(half)] == half
    assert [r["step"] for r in resumed.history] == [5, 10, 15]
    assert [numbers(r) for r in resumed.history] == [numbers(r) for r in run(3).history]
    assert resumed._budget.due == 3


def test_averages_of_weights_and_another_head_go_with_it(pl: Any) -> None:
    # the first adds an epoch without training of its own
    averages = pl.callbacks.StochasticWeightAveraging(0.05), pl.callbacks.EMAWeightAveraging()
    for average, runs in zip(averages, (3, 2), strict=True):
        layers = probe()
        model = built(simclr, pl)
        fit(pl, model, HeadSwap("simclr_plain", hidden_dim=5, output_dim=Z), average, layers)
        assert len(layers.history) == runs
        assert layers.report.spectra[-1]["dim"] == Z


@pytest.mark.parametrize("kind", ["workers", "batches", "function"])
def test_data_may_be_given_in_many_ways(kind: str) -> None:
    pl, model = lightning, built(simclr, lightning)
    given: dict[str, Any] = {
        "workers": DataLoader(TRAIN, batch_size=8, shuffle=True, num_workers=1),
        "batches": list(DataLoader(TRAIN, batch_size=8)),
        "function": lambda: loader(drop_last=True),
    }
    layers = LayerProbe(given[kind], lambda: TEST, max_fraction_of_time=None)
    fit(pl, model, layers, max_epochs=1)
    expected = by_hand(model)
    assert {k: layers.history[-1][k] for k in expected} == pytest.approx(expected)


def test_diagnostics_alone_need_neither_labels_nor_test_data(pl: Any) -> None:
    images = TensorDataset(TRAIN.tensors[0])
    names = ("rankme", "stable_rank", "dead_units", "alpha")
    layers = LayerProbe(images, at="projection", probes=(), diagnostics=names)
    model = built(simclr, pl)
    fit(pl, model, layers, max_epochs=1)
    z = extract_features(model, DataLoader(images, 256), "projection")["projection"]
    described = describe(z)
    assert described["alpha"] is None or len(z) > 6
    assert numbers(layers.history[0]) == pytest.approx(
        {
            f"probe/projection/{n}": math.nan if described[n] is None else described[n]
            for n in names
        },
        nan_ok=True,
    )
    assert layers.report is None


# its cost


def test_there_is_no_time_and_a_warning_says_so_once(pl: Any) -> None:
    layers = probe(max_fraction_of_time=1e-6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(pl, built(simclr, pl), layers, max_epochs=4)
    assert [row["epoch"] for row in layers.history] == [0]
    said = [str(w.message) for w in caught if "LayerProbe" in str(w.message)]
    assert len(said) == 1
    assert "max_fraction_of_time is 1e-06" in said[0]
    assert "ask for every_n_epochs=" in said[0]
    assert "probe/gap/knn" in trainer.callback_metrics


def test_the_share_of_time_keeps_within_the_bound() -> None:
    class Slow(lightning.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            torch.randn(300, 300) @ torch.randn(300, 300)

    layers = probe(max_fraction_of_time=0.4, every_n_steps=1, at="backbone")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(lightning, built(simclr, lightning), layers, Slow(), max_epochs=10)
    budget = layers._budget
    assert 1 < len(layers.history) < 60 == budget.due
    assert sum(row["seconds"] for row in layers.history) == pytest.approx(budget.spent)
    last = layers.history[-1]["seconds"]  # known only once it was spent
    assert budget.spent - last <= 0.4 * (budget.spent + budget.around)


# bad input


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"probes": ["knnn"]}, UnknownNameError, r"no probe is called 'knnn'. Closest: knn"),
        ({"probes": [], "diagnostics": []}, OptionError, "name at least one probe or one diag"),
        ({"test": None}, OptionError, "probes need test data"),
        ({"diagnostics": "rankm"}, UnknownNameError, "no diagnostic is called 'rankm'"),
        ({"every_n_steps": 0}, OptionError, "every_n_steps must be a positive integer, not 0"),
        ({"every_n_epochs": 1.5}, OptionError, "every_n_epochs must be a positive integer"),
        ({"every_n_epochs": 1, "every_n_steps": 1}, OptionError, "leave one of them out"),
        ({"max_fraction_of_time": 0}, OptionError, "max_fraction_of_time must lie above 0"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(
    options: dict[str, Any], error: Any, words: str
) -> None:
    with pytest.raises(error, match=words):
        LayerProbe(TRAIN, **{"test": TEST, **options})


def without_labels() -> Any:
    return DataLoader(TensorDataset(TEST.tensors[0]), batch_size=8)


def numbers_to_predict() -> Any:
    return TensorDataset(TEST.tensors[0], TEST.tensors[1].float())


class Unused(nn.Module):
    """A layer that no forward calls."""

    def forward(self, x: Any) -> Any:
        return x


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"at": "bckbone"}, UnknownNameError, "Closest: backbone"),
        ({"at": "unused"}, TapError, "unused"),
        ({"train": without_labels()}, DataError, "the train data of LayerProbe have no labels"),
        ({"test": without_labels}, DataError, "the test data of LayerProbe have no labels"),
        (
            {"train": numbers_to_predict, "at": "backbone"},
            DataError,
            r"the train labels are regression, \(N, 1\) floats and the test labels are classes",
        ),
        (
            {"train": numbers_to_predict, "test": numbers_to_predict, "probes": "logistic"},
            OptionError,
            "logistic regression needs classes or labels",
        ),
        ({"probes": {"mine": [LinearSetting(lr=-1.0)]}}, OptionError, "lr in .* not -1.0"),
        ({"test": []}, DataError, "the loader is empty"),
        ({"test": 5}, DataError, "a int cannot be iterated"),
        ({"train": lambda: iter([])}, DataError, "train data of LayerProbe are a list_iterator"),
    ],
)
def test_what_cannot_work_fails_when_the_trainer_starts(
    pl: Any, options: dict[str, Any], error: Any, words: str
) -> None:
    model = built(simclr, pl)
    model.unused = Unused()
    state = copy.deepcopy(model.state_dict())
    layers = LayerProbe(**{"train": TRAIN, "test": TEST, **options})
    with pytest.raises(error, match=words):
        fit(pl, model, layers)
    assert equal(dict(state), dict(model.state_dict()))
    assert all(modes(model))
    assert hooks(model) == 0


def test_a_model_without_a_head_is_refused_when_the_trainer_starts(pl: Any) -> None:
    class Plain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self(batch[0]).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(SlotError, match="needs one projection head"):
        fit(pl, Plain(), probe(at="projection"))
    layers = probe(at="net")
    fit(pl, Plain(), layers)
    assert "probe/net/knn_accuracy" in layers.history[-1]
