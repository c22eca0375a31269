from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from headplug import extract_features
from headplug.errors import DataError, OptionError, RunError, UnknownNameError
from headplug.probing.linear import LinearSetting, LinearTraining, fit_linear
from headplug.probing.live import fit_linear_on

GRID = [LinearSetting(0.05), LinearSetting(0.3, 1e-3, "l2"), LinearSetting(0.01, 0.0, "none")]


class Rows(TensorDataset):
    """Counts the samples that are read."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.read = 0

    def __getitem__(self, index):
        self.read += 1
        return super().__getitem__(index)


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 12)
    return nn.Sequential(*layers).train()


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (40,), generator=generator)
    return torch.randn(40, 3, 8, 8, generator=generator) + y[:, None, None, None], y


@pytest.mark.parametrize("kind", ["classes", "multilabel", "regression"])
def test_live_probes_are_those_of_stored_features(model, data, kind):
    """The order of `fit_linear`'s one epoch, given to the loader."""
    x, y = data
    labels = {
        "classes": y,
        "multilabel": torch.stack([y == 0, y > 0], 1),
        "regression": y.float()[:, None] * torch.tensor([[1.0, 2.0]]),
    }[kind]
    training = LinearTraining(epochs=1, batch_size=8, init="normal")
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    live = fit_linear_on(
        model,
        DataLoader(TensorDataset(x[order], labels[order]), 8),
        ["0", "4"],
        GRID,
        training=training,
        seed=5,
    )
    assert list(live) == ["0", "4"]
    store = extract_features(model, DataLoader(TensorDataset(x, labels), 8), ["0", "4"])
    for tap, models in live.items():
        stored = fit_linear(store[tap], labels, GRID, training=training, seed=5)
        torch.testing.assert_close(models.weight, stored.weight, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(models.predict(store[tap]), stored.predict(store[tap]))


def test_the_data_are_read_once_an_epoch_and_once_more_only_to_standardise(model, data):
    rows = Rows(*data)
    loader = DataLoader(rows, 10, shuffle=True)
    training = LinearTraining(epochs=3)
    for settings, options, passes in (
        (GRID, {}, 4),
        (GRID[1:], {"num_classes": 3}, 3),
        (GRID[1:], {}, 4),
    ):
        rows.read = 0
        fit_linear_on(model, loader, "4", settings, training=training, **options)
        assert rows.read == 40 * passes + 10  # one batch shows the width of the taps
    rows.read = 0
    fit_linear_on(model, loader, "4", GRID[1:], training=LinearTraining(max_steps=2), num_classes=3)
    assert rows.read <= 10 + 30


def test_the_model_and_the_random_state_are_left_as_they_were(model, data):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model[1].eval()
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    loader = DataLoader(TensorDataset(*data), 10, shuffle=True)
    fit_linear_on(model, loader, "0", GRID, training=LinearTraining(epochs=1))
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_cannot_be_trained_on_is_refused_with_the_name_of_the_tap(model, data):
    loader = DataLoader(TensorDataset(*data), 10)
    short = {"training": LinearTraining(epochs=1)}
    with pytest.raises(OptionError, match="no length; give a DataLoader"):
        fit_linear_on(model, (batch for batch in loader), "4", GRID)
    with pytest.raises(DataError, match="only once; give a DataLoader"):
        fit_linear_on(model, iter(loader), "4", GRID)
    with pytest.raises(OptionError, match="store them with extract_features"):
        fit_linear_on(model, loader, "4", GRID, training=LinearTraining(keep_best=True))
    with pytest.raises(DataError, match="no labels"):
        fit_linear_on(model, [data[0]], "4", GRID)
    with pytest.raises(DataError, match="loader is empty"):
        fit_linear_on(model, [], "4", GRID)
    with pytest.raises(DataError, match=r"tap '0' gives \(10, 6, 6, 6\) .*pool="):
        fit_linear_on(model, loader, "0", GRID, pool=None)
    with pytest.raises(UnknownNameError, match="'9'"):
        fit_linear_on(model, loader, "9", GRID)
    with pytest.raises(RunError, match="tap '4': the weights overflowed"):
        fit_linear_on(model, loader, "4", [LinearSetting(1e30, 1e30)], **short)
    with pytest.warns(UserWarning, match=r"tap '4': left out.*lr=1e\+30"):
        fit_linear_on(model, loader, "4", [LinearSetting(1e30, 1e30), GRID[0]], **short)
    broken = [(data[0].clone().fill_(torch.nan), data[1])]
    with pytest.raises(DataError, match="tap '4': 40 of 40 samples hold NaN"):
        fit_linear_on(model, broken, "4", GRID)
