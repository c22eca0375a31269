"""How `+headplug=HEAD` reaches solo-learn's own command line.

Hydra imports this module in every application on the machine, so it imports nothing and does
nothing but in a script that has imported solo-learn's methods, and in the processes that such a
script hands the jobs of a sweep to. It lies in a namespace package that other plugins share: there
must be no `__init__.py` beside it.
"""

from __future__ import annotations

import os
import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

JOBS = "HEADPLUG_SOLO_JOBS"


class HeadplugSearchPathPlugin(SearchPathPlugin):
    """Offers the config group `headplug` and swaps heads, where solo-learn is in use."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called once per application, before its config is read; leaves the search path alone."""
        if "solo.methods" in sys.modules:
            from headplug_solo.config import offer
            from headplug_solo.patch import arm

            offer()
            arm()
            os.environ[JOBS] = "1"


# A launcher (joblib, submitit) sends a job to another process as a config that is composed already:
# no search path is made there, but this module is imported with the state of Hydra.
if JOBS in os.environ:
    from headplug_solo.launch import watch

    watch()
