"""Downstream accuracy of heads and layers, through `compare`.

On scikit-learn's digits, or on what `--data` names, e.g. `torchvision:CIFAR10` or a folder of
parquet files; `--seeds N` repeats all. A laptop trains timm's `test_resnet` for 10 epochs on 4,000
images, or 5 on 500 digits; with `--full` a GPU trains a ResNet-18 for 100 epochs on all.
"""

import pytest

pytestmark = [pytest.mark.benchmark(group="accuracy"), pytest.mark.timeout(0)]
HEADS = ("simclr", "ae_embedding", "reweighting")
KAPPAS = (1.0, 1.01, 1.02, 1.05, 1.1, 1.2)  # 1 is no weighting; arXiv 2403.11391 has the others


def test_heads_at_every_layer(sized, compared, recorded, benchmark):
    (results,) = compared({**sized, "heads": HEADS, "probes": ("knn", "linear")})
    rows = recorded(results["runs"], results["summary"]["default_head"])
    benchmark.extra_info["best"] = results["summary"]["best"]
    assert {row["head"] for row in rows} == set(HEADS)
    above_chance(rows, results)


def test_reweighting_by_kappa(sized, compared, recorded):
    """By neighbours before and after it: linear probes standardise and see no fixed weights."""
    heads = ("simclr", "reweighting")
    (results,) = compared({**sized, "heads": heads, "kappas": KAPPAS, "probes": ("knn",)})
    default = results["summary"]["default_head"]
    rows = recorded(results["runs"], default, ("pre_projection", "projection"))
    kappas = {run["head"]: run["head_config"].get("kappa") for run in results["runs"]}
    for row in rows:
        row["kappa"] = kappas[row["head"]]
    assert set(kappas.values()) == {None, *KAPPAS}
    above_chance(rows, results)


def above_chance(rows, results):
    """Before every head, features tell the classes apart."""
    for row in rows:
        if row["tap"] == "pre_projection":
            assert row["low"] > 1 / results["data"]["classes"], row
