"""Files: what is written, what an interruption leaves, what damage and mixing are noticed."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import warnings
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from headplug import FeatureStore, extract_features
from headplug.errors import CheckpointError, RunError


@pytest.fixture
def extract(model, data, at, tmp_path):
    """Makes a store of five shards, or goes on with it; counts the batches that the model meets."""

    def run(**options):
        loader = options.pop("loader", DataLoader(data, batch_size=5, shuffle=True))
        out = options.pop("out", tmp_path / "store")
        before = model.forwards
        store = extract_features(
            options.pop("model", model), loader, options.pop("at", at), out, shard_size=5, **options
        )
        run.batches = model.forwards - before
        return store

    return run


def test_shards_and_index(extract, at, tmp_path, assert_equal):
    written = extract()
    names = [f"shard-0000{i}.safetensors" for i in range(5)]
    assert sorted(os.listdir(tmp_path / "store")) == [*names, "store.json"]
    index = json.loads((tmp_path / "store" / "store.json").read_text())
    assert index["schema"] == 3
    assert index["points"] == at
    assert [entry["file"] for entry in index["shards"]] == names
    assert_equal(FeatureStore.open(str(tmp_path / "store")), written)
    assert_equal(written, extract(out=None))
    assert repr(written) == (
        "FeatureStore(23 samples; backbone.0: 4, backbone.3: 6, pre_projection: 6, projection: 2)"
    )


def test_a_shard_is_a_file_that_safetensors_reads(extract, tmp_path):
    from safetensors.torch import load_file

    store = extract()
    tensors = load_file(tmp_path / "store" / "shard-00001.safetensors")
    assert torch.equal(tensors["projection"], store["projection"][5:10])
    assert tensors[":ids"].tolist() == [5, 6, 7, 8, 9]


def test_the_same_extraction_gives_the_same_bytes(extract, tmp_path, files):
    extract()
    extract(out=tmp_path / "again")
    assert files(tmp_path / "store") == files(tmp_path / "again")


def test_a_module_may_be_called_labels(tmp_path):
    model = nn.Sequential()
    model.labels = nn.Flatten()
    store = extract_features(model, [(torch.ones(2, 3), [4, 5])], ["labels"], tmp_path)
    assert torch.equal(store["labels"], torch.ones(2, 3))
    assert store.labels.tolist() == [4, 5]


@pytest.mark.parametrize("shard_size", [1, 5, 7, 23, 1000])
def test_shard_size_does_not_matter(model, loader, at, tmp_path, shard_size, assert_equal):
    store = extract_features(model, loader, at, tmp_path / "s", shard_size=shard_size)
    assert_equal(store, extract_features(model, loader, at))


# ---- again ---------------------------------------------------------------------------------------


def test_a_finished_store_is_returned_as_it_is(extract, tmp_path, files, assert_equal):
    first = extract()
    before = files(tmp_path / "store")
    assert_equal(extract(), first)
    assert extract.batches == 0
    assert files(tmp_path / "store") == before


def test_a_finished_store_can_be_read_where_nothing_can_be_written(extract, tmp_path):
    extract()
    (tmp_path / "store").chmod(0o555)
    try:
        assert len(extract()) == 23
    finally:
        (tmp_path / "store").chmod(0o755)


def test_only_shards_that_are_missing_are_decoded_and_computed(extract, data, tmp_path, files):
    class Counting(TensorDataset):
        asked: ClassVar = []

        def __getitem__(self, i):
            self.asked.append(i)
            return super().__getitem__(i)

    loader = DataLoader(Counting(*data.tensors), batch_size=5)
    extract(loader=loader)
    before = files(tmp_path / "store")
    for name in ("store.json", "shard-00001.safetensors", "shard-00003.safetensors"):
        (tmp_path / "store" / name).unlink()
    (tmp_path / "store" / ".shard-00003.safetensors.17.partial").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="no finished feature store"):
        FeatureStore.open(tmp_path / "store")
    Counting.asked.clear()
    extract(loader=loader)
    assert extract.batches == 2
    assert Counting.asked[8:] == [*range(5, 10), *range(15, 20)]  # eight are for the fingerprint
    assert files(tmp_path / "store") == before


def test_an_extraction_that_failed_goes_on(extract, model, data, tmp_path, files):
    extract(out=tmp_path / "whole")

    class Broken(TensorDataset):
        fails = True

        def __getitem__(self, i):
            if i == 17 and self.fails:
                raise OSError("the disk of images went away")
            return super().__getitem__(i)

    loader = DataLoader(Broken(*data.tensors), batch_size=5)
    with pytest.raises(OSError, match="went away"):
        extract(loader=loader)
    assert sorted(os.listdir(tmp_path / "store")) == [
        f"shard-0000{i}.safetensors" for i in range(3)
    ]
    Broken.fails = False
    extract(loader=loader)
    assert extract.batches == 2
    for name, content in files(tmp_path / "store").items():
        if name != "store.json":  # the data set is of another type
            shard = tmp_path / "whole" / name
            assert len(content) == shard.stat().st_size
    assert not model._forward_hooks


def test_a_stream_goes_on_without_the_forwards_of_finished_shards(model, tmp_path, files):
    x, y = torch.rand(10, 1, 8, 8), torch.arange(10)
    batches = [(x[i : i + 2], y[i : i + 2]) for i in range(0, 10, 2)]
    out = tmp_path / "s"

    def breaks(at):
        yield from batches[:at]
        if at < len(batches):
            raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        extract_features(model, breaks(3), "projection", out, shard_size=2)
    before = model.forwards
    extract_features(model, breaks(9), "projection", out, shard_size=2)
    assert model.forwards - before == 2
    extract_features(model, breaks(9), "projection", tmp_path / "t", shard_size=2)
    assert files(out) == files(tmp_path / "t")
    before = model.forwards
    extract_features(model, breaks(9), "projection", out, shard_size=2)
    assert model.forwards == before


def test_a_stream_that_gives_something_else_the_second_time_is_refused(model, tmp_path):
    def batches(*ids):
        return [(torch.ones(2, 1, 8, 8), [0, 1], list(i)) for i in ids]

    def run(*ids):
        return extract_features(model, batches(*ids), "projection", tmp_path, shard_size=2)

    run((0, 1), (2, 3), (4, 5))
    (tmp_path / "store.json").unlink()
    for other in ([(7, 1), (2, 3), (4, 5)], [(0, 1), (2, 4), (4, 5)], [(0, 1), (2, 3)]):
        with pytest.raises(
            RunError, match=r"the data|number of batches|other samples|fewer samples"
        ):
            run(*other)


def test_another_process_finds_the_same_fingerprint(python, tmp_path):
    """Whatever the order of sets and the addresses of objects."""
    script = """
