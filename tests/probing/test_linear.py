from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from headplug.errors import DimensionError, OptionError, RunError
from headplug.probing.linear import LinearSetting, LinearTraining, fit_linear, linear_grid

LOSS = {
    "classes": F.cross_entropy,
    "multilabel": lambda s, y: F.binary_cross_entropy_with_logits(s, y.float()),
    "regression": F.mse_loss,
}


def seen(x, how):
    if how == "standard":
        return torch.from_numpy(StandardScaler().fit_transform(x.double().numpy())).float()
    return x / x.norm(dim=1, keepdim=True) if how == "l2" else x


def scheduler(sgd, training, per_epoch):
    schedules = torch.optim.lr_scheduler
    if training.schedule == "plateau":
        return schedules.ReduceLROnPlateau(sgd, factor=training.factor, patience=training.patience)
    if training.schedule == "steps":
        return schedules.MultiStepLR(sgd, training.milestones, training.factor)
    if training.schedule == "constant":
        return schedules.ConstantLR(sgd, 1.0)
    per = per_epoch if training.schedule == "cosine" else 1
    return schedules.CosineAnnealingLR(sgd, training.epochs * per)


def plain_loop(x, y, kind, start, setting, training, seed, validation=None):
    """nn.Linear, autograd, torch.optim.SGD and torch's schedulers: what the joint pass equals."""
    model = nn.Linear(x.shape[1], len(start.bias[0]))
    model.load_state_dict({"weight": start.weight[0], "bias": start.bias[0]})
    z = seen(x, setting.normalize)
    per_epoch = math.ceil(len(x) / training.batch_size)
    sgd = torch.optim.SGD(
        model.parameters(),
        setting.lr,
        momentum=training.momentum,
        nesterov=training.nesterov,
        weight_decay=setting.weight_decay,
    )
    schedule = scheduler(sgd, training, per_epoch)
    generator = torch.Generator().manual_seed(seed)
    best = (math.inf, None)
    for _ in range(training.epochs):
        total = 0.0
        for index in torch.randperm(len(x), generator=generator).tensor_split(per_epoch):
            sgd.zero_grad()
            loss = LOSS[kind](model(z[index]), y[index])
            loss.backward()
            sgd.step()
            total += loss.item() * len(index) / len(x)
            if training.schedule == "cosine":
                schedule.step()
        if training.schedule == "plateau":
            schedule.step(total)
        elif training.schedule != "cosine":
            schedule.step()
        if validation is not None:
            with torch.no_grad():
                loss = LOSS[kind](model(validation[0]), validation[1]).item()
            if loss < best[0]:
                best = (loss, copy.deepcopy(model))
    return best[1] or model


