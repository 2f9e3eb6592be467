"""What a table of losses shows: every config against the first, over seeds.

The model: loss of config i with seed s = config + seed + noise, the noise independent with one
spread sigma. A seed gives all configs the same tokens and the same shared initial weights, so its
own effect falls out of a paired difference (a randomised block design).

    sigma^2 = squared residuals of that fit / df,  df = cells - configs - seeds + 1
    se_i = larger of sigma sqrt(2) and the spread of row i's own differences / sqrt(n_i seeds)
    t_i = mean difference of row i / se_i

Rows share the first config, hence correlate by 1/2: Dunnett's test (1955, JASA 50) judges the
largest of all |t_i|, so that a table without any effect shows one in 5% of the cases, however many
rows it has. scipy.stats.dunnett is that test for groups that are not paired; its random integration
would also give other digits every time. Here the same integral is a sum over fixed points.

Dunnett needs one spread. Where Bartlett's test (1937) of the residuals refuses it at 10%, or the
user does, each row has its own noise instead: Student's paired t-tests with Holm's correction
(1979, Scand. J. Statist. 6), and Bonferroni's intervals, a little wider than Holm's p asks for. The
residuals hold nothing of the mean differences, so that the result does not choose the test. Three
seeds cannot prove that spreads are equal, hence se_i's "larger of": of 17 rows without an effect,
one of them five times as noisy, a table shows one in 9% of the cases instead of 15%. Against a
first config three times as noisy as all others nothing but own noise helps: 16%, with 5 seeds 10%.
"""

import functools
import math
import statistics

import numpy as np

LEVEL = 0.05  # of the whole table
POWER = 0.8
UNEQUAL = 0.1  # a p of Bartlett's test below which spreads are not pooled
UNKNOWN = {  # about a row without a seed in common with the first
    "mean": None, "ci95": [None, None], "p": None, "p_adjusted": None, "verdict": None,
    "least_effect": None, "n": 0, "more_seeds": None,
}  # fmt: skip

# ----------------------------------------------------------------------------- the distribution


@functools.lru_cache(maxsize=64)
def spreads(df):
    """Points s and their weights, (128,) each: the estimated spread / the true one, whose square
    is chi^2 / df."""
    from scipy.stats import chi2  # SciPy only where there is noise to judge

    x, weights = np.polynomial.legendre.leggauss(128)
    v, weights = (x + 1) / 2, weights / 2
    u = v * v * (3 - 2 * v)  # denser at both ends, where the quantile is steep
    return np.sqrt(chi2.ppf(u, df) / df), weights * 6 * v * (1 - v)


def largest_t_sf(t, rows, df, rho=0.5, sides=2):
    """P(largest of `rows` t-values of df degrees of freedom, each two correlated by rho, > t), of
    their sizes with two sides; t (n,) -> (n,).

    t_i = (sqrt(rho) z + sqrt(1 - rho) e_i) / s with one z and one s for all rows, and so
    P(all <= t) = E_s E_z [Phi((t s - sqrt(rho) z) / sqrt(1 - rho)) - ...]^rows (Dunnett 1955)."""
    from scipy.special import ndtr

    s, s_weights = spreads(df)
    z, z_weights = np.polynomial.hermite_e.hermegauss(48)
    z_weights = z_weights / z_weights.sum()
    edge = np.atleast_1d(t)[:, None, None] * s[:, None]  # (n, s, 1)
    shift, scale = math.sqrt(rho) * z, math.sqrt(1 - rho)
    inside = ndtr((edge - shift) / scale)  # (n, s, z)
    if sides == 2:
        inside = inside - ndtr((-edge - shift) / scale)
    return np.clip(1 - (inside**rows @ z_weights) @ s_weights, 0, 1)


@functools.lru_cache(maxsize=512)
def critical(rows, df, rho=0.5, level=LEVEL):
    """The t that the largest of all rows' sizes passes by chance with probability `level`."""
    from scipy.optimize import brentq
    from scipy.stats import t

    low, high = t.isf(level / 2, df), t.isf(level / 2 / rows, df)  # one row; Bonferroni
    if rows == 1:
        return float(low)
    return float(brentq(lambda x: largest_t_sf(x, rows, df, rho)[0] - level, 0.99 * low, high))


def bonferroni(rows, df, level=LEVEL):
    from scipy.stats import t

    return float(t.isf(level / 2 / rows, df))


