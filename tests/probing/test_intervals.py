from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from scipy.stats import bootstrap as scipys

from headplug.errors import DataError
from headplug.probing.data import Targets
from headplug.probing.intervals import (
    bootstrap,
    bootstrap_scores,
    holm,
    paired_hits,
    paired_scores,
    quantiles,
    score_interval,
    wilson_interval,
)
from headplug.probing.metrics import score

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("hits", "n"), [(0, 7), (7, 7), (93, 100), (5000, 10000)])
def test_wilson_interval_equals_scipys(hits, n):
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson_interval(hits / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_bootstrap_of_one_repeat_is_scipys():
    values = RNG.choice([-1.0, 0.0, 1.0], size=500, p=[0.1, 0.6, 0.3])
    expected = scipys((values,), np.mean, method="percentile", rng=0).confidence_interval
    assert bootstrap(values[None]) == pytest.approx(tuple(expected), abs=0.01)


def test_bootstrap_of_several_repeats_covers_the_spread_of_both():
    samples, repeats = RNG.normal(size=400), RNG.normal(size=(8, 1))
    low, high = bootstrap(repeats + samples)
    alone_low, alone_high = bootstrap((repeats + samples)[:1])
    assert high - low > 3 * (alone_high - alone_low)


def test_intervals_cover_the_truth_as_often_as_they_say():
    covered = 0
    for seed in range(200):
        hits = np.random.default_rng(seed).random((1, 300)) < 0.7
        low, high = bootstrap(hits)
        covered += low <= 0.7 <= high
    assert 0.9 <= covered / 200 <= 0.99


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (5, 0), (3, 9), (120, 80), (2000, 2100)])
def test_p_of_hits_is_mcnemars_exact(won, lost):
    ours = np.repeat([1, 0, 1, 0], [won, lost, 50, 7])
    theirs = np.repeat([0, 1, 1, 0], [won, lost, 50, 7])
    found = paired_hits(ours, theirs)
    expected = binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert found.p == pytest.approx(expected, rel=1e-6)
    assert found.value == pytest.approx((won - lost) / len(ours))
    assert found.low <= found.value <= found.high


def hits(won, lost, same):
    return np.repeat([1, 0, 1], [won, lost, same]), np.repeat([0, 1, 1], [won, lost, same])


@pytest.mark.parametrize(("won", "lost"), [(5, 0), (0, 8), (3, 9), (120, 80), (24000, 26000)])
def test_the_interval_of_hits_holds_clopper_and_pearsons_and_the_bootstraps(won, lost):
    total, count = won + lost, won + lost + 57
    share = binomtest(won, total).proportion_ci(method="exact")
    exact = [(2 * end - 1) * total / count for end in (share.low, share.high)]
    ours, theirs = hits(won, lost, 57)
    drawn = bootstrap(ours[None] - theirs[None])
    found = paired_hits(ours, theirs)
    expected = [min(exact[0], drawn[0]), max(exact[1], drawn[1])]
    assert [found.low, found.high] == pytest.approx(expected, abs=1e-9)


def test_the_interval_of_hits_excludes_none_exactly_where_p_says_so():
    for won in range(25):
        for lost in range(25):
            found = paired_hits(*hits(won, lost, 11))
            assert (found.low > 0 or found.high < 0) == (found.p < 0.05), (won, lost)
            assert -1 <= found.low <= found.value <= found.high <= 1
    assert paired_hits(*hits(0, 0, 11))[:4] == (0, 0, 0, 1)


def test_p_of_several_draws_is_small_for_a_difference_and_rarely_for_none():
    same = RNG.random((5, 400)) < 0.6
    better = same | (RNG.random((5, 400)) < 0.2)
    assert paired_hits(better, same).p < 0.01
    rejected = 0
    for _ in range(60):  # each draw of training samples moves both sides by about 3 points
        chances = 0.6 + 0.03 * RNG.normal(size=(2, 5, 1))
        ours, theirs = (RNG.random((5, 300)) < p for p in chances)
        rejected += paired_hits(ours, theirs).p < 0.05
    assert rejected <= 7


def test_repeats_stand_against_one_repeat_and_the_order_does_not_matter():
    one, few = RNG.random((1, 300)) < 0.6, RNG.random((5, 300)) < 0.6
    there, back = paired_hits(one, few), paired_hits(few, one)
    assert there.p == pytest.approx(back.p)
    assert there.value == pytest.approx(-back.value)
    assert paired_hits(few, np.repeat(one, 5, 0)).p == pytest.approx(back.p)
    with pytest.raises(DataError, match="cannot be paired"):
        paired_hits(few, few[:3])
    with pytest.raises(DataError, match="cannot be paired"):
        paired_hits(few, few[:, :10])


def test_a_rare_label_gives_an_interval_and_a_warning():
    truth = torch.zeros(60, 1).bool()
    truth[:2] = True
    predicted = torch.randn(1, 60, 1, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="resamples"):
        low, high = quantiles(bootstrap_scores(predicted, Targets("multilabel", truth, 1)))
    assert 0 <= low <= high <= 1


