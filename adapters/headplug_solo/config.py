"""The block `headplug:` of a solo-learn config: read, checked, and recorded in full.

A mistake in it must stop the run before training: solo-learn itself ignores keys that it does not
know. Beside the head, `probe:` says which layers to read during training. What is recorded is the
whole head, so that an evaluation script builds it again from `args.json` without the user's files,
and two runs are taken for one only if their heads are equal.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headplug.checkpoints import read_embedding
from headplug.errors import HeadplugError, OptionError, unknown
from headplug.heads import AEEmbeddingHead, describe_head, list_heads
from headplug.swap.records import KEY

KEYS = ("head", "slot", "probe", "weights_sha256")
NAMES: tuple[type, ...] = (str, list)
PROBE_KEYS: dict[str, tuple[type, ...]] = {  # and what LayerProbe itself does not check
    "taps": (*NAMES, Mapping),
    "probes": NAMES,
    "diagnostics": NAMES,
    "every_n_epochs": (object,),
    "every_n_steps": (object,),
    "max_fraction_of_time": (object,),
    "seed": (int,),
}
ENVIRONMENT = "HEADPLUG_SOLO"  # the block as JSON, where a script has no config to hold it
EXAMPLE = "headplug: {head: {name: ae_embedding, weights: ae.safetensors}}"
PROBE_EXAMPLE = "headplug: {probe: {taps: [backbone, projection], every_n_epochs: 5}}"

Block = dict[str, Any]


def offer() -> None:
    """Adds the config group `headplug` to Hydra, with one option per registered head.

    The options take any key (`headplug.head.weights=...` needs no `+`), since the head checks its
    own; a user's file of the same name in the group goes before ours.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    for name in list_heads():
        node = OmegaConf.create({"head": {"name": name}}, flags={"struct": False})
        ConfigStore.instance().store(name, node, group=KEY, provider="headplug")


def read_block(config: Any, loading: bool = False) -> Block | None:
    """What a run asks for, in its config or through `headplug-solo --headplug`.

    Args:
        config: A method's OmegaConf config; None where it has none.
        loading: The weights come from a checkpoint, so the block's own file is not needed.

    Returns:
        `head` (a mapping with a name and, for a file of weights, its absolute path) and, where
        given or known, `slot` and `weights_sha256`; None if no other head is asked for. On the
        command line `headplug.head=null` says so: since there is a config group of the name,
        Hydra refuses `headplug=null`.

    Raises:
        OptionError, UnknownNameError: A key is misspelt, missing or at the wrong place.
    """
    block = _given(config)
    if isinstance(block, Mapping):
        probed, block = "probe" in block, {k: v for k, v in block.items() if k != "probe"}
        if block == {"head": None} or (probed and not block):
            return None
    return None if block is None else _checked(block, loading)


def read_probe(config: Any) -> Block | None:
    """What a run asks for under `headplug.probe:`; None if nothing.

    It changes no weights, so it is no part of what is recorded, or compared when a run resumes.

    Args:
        config: As in `read_block`.

    Returns:
        Options of `headplug.callbacks.LayerProbe`; its `at` is called `taps`.

    Raises:
        OptionError: It is no block, a key is misspelt, or a value is of no such kind.
    """
    block = _given(config)
    probe = block.get("probe") if isinstance(block, Mapping) else None
    if probe is None:
        return None
    if not isinstance(probe, Mapping):
        raise OptionError(
            f"`{KEY}.probe` must hold a block, not {probe!r}. Example: {PROBE_EXAMPLE}."
        )
    hint = f"Example: {PROBE_EXAMPLE}."
    for key, value in probe.items():
        if key not in PROBE_KEYS:
            raise OptionError(str(unknown(f"key under `{KEY}.probe:`", str(key), PROBE_KEYS, hint)))
        if value is not None and not isinstance(value, PROBE_KEYS[key]):
            raise OptionError(f"`{KEY}.probe.{key}` cannot be {value!r}. {hint}")
    return {k: v for k, v in probe.items() if v is not None or k == "max_fraction_of_time"}


def _given(config: Any) -> Any:
    """The block as it was written, in the config or through `headplug-solo --headplug`."""
    block = None
    if config is not None:
        _refuse_misspelt(config)
        block = _plain(config.get(KEY))
    if ENVIRONMENT in os.environ:
        if block is not None:
            raise OptionError(
                "the config has a block `headplug:` already. Leave --headplug out, or the block."
            )
        block = json.loads(os.environ[ENVIRONMENT])
    return block


