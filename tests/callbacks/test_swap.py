"""HeadSwap under both Lightning namespaces: swapped before the optimiser, kept in checkpoints."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import pytorch_lightning
import torch
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import nn

from headplug import AEEmbeddingHead, swap_head
from headplug.callbacks import HeadSwap
from headplug.errors import CheckpointError, SlotError

H, Z = 12, 8
NAMESPACES = {"lightning.pytorch": lightning, "pytorch_lightning": pytorch_lightning}
DATA = torch.utils.data.DataLoader(torch.randn(16, 5), batch_size=8)


def module(pl: Any, late: bool = False) -> Any:
    """A BYOL module of one of the namespaces, its head made in `configure_model` or at once."""

    class BYOL(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(5, H)
            if not late:
                self.make_heads()

        def configure_model(self) -> None:
            if late and not hasattr(self, "projection_head"):
                self.make_heads()

        def make_heads(self) -> None:
            self.projection_head = BYOLProjectionHead(H, 16, Z)
            self.prediction_head = BYOLPredictionHead(Z, 16, Z)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            deactivate_requires_grad(self.projection_head_momentum)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)
            h = self.backbone(batch)
            target = self.projection_head_momentum(h).detach()
            return (self.prediction_head(self.projection_head(h)) - target).square().mean()

        def validation_step(self, batch: torch.Tensor, index: int) -> None:
            self.projection_head(self.backbone(batch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    return BYOL


def trainer(pl: Any, *callbacks: Any, **options: Any) -> Any:
    options = {"max_epochs": 1, "enable_checkpointing": False, **options}
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=list(callbacks), **options,
    )  # fmt: skip


def ae_embedding() -> HeadSwap:
    return HeadSwap("ae_embedding", weights=nn.Linear(H, 6))


@pytest.fixture(params=NAMESPACES)
def pl(request: pytest.FixtureRequest) -> Any:
    return NAMESPACES[request.param]


@pytest.mark.parametrize("late", [False, True])
def test_head_and_twin_are_swapped_and_trained(pl: Any, late: bool) -> None:
    model, swap = module(pl, late)(), ae_embedding()
    trainer(pl, swap).fit(model, DATA)
    head = model.projection_head
    assert isinstance(head, AEEmbeddingHead)
    assert head is swap.swap.head
    assert isinstance(model.projection_head_momentum, AEEmbeddingHead)
    optimised = {id(p) for g in model.optimizers().param_groups for p in g["params"]}
    assert {id(p) for p in head.parameters()} <= optimised
    assert all(p.grad is not None for p in head.parameters())
    assert not {"configure_model", "on_load_checkpoint"} & vars(model).keys()


def test_the_head_is_built_once_and_its_warnings_are_seen(pl: Any) -> None:
    model, swap = module(pl)(), HeadSwap("reweighting", kappa=1e30)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(pl, swap).fit(model, DATA)
    assert len([w for w in caught if "kappa" in str(w.message)]) == 1
    assert not any("optimiser" in str(w.message) for w in caught)
    assert not any("optimiser" in note for note in swap.swap.report.notes)
    assert swap.swap.report.rebuilt == ("prediction_head",)


def test_later_stages_and_other_trainers_keep_the_trained_head(pl: Any) -> None:
    model, swap = module(pl)(), ae_embedding()
    trainer(pl, swap).fit(model, DATA)
    head, weights = model.projection_head, copy.deepcopy(model.projection_head.state_dict())
    trainer(pl, swap).validate(model, DATA, verbose=False)
    again = ae_embedding()
    trainer(pl, again, max_epochs=0).fit(model, DATA)
    assert model.projection_head is head is again.swap.head
    assert all(torch.equal(v, weights[k]) for k, v in head.state_dict().items())


@pytest.mark.parametrize("late", [False, True])
def test_checkpoint_carries_the_head_and_loads_without_the_autoencoder(
    pl: Any, late: bool, tmp_path: Path
) -> None:
    cls = module(pl, late)
    model, path = cls(), tmp_path / "last.ckpt"
    fitted = trainer(pl, ae_embedding())
    fitted.fit(model, DATA)
    fitted.save_checkpoint(path)
    (record,) = torch.load(path, weights_only=True)["headplug"]
    assert record["slot"] == "projection_head"
    assert record["head"]["name"] == "ae_embedding"
    assert record["twin"] == "projection_head_momentum"
    hook = cls.on_load_checkpoint
    loaded = HeadSwap.load_from_checkpoint(cls, path)
    assert cls.on_load_checkpoint is hook
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    x = torch.randn(3, H)
    expected = model.eval().projection_head(x)
    assert torch.equal(loaded.eval().projection_head(x), expected)


def test_another_width_is_rebuilt_when_loaded(pl: Any, tmp_path: Path) -> None:
    cls, path = module(pl), tmp_path / "last.ckpt"
    fitted = trainer(pl, HeadSwap("simclr_plain", output_dim=Z + 2))
    fitted.fit(cls(), DATA)
    fitted.save_checkpoint(path)
    loaded = HeadSwap.load_from_checkpoint(cls, path)
    assert loaded.prediction_head(torch.randn(4, Z + 2)).shape == (4, Z + 2)


def test_a_twin_that_was_named_is_in_the_record(pl: Any, tmp_path: Path) -> None:
    class Unclear(module(pl)):  # type: ignore[misc]
        def make_heads(self) -> None:
            super().make_heads()
            self.projection_head_momentum = BYOLProjectionHead(H, 16, Z)  # trained, it seems

    path = tmp_path / "last.ckpt"

    def swap(twin: str | None) -> HeadSwap:
        return HeadSwap("simclr_plain", slot="projection_head", twin=twin)

    fitted = trainer(pl, swap("projection_head_momentum"))
    fitted.fit(Unclear(), DATA)
    fitted.save_checkpoint(path)
    loaded = HeadSwap.load_from_checkpoint(Unclear, path)
    twin = loaded.projection_head_momentum
    assert type(twin) is type(loaded.projection_head)
    assert not any(p.requires_grad for p in twin.parameters())
    with pytest.raises(CheckpointError, match="EMA twin 'projection_head_momentum', this run has"):
        trainer(pl, swap(None), max_epochs=2).fit(Unclear(), DATA, ckpt_path=path)


def test_two_heads_are_swapped_saved_and_resumed(pl: Any, tmp_path: Path) -> None:
    class Two(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.projection_head_global = BYOLProjectionHead(5, 16, Z)
            self.projection_head_local = BYOLProjectionHead(5, 16, Z)

        def training_step(self, x: torch.Tensor, index: int) -> torch.Tensor:
            return (self.projection_head_global(x) - self.projection_head_local(x)).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def swaps() -> list[HeadSwap]:
        names = {"projection_head_global": "simclr_plain", "projection_head_local": "byol"}
        return [HeadSwap(head, slot=slot, twin=None) for slot, head in names.items()]

    model, path = Two(), tmp_path / "last.ckpt"
    fitted = trainer(pl, *swaps())
    fitted.fit(model, DATA)
    fitted.save_checkpoint(path)
    saved = model.state_dict()
    loaded = HeadSwap.load_from_checkpoint(Two, path).state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[k], saved[k]) for k in saved)
    trainer(pl, *swaps(), max_epochs=2).fit(Two(), DATA, ckpt_path=path)
    with pytest.raises(CheckpointError, match=r"saved with .*_global' and .*_local', this run has"):
        trainer(pl, swaps()[0], max_epochs=2).fit(Two(), DATA, ckpt_path=path)


def test_checkpoint_without_a_record_loads_as_ever(pl: Any, tmp_path: Path) -> None:
    cls, path = module(pl), tmp_path / "last.ckpt"
    fitted = trainer(pl)
    fitted.fit(cls(), DATA)
    fitted.save_checkpoint(path)
    loaded = HeadSwap.load_from_checkpoint(cls, path)
    assert isinstance(loaded.projection_head, BYOLProjectionHead)


def test_resumed_run_equals_an_unbroken_one(pl: Any, tmp_path: Path) -> None:
    cls = module(pl)
    torch.manual_seed(0)
    start = cls().state_dict()

    def run(epochs: int, **fit: Any) -> Any:
        torch.manual_seed(1)
        model = cls()
        model.load_state_dict(start)
        fitted = trainer(pl, HeadSwap("simclr_plain", hidden_dim=6), max_epochs=epochs)
        fitted.fit(model, DATA, **fit)
        fitted.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return model.state_dict()

    run(1)
    resumed = run(2, ckpt_path=tmp_path / "1.ckpt")
    unbroken = run(2)
    assert all(torch.equal(v, unbroken[k]) for k, v in resumed.items())


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ([HeadSwap("simclr_plain", hidden_dim=6)], r"saved with the head .*simclr_plain.*byol"),
        ([], r"saved without HeadSwap, this run has the head .*byol"),
    ],
)
def test_checkpoint_of_another_head_is_refused_in_one_sentence(
    pl: Any, saved: list[HeadSwap], words: str, tmp_path: Path
) -> None:
    cls = module(pl)
    fitted = trainer(pl, *saved)
    fitted.fit(cls(), DATA)
    fitted.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=words) as refused:
        trainer(pl, HeadSwap("byol", hidden_dim=6), max_epochs=2).fit(
            cls(), DATA, ckpt_path=tmp_path / "last.ckpt"
        )
    assert "Missing key" not in str(refused.value)


def test_model_without_a_head_is_refused_when_the_trainer_starts(pl: Any) -> None:
    class Plain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(5, 2)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.net(batch).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(SlotError, match="no known projection heads"):
        trainer(pl, ae_embedding()).fit(Plain(), DATA)


def test_namespace_imported_after_the_callback_works_too(tmp_path: Path) -> None:
    script = f"""
