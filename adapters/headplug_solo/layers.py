"""A LayerProbe for the trainer of solo-learn's runs, as the block `headplug: {probe: ...}` asks.

It reads what solo-learn's own classifier is trained and validated on, the images of the config's
train and val folders, but both with the plain transform of validation. It stands before other
callbacks: what it found is in the checkpoint of the same epoch, and all processes come to it at the
same time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from headplug.errors import OptionError
from headplug.swap.records import KEY
from headplug.taps.options import Tap, requested
from headplug.taps.points import Layout
from headplug_solo.config import Block

if TYPE_CHECKING:
    from headplug.callbacks import LayerProbe

FOLDERS = ("custom", "imagenet", "imagenet100")  # others bring their validation images


@dataclass
class Images:
    """The labelled images of a run, as solo-learn reads them.

    Attributes:
        dataset: Its name.
        places: What `prepare_datasets` takes besides.
        reading: What `prepare_dataloaders` takes besides.
        has_val: Whether there are any to validate on.
    """

    dataset: str
    places: dict[str, Any]
    reading: dict[str, Any]
    has_val: bool

    @classmethod
    def of(cls, config: Any, arguments: Mapping[str, Any]) -> Images:
        """What a run reads.

        Args:
            config: A method's OmegaConf config; None where it has none, as in release 1.0.2.
            arguments: What the method was made with, in release 1.0.2 all of the command line.

        Raises:
            OptionError: The run does not say where images are, or they have no labels.
        """
        data = arguments if config is None else config.get("data") or {}
        name = data.get("dataset")
        if name is None or data.get("no_labels"):
            why = "does not say where they are" if name is None else "has no_labels=True"
            raise OptionError(
                f"`{KEY}.probe` reads the labelled images that solo-learn's classifier reads, and "
                f"this run {why}. Leave it out, or give headplug.callbacks.LayerProbe(train, test) "
                "to the trainer."
            )
        places: dict[str, Any]
        if config is None:
            reading = {k: data[k] for k in ("batch_size", "num_workers") if k in data}
            train, val = data.get("train_dir"), data.get("val_dir")
            places = {"data_dir": data.get("data_dir"), "train_dir": train, "val_dir": val or train}
        else:
            rows, workers = config.optimizer.batch_size, data.get("num_workers", 4)
            reading = {"batch_size": rows, "num_workers": workers}
            train, val = data.get("train_path"), data.get("val_path")
            kind = data.get("format") or "image_folder"
            places = {
                "train_data_path": train,
                "val_data_path": val or train,
                "data_format": "image_folder" if kind == "dali" else kind,
                "data_fraction": data.get("fraction") or -1,
            }
        return cls(name, places, reading, val is not None or name not in FOLDERS)

    @cached_property
    def loaders(self) -> tuple[Any, Any]:
        """Of train and val, made when they are asked for."""
        package = "solo.data" if find_spec("solo.data") else "solo.utils"  # in release 1.0.2
        solo = import_module(f"{package}.classification_dataloader")
        _, plain = solo.prepare_transforms(self.dataset)
        both = solo.prepare_datasets(self.dataset, plain, plain, **self.places)
        loaders: tuple[Any, Any] = solo.prepare_dataloaders(*both, **self.reading)
        return loaders

    def train(self) -> Any:
        """A loader of the training images."""
        return self.loaders[0]

    def val(self) -> Any:
        """A loader of the validation images."""
        return self.loaders[1]


def layer_probe(options: Block, images: Images) -> LayerProbe:
    """A new callback.

    Args:
        options: What `read_probe` returned.
        images: What it is to read.

    Raises:
        OptionError: An option is impossible, or there are no images to validate on.
        UnknownNameError: There is no such probe or diagnostic.
    """
    from headplug.callbacks import LayerProbe

    if not images.has_val and options.get("probes", True):
        raise OptionError(
            f"`{KEY}.probe` needs validation images, and this run has none. Name them "
            "(data.val_path=, in release 1.0.2 --val_dir), or ask for diagnostics alone: "
            f"{KEY}.probe.probes=[]."
        )
    images = replace(images)
    options = {"at" if key == "taps" else key: value for key, value in options.items()}
    return LayerProbe(images.train, images.val if images.has_val else None, **options)


def points(probe: LayerProbe, model: Any) -> list[str]:
    """The names of what it reads of a model, once it is sure that the model has all of them.

    Raises:
        UnknownNameError: A point matches nothing.
        SlotError: `pre_projection` or `projection` of a model without one projection head.
        TapError: A point's ending means nothing, or it is never called.
    """
    asked = requested(probe.at, Tap(""))
    Layout(model).resolve(asked)
    return list(asked)


def attach(trainer: Any, probe: LayerProbe) -> None:
    """Puts it before the trainer's callbacks, unless it has one of that name."""
    if all(getattr(c, "state_key", None) != probe.state_key for c in trainer.callbacks):
        trainer.callbacks = [probe, *trainer.callbacks]
