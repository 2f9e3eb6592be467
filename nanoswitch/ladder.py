"""Configs at several sizes: loss against compute, and how much compute a config is worth.

    L(C) = E + A C^-alpha                        (Hestness et al. 2017; Kaplan et al. 2020)

Compute-equivalent gain of a row: how many times its compute C the first config needs for the row's
loss, by the first one's fit. A fit to more than three sizes misses each by a little. That is taken
off, in proportion between the sizes, so that the curve goes through them all and a config like the
first has a gain of 1. At equal FLOPs, C is the row's own count; at equal tokens, that of the first
at the same size, as if their tokens cost the same. The noise is that of seeds: they are drawn anew
with replacement, the same ones for all configs and sizes, and everything is fitted again
(bootstrap, Efron 1979). n seeds show a variance too small by (n - 1) / n, which is made good. Three
have only ten different draws, whose extremes are no 95% interval: all intervals are the central 68%
of the draws, widened by Student's t of n - 1 degrees of freedom.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from model import GPTConfig
from nanoswitch import cli
from nanoswitch.counts import num_params
from nanoswitch.log import LOSSES
from nanoswitch.progress import markdown, short
from nanoswitch.stats import p_text
from nanoswitch.study import Study, flat, model_of, name_of, read_entries
from nanoswitch.tune import FLAT
from train_gpt2 import TrainConfig

# ----------------------------------------------------------------------------- fits

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


def missed(loss, compute, first, curve):
    """How far curves (draws, 3) are from the first config, at the losses (draws, n): the log of the
    compute (sizes,) that it took over that of the curve. Known at its own losses (draws, sizes);
    between them on straight lines, beyond them as at the last."""
    own = compute_for(first, curve)
    miss = np.where(np.isfinite(own) & (own > 0), np.log(compute / np.maximum(own, 1e-300)), 0.0)
    order = np.argsort(first, axis=1)  # np.interp wants rising ones
    first, miss = (np.take_along_axis(x, order, axis=1) for x in (first, miss))
    return np.stack([np.interp(*each) for each in zip(loss, first, miss, strict=True)])


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


def interval(values, seeds):
    """(1 + draws, sizes), the observed first -> 95% intervals, low and high (sizes,) each; without
    ends for one seed."""
    if seeds < 2:
        return np.full(values.shape[1], -np.inf), np.full(values.shape[1], np.inf)
    from scipy.stats import norm, t  # SciPy only where there is noise to judge

    ends = np.quantile(values[1:], norm.cdf([-1, 1]), axis=0)
    # the farther end for both sides: of two seeds all draws may lie on one side
    width = t.ppf(0.975, seeds - 1) * np.abs(ends - values[0]).max(0)
    return values[0] - width, values[0] + width


MOST = 1e4  # times the compute; beyond it, and below its inverse, is no end


def logs(ratio):
    """Gains -> their logarithms, an endless one too: it still has a direction."""
    return np.log(np.clip(ratio, 1 / MOST, MOST))


def pairs(low, high, most=np.inf):
    """Ends (sizes,) each -> [[low, high]], None where there is no end."""
    ends = zip(low.tolist(), high.tolist(), strict=True)
    return [[x if abs(x) < most else None for x in both] for both in ends]


def finite(x):
    return float(x) if np.isfinite(x) else None


def ladder(losses, draws=DRAWS, seed=0):
    """{name: {compute: {seed: loss}}} -> {name: {"fit": {"E", "A", "alpha", each a "mean" and
    "ci95"}, "equal_flops", "equal_tokens", each {"gain": [{"compute", "mean", "ci95"}], "trend"}}}.

    The first name's config is the reference: it has three sizes or more, and the others at least
    the two smallest; with two, their own fit is None. trend: grows, shrinks or undecided, by the
    95% interval of the slope of log gain over log compute. A gain without end is None."""
    first = next(iter(losses))
    sizes = {name: len(of) for name, of in losses.items()}
    if sizes[first] < 3:
        raise ValueError(f"a ladder needs three sizes of {first}: with two any curve fits")
    if min(sizes.values()) < 2 or max(sizes.values()) > sizes[first]:
        raise ValueError(f"the other configs need two sizes or more, and none that {first} lacks")
    seeds = sorted(set.intersection(*(set(of) for by in losses.values() for of in by.values())))
    if not seeds:
        raise ValueError("the sizes and configs of a ladder have no seed in common")
    measured = {
        name: (np.array(sorted(by)), np.array([[by[c][s] for s in seeds] for c in sorted(by)]))
        for name, by in losses.items()
    }
    means = redrawn(measured, seeds, draws, np.random.default_rng(seed))
    its, found = measured[first][0], {}
    reference = fit(its, means[first])
    for name, (compute, _) in measured.items():
        numbers = None
        if len(compute) > 2:
            curve = fit(compute, means[name])
            numbers = {
                key: {"mean": float(curve[0, i]),
                      "ci95": pairs(*interval(curve[:, [i]], len(seeds)))[0]}
                for i, key in enumerate(("E", "A", "alpha"))
            }  # fmt: skip
        found[name] = {"fit": numbers, "equal_flops": None, "equal_tokens": None}
        if name != first:
            needed = compute_for(means[name], reference)  # (1 + draws, sizes)
            needed *= np.exp(missed(means[name], its, means[first], reference))
            for way, spent in (("equal_flops", compute), ("equal_tokens", its[: len(compute)])):
                found[name][way] = gains(compute, needed / spent, len(seeds))
    return found


def gains(compute, ratio, seeds):
    """Gains (1 + draws, sizes), the observed first -> what ladder() says of them."""
    low, high = interval(logs(ratio), seeds)
    bounds = pairs(*(np.exp(np.clip(end, -700, 700)) for end in (low, high)), MOST)
    return {
        "gain": [
            {"compute": float(c), "mean": finite(g), "ci95": ci}
            for c, g, ci in zip(compute, ratio[0], bounds, strict=True)
        ],
        "trend": trend_of(compute, ratio, seeds) if seeds > 1 else None,
    }


def trend_of(compute, ratio, seeds):
    """Gains (1 + draws, sizes) -> what they do as compute grows."""
    x = np.log(compute) - np.log(compute).mean()
    (low,), (high,) = interval((logs(ratio) @ x / (x @ x))[:, None], seeds)
    nothing = 1e-9  # the slope of gains that are all clipped alike is rounding
    return "grows" if low > nothing else "shrinks" if high < -nothing else "undecided"


# ----------------------------------------------------------------------------- runs

RATES = ("lr", "muon_lr")  # what follows the width


@dataclass
class Rule:
    """A ladder file: these keys, and flags of train_gpt2.py, which hold for every run unless its
    config or the command line has them. `base = "FILE"` takes the keys of another one first."""

    widths: list
    """n_embd of each size, from the smallest; three or more"""
    others: int = 0
    """how many of the sizes, from the smallest, the configs but the first train at: the first one's
    curve needs three, a row two; 0 = all"""
    width_per_layer: float = 32
    """n_layer = n_embd / this"""
    width_per_head: float = 32
    """n_head = n_embd / this"""
    heads: int = 0
    """n_head of every size, so that n_kv_head is one fraction of it; 0 = by width_per_head"""
    tokens_per_parameter: float = 10.0
    """tokens of a size's runs for each parameter of the first config there"""
    warmup_frac: float = 0.02
    """warm-up as a fraction of the steps"""
    tune: str = "lr"
    """the rate that each config searches at the smallest size, lr or muon_lr; "" = as it stands"""
    rate_power: float = -0.5
    """rates at width w: those of the smallest width v, times (w / v) to this power"""
    flags: dict = field(default_factory=dict)

    def __post_init__(self):
        whole = isinstance(self.widths, list) and all(type(w) is int and w > 0 for w in self.widths)
        if not whole or len(self.widths) < 3 or self.widths != sorted(set(self.widths)):
            raise ValueError(f"widths is {self.widths}; give three or more, rising: [96, 128, 192]")
        if self.others not in (0, *range(2, len(self.widths) + 1)):
            raise ValueError(f"others is {self.others}; give 0, or 2 to {len(self.widths)} sizes")
        for name in ("width_per_layer", "width_per_head", "tokens_per_parameter"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.heads < 0:
            raise ValueError(f"heads is {self.heads}; it must be 0 or more")
        name = "heads" if self.heads else "width_per_head"
        per = getattr(self, name)
        for width in self.widths:
            if width % per:
                raise ValueError(f"widths has {width}, no multiple of {name} {per}")
        if not 0 <= self.warmup_frac <= 1:
            raise ValueError(f"warmup_frac is {self.warmup_frac}; it must be from 0 to 1")
        if self.tune not in ("", *RATES):
            raise ValueError(f"tune is '{self.tune}'; a ladder tunes {' or '.join(RATES)}, or ''")

    def sizes(self, width):
        layers = max(1, round(width / self.width_per_layer))
        heads = self.heads or int(width / self.width_per_head)
        return {"n_layer": layers, "n_head": heads, "n_embd": width}


DECIDED = {"n_layer", "n_head", "n_embd", "max_steps", "warmup_steps"}  # by the rule


KINDS = {f.name: type(f.default) for f in dataclasses.fields(Rule) if f.name != "flags"}


def read_table(path, above=()):
    """A ladder file -> its keys, on top of those of its `base`, a file beside it; one line for what
    is wrong with them."""
    table = cli.load_toml(path)
    base, above = table.pop("base", ""), (*above, Path(path).resolve())
    beside = Path(path).parent / str(base)
    if not isinstance(base, str) or (base and beside.resolve() in above):
        raise ValueError(f"{path}: base is {base!r}; it must name another ladder file beside it")
    flags = {f.name for c in (GPTConfig, TrainConfig) for f in dataclasses.fields(c)}
    for name, value in table.items():
        cli.check_name(f"{path}: {name}", name, {*KINDS, *flags, "base"})
        check_free(f"{path}: {name}", name)
        number = KINDS.get(name) in (int, float)
        if number and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{path}: {name} is {value!r}; it must be a number")
        if KINDS.get(name) is int and not isinstance(value, int):
            raise ValueError(f"{path}: {name} is {value!r}; it must be a whole number")
        if name == "tune" and not isinstance(value, str):
            raise ValueError(f"{path}: {name} is {value!r}; it must be a text")
        if name not in KINDS and isinstance(value, list | dict):
            raise ValueError(f"{path}: {name} must be one value")
    return (read_table(beside, above) if base else {}) | table


def read_rule(path):
    """A ladder file -> its Rule."""
    table = read_table(path)
    if "widths" not in table:
        raise ValueError(f"{path} has no widths, such as widths = [96, 128, 192]")
    own = {name: value for name, value in table.items() if name in KINDS}
    held = {name: cli.as_flag(value) for name, value in table.items() if name not in KINDS}
    try:
        return Rule(**own, flags=held)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def check_free(origin, name):
    if name in DECIDED:
        raise ValueError(f"{origin} follows from the ladder's widths and tokens: leave it out")


class Ladder:
    """A Study at each size. Like one, the runs there must be follow from the command and the logs
    alone: the same command goes on where another one stopped."""

    def __init__(self, config, flags):
        for flag in flags:
            check_free(flag.partition("=")[0], flag[2:].partition("=")[0])
        if config.plan:
            config = dataclasses.replace(config, report_only=True)  # trains nothing
        self.config, self.flags, self.rule = config, flags, read_rule(config.ladder)
        if config.tune not in ("", *RATES):
            raise ValueError(f"tune is {config.tune}; a ladder tunes {' or '.join(RATES)}")
        self.tune = config.tune or self.rule.tune
        self.studies = [self.study(width) for width in self.rule.widths]  # refuses what is wrong

    def study(self, width, rates=None):
        """The Study of a width. rates: {name: the smallest width's}, the configs' own without."""
        config, rule = self.config, self.rule
        base = [config.base] if config.base else []
        factor, own, steps = (width / rule.widths[0]) ** rule.rate_power, {}, None
        shared = width in rule.widths[: rule.others or None]
        inputs = config.inputs if shared else config.inputs[:1]
        for path in inputs:
            known = cli.given([*base, path, *self.flags], configs=True)
            argv = {k: v for k, v in rule.flags.items() if k not in known} | rule.sizes(width)
            found = flat([*base, path, *self.flags, *words(argv)])
            if steps is None:  # from the first config on, so that all have the same tokens
                tokens = rule.tokens_per_parameter * num_params(model_of(found))
                steps = max(1, round(tokens / found["total_batch_tokens"]))
            argv |= {"max_steps": steps, "warmup_steps": round(rule.warmup_frac * steps)}
            if "eval_every" not in known | rule.flags:
                argv["eval_every"] = -(-steps // 5)
            own_rates = {key: found[key] for key in RATES} | (rates or {}).get(name_of(path), {})
            argv |= {key: float(f"{rate * factor:.3g}") for key, rate in own_rates.items()}
            own[path] = words(argv)
        out = str(Path(config.out) / f"n_embd_{width}")
        config = dataclasses.replace(config, inputs=inputs, out=out, tune=self.tune, ladder="")
        return Study(config, read_entries(config, self.flags, own))

    @property
    def entries(self):
        return self.studies[0].entries

    @property
    def failed(self):
        return [line for study in self.studies for line in study.failed]

    def climb(self):
        """The searches at the smallest size, the rates of the others by the rule, and its check at
        the next."""
        if not self.tune:
            return
        smallest, *larger = self.studies
        smallest.search()
        best = {name: one.result()["best"] for name, one in smallest.searches.items()}
        rates = {name: {self.tune: rate} for name, rate in best.items() if rate is not None}
        larger = [self.study(width, rates) for width in self.rule.widths[1:]]
        self.studies = [smallest, *larger]
        if self.ready:
            larger[0].search()

    def all_jobs(self):
        return self.jobs()

    @property
    def ready(self):
        return not self.tune or bool(self.studies[0].tuned)

    def jobs(self):
        """From the smallest size on."""
        first, *larger = self.studies
        found = first.jobs(tuned=bool(self.tune))
        return found + [job for study in larger for job in study.jobs()]

    def do(self):
        """Train all that is missing -> the groups of the largest size of all configs that the
        first one has finished, and {}."""
        self.climb()
        if not self.ready:
            failed = self.failed
            raise ValueError(
                failed[0]
                if failed
                else f"the searches in {self.studies[0].out}/tune are not "
                "finished: run the same command without --report_only"
            )
        self.studies[0].train(self.jobs())
        return self.groups()[: self.rule.others or None][: self.top() + 1][-1], {}

    def groups(self):
        """[{name: Runs that have begun}] of each size."""
        first, *larger = self.studies
        return [first.groups(tuned=bool(self.tune)), *(study.groups() for study in larger)]

    def top(self):
        """The place of the largest size that the first config has finished."""
        first = self.studies[0].entries[0].name
        done = [any(run.finished for run in groups[first]) for groups in self.groups()]
        return max((i for i, is_done in enumerate(done) if is_done), default=0)

    def plan(self):
        """What show_plan() asks: [(title, Study, runs and trials of each config)]."""
        self.climb()
        trials = [3 * bool(self.tune)] * 2 + [0] * (len(self.studies) - 2)
        return [
            (f"n_embd {width}", study, self.config.seeds, tries)
            for width, study, tries in zip(self.rule.widths, self.studies, trials, strict=True)
        ]

    def searched(self):
        return None  # its own part of the report says it

    def found(self, results):
        """For results.json. results: the function that makes its dict of {name: finished Runs}."""
        sizes, losses, lagging = [], {}, set()
        first = self.studies[0].entries[0].name
        for width, by in zip(self.rule.widths, self.groups()[: self.top() + 1], strict=False):
            done = {n: [run for run in runs if run.finished] for n, runs in by.items()}
            if not done[first]:
                continue  # nothing to compare with at this size
            lagging |= {name for name, runs in done.items() if not runs}
            found = results({name: runs for name, runs in done.items() if runs})
            sizes.append(self.rule.sizes(width) | {"results": found})
            for name, row in found["configs"].items():
                compute = float(row["flops_per_token"] * row["tokens"])
                final = {run.seed: run.last(found["metric"]) for run in done[name]}
                losses.setdefault(name, {})[compute] = final
        losses = {name: by for name, by in losses.items() if name not in lagging}
        why, curves = None, None
        try:
            curves = ladder(losses)
        except ValueError as error:
            why = str(error)
        check = None
        if self.tune:
            check = self.check()
        rule = dataclasses.asdict(self.rule) | {"tune": self.tune}
        rule["flags"] = rule["flags"] | cli.given(self.flags)
        return {
            "rule": rule, "sizes": sizes,
            "curves": curves, "no_curves": why, "lagging": sorted(lagging),
            "search": self.studies[0].searched(), "check": check,
        }  # fmt: skip

    def check(self):
        """{name: how far the rule's rate at the second size is from the best one there}."""
        found = {}
        for name, one in self.studies[1].searches.items():
            one = one.result()
            best, losses = one["best"], one["losses"]
            known = best is not None and None not in (losses[best], losses[one["base"]])
            found[name] = {
                "rule": one["base"], "best": best, "inside": one["inside"],
                "lost": losses[one["base"]] - losses[best] if known else None,
            }  # fmt: skip
        return found


def words(flags):
    return [f"--{name}={value}" for name, value in flags.items()]


# ----------------------------------------------------------------------------- tables


def gain_text(one):
    """{"mean", "ci95"} of a gain -> text; a gain without end: no compute is enough."""
    if one is None:
        return "-"
    mean, low, high = (
        "no end" if x is None else f"{x:.2f}" if abs(x) < 100 else f"{x:,.0f}"
        for x in (one["mean"], *one["ci95"])
    )  # fmt: skip
    return mean if low == high == "no end" else f"{mean} [{low}, {high}]"


def tables(found):
    """found()'s dict -> [(title, head, rows, notes)]: every size, the trends, the rates."""
    curves, sizes, rule = found["curves"] or {}, found["sizes"], found["rule"]
    metric = sizes[0]["results"]["metric"]
    unit, rate = LOSSES[metric], rule.get("tune") or "lr"
    head = ["config", "n_embd", "parameters", "tokens", "FLOPs", rate, unit, "difference",
            "p adjusted", "verdict", "gain at equal FLOPs", "gain at equal tokens"]  # fmt: skip
    rows = []
    for i, size in enumerate(sizes):
        for name, row in size["results"]["configs"].items():
            one, diff = curves.get(name) or {}, row["diff"]
            ways = [one.get(way) for way in ("equal_flops", "equal_tokens")]
            spread = row[metric]["sd"]
            is_first = name == size["results"]["first"]
            change = "-" if diff["mean"] is None else f"{diff['mean']:+.4f}"
            says = "one seed" if diff["n"] == 1 else diff["verdict"] or "-"
            rows.append([
                name, str(size["n_embd"]), f"{row['parameters']:,}", short(row["tokens"]),
                f"{row['flops_per_token'] * row['tokens']:.2e}", f"{row[rate]:g}",
                f"{row[metric]['mean']:.4f}" + (f" ± {spread:.4f}" if spread is not None else ""),
                *(["-"] * 3 if is_first else [change, p_text(diff["p_adjusted"]), says]),
                *(gain_text(way["gain"][i]) if way else "-" for way in ways),
            ])  # fmt: skip
    first = sizes[0]["results"]["first"]
    heads = rule.get("heads") or f"n_embd / {rule['width_per_head']:g}"
    notes = [
        f"One rule for all sizes: n_layer = n_embd / {rule['width_per_layer']:g}, n_head = "
        f"{heads}, {rule['tokens_per_parameter']:g} tokens for each of {first}'s "
        f"parameters, rates with n_embd to the power {rule['rate_power']:g}. The gain is "
        f"how many times the compute {first} needs for the same loss, by its fit E + A C^-alpha, "
        "led through all its sizes: at equal FLOPs of the row's own count, at equal tokens of the "
        "first's. Intervals hold the noise of seeds, drawn anew, and not that of the curve's form; "
        "a gain beyond the largest size is extrapolated.",
        "Adjusted p and verdicts are those of each size's own table, among its rows.",
    ]
    if absent := set(rule["widths"]) - {size["n_embd"] for size in sizes}:
        listed = ", ".join(map(str, sorted(absent)))
        notes.append(f"{first} has no finished run at n_embd {listed}.")
    if found["no_curves"]:
        notes.append(f"No gains: {found['no_curves']}.")
    if found["lagging"]:
        notes.append(
            f"Not finished at every size, so without a gain: {', '.join(found['lagging'])}."
        )
    made = [("The ladder", head, rows, notes)]
    if curves:
        made.append(trends(curves))
    if found["search"]:
        made.append(rates(found))
    return made


def trends(curves):
    head = ["config", "gain at equal FLOPs", "gain at equal tokens", "E", "alpha"]
    rows = []
    for name, one in curves.items():
        ways = [one[way] and one[way]["trend"] for way in ("equal_flops", "equal_tokens")]
        numbers = [one["fit"] and one["fit"][key] for key in ("E", "alpha")]
        rows.append([name, *(way or "-" for way in ways), *map(gain_text, numbers)])
    note = (
        "What the gain does as compute grows: it grows or shrinks where the 95% interval of its "
        "slope says so, and all else is undecided, which is not the same as lasting. Each row is "
        "judged alone: of twenty gains that do not change, one is said to."
    )
    return "Does it last?", head, rows, [note]


def rates(found):
    """How the rates were found, and how the rule did at the second size."""
    search, check = found["search"], found["check"]
    flag, (small, next_size, *_) = search["flag"], found["rule"]["widths"]
    head = ["config", f"best {flag} at {small}", f"by the rule at {next_size}",
            f"best at {next_size}", "lost by the rule", "check"]  # fmt: skip
    rows = []
    for name, one in search["configs"].items():
        seen = check.get(name)
        best = "-" if one["best"] is None else f"{one['best']:g}"
        if not seen or seen["best"] is None:
            rows.append([name, best, "-", "-", "-", "not finished"])
            continue
        factor = seen["best"] / seen["rule"]
        says = "fits" if 0.7 < factor < 1.42 else f"off by {factor:.2g}"
        lost = "-" if seen["lost"] is None else f"{seen['lost']:.4f}"
        rows.append([name, best, f"{seen['rule']:g}", f"{seen['best']:g}", lost, says])
    note = (
        f"Searches with seed {search['seed']} on {search['frac']:g} of the steps, in factors of "
        f"sqrt 2, widened until the best is inside; of rates within {FLAT:g} nats of it the one "
        f"nearest to the config's own. All runs take the rule's rate: where the best "
        f"at {next_size} is more than one factor away, the gains of larger sizes are those of a "
        f"wrong rate, and rate_power should change."
    )
    if search["frac"] == 1:
        note += " On all of the steps, that seed's run at its own rate is one of the table's too."
    return f"{flag} by the rule", head, rows, [note]


def text(found):
    """results.md's part about a ladder."""
    parts = []
    for title, head, rows, notes in tables(found):
        parts += [f"## {title}", markdown(head, rows), *notes]
    return "\n" + "\n\n".join([*parts, "![ladder](ladder.png)"]) + "\n"


def gain_lines(found):
    """The gains, for a terminal."""
    lines = [f"no gains: {found['no_curves']}"] * bool(found["no_curves"])
    for name, one in (found["curves"] or {}).items():
        if way := one["equal_flops"]:
            gains = ", ".join(map(gain_text, way["gain"]))
            lines.append(
                f"{name} is worth {gains} times the first's compute: {way['trend'] or '-'}"
            )
    return lines
