"""Reading one head's weights from files, state dicts and whole models of other libraries."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightly.models.modules import heads as lightly_heads
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from headplug import create_head
from headplug.errors import CheckpointError, OptionError, UnknownNameError
from headplug.heads.loading import read_head

INPUT, HIDDEN, OUTPUT = 20, 12, 6


def state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def ours(name: str = "byol", **options: Any) -> nn.Module:
    return create_head(
        name, **{"input_dim": INPUT, "hidden_dim": HIDDEN, "output_dim": OUTPUT, **options}
    )


def online() -> nn.Module:
    """lightly's BYOL head, trained for a step."""
    head = lightly_heads.BYOLProjectionHead(INPUT, HIDDEN, OUTPUT)
    return stepped(head, INPUT)


def stepped(module: nn.Module, width: int) -> nn.Module:
    optimiser = torch.optim.SGD(module.parameters(), lr=1.0)
    module.train()(torch.randn(8, width)).cos().sum().backward()
    optimiser.step()
    return module


class Model(nn.Module):
    """What the examples of lightly and others look like: a backbone and named heads."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, INPUT, 3), nn.BatchNorm2d(INPUT))
        for name, part in parts.items():
            self.add_module(name, part)


def followed(head: nn.Module) -> nn.Module:
    """An EMA twin that has drifted away from its head."""
    from lightly.models.utils import update_momentum

    twin = copy.deepcopy(head).requires_grad_(False)
    stepped(head, INPUT)
    update_momentum(head, twin, m=0.9)
    return twin


@pytest.mark.parametrize(
    ("trains", "follows"),
    [
        ("projection_head", "projection_head_momentum"),  # BYOL, MoCo, TiCo, ... in the examples
        ("projection_head", "teacher_projection_head"),  # BYOL in the benchmarks
        ("projection_head", "key_projection_head"),  # MoCo in the benchmarks
        ("student_head", "teacher_head"),  # DINO in the examples
        ("student_projection_head", "projection_head"),  # DINO in the benchmarks
        ("anchor_projection_head", "projection_head"),  # MSN
        ("projector", "momentum_projector"),
        ("head", "momentum_head"),
        ("prediction_head", "momentum_prediction_head"),
    ],
)
@pytest.mark.parametrize("twin_first", [True, False])
def test_the_head_that_trains_is_read_not_its_twin(
    trains: str, follows: str, twin_first: bool
) -> None:
    head = online()
    parts = {trains: head, follows: followed(head)}
    model = Model(**dict(reversed(parts.items())) if twin_first else parts)
    for source in (model, model.state_dict(), nn.ModuleDict({"module": model})):
        assert same(state(ours(weights=source)), state(head))


def test_lightly_moco_model_gives_its_head_among_others_of_other_shapes() -> None:
    head = stepped(lightly_heads.MoCoProjectionHead(INPUT, HIDDEN, OUTPUT), INPUT)
    predictor = lightly_heads.BYOLPredictionHead(OUTPUT, HIDDEN, OUTPUT)
    model = Model(prediction_head=predictor, projection_head=head)
    assert same(state(ours("moco_v2", weights=model)), state(head))
    found = ours("byol_predictor", input_dim=OUTPUT, weights=model)
    assert same(state(found), state(predictor))


@pytest.mark.parametrize(
    ("before", "behind", "kind"),
    [
        ("projection_head", "prediction_head", "byol_predictor"),
        ("projector", "predictor", "byol_predictor_solo"),
        ("projector", "prototypes", "swav_prototypes"),
    ],
)
def test_heads_of_equal_shapes_are_told_apart_by_what_they_are(
    before: str, behind: str, kind: str
) -> None:
    heads = [stepped(ours(input_dim=OUTPUT), OUTPUT) for _ in range(2)]
    model = Model(**dict(zip((before, behind), heads, strict=True)))
    assert same(read_head(model, ours(input_dim=OUTPUT), "byol"), state(heads[0]))
    assert same(read_head(model, ours(input_dim=OUTPUT), kind), state(heads[1]))
    if kind == "byol_predictor":
        assert same(state(ours(kind, input_dim=OUTPUT, weights=model)), state(heads[1]))


@pytest.mark.parametrize("path", ["student_head", "student_head.dino_head"])
def test_lightly_dino_model_gives_its_students_head(path: str) -> None:
    options = {"bottleneck_dim": 5, "output_dim": 9}
    with pytest.warns(FutureWarning, match="weight_norm"):
        student, teacher = (lightly_heads.DINOProjectionHead(INPUT, HIDDEN, 5, 9) for _ in range(2))
    model = Model(student_head=nn.Identity(), teacher_head=teacher)
    holder, _, name = path.rpartition(".")
    model.get_submodule(holder).add_module(name, student)
    assert same(state(ours("dino", **options, weights=model)), state(student))


@pytest.mark.parametrize("name", ["byol_solo", "simsiam_solo", "simclr_plain"])
def test_solo_learns_bare_keys_are_read_below_projector(name: str) -> None:
    head = stepped(ours(name), INPUT)
    projector = copy.deepcopy(head.layers)  # solo-learn's modules are bare Sequentials
    twin = copy.deepcopy(projector)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.add_(1)
    model = Model(momentum_projector=twin, projector=projector, classifier=nn.Linear(INPUT, 5))
    assert "projector.0.weight" in model.state_dict()
    assert same(state(ours(name, weights=model.state_dict())), state(head))


class Lightning(pl.LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.save_hyperparameters(options)
        self.backbone = nn.Linear(4, INPUT)
        self.projection_head = lightly_heads.BYOLProjectionHead(INPUT, HIDDEN, OUTPUT)
        self.projection_head_momentum = copy.deepcopy(self.projection_head).requires_grad_(False)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.projection_head(self.backbone(batch[0])).cos().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def checkpoint(model: pl.LightningModule, folder: Path) -> Path:
    """What Lightning's own trainer saves after two steps."""
    data = torch.utils.data.TensorDataset(torch.randn(16, 4))
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=8))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.mark.filterwarnings("ignore")
class TestLightningCheckpoint:
    def test_head_is_read_from_the_file(self, tmp_path: Path) -> None:
        model = Lightning(lr=0.1, name="byol")
        file = checkpoint(model, tmp_path)
        assert torch.load(file, weights_only=True).keys() >= {"state_dict", "optimizer_states"}
        head = ours(weights=str(file))
        assert same(state(head), state(model.projection_head))
        assert not same(state(head), state(model.projection_head_momentum))

    def test_head_is_read_from_what_torch_loaded(self, tmp_path: Path) -> None:
        model = Lightning()
        content = torch.load(checkpoint(model, tmp_path), weights_only=False)
        assert same(state(ours(weights=content)), state(model.projection_head))

    @pytest.mark.parametrize(
        "config",
        [OmegaConf.create({"lr": 0.1}), functools.partial(pow, 2), Path("x"), nn.Linear(2, 2)],
        ids=["OmegaConf", "solo-learn's SimSiam has a partial", "path", "module"],
    )
    def test_objects_beside_the_weights_are_passed_over(self, tmp_path: Path, config: Any) -> None:
        model = Lightning()
        content = {"state_dict": model.state_dict(), "hyper_parameters": {"config": config}}
        torch.save(content, tmp_path / "last.ckpt")
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "last.ckpt", weights_only=True)
        head = ours(weights=tmp_path / "last.ckpt")
        assert same(state(head), state(model.projection_head))

    @pytest.mark.parametrize("call", ["os.system", "builtins.eval", "pathlib.Path.touch"])
    def test_no_code_in_the_file_runs(self, tmp_path: Path, call: str) -> None:
        module, _, name = call.partition(".")

        class Bomb:
            def __reduce__(self) -> Any:
                function = functools.reduce(
                    getattr, name.split("."), importlib.import_module(module)
                )
                touched = tmp_path / "touched"
                text = {"system": f"touch {touched}", "eval": f"open({str(touched)!r}, 'w')"}
                return function, (text.get(name, touched),)

        torch.save({"state_dict": Lightning().state_dict(), "x": Bomb()}, tmp_path / "last.ckpt")
        with contextlib.suppress(CheckpointError):
            ours(weights=tmp_path / "last.ckpt")
        assert not (tmp_path / "touched").exists()

    def test_objects_among_the_weights_are_refused(self, tmp_path: Path) -> None:
        state = {"state_dict": {**Lightning().state_dict(), "x": Path("x")}}
        torch.save(state, tmp_path / "last.ckpt")
        with pytest.raises(CheckpointError, match=r"holds more than tensors.*never unpickles"):
            ours(weights=tmp_path / "last.ckpt")


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "_orig_mod.", "a.b.c."])
def test_prefix_of_a_wrapper_does_not_matter(prefix: str) -> None:
    head = online()
    weights = {f"{prefix}{k}": v for k, v in head.state_dict().items()}
    assert same(state(ours(weights=weights)), state(head))
    weights = {f"{prefix}projection_head._orig_mod.{k}": v for k, v in head.state_dict().items()}
    assert same(state(ours(weights=weights)), state(head))


