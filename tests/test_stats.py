"""nanoswitch/stats.py against SciPy's own tests, published tables, formulas written out here and
simulated tables."""

import math

import numpy as np
import pytest
import scipy.stats

from nanoswitch import stats

SIMULATED = 4000  # tables; a share of 5% then has a standard error of 0.34%


def table(values):
    """(configs, seeds) losses -> {name: {seed: loss}}."""
    return {f"c{i}": dict(enumerate(map(float, row))) for i, row in enumerate(values)}


def draw(rng, spreads, seeds=3, effects=0.0):
    """Losses of a table: noise of each config, seeds that differ by much more, and effects."""
    noise = rng.normal(size=(len(spreads), seeds)) * np.asarray(spreads)[:, None]
    return 4 + noise + rng.normal(size=seeds) + np.broadcast_to(effects, len(spreads))[:, None]


# ----------------------------------------------------------------------------- distributions


@pytest.mark.parametrize(
    "df, published",
    # Dunnett 1964 (Biometrics 20), two-sided 5%, for 1, 2, 3 and 4 rows
    [(10, [2.23, 2.57, 2.76, 2.89]), (20, [2.09, 2.38, 2.54, 2.65])],
)
def test_critical_values_are_dunnetts(df, published):
    found = [stats.critical(rows, df) for rows in (1, 2, 3, 4)]
    assert found == pytest.approx(published, abs=0.006)


@pytest.mark.parametrize("rows, n", [(2, 2), (4, 6), (17, 3)])
def test_adjusted_p_is_scipys_dunnett(rows, n):
    """SciPy's is for groups that are not paired: the same t, another df."""
    rng = np.random.default_rng(rows)
    control, *groups = rng.normal(size=(rows + 1, n)) + np.linspace(0, 1.5, rows + 1)[:, None]
    reference = scipy.stats.dunnett(*groups, control=control, rng=np.random.default_rng(0))
    found = stats.largest_t_sf(np.abs(reference.statistic), rows, (rows + 1) * (n - 1))
    assert found == pytest.approx(reference.pvalue, abs=2e-3)


def test_rows_that_do_not_correlate_multiply():
    t = np.array([1.0, 2.0, 3.0])
    once = 1 - 2 * scipy.stats.norm.sf(t)  # at many df
    assert stats.largest_t_sf(t, 5, 10**7, rho=0.0) == pytest.approx(1 - once**5, abs=1e-5)


@pytest.mark.parametrize("df", [1, 2, 8, 40])
def test_one_row_is_students_t(df):
    t = np.array([0.5, 2.0, 10.0])
    assert stats.largest_t_sf(t, 1, df) == pytest.approx(2 * scipy.stats.t.sf(t, df), abs=1e-6)
    one_sided = stats.largest_t_sf(t, 1, df, sides=1)
    assert one_sided == pytest.approx(scipy.stats.t.sf(t, df), abs=1e-6)


def test_power_is_the_noncentral_t():
    for df in (2, 5, 30):
        limit = scipy.stats.t.isf(0.025, df)
        for effect in (0.0, 2.0, 5.0):
            t = scipy.stats.nct(df, effect)
            reference = t.sf(limit) + t.cdf(-limit) if effect else 0.05
            assert stats.power(effect, limit, df, df) == pytest.approx(reference, abs=1e-5)


def test_power_with_the_larger_of_two_noises_is_that_of_a_simulation():
    rng, own, df, limit, effect, n = np.random.default_rng(0), 2, 34, 3.0, 4.5, 400_000
    mine, others = rng.chisquare(own, n), rng.chisquare(df - own, n)
    noise = np.sqrt(np.maximum(mine / own, (mine + others) / df))
    hits = np.abs(effect + rng.normal(size=n)) > limit * noise
    assert stats.power(effect, limit, own, df) == pytest.approx(hits.mean(), abs=0.003)


def test_seeds_for_80_percent_are_about_15_7_squared_spreads():
    """One row and many seeds: n = 2 (1.96 + 0.84)^2 (sigma / effect)^2, Lehr 1992."""
    assert stats.planned_effect(1.0, 1, 1000) == pytest.approx(math.sqrt(15.7 / 1000), rel=0.01)


# ----------------------------------------------------------------------------- a table


def test_holm_by_hand():
    assert stats.holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )
    assert stats.holm(np.array([0.9, 0.8])) == pytest.approx([1, 1])


