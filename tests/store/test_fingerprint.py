"""What makes an extraction another one: what a model, a transform and a stream really do."""

from __future__ import annotations

import functools
from types import MethodType

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
        with pytest.raises(RunError, match="the data changed"):
            extract_features(model, other, "projection", tmp_path)
    assert len(extract_features(model, batches[:4], "projection", tmp_path)) == 8
