"""Swapping the head of every solo-learn method at the end of its construction, and probing it.

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
from headplug.hosts.modules import submodule
from headplug.swap import Swap, restore_heads, swap_head
from headplug.swap.records import (
    KEY,
    Record,
    mark,
    misfit,
    recorded,
    records,
    refuse_unrecorded,
    unlike,
)
from headplug_solo.config import (
    EXAMPLE,
    Block,
    hydra_config,
    merged,
    read_block,
    read_probe,
    record,
)
from headplug_solo.layers import Images, attach, layer_probe, points

KNN = (
    "solo-learn's kNN classifier does not run on torchmetrics 0.12 or newer, with or without "
    "headplug: pip install 'torchmetrics<0.12' 'setuptools<81'."
)
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
MARK = "_takes_heads_of_headplug"
PROBE = "_layer_probe_of_headplug"

_loading: ContextVar[bool] = ContextVar("loading", default=False)
made: list[Block | None] = []  # the head of each method made in this process, None for its own


def arm() -> None:
    """Makes solo-learn's methods take the head that their config asks for; twice does no harm.

    Subclasses, whenever they are defined, do so too. `solo.methods` must have been imported.
    """
    if not (found := roots()):
        return
    for root in found:
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


def roots() -> set[type]:
    """solo-learn's own bases of its methods; none where another package is called `solo`."""
    methods = getattr(sys.modules["solo.methods"], "METHODS", None)
    found = methods.values() if isinstance(methods, Mapping) else ()
    classes = [c for c in found if isinstance(c, type) and hasattr(c, "load_from_checkpoint")]
    lines = [[b for b in c.__mro__ if b.__module__.startswith("solo.")] for c in classes]
    return {line[-1] for line in lines if line}


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
    root.restores_heads = True  # `headplug.callbacks.HeadSwap` need not


def _adopt(cls: Any) -> None:
    """Adds the swap, its record in checkpoints and the probe to the class of a model to be made."""
    if MARK in vars(cls):
        return
    init, save, load = cls.__init__, cls.on_save_checkpoint, cls.on_load_checkpoint
    configure, signature = cls.configure_callbacks, inspect.signature(init)

    @functools.wraps(init)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind_partial(self, *args, **kwargs).arguments.get("cfg")
        if type(self) is cls and given is not None and (given.get("knn_eval") or {}).get("enabled"):
            _check_knn()
        init(self, *args, **kwargs)
        # a subclass goes on constructing; a model that is loaded takes its checkpoint's head
        if type(self) is cls and not _loading.get():
            _swap_configured(self, getattr(self, "cfg", given), kwargs)

    @functools.wraps(save)
    def on_save_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        save(self, checkpoint)
        if found := records(self):
            checkpoint[KEY] = found

    @functools.wraps(load)
    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        try:
            _check_checkpoint(self, checkpoint)
        except HeadplugError as error:
            raise _brief(error) from None
        load(self, checkpoint)

    @functools.wraps(configure)
    def configure_callbacks(self: Any) -> Any:
        if type(self) is cls and PROBE in vars(self):
            attach(self.trainer, layer_probe(*vars(self)[PROBE]))
        return configure(self)

    construct.__signature__ = signature  # type: ignore[attr-defined]  # Lightning looks no deeper
    cls.__init__ = construct
    cls.on_save_checkpoint = on_save_checkpoint
    cls.on_load_checkpoint = on_load_checkpoint
    cls.configure_callbacks = configure_callbacks
    setattr(cls, MARK, True)


def _swap_configured(model: Any, config: Any, arguments: Mapping[str, Any]) -> None:
    asked = ""
    try:
        options, block = read_probe(config), read_block(config)
        if block is not None:
            asked = " ".join(f"{KEY}.head.{k}={v}" for k, v in block["head"].items())
            _swap(model, block, config)
            asked = ""
        else:
            made.append(None)
            if config is not None and KEY in config:
                _say("no other head is asked for.")
                _write(config, None)
        if options is not None:
            probed = options, Images.of(config, arguments)
            taps = points(layer_probe(*probed), model)  # finds what is wrong with it now
            setattr(model, PROBE, probed)
            _say(f"LayerProbe reads {', '.join(taps)}.")
    except HeadplugError as error:
        raise _brief(error, asked and f"\nThe config asks for {asked}") from None


def _swap(model: Any, block: Block, config: Any) -> None:
    swap = swap_head(model, block["head"], slot=block.get("slot"))
    if not getattr(swap.head, "pretrained", True):
        width, out = swap.head.input_dim, swap.head.embedding_dim
        raise HeadplugError(
            "this ae_embedding head has no pretrained embedding layer and will not train. "
            f"Pretrain one: `headplug pretrain-ae --data DATA --hidden-dim {width} --latent-dim "
            f"{out} --out ae.safetensors`, then add headplug.head.weights=ae.safetensors."
        )
    if "weights_sha256" in block:
        there = submodule(model, swap.report.slot.path)
        mark(there, weights_sha256=block["weights_sha256"])
    _tell(model, swap, block, config)


def _tell(model: Any, swap: Swap, block: Block, config: Any) -> None:
    """Leaves what the run has in args.json, and prints it."""
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
    """Refuses to mix the weights of different heads; makes the heads that a loaded model lacks."""
    there, state = recorded(checkpoint), checkpoint["state_dict"]
    config = getattr(model, "cfg", None)
    here = _asked(config, there) if _loading.get() else records(model)
    if here and not there:
        raise CheckpointError(
            f"the checkpoint has solo-learn's own head, this run asks for {_name(here[0])!r}. "
            "Take the block `headplug:` out, or start from another checkpoint."
        )
    if there and not here:
        raise CheckpointError(
            f"the checkpoint has the head {_name(there[0])!r}, this run asks for none. Add "
            f"the block `headplug:` that its args.json shows, e.g. {EXAMPLE}."
        )
    if words := unlike(there, here):
        raise CheckpointError(
            "the checkpoint has another head than this run asks for (there and here): "
            f"{'; '.join(words)}. Ask for the same head, or start from another checkpoint."
        )
    if _loading.get():
        blocks = {r["slot"]: r for r in there}
        for swap in restore_heads(model, checkpoint):
            _tell(model, swap, blocks[swap.report.slot.path], config)
        if not there:
            refuse_unrecorded(model, state)
    for head in there:
        _check_weights(model, state, head["slot"])


def _asked(config: Any, there: list[Record]) -> list[Record]:
    """What a script that loads a checkpoint asks for; the checkpoint tells what it leaves out."""
    block = read_block(config, loading=True)
    if block is None:
        return there
    place = block.get("slot")
    known = next((r for r in there if place in (None, r["slot"])), {})
    return [merged(known, block), *(r for r in there if r is not known)]


def _name(head: Record) -> str:
    return str(head["head"].get("name") or head["head"].get("class"))


def _check_weights(model: Any, state: Mapping[str, Any], slot: str) -> None:
    """solo-learn loads with `strict=False`, which would leave a head random and say nothing."""
    place = slot_at(model, slot)
    paths = [place.path, place.twin, *(p for d in place.dependents for p in (d.path, d.twin))]
    if reason := misfit(model, state, paths):
        raise CheckpointError(
            f"the checkpoint does not hold the weights that go with its head: {reason}. Load the "
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
