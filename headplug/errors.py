"""Errors that say what was asked, what was found and what to type next.

One base class to catch, and a subclass per kind of mistake that is also the built-in a caller would
expect (`ValueError`, `LookupError`), so that code which knows nothing of headplug can handle it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HeadplugError(Exception):
    """Base of every error that headplug raises on purpose."""


class OptionError(HeadplugError, ValueError):
    """An option is unknown, has the wrong type or an impossible value."""


class UnknownNameError(HeadplugError, LookupError):
    """A head, tap, slot, file or other named thing does not exist."""


class DimensionError(HeadplugError, ValueError):
    """Two widths that must agree do not."""


class SlotError(HeadplugError, ValueError):
    """A head cannot be found, or cannot be swapped safely."""


class TapError(HeadplugError, RuntimeError):
    """A tap cannot be placed, or has nothing to read."""


class DataError(HeadplugError, ValueError):
    """Images, labels or features that cannot be used."""


class CheckpointError(HeadplugError, ValueError):
    """A file of weights that cannot be read safely or does not hold what was asked for."""


class RunError(HeadplugError, RuntimeError):
    """A run that cannot start, go on or be resumed."""


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> UnknownNameError:
    """The error for a name that is not there: what was asked, the closest names, what to type.

    Args:
        kind: What the name stands for, in the singular: "head", "tap".
        name: The name that was asked for.
        known: The names that exist.
        hint: One sentence on how to list them.

    >>> unknown("head", "simclir", ["simclr", "byol"], "list_heads() shows all.")
    UnknownNameError("no head is called 'simclir'. Closest: simclr. list_heads() shows all.")
    """
    known = list(known)
    by_lower = {k.lower(): k for k in known}
    close = [by_lower[k] for k in difflib.get_close_matches(name.lower(), by_lower, 4, 0.5)]
    if close:
        found = f"Closest: {', '.join(close)}."
    elif known:
        more = ", ..." if len(known) > 8 else ""
        found = f"There {'is' if len(known) == 1 else 'are'}: {', '.join(known[:8])}{more}."
    else:
        found = "There are none."
    return UnknownNameError(" ".join(filter(None, [f"no {kind} is called {name!r}.", found, hint])))
