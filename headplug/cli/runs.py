"""Commands for comparisons of heads."""

from __future__ import annotations

import json
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from headplug.cli.common import (
    AsJson,
    Data,
    ImageSize,
    Limit,
    Probes,
    Protocol,
    Workers,
    numbers,
    split,
)
from headplug.errors import OptionError


def compare(
    data: Data = "digits",
    heads: Annotated[
        str, typer.Option(help="Names, with commas between.")
    ] = "simclr,ae_embedding,reweighting",
    backbone: Annotated[str, typer.Option(help="A timm model.")] = "resnet18",
    recipe: Annotated[
        str, typer.Option(help="simclr, byol, simsiam, barlow_twins or vicreg.")
    ] = "simclr",
    epochs: Annotated[int, typer.Option(help="Of training, for each head and seed.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Images a step, on each device.")] = 256,
    seeds: Annotated[str, typer.Option(help="e.g. 0,1,2")] = "0",
    width: Annotated[str, typer.Option(help="Hidden or embedding widths, e.g. 128,256.")] = "",
    output_dim: Annotated[str, typer.Option(help="Projection widths, e.g. 32,64.")] = "",
    activation: Annotated[str, typer.Option(help="Activations, e.g. relu,tanh.")] = "",
    kappa: Annotated[str, typer.Option(help="Of the reweighting head, e.g. 1.02,1.05.")] = "",
    standardize: Annotated[
        bool | None,
        typer.Option(help="Z-score each channel; default: as pretrained weights need it, or not."),
    ] = None,
    limit: Limit = None,
    image_size: ImageSize = None,
    stem: Annotated[str, typer.Option(help="auto, small or default.")] = "auto",
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start from timm's weights, not random ones.")
    ] = False,
    lr: Annotated[float | None, typer.Option(help="Default: the recipe's, by batch size.")] = None,
    ae_epochs: Annotated[int, typer.Option(help="Of autoencoder pretraining.")] = 100,
    probes: Probes = "",
    protocol: Protocol = "headplug",
    devices: Annotated[int, typer.Option(help="On each node; more than one starts torchrun.")] = 1,
    nodes: Annotated[int, typer.Option(help="Machines; start the same command by torchrun.")] = 1,
    precision: Annotated[str, typer.Option(help="As Lightning names it.")] = "32-true",
    workers: Workers = 0,
    out: Annotated[str | None, typer.Option(help="Folder of the run.")] = None,
    json_: AsJson = False,
) -> None:
    """Train a model with each head, probe every layer, say which head and layer win."""
    from headplug.compare import Plan
    from headplug.compare import compare as run
    from headplug.compare.processes import launched

    _quiet()
    plan = Plan(
        data=data,
        heads=split(heads),
        backbone=backbone,
        recipe=recipe,
        epochs=epochs,
        batch_size=batch_size,
        seeds=numbers("seeds", seeds, int),
        widths=numbers("width", width, int),
        output_dims=numbers("output-dim", output_dim, int),
        activations=split(activation),
        kappas=numbers("kappa", kappa, float),
        standardize=standardize,
        limit=limit,
        image_size=image_size,
        stem=stem,
        pretrained=pretrained,
        lr=lr,
        ae_epochs=ae_epochs,
        probes=split(probes),
        protocol=protocol,
        devices=devices,
        nodes=nodes,
        precision=precision,
        workers=workers,
        out=out,
    )
    if devices * nodes > 1 and not launched():
        _under_torchrun(devices, nodes)
    command = shlex.join(["headplug", *sys.argv[1:]])
    results = run(plan, say=lambda line: print(line, file=sys.stderr), command=command)
    if results:  # there are none on the other of several processes
        _show(results, plan.folder, json_)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of runs of headplug compare or headplug probe."),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the page of several runs.")] = None,
    json_: AsJson = False,
) -> None:
    """Print a run's table and write its report.html anew; of several runs, compare them."""
    from headplug.compare.merge import merge, read_results
    from headplug.compare.report import write_report
    from headplug.files import write_json

    results = merge({str(run): read_results(run) for run in runs})
    only = runs[0] if runs[0].is_dir() else runs[0].parent
    folder = out or (only if len(runs) == 1 else Path("runs/report"))
    if folder != only or len(runs) > 1:
        write_json(folder / "results.json", results)
    write_report(results, folder / "report.html")
    _show(results, folder, json_)


def _show(results: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Prints the outcome of a comparison, and where it stands."""
    from headplug.compare.digest import answer, results_table

    if as_json:
        print(json.dumps(results, indent=1))
        return
    print(results_table(results), "", *answer(results), "", sep="\n")
    print(f"results: {folder / 'results.json'}\nreport:  {folder / 'report.html'}")


def _under_torchrun(devices: int, nodes: int) -> NoReturn:
    """Starts this very command again, once per device."""
    if nodes > 1:
        raise OptionError(
            f"--nodes {nodes}: start the command on every node with torchrun --nnodes {nodes} "
            f"--nproc-per-node {devices} ... -m headplug.cli compare ..., or with srun."
        )
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
    os.execv(sys.executable, [sys.executable, *launch, "-m", "headplug.cli", *sys.argv[1:]])


def _quiet() -> None:
    """Silences Lightning's advice, which is for people who wrote the training loop."""
    import logging

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


COMMANDS = {compare: "compare", report: "report"}
