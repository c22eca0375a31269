from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import time
import weakref
from collections import Counter
from contextlib import contextmanager
from statistics import median

import pytest
import timm
import torch
import torchvision
from lightly.models.modules import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    MAEDecoderTIMM,
    MaskedVisionTransformerTIMM,
    SimCLRProjectionHead,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

import headplug
from headplug import features, list_taps, tap
from headplug.errors import SlotError, TapError, UnknownNameError
from headplug.taps.recorder import RECORDER

MODELS = {
    "resnet18": {},
    "convnext_atto": {"drop_path_rate": 0.2},
    "vit_tiny_patch16_224": {"img_size": 32, "drop_path_rate": 0.2, "proj_drop_rate": 0.1},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "drop_path_rate": 0.2},
    "efficientnet_b0": {"drop_rate": 0.2},
    "regnety_002": {},
}
built: dict[str, nn.Module] = {}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def make(name: str) -> nn.Module:
    """A model of its own, with weights that are the same every time."""
    if name not in built:
        torch.manual_seed(0)
        if name == "torchvision":
            built[name] = torchvision.models.resnet18(num_classes=10)
        elif name in MODELS:
            built[name] = timm.create_model(name, num_classes=10, **MODELS[name])
        else:
            built[name] = {"simclr": SimCLR, "lightning": Lightning, "byol": BYOL}[name]()
    return copy.deepcopy(built[name])


def images(name: str, count: int = 4) -> torch.Tensor:
    size = MODELS.get(name, {}).get("img_size", 32)
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def backbone() -> nn.Module:
    """As in lightly's examples: maps (B, 512, 1, 1)."""
    return nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])


class SimCLR(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = backbone()
        self.projection_head = SimCLRProjectionHead(512, 64, 32)

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(1))


class Lightning(SimCLR):
    """The head is only called by the training step, once per view."""

    def forward(self, x):
        return self.backbone(x).flatten(1)

    def training_step(self, views):
        z0, z1 = (self.projection_head(self(v)) for v in views)
        return -nn.functional.cosine_similarity(z0, z1).mean()


