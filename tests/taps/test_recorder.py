"""Seeing every call once: direct ones, as in lightly's DINOv2, iBOT and MAE; in threads; nested."""

from __future__ import annotations

import copy
import sys
import threading

import pytest
import timm
import torch
from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM
from torch import nn

from headplug import tap
from headplug.taps.recorder import _active


class IBOT(nn.Module):
    """As lightly's example: encode() and forward() are called directly."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        vit = timm.create_model("test_vit", num_classes=0, img_size=32, dynamic_img_size=True)
        self.student_backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.teacher_backbone = copy.deepcopy(self.student_backbone).requires_grad_(False)
        width = vit.num_features
        self.student_head = DINOProjectionHead(width, 16, 8, 12, freeze_last_layer=0)
        self.teacher_head = DINOProjectionHead(width, 16, 8, 12).requires_grad_(False)

    def step(self, x):
        with torch.no_grad():
            self.teacher_head.forward(self.teacher_backbone.encode(x)[:, 0])
        tokens = self.student_backbone.encode(x)
        return tokens, self.student_head.forward(tokens[:, 0]), self.student_head(tokens[:, 1])


@pytest.fixture
def model():
    return IBOT().eval()


pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_shared_names_see_direct_calls_once_each(model):
    original = DINOProjectionHead.__dict__.get("forward"), MaskedVisionTransformerTIMM.encode
    with tap(model, "backbone", "pre_projection", "projection") as taps:
        tokens, direct, usual = model.step(X)
    assert [t.shape for t in taps["backbone"]] == [tokens.shape]
    assert torch.equal(taps["backbone"][0], tokens)
    assert all(map(torch.equal, taps["projection"], (direct, usual)))
    assert len(taps["projection"]) == 2
    assert all(map(torch.equal, taps["pre_projection"], (tokens[:, 0], tokens[:, 1])))
    assert (
        DINOProjectionHead.__dict__.get("forward"),
        MaskedVisionTransformerTIMM.encode,
    ) == original
    assert not _active


def test_values_and_gradients_are_untouched(model):
    def left():
        model.zero_grad()
        torch.manual_seed(1)
        _, direct, usual = model.step(X)
        (direct.sum() + usual.square().sum()).backward()
        return [p.grad for p in model.student_head.parameters() if p.grad is not None]

    plain = [g.clone() for g in left()]
    with tap(model, "backbone", "projection"):
        assert all(map(torch.equal, plain, left()))


def test_copies_other_modules_and_other_threads_are_not_read(model):
    other = IBOT().eval()
    with tap(model, "backbone", "projection") as taps:
        clone = copy.deepcopy(model.student_backbone)  # the head's weight norm does not allow it
        clone.encode(X), other.step(X)
        thread = threading.Thread(target=model.step, args=(X,))
        thread.start(), thread.join()
        model.step(X)
    assert [len(taps[p]) for p in taps] == [1, 2]
    assert "encode" not in vars(clone)


def test_blocks_nest_and_an_exception_leaves_no_trace(model):
    original = DINOProjectionHead.forward
    with tap(model, "projection") as outer:
        with tap(model, "projection") as inner:
            model.step(X)
        model.step(X)
        with pytest.raises(RuntimeError):
            model.student_head.forward(torch.rand(2, 3))  # wrong width
    assert (len(inner["projection"]), len(outer["projection"])) == (2, 4)
    assert DINOProjectionHead.forward is original
    assert not _active
    with tap(model, "projection") as again:
        model.step(X)
    assert len(again["projection"]) == 2


def test_direct_calls_are_seen_by_path_too_and_with_a_forward_of_its_own(model):
    head = model.student_head
    head.forward = lambda x: type(head).forward(head, x) * 2  # as some libraries patch it
    own = head.forward
    with tap(model, "student_backbone", "student_head") as taps:
        tokens, direct, usual = model.step(X)
    assert torch.equal(taps["student_backbone"][0], tokens)
    assert all(map(torch.equal, taps["student_head"], (direct, usual)))
    assert head.forward is own


def test_blocks_may_end_in_any_order(model):
    first, second = tap(model, "student_head"), tap(model, "student_head")
    one, two = first.__enter__(), second.__enter__()
    model.step(X)
    first.__exit__(None, None, None)
    model.step(X)
    second.__exit__(None, None, None)
    model.step(X)
    assert (len(one["student_head"]), len(two["student_head"])) == (2, 4)
    assert not _active
    assert "forward" not in vars(model.student_head)


def test_threads_that_open_and_close_blocks_at_once_do_not_meet():
    shared = nn.Sequential(nn.Linear(4, 4))
    errors = []

    def job():
        try:
            for _ in range(100):
                with tap(shared, "0") as taps:
                    shared(torch.rand(2, 4)), shared[0].forward(torch.rand(2, 4))
                assert len(taps["0"]) == 2
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=job) for _ in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
    assert not _active
    assert "forward" not in vars(shared[0])


def test_the_copy_of_a_parametrized_module_is_not_read():
    module = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))  # it copies all it has
    model, x = nn.Sequential(module), torch.rand(2, 4)
    with torch.no_grad(), tap(model, "0") as taps:
        clone = copy.deepcopy(model)
        again = copy.deepcopy(clone)
        assert torch.equal(clone(x), model(x))
        assert torch.equal(again(x), model(x))
    assert len(taps["0"]) == 2
    assert torch.equal(clone(x), model(x))
