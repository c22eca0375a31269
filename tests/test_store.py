from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from headplug import FeatureStore, extract_features, features, probe_layers
from headplug.errors import (
    CheckpointError,
    DataError,
    RunError,
    SlotError,
    TapError,
    UnknownNameError,
)
from headplug.store import gap

AT = ["backbone.0", "backbone.3", "pre_projection", "projection"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 3),
            nn.AdaptiveAvgPool2d(1),
        )
        self.projection_head = nn.Sequential(nn.Linear(6, 5), nn.Dropout(), nn.Linear(5, 2))

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(1))


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def data():
    return TensorDataset(torch.randn(23, 1, 8, 8), torch.randperm(23))


@pytest.fixture
def loader(data):
    return DataLoader(data, batch_size=5)


def by_hand(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model = model.eval()
    with torch.no_grad():
        first = model.backbone[0](x)
        second = model.backbone[3](model.backbone[1](first).relu())
        h = second.mean((2, 3))
        values = [first.mean((2, 3)), h, h, model.projection_head(h)]
        return dict(zip(AT, values, strict=True))


def assert_equal(a: FeatureStore, b: FeatureStore) -> None:
    assert a.points == b.points
    assert torch.equal(a.labels, b.labels)
    assert all(torch.equal(a[p], b[p]) for p in a.points)


# ---- extraction ----------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [False, True])
def test_extraction_equals_one_pass_by_hand(model, loader, data, tmp_path, on_disk):
    out = tmp_path / "a" / "store" if on_disk else None
    store = extract_features(model, loader, AT, out, shard_size=8)
    x, y = data.tensors
    assert store.points == AT
    assert len(store) == 23
    assert torch.equal(store.labels, y)
    assert store.labels.dtype == torch.int64
    for point, expected in by_hand(model, x).items():
        torch.testing.assert_close(store[point], expected)
        assert store[point].dtype == torch.float32
        assert not store[point].requires_grad


def test_the_order_is_that_of_the_loader(model, data):
    order = torch.randperm(23).tolist()
    store = extract_features(model, DataLoader(data, batch_size=4, sampler=order), AT)
    x, y = data.tensors
    assert torch.equal(store.labels, y[order])
    torch.testing.assert_close(store["projection"], by_hand(model, x[order])["projection"])


def test_taps_come_in_depth_order_each_once(model, loader):
    at = ["projection", "backbone.*", "pre_projection", "backbone.3"]
    store = extract_features(model, loader, at)
    assert store.points == [*(f"backbone.{i}" for i in range(5)), "pre_projection", "projection"]
    assert extract_features(model, loader, "projection").points == ["projection"]


def test_in_place_modules_do_not_spoil_what_is_kept(model, loader, data):
    store = extract_features(model, loader, ["backbone.1", "projection"])
    with torch.no_grad():
        expected = model.eval().backbone[:2](data.tensors[0]).mean((2, 3))
    torch.testing.assert_close(store["backbone.1"], expected)


def test_transform_is_applied_to_the_batch(model, loader, data):
    store = extract_features(model, loader, ["projection"], transform=lambda x: 2 * x + 1)
    expected = by_hand(model, 2 * data.tensors[0] + 1)["projection"]
    torch.testing.assert_close(store["projection"], expected)


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_gets_its_mode_back(model, loader, fails):
    model.train()
    model.backbone[1].eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def pool(x):
        assert not any(m.training for m in model.modules())
        if fails:
            raise KeyError
        return gap(x)

    if fails:
        with pytest.raises(KeyError):
            extract_features(model, loader, AT, pool=pool)
    else:
        extract_features(model, loader, AT, pool=pool)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_more_of_the_model_runs_than_needed(model, loader):
    calls = []
    model.projection_head.register_forward_pre_hook(lambda *_: calls.append(1))
    extract_features(model, loader, ["backbone.3"])
    assert calls == []


def test_half_precision_is_kept_as_float32(loader):
    model = Model().to(torch.bfloat16)
    store = extract_features(model, loader, ["projection"], transform=lambda x: x.bfloat16())
    assert store["projection"].dtype == torch.float32


def test_loaders_without_a_length_and_with_more_than_labels_work(model):
    class Stream(IterableDataset):
        def __iter__(self):
            for i in range(7):
                yield torch.full((1, 8, 8), float(i)), i, f"file{i}"

    store = extract_features(model, DataLoader(Stream(), batch_size=3), ["projection"])
    assert store.labels.tolist() == list(range(7))
    pairs = ((torch.rand(2, 1, 8, 8), [0, 1]) for _ in range(2))
    assert extract_features(model, pairs, ["projection"]).labels.tolist() == [0, 1, 0, 1]


# ---- pooling -------------------------------------------------------------------------------------


def test_gap_is_the_mean_over_positions():
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(gap(x), x.mean((2, 3)))
    x = torch.randn(2, 3, 4, 5, 6)  # video
    torch.testing.assert_close(gap(x), x.mean((2, 3, 4)))
    x = torch.randn(2, 7, 3)  # tokens
    torch.testing.assert_close(gap(x), x.mean(1))
    x = torch.randn(2, 3)
    assert torch.equal(gap(x), x)
    assert gap(torch.randn(2)).shape == (2, 1)
    x = torch.randn(2, 3, 1, 1)
    assert torch.equal(gap(x), x.flatten(1))


def test_gap_pools_every_stage_of_cnn_vit_and_swin_to_its_channels():
    batch = [(torch.randn(2, 3, 64, 64), [0, 1])]
    for name, at, widths in (
        ("resnet18", "layer*", [64, 128, 256, 512]),
        ("swin_tiny_patch4_window7_224", "layers.*", [96, 192, 384, 768]),
        ("vit_tiny_patch16_224", "blocks.1[01]", [192, 192]),
    ):
        options = {} if name == "resnet18" else {"img_size": 64}
        model = timm.create_model(name, **options).eval()
        store = extract_features(model, batch, at)
        assert [store[p].shape[1] for p in store.points] == widths
        if "vit" in name:
            expected = [value.mean(1) for value in features(model, batch[0][0], store.points)]
        else:
            maps = model.forward_intermediates(batch[0][0], intermediates_only=True)
            expected = [m.mean((2, 3)).detach() for m in maps[-4:]]
        for point, value in zip(store.points, expected, strict=True):
            torch.testing.assert_close(store[point], value)


def test_pool_can_be_any_function_of_a_tap(model, loader, data):
    store = extract_features(model, loader, AT, pool=lambda x: x.flatten(1)[:, :3])
    first = model.eval().backbone[0](data.tensors[0]).flatten(1)[:, :3]
    torch.testing.assert_close(store["backbone.0"], first.detach())
    for wrong in (lambda x: x.mean(), lambda x: x[None], lambda x: None, lambda x: x[:1]):
        with pytest.raises(DataError, match=r"it must give \(5, D\)"):
            extract_features(model, loader, AT, pool=wrong)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "the loader is empty"),
        ([torch.rand(2, 1, 8, 8)], r"must yield \(images, labels\), not a Tensor"),
        ([(torch.rand(2, 1, 8, 8),)], r"must yield \(images, labels\)"),
        ([{"image": torch.rand(2, 1, 8, 8)}], r"not a dict"),
        ([([torch.rand(2, 1, 8, 8)] * 2, [0, 1])], "one view"),
        ([(torch.rand(2, 1, 8, 8), [0, 1, 2])], "2 images with 3 labels"),
        ([(torch.rand(2, 1, 8, 8), ["cat", "dog"])], "the labels cannot be made a tensor"),
        ([(torch.rand(2, 1, 8, 8), None)], "the labels cannot be made a tensor"),
        ([(torch.rand(2, 1, 8, 8), torch.rand(2))], "labels must be integers"),
        ([(torch.rand(2, 1, 8, 8), torch.eye(2).long())], "labels must be integers"),
    ],
)
def test_a_loader_that_cannot_be_used_is_refused(model, tmp_path, batches, message, on_disk):
    out = tmp_path / "store" if on_disk else None
    with pytest.raises(DataError, match=message):
        extract_features(model, batches, ["projection"], out)
    with pytest.raises(CheckpointError, match="no finished feature store"):
        FeatureStore.open(tmp_path / "store")