import sys
import lightning.pytorch
from headplug.callbacks import HeadSwap
assert "pytorch_lightning" not in sys.modules
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_swap as t
model = t.module(t.pytorch_lightning)()
t.trainer(t.pytorch_lightning, HeadSwap("simclr_plain")).fit(model, t.DATA)
print(type(model.projection_head).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.stdout.split()[-1:] == ["MLPHead"], done.stderr[-2000:]


def saved_in_training(pl: Any, folder: Path, cls: Any, *callbacks: Any, **options: Any) -> Path:
    keep = pl.callbacks.ModelCheckpoint(folder, save_last=True, **options)
    trainer(pl, keep, *callbacks, enable_checkpointing=True).fit(cls(), DATA)
    return folder / "last.ckpt"


def test_a_checkpoint_of_weights_alone_has_the_record(pl: Any, tmp_path: Path) -> None:
    cls = module(pl)
    swap = HeadSwap("simclr_plain")
    path = saved_in_training(pl, tmp_path, cls, swap, save_weights_only=True)
    state = torch.load(path, weights_only=True)["state_dict"]
    loaded = HeadSwap.load_from_checkpoint(cls, path).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[k], state[k]) for k in state)
    trainer(pl, HeadSwap("simclr_plain")).validate(cls(), DATA, ckpt_path=path, verbose=False)
    after = trainer(pl, HeadSwap("simclr_plain"))
    after.fit(cls(), DATA)
    after.save_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    records = [
        torch.load(p, weights_only=True)["headplug"] for p in (path, tmp_path / "after.ckpt")
    ]
    assert records[0] == records[1]


