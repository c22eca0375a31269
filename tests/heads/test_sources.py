"""Every head that has a source equals it to the last bit: lightly's classes, solo-learn's methods.

Both lists come from the registry. solo-learn runs in a process of its own (see `run_on_solo`); this
file is also the script there, which builds real methods and compares their heads with ours.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headplug import create_head, describe_head, list_heads
from headplug.errors import HeadplugError

SOURCES = {name: describe_head(name).source for name in list_heads() if describe_head(name).source}
OF_SOLO = [name for name, source in SOURCES.items() if source.startswith("solo.")]
OF_LIGHTLY = [name for name in SOURCES if name not in OF_SOLO]

DIMS = ("input_dim", "hidden_dim", "output_dim", "bottleneck_dim")
WIDTHS: list[tuple[Any, ...]] = [
    (32, 48, 24, 8),
    (24, 40, 40, 40),
    (7, 5, 3, 4),
    (16, 12, [6, 9], 8),  # for those that have several outputs
]

# What a constructor of lightly's calls by another name than our head; all other names agree.
TRANSLATED: dict[str, Callable[[Any], Any]] = {
    "batch_norm": lambda head: head.norm == "batch",
    "use_bias": lambda head: bool(head.bias),
    "proj_drop": lambda head: head.dropout,
    "n_prototypes": lambda head: head.output_dim,
    "num_clusters": lambda head: head.output_dim,
    "group_features": lambda head: torch.rand(head.output_dim, head.input_dim),
}
TRANSLATED_FOR: dict[str, dict[str, Callable[[Any], Any]]] = {
    "MMCRProjectionHead": {"num_layers": lambda head: head.num_layers - 1},  # it counts hidden ones
}
CALLS: dict[str, Callable[[Any, Tensor], Any]] = {
    "SMoGPrototypes": lambda module, x: module(x, module.group_features),
    "ModuleList": lambda module, x: [layer(x) for layer in module],
}

# Where a preset is, on purpose, not lightly's default: a later version of the same method, whose
# values lightly's docstrings give in words.
LATER_VERSIONS: dict[str, dict[str, Any]] = {
    "moco_v3": {"hidden_dim": 4096, "output_dim": 256, "num_layers": 3, "batch_norm": True},
    "simclr_v2": {"num_layers": 3},
}
# Where it is not what solo-learn's configs for CIFAR say, but what the paper does.
OF_THE_PAPER: dict[str, dict[str, Any]] = {"simclr_plain": {"hidden_dim": None, "output_dim": 128}}

# Where the release differs from main, which we follow: heads are equal once weights are loaded, but
# start with others or train others.
CHANGED_SINCE_RELEASE = {
    "swav_prototypes_solo": "1.0.2 trains the prototypes' lengths; main fixes them at one"
}
MAIN_ONLY = ("supcon", "vibcreg", "mocov3", "all4one")
# Where the source writes gradients by hand and we leave them to autograd: equal up to rounding.
ROUNDED_GRADIENTS = ("vibcreg_iternorm_solo",)
# What else than widths changes a method's heads.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "mocov3": [{"backbone": "vit_tiny"}],
    "vibcreg": [{"iternorm": True}],
}
HEADS_OF_METHODS = ("projector", "predictor", "predictor2", "head", "prototypes")


# comparing two heads


def call(head: nn.Module, x: Tensor) -> list[Tensor]:
    """The output as a list of tensors, whatever a head gives."""
    z = CALLS.get(type(head).__name__, lambda module, x: module(x))(head, x)
    return [z] if isinstance(z, Tensor) else list(z)


def equal(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        x is y is None or (x is not None and y is not None and torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


def close(a: list[Any], b: list[Any]) -> bool:
    """Whether gradients are equal up to rounding; biases in front of a norm have none but that."""
    scale = max(float(y.abs().max()) for y in b if y is not None)
    return all(
        x is y is None or torch.allclose(x, y, rtol=1e-4, atol=1e-6 * scale)
        for x, y in zip(a, b, strict=True)
    )


def step(head: nn.Module, x: Tensor) -> dict[str, list[Any]]:
    """What a training step leaves behind; gradients in the order of the state dict."""
    x = x.clone().requires_grad_()
    head.zero_grad()
    z = call(head.train(), x)
    torch.stack([t.cos().sum() for t in z]).sum().backward()
    found = {
        "output in training": [t.detach() for t in z],
        "gradient of the input": [x.grad],
        "gradients of the weights": [p.grad for p in head.state_dict(keep_vars=True).values()],
        "state after a step": list(head.state_dict().values()),
    }
    return {**found, "output in evaluation": [t.detach() for t in call(head.eval(), x)]}


def shaken(key: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value + 1
    return value + (torch.rand if key.endswith("running_var") else torch.randn)(value.shape) / 8


def counts(head: nn.Module) -> list[int]:
    return [sum(p.numel() for p in head.parameters() if p.requires_grad >= r) for r in (0, 1)]


def differences(ours: nn.Module, theirs: nn.Module, names: Callable[[nn.Module], Any]) -> list[str]:
    """What is not equal between two heads that were built after the same random state.

    Args:
        ours: Our head.
        theirs: The source's.
        names: Gives our state dict under the source's names.
    """
    found: list[str] = []

    def check(what: str, holds: bool) -> None:
        found.extend([] if holds else [what])

    def check_step(when: str) -> None:
        x = torch.randn(16, ours.input_dim)
        left, right = step(ours, x), step(theirs, x)
        for what in left:
            rounded = "gradient" in what and ours.name in ROUNDED_GRADIENTS
            check(f"{what}, {when}", (close if rounded else equal)(left[what], right[what]))

    state = theirs.state_dict()
    check(f"names {list(names(ours))}, not {list(state)}", list(names(ours)) == list(state))
    check("initial weights", equal(list(names(ours).values()), list(state.values())))
    check("number of parameters, trainable ones", counts(ours) == counts(theirs))
    check_step("as initialised")
    for source, target in ((theirs, ours), (ours, theirs)):
        source.load_state_dict({k: shaken(k, v) for k, v in source.state_dict().items()})
        given = names(ours) if target is theirs else theirs.state_dict()
        target.load_state_dict(given, strict=True)
        check_step(f"weights {'read from' if target is ours else 'given to'} the source")
    return found


# lightly's


def lightly_class(name: str) -> type[nn.Module]:
    module, _, cls = SOURCES[name].partition(":")
    found: type[nn.Module] = getattr(importlib.import_module(module), cls)
    return found


def in_lightlys_words(head: nn.Module, cls: type[nn.Module]) -> dict[str, Any]:
    """Our head's options as its source's constructor takes them; what we do not have is left out.

    A required one that is missing here makes the constructor fail, and the test with it.
    """
    translated = {**TRANSLATED, **TRANSLATED_FOR.get(cls.__name__, {})}
    values = {}
    for option in inspect.signature(cls).parameters:
        if hasattr(head, option) and option not in TRANSLATED_FOR.get(cls.__name__, {}):
            values[option] = getattr(head, option)
        elif option in translated:
            values[option] = translated[option](head)
    return values


def dims_for(name: str, widths: tuple[Any, ...]) -> dict[str, Any]:
    options = describe_head(name).signature.parameters
    return {dim: width for dim, width in zip(DIMS, widths, strict=True) if dim in options}


def takes(name: str, widths: tuple[Any, ...]) -> bool:
    try:
        describe_head(name).check(dims_for(name, widths))
    except HeadplugError:
        return False
    return True


def differences_from_lightlys(name: str, **options: Any) -> list[str]:
    """Builds both heads after the same seed and compares them."""
    cls = lightly_class(name)
    theirs = in_lightlys_words(create_head(name, **options), cls)
    torch.manual_seed(5)
    ours = create_head(name, **options)
    torch.manual_seed(5)
    drawn = {o: in_lightlys_words(ours, cls)[o] for o in theirs if isinstance(theirs[o], Tensor)}
    return differences(ours, cls(**{**theirs, **drawn}), nn.Module.state_dict)


@pytest.mark.parametrize(
    ("name", "widths"), [(n, w) for n in OF_LIGHTLY for w in WIDTHS if takes(n, w)]
)
def test_head_equals_lightlys(name: str, widths: tuple[Any, ...]) -> None:
    assert differences_from_lightlys(name, **dims_for(name, widths)) == []


@pytest.mark.parametrize("name", OF_LIGHTLY)
def test_head_equals_lightlys_with_each_switch_turned(name: str) -> None:
    switches = {
        o: not p.default
        for o, p in inspect.signature(lightly_class(name)).parameters.items()
        if isinstance(p.default, bool) and o in describe_head(name).defaults
    }
    for option, value in switches.items():
        options = {**dims_for(name, WIDTHS[0]), option: value}
        assert differences_from_lightlys(name, **options) == [], options


@pytest.mark.parametrize("name", OF_LIGHTLY)
def test_defaults_are_lightlys_save_for_later_versions(name: str) -> None:
    cls = lightly_class(name)
    with torch.device("meta"):  # Barlow Twins' has 151 million parameters
        ours = in_lightlys_words(create_head(name, input_dim=8), cls)
    defaults = {o: p.default for o, p in inspect.signature(cls).parameters.items()}
    given = {o for o, default in defaults.items() if default is not inspect.Parameter.empty}
    differing = {o: ours[o] for o in given & ours.keys() - {"input_dim"} if ours[o] != defaults[o]}
    assert differing == LATER_VERSIONS.get(name, {})


@pytest.mark.parametrize("module", ["heads", "heads_timm"])
def test_every_head_of_lightly_is_there(module: str) -> None:
    module = f"lightly.models.modules.{module}"
    classes = [c for _, c in inspect.getmembers(importlib.import_module(module), inspect.isclass)]
    heads = {
        f"{module}:{c.__name__}"
        for c in classes
        if c.__module__ == module and c.__name__.endswith(("Head", "Prototypes"))
        if not any(issubclass(other, c) for other in classes if other is not c)  # no base class
    }
    assert heads
    assert heads - set(SOURCES.values()) == set()


# solo-learn's


@pytest.fixture(scope="module")
def on_release(run_on_solo: Any) -> Any:
    return run_on_solo(__file__, "release")


@pytest.fixture(scope="module")
def on_main(run_on_solo: Any) -> Any:
    return run_on_solo(__file__, "main")


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_SOLO)
def test_head_equals_that_of_solo_learns_release(name: str, on_release: Any) -> None:
    found = on_release["entries"][name]
    if found == "absent":
        method = SOURCES[name].removeprefix("solo.methods.").partition(":")[0]
        assert method in MAIN_ONLY
        pytest.skip(f"solo-learn 1.0.2 has no {method}; the same test on main has")
    if name in CHANGED_SINCE_RELEASE:
        other = ("initial weights", "number of parameters", "gradients of the weights")
        assert found
        found = [f for f in found if not f.startswith(other) and "as initialised" not in f]
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_SOLO)
def test_head_equals_that_of_solo_learn_main(name: str, on_main: Any) -> None:
    assert on_main["entries"][name] == []


@pytest.mark.slow
@pytest.mark.parametrize("version", ["release", "main"])
def test_every_head_of_solo_learn_is_there(version: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(f"on_{version}")["heads"]
    assert len(found) > 20
    assert [head for head, entries in found.items() if not entries] == []


@pytest.fixture(scope="module")
def cifar_configs() -> dict[str, Any]:
    from omegaconf import OmegaConf

    folder = Path(os.environ.get("SOLO_LEARN_HOME") or "no clone", "scripts", "pretrain", "cifar")
    if not folder.is_dir():
        pytest.skip("set SOLO_LEARN_HOME to a clone of solo-learn main, which has its configs")
    configs = [OmegaConf.load(file) for file in folder.glob("*.yaml")]
    return {config.method: OmegaConf.to_container(config.method_kwargs) for config in configs}


@pytest.mark.parametrize("name", OF_SOLO)
def test_widths_are_those_of_solo_learns_cifar_configs(name: str, cifar_configs: Any) -> None:
    method, _, part = SOURCES[name].removeprefix("solo.methods.").partition(":")
    keys = {
        "projector": {"hidden_dim": "proj_hidden_dim", "output_dim": "proj_output_dim"},
        "predictor": {"hidden_dim": "pred_hidden_dim", "output_dim": "proj_output_dim"},
        "prototypes": {"output_dim": "num_prototypes"},
        "head": {
            "hidden_dim": "proj_hidden_dim",
            "bottleneck_dim": "proj_output_dim",
            "output_dim": "num_prototypes",
        },
    }[part.rpartition(".")[2]]
    ours = {dim: describe_head(name).defaults[dim] for dim in keys}
    theirs = {dim: cifar_configs[method][key] for dim, key in keys.items()}
    assert ours == {**theirs, **OF_THE_PAPER.get(name, {})}


# the script


def remember_random_states() -> None:
    """Makes each linear layer keep the random state that it was initialised from."""
    init = nn.Linear.__init__

    def remembering(self: Any, *args: Any, **kwargs: Any) -> None:
        state = torch.get_rng_state()
        init(self, *args, **kwargs)
        self.random_state = state

    nn.Linear.__init__ = remembering  # type: ignore[method-assign]


def method_of(
    version: str, name: str, sizes: tuple[int, ...], backbone: str = "resnet18", **more: Any
) -> Any:
    """A real method of solo-learn with small dims; it ignores the options that it does not have."""
    from solo.methods import METHODS

    hidden, output, predictor, prototypes = sizes
    options: dict[str, Any] = {
        "proj_hidden_dim": hidden, "proj_output_dim": output, "pred_hidden_dim": predictor,
        "num_prototypes": [prototypes] * 2 if name == "deepclusterv2" else prototypes,
        "temperature": 0.2, "queue_size": 32, "lamb": 0.005, "scale_loss": 0.1,
        "sim_loss_weight": 25.0, "var_loss_weight": 25.0, "cov_loss_weight": 1.0,
        "iternorm": False, "whitening_iters": 1, "whitening_size": 8, "whitening_eps": 0.0,
        "temperature_q": 0.1, "temperature_k": 0.04, "sk_iters": 3, "sk_epsilon": 0.05,
        "epoch_queue_starts": 15, "freeze_prototypes_epochs": 1, "kmeans_iters": 2,
        "use_bn_in_head": False, "norm_last_layer": True, "clip_grad": 0.0,
        "freeze_last_layer": 0, "student_temperature": 0.1, "teacher_temperature": 0.07,
        "warmup_teacher_temperature": 0.04, "warmup_teacher_temperature_epochs": 1, **more,
    }  # fmt: skip
    if version == "main":
        from omegaconf import OmegaConf

        config = {
            "method": name,
            "backbone": {"name": backbone, "kwargs": {"img_size": 32} if "vit" in backbone else {}},
            "data": {"dataset": "cifar10", "num_classes": 5, "num_large_crops": 2,
                     "num_small_crops": 0},
            "max_epochs": 1,
            "optimizer": {"name": "sgd", "batch_size": 8, "lr": 0.1, "weight_decay": 0.0,
                          "classifier_lr": 0.1, "kwargs": {"momentum": 0.9}},
            "scheduler": {"name": "none"},
            "momentum": {"base_tau": 0.9, "final_tau": 1.0, "classifier": False},
            "method_kwargs": options,
        }  # fmt: skip
        return METHODS[name](OmegaConf.create(config))
    arguments: dict[str, Any] = {
        "encoder": backbone, "num_classes": 5, "max_epochs": 1, "batch_size": 8,
        "backbone_args": {"cifar": True, "zero_init_residual": False}, "optimizer": "sgd",
        "lars": False, "lr": 0.1, "weight_decay": 0.0, "classifier_lr": 0.1,
        "exclude_bias_n_norm": False, "accumulate_grad_batches": 1,
        "extra_optimizer_args": {"momentum": 0.9}, "scheduler": "none", "min_lr": 0.0,
        "warmup_start_lr": 0.0, "warmup_epochs": 0, "num_large_crops": 2, "num_small_crops": 0,
        "base_tau_momentum": 0.9, "final_tau_momentum": 1.0, "momentum_classifier": False,
    }  # fmt: skip
    return METHODS[name](**arguments, **options)


def linears(module: nn.Module) -> list[nn.Linear]:
    return [m for m in module.modules() if isinstance(m, nn.Linear)]


def like(name: str, source: nn.Module, **options: Any) -> Any:
    """Our head with the widths of a solo-learn module."""
    first, last = linears(source)[0], linears(source)[-1]
    several = isinstance(source, nn.ModuleList)
    output_dim = [m.out_features for m in linears(source)] if several else last.out_features
    widths = (first.in_features, first.out_features, output_dim, last.in_features)
    return create_head(name, **dims_for(name, widths), **options)


def shapes(state: dict[str, Tensor]) -> dict[str, Any]:
    return {key: tuple(value.shape) for key, value in state.items()}


def compare_entry(name: str, models: list[nn.Module]) -> list[str]:
    """Compares with the model whose part has the head's shapes; MoCo v3's differ by backbone."""
    part = SOURCES[name].partition(":")[2].partition(".")[2]
    candidates = [model.get_submodule(part) for model in models]
    ours = [shapes(like(name, c).solo_state_dict()) for c in candidates]
    theirs = [shapes(c.state_dict()) for c in candidates]
    if not any(a == b for a, b in zip(ours, theirs, strict=True)):
        return [f"shapes {ours}, not {theirs}"]
    which = next(i for i, shape in enumerate(ours) if shape == theirs[i])
    model, source = models[which], candidates[which]
    torch.set_rng_state(linears(source)[0].random_state)
    found = differences(like(name, source), source, lambda head: head.solo_state_dict())
    with torch.no_grad():  # EMA twins start as copies
        for twin in (p for n, p in model.named_parameters() if "momentum" in n):
            twin.add_(1)
    from_model = like(name, source, weights=model).solo_state_dict()
    same = equal(list(from_model.values()), list(source.state_dict().values()))
    return found if same else [*found, "weights found in the whole model"]


def matching_entries(source: nn.Module) -> list[str]:
    """Names of our heads that give the outputs of a solo-learn module, once loaded."""
    found = []
    for name in list_heads():
        try:
            ours = like(name, source)
        except HeadplugError:
            continue
        names = getattr(ours, "solo_state_dict", ours.state_dict)
        if shapes(names()) == shapes(source.state_dict()):
            ours.load_state_dict(source.state_dict(), strict=True)
            x = torch.randn(16, ours.input_dim)
            if equal(call(ours.eval(), x), call(source.eval(), x)):
                found.append(name)
    return found


def main(version: str) -> dict[str, Any]:
    from solo.methods import METHODS

    remember_random_states()
    entries: dict[str, Any] = dict.fromkeys(OF_SOLO, "absent")
    heads: dict[str, list[str]] = {}
    for method in METHODS.keys() - {"base", "linear", "mae"}:
        own = [name for name in OF_SOLO if SOURCES[name].startswith(f"solo.methods.{method}:")]
        entries.update({name: [] for name in own})
        variants: list[dict[str, Any]] = [{}, *VARIANTS.get(method, [])]
        for sizes in [(24, 16, 20, 30), (9, 192, 7, 11)]:
            torch.manual_seed(sum(sizes))
            models = [method_of(version, method, sizes, **variant) for variant in variants]
            for name in own:
                assert f":{METHODS[method].__name__}." in SOURCES[name]
                entries[name] += compare_entry(name, models)
        for variant, model in zip(variants, models, strict=True):
            for part in set(HEADS_OF_METHODS) & dict(model.named_children()).keys():
                heads[f"{method}.{part} {variant}"] = matching_entries(model.get_submodule(part))
    return {"entries": entries, "heads": heads}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(main(sys.argv[1])))
