"""Probes: what the features of a tap are worth, as functions on tensors.

`probe_layers` runs them at every tap of two feature stores and returns a `LayerReport`.
"""

from __future__ import annotations

from headplug import diagnostics
from headplug.probing import metrics
from headplug.probing.intervals import wilson_interval
from headplug.probing.knn import KNNSetting, knn_grid, knn_predict
from headplug.probing.layerwise import probe_layers
from headplug.probing.linear import LinearSetting, LinearTraining, fit_linear, linear_grid
from headplug.probing.live import fit_linear_on
from headplug.probing.logistic import LogisticSetting, fit_logistic, logistic_grid
from headplug.probing.mlp import MLPSetting, fit_mlp, mlp_grid
from headplug.probing.models import LinearModels
from headplug.probing.probes import PROBES, Probe
from headplug.probing.protocols import PROTOCOLS, ProbeProtocol
from headplug.probing.report import LayerReport
from headplug.probing.ridge import RidgeSetting, fit_ridge, ridge_grid
from headplug.probing.tasks import Features

DEFINITIONS = {**metrics.DEFINITIONS, **diagnostics.DEFINITIONS}

__all__ = [
    "DEFINITIONS",
    "PROBES",
    "PROTOCOLS",
    "Features",
    "KNNSetting",
    "LayerReport",
    "LinearModels",
    "LinearSetting",
    "LinearTraining",
    "LogisticSetting",
    "MLPSetting",
    "Probe",
    "ProbeProtocol",
    "RidgeSetting",
    "fit_linear",
    "fit_linear_on",
    "fit_logistic",
    "fit_mlp",
    "fit_ridge",
    "knn_grid",
    "knn_predict",
    "linear_grid",
    "logistic_grid",
    "mlp_grid",
    "probe_layers",
    "ridge_grid",
    "wilson_interval",
]
