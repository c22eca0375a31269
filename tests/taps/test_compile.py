"""Taps and torch.compile: no graph breaks, no recompilation, never silently empty."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from headplug import features, tap
from headplug.errors import TapError
from headplug.taps import Tap
from headplug.taps.options import requested
from headplug.taps.points import Layout
from headplug.taps.reading import Reader


class Graphs:
    """A backend that runs graphs as they are and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph

    def operations(self):
        return [n.name for g in self.graphs for n in g.graph.nodes if n.op.startswith("call")]


class Model(nn.Module):
    """A module that is called twice, one that works in place, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 8))
        self.projection_head = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x):
        return self.projection_head(self.backbone(x) + self.backbone(2 * x))


POINTS = ["backbone", "backbone.0", "pre_projection", "projection", "projection.hidden1"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def expected(x):
    with tap(model := Model(), *POINTS, clone=True) as taps:
        model(x)
    return taps


def compiled(model, how, **options):
    """The model to tap, and what to call."""
    if how == "torch.compile":
        model = torch.compile(model, **options)
    elif how == "model.compile":
        model.compile(**options)
    elif how == "method":
        model.forward = torch.compile(model.forward, **options)
    elif how == "part":
        model.backbone = torch.compile(model.backbone, **options)
    elif how == "function":
        return model, torch.compile(lambda x: model(x), **options)
    return model, model


def assert_equal(found, reference):
    for point in POINTS:
        assert len(found[point]) == len(reference[point])
        assert all(map(torch.equal, found[point], reference[point])), point


@pytest.mark.parametrize(
    "how", ["torch.compile", "model.compile", "method", "part", "in the block"]
)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_hooks_before_the_first_call_are_compiled_in_whole_and_once(how, backend):
    model, x = Model(), torch.rand(3, 4)
    reference = expected(x)
    options = {"backend": backend, "fullgraph": True}
    model, run = compiled(model, how, **options)
    with tap(model, *POINTS) as taps:
        if how == "in the block":
            run = torch.compile(model, **options)
        for i in range(4):
            with torch._dynamo.config.patch(error_on_recompile=i > 0 and how != "part"):
                out = run(x)
            assert_equal(taps, reference)
            assert torch.equal(out, taps["projection"][0])
            taps.clear()
        run(x), run(x)  # unread, they come one after the other
        assert len(taps["projection"]) == 2
    taps.clear()
    run(x)
    with pytest.raises(TapError, match="never reached"):
        taps["projection"]  # no hook lives on in compiled code
    run(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(x)  # and it is compiled once for that


@pytest.mark.parametrize("how", ["torch.compile", "model.compile", "method", "part", "function"])
def test_what_was_compiled_before_is_compiled_once_more_and_is_as_before_after_it(how):
    backend = Graphs()
    model, x = Model(), torch.rand(3, 4)
    reference = expected(x)
    options = {"backend": backend, "fullgraph": True}
    model, run = compiled(model, how, **options)
    run(x)
    before = len(backend.graphs)
    for _ in range(10):  # more blocks than torch compiles one function for
        with tap(model, *POINTS) as taps:
            for _ in range(20):  # and more calls; nothing is read in between
                run(x)
        assert all(len(taps[p]) == 20 * len(reference[p]) for p in POINTS)
        assert all(map(torch.equal, taps["projection"], 20 * reference["projection"]))
        assert len(backend.graphs) == 2 * before
        with torch._dynamo.config.patch(error_on_recompile=True):
            run(x)
    with tap(model, "backbone", calls="last") as taps:
        for _ in range(20):
            run(x)
    assert torch.equal(taps["backbone"], reference["backbone"][1])


def test_nested_blocks_of_compiled_models_both_read():
    model, x = torch.compile(Model(), backend="eager"), torch.rand(3, 4)
    model(x)
    with tap(model, "projection") as outer:
        model(x)
        with tap(model, "projection", "backbone") as inner:
            model(x)
        model(x)
    assert (len(outer["projection"]), len(inner["projection"])) == (3, 1)
    assert len(inner["backbone"]) == 2


def test_losses_act_on_what_compiled_code_gives():
    model, plain, x = torch.compile(Model(), backend="aot_eager"), Model(), torch.rand(3, 4)
    for m in (model, plain):
        with tap(m, "pre_projection") as taps:
            m(x)
        taps["pre_projection"][0].square().mean().backward()
    for ours, reference in zip(model.parameters(), plain.parameters(), strict=True):
        zero = torch.zeros_like(reference)  # compiled code has zeros where there is no gradient
        assert torch.allclose(ours.grad, zero if reference.grad is None else reference.grad)
    assert plain.backbone[0].weight.grad.abs().sum() > 0


def test_gradients_are_read_in_an_eager_run():
    model, plain, x = torch.compile(Model(), backend="aot_eager"), Model(), torch.rand(3, 4)
    found = []
    for m in (model, plain):
        with tap(m, "pre_projection", gradients=True) as taps:
            m(x).square().mean().backward()
        found.append(taps.gradient("pre_projection")[0])
    assert torch.equal(*found)


def test_early_exit_is_compiled_in():
    backend = Graphs()
    wrapped = timm.create_model("test_resnet", num_classes=0).eval()
    model, x = torch.compile(wrapped, backend=backend, fullgraph=True), torch.rand(2, 3, 32, 32)
    model(x)
    whole = len(backend.operations())
    layout, at = Layout(model), ["layer2", "layer1"]
    asked = layout.resolve(requested(at, Tap("", 0)))
    for _ in range(9):  # more readers than torch compiles one function for
        backend.graphs.clear()
        with Reader(layout, at, asked, compiled=True) as read:
            found = [f.clone() for f in read(x).read()]
            assert 0 < len(backend.operations()) < 0.7 * whole
            for _ in range(2):
                with torch._dynamo.config.patch(error_on_recompile=True):
                    again = read(x).read()
            assert all(map(torch.equal, found, again))
        assert all(map(torch.equal, found, features(wrapped, x, at)))
    with torch._dynamo.config.patch(error_on_recompile=True):
        model(x)  # the user's own compiled code is as it was


@pytest.mark.filterwarnings("ignore:Dynamo does not know", "ignore:Dynamo detected a call")
def test_features_of_a_compiled_model_and_in_a_compiled_function():
    wrapped, x = Model().eval(), torch.rand(3, 4)
    reference = features(wrapped, x, POINTS)
    model = torch.compile(wrapped, backend="eager")
    for _ in range(2):
        assert all(map(torch.equal, features(model, x, POINTS), reference))
        model(x)
    function = torch.compile(lambda x: features(wrapped, x, "backbone.0") + 1, backend="eager")
    assert torch.equal(function(x), reference[1] + 1)
