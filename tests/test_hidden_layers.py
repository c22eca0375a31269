"""Names for what a head computes on its way, the same for every head and host."""

from __future__ import annotations

import pytest
import torch
from lightly.models.modules import heads as lightly_heads
from torch import nn

from headplug import create_head, describe_head, features, list_heads, list_taps, swap_head, tap
from headplug.errors import UnknownNameError
from headplug.heads.layers import hidden_paths, layers

H, HIDDEN, Z = 12, 20, 8


class Model(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Linear(5, H)
        self.projection_head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection_head(self.backbone(x))


def bare(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules)


HEADS = {
    "solo-learn": lambda: bare(
        nn.Linear(H, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, Z)
    ),
    "no norm": lambda: bare(nn.Linear(H, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, Z)),
    "lightly": lambda: lightly_heads.SimCLRProjectionHead(H, HIDDEN, Z),
    "headplug": lambda: create_head("simclr", input_dim=H, hidden_dim=HIDDEN, output_dim=Z),
    "nested": lambda: bare(bare(nn.Linear(H, HIDDEN), nn.ReLU()), nn.Linear(HIDDEN, Z)),
}


@pytest.mark.parametrize("build", HEADS.values(), ids=HEADS.keys())
def test_hidden_layer_of_any_two_layer_head_is_what_its_last_layer_receives(build) -> None:
    model = Model(build()).eval()
    x = torch.randn(6, 5)
    linear = [m for m in model.projection_head.modules() if isinstance(m, nn.Linear)]
    received = []
    hook = linear[-1].register_forward_pre_hook(lambda m, a: received.append(a[0]))
    model(x)
    hook.remove()
    with tap(model, "projection.hidden1", "projection.hidden*") as taps:
        model(x)
    assert torch.equal(taps["projection.hidden1"][0], received[0])
    assert torch.equal(features(model, x, at="projection.hidden1"), received[0])
    assert list(features(model, x, at="projection.hidden*")) == ["projection.hidden1"]
    assert "projection.hidden1" in [row["name"] for row in list_taps(model, x)]


def test_names_outlive_a_swap_for_deeper_heads() -> None:
    model = Model(lightly_heads.SimSiamProjectionHead(H, HIDDEN, Z)).eval()
    x = torch.randn(6, 5)
    before = features(model, x, at=["projection.hidden1", "projection.hidden2"])
    with swap_head(model, "nnclr", hidden_dim=HIDDEN + 1):
        after = features(model, x, at=["projection.hidden1", "projection.hidden2"])
    assert [t.shape for t in before] == [(6, HIDDEN)] * 2
    assert [t.shape for t in after] == [(6, HIDDEN + 1)] * 2


def test_hidden_layers_are_found_where_forward_leaves_the_head_to_the_training_step() -> None:
    class Benchmark(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.backbone(x)

    model = Benchmark(HEADS["lightly"]()).eval()
    x = torch.randn(6, 5)
    expected = model.projection_head.layers[:3](model.backbone(x))
    assert torch.equal(features(model, x, at="projection.hidden1"), expected)


def test_missing_hidden_layer_shows_those_there_are() -> None:
    with pytest.raises(UnknownNameError, match=r"projection\.hidden1"):
        features(Model(HEADS["no norm"]()), torch.randn(2, 5), at="projection.hidden2")


@pytest.mark.parametrize("name", list_heads())
def test_every_head_names_layers_of_its_own(name: str) -> None:
    small = {o: 12 for o, v in describe_head(name).defaults.items() if o.endswith("_dim") and v}
    with torch.device("meta"):
        head = create_head(name, input_dim=H, **small)
    paths = hidden_paths(head)
    assert len(set(paths)) == len(paths)
    assert all(isinstance(head.get_submodule(path), nn.Module) for path in paths)
    assert [path for path, _ in layers(head) if path in paths] == paths
    assert len(paths) >= sum(isinstance(m, nn.Linear) for _, m in layers(head)) - 1


def test_features_pair_a_head_with_its_own_backbone() -> None:
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher_backbone, self.student_backbone = nn.Linear(3, 6), nn.Linear(3, 6)
            self.teacher_backbone.requires_grad_(False)
            self.student_projection_head = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.teacher_backbone(x)

    model, x = Student(), torch.rand(4, 3)
    swap_head(model, "simclr_plain", slot="student_projection_head", twin=None)
    h = features(model, x, at="pre_projection")
    assert torch.equal(h, model.student_backbone(x))
