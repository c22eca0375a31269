"""What must be the same for two extractions to be one: digests that name what differs.

A digest sees tensors by their bytes, functions by what they do, and other objects by their repr
without addresses and their attributes, so that it is the same in every process that does the same
work.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import re
import zlib
from collections.abc import Mapping, Sequence
from logging import Logger
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headplug.taps.points import Point

Fingerprint = dict[str, Any]
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+|\b0x[0-9a-fA-F]{6,}")
CONSTANTS = (bool, int, float, str, tuple, list, Tensor)  # what of a function's module is seen
STATE = {*vars(nn.Module()), "_compiled_call_impl", "_current_fx_name"}  # not a module's options
WORDS = {
    "weights": "the model's weights",
    "buffers": "the model's buffers, e.g. BatchNorm statistics",
    "model": "the model's layers or their options",
    "points": "the points",
    "pool": "the pooling",
    "dtype": "the dtype",
    "autocast": "autocast",
    "transform": "the transform",
    "data": "the data",
    "shard": "the samples in a shard",
    "processes": "the number of processes",
}
"""What each part of a fingerprint is called in messages."""


def digest(*what: Any) -> str:
    """A short text that changes with any of the objects and does not depend on the process."""
    sink = _Sink(hashlib.blake2b(digest_size=8), {})
    _feed(sink, what, set())
    text: str = sink.hash.hexdigest()
    return text


def of_model(model: nn.Module) -> Fingerprint:
    """The parts of a fingerprint that a model decides.

    `weights` sees names, shapes and bytes of parameters, `buffers` those of buffers, and `model`
    the repr of its modules, the code of their forwards and hooks, and their plain attributes, but
    for those that a forward itself sets.
    """
    return {name: digest(part) for name, part in _parts(model).items()}


def _parts(model: nn.Module) -> dict[str, Any]:
    classes = {type(m): None for m in model.modules()}
    written = {kind: _written(kind.forward) for kind in classes}
    return {
        "weights": dict(model.named_parameters(remove_duplicate=False)),
        "buffers": dict(model.named_buffers(remove_duplicate=False)),
        "model": (
            _plain(repr(model)),
            {_name(kind): kind.forward for kind in classes},
            [(path, *_own(m, written[type(m)])) for path, m in model.named_modules()],
        ),
    }


def _own(module: nn.Module, written: set[str]) -> tuple[dict[str, Any], list[Any]]:
    """What is set on a module itself that its class and its repr may not show."""
    options: dict[str, Any] = {}
    for name, value in sorted(vars(module).items()):
        value = getattr(value, "__func__", value)  # a method of a module would bring that whole
        plain = isinstance(value, functools.partial) or _is_constant(value)
        if plain and name not in STATE and name not in written and not _is_ours(value):
            options[name] = value
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return options, [_hook(hook) for hook in hooks if not _is_ours(hook)]


def _hook(hook: Any) -> Any:
    """What a hook does, without what it collects."""
    hook = getattr(hook, "func", hook)
    hook = getattr(hook, "__func__", hook)
    function = hook if isinstance(hook, FunctionType) else type(hook).__call__
    cells = [_content(cell) for cell in getattr(function, "__closure__", None) or ()]
    numbers = [c for c in cells if isinstance(c, bool | int | float | str | Tensor)]
    return _name(hook), getattr(function, "__code__", None), numbers


def _is_ours(function: Any) -> bool:
    """Whether it is a tap of headplug's, which changes nothing."""
    function = getattr(function, "__func__", function)
    module = getattr(function, "__globals__", {}).get("__name__", "")  # wraps changes __module__
    return str(module).startswith("headplug.taps")


def _is_constant(what: Any, depth: int = 4) -> bool:
    if isinstance(what, dict):
        what = [*what, *what.values()]
    if isinstance(what, list | tuple | set | frozenset):
        return depth > 0 and all(_is_constant(item, depth - 1) for item in what)
    kinds = bool | int | float | str | Tensor | torch.dtype | FunctionType | nn.Module
    return what is None or isinstance(what, kinds)


def _written(function: Any) -> set[str]:
    """The attributes that a function sets: counters and caches, not options."""
    if not hasattr(function, "__code__"):
        return set()
    return {i.argval for i in dis.get_instructions(function) if i.opname == "STORE_ATTR"}


def of_request(
    points: Sequence[Point], dtype: torch.dtype, transform: Any, device: str
) -> Fingerprint:
    """The parts that the call decides, legible where they can be."""
    autocast = torch.is_autocast_enabled(device) and str(torch.get_autocast_dtype(device))
    return {
        "points": sorted(map(_point, points)),
        "pool": _pools({p.name: _named(p.how.pool) for p in points}),
        "dtype": str(dtype).removeprefix("torch."),
        "autocast": str(autocast or "off").removeprefix("torch."),
        "transform": _named(transform),
    }