SMALL = {"epochs": 12, "batch_size": 64}
TRAININGS = {
    "ours": LinearTraining(**SMALL),
    "simclr": LinearTraining(**SMALL, nesterov=True),
    "solo": LinearTraining(**SMALL, schedule="steps", milestones=(6, 9), init="linear"),
    "moco": LinearTraining(**SMALL, schedule="steps", milestones=(6, 9), init="normal"),
    "dino": LinearTraining(**SMALL, schedule="cosine_epoch", init="normal"),
    "ae": LinearTraining(
        **SMALL, momentum=0.0, schedule="plateau", patience=0, init="linear", keep_best=True
    ),
    "constant": LinearTraining(**SMALL, schedule="constant"),
}
GRID = [
    LinearSetting(0.01),
    LinearSetting(3.0, 0.0, "l2"),
    LinearSetting(0.2, 1e-2),
    LinearSetting(0.003, 1e-3, "none"),
    LinearSetting(0.5, 1e-3),
    LinearSetting(2.0),
]


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("kind", LOSS)
def test_every_setting_of_the_joint_pass_equals_a_plain_sgd_loop(blobs, name, kind):
    x, classes = blobs(300)
    classes = classes.flip(0)  # nothing to learn: the loss cannot fall for ever
    y = {
        "classes": classes,
        "multilabel": torch.stack([classes == 1, classes > 1, x[:, 0] > 2], 1),
        "regression": torch.stack([x[:, 0] - x[:, 3], x[:, 1].sin()], 1),
    }[kind]
    grid = [s._replace(lr=s.lr / 20) for s in GRID] if kind == "regression" else GRID
    training = TRAININGS[name]
    held = (x[:80] + 1, y[:80]) if training.keep_best else None
    models = fit_linear(x, y, grid, training=training, validation=held, seed=3)
    unmoved = LinearTraining(max_steps=1, init=training.init, momentum=0.0)
    start = fit_linear(x, y, [LinearSetting(1e-30)], training=unmoved, seed=3)
    scaler = StandardScaler().fit(x.double().numpy())
    for i, s in enumerate(grid):
        if held:
            z = torch.from_numpy(scaler.transform(held[0].double().numpy())).float()
            validation = (z if s.normalize == "standard" else seen(held[0], s.normalize), held[1])
        else:
            validation = None
        expected = plain_loop(x, y, kind, start, s, training, 3, validation)
        torch.testing.assert_close(models.weight[i], expected.weight.data, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(models.bias[i], expected.bias.data, atol=1e-4, rtol=1e-3)


def test_rates_fall_on_a_plateau_and_the_best_epoch_is_not_the_last(blobs):
    """What the comparison above would not notice: that neither ever happened."""
    (x, y), held = blobs(300), blobs(80, seed=1)
    y, grid = y.flip(0), [LinearSetting(2.0)]
    weights = [
        fit_linear(x, y, grid, training=t, validation=held if t.keep_best else None).weight
        for t in (
            LinearTraining(**SMALL, momentum=0.0, schedule="constant", init="linear"),
            LinearTraining(**SMALL, momentum=0.0, schedule="plateau", patience=0, init="linear"),
            TRAININGS["ae"],
        )
    ]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_the_start_is_that_of_the_named_layer():
    x, y = torch.randn(8, 400), torch.arange(8)
    unmoved = {"max_steps": 1, "momentum": 0.0}
    still = [LinearSetting(1e-30), LinearSetting(1e-30)]
    at = {
        init: fit_linear(x, y, still, training=LinearTraining(**unmoved, init=init))
        for init in ("zeros", "normal", "linear")
    }
    assert at["zeros"].weight.abs().max() < 1e-25
    assert at["normal"].weight.std() == pytest.approx(0.01, rel=0.05)
    assert at["normal"].bias.abs().max() < 1e-25
    for t in (at["linear"].weight, at["linear"].bias):
        assert 0.5 / 20 < t.abs().max() <= 1 / 20  # 1 / sqrt(400)
        assert torch.equal(t[0], t[1])


def test_a_setting_alone_gives_the_same_classes_as_in_the_grid(blobs):
    x, y = blobs(500)
    queries, _ = blobs(400, seed=1)
    grid = linear_grid(normalize=("standard", "l2", "none"))
    training = LinearTraining(epochs=20)
    together = fit_linear(x, y, grid, training=training).predict(queries)
    for i in (0, 7, 17, 20, 53):
        alone = fit_linear(x, y, [grid[i]], training=training).predict(queries)[0]
        assert (alone == together[i]).float().mean() > 0.995


def test_best_setting_is_no_worse_than_logistic_regression(blobs):
    (x, y), (queries, answers) = blobs(1500), blobs(2000, seed=1)
    got = (fit_linear(x, y, linear_grid()).predict(queries) == answers).double().mean(dim=1).max()
    scaler = StandardScaler().fit(x.numpy())
    oracle = LogisticRegression(C=1.0, max_iter=500).fit(scaler.transform(x.numpy()), y.numpy())
    expected = oracle.score(scaler.transform(queries.numpy()), answers.numpy())
    assert float(got) > expected - 0.005


def test_accuracy_is_that_of_lightlys_linear_classifier(blobs):
    """Lightly's classifier trained alone by its Trainer, on the same stored features."""
    from lightly.utils.benchmarking import LinearClassifier
    from pytorch_lightning import Trainer
    from torch.utils.data import DataLoader, TensorDataset

    (x, y), (queries, answers) = blobs(1500), blobs(4000, seed=1)
    lr, batch, epochs = 0.1, 256, 30
    torch.manual_seed(0)
    peer = LinearClassifier(nn.Identity(), batch, lr, feature_dim=16, num_classes=4, topk=(1,))
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(max_epochs=epochs, accelerator="cpu", **dict.fromkeys(quiet, False))
        trainer.fit(peer, DataLoader(TensorDataset(x, y), batch, shuffle=True))
    with torch.no_grad():
        expected = (peer(queries).argmax(1) == answers).double().mean()
    training = LinearTraining(epochs=epochs, batch_size=batch, init="linear")
    ours = fit_linear(x, y, [LinearSetting(lr * batch / 256, 0, "none")], training=training)
    got = (ours.predict(queries)[0] == answers).double().mean()
    assert expected > 0.5  # of four classes
    assert abs(float(got - expected)) < 0.005


def test_settings_that_overflow_are_named_predict_nothing_and_disturb_no_other(blobs):
    x, y = blobs(300)
    good, bad = LinearSetting(0.1), LinearSetting(1e3, 1e3)
    training = LinearTraining(epochs=20)
    for labels, nothing in ((y, -1), (torch.stack([y > 1, y < 2], 1), math.nan)):
        with pytest.warns(UserWarning, match=r"overflowed.*lr=1000") as caught:
            models = fit_linear(x, labels, [bad, good], training=training)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert models.finite.tolist() == [False, True]
        predicted = models.predict(x)
        assert torch.all(predicted[0].isnan() if math.isnan(nothing) else predicted[0] == nothing)
        alone = fit_linear(x, labels, [good], training=training).predict(x)[0]
        torch.testing.assert_close(predicted[1], alone)
    with pytest.raises(RunError, match="lower lr"):
        fit_linear(x, y, [bad], training=training)
    best = LinearTraining(epochs=3, batch_size=64, keep_best=True)
    with pytest.warns(UserWarning, match=r"overflowed.*lr=1e\+30"):
        models = fit_linear(x, y, [bad._replace(lr=1e30), good], training=best, validation=(x, y))
    assert models.finite.tolist() == [False, True]


def test_weights_hold_no_denormals_after_saturation(blobs):
    x, y = blobs(400)
    for labels in (y, torch.stack([y > 1, y < 2], 1)):
        training = LinearTraining(epochs=200, batch_size=64)
        weight = fit_linear(x, labels, [LinearSetting(30.0)], training=training).weight
        assert not ((weight != 0) & (weight.abs() < torch.finfo(torch.float32).tiny)).any()


def test_steps_are_bounded_and_the_seed_decides(blobs):
    x, y = blobs(400)
    grid = [LinearSetting(0.1)]
    bounded = LinearTraining(batch_size=100, max_steps=8)
    one = fit_linear(x, y, grid, training=bounded)
    same = fit_linear(x, y, grid, training=LinearTraining(batch_size=100, epochs=2))
    other = fit_linear(x, y, grid, training=bounded, seed=1)
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be a positive integer"),
        ({"max_steps": 0}, "max_steps must be a positive integer"),
        ({"momentum": 1.0}, "momentum must be a number in"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov needs a momentum"),
        ({"schedule": "linear"}, "schedule is one of cosine, cosine_epoch"),
        ({"schedule": "steps"}, "milestones=\\(60, 80\\)"),
        ({"milestones": (60, 80)}, 'schedule="steps"'),
        ({"factor": 0.0}, "factor must be a positive number"),
        ({"init": "xavier"}, "init is one of zeros, normal, linear"),
    ],
)
def test_bad_trainings_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        LinearTraining(**options)


