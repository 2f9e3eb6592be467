"""python compare.py configs/gpt2_124m.toml configs/rope_gqa.toml --seeds 3 --max_steps 2000

    python compare.py runs/gpt2_124m runs/rope_gqa --out runs/comparison

Configs -> one fair table and its curves. Every config is trained once per seed, by train_gpt2.py,
on the same tokens in the same order, with the weights that configs share starting equal; any flag
of train_gpt2.py holds for every run; --ladder does so at several sizes. Run the same command again
to continue; with --out on a shared disk several machines may run it at once and share the work.
Folders of runs that were trained otherwise are compared alike, those named seed_N as one config's
seeds.

    OUT/runs/NAME/seed_S/                    the runs, as train_gpt2.py leaves them
    OUT/results.md, results.json             the table, from their logs alone
    OUT/report.html                          the same and more on one page, to send
    OUT/curves.png, curves.svg               needs matplotlib; more than one seed needs scipy too
    OUT/lengths.md, lengths.json             --lengths: longer contexts than trained
    OUT/tune.png, ladder.png, and .svg       of --tune: loss against its value; of --ladder
    OUT/tune/NAME/FLAG_VALUE/                --tune: the search of each config's own value
    OUT/tuned/NAME/seed_S/                   the runs at it, where it is not the common one
    OUT/n_embd_N/                            --ladder: runs, tune and tuned of each size
"""

import dataclasses
import difflib
import importlib.util
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tyro.conf import Positional

from model import GPTConfig
from nanoswitch import cli, ladder, stats
from nanoswitch.counts import flops_per_token, kv_bytes_per_token, on_meta
from nanoswitch.curves import draw, draw_ladder, draw_searches, mean_curve
from nanoswitch.files import locked, write_beside
from nanoswitch.lengths import lengths_table, score_lengths
from nanoswitch.log import LOSSES, read_run
from nanoswitch.progress import clock, markdown, short
from nanoswitch.report import page
from nanoswitch.scoring import NAMES, add_up, at_chance, error_name, summarize
from nanoswitch.study import (
    MUST_AGREE,
    Study,
    check_fair,
    merge,
    metric_of,
    name_of,
    planned_tokens,
    read_entries,
    show_plan,
)
from nanoswitch.sweep import INCIDENTAL, config_then
from nanoswitch.tune import FLAT
from train_gpt2 import TrainConfig