def differences(
    there: Mapping[str, Any], here: Mapping[str, Any], places: tuple[str, str] = ("there", "now")
) -> list[str]:
    """What differs between two fingerprints, in words; values too where people can read them."""
    found = []
    others = there.get("processes") != here.get("processes")  # which then meet other batches
    for key in dict.fromkeys([*here, *there]):
        old, new = there.get(key), here.get(key)
        if old != new and not (others and key == "data"):
            legible = key not in ("weights", "buffers", "model", "data")
            values = f" ({_shown(old, new)} {places[0]}, {_shown(new, old)} {places[1]})"
            found.append(WORDS.get(key, key) + values * legible)
    return found


class _Sink(NamedTuple):
    """A hash, and the objects with attributes that it has seen, which may hold each other."""

    hash: Any
    seen: dict[int, Any]

    def update(self, content: bytes) -> None:
        self.hash.update(content)

    def is_new(self, what: Any) -> bool:
        new = id(what) not in self.seen
        self.seen[id(what)] = what
        return new


def _feed(sink: _Sink, what: Any, above: set[int]) -> None:
    """Adds an object to a hash, with its type, so that 1, "1" and [1] differ."""
    if id(what) in above:  # an object that holds itself
        return
    above = {*above, id(what)}
    kind = Tensor if isinstance(what, Tensor) else type(what)
    sink.update(f"{kind.__qualname__}:".encode())
    if isinstance(what, Tensor):
        _feed_tensor(sink, what)
    elif isinstance(what, nn.Module):
        if sink.is_new(what):
            _feed(sink, _parts(what), above)
    elif isinstance(what, str | bytes):
        sink.update(what.encode(errors="surrogatepass") if isinstance(what, str) else what)
    elif isinstance(what, Mapping):
        for key, value in what.items():
            _feed(sink, key, above)
            _feed(sink, value, above)
    elif isinstance(what, list | tuple):
        for item in what:
            _feed(sink, item, above)
    elif isinstance(what, set | frozenset):
        _feed(sink, sorted(map(repr, what)), above)
    elif isinstance(what, functools.partial):
        _feed(sink, (what.func, what.args, what.keywords), above)
    elif isinstance(what, MethodType):
        _feed(sink, (what.__func__, what.__self__), above)
    elif isinstance(what, FunctionType):
        code, known = what.__code__, what.__globals__
        cells = [_content(cell) for cell in what.__closure__ or ()]
        constants = [v for n in code.co_names if isinstance(v := known.get(n), CONSTANTS)]
        given = (code, what.__defaults__, what.__kwdefaults__, cells, constants)
        _feed(sink, (_name(what), *given), above)
    elif isinstance(what, CodeType):
        _feed(sink, (what.co_code, what.co_names, what.co_consts), above)
    elif hasattr(what, "__array_interface__"):  # NumPy's arrays and scalars, Pillow's images
        import numpy

        array = numpy.ascontiguousarray(what)
        sink.update(f"{array.dtype.str}{array.shape}".encode() + array.tobytes())
    else:
        text = repr(what)
        sink.update(_plain(text).encode(errors="surrogatepass"))
        told = isinstance(what, type | ModuleType | Logger) or not hasattr(what, "__dict__")
        if not told and sink.is_new(what):  # its repr may tell little of it
            call = type(what).__call__ if callable(what) else None
            _feed(sink, (vars(what), call if isinstance(call, FunctionType) else None), above)
    sink.update(b";")


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a function that names itself, before it is there
        return None


def _feed_tensor(sink: _Sink, tensor: Tensor) -> None:
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    # of a copy: NumPy would keep FSDP from freeing the memory of what it looks at
    tensor = tensor.detach().to("cpu", copy=True)
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    # several times as fast as a cryptographic hash, and weights can be many gigabytes
    sink.update(f"{tensor.dtype}{tuple(tensor.shape)}{zlib.crc32(content)}".encode())


def _point(point: Point) -> str:
    """A point with all that decides what is read there."""
    text = f"{point.path}:input" if point.takes_input else point.path
    text += f"[{point.key}]" if point.key is not None else ""
    text += f", call {point.how.calls}" if point.how.calls else ""
    return point.name if point.name == text else f"{point.name} ({text})"


def _pools(names: Mapping[str, str]) -> str:
    if len(same := set(names.values())) == 1:
        return same.pop()
    return ", ".join(f"{name}: {names[name]}" for name in sorted(names))


def _named(what: Any) -> str:
    """What an option is, for people; a function by its name and a digest."""
    return f"{_name(what)} {digest(what)}" if callable(what) else str(what)


def _plain(text: str) -> str:
    return ADDRESS.sub("", text)


def _name(what: Any) -> str:
    named = what if hasattr(what, "__qualname__") else type(what)
    return f"{named.__module__}.{named.__qualname__}"


def _shown(value: Any, other: Any) -> str:
    """A value for people; of a list what the other lacks."""
    if isinstance(value, list):
        value = ", ".join(v for v in value if v not in (other or [])) or "no other"
    text = str(value)
    return text if len(text) < 200 else text[:200] + "..."