def test_bad_settings_widths_and_validations_are_refused(blobs):
    x, y = blobs(50)
    for setting in (
        LinearSetting(0.0),
        LinearSetting(math.nan),
        LinearSetting(0.1, math.inf),
        LinearSetting(0.1, -1e-3),
    ):
        with pytest.raises(OptionError, match=r"lr=.*must be"):
            fit_linear(x, y, [setting])
    with pytest.raises(OptionError, match='normalize is "standard", "l2" or "none", not \'bn\''):
        fit_linear(x, y, [LinearSetting(0.1, 0.0, "bn")])
    with pytest.raises(OptionError, match="no settings; take linear_grid"):
        fit_linear(x, y, [])
    grid, best = [LinearSetting(0.1)], LinearTraining(epochs=1, keep_best=True)
    with pytest.raises(DimensionError, match="fitted on 16 features a sample and is given 3"):
        fit_linear(x, y, grid, training=LinearTraining(epochs=1)).predict(x[:, :3])
    for options in ({"training": best}, {"validation": (x, y)}):
        with pytest.raises(OptionError, match="go together"):
            fit_linear(x, y, grid, **options)
    with pytest.raises(DimensionError, match="3 values a sample and the training features 16"):
        fit_linear(x, y, grid, training=best, validation=(x[:, :3], y))
    with pytest.raises(OptionError, match="validation labels regression"):
        fit_linear(x, y, grid, training=best, validation=(x, y.float()))