def test_one_row_is_the_paired_t_test():
    values = [[5.0, 5.2, 4.9, 5.1], [4.9, 5.05, 4.88, 5.0]]
    found = stats.against_first(table(values))
    row, reference = found["rows"]["c1"], scipy.stats.ttest_rel(values[1], values[0])
    interval = reference.confidence_interval(0.95)
    assert row["p"] == row["p_adjusted"] == pytest.approx(reference.pvalue)
    assert row["ci95"] == pytest.approx([interval.low, interval.high])
    assert row["mean"] == pytest.approx(np.subtract(*values[::-1]).mean())


def test_noise_is_pooled_over_all_configs():
    values = draw(np.random.default_rng(3), np.ones(6), effects=np.arange(6) * 2)
    found = stats.against_first(table(values))
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    sigma = math.sqrt((rest**2).sum() / (5 * 2))  # two-way analysis of variance
    assert found["method"] == "dunnett" and found["df"] == 10
    assert found["sd"] == pytest.approx(sigma)
    for i in range(1, 6):
        row, d = found["rows"][f"c{i}"], values[i] - values[0]
        se = max(math.sqrt(2) * sigma, d.std(ddof=1)) / math.sqrt(3)
        assert row["p"] == pytest.approx(2 * scipy.stats.t.sf(abs(d.mean()) / se, 10))
        assert row["p_adjusted"] > row["p"]
        half = (row["ci95"][1] - row["ci95"][0]) / 2
        assert half == pytest.approx(stats.critical(5, 10) * se)
        low, high = row["ci95"]  # verdict, p and interval say the same
        assert (row["p_adjusted"] < 0.05) == (not low <= 0 <= high) == (row["verdict"] == "worse")


def test_unequal_spreads_are_not_pooled():
    values = draw(np.random.default_rng(1), [0.01, 0.01, 0.01, 5.0], seeds=5, effects=[0, 0, 1, 0])
    found = stats.against_first(table(values))
    assert found["method"] == "holm"
    p = np.array([scipy.stats.ttest_rel(values[i], values[0]).pvalue for i in (1, 2, 3)])
    for i, adjusted in enumerate(stats.holm(p), 1):
        row = found["rows"][f"c{i}"]
        assert row["p"] == pytest.approx(p[i - 1])
        assert row["p_adjusted"] == pytest.approx(adjusted)
        paired = scipy.stats.ttest_rel(values[i], values[0]).confidence_interval(1 - 0.05 / 3)
        assert row["ci95"] == pytest.approx([paired.low, paired.high])
    assert found["rows"]["c2"]["verdict"] == "worse"


def test_own_noise_can_be_asked_for():
    values = table(draw(np.random.default_rng(0), np.ones(4)))
    assert stats.against_first(values)["method"] == "dunnett"
    assert stats.against_first(values, pool=False)["method"] == "holm"


def test_means_do_not_choose_the_test():
    rng = np.random.default_rng(5)
    for _ in range(30):
        values = draw(rng, np.linspace(1, 4, 5))
        moved = values + rng.normal(size=(5, 1)) * 100
        a, b = (stats.against_first(table(x)) for x in (values, moved))
        assert a["method"] == b["method"]
        assert a["sd"] == pytest.approx(b["sd"], rel=1e-6)


def test_rows_may_have_other_seeds():
    losses = table(draw(np.random.default_rng(2), np.ones(4), seeds=6))
    losses["c1"] = {s: x for s, x in losses["c1"].items() if s < 3}
    losses["c2"] = {s: x for s, x in losses["c2"].items() if s != 1}
    found = stats.against_first(losses)
    cells, configs, seeds = 6 + 3 + 5 + 6, 4, 6
    assert found["df"] == cells - configs - seeds + 1
    assert [row["n"] for row in found["rows"].values()] == [3, 5, 6]
    d = [losses["c1"][s] - losses["c0"][s] for s in range(3)]
    assert found["rows"]["c1"]["mean"] == pytest.approx(np.mean(d))
    # fewer common seeds correlate less, and ask for more
    few = found["rows"]["c3"]["ci95"]
    se = (few[1] - few[0]) / 2 / stats.critical(3, found["df"], 0.5 * 3 / math.sqrt(15))
    assert se >= math.sqrt(2 / 6) * found["sd"] * (1 - 1e-9)


