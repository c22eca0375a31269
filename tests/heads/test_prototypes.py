from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from headplug import create_head
from headplug.errors import CheckpointError, DimensionError, OptionError
from headplug.heads.prototypes import CAPIHead, PrototypesHead, SMoGPrototypesHead

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")  # lightly uses it


def lightly_head(name: str, *args: Any, **options: Any) -> nn.Module:
    from lightly.models.modules import heads

    return getattr(heads, name)(*args, **options)


def exchange(ours: nn.Module, theirs: nn.Module, into_ours: bool | None) -> None:
    """Changes the weights of one head and loads them into the other; None leaves both."""
    if into_ours is not None:
        source, target = (theirs, ours) if into_ours else (ours, theirs)
        with torch.no_grad():
            for tensor in source.parameters():
                tensor.add_(1)
        target.load_state_dict(source.state_dict(), strict=True)


def both(ours: Callable[[], nn.Module], theirs: Callable[[], nn.Module]) -> list[nn.Module]:
    """Two heads, each built after the same seed, which take the same random numbers."""
    heads, after = [], []
    for make in (ours, theirs):
        torch.manual_seed(5)
        heads.append(make())
        after.append(torch.get_rng_state())
    assert torch.equal(*after)
    return heads


def assert_equal_states(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def as_list(z: Tensor | list[Tensor]) -> list[Tensor]:
    return z if isinstance(z, list) else [z]


def train(head: nn.Module, x: Tensor, normalize: bool = False, **options: Any) -> list[Tensor]:
    """One optimiser step; returns outputs and gradients, that of the input first."""
    x = x.clone().requires_grad_()
    z = as_list(head.train()(x, **options))
    sum((s + 1) * out.cos().sum() for s, out in enumerate(z)).backward()
    gradients = [torch.empty(0) if p.grad is None else p.grad for p in head.parameters()]
    if trained := [p for p in head.parameters() if p.requires_grad]:
        torch.optim.SGD(trained, lr=0.5, weight_decay=0.1).step()
    head.zero_grad()
    if normalize:
        with torch.no_grad():  # lightly's own needs it
            head.normalize()
    return [x.grad, *z, *gradients]


def assert_train_alike(ours: nn.Module, theirs: nn.Module, width: int, **options: Any) -> None:
    for _ in range(3):
        x = torch.randn(16, width)
        a, b = train(ours, x, **options), train(theirs, x, **options)
        assert len(a) == len(b)
        assert all(torch.equal(i, j) for i, j in zip(a, b, strict=True))
        assert_equal_states(ours, theirs)


def requirements(head: nn.Module) -> list[tuple[str, bool]]:
    return [(n, p.requires_grad) for n, p in head.named_parameters()]


# SwAV


@pytest.mark.parametrize("into_ours", [True, False, None])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("sizes", [7, 1, [7], [5, 9, 3]])
def test_swavs_prototypes_are_lightlys(
    sizes: int | list[int], normalize: bool, into_ours: bool | None
) -> None:
    ours, theirs = both(
        lambda: create_head("swav_prototypes", input_dim=12, output_dim=sizes),
        lambda: lightly_head("SwaVPrototypes", 12, sizes),
    )
    assert_equal_states(ours, theirs)
    exchange(ours, theirs, into_ours)
    assert_train_alike(ours, theirs, 12, normalize=normalize)
    x = torch.randn(4, 3, 12)
    a, b = ours.eval()(x), theirs.eval()(x)
    assert type(a) is type(b)
    assert [z.shape for z in as_list(a)] == [z.shape for z in as_list(b)]
    assert all(torch.equal(i, j) for i, j in zip(as_list(a), as_list(b), strict=True))


def test_swavs_defaults_are_lightlys() -> None:
    ours, theirs = create_head("swav_prototypes", input_dim=128), lightly_head("SwaVPrototypes")
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]


