"""Several processes of torch.distributed make one store, bit for bit as one process does."""

from __future__ import annotations

import json
import re

import pytest
import torch

from headplug import extract_features
from headplug.errors import RunError

SCRIPT = """
import copy, json, os, sys, time, traceback
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset
from headplug import FeatureStore, extract_features
from headplug.errors import HeadplugError
from headplug import ranks

torch.set_num_threads(1)
folder, size = Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
data = TensorDataset(torch.rand(61, 1, 4, 4), torch.randperm(61))
layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
model = nn.Sequential(*layers)
AT = ["2", "4"]

def run(loader, out=None, model=model):
    return extract_features(model, loader, AT, out, shard_size=8)

def files(out):
    return {p.name: p.read_bytes() for p in out.iterdir()}

def same(a, b):
    return (
        a.points == b.points and torch.equal(a.labels, b.labels) and list(a.ids) == list(b.ids)
        and all(torch.equal(a[p], b[p]) for p in a.points)
    )

def refused(work):
    started = time.perf_counter()
    try:
        work()
    except (HeadplugError, OSError) as error:
        return [type(error).__name__, str(error), time.perf_counter() - started]
    return None

one = run(DataLoader(data, batch_size=4), folder / "one")
whole = files(folder / "one")
cut = folder / "cut"
run(DataLoader(data, batch_size=4), cut)
for name in ("store.json", *(f"shard-0000{i}.safetensors" for i in (0, 3, 4, 6))):
    (cut / name).unlink()

class Broken(Dataset):
    def __init__(self, how):
        self.how = how
    def __len__(self):
        return 61
    def __getitem__(self, i):
        if dist.get_rank() == 1 and i in self.how:
            self.how[i]()
        return data[i]

def fail():
    raise OSError("the disk of rank 1 went away")

def work(rank):
    found = {}
    found["plain"] = same(run(DataLoader(data, batch_size=4, shuffle=True), folder / "a"), one)
    sampler = DistributedSampler(data)
    found["memory"] = same(run(DataLoader(data, batch_size=4, sampler=sampler)), one)
    found["sampler"] = same(run(DataLoader(data, batch_size=4, sampler=sampler), folder / "b"), one)
    found["resumed"] = same(run(DataLoader(data, batch_size=4), cut), one)
    found["finished"] = same(run(DataLoader(data, batch_size=4), folder / "one"), one)

    rows = list(sampler)  # with padding
    x, y = data.tensors
    parts = [torch.tensor(rows[i : i + 4]) for i in range(0, len(rows), 4)]
    with_ids = [(x[p], y[p], p) for p in parts]
    for name, out in (("stream", folder / "c"), ("stream in memory", None)):
        store = run(with_ids, out)
        found[name] = (
            store.ids.tolist() == list(range(61))
            and torch.equal(store.labels, one.labels)
            and all(torch.allclose(store[p], one[p], atol=1e-6) for p in AT)
        )
    (folder / "c" / "store.json").unlink(missing_ok=True)
    found["stream again"] = len(run(with_ids, folder / "c"))
    found["no ids"] = refused(lambda: run([(x[p], y[p]) for p in parts]))

    model[1].running_mean += rank  # as plain BatchNorm leaves it under DDP
    state = model[1].running_mean.clone()
    found["buffers"] = same(run(DataLoader(data, batch_size=4)), one)
    found["buffers back"] = torch.equal(model[1].running_mean, state)
    with torch.no_grad():
        bias = model[4].bias.clone()
        model[4].bias += rank
    found["weights"] = refused(lambda: run(DataLoader(data, batch_size=4), folder / "d"))
    with torch.no_grad():
        model[4].bias.copy_(bias)

    other = folder / ("g" if rank else "h")
    found["out"] = refused(lambda: run(DataLoader(data, batch_size=4), other))
    found["no out"] = refused(lambda: run(DataLoader(data, batch_size=4), None if rank else other))
    found["at"] = refused(
        lambda: extract_features(model, DataLoader(data), AT[: rank or 2], folder / "i")
    )

    plain = DataLoader(data, batch_size=4)
    alone = rank == 0 and extract_features(model, plain, AT, distributed=False)
    found["alone"] = rank > 0 or same(alone, one)
    bad = DataLoader(Broken({9: fail}), batch_size=4)
    found["fails"] = refused(lambda: run(bad, folder / "e"))

    mesh = init_device_mesh("cpu", (size,))
    spread = copy.deepcopy(model)
    fully_shard(spread[4], mesh=mesh)
    fully_shard(spread, mesh=mesh)
    found["spread"] = same(run(plain, model=spread), one)
    found["spread in files"] = same(run(plain, folder / "j", spread), one)
    found["spread again"] = same(run(plain, folder / "j", spread), one)
    with torch.no_grad():  # it still computes; its backward over gloo fails now and then
        spread.eval()(x[:4])
    few = [] if rank else with_ids[:2]  # only one of them has anything to run
    found["spread, nothing here"] = len(run(few, None, spread))
    few = with_ids[: 1 + rank]
    store = run(few, None, spread)
    found["spread unevenly"] = torch.allclose(store["4"], one["4"][store.ids], atol=1e-6)
    found["spread fails"] = refused(lambda: run(bad, folder / "k", spread))
    flat = FullyShardedDataParallel(copy.deepcopy(model), device_id=torch.device("cpu"))
    found["flat"] = refused(lambda: run(plain, None, flat))
    dead = DataLoader(Broken({9: lambda: os._exit(7)}), batch_size=4)
    found["dies"] = refused(lambda: run(dead, folder / "f"))
    ranks.MEETING = timedelta(seconds=2)
    found["absent"] = refused(lambda: run(plain))
    return found

children = []
for rank in range(size):
    child = os.fork()
    if not child:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size,
            timeout=timedelta(seconds=60),
        )
        try:
            found = work(rank)
            (folder / f"rank{rank}.json").write_text(json.dumps(found))
        except Exception:
            (folder / f"error{rank}.txt").write_text(traceback.format_exc())
        finally:
            sys.stdout.flush()
            os._exit(0)
    children.append(child)
for child in children:
    os.waitpid(child, 0)
found = [json.loads(p.read_text()) for p in sorted(folder.glob("rank*.json"))]
equal = {name: files(folder / name) == whole for name in ("a", "b", "cut", "one")}
print(json.dumps([found, equal]))
"""