def test_taps_without_a_row_per_image_are_refused(model, loader):
    lstm = nn.Sequential(nn.Flatten(2), nn.LSTM(64, 3))
    with pytest.raises(DataError, match=r"'1' gives a tuple, not a tensor"):
        extract_features(lstm, loader, ["1"])

    class Windows(nn.Module):
        def forward(self, x):
            return x.repeat(4, 1, 1, 1)

    windows = nn.Sequential(Windows(), nn.Conv2d(1, 2, 1))
    with pytest.raises(DataError, match=r"'0' gives shape \(20, 1, 8, 8\) for 5 images"):
        extract_features(windows, loader, ["0", "1"])


def test_points_are_checked_before_the_work(model, tmp_path):
    def never():
        raise AssertionError("the loader was read")
        yield

    with pytest.raises(UnknownNameError, match="Closest"):
        extract_features(model, never(), ["projektion"])
    with pytest.raises(TapError, match="at least one point"):
        extract_features(model, never(), [])
    with pytest.raises(SlotError):
        extract_features(nn.Sequential(nn.ReLU()), never(), ["projection"])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write to"):
        extract_features(model, never(), AT, tmp_path / "file" / "store")
    model.unused = nn.ReLU()
    with pytest.raises(TapError, match="'unused' was never reached"):
        extract_features(model, [(torch.rand(2, 1, 8, 8), [0, 1])], ["unused", "projection"])


