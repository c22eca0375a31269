"""Models that somebody's own code builds: `package.module:callable`."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from headplug.checkpoints import read_state_dict
from headplug.errors import (
    CheckpointError,
    HeadplugError,
    OptionError,
    RunError,
    UnknownNameError,
    unknown,
)
from headplug.weights import fill, plain


def from_code(module: str, name: str, weights: str | Path | None) -> tuple[nn.Module, str]:
    """The model that an object in somebody's code gives.

    Args:
        module: To import, also from the working directory.
        name: Of a function or class that is called without arguments, or of a model. The class of a
            LightningModule loads the checkpoint itself.
        weights: A checkpoint.

    Returns:
        The model, and what it is, in one line.

    Raises:
        UnknownNameError: There is no such module, object or file.
        OptionError: The object cannot be called, or gives no module.
        CheckpointError: The weights do not fit, or cannot be read safely.
        RunError: The code imports what is not there.
    """
    from importlib import import_module

    sys.path.insert(0, os.getcwd())
    try:
        found: Any = import_module(module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise UnknownNameError(
                f"there is no module {module!r} in {os.getcwd()} or installed. A model is "
                "timm:NAME, torchvision:NAME, MODULE:CALLABLE or a checkpoint."
            ) from None
        raise _lacking(module, error) from error
    finally:
        sys.path.remove(os.getcwd())
    for part in name.split("."):
        if not hasattr(found, part):
            public = [key for key in vars(found) if not key.startswith("_")]
            raise unknown(f"object in {module}", name, public)
        found = getattr(found, part)
    text = f"{module}:{name}"
    if weights is not None and inspect.isclass(found) and hasattr(found, "load_from_checkpoint"):
        return _from_lightning(found, weights), f"{text} loaded from {weights}"
    model = found if isinstance(found, nn.Module) else _called(found, text)
    if weights is None:
        return model, text
    state = read_state_dict(weights)
    whole = state.keys() >= model.state_dict().keys()
    fill(model, state if whole else plain(state), weights)
    return model, f"{text} with the weights of {weights}"


def _lacking(what: str, error: ImportError) -> RunError:
    return RunError(f"{what} cannot be used, because it imports what is not there: {error}.")


def _called(found: Any, text: str) -> nn.Module:
    try:
        model = found()
    except ImportError as error:
        raise _lacking(text, error) from error
    except TypeError as error:
        raise OptionError(
            f"{text} cannot be called without arguments ({error}); name a function that builds the "
            "model."
        ) from error
    if not isinstance(model, nn.Module):
        raise OptionError(f"{text} gives a {type(model).__name__}, not a torch module.")
    return model


def _from_lightning(kind: Any, weights: str | Path) -> nn.Module:
    """A LightningModule with its hyper-parameters and the heads that HeadSwap recorded."""
    from headplug.callbacks import HeadSwap

    if not Path(weights).is_file():
        raise UnknownNameError(f"there is no file {str(weights)!r}; check the path.")
    try:
        model: nn.Module = HeadSwap.load_from_checkpoint(
            kind, weights, map_location="cpu", **safely(kind)
        )
    except HeadplugError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{kind.__name__}.load_from_checkpoint cannot load {weights}: "
            f"{' '.join(str(error).split())[:300]}. Name a function that builds the model instead; "
            "its weights are then loaded by name."
        ) from error
    return model


def safely(kind: Any) -> dict[str, Any]:
    """What makes a LightningModule's `load_from_checkpoint` unpickle nothing; torch's default."""
    base = next((c for c in kind.__mro__ if c.__name__ == "LightningModule"), kind)
    taken = inspect.signature(base.load_from_checkpoint).parameters
    return {"weights_only": True} if "weights_only" in taken else {}