class BYOL(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = backbone()
        self.projection_head = BYOLProjectionHead(512, 64, 32)
        self.prediction_head = BYOLPredictionHead(32, 64, 32)
        self.backbone_momentum = copy.deepcopy(self.backbone).requires_grad_(False)
        self.projection_head_momentum = copy.deepcopy(self.projection_head).requires_grad_(False)

    def forward(self, x):
        return self.prediction_head(self.projection_head(self.backbone(x).flatten(1)))

    def forward_momentum(self, x):
        return self.projection_head_momentum(self.backbone_momentum(x).flatten(1)).detach()


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


class Head(nn.Module):
    """Plain PyTorch, small enough to look through."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.projection_head = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x):
        return self.projection_head(self.backbone(x))


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything that a training step leaves behind."""
    torch.manual_seed(7)
    out = model(x)
    out.square().mean().backward()
    left = {"out": out.detach(), "rng": torch.get_rng_state()}
    left |= {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return left | {f"state {n}": t for n, t in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def hook_count(model: nn.Module) -> int:
    return sum(
        len(d)
        for m in model.modules()
        for d in (
            m._forward_hooks,
            m._forward_pre_hooks,
            m._forward_hooks_with_kwargs,
            m._forward_pre_hooks_with_kwargs,
            m._forward_hooks_always_called,
            m._backward_hooks,
        )
    ) + sum(RECORDER in vars(m) for m in model.modules())


@contextmanager
def watched(model: nn.Module, log: list[str]):
    """Logs starts and ends of all modules' calls with plain hooks."""
    handles = []
    for path, module in model.named_modules():
        handles += [
            module.register_forward_pre_hook(lambda *_, p=path: log.append(f"start {p}")),
            module.register_forward_hook(lambda *_, p=path: log.append(f"end {p}")),
        ]
    yield
    for handle in handles:
        handle.remove()


# ---- tapping leaves no trace ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MODELS, "torchvision", "simclr", "byol"])
def test_training_step_is_bit_identical_with_every_module_tapped(name):
    x = images(name)
    bare, tapped = make(name).train(), make(name).train()
    with tap(tapped, "**", "**:input") as taps:
        left = step(tapped, x)
    assert_same(step(bare, x), left)
    assert len(taps) > 20
    assert hook_count(tapped) == 0


def test_lightning_step_is_bit_identical_and_keeps_one_tensor_per_view():
    views = [images("lightning"), images("lightning") * 0.5]
    bare, tapped = make("lightning").train(), make("lightning").train()
    with tap(tapped, "backbone", "pre_projection", "projection") as taps:
        loss = tapped.training_step(views)
        loss.backward()
    expected = bare.training_step(views)
    expected.backward()
    assert torch.equal(loss, expected)
    assert_same(bare.state_dict(), tapped.state_dict())
    assert_same(
        {n: p.grad for n, p in bare.named_parameters()},
        {n: p.grad for n, p in tapped.named_parameters()},
    )
    reference = make("lightning").train()
    for view, h, z in zip(views, taps["pre_projection"], taps["projection"], strict=True):
        assert torch.equal(h, reference(view))
        assert torch.equal(z, reference.projection_head(h))
    assert taps["backbone"][0].shape == (4, 512, 1, 1)


def test_gradients_flow_through_taps_and_detach_cuts_them():
    model, x = small(), torch.rand(3, 4)
    with tap(model, "1") as taps:
        model(x)
    taps["1"][0].sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
    assert model[2].weight.grad is None
    with tap(model, "1", "1:input", detach=True) as taps:
        model(x)
    assert not taps["1"][0].requires_grad
    assert not taps["1:input"][0].requires_grad


# ---- what is read equals the oracles -------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_stages_equal_timm_forward_intermediates(name):
    model, x = make(name).eval(), images(name)
    info = model.feature_info
    modules = [i["module"] for i in (info if isinstance(info, list) else info.info)]
    options = {"norm": False} if "vit" in name else {}
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True, **options)
    with tap(model, *modules) as taps, torch.no_grad():
        model(x)
    found = features(model, x, modules)
    assert len(expected) == len(found) >= 4
    for path, oracle, value in zip(modules, expected, found, strict=True):
        assert torch.equal(value, taps[path][0])
        if "vit" in name:  # tokens, the class token first; the oracle gives maps
            side = oracle.shape[-1]
            value = value[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        elif "swin" in name:
            value = value.permute(0, 3, 1, 2)
        assert torch.equal(value, oracle)


def test_every_point_equals_torchvisions_feature_extractor():
    model, x = make("torchvision").eval(), images("torchvision")
    points = ["conv1", "bn1", "maxpool", "layer1.0.bn2", "layer1", "layer2", "layer3", "layer4"]
    points += ["layer2.0.downsample", "avgpool", "fc"]
    extractor = create_feature_extractor(copy.deepcopy(model), points)
    for module in extractor.modules():  # the oracle itself is not safe from in-place changes
        if isinstance(module, nn.ReLU):
            module.inplace = False
    with torch.no_grad():
        expected = extractor(x)
    found = features(model, x, points)
    for point, value in zip(points, found, strict=True):
        torch.testing.assert_close(features(model, x, point), value, rtol=0, atol=0)
        if point != "layer1.0.bn2":  # `out += identity` changes the extractor's
            assert torch.equal(value, expected[point]), point
    bn2 = model.layer1[0].bn2
    with torch.no_grad():
        assert torch.equal(
            found[points.index("layer1.0.bn2")], bn2(features(model, x, "layer1.0.bn2:input"))
        )


@pytest.mark.parametrize("name", ["simclr", "lightning"])
def test_shared_names_are_what_the_head_receives_and_returns(name):
    model, x = make(name).eval(), images(name)
    with torch.no_grad():
        maps = model.backbone(x)
        h = maps.flatten(1)
        z = model.projection_head(h)
    found = features(model, x, ["projection", "pre_projection", "backbone"])
    for value, expected in zip(found, [z, h, maps], strict=True):
        assert torch.equal(value, expected)
    inner = features(model, x, "projection_head.layers.0")
    assert torch.equal(inner, model.projection_head.layers[0](h))
    assert torch.equal(features(model, x, "projection:input"), h)
    assert torch.equal(features(model, x, "backbone:input"), x)


def test_the_online_head_is_meant_where_there_is_an_ema_twin():
    model, x = make("byol").eval(), images("byol")
    with tap(model, "projection", "projection_head_momentum", "backbone") as taps:
        model(x), model.forward_momentum(x)
    with torch.no_grad():
        h = model.backbone(x)
        torch.testing.assert_close(taps["projection"][0], model.projection_head(h.flatten(1)))
    assert len(taps["projection"]) == len(taps["projection_head_momentum"]) == 1
    assert len(taps["backbone"]) == 1


def test_keyword_arguments_are_read_as_inputs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.none = nn.ReLU(), Nothing()

        def forward(self, x):
            return self.a(input=x) + self.none()

    class Nothing(nn.Module):
        def forward(self):
            return 1

    x = torch.rand(2, 3)
    model = Model()
    assert features(model, x, "a:input") is x
    with tap(model, "a:input", "none:input", "none") as taps:
        model(x)
    assert taps["a:input"][0] is x
    assert taps["none:input"] == [None]
    assert taps["none"] == [1]


def test_nested_outputs_are_detached_copied_and_watched():
    class Parts(nn.Module):
        def forward(self, x):
            return {"a": x * 2, "b": [x + 1, "text"]}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = Parts()

        def forward(self, x):
            parts = self.parts(x)
            return parts["b"][0].mul_(0) + parts["a"]

    x = torch.ones(2, requires_grad=True)
    model = Model()
    with tap(model, "parts") as taps:
        model(x)
    with pytest.raises(TapError, match="clone=True"):
        taps["parts"]
    with tap(model, "parts", clone=True, detach=True) as taps:
        model(x)
    value = taps["parts"][0]
    assert value["b"][1] == "text"
    assert torch.equal(value["b"][0], torch.full((2,), 2.0))
    assert not value["a"].requires_grad
    assert torch.equal(features(model, x, ["parts", "parts:input"])[0]["a"], torch.full((2,), 2.0))


# ---- features ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("resnet18", "layer1"),
        ("resnet18", "layer2.0.bn1:input"),
        ("convnext_atto", "stages.1"),
        ("vit_tiny_patch16_224", "blocks.3.attn"),
        ("torchvision", "relu"),
        ("simclr", "pre_projection"),
        ("simclr", "projection_head.layers.2"),
    ],
)
def test_features_call_no_module_deeper_than_needed(name, point):
    model, x = make(name).eval(), images(name)
    whole: list[str] = []
    short: list[str] = []
    path, _, takes_input = point.partition(":")
    if point == "pre_projection":
        path, takes_input = "projection_head", "input"
    with watched(model, whole), torch.no_grad():
        model(x)
    with watched(model, short):
        features(model, x, point)
    last = whole.index(f"start {path}" if takes_input else f"end {path}")
    assert short == whole[: last + 1]
    assert len(short) < len(whole)


def test_features_stop_at_the_deepest_of_several_points():
    model, x = make("resnet18").eval(), images("resnet18")
    log: list[str] = []
    with watched(model, log):
        features(model, x, ["layer2", "layer1"])
    assert log[-1] == "end layer2"


def test_features_have_no_grad_unless_asked():
    model, x = make("simclr").eval(), images("simclr")
    assert not features(model, x, "backbone").requires_grad
    assert torch.is_grad_enabled()
    value = features(model, x, ["1", "backbone"][1:], grad=True)[0]
    value.sum().backward()
    assert model.backbone[0].weight.grad is not None
    with torch.no_grad():
        assert features(model, x, "backbone", grad=True).requires_grad


def test_request_shape_is_result_shape():
    model, x = make("resnet18").eval(), images("resnet18")
    assert isinstance(features(model, x, "layer1"), torch.Tensor)
    as_list = features(model, x, ["layer2", "layer1"])
    assert [v.shape[1] for v in as_list] == [128, 64]
    as_tuple = features(model, x, ("layer1",))
    assert torch.equal(as_tuple[0], as_list[1])
    as_dict = features(model, x, {"deep": "layer2", "shallow": "layer1"})
    assert list(as_dict) == ["deep", "shallow"]
    assert torch.equal(as_dict["deep"], as_list[0])
    glob = features(model, x, "layer*")
    assert list(glob) == ["layer1", "layer2", "layer3", "layer4"]
    mixed = features(model, x, {"all": "layer[12]", "one": "layer1"})
    assert list(mixed["all"]) == ["layer1", "layer2"]
    assert torch.equal(mixed["one"], mixed["all"]["layer1"])


def test_features_give_the_first_call_of_a_module_called_often():
    model, x = make("torchvision").eval(), images("torchvision")
    with tap(model, "layer1.0.relu", clone=True) as taps, torch.no_grad():
        model(x)
    first, second = taps["layer1.0.relu"]
    assert torch.equal(features(model, x, "layer1.0.relu"), first)
    assert torch.equal(features(model, x, ["layer1.0.relu", "layer2"])[0], first)
    assert not torch.equal(first, second)


def test_features_are_right_where_later_modules_work_in_place_and_run_the_model_once():
    model, x = make("torchvision").train(), images("torchvision")
    reference = make("torchvision").train()
    seen = {}
    for path in ("bn1", "layer1.0.bn2"):
        module = reference.get_submodule(path)
        module.register_forward_hook(lambda m, a, out, p=path: seen.update({p: out.clone()}))
    reference(x)
    found = features(model, x, ["bn1", "layer1.0.bn2", "fc"])
    assert torch.equal(found[0], seen["bn1"])
    assert torch.equal(found[1], seen["layer1.0.bn2"])
    assert_same(reference.state_dict(), model.state_dict())  # statistics moved once


def test_features_leave_no_hooks_and_no_state():
    model, x = make("resnet18").eval(), images("resnet18")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    features(model, x, ["layer1", "layer2"])
    assert hook_count(model) == 0
    assert torch.equal(rng, torch.get_rng_state())
    assert_same(before, model.state_dict())


def test_features_say_when_the_forward_pass_does_not_reach_a_point():
    model, x = make("byol").eval(), images("byol")
    with pytest.raises(TapError, match="'backbone_momentum' was never reached"):
        features(model, x, ["backbone", "backbone_momentum"])
    assert hook_count(model) == 0


# ---- calls, nesting, threads, copies, memory -----------------------------------------------------


def test_a_shared_module_keeps_every_call_in_order():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 8), relu, nn.Linear(8, 2), relu)
    x = torch.rand(3, 4)
    with tap(model, "1", "3") as taps, torch.no_grad():
        model(x)
    a = model[0](x).relu()
    b = model[2](a).relu()
    for path in ("1", "3"):  # two paths of one module
        assert [torch.equal(v, e) for v, e in zip(taps[path], [a, b], strict=True)] == [True, True]
    with tap(make("torchvision"), "layer1.0.relu") as taps:
        assert "layer1.0.relu" in taps