def labels_and_scores(count, prevalence, rng):
    truth = rng.random((count, len(prevalence))) < prevalence
    scores = rng.normal(size=truth.shape) + 1.5 * truth
    return torch.from_numpy(scores), torch.from_numpy(truth)


def numbers_and_predictions(count, outputs, rng):
    predicted = rng.exponential(size=(count, len(outputs)))
    errors = rng.normal(size=predicted.shape) * (0.2 + predicted / 2)
    return torch.from_numpy(predicted), torch.from_numpy(predicted + errors)


@pytest.mark.parametrize(
    ("kind", "draw", "columns", "gain"),
    [
        ("multilabel", labels_and_scores, np.array([0.1, 0.15, 0.2, 0.3, 0.4, 0.5]), 0.08),
        ("regression", numbers_and_predictions, np.arange(4), 0.04),
    ],
)
def test_intervals_of_scores_cover_where_percentiles_do_not(kind, draw, columns, gain):
    def measure(count, rng):
        predicted, truth = draw(count, columns, rng)
        targets = Targets(kind, truth, len(columns))
        return targets, predicted[None], float(score(predicted[None], targets)[0])

    _, _, expected = measure(400_000, np.random.default_rng(1))
    covered = np.zeros(2)
    widths, values = [], []
    for seed in range(150):
        targets, predicted, value = measure(60, np.random.default_rng(seed))
        resampled = bootstrap_scores(predicted, targets)[0]
        both = score_interval(value, resampled, targets), quantiles(resampled)
        assert both[0][0] <= value <= both[0][1]
        covered += [low <= expected <= high for low, high in both]
        widths.append(both[0][1] - both[0][0])
        values.append(value)
    ours, percentiles = covered / 150
    assert ours >= 0.9
    assert ours >= percentiles + gain
    assert np.mean(widths) < 1.5 * 3.92 * np.std(values)


def test_an_interval_of_many_samples_is_that_of_percentiles():
    predicted, truth = labels_and_scores(4000, np.array([0.3]), np.random.default_rng(0))
    numbers = Targets("regression", truth.double(), 1)
    for targets in (Targets("multilabel", truth, 1), numbers):
        predicted = predicted / 4 + 0.1
        value = float(score(predicted[None], targets)[0])
        resampled = bootstrap_scores(predicted[None], targets)[0]
        found = score_interval(value, resampled, targets)
        assert found == pytest.approx(quantiles(resampled), abs=0.004)


def test_an_interval_of_what_is_all_right_is_no_point_for_labels():
    truth = torch.arange(40)[:, None] < 10
    targets = Targets("multilabel", truth, 1)
    low, high = score_interval(1.0, [1.0] * 500, targets)
    assert high == 1.0
    assert low < wilson_interval(1.0, 10)[0]
    assert score_interval(1.0, [1.0] * 9, Targets("regression", truth.double(), 1))[1] == 1.0


def test_paired_scores_are_surer_than_two_intervals():
    truth = torch.randn(300, 1, generator=torch.Generator().manual_seed(0)).double()
    noise = torch.randn(300, 1, generator=torch.Generator().manual_seed(1)).double()
    targets = Targets("regression", truth, 1)
    both = torch.stack([truth + noise, truth + 1.1 * noise])
    found = paired_scores(both, targets)
    one, two = (quantiles(v) for v in bootstrap_scores(both, targets).numpy())
    assert one[0] < two[1]  # the intervals overlap
    assert found.low > 0
    assert found.p < 0.01
    nothing = paired_scores(both[:1].repeat(2, 1, 1), targets)
    assert nothing.value == 0
    assert nothing.p == 1


def test_a_difference_of_scores_stays_within_what_is_possible():
    truth = torch.tensor([[True, False, True]] * 3 + [[False, True, False]] * 9)
    both = torch.stack([truth.double(), 1 - truth.double()])
    both += 0.8 * torch.rand(both.shape, generator=torch.Generator().manual_seed(0))
    found = paired_scores(both, Targets("multilabel", truth, 3))
    assert 0.5 < found.value < found.high == 1.0
    assert paired_scores(both.flip(0), Targets("multilabel", truth, 3)).low == -1.0
    numbers = Targets("regression", truth.double(), 3)
    assert paired_scores(both, numbers).high > 1


def test_holm_is_the_definition():
    ps = RNG.random(20) ** 4
    order = np.argsort(ps)
    expected = np.empty(20)
    expected[order] = np.maximum.accumulate(np.minimum(1, ps[order] * np.arange(20, 0, -1)))
    assert holm(ps.tolist()) == pytest.approx(expected.tolist())


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    paired_hits([1, 0, 1], [0, 0, 1])
    truth = torch.arange(6.0)[:, None]
    bootstrap_scores(truth[None], Targets("regression", truth, 1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