import sys, timm, torch
from headplug import extract_features
torch.manual_seed(0)
model = timm.create_model("test_vit", num_classes=0)
known, half = {"red", "green", "blue"}, 0.5
class Scale:
    def __init__(self):
        self.by = 2.0
    def __call__(self, x):
        return x * self.by
scale = Scale()
def transform(x):
    return scale(x) if "red" in known and half in {0.5, 0.7} else x
seen = []
model.register_forward_pre_hook(lambda *_: seen.append(1))
batches = [(torch.rand(4, 3, 160, 160), torch.arange(4))]
extract_features(model, batches, "blocks.*", sys.argv[1], transform=transform, pool="cls")
print(len(seen))
"""
    out = tmp_path / "s"
    assert int(python(script, out, PYTHONHASHSEED="1")) == 1
    assert int(python(script, out, PYTHONHASHSEED="2")) == 0


# ---- kill ----------------------------------------------------------------------------------------

KILLED = """
import json, os, random, shutil, signal, sys, time
import torch
from pathlib import Path
from torch import nn
from torch.utils.data import DataLoader, Dataset
from headplug import extract_features

torch.set_num_threads(1)
folder = Path(sys.argv[1])
model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU())
forwards = []
model.register_forward_pre_hook(lambda *_: forwards.append(1))

class Slow(Dataset):
    def __len__(self):
        return 120
    def __getitem__(self, i):
        time.sleep(0.0003)
        return torch.full((1, 4, 4), i / 120), i

def run(out):
    return extract_features(model, DataLoader(Slow(), batch_size=2), ["1", "2"], out, shard_size=4)

def files(out):
    return {p.name: p.read_bytes() for p in out.iterdir()}

