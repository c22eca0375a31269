"""Probes on made-up features: 4,000 train and 1,000 test rows of 256 features, 10 classes."""

import pytest
import torch

from headplug.probing import (
    KNNSetting,
    fit_linear,
    fit_ridge,
    knn_grid,
    knn_predict,
    linear_grid,
    ridge_grid,
)

CLASSES = 10


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, 256, generator=generator)
    y = torch.randint(CLASSES, (5000,), generator=generator)
    X = centres[y] + 4 * torch.randn(5000, 256, generator=generator)
    return X[:4000], y[:4000], X[4000:], y[4000:]


def test_knn_grid_against_lightlys_single_setting(data, against):
    from lightly.utils.benchmarking.knn import knn_predict as peer

    X, y, Q, _ = data
    bank, queries = (torch.nn.functional.normalize(t, dim=1) for t in (X, Q))
    grid = [s for s in knn_grid() if s.distance == "cosine"]
    against(
        lambda: knn_predict(X, y, Q, grid, num_classes=CLASSES),
        lambda: peer(queries, bank.T, y, CLASSES, knn_k=200, knn_t=0.1),
    )


def test_knn_single_setting_against_lightly(data, against):
    from lightly.utils.benchmarking.knn import knn_predict as peer

    X, y, Q, _ = data
    bank, queries = (torch.nn.functional.normalize(t, dim=1) for t in (X, Q))
    setting = KNNSetting(200, "cosine", 0.1)
    against(
        lambda: knn_predict(X, y, Q, [setting], num_classes=CLASSES),
        lambda: peer(queries, bank.T, y, CLASSES, knn_k=200, knn_t=0.1),
    )


def test_joint_linear_probe_against_a_loop_for_one_setting(data, against, benchmark):
    X, y, Q, targets = data

    def loop():
        torch.manual_seed(0)
        layer = torch.nn.Linear(256, CLASSES)
        optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
        for _ in range(10):
            for rows in torch.randperm(len(X)).split(512):
                loss = torch.nn.functional.cross_entropy(layer(X[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return layer

    def joint():
        return fit_linear(X, y, linear_grid(), num_classes=CLASSES, epochs=10)

    benchmark.extra_info["accuracy"] = float((joint().predict(Q) == targets).float().mean(1).max())
    peer = loop()(Q).argmax(1)
    benchmark.extra_info["peer_accuracy"] = float((peer == targets).float().mean())
    against(joint, loop, rounds=7)


def test_ridge_path_against_scikit_learn(data, against, benchmark):
    from sklearn.linear_model import RidgeClassifierCV

    X, y, Q, targets = data
    alphas = [s.penalty * len(X) for s in ridge_grid()]
    peer = RidgeClassifierCV(alphas).fit(X.numpy(), y.numpy())
    models = fit_ridge(X, y, ridge_grid(), num_classes=CLASSES)
    benchmark.extra_info["accuracy"] = float((models.predict(Q) == targets).float().mean(1).max())
    benchmark.extra_info["peer_accuracy"] = float(peer.score(Q.numpy(), targets.numpy()))
    against(
        lambda: fit_ridge(X, y, ridge_grid(), num_classes=CLASSES),
        lambda: RidgeClassifierCV(alphas).fit(X.numpy(), y.numpy()),
        rounds=7,
    )
