"""EMA twins: which module is the momentum copy of a head, and how to make another.

Structure comes first: a twin has the class and the shapes of its head. Which of the two is the copy
is told by `requires_grad`; which copy belongs to which head by equal values, and only then by
names. What stays unclear is reported, never guessed.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Collection
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from headplug.errors import SlotError
from headplug.heads import create_head
from headplug.hosts.modules import inside, named_modules, parent, submodule, tensors

M = TypeVar("M", bound=nn.Module)
ANCHOR = "ema_anchor"
MARK = "is_ema_twin"
COPY_WORDS = {
    *("momentum", "ema", "teacher", "student", "target", "online", "key", "query", "anchor"),
    *("copy", "k", "q", "s", "t", "m"),
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def find_twin(
    model: nn.Module, path: str, heads: Collection[str] = ()
) -> tuple[str | None, tuple[str, ...]]:
    """The EMA copy of the module at a path.

    Args:
        model: The model.
        path: The head that is trained.
        heads: Paths that are known to hold heads; there, two alike need not resemble each other in
            name.

    Returns:
        The path of the copy, or None; and the paths of modules that may be it, where that is
        unclear.

    >>> model = nn.ModuleDict({"projector": nn.Linear(8, 4), "ema_projector": nn.Linear(8, 4)})
    >>> find_twin(model, "projector")
    (None, ('ema_projector',))
    >>> _ = model["ema_projector"].requires_grad_(False)
    >>> find_twin(model, "projector")
    ('ema_projector', ())
    """
    head = submodule(model, path)
    if is_twin(head):
        return None, ()
    alike = _alike(model, path)
    copies = [p for p, m in alike.items() if is_twin(m) or (_trains(head) and not _trains(m))]
    rivals = any(p in heads for p in alike if p not in copies)
    signs = {p: (equal(head, m), *_named_alike(path, p)) for p, m in alike.items()}
    known = {p: (*signs[p], p in heads and not rivals) for p in copies}
    best = max(known.values(), default=())
    if any(best):
        likely = tuple(p for p in copies if known[p] == best)
        return (likely[0], ()) if len(likely) == 1 else (None, likely)
    return None, tuple(
        p
        for p, m in alike.items()
        if any(signs[p]) or (parent(p) == parent(path) and _trains(m) != _trains(head))
    )


def find_original(model: nn.Module, path: str) -> str | None:
    """The head whose EMA copy is at a path, or None."""
    module = submodule(model, path)
    if _trains(module) and not is_twin(module):
        return None
    for other in _alike(model, path):
        twin, _ = find_twin(model, other)
        if twin and submodule(model, twin) is module:
            return other
    return None


def copies_of(head: nn.Module, root: nn.Module) -> dict[str, nn.Module]:
    """What may be a head's EMA copy in another model: alike, and frozen or of equal values.

    >>> head = nn.Linear(8, 4)
    >>> list(copies_of(head, nn.ModuleDict({"a": copy.deepcopy(head), "b": nn.Linear(8, 4)})))
    ['a']
    """
    own = _shapes(head)
    return {
        path: module
        for path, module in root.named_modules()
        if type(module) is type(head) and module is not head and own and _shapes(module) == own
        if equal(head, module) or (_trains(head) and not _trains(module))
    }


def build_twin(head: nn.Module) -> nn.Module:
    """The EMA copy of a head, ready to be updated from it.

    Raises:
        SlotError: As in `copy_frozen`.
    """
    twin = copy_frozen(head)
    anchor(head)
    anchor(twin)
    return twin


def copy_frozen(head: nn.Module) -> nn.Module:
    """A copy of a head, buffers included: equal, frozen, marked as a twin, sharing no storage.

    Raises:
        SlotError: The head can neither be copied nor built a second time.

    >>> head = nn.utils.weight_norm(nn.Linear(4, 2))  # copy.deepcopy alone fails on these
    >>> all(not p.requires_grad for p in copy_frozen(head).parameters())
    True
    """
    try:
        twin = detached_copy(head)
    except Exception as error:
        try:
            twin = _build_again(head)
        except Exception:
            raise SlotError(
                f"no EMA twin of {type(head).__name__} can be made ({error}). Register the head "
                "and pass its name, so that it can be built twice."
            ) from error
    setattr(twin, MARK, True)
    return twin.requires_grad_(False)


def detached_copy(module: M) -> M:
    """A deep copy, also where hooks left tensors that are part of a graph (old weight norm).

    Hooks are left out, but for torch's own: a copied one would still report to its owner, or copy
    the owner too.
    """
    computed = (v for m in module.modules() for v in vars(m).values() if isinstance(v, Tensor))
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in computed if not t.is_leaf}
    for part in module.modules():
        for name in HOOKS:
            hooks: OrderedDict[int, Any] = getattr(part, name)
            own = {k: h for k, h in hooks.items() if type(h).__module__.startswith("torch.")}
            memo[id(hooks)] = OrderedDict(own)
    return copy.deepcopy(module, memo)


def _build_again(head: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        twin = create_head(head.config)  # type: ignore[arg-type]
    if type(twin) is not type(head):
        raise TypeError(f"{head.config} builds a {type(twin).__name__}")
    twin.load_state_dict(head.state_dict())
    return twin


def anchor(head: nn.Module) -> None:
    """Gives a head without parameters an empty frozen one.

    EMA updates, lightly's `update_momentum` among them, refuse an empty list.
    """
    if not list(head.parameters()):
        like = next(head.buffers(), torch.empty(0))
        empty = torch.empty(0, device=like.device)
        head.register_parameter(ANCHOR, nn.Parameter(empty, requires_grad=False))


def is_twin(module: nn.Module) -> bool:
    """Whether headplug made the module as an EMA copy."""
    return bool(vars(module).get(MARK))


def _alike(model: nn.Module, path: str) -> dict[str, nn.Module]:
    """The other modules of the same class with parameters of the same names and shapes."""
    module = submodule(model, path)
    own = _shapes(module)
    return {
        p: m
        for p, m in named_modules(model)
        if type(m) is type(module)
        and m is not module
        and not inside(p, path)
        and not inside(path, p)
        and _shapes(m) == own
    }


def _shapes(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(n, () if is_lazy(p) else tuple(p.shape)) for n, p in module.named_parameters()]


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def equal(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules of the same shapes hold the same values."""
    pairs = [(s, t) for s, t in zip(tensors(a), tensors(b), strict=False) if s.numel()]
    return bool(pairs) and all(
        not s.is_meta and s.shape == t.shape and s.device == t.device and torch.equal(s, t)
        for s, t in pairs
    )


def _named_alike(a: str, b: str) -> tuple[bool, bool]:
    """Whether paths differ in copy words only; whether they do so and end in the same word."""
    words = [re.split(r"[._]", path.lower()) for path in (a, b)]
    plain = [[w for w in ws if w not in COPY_WORDS] for ws in words]
    copied = [sorted(w for w in ws if w in COPY_WORDS) for ws in words]
    differ = copied[0] != copied[1]
    return differ and plain[0] == plain[1], differ and plain[0][-1:] == plain[1][-1:]