@pytest.mark.parametrize("form", ["state_dict", "model_state_dict", "model"])
def test_wrapped_state_dict_is_opened(form: str, tmp_path: Path) -> None:
    head = online()
    content = {form: head.state_dict(), "epoch": 3}
    torch.save(content, tmp_path / "head.pt")
    for source in (content, tmp_path / "head.pt"):
        assert same(state(ours(weights=source)), state(head))


def test_other_precision_is_read_into_the_heads_own() -> None:
    head = online().to(torch.bfloat16)
    found = ours(weights=head)
    assert {v.dtype for k, v in found.state_dict().items() if "tracked" not in k} == {torch.float32}
    assert torch.equal(found.layers[0].weight.bfloat16(), head.layers[0].weight)


def test_copies_of_one_head_are_no_ambiguity() -> None:
    head = online()
    found = ours(weights=Model(left=head, right=copy.deepcopy(head)))
    assert same(state(found), state(head))


@pytest.mark.parametrize(
    ("paths", "listed"),
    [
        (("left", "right"), "'left.', 'right.'"),
        (("student.head", "teacher.head"), "'student.head.', 'teacher.head.'"),
    ],
)
def test_heads_that_fit_alike_are_listed_and_one_can_be_given(
    paths: tuple[str, str], listed: str
) -> None:
    heads = dict(zip(paths, (online(), online()), strict=True))
    weights = {f"{p}.{k}": v for p, head in heads.items() for k, v in head.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"several heads that fit: {listed}\\. Pass") as info:
        ours(weights=weights)
    example = str(info.value).partition("weights=")[2].removesuffix(".")
    chosen = eval(example, {"state": weights, "PREFIX": f"{paths[1]}."})
    assert same(state(ours(weights=chosen)), state(heads[paths[1]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_dim": 21}, r"'layers\.0\.weight' below 'projection_head\.' has shape \(12, 20\), "
                            r"the head's \(12, 21\)\."),
        ({"output_dim": 7}, r"'layers\.3\.weight' below 'projection_head\.' has shape \(6, 12\), "
                            r"the head's \(7, 12\)\."),
        ({"name": "simclr"}, r"there is no 'layers\.4\.weight' below 'projection_head\.'\."),
        ({"name": "simclr_plain"}, r"no 'layers\.0\.bias' below 'projection_head\.'\."),
        ({"name": "low_rank", "hidden_dim": 12, "output_dim": 12}, "below 'projection_head"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_both_shapes(options: dict[str, Any], message: str) -> None:
    model = Model(projection_head=online(), fc=nn.Linear(INPUT, 9))
    with pytest.raises(
        CheckpointError,
        match=f"Model has no weights that fit {options.get('name', 'byol')}: "
        f".*{message}.* Build the head that was trained",
    ):
        ours(**{"name": "byol", "weights": model, **options})


def test_too_many_weights_are_named() -> None:
    weights = {**online().state_dict(), "layers.9.weight": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"there is also 'layers\.9\.weight'\."):
        ours(weights=weights)


def test_strangers_keys_are_shown_beside_ours() -> None:
    message = r"should have layers\.0\.weight, .*, \.\.\. and has stem\.weight, stem\.bias\.$"
    with pytest.raises(CheckpointError, match=message):
        ours(weights=nn.ModuleDict({"stem": nn.Linear(3, 3)}))
    with pytest.raises(CheckpointError, match=r"and has nothing\.$"):
        ours(weights={})


def test_part_of_a_nested_checkpoint_is_proposed_and_can_be_given() -> None:
    head = online()
    content = {"epoch": 3, "config": {"lr": 0.1}, "student": head.state_dict()}
    message = r"has epoch, config, student\. Pass a part of it: weights=checkpoint\['student'\]\."
    with pytest.raises(CheckpointError, match=message):
        ours(weights=content)
    assert same(state(ours(weights=content["student"])), state(head))


def test_values_that_are_no_tensors_do_not_fit() -> None:
    weights: dict[str, Any] = {k: v.tolist() for k, v in online().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"'layers\.0\.weight' has shape None"):
        ours(weights=weights)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"no file .*none\.pt"):
        ours(weights=tmp_path / "none.pt")
    for name in ("damaged.pt", "damaged.safetensors"):
        (tmp_path / name).write_bytes(b"neither of both")
        with pytest.raises(CheckpointError, match=name):
            ours(weights=str(tmp_path / name))
    torch.save({"layers": online()}, tmp_path / "pickled.pt")
    with pytest.raises(CheckpointError, match=r"pickled\.pt holds more than tensors"):
        ours(weights=tmp_path / "pickled.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"list\.pt holds a list, not a state dict"):
        ours(weights=tmp_path / "list.pt")


def test_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    save_file(online().state_dict(), tmp_path / "head.safetensors")
    with pytest.raises(CheckpointError, match=r"head\.safetensors has no weights that fit"):
        ours(output_dim=7, weights=tmp_path / "head.safetensors")


@pytest.mark.parametrize("weights", [3, ["file.pt"], torch.ones(2)])
def test_other_types_are_refused_by_name(weights: Any) -> None:
    with pytest.raises(OptionError, match=r"byol: weights must be .*not"):
        ours(weights=weights)
    with pytest.raises(CheckpointError, match=f"from a {type(weights).__name__}; pass a path"):
        read_head(weights, ours())


def test_pair_of_tensors_is_no_whole_head() -> None:
    with pytest.raises(CheckpointError, match="cannot read a head from a tuple; pass a path"):
        ours(weights=(torch.ones(12, 20), torch.ones(12)))


@pytest.mark.parametrize("solo", [True, False])
def test_source_stays_as_it_was_and_shares_nothing_with_the_head(
    solo: bool, tmp_path: Path
) -> None:
    head = online()
    model = Model(projector=head.layers if solo else head)
    before, weights = state(model), model.state_dict()
    keys = list(weights)
    torch.save(weights, tmp_path / "model.pt")
    content = (tmp_path / "model.pt").read_bytes()
    for source in (model, weights, tmp_path / "model.pt"):
        found = ours(weights=source)
        with torch.no_grad():
            for tensor in found.state_dict().values():
                tensor.add_(1)
    assert same(state(model), before)
    assert list(weights) == keys
    assert (tmp_path / "model.pt").read_bytes() == content
    theirs = {v.data_ptr() for v in weights.values()}
    assert not theirs & {v.data_ptr() for v in ours(weights=model).state_dict().values()}


def test_read_weights_can_be_frozen_at_once() -> None:
    head = ours(weights=Model(projection_head=(source := online())), freeze="layers.0")
    assert torch.equal(head.layers[0].weight, source.layers[0].weight)
    assert "layers.0.weight" not in dict(head.named_parameters())


def test_weights_take_no_part_in_the_config() -> None:
    assert ours(weights=online()).config == ours().config
