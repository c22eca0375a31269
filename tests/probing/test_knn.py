from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from torch.nn.functional import normalize

from headplug.errors import DataError, DimensionError, HeadplugError, OptionError
from headplug.probing import KNNSetting, knn_grid, knn_predict
from headplug.probing.data import Targets

KS = (1, 4, 20, 150)
CLASSES = 4


@pytest.fixture(scope="module")
def data(blobs):
    return *blobs(900), *blobs(300, seed=1)


@pytest.fixture(scope="module")
def numbers(data):
    """Three numbers to predict of each sample, that depend on its features."""
    weights = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    return data[0] @ weights + torch.tensor([0.0, 50.0, -3.0])


def oracle(bank, values, queries, setting):
    """Weighted means of `values (N, K)` in float64, written from the definition."""
    bank, queries = bank.double().numpy(), queries.double().numpy()
    if setting.distance == "cosine":
        bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
        far = 1 - queries @ bank.T
    else:
        far = np.linalg.norm(queries[:, None] - bank, axis=2)
    index = np.argsort(far, axis=1, kind="stable")[:, : setting.k]
    far = np.take_along_axis(far, index, 1)
    weights = {
        "equal": lambda: np.ones_like(far),
        "exp": lambda: np.exp((1 - far) / setting.temperature),
        "inverse": lambda: 1 / (far + (setting.temperature or 0)),
    }[setting.votes]()
    said = values.double().numpy()[index]
    return torch.from_numpy((said * weights[..., None]).sum(1) / weights.sum(1, keepdims=True))


def test_exponential_votes_equal_lightly(data):
    from lightly.utils.benchmarking.knn import knn_predict as peer

    bank, labels, queries, _ = data
    grid = knn_grid((*KS, 200), (0.02, 0.07, 0.1, 0.5, 2.0), votes=["exp"])
    assert len(grid) == 25
    for row, s in zip(knn_predict(bank, labels, queries, grid), grid, strict=True):
        theirs = peer(normalize(queries), normalize(bank).T, labels, CLASSES, s.k, s.temperature)[
            :, 0
        ]
        assert torch.equal(row, theirs), s


