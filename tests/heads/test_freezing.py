"""Freezing layers and grouping weights, on plain modules and on heads."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from headplug import MLPHead, create_head, register_head
from headplug.errors import OptionError, UnknownNameError
from headplug.heads import HEADS
from headplug.heads.parameters import FrozenBatchNorm, freeze, param_groups


def module() -> nn.Sequential:
    block = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4))
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), block)


def trainable(module: nn.Module) -> list[str]:
    return [n for n, _ in module.named_parameters()]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def train(module: nn.Module, x: Tensor) -> None:
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        module.train()(x).cos().sum().backward()
        optimiser.step()


@pytest.mark.parametrize(
    ("what", "left"),
    [
        (False, ["0.weight", "0.bias", "1.weight", "1.bias", "3.0.weight", "3.0.bias",
                 "3.1.weight", "3.1.bias"]),
        (True, []),
        ("*", []),
        ("0", ["1.weight", "1.bias", "3.0.weight", "3.0.bias", "3.1.weight", "3.1.bias"]),
        (["0", "1"], ["3.0.weight", "3.0.bias", "3.1.weight", "3.1.bias"]),
        ("[01]", ["3.0.weight", "3.0.bias", "3.1.weight", "3.1.bias"]),
        ("3", ["0.weight", "0.bias", "1.weight", "1.bias"]),
        ("3.*", ["0.weight", "0.bias", "1.weight", "1.bias"]),
        ("3.1", ["0.weight", "0.bias", "1.weight", "1.bias", "3.0.weight", "3.0.bias"]),
        ("0.bias", ["0.weight", "1.weight", "1.bias", "3.0.weight", "3.0.bias", "3.1.weight",
                    "3.1.bias"]),
        ("*.bias", ["0.weight", "1.weight", "3.0.weight", "3.1.weight"]),
        (["3.1.weight", "1"], ["0.weight", "0.bias", "3.0.weight", "3.0.bias", "3.1.bias"]),
    ],
)  # fmt: skip
def test_paths_and_globs_choose_what_trains(what: Any, left: list[str]) -> None:
    head = module()
    x = torch.randn(8, 6)
    keys, expected = set(head.state_dict()), copy.deepcopy(head).eval()(x)
    freeze(head, what)
    assert trainable(head) == left
    assert set(head.state_dict()) == keys
    assert torch.equal(head.eval()(x), expected)
    if left:
        before = state(head)
        train(head.requires_grad_(True), x)
        fixed = keys - set(left) - {k for k in keys if "running" in k or "tracked" in k}
        assert all(torch.equal(head.state_dict()[k], before[k]) for k in fixed)
        assert not any(torch.equal(head.state_dict()[k], before[k]) for k in left)


def test_patterns_come_back() -> None:
    assert freeze(module(), False) == []
    assert freeze(module(), True) == ["*"]
    assert freeze(module(), "0") == ["0"]
    assert freeze(module(), ("0", "3.*", "0")) == ["0", "3.*"]


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm])
@pytest.mark.parametrize("affine", [True, False])
def test_frozen_batch_norm_is_batch_norm_in_evaluation(kind: Any, affine: bool) -> None:
    norm = kind(5, affine=affine, eps=1e-3)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(1, 2)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    head = nn.Sequential(norm)
    before = state(head)
    x = torch.randn(8, 5, 2, 2) if kind is nn.BatchNorm2d else torch.randn(8, 5)
    expected = norm.eval()(x)
    freeze(head, "0")
    for training in (True, False):
        assert torch.equal(head.train(training)(x), expected)
    after = state(head)
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_frozen_batch_norm_passes_gradients_on() -> None:
    norm = nn.BatchNorm1d(5)
    norm.running_var.uniform_(1, 2)
    x, y = (torch.randn(8, 5).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    norm.eval()(x).cos().sum().backward()
    head = nn.Sequential(norm)
    freeze(head, True)
    head.train()(y).cos().sum().backward()
    assert torch.equal(x.grad, y.grad)


def test_batch_norm_without_statistics_still_takes_those_of_the_batch() -> None:
    norm = nn.BatchNorm1d(5, track_running_stats=False)
    head = nn.Sequential(norm)
    x = torch.randn(8, 5)
    expected = norm(x)
    freeze(head, "0")
    assert torch.equal(head.eval()(x), expected)
    assert trainable(head) == []


def test_batch_norm_that_is_not_frozen_keeps_learning() -> None:
    head = module()
    freeze(head, "0")
    before = state(head)
    head.train()(torch.randn(8, 6))
    assert type(head[1]) is nn.BatchNorm1d
    assert not torch.equal(head[1].running_mean, before["1.running_mean"])


def test_batch_norm_with_one_frozen_weight_keeps_its_statistics_moving() -> None:
    head = module()
    freeze(head, "1.weight")
    before = state(head)
    train(head, torch.randn(8, 6))
    assert torch.equal(head[1].weight, before["1.weight"])
    assert not torch.equal(head[1].bias, before["1.bias"])
    assert not torch.equal(head[1].running_var, before["1.running_var"])


def test_our_layers_with_statistics_are_told_to_keep_them() -> None:
    class Mean(nn.Module):
        fixed = False

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(5))

    head = nn.Sequential(nn.Sequential(Mean()), Mean())
    freeze(head, "0")
    assert [m.fixed for m in head.modules() if isinstance(m, Mean)] == [True, False]
    alone = Mean()  # a head may be such a layer itself
    freeze(alone, True)
    assert alone.fixed


def test_tied_weights_are_frozen_wherever_they_are() -> None:
    head = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    head[2].weight = head[0].weight
    freeze(head, "2.weight")
    assert trainable(head) == ["0.bias", "2.bias"]
    assert head[0].weight is head[2].weight
    before = state(head)
    train(head, torch.randn(8, 5))
    assert torch.equal(head[0].weight, before["0.weight"])


def test_shared_layers_are_frozen_under_every_path() -> None:
    norm = nn.BatchNorm1d(5)
    head = nn.Sequential(nn.Linear(5, 5), norm, nn.Linear(5, 5), norm)
    freeze(head, "3")
    assert isinstance(head[1], FrozenBatchNorm)
    assert head[1] is head[3]
    assert trainable(head) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_weight_normed_layer_is_frozen_whole() -> None:
    head = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 3))
    x = torch.randn(8, 6)
    keys, expected = set(head.state_dict()), head(x)
    freeze(head, "0")
    assert set(head.state_dict()) == keys
    assert trainable(head) == ["1.weight", "1.bias"]
    assert torch.equal(head(x), expected)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("3.2", r"no layer is called '3\.2'.*Closest: .*3\.1"),
        (["0", "layers.0"], r"no layer is called 'layers\.0'"),
        ("0.weights", r"Closest: 0\.weight\b"),
        ("1.running_mean", "no layer is called"),  # no weight: it would go on moving
        ("", "no layer is called ''"),
        ("true", r"freeze=.\*. freezes the whole head"),
        ("[9]*", "no layer is called"),
    ],
)
def test_unknown_path_is_refused_and_leaves_the_module_as_it_was(what: Any, message: str) -> None:
    head = module()
    children, before = dict(head.named_modules()), {k: id(p) for k, p in head.named_parameters()}
    with pytest.raises(UnknownNameError, match=message):
        freeze(head, what)
    assert dict(head.named_modules()) == children
    assert {k: id(p) for k, p in head.named_parameters()} == before


@pytest.mark.parametrize("what", ["2", ["0", "2"], "2*"])
def test_layer_without_weights_is_refused_and_those_with_some_are_named(what: Any) -> None:
    head = module()
    with pytest.raises(OptionError, match=r"'2\*?' has no weights .* have: 0, 1, 3\.0, 3\.1\.$"):
        freeze(head, what)
    assert trainable(head) == trainable(module())


def test_norm_with_statistics_alone_has_something_to_freeze() -> None:
    head = nn.Sequential(nn.BatchNorm1d(5, affine=False))
    freeze(head, "0")
    before = state(head)
    head.train()(torch.randn(8, 5))
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())


def test_module_without_layers_has_nothing_to_freeze() -> None:
    assert freeze(nn.Identity(), True) == ["*"]
    with pytest.raises(UnknownNameError, match=r"no layer is called '0'\. There are none\."):
        freeze(nn.Identity(), "0")


@pytest.mark.parametrize("what", [True, "0", ["0", "1"], "0.weight", "*"])
def test_freezing_twice_is_freezing_once(what: Any) -> None:
    head = module()
    freeze(head, what)
    left, before, modules = trainable(head), state(head), dict(head.named_modules())
    freeze(head, what)
    assert trainable(head) == left
    assert dict(head.named_modules()) == modules
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())


def test_head_freezes_more_later_and_its_config_says_so() -> None:
    head = MLPHead(6, 4, hidden_dim=5, num_layers=3)
    assert "freeze" not in head.config
    head.freeze_layers("layers.0")
    head.freeze_layers(["layers.0", "layers.1"])
    assert head.config["freeze"] == ["layers.0", "layers.1"]
    again = create_head(head.config)
    assert trainable(again) == trainable(head) == ["layers.3.weight", "layers.4.weight",
                                                   "layers.4.bias", "layers.6.weight",
                                                   "layers.6.bias"]  # fmt: skip
    head.freeze_layers()
    assert trainable(create_head(head.config)) == []


@pytest.mark.parametrize("what", [True, ["layers.0", "layers.1"], "layers.4"])
class TestFrozenHead:
    """That frozen layers go wherever heads go; batch norm frozen among them."""

    @pytest.fixture
    def head(self, what: Any) -> nn.Module:
        head = create_head("simclr", input_dim=6, hidden_dim=5, output_dim=4)
        head.train()(torch.randn(8, 6))  # statistics other than zeros and ones
        head.freeze_layers(what)
        return head

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))])
    def test_is_copied(self, head: nn.Module, how: Any) -> None:
        x, twin = torch.randn(8, 6), how(head)
        assert torch.equal(twin(x), head(x))
        assert trainable(twin) == trainable(head)
        pointers = [{v.data_ptr() for v in h.state_dict().values()} for h in (head, twin)]
        assert not pointers[0] & pointers[1]

    def test_compiles_and_exports(self, head: nn.Module) -> None:
        x = torch.randn(8, 6)
        torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(head), fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), head(x))
        exported = torch.export.export(head.eval(), (x,)).module()
        assert torch.equal(exported(x), head(x))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_runs_in_half_precision(self, head: nn.Module, dtype: torch.dtype) -> None:
        x = torch.randn(8, 6)
        exact = head.eval()(x)
        with torch.autocast("cpu", dtype):
            assert torch.allclose(head(x).float(), exact, atol=0.05)
        assert torch.allclose(head.to(dtype)(x.to(dtype)).float(), exact, atol=0.05)

    def test_is_filled_on_the_meta_device(self, head: nn.Module) -> None:
        x = torch.randn(8, 6)
        with torch.device("meta"):
            empty = create_head(head.config)
        empty.load_state_dict(head.state_dict(), assign=True)
        assert torch.equal(empty.eval()(x), head.eval()(x))
        assert trainable(empty) == trainable(head)


def test_misspelt_layer_of_a_head_is_refused_before_it_is_used() -> None:
    with pytest.raises(UnknownNameError, match=r"no layer is called 'layer\.0'.*layers\.0"):
        create_head("simclr", input_dim=6, hidden_dim=5, output_dim=4, freeze="layer.0")


@pytest.fixture
def plain() -> Iterator[str]:
    """A head of another package: a plain module, whose builder knows nothing of freezing."""

    def build(input_dim: int, output_dim: int = 4) -> nn.Module:
        return nn.Sequential(nn.Linear(input_dim, output_dim), nn.BatchNorm1d(output_dim))

    register_head("plain_of_others", build, summary="a plain module")
    yield "plain_of_others"
    del HEADS._entries["plain_of_others"]


@pytest.mark.parametrize(
    ("what", "left"),
    [("0", ["1.weight", "1.bias"]), ("*.bias", ["0.weight", "1.weight"]), (True, [])],
)
def test_plain_module_of_another_package_is_frozen_alike(
    plain: str, what: Any, left: list[str]
) -> None:
    head = create_head(plain, input_dim=6, freeze=what)
    assert trainable(head) == left
    again = create_head(head.config)
    assert trainable(again) == left
    again.load_state_dict(head.state_dict(), strict=True)


def test_plain_module_takes_weights_and_keeps_them_frozen(plain: str) -> None:
    source = create_head(plain, input_dim=6)
    head = create_head(plain, input_dim=6, weights=source, freeze=True)
    assert all(torch.equal(v, head.state_dict()[k]) for k, v in source.state_dict().items())
    assert trainable(head) == []


def test_groups_are_those_made_by_hand() -> None:
    head = nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Conv1d(5, 5, 1), nn.LayerNorm(5),
        parametrizations.weight_norm(nn.Linear(5, 4)),
    )  # fmt: skip
    head[2].no_decay = ("weight",)
    head[3].requires_grad_(False)
    freeze(head, "0.bias")
    decaying, spared = param_groups(head, 0.05)
    length, direction = head[4].parametrizations.weight.parameters()
    expected = [head[0].weight, length, direction]
    assert {id(p) for p in decaying["params"]} == {id(p) for p in expected}
    assert decaying["weight_decay"] == 0.05
    expected = [head[1].weight, head[1].bias, head[2].weight, head[2].bias, head[4].bias]
    assert {id(p) for p in spared["params"]} == {id(p) for p in expected}
    assert spared["weight_decay"] == 0.0


def test_groups_hold_a_tied_weight_once_and_spare_it_if_one_layer_does() -> None:
    head = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    head[1].weight = head[0].weight
    assert [len(g["params"]) for g in param_groups(head, 0.1)] == [1]
    head[1].no_decay = ("weight",)
    (group,) = param_groups(head, 0.1)
    assert group == {"params": [head[0].weight], "weight_decay": 0.0}


def test_groups_of_a_frozen_module_are_none() -> None:
    head = module()
    freeze(head, True)
    assert param_groups(head, 0.1) == []


def test_only_weights_shrink_under_weight_decay() -> None:
    head = MLPHead(6, 4, hidden_dim=5)
    before = {n: p.detach().clone() for n, p in head.named_parameters()}
    optimiser = torch.optim.SGD(head.param_groups(weight_decay=0.5), lr=0.1)
    for parameter in head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    for name, parameter in head.named_parameters():
        rate = 0.95 if parameter.ndim > 1 else 1.0
        assert torch.allclose(parameter, rate * before[name]), name
