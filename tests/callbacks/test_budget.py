"""What LayerProbe may spend: arithmetic on seconds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headplug.callbacks.budget import Budget
from headplug.errors import OptionError

seconds = st.floats(0.01, 100)


@given(st.floats(0.01, 1), seconds, st.lists(seconds, max_size=50))
def test_runs_of_one_length_never_take_more_than_their_fraction(
    fraction: float, run: float, between: list[float]
) -> None:
    budget, runs = Budget(fraction), 0
    for gap in between:
        budget.around += gap
        if budget.allows():
            budget.add(run)
            runs += 1
            share = budget.spent / (budget.spent + budget.around)
            assert runs == 1 or share <= fraction + 1e-9
        else:
            share = (budget.spent + run) / (budget.spent + run + budget.around)
            assert share > fraction - 1e-9
    assert runs >= min(1, len(between))


@given(seconds, seconds, st.floats(0.01, 0.9), st.integers(1, 1000))
def test_the_advice_makes_room_for_every_run(
    run: float, between: float, fraction: float, every: int
) -> None:
    budget = Budget(fraction, spent=run, around=between, last=run, due=1)
    words = budget.advice("every_n_steps", every)
    if run / (run + between) <= fraction:
        return
    room = int(words.partition("every_n_steps=")[2].partition(",")[0])
    assert run / (run + between * room / every) <= fraction * 1.001
    asked = float(words.rpartition("max_fraction_of_time=")[2].rstrip("."))
    again = Budget(min(asked, 1.0))
    for _ in range(20):
        again.around += between
        assert again.allows()
        again.add(run)


def test_numbers_are_in_the_advice() -> None:
    words = Budget(0.1, spent=3.0, around=9.0, last=3.0, due=1).advice("every_n_epochs", 2)
    assert "a run takes 3 s and training 9 s between two of them" in words
    assert "25% of the time; max_fraction_of_time is 0.1" in words
    assert "every_n_epochs=6" in words
    assert "max_fraction_of_time=0.26" in words


def test_without_a_bound_all_is_allowed() -> None:
    assert Budget(None, spent=1e9, last=1e9).allows()


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, float("nan"), True, "0.1"])
def test_what_is_no_fraction_is_refused(fraction: Any) -> None:
    with pytest.raises(OptionError, match="max_fraction_of_time must lie above 0"):
        Budget(fraction)
