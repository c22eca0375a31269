"""The command that probes features."""

from __future__ import annotations

import json
import os
import re
import shlex
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
    Normalize,
    Pool,
    Pretrained,
    Probes,
    Protocol,
    Weights,
    Workers,
    numbers,
    split,
)


def probe(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder that headplug extract wrote, or a model: timm:NAME, torchvision:NAME, "
            "MODULE:CALLABLE, or a checkpoint of solo-learn, lightly or Lightning."
        ),
    ],
    data: Data = "digits",
    at: At = None,
    probes: Probes = "",
    protocol: Protocol = "headplug",
    select_on: Annotated[
        str | None, typer.Option(help="Choose settings on held-out train, or on test.")
    ] = None,
    held_out: Annotated[
        float | None, typer.Option(help="Part of train that settings are chosen on.")
    ] = None,
    shots: Annotated[
        str, typer.Option(help="Also with few samples of each class, e.g. 1,5,10.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Of the samples held out, and of training.")] = 0,
    name: Annotated[
        str | None, typer.Option(help="What to call it in tables; default: the file's name.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.")] = None,
    weights: Weights = None,
    backbone: Backbone = None,
    pretrained: Pretrained = True,
    pool: Pool = "gap",
    normalize: Normalize = "auto",
    batch_size: BatchSize = 256,
    workers: Workers = 0,
    device: Device = "auto",
    image_size: ImageSize = None,
    limit: Limit = None,
    json_: AsJson = False,
) -> None:
    """Probe every layer of a model, or features on disk; say which layer to use."""
    from headplug.evaluation import check_options, evaluate, is_stores

    few = numbers("shots", shots, int)
    wanted = check_options(split(probes) or None, protocol, select_on, held_out, few)
    folder = out or Path("runs") / f"probe-{re.sub(r'[^a-zA-Z0-9._]+', '-', source).strip('-.')}"
    label = name or _label(source)
    command = shlex.join(["headplug", *sys.argv[1:]])
    options = {"seed": seed, "device": device, "show_progress": True, **wanted}
    with redirect_stdout(sys.stderr):  # libraries and the user's code may print
        stored = is_stores(source)
        first = os.environ.get("RANK", "0") == "0"  # it probes alone
        if stored and first:
            report, results = evaluate(
                Path(source), folder, name=label, command=command, taps=at or (), **options
            )
        elif not stored:
            from headplug.extraction import extract

            done = extract(
                source,
                data,
                folder / "features",
                at or (),
                pool=pool,
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
            if not first:
                return
            about = {"model": done["model"], "data": data, "images": done["images"], "pool": pool}
            report, results = evaluate(
                folder / "features", folder, name=label, command=command, config=about, **options
            )
        else:
            return
    if json_:
        print(json.dumps(results, indent=1))
        return
    print(report.table(), "", f"protocol {protocol}:", sep="\n")
    print(report.setting, "", sep="\n")
    print(*(f"{what}: {folder / file}" for what, file in FILES.items()), sep="\n")


def _label(source: str) -> str:
    """What a model or a folder of features is called."""
    path = Path(source.rpartition(":")[2])
    if path.is_dir() and path.name == "features":
        path = path.absolute().parent
    if path.name == "model.safetensors":
        path = path.absolute().parent
    return path.stem if path.is_file() else path.name


FILES = {"results": "results.json", "report ": "report.html", "picture": "layers.png"}
COMMANDS = {probe: "probe"}