run(folder / "whole")
started = time.perf_counter()
run(folder / "timed")
took = time.perf_counter() - started
whole = files(folder / "whole")
draw = random.Random(0)
done, equal, least = [], [], []
for trial in range(20):
    out = folder / str(trial)
    child = os.fork()
    if not child:
        run(out)
        os._exit(0)
    time.sleep(draw.uniform(0, took))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    there = len(list(out.glob("shard-*.safetensors")))
    finished = (out / "store.json").exists()
    forwards.clear()
    store = run(out)
    equal.append(files(out) == whole and store.labels.tolist() == list(range(120)))
    least.append(len(forwards) == (0 if finished else 2 * (30 - there)))
    done.append(there)
print(json.dumps([done, equal, least]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="fork and SIGKILL")
def test_killed_at_twenty_moments_the_resumed_store_equals_the_uninterrupted_one(python, tmp_path):
    done, equal, least = json.loads(python(KILLED, tmp_path))
    assert all(equal)
    assert all(least)  # no whole shard is computed again
    assert len(set(done)) > 5, done  # the moments were different ones


# ---- damage --------------------------------------------------------------------------------------


def test_truncated_and_missing_shards_are_named_at_once_and_only_they_are_made_anew(
    extract, tmp_path, files
):
    extract()
    folder = tmp_path / "store"
    before = files(folder)
    shard = folder / "shard-00001.safetensors"
    whole = shard.read_bytes()
    for keep in (0, 4, 100, len(whole) - 1, None):
        shard.unlink()
        if keep is not None:
            shard.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=r"shard-00001.* missing or damaged.* same extra"):
            FeatureStore.open(folder)
        with pytest.warns(UserWarning, match=r"shard-00001.*made anew"):
            extract()
        assert extract.batches == 1
        assert files(folder) == before


