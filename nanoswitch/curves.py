"""Curves of runs, from their logs."""

import contextlib
import io
import statistics

import numpy as np

from nanoswitch.counts import flops_per_token, on_meta
from nanoswitch.files import write_beside
from nanoswitch.log import read_run

# acc_norm of all 10,042 items by the completion protocol; GPT-3's is its paper's, for 124M
HELLASWAG_MARKS = {"GPT-2 124M": 0.2955, "GPT-3 124M": 0.337}
PIP = "pip install matplotlib"


def draw_run(folder):
    """Draw a run's curves so far into its curve.png; nothing where matplotlib is missing."""
    with contextlib.suppress(ModuleNotFoundError):
        draw({folder.name: [read_run(folder)]}, folder / "curve.png")


def mean_curve(runs, key):
    """Steps that all Runs have, and the mean of their values there."""
    steps = sorted(set.intersection(*(set(run.values.get(key, {})) for run in runs)))
    return steps, [statistics.fmean(run.values[key][step] for run in runs) for step in steps]


def bits_per_nat(groups):
    """The bits per byte of a nat per token, where all Runs have the same; else None: other
    vocabularies, or logs from before there were any."""
    ratios = set()
    for run in [run for runs in groups for run in runs]:
        bpb, loss = run.last("val_bpb"), run.last("val_loss")
        ratios.add(round(bpb / loss, 9) if bpb and loss else None)
    return ratios.pop() if len(ratios) == 1 else None


def draw(groups, path, metric="val_loss"):
    """{name: Runs} -> curves of the metric, val_loss or val_bpb, against tokens, FLOPs and seconds,
    and of HellaSwag against tokens, means over seeds with their range; one picture per suffix of
    the path's."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"drawing needs matplotlib: {PIP}") from None
    from matplotlib.figure import Figure

    found = [name for name, runs in groups.items() if runs[0].curve(metric)[0]]
    unit = "validation loss (nats)" if metric == "val_loss" else "validation: bits per byte"
    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    (tokens, flops), (seconds, score) = figure.subplots(2, 2)
    for name in found:
        runs, batch = groups[name], groups[name][0].config["total_batch_tokens"]
        steps, _ = mean_curve(runs, metric)
        spent = np.mean([run.seconds(steps) for run in runs], axis=0)
        x = np.array(steps) * batch
        plot(tokens, x / 1e6, runs, metric, name)
        plot(flops, x * flops_per_token(on_meta(runs[0].model_config)), runs, metric, name)
        plot(seconds, spent, runs, metric, name)
        steps, _ = mean_curve(runs, "hellaswag_acc_norm")
        plot(score, np.array(steps) * batch / 1e6, runs, "hellaswag_acc_norm", name)
        if len(groups) == 1:
            steps, losses = runs[0].curve("train_loss")
            tokens.plot(np.array(steps) * batch / 1e6, losses, "grey", alpha=0.4, lw=0.7, zorder=0)
    for name, value in (HELLASWAG_MARKS | {"chance": 0.25}).items():
        score.axhline(value, linestyle=":" if name == "chance" else "--", color="grey", lw=0.8)
        score.text(0.02, value, name, transform=score.get_yaxis_transform(), va="bottom", size=8)
    for axis, label in ((tokens, "million tokens"), (flops, "FLOPs"), (seconds, "seconds")):
        axis.set(xlabel=label, ylabel=unit)
        low = [min(mean_curve(groups[name], metric)[1]) for name in found]
        high = [mean_curve(groups[name], metric)[1] for name in found]
        knee = max((values[len(values) // 4] for values in high), default=1)
        if low and knee > min(low):  # the first quarter falls too far to see the rest beside it
            axis.set_ylim(min(low) - 0.05 * (knee - min(low)), knee + 0.05 * (knee - min(low)))
        if (ratio := bits_per_nat(groups[name] for name in found)) and metric == "val_loss":
            scale = (lambda loss: loss * ratio, lambda bits: bits / ratio)
            axis.secondary_yaxis("right", functions=scale).set_ylabel("bits per byte")
        axis.locator_params(axis="x", nbins=6)  # more would overlap
    score.set(xlabel="million tokens", ylabel="HellaSwag acc_norm")
    scored = (run.curve("hellaswag_acc_norm")[0] for runs in groups.values() for run in runs)
    score.set_visible(any(scored))  # else there is nothing to see
    if found:
        tokens.legend(fontsize=8)
    save(figure, path)


def save(figure, path):
    """Write a figure as .png and .svg, or as what the path's suffix says."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "nanoswitch"}):  # the same runs, the same file
        for suffix, extra in ((".png", {"dpi": 110}), (".svg", {"metadata": {"Date": None}})):
            if not path.suffix or path.suffix == suffix:
                picture = io.BytesIO()
                figure.savefig(picture, format=suffix[1:], **extra)
                with write_beside(str(path.with_suffix(suffix))) as file:
                    file.write(picture.getvalue())