def test_one_seed_has_no_noise_and_none_in_common_no_difference():
    found = stats.against_first({"a": {1: 5.0}, "b": {1: 4.0}, "c": {2: 3.0}})
    b, c = found["rows"].values()
    assert (b["mean"], b["ci95"], b["p"], b["verdict"]) == (-1.0, [None, None], None, "undecided")
    assert c["mean"] is None and c["verdict"] is None and found["method"] is None


def test_equal_losses_are_no_effect_and_equal_differences_are_one():
    values = np.array([[4.0, 4.2, 4.1]] * 2 + [[5.0, 5.2, 5.1]])
    rows = stats.against_first(table(values), margin=0.01)["rows"]
    assert rows["c1"]["p_adjusted"] == 1 and rows["c1"]["verdict"] == "equal"
    assert rows["c2"]["p_adjusted"] < 1e-9 and rows["c2"]["verdict"] == "worse"


@pytest.mark.parametrize("margin, word", [(0.0, "undecided"), (0.05, "undecided"), (0.2, "equal")])
def test_equal_is_two_one_sided_tests(margin, word):
    d = np.array([0.03, -0.04, 0.05, -0.02])
    row = stats.against_first(table([[4.0] * 4, 4 + d]), margin)["rows"]["c1"]
    below = scipy.stats.ttest_1samp(d, margin, alternative="less").pvalue
    above = scipy.stats.ttest_1samp(d, -margin, alternative="greater").pvalue
    assert row["verdict"] == word == ("equal" if max(below, above) < 0.05 else "undecided")


@pytest.mark.parametrize("rows, pooled", [(1, True), (17, True), (17, False)])
def test_seeds_for_a_width_are_the_fewest(rows, pooled):
    def width(n):
        return 2 * stats.limit_of(rows, n, pooled)[1] * 0.02 / math.sqrt(n)

    n = stats.seeds_for(0.015, 0.02, rows, pooled)
    assert width(n) < 0.015 <= width(n - 1)
    assert stats.seeds_for(1e-9, 0.02, rows, pooled) is None
    values = draw(np.random.default_rng(0), np.full(rows + 1, 0.02))
    row = stats.against_first(table(values), wanted=0.015, pool=pooled)["rows"]["c1"]
    assert row["more_seeds"] > 0
    assert stats.against_first(table(values), wanted=9.0)["rows"]["c1"]["more_seeds"] == 0


# ----------------------------------------------------------------------------- simulated tables


def draw_many(rng, spreads, seeds, effects):
    """(SIMULATED, configs, seeds) losses, as draw() has them."""
    noise = rng.normal(size=(SIMULATED, len(spreads), seeds)) * np.asarray(spreads)[:, None]
    common = rng.normal(size=(SIMULATED, 1, seeds))
    return 4 + noise + common + np.broadcast_to(effects, len(spreads))[:, None]


def found_in(values, margin=0.0, pool=True):
    """Losses (tables, configs, seeds) -> (tables, rows): -1 better, 1 worse, 2 equal, 0 undecided;
    all that against_first() decides, written out for many tables at once."""
    _, configs, seeds = values.shape
    rows, df = configs - 1, (configs - 1) * (seeds - 1)
    rest = values - values.mean(2, keepdims=True) - values.mean(1, keepdims=True)
    rest += values.mean((1, 2), keepdims=True)
    pooled = np.sqrt((rest**2).sum((1, 2)) * 2 / df)[:, None]  # of a difference
    change = values[:, 1:] - values[:, :1]
    mean, own = change.mean(2), change.std(2, ddof=1)
    alike = np.ones((len(values), 1), dtype=bool)
    if rows > 1:  # Bartlett's statistic of `configs` spreads
        each = (rest**2).sum(2) / (seeds - 1)
        n = configs * (seeds - 1)
        b = n * np.log(each.mean(1)) - (seeds - 1) * np.log(each).sum(1)
        b /= 1 + (configs / (seeds - 1) - 1 / n) / (3 * rows)
        alike = (scipy.stats.chi2.sf(b, rows) >= 0.1)[:, None] & pool

    # Holm, step by step: the smallest p at 5% / rows, the next at 5% / (rows - 1)
    def step_down(p):
        order = np.argsort(p, axis=1)
        passed = np.take_along_axis(p, order, 1) < 0.05 / np.arange(rows, 0, -1)
        hits = np.zeros_like(alike & passed)
        np.put_along_axis(hits, order, np.logical_and.accumulate(passed, axis=1), 1)
        return hits

    error = own / math.sqrt(seeds)
    hits = step_down(2 * scipy.stats.t.sf(np.abs(mean) / error, seeds - 1))
    same = step_down(scipy.stats.t.sf((margin - np.abs(mean)) / error, seeds - 1))
    error = np.maximum(pooled, own) / math.sqrt(seeds)
    hits = np.where(alike, np.abs(mean) > stats.critical(rows, df) * error, hits)
    # one-sided, the critical value of all rows by bisection
    low, high = 0.0, 50.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        above = stats.largest_t_sf(middle, rows, df, sides=1)[0] > 0.05
        low, high = (middle, high) if above else (low, middle)
    same = np.where(alike, margin - np.abs(mean) > high * error, same) & (margin > 0)
    return np.where(hits, np.sign(mean), 2 * same)


