"""Downstream accuracy of heads and layers on scikit-learn's digits, through `compare`."""

import pytest

from headplug.compare import Plan, compare


@pytest.mark.benchmark(group="accuracy")
def test_heads_on_digits(benchmark, tmp_path):
    plan = Plan(
        data="digits", backbone="test_resnet", epochs=5, batch_size=128, ae_epochs=30,
        out=str(tmp_path),
    )  # fmt: skip
    results = benchmark.pedantic(lambda: compare(plan, say=lambda line: None), rounds=1)
    benchmark.extra_info["summary"] = results["summary"]
    for entry in results["summary"]["heads"]:
        assert entry["accuracy"] > 0.8  # chance is 0.1