@dataclass
class CompareConfig:
    inputs: Positional[tuple[str, ...]]
    """config files to train, or folders of runs; the others are compared with the first"""
    out: str = "runs/comparison"
    """folder of the runs, the table and the curves"""
    base: str = ""
    """a config file that is read before each of the others"""
    seeds: int = 1
    """runs of each config: with --seed, --seed + 1, ...; 3 or more tell noise from effect"""
    match: Literal["none", "params"] = "none"
    """params sets mlp_hidden so that every config has the first one's parameters within 1%"""
    jobs: int = 0
    """runs at a time; 0 = one per GPU, on CPU one"""
    lengths: str = ""
    """score the last checkpoints at multiples of their context too, such as 1,2,4, on prose and on
    texts that stand twice, which tell how far back a model reads: lengths.md"""
    margin: float = 0.0
    """nats; differences that are surely smaller are called equal; 0 = no difference is"""
    noise: Literal["pooled", "own"] = "pooled"
    """pooled: one noise for all configs, where their spreads are alike; own: each row's, where they
    differ, which takes more seeds"""
    require: str = ""
    """end with status 1 unless this config is better than the first"""
    tune: str = ""
    """a numeric flag, such as lr: search each config's own value, and compare at those too"""
    tune_frac: float = 0.25
    """fraction of the steps that a run of the search takes"""
    resolve: float = 0.0
    """nats, between vocabularies bits per byte; add seeds to the first and a row in pairs until its
    interval is narrower"""
    max_seeds: int = 12
    """the most seeds that --resolve gives a config"""
    plan: bool = False
    """print runs, tokens, hours and the least effect that the seeds can show; train nothing.
    --device cuda:h100, or another card that train_gpt2.py's --dry_run knows, plans for that card"""
    ladder: str = ""
    """a file of sizes, such as configs/ladder.toml: train every config at each of them, fit loss
    against compute and say how much compute a config is worth, and whether that lasts"""
    merge: str = ""
    """take the finished runs of another machine's --out folder first, copied to here; several with
    commas between"""
    sd: float = 0.0
    """--plan's spread of one config over seeds in nats; 0 = that of finished runs, else typical"""
    report_only: bool = False
    """train nothing: write the table and curves of what is finished"""

    def __post_init__(self):
        if not self.inputs:
            raise ValueError("name config files to train, or run folders such as runs/quickstart")
        cli.at_least(self, 1, "seeds max_seeds")
        cli.at_least(self, 0, "jobs")
        is_toml = {path.endswith(".toml") for path in self.inputs}
        if len(is_toml) > 1:
            raise ValueError("give config files (.toml) or run folders, not both at once")
        self.trains = is_toml.pop()
        try:
            self.multiples = [int(text) for text in self.lengths.split(",")] if self.lengths else []
        except ValueError:
            self.multiples = [0]
        if min(self.multiples, default=1) < 1:
            raise ValueError(f"lengths is {self.lengths}; give whole numbers, such as 1,2,4")
        cli.at_least(self, 0, "margin resolve sd")
        if not 0 < self.tune_frac <= 1:
            raise ValueError(f"tune_frac is {self.tune_frac}; it must be above 0, up to 1")
        numeric = {
            f.name for c in (GPTConfig, TrainConfig) for f in dataclasses.fields(c)
            if f.type in (int, float)
        } - INCIDENTAL - {"seed", "max_steps", *MUST_AGREE}  # fmt: skip
        if self.tune and self.tune not in numeric:
            near = difflib.get_close_matches(self.tune, numeric, n=1)
            hint = f"did you mean {near[0]}?" if near else "such as lr"
            raise ValueError(f"tune is {self.tune}, no flag with a number to vary; {hint}")
        if self.ladder and (self.resolve or self.lengths):
            raise ValueError("--ladder adds no seeds and scores no lengths: leave --resolve and "
                             "--lengths out")  # fmt: skip
        names = [name_of(path) for path in self.inputs]
        if self.require and self.require not in names[1:]:
            raise ValueError(f"require is {self.require}; it must be one of {', '.join(names[1:])}")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two of the inputs are called {name}: rename one")


# ----------------------------------------------------------------------------- reading logs


def read_folders(path):
    """A run folder, or a folder of seed_N runs -> the Runs of one config, by seed."""
    folders = sorted(Path(path).glob("seed_*")) or [path]
    runs = [run for run in map(read_run, folders) if run]
    if not runs:
        raise ValueError(
            f"no {path}/log.jsonl with a whole line: give the folder of a run that train_gpt2.py "
            f"started"
        )
    return sorted(runs, key=lambda run: run.seed)


def check_runs(groups):
    """check_fair, for {name: Runs}; those of one name may differ in their seed only."""
    scored = {}
    for run in [run for runs in groups.values() for run in runs]:
        seen = {"data": run.start.get("data_sha256"), "HellaSwag items": run.last("hellaswag_n")}
        text = {"val_text_sha256": run.start.get("val_text_sha256")}
        scored[str(run.folder)] = run.config | seen | text
    if scored:  # else a size of a ladder that has not begun
        check_fair(scored, (*MUST_AGREE, "data", "HellaSwag items"))
    for name, runs in groups.items():
        if len({run.seed for run in runs}) < len(runs):
            raise ValueError(f"{name} has two runs with the same seed: move one elsewhere")
        for run in runs[1:]:
            one, other = config_then(run), config_then(runs[0])
            for key in sorted({*one, *other} - INCIDENTAL - {"seed"}):
                if one.get(key) != other.get(key):
                    raise ValueError(
                        f"{run.folder} and {runs[0].folder} differ in {key}: they are no seeds of "
                        f"one config; give them as two"
                    )


# ----------------------------------------------------------------------------- the numbers


def mean_sd(values):
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": spread, "seeds": values}


VERSIONS = {  # of a Run: what may have changed the numbers between two sittings or machines
    "torch": lambda run: run.start.get("versions", {}).get("torch", "").partition("+")[0],
    "commit": lambda run: run.start.get("git"),
}