# ---- on disk -------------------------------------------------------------------------------------


def test_shards_and_index(model, loader, tmp_path):
    out = tmp_path / "store"
    written = extract_features(model, loader, AT, out, shard_size=10)
    names = sorted(os.listdir(out))
    assert names == [f"shard-0000{i}.safetensors" for i in range(3)] + ["store.json"]
    assert json.loads((out / "store.json").read_text()) == {
        "schema": 1,
        "points": AT,
        "shards": names[:3],
    }
    reopened = FeatureStore.open(out)
    assert_equal(reopened, written)
    assert_equal(reopened, extract_features(model, loader, AT))
    assert_equal(FeatureStore.open(str(out)), written)
    assert repr(reopened) == (
        "FeatureStore(23 samples; backbone.0: 4, backbone.3: 6, pre_projection: 6, projection: 2)"
    )


def test_a_module_may_be_called_labels(tmp_path):
    model = nn.Sequential()
    model.labels = nn.Flatten()
    store = extract_features(model, [(torch.ones(2, 3), [4, 5])], ["labels"], tmp_path)
    assert torch.equal(store["labels"], torch.ones(2, 3))
    assert store.labels.tolist() == [4, 5]


@pytest.mark.parametrize("shard_size", [1, 5, 7, 23, 1000])
def test_shard_size_does_not_matter(model, loader, tmp_path, shard_size):
    store = extract_features(model, loader, AT, tmp_path / "s", shard_size=shard_size)
    assert_equal(store, extract_features(model, loader, AT))