def test_a_changed_bit_is_found_when_the_tap_is_read_and_only_its_shard_is_made_anew(
    extract, at, tmp_path, files
):
    """Any bit: of the features, the labels, the ids, or the header."""
    extract()
    folder = tmp_path / "store"
    before = files(folder)
    names = ["shard-00000.safetensors", "shard-00003.safetensors"]
    size = len(before[names[1]])
    start = 8 + int.from_bytes(before[names[1]][:8], "little")
    for position in (3, 20, start // 2, start - 40, *range(start, size, 41), size - 1):
        for name in names:
            content = bytearray(before[name])
            content[position] ^= 1 << position % 8
            (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="shard-00000"):
            [FeatureStore.open(folder)[tap] for tap in at]
        with pytest.raises(CheckpointError, match=r"(?s)shard-00000.*shard-00003"):
            FeatureStore.open(folder).verify()
        with pytest.warns(UserWarning, match=r"(?s)shard-00000.*shard-00003"):
            extract()
        assert extract.batches == 2
        assert files(folder) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FeatureStore.open(folder).verify()


def test_shards_of_another_store_are_noticed_and_made_anew(extract, at, tmp_path, files):
    extract()
    folder = tmp_path / "store"
    before = files(folder)
    extract(at=at[:2], out=tmp_path / "b")
    shutil.copy(tmp_path / "b" / "shard-00001.safetensors", folder)
    with pytest.raises(CheckpointError, match=r"shard-00001.* belongs to another store"):
        FeatureStore.open(folder)
    with pytest.warns(UserWarning, match=r"shard-00001.* made anew"):
        extract()
    assert extract.batches == 1
    assert files(folder) == before
    shutil.copy(tmp_path / "b" / "shard-00001.safetensors", folder)
    (folder / "store.json").unlink()
    with pytest.raises(RunError, match=r"shard-00001.safetensors holds .* extraction: the points"):
        extract()


def test_a_stray_shard_beside_a_finished_store_is_left_aside(extract, tmp_path, recwarn):
    extract(**a_loader())
    (stray := tmp_path / "store" / "shard-00009.safetensors").write_bytes(b"of nothing")
    assert len(extract(**a_loader())) == 23
    assert not recwarn.list
    assert stray.exists()


@pytest.mark.parametrize("indexed", [True, False])
def test_a_shard_copied_over_another_is_named_and_made_anew(extract, tmp_path, files, indexed):
    extract()
    folder = tmp_path / "store"
    before = files(folder)
    shutil.copy(folder / "shard-00002.safetensors", folder / "shard-00001.safetensors")
    if indexed:
        with pytest.raises(CheckpointError, match=r"shard-00001.*a copy of shard 2"):
            FeatureStore.open(folder)
    else:
        (folder / "store.json").unlink()
    with pytest.warns(UserWarning, match=r"shard-00001.* made anew"):
        extract()
    assert extract.batches == 1
    assert files(folder) == before


def test_any_changed_bit_of_the_index_is_noticed_and_the_index_written_anew(
    extract, tmp_path, files
):
    extract()
    folder = tmp_path / "store"
    before = files(folder)
    text = before["store.json"]
    at_digit = text.index(b"shard-00003") + len("shard-0000")
    for position in (at_digit, *range(1, len(text) - 1, 97)):
        content = bytearray(text)
        content[position] ^= 1
        (folder / "store.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"store.json cannot be used"):
            FeatureStore.open(folder)
        if position in (at_digit, 1):
            extract()
            assert extract.batches == 0
            assert files(folder) == before


@pytest.mark.skipif(sys.platform == "win32", reason="flock")
def test_two_extractions_into_one_folder_at_once_are_refused(model, tmp_path, monkeypatch):
    from headplug.store import folder

    monkeypatch.setattr(folder, "GRACE", 0.3)
    (tmp_path / "s").mkdir()
    partial = tmp_path / "s" / ".shard-00000.safetensors.17.partial"

    def batches(inner):
        yield torch.rand(2, 1, 8, 8), [0, 1]
        partial.write_bytes(b"half")
        if inner:
            with pytest.raises(RunError, match="another process is writing to"):
                extract_features(model, batches(False), "projection", tmp_path / "s")
            assert partial.exists()
        yield torch.rand(2, 1, 8, 8), [2, 3]

    assert len(extract_features(model, batches(True), "projection", tmp_path / "s")) == 4


def test_a_store_outlives_a_change_of_folder(model, loader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stores = [extract_features(model, loader, "projection", "s"), FeatureStore.open("s")]
    monkeypatch.chdir("/")
    assert all(store["projection"].shape == (23, 2) for store in stores)


def test_data_with_random_numbers_of_its_own_is_told_so(model, tmp_path):
    class Random(TensorDataset):
        draw = torch.Generator().manual_seed(0)

        def __getitem__(self, i):
            return torch.randn(1, 8, 8, generator=self.draw), i

    loader = DataLoader(Random(torch.zeros(9)), batch_size=3)
    extract_features(model, loader, "projection", tmp_path)
    with pytest.raises(RunError, match=r"the data changed.* random numbers.* without them"):
        extract_features(model, loader, "projection", tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"schema": 1, "points": ["a"], "shards": ["b"]}',
        '{"schema": 3}',
        '{"schema": 3, "points": [], "shards": []}',
    ],
)
def test_a_damaged_index_is_named_and_written_anew(extract, tmp_path, text, files):
    extract()
    before = files(tmp_path / "store")
    (tmp_path / "store" / "store.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"store.json cannot be used"):
        FeatureStore.open(tmp_path / "store")
    extract()
    assert extract.batches == 0
    assert files(tmp_path / "store") == before


def test_a_folder_without_a_store_tells_where_there_are_some(model, loader, tmp_path):
    with pytest.raises(CheckpointError, match=r"no finished feature store.*Check the path"):
        FeatureStore.open(tmp_path / "nothing")
    for split in ("test", "train"):
        extract_features(model, loader, "projection", tmp_path / "out" / split)
    with pytest.raises(CheckpointError, match=r"There is one in .*/out/test and .*/out/train"):
        FeatureStore.open(tmp_path / "out")


# ---- mixing --------------------------------------------------------------------------------------


def other_weights(model):
    with torch.no_grad():
        model.projection_head[2].bias[0] += 1e-7
    return {}


def other_statistics(model):
    model.backbone[1].running_mean[0] += 1e-7
    return {}


def other_stride(model):
    model.backbone[0].padding = (1, 1)
    return {}


def other_activation(model):
    model.backbone[2] = nn.GELU()
    return {}


def a_loader(change=lambda x: x, count=23, **options):
    torch.manual_seed(0)
    x, y = change(torch.randn(23, 1, 8, 8)), torch.randperm(23)
    options = {"batch_size": 5, **options}
    return {"loader": DataLoader(TensorDataset(x[:count], y[:count]), **options)}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_weights, "the model's weights"),
        (other_statistics, "the model's buffers"),
        (other_stride, "the model's layers"),
        (other_activation, "the model's layers"),
        (lambda _: {"at": ["projection"]}, r"the points \(.*backbone.3.* there, no other now\)"),
        (lambda _: {"at": [":Linear"]}, "the points"),
        (lambda _: {"pool": "flat"}, r"the pooling \(gap there, flat now\)"),
        (lambda _: {"pool": lambda x: x.flatten(1)}, "the pooling"),
        (lambda _: {"dtype": torch.float16}, r"the dtype \(float32 there, float16 now\)"),
        (lambda _: {"transform": lambda x: 2 * x}, "the transform"),
        (lambda _: a_loader(lambda x: x + 1e-6), "the data"),
        (lambda _: a_loader(count=22), r"the number of samples \(23 there, 22 now\) changed"),
        (lambda _: a_loader(sampler=range(22)), r"the number of samples"),
        (lambda _: a_loader(batch_size=3), r"the samples in a shard \(5 there, 3 now\)"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_extraction_is_refused_and_told_what_differs(
    extract, model, tmp_path, files, change, named, finished
):
    extract(**a_loader())
    if not finished:
        for name in ("store.json", "shard-00002.safetensors"):
            (tmp_path / "store" / name).unlink()
    before = files(tmp_path / "store")
    with pytest.raises(RunError, match=rf"another extraction: {named}.* Name another folder"):
        extract(**{**a_loader(), **change(model)})
    assert files(tmp_path / "store") == before


def test_autocast_is_part_of_what_must_be_the_same(extract):
    extract()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RunError, match=r"autocast \(off there, bfloat16 now\)"),
    ):
        extract()


