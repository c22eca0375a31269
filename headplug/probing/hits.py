"""Which samples a probe got right, as a few characters of JSON."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def packed(hits: Tensor) -> dict[str, Any]:
    """Hits `(R, M)` as plain values."""
    bits = np.packbits(hits.numpy()).tobytes()
    return {"shape": list(hits.shape), "bits": base64.b64encode(zlib.compress(bits)).decode()}


def unpacked(packed: Mapping[str, Any] | None) -> Tensor:
    """The same as a tensor; an empty one of None."""
    if packed is None:
        return torch.empty(0)
    count = int(np.prod(packed["shape"]))
    bits = np.frombuffer(zlib.decompress(base64.b64decode(packed["bits"])), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(bits, count=count).astype(bool)).view(packed["shape"])
