"""Warnings of what is done again and again, each shown once."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

NUMBER = re.compile(r"(?<![\w.'])[-+]?\d+(\.\d+)?(e[-+]?\d+)?")  # but for parts of names


@contextmanager
def once(said: set[str]) -> Iterator[None]:
    """Keeps warnings of the block back that were shown before, if perhaps with other numbers.

    Args:
        said: What was shown; what is shown now is added.

    >>> said = set()
    >>> with warnings.catch_warnings(record=True) as shown:
    ...     for gap in (0.1, 0.2):
    ...         with once(said):
    ...             warnings.warn(f"a gap of {gap}")
    >>> [str(w.message) for w in shown]
    ['a gap of 0.1']
    """
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield
    finally:
        for w in caught:
            text = NUMBER.sub("", str(w.message))
            if text not in said:
                said.add(text)
                warnings.warn_explicit(w.message, w.category, w.filename, w.lineno, source=w.source)