def test_taps_nest():
    model, x = small(), torch.rand(3, 4)
    with tap(model, "1") as outer:
        model(x)
        with tap(model, "1", "2") as inner:
            model(x)
            assert features(model, x, "0").shape == (3, 8)  # ends early; reaches no tap
        assert hook_count(model) == 1
        model(x)
    assert (len(outer["1"]), len(inner["1"]), len(inner["2"])) == (3, 1, 1)
    assert hook_count(model) == 0


def test_an_exception_in_the_block_or_in_the_model_removes_hooks():
    model = make("resnet18")
    with pytest.raises(KeyError), tap(model, "**", "**:input"):
        raise KeyError
    assert hook_count(model) == 0
    with pytest.raises(RuntimeError), tap(model, "layer1") as taps:
        model(torch.rand(2, 5, 32, 32))
    assert hook_count(model) == 0
    with pytest.raises(TapError):
        taps["layer1"]
    with pytest.raises(RuntimeError):
        features(model, torch.rand(2, 5, 32, 32), "layer1")
    assert hook_count(model) == 0
    with pytest.raises(RuntimeError):
        list_taps(model, torch.rand(2, 5, 32, 32))
    assert hook_count(model) == 0
    assert model.training


def test_an_abandoned_generator_removes_hooks():
    model = small()

    def stream():
        with tap(model, "1") as taps:
            for _ in range(10):
                model(torch.rand(2, 4))
                yield taps["1"][-1]

    generator = stream()
    next(generator)
    assert hook_count(model) == 1
    generator.close()
    assert hook_count(model) == 0