def summary(runs):
    """The numbers of one config from its finished Runs, as in results.json."""
    model = on_meta(runs[0].model_config)
    losses, bpb = ([run.last(key) for run in runs] for key in ("val_loss", "val_bpb"))
    steps = [run.curve("val_loss")[0][-1] for run in runs]
    score = None
    if all(run.last("hellaswag_acc_norm") is not None for run in runs):
        score = {
            "acc_norm": statistics.fmean(run.last("hellaswag_acc_norm") for run in runs),
            "n": int(runs[0].last("hellaswag_n") or 0),
            # of one run: the seeds share the items, so that more of them narrow it little
            "se": statistics.fmean(run.last("hellaswag_se") or 0.0 for run in runs),
        }
        if all(run.last("hellaswag_bpb") is not None for run in runs):  # older logs have none
            for key in ("bpb", "bpb_se"):
                score[key] = statistics.fmean(run.last(f"hellaswag_{key}") for run in runs)
    speeds = [speed for run in runs for speed in run.curve("tok_per_s")[1]]
    peaks = [peak for run in runs for peak in run.curve("peak_memory_bytes")[1]]
    return {
        "parameters": runs[0].start["parameters"],
        "flops_per_token": flops_per_token(model),
        "kv_bytes_per_token": kv_bytes_per_token(model),
        "tok_per_s": statistics.median(speeds) if speeds else None,
        "peak_memory_bytes": max(peaks, default=None),
        "wall_s": statistics.fmean(
            run.seconds([step])[0] for run, step in zip(runs, steps, strict=True)
        ),
        "tokens": round(statistics.fmean(steps) * runs[0].config["total_batch_tokens"]),
        "planned_tokens": planned_tokens(runs),
        "lr": runs[0].config.get("lr"),
        "muon_lr": runs[0].config.get("muon_lr"),
        "val_loss": mean_sd(losses),
        "val_bpb": None if None in bpb else mean_sd(bpb),
        "hellaswag": score,
    }


def by_item(runs, theirs):
    """HellaSwag's figures of Runs minus those of the first config's, whose items by seed are
    theirs, over the seeds that both have: {name: {"mean", "se"}}, or None where no such seed kept
    its items. What both find hard or easy drops out of the error, which is that of items; the
    spread over seeds is not in it."""
    pairs = [(run.items(), theirs.get(run.seed)) for run in runs]
    diffs = [a - b for a, b in pairs if a is not None and b is not None and len(a) == len(b)]
    if not diffs:
        return None
    n, values = len(diffs[0]), torch.from_numpy(np.mean(diffs, axis=0))  # (n, 4)
    found = summarize(add_up(values), n)
    return {
        name: {"mean": found[name], "se": found[error_name(name)] if n > 1 else None}
        for name in NAMES
    }


def reaches(runs, loss, metric):
    """When the mean curve of Runs first is at `loss` or below, between validations on a straight
    line -> {"tokens", "s"}, or None if it never is."""
    steps, mean = mean_curve(runs, metric)
    below = next((i for i, value in enumerate(mean) if value <= loss), None)
    if below is None:
        return None
    step = steps[below]
    if below:
        step = np.interp(-loss, [-mean[below - 1], -mean[below]], steps[below - 1 : below + 1])
    seconds = statistics.fmean(run.seconds([step])[0] for run in runs)
    return {"tokens": int(step * runs[0].config["total_batch_tokens"]), "s": seconds}


def results(groups, margin=0.0, wanted=0.0, pool=True):
    """{name: finished Runs} -> results.json's dict. margin, wanted, pool: stats.against_first's."""
    first, configs = next(iter(groups)), {name: summary(runs) for name, runs in groups.items()}
    metric = metric_of(groups)
    for name, row in configs.items():
        if row[metric] is None:
            raise ValueError(f"{name}'s log has no {metric}, by which two vocabularies compare")
    losses = {
        name: {run.seed: run.last(metric) for run in runs} for name, runs in groups.items()
        if configs[name]["planned_tokens"] == configs[first]["planned_tokens"]  # else another study
    }  # fmt: skip
    found = stats.against_first(losses, margin, wanted, pool)
    items = {run.seed: run.items() for run in groups[first]}
    for name, runs in groups.items():
        row = configs[name]
        row["seeds"] = [run.seed for run in runs]
        row["diff"] = found["rows"].get(name, stats.UNKNOWN)
        row["compute_gain"] = None  # a ladder's
        row["reaches_first"] = reaches(runs, configs[first][metric]["mean"], metric)
        mine, theirs = (about(group[0]) for group in (runs, groups[first]))
        if row["hellaswag"] and configs[first]["hellaswag"] and name != first:
            row["hellaswag"]["diff"] = by_item(runs, items)
        row["differs_in"] = {k: v for k, v in sorted(mine.items()) if v != theirs.get(k)}
    runs = [run for of in groups.values() for run in of]
    code = {key: sorted(set(filter(None, map(of, runs)))) for key, of in VERSIONS.items()}
    asked = {"level": stats.LEVEL, "power": stats.POWER, "margin": margin, "wanted": wanted}
    noise = {key: found[key] for key in ("method", "sd", "df")}
    return {"configs": configs, "first": first, "metric": metric, "statistics": noise | asked,
            "versions": code}  # fmt: skip


