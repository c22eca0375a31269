"""The command line: options in, calls out, errors as one line.

Heavy imports happen inside the commands, so that `headplug --help` answers at once.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from headplug.errors import DimensionError, HeadplugError, OptionError, UnknownNameError

app = typer.Typer(
    help="Change the projection head of a self-supervised model, and measure which one to use.",
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
state = {"debug": False}
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Data = Annotated[
    str,
    typer.Option(help="digits, torchvision:NAME, an image folder or a folder of parquet files."),
]
ImageSize = Annotated[int | None, typer.Option(help="Resize images to squares of this side.")]


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


@app.command()
def heads(
    pattern: Annotated[str, typer.Argument(help="A name or a glob, e.g. '*moco*'.")] = "*",
    input_dim: Annotated[int, typer.Option(help="Width in front of the heads.")] = 512,
    json_: AsJson = False,
) -> None:
    """List the projection heads with their layers and sizes, or show one whole."""
    from headplug.heads import describe_head, list_heads
    from headplug.heads.zoo import summarise

    names = list_heads(pattern) or [pattern]  # an unknown name is refused by describe_head
    rows = [summarise(describe_head(n), input_dim) for n in names]
    if json_:
        print(json.dumps(rows, indent=1, default=str))
    elif len(rows) == 1:
        for key, value in rows[0].items():
            if key == "defaults":
                key, value = "options", ", ".join(f"{k}={v!r}" for k, v in value.items())
            if isinstance(value, int):
                value = f"{value:,}"
            print(f"{key:16} {'-' if value in ('', None) else value}")
    else:
        _table(
            ["name", "layers", "dims", "parameters", "paper"],
            [[r["name"], r["layers"], r["dims"], _parameters(r), r["paper"]] for r in rows],
        )


@app.command()
def taps(
    model: Annotated[str, typer.Argument(help="A timm model, e.g. timm:resnet18.")],
    image_size: Annotated[int, typer.Option(help="Side of the example image.")] = 224,
    json_: AsJson = False,
) -> None:
    """List the points of a model where features can be read."""
    import torch

    from headplug.compare.backbones import build_backbone
    from headplug.taps import list_taps

    shape = (3, image_size, image_size)
    backbone = build_backbone(model.removeprefix("timm:"), shape, "default")
    rows = list_taps(backbone, torch.zeros(1, *shape))
    if json_:
        print(json.dumps(rows, indent=1, default=str))
    else:
        columns = ["path", "type", "shape", "calls"]
        _table(columns, [[str(r[c]) for c in columns] for r in rows])


@app.command(name="pretrain-ae")
def pretrain_ae(
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    data: Data = "digits",
    latent_dim: Annotated[int, typer.Option(help="Width of the embedding.")] = 256,
    hidden_dim: Annotated[int, typer.Option(help="Feature width of the backbone it is for.")] = 512,
    epochs: int = 100,
    batch_size: int = 100,
    lr: float = 1e-4,
    seed: int = 42,
    limit: Annotated[int | None, typer.Option(help="Use a subset of this many images.")] = None,
    image_size: ImageSize = None,
    device: str = "auto",
) -> None:
    """Pretrain the autoencoder whose embedding layer an ae_embedding head takes."""
    from headplug.autoencoder import pretrain_autoencoder
    from headplug.compare.data import load_data

    if out.suffix != ".safetensors":
        raise OptionError(f"--out must end in .safetensors; it is {str(out)!r}.")
    images = load_data(data, image_size=image_size, limit=limit, seed=seed).train.tensor()
    ae = pretrain_autoencoder(
        images,
        latent_dim,
        hidden_dim,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        device=device,
        resume=out.with_suffix(".partial.pt"),
    )
    ae.save(out)
    mse, epoch = min((h["val_loss"], i + 1) for i, h in enumerate(ae.history))
    print(f"{out}: validation MSE {mse:.4f} (epoch {epoch} of {epochs})")
    print(f"use it: create_head('ae_embedding', input_dim={hidden_dim}, weights='{out}')")


@app.command()
def strip(
    checkpoint: Annotated[Path, typer.Argument(help="A .ckpt, .pt or .safetensors file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors file to write.")],
    backbone: Annotated[str | None, typer.Option(help="Its path in the model.")] = None,
) -> None:
    """Write the backbone of a pretraining checkpoint alone, under torchvision's or timm's names."""
    from headplug.strip import save_backbone

    if out.suffix != ".safetensors":
        raise OptionError(f"--out must end in .safetensors; it is {str(out)!r}.")
    weights = save_backbone(checkpoint, out, backbone)
    count = sum(w.numel() for w in weights.values())
    print(f"{out}: {len(weights)} tensors, {count:,} values ({', '.join(list(weights)[:3])}, ...)")


@app.command()
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
    standardize: Annotated[bool, typer.Option(help="Z-score each channel.")] = False,
    limit: Annotated[int | None, typer.Option(help="Use a subset of this many images.")] = None,
    image_size: ImageSize = None,
    stem: Annotated[str, typer.Option(help="auto, small or default.")] = "auto",
    lr: Annotated[float | None, typer.Option(help="Default: the recipe's, by batch size.")] = None,
    ae_epochs: Annotated[int, typer.Option(help="Of autoencoder pretraining.")] = 100,
    probes: Annotated[str, typer.Option(help="Any of knn,linear,ridge.")] = "knn,linear,ridge",
    devices: Annotated[int, typer.Option(help="On each node; more than one starts torchrun.")] = 1,
    nodes: Annotated[int, typer.Option(help="Machines; start the same command by torchrun.")] = 1,
    precision: Annotated[str, typer.Option(help="As Lightning names it.")] = "32-true",
    workers: Annotated[int, typer.Option(help="Processes that decode images.")] = 0,
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
        heads=_split(heads),
        backbone=backbone,
        recipe=recipe,
        epochs=epochs,
        batch_size=batch_size,
        seeds=_numbers("seeds", seeds, int),
        widths=_numbers("width", width, int),
        output_dims=_numbers("output-dim", output_dim, int),
        activations=_split(activation),
        kappas=_numbers("kappa", kappa, float),
        standardize=standardize,
        limit=limit,
        image_size=image_size,
        stem=stem,
        lr=lr,
        ae_epochs=ae_epochs,
        probes=_split(probes),
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


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or its results.json.")],
    json_: AsJson = False,
) -> None:
    """Print a run's table and write its report.html anew."""
    from headplug.compare.report import write_report

    path = run / "results.json" if run.is_dir() else run
    if not path.is_file():
        raise UnknownNameError(f"there is no {path}; give the folder that compare wrote.")
    try:
        results = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise OptionError(f"{path} is not JSON: {error}.") from None
    write_report(results, path.with_name("report.html"))
    _show(results, path.parent, json_)


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
        print("stopped; the same command goes on after the last whole epoch.", file=sys.stderr)
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


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(name: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in _split(text)]
    except ValueError:
        raise OptionError(f"--{name} takes numbers with commas between, not {text!r}.") from None


def _parameters(row: dict[str, Any]) -> str:
    """How many values of a head are trained, and how many are fixed, for people."""
    trained, fixed = row["params_trainable"], row["params_frozen"]
    return "-" if trained is None else f"{trained:,}" + (f" (+{fixed:,} fixed)" if fixed else "")


def _table(columns: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


def _quiet() -> None:
    """Silences Lightning's advice, which is for people who wrote the training loop."""
    import logging

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


if __name__ == "__main__":
    main()
