"""What makes an extraction another one: what a model, a transform and a stream really do."""

from __future__ import annotations

import functools
import math
from argparse import Namespace
from enum import Enum
from types import MethodType, SimpleNamespace

import kornia
import lightning
import numpy
import pytest
import timm
import torch
from torch import nn
from torchvision.transforms import Compose, Lambda, v2

from headplug import extract_features, tap
from headplug.errors import RunError
from headplug.store.fingerprint import digest, of_model


class Scale:
    def __init__(self, by):
        self.by = by

    def __repr__(self):
        return "Scale()"

    def __call__(self, x):
        return x * self.by


class Doubles(Scale):
    def __call__(self, x):
        return x + x


Doubles.__qualname__ = "Scale"

TWICE, THRICE = (lambda x: x * 2), (lambda x: x * 3)


@pytest.mark.parametrize(
    "make",
    [
        Lambda,
        lambda f: Compose([Lambda(f)]),
        v2.Lambda,
        lambda f: v2.Compose([v2.Lambda(f)]),
        lambda f: functools.partial(map, f),
    ],
)
def test_functions_inside_transforms_are_seen(make):
    assert digest(make(TWICE)) == digest(make(TWICE))
    assert digest(make(TWICE)) != digest(make(THRICE))


def test_callable_objects_are_what_they_hold_and_do():
    assert digest(Scale(2)) == digest(Scale(2)) != digest(Scale(3))
    assert digest(Scale(2)) != digest(Doubles(2))
    assert digest(Scale(Scale(2))) != digest(Scale(Scale(3)))
    ring = Scale(2)
    ring.others = [ring, Scale(ring)]
    assert digest(ring) == digest(ring)


def changed_option(model):
    model[0].t = 2.0


def changed_list(model):
    model[0].steps = [1, 3]


def patched_forward(model):
    model[0].forward = lambda x: x * 2


def patched_method(model):
    def forward(self, x):
        return x * 3

    model[0].forward = MethodType(forward, model[0])


def hooked(model):
    model[1].register_forward_hook(lambda m, x, y: 2 * y)


def hooked_before(model):
    model[1].register_forward_pre_hook(lambda m, x: 2 * x[0])


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.t = 1.0
        self.steps = [1, 2]
        self.calls = 0
        self.parent = [self]

    def forward(self, x):
        self.calls += 1
        return x / self.t


@pytest.mark.parametrize(
    "change",
    [changed_option, changed_list, patched_forward, patched_method, hooked, hooked_before],
)
def test_what_a_model_does_is_seen_although_its_repr_hides_it(change):
    model = nn.Sequential(Odd(), nn.Linear(2, 2))
    before = of_model(model)
    model(torch.ones(1, 2))
    with tap(model, "0"):
        assert of_model(model) == before  # counters and taps change nothing
    change(model)
    assert [name for name, text in of_model(model).items() if text != before[name]] == ["model"]


class Busy(nn.Module):
    """Counts, caches and collects while it runs; `scale`, `steps` and `how` are options."""

    def __init__(self):
        super().__init__()
        self.scale, self._gain, self.calls, self.seen, self.cache = 2, 3, 0, [], {}
        self.counts, self.steps = {0: 0}, [1]
        self.how = SimpleNamespace(scale=1, kind=Kind.MEAN, nested=[Plain(2)])

    def bump(self, x):
        self.calls += 1
        self.seen.append(x.shape)
        self.cache[x.shape[0], "a"] = self.steps[0]
        self.counts[len(x.shape) - 2] += self.steps[0]

    def forward(self, x):
        self.bump(x)
        return x * self.scale


class Kind(Enum):
    MEAN, MAX = 1, 2


class Plain:
    __slots__ = ("size",)

    def __init__(self, size):
        self.size = size


class Counting(Scale):
    calls = 0

    def __call__(self, x):
        self.calls += 1
        return x * self.by


