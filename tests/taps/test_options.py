"""How points are read: which calls, in which shape, pooled, converted, with gradients."""

from __future__ import annotations

import gc
import weakref

import pytest
import timm
import torch
import torchvision
from torch import nn

from headplug import features, tap
from headplug.errors import OptionError, TapError
from headplug.taps import Tap


class Twice(nn.Module):
    """Calls its head once per view, as SSL steps do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.projection_head = nn.Linear(8, 2)

    def forward(self, x):
        return self.projection_head(self.backbone(x))


@pytest.fixture
def model():
    return Twice()


@pytest.fixture
def views():
    return torch.rand(3, 4), torch.rand(5, 4)


def test_calls(model, views):
    z = [model(v) for v in views]
    expected = {"all": z, "last": z[1], "cat": torch.cat(z), 0: z[0], 1: z[1]}
    with tap(model, {c: Tap("projection", calls=c) for c in expected}) as taps:
        [model(v) for v in views]
        for call, value in expected.items():
            if call == "all":
                assert all(map(torch.equal, taps["all"], value))
            else:
                assert torch.equal(taps[call], value)


def test_a_call_that_did_not_happen(model, views):
    with tap(model, "projection", calls=2) as taps:
        [model(v) for v in views]
    with pytest.raises(TapError, match="'projection' was reached 2 times, so there is no call 2"):
        taps["projection"]


def test_what_is_read_has_the_shape_of_the_request(model, views):
    x = views[0]
    h, z = model.backbone(x), model(x)

    def read(*points):
        with tap(model, *points, calls="last") as taps:
            model(x)
        return taps.read()

    assert torch.equal(read("projection"), z)
    assert all(map(torch.equal, read("backbone", "projection"), (h, z)))
    assert all(map(torch.equal, read(["projection", "backbone"]), (z, h)))
    (only,) = read(["projection"])
    assert torch.equal(only, z)
    named = read({"h": "backbone", "z": Tap("projection", dtype=torch.float64)})
    assert torch.equal(named["h"], h)
    assert torch.equal(named["z"], z.double())
    both = read("backbone", {"z": "projection"})
    assert torch.equal(both[0], h)
    assert torch.equal(both[1]["z"], z)
    assert list(read("backbone.*")) == ["backbone.0", "backbone.1"]


def test_options_for_all_and_for_one(model, views):
    at = ["backbone", Tap("projection", detach=False, calls="all")]
    with tap(model, at, detach=True, calls="last", dtype=torch.bfloat16) as taps:
        model(views[0])
    h, (z,) = taps.read()
    assert (h.requires_grad, z.requires_grad) == (False, True)
    assert h.dtype == z.dtype == torch.bfloat16


def test_dtype_leaves_integers_alone():
    model = nn.Sequential(nn.Embedding(5, 3))
    ids = torch.tensor([1, 2])
    assert features(model, ids, "0:input", dtype=torch.float16).dtype == torch.int64
    assert features(model, ids, "0", dtype=torch.float16).dtype == torch.float16


def test_later_calls_work_in_place_on_what_was_read():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    x = torch.randn(6, 4)
    with torch.no_grad():
        before = model[0](x)
        for pool in (None, "flat"):  # both are the very tensor, or a view of it
            with tap(model, "0", pool=pool) as taps:
                model(x)
            with pytest.raises(TapError, match="changed in place"):
                taps["0"]
            with tap(model, "0", pool=pool, clone=True) as taps:
                model(x)
            assert torch.equal(taps["0"][0], before)
        with tap(model, "0", dtype=torch.float64) as taps:  # a copy already
            model(x)
        assert torch.equal(taps["0"][0], before.double())


def test_gradients_are_those_of_autograd(model, views):
    x = views[0]
    h = model.backbone(x).detach().requires_grad_()
    z = model.projection_head(h)
    z.retain_grad()
    z.square().sum().backward()
    with tap(model, "pre_projection", "projection", gradients=True, detach=True) as taps:
        model(x).square().sum().backward()
    assert torch.equal(taps.gradient("pre_projection")[0], h.grad)
    assert torch.equal(taps.gradient("projection")[0], z.grad)
    assert not taps["projection"][0].requires_grad


def test_gradients_of_each_call_in_the_place_of_what_was_read(model, views):
    with tap(
        model, {c: Tap("projection", calls=c) for c in ("all", "last", "cat")}, gradients=True
    ) as taps:
        zs = [model(v) for v in views]
        (zs[0].sum() + 2 * zs[1].sum()).backward(retain_graph=True)
        each = [torch.ones(3, 2), torch.full((5, 2), 2.0)]
        assert all(map(torch.equal, taps.gradient("all"), each))
        assert torch.equal(taps.gradient("last"), each[1])
        assert torch.equal(taps.gradient("cat"), torch.cat(each))
        zs[0].sum().backward()  # they add up, as .grad does
        assert torch.equal(taps.gradient("all")[0], torch.full((3, 2), 2.0))
        taps.clear()
        with pytest.raises(TapError, match="never reached"):
            taps.gradient("all")


def test_gradients_of_calls_that_are_not_kept_are_not_kept(model, views):
    with tap(model, "projection", calls="last", gradients=True, dtype=torch.float64) as taps:
        for _ in range(5):
            model(views[0]).sum().backward()
        assert len(taps._calls[0]._gradients) == 1
    assert torch.equal(taps.gradient("projection"), torch.ones(3, 2))


def test_a_call_without_gradient_has_none(model, views):
    with tap(model, "projection", gradients=True) as taps:
        with torch.no_grad():
            model(views[0])
        model(views[1]).sum().backward()
    first, second = taps.gradient("projection")
    assert first is None
    assert torch.equal(second, torch.ones(5, 2))


def test_views_of_two_sizes_cannot_be_joined_without_pooling():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    crops = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 5, 5)
    with tap(model, {"map": "0", "gap": Tap("0", pool="gap")}, calls="cat") as taps:
        [model(c) for c in crops]
    assert taps["gap"].shape == (4, 4)
    with pytest.raises(TapError, match=r"'0' gave shapes .*pool='gap' makes vectors"):
        taps["map"]


def test_a_model_that_catches_exceptions_ends_early_too():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            try:
                h = self.first(x)
            except Exception as error:
                raise RuntimeError("a layer failed") from error
            return self.second(h)

    model, x = Careful(), torch.rand(2, 4)
    assert torch.equal(features(model, x, "first"), model.first(x))


def test_gradients_that_are_not_there(model, views):
    with tap(model, "projection") as taps:
        model(views[0]).sum().backward()
    with pytest.raises(TapError, match="without gradients=True"):
        taps.gradient("projection")
    with tap(model, "projection", gradients=True) as taps, torch.no_grad():
        model(views[0])
    with pytest.raises(TapError, match="no gradient has come to 'projection'"):
        taps.gradient("projection")


def test_gradients_change_nothing_and_keep_nothing(model, views):
    x = views[0]
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    gc.disable()
    try:
        with tap(model, "backbone", "projection", gradients=True) as taps:
            out = model(x)
        held = weakref.ref(taps)
        del taps
        assert held() is None  # the graph of `out` is still alive
        out.square().sum().backward()
    finally:
        gc.enable()
    assert all(map(torch.equal, plain, (p.grad for p in model.parameters())))


@pytest.mark.parametrize(
    "wrong",
    [
        {"device": "gpu"},
        {"calls": "first"},
        {"calls": -1},
        {"calls": True},
        {"pool": "mean"},
        {"dtype": "half"},
    ],
)
def test_wrong_options_say_what_there_is(model, wrong):
    with pytest.raises(
        OptionError, match=f"^{next(iter(wrong))} is .*not {next(iter(wrong.values()))!r}"
    ):
        Tap("projection", **wrong)
    with pytest.raises(OptionError), tap(model, "projection", **wrong):
        pass


# ---- pooling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "at"), [("test_resnet", "layer4"), ("test_vit", -1)])
def test_gap_is_timms_average_pooling(name, at):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, global_pool="avg").eval()
    x = torch.rand(2, 3, *model.default_cfg["input_size"][1:])
    found = features(model, x, at, pool="gap", grad=True)
    found = model.fc_norm(found) if name == "test_vit" else found
    assert torch.allclose(found, model(x), atol=1e-6)


def test_class_and_patch_tokens_of_a_vit_with_registers():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0, reg_tokens=3, class_token=True).eval()
    x = torch.rand(2, 3, *model.default_cfg["input_size"][1:])
    tokens = features(model, x, "norm")
    assert model.num_prefix_tokens == 4
    assert torch.equal(features(model, x, "norm", pool="cls"), tokens[:, 0])
    assert torch.equal(features(model, x, "norm", pool="tokens"), tokens[:, 4:])
    assert torch.allclose(features(model, x, "norm", pool="gap"), tokens[:, 4:].mean(1))
    both = features(model, x, "norm", pool="cls+gap")
    assert torch.allclose(both, torch.cat([tokens[:, 0], tokens[:, 4:].mean(1)], 1))
    assert torch.equal(features(model, x, "norm", pool="flat"), tokens.flatten(1))
    assert torch.equal(features(model, x, "norm", pool=lambda t: t[:, 1]), tokens[:, 1])


def test_tokens_of_torchvisions_vit():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32).eval()
    x = torch.rand(2, 3, 32, 32)
    tokens = features(model, x, "encoder.ln")
    assert torch.equal(features(model, x, "encoder.ln", pool="cls"), tokens[:, 0])
    assert features(model, x, "encoder.ln", pool="tokens").shape == (2, 4, 16)


@pytest.mark.parametrize("size", [64, (64, 128)], ids=["square", "wide"])
def test_channels_last_maps_of_swin(size):
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=size,
        window_size=2,
        num_classes=0,
        embed_dim=24,
        depths=(1, 1),
        num_heads=(1, 2),
    ).eval()
    x = torch.rand(2, 3, *(size if isinstance(size, tuple) else (size, size)))
    maps = features(model, x, "layers.0")
    assert maps.shape[-1] == 24
    assert torch.allclose(features(model, x, "layers.0", pool="gap"), maps.mean((1, 2)), atol=1e-6)
    assert torch.equal(features(model, x, "layers.0", pool="tokens"), maps.flatten(1, 2))
    conv = features(model, x, "patch_embed.proj")  # channels first inside it
    if size == 64:
        pooled = features(model, x, "patch_embed.proj", pool="gap")
        assert torch.allclose(pooled, conv.mean((2, 3)), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "at", "size"),
    [("resnet18", "layer1", (256, 128)), ("resnet18", "layer1.0.relu", (256, 128)),
     ("convnext_tiny", "features.1", (384, 192)), ("swin_t", "features.1", (64, 192))],
)  # fmt: skip
def test_maps_with_a_side_as_long_as_they_are_wide(name, at, size):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    maps = features(model, torch.rand(1, 3, *size), at)
    axis = 3 if name == "swin_t" else 1
    width = {"resnet18": 64, "convnext_tiny": 96, "swin_t": 96}[name]
    assert maps.shape[axis] == width
    positions = [d for d in (1, 2, 3) if d != axis]
    pooled = features(model, torch.rand(1, 3, *size), at, pool="gap")
    assert pooled.shape == (1, width)
    with tap(model, {"map": at, "gap": Tap(at, pool="gap")}, calls="last") as taps:
        model(torch.rand(1, 3, *size))
    assert torch.allclose(taps["gap"], taps["map"].mean(positions), atol=1e-5)


@pytest.mark.parametrize("at", ["patch_embed", "blocks.0"])
def test_points_before_the_class_token_have_none(at):
    torch.manual_seed(0)
    name = {"patch_embed": "vit_tiny_patch16_224", "blocks.0": "cait_xxs24_224"}[at]
    model = timm.create_model(name, num_classes=0, depth=1, img_size=32)
    x = torch.rand(1, 3, 32, 32)
    tokens = features(model.eval(), x, at)
    assert tokens.shape[1] == model.patch_embed.num_patches
    assert torch.equal(features(model, x, at, pool="tokens"), tokens)
    with pytest.raises(TapError, match="tokens without a class token"):
        features(model, x, at, pool="cls")


def test_cls_of_what_has_no_class_token():
    model = timm.create_model("test_resnet", num_classes=0).eval()
    x = torch.rand(1, 3, 32, 32)
    with pytest.raises(
        TapError, match=r"'layer4': pool='cls' cannot be had: .* are maps; take 'gap'"
    ):
        features(model, x, "layer4", pool="cls")
    assert features(model, x, "global_pool", pool="cls").shape == (1, model.num_features)


def test_pooling_a_tuple_says_what_to_name():
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    found = features(nn.Sequential(Two()), torch.rand(2, 3, 4, 4), "0", pool="gap")
    assert [t.shape for t in found] == [(2, 3), (2, 3)]  # each tensor of it


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_moving_to_the_cpu_is_pinned_and_right(model, views):
    model, x = model.cuda(), views[0].cuda()
    with tap(model, "projection", device="cpu") as taps:
        out = model(x)
    (z,) = taps["projection"]
    assert z.is_pinned()
    assert torch.equal(z, out.cpu())


def test_moving_to_a_device():
    model = nn.Sequential(nn.Linear(4, 2))
    assert features(model, torch.rand(3, 4), "0", device="meta").is_meta
