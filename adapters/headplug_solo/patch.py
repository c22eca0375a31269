"""Swapping the head of every solo-learn method at the end of its construction.

solo-learn makes a model, then its optimiser, data-parallel copies and checkpoints from what it then
has, so the end of `__init__` is early enough for all of them. Without a block `headplug:` in the
config nothing is changed, and no random number is drawn.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from headplug.errors import CheckpointError, HeadplugError
from headplug.hosts import slot_at
from headplug.swap import swap_head
from headplug_solo.config import (
    EXAMPLE,
    KEY,
    Block,
    differences,
    hydra_config,
    merged,
    read_block,
    record,
)

KNN = (
    "solo-learn's kNN classifier does not run on torchmetrics 0.12 or newer, with or without "
    "headplug: pip install 'torchmetrics<0.12' 'setuptools<81'."
)
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
MARK = "_takes_heads_of_headplug"

_loading: ContextVar[bool] = ContextVar("loading", default=False)
made: list[Block | None] = []  # the head of each method made in this process, None for its own


def arm() -> None:
    """Makes solo-learn's methods take the head that their config asks for; twice does no harm.

    Subclasses, whenever they are defined, do so too. `solo.methods` must have been imported.
    """
    methods = sys.modules["solo.methods"].METHODS.values()
    for root in {_root(cls) for cls in methods}:
        if "__new__" not in vars(root):
            _arm_root(root)

    from solo.utils import auto_resumer, checkpointer

    if KEY not in auto_resumer.AutoResumer.SHOULD_MATCH:
        auto_resumer.AutoResumer.SHOULD_MATCH.append(KEY)
        if hasattr(auto_resumer, "Namespace"):  # release 1.0.2 has no configs
            _arm_arguments(auto_resumer, checkpointer.Checkpointer)


def _arm_arguments(auto_resumer: Any, checkpointer: Any) -> None:
    """Puts the head of the run among the arguments that are compared, and in args.json."""
    namespace, find = auto_resumer.Namespace, auto_resumer.AutoResumer.find_checkpoint
    save = checkpointer.save_args

    def find_checkpoint(self: Any, args: Any) -> Any:
        return find(self, namespace(**{**vars(args), KEY: made[-1] if made else None}))

    def save_args(self: Any, trainer: Any, *others: Any) -> None:
        if KEY in vars(trainer.lightning_module):
            vars(self.args)[KEY] = trainer.lightning_module.headplug
        save(self, trainer, *others)

    auto_resumer.Namespace = functools.partial(namespace, **{KEY: None})  # of older runs
    auto_resumer.AutoResumer.find_checkpoint = find_checkpoint
    checkpointer.save_args = save_args


def _root(cls: type) -> type:
    """solo-learn's own base of a method: `BaseMethod` or `LinearModel`."""
    return next(c for c in reversed(cls.__mro__) if c.__module__.startswith("solo."))


def _arm_root(root: Any) -> None:
    def new(cls: type, *_: Any, **__: Any) -> Any:
        _adopt(cls)
        return super(root, cls).__new__(cls)

    def load_from_checkpoint(cls: type, *args: Any, **kwargs: Any) -> Any:
        if "WeightedKNNClassifier" in vars(sys.modules["__main__"]):
            _check_knn()
        token = _loading.set(True)
        try:
            return super(root, cls).load_from_checkpoint(*args, **kwargs)
        finally:
            _loading.reset(token)

    root.__new__ = new
    root.load_from_checkpoint = classmethod(load_from_checkpoint)


def _adopt(cls: Any) -> None:
    """Adds the swap, and its record in checkpoints, to the class of a model about to be made."""
    if MARK in vars(cls):
        return
    init, save, load = cls.__init__, cls.on_save_checkpoint, cls.on_load_checkpoint
    signature = inspect.signature(init)

    @functools.wraps(init)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind_partial(self, *args, **kwargs).arguments.get("cfg")
        if type(self) is cls and given is not None and (given.get("knn_eval") or {}).get("enabled"):
            _check_knn()
        init(self, *args, **kwargs)
        # a subclass goes on constructing; a model that is loaded takes its checkpoint's head
        if type(self) is cls and not _loading.get():
            _swap_configured(self, getattr(self, "cfg", given))

    @functools.wraps(save)
    def on_save_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        save(self, checkpoint)
        if KEY in vars(self):
            checkpoint[KEY] = self.headplug

    @functools.wraps(load)
    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        try:
            _check_checkpoint(self, checkpoint)
        except HeadplugError as error:
            raise _brief(error) from None
        load(self, checkpoint)

    construct.__signature__ = signature  # type: ignore[attr-defined]  # Lightning looks no deeper
    cls.__init__ = construct
    cls.on_save_checkpoint = on_save_checkpoint
    cls.on_load_checkpoint = on_load_checkpoint
    setattr(cls, MARK, True)