def test_what_a_call_changes_is_no_option_and_all_else_is():
    model = Busy()
    before = of_model(model)
    model(torch.ones(2, 2))
    assert (model.calls, len(model.cache), model.counts) == (1, 1, {0: 1})
    assert of_model(model) == before
    counting = Counting(2)
    fresh = digest(counting)
    counting(torch.ones(1))
    assert digest(counting) == fresh != digest(Counting(3))
    found = [before["model"]]
    for change in (
        lambda: setattr(model, "scale", 5),
        lambda: setattr(model, "_gain", 5),
        lambda: model.steps.append(5),
        lambda: setattr(model.how, "scale", 5),
        lambda: setattr(model.how, "kind", Kind.MAX),
        lambda: setattr(model.how.nested[0], "size", 5),
        lambda: setattr(model, "how", Namespace(scale=5)),
        lambda: setattr(model, "how", numpy.ones(2)),
        lambda: setattr(model, "how", numpy.ones(3)),
    ):
        change()
        found.append(of_model(model)["model"])
    assert len(set(found)) == len(found)


def test_what_libraries_keep_after_use_is_no_option(tmp_path):
    """Of kornia's transforms, Lightning's modules and torch.compile."""
    normalize = kornia.augmentation.Normalize(torch.zeros(1), torch.ones(1))
    before = digest(normalize)
    normalize(torch.rand(2, 1, 4, 4))
    assert digest(normalize) == before
    assert digest(kornia.augmentation.Normalize(torch.ones(1), torch.ones(1))) != before
    model = nn.Sequential(nn.Linear(2, 2))
    plain = of_model(model)
    torch.compile(model, backend="eager")
    assert of_model(model) == plain

    class Lit(lightning.LightningModule):
        def __init__(self, scale):
            super().__init__()
            self.save_hyperparameters()
            self.layer, self.losses = nn.Linear(2, 2), []

        def forward(self, x):
            return self.layer(x) * self.hparams.scale

        def training_step(self, batch, _):
            self.losses.append(self(batch).sum())
            return self.losses[-1]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    fitted = Lit(2)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=2, enable_checkpointing=False, **options
    )
    trainer.fit(fitted, torch.utils.data.DataLoader(torch.rand(4, 2), 2))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    path = tmp_path / "a.ckpt"
    loaded = Lit.load_from_checkpoint(path, weights_only=True)
    other = Lit.load_from_checkpoint(path, weights_only=True, scale=3)
    assert len(fitted.losses) == 2
    assert of_model(loaded) == of_model(fitted) != of_model(other)


def by(x):
    return x * CONFIG["by"]


def outer(x):
    return (lambda y: by(y))(x) if x is not None else outer(0)


class Settings:
    by = 2

    def __call__(self, x):
        return math.sqrt(Settings.by) * x


CONFIG, SETTINGS = {"by": 2}, SimpleNamespace(by=2)


def with_settings(x):
    return x * SETTINGS.by


def with_method(self, x):
    return self.by(x)


def test_helpers_and_settings_that_a_function_names_are_seen(monkeypatch):
    model = type("M", (nn.Module,), {"forward": with_method, "by": lambda self, x: x * 2})()

    def look():
        own = digest(outer), digest(with_settings), digest(Settings())
        return *own, of_model(model)["model"]

    before = look()
    assert look() == before
    monkeypatch.setitem(CONFIG, "by", 3)
    monkeypatch.setattr(SETTINGS, "by", 3)
    monkeypatch.setattr(Settings, "by", 3)
    monkeypatch.setattr(type(model), "by", lambda self, x: x * 3)
    other = look()
    assert not set(before) & set(other)
    monkeypatch.setitem(globals(), "by", TWICE)
    assert digest(outer) not in (before[0], other[0])
    monkeypatch.setattr(Settings, "__call__", lambda self, x: x)
    assert digest(Settings()) not in (before[2], other[2])


def test_looking_at_weights_leaves_their_memory_as_it_was():
    """NumPy would fix its size, which FSDP changes."""
    model = nn.Linear(4, 4)
    of_model(model)
    assert model.weight.untyped_storage().resizable()


def test_swins_shift_is_seen():
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, depths=(2, 1, 1, 1))
    before = of_model(model)
    assert of_model(model) == before
    model.layers[0].blocks[1].shift_size = (0, 0)
    assert of_model(model)["model"] != before["model"]


def test_a_stream_of_another_length_is_refused(model, tmp_path):
    batches = [(torch.rand(2, 1, 8, 8), [0, 1]) for _ in range(6)]
    extract_features(model, batches[:4], "projection", tmp_path)
    for other in (batches, batches[:3]):
        with pytest.raises(RunError, match=r"the number of batches \(4 there"):
            extract_features(model, other, "projection", tmp_path)
    assert len(extract_features(model, batches[:4], "projection", tmp_path)) == 8
