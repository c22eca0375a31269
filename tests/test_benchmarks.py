"""What benchmarks measure with, and what is written of their results."""

import measure
import page
import pytest
import torch

CPU = torch.device("cpu")


def test_pages_say_what_the_results_files_say():
    """`python benchmarks/page.py` was run after the last change."""
    texts = page.PAGE.read_text("utf-8"), page.README.read_text("utf-8")
    assert page.written(page.results()) == texts


def test_work_and_memory_are_those_of_the_tensors():
    x, weight = torch.randn(8, 16), torch.randn(32, 16)

    def call():
        for _ in range(3):  # the second frees what the first one made
            z = x @ weight.T
        return z.relu_().view(-1)

    flops, peak = measure.counted(call, CPU)
    assert flops == 3 * 2 * 8 * 16 * 32
    assert peak == 2 * 8 * 32 * 4


def test_work_includes_the_way_back():
    layer, x = torch.nn.Linear(16, 32), torch.randn(8, 16, requires_grad=True)
    flops, _ = measure.counted(lambda: layer(x).sum().backward(), CPU)
    assert flops == 3 * 2 * 8 * 16 * 32


def test_time_is_that_of_the_processor():
    import time

    assert measure.seconds(lambda: time.sleep(0.2), CPU) < 0.1
    a = torch.randn(1000, 1000)
    assert measure.seconds(lambda: [a @ a for _ in range(10)], CPU) > 0.005


def test_inputs_come_in_turn():
    inputs = measure.rotated(lambda: torch.randn(3), count=3)
    found = [next(inputs) for _ in range(6)]
    assert all(a is b for a, b in zip(found[:3], found[3:], strict=True))
    assert len({id(x) for x in found}) == 3


def test_ceilings_are_rates():
    found = measure.ceilings(CPU)
    assert set(found) == {"float32", "bfloat16", "copy"}
    assert all(1e8 < rate < 1e15 for rate in found.values())


@pytest.mark.parametrize("names", [["one"], ["one", "two"], ["test_*"], ["none"]])
def test_cells_of_the_table(names):
    found = {n: {"ratio": 0.5, "ratio_low": 0.4, "ratio_high": 0.6} for n in ("one", "two")}
    found["test_a"], found["test_b"] = {"ratio": 1.0}, {"ratio": 2.0}
    said = {
        "one": "0.50 [0.40, 0.60]",
        "one two": "0.50, 0.50",
        "test_*": "1.00 to 2.00 (2 heads)",
        "none": "",
    }
    assert page.cell(found, names) == said[" ".join(names)]
