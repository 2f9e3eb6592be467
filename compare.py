"""python compare.py configs/gpt2_124m.toml configs/rope_gqa.toml --seeds 3 --max_steps 2000
python compare.py runs/gpt2_124m runs/rope_gqa --out runs/comparison

Configs -> one fair table and its curves. Every config is trained once per seed, by train_gpt2.py,
on the same tokens in the same order, with the weights that configs share starting equal; any flag
of train_gpt2.py holds for every run. Run the same command again to continue; with --out on a shared
disk several machines may run it at once and share the work. Folders of runs that were trained
otherwise are compared alike, those named seed_N as one config's seeds.

    OUT/runs/NAME/seed_S/                    the runs, as train_gpt2.py leaves them
    OUT/results.md, results.json             the table, from their logs alone
    OUT/curves.png, curves.svg               needs matplotlib; more than one seed needs scipy too
    OUT/lengths.md, lengths.json             --lengths: the loss at longer contexts than trained
"""

import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm
from tyro.conf import Positional

from model import GPT, GPTConfig
from nanoswitch import checkpoints, cli
from nanoswitch.counts import flops_per_token, kv_bytes_per_token, num_params, on_meta
from nanoswitch.curves import draw, mean_curve
from nanoswitch.device import autocast, pick_device, pick_dtype
from nanoswitch.files import locked, write_beside
from nanoswitch.log import read_run
from nanoswitch.progress import clock, short
from nanoswitch.shards import load_shards, match_vocabulary
from nanoswitch.signals import StopSignal
from nanoswitch.windows import Windows
from train_gpt2 import TrainConfig

MUST_AGREE = ("block_size", "vocab_used", "val_tokens", "hellaswag_limit", "overfit_single_batch")
INCIDENTAL = {  # where and how a run was done, not what it computes
    "run_dir", "data_dir", "hellaswag_data", "device", "compile", "parallel", "micro_batch",
    "print_every", "sample_every", "checkpoint_every", "keep_checkpoints", "resume", "curve",
    "wandb",
}  # fmt: skip


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
    """score the last checkpoints at multiples of their context too, such as 1,2,4: lengths.md"""
    report_only: bool = False
    """train nothing: write the table and curves of what is finished"""

    def __post_init__(self):
        if not self.inputs:
            raise ValueError("name config files to train, or run folders such as runs/quickstart")
        if self.seeds < 1 or self.jobs < 0:
            raise ValueError("seeds must be 1 or more, jobs 0 or more")
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
        names = [name_of(path) for path in self.inputs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two of the inputs are called {name}: rename one")


def name_of(path):
    """A config file or run folder -> its name in the table."""
    return Path(path).stem if path.endswith(".toml") else Path(os.path.abspath(path)).name


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


def check_fair(configs, keys=MUST_AGREE):
    """ValueError unless all of {name: flags} see the same tokens and are scored on the same."""
    (first, reference), *others = configs.items()
    for name, config in others:
        for key in keys:
            mine, theirs = config.get(key), reference.get(key)
            if mine != theirs and None not in (mine, theirs):
                known = key in TrainConfig.__dataclass_fields__ | GPTConfig.__dataclass_fields__
                hint = f"give --{key} for all" if known else "use the same data for all"
                raise ValueError(
                    f"no fair comparison: {first} has {key} {theirs}, {name} has {mine}; {hint}"
                )


def check_runs(groups):
    """check_fair, for {name: Runs}; those of one name may differ in their seed only."""
    scored = {}
    for run in [run for runs in groups.values() for run in runs]:
        seen = {"data": run.start.get("data_sha256"), "HellaSwag items": run.last("hellaswag_n")}
        scored[str(run.folder)] = run.config | seen
    check_fair(scored, (*MUST_AGREE, *seen))
    for name, runs in groups.items():
        if len({run.seed for run in runs}) < len(runs):
            raise ValueError(f"{name} has two runs with the same seed: move one elsewhere")
        for run in runs[1:]:
            for key in sorted({*run.config, *runs[0].config} - INCIDENTAL - {"seed"}):
                if run.config.get(key) != runs[0].config.get(key):
                    raise ValueError(
                        f"{run.folder} and {runs[0].folder} differ in {key}: they are no seeds of "
                        f"one config; give them as two"
                    )


# ----------------------------------------------------------------------------- the numbers


def paired(ours, first):
    """Losses {seed: loss} of a config and of the first one -> {"mean", "ci95", "p"} of their
    differences over the seeds they share: Student's paired t-test, two-sided. The interval and p
    are None with one seed, all is None without a shared one."""
    differences = [ours[seed] - first[seed] for seed in sorted(ours.keys() & first.keys())]
    if not differences:
        return {"mean": None, "ci95": [None, None], "p": None}
    mean, n = statistics.fmean(differences), len(differences)
    if n == 1:
        return {"mean": mean, "ci95": [None, None], "p": None}
    from scipy.stats import t  # main() has looked for it; one seed needs none

    error = statistics.stdev(differences) / math.sqrt(n)
    half = t.ppf(0.975, n - 1) * error
    p = 2 * t.sf(abs(mean) / error, n - 1) if error else float(mean == 0)
    return {"mean": mean, "ci95": [mean - half, mean + half], "p": float(p)}


def summary(runs):
    """The numbers of one config from its finished Runs, as in results.json."""
    model = on_meta(runs[0].model_config)
    losses = [run.last("val_loss") for run in runs]
    steps = [run.curve("val_loss")[0][-1] for run in runs]
    score = None
    if all(run.last("hellaswag_acc_norm") is not None for run in runs):
        score = {
            "acc_norm": statistics.fmean(run.last("hellaswag_acc_norm") for run in runs),
            "n": int(runs[0].last("hellaswag_n") or 0),
            # of one run: the seeds share the items, so that more of them narrow it little
            "se": statistics.fmean(run.last("hellaswag_se") or 0.0 for run in runs),
        }
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
        "tokens": steps[0] * runs[0].config["total_batch_tokens"],
        "val_loss": {
            "mean": statistics.fmean(losses),
            "sd": statistics.stdev(losses) if len(losses) > 1 else None,
            "seeds": losses,
        },
        "hellaswag": score,
    }