def about(run):
    """What a Run was, for a list of differences: its flags, and what they came to."""
    found = {name: run.start.get(name) for name in ("device", "dtype", "world", "git")}
    flags = {k: v for k, v in run.config.items() if k not in INCIDENTAL | {"seed", "dtype"}}
    return flags | {name: value for name, value in found.items() if value is not None}


def verdict(diff):
    """A difference in loss, in words."""
    return "one seed: noise unknown" if diff["n"] == 1 else diff["verdict"] or "-"


# ----------------------------------------------------------------------------- the table

LEADS = {"val_loss": LOSSES, "val_bpb": dict(reversed(LOSSES.items()))}  # what stands first
UNITS = {"val_loss": "nats", "val_bpb": "bits per byte"}


def grid(found):
    """results()'s dict -> the table's head and rows, of text."""
    configs, first, leads = found["configs"], found["first"], LEADS[found["metric"]]
    head = [
        "config", "parameters", "MFLOP/token", "KV B/token", "tok/s", "peak memory", "tokens",
        *leads.values(), f"difference from {first}", "p", "p adjusted",
        "least effect", "verdict", "HellaSwag acc_norm", "HellaSwag bits per byte", "training time",
        f"reaches {first}'s loss after",
    ]  # fmt: skip
    rows = [cells(name, row, name == first, leads) for name, row in configs.items()]
    return head, rows


def hellaswag_cells(score):
    """Accuracy, marked where it does not stand out from 1 of 4, and bits per byte; of both the
    difference from the first config, paired by item."""
    if not score:
        return "-", "-"
    diff = score.get("diff") or {}

    def change(name):
        found = diff.get(name, {"se": None})
        return "" if found["se"] is None else f"; {found['mean']:+.4f} ± {found['se']:.4f}"

    chance = ", at chance" if at_chance(score["acc_norm"], score["se"], 0.25) else ""
    acc = f"{score['acc_norm']:.4f} ± {score['se']:.4f} (n {score['n']:,}{chance})"
    bits = f"{score['bpb']:.4f} ± {score['bpb_se']:.4f}" if "bpb" in score else "-"
    return acc + change("acc_norm"), bits + change("bpb")


def notes_of(found, match, unfinished):
    """What must be known to read the table: a list of paragraphs."""
    configs, first = found["configs"], found["first"]
    counts = {len(row["val_loss"]["seeds"]) for row in configs.values()}
    notes = [
        f"Mean ± standard deviation over {' or '.join(map(str, sorted(counts)))} seeds; the "
        "difference is paired by seed. " + about_noise(found) + " HellaSwag ± the standard error "
        "over its items; behind it the difference from the first, paired by item. Training time "
        "holds torch.compile's, and leaves out evaluations and checkpoints.",
        "Parameters are matched within 1% by mlp_hidden."
        if match == "params"
        else "Parameters are not matched: a larger model has an advantage.",
    ]
    if found["metric"] == "val_bpb":
        notes.insert(0, "The vocabularies differ: nats of different tokens do not compare, so that "
                     "all is judged in bits per byte of the same validation text. Equal numbers of "
                     "tokens are different amounts of text.")  # fmt: skip
    if any(row["tokens"] < row["planned_tokens"] for row in configs.values()):
        notes.append("--patience stopped runs early: their tokens are the mean over seeds.")
    if len({row["planned_tokens"] for row in configs.values()}) > 1:
        notes.append(
            "Runs of other lengths have no difference: a schedule that ends at another token "
            "count is another experiment. The last column compares them."
        )
    alone = [
        name for name, row in configs.items()
        if name != first and row["planned_tokens"] == configs[first]["planned_tokens"]
        and row["diff"]["mean"] is None
    ]  # fmt: skip
    if alone:
        notes.append(f"No seed in common with {first}, so no difference: {', '.join(alone)}.")
    for what, several in found["versions"].items():
        if len(several) > 1:
            notes.append(f"Runs of more than one {what}: {', '.join(several)}.")
    if unfinished:
        notes.append(f"Not finished, so left out: {', '.join(unfinished)}.")
    return notes


