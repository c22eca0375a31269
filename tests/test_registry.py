from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Protocol

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from headplug import MLPHead, create_head, describe_head, list_heads, register_head
from headplug.errors import HeadplugError, OptionError, UnknownNameError
from headplug.heads import HEADS
from headplug.registry import Registry


@pytest.fixture
def shapes() -> Registry:
    return Registry("shape", listing="Look at shapes.names().")


@pytest.fixture
def heads() -> Iterator[Registry]:
    """The registry of heads, as it was before the test when the test is over."""
    before = dict(HEADS._entries)
    yield HEADS
    HEADS._entries.clear()
    HEADS._entries.update(before)


def square(side: int = 1, *, colour: Literal["red", "blue"] = "red") -> tuple[int, str]:
    return side**2, colour


class TestRegister:
    def test_directly_and_as_a_decorator(self, shapes: Registry) -> None:
        assert shapes.register("direct", square, summary="a square", paper="Euclid") is square

        @shapes.register("decorated", preset={"side": 3})
        def cube(side: int = 1) -> int:
            return side**3

        assert cube(2) == 8  # the decorator returns what it was given
        assert shapes.build("direct", {"side": 2}) == (4, "red")
        assert shapes.build("decorated", {}) == 27
        assert (shapes.get("direct").summary, shapes.get("direct").paper) == ("a square", "Euclid")

    @pytest.mark.parametrize("builder", [None, str], ids=["decorator", "direct"])
    def test_clash_raises_and_names_both(self, shapes: Registry, builder: Any) -> None:
        shapes.register("square", square)
        with pytest.raises(OptionError, match=r"'square' is already .*square.*overwrite=True"):
            shapes.register("square", builder)
        assert shapes.get("square").builder is square

    def test_overwrite_replaces(self, shapes: Registry) -> None:
        shapes.register("square", square)
        shapes.register("square", lambda: 7, overwrite=True)
        assert shapes.build("square", {}) == 7
        shapes.register("square", overwrite=True)(lambda: 8)
        assert shapes.build("square", {}) == 8

    @pytest.mark.parametrize("name", ["", "Square", "a square", "-a", "a*", "ä", 3, None, square])
    def test_bad_names_are_refused(self, shapes: Registry, name: Any) -> None:
        with pytest.raises(OptionError, match="cannot name a shape: use lower-case"):
            shapes.register(name)  # as `@register` without a name does
        with pytest.raises(OptionError, match="cannot name a shape: use lower-case"):
            shapes.register(name, square)
        assert shapes.names() == []

    @pytest.mark.parametrize("builder", [3, "square", nn.Linear(2, 2).weight])
    def test_what_cannot_be_called_is_refused(self, shapes: Registry, builder: Any) -> None:
        with pytest.raises(OptionError, match="builder of 'square' must be a class or function"):
            shapes.register("square", builder)

    @pytest.mark.parametrize(
        ("preset", "message"),
        [
            ({"sid": 3}, "preset of square: no option is called 'sid'. Closest: side"),
            ({"side": "3"}, "preset of square: side must be int, not '3'"),
            ({"colour": "green"}, "preset of square: colour must be one of 'red', 'blue'"),
        ],
    )
    def test_wrong_presets_are_refused(
        self, shapes: Registry, preset: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(OptionError, match=message):
            shapes.register("square", square, preset=preset)
        assert shapes.names() == []

    def test_entries_are_frozen(self, shapes: Registry) -> None:
        preset = {"side": 2}
        shapes.register("square", square, preset=preset)
        preset["side"] = 9
        shapes.get("square").defaults["side"] = 9
        with pytest.raises(AttributeError):
            shapes.get("square").summary = "changed"  # type: ignore[misc]
        with pytest.raises(TypeError):
            shapes.get("square").preset["side"] = 9  # type: ignore[index]
        assert shapes.build("square", {}) == (4, "red")

    def test_preset_changes_the_defaults_and_options_win(self, shapes: Registry) -> None:
        shapes.register("blue", square, preset={"side": 3, "colour": "blue"})
        assert shapes.get("blue").defaults == {"side": 3, "colour": "blue"}
        assert shapes.build("blue", {}) == (9, "blue")
        assert shapes.build("blue", {"side": 1}) == (1, "blue")


class TestNames:
    def test_globs_and_natural_order(self, shapes: Registry) -> None:
        for name in ("net_v10", "net_v2", "net_v2b", "arc", "net_v1.5", "10", "9"):
            shapes.register(name, square)
        assert shapes.names() == ["9", "10", "arc", "net_v1.5", "net_v2", "net_v2b", "net_v10"]
        assert shapes.names("net_v?") == ["net_v2"]
        assert shapes.names("*v1*") == ["net_v1.5", "net_v10"]
        assert shapes.names("nothing*") == []

    def test_unknown_name_shows_the_closest_and_how_to_list(self, shapes: Registry) -> None:
        for name in ("square", "square_big", "circle"):
            shapes.register(name, square)
        with pytest.raises(
            UnknownNameError,
            match=r"no shape is called 'squaer'. Closest: square.*Look at shapes.names\(\)",
        ):
            shapes.get("squaer")

    def test_unknown_name_without_a_neighbour_shows_what_there_is(self, shapes: Registry) -> None:
        with pytest.raises(UnknownNameError, match=r"There are none\."):
            shapes.get("square")
        shapes.register("square", square)
        with pytest.raises(UnknownNameError, match=r"There is: square\."):
            shapes.get("zzz")

    @pytest.mark.parametrize(
        ("asked", "found"),
        [("simclir", "simclr"), ("SimCLR", "simclr"), ("ae-embedding", "ae_embedding")],
    )
    def test_misspelt_head_names_its_neighbour(self, asked: str, found: str) -> None:
        for call in (describe_head, functools.partial(create_head, input_dim=8)):
            with pytest.raises(UnknownNameError, match=rf"{asked!r}. Closest: {found}\b.*heads`"):
                call(asked)

    def test_design_names_are_there(self) -> None:
        assert {
            "mlp", "ae_embedding", "reweighting", "identity", "simclr", "simclr_plain",
        } <= set(list_heads())  # fmt: skip
        assert list_heads("moco_v?") == ["moco_v2", "moco_v3"]


class Sized(Protocol):
    size: int


class TestOptions:
    @pytest.mark.parametrize(
        ("option", "value", "type_"),
        [
            ("num_layers", True, "int, not True"),
            ("num_layers", "3", "int, not '3'"),
            ("num_layers", 3.0, "int, not 3.0"),
            ("num_layers", None, "int, not None"),
            ("hidden_dim", 2.5, "int or None, not 2.5"),
            ("activation", 3, "str, not 3"),
            ("norm", "Batch", "one of 'batch', 'batch_no_affine', .*, 'none', not 'Batch'"),
            ("output_bias", "no", "bool, 'frozen' or None, not 'no'"),
            ("freeze", [0], r"bool, str or list of str, not \[0\]"),
            ("input_dim", "8", r"int, not '8' \(str\)\. Write 8 without quotes\."),
            ("bias", "true", r"bool or None, not 'true' \(str\)\. Write True without quotes\."),
            ("dropout", "half", r"float, not 'half' \(str\)\.$"),
            ("norm", True, "one of 'batch', .*, not True"),
            ("output_dim", [128], r"int, not \[128\]"),
        ],
    )
    def test_wrong_type_is_refused_by_name(self, option: str, value: Any, type_: str) -> None:
        with pytest.raises(OptionError, match=f"simclr: {option} must be {type_}"):
            create_head("simclr", **{"input_dim": 8, option: value})

    @pytest.mark.parametrize(
        ("name", "option", "value"),
        [
            ("reweighting", "kappa", "1.05"),
            ("reweighting", "kappa", True),
            ("ae_embedding", "freeze", 1),
            ("ae_embedding", "weights", 3),
        ],
    )
    def test_wrong_type_of_other_heads(self, name: str, option: str, value: Any) -> None:
        with pytest.raises(OptionError, match=f"{name}: {option} must be"):
            create_head(name, input_dim=8, **{option: value})

    def test_integer_is_a_number(self) -> None:
        assert create_head("reweighting", input_dim=8, kappa=2).config["kappa"] == 2.0

    def test_unknown_option_shows_the_closest(self) -> None:
        with pytest.raises(
            OptionError, match=r"byol: no option is called 'hiden_dim'\. Closest: hidden_dim"
        ):
            create_head("byol", input_dim=8, hiden_dim=3)

    @pytest.mark.parametrize("name", list_heads())
    def test_missing_input_dim_says_so(self, name: str) -> None:
        with pytest.raises(OptionError, match=f"{name}: input_dim must be given"):
            create_head(name)

    def test_all_errors_are_ours_and_builtin(self) -> None:
        assert issubclass(OptionError, HeadplugError)
        assert issubclass(OptionError, ValueError)
        assert issubclass(UnknownNameError, HeadplugError)
        assert issubclass(UnknownNameError, LookupError)

    @pytest.mark.parametrize(
        ("hint", "good", "bad"),
        [
            (int, [3, -1], [True, 1.0, "1", None]),
            (float, [1.5, 2], [True, "1"]),
            (bool, [True], [1, 0, "true"]),
            (str, ["a"], [1, None, ["a"]]),
            (list[int], [[1, 2], (1, 2), []], [["a"], "12", 1, [True]]),
            (tuple[int, str], [(1, "a"), [1, "a"]], [(1, 2), (1,), ("a", 1)]),
            (tuple[float, ...], [(1, 2.5), [1.0], ()], [("a",), 1.0]),
            (tuple, [(1,), ["a"]], ["a", 3]),
            (list, [[1], ("a",)], ["a", {"a": 1}]),
            (dict[str, int], [{"a": 1}, {}], [[("a", 1)], "a"]),
            (int | None, [1, None], ["a", 1.0]),
            (Optional[str], ["a", None], [1]),  # noqa: UP045
            (Literal["a", 1], ["a", 1], ["b", True, 1.0]),
            (Annotated[int, "width"], [1], ["1"]),
            (type[nn.Module], [nn.ReLU], [nn.ReLU(), "relu"]),
            (nn.Module, [nn.ReLU()], [nn.ReLU, "relu"]),
            (Any, [1, "a", None, [1]], []),
            (Sized, [1, "a"], []),  # cannot be checked: passes
            ("no_such_type", [1, "a"], []),
        ],
    )
    def test_values_are_held_against_annotations(
        self, shapes: Registry, hint: Any, good: list[Any], bad: list[Any]
    ) -> None:
        def build(option):  # type: ignore[no-untyped-def]
            return option

        build.__annotations__["option"] = hint
        shapes.register("shape", build)
        for value in good:
            assert shapes.build("shape", {"option": value}) is value
        for value in bad:
            with pytest.raises(OptionError, match="shape: option must be"):
                shapes.build("shape", {"option": value})

    def test_default_none_may_be_given_whatever_the_annotation(self, shapes: Registry) -> None:
        shapes.register("shape", sloppy)
        assert shapes.build("shape", {"side": None}) is None  # a config that came back


def sloppy(side: int = None) -> int:  # type: ignore[assignment]  # noqa: RUF013
    return side


class TestBuilders:
    def test_open_builder_takes_any_option(self, shapes: Registry) -> None:
        shapes.register("open", lambda side=1, **rest: (side, rest), preset={"tint": "red"})
        assert shapes.build("open", {"depth": 2}) == (1, {"tint": "red", "depth": 2})
        assert shapes.get("open").defaults == {"side": 1, "tint": "red"}
        assert shapes.get("open").required == []

    def test_positional_rest_is_left_empty(self, shapes: Registry) -> None:
        shapes.register("star", lambda side, *rest, depth=2: (side, rest, depth))
        assert shapes.build("star", {"side": 1}) == (1, (), 2)
        with pytest.raises(OptionError, match="star: no option is called 'rest'"):
            shapes.build("star", {"side": 1, "rest": (2,)})
        with pytest.raises(OptionError, match="star: side must be given"):
            shapes.build("star", {})

    def test_partial_is_checked_like_its_function(self, shapes: Registry) -> None:
        shapes.register("blue", functools.partial(square, colour="blue"))
        assert shapes.build("blue", {"side": 2}) == (4, "blue")
        with pytest.raises(OptionError, match="blue: side must be int"):
            shapes.build("blue", {"side": "2"})


class TestCreateHead:
    def test_mapping_without_a_name_shows_its_keys(self) -> None:
        with pytest.raises(OptionError, match="needs the key 'name'; it has nam, input_dim"):
            create_head({"nam": "simclr", "input_dim": 8})
        with pytest.raises(OptionError, match="needs the key 'name'; it has nothing"):
            create_head({})

    @pytest.mark.parametrize("name", [3, None, ["simclr"], {"name": None, "input_dim": 8}])
    def test_name_must_be_a_string(self, name: Any) -> None:
        with pytest.raises(OptionError, match="named by a string or a mapping, not by"):
            create_head(name)

    def test_options_win_over_the_mapping_which_is_left_alone(self) -> None:
        mapping = {"name": "simclr", "input_dim": 8, "output_dim": 4}
        head = create_head(mapping, output_dim=5, hidden_dim=6)
        assert (head.input_dim, head.output_dim, head.hidden_dim) == (8, 5, 6)
        assert create_head(mapping, name="moco_v2").name == "moco_v2"
        assert mapping == {"name": "simclr", "input_dim": 8, "output_dim": 4}

    def test_omegaconf_with_nested_lists_and_interpolation(self, heads: Registry) -> None:
        heads.register("stack", Stack)
        cfg = OmegaConf.create(
            {
                "width": 8,
                "head": {
                    "name": "stack",
                    "input_dim": "${width}",
                    "widths": [[6, 5], [4]],
                    "names": {"last": ["a"]},
                },
            }
        )
        for head in (
            create_head(cfg.head),
            create_head("stack", input_dim=8, widths=cfg.head.widths, names=cfg.head.names),
        ):
            assert head(torch.rand(2, 8)).shape == (2, 4)
            assert json.loads(json.dumps(head.config)) == {
                "name": "stack",
                "input_dim": 8,
                "widths": [[6, 5], [4]],
                "names": {"last": ["a"]},
            }
            assert type(head.config["widths"][0]) is list
            assert type(head.config["names"]) is dict

    @pytest.mark.parametrize("as_mapping", [True, False])
    def test_weights_reach_the_head_as_they_are(self, as_mapping: bool) -> None:
        pair = (torch.rand(6, 8), torch.rand(6))
        options: dict[str, Any] = {"input_dim": 8, "weights": pair}
        head = (
            create_head({"name": "ae_embedding", **options})
            if as_mapping
            else create_head("ae_embedding", **options)
        )
        assert torch.equal(head.state_dict()["layers.embedding.weight"], pair[0])
        assert "weights" not in head.config


class Stack(nn.Module):
    """A third party's module that knows nothing of headplug but the two dims."""

    def __init__(
        self, input_dim: int, widths: list[list[int]], names: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        flat = [input_dim, *(w for group in widths for w in group)]
        self.output_dim = flat[-1]
        self.net = nn.Sequential(*map(nn.Linear, flat[:-1], flat[1:]))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Plain(nn.Module):
    def __init__(self, input_dim: int, output_dim: int = 6, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(input_dim, output_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Nameless(nn.Module):
    def __init__(self, input_dim: int, width: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(input_dim, width)


class Wide(MLPHead):
    """A subclass that hands its options on."""

    def __init__(self, input_dim: int, **options: Any) -> None:
        super().__init__(input_dim, hidden_dim=4 * input_dim, **options)


class Forgetful(MLPHead):
    def __init__(self, input_dim: int, factor: int = 4) -> None:
        super().__init__(input_dim, hidden_dim=factor * input_dim)


class TestThirdParties:
    def test_plain_module_gets_config_and_dims(self, heads: Registry) -> None:
        register_head("plain", Plain, preset={"bias": False})
        head = create_head("plain", input_dim=4)
        assert (head.input_dim, head.output_dim) == (4, 6)
        assert head.config == {"name": "plain", "input_dim": 4, "output_dim": 6, "bias": False}
        again = create_head(json.loads(json.dumps(head.config)))
        again.load_state_dict(head.state_dict(), strict=True)
        assert "plain" in list_heads("pl*")

    @pytest.mark.parametrize("cls", ["DINOProjectionHead", "MMCRProjectionHead"])
    def test_lightlys_own_classes_register_as_they_are(self, heads: Registry, cls: str) -> None:
        module = pytest.importorskip("lightly.models.modules.heads")
        register_head("lightlys", getattr(module, cls))
        head = create_head("lightlys", input_dim=8, hidden_dim=6, output_dim=5)
        assert (head.input_dim, head.output_dim) == (8, 5)
        assert head(torch.rand(4, 8)).shape == (4, 5)
        create_head(head.config).load_state_dict(head.state_dict(), strict=True)

    @pytest.mark.parametrize("option", ["output_dim", "input_dim"])
    def test_module_without_its_dims_is_refused(self, heads: Registry, option: str) -> None:
        if option == "output_dim":
            register_head("nameless", Nameless)
            options = {"input_dim": 4}
        else:
            register_head("nameless", lambda width: Nameless(width))
            options = {"width": 4}
        with pytest.raises(OptionError, match=f"'nameless'.*must set `self.{option}`"):
            create_head("nameless", **options)

    def test_width_left_at_none_is_not_taken_for_a_width(self, heads: Registry) -> None:
        def same_width(input_dim: int, output_dim: int | None = None) -> nn.Module:
            return nn.Linear(input_dim, output_dim or input_dim)

        register_head("same", same_width)
        assert create_head("same", input_dim=4, output_dim=3).output_dim == 3
        with pytest.raises(OptionError, match=r"'same'.*must set `self.output_dim`"):
            create_head("same", input_dim=4)

    def test_builder_must_return_a_module(self, heads: Registry) -> None:
        register_head("broken", lambda input_dim: "a head")
        with pytest.raises(OptionError, match="builder of 'broken' returned str, not a module"):
            create_head("broken", input_dim=4)

    @pytest.mark.parametrize(
        ("builder", "options"),
        [
            (Wide, {"output_dim": 5}),
            (functools.partial(MLPHead, num_layers=4), {"output_dim": 5}),
            (lambda input_dim, factor=2: MLPHead(input_dim, hidden_dim=factor * input_dim), {}),
            (lambda input_dim: create_head("ae_embedding", input_dim=input_dim), {}),
        ],
        ids=["subclass with **options", "partial", "function", "function of create_head"],
    )
    def test_built_on_ours_keeps_its_name_and_its_config_rebuilds_it(
        self, heads: Registry, builder: Any, options: dict[str, Any]
    ) -> None:
        register_head("theirs", builder)
        head = create_head("theirs", input_dim=4, **options)
        assert head.name == "theirs"
        assert head.config["name"] == "theirs"
        again = create_head(json.loads(json.dumps(head.config)))
        again.load_state_dict(head.state_dict(), strict=True)
        assert again.config == head.config
        assert "theirs" in repr(head)

    def test_weights_stay_out_of_the_config_of_a_function_too(self, heads: Registry) -> None:
        def tuned(input_dim: int, weights: nn.Module | None = None) -> nn.Module:
            return create_head("ae_embedding", input_dim=input_dim, weights=weights)

        register_head("tuned", tuned)
        head = create_head("tuned", input_dim=4, weights=nn.Linear(4, 256))
        assert head.config == {"name": "tuned", "input_dim": 4}

    def test_subclass_that_forgets_an_argument_is_told_so(self) -> None:
        with pytest.raises(OptionError, match="Forgetful takes 'factor' and must store it"):
            _ = Forgetful(4).config


SOURCES = {
    "good": {
        "declares": {"their_head": "good_heads:TheirHead", "more": "good_heads:register"},
        "module": '''
from headplug import MLPHead, register_head
from torch import nn

class TheirHead(nn.Module):
    """A head from another package.

    With more to say.
    """

    def __init__(self, input_dim: int, output_dim: int = 7) -> None:
        super().__init__()
        self.linear = nn.Linear(input_dim, output_dim)

    def forward(self, x):
        return self.linear(x)

@register_head("their_decorated", summary="registered when its module is imported")
class Decorated(TheirHead):
    pass

def register():
    register_head("their_mlp", MLPHead, summary="ours, wider", preset={"hidden_dim": 99})
''',
    },
    "decorated": {
        "declares": {"their_decorated": "decorated_heads:Decorated"},
        "module": "from good_heads import Decorated\n",
    },
    "module": {
        "declares": {"any": "module_heads"},
        "module": "from headplug import MLPHead, register_head\n"
        "register_head('their_plain', MLPHead)\n",
    },
    "broken": {
        "declares": {"broken_head": "broken_heads:BrokenHead"},
        "module": "raise RuntimeError('this package is broken')\n",
    },
    "clashing": {
        "declares": {"simclr": "clashing_heads:Impostor"},
        "module": "from good_heads import TheirHead\nclass Impostor(TheirHead): pass\n",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the packages above."""
    root = tmp_path_factory.mktemp("plugins")
    for name, source in SOURCES.items():
        project = root / name
        project.mkdir()
        (project / f"{name}_heads.py").write_text(source["module"])
        points = "\n".join(f"{k} = '{v}'" for k, v in source["declares"].items())
        (project / "pyproject.toml").write_text(
            "[build-system]\nrequires = ['hatchling']\nbuild-backend = 'hatchling.build'\n"
            f"[project]\nname = '{name}-heads'\nversion = '1.0'\n"
            f"[project.entry-points.'headplug.heads']\n{points}\n"
            f"[tool.hatch.build.targets.wheel]\ninclude = ['{name}_heads.py']\n"
        )
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(root / "site")]
    projects = [str(root / name) for name in SOURCES]
    subprocess.run([*pip, *flags, *projects], check=True, capture_output=True, text=True)
    return root / "site"


def run_with(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, check=True, capture_output=True, text=True
    )


def test_heads_of_installed_packages_appear_and_build(site: Path) -> None:
    script = """
import json, sys, warnings
import headplug
headplug.create_head("simclr", input_dim=4)
inert = not {"good_heads", "broken_heads"} & set(sys.modules)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    head = headplug.create_head("their_head", input_dim=4)
    names = headplug.list_heads()
print(json.dumps({
    "inert": inert,
    "names": names,
    "config": head.config,
    "summary": headplug.describe_head("their_head").summary,
    "hidden_dim": headplug.create_head("their_mlp", input_dim=4).hidden_dim,
    "simclr": headplug.describe_head("simclr").builder.__module__,
    "warnings": [str(w.message) for w in caught],
}))
"""
    found = json.loads(run_with(site, "-c", script).stdout)
    assert found["inert"], "entry points are read before they are needed"
    assert sorted(set(found["names"]) - set(list_heads())) == [
        "their_decorated", "their_head", "their_mlp", "their_plain",
    ]  # fmt: skip
    assert found["config"] == {"name": "their_head", "input_dim": 4, "output_dim": 7}
    assert found["summary"] == "A head from another package."
    assert found["hidden_dim"] == 99
    assert found["simclr"] == "headplug.heads.mlp"
    broken, clashing = sorted(found["warnings"])
    assert "'broken_head'" in broken
    assert "broken_heads:BrokenHead" in broken
    assert "RuntimeError: this package is broken" in broken
    assert "clashing_heads:Impostor" in clashing
    assert "already registered" in clashing


def test_command_line_lists_heads_of_installed_packages(site: Path) -> None:
    main = "import sys; from headplug.cli import main; sys.argv[0] = 'headplug'; main()"
    listing = run_with(site, "-c", main, "heads")
    for name in ("their_head", "their_mlp", "simclr"):
        assert name in listing.stdout
    assert "broken_heads:BrokenHead" in listing.stderr
    rows = json.loads(run_with(site, "-c", main, "heads", "their_head", "--json").stdout)
    assert rows[0]["summary"] == "A head from another package."


@pytest.mark.slow
def test_head_of_an_installed_package_is_compared_with_ours(site: Path, tmp_path: Path) -> None:
    command = [
        "-m", "headplug.cli", "compare", "--backbone", "test_resnet", "--limit", "200",
        "--epochs", "1", "--batch-size", "64", "--probes", "ridge", "--heads",
        "simclr_plain,their_head",
        "--out", str(tmp_path / "run"), "--json",
    ]  # fmt: skip
    results = json.loads(run_with(site, *command).stdout)
    theirs = {run["head"]: run for run in results["runs"]}["their_head"]
    assert theirs["head_params_trainable"] == 7 * (theirs["head_params_trainable"] // 7) > 0
    assert theirs["train_images_per_s"] > 0
    assert {"pre_projection", "projection"} <= {row["tap"] for row in theirs["taps"]}
    assert "their_head" in (tmp_path / "run" / "report.html").read_text("utf-8")