def record(block: Block, head: Mapping[str, Any], slot: str) -> Block:
    """The block of a run that was made: its whole head, JSON-plain.

    Args:
        block: What `read_block` returned.
        head: The config of the head that was built.
        slot: The path where it was put.

    Raises:
        OptionError: The head's config does not survive JSON.
    """
    weights = {"weights": block["head"]["weights"]} if block["head"].get("weights") else {}
    kept = {k: block[k] for k in ("weights_sha256",) if k in block}
    try:
        whole: Block = json.loads(
            json.dumps({"head": {**head, **weights}, "slot": slot, **kept}, allow_nan=False)
        )
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"the config of the head {head.get('name')!r} cannot be written to args.json: {error}."
        ) from None
    return whole


def merged(block: Block, other: Block) -> Block:
    """One block with another's options over its own, at every level.

    >>> merged({"head": {"name": "byol", "output_dim": 8}}, {"head": {"output_dim": 16}})
    {'head': {'name': 'byol', 'output_dim': 16}}
    """
    both = [k for k in other if isinstance(block.get(k), dict) and isinstance(other[k], dict)]
    return {**block, **other, **{k: merged(block[k], other[k]) for k in both}}


def _refuse_misspelt(config: Any) -> None:
    """Refuses keys that look like `headplug` and would be ignored, and `headplug` elsewhere."""
    for key in config:
        if key != KEY and difflib.get_close_matches(str(key).lower(), [KEY], cutoff=0.8):
            raise OptionError(
                f"the config has the key {key!r}, which nothing reads; write `{KEY}:`."
            )
    if KEY in (config.get("method_kwargs") or ()):
        raise OptionError(
            f"`{KEY}:` stands under `method_kwargs:`, where nothing reads it; move it to the top "
            f"of the config, beside `method:`. Example: {EXAMPLE}."
        )


def _plain(block: Any) -> Any:
    if type(block).__module__.startswith("omegaconf."):
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            return OmegaConf.to_container(block, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            reason = str(error).partition("\n")[0]
            raise OptionError(f"the block `{KEY}:` cannot be read: {reason}.") from None
    return block


def _checked(block: Any, loading: bool) -> Block:
    if not isinstance(block, Mapping):
        raise OptionError(f"`{KEY}:` must hold a block, not {block!r}. Example: {EXAMPLE}.")
    for key in block:
        if key not in KEYS:
            hint = f"A head's own options stand under `head:`, e.g. {EXAMPLE}."
            raise OptionError(str(unknown("key under `headplug:`", str(key), KEYS[:3], hint)))
    head, slot = block.get("head"), block.get("slot")
    if isinstance(head, str):
        head = {"name": head}
    if not isinstance(head, Mapping) or not isinstance(head.get("name"), str):
        raise OptionError(
            f"`{KEY}:` must say which head: a name, or a block with `name:`; found {head!r}. "
            f"Example: {EXAMPLE}."
        )
    if slot is not None and not isinstance(slot, str):
        raise OptionError(f"`{KEY}.slot` must be the path of a module, not {slot!r}.")
    head = {k: v for k, v in head.items() if k != "weights" or v is not None}
    checked: Block = {**block, "head": head}
    if loading:
        head.pop("weights", None)
    elif isinstance(head.get("weights"), str):
        path = (_start() / Path(head["weights"]).expanduser()).resolve()
        if _is_for_others(path, head["name"]):
            print(f"headplug: {path} is an autoencoder's and not used for {head['name']!r}.")
            del head["weights"]
        else:
            head["weights"] = str(path)
            checked["weights_sha256"] = _digest(path, block.get("weights_sha256"))
    return checked


def hydra_config() -> Any:
    """What Hydra knows of the job that it runs; None where it runs none."""
    module = sys.modules.get("hydra.core.hydra_config")
    return module.HydraConfig.get() if module and module.HydraConfig.initialized() else None


def _start() -> Path:
    """The directory that the user started from, which Hydra may have left (`hydra.job.chdir`)."""
    job = hydra_config()
    return Path(job.runtime.cwd) if job else Path.cwd()


def _is_for_others(path: Path, name: str) -> bool:
    """Whether a sweep gives an autoencoder to all its heads, and this one cannot take it."""
    job = hydra_config()
    if job is None or job.mode is None or job.mode.name != "MULTIRUN":
        return False
    if describe_head(name).builder is AEEmbeddingHead:
        return False
    try:
        read_embedding(path)
    except HeadplugError:
        return False
    return True


def _digest(path: Path, expected: Any) -> str | None:
    """SHA-256 of a file of weights; None if there is none, which the head refuses."""
    path = path / "model.pt" if path.is_dir() else path
    if not path.is_file():
        return None
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if expected not in (None, found):
        raise OptionError(
            f"{path} is not the file that the config was written for: its SHA-256 is {found}, not "
            f"{expected}. Bring the old file back, or take `weights_sha256` out."
        )
    return found
