"""Callbacks for Lightning trainers, `lightning.pytorch` and `pytorch_lightning` alike."""

from __future__ import annotations

from headplug.callbacks.layers import LayerProbe
from headplug.callbacks.swap import HeadSwap

__all__ = ["HeadSwap", "LayerProbe"]
