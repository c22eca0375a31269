"""The command line: options in, calls out, errors as one line.

Heavy imports happen inside the commands, so that `headplug --help` answers at once.
"""

from __future__ import annotations

import sys
import warnings
from importlib import metadata
from typing import Annotated, NoReturn

import typer

from headplug.cli import features, heads, probes, runs
from headplug.errors import DimensionError, HeadplugError, OptionError, UnknownNameError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Change the projection head of a self-supervised model, and measure which one to use.",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
state = {"debug": False}


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    """Options of every command."""
    state["debug"] = debug
    if version:
        print(metadata.version("headplug"))
        raise typer.Exit


for group in (heads, features, probes, runs):
    for command, name in group.COMMANDS.items():
        app.command(name)(command)


def main() -> NoReturn:
    """The console script: exit code 0, 2 for a mistake in what was typed, 1 for other failures."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        code = app(standalone_mode=False) or 0  # typer returns 130 for Ctrl-C
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if state["debug"]:
            raise
        code, message = _explain(error)
        if message:
            print(f"error: {message}", file=sys.stderr)
    if code == 130:
        print("stopped; the same command goes on after what is finished.", file=sys.stderr)
    sys.exit(code)


def _explain(error: Exception) -> tuple[int, str]:
    """The exit code and the one line that an error deserves."""
    if hasattr(error, "format_message"):  # typer's own: an unknown option or command
        message = error.format_message()
        return 2, f"{message.rstrip('.')}. See headplug --help." if message else ""
    if isinstance(error, HeadplugError):
        usage = isinstance(error, OptionError | UnknownNameError | DimensionError)
        return 2 if usage else 1, str(error)
    if isinstance(error, ImportError):
        missing = error.name or error
        return 1, f"{missing} is missing; install it with: pip install 'headplug[compare]'"
    return 1, f"{type(error).__name__}: {error} (headplug --debug ... shows where)"
