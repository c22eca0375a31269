"""The views of a batch."""

import numpy as np
import pytest
import torch

from headplug.compare.augment import Views, statistics


def uint8(channels=3, side=32, count=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, channels, side, side), generator=generator, dtype=torch.uint8)


def test_statistics_are_those_of_numpy_in_float64():
    images = uint8()
    values = images.numpy().astype(np.float64) / 255
    mean, std = statistics(images)
    np.testing.assert_allclose(mean, values.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std, values.std(axis=(0, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 8), (3, 64)])
def test_two_different_views_of_the_shape_of_the_images(channels, side):
    images = uint8(channels, side)
    first, second = Views((channels, side, side), torch.zeros(channels), torch.ones(channels))(
        images
    )
    assert first.shape == second.shape == images.shape
    assert first.dtype == torch.float32
    assert first.isfinite().all()
    assert not torch.equal(first, second)


def test_views_are_drawn_from_torchs_seed():
    views = Views((3, 32, 32), torch.zeros(3), torch.ones(3))
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(views(uint8())[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_plain_images_are_standardised_and_nothing_else():
    images = uint8()
    plain = Views((3, 32, 32), *statistics(images)).plain(images)
    assert plain.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (plain.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3
