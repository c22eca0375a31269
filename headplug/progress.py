"""One progress bar for all long work: what, how far, how long still."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(
    what: str, total: int | None, *, done: int = 0, show: bool = True
) -> Iterator[Callable[..., None]]:
    """Shows a bar with an ETA on stderr while the block runs.

    Args:
        what: Its label.
        total: Number of steps, if known.
        done: Steps that an earlier run did.
        show: Whether to show anything.

    Yields:
        A function to call after each step, with a short note (e.g. the loss) or "", and the number
        of steps if it was more than one.
    """
    if not show:
        yield lambda note, steps=1: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, completed=done, note="")
        yield lambda note, steps=1: bar.update(task, advance=steps, note=note)
