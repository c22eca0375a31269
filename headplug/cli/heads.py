"""Commands for heads: the zoo, an autoencoder for one, a backbone without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from headplug.cli.common import AsJson, Data, ImageSize, print_table
from headplug.errors import OptionError


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
        print_table(
            ["name", "layers", "dims", "parameters", "paper"],
            [[r["name"], r["layers"], r["dims"], _parameters(r), r["paper"]] for r in rows],
        )


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


def _parameters(row: dict[str, Any]) -> str:
    """How many values of a head are trained, and how many are fixed, for people."""
    trained, fixed = row["params_trainable"], row["params_frozen"]
    return "-" if trained is None else f"{trained:,}" + (f" (+{fixed:,} fixed)" if fixed else "")


COMMANDS = {heads: "heads", pretrain_ae: "pretrain-ae", strip: "strip"}
