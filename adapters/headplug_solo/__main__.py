"""`python -m headplug_solo SCRIPT ...`: the same as `headplug-solo SCRIPT ...`."""

from headplug_solo.launch import main

main()
