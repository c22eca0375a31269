from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.preprocessing import StandardScaler
from torch import nn

from headplug.errors import OptionError, RunError
from headplug.probing.mlp import MLPSetting, fit_mlp, mlp_grid

GRID = [
    MLPSetting(1e-3, 0.1, 24),
    MLPSetting(1e-2, 0.0, 8),
    MLPSetting(3e-3, 1.0, 24),
    MLPSetting(1e-3, 0.01, 1),
]


def plain_loop(z, y, loss, start, setting, epochs, batch, seed):
    """Modules, autograd, torch.optim.AdamW and a scheduler: what the joint pass must equal."""
    layers = [nn.Linear(len(w[0]), len(w)) for w in start[::2]]
    for layer, weight, bias in zip(layers, start[::2], start[1::2], strict=True):
        layer.load_state_dict({"weight": weight, "bias": bias})
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    per_epoch = math.ceil(len(z) / batch)
    adamw = torch.optim.AdamW(model.parameters(), setting.lr, weight_decay=setting.weight_decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, epochs * per_epoch)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(z), generator=generator).tensor_split(per_epoch):
            adamw.zero_grad()
            loss(model(z[index]), y[index]).backward()
            adamw.step()
            cosine.step()
    return model


@pytest.mark.parametrize("kind", ["classes", "multilabel", "regression"])
def test_every_setting_equals_a_plain_adamw_loop(blobs, kind):
    x, classes = blobs(300)
    scaler = StandardScaler().fit(x.double().numpy())
    z = torch.from_numpy(scaler.transform(x.double().numpy())).float()
    y, loss = classes, F.cross_entropy
    if kind == "multilabel":
        y, loss = torch.stack([classes == 1, classes > 1], 1), None
        loss = lambda s, t: F.binary_cross_entropy_with_logits(s, t.float())  # noqa: E731
    elif kind == "regression":
        y, loss = torch.stack([100 * x[:, 0] + 7, x[:, 1].sin()], 1), F.mse_loss
    models = fit_mlp(x, y, GRID, epochs=6, batch_size=64, seed=3)
    start = fit_mlp(x, y, [s._replace(lr=1e-30) for s in GRID], max_steps=1, seed=3)
    target = y
    if kind == "regression":
        target = (y - y.mean(0)) / y.std(0, correction=0)
    for i, s in enumerate(GRID):
        assert torch.equal(start.layers[i][0], start.layers[i][0].clamp(-0.25, 0.25))  # 1 / √16
        expected = plain_loop(z, target, loss, start.layers[i], s, 6, 64, 3)
        for ours, theirs in zip(models.layers[i], expected.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.data, atol=2e-4, rtol=2e-3)
        with torch.no_grad():
            scores = expected(z)
        if kind == "classes":
            assert (models.predict(x)[i] == scores.argmax(1)).float().mean() > 0.99
        elif kind == "multilabel":
            torch.testing.assert_close(models.predict(x)[i], scores, atol=1e-2, rtol=1e-2)
        else:
            scores = scores * y.std(0, correction=0) + y.mean(0)
            torch.testing.assert_close(models.predict(x)[i], scores, atol=2.0, rtol=1e-2)


def test_what_no_linear_probe_can_tell_apart_is_learned():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 2, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()
    models = fit_mlp(x[:800], y[:800], mlp_grid(), epochs=60)
    assert (models.predict(x[800:]) == y[800:]).float().mean(1).max() > 0.95


def test_settings_that_overflow_are_named_and_predict_nothing(blobs):
    x, y = blobs(300)
    good, bad = MLPSetting(1e-3), MLPSetting(1e20, 1e20)
    for labels in (y, y.float()):
        with pytest.warns(UserWarning, match=r"overflowed.*lr=1e\+20") as caught:
            models = fit_mlp(x, labels, [bad, good], epochs=5)
        assert caught[0].filename == __file__
        assert models.finite.tolist() == [False, True]
        predicted = models.predict(x)
        assert torch.all(predicted[0] == -1 if labels is y else predicted[0].isnan())
        alone = fit_mlp(x, labels, [good], epochs=5).predict(x)[0]
        torch.testing.assert_close(predicted[1], alone)
    with pytest.raises(RunError, match="lower lr"):
        fit_mlp(x, y, [bad], epochs=5)


def test_bad_options_are_refused(blobs):
    x, y = blobs(50)
    for setting, message in (
        (MLPSetting(0.0), "lr in"),
        (MLPSetting(0.1, -1.0), "weight_decay in"),
        (MLPSetting(0.1, 0.0, 0), "hidden_dim in"),
    ):
        with pytest.raises(OptionError, match=message):
            fit_mlp(x, y, [setting])
    with pytest.raises(OptionError, match="take mlp_grid"):
        fit_mlp(x, y, [])
    with pytest.raises(OptionError, match="epochs must be"):
        fit_mlp(x, y, mlp_grid(), epochs=0)
