"Intervals and tests: what must hold whatever the numbers."
import math

import numpy as np
import pytest
from scipy import stats as sp

from franken import stats


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_a_share_lies_in_its_interval_and_in_0_1(n):
    for k in range(n + 1):
        score, low, high = stats.share(k, n)
        assert 0 <= low <= score <= high <= 1 and low < high
        mirrored = stats.share(n - k, n)
        assert low == pytest.approx(1 - mirrored[2])

def test_nothing_tried_is_nan(): assert all(math.isnan(x) for x in stats.share(0, 0))

def test_more_questions_narrow_the_interval():
    widths = [stats.share(n // 2, n)[2] - stats.share(n // 2, n)[1] for n in (10, 100, 1000)]
    assert widths == sorted(widths, reverse=True)

def test_mean_ci_is_deterministic_and_leaves_missing_out():
    x = np.random.default_rng(0).normal(size=50)
    assert stats.mean_ci(x) == stats.mean_ci(np.r_[x, math.nan])
    mean, low, high = stats.mean_ci(x)
    assert low < mean < high and mean == pytest.approx(x.mean())
    assert math.isnan(stats.mean_ci([])[0]) and stats.mean_ci([3.])[0] == 3 and math.isnan(stats.mean_ci([3.])[1])

def test_mean_ci_covers():
    hits = 0
    for seed in range(60):
        _, low, high = stats.mean_ci(np.random.default_rng(seed).exponential(size=80), seed)
        hits += low <= 1 <= high
    assert hits >= 50

def test_paired_is_antisymmetric():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, (2, 90))
    there, back = stats.paired(a, b), stats.paired(b, a)
    assert there["gain"] == -back["gain"] and there["p"] == back["p"] and there["low"] == pytest.approx(-back["high"])

def test_paired_is_mcnemar_exact():
    before, after = np.r_[np.zeros(9), np.ones(2), np.ones(30)], np.r_[np.ones(9), np.zeros(2), np.ones(30)]
    assert stats.paired(before, after)["p"] == pytest.approx(sp.binomtest(9, 11).pvalue)

@pytest.mark.parametrize("n", [1, 3, 20, 200])
def test_the_interval_of_a_gain_contains_it(n):
    rng = np.random.default_rng(n)
    for _ in range(50):
        g = stats.paired(rng.integers(0, 2, n), rng.integers(0, 2, n))
        assert -1 <= g["low"] <= g["gain"] <= g["high"] <= 1
    for always in (0, 1):
        g = stats.paired(np.full(n, 1 - always), np.full(n, always))
        assert -1 <= g["low"] <= g["gain"] <= g["high"] <= 1

def test_the_interval_of_a_gain_covers():
    hits = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        before = rng.random(60) < .5
        after = np.where(before, rng.random(60) < .9, rng.random(60) < .4)  # true gain: .5*.9 + .5*.4 - .5 = .15
        g = stats.paired(before, after)
        hits += g["low"] <= .15 <= g["high"]
    assert .92 <= hits / 300 <= .99

def test_paired_of_means_and_of_missing():
    rng = np.random.default_rng(0)
    before = rng.normal(size=40)
    after = before + .5 + .1 * rng.normal(size=40)
    g = stats.paired(before, after)
    assert g["low"] < .5 < g["high"] and g["p"] < .01
    before[0] = math.nan
    assert stats.paired(before, after)["gain"] == pytest.approx((after - before)[1:].mean())
    assert math.isnan(stats.paired([], [])["gain"])
    with pytest.raises(ValueError, match="same questions"): stats.paired([1], [1, 0])

def test_combine_and_conjunctions():
    a, b = stats.share(70, 100), stats.share(60, 100)
    d, e = stats.combine((1, a), (-1, b)), stats.combine((1, b), (-1, a))
    assert d[0] == pytest.approx(.1) and d[1] == pytest.approx(-e[2])
    assert stats.combine((1, a)) == pytest.approx(a)
    both = stats.every(d, a)
    assert both[0] == d[0] and both[1] == d[1] and both[2] > d[2]  # refuting costs more than establishing
    either = stats.some(d, e)
    assert either[0] == d[0] and either[1] < d[1] and either[2] == d[2]
