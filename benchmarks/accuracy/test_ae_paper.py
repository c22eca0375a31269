"""The AE paper's CIFAR-10 grid: the frozen AE embedding against an MLP of the same widths.

`--data` names CIFAR-10, `--fraction` how much of the grid's 72 pairs is run. With `--full` all is
of the paper's size: 144 runs of a ResNet-34 from ImageNet's weights if the fraction is 1. These
stay in runs/ae-paper, where an interrupted grid, or a larger fraction, goes on.
"""

import re
from pathlib import Path
from statistics import fmean

import pytest
from accuracy.ae_grid import HEADS, LAPTOP, PAPER, RECORDED, pairs

from headplug.compare.backbones import build_backbone
from headplug.errors import OptionError

DIFFERS = (
    "unlike the paper's code: the last epoch is taken, not the best by validation loss; images are "
    "standardised by all training pixels; the autoencoder holds out a tenth of the images"
)


@pytest.mark.benchmark(group="accuracy")
@pytest.mark.timeout(0)
def test_ae_embedding_against_the_papers_default(
    pytestconfig, full, compared, recorded, benchmark, tmp_path
):
    data = pytestconfig.getoption("data")
    if not re.search(r"cifar[-_]?10/?$", data, re.IGNORECASE):
        pytest.skip("the paper's grid is of CIFAR-10: add --data torchvision:CIFAR10 or a folder")
    size = PAPER if full else {**LAPTOP, "pretrained": weights_at_hand(LAPTOP["backbone"])}
    chosen = pairs(pytestconfig.getoption("fraction"))
    folder = Path("runs/ae-paper") if full else tmp_path
    plans = [
        pair.plan(size, data=data, out=str(folder / f"standardize-{pair.standardize}"))
        for pair in chosen
    ]
    runs, cells = [], []
    for number, results in enumerate(compared(*plans)):
        pair = chosen[number]
        for head in HEADS:
            run = next(r for r in results["runs"][:2] if r["head"].startswith(f"{head}["))
            (row,) = (row for row in run["taps"] if row["tap"] == "pre_projection")
            runs.append({**run, "head": head, "seed": number})  # a pair takes the part of a seed
            cells.append({"head": head, **pair._asdict(), "accuracy": row["accuracy"]})
    rows = {row["head"]: row for row in recorded(runs, "simclr_plain", ["pre_projection"])}
    of = {head: [c["accuracy"] for c in cells if c["head"] == head] for head in HEADS}
    for head in HEADS:
        rows[head]["max"] = max(of[head])
    info = benchmark.extra_info
    whole = full and len(chosen) == 72 and info["images"] == PAPER["limit"]
    info.update(
        pairs=f"{len(chosen)} of 72",
        size=(
            f"images {info['images']:,} of {PAPER['limit']:,}, epochs {size['epochs']} of "
            f"{PAPER['epochs']}, batch {size['batch_size']:,} of {PAPER['batch_size']:,}, backbone "
            f"{size['backbone']} of {PAPER['backbone']}, weights: "
            f"{'ImageNet' if size['pretrained'] else 'random, not ImageNet'}"
        ),
        tested_on=f"{runs[0]['taps'][0]['n_test']:,} of {info['test_images']:,} test images",
        cells=cells,
        paper={head: dict(figures) for head, figures in RECORDED.items()},
        paper_gain=RECORDED["ae_embedding"]["mean"] - RECORDED["simclr_plain"]["mean"],
        comparable=DIFFERS
        if whole
        else f"no: the paper's means are of its own size and of all pairs; {DIFFERS}",
    )
    assert len(runs) == 2 * len(chosen)
    for head in HEADS:
        assert fmean(of[head]) == pytest.approx(rows[head]["accuracy"])
        assert fmean(of[head]) > 1 / info["classes"]


def weights_at_hand(backbone):
    """Whether ImageNet's weights can be had; a laptop without a network does without."""
    try:
        build_backbone(backbone, (3, 32, 32), "default", pretrained=True)
    except OptionError:
        return False
    return True
