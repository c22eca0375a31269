from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from headplug.diagnostics import invariance
from headplug.errors import DataError, OptionError, UnknownNameError


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(6, 4),
    )


@pytest.fixture
def images():
    return torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def noisy(x):
    return x + 0.2 * torch.randn_like(x)


def test_ratios_and_cosines_follow_their_definitions(model, images):
    found = invariance(
        model,
        [(part, torch.zeros(len(part))) for part in images.split(16)],
        {"brighter": lambda x: x + 0.3, "same": lambda x: x},
        ["4", "6"],
        transform=lambda x: x - 0.5,
    )
    assert [(r["tap"], r["augmentation"]) for r in found] == [
        (tap, name) for tap in ("4", "6") for name in ("brighter", "same")
    ]
    assert json.loads(json.dumps(found)) == found
    model.eval()
    for row in found:
        part = model[: int(row["tap"]) + 1]
        with torch.no_grad():
            h, moved = (part(x - 0.5).double().numpy() for x in (images, images + 0.3))
        if row["augmentation"] == "same":
            assert row["distance_ratio"] == 0.0
            assert row["cosine"] == pytest.approx(1.0)
            continue
        between = [((a - b) ** 2).sum() for i, a in enumerate(h) for b in h[i + 1 :]]
        expected = ((h - moved) ** 2).sum(1).mean() / np.mean(between)
        assert row["distance_ratio"] == pytest.approx(expected, rel=1e-5)
        cosine = (h * moved).sum(1) / np.linalg.norm(h, axis=1) / np.linalg.norm(moved, axis=1)
        assert row["cosine"] == pytest.approx(cosine.mean(), rel=1e-5)
        assert row["samples"] == 50


def test_a_pooled_layer_does_not_see_a_shift_that_the_map_does(images):
    shift = {"shift": lambda x: x.roll(3, dims=3)}
    conv = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"))
    rows = invariance(conv, [images], shift, "0", pool="gap")
    rows += invariance(conv, [images], shift, "0", pool="flat")
    assert rows[0]["distance_ratio"] < 1e-6
    assert rows[1]["distance_ratio"] == pytest.approx(1.0, abs=0.1)


def test_draws_repeat_by_seed_and_leave_model_and_generators_alone(model, images):
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    one, again, other = (
        invariance(model, [images], {"noise": noisy}, "4", seed=seed)[0]["distance_ratio"]
        for seed in (0, 0, 1)
    )
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_each_augmentation_draws_by_its_own_name_from_every_generator(model, images):
    augmentations = {
        "torch": noisy,
        "numpy": lambda x: x + np.random.rand(),
        "python": lambda x: x + random.random(),
    }
    before = random.getstate(), np.random.get_state()[1].tolist()
    together = invariance(model, images.split(20), augmentations, "4")
    for row in together:
        name = row["augmentation"]
        assert [row] == invariance(model, images.split(20), {name: augmentations[name]}, "4")
    assert before == (random.getstate(), np.random.get_state()[1].tolist())
    ratios = [row["distance_ratio"] for row in together]
    assert len(set(ratios)) == 3


def test_in_place_augmentations_do_not_reach_the_images(model, images):
    before = images.clone()
    augmentations = {"darker": lambda x: x.mul_(0.1), "same": lambda x: x}
    rows = invariance(model, [images], augmentations, "4")
    assert rows[0]["distance_ratio"] > 0.1
    assert rows[1]["distance_ratio"] == 0.0
    assert torch.equal(images, before)


def test_what_is_undefined_is_none_with_the_reason(images):
    dead = nn.Sequential(nn.Flatten(), nn.Linear(192, 4, bias=False))
    nn.init.zeros_(dead[1].weight)
    [row] = invariance(dead, [images], {"noise": noisy}, "1")
    assert row["distance_ratio"] is row["cosine"] is None
    assert row["why"] == {
        "distance_ratio": "the features are the same for all samples.",
        "cosine": "the features of 50 samples are zero, and have no angle.",
    }


def test_bad_input_is_refused(model, images):
    with pytest.raises(OptionError, match="at least one augmentation"):
        invariance(model, [images], {}, "4")
    with pytest.raises(DataError, match="'half' must give 50 images for as many"):
        invariance(model, [images], {"half": lambda x: x[:25]}, "4")
    with pytest.raises(DataError, match="fewer than two images"):
        invariance(model, [images[:1]], {"noise": noisy}, "4")
    with pytest.raises(DataError, match="fewer than two images"):
        invariance(model, [], {"noise": noisy}, "4")
    with pytest.raises(UnknownNameError, match="nothing"):
        invariance(model, [images], {"noise": noisy}, "nothing")
    with pytest.raises(DataError, match="augmented images at '4' hold NaN"):
        invariance(model, [images], {"nan": lambda x: x * torch.nan}, "4")
    small = {"crop": lambda x: x[..., :4, :4]}
    with pytest.raises(DataError, match=r"'0' have shape .* pool them"):
        invariance(model, [images], small, "0", pool="flat")
