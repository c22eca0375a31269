"""Options that several commands take, and tables."""

from __future__ import annotations

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Data = Annotated[
    str,
    typer.Option(help="digits, torchvision:NAME, an image folder or a folder of parquet files."),
]
ImageSize = Annotated[int | None, typer.Option(help="Resize images to squares of this side.")]


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


def split(text: str) -> list[str]:
    """The parts of an option with commas between."""
    return [part.strip() for part in text.split(",") if part.strip()]