@pytest.mark.parametrize("version", ["release", "main"])
def test_votes_equal_solo_learn_on_both_distances(data, solo_home, version):
    """Its class counts correct predictions: all are, where its predictions are taken as the truth.

    The method is called on a plain object, since its constructor fails with a current torchmetrics,
    and in float64, since exp(0.9 / 0.01) is more than float32 holds.
    """
    path = solo_home(version) / "solo" / "utils" / "knn.py"
    spec = importlib.util.spec_from_file_location("solo_knn", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    bank, labels, queries, _ = data
    grid = knn_grid(KS, (0.01, 0.07, 0.5), votes=["exp"])
    grid += [KNNSetting(k, "euclidean", "inverse", 1e-5) for k in KS]
    for row, s in zip(knn_predict(bank, labels, queries, grid), grid, strict=True):
        assert len(row.unique()) == CLASSES  # it takes their number from the truth
        X, Q = bank.double(), queries.double()
        if s.distance == "cosine":
            X, Q = normalize(X), normalize(Q)
        peer = SimpleNamespace(
            train_features=[X], train_targets=[labels], test_features=[Q], test_targets=[row],
            k=s.k, T=s.temperature, distance_fx=s.distance, epsilon=1e-5,
            max_distance_matrix_size=100_000, reset=lambda: None,
        )  # fmt: skip
        assert module.WeightedKNNClassifier.compute(peer)[0] == 100, s


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize(("votes", "weights"), [("equal", "uniform"), ("inverse", "distance")])
def test_votes_of_every_kind_of_label_equal_scikit_learn(data, numbers, distance, votes, weights):
    bank, labels, queries, _ = data
    several = torch.stack([labels == 0, labels > 1, bank[:, 0] > 2], 1)
    grid = knn_grid(KS, distances=[distance], votes=[votes])
    winners, shares, means, one = (
        knn_predict(bank, y, queries, grid) for y in (labels, several, numbers, numbers[:, 1])
    )
    assert (winners.shape, winners.dtype) == ((len(KS), 300), torch.long)
    assert shares.shape == means.shape == (len(KS), 300, 3)
    assert one.shape == (len(KS), 300, 1)
    bank, queries = bank.double().numpy(), queries.double().numpy()
    for i, k in enumerate(KS):
        options = {"n_neighbors": k, "weights": weights, "metric": distance}
        peer = KNeighborsClassifier(**options).fit(bank, labels.numpy())
        assert winners[i].tolist() == peer.predict(queries).tolist(), k
        theirs = peer.fit(bank, several.numpy()).predict_proba(queries)
        theirs = torch.from_numpy(np.stack([p[:, 1] for p in theirs], 1))
        torch.testing.assert_close(shares[i].double(), theirs, atol=2e-4, rtol=0)
        theirs = KNeighborsRegressor(**options).fit(bank, numbers.numpy()).predict(queries)
        torch.testing.assert_close(means[i].double(), torch.from_numpy(theirs).double(),
                                   atol=2e-3, rtol=1e-4)  # fmt: skip
        torch.testing.assert_close(one[i], means[i, :, 1:2])


def test_inverse_votes_with_a_temperature_equal_their_definition(data, numbers):
    bank, _, queries, _ = data
    for distance in ("cosine", "euclidean"):
        grid = [KNNSetting(k, distance, "inverse", t) for k in KS for t in (1e-5, 0.07, 3)]
        grid += knn_grid(KS, (0.02, 0.3), [distance])
        for row, s in zip(knn_predict(bank, numbers, queries, grid), grid, strict=True):
            expected = oracle(bank, numbers, queries, s)
            torch.testing.assert_close(row.double(), expected, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", ["classes", "multilabel", "regression"])
def test_a_grid_gives_what_each_setting_gives_alone_in_any_order(data, numbers, kind):
    bank, labels, queries, _ = data
    y = {"classes": labels, "multilabel": numbers > 0, "regression": numbers}[kind]
    grid = knn_grid(KS, (0.07, 0.5))
    together = knn_predict(bank, y, queries, grid)
    assert torch.equal(together, knn_predict(bank, y, queries, grid[::-1]).flip(0))
    for row, s in zip(together, grid, strict=True):
        torch.testing.assert_close(row, knn_predict(bank, y, queries, [s])[0], rtol=1e-5, atol=1e-5)


def test_every_sample_can_vote_and_the_same_setting_can_come_twice(data, numbers):
    bank, labels, queries, _ = data
    most = labels.bincount().argmax()
    settings = [KNNSetting(900), KNNSetting(900), KNNSetting(900, "euclidean")]
    assert (knn_predict(bank, labels, queries, settings) == most).all()
    means = knn_predict(bank, numbers, queries, settings)
    torch.testing.assert_close(means, numbers.mean(0).expand_as(means))


def test_equal_votes_go_to_the_lowest_class():
    bank, queries = torch.tensor([[0.0], [2.0]]), torch.ones(1, 1)
    for votes in ("equal", "inverse"):
        for labels in ([3, 1], [1, 3]):
            setting = KNNSetting(2, "euclidean", votes)
            assert knn_predict(bank, torch.tensor(labels), queries, [setting]).item() == 1


def test_with_inverse_votes_duplicates_alone_vote_as_in_scikit_learn(data):
    bank, labels, queries, _ = data
    bank = torch.cat([queries[:50], bank, queries[:50], queries[:20]])
    labels = torch.cat([torch.arange(50) % 4, labels, torch.arange(50) // 2 % 4, torch.ones(20)])
    labels = labels.long()
    for distance in ("cosine", "euclidean"):
        grid = knn_grid((1, 2, 3, 10), distances=[distance], votes=["inverse"])
        for row, s in zip(knn_predict(bank, labels, queries, grid), grid, strict=True):
            first = torch.stack([labels[:50], labels[950:1000]], 1)
            first[:20] = (
                torch.cat([first[:20], torch.ones(20, 1).long()], 1).mode(1).values[:, None]
            )
            if s.k > 2:
                assert torch.equal(row[:50], first.amin(1)), s
    model = KNeighborsClassifier(10, weights="distance", algorithm="kd_tree")
    theirs = model.fit(bank.double().numpy(), labels.numpy()).predict(queries.double().numpy())
    assert row.tolist() == theirs.tolist()


def test_classes_that_no_sample_has_and_banks_of_one_class_or_sample(data):
    bank, labels, queries, _ = data
    grid = knn_grid((1, 20))
    few = knn_predict(bank, labels, queries, grid)
    assert torch.equal(few, knn_predict(bank, labels, queries, grid, num_classes=1000))
    assert (knn_predict(bank, torch.full_like(labels, 7), queries, grid) == 7).all()
    assert (knn_predict(bank[:1], labels[:1] * 0 + 3, queries, [KNNSetting(1)]) == 3).all()
    targets = Targets("classes", labels, 9)
    assert torch.equal(few, knn_predict(bank, targets, queries, grid))


def test_k_above_the_bank_is_clamped_with_one_warning_that_names_both(data):
    bank, labels, queries, _ = data
    grid = knn_grid((10, 60, 200))
    with pytest.warns(UserWarning, match=r"k=60 and 200 .* 50 samples; all 50 vote") as caught:
        got = knn_predict(bank[:50], labels[:50], queries, grid)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    expected = [s._replace(k=min(s.k, 50)) for s in grid]
    assert torch.equal(got, knn_predict(bank[:50], labels[:50], queries, expected))


def test_no_warning_without_cause(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        knn_predict(*data[:3], knn_grid())


def test_low_temperatures_do_not_overflow(data, numbers):
    bank, labels, queries, _ = data
    grid = [KNNSetting(20, "cosine", "exp", 1e-7), KNNSetting(1)]
    for y in (labels, numbers):
        sharp, nearest = knn_predict(bank, y, queries, grid)
        torch.testing.assert_close(sharp, nearest)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (KNNSetting(0), "k must be a positive integer"),
        (KNNSetting(3, "manhattan"), "no distance is called 'manhattan'"),
        (KNNSetting(3, votes="expp"), "no vote rule is called 'expp'. Closest: exp"),
        (KNNSetting(3, temperature=0.1), 'add votes="exp" or votes="inverse"'),
        (KNNSetting(3, votes="exp"), "needs a positive temperature such as 0.07, not None"),
        (KNNSetting(3, "cosine", "exp", 0.0), "needs a positive temperature"),
        (KNNSetting(3, "cosine", "exp", float("nan")), "needs a positive temperature"),
        (KNNSetting(3, "euclidean", "exp", 0.1), 'take votes="inverse" or distance="cosine"'),
        (KNNSetting(3, "euclidean", "inverse", -1.0), "must be 0 or more, not -1.0"),
    ],
)
def test_impossible_settings_are_refused(data, setting, message):
    with pytest.raises(HeadplugError, match=message):
        knn_predict(*data[:3], [KNNSetting(1), setting])


def test_wrong_shapes_and_labels_are_refused(data):
    bank, labels, queries, _ = data
    one = [KNNSetting(1)]
    with pytest.raises(DimensionError, match="5 and 16 features a sample"):
        knn_predict(bank, labels, queries[:, :5], one)
    with pytest.raises(DataError, match="one label a sample"):
        knn_predict(bank, labels[:-1], queries, one)
    with pytest.raises(DataError, match="from 0 to 2"):
        knn_predict(bank, labels, queries, one, num_classes=3)
    with pytest.raises(DataError, match="at row 2"):
        knn_predict(bank.index_fill(0, torch.tensor(2), torch.nan), labels, queries, one)
    with pytest.raises(DataError, match="the bank has no samples"):
        knn_predict(bank[:0], labels[:0], queries, one)
    for name, position in (("bank", 0), ("labels", 1), ("queries", 2)):
        inputs = [bank, labels, queries]
        inputs[position] = inputs[position].numpy()
        with pytest.raises(DataError, match=f"the {name} must be a tensor, not ndarray"):
            knn_predict(*inputs, one)
    with pytest.raises(DataError, match=r"real numbers, not torch.complex64"):
        knn_predict(bank, labels, queries.cfloat(), one)


def test_a_grid_needs_settings_and_known_names(data):
    with pytest.raises(OptionError, match=r"no vote rule is called 'exq'. Closest: exp"):
        knn_grid(votes=["equal", "exq"])
    with pytest.raises(OptionError, match=r"no distance is called 'euclid'. Closest: euclidean"):
        knn_grid(distances=["euclid"])
    with pytest.raises(OptionError, match="no setting to predict with"):
        knn_predict(*data[:3], [])


def test_settings_may_come_one_by_one_and_queries_may_be_none(data):
    bank, labels, queries, _ = data
    grid = knn_grid((1, 20))
    assert torch.equal(
        knn_predict(bank, labels, queries, iter(grid)), knn_predict(bank, labels, queries, grid)
    )
    assert knn_predict(bank, labels, queries[:0], grid).shape == (len(grid), 0)
    assert knn_predict(bank, bank, queries[:0], grid).shape == (len(grid), 0, 16)


def test_votes_that_differ_in_the_eighth_digit_are_no_tie():
    bank, query = torch.tensor([[1.0, 1.5e-4], [1.0, 1e-4]]), torch.tensor([[1.0, 0.0]])
    for labels in ([0, 1], [1, 0]):
        setting = KNNSetting(2, "cosine", "exp", 0.5)  # exp(-1e-8) to 1
        assert knn_predict(bank, torch.tensor(labels), query, [setting]).item() == labels[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives_wherever_the_bank_is(data, numbers):
    bank, labels, queries, _ = data
    for y in (labels, numbers):
        expected = knn_predict(bank, y, queries, knn_grid())
        for place in ("cpu", "cuda"):
            got = knn_predict(bank.to(place), y.to(place), queries.cuda(), knn_grid())
            torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-3)


PROCESSES = """
import json, os, sys, traceback
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from headplug.errors import HeadplugError
from headplug.probing import KNNSetting, knn_grid, knn_predict, neighbours

torch.set_num_threads(1)
folder = Path(sys.argv[1])
generator = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(*shape, generator=generator)
bank, queries = draw(700, 8) + 3, draw(360, 8) + 3
bank[50:60] = bank[650:660]  # the same samples on both
labels = {
    "classes": torch.randint(5, (700,), generator=generator),
    "multilabel": draw(700, 3) > 0,
    "regression": draw(700, 2),
}
labels["classes"][300:] %= 4  # the last class on the first process alone
for y in labels.values():
    y[50:60] = y[650:660]
grid = knn_grid((1, 4, 50, 400), (0.07, 0.5))
whole = {kind: knn_predict(bank, y, queries, grid) for kind, y in labels.items()}
one = [KNNSetting(1)]

def work(rank):
    world = dist.group.WORLD
    mine = lambda x, cut: x[cut:] if rank else x[:cut]
    found = {}
    for name, cut, ask, piece in (
        ("plain", 430, 100, 16384), ("pieces", 430, 300, 90), ("few", 5, 1, 16384),
        ("no bank", 0, 200, 300), ("no queries", 300, 360, 300),
    ):
        neighbours.PIECE, neighbours.ROWS = piece, min(piece, 256)
        neighbours.CELLS = 9000 if piece < 300 else 2**22
        found[name] = {}
        for kind, y in labels.items():
            parts = mine(bank, cut), mine(y, cut), mine(queries, ask)
            got = knn_predict(*parts, grid, group=world)
            expected = whole[kind][:, ask:] if rank else whole[kind][:, :ask]
            same = (got - expected).abs() <= 1e-5
            found[name][kind] = [list(got.shape), bool(same.all())]
    binary = [(x > 3).float() for x in (bank, queries)]  # full of exact ties
    euclidean = knn_grid((1, 9), distances=["euclidean"], votes=["equal"])
    alone = knn_predict(binary[0], labels["classes"], binary[1], euclidean)
    parts = [mine(x, 300) for x in (binary[0], labels["classes"], binary[1])]
    got = knn_predict(*parts, euclidean, group=world)
    found["ties"] = torch.equal(got, mine(alone.T, 300).T)
    apart = [torch.cat([x[:300], x[300:] - 6]) + 1e4 for x in (bank, queries)]  # of each process
    alone = knn_predict(apart[0], labels["classes"], apart[1], grid)
    got = knn_predict(*(mine(x, 300) for x in (apart[0], labels["classes"], apart[1])), grid,
                      group=world)
    found["collapsed"] = bool((got == mine(alone.T, 300).T).float().mean() > 0.999)
    half = mine(bank, 350)
    y = mine(labels["classes"], 350)

    def refused(*inputs, settings=one):
        try:
            knn_predict(*inputs, settings, group=world)
        except HeadplugError as error:
            return [type(error).__name__, str(error)]

    found["nan"] = refused(half if rank == 0 else half * torch.nan, y, queries)
    found["settings"] = refused(half, y, queries, settings=[KNNSetting(1 + rank)])
    found["bad setting"] = refused(half, y, queries, settings=[KNNSetting(rank)])
    found["widths"] = refused(half[:, : 8 - rank], y, queries[:, : 8 - rank])
    found["kinds"] = refused(half, y.float() if rank else y, queries)
    found["nothing"] = refused(half[:0], y[:0], queries)
    found["alone"] = knn_predict(half, y, queries, one).shape[1]
    found["after all"] = refused(half, y, queries)
    return found

children = []
for rank in range(2):
    child = os.fork()
    if not child:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
            timeout=timedelta(seconds=60),
        )
        try:
            (folder / f"rank{rank}.json").write_text(json.dumps(work(rank)))
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    children.append(child)
for child in children:
    os.waitpid(child, 0)
"""


def test_two_processes_give_what_one_gives_and_fail_together(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROCESSES, tmp_path],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    found = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("rank*.json"))]
    assert len(found) == 2, done.stderr[-3000:]
    asked = {"plain": 100, "pieces": 300, "few": 1, "no bank": 200, "no queries": 360}
    for name, first in asked.items():
        for rank, count in enumerate((first, 360 - first)):
            assert found[rank][name] == {
                "classes": [[24, count], True],
                "multilabel": [[24, count, 3], True],
                "regression": [[24, count, 2], True],
            }, (name, rank)
    assert [f["nan"][0] for f in found] == ["RunError", "DataError"]
    assert "process 1 of 2 failed: 350 of 350 samples hold NaN" in found[0]["nan"][1]
    assert [f["bad setting"][0] for f in found] == ["OptionError", "RunError"]
    for f in found:
        assert f["settings"] == [
            "OptionError", "the processes ask for different settings; give all of them the same."
        ]  # fmt: skip
        assert f["widths"][0] == "DimensionError"
        assert "7 and 8 features" in f["widths"][1]
        assert "1 regression and classes" in f["kinds"][1]
        assert "the bank has no samples" in f["nothing"][1]
        assert f["ties"]
        assert f["collapsed"]
        assert f["alone"] == 360
        assert f["after all"] is None
