"""The CIFAR-10 grid of arXiv 2408.14514 as plans of `compare`: whole, or some of its pairs.

A pair is a frozen AE embedding and the paper's default head, `simclr_plain`, with all else alike.
"""

from typing import NamedTuple

from headplug.errors import OptionError

WIDTHS, OUTPUT_DIMS = (128, 256, 512), (32, 64, 128)
ACTIVATIONS, STANDARDIZE = ("relu", "silu", "sigmoid", "tanh"), (False, True)
HEADS = ("ae_embedding", "simclr_plain")

PAPER = {
    "heads": HEADS,
    "recipe": "simclr",  # its SGD, learning rates and views are the paper's
    "backbone": "resnet34.tv_in1k",  # torchvision's weights
    "pretrained": True,
    "stem": "default",
    "limit": 45_000,
    "epochs": 150,
    "batch_size": 1280,
    "ae_epochs": 100,
    "seeds": (42,),
    "protocol": "ae",
}
LAPTOP = {
    **PAPER,
    "backbone": "resnet18.tv_in1k",
    "limit": 2000,
    "epochs": 10,
    "batch_size": 128,
    "ae_epochs": 20,
}
RECORDED = {  # micro accuracy, mean and maximum over runs of one seed
    "ae_embedding": {"mean": 0.620, "max": 0.666, "runs": 72},
    "simclr_plain": {"mean": 0.586, "max": 0.649, "runs": 72},
    "ae_embedding, unfrozen": {"mean": 0.564, "runs": 9},
}


class Pair(NamedTuple):
    """What the two heads of a pair have in common."""

    width: int
    output_dim: int
    activation: str
    standardize: bool

    def plan(self, size, **options):
        """Options of a `Plan`."""
        return {
            **size,
            "widths": (self.width,),
            "output_dims": (self.output_dim,),
            "activations": (self.activation,),
            "standardize": self.standardize,
            **options,
        }


def pairs(fraction):
    """A fraction of the 72 pairs, at least one: the first of an order that is spread over the grid.

    Twelve pairs in turn have every width with every activation; what goes with them is shifted, so
    that each value of each factor comes early and about as often as the others.

    Raises:
        OptionError: It is none.
    """
    if not 0 < fraction <= 1:
        raise OptionError(f"a fraction lies above 0 and is at most 1, not {fraction!r}.")
    order = []
    for turn in range(6):
        for i in range(12):
            order.append(
                Pair(
                    WIDTHS[i % 3],
                    OUTPUT_DIMS[(i + i // 3 + turn) % 3],
                    ACTIVATIONS[i % 4],
                    STANDARDIZE[(i + i // 4 + turn) % 2],
                )
            )
    return order[: max(1, round(fraction * len(order)))]