def test_an_unknown_point_places_no_hook():
    model = small()
    with pytest.raises(UnknownNameError), tap(model, "1", "nothing"):
        pass
    assert hook_count(model) == 0


def add_one(module, args, out):
    return out + 1


def test_other_hooks_stay_and_are_seen():
    model, x = small(), torch.rand(3, 4)
    handle = model[1].register_forward_hook(add_one)
    with tap(model, "1") as taps:
        model(x)
        assert torch.equal(taps["1"][0], model[0](x).relu() + 1)
        clone = copy.deepcopy(model)
        clone(x)
    assert len(taps["1"]) == 1
    assert hook_count(model) == hook_count(clone) == 1
    with tap(model, "1") as taps:
        model[1].forward(x)  # no hook runs
    assert torch.equal(taps["1"][0], x.relu())
    handle.remove()


def in_threads(*jobs):
    errors = []

    def run(job):
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_threads_with_models_of_their_own_do_not_mix():
    models = [small(), small()]
    models[1][0].weight.data.mul_(2)

    def job(model, x):
        for _ in range(50):
            with tap(model, "1") as taps, torch.no_grad():
                model(x)
            assert torch.equal(taps["1"][0], model[0](x).relu())
            assert len(taps["1"]) == 1

    in_threads(*(lambda m=m, n=n: job(m, torch.rand(n, 4)) for n, m in enumerate(models, 2)))


def test_threads_that_share_a_model_do_not_mix():
    model = small().eval()

    def job(n):
        x = torch.rand(n, 4)
        with torch.no_grad():
            first, last = model[0](x), model[1](model[0](x))
        for _ in range(100):
            assert torch.equal(features(model, x, "0"), first)
            assert torch.equal(features(model, x, ["1", "0"])[0], last)
            with tap(model, "1") as taps, torch.no_grad():
                model(x)
            assert torch.equal(torch.cat(taps["1"]), last)

    in_threads(*(lambda n=n: job(n) for n in range(2, 6)))
    assert hook_count(model) == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_second_forward_of_activation_checkpointing_is_not_read(reentrant):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = small()

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=reentrant)

    model, x = Model(), torch.rand(3, 4, requires_grad=True)
    with tap(model, "block.1") as taps:
        model(x).sum().backward()
    assert len(taps["block.1"]) == 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_tapped_model_is_clean(how):
    model, x = small(), torch.rand(3, 4)
    with tap(model, "1", "1:input") as taps:
        model(x)
        if how == "deepcopy":
            clone = copy.deepcopy(model)
        elif how == "pickle":
            clone = pickle.loads(pickle.dumps(model))
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            clone = torch.load(buffer, weights_only=False)
        assert torch.equal(clone(x), model(x))
    assert len(taps["1"]) == len(taps["1:input"]) == 2  # the copy wrote nothing
    clone(x)
    assert len(taps["1"]) == 2
    held = weakref.ref(taps["1"][0])
    del taps
    assert held() is None  # and holds nothing
    with tap(clone, "1") as taps:
        clone(x)
    assert len(taps["1"]) == 1


