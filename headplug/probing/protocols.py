"""Published ways to evaluate features, as data: what each prints about itself is all of it.

They are run on stored features, so that augmentation during the probe's training is not part of
them; where a paper has it, `differs` says so. Learning rates are scaled by batch size / 256 where
the source does that, and written out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from headplug.probing.knn import KNNSetting, knn_grid
from headplug.probing.linear import LinearSetting, LinearTraining
from headplug.probing.logistic import LogisticSetting
from headplug.probing.probes import PROBES, Probe

SELECT_ON = ("held-out", "test")


@dataclass(frozen=True)
class ProbeProtocol:
    """A way to evaluate features.

    Attributes:
        source: Paper or code that it is taken from.
        probes: By name.
        differs: What it does not do that its source does.
        select_on: "held-out": settings are chosen on a part of train; "test": on the test samples
            that accuracies are reported on, as the source does.
        held_out: Part of train that is held out.
        resplit: If given, the parts of the *test* samples to fit on, to choose on and to report on;
            the training samples are not used.
    """

    source: str
    probes: Mapping[str, Probe]
    differs: str = "no augmentation while the probe is trained"
    select_on: str = "held-out"
    held_out: float = 0.2
    resplit: tuple[float, float, float] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """All of it, as plain values."""
        probes = {
            name: {
                "kind": probe.kind,
                "settings": [s._asdict() for s in probe.settings],
                **({"training": asdict(probe.training)} if probe.kind == "linear" else {}),
            }
            for name, probe in self.probes.items()
        }
        about = {k: v for k, v in vars(self).items() if k != "probes"}
        return {**about, "probes": probes}

    def __str__(self) -> str:
        """All of it, in lines."""
        return spelled(self.config)


def spelled(config: Mapping[str, Any]) -> str:
    """All of a protocol's `config`, in lines."""
    lines = [f"source: {config['source']}", f"not as there: {config['differs']}"]
    if config["resplit"]:
        parts = "/".join(f"{part:.0%}" for part in config["resplit"])
        lines.append(f"the test samples are divided {parts}: fit, choose, report")
    if config["select_on"] == "test":
        lines.append("settings are chosen on the test samples that are reported on")
    elif not config["resplit"]:
        lines.append(f"settings are chosen on {config['held_out']:.0%} of train, held out")
    for name, probe in config["probes"].items():
        settings = probe["settings"]
        lines.append(f"{name}: {probe['kind']}, {len(settings)} settings")
        for key in settings[0]:
            values = dict.fromkeys(_plain(s[key]) for s in settings if s[key] is not None)
            lines += [f"  {key}: {', '.join(values)}"] if values else []
        lines += [f"  {k}: {_plain(v)}" for k, v in probe.get("training", {}).items()]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _linear(*lrs: float, **training: Any) -> Probe:
    settings = [LinearSetting(lr, normalize="none") for lr in lrs]
    return Probe(settings, LinearTraining(max_steps=training.pop("max_steps", None), **training))


def _neighbours(*ks: int, temperatures: tuple[float, ...]) -> Probe:
    return Probe(knn_grid(ks, temperatures, votes=["exp"]))


_NO_VIEWS = "no crops and flips while the probe is trained"
_LINEAR: dict[str, Any] = {
    "epochs": 100,
    "batch_size": 256,
    "schedule": "steps",
    "milestones": (60, 80),
}
_SOLO_TEMPERATURES = (0.01, 0.02, 0.05, 0.07, 0.1, 0.2, 0.5, 1.0)
_SOLO_KS = (1, 2, 5, 10, 20, 50, 100, 200)
_LOGISTIC = [LogisticSetting(float(10 ** (-6 + 11 * i / 44))) for i in range(45)]

PROTOCOLS: Mapping[str, ProbeProtocol] = {
    "headplug": ProbeProtocol(
        source="headplug: grids wide enough for most features",
        probes={name: PROBES[name] for name in ("knn", "linear", "ridge")},
        differs="nothing",
    ),
    "simclr": ProbeProtocol(
        source="arXiv 2002.05709, appendix B: linear evaluation, and transfer by L-BFGS",
        probes={
            "linear": _linear(1.6, epochs=90, batch_size=4096, nesterov=True, init="normal"),
            "logistic": Probe(_LOGISTIC),
        },
        differs=(f"{_NO_VIEWS}; penalties are of the mean loss on standardised features"),
    ),
    "moco": ProbeProtocol(
        source="arXiv 1911.05722 and its main_lincls.py",
        probes={"linear": _linear(30.0, init="normal", **_LINEAR)},
        differs=f"{_NO_VIEWS}; the last epoch, not the best on test",
    ),
    "dino": ProbeProtocol(
        source="arXiv 2104.14294 and its eval_linear.py and eval_knn.py: 128 x 8 images a step",
        probes={
            "knn": _neighbours(10, 20, 100, 200, temperatures=(0.07,)),
            "linear": _linear(
                0.004, epochs=100, batch_size=1024, schedule="cosine_epoch", init="normal"
            ),
        },
        differs=f"{_NO_VIEWS}; the last epoch, not the best on test",
    ),
    "dinov2": ProbeProtocol(
        source="arXiv 2304.07193 and its eval/: 13 learning rates, 12,500 steps of 128 on one GPU",
        probes={
            "knn": _neighbours(10, 20, 100, 200, temperatures=(0.07,)),
            "linear": _linear(
                *(m * 10.0**e / 2 for e in (-5, -4, -3, -2) for m in (1, 2, 5)),
                0.05,
                epochs=None,
                max_steps=12_500,
                batch_size=128,
                init="normal",
            ),
            "logistic": Probe([s._replace(of="sum") for s in _LOGISTIC]),  # C of 1e-5 to 1e6
        },
        differs=(
            f"{_NO_VIEWS}; rates of the linear probe are chosen on held-out train, not on test; "
            "each tap stands for itself, where its input is the last 1 or 4 blocks with and "
            "without the mean of the patches; logistic regression sees standardised features"
        ),
        held_out=0.1,
    ),
    "lightly": ProbeProtocol(
        source="lightly 1.6: utils/benchmarking and benchmarks/imagenet, one device",
        probes={
            "knn": _neighbours(200, temperatures=(0.1,)),
            "linear": _linear(0.05, epochs=90, batch_size=128, init="linear"),
        },
        differs=f"{_NO_VIEWS}; the last epoch, not the best on test",
    ),
    "solo-learn": ProbeProtocol(
        source="solo-learn 1.0.6: main_knn.py, and main_linear.py with scripts/linear",
        probes={
            "knn": Probe(
                knn_grid(_SOLO_KS, _SOLO_TEMPERATURES, votes=["exp"])
                + [KNNSetting(k, "euclidean", "inverse", 1e-5) for k in _SOLO_KS]
            ),
            "linear": _linear(0.1, 0.15, 0.3, 1.0, 3.0, 30.0, init="linear", **_LINEAR),
        },
        differs=(
            f"{_NO_VIEWS}; the learning rate of its scripts, one a method, is chosen from all"
        ),
    ),
    "ae": ProbeProtocol(
        source="arXiv 2408.14514 and its code: a linear layer on a part of the test split",
        probes={
            "linear": _linear(
                1e-3,
                epochs=50,
                batch_size=32,
                momentum=0.0,
                schedule="plateau",
                init="linear",
                keep_best=True,
            )
        },
        differs=(
            "the order of samples and the weights at the start; the plateau is one of an epoch's "
            "mean loss, not of its last batch's"
        ),
        resplit=(0.7, 0.1, 0.2),
    ),
}
"""Ways to evaluate by name; printing one shows its whole setting."""
