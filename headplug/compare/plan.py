"""What a comparison will do, checked before anything is computed."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headplug.compare.recipes import recipe
from headplug.errors import OptionError, unknown
from headplug.heads import create_head, describe_head
from headplug.probing import PROBES
from headplug.probing.layerwise import rule_of
from headplug.probing.probes import probes_of

WIDTH_OPTIONS = ("embedding_dim", "hidden_dim")  # what `widths` means to a head
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")
SWEEPS = ("seeds", "heads", "widths", "output_dims", "activations", "kappas")
PLACE = ("devices", "nodes", "precision", "workers", "out")  # where it runs, not what it computes


@dataclass(frozen=True)
class HeadChoice:
    """One head of a comparison.

    Attributes:
        label: What tables call it, e.g. "ae_embedding[embedding_dim=128]".
        options: What `create_head` gets beside `input_dim`.
    """

    label: str
    options: dict[str, Any]

    @property
    def slug(self) -> str:
        """The label as part of a file name."""
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", self.label).strip("-")

    def check(self, input_dim: int) -> None:
        """Builds and runs the head on the meta device, which allocates nothing.

        Raises:
            OptionError: It gives something else than one vector per image.
            DimensionError, OptionError: As `create_head` does.
        """
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come when the head is built for the run
            head = create_head({**self.options, "input_dim": input_dim}).eval()
            z = head(torch.empty(2, input_dim))
        if not isinstance(z, Tensor) or z.ndim != 2:
            raise OptionError(
                f"the head {self.label!r} gives {type(z).__name__} and cannot stand before a loss; "
                "compare projection heads only."
            )


@dataclass(frozen=True)
class Plan:
    """The settings of a comparison.

    Attributes:
        data: See `headplug.compare.data.load_data`.
        heads: Names of heads.
        backbone: Name of a timm model.
        recipe: simclr, byol, simsiam, barlow_twins or vicreg.
        epochs: Passes over the training images for each run.
        batch_size: Images a step, on each device.
        seeds: One run per head and seed. Runs of one seed share backbone weights, batches and
            views.
        widths: Hidden or embedding widths to sweep, for the heads that have one.
        output_dims: Projection widths to sweep, for the heads that can change it.
        activations: Activations to sweep, for the heads that have one.
        kappas: Values of kappa to sweep, for the reweighting head.
        standardize: Subtract the mean and divide by the standard deviation of each channel, of the
            training images. Left out, images of a pretrained backbone are normalised as timm has it
            for its weights, and others are not.
        limit: Use a class-balanced subset of this many training images.
        image_size: Side to resize images to; left out, their own.
        stem: "small" keeps the resolution in a ResNet's stem, "default" leaves the model as it is,
            "auto" is small for images below 65 pixels, unless the backbone is pretrained.
        pretrained: Start from timm's weights instead of random ones; those of a small stem are
            new.
        lr: Learning rate of SGD; left out, the recipe's (0.3 or 0.1) for 256 images a step.
        ae_epochs: Epochs of autoencoder pretraining, for the heads that need it.
        protocol: Whose way to evaluate, a name of `headplug.probing.PROTOCOLS`.
        probes: Any of "knn", "linear", "ridge", "logistic" and "mlp"; left out, the protocol's.
        devices: Devices on each node.
        nodes: Machines.
        precision: As Lightning names it: "32-true", "16-mixed", "bf16-mixed".
        workers: Processes that decode images which do not fit in memory.
        out: Folder of the run; left out, `runs/DATA-BACKBONE-RECIPE`.
    """

    data: str = "digits"
    heads: Sequence[str] = ("simclr", "ae_embedding", "reweighting")
    backbone: str = "resnet18"
    recipe: str = "simclr"
    epochs: int = 20
    batch_size: int = 256
    seeds: Sequence[int] = (0,)
    widths: Sequence[int] = ()
    output_dims: Sequence[int] = ()
    activations: Sequence[str] = ()
    kappas: Sequence[float] = ()
    standardize: bool | None = None
    limit: int | None = None
    image_size: int | None = None
    stem: str = "auto"
    pretrained: bool = False
    lr: float | None = None
    ae_epochs: int = 100
    protocol: str = "headplug"
    probes: Sequence[str] = ()
    devices: int = 1
    nodes: int = 1
    precision: str = "32-true"
    workers: int = 0
    out: str | None = None
    choices: tuple[HeadChoice, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "ae_epochs", "devices", "nodes"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("heads", "seeds", "probes"):
            values = list(getattr(self, name))
            if not values and name != "probes":
                raise OptionError(f"{name} must name at least one.")
            if len(set(values)) < len(values):
                raise OptionError(f"{name} must name each thing once; it is {values}.")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise OptionError(f"lr must be a positive number, not {self.lr!r}.")
        if self.precision not in PRECISIONS:
            raise OptionError(str(unknown("precision", self.precision, PRECISIONS)))
        if self.stem not in ("auto", "small", "default"):
            raise OptionError(f"stem must be auto, small or default, not {self.stem!r}.")
        recipe(self.recipe)
        published = rule_of(self.protocol, None, None).probes
        asked = probes_of(self.probes or [*published], {**PROBES, **published})
        object.__setattr__(self, "probes", tuple(asked))
        if self.pretrained and self.stem == "auto":
            object.__setattr__(self, "stem", "default")
        object.__setattr__(self, "choices", self._grid())

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        if self.out is not None:
            return Path(self.out)
        name = re.sub(r"[^A-Za-z0-9]+", "-", Path(self.data).name)
        return Path("runs") / f"{name}-{self.backbone}-{self.recipe}"

    @property
    def rate(self) -> float:
        """The learning rate of the whole batch."""
        batch = self.batch_size * self.devices * self.nodes
        return recipe(self.recipe).lr * batch / 256 if self.lr is None else self.lr

    @property
    def config(self) -> dict[str, Any]:
        """The settings as JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        del plain["choices"]
        return plain

    def folder_of(self, choice: HeadChoice, seed: int) -> Path:
        """Where one run lives."""
        return self.folder / f"{choice.slug}-seed{seed}"

    @property
    def runs(self) -> list[tuple[HeadChoice, int]]:
        """Every head with every seed."""
        return [(c, s) for s in self.seeds for c in self.choices]

    @property
    def shared(self) -> dict[str, Any]:
        """What all runs in one folder must agree on; heads, sweeps and seeds may be added."""
        return {k: v for k, v in self.config.items() if k not in (*SWEEPS, *PLACE)}

    @property
    def fingerprint(self) -> str:
        """A hash of `shared`."""
        return hashlib.sha256(json.dumps(self.shared, sort_keys=True).encode()).hexdigest()[:16]

    def _grid(self) -> tuple[HeadChoice, ...]:
        found: dict[str, HeadChoice] = {}
        used: set[str] = set()
        for name in self.heads:
            known = describe_head(name).defaults
            width = next((o for o in WIDTH_OPTIONS if o in known), None)
            fixed_width = known.get("output_dim", 0) is None
            axes: dict[str, Sequence[Any]] = {
                width or "": self.widths,
                "" if fixed_width else "output_dim": self.output_dims,
                "activation": self.activations,
                "kappa": self.kappas,
            }
            axes = {o: v for o, v in axes.items() if o in known and len(v)}
            used |= set(axes)
            for values in itertools.product(*axes.values()):
                options: dict[str, Any] = dict(zip(axes, values, strict=True))
                listing = ",".join(f"{o}={v}" for o, v in options.items())
                label = f"{name}[{listing}]" if listing else name
                found[label] = HeadChoice(label, {"name": name, **options})
                found[label].check(2**16)  # the backbone's width is not known yet
        given = {
            "widths": WIDTH_OPTIONS,
            "output_dims": ("output_dim",),
            "activations": ("activation",),
            "kappas": ("kappa",),
        }
        for name, taking in given.items():
            if len(getattr(self, name)) and not used.intersection(taking):
                raise OptionError(
                    f"{name} was given, but none of the heads {', '.join(self.heads)} takes it."
                )
        return tuple(found.values())