def draw_searches(searched, path):
    """results.json's "search" -> loss against the value of the tuned flag, a line a config."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, one in searched["configs"].items():
        known = [(value, loss) for value, loss in one["losses"].items() if loss is not None]
        (line,) = axis.plot(
            *zip(*known, strict=True) if known else ([], []), marker=".", label=name
        )
        if one["best"] is not None and one["losses"][one["best"]] is not None:
            axis.plot(one["best"], one["losses"][one["best"]], "o", color=line.get_color())
    axis.set(xscale="log", xlabel=searched["flag"], ylabel="validation loss (nats)")
    axis.legend(fontsize=8)
    save(figure, path)


def draw_ladder(found, path):
    """results.json's "ladder" -> loss against compute with the fitted curves, and the gain at equal
    FLOPs against compute with its intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure, curves = Figure(figsize=(11, 4), layout="constrained"), found["curves"] or {}
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    tables, shown = [size["results"] for size in found["sizes"]], [1.0]
    metric = tables[0]["metric"]
    for i, name in enumerate(tables[0]["configs"]):
        color = f"C{i % 10}"
        rows = [table["configs"][name] for table in tables if name in table["configs"]]
        compute = np.array([float(row["flops_per_token"] * row["tokens"]) for row in rows])
        mean = np.array([row[metric]["mean"] for row in rows])
        spread = [row[metric]["sd"] or 0.0 for row in rows]
        left.errorbar(compute, mean, yerr=spread, fmt="o", ms=4, color=color, label=name)
        if name in curves and curves[name]["fit"]:
            fit = {key: curves[name]["fit"][key]["mean"] for key in ("E", "A", "alpha")}
            x = np.geomspace(compute.min(), compute.max(), 100)
            left.plot(x, fit["E"] + fit["A"] * x ** -fit["alpha"], color=color, lw=1)
        else:
            left.plot(compute, mean, color=color, lw=1, ls=":")
        gains = (curves.get(name) or {}).get("equal_flops")
        known = [one for one in gains["gain"] if one["mean"]] if gains else []
        if known:
            x, y = (np.array([one[key] for one in known]) for key in ("compute", "mean"))
            x = x * 1.03 ** (i - len(tables[0]["configs"]) / 2)  # so that bars do not hide others
            low = [one["ci95"][0] or 1e-9 for one in known]  # an end that is none leaves the frame
            high = [one["ci95"][1] or 1e9 for one in known]
            # of an interval no more than a factor of two: a wide one would flatten all others
            shown.extend([*np.clip(low, y / 2, y), *np.clip(high, y, 2 * y)])
            bars = np.maximum(0, (y - low, high - y))  # a gain beyond MOST is outside its interval
            right.errorbar(x, y, yerr=bars, fmt="o-", ms=4, color=color, lw=1)
    right.axhline(1, color="grey", lw=0.8, ls="--")
    unit = "bits per byte" if metric == "val_bpb" else "validation loss (nats)"
    left.set(xscale="log", xlabel="training FLOPs", ylabel=unit)
    right.set(xscale="log", xlabel="training FLOPs", ylabel=f"times {tables[0]['first']}'s compute")
    firsts = [table["configs"][table["first"]] for table in tables]
    sizes = [row["flops_per_token"] * row["tokens"] for row in firsts]
    for axis in (left, right):  # a tick for each size: the scale's own would write over one another
        axis.set_xticks(sizes, [f"{flops:.1e}" for flops in sizes])
        axis.minorticks_off()
    bottom, top = min(shown) / 1.1, max(shown) * 1.1
    steps = (1, 1.1, 1.2, 1.5, 2, 3, 5, 7, 8, 9) if top < 3 * bottom else (1, 1.5, 2, 3, 5, 7)
    ticks = [x * 10.0**n for n in range(-3, 4) for x in steps]
    right.set(yscale="log", ylim=(bottom, top))
    right.set_yticks([x for x in ticks if bottom < x < top])
    right.yaxis.set_major_formatter("{x:g}")
    right.minorticks_off()
    if not curves:
        right.remove()
        left.set_subplotspec(figure.add_gridspec(1, 1)[0])
        figure.set_size_inches(5.5, 4)
    left.legend(fontsize=8)
    save(figure, path)


def plot(axis, x, runs, key, name):
    """The mean of Runs as a line, their range as a band."""
    steps, mean = mean_curve(runs, key)
    values = np.array([[run.values[key][step] for step in steps] for run in runs])
    (line,) = axis.plot(x, mean, marker=".", markersize=4, label=name)
    if len(runs) > 1 and steps:
        band = values.min(axis=0), values.max(axis=0)
        axis.fill_between(x, *band, color=line.get_color(), alpha=0.2, linewidth=0)