FACTOR = 2.0


def test_transforms_are_told_apart_by_what_they_do(extract, monkeypatch, tmp_path):
    def scale(factor):
        return lambda x: x * factor

    extract(transform=scale(2.0))
    extract(transform=scale(2.0))
    assert extract.batches == 0
    for other in (scale(3.0), lambda x: x + 2.0, lambda x: x * FACTOR, nn.Identity()):
        with pytest.raises(RunError, match="the transform"):
            extract(transform=other)

    def constant(x):
        return x * FACTOR

    extract(transform=constant, out=tmp_path / "b")
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    with pytest.raises(RunError, match="the transform"):
        extract(transform=constant, out=tmp_path / "b")


# ---- limits --------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_is_a_run_error_at_once(python, tmp_path):
    """With a limit on file sizes, as a full disk gives; the loader would go on for ever."""
    script = """
import itertools, resource, signal, sys, torch
from torch import nn
from headplug import extract_features
from headplug.errors import RunError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sizes = itertools.chain((8, 8, 2000), itertools.repeat(8))
batches = ((torch.rand(n, 4), torch.arange(n)) for n in sizes)
try:
    extract_features(nn.Sequential(nn.ReLU()), batches, ["0"], sys.argv[1], shard_size=8)
except RunError as error:
    print("refused:", error)
"""
    printed = python(script, tmp_path / "s")
    assert re.search("refused: cannot write .*shard-00002.* Free space", printed), printed
    left = sorted(os.listdir(tmp_path / "s"))
    assert "store.json" not in left
    assert not [name for name in left if name.endswith("partial")]


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(extract, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("root may write everywhere")
    with pytest.raises(RunError, match="cannot write to"):
        extract(out=tmp_path / "locked" / "store")


MEMORY = """
import resource, sys, torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from headplug import FeatureStore, extract_features

class Data(Dataset):
    def __len__(self):
        return int(sys.argv[2])
    def __getitem__(self, i):
        return torch.full((64,), float(i)), i

model = nn.Sequential(nn.Linear(64, 512), nn.ReLU())
out = sys.argv[1]
store = extract_features(model, DataLoader(Data(), batch_size=128), ["0", "1"], out, shard_size=512)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
total = sum(part.sum().item() for part in store.parts("1"))
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
before = int(status["RssAnon"].split()[0]) / 1024
x = store["0"]
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(peak, len(store), int(status["RssAnon"].split()[0]) / 1024 - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_data(python, tmp_path):
    small, large = (
        [float(v) for v in python(MEMORY, tmp_path / str(n), n).split()] for n in (2000, 20000)
    )
    assert large[1] == 20000  # 82 MB of features
    assert large[0] < 1.1 * small[0]
    assert large[2] > 30  # only what is asked for whole is in memory whole