def test_a_finished_store_is_never_written_over(model, loader, tmp_path):
    extract_features(model, loader, AT, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(RunError, match=r"holds a finished feature store.*FeatureStore.open"):
        extract_features(model, loader, AT, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_unfinished_extraction_is_not_read_and_can_be_done_again(model, data, tmp_path):
    def breaks():
        yield from DataLoader(data, batch_size=5)
        raise OSError("the disk of images went away")

    with pytest.raises(OSError, match="went away"):
        extract_features(model, breaks(), AT, tmp_path, shard_size=5)
    assert "shard-00000.safetensors" in os.listdir(tmp_path)
    with pytest.raises(CheckpointError, match="no finished feature store"):
        FeatureStore.open(tmp_path)
    loader = DataLoader(data, batch_size=12)
    store = extract_features(model, loader, AT[:2], tmp_path, shard_size=12)
    assert_equal(FeatureStore.open(tmp_path), store)
    assert_equal(store, extract_features(model, loader, AT[:2]))


def test_a_disk_that_fills_up_is_a_run_error(model, data, tmp_path):
    """With a limit on file sizes, as a full disk gives: the third shard is too large."""
    script = """
import resource, signal, sys, torch
from torch import nn
from headplug import extract_features
from headplug.errors import RunError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
batches = [(torch.rand(n, 4), torch.arange(n)) for n in (8, 8, 2000)]
try:
    extract_features(nn.Sequential(nn.ReLU()), batches, ["0"], sys.argv[1], shard_size=8)
except RunError as error:
    print("refused:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "s"], capture_output=True, text=True, check=False
    )
    assert "refused: cannot write" in done.stdout, done.stderr
    assert sorted(os.listdir(tmp_path / "s")) == [f"shard-0000{i}.safetensors" for i in (0, 1)]


def damaged(model, loader, folder: Path) -> Path:
    extract_features(model, loader, AT, folder, shard_size=10)
    return folder


def test_a_truncated_or_missing_shard_is_named(model, loader, tmp_path):
    folder = damaged(model, loader, tmp_path / "a")
    shard = folder / "shard-00001.safetensors"
    whole = shard.read_bytes()
    for keep in (0, 4, 100, len(whole) - 1):
        shard.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=r"shard-00001.safetensors is missing or damaged"):
            FeatureStore.open(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"shard-00001.safetensors is missing or damaged"):
        FeatureStore.open(folder)
    shard.write_bytes(whole)
    FeatureStore.open(folder)


def test_shards_of_another_store_are_noticed(model, loader, data, tmp_path):
    folder = damaged(model, loader, tmp_path / "a")
    extract_features(model, loader, AT[:2], tmp_path / "b", shard_size=10)
    shutil.copy(tmp_path / "b" / "shard-00001.safetensors", folder)
    with pytest.raises(CheckpointError, match="shard-00001"):
        FeatureStore.open(folder)
    wider = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    for width, name in ((3, "c"), (4, "d")):
        wider[1] = nn.Linear(64, width)
        extract_features(wider, loader, ["1"], tmp_path / name, shard_size=10)
    shutil.copy(tmp_path / "d" / "shard-00001.safetensors", tmp_path / "c")
    with pytest.raises(DataError, match=r"at '1' must be \(N, D\)"):
        FeatureStore.open(tmp_path / "c")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"schema": 2, "points": ["a"], "shards": ["b"]}',
        '{"schema": 1}',
        '{"schema": 1, "points": [], "shards": []}',
    ],
)
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"store.json cannot be used"):
        FeatureStore.open(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="no finished feature store"):
        FeatureStore.open(tmp_path / "nothing")


def test_a_tap_costs_memory_only_when_it_is_read(tmp_path):
    """Opening maps the shards; 64 MB of features must not be resident before they are asked for."""
    script = """
import sys, torch
from torch import nn
from headplug import FeatureStore, extract_features
def anonymous():
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return int(line.split()[1]) / 1024
batches = ((torch.rand(1024, 2048), torch.arange(1024)) for _ in range(8))
extract_features(nn.Sequential(nn.ReLU()), batches, ["0"], sys.argv[1], shard_size=1024)
before = anonymous()
store = FeatureStore.open(sys.argv[1])
opened = anonymous() - before
x = store["0"]
print(len(store), opened, anonymous() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "s"], capture_output=True, text=True, check=True
    )
    count, opened, read = done.stdout.split()
    assert int(count) == 8192
    assert float(opened) < 16
    assert float(read) > 48


# ---- in memory -----------------------------------------------------------------------------------


def test_from_tensors_takes_tensors_arrays_and_lists():
    x = np.arange(6.0).reshape(3, 2)
    store = FeatureStore.from_tensors({"a": x, "b": torch.ones(3, 1), "c": [[1, 2]] * 3}, [2, 0, 1])
    assert store.points == ["a", "b", "c"]
    assert np.array_equal(store["a"].numpy(), x)
    assert store.labels.tolist() == [2, 0, 1]
    assert len(store) == 3
    assert list(store) == store.points
    assert "a" in store
    assert "z" not in store
    store = FeatureStore.from_tensors({"a": x}, np.array([1, 0, 1], dtype=np.uint8))
    assert store.labels.dtype == torch.int64
    with pytest.raises(UnknownNameError, match=r"no tap is called 'aa'\. .*store.points"):
        store["aa"]
    with pytest.raises(UnknownNameError):
        store[0]


@pytest.mark.parametrize(
    ("given", "labels", "message"),
    [
        ({}, [0], "at least one tap"),
        ({"a": torch.rand(3, 2)}, [0, 1], "'a' has 3 samples, but there are 2 labels"),
        ({"a": torch.rand(2, 2), "b": torch.rand(3, 2)}, [0, 1], "'b' has 3 samples"),
        ({"a": torch.rand(2)}, [0, 1], r"'a' must be \(N, D\), not \(2,\)"),
        ({"a": torch.rand(2, 2, 2)}, [0, 1], r"must be \(N, D\), not \(2, 2, 2\)"),
        ({"a": torch.tensor(1.0)}, [0, 1], r"must be \(N, D\), not \(\)"),
        ({"a": ["x", "y"]}, [0, 1], "'a' cannot be made a tensor"),
        ({"a": torch.rand(2, 2)}, torch.rand(2), "labels must be integers"),
        ({"a": torch.rand(2, 2)}, [[0], [1]], "labels must be integers"),
        ({"a": torch.rand(2, 2)}, ["x", "y"], "the labels cannot be made a tensor"),
        ({"a": torch.rand(2, 2)}, None, "the labels cannot be made a tensor"),
    ],
)
def test_from_tensors_refuses_what_does_not_fit(given, labels, message):
    with pytest.raises(DataError, match=message):
        FeatureStore.from_tensors(given, labels)


# ---- end to end ----------------------------------------------------------------------------------


def test_stores_are_what_probe_layers_takes(tmp_path):
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    model = Model()
    stores = [
        extract_features(
            model, DataLoader(TensorDataset(x[a:b], y[a:b]), batch_size=128), AT, tmp_path / name
        )
        for name, a, b in (("train", 0, 600), ("test", 600, 900))
    ]
    in_memory = [FeatureStore.from_tensors({p: s[p] for p in AT}, s.labels) for s in stores]
    report = probe_layers(*stores, probes=("knn",))
    assert [row["tap"] for row in report.rows] == AT
    assert report.rows == probe_layers(*in_memory, probes=("knn",)).rows
    best = max(row["accuracy"] for row in report.rows)
    assert best > 0.2  # chance is 0.1
