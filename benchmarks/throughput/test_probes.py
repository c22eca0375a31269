"""Probes on made-up features: 8,000 train and 2,000 test rows of 512 features, 10 classes.

The classes overlap (the best accuracy is about 0.75) and the features are correlated.
"""

import statistics
import subprocess
import sys
import time
import warnings

import pytest
import torch
from measure import graphed, rotated

from headplug.probing.data import Targets
from headplug.probing.linear import (
    Joint,
    LinearSetting,
    LinearTraining,
    fit_linear,
    linear_grid,
)
from headplug.probing.logistic import fit_logistic, logistic_grid
from headplug.probing.mlp import MLPSetting, fit_mlp, mlp_grid
from headplug.probing.ridge import fit_ridge, ridge_grid

CLASSES, DIM, TRAIN, TEST = 10, 512, 8000, 2000
EPOCHS, BATCH, LR = 10, 256, 0.1


def made(count, dim, seed):
    """Overlapping classes; features are correlated and of unequal scale."""
    fixed = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, dim, generator=fixed)
    mix = torch.randn(dim, dim, generator=fixed) / dim**0.5
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=generator)
    X = centres[y] + 9 * torch.randn(count, dim, generator=generator)
    return X @ mix * torch.linspace(0.1, 1, dim), y


@pytest.fixture(scope="module")
def data(device):
    X, y = made(TRAIN, DIM, 1)
    Q, targets = made(TEST, DIM, 2)
    mean, std = X.mean(0), X.std(0)
    found = (X - mean) / std, y, (Q - mean) / std, targets
    return [t.to(device) for t in found]


