"""Which heads a model was given: what a checkpoint tells, and what it is compared with.

A swap marks the head that it puts in. A record is read off the heads that are there when a
checkpoint is saved, so it is true whoever put them there, and of a head that has gone none is left.
One form serves every host: a list of `{"head": config, "slot": path, "twin": path}` under
"headplug", where a host may add what it knows besides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from headplug.errors import CheckpointError, HeadplugError, SlotError
from headplug.hosts import find_slots
from headplug.hosts.modules import inside, named_modules
from headplug.hosts.twins import find_twin

KEY = "headplug"
MARK = "put_by_headplug"

Record = dict[str, Any]


def config_of(head: nn.Module) -> dict[str, Any]:
    """What builds a head again; of one without a config, the class alone.

    >>> config_of(nn.Sequential())
    {'class': 'Sequential'}
    """
    if record := vars(head).get(MARK):
        return dict(record["head"])
    with suppress(HeadplugError):  # a class that does not store its options has none
        if isinstance(config := getattr(head, "config", None), Mapping):
            return dict(config)
    return {"class": type(head).__name__}


def mark(head: nn.Module, /, **facts: Any) -> None:
    """Adds to what is recorded of a head."""
    setattr(head, MARK, {**vars(head).get(MARK, {}), **facts})


def records(model: nn.Module) -> list[Record]:
    """The heads that a model was given and has, with their paths in it.

    >>> from headplug import swap_head
    >>> model = nn.ModuleDict({"backbone": nn.Identity(), "projector": nn.Linear(8, 4)})
    >>> _ = swap_head(model, "reweighting")
    >>> [(r["slot"], r["head"]["name"]) for r in records(nn.ModuleDict({"model": model}))]
    [('model.projector', 'reweighting')]
    """
    found = []
    for path, module in named_modules(model):
        if record := vars(module).get(MARK):
            twin, before = record["twin"], path.removesuffix(record["slot"])
            twin = before + twin if twin and before != path else find_twin(model, path)[0]
            found.append({**record, "slot": path, "twin": twin})
    twins = {record["twin"] for record in found}
    return [record for record in found if record["slot"] not in twins]


def recorded(checkpoint: Mapping[str, Any]) -> list[Record]:
    """The records in a checkpoint; older runs of solo-learn left one without a list."""
    found = checkpoint.get(KEY) or []
    return [dict(found)] if isinstance(found, Mapping) else [dict(r) for r in found]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs between two records; of what a host added, only what both have.

    Where the weights of a head lay does not count.

    >>> head = {"name": "reweighting", "kappa": 1.05}
    >>> differences({"head": head, "twin": None}, {"head": {**head, "kappa": 1.2}})
    ['kappa: 1.05 and 1.2']
    """
    heads = one["head"], other["head"]
    pairs = {k: (heads[0].get(k), heads[1].get(k)) for k in {**heads[0], **heads[1]}}
    pairs |= {k: (one[k], other[k]) for k in one if k in other and k != "head"}
    return [f"{k}: {a!r} and {b!r}" for k, (a, b) in pairs.items() if a != b and k != "weights"]


def unlike(there: Sequence[Record], here: Sequence[Record]) -> list[str]:
    """What differs between two lists of records, slot by slot."""
    heads = [{r.get("slot"): r for r in found} for found in (there, here)]
    found = []
    for slot in {**heads[0], **heads[1]}:
        one, other = heads[0].get(slot), heads[1].get(slot)
        if one and other:
            found += differences(one, other)
        else:
            found.append(f"a head at {slot!r}: {one is not None} and {other is not None}")
    return found


def misfit(model: nn.Module, state: Mapping[str, Any], paths: Iterable[str | None]) -> str | None:
    """Where the weights at some paths are not those of a model, in words."""
    for path in filter(None, paths):
        ours, found = (
            {k: tuple(v.shape) for k, v in of.items() if k == path or inside(k, path)}
            for of in (model.state_dict(), state)
        )
        for key in sorted({*ours, *found}):
            if ours.get(key) != found.get(key):
                return f"{key!r} has shape {found.get(key)}, the model's {ours.get(key)}"
    return None


def refuse_unrecorded(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuses the weights of a head that the model does not have, where no record tells of it.

    Raises:
        CheckpointError: They are of another head.
    """
    with suppress(SlotError):  # a model without a projection head has none to mix up
        heads = [s.path for s in find_slots(model) if s.role == "projection"]
        if reason := misfit(model, state, heads):
            raise CheckpointError(
                f"the checkpoint holds another head than the model, and no record of it: "
                f"{reason}. Swap that head with swap_head(), then load the weights with "
                "model.load_state_dict()."
            )