def table(found, match, unfinished):
    """results()'s dict -> results.md."""
    configs, first = found["configs"], found["first"]
    head, rows = grid(found)
    differs = [
        f"- {name}: {', '.join(f'{k} {v}' for k, v in row['differs_in'].items()) or 'nothing'}"
        for name, row in configs.items()
        if name != first
    ]
    parts = [markdown(head, rows), *notes_of(found, match, unfinished), "![curves](curves.png)"]
    if differs:
        parts += [f"Where a config differs from {first}:", "\n".join(differs)]
    return "\n\n".join(parts) + "\n"


def about_noise(found):
    """What the differences and verdicts rest on, in a few sentences."""
    how, rows = found["statistics"], [row["diff"] for row in found["configs"].values()]
    unit = UNITS[found["metric"]]
    if not how["method"]:
        return "With one seed nothing tells noise from effect."
    text = {
        "dunnett": f"The noise, {how['sd']:.4f} {unit} over seeds, is pooled over all configs, or "
        "the row's own where that is larger; intervals and adjusted p are Dunnett's",
        "holm": "Each row is judged by its own noise, for the configs' spreads differ or it was "
        "asked for; adjusted p are Holm's, intervals Bonferroni's",
    }[how["method"]]
    text += (
        ": if no config differed, one table in twenty would show a row as better or worse. p is "
        "the row's alone. The least effect is the difference that these seeds find in 8 cases of "
        "10. A row whose adjusted p is below 0.05 is better or worse"
    )
    if how["margin"]:
        text += f"; one surely within {how['margin']:g} {unit} of the first is equal"
    text += "; all else is undecided, which is not the same as equal. Two rows are not compared."
    if how["method"] == "dunnett":
        text += " Where the first config is by far the noisiest, up to one table in seven errs."
    if not how["wanted"]:
        return text
    text += " Seeds were added until the intervals were narrow: up to one table in ten errs."
    more = [diff["more_seeds"] for diff in rows if diff["n"] and diff["ci95"][0] is not None]
    if more:
        most = "more than 10,000" if None in more else max(more)
        text += f" Ones narrower than {how['wanted']:g} {unit} would take about {most} more seeds."
    return text


def cells(name, row, is_first, leads):
    diff, score = row["diff"], row["hellaswag"]
    change, least = "-", "-"
    if diff["mean"] is not None:
        change = f"{diff['mean']:+.4f}"
    if diff["p"] is not None:
        change += f" [{diff['ci95'][0]:+.4f}, {diff['ci95'][1]:+.4f}]"
        least = f"{diff['least_effect']:.4f}"
    reached = row["reaches_first"]
    after = f"{short(reached['tokens'])} tokens, {clock(reached['s'])}" if reached else "not yet"
    return [
        name, f"{row['parameters']:,}", f"{row['flops_per_token'] / 1e6:,.1f}",
        f"{row['kv_bytes_per_token']:,}", f"{row['tok_per_s']:,.0f}" if row["tok_per_s"] else "-",
        f"{row['peak_memory_bytes'] / 1e9:.2f} GB" if row["peak_memory_bytes"] else "-",
        short(row["tokens"]), *(mean_and_sd(row[key]) for key in leads),
        change, *map(stats.p_text, (diff["p"], diff["p_adjusted"])), least,
        "-" if is_first else verdict(diff),
        *hellaswag_cells(score),
        clock(row["wall_s"]), "-" if is_first else after,
    ]  # fmt: skip


def mean_and_sd(found):
    if found is None:  # a log from before there were bits per byte
        return "-"
    return f"{found['mean']:.4f}" + ("" if found["sd"] is None else f" ± {found['sd']:.4f}")


# ----------------------------------------------------------------------------- main