def test_nothing_is_kept_once_the_taps_are_gone():
    model, x = make("simclr").train(), images("simclr")
    gc.collect()
    gc.disable()  # no cycles either
    try:
        with tap(model, "backbone", "projection") as taps:
            model(x)
            refs = [weakref.ref(taps[p][0]) for p in ("backbone", "projection")]
            assert all(r() is not None for r in refs)
        assert taps["projection"][0] is refs[1]()  # still to be read after the block
        del taps
        assert [r() for r in refs] == [None, None]
        with tap(model, "backbone") as taps:
            model(x)
            ref = weakref.ref(taps["backbone"][0])
            taps.clear()
            assert ref() is None
        value = features(model, x, "backbone")
        ref = weakref.ref(value)
        del value
        assert ref() is None
    finally:
        gc.enable()


def test_memory_is_flat_over_2000_steps():
    model, x = Head(), torch.rand(8, 4)

    def tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    def run(steps):
        for _ in range(steps):
            with tap(model, "**") as taps:
                model(x).sum().backward()
                assert len(taps["projection_head.1"]) == 1
            features(model, x, ["backbone", "projection"])
        with tap(model, "projection") as taps:  # one block around a whole training
            for _ in range(steps):
                model(x).sum().backward()
                taps.clear()

    run(10)
    before = tensors()
    run(1000)
    assert tensors() == before
    assert hook_count(model) == 0


# ---- names ---------------------------------------------------------------------------------------


def test_globs_stay_within_a_level_unless_told():
    model = make("simclr").eval()
    found = features(model, images("simclr"), "backbone.4.*.conv*")
    assert list(found) == [f"backbone.4.{i}.conv{j}" for i in (0, 1) for j in (1, 2)]
    model, x = make("resnet18").eval(), images("resnet18")
    assert set(features(model, x, "layer?")) == {f"layer{i}" for i in range(1, 5)}
    every = [p for p, m in model.named_modules() if p.endswith("bn1")]
    assert set(features(model, x, "**.bn1")) == set(every)
    assert "bn1" in every
    assert set(features(model, x, "layer1.**")) == {
        p for p, _ in model.named_modules() if p == "layer1" or p.startswith("layer1.")
    }
    inputs = features(model, x, "layer[12]:input")
    assert list(inputs) == ["layer1:input", "layer2:input"]
    assert torch.equal(inputs["layer2:input"], features(model, x, "layer1"))


def test_taps_are_a_mapping_of_points():
    model, x = make("resnet18").eval(), images("resnet18")
    with tap(model, "layer*", "layer1", "act1:input", clone=True) as taps, torch.no_grad():
        model(x)
    assert list(taps) == ["layer1", "layer2", "layer3", "layer4", "act1:input"]
    assert len(taps) == 5
    assert dict(taps)["layer1"][0] is taps["layer1"][0]
    assert list(taps["layer*"]) == ["layer1", "layer2", "layer3", "layer4"]
    assert len(taps["layer1"]) == 1  # asked for twice, read once
    assert "layer1" in taps
    assert "layer*" in taps
    assert "fc" not in taps
    with pytest.raises(UnknownNameError, match=r"no tap is called 'layer9'\. Closest: layer"):
        taps["layer9"]


@pytest.mark.parametrize("ask", [tap, lambda m, p: features(m, torch.rand(1, 3, 32, 32), p)])
def test_an_unknown_point_shows_the_closest_names(ask):
    model = make("simclr")

    def go(point):
        with ask(model, point):
            pass

    with pytest.raises(
        UnknownNameError, match=r"no tap is called 'projektion'\. Closest:.*projecti"
    ):
        go("projektion")
    with pytest.raises(UnknownNameError, match="backbone"):
        go("backbon")
    with pytest.raises(UnknownNameError, match="within one level and '\\*\\*' crosses"):
        go("*.nothing")
    with pytest.raises(TapError, match="after ':' can follow input, input"):
        go("backbone:")
    with pytest.raises(TapError, match="after ':' can follow input, input"):
        go("backbone:input:input")


def test_no_point_at_all_is_refused():
    with (
        pytest.raises(TapError, match="name at least one point, for example: backbone"),
        tap(Head()),
    ):
        pass
    with pytest.raises(TapError, match="at least one point"):
        features(Head(), torch.rand(1, 4), [])