def power(effect, limit, own, df):
    """P(|t| > limit) of a row whose true difference is `effect` true standard errors.

    Of the df of the pooled noise `own` are the row's, and its error is the larger of the two:
    own s^2 ~ chi^2, df S^2 = own s^2 + chi^2 of the others, and t = (effect + z) / max(s, S)."""
    from scipy.special import ndtr

    noise, weights = np.zeros(1), np.ones(1)
    if own:
        noise, weights = spreads(own)
    if df > own:
        other, more = spreads(df - own)
        pooled = (own * noise[:, None] ** 2 + (df - own) * other**2) / df
        noise = np.maximum(noise[:, None], np.sqrt(pooled)).ravel()
        weights = (weights[:, None] * more).ravel()
    return float((ndtr(effect - limit * noise) + ndtr(-effect - limit * noise)) @ weights)


@functools.lru_cache(maxsize=512)
def least_errors(limit, own, df, wanted=POWER):
    """How many standard errors a difference must have to be found with probability `wanted`."""
    from scipy.optimize import brentq

    return float(brentq(lambda x: power(x, limit, own, df) - wanted, 0, 100 + 100 * limit))


# ----------------------------------------------------------------------------- plans


def limit_of(rows, seeds, pooled=True):
    """-> df and critical t of a table of `rows` rows beside the first, all with `seeds` seeds."""
    df = rows * (seeds - 1) if pooled else seeds - 1
    return df, (critical if pooled else bonferroni)(rows, df)


def planned_effect(sd, rows, seeds, pooled=True):
    """The least effect that a table will show, from the spread sd of one config over seeds."""
    df, limit = limit_of(rows, seeds, pooled)
    return sd * math.sqrt(2 / seeds) * least_errors(limit, seeds - 1, df)


def seeds_for(width, spread, rows, pooled=True, most=10_000):
    """The fewest seeds with which an interval is narrower than `width`, None beyond `most`.

    spread: that of one paired difference; for one sigma it is sqrt(2) sigma."""

    def narrow(n):
        return 2 * limit_of(rows, n, pooled)[1] * spread / math.sqrt(n) < width

    if not narrow(most):
        return None
    low, high = 1, most
    while high - low > 1:  # the width falls with every seed
        middle = (low + high) // 2
        low, high = (low, middle) if narrow(middle) else (middle, high)
    return high


# ----------------------------------------------------------------------------- a table


def shared(ours, first):
    """Losses {seed: loss} of a config and of the first -> (n,) differences, by seed."""
    return np.array([ours[seed] - first[seed] for seed in sorted(ours.keys() & first.keys())])


def noise(losses):
    """{name: {seed: loss}} -> sigma of the additive fit, its df, and whether the spreads of the
    configs allow to pool them; (None, 0, False) without a degree of freedom."""
    from scipy.stats import bartlett

    seeds = [seed for of in losses.values() for seed in of]
    seeds = sorted({seed for seed in seeds if seeds.count(seed) > 1})  # one alone says nothing
    cells = [
        (i, seeds.index(seed), value)
        for i, of in enumerate(losses.values()) for seed, value in of.items() if seed in seeds
    ]  # fmt: skip
    row, column, value = (np.array(x) for x in zip(*cells, strict=True))
    design = np.hstack((np.eye(len(losses))[row], np.eye(len(seeds))[column]))
    fit, _, rank, _ = np.linalg.lstsq(design, value, rcond=None)
    df = len(cells) - int(rank)
    if not df:
        return None, 0, False
    rest = value - design @ fit
    rest[np.abs(rest) < 1e-12 * np.abs(value).max()] = 0.0  # rounding is no noise
    sigma = math.sqrt(float(rest @ rest) / df)
    groups = [rest[row == i] for i in range(len(losses)) if (row == i).sum() > 1]
    if len(losses) == 2 or not sigma:  # both have the same residuals: nothing to choose
        return sigma, df, True
    if any(not group.any() for group in groups):
        return sigma, df, False
    return sigma, df, len(groups) < 2 or bool(bartlett(*groups).pvalue >= UNEQUAL)


def p_text(p):
    """A p-value for a table. Below 0.001 digits tell nothing more, and the last are rounding."""
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.2g}"


def holm(p):
    """p-values (n,) -> Holm's adjusted ones."""
    order, adjusted, highest = np.argsort(p), np.empty(len(p)), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, float(p[i]) * (len(p) - place)))
        adjusted[i] = highest
    return adjusted