@pytest.fixture
def lightly(data):
    """Trains lightly's classifier with its own Trainer on the stored features of one tap."""
    from lightly.utils.benchmarking import LinearClassifier
    from pytorch_lightning import Trainer
    from torch.utils.data import DataLoader, TensorDataset

    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")

    def train(X, y):
        peer = LinearClassifier(
            torch.nn.Identity(), BATCH, LR, feature_dim=X.shape[1], num_classes=CLASSES, topk=(1,)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = Trainer(
                max_epochs=EPOCHS, accelerator=X.device.type, devices=1,
                **dict.fromkeys(quiet, False),
            )  # fmt: skip
            stored = TensorDataset(X.cpu(), y.cpu())  # a loader takes samples one by one
            trainer.fit(peer, DataLoader(stored, BATCH, shuffle=True))
        return peer.requires_grad_(False).to(X.device)

    return train


@pytest.mark.parametrize("lrs", [(LR,), tuple(LR * 3.0**i for i in range(-5, 3))], ids=len)
def test_linear_probes_of_six_taps_against_lightlys_classifier_with_one_rate(
    data, lightly, against, benchmark, lrs
):
    """4,000 rows; the taps are as wide as the stages of a ResNet-18 and its projection."""
    y, targets = data[1][:4000], data[3]
    widths = (64, 64, 128, 256, 512, 128)
    taps = [(data[0][:4000, -w:].contiguous(), data[2][:, -w:].contiguous()) for w in widths]
    settings = [LinearSetting(lr, 0.0, "none") for lr in lrs]
    training = LinearTraining(epochs=EPOCHS, batch_size=BATCH, init="linear")

    def joint():
        return [fit_linear(X, y, settings, training=training) for X, _ in taps]

    def peer():
        return [lightly(X, y) for X, _ in taps]

    fits = zip(joint(), peer(), taps, strict=True)
    hits = torch.tensor(
        [
            [(ours.predict(Q)[lrs.index(LR)] == targets).sum(), (one(Q).argmax(1) == targets).sum()]
            for ours, one, (_, Q) in fits
        ]
    )
    mean = (hits.double() / len(targets)).mean(0).tolist()
    benchmark.extra_info.update(accuracy=mean[0], peer_accuracy=mean[1])
    against(joint, peer, rounds=5)


@pytest.mark.guard
def test_18_linear_probes_against_a_loop_for_one(data, against):
    """In plain torch; lightly's own loop costs several times as much."""
    X, y = data[0][:4000, :256].contiguous(), data[1][:4000]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(X), generator=generator).to(X.device).split(BATCH)

    def loop():
        layer = torch.nn.Linear(X.shape[1], CLASSES, device=X.device)
        optimizer = torch.optim.SGD(layer.parameters(), LR, momentum=0.9)
        for rows in order * EPOCHS:
            loss = torch.nn.functional.cross_entropy(layer(X[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    training = LinearTraining(epochs=EPOCHS, batch_size=BATCH)
    assert against(lambda: fit_linear(X, y, linear_grid(), training=training), loop, rounds=7) < 2.5


def test_linear_step_as_cuda_graph(data, against, cuda):
    """Of 18 settings, against the same step without one; in the package none is captured."""
    X, y = data[0], data[1]
    targets = Targets("classes", y, CLASSES)
    training = LinearTraining(epochs=EPOCHS, batch_size=BATCH)
    moments = X.double().mean(0), X.double().std(0)
    joint = Joint(linear_grid(), training, targets, *moments, len(X) // BATCH, 1000, 0)
    batches = rotated(lambda: torch.randint(len(X), (BATCH,), device=X.device))
    rows, values = X[:BATCH].clone(), y[:BATCH].clone()

    def gather():
        index = next(batches)
        torch.index_select(X, 0, index, out=rows)
        torch.index_select(y, 0, index, out=values)

    def step():
        joint.sgd["standard"].descend(rows, values)

    with torch.no_grad():
        replay = graphed(step)
        against(lambda: (gather(), replay()), lambda: (gather(), step()), dtype=None)


@pytest.mark.guard
def test_ridge_path_with_its_choice_against_scikit_learn(data, against, benchmark, cpu):
    from sklearn.linear_model import RidgeClassifierCV

    X, y, Q, targets = data
    alphas = [s.penalty * len(X) for s in ridge_grid()]

    def ours():
        models = fit_ridge(X, y, ridge_grid())
        return models, int((models.left_out == y).float().mean(1).argmax())

    def peer():
        return RidgeClassifierCV(alphas).fit(X.numpy(), y.numpy())

    models, chosen = ours()
    benchmark.extra_info["accuracy"] = float((models.predict(Q)[chosen] == targets).float().mean())
    benchmark.extra_info["peer_accuracy"] = float(peer().score(Q.numpy(), targets.numpy()))
    assert against(ours, peer, rounds=7, dtype=None) < 0.2


def test_logistic_path_against_scikit_learn_refitted_for_each_penalty(
    data, against, benchmark, cpu
):
    from sklearn.linear_model import LogisticRegression

    X, y, Q, targets = data[0][:4000], data[1][:4000], *data[2:]
    X, Q, grid = X[:, ::2], Q[:, ::2], logistic_grid()
    X = ((X - X.mean(0)) / X.std(0, correction=0)).contiguous()

    def ours():
        return fit_logistic(X, y, grid)

    def peer():
        fits = [LogisticRegression(C=1 / (s.penalty * len(X)), max_iter=1000) for s in grid]
        return [fit.fit(X.numpy(), y.numpy()) for fit in fits]

    models, fits = ours(), peer()
    accuracies = (models.predict(Q) == targets).float().mean(1)

    def objective(weight, bias, penalty):
        scores = X.double() @ weight.double().T + bias.double()
        loss = torch.nn.functional.cross_entropy(scores, y)
        return float(loss + penalty / 2 * weight.double().square().sum())

    above = [
        objective(torch.tensor(f.coef_), torch.tensor(f.intercept_), s.penalty)
        - objective(models.weight[i], models.bias[i], s.penalty)
        for i, (f, s) in enumerate(zip(fits, grid, strict=True))
    ]
    benchmark.extra_info["accuracy"] = float(accuracies.max())
    benchmark.extra_info["peer_accuracy"] = max(f.score(Q.numpy(), targets.numpy()) for f in fits)
    benchmark.extra_info["largest_gap"] = float(models.gap.max())
    benchmark.extra_info["peer_objective_above_ours"] = max(above)
    against(ours, peer, rounds=5, dtype=None)


def test_mlp_grid_against_a_loop_for_one_setting(data, against, benchmark):
    X, y, Q, targets = data
    epochs = 2

    def loop():
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(DIM, 256), torch.nn.ReLU(), torch.nn.Linear(256, CLASSES)
        ).to(X.device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
        steps = epochs * -(-len(X) // BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(X), device=X.device).split(BATCH):
                loss = torch.nn.functional.cross_entropy(model(X[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        return model

    def ours():
        return fit_mlp(X, y, mlp_grid(), epochs=epochs)

    one = fit_mlp(X, y, [MLPSetting(1e-3)], epochs=epochs).predict(Q)[0]
    benchmark.extra_info["accuracy"] = float((one == targets).float().mean())
    peer = loop()(Q).argmax(1)
    benchmark.extra_info["peer_accuracy"] = float((peer == targets).float().mean())
    benchmark.extra_info["settings"] = len(mlp_grid())
    against(ours, loop, rounds=5, dtype=None)


MEMORY = """
import ctypes
import torch
torch.set_num_threads(1)
X, y = torch.randn(40000, 256), torch.randint(10, (40000,))
{imports}

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

fit(X, y)  # what the libraries load on first use is not the fit's
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
before = peak()
fit(X, y)
print(peak() - before)
"""
SIDES = {
    "linear": (
        "from headplug.probing.linear import *\n"
        "fit = lambda X, y: fit_linear(X, y, linear_grid(), training=LinearTraining(epochs=1))",
        "from sklearn.linear_model import LogisticRegression as Peer\n"
        "fit = lambda X, y: Peer(max_iter=5).fit(X.numpy(), y.numpy())",
    ),
    "ridge": (
        "from headplug.probing.ridge import *\nfit = lambda X, y: fit_ridge(X, y, ridge_grid())",
        "from sklearn.linear_model import RidgeClassifierCV as Peer\n"
        "fit = lambda X, y: Peer([1, 10, 100]).fit(X.numpy(), y.numpy())",
    ),
    "logistic": (
        "from headplug.probing.logistic import *\n"
        "fit = lambda X, y: fit_logistic(X, y, [LogisticSetting(1e-2)])",
        "from sklearn.linear_model import LogisticRegression as Peer\n"
        "fit = lambda X, y: Peer(max_iter=5).fit(X.numpy(), y.numpy())",
    ),
}


@pytest.mark.parametrize("probe", SIDES)
def test_memory_of_a_fit_against_scikit_learn(benchmark, probe, cpu):
    """Of 40,000 samples of 256 features: what the peak of the process rises by, in MiB (Linux)."""

    def used(imports):
        code = MEMORY.format(imports=imports)
        found = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
        )
        return int(found.stdout) / 1024

    ours, peer = (used(side) for side in SIDES[probe])
    benchmark.extra_info.update(mib=ours, peer_mib=peer)
    benchmark.pedantic(lambda: None)


FITS = {
    "linear": lambda X, y: fit_linear(
        X, y, [LinearSetting(LR)], training=LinearTraining(epochs=2, max_steps=None)
    ),
    "ridge": lambda X, y: fit_ridge(X, y, ridge_grid()),
    "logistic": lambda X, y: fit_logistic(X, y, logistic_grid()[3:]),
}


@pytest.mark.parametrize("probe", FITS)
def test_growth_from_5000_to_80000_samples(benchmark, one_thread, probe, cpu):
    """16 is linear."""
    X, y = made(80000, 128, 3)
    spent = {}
    for count in (5000, 80000):
        times = []
        for _ in range(3):
            started = time.process_time()
            FITS[probe](X[:count], y[:count])
            times.append(time.process_time() - started)
        spent[count] = statistics.median(times)
    benchmark.extra_info["growth"] = spent[80000] / spent[5000]
    benchmark.pedantic(lambda: None)
