"""What must be the same for two extractions to be one: digests that name what differs.

A digest sees tensors by their bytes, functions by what they do, and other objects by their repr
without addresses and their attributes, so that it is the same in every process that does the same
work.
"""

from __future__ import annotations

import functools
import hashlib
import re
import zlib
from collections.abc import Mapping, Sequence
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headplug.store.state import (
    TOLD,
    attributes,
    is_constant,
    is_installed,
    methods,
    names,
    writes,
    written,
)
from headplug.taps.points import Point

Fingerprint = dict[str, Any]
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+|\b0x[0-9a-fA-F]{6,}")
CONSTANTS = (bool, int, float, str, tuple, list, Tensor)  # what of a function's module is seen
STATE = {  # not a module's options
    *vars(nn.Module()),
    *("_compiled_call_impl", "_current_fx_name", "_is_torch_compile", "_compile_kwargs"),
}
HYPER = "_hparams"  # Lightning's, which a forward may read
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
    "samples": "the number of samples",
    "batches": "the number of batches",
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
    for those that are state, see `headplug.store.state`.
    """
    return {name: digest(part) for name, part in _parts(model).items()}


def _parts(model: nn.Module) -> dict[str, Any]:
    classes = {type(m): None for m in model.modules()}
    state = {kind: STATE | written(kind) for kind in classes}
    return {
        "weights": dict(model.named_parameters(remove_duplicate=False)),
        "buffers": dict(model.named_buffers(remove_duplicate=False)),
        "model": (
            _plain(repr(model)),
            {_name(kind): (kind.forward, _code(kind)) for kind in classes},
            [(path, *_own(m, state[type(m)])) for path, m in model.named_modules()],
        ),
    }


def _code(kind: type) -> list[FunctionType]:
    """What a call runs of code that people edit."""
    return [function for function in methods(kind) if not is_installed(function)]


def _own(module: nn.Module, state: set[str]) -> tuple[dict[str, Any], list[Any]]:
    """What is set on a module itself that its class and its repr may not show."""
    options: dict[str, Any] = {}
    for name, value in sorted(vars(module).items()):
        value = getattr(value, "__func__", value)  # a method of a module would bring that whole
        plain = isinstance(value, functools.partial) or is_constant(value)
        option = name not in state or (name == HYPER and value)
        if plain and option and not _is_ours(value):
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
    # then the data that are looked at must differ, whatever they are
    others = any(there.get(key) != here.get(key) for key in ("samples", "batches", "processes"))
    for key in dict.fromkeys([*here, *there]):
        old, new = there.get(key), here.get(key)
        if old != new and not (others and key == "data"):
            legible = key not in ("weights", "buffers", "model", "data")
            values = f" ({_shown(old, new)} {places[0]}, {_shown(new, old)} {places[1]})"
            found.append(WORDS.get(key, key) + values * legible)
    return found


class _Sink(NamedTuple):
    """A hash, and the objects that it has seen, which may hold each other, with their places."""

    hash: Any
    seen: dict[int, tuple[int, Any]]

    def update(self, content: bytes) -> None:
        self.hash.update(content)

    def is_new(self, what: Any) -> bool:
        """Whether it was not seen; what was is fed as its place."""
        new = id(what) not in self.seen
        place, _ = self.seen.setdefault(id(what), (len(self.seen), what))
        if not new:
            self.update(f"{place}".encode())
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
        sink.update(_name(what).encode())
        if sink.is_new(what):
            cells = [_content(cell) for cell in what.__closure__ or ()]
            given = (what.__code__, what.__defaults__, what.__kwdefaults__, cells)
            _feed(sink, (*given, _globals(what)), above)
    elif isinstance(what, CodeType):
        _feed(sink, (what.co_code, what.co_names, what.co_consts), above)
    elif hasattr(what, "__array_interface__"):  # NumPy's arrays and scalars, Pillow's images
        import numpy

        array = numpy.ascontiguousarray(what)
        sink.update(f"{array.dtype.str}{array.shape}".encode() + array.tobytes())
    else:
        text = repr(what)
        sink.update(_plain(text).encode(errors="surrogatepass"))
        own = attributes(what)
        told = isinstance(what, TOLD) or not (own or hasattr(what, "__dict__"))
        if not told and sink.is_new(what):  # its repr may tell little of it
            state = written(type(what))
            options = {name: value for name, value in own.items() if name not in state}
            call = type(what).__call__ if callable(what) else None
            call = call if isinstance(call, FunctionType) else None
            _feed(sink, (options, call, _code(type(what))), above)
    sink.update(b";")


def _globals(function: FunctionType) -> list[Any]:
    """What a function names outside itself: values, and what else people wrote."""
    code, known = function.__code__, function.__globals__
    changed, own = writes(code), not is_installed(function)
    found = [
        known[n] for n in (names(code) if own else code.co_names) if n in known.keys() - changed
    ]
    for place in [p for p in found if own and isinstance(p, ModuleType | type)]:
        if not is_installed(place):
            found += [vars(place)[n] for n in names(code) if n in vars(place).keys() - changed]

    def counts(value: Any) -> bool:
        if isinstance(value, FunctionType):
            return own and not is_installed(value)
        return isinstance(value, CONSTANTS) or (own and is_constant(value))

    return [value for value in found if counts(value)]


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
    """What an option is, for people; a function by its name, or what it says, and a digest."""
    if not callable(what):
        return str(what)
    says = any("__str__" in vars(kind) for kind in type(what).__mro__[:-1])
    return f"{_plain(str(what)) if says else _name(what)} {digest(what)}"


def _plain(text: str) -> str:
    return ADDRESS.sub("", text)


def _name(what: Any) -> str:
    named = what if hasattr(what, "__qualname__") else type(what)
    return f"{named.__module__}.{named.__qualname__}"


def _shown(value: Any, other: Any) -> str:
    """A value for people; of a list what the other lacks."""
    if isinstance(value, list):
        value = ", ".join(v for v in value if v not in (other or [])) or "no other"
    text = "unknown" if value is None else str(value)
    return text if len(text) < 200 else text[:200] + "..."
