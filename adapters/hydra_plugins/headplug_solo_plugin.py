"""How `+headplug=HEAD` reaches solo-learn's own command line.

Hydra imports this module in every application on the machine, so it imports nothing, and does
nothing until solo-learn's methods are imported: most often before this module is; in the processes
that a launcher (joblib, submitit) hands the jobs of a sweep to, after it; and in a script that
imports them inside its `main`, too. It lies in a namespace package that other plugins share: there
must be no `__init__.py` beside it.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

METHODS = "solo.methods"


class HeadplugSearchPathPlugin(SearchPathPlugin):
    """Offers the config group `headplug`, where solo-learn is in use."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called once per application, before its config is read; leaves the search path alone."""
        if METHODS in sys.modules:
            from headplug_solo.config import offer
            from headplug_solo.patch import roots

            if roots():
                offer()
                _watch()


class _Watcher(MetaPathFinder):
    """Has the heads swapped as soon as solo-learn's methods are imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """The module as others find it."""
        if name != METHODS:
            return None
        sys.meta_path.remove(self)
        _watch()
        return importlib.util.find_spec(name)


def _watch() -> None:
    from headplug_solo.launch import watch

    watch()


if METHODS in sys.modules:
    _watch()
else:
    sys.meta_path.insert(0, _Watcher())
