"""headplug: change the projection head of a self-supervised model, and measure which one to use."""

from headplug.autoencoder import Autoencoder, pretrain_autoencoder
from headplug.errors import HeadplugError
from headplug.heads import (
    AEEmbeddingHead,
    MLPHead,
    ProjectionHead,
    ReweightingHead,
    create_head,
    describe_head,
    list_heads,
    register_head,
)
from headplug.hosts import HeadSlot, find_slots
from headplug.probing import LayerReport, probe_layers
from headplug.store import FeatureStore, extract_features
from headplug.swap import swap_head
from headplug.taps import Tap, features, list_taps, tap

__version__ = "0.1.0"

__all__ = [
    "AEEmbeddingHead",
    "Autoencoder",
    "FeatureStore",
    "HeadSlot",
    "HeadplugError",
    "LayerReport",
    "MLPHead",
    "ProjectionHead",
    "ReweightingHead",
    "Tap",
    "create_head",
    "describe_head",
    "extract_features",
    "features",
    "find_slots",
    "list_heads",
    "list_taps",
    "pretrain_autoencoder",
    "probe_layers",
    "register_head",
    "swap_head",
    "tap",
]
