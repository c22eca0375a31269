"""The main job: train a model with each head, probe every layer, and say which head and layer win.

`compare` is what `headplug compare` runs; it needs the extra `headplug[compare]`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headplug.compare.job import compare
    from headplug.compare.plan import Plan

__all__ = ["Plan", "compare"]


def __getattr__(name: str) -> Any:
    """Imports what training needs when it is asked for: its data sets need no Lightning."""
    if name == "compare":
        from headplug.compare.job import compare

        return compare
    if name == "Plan":
        from headplug.compare.plan import Plan

        return Plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
