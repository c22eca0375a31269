"""Commands that read a model's features."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from headplug.cli.common import (
    AsJson,
    At,
    Backbone,
    BatchSize,
    Data,
    Device,
    ImageSize,
    Limit,
    Model,
    Normalize,
    Pool,
    Pretrained,
    Weights,
    Workers,
    print_table,
)


def taps(
    model: Model,
    weights: Weights = None,
    backbone: Backbone = None,
    image_size: Annotated[int, typer.Option(help="Side of the example image.")] = 224,
    json_: AsJson = False,
) -> None:
    """List the points of a model where features can be read, with what each costs."""
    import torch

    from headplug.heads.base import positive
    from headplug.models import image_channels, load_model
    from headplug.taps import list_taps

    side = positive("image_size", image_size)
    with redirect_stdout(sys.stderr):
        shape = (3, side, side)
        net = load_model(model, shape=shape, weights=weights, backbone=backbone).model
        rows = list_taps(net, torch.zeros(1, image_channels(net, 1), side, side))
    if json_:
        print(json.dumps(rows, indent=1, default=str))
        return
    shown = ["path", "type", "shape", "calls"]
    cells = [[str(r[c]) for c in shown] + [f"{r['cost']:.0%}"] for r in rows]
    print_table([*shown, "cost so far"], cells)


def extract(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of the feature stores, one for each split.")],
    at: At = None,
    data: Data = "digits",
    split: Annotated[str, typer.Option(help="train, test or all.")] = "all",
    pool: Pool = "gap",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    normalize: Normalize = "auto",
    weights: Weights = None,
    backbone: Backbone = None,
    pretrained: Pretrained = True,
    batch_size: BatchSize = 256,
    workers: Workers = 0,
    device: Device = "auto",
    image_size: ImageSize = None,
    limit: Limit = None,
    json_: AsJson = False,
) -> None:
    """Keep the features of a data set at some points of a model; goes on where it was stopped."""
    import os

    from headplug.extraction import extract as run

    with redirect_stdout(sys.stderr):  # libraries and the user's code may print
        done = run(
            model,
            data,
            out,
            at or (),
            split=split,
            pool=pool,
            dtype=dtype,
            normalize=normalize,
            batch_size=batch_size,
            workers=workers,
            device=device,
            image_size=image_size,
            limit=limit,
            weights=weights,
            backbone=backbone,
            pretrained=pretrained,
        )
    if os.environ.get("RANK", "0") != "0":
        return
    if json_:
        print(json.dumps(done, indent=1))
        return
    print(f"model:  {done['model']}\nimages: {done['images']}", file=sys.stderr)
    for store in done["stores"]:
        shapes = [[tap, " x ".join(map(str, shape))] for tap, shape in store["taps"].items()]
        print_table(["tap", "shape"], shapes)
        speed = f"{store['images_per_s']:.0f} images/s" if store["computed"] else "already there"
        print(f"{store['folder']}: {store['samples']} samples, {store['dtype']}, {speed}\n")


COMMANDS = {taps: "taps", extract: "extract"}
