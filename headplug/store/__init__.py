"""Features of a model at named points, extracted once: in memory, or on disk to any size.

`extract_features` makes a `FeatureStore`; `FeatureStore.open` reads one again. On disk a store is a
folder of safetensors shards and an index, see `headplug.store.shards`.
"""

from __future__ import annotations

from headplug.store.extract import extract_features
from headplug.store.features import FeatureStore

__all__ = ["FeatureStore", "extract_features"]
