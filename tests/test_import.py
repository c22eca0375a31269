from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import headplug

ROOT = Path(__file__).parents[1]
PACKAGES = ["headplug", "headplug_lightly", "headplug_solo"]
HEAVY = [
    "lightly", "lightning", "pytorch_lightning", "timm", "matplotlib", "sklearn", "pandas",
    "kornia", "pyarrow", "PIL", "torchvision", "rich", "typer", "omegaconf", "solo", "safetensors",
]  # fmt: skip


def python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd="/",
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


def test_importing_headplug_imports_nothing_heavy() -> None:
    loaded = python("import headplug, sys; print(*{m.split('.')[0] for m in sys.modules})").split()
    assert "torch" in loaded
    assert sorted(set(HEAVY) & set(loaded)) == []


def test_importing_headplug_takes_at_most_0_3_s_of_cpu_time_beyond_torch() -> None:
    code = """
import time
import torch
start = time.process_time()
import headplug
print(time.process_time() - start)
"""
    assert min(float(python(code)) for _ in range(3)) <= 0.3


def test_public_names_are_those_of_the_design() -> None:
    assert set(headplug.__all__) >= {
        "AEEmbeddingHead", "MLPHead", "ReweightingHead", "ProjectionHead",
        "create_head", "list_heads", "register_head", "describe_head",
        "Autoencoder", "pretrain_autoencoder", "swap_head", "find_slots",
        "tap", "list_taps", "features", "extract_features", "FeatureStore", "probe_layers",
    }  # fmt: skip
    assert len(set(headplug.__all__)) == len(headplug.__all__)
    for name in headplug.__all__:
        assert getattr(headplug, name).__doc__, name


def test_nothing_shadows_the_package_adapters_of_pypi() -> None:
    assert not (ROOT / "adapters" / "__init__.py").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True, text=True)
    (built,) = out.glob("*.whl")
    return built


def test_wheel_holds_the_packages_and_the_hydra_plugin_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"headplug-{headplug.__version__}.dist-info"
    assert {n.split("/")[0] for n in names} == {*PACKAGES, "hydra_plugins", info}
    # a namespace package, which other Hydra plugins share
    assert [n for n in names if n.startswith("hydra_plugins/")] == [
        "hydra_plugins/headplug_solo_plugin.py"
    ]
    for package in PACKAGES:
        folder = ROOT / package if package == "headplug" else ROOT / "adapters" / package
        for module in folder.rglob("*.py"):
            assert f"{package}/{module.relative_to(folder).as_posix()}" in names
        assert f"{package}/py.typed" in names
    assert not [n for n in names if n.endswith((".pyc", ".ckpt", ".png")) or "__pycache__" in n]


def test_wheel_declares_version_command_and_adapters(wheel: Path) -> None:
    info = f"headplug-{headplug.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = message_from_string(archive.read(f"{info}/METADATA").decode())
    assert metadata["Version"] == headplug.__version__
    assert "headplug = headplug.cli:main" in points
    assert "headplug-solo = headplug_solo.launch:main" in points
    assert "[headplug.adapters]\nlightly = headplug_lightly:adapter\n" in points
    assert "solo = headplug_solo:adapter" in points


def test_installed_wheel_imports_and_finds_its_adapters(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = """
import json
import headplug, headplug_lightly, headplug_solo
from importlib.metadata import entry_points
from headplug.hosts import adapters
points = [p.name for p in entry_points(group="headplug.adapters")]
files = [m.__file__ for m in (headplug, headplug_lightly, headplug_solo)]
print(json.dumps([files, points, len(adapters())]))
"""
    files, points, count = json.loads(python(code, PYTHONPATH=str(tmp_path)))
    assert all(Path(f).is_relative_to(tmp_path) for f in files)
    assert sorted(points) == ["lightly", "solo"]
    assert count == 2