def test_without_a_record_the_weights_decide(pl: Any, tmp_path: Path) -> None:
    cls, path = module(pl), tmp_path / "last.ckpt"

    class Swapped(cls):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            swap_head(self, "simclr_plain")

    fitted = trainer(pl)
    fitted.fit(Swapped(), DATA)
    fitted.save_checkpoint(path)
    assert "headplug" not in torch.load(path, weights_only=True)
    trainer(pl, HeadSwap("simclr_plain")).validate(cls(), DATA, ckpt_path=path, verbose=False)
    with pytest.raises(CheckpointError, match="no record of it: 'projection_head"):
        HeadSwap.load_from_checkpoint(cls, path)


def test_the_record_is_of_the_head_that_is_there(pl: Any, tmp_path: Path) -> None:
    model, path = module(pl)(), tmp_path / "last.ckpt"
    fitted = trainer(pl, HeadSwap("identity"))
    fitted.fit(model, DATA)
    swap_head(model, "reweighting", optimizer=model.optimizers())
    fitted.save_checkpoint(path)
    loaded = HeadSwap.load_from_checkpoint(module(pl), path)
    assert loaded.projection_head.name == "reweighting"


def test_averages_of_weights_take_the_new_head(pl: Any) -> None:
    cls = module(pl)
    swa = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    late = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    model = cls()
    trainer(pl, HeadSwap("simclr_plain"), swa, max_epochs=3).fit(model, DATA)
    assert type(model.projection_head).__name__ == "MLPHead"
    model = cls()
    with pytest.raises(SlotError, match=r"StochasticWeightAveraging.*Put HeadSwap first"):
        trainer(pl, late, HeadSwap("simclr_plain"), max_epochs=3).fit(model, DATA)
    assert isinstance(model.projection_head, BYOLProjectionHead)
    for average in (pl.callbacks.EMAWeightAveraging, pl.callbacks.WeightAveraging):
        trainer(pl, HeadSwap("simclr_plain"), average()).fit(cls(), DATA)
        with pytest.raises(SlotError, match="Put HeadSwap first"):
            trainer(pl, average(), HeadSwap("simclr_plain")).fit(cls(), DATA)


def test_the_module_can_be_pickled_in_training_and_is_clean_after_an_error(tmp_path: Path) -> None:
    class Boom(lightning.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            torch.save(pl_module, tmp_path / "module.pt")
            copied = copy.deepcopy(pl_module)
            assert copied.on_save_checkpoint.func.__self__ is copied
            raise ValueError("boom")

    model = PICKLED()
    with pytest.raises(ValueError, match="boom"):
        trainer(lightning, HeadSwap("simclr_plain"), Boom()).fit(model, DATA)
    assert not {"configure_model", "on_load_checkpoint"} & vars(model).keys()
    again = torch.load(tmp_path / "module.pt", weights_only=False)
    assert type(again.projection_head) is type(model.projection_head)
    again.on_save_checkpoint({})


PICKLED = module(lightning)
PICKLED.__qualname__ = "PICKLED"


def test_a_head_built_by_hand_is_named_when_it_cannot_be_loaded(pl: Any, tmp_path: Path) -> None:
    built = nn.Sequential(nn.Linear(H, 4), nn.ReLU(), nn.Linear(4, Z))
    path = saved_in_training(pl, tmp_path, module(pl), HeadSwap(built))
    with pytest.raises(CheckpointError, match=r"a Sequential built by hand.*register_head\(\)"):
        HeadSwap.load_from_checkpoint(module(pl), path)


def test_two_callbacks_for_one_head_are_refused(pl: Any) -> None:
    swaps = [HeadSwap("simclr_plain"), HeadSwap("byol")]
    with pytest.raises(SlotError, match="two HeadSwap callbacks swap 'projection_head'"):
        trainer(pl, *swaps).fit(module(pl)(), DATA)
