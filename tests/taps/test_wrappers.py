"""Models inside FSDP and activation checkpointing, and models that cannot be tapped."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torchvision.models.feature_extraction import create_feature_extractor

from headplug import features, list_taps, tap
from headplug.errors import TapError

FSDP = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from headplug import features, tap
rank, file = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
        self.projection_head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    def forward(self, x):
        return self.projection_head(self.backbone(x))

def first(model):
    inner = FullyShardedDataParallel(model.backbone[1], device_id=torch.device("cpu"))
    model.backbone[1] = inner
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))

def second(model):
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.backbone, mesh=mesh)
    return fully_shard(model, mesh=mesh)

points = ["backbone", "backbone.1.0", "pre_projection", "projection.hidden1", "projection"]
torch.manual_seed(1)
x = torch.rand(3, 4)
with tap(Model(), "backbone") as _: pass
for shard in (first, second):
    plain, model = Model(), shard(Model())
    expected = features(plain, x, points)
    for _ in range(2):
        with tap(model, *points) as taps:
            model(x).sum().backward()
        for point, value in zip(points, expected):
            assert torch.allclose(taps[point][0], value), (shard, point)
        # both ranks take part; weights that another layer still needs are gathered in step
        found = features(model, x, points[:2])
        assert all(map(torch.allclose, found, expected)), shard
        model(x).sum().backward()
print("fine")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_both_generations_of_fsdp_in_two_processes(on_two_processes):
    on_two_processes(FSDP)


def test_checkpointed_blocks_have_their_usual_names():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), checkpoint_wrapper(nn.Sequential(nn.Linear(8, 2))))
    x = torch.rand(3, 4, requires_grad=True)
    with tap(model, "1", "1.0") as taps:
        out = model(x)
        out.sum().backward()
    assert len(taps["1.0"]) == 1  # the second forward is not read
    assert torch.equal(taps["1.0"][0], out)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("use", [lambda m, x: features(m, x, "0"), list_taps])
@pytest.mark.parametrize("how", ["program", "module", "script", "trace"])
def test_models_without_calls_of_modules_are_refused_with_the_reason(how, use):
    model, x = nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.rand(3, 4)
    if how in ("program", "module"):
        model = torch.export.export(model, (x,))
        model, reason = model.module() if how == "module" else model, "before torch.export"
    else:
        model = torch.jit.script(model) if how == "script" else torch.jit.trace(model, x)
        reason = "TorchScript runs without hooks"
    with pytest.raises(TapError, match=reason):
        use(model, x)


def test_what_is_no_module_is_refused():
    with pytest.raises(TapError, match=r"taps read an nn.Module, not a function"):
        features(lambda x: x, torch.rand(1), "0")


def test_traced_graphs_that_call_modules_can_be_tapped():
    model, x = torchvision.models.resnet18(num_classes=2).eval(), torch.rand(1, 3, 32, 32)
    graph = create_feature_extractor(model, ["layer2"])
    at = ["layer1.1.conv2", "layer2.0.conv1:input"]
    assert all(map(torch.equal, features(graph, x, at), features(model, x, at)))
    unflat = torch.export.unflatten(torch.export.export(model, (x,)))
    found = features(unflat, x, "layer1")
    assert torch.allclose(found, features(model, x, "layer1"), atol=1e-5)
