from __future__ import annotations

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from headplug.errors import DimensionError, OptionError, RunError
from headplug.probing import LinearSetting, fit_linear, linear_grid


def plain_loop(x, y, classes, setting, epochs, batch_size, seed):
    """nn.Linear, autograd, torch.optim.SGD and a scheduler: what the joint pass must equal."""
    model = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    x = torch.from_numpy(StandardScaler().fit_transform(x.double().numpy())).float()
    per_epoch = math.ceil(len(x) / batch_size)
    sgd = torch.optim.SGD(
        model.parameters(), setting.lr, momentum=0.9, weight_decay=setting.weight_decay
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, epochs * per_epoch)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator).tensor_split(per_epoch):
            sgd.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            sgd.step()
            cosine.step()
    return model


def test_every_setting_of_the_joint_pass_equals_a_plain_sgd_loop(blobs):
    x, y = blobs(700)
    grid = [LinearSetting(0.01), LinearSetting(0.1, 1e-2), LinearSetting(0.5, 1e-3)]
    models = fit_linear(x, y, grid, epochs=5, batch_size=128, seed=3)
    for i, s in enumerate(grid):
        expected = plain_loop(x, y, 4, s, epochs=5, batch_size=128, seed=3)
        torch.testing.assert_close(
            models.weight[:, :, i].T, expected.weight.data, atol=2e-5, rtol=1e-4
        )
        torch.testing.assert_close(models.bias[:, i], expected.bias.data, atol=2e-5, rtol=1e-4)


def test_a_setting_alone_gives_the_same_classes_as_in_the_grid(blobs):
    x, y = blobs(500)
    queries, _ = blobs(400, seed=1)
    together = fit_linear(x, y, linear_grid(), epochs=20).predict(queries)
    for i in (0, 7, 17):
        alone = fit_linear(x, y, [linear_grid()[i]], epochs=20).predict(queries)[0]
        assert (alone == together[i]).float().mean() > 0.995


def test_best_setting_is_no_worse_than_logistic_regression(blobs):
    (x, y), (queries, answers) = blobs(1500), blobs(2000, seed=1)
    got = (fit_linear(x, y, linear_grid()).predict(queries) == answers).double().mean(dim=1).max()
    scaler = StandardScaler().fit(x.numpy())
    oracle = LogisticRegression(C=1.0, max_iter=500).fit(scaler.transform(x.numpy()), y.numpy())
    expected = oracle.score(scaler.transform(queries.numpy()), answers.numpy())
    assert float(got) > expected - 0.005


def test_accuracy_is_that_of_lightlys_linear_classifier(blobs):
    """Lightly's module and optimiser on standardised features; its Trainer loop written out."""
    from lightly.utils.benchmarking import LinearClassifier
    from lightly.utils.scheduler import CosineWarmupScheduler

    (x, y), (queries, answers) = blobs(1500), blobs(2000, seed=1)
    scaler = StandardScaler().fit(x.numpy())
    x_std, q_std = (torch.from_numpy(scaler.transform(t.numpy())).float() for t in (x, queries))
    lr, batch, epochs = 0.1, 256, 30
    torch.manual_seed(0)
    model = LinearClassifier(nn.Identity(), batch, lr, feature_dim=16, num_classes=4, topk=(1,))
    sgd = torch.optim.SGD(model.get_trainable_parameters(), lr * batch / 256, momentum=0.9)
    steps = epochs * math.ceil(len(x) / batch)
    schedule = CosineWarmupScheduler(sgd, warmup_epochs=0, max_epochs=steps)
    for _ in range(epochs):
        for index in torch.randperm(len(x_std)).split(batch):
            sgd.zero_grad()
            model.shared_step((x_std[index], y[index]), 0)[0].backward()
            sgd.step()
            schedule.step()
    expected = (model(q_std).argmax(1) == answers).double().mean()
    ours = fit_linear(x, y, [LinearSetting(lr)], batch_size=batch, epochs=epochs)
    got = (ours.predict(queries)[0] == answers).double().mean()
    assert abs(float(got - expected)) < 0.005


def test_settings_that_overflow_are_named_predict_nothing_and_disturb_no_other(blobs):
    x, y = blobs(300)
    good, bad = LinearSetting(0.1), LinearSetting(1e3, 1e3)
    with pytest.warns(UserWarning, match=r"overflowed.*lr=1000"):
        models = fit_linear(x, y, [bad, good], epochs=20)
    assert models.finite.tolist() == [False, True]
    predicted = models.predict(x)
    assert (predicted[0] == -1).all()
    assert torch.equal(predicted[1], fit_linear(x, y, [good], epochs=20).predict(x)[0])
    with pytest.raises(RunError, match="lower lr"):
        fit_linear(x, y, [bad], epochs=20)


def test_weights_hold_no_denormals_after_saturation(blobs):
    x, y = blobs(400)
    weight = fit_linear(x, y, [LinearSetting(30.0)], epochs=200, batch_size=64).weight
    assert not ((weight != 0) & (weight.abs() < torch.finfo(torch.float32).tiny)).any()


def test_constant_features_get_no_weight_and_no_nan(blobs):
    x, y = blobs(300)
    constant = torch.full((300, 1), 0.1)
    models = fit_linear(torch.cat([x, constant], 1), y, [LinearSetting(0.1)], epochs=5)
    assert models.finite.all()
    assert models.weight[-1].abs().max() < 1e-5


def test_steps_are_bounded_and_the_seed_decides(blobs):
    x, y = blobs(400)
    grid = [LinearSetting(0.1)]
    one = fit_linear(x, y, grid, batch_size=100, max_steps=8)
    same = fit_linear(x, y, grid, batch_size=100, epochs=2)
    other = fit_linear(x, y, grid, batch_size=100, max_steps=8, seed=1)
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)


def test_bad_settings_and_widths_are_refused(blobs):
    x, y = blobs(50)
    for setting in (LinearSetting(0.0), LinearSetting(math.nan), LinearSetting(0.1, math.inf)):
        with pytest.raises(OptionError, match="lr"):
            fit_linear(x, y, [setting])
    with pytest.raises(DimensionError, match="fitted on 16 features a sample and is given 3"):
        fit_linear(x, y, [LinearSetting(0.1)], epochs=1).predict(x[:, :3])