@pytest.mark.parametrize("point", [None, 1.5, True, b"1", nn.ReLU()])
def test_a_point_is_a_string_an_index_or_a_tap(point):
    with pytest.raises(TapError, match=r"a point is a string, an index or a Tap, not"):
        features(small(), torch.rand(1, 4), point)
    with pytest.raises(TapError, match="a point is a string"), tap(small(), "1", point):
        pass


def test_head_points_say_why_they_cannot_be_had():
    with (
        pytest.raises(SlotError, match="none is found in this Sequential"),
        tap(small(), "projection"),
    ):
        pass
    two = nn.ModuleDict({"projector": nn.Linear(4, 2), "projection_head": nn.Linear(4, 3)})
    with (
        pytest.raises(SlotError, match="there are 2, projector, projection_head"),
        tap(two, "pre_projection"),
    ):
        pass


@pytest.mark.filterwarnings("ignore:MAEDecoderTIMM is deprecated")
def test_a_model_whose_head_cannot_be_swapped_can_be_tapped():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    model = nn.Module()
    model.backbone = MaskedVisionTransformerTIMM(vit=vit)
    model.decoder = MAEDecoderTIMM(4, 16, embed_dim=192, decoder_embed_dim=32, decoder_depth=1,
                                   decoder_num_heads=1)  # fmt: skip
    x = images("resnet18", 2)
    with tap(model, "backbone", "backbone.vit.blocks.*") as taps, torch.no_grad():
        model.backbone(x)
    assert taps["backbone"][0].shape == (2, 192)
    assert len(taps["backbone.vit.blocks.*"]) == 12
    with pytest.raises(SlotError, match="MAE has no projection head"), tap(model, "projection"):
        pass


def test_a_list_of_modules_is_refused_with_what_to_type_and_left_out_of_globs():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    with pytest.raises(TapError, match=r"ModuleList, which is never called.*'blocks.\*'"):
        features(Blocks(), torch.rand(1, 4), "blocks")
    assert list(features(Blocks(), torch.rand(1, 4), "**")) == ["blocks.0", "blocks.1"]


def test_a_point_that_was_never_reached_says_why():
    model, x = small(), torch.rand(3, 4)
    with tap(model, "0", "1") as taps:
        nn.functional.linear(x, model[0].weight)
    with pytest.raises(TapError, match=r"'0' was never reached.*only its weights were used"):
        taps["0"]
    with pytest.raises(TapError, match="was not called inside the block"):
        taps["1"]
    with pytest.raises(TapError):
        dict(taps)
    assert "0" in taps
    model(x)  # after the block
    with pytest.raises(TapError):
        taps["1"]


def test_tensors_changed_in_place_are_detected_and_clone_keeps_them():
    x = images("torchvision")
    model = make("torchvision").eval()
    points = ("bn1", "layer1.0.bn2", "relu:input")  # ReLU(inplace=True); `out += identity`; both
    with tap(model, *points, "layer1") as taps, torch.no_grad():
        model(x)
    for point in points:
        with pytest.raises(TapError, match=r"clone=True to tap\(\)"):
            taps[point]
    assert taps["layer1"][0].shape == (4, 64, 8, 8)
    with tap(model, *points, clone=True) as taps, torch.no_grad():
        model(x)
    assert (taps["bn1"][0] < 0).any()
    assert torch.equal(taps["bn1"][0], taps["relu:input"][0])
    expected = features(model, x, list(points))
    assert all(torch.equal(taps[p][0], e) for p, e in zip(points, expected, strict=True))


def test_inference_mode_is_never_wrong():
    x = images("torchvision")
    model = make("torchvision").eval()
    with torch.inference_mode():
        with tap(model, "bn1", "layer1") as taps:
            model(x)
        found = features(model, x, ["bn1", "layer1"])
    assert (taps["bn1"][0] < 0).any()  # not what ReLU made of it
    assert all(torch.equal(t, f[0]) for t, f in zip(found, taps.values(), strict=True))


def test_dataparallel_is_refused():
    model = nn.DataParallel(small())
    for ask in (lambda: tap(model, "1").__enter__(), lambda: features(model, torch.rand(1, 4), "1"),
                lambda: list_taps(model, torch.rand(1, 4))):  # fmt: skip
        with pytest.raises(TapError, match=r"Tap model.module, or use DistributedDataParallel"):
            ask()


# ---- torch.compile, autocast, DDP ----------------------------------------------------------------