def only_finished(groups):
    """{name: Runs} -> {name: those finished}, and the folders or names of what is not."""
    finished = {name: [run for run in runs if run.finished] for name, runs in groups.items()}
    unfinished = [str(run.folder) for runs in groups.values() for run in runs if not run.finished]
    unfinished += [name for name, runs in groups.items() if not runs]
    return {name: runs for name, runs in finished.items() if runs}, unfinished


def report(groups, config, tuned=None, searched=None, climbed=None):
    """Write all that OUT holds about {name: Runs}, and print the table -> results.json's dict.

    tuned: the groups at each config's own value; searched: how that was found; climbed: the Ladder
    whose largest size the groups are."""
    finished, unfinished = only_finished(groups)
    if next(iter(groups)) not in finished:
        raise ValueError(f"{next(iter(groups))} has no finished run yet: nothing to compare with")
    check_runs(groups)
    out, judged = Path(config.out), (config.margin, config.resolve, config.noise == "pooled")
    found = results(finished, *judged)
    text = table(found, config.match, unfinished)
    if searched:
        found["search"] = searched
        own, missing = only_finished(tuned or {})
        if found["first"] in own:
            check_runs(tuned)
            found["tuned"] = results(own, *judged)
        text += tuned_text(found, config.match, missing)
    if climbed:
        for by in climbed.groups():
            check_runs(by)
        found["ladder"] = climbed.found(lambda done: results(done, *judged))
        for name, one in (found["ladder"]["curves"] or {}).items():
            if one["equal_flops"] and name in found["configs"]:
                gain = one["equal_flops"]["gain"][-1]
                found["configs"][name]["compute_gain"] = {k: gain[k] for k in ("mean", "ci95")}
        text += ladder.text(found["ladder"])
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        write(out / "results.md", text)
        write(out / "results.json", json.dumps(found, indent=1))
        draw(finished, out / "curves", found["metric"])
        if climbed:
            draw_ladder(found["ladder"], out / "ladder")
        if searched:
            draw_searches(searched, out / "tune")
        write(
            out / "report.html",
            html_page(found, finished, tuned or {}, config, unfinished, climbed),
        )
        if config.multiples:
            for scores in score_lengths(finished, config.multiples):  # kept as far as they are
                write(out / "lengths.md", lengths_table(scores))
                write(out / "lengths.json", json.dumps(scores, indent=1))
    print_short(found)
    if "tuned" in found:
        print(f"each at its own {searched['flag']}:")
        print_short(found["tuned"])
    if climbed:
        print("\n".join(ladder.gain_lines(found["ladder"])))
    print(f"written: {out}/results.md, results.json, report.html, curves.png, curves.svg")
    return found


def html_page(found, groups, tuned, config, unfinished, climbed=None):
    """report.html: results.md, results.json and the pictures in one page."""
    tables = [("Results", *grid(found), notes_of(found, config.match, unfinished))]
    pictures = [("Curves", Path(config.out) / "curves.svg")]
    if "search" in found:
        flag = found["search"]["flag"]
        pictures.append((f"Loss against {flag}", Path(config.out) / "tune.svg"))
        if "tuned" in found:
            notes = notes_of(found["tuned"], config.match, [])
            tables.append((f"Each at its own {flag}", *grid(found["tuned"]), notes))
    everything = [groups, tuned]
    if climbed:
        size = groups[found["first"]][0].config["n_embd"]
        (_, *rest), *_ = tables
        tables = [*ladder.tables(found["ladder"]), (f"At n_embd {size}", *rest)]
        pictures.insert(0, ("Loss and gain against compute", Path(config.out) / "ladder.svg"))
        everything = [only_finished(by)[0] for by in climbed.groups()]
    runs = {}
    for by in everything:
        for name, of in by.items():
            runs.setdefault(name, {}).update({run.folder: run for run in of})
    runs = {name: list(of.values()) for name, of in runs.items()}
    return page(found, tables, runs, pictures)