def against_first(losses, margin=0.0, wanted=0.0, pool=True):
    """{name: {seed: loss}}, the first name's compared with -> {"method", "sd", "df", "rows":
    {name: {"mean", "ci95", "p", "p_adjusted", "verdict", "least_effect", "n", "more_seeds"}}}.

    p: the row's alone; p_adjusted, ci95 and least_effect (power 0.8): among all rows. more_seeds:
    how many more it takes until ci95 is narrower than `wanted`. None is what cannot be known.
    pool: whether the noise may be; else each row has its own.

    verdict: better or worse where p_adjusted is below 5%; else equal where two one-sided tests, at
    5% over all rows, place the difference within `margin` nats of 0 on both sides (Schuirmann
    1987); else undecided."""
    (_, first), *others = losses.items()
    found = {name: dict(UNKNOWN) for name, _ in others}
    result = {"method": None, "sd": None, "df": 0, "rows": found}
    changes = {name: shared(ours, first) for name, ours in others}
    changes = {name: d for name, d in changes.items() if len(d)}
    for name, d in changes.items():
        found[name] |= {"mean": float(d.mean()), "n": len(d), "verdict": "undecided"}
    if not any(len(d) > 1 for d in changes.values()):
        return result

    kept = {name: of for name, of in losses.items() if of is first or name in changes}
    sigma, df, alike = noise(kept)
    pooled = alike and (pool or len(changes) == 1)  # one row alone has the same noise either way
    if not pooled:
        changes = {name: d for name, d in changes.items() if len(d) > 1}
    rows, n = len(changes), np.array([len(d) for d in changes.values()])
    mean = np.array([d.mean() for d in changes.values()])
    smallest = 1e-12 * max(map(abs, first.values()))  # rounding is no noise
    own = [statistics.stdev(d) if len(d) > 1 else 0.0 for d in changes.values()]
    spread = np.array([x if x > smallest else 0.0 for x in own])  # of one paired difference
    if pooled:
        spread, dfs, rho = np.maximum(spread, math.sqrt(2) * sigma), np.full(rows, df), 0.5
        if rows > 1:  # rows of other seeds correlate less; the least is on the safe side
            rho = min_correlation([set(losses[name]) & set(first) for name in changes])
        limits = np.full(rows, critical(rows, df, rho))
    else:
        dfs, limits = n - 1, np.array([bonferroni(rows, int(k) - 1) for k in n])
    se = spread / np.sqrt(n)
    p, adjusted = two_sided(mean, se, dfs, rows, rho if pooled else None)
    same = equal(mean, se, dfs, rows, rho if pooled else None, margin)
    for i, name in enumerate(changes):
        verdict = "undecided"
        if adjusted[i] < LEVEL:
            verdict = "better" if mean[i] < 0 else "worse"
        elif same[i] < LEVEL:
            verdict = "equal"
        more = seeds_for(wanted, float(spread[i]), rows, pooled) if wanted else None
        found[name] |= {
            "ci95": [float(mean[i] - limits[i] * se[i]), float(mean[i] + limits[i] * se[i])],
            "p": float(p[i]), "p_adjusted": float(adjusted[i]), "verdict": verdict,
            "least_effect": float(se[i]) * least_errors(limits[i], int(n[i]) - 1, int(dfs[i])),
            "more_seeds": more and max(0, more - int(n[i])),
        }  # fmt: skip
    method = "dunnett" if pooled else "holm"
    return result | {"method": method, "sd": sigma, "df": df if pooled else int(dfs.min())}


def min_correlation(seeds):
    """The smallest correlation of two rows' mean differences, from the seeds of each: with m in
    common, cov = sigma^2 m / (n_i n_j), var_i = 2 sigma^2 / n_i."""
    pairs = [(a, b) for i, a in enumerate(seeds) for b in seeds[:i]]
    return min(0.5 * len(a & b) / math.sqrt(len(a) * len(b)) for a, b in pairs)


def two_sided(mean, se, dfs, rows, rho):
    """(rows,) means and errors -> p of each alone and adjusted; rho None: by Holm."""
    from scipy.stats import t

    size = np.divide(np.abs(mean), se, out=np.where(mean == 0, 0.0, np.inf), where=se > 0)
    p = 2 * t.sf(size, dfs)
    if rho is None or rows == 1:
        return p, holm(p)
    return p, np.maximum(p, largest_t_sf(np.minimum(size, 1e9), rows, int(dfs[0]), rho))


def equal(mean, se, dfs, rows, rho, margin):
    """-> adjusted p of "the difference is `margin` or more": the larger of two one-sided tests."""
    from scipy.stats import t

    room = margin - np.abs(mean)
    size = np.divide(room, se, out=np.where(room > 0, np.inf, -np.inf), where=se > 0)
    p = t.sf(size, dfs)
    if not margin:
        return np.ones(len(p))
    if rho is None or rows == 1:
        return holm(p)
    return np.maximum(p, largest_t_sf(np.clip(size, -1e9, 1e9), rows, int(dfs[0]), rho, sides=1))
