"""The main job: train a model with each head, probe every layer, and say which head and layer win.

`compare` is what `headplug compare` runs; it needs the extra `headplug[compare]`.
"""

from headplug.compare.plan import Plan
from headplug.compare.runs import compare

__all__ = ["Plan", "compare"]
