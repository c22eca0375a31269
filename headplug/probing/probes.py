"""What a probe is: a kind of classifier, the settings to choose from, and how it trains.

The type of the settings says which kind it is, so that a grid of one's own needs no name for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from headplug.errors import OptionError, unknown
from headplug.probing.data import Targets
from headplug.probing.knn import KNNSetting, knn_grid, knn_predict
from headplug.probing.linear import LinearSetting, LinearTraining, fit_linear, linear_grid
from headplug.probing.logistic import LogisticSetting, fit_logistic, logistic_grid
from headplug.probing.mlp import MLPSetting, fit_mlp, mlp_grid
from headplug.probing.ridge import RidgeSetting, fit_ridge, ridge_grid

Pair = tuple[Tensor, Targets]


Predict = Callable[[Tensor], Tensor]
"""Makes of `(M, D)` features what S settings predict: classes `(S, M)` or numbers `(S, M, K)`."""


@dataclass(frozen=True)
class Probe:
    """A classifier (or regressor) with the settings to choose from.

    Attributes:
        settings: All of one type: `KNNSetting`, `LinearSetting`, `RidgeSetting`, `LogisticSetting`
            or `MLPSetting`.
        training: How a linear probe is trained; the others know it by themselves.

    Raises:
        OptionError: There is no setting, or they are of several types.

    >>> Probe([KNNSetting(5), KNNSetting(20)]).kind
    'knn'
    """

    settings: Sequence[Any]
    training: LinearTraining = field(default_factory=LinearTraining)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", tuple(self.settings))
        kinds = {type(s) for s in self.settings}
        if len(kinds) != 1 or not kinds <= KINDS.keys():
            names = ", ".join(sorted(k.__name__ for k in kinds)) or "none"
            raise OptionError(
                f"a probe takes settings of one type of {', '.join(k.__name__ for k in KINDS)}; "
                f"these are {names}."
            )

    @property
    def kind(self) -> str:
        """knn, linear, ridge, logistic or mlp."""
        return KINDS[type(self.settings[0])][0]

    def only(self, index: int) -> Probe:
        """The same with one of its settings."""
        return replace(self, settings=(self.settings[index],))

    def up_to(self, count: int) -> Probe:
        """The same without neighbours that `count` samples do not have."""
        if self.kind != "knn":
            return self
        fitting = [s for s in self.settings if s.k <= count]
        return replace(self, settings=fitting) if fitting else self

    def fit(
        self, features: Tensor, targets: Targets, *, seed: int = 0, validation: Pair | None = None
    ) -> Predict:
        """Fits all settings to `(N, D)` features.

        Args:
            features: Of the training samples.
            targets: Of the same.
            seed: Of the order of samples in training.
            validation: Samples to choose the best epoch on, if and only if `training` asks for it.

        Raises:
            HeadplugError: As the kind's own function does.
        """
        return KINDS[type(self.settings[0])][1](self, features, targets, seed, validation)


def _knn(probe: Probe, features: Tensor, targets: Targets, seed: int, _: Pair | None) -> Predict:
    return lambda queries: knn_predict(features, targets, queries, probe.settings)


def _linear(
    probe: Probe, features: Tensor, targets: Targets, seed: int, validation: Pair | None
) -> Predict:
    models = fit_linear(
        features,
        targets,
        probe.settings,
        training=probe.training,
        validation=validation,
        seed=seed,
    )
    return models.predict


def _ridge(probe: Probe, features: Tensor, targets: Targets, seed: int, _: Pair | None) -> Predict:
    return fit_ridge(features, targets, probe.settings).predict


def _logistic(
    probe: Probe, features: Tensor, targets: Targets, seed: int, _: Pair | None
) -> Predict:
    return fit_logistic(features, targets, probe.settings).predict


def _mlp(probe: Probe, features: Tensor, targets: Targets, seed: int, _: Pair | None) -> Predict:
    return fit_mlp(features, targets, probe.settings, seed=seed).predict


KINDS: Mapping[type, tuple[str, Callable[..., Predict]]] = {
    KNNSetting: ("knn", _knn),
    LinearSetting: ("linear", _linear),
    RidgeSetting: ("ridge", _ridge),
    LogisticSetting: ("logistic", _logistic),
    MLPSetting: ("mlp", _mlp),
}

PROBES: Mapping[str, Probe] = {
    "knn": Probe(knn_grid()),
    "linear": Probe(linear_grid()),
    "ridge": Probe(ridge_grid()),
    "logistic": Probe(logistic_grid()),
    "mlp": Probe(mlp_grid()),
}
"""The probes by name, with grids that suit most features."""


def probes_of(asked: Any, known: Mapping[str, Probe] = PROBES) -> dict[str, Probe]:
    """Probes by name.

    Args:
        asked: A name, several, or a mapping of names of one's own to settings or `Probe`s.
        known: Those that have a name.

    Raises:
        UnknownNameError: There is no such probe.
        OptionError: None is asked for, or settings are of several types.

    >>> probes_of({"nearest": [KNNSetting(1)]})["nearest"].kind
    'knn'
    """
    if isinstance(asked, str):
        asked = [asked]
    if isinstance(asked, Mapping):
        found = {str(k): v if isinstance(v, Probe) else Probe(v) for k, v in asked.items()}
    else:
        found = {}
        for name in asked:
            if name not in known:
                raise unknown("probe", str(name), known)
            found[name] = known[name]
    if not found:
        raise OptionError(f"name at least one probe of {', '.join(known)}.")
    return found