def reaches(runs, loss):
    """When the mean curve of Runs first is at `loss` or below, between validations on a straight
    line -> {"tokens", "s"}, or None if it never is."""
    steps, mean = mean_curve(runs, "val_loss")
    below = next((i for i, value in enumerate(mean) if value <= loss), None)
    if below is None:
        return None
    step = steps[below]
    if below:
        step = np.interp(-loss, [-mean[below - 1], -mean[below]], steps[below - 1 : below + 1])
    seconds = statistics.fmean(run.seconds([step])[0] for run in runs)
    return {"tokens": int(step * runs[0].config["total_batch_tokens"]), "s": seconds}


def results(groups):
    """{name: finished Runs} -> results.json's dict."""
    first, configs = next(iter(groups)), {name: summary(runs) for name, runs in groups.items()}
    reference = {run.seed: run.last("val_loss") for run in groups[first]}
    for name, runs in groups.items():
        row = configs[name]
        row["seeds"] = [run.seed for run in runs]
        fair = row["tokens"] == configs[first]["tokens"] and name != first
        losses = {run.seed: run.last("val_loss") for run in runs}
        row["diff"] = paired(losses, reference if fair else {})
        row["reaches_first"] = reaches(runs, configs[first]["val_loss"]["mean"])
        mine, theirs = (about(group[0]) for group in (runs, groups[first]))
        row["differs_in"] = {k: v for k, v in sorted(mine.items()) if v != theirs.get(k)}
    return {"configs": configs, "first": first}


def about(run):
    """What a Run was, for a list of differences: its flags, and what they came to."""
    found = {name: run.start.get(name) for name in ("device", "dtype", "world", "git")}
    flags = {k: v for k, v in run.config.items() if k not in INCIDENTAL | {"seed", "dtype"}}
    return flags | {name: value for name, value in found.items() if value is not None}


