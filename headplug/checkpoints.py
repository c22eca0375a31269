"""Reading weights without ever unpickling: safetensors, or torch files with `weights_only=True`."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headplug.errors import CheckpointError, UnknownNameError

Weights = str | Path | Mapping[str, Any] | nn.Module | tuple[Tensor, Tensor]
WRAPPERS = ("state_dict", "model_state_dict", "model")


def read_state_dict(path: str | Path) -> dict[str, Any]:
    """The tensors in a file, or in a pythae folder, by name.

    Args:
        path: A `.safetensors` file, a file written by `torch.save` (Lightning's `.ckpt` included),
            or a folder that holds pythae's `model.pt`.

    Raises:
        UnknownNameError: There is no such file.
        CheckpointError: The file is damaged, or holds objects that would have to be unpickled.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.pt"
    if not path.is_file():
        raise UnknownNameError(f"there is no file {str(path)!r}; check the path.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not _looks_pickled(path):
            raise CheckpointError(f"{path} is not a checkpoint; is it damaged?") from None
        content = _beside_objects(path)
        if content is None:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise CheckpointError(
                f"{path} holds more than tensors{f' ({named[1]})' if named else ''}, and headplug "
                "never unpickles. Re-save it where you trust it: torch.save(model.state_dict(), "
                "path)."
            ) from None
    except Exception as error:  # torch and safetensors raise many types for a damaged file
        raise CheckpointError(f"{path} is not a readable checkpoint: {_first(error)}") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict.")
    return {str(k): v for k, v in unwrapped(content).items()}


def unwrapped(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict in what a trainer saves around it."""
    for key in WRAPPERS:
        if isinstance(content.get(key), Mapping):
            content = content[key]
    return content


def below(state: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The part of a state dict that lies below a path, under names from there.

    >>> below({"head.0.weight": 1, "backbone.weight": 2}, "head")
    {'0.weight': 1}
    """
    prefix = f"{path}." if path else ""
    return {k.removeprefix(prefix): v for k, v in state.items() if str(k).startswith(prefix)}


def plain_name(key: str, wrappers: tuple[str, ...] = ("module.", "_orig_mod.")) -> str:
    """A key without what DDP and torch.compile put in front of it or into it.

    >>> plain_name("module.backbone._orig_mod.conv1.weight")
    'backbone.conv1.weight'
    """
    key = key.replace("._orig_mod.", ".")
    while key.startswith(wrappers):
        key = key.partition(".")[2]
    return key


def opened(source: Any) -> tuple[str, Any]:
    """What to call a source of weights in messages, and its state dict if a file or module is it.

    Raises:
        UnknownNameError, CheckpointError: As `read_state_dict` does.
    """
    if isinstance(source, str | Path):
        return str(source), read_state_dict(source)
    where = type(source).__name__
    return where, source.state_dict() if isinstance(source, nn.Module) else source


def read_embedding(source: Any) -> tuple[Tensor, Tensor]:
    """The embedding layer of an autoencoder, whatever form it comes in.

    Args:
        source: A path to headplug's `.safetensors`, to a Lightning `.ckpt` of the AE paper's code,
            to pythae's `model.pt` or its folder, or to a bare state dict (keys with or without
            `encoder.`); or such a state dict; or a module that has an `embedding` layer; or an
            `nn.Linear`; or the pair of its weight and bias.

    Returns:
        Weight `(embedding, hidden)` and bias `(embedding,)`, float32 copies on the CPU.

    Raises:
        UnknownNameError: The file does not exist.
        CheckpointError: It cannot be read safely, or has no single embedding layer.
    """
    where, source = opened(source)
    if isinstance(source, Mapping):
        weight, bias = _find_embedding(source, where)
    elif isinstance(source, tuple) and len(source) == 2:
        weight, bias = source
    else:
        raise CheckpointError(
            f"cannot read an embedding layer from a {where}; pass a path, a state dict, a module "
            "or the pair (weight, bias)."
        )
    shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (weight, bias)]
    if not (isinstance(weight, Tensor) and isinstance(bias, Tensor)) or (
        weight.ndim != 2 or bias.shape != weight.shape[:1]
    ):
        raise CheckpointError(
            f"the embedding layer in {where} should be a weight (embedding, hidden) and a bias "
            f"(embedding,); found {shapes[0]} and {shapes[1]}."
        )
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise CheckpointError(f"the embedding layer in {where} has values that are not finite.")
    # clone: the head must share no storage with the source
    return tuple(t.detach().to("cpu", torch.float32).clone() for t in (weight, bias))  # type: ignore[return-value]


class _Inert:
    """Stands where a file has an object that is no tensor: nothing of that object's code runs."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _beside_objects(path: Path) -> Mapping[str, Any] | None:
    """The state dict that lies beside objects in a checkpoint, which are not made; None if none.

    Trainers store schedulers and configs beside the weights. torch reads with `weights_only=True`
    here, too; every class that it does not allow is replaced by an inert one.
    """
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        inert: list[Any] = [(_Inert, name) for name in unknown]
        with torch.serialization.safe_globals(inert):
            state = unwrapped(dict(torch.load(path, map_location="cpu", weights_only=True)))
    except Exception:  # whatever torch does not allow at all
        return None
    return state if all(isinstance(v, Tensor) for v in state.values()) else None


def _find_embedding(state: Mapping[str, Any], where: str) -> tuple[Any, Any]:
    if set(state) == {"weight", "bias"}:
        return state["weight"], state["bias"]
    found = [k for k in state if ("." + k).endswith(".embedding.weight")]
    if len(found) != 1:
        weights = [k for k in state if k.endswith("weight")]
        keys = ", ".join(found or (weights or list(state))[:6]) or "nothing"
        raise CheckpointError(
            f"{where} has {len(found) or 'no'} layers named 'embedding' (keys: {keys}); one is "
            "needed. Pass the layer itself: weights=autoencoder.encoder.embedding."
        )
    key = found[0]
    return state[key], state.get(key.removesuffix("weight") + "bias")


def _looks_pickled(path: Path) -> bool:
    with path.open("rb") as file:
        return zipfile.is_zipfile(path) or file.read(1) == pickle.PROTO


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