def _swap_configured(model: Any, config: Any) -> None:
    asked = ""
    try:
        block = read_block(config)
        if block is not None:
            asked = " ".join(f"{KEY}.head.{k}={v}" for k, v in block["head"].items())
            _swap(model, block, config)
            return
        made.append(None)
        if config is not None and KEY in config:
            _say("no other head is asked for.")
            _write(config, None)
    except HeadplugError as error:
        raise _brief(error, asked and f"\nThe config asks for {asked}") from None


def _swap(model: Any, block: Block, config: Any) -> None:
    loaded = ("weights",) if _loading.get() else ()  # the checkpoint brings them
    head = {k: v for k, v in block["head"].items() if k not in loaded}
    swap = swap_head(model, head, slot=block.get("slot"))
    if not _loading.get() and not getattr(swap.head, "pretrained", True):
        width, out = swap.head.input_dim, swap.head.embedding_dim
        raise HeadplugError(
            "this ae_embedding head has no pretrained embedding layer and will not train. "
            f"Pretrain one: `headplug pretrain-ae --data DATA --hidden-dim {width} --latent-dim "
            f"{out} --out ae.safetensors`, then add headplug.head.weights=ae.safetensors."
        )
    model.headplug = record(block, swap.report.new, swap.report.slot.path)
    if config is not None:
        _write(config, model.headplug)
    made.append(model.headplug)
    _say(swap.report)


def _write(config: Any, block: Block | None) -> None:
    """Leaves in the config, and so in args.json, what the run really has."""
    from omegaconf import open_dict

    with open_dict(config):
        if block is None:
            del config[KEY]
        else:
            config[KEY] = block


def _say(what: object) -> None:
    """Prints once, however many processes train."""
    if all(os.environ.get(rank, "0") == "0" for rank in RANKS):
        print(f"headplug: {what}", flush=True)


def _check_checkpoint(model: Any, checkpoint: Mapping[str, Any]) -> None:
    """Refuses to mix the weights of different heads; makes the head that a loaded model lacks."""
    theirs, config = checkpoint.get(KEY), getattr(model, "cfg", None)
    asked: Any = read_block(config, loading=True) if _loading.get() else vars(model).get(KEY)
    if theirs is None and asked is None:
        return
    if theirs is None:
        raise CheckpointError(
            f"the checkpoint has solo-learn's own head, this run asks for {asked['head']['name']!r}"
            ". Take the block `headplug:` out, or start from another checkpoint."
        )
    if asked is None and not _loading.get():
        raise CheckpointError(
            f"the checkpoint has the head {theirs['head']['name']!r}, this run asks for none. Add "
            f"the block `headplug:` that its args.json shows, e.g. {EXAMPLE}."
        )
    if _loading.get():  # what is asked for may leave options out
        asked = merged(theirs, asked or {})
    if unlike := differences(theirs, asked):
        raise CheckpointError(
            "the checkpoint has another head than this run asks for (there and here): "
            f"{'; '.join(unlike)}. Ask for the same head, or start from another checkpoint."
        )
    if _loading.get():
        _swap(model, theirs, config)
    _check_weights(model, checkpoint["state_dict"], theirs["slot"])


def _check_weights(model: Any, state: Mapping[str, Any], slot: str) -> None:
    """solo-learn loads with `strict=False`, which would leave a head random and say nothing."""
    place = slot_at(model, slot)
    paths = [place.path, place.twin, *(p for d in place.dependents for p in (d.path, d.twin))]
    for path in filter(None, paths):
        ours, found = (
            {k: tuple(v.shape) for k, v in of.items() if k == path or k.startswith(f"{path}.")}
            for of in (model.state_dict(), state)
        )
        if ours != found:
            key = min(k for k in {*ours, *found} if ours.get(k) != found.get(k))
            raise CheckpointError(
                f"the checkpoint does not hold the weights at {path!r} that go with its head: "
                f"{key!r} has shape {found.get(key)}, the model's {ours.get(key)}. Load the "
                "checkpoint that the run wrote, unchanged."
            )


def _check_knn() -> None:
    from solo.utils.knn import WeightedKNNClassifier

    try:
        WeightedKNNClassifier()
    except (TypeError, ValueError) as error:
        if "compute_on_step" in str(error):
            print(f"headplug: {KNN}", file=sys.stderr)


def _brief(error: HeadplugError, more: str = "") -> HeadplugError:
    """The same error with more words, of a kind that a running Hydra prints without a traceback."""
    kind = type(error)
    if hydra_config() is not None:
        from hydra.errors import CompactHydraException

        kind = type(kind.__name__, (kind, CompactHydraException), {})
    return kind(f"{error}{more}")