def compiled_model(how: str) -> nn.Module:
    torch._dynamo.reset()
    model = Head().eval()
    if how == "torch.compile(model)":
        return torch.compile(model, backend="eager")
    if how == "model.compile()":
        model.compile(backend="eager")
    elif how == "submodule":
        model.backbone = torch.compile(model.backbone, backend="eager")
    elif how == "submodule.compile()":
        model.backbone.compile(backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.parametrize("called", [True, False], ids=["called before", "fresh"])
@pytest.mark.parametrize(
    "how", ["torch.compile(model)", "model.compile()", "submodule", "submodule.compile()", "method"]
)
def test_compiled_models_are_never_silently_empty(how, called):
    model, x, plain = compiled_model(how), torch.rand(3, 4), Head().eval()
    points = ["backbone", "backbone.0", "pre_projection", "projection", "projection_head.0"]
    with torch.no_grad():
        if called:
            model(x), model(x)
        with tap(model, *points) as taps:
            model(x), model(x * 2)
        expected = features(plain, x, points)
        for point, value in zip(points, expected, strict=True):
            assert len(taps[point]) == 2
            assert torch.equal(taps[point][0], value)
        for value, e in zip(features(model, x, points), expected, strict=True):
            assert torch.equal(value, e)
        assert [r["path"] for r in list_taps(model, x)] == [r["path"] for r in list_taps(plain, x)]
        compiled = Counter()

        def count(graph, inputs):
            compiled["graphs"] += 1
            return graph

        torch.compile(lambda x: x + 1, backend=count)(x)
        assert compiled["graphs"] == 1  # the compiler is on again
        taps.clear()
        assert torch.equal(model(x), plain(x))
        assert all(c.seen == 0 for c in taps._calls)  # nothing lives on in a graph
    assert hook_count(model) == 0


def test_paths_with_the_wrappers_own_names_work_too():
    model, x = compiled_model("torch.compile(model)"), torch.rand(3, 4)
    with tap(model, "_orig_mod.backbone.0") as taps:
        model(x)
    assert torch.equal(taps["_orig_mod.backbone.0"][0], Head().backbone[0](x))


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_a_model_compiled_first_inside_the_block_is_read_and_forgotten():
    torch._dynamo.reset()
    model, x = small(), torch.rand(3, 4)
    with tap(model, "1") as taps:
        compiled = torch.compile(model, backend="eager")
        compiled(x), compiled(x)
    assert torch.equal(taps["1"][1], model[0](x).relu())
    taps.clear()
    compiled(x)
    with pytest.raises(TapError, match="never reached"):
        taps["1"]


def test_a_compiled_function_around_the_model_is_read():
    torch._dynamo.reset()
    model, x = small(), torch.rand(3, 4)
    function = torch.compile(lambda x: model(x), backend="eager")
    function(x)
    with tap(model, "1") as taps:
        function(x), function(torch.rand(5, 4)), function(x)
    assert [len(t) for t in taps["1"]] == [3, 5, 3]


def test_compiled_models_in_threads_leave_the_compiler_on():
    torch._dynamo.reset()
    models = [compiled_model("model.compile()") for _ in range(2)]
    x = torch.rand(3, 4)
    inside = [threading.Event(), threading.Event()]

    def job(me, other):  # both enter; the one that came first leaves first
        with tap(models[me], "backbone") as taps, torch.no_grad():
            models[me](x)
            inside[me].set()
            inside[other].wait(5)
        assert len(taps["backbone"]) == 1
        time.sleep(0.05 * me)

    in_threads(lambda: job(0, 1), lambda: job(1, 0))
    assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.mark.slow
def test_inductor():
    torch._dynamo.reset()
    model, x = torch.compile(Head().eval()), torch.rand(3, 4)
    with torch.no_grad():
        model(x)
        with tap(model, "projection") as taps:
            out = model(x)
        assert torch.equal(taps["projection"][0], out)
        torch.testing.assert_close(features(model, x, "projection"), model(x))


def test_autocast_dtypes_are_kept():
    model, x = make("simclr").eval(), images("simclr")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with tap(model, "backbone", "backbone.0", "projection") as taps:
            out = model(x)
        assert features(model, x, "backbone.0").dtype == torch.bfloat16
    assert taps["backbone.0"][0].dtype == torch.bfloat16
    assert taps["projection"][0].dtype == out.dtype
    assert torch.equal(taps["projection"][0], out)


def test_channels_last_is_kept():
    model = make("resnet18").eval().to(memory_format=torch.channels_last)
    x = images("resnet18").to(memory_format=torch.channels_last)
    for value in features(model, x, ["layer1", "layer2"]):
        assert value.is_contiguous(memory_format=torch.channels_last)


DDP = """
import sys, torch, torch.distributed as dist
from torch import nn
from headplug import features, list_taps, tap
rank, file = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
torch.manual_seed(0)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.projection_head = nn.Linear(8, 2)
    def forward(self, x):
        return self.projection_head(self.backbone(x))
model = Model()
ddp = nn.parallel.DistributedDataParallel(model)
points = ["backbone", "pre_projection", "projection", "backbone.0"]
for step in range(3):
    x = torch.rand(3 + rank, 4)
    ddp.zero_grad()
    with tap(ddp, *points, "module.backbone.2") as taps:
        out = ddp(x)
        out.sum().backward()
    assert torch.equal(taps["projection"][0], out)
    assert torch.equal(taps["pre_projection"][0], taps["backbone"][0])
    assert torch.equal(taps["module.backbone.2"][0], taps["backbone"][0])
    assert taps["backbone.0"][0].shape == (3 + rank, 8)
    grads = [torch.empty(2, 8) for _ in range(2)]
    dist.all_gather(grads, model.projection_head.weight.grad)
    assert torch.equal(*grads)
    if rank == 0:
        value = features(ddp, x, "backbone", grad=True)  # no collective: one rank may do it alone
        value.sum().backward()
assert "module" not in str([r["path"] for r in list_taps(ddp, x)])
assert not any(m._forward_hooks or m._forward_pre_hooks for m in ddp.modules())
dist.barrier()
dist.destroy_process_group()
print("fine")
"""


@pytest.mark.slow
def test_ddp_in_two_processes_with_the_shared_names(on_two_processes):
    on_two_processes(DDP)


# ---- list_taps -----------------------------------------------------------------------------------


def test_list_taps_rows():
    model, x = make("simclr"), images("simclr")
    log: list[str] = []
    with watched(model, log), torch.no_grad():
        model.eval()(x)
    calls = Counter(line.removeprefix("start ") for line in log if line.startswith("start "))
    del calls[""]
    rows = list_taps(model, x)
    assert [row["path"] for row in rows] == list(calls)  # in the order of first calls
    assert {row["path"]: row["calls"] for row in rows} == calls
    assert {tuple(row) for row in rows} == {("name", "path", "type", "shape", "calls", "cost")}
    by_path = {row["path"]: row for row in rows}
    assert by_path["backbone"]["name"] == "backbone"
    assert by_path["backbone"]["shape"] == (4, 512, 1, 1)
    assert by_path["projection_head"]["name"] == "projection"
    assert by_path["projection_head"]["type"] == "SimCLRProjectionHead"
    assert by_path["backbone.4.0.relu"]["calls"] == 2
    block = by_path["backbone.4.0"]
    assert 0 < block.pop("cost") < by_path["backbone.4.1"]["cost"] < 1
    assert block == {
        "name": "backbone.4.0",
        "path": "backbone.4.0",
        "type": "BasicBlock",
        "shape": (4, 64, 8, 8),
        "calls": 1,
    }
    assert rows[-1]["cost"] == 1
    for row in rows:  # every name can be tapped
        features(model.eval(), x, row["name"])


def test_list_taps_shows_the_head_that_only_a_training_step_calls():
    model, x = make("lightning"), images("lightning")
    assert [r["path"] for r in list_taps(model, x)] == [
        r["path"] for r in list_taps(make("simclr"), x)
    ]


def test_list_taps_shape_is_none_for_tuples():
    model = nn.Sequential(nn.LSTM(4, 3))
    row = list_taps(model, torch.rand(2, 5, 4))[0]
    assert (row["type"], row["shape"], row["calls"]) == ("LSTM", None, 1)


class Restless(nn.Module):
    """A queue, statistics that ignore eval mode, and random numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("queue", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        self.queue += 1
        self.replaced = self.replaced + 1
        self.norm.train()
        return self.norm(x) + torch.rand(4)


@pytest.mark.parametrize("name", ["simclr", "restless"])
def test_list_taps_leaves_no_trace(name):
    model = Restless() if name == "restless" else make(name)
    x = torch.rand(3, 4) if name == "restless" else images(name)
    model.train()
    list(model.modules())[1].eval()  # mixed modes
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    buffers = list(model.buffers())
    rng = torch.get_rng_state()
    list_taps(model, x)
    assert torch.equal(rng, torch.get_rng_state())
    assert [m.training for m in model.modules()] == modes
    assert_same(before, model.state_dict())
    assert all(a is b for a, b in zip(buffers, model.buffers(), strict=True))
    assert hook_count(model) == 0
    assert all(p.grad is None for p in model.parameters())


# ---- speed ---------------------------------------------------------------------------------------


def paired(a, b, pairs=9) -> float:
    """Median over interleaved pairs of the time of `a` over that of `b`."""
    a(), b()
    ratios = []
    for _ in range(pairs):
        spent = []
        for run in (a, b):
            start = time.process_time()
            run()
            spent.append(time.process_time() - start)
        ratios.append(spent[0] / spent[1])
    return median(ratios)


def test_taps_cost_little_and_early_exit_saves_time():
    model, x = make("torchvision").eval(), torch.randn(4, 3, 64, 64)

    @torch.no_grad()
    def bare():
        model(x)

    @torch.no_grad()
    def tapped():
        with tap(model, "maxpool", "layer*"):
            model(x)

    assert paired(tapped, bare) < 1.25
    shares = [
        paired(lambda p=p: features(model, x, p), bare) for p in ("layer1", "layer2", "layer3")
    ]
    assert shares[0] < 0.7
    assert shares == sorted(shares)
    assert shares[2] < 1.05


def test_public_names_are_exported():
    assert {"tap", "features", "list_taps"} <= set(headplug.__all__)
