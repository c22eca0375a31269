"""How much of a training run may go into something that is done every now and then."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

from headplug.errors import OptionError


@dataclass
class Budget:
    """Seconds spent and seconds left, by what was measured so far.

    The first run is always allowed, since nothing is known of its cost; a later one if, when it
    takes as long as the last one did, all runs together have taken no more than their share.

    Args:
        fraction: Of the whole time, runs included, that they may take; None for any.
        spent: Seconds of all runs.
        around: Seconds of all else.
        last: Seconds of the last run.
        due: How often a run was due.

    Raises:
        OptionError: The fraction is none.

    >>> Budget(0.1, spent=1.0, around=17.0, last=1.0).allows()
    False
    >>> Budget(0.1, spent=1.0, around=18.0, last=1.0).allows()
    True
    """

    fraction: float | None
    spent: float = 0.0
    around: float = 0.0
    last: float = 0.0
    due: int = 0

    def __post_init__(self) -> None:
        number = isinstance(self.fraction, Real) and not isinstance(self.fraction, bool)
        if self.fraction is not None and not (number and 0 < self.fraction <= 1):
            raise OptionError(
                "max_fraction_of_time must lie above 0 and be at most 1, or be None for no bound, "
                f"not {self.fraction!r}."
            )

    def add(self, seconds: float) -> None:
        """Counts a run."""
        self.spent += seconds
        self.last = seconds

    def allows(self) -> bool:
        """Whether another run keeps within the fraction."""
        if self.fraction is None or not self.spent:
            return True
        after = self.spent + self.last
        return after <= self.fraction * (after + self.around)

    def advice(self, option: str, every: int) -> str:
        """What runs cost and what would make room for all of them, in numbers.

        Args:
            option: What says how often runs are due.
            every: Its value now.
        """
        between = self.around / max(self.due, 1)
        share = self.last / (self.last + between)
        bound = self.fraction or 1.0
        room = math.ceil(every * self.last * (1 - bound) / (bound * between)) if between else every
        return (
            f"a run takes {self.last:.2g} s and training {between:.2g} s between two of them, so "
            f"that runs would take {share:.0%} of the time; max_fraction_of_time is {bound:.3g}. "
            "Runs for which there is no time are left out. For regular ones ask for "
            f"{option}={max(room, every + 1)}, for smaller train and test data, or for "
            f"max_fraction_of_time={min(1.0, math.ceil(100 * share + 1) / 100):.3g}."
        )