@pytest.mark.parametrize("sizes", [7, [5, 9]])
@pytest.mark.parametrize("steps", [0, 2])
def test_prototypes_are_held_for_the_first_steps_as_in_lightly(
    sizes: int | list[int], steps: int
) -> None:
    options = {"n_steps_frozen_prototypes": steps}
    ours, theirs = both(
        lambda: create_head("swav_prototypes", input_dim=12, output_dim=sizes, **options),
        lambda: lightly_head("SwaVPrototypes", 12, sizes, **options),
    )
    before = copy.deepcopy(ours.state_dict())
    for step in range(4):
        x = torch.randn(8, 12)
        a, b = train(ours, x, step=step), train(theirs, x, step=step)
        assert all(torch.equal(i, j) for i, j in zip(a, b, strict=True))
        assert requirements(ours) == requirements(theirs)
        moved = any(not torch.equal(before[k], v) for k, v in ours.state_dict().items())
        assert moved == (step >= steps)
    assert_equal_states(ours, theirs)


def test_held_prototypes_ask_for_the_step_in_training_only() -> None:
    head = PrototypesHead(6, 4, n_steps_frozen_prototypes=3)
    with pytest.raises(OptionError, match=r"n_steps_frozen_prototypes=3.*step=step"):
        head(torch.randn(2, 6))
    assert head.eval()(torch.randn(2, 6)).shape == (2, 4)