def verdict(diff):
    """A difference in loss, in words."""
    low, high = diff["ci95"]
    if diff["mean"] is None:
        return "-"
    if low is None:
        return "one seed: noise unknown"
    return "within noise" if low <= 0 <= high else "better" if high < 0 else "worse"


# ----------------------------------------------------------------------------- the table


def table(found, match, unfinished):
    """results()'s dict -> results.md."""
    configs, first = found["configs"], found["first"]
    head = [
        "config", "parameters", "MFLOP/token", "KV B/token", "tok/s", "peak memory", "tokens",
        "validation loss", f"difference from {first}", "p", "verdict", "HellaSwag acc_norm",
        "training time", f"reaches {first}'s loss after",
    ]  # fmt: skip
    rows = [cells(name, row, name == first) for name, row in configs.items()]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    counts = {len(row["val_loss"]["seeds"]) for row in configs.values()}
    notes = [
        f"Mean ± standard deviation over {' or '.join(map(str, sorted(counts)))} seeds; the "
        "difference is paired by seed, with its 95% interval and Student's p, each pair alone: "
        "among many rows one in twenty falls below 0.05 by chance. An interval that holds 0 is "
        "within noise. HellaSwag ± the standard error over its items. Training time holds "
        "torch.compile's, and leaves out evaluations and checkpoints.",
        "Parameters are matched within 1% by mlp_hidden."
        if match == "params"
        else "Parameters are not matched: a larger model has an advantage.",
    ]
    if len({row["tokens"] for row in configs.values()}) > 1:
        notes.append(
            "Runs of other lengths have no difference: a schedule that ends at another token "
            "count is another experiment. The last column compares them."
        )
    alone = [
        name for name, row in configs.items()
        if name != first and row["tokens"] == configs[first]["tokens"]
        and row["diff"]["mean"] is None
    ]  # fmt: skip
    if alone:
        notes.append(f"No seed in common with {first}, so no difference: {', '.join(alone)}.")
    if unfinished:
        notes.append(f"Not finished, so left out: {', '.join(unfinished)}.")
    differs = [
        f"- {name}: {', '.join(f'{k} {v}' for k, v in row['differs_in'].items()) or 'nothing'}"
        for name, row in configs.items()
        if name != first
    ]
    parts = ["\n".join(lines), *notes, "![curves](curves.png)"]
    if differs:
        parts += [f"Where a config differs from {first}:", "\n".join(differs)]
    return "\n\n".join(parts) + "\n"


def cells(name, row, is_first):
    diff, score = row["diff"], row["hellaswag"]
    change, p = "-", "-"
    if diff["mean"] is not None:
        change = f"{diff['mean']:+.4f}"
    if diff["p"] is not None:
        change += f" [{diff['ci95'][0]:+.4f}, {diff['ci95'][1]:+.4f}]"
        p = f"{diff['p']:.2g}"
    reached = row["reaches_first"]
    after = f"{short(reached['tokens'])} tokens, {clock(reached['s'])}" if reached else "not yet"
    return [
        name, f"{row['parameters']:,}", f"{row['flops_per_token'] / 1e6:,.1f}",
        f"{row['kv_bytes_per_token']:,}", f"{row['tok_per_s']:,.0f}" if row["tok_per_s"] else "-",
        f"{row['peak_memory_bytes'] / 1e9:.2f} GB" if row["peak_memory_bytes"] else "-",
        short(row["tokens"]), mean_and_sd(row), change, p,
        "-" if is_first else verdict(diff),
        f"{score['acc_norm']:.4f} ± {score['se']:.4f} (n {score['n']:,})" if score else "-",
        clock(row["wall_s"]), "-" if is_first else after,
    ]  # fmt: skip


def mean_and_sd(row):
    loss = row["val_loss"]
    return f"{loss['mean']:.4f}" + ("" if loss["sd"] is None else f" ± {loss['sd']:.4f}")


# ----------------------------------------------------------------------------- longer contexts


def score_lengths(groups, multiples):
    """{name: Runs} -> {name: {context: [loss of each seed]}} in nats: the last checkpoints
    on the same validation tokens, cut into longer windows. None where positions end."""
    found = {}
    for name, runs in groups.items():
        found[name] = {}
        for T in [runs[0].config["block_size"] * k for k in multiples]:
            losses = [score_length(run, T) for run in runs]
            found[name][T] = None if None in losses else losses
    return found


