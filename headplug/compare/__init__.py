"""The main job: train a model with each head, probe every layer, and say which head and layer win.

`compare` is what `headplug compare` runs; it needs the extra `headplug[compare]`.
"""

from headplug.compare.job import compare
from headplug.compare.plan import Plan

__all__ = ["Plan", "compare"]
