"""Stores as they are read: from memory and files, whole, in parts, by sample, by other tools."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow.parquet
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from headplug import FeatureStore, extract_features, probe_layers
from headplug.errors import DataError, RunError, UnknownNameError


@pytest.fixture(params=["memory", "one file", "files", "out of order"])
def store(request, model, data, at, tmp_path):
    """The same samples, kept in four ways."""
    x, y = data.tensors
    if request.param == "out of order":
        rows = torch.randperm(23).split(4)
        batches = [(x[r], y[r], r) for r in rows]
        return extract_features(model, batches, at, tmp_path / "store", shard_size=8)
    out = None if request.param == "memory" else tmp_path / "store"
    size = 5 if request.param == "files" else 100
    return extract_features(model, DataLoader(data, batch_size=5), at, out, shard_size=size)


@pytest.fixture
def expected(model, data, by_hand):
    return by_hand(model, data.tensors[0])


def test_taps_whole_in_parts_and_as_arrays(store, data, at, expected):
    assert list(store) == store.points == at
    assert "projection" in store
    assert "z" not in store
    for tap in at:
        torch.testing.assert_close(store[tap], expected[tap])
        assert torch.equal(torch.cat(list(store.parts(tap))), store[tap])
        assert np.array_equal(store.numpy(tap), store[tap].numpy())
    assert torch.equal(store.labels, data.tensors[1])
    store.verify()
    for method in (store.__getitem__, store.parts, store.numpy, store.dataset):
        with pytest.raises(UnknownNameError, match=r"no tap is called 'projektion'.*store.points"):
            method("projektion")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_for_training_on_features(store, data, expected, workers):
    dataset = store.dataset("projection", "backbone.0")
    assert len(dataset) == 23
    z, first, label = dataset[7]
    assert torch.equal(z, store["projection"][7])
    assert torch.equal(first, store["backbone.0"][7])
    assert label == data.tensors[1][7]
    assert torch.equal(dataset[-1][0], store["projection"][22])
    for wrong in (23, -24, [0, 23]):
        with pytest.raises(IndexError):
            dataset[wrong]
    mask = torch.arange(23) % 3 == 1
    for index in (mask, mask.numpy(), mask.tolist(), slice(1, None, 3), range(1, 23, 3)):
        z, _, labels = dataset[index]
        assert torch.equal(z, store["projection"][1::3])
        assert torch.equal(labels, store.labels[1::3])
    assert len(dataset[[]][0]) == len(dataset[5:5][0]) == 0
    for wrong in (1.5, "a", [0.0], None, True, mask[:5], [[0, 1]]):
        with pytest.raises(DataError, match="an integer, a list of them, a slice or a mask of 23"):
            dataset[wrong]
    samples = DataLoader(dataset, batch_size=4, shuffle=True, num_workers=workers)
    batches = DataLoader(
        dataset,
        batch_size=None,
        sampler=BatchSampler(SequentialSampler(dataset), 4, drop_last=False),
        num_workers=workers,
    )
    order = data.tensors[1].argsort()
    for loader in (samples, batches):
        z, first, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert labels.sort()[0].tolist() == list(range(23))
        torch.testing.assert_close(z[labels.argsort()], expected["projection"][order])
        torch.testing.assert_close(first[labels.argsort()], expected["backbone.0"][order])
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[[3, 21]][0], dataset[[3, 21]][0])
    assert len(store.dataset()[0]) == 5


def test_arrow_and_parquet_round_trip(store, at, tmp_path):
    path = tmp_path / "out" / "features.parquet"
    store.to_parquet(path)
    read = pyarrow.parquet.read_table(path)
    for table in (store.to_arrow(), read):
        assert table.column_names == ["id", "label", *at]
        assert table["id"].to_pylist() == list(range(23))
        assert table["label"].to_pylist() == store.labels.tolist()
        for tap in at:
            kind = table.schema.field(tap).type
            assert (kind.list_size, str(kind.value_type)) == (store[tap].shape[1], "float")
            assert np.array_equal(np.array(table[tap].to_pylist(), np.float32), store.numpy(tap))
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        store.to_parquet(tmp_path / "file" / "features.parquet")


def test_arrow_of_maps_strings_and_several_labels(tmp_path):
    x = torch.rand(3, 2, 4)
    labels = torch.eye(3)
    store = FeatureStore.from_tensors({"m": x.bfloat16()}, labels, ids=["b", "a", "c"])
    table = store.to_arrow()
    assert table["id"].to_pylist() == ["a", "b", "c"]
    assert table["label"].to_pylist() == labels[[1, 0, 2]].tolist()
    assert np.array(table["m"].to_pylist()).shape == (3, 2, 4)
    store = FeatureStore.from_tensors({"label": x})
    assert store.labels is None
    assert store.dataset()[1][0].shape == (2, 4)
    with pytest.raises(DataError, match="a tap is called 'label'"):
        store.to_arrow()


# ---- from tensors --------------------------------------------------------------------------------


def test_from_tensors_takes_tensors_arrays_and_lists():
    x = np.arange(6.0).reshape(3, 2)
    store = FeatureStore.from_tensors({"a": x, "b": torch.ones(3, 1), "c": [[1, 2]] * 3}, [2, 0, 1])
    assert store.points == ["a", "b", "c"]
    assert np.array_equal(store["a"].numpy(), x)
    assert store.labels.tolist() == [2, 0, 1]
    assert len(store) == 3
    assert list(store) == store.points
    assert repr(store) == "FeatureStore(3 samples; a: 2, b: 1, c: 2)"
    store = FeatureStore.from_tensors({"a": x}, np.array([1, 0, 1], dtype=np.uint8), [5, 9, 1])
    assert store.labels.dtype == torch.int64
    assert store.ids.tolist() == [1, 5, 9]
    assert store["a"].tolist() == x[[2, 0, 1]].tolist()
    with pytest.raises(UnknownNameError):
        store[0]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({}, {"labels": [0]}, "at least one tap"),
        ({"a": torch.rand(3, 2)}, {"labels": [0, 1]}, "'a' has 3 samples, but there are labels"),
        ({"a": torch.rand(2, 2), "b": torch.rand(3, 2)}, {}, "'a' has 2 samples, but 'b' has 3"),
        ({"a": torch.rand(2)}, {}, r"'a' must be \(N, D\) or \(N, ...\), not \(2,\)"),
        ({"a": torch.tensor(1.0)}, {}, r"must be \(N, D\).* not \(\)"),
        ({"a": ["x", "y"]}, {}, "'a' cannot be made a tensor"),
        ({"a": torch.rand(2, 2)}, {"labels": torch.rand(2, 2, 2)}, "labels must be"),
        ({"a": torch.rand(2, 2)}, {"labels": ["x", "y"]}, "such as 'x': map each to an integer"),
        ({"a": torch.rand(2, 2)}, {"labels": np.array(["x", "y"])}, "such as 'x': map each"),
        ({":labels": torch.rand(2, 2)}, {}, "called ':labels', which a store needs for itself"),
        ({"a": torch.rand(2, 2), 3: torch.rand(2, 2)}, {}, "called 3, which is no string"),
        ({"a": torch.rand(2, 2).to(torch.float8_e4m3fn)}, {}, "float8_e4m3fn, which cannot be ke"),
        ({"a": torch.rand(2, 2).to(torch.complex64)}, {}, "complex64.* one of float32, float16"),
        ({"a": torch.rand(2, 2)}, {"ids": [1, 1]}, "ids must be 2 different integers or strings"),
        ({"a": torch.rand(2, 2)}, {"ids": [1]}, "ids must be 2 different"),
        ({"a": torch.rand(2, 2)}, {"ids": [0.5, 1.5]}, "ids must be 2 different"),
        ({"a": torch.rand(2, 2)}, {"ids": "ab"}, "ids must be 2 different"),
    ],
)
def test_from_tensors_refuses_what_does_not_fit(given, options, message):
    with pytest.raises(DataError, match=message):
        FeatureStore.from_tensors(given, **options)


# ---- end to end ----------------------------------------------------------------------------------


def test_stores_are_what_probe_layers_takes(model, at, tmp_path):
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    stores = [
        extract_features(
            model, DataLoader(TensorDataset(x[a:b], y[a:b]), batch_size=128), at, tmp_path / name
        )
        for name, a, b in (("train", 0, 600), ("test", 600, 900))
    ]
    in_memory = [FeatureStore.from_tensors({p: s[p] for p in at}, s.labels) for s in stores]
    report = probe_layers(*stores, probes=("knn",))
    assert [row["tap"] for row in report.rows] == at
    assert report.rows == probe_layers(*in_memory, probes=("knn",)).rows
    best = max(row["accuracy"] for row in report.rows)
    assert best > 0.2  # chance is 0.1