def tuned_text(found, match, missing):
    """results.md's second part: each config at its own value, and how that was found."""
    searched, flag = found["search"], found["search"]["flag"]
    lines = [f"| config | own {flag} | common {flag} | tried | best inside |", "|" + " --- |" * 5]
    for name, one in searched["configs"].items():
        best = "not finished" if one["best"] is None else f"{one['best']:g}"
        inside = "yes" if one["inside"] else "no"
        lines.append(f"| {name} | {best} | {one['base']:g} | {len(one['losses'])} | {inside} |")
    parts = [f"## Each at its own {flag}", "\n".join(lines)]
    parts.append(
        f"Found with seed {searched['seed']} on {searched['frac']:g} of the steps: factors of "
        f"sqrt 2 around the common {flag}, widened until the best is inside; of values within "
        f"{FLAT:g} nats of it the one nearest to the common one."
    )
    parts.append(f"![loss against {flag}](tune.png)")
    if "tuned" in found:
        parts.append(table(found["tuned"], match, missing).replace("\n\n![curves](curves.png)", ""))
    return "\n" + "\n\n".join(parts).rstrip() + "\n"


def check_required(found, name):
    """ValueError unless the config of this name is better than the first: at its own value of what
    was tuned, if anything was."""
    if not name:
        return
    found = found.get("tuned", found)
    row = found["configs"].get(name)
    says = verdict(row["diff"]) if row else "not finished"
    if says != "better":
        raise ValueError(f"{name} is not better than {found['first']}: {says}")


def write(path, text):
    with write_beside(str(path)) as file:
        file.write(text.encode())


def print_short(found):
    """The table's main columns, for a terminal."""
    title = found["metric"].replace("_", " ")
    print(f"{'config':<20}{'parameters':>13}{title:>18}{'difference':>12}  verdict")
    for name, row in found["configs"].items():
        diff = row["diff"]
        change = "" if diff["mean"] is None else f"{diff['mean']:+.4f}"
        says = "" if name == found["first"] else verdict(diff)
        size, loss = row["parameters"], mean_and_sd(row[found["metric"]])
        print(f"{name[:19]:<20}{size:>13,}{loss:>18}{change:>12}  {says}")


def bare(argv):
    return cli.bare_switch(cli.bare_switch(argv, "report_only"), "plan")


def parse():
    """The command line -> CompareConfig, and the flags that are train_gpt2.py's."""
    flags, inputs, asks_help = cli.split_argv(bare(sys.argv[1:]))
    own = {field.name for field in dataclasses.fields(CompareConfig)}
    theirs = {field.name for c in (GPTConfig, TrainConfig) for field in dataclasses.fields(c)}
    for origin, name, _ in flags:
        cli.check_name(origin, name, own | theirs)
        if name == "run_dir":
            cli.fail("--run_dir: every run gets its own under --out; leave it out", status=2)
    argv = [f"--{name}={value}" for _, name, value in flags if name in own] + inputs
    config = cli.parse(CompareConfig, argv=["--help"] if asks_help else argv)
    for origin, name, _ in flags:
        allowed = ("out", "lengths", "report_only", "margin", "noise", "require", "resolve")
        if not config.trains and name not in allowed:
            raise ValueError(f"{origin} has no effect on finished runs: leave it out")
    return config, [f"--{name}={value}" for _, name, value in flags if name not in own]


def check_packages(config):
    """ModuleNotFoundError, before anything is trained, for what the report will need."""
    wanted = {"matplotlib": "the curves need", "scipy": "more than one seed needs"}
    for name, why in wanted.items():
        needed = name != "scipy" or not config.trains or config.seeds > 1 or config.resolve
        if needed and importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"{why} {name}: pip install {' '.join(wanted)}")


def main():
    config, flags = parse()
    check_packages(config)
    if not config.trains:
        groups = {name_of(path): read_folders(path) for path in config.inputs}
        return check_required(report(groups, config), config.require)
    climbs = ladder.Ladder(config, flags) if config.ladder else None
    study = climbs or Study(config, read_entries(config, flags))
    if config.plan:
        return show_plan(config, study.plan())
    for other in filter(None, config.merge.split(",")):
        taken = merge(config.out, other, study.entries, [] if climbs else study.jobs())
        print(f"{other}: {taken} runs taken, others are here or not finished")
    groups, tuned = study.do()
    failed = study.failed
    try:
        found = report(groups, config, tuned, study.searched(), climbs)
    except ValueError as error:
        raise ValueError(f"{error}; {failed[0]}" if failed else error) from None
    if failed:
        total = len({job.folder for job in study.all_jobs()})
        raise ValueError(f"{len(failed)} of {total} runs failed; the first: {failed[0]}")
    check_required(found, config.require)


if __name__ == "__main__":
    cli.run(main)
