"""kNN on made-up features: a bank of 10,000 and 2,000 queries of 512 features, 10 classes."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from headplug.probing import KNNSetting, knn_grid, knn_predict

CLASSES = 10
ONE = [KNNSetting(200, "cosine", "exp", 0.1)]
KS = (1, 2, 5, 10, 20, 50, 100, 200)
TEMPERATURES = (0.02, 0.05, 0.07, 0.1, 0.2, 0.5, 0.7, 1.0)
GRID = knn_grid(KS, TEMPERATURES, votes=["exp"])
ROOT = Path(__file__).resolve().parents[2]
SOLO = [ROOT / ".solo", Path(os.environ.get("SOLO_LEARN_HOME", "."))]


@pytest.fixture(scope="module")
def data(device):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, 512, generator=generator)
    y = torch.randint(CLASSES, (12_000,), generator=generator)
    X = centres[y] + 6 * torch.randn(12_000, 512, generator=generator)
    X, y = X.to(device), y.to(device)
    return X[:10_000], y[:10_000], X[10_000:], y[10_000:]


@pytest.fixture
def accuracy(benchmark, data):
    """Notes the accuracy of both sides' predictions beside the times."""

    def note(ours, peer):
        for name, predicted in (("accuracy", ours), ("peer_accuracy", peer)):
            benchmark.extra_info[name] = float((predicted == data[3]).float().mean())

    return note


def unit(X):
    return torch.nn.functional.normalize(X, dim=1)


def test_a_grid_of_64_against_its_dearest_setting(data, against, accuracy):
    X, y, Q, _ = data
    dearest = [KNNSetting(200, "cosine", "exp", 0.07)]
    together, alone = knn_predict(X, y, Q, GRID), knn_predict(X, y, Q, dearest)[0]
    assert torch.equal(together[GRID.index(dearest[0])], alone)
    accuracy(together[GRID.index(dearest[0])], alone)
    against(lambda: knn_predict(X, y, Q, GRID), lambda: knn_predict(X, y, Q, dearest), rounds=9)


@pytest.mark.guard
def test_one_setting_against_lightly(data, against, accuracy):
    from lightly.utils.benchmarking.knn import knn_predict as peer

    X, y, Q, _ = data

    def theirs():
        return peer(unit(Q), unit(X).T, y, CLASSES, knn_k=200, knn_t=0.1)[:, 0]

    accuracy(knn_predict(X, y, Q, ONE)[0], theirs())
    assert against(lambda: knn_predict(X, y, Q, ONE), theirs, rounds=9) < 1.2


def test_64_settings_against_solo_learn(data, against, benchmark):
    """Each setting is an evaluation of its own there; one is timed, so the ratio is for one."""
    path = next((p for home in SOLO if (p := home / "solo/utils/knn.py").is_file()), None)
    if path is None:
        pytest.skip("no solo-learn: `make .solo/ready`, or set SOLO_LEARN_HOME to a clone")
    spec = importlib.util.spec_from_file_location("solo_knn", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    X, y, Q, targets = data

    def theirs():  # on a plain object: the constructor fails with a current torchmetrics
        peer = SimpleNamespace(
            train_features=[unit(X)], train_targets=[y], test_features=[unit(Q)],
            test_targets=[targets], k=200, T=0.1, distance_fx="cosine", epsilon=1e-5,
            max_distance_matrix_size=int(5e6), reset=lambda: None,
        )  # fmt: skip
        return module.WeightedKNNClassifier.compute(peer)[0] / 100

    ours = knn_predict(X, y, Q, GRID)[GRID.index(ONE[0])]
    benchmark.extra_info["accuracy"] = float((ours == targets).float().mean())
    benchmark.extra_info["peer_accuracy"] = theirs()
    one = against(lambda: knn_predict(X, y, Q, GRID), theirs, rounds=9)
    benchmark.extra_info["times_faster_than_64_evaluations"] = len(GRID) / one


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_inverse_votes_against_scikit_learn(data, against, accuracy, metric, cpu):
    from sklearn.neighbors import KNeighborsClassifier

    X, y, Q, _ = data
    setting = [KNNSetting(200, metric, "inverse")]

    def theirs():
        model = KNeighborsClassifier(200, weights="distance", metric=metric, algorithm="brute")
        return torch.from_numpy(model.fit(X.numpy(), y.numpy()).predict(Q.numpy()))

    accuracy(knn_predict(X, y, Q, setting)[0], theirs())
    against(lambda: knn_predict(X, y, Q, setting), theirs, rounds=9)


MEMORY = """
import os, sys, threading, time, torch
torch.set_num_threads(1)
who, count, metric = sys.argv[1], int(sys.argv[2]), sys.argv[3]
generator = torch.Generator().manual_seed(0)
X, Q = (torch.randn(n, 512, generator=generator) for n in (count, 2000))
y = torch.randint(10, (count,), generator=generator)
if who == "headplug":
    from headplug.probing import KNNSetting, knn_predict
    run = lambda X, y, Q: knn_predict(X, y, Q, [KNNSetting(200, metric, "inverse")])
else:
    from sklearn.neighbors import KNeighborsClassifier
    run = lambda X, y, Q: KNeighborsClassifier(
        200, weights="distance", metric=metric, algorithm="brute"
    ).fit(X.numpy(), y.numpy()).predict(Q.numpy())
run(X[:300], y[:300], Q[:300])
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
base = peak = resident()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, resident())
thread = threading.Thread(target=watch)
thread.start()
started = time.process_time()
run(X, y, Q)
spent = time.process_time() - started
done.set()
thread.join()
print((peak - base) / 2**20, spent)
"""


def test_memory_and_growth_against_scikit_learn(benchmark, cpu):
    """Resident memory on top of the features in MiB and CPU seconds, in a process for each."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("memory is read from /proc")

    def measured(who, count, metric="cosine"):
        said = subprocess.run(
            [sys.executable, "-c", MEMORY, who, str(count), metric],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        return [round(float(number), 2) for number in said.split()]

    for count in (5_000, 80_000):
        for metric in ("cosine", "euclidean"):
            for who in ("headplug", "sklearn"):
                info = measured(who, count, metric)
                benchmark.extra_info[f"{who} {metric} {count}: MiB, s"] = info
    found = benchmark.extra_info
    ours, theirs = (found[f"{who} cosine 80000: MiB, s"] for who in ("headplug", "sklearn"))
    print(dict(found))
    assert ours[0] <= theirs[0] / 5
    assert ours[1] <= 1.25 * 16 * found["headplug cosine 5000: MiB, s"][1]
    benchmark.pedantic(lambda: None)
