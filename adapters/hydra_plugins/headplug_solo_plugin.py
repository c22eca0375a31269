"""How `+headplug=HEAD` reaches solo-learn's own command line.

Hydra imports this module in every application on the machine, so it imports nothing and does
nothing but in a script that has imported solo-learn's methods. It lies in a namespace package that
other plugins share: there must be no `__init__.py` beside it.
"""

from __future__ import annotations

import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class HeadplugSearchPathPlugin(SearchPathPlugin):
    """Offers the config group `headplug` and swaps heads, where solo-learn is in use."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called once per application, before its config is read; leaves the search path alone."""
        if "solo.methods" in sys.modules:
            from headplug_solo.config import offer
            from headplug_solo.patch import arm

            offer()
            arm()
