"""Which pairs of the AE paper's grid a fraction runs."""

from collections import Counter

import pytest
from accuracy.ae_grid import HEADS, LAPTOP, PAPER, pairs

from headplug.compare import Plan
from headplug.errors import OptionError

LEVELS = (3, 3, 4, 2)  # of width, output width, activation, standardisation


def test_the_whole_is_every_pair_once():
    assert len(set(pairs(1))) == len(pairs(1)) == 3 * 3 * 4 * 2


@pytest.mark.parametrize("count", range(1, 73))
def test_a_fraction_covers_every_factor_evenly_and_is_a_part_of_larger_ones(count):
    chosen = pairs(count / 72)
    assert len(chosen) == count
    assert chosen == pairs(1)[:count]
    for values, levels in zip(zip(*chosen, strict=True), LEVELS, strict=True):
        counts = Counter(values)
        assert len(counts) == min(count, levels)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_the_least_fraction_is_one_pair():
    assert pairs(1e-9) == pairs(1)[:1]


@pytest.mark.parametrize("size", [PAPER, LAPTOP])
def test_a_pair_is_both_heads_with_the_same_widths(size):
    for pair in pairs(1):
        plan = Plan(**pair.plan(size, data="torchvision:CIFAR10"))
        ae, mlp = (choice.options for choice in plan.choices)
        assert (ae.pop("name"), mlp.pop("name")) == HEADS
        assert ae.pop("embedding_dim") == mlp.pop("hidden_dim") == pair.width
        assert ae == mlp == {"output_dim": pair.output_dim, "activation": pair.activation}
        assert plan.standardize == pair.standardize
        assert (plan.probes, plan.seeds) == (("linear",), (42,))


def test_the_papers_learning_rate_follows_from_its_batch():
    assert Plan(**pairs(1)[0].plan(PAPER, data="digits")).rate == pytest.approx(1.5)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_what_is_no_fraction_is_refused(fraction):
    with pytest.raises(OptionError, match="at most 1"):
        pairs(fraction)
