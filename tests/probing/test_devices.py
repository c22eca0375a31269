"""What probes do on a GPU, tried without one: tensors that have a device and no values.

An operation that mixes devices, or asks for a value, is an error there.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headplug.probing import linear, logistic, mlp, ridge
from headplug.probing.data import Targets
from headplug.probing.lbfgs import MEMORY, _direction
from headplug.probing.linear import LinearSetting, LinearTraining
from headplug.probing.mlp import MLPSetting
from headplug.probing.ridge import RidgeSetting

GPU = torch.device("cuda:0")


class OnlyOn(TorchDispatchMode):
    """Refuses operations on tensors that are elsewhere, also copies from or to there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, FakeTensor):
                assert leaf.device == GPU, f"{func} on {leaf.device}"
        return out


def on_gpu(*shape, kind="classes"):
    """Features and targets."""
    x = torch.randn(*shape, device=GPU)
    values = {
        "classes": lambda: torch.zeros(len(x), dtype=torch.long, device=GPU),
        "multilabel": lambda: torch.zeros(len(x), 3, dtype=torch.bool, device=GPU),
        "regression": lambda: torch.zeros(len(x), 3, device=GPU),
    }[kind]()
    return x, Targets(kind, values, 3)


KINDS = ("classes", "multilabel", "regression")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": True}, {"momentum": 0.0, "schedule": "plateau"}],
    ids=["cosine", "nesterov", "plateau"],
)
def test_a_step_of_linear_probes_stays_on_the_gpu(kind, options):
    with FakeTensorMode():
        x, y = on_gpu(40, 8, kind=kind)
        grid = [LinearSetting(0.1, wd, how) for how in ("standard", "l2", "none") for wd in (0, 1)]
        moments = torch.zeros(8, device=GPU), torch.ones(8, device=GPU)
        joint = linear.Joint(grid, LinearTraining(**options), y, *moments, 2, 10, 0)
        with OnlyOn(), torch.no_grad():
            for _ in range(2):  # an epoch
                joint.step(x, y.values)
            joint.validate(x, y)
        assert {sgd.weight.device for sgd in joint.sgd.values()} == {GPU}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_mlp_probes_stays_on_the_gpu(kind):
    with FakeTensorMode():
        x, y = on_gpu(40, 8, kind=kind)
        net = mlp._Training([MLPSetting(0.1), MLPSetting(0.2)], y, 8, 10, 0, GPU)
        with OnlyOn(), torch.no_grad():
            net.step(x, y.values)
            net.step(x, y.values)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_an_evaluation_of_logistic_regression_stays_on_the_gpu(kind):
    with FakeTensorMode(), OnlyOn(), torch.no_grad():
        x, y = on_gpu(40, 8, kind=kind)
        problem = logistic._Problem(x, y)
        weight, bias = torch.zeros(2, 3, 8, device=GPU), torch.zeros(2, 3, device=GPU)
        problem._loss(weight, bias)
        problem._gap(weight, bias, torch.ones(2, device=GPU))
        memory = torch.zeros(2, MEMORY, 27, device=GPU)
        _direction(memory[:, 0], memory, memory, memory[:, :, 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 8), (8, 40)], ids=["tall", "wide"])
def test_ridge_is_fitted_on_the_gpu(kind, shape, monkeypatch):
    """Whole, but for the check that the features are finite; penalties come from the host."""
    monkeypatch.setattr(ridge, "check_features", lambda features: features)
    with FakeTensorMode():
        models = ridge.fit_ridge(*on_gpu(*shape, kind=kind), [RidgeSetting(0.1), RidgeSetting(1)])
    assert models.left_out.device == models.weight.device == GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_step_of_linear_probes_can_be_captured_in_a_cuda_graph():
    """Rates are read from the device, batches from one place: replayed, it gives the same."""
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0)).to(GPU)
    y, moments = (x[:, 0] > 0).long(), (x.double().mean(0), x.double().std(0))
    grid = [LinearSetting(lr, 1e-3) for lr in (0.01, 0.1)]
    found = []
    for capture in (False, True):
        joint = linear.Joint(grid, LinearTraining(), Targets("classes", y, 2), *moments, 4, 40, 0)
        sgd, graph, batch = (
            joint.sgd["standard"],
            torch.cuda.CUDAGraph(),
            (x[:250] + 0, y[:250] + 0),
        )
        with torch.no_grad():
            for step in range(40):
                rows = slice(step % 4 * 250, step % 4 * 250 + 250)
                batch[0].copy_(x[rows]), batch[1].copy_(y[rows])
                if capture and step == 3:  # after some to warm up; capturing runs nothing
                    torch.cuda.synchronize()
                    with torch.cuda.graph(graph):
                        sgd.descend(*batch)
                    sgd.descend = lambda *_, graph=graph: graph.replay()
                sgd.step(*batch)
        found.append(sgd.weight.clone())
    torch.testing.assert_close(*found)
