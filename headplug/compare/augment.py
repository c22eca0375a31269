"""The two views of an image, made on the device by kornia."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Views(nn.Module):
    """SimCLR's augmentation, twice, then the normalisation (arXiv 2002.05709, 2408.14514).

    Colour images: random crop, flip, colour jitter (0.8, 0.8, 0.8, 0.2; p 0.8), grey (p 0.2), blur
    (p 0.5, kernel a tenth of the side). Grey images are often signs, which a flip would change:
    random crop, a small rotation and shift, jitter of brightness and contrast, blur.

    Args:
        shape: (channels, height, width).
        mean: Of each channel, in [0, 1].
        std: The same.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, shape: tuple[int, int, int], mean: Tensor, std: Tensor) -> None:
        super().__init__()
        import kornia.augmentation as K

        channels, *size = shape
        kernel = max(size) // 10 | 1
        blur: list[Any] = []
        if kernel >= 3:
            blur = [K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=0.5)]
        if channels == 3:
            steps = [
                K.RandomResizedCrop(tuple(size)),
                K.RandomHorizontalFlip(),
                K.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
                K.RandomGrayscale(p=0.2),
                *blur,
            ]
        else:
            steps = [
                K.RandomResizedCrop(tuple(size), scale=(0.4, 1.0)),
                K.RandomAffine(degrees=15, translate=(0.1, 0.1), p=0.8),
                K.RandomBrightness((0.6, 1.4), p=0.8),
                K.RandomContrast((0.6, 1.4), p=0.8),
                *blur,
            ]
        self.augment = nn.Sequential(*steps)
        self.register_buffer("mean", mean.view(1, -1, 1, 1))
        self.register_buffer("std", std.view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Two views of uint8 images `(batch, *shape)`, normalised floats of the same shape."""
        with torch.no_grad():
            both = images.repeat(2, 1, 1, 1).float() / 255
            first, second = self.normalize(self.augment(both)).chunk(2)
        return first, second

    def normalize(self, x: Tensor) -> Tensor:
        """Images in [0, 1], normalised, in the memory format that convolutions like best."""
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def plain(self, images: Tensor) -> Tensor:
        """uint8 images as the backbone sees them when features are read: normalised only."""
        return self.normalize(images.float() / 255)


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of uint8 images, on the scale of [0, 1].

    >>> statistics(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
    (tensor([0.5000]), tensor([0.5000]))
    """
    counts = torch.stack(
        [torch.bincount(c.flatten().int(), minlength=256) for c in images.unbind(1)]
    )
    share = counts.double() / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ values
    std = (share @ values.square() - mean.square()).clamp_min(1e-12).sqrt()
    return mean.float(), std.float()
