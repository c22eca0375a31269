"""What wraps a model: DistributedDataParallel, FSDP, Fabric, torch.compile, checkpointing.

None of them leaves a mark in the names of points. Models whose modules are never called, or whose
calls see a part of the batch, are refused with the reason.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn

from headplug.errors import TapError

INNER = ("_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def tappable(model: Any) -> dict[str, nn.Module]:
    """All modules of a model by path, shared ones at each of theirs.

    Raises:
        TapError: The model is no module, or hooks cannot see what it computes.
    """
    if isinstance(model, torch.export.ExportedProgram) or _is_exported(model):
        raise TapError(
            "an exported program is a graph of operations: its modules are never called, so there "
            "is nothing to hook. Tap the model before torch.export, or export a module that "
            "returns what you want to read."
        )
    if not isinstance(model, nn.Module):
        raise TapError(f"taps read an nn.Module, not a {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise TapError(
            "TorchScript runs without hooks. Tap the model that was scripted or traced instead."
        )
    named = dict(model.named_modules(remove_duplicate=False))
    if any(issubclass(kind, nn.DataParallel) for kind in set(map(type, named.values()))):
        raise TapError(
            "DataParallel runs copies of the model, and hooks see a part of the batch in each. "
            "Tap model.module, or use DistributedDataParallel."
        )
    return named


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """What is inside the wrappers, and the start of paths to it."""
    prefix = ""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model, prefix = model.module, prefix + "module."
        elif inner := next((n for n in INNER if n in model._modules), None):
            model, prefix = model.get_submodule(inner), f"{prefix}{inner}."
        else:
            return model, prefix


def plain(path: str) -> str:
    """A path without the names that wrappers put into it.

    >>> plain("backbone._orig_mod.layer1")
    'backbone.layer1'
    """
    if "._" not in path and not path.startswith("_"):
        return path
    return ".".join(part for part in path.split(".") if part not in INNER)


def is_sharded(modules: Sequence[nn.Module]) -> bool:
    """Whether FSDP, of either generation, keeps the weights of some modules in parts."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    kinds = fsdp and (fsdp.FullyShardedDataParallel, fsdp.FSDPModule)
    return bool(kinds) and any(issubclass(kind, kinds) for kind in set(map(type, modules)))


def compiled_in(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules with a compiled call or method, once for each use of torch.compile."""
    if "torch._dynamo" not in sys.modules:
        return []
    return [
        module
        for module in modules
        if FunctionType in map(type, vars(module).values())
        for value in vars(module).values()
        if hasattr(value, "_torchdynamo_orig_callable") and type(value) is FunctionType
    ]


def _is_exported(model: Any) -> bool:
    """Whether it is what ExportedProgram.module() gives: a graph without calls of modules."""
    return isinstance(model, torch.fx.GraphModule) and any(
        isinstance(node.target, torch._ops.OpOverload) for node in model.graph.nodes
    )
