"""What a script under `headplug-solo` is called in the processes that it starts.

Lightning starts its other ranks, and multiprocessing its spawned workers, by the name of the main
module; under this name they run the same script, with its heads swapped.
"""

from __future__ import annotations

import os
import sys

if __name__ in ("__main__", "__mp_main__"):
    from headplug_solo.launch import SCRIPT, run

    run(os.environ[SCRIPT], sys.argv[1:], globals())
