"""The bases that let one callback serve both Lightning packages.

A trainer calls all hooks of its own kind of Callback, so a callback of ours derives from the one of
whichever package is loaded.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

from headplug.errors import HeadplugError

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")


def callback_bases() -> tuple[type, ...]:
    """The Callback classes of the Lightning packages that are loaded; else of one installed.

    Raises:
        HeadplugError: None is installed.
    """
    loaded = [n for n in NAMESPACES if n in sys.modules]
    found = loaded or [n for n in NAMESPACES if find_spec(n.partition(".")[0])][:1]
    if not found:
        raise HeadplugError("headplug.callbacks needs Lightning: pip install lightning")
    return tuple(dict.fromkeys(import_module(name).Callback for name in found))
