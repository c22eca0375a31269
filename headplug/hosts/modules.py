"""Modules of a model by their paths: finding, replacing, and reading their widths."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headplug.errors import unknown


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at a path.

    Raises:
        UnknownNameError: There is none; the message shows the closest paths.
    """
    paths: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if not path or path not in paths:
        raise unknown("module", str(path), [p for p in paths if p], "print(model) shows them all.")
    return paths[path]


def value_at(model: nn.Module, path: str) -> Any:
    """The module, tensor or plain attribute at a path."""
    return getattr(model.get_submodule(parent(path)), path.rpartition(".")[2])


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module but the root, once, with its first path."""
    return [(p, m) for p, m in model.named_modules() if p]


def paths_of(model: nn.Module, what: nn.Module | Tensor) -> tuple[str, ...]:
    """Every path that leads to a module, a parameter or a buffer."""
    named = model.named_modules(remove_duplicate=False)
    if isinstance(what, nn.Module):
        return tuple(p for p, m in named if m is what)
    return tuple(
        f"{p}.{n}".lstrip(".")
        for p, m in named
        for n, t in (*m._parameters.items(), *m._buffers.items())
        if t is what
    )


def assign(model: nn.Module, path: str, value: Any) -> None:
    """Puts a module (or tensor, or number) at a path; its place in the order stays."""
    setattr(model.get_submodule(parent(path)), path.rpartition(".")[2], value)


def parent(path: str) -> str:
    """The path of the module that holds the one at a path; "" is the root."""
    return path.rpartition(".")[0]


def inside(path: str, other: str) -> bool:
    """Whether a path lies below another.

    >>> inside("head.layers.0", "head"), inside("head2", "head")
    (True, False)
    """
    return path.startswith(other + ".")


def dims(module: nn.Module) -> tuple[int, int] | None:
    """Widths of a module: its own attributes, or those of its first and last linear layer.

    >>> dims(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    (8, 4)
    """
    own = getattr(module, "input_dim", None), getattr(module, "output_dim", None)
    linear = [
        m for m in module.modules() if hasattr(m, "in_features") and hasattr(m, "out_features")
    ]
    read = (linear[0].in_features, linear[-1].out_features) if linear else (None, None)
    for fan_in, fan_out in (own, read):
        if isinstance(fan_in, int) and isinstance(fan_out, int) and fan_in:  # 0: a lazy layer
            return fan_in, fan_out
    return None


def tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]
