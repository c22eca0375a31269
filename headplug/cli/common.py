"""Options that several commands take, and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from headplug.errors import OptionError

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Data = Annotated[
    str,
    typer.Option(help="digits, torchvision:NAME, an image folder or a folder of parquet files."),
]
ImageSize = Annotated[int | None, typer.Option(help="Resize images to squares of this side.")]
Limit = Annotated[int | None, typer.Option(help="Use a subset of this many images of a split.")]
Workers = Annotated[int, typer.Option(help="Processes that decode images.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
BatchSize = Annotated[int, typer.Option(help="Images a step, on each device.")]
Weights = Annotated[
    Path | None, typer.Option(help="A checkpoint to fill a library's model or yours with.")
]
Backbone = Annotated[
    str | None,
    typer.Option(help="What a checkpoint is of if it does not say, e.g. torchvision:resnet18."),
]
Pretrained = Annotated[
    bool,
    typer.Option(
        "--pretrained/--random", help="Weights of a library's model if there are no others."
    ),
]
Pool = Annotated[str, typer.Option(help="gap, flat, cls, cls+gap or tokens.")]
Normalize = Annotated[
    str,
    typer.Option(
        help="auto (as the model was trained, if known), imagenet, none, or MEAN/STD by channel, "
        "e.g. 0.49,0.48,0.45/0.2,0.2,0.2."
    ),
]
Probes = Annotated[
    str, typer.Option(help="Any of knn,linear,ridge,logistic,mlp; default: the protocol's.")
]
Protocol = Annotated[
    str, typer.Option(help="headplug, simclr, moco, dino, dinov2, lightly, solo-learn or ae.")
]
Model = Annotated[
    str,
    typer.Argument(
        help="timm:NAME, torchvision:NAME, MODULE:CALLABLE, or a checkpoint of solo-learn, lightly "
        "or Lightning."
    ),
]
At = Annotated[
    list[str] | None,
    typer.Option(
        help="A point to read, as headplug taps lists; repeat for more. Left out: the stages of "
        "the backbone, and before, inside and after the head, or else the model's output."
    ),
]


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


def split(text: str) -> list[str]:
    """The parts of an option with commas between."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(name: str, text: str, kind: type) -> list[Any]:
    """The numbers of an option with commas between.

    Raises:
        OptionError: They are no numbers.
    """
    try:
        return [kind(part) for part in split(text)]
    except ValueError:
        raise OptionError(f"--{name} takes numbers with commas between, not {text!r}.") from None