def test_lengths_of_weight_normed_prototypes_are_never_released() -> None:
    head = PrototypesHead(6, 4, n_steps_frozen_prototypes=1, bias=False, weight_norm=True)
    for step in range(3):
        train(head, torch.randn(8, 6), step=step)
        assert requirements(head) == [("heads.0.weight_g", False), ("heads.0.weight_v", step > 0)]
    assert torch.equal(head.heads[0].weight_g, torch.ones(4, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalize_gives_rows_length_one_and_leaves_biases(dtype: torch.dtype) -> None:
    head = PrototypesHead(16, [5, 8]).to(dtype)
    with torch.no_grad():
        head.heads[0].weight[2] = 0
    biases = [h.bias.clone() for h in head]
    head.normalize()  # no `with torch.no_grad()` around it
    lengths = torch.cat([h.weight.float().norm(dim=1) for h in head])
    expected = torch.ones(13)
    expected[2] = 0
    assert torch.allclose(lengths, expected, atol=2 * torch.finfo(dtype).eps)
    assert all(torch.equal(h.bias, b) for h, b in zip(head, biases, strict=True))


def test_normalize_leaves_frozen_prototypes() -> None:
    head = create_head("swav_prototypes", input_dim=6, output_dim=[4, 5], freeze="heads.1")
    before = copy.deepcopy(head.state_dict())
    head.normalize()
    for key, value in head.state_dict().items():
        assert torch.equal(value, before[key]) == (key != "heads.0.weight"), key


# solo-learn's prototypes


def solo_swav() -> nn.Module:
    """Written out from solo-learn's constructor; the last test runs the method itself."""
    layer = nn.utils.weight_norm(nn.Linear(12, 7, bias=False))
    layer.weight_g.data.fill_(1)
    layer.weight_g.requires_grad = False
    return layer


def solo_deepcluster() -> nn.Module:
    layers = nn.ModuleList(nn.Linear(12, n, bias=False) for n in (5, 9))
    layers.requires_grad_(False)
    for layer in layers:
        layer.weight.copy_(nn.functional.normalize(layer.weight.data.clone(), dim=-1))
    return layers


SOLO = {
    "swav_prototypes_solo": (7, solo_swav),
    "deepcluster_v2_prototypes_solo": ([5, 9], solo_deepcluster),
}


@pytest.mark.parametrize("name", SOLO)
def test_solo_learns_prototypes_start_equal_and_train_alike(name: str) -> None:
    sizes, make = SOLO[name]
    ours, theirs = both(lambda: create_head(name, input_dim=12, output_dim=sizes), make)
    for x in torch.randn(3, 8, 12).unbind():
        outs = []
        for head in (ours, theirs):
            given = x.clone().requires_grad_()
            layers = head if isinstance(head, nn.ModuleList) else [head]
            z = [z for layer in layers for z in as_list(layer(given))]
            sum((s + 1) * out.cos().sum() for s, out in enumerate(z)).backward()
            if trained := [p for p in head.parameters() if p.requires_grad]:
                torch.optim.SGD(trained, lr=0.5).step()
            outs.append([given.grad, *z])
            head.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
        given, other = ours.solo_state_dict(), theirs.state_dict()
        assert list(given) == list(other)
        assert all(torch.equal(given[k], other[k]) for k in given)
    counts = [[(p.numel(), p.requires_grad) for p in head.parameters()] for head in (ours, theirs)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", SOLO)
def test_solo_learns_weights_load_in_both_directions(name: str) -> None:
    sizes, make = SOLO[name]
    ours, theirs = create_head(name, input_dim=12, output_dim=sizes), make()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        for tensor in ours.parameters():
            tensor.mul_(3)
    theirs.load_state_dict(ours.solo_state_dict(), strict=True)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_deepclusters_sets_are_set_as_solo_learn_sets_them() -> None:
    head = create_head("deepcluster_v2_prototypes_solo", input_dim=6, output_dim=[4, 4])
    centroids = torch.randn(2, 4, 6)
    for prototypes, centroid in zip(head, centroids, strict=True):
        prototypes.weight.copy_(centroid)
    z = torch.randn(3, 6)
    stacked = torch.stack([prototypes(z) for prototypes in head])
    assert torch.equal(stacked, torch.stack(head(z)))
    assert torch.allclose(stacked, z @ centroids.mT, atol=1e-6)


# whole checkpoints


@pytest.mark.parametrize("sizes", [7, [5, 9]])
def test_swavs_prototypes_are_found_in_lightlys_checkpoint(
    sizes: int | list[int], tmp_path: Path
) -> None:
    model = nn.ModuleDict(
        {
            "backbone": nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
            "projection_head": lightly_head("SwaVProjectionHead", 8, 16, 12),
            "prototypes": lightly_head("SwaVPrototypes", 12, sizes),
        }
    )
    torch.save({"state_dict": model.state_dict()}, tmp_path / "swav.ckpt")
    head = create_head(
        "swav_prototypes", input_dim=12, output_dim=sizes, weights=tmp_path / "swav.ckpt"
    )
    assert_equal_states(head, model["prototypes"])


@pytest.mark.parametrize("new_names", [True, False])
@pytest.mark.parametrize("name", SOLO)
def test_prototypes_are_found_in_solo_learns_checkpoint(name: str, new_names: bool) -> None:
    sizes, make = SOLO[name]
    state = {"projector.3.weight": torch.rand(12, 16), "queue": torch.rand(2, 4, 12)}
    for key, value in make().state_dict().items():
        if new_names:
            key = key.replace("weight_g", "parametrizations.weight.original0")
            key = key.replace("weight_v", "parametrizations.weight.original1")
        state[f"prototypes.{key}"] = value
    head = create_head(name, input_dim=12, output_dim=sizes, weights=state)
    for parameter, value in zip(head.parameters(), list(state.values())[2:], strict=True):
        assert torch.equal(parameter, value)
    with pytest.raises(CheckpointError, match="fit"):
        create_head(name, input_dim=13, output_dim=sizes, weights=state)


# CAPI


@pytest.mark.parametrize("into_ours", [True, False, None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight_norm", [True, False])
def test_capis_head_is_lightlys(bias: bool, weight_norm: bool, into_ours: bool | None) -> None:
    options = {"bias": bias, "weight_norm": weight_norm}
    ours, theirs = both(
        lambda: create_head("capi", input_dim=12, output_dim=7, **options),
        lambda: lightly_head("CAPIProjectionHead", 12, 7, **options),
    )
    assert_equal_states(ours, theirs)
    assert requirements(ours) == requirements(theirs)
    exchange(ours, theirs, into_ours)
    assert_train_alike(ours, theirs, 12)
    tokens = torch.randn(4, 9, 12)
    assert torch.equal(ours.eval()(tokens), theirs.eval()(tokens))


def test_capis_defaults_are_lightlys() -> None:
    with torch.device("meta"):
        ours, theirs = create_head("capi", input_dim=384), lightly_head("CAPIProjectionHead")
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [
        (n, p.shape) for n, p in theirs.named_parameters()
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_capi_takes_empty_patches_in_every_precision(dtype: torch.dtype) -> None:
    head = CAPIHead(6, 4, weight_norm=True).to(dtype)
    z = head(torch.cat([torch.zeros(1, 6), 100 * torch.randn(3, 6)]).to(dtype))
    assert z.isfinite().all()
    assert not z[0].any()
    assert z.abs().max() <= 1.02  # cosines


# SMoG


def smog_pair(n: int = 7, width: int = 12) -> list[nn.Module]:
    ours, theirs = both(
        lambda: create_head("smog_prototypes", input_dim=width, output_dim=n, beta=0.9),
        lambda: lightly_head("SMoGPrototypes", torch.rand(n, width), beta=0.9),
    )
    assert_equal_states(ours, theirs)
    assert requirements(ours) == requirements(theirs) == [("group_features", False)]
    return [ours, theirs]


def test_smogs_prototypes_run_through_training_as_lightlys() -> None:
    ours, theirs = smog_pair()
    for x in torch.randn(4, 20, 12).unbind():
        results = []
        for head in (ours, theirs):
            given = x.clone().requires_grad_()
            assigned = head.assign_groups(given)
            groups = head.get_updated_group_features(given)
            logits = head(given, groups, temperature=0.2)
            nn.functional.cross_entropy(logits, assigned.flip(0)).backward()
            head.set_group_features(groups)
            results.append([assigned, groups, logits, given.grad])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert_equal_states(ours, theirs)
        assert ours.group_features.grad_fn is None
        assert not ours.group_features.requires_grad
    own = x.clone()
    assert torch.equal(ours(own), theirs(own, theirs.group_features))


@pytest.mark.parametrize("into_ours", [True, False])
def test_smogs_groups_load_in_both_directions(into_ours: bool) -> None:
    ours, theirs = smog_pair()
    source, target = (theirs, ours) if into_ours else (ours, theirs)
    source.group_features.data.mul_(-1)
    target.load_state_dict(source.state_dict(), strict=True)
    assert_equal_states(ours, theirs)


def test_smogs_groups_can_be_given_at_the_start() -> None:
    groups = torch.randn(7, 12)
    head = create_head(
        "smog_prototypes", input_dim=12, output_dim=7, weights={"group_features": groups}
    )
    assert torch.equal(head.group_features, groups)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_group_moves_to_the_mean_of_its_projections(beta: float) -> None:
    head = SMoGPrototypesHead(2, 3, beta=beta)
    head.set_group_features(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
    x = torch.tensor([[2.0, 0.1], [4.0, -0.1], [0.0, 3.0]])
    assert head.assign_groups(x).tolist() == [0, 0, 1]
    means = torch.tensor([[3.0, 0.0], [0.0, 3.0], [-1.0, -1.0]])  # none is near the last
    expected = beta * head.group_features + (1 - beta) * means
    assert torch.allclose(head.get_updated_group_features(x), expected)
    assert head.group_features[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("shape", [(6, 12), (7, 11), (12,)])
def test_groups_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    head = SMoGPrototypesHead(12, 7)
    before = head.group_features.clone()
    with pytest.raises(DimensionError, match=r"\(7, 12\), not \("):
        head.set_group_features(torch.randn(shape))
    assert torch.equal(head.group_features, before)


def test_set_groups_take_the_heads_type_and_share_nothing_with_the_graph() -> None:
    head = SMoGPrototypesHead(12, 7)
    head.set_group_features(torch.randn(7, 12, dtype=torch.float16, requires_grad=True))
    assert head.group_features.dtype == torch.float32
    assert head.group_features.is_leaf


@pytest.mark.parametrize("beta", [1.0, -0.1, True, "0.9"])
def test_beta_is_a_share(beta: Any) -> None:
    with pytest.raises(OptionError, match="beta must be a number in"):
        SMoGPrototypesHead(4, 3, beta=beta)


# all of them

SHAPED = [
    ("swav_prototypes", {"output_dim": [5, 7]}),
    ("swav_prototypes_solo", {"output_dim": [5, 7]}),
    ("deepcluster_v2_prototypes_solo", {"output_dim": [5, 7, 9]}),
    ("capi", {"output_dim": 5, "weight_norm": True, "bias": True}),
    ("smog_prototypes", {"output_dim": 5}),
]


@pytest.mark.parametrize(("name", "options"), SHAPED)
class TestEveryKind:
    def test_fresh_heads_can_be_copied_and_pickled(
        self, name: str, options: dict[str, Any]
    ) -> None:
        head = create_head(name, input_dim=6, **options)
        x = torch.randn(3, 6)
        for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
            assert_equal_states(twin, head)
            assert requirements(twin) == requirements(head)
            assert twin.config == head.config
            pairs = zip(as_list(twin(x)), as_list(head(x)), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
            assert twin.solo_state_dict().keys() == head.solo_state_dict().keys()

    def test_config_rebuilds_the_head_from_json(self, name: str, options: dict[str, Any]) -> None:
        head = create_head(name, input_dim=6, **options)
        again = create_head(json.loads(json.dumps(head.config)))
        assert again.config == head.config
        assert requirements(again) == requirements(head)
        again.load_state_dict(head.state_dict(), strict=True)
        assert_equal_states(again, head)

    @pytest.mark.parametrize("shape", [(), (0,), (2, 3), (2, 0, 4)])
    def test_leading_dims_are_kept(
        self, name: str, options: dict[str, Any], shape: tuple[int, ...]
    ) -> None:
        head = create_head(name, input_dim=6, **options)
        x = torch.randn(*shape, 6)
        widths = options["output_dim"]
        for z, flat, n in zip(
            as_list(head(x)),
            as_list(head(x.reshape(-1, 6))),
            widths if isinstance(widths, list) else [widths],
            strict=True,
        ):
            assert z.shape == (*shape, n)
            assert torch.equal(z.reshape(-1, n), flat)

    def test_wrong_width_is_refused_with_both_widths(
        self, name: str, options: dict[str, Any]
    ) -> None:
        head = create_head(name, input_dim=6, **options)
        with pytest.raises(DimensionError, match=rf"{name}.*takes 6 .*input_dim=7"):
            head(torch.randn(4, 7))

    def test_it_compiles_and_exports(self, name: str, options: dict[str, Any]) -> None:
        head = create_head(name, input_dim=6, **options)
        x = torch.randn(4, 6)
        torch._dynamo.reset()
        compiled = torch.compile(head, fullgraph=True, backend="eager")
        exported = torch.export.export(head, (x,)).module()
        for other in (compiled, exported):
            pairs = zip(as_list(other(x)), as_list(head(x)), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)

    def test_a_teacher_follows_by_momentum(self, name: str, options: dict[str, Any]) -> None:
        from lightly.models.utils import update_momentum

        student = create_head(name, input_dim=6, **options)
        teacher = copy.deepcopy(student)
        with torch.no_grad():
            for p in student.parameters():
                if p.requires_grad:
                    p.add_(1)
        start = copy.deepcopy(teacher.state_dict())
        update_momentum(student, teacher, m=0.75)
        for key, value in teacher.state_dict().items():
            expected = 0.75 * start[key] + 0.25 * student.state_dict()[key]
            assert torch.allclose(value, expected, atol=1e-6), key


@pytest.mark.parametrize("value", [0, -3, 2.0, True, "8", [], [4, 0], [4, "x"]])
def test_numbers_of_prototypes_are_checked(value: Any) -> None:
    with pytest.raises(OptionError, match="output_dim must be a positive integer, not "):
        PrototypesHead(6, value)


def test_what_never_trains_cannot_be_held_for_some_steps() -> None:
    with pytest.raises(OptionError, match="n_steps_frozen_prototypes=5 out"):
        PrototypesHead(6, 4, n_steps_frozen_prototypes=5, trainable=False)


# solo-learn itself, in a process of its own

WIDTH, BOTTLENECK = 24, 16
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "swav": ("swav_prototypes_solo", {"input_dim": BOTTLENECK, "output_dim": 30}),
    "deepclusterv2": (
        "deepcluster_v2_prototypes_solo",
        {"input_dim": BOTTLENECK, "output_dim": [5, 5]},
    ),
    "dino": (
        "dino_solo",
        {"input_dim": 512, "hidden_dim": WIDTH, "bottleneck_dim": BOTTLENECK, "output_dim": 30},
    ),
    "dino with batch norm": (
        "dino_solo",
        {"input_dim": 512, "hidden_dim": WIDTH, "bottleneck_dim": BOTTLENECK, "output_dim": 30,
         "norm": "batch", "norm_last_layer": False},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def in_solo(run_on_solo: Any) -> dict[str, Any]:
    found: dict[str, Any] = run_on_solo(__file__, "main")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_solo_learns_methods_give_the_same_with_these_in_place(
    in_solo: dict[str, Any], method: str
) -> None:
    found = in_solo[method]
    assert len(found) == 5
    assert [what for what, holds in found.items() if not holds] == []


def solo_method(name: str) -> nn.Module:
    from omegaconf import OmegaConf
    from solo.methods import METHODS as SOLO_METHODS

    extra: dict[str, Any] = {
        "swav": {"num_prototypes": 30, "temperature": 0.1, "queue_size": 0},
        "deepclusterv2": {"num_prototypes": [5, 5]},
        "dino": {"num_prototypes": 30},
        "dino with batch norm": {
            "num_prototypes": 30, "use_bn_in_head": True, "norm_last_layer": False,
        },
    }  # fmt: skip
    name, options = name.partition(" ")[0], extra[name]
    config = {
        "method": name,
        "backbone": {"name": "resnet18", "kwargs": {}},
        "data": {"dataset": "cifar10", "num_classes": 5, "num_large_crops": 2,
                 "num_small_crops": 0},
        "max_epochs": 1,
        "optimizer": {"name": "sgd", "batch_size": 8, "lr": 0.1, "weight_decay": 0.0,
                      "classifier_lr": 0.1, "kwargs": {"momentum": 0.9}},
        "scheduler": {"name": "none"},
        "momentum": {"base_tau": 0.9, "final_tau": 1.0, "classifier": False},
        "method_kwargs": {"proj_hidden_dim": WIDTH, "proj_output_dim": BOTTLENECK, **options},
    }  # fmt: skip
    return SOLO_METHODS[name](OmegaConf.create(config))


def linear_layers_start() -> Any:
    """Records, by widths, the state of the random numbers before each new linear layer."""
    init, states = nn.Linear.__init__, {}

    def watch(layer: nn.Linear, fan_in: int, fan_out: int, *args: Any, **options: Any) -> None:
        states.setdefault((fan_in, fan_out), torch.get_rng_state())
        init(layer, fan_in, fan_out, *args, **options)

    return states, patch.object(nn.Linear, "__init__", watch)


def one_step(model: nn.Module, head: nn.Module, state: dict[str, Tensor]) -> list[Tensor | None]:
    """Logits, gradients and the head's new weights, from a model that has this head."""
    model.load_state_dict(state, strict=False)
    out = model.train()(torch.arange(8 * 3 * 32 * 32).reshape(8, 3, 32, 32).cos())
    logits = out["z" if head is getattr(model, "head", None) else "p"]
    logits.cos().sum().backward()
    gradients = [p.grad for p in [*model.backbone.parameters(), *head.parameters()]]
    model.zero_grad()
    for p, gradient in zip(reversed([*head.parameters()]), reversed(gradients), strict=False):
        if gradient is not None:
            p.data.sub_(gradient, alpha=0.5)
    return [logits, *gradients, *head.parameters()]


def compare(method: str) -> dict[str, bool]:
    """A method of solo-learn's with its own head and with ours in its place."""
    name, options = METHODS[method]
    attribute = "head" if name == "dino_solo" else "prototypes"
    states, watching = linear_layers_start()
    with watching:
        model = solo_method(method)
    theirs = getattr(model, attribute)
    first = (
        (512, WIDTH) if attribute == "head" else (BOTTLENECK, next(theirs.parameters()).shape[0])
    )
    torch.set_rng_state(states[first])
    ours = create_head(name, **options)

    def equal() -> bool:
        a, b = ours.solo_state_dict(), theirs.state_dict()
        return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)

    def scale(head: nn.Module) -> None:
        for p in head.parameters():
            p.data.mul_(1.5)

    found = {"same start": equal()}
    sizes = [[(p.numel(), p.requires_grad) for p in h.parameters()] for h in (ours, theirs)]
    found["same parameters"] = sizes[0] == sizes[1]
    scale(ours)
    theirs.load_state_dict(ours.solo_state_dict(), strict=True)
    found["loads there"] = equal()
    scale(theirs)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    ours = create_head(name, **options, weights=state)
    found["is found in the checkpoint"] = equal()
    results = [one_step(model, theirs, state)]
    setattr(model, attribute, ours)
    results.append(one_step(model, ours, {k: v for k, v in state.items() if attribute not in k}))
    found["same step"] = equal() and all(
        a is b or torch.equal(a, b) for a, b in zip(*results, strict=True)
    )
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    print(json.dumps({method: compare(method) for method in METHODS}))
