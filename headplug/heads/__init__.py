"""The projection heads and their registry.

`create_head` builds one by name, `list_heads` and `describe_head` say what there is,
`register_head` adds to it; other packages add theirs through the entry-point group
`headplug.heads`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from headplug.checkpoints import Weights
from headplug.errors import OptionError
from headplug.heads import (
    ae_embedding,
    dino,
    identity,
    parameters,
    presets,
    prototypes,
    rbf,
    residual,
    reweighting,
)
from headplug.heads.ae_embedding import AEEmbeddingHead
from headplug.heads.base import ProjectionHead
from headplug.heads.identity import IdentityHead
from headplug.heads.loading import read_head
from headplug.heads.mlp import MLPHead
from headplug.heads.reweighting import ReweightingHead
from headplug.registry import Entry, Registry


def _finish(
    head: object,
    name: str,
    freeze: bool | str | Sequence[str] = False,
    weights: Weights | None = None,
) -> None:
    """What any head can be given: weights from a file or another module, then frozen layers."""
    if not isinstance(head, nn.Module):
        return  # refused by create_head
    if weights is not None:
        head.load_state_dict(read_head(weights, head, name))
    if isinstance(head, ProjectionHead):
        head.freeze_layers(freeze)
    else:
        parameters.freeze(head, freeze)


HEADS = Registry(
    "head",
    group="headplug.heads",
    listing="`headplug heads` lists them all.",
    finish=_finish,
)
register_head = HEADS.register

for _module in (ae_embedding, dino, identity, presets, prototypes, rbf, residual, reweighting):
    for _name, _about in _module.PRESETS.items():
        register_head(_name, **_about)


def list_heads(pattern: str = "*") -> list[str]:
    """Names of registered heads that match a glob, in natural order.

    >>> list_heads("moco_v?")
    ['moco_v2', 'moco_v3']
    """
    return HEADS.names(pattern)


def describe_head(name: str) -> Entry:
    """The registry entry of a head: its summary, paper, source and default options.

    Raises:
        UnknownNameError: No head has that name; the message shows the closest ones.

    >>> describe_head("identity")
    identity: no head: the loss sees the representation itself
      options  input_dim (required), output_dim=None, freeze=False, weights=None
    >>> describe_head("byol").defaults["hidden_dim"]
    4096
    """
    return HEADS.get(name)


def create_head(name: str | Mapping[str, Any], /, **options: Any) -> nn.Module:
    """Builds a head from its name and options, or from one mapping that holds both.

    Args:
        name: A registered name, or a mapping with the key "name" (a dict, JSON, OmegaConf).
        options: What the head takes, `input_dim` always among it; they win over the mapping's.
            Every head takes `weights` (a file, state dict or module; see
            `headplug.heads.loading.read_head`) and `freeze` (True, or paths such as "layers.0"; see
            `ProjectionHead.freeze_layers`).

    Returns:
        The head, with `input_dim`, `output_dim` and `config`, a mapping that `create_head` accepts
        and that survives JSON.

    Raises:
        UnknownNameError: No head has that name.
        OptionError: An option is unknown, missing or of the wrong type; the message names it.

    >>> head = create_head("simclr", input_dim=512, output_dim=64)
    >>> create_head(head.config).output_dim
    64
    """
    if isinstance(name, Mapping):
        options = {**name, **options}
        if "name" not in options:
            keys = ", ".join(map(str, options)) or "nothing"
            raise OptionError(f"a head's mapping needs the key 'name'; it has {keys}.")
        name = options.pop("name")
    if not isinstance(name, str):
        raise OptionError(f"a head is named by a string or a mapping, not by {name!r}.")
    entry = HEADS.get(name)
    bound = entry.bind({str(k): _plain(v) for k, v in options.items()})
    head: object = entry.build(bound)
    if not isinstance(head, nn.Module):
        raise OptionError(f"the builder of {name!r} returned {type(head).__name__}, not a module.")
    shared = (p for p in entry.shared if p.name not in entry.preset)
    unset = {"weights", *(p.name for p in shared if bound[p.name] is p.default)}
    config = {"name": name, **{k: v for k, v in bound.items() if k not in unset}}
    if isinstance(head, ProjectionHead):
        head.name = name
        if type(head) is not entry.builder or entry.open_ended or "freeze" in entry.preset:
            head.recipe, head.inherent = config, head.frozen
        return head
    return _complete(head, config)


def _complete(head: nn.Module, config: dict[str, Any]) -> nn.Module:
    """Gives a third party's plain module what every head here has, unless it has it already."""
    widths = {width: config.get(width) for width in ("input_dim", "output_dim")}
    for attribute, value in {"config": config, **widths}.items():
        if getattr(head, attribute, None) is None:
            if value is None:
                raise OptionError(
                    f"the head {config['name']!r} was given no {attribute} and must set "
                    f"`self.{attribute}`."
                )
            setattr(head, attribute, value)
    return head


def _plain(value: Any) -> Any:
    """Containers of any library as lists and dicts; a tuple, such as a pair of tensors, stays."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, tuple)):
        return [_plain(v) for v in value]
    return value


__all__ = [
    "HEADS",
    "AEEmbeddingHead",
    "IdentityHead",
    "MLPHead",
    "ProjectionHead",
    "ReweightingHead",
    "create_head",
    "describe_head",
    "list_heads",
    "register_head",
]
