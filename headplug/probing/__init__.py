"""Probes and spectra: what the features of a tap are worth, as functions on tensors.

`probe_layers` runs them all at every tap of two feature stores and returns a `LayerReport`.
"""

from __future__ import annotations

from headplug.probing.knn import KNNSetting, knn_grid, knn_predict
from headplug.probing.layerwise import PROBES, Features, probe_layers
from headplug.probing.linear import LinearModels, LinearSetting, fit_linear, linear_grid
from headplug.probing.report import LayerReport, wilson_interval
from headplug.probing.ridge import RidgeSetting, fit_ridge, ridge_grid
from headplug.probing.spectrum import (
    DEFINITIONS,
    effective_rank,
    rankme,
    singular_values,
    spectrum,
)

__all__ = [
    "DEFINITIONS",
    "PROBES",
    "Features",
    "KNNSetting",
    "LayerReport",
    "LinearModels",
    "LinearSetting",
    "RidgeSetting",
    "effective_rank",
    "fit_linear",
    "fit_ridge",
    "knn_grid",
    "knn_predict",
    "linear_grid",
    "probe_layers",
    "rankme",
    "ridge_grid",
    "singular_values",
    "spectrum",
    "wilson_interval",
]
