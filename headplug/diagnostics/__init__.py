"""What features say about themselves, tap by tap, without labels.

`diagnose` gives ranks, spectra and dead units of every tap; `weight_profiles` how a layer weights
the features it is given; `cka` how alike taps are; `diagnose_views` and `invariance` what
augmentations do to them; `separation` how the kernels of RBF heads are spread. Each number has one
stated definition with switches where the literature differs, and each result says which was used.
"""

from __future__ import annotations

from headplug.diagnostics.augmented import invariance
from headplug.diagnostics.describe import DEFINITIONS, describe, diagnose
from headplug.diagnostics.moments import Moments
from headplug.diagnostics.options import SpectrumOptions, definitions
from headplug.diagnostics.profile import weight_profile, weight_profiles
from headplug.diagnostics.rbf import separation
from headplug.diagnostics.scatter import LiDAR, lidar
from headplug.diagnostics.similarity import cka, linear_cka
from headplug.diagnostics.spectrum import PowerLaw, Spectrum
from headplug.diagnostics.views import (
    VIEW_DEFINITIONS,
    alignment,
    describe_views,
    diagnose_views,
    uniformity,
)

__all__ = [
    "DEFINITIONS",
    "VIEW_DEFINITIONS",
    "LiDAR",
    "Moments",
    "PowerLaw",
    "Spectrum",
    "SpectrumOptions",
    "alignment",
    "cka",
    "definitions",
    "describe",
    "describe_views",
    "diagnose",
    "diagnose_views",
    "invariance",
    "lidar",
    "linear_cka",
    "separation",
    "uniformity",
    "weight_profile",
    "weight_profiles",
]