@pytest.mark.parametrize("size", [2, 3])
def test_processes_make_what_one_makes(python, tmp_path, size):
    found, equal = json.loads(python(SCRIPT, tmp_path, size))
    assert equal == dict.fromkeys(("a", "b", "cut", "one"), True)
    errors = [path.read_text() for path in tmp_path.glob("error*.txt")]
    assert len(found) == size - 1, errors  # the one that dies reports nothing
    for rank, one in enumerate(found):
        for name in (
            "plain", "memory", "sampler", "resumed", "finished", "stream", "stream in memory",
            "buffers", "buffers back", "alone", "spread", "spread in files", "spread again",
            "spread unevenly",
        ):  # fmt: skip
            assert one[name] is True, (rank, name)
        assert one["stream again"] == 61
        assert one["no ids"][0] in ("DataError", "RunError")
        assert "whose samples have no ids" in one["no ids"][1]
        assert "process 1 has others than process 0" in one["weights"][1]
        assert "the model's weights" in one["weights"][1]
        for name in ("out", "no out"):
            assert "all processes must pass the same out" in one[name][1]
        assert re.search(r"the points \(4 on process 0, no other on process 1\)", one["at"][1])
        assert "the other processes do not take part" in one["absent"][1]
        assert one["absent"][2] < 30
        for name in ("fails", "spread fails"):
            assert one[name][0] == "RunError"  # on the processes where nothing failed
            assert "process 1 of" in one[name][1]
            assert "the disk of rank 1 went away" in one[name][1]
            assert one[name][2] < 30
        assert one["spread, nothing here"] == 8
        assert "Use fully_shard" in one["flat"][1]
        assert one["dies"][0] == "RunError"
        assert one["dies"][2] < 30


def test_started_by_a_launcher_without_a_process_group_is_refused(model, loader, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"init_process_group\('gloo'\).*distributed=False"):
        extract_features(model, loader, "projection")
    assert len(extract_features(model, loader, "projection", distributed=False)) == 23
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert len(extract_features(model, loader, "projection")) == 23
    assert not torch.distributed.is_initialized()
