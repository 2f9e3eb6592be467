"""Configs at several sizes: loss against compute, and how much compute a config is worth.

    L(C) = E + A C^-alpha                        (Hestness et al. 2017; Kaplan et al. 2020)

Compute-equivalent gain of a row at its compute C: how many times C the first config needs for the
row's loss, by the first one's fit. The noise is that of seeds: they are drawn anew with
replacement, the same ones for all configs and sizes, and everything is fitted again (bootstrap,
Efron 1979). n seeds show a variance too small by (n - 1) / n, which is made good; with three
there are ten different draws, so that the intervals are rough.
"""

import numpy as np

DRAWS = 1000
ALPHAS = np.geomspace(0.01, 2.0, 40)
GOLDEN = (np.sqrt(5) - 1) / 2


def solve(compute, loss, alpha):
    """The best E and A of a fit with given alpha, by least squares, both 0 or more: (..., sizes)
    losses and (...) alphas -> E, A and the squared error, (...) each."""
    x = (compute / compute.max()) ** -alpha[..., None]  # (..., sizes)
    dx, dy = x - x.mean(-1, keepdims=True), loss - loss.mean(-1, keepdims=True)
    A = np.maximum(0, (dx * dy).sum(-1) / np.maximum((dx * dx).sum(-1), 1e-300))
    E = loss.mean(-1) - A * x.mean(-1)
    through = (x * loss).sum(-1) / (x * x).sum(-1)  # the best one with E = 0
    A, E = np.where(E < 0, through, A), np.maximum(E, 0)
    error = ((E[..., None] + A[..., None] * x - loss) ** 2).sum(-1)
    return E, A * compute.max() ** alpha, error


def fit(compute, loss):
    """Least squares: (sizes,) computes, (draws, sizes) losses -> (draws, 3): E, A, alpha.

    For each alpha the rest is a straight line; alpha itself is searched on a grid, then by golden
    section between its neighbours."""
    errors = np.stack([solve(compute, loss, np.full(len(loss), a))[2] for a in ALPHAS])
    at = errors.argmin(0)
    low, high = (np.log(ALPHAS[np.clip(at + d, 0, len(ALPHAS) - 1)]) for d in (-1, 1))
    for _ in range(40):
        a, b = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        left = solve(compute, loss, np.exp(a))[2] < solve(compute, loss, np.exp(b))[2]
        low, high = np.where(left, low, a), np.where(left, b, high)
    alpha = np.exp((low + high) / 2)
    E, A, _ = solve(compute, loss, alpha)
    return np.stack((E, A, alpha), axis=1)


def compute_for(loss, curve):
    """The compute at which curves (draws, 3) have the losses (draws, sizes); infinite at E or
    below, which no compute reaches."""
    E, A, alpha = curve.T[:, :, None]
    above = np.maximum(loss - E, 0)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        return np.where(above > 0, (np.maximum(above, 1e-300) / A) ** (-1 / alpha), np.inf)


def redrawn(losses, seeds, draws, rng):
    """{name: (compute (sizes,), loss (sizes, seeds))} -> {name: (1 + draws, sizes)} mean losses:
    first the observed ones, then those of seeds drawn with replacement."""
    n = len(seeds)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=draws) / n  # (draws, seeds)
    found = {}
    for name, (_, loss) in losses.items():
        mean = loss.mean(1)
        spread = np.sqrt(n / (n - 1)) if n > 1 else 0.0
        found[name] = np.vstack((mean, mean + spread * (counts @ loss.T - mean)))
    return found


def interval(values):
    """(draws, ...) -> the 95% percentile interval, [low, high] of each; None where infinite."""
    low, high = np.quantile(values, [0.025, 0.975], axis=0, method="nearest")
    return [[finite(a), finite(b)] for a, b in zip(np.ravel(low), np.ravel(high), strict=True)]


def finite(x):
    return float(x) if np.isfinite(x) else None


def ladder(losses, draws=DRAWS, seed=0):
    """{name: {compute: {seed: loss}}} with three sizes or more -> {name: {"fit": {"E", "A",
    "alpha", each a "mean" and "ci95"}, "gain": [{"compute", "mean", "ci95"}], "trend"}}.

    The first name's config is the reference. trend: grows, holds or shrinks, by the 95% interval of
    the slope of log gain over log compute. A gain without end is None."""
    sizes = {len(of) for of in losses.values()}
    if min(sizes) < 3:
        raise ValueError("a ladder needs three sizes of each config: with two any curve fits")
    seeds = sorted(set.intersection(*(set(of) for by in losses.values() for of in by.values())))
    if not seeds:
        raise ValueError("the sizes and configs of a ladder have no seed in common")
    measured = {
        name: (np.array(sorted(by)), np.array([[by[c][s] for s in seeds] for c in sorted(by)]))
        for name, by in losses.items()
    }
    means = redrawn(measured, seeds, draws, np.random.default_rng(seed))
    reference = fit(measured[next(iter(losses))][0], means[next(iter(losses))])
    found = {}
    for name, (compute, _) in measured.items():
        curve = fit(compute, means[name])
        numbers = {
            key: {"mean": float(curve[0, i]), "ci95": interval(curve[1:, i])[0]}
            for i, key in enumerate(("E", "A", "alpha"))
        }
        gain, trend = None, None
        if name != next(iter(losses)):
            ratio = compute_for(means[name], reference) / compute  # (1 + draws, sizes)
            bounds = interval(ratio[1:]) if len(seeds) > 1 else [[None, None]] * len(compute)
            gain = [
                {"compute": float(c), "mean": finite(g), "ci95": ci}
                for c, g, ci in zip(compute, ratio[0], bounds, strict=True)
            ]
            trend = trend_of(compute, ratio) if len(seeds) > 1 else None
        found[name] = {"fit": numbers, "gain": gain, "trend": trend}
    return found


def trend_of(compute, ratio):
    """Gains (1 + draws, sizes) -> what they do as compute grows."""
    x = np.log(compute) - np.log(compute).mean()
    y = np.log(np.clip(ratio, 1e-9, 1e9))  # an endless gain still has a direction
    low, high = np.quantile((y[1:] @ x) / (x @ x), [0.025, 0.975])
    return "grows" if low > 0 else "shrinks" if high < 0 else "holds"
