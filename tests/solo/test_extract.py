"""`headplug extract` from what a run of solo-learn left, with and without solo-learn."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from headplug import FeatureStore

CLONE = os.environ.get("SOLO_LEARN_HOME", "")
ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(not CLONE, reason="set SOLO_LEARN_HOME to a clone of solo-learn main"),
    pytest.mark.slow,
]


@pytest.mark.parametrize("head", ["", "+headplug=reweighting"])
def test_a_run_is_read_whole_with_its_head_or_its_backbone_alone(work: Any, head: str) -> None:
    name = head.rpartition("=")[2] or "stock"
    work.pretrain("simclr", f"run-{name}", *filter(None, [head]))
    ((args, checkpoint),) = work.read(f"run-{name}")
    (folder,) = (work.folder / f"run-{name}").glob("*/*/args.json")
    state = checkpoint["state_dict"]
    options = (
        "--data", "digits", "--limit", "20", "--image-size", "32", "--split", "test", "--json",
    )  # fmt: skip
    here = [work.folder / "shim", ROOT, ROOT / "adapters"]
    with_solo = os.pathsep.join(map(str, [CLONE, *here]))

    def extract(out: str, *arguments: str, **environment: str) -> Any:
        command = ["-m", "headplug.cli", "extract", *arguments, "--out", out, *options]
        return work.run(*command, **environment)

    points = ("--at", "backbone", "--at", "pre_projection", "--at", "projection")
    done = extract(f"whole-{name}", str(folder.parent), *points, PYTHONPATH=with_solo)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert "solo-learn's simclr (resnet18)" in found["model"]
    assert "mean 0.485/0.456/0.406" in found["images"]  # a custom data set, as solo-learn does it
    whole = FeatureStore.open(work.folder / f"whole-{name}" / "test")
    assert torch.equal(whole["backbone"], whole["pre_projection"])
    if head:
        assert args["headplug"]["head"]["name"] == "reweighting"
    else:  # the trained head, by hand
        h = whole["pre_projection"]
        weights = [state[f"projector.{i}.{kind}"] for i in (0, 2) for kind in ("weight", "bias")]
        first = torch.nn.functional.linear(h, *weights[:2]).relu()
        z = torch.nn.functional.linear(first, *weights[2:])
        torch.testing.assert_close(whole["projection"], z, rtol=1e-4, atol=1e-5)

    done = extract(f"alone-{name}", str(work.last(folder.parent)), "--at", "backbone")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "without its heads, because solo-learn is not installed" in done.stdout
    alone = FeatureStore.open(work.folder / f"alone-{name}" / "test")
    torch.testing.assert_close(alone["backbone"], whole["backbone"], rtol=1e-4, atol=1e-5)
