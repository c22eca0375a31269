"""What must be the same for two extractions to be one: digests that name what differs.

A digest sees tensors by their bytes, functions by what they do, and other objects by their repr
without addresses, so that it is the same in every process that does the same work.
"""

from __future__ import annotations

import functools
import hashlib
import re
import zlib
from collections.abc import Mapping, Sequence
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from headplug.taps.points import Point

Fingerprint = dict[str, Any]
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+|\b0x[0-9a-fA-F]{6,}")
CONSTANTS = (bool, int, float, str, tuple, list, Tensor)  # what of a function's module is seen
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
}
"""What each part of a fingerprint is called in messages."""


def digest(*what: Any) -> str:
    """A short text that changes with any of the objects and does not depend on the process."""
    sink = hashlib.blake2b(digest_size=8)
    _feed(sink, what, set())
    return sink.hexdigest()


def of_model(model: nn.Module) -> Fingerprint:
    """The parts of a fingerprint that a model decides.

    `weights` sees names, shapes and bytes of parameters, `buffers` those of buffers, and `model`
    the repr of its modules (where strides and activations show) and the code of their forwards.
    """
    classes = {type(m): None for m in model.modules()}
    forwards = {_name(kind): kind.forward for kind in classes}
    return {
        "weights": digest(dict(model.named_parameters(remove_duplicate=False))),
        "buffers": digest(dict(model.named_buffers(remove_duplicate=False))),
        "model": digest(_plain(repr(model)), forwards),
    }


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


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words; values too where people can read them."""
    found = []
    for key in dict.fromkeys([*here, *there]):
        old, new = there.get(key), here.get(key)
        if old != new:
            legible = key not in ("weights", "buffers", "model", "data")
            values = f" ({_shown(old, new)} there, {_shown(new, old)} now)" if legible else ""
            found.append(WORDS.get(key, key) + values)
    return found


def _feed(sink: Any, what: Any, above: set[int]) -> None:
    """Adds an object to a hash, with its type, so that 1, "1" and [1] differ."""
    if id(what) in above:  # an object that holds itself
        return
    above = {*above, id(what)}
    sink.update(f"{type(what).__qualname__}:".encode())
    if isinstance(what, Tensor):
        _feed_tensor(sink, what)
    elif isinstance(what, nn.Module):
        for part in of_model(what).values():
            sink.update(part.encode())
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
        if ADDRESS.search(text) and hasattr(what, "__dict__") and not isinstance(what, type):
            _feed(sink, vars(what), above)  # its repr tells nothing of it
    sink.update(b";")


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a function that names itself, before it is there
        return None


def _feed_tensor(sink: Any, tensor: Tensor) -> None:
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
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