def at_most(share, wanted):
    """Whether a share of simulated tables is `wanted` or less, two standard errors allowed."""
    return share < wanted + 2 * math.sqrt(wanted * (1 - wanted) / SIMULATED)


@pytest.mark.parametrize("margin, pool", [(0.0, True), (1.5, True), (1.5, False)])
def test_the_simulation_decides_as_the_table_does(margin, pool):
    words = {-1: "better", 1: "worse", 2: "equal", 0: "undecided"}
    spreads, effects = np.linspace(0.1, 0.5, 5), [0, 3, -0.1, -3, 1.5]
    values = draw_many(np.random.default_rng(0), spreads, 3, effects)[:40]
    found = found_in(values, margin, pool)
    for losses, row in zip(values, found, strict=True):
        rows = stats.against_first(table(losses), margin, pool=pool)["rows"]
        assert [r["verdict"] for r in rows.values()] == [words[x] for x in row]
    assert {-1, 1, 0} <= set(found.ravel()) and (2 in found) == bool(margin)


@pytest.mark.parametrize("seeds", [3, 5])
def test_of_17_rows_without_an_effect_5_percent_of_tables_show_one(seeds):
    values = draw_many(np.random.default_rng(seeds), np.ones(18), seeds, 0.0)
    share = found_in(values).any(1).mean()
    assert share > 0.02 and at_most(share, 0.05)
    # each row alone, as the table did before: more than half of all tables show one
    alone = scipy.stats.ttest_rel(values[:, 1:], values[:, :1], axis=2).pvalue < 0.05
    assert alone.any(1).mean() > 0.4


def test_own_noise_holds_5_percent_whatever_the_spreads():
    for spreads in ([5, *[1] * 16, 5], [1, *range(1, 18)]):
        values = draw_many(np.random.default_rng(0), spreads, 3, 0.0)
        assert at_most(found_in(values, pool=False).any(1).mean(), 0.05)


@pytest.mark.parametrize(
    "spreads, seeds, share",
    # what the docstring of stats.py admits
    [([*[1] * 17, 5], 3, 0.09), ([3, *[1] * 17], 3, 0.16), ([3, *[1] * 17], 5, 0.1)],
)
def test_unequal_spreads_cost_no_more_than_is_said(spreads, seeds, share):
    values = draw_many(np.random.default_rng(0), spreads, seeds, 0.0)
    assert at_most(found_in(values).any(1).mean(), share)


@pytest.mark.parametrize("rows, seeds", [(1, 3), (4, 3), (17, 3), (17, 5)])
def test_the_least_effect_is_found_in_80_percent(rows, seeds):
    effect = stats.planned_effect(1.0, rows, seeds)
    effects = np.zeros(rows + 1)
    effects[1] = -effect
    rng, spreads, error = np.random.default_rng(rows), np.ones(rows + 1), 0.4 / SIMULATED**0.5
    share = (found_in(draw_many(rng, spreads, seeds, effects))[:, 0] == -1).mean()
    # spreads that look unequal by chance, 10% of tables, lose their pooled noise
    assert 0.8 - (0.09 if rows > 1 else 0) - 2 * error < share < 0.8 + 2 * error
    half = found_in(draw_many(rng, spreads, seeds, effects / 2))[:, 0] == -1
    assert half.mean() < 0.5


def test_equal_is_seldom_said_of_an_effect_as_large_as_the_margin():
    rng, effects = np.random.default_rng(0), [0.0, *[1.0] * 17]
    values = draw_many(rng, np.full(18, 0.2), 3, effects)
    assert at_most((found_in(values, margin=1.0) == 2).any(1).mean(), 0.05)
    values = draw_many(rng, np.full(18, 0.1), 3, 0.0)
    assert (found_in(values, margin=1.0) == 2).mean() > 0.8