def score_length(run, T):
    """The validation loss of a run's last checkpoint in windows of T tokens, or None."""
    model = GPT.from_pretrained(run.folder)
    if model.config.block_size < T and not model.extrapolates:
        return None
    device = pick_device(run.config.get("device", "auto"))
    model = model.to(device).eval()
    data_dir = run.config["data_dir"]
    vocab = match_vocabulary(data_dir, model.config)
    val = Windows(load_shards(data_dir, "val"), T, vocab)
    count = min(run.config["val_tokens"] // T, val.count)
    if not count:
        raise ValueError(f"{run.folder} validates on fewer than {T} tokens; give shorter --lengths")
    total, size = 0.0, max(1, 8192 // T)
    with torch.no_grad(), autocast(device, pick_dtype(run.config.get("dtype", "auto"), device)):
        for begin in range(0, count, size):
            x, y = val.read(np.arange(begin, min(begin + size, count)))
            total += model(x.to(device), y.to(device))[1].item() * len(x)
    return total / count


def lengths_table(found):
    """score_lengths()'s dict -> lengths.md."""
    lengths = list(next(iter(found.values())))
    lines = [["config", *(f"T = {T:,}" for T in lengths)], ["---"] * (1 + len(lengths))]
    for name, losses in found.items():
        cells = [name]
        for T in lengths:
            seeds = losses.get(T)
            spread = f" ± {statistics.stdev(seeds):.4f}" if seeds and len(seeds) > 1 else ""
            cells.append(f"{statistics.fmean(seeds):.4f}{spread}" if seeds else "-")
        lines.append(cells)
    note = (
        "Validation loss of the last checkpoints at contexts up to and beyond the trained one, the "
        "same tokens at every length, mean ± standard deviation over seeds."
    )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + f"\n\n{note}\n"


# ----------------------------------------------------------------------------- training them


@dataclass
class Job:
    """One run to train: its arguments for train_gpt2.py and all flags they stand for."""

    name: str
    folder: Path
    argv: list
    config: dict
    process: subprocess.Popen = None
    slot: int = 0
    share: float = 0.0  # of its steps that are logged, as last looked up

    def run(self):
        """Its Run if it has begun; ValueError if that was made by other flags."""
        run = read_run(self.folder)
        loaded = GPTConfig.__dataclass_fields__ if self.config["init_from"] else ()
        for key, value in self.config.items() if run else ():
            if run.config.get(key, value) != value and key not in INCIDENTAL.union(loaded):
                raise ValueError(
                    f"{self.folder} was made with {key} {run.config[key]}, not {value}; give the "
                    f"same flags or another --out"
                )
        return run

    def done(self):
        run = self.run()
        return bool(run and run.finished)

    def look(self):
        if self.share < 1 and (run := read_run(self.folder)) and run.start.get("steps"):
            done = max(run.values.get("train_loss", {0: 0}))
            self.share = 1.0 if run.finished else min(0.99, done / run.start["steps"])


def plan(config, flags):
    """-> Jobs, seed by seed, so that all configs have their first seed soon."""
    base = [config.base] if config.base else []
    jobs, configs, matched = [], {}, None
    for path in config.inputs:
        argv = [*base, path, *flags]
        model, train = cli.parse(GPTConfig, TrainConfig, argv=argv, configs=True)
        if config.match == "params" and matched:
            argv.append(f"--mlp_hidden={match_parameters(path, argv, matched)}")
            model, train = cli.parse(GPTConfig, TrainConfig, argv=argv, configs=True)
        matched = matched or num_params(model)
        configs[path] = dataclasses.asdict(model) | dataclasses.asdict(train)
        for seed in range(train.seed, train.seed + config.seeds):
            folder = Path(config.out) / "runs" / name_of(path) / f"seed_{seed}"
            own = [*argv, f"--seed={seed}", f"--run_dir={folder}"]
            flat = configs[path] | {"seed": seed, "run_dir": str(folder)}
            jobs.append(Job(name_of(path), folder, own, flat))
    check_fair(configs, (*MUST_AGREE, "seed", "data_dir", "hellaswag_data"))
    return sorted(jobs, key=lambda job: job.config["seed"])


def match_parameters(path, argv, wanted):
    """The mlp_hidden with which a config has `wanted` parameters within 1%."""

    def count(hidden):
        flags = [*argv, f"--mlp_hidden={hidden}"]
        return num_params(cli.parse(GPTConfig, TrainConfig, argv=flags, configs=True)[0])

    each = count(2) - count(1)  # the count is a straight line
    exact = 1 + (wanted - count(1)) / each
    for unit in (64, 8, 1):  # round widths are faster
        hidden = round(exact / unit) * unit
        if hidden > 0 and abs(count(hidden) / wanted - 1) < 0.01:
            return hidden
    raise ValueError(
        f"no mlp_hidden brings {path} to {wanted:,} parameters within 1%; change its n_layer or "
        f"n_embd, or leave --match out"
    )


def busy(folder):
    """Whether another process trains there."""
    try:
        with checkpoints.sole_user(folder):
            return False
    except ValueError as error:
        if "another process" not in str(error):
            raise
        return True


def sweep(jobs, at_once):
    """Train every Job that is not done, `at_once` at a time -> the lines of those that failed.

    One that another process is training is passed over and looked at again later."""
    waiting = deque(job for job in jobs if not job.done())
    active, failed, slots = [], [], deque(range(at_once))
    live = sys.stderr.isatty()  # else a line a minute, for a file
    shape = "{percentage:3.0f}%|{bar:20}| {n:.2f}/{total} runs, {elapsed} spent, {remaining} left"
    bar = tqdm(total=len(jobs), bar_format=shape, file=sys.stderr if live else io.StringIO())
    looked = said = 0.0
    with StopSignal(False) as signal, bar, stopping(active):
        while waiting or active:
            for _ in range(len(waiting)):
                job = waiting.popleft()
                if not slots or busy(job.folder):
                    waiting.append(job)
                elif not job.done():  # by another process, since we looked
                    job.slot = slots.popleft()
                    start(job, at_once)
                    active.append(job)
            time.sleep(0.5)
            if signal.number:
                break
            for job in [job for job in active if job.process.poll() is not None]:
                active.remove(job)
                slots.append(job.slot)
                run = job.run()
                if run and run.finished:
                    loss = run.last("val_loss")
                    tqdm.write(f"{job.folder}: validation loss {loss:.4f}", file=sys.stdout)
                elif busy(job.folder):
                    waiting.append(job)  # another process was a moment faster
                else:
                    failed.append(f"{job.folder}: {last_line(job.folder / 'output.txt')}")
                    tqdm.write(f"failed: {failed[-1]}", file=sys.stderr)
            if time.monotonic() - looked > 2:
                for job in jobs:
                    job.look()
                bar.n = sum(job.share for job in jobs)
                bar.initial = bar.initial if looked else bar.n
                bar.refresh()
                looked = time.monotonic()
            if not live and time.monotonic() - said > 60:
                print(bar, file=sys.stderr, flush=True)
                said = time.monotonic()
    if signal.number:
        print("stopped; the same command continues", file=sys.stderr)
        sys.exit(signal.status())
    return failed


@contextlib.contextmanager
def stopping(active):
    """On the way out, have the Jobs that are still at work save a checkpoint and end."""
    try:
        yield
    finally:
        for job in active:
            job.process.terminate()
        for job in active:
            job.process.wait()


def start(job, at_once):
    """Start a Job's process, with a GPU or a share of the cores of its own."""
    environment = dict(os.environ)
    if at_once > 1:
        cards = os.environ.get("CUDA_VISIBLE_DEVICES")
        cards = cards.split(",") if cards else range(torch.cuda.device_count())
        if torch.cuda.is_available():
            environment["CUDA_VISIBLE_DEVICES"] = str(cards[job.slot % len(cards)])
        else:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // at_once))
    job.folder.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("train_gpt2.py")
    with open(job.folder / "output.txt", "ab") as output:
        job.process = subprocess.Popen(
            [sys.executable, str(script), *job.argv], env=environment,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip


def last_line(path):
    lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")


# ----------------------------------------------------------------------------- main


def report(groups, config):
    """Write all that OUT holds about {name: Runs}, and print the table."""
    finished = {name: [run for run in runs if run.finished] for name, runs in groups.items()}
    unfinished = [str(run.folder) for runs in groups.values() for run in runs if not run.finished]
    unfinished += [name for name, runs in groups.items() if not runs]
    finished = {name: runs for name, runs in finished.items() if runs}
    if next(iter(groups)) not in finished:
        raise ValueError(f"{next(iter(groups))} has no finished run yet: nothing to compare with")
    check_runs(groups)
    found, out = results(finished), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        write(out / "results.md", table(found, config.match, unfinished))
        write(out / "results.json", json.dumps(found, indent=1))
        draw(finished, out / "curves")
        if config.multiples:
            losses = score_lengths(finished, config.multiples)
            write(out / "lengths.md", lengths_table(losses))
            write(out / "lengths.json", json.dumps(losses, indent=1))
    print_short(found)
    print(f"written: {out}/results.md, results.json, curves.png, curves.svg")


def write(path, text):
    with write_beside(str(path)) as file:
        file.write(text.encode())


def print_short(found):
    """The table's main columns, for a terminal."""
    print(f"{'config':<20}{'parameters':>13}{'val loss':>18}{'difference':>12}  verdict")
    for name, row in found["configs"].items():
        diff = row["diff"]
        change = "" if diff["mean"] is None else f"{diff['mean']:+.4f}"
        says = "" if name == found["first"] else verdict(diff)
        size, loss = row["parameters"], mean_and_sd(row)
        print(f"{name[:19]:<20}{size:>13,}{loss:>18}{change:>12}  {says}")


def parse():
    """The command line -> CompareConfig, and the flags that are train_gpt2.py's."""
    flags, inputs, asks_help = cli.split_argv(cli.bare_switch(sys.argv[1:], "report_only"))
    own = {field.name for field in dataclasses.fields(CompareConfig)}
    theirs = {field.name for c in (GPTConfig, TrainConfig) for field in dataclasses.fields(c)}
    for origin, name, _ in flags:
        cli.check_name(origin, name, own | theirs)
        if name == "run_dir":
            cli.fail("--run_dir: every run gets its own under --out; leave it out", status=2)
    argv = [f"--{name}={value}" for _, name, value in flags if name in own] + inputs
    config = cli.parse(CompareConfig, argv=["--help"] if asks_help else argv)
    for origin, name, _ in flags:
        if not config.trains and name not in ("out", "lengths", "report_only"):
            raise ValueError(f"{origin} has no effect on finished runs: leave it out")
    return config, [f"--{name}={value}" for _, name, value in flags if name not in own]


def check_packages(config):
    """ModuleNotFoundError, before anything is trained, for what the report will need."""
    wanted = {"matplotlib": "the curves need", "scipy": "more than one seed needs"}
    for name, why in wanted.items():
        needed = name != "scipy" or not config.trains or config.seeds > 1
        if needed and importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"{why} {name}: pip install {' '.join(wanted)}")


def main():
    config, flags = parse()
    check_packages(config)
    if not config.trains:
        groups = {name_of(path): read_folders(path) for path in config.inputs}
        return report(groups, config)
    jobs, failed = plan(config, flags), []
    if not config.report_only:
        failed = sweep(jobs, config.jobs or torch.cuda.device_count() or 1)
    groups = {name_of(path): [] for path in config.inputs}  # in their order
    for job in jobs:
        groups[job.name] += [run for run in [job.run()] if run]
    try:
        report(groups, config)
    except ValueError as error:
        raise ValueError(f"{error}; {failed[0]}" if failed else error) from None
    if failed:
        raise ValueError(f"{len(failed)} of {len(jobs)} runs failed; the first: {failed[0]}")


if __name__ == "__main__":
    cli.run(main)
