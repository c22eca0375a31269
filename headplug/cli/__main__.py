"""`python -m headplug.cli`."""

from headplug.cli import main

main()
