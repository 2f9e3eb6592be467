"""Which runs a comparison takes: every config once per seed, the searches of each one's own value,
seeds that are added until they tell; and, before any of it, what that costs."""

import contextlib
import dataclasses
import functools
import io
import math
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from model import GPTConfig
from nanoswitch import stats, surgery, tune
from nanoswitch.cards import named_card
from nanoswitch.counts import flops_per_token, num_params, on_meta
from nanoswitch.device import matrix_rate, pick_device, pick_dtype
from nanoswitch.log import DIVERGED, read_run
from nanoswitch.progress import clock, short
from nanoswitch.shards import load_shards, val_text
from nanoswitch.sweep import Job, check_seen, config_then, sweep
from nanoswitch.tokenizer import N_VOCAB
from nanoswitch.windows import Windows, data_sha256
from train_gpt2 import TrainConfig, count_steps, read_flags

OF_TOKENS = ("vocab_used", "val_tokens", "data_dir", "data")  # differ between vocabularies
SPLITS = ("train", "val")
MUST_AGREE = ("block_size", "vocab_used", "val_tokens", "hellaswag_limit", "overfit_single_batch")


def name_of(path):
    """A config file or run folder -> its name in the table."""
    return Path(path).stem if path.endswith(".toml") else Path(os.path.abspath(path)).name


def check_fair(configs, keys=MUST_AGREE):
    """ValueError unless all of {name: flags} see the same tokens and are scored on the same; with
    several vocabularies, unless they are scored on the same text."""
    sizes = {config.get("vocab_used") for config in configs.values()}
    texts = {config.get("val_text_sha256") for config in configs.values()}
    if len(sizes - {None}) > 1:
        if len(texts) > 1 or None in texts:
            raise ValueError(
                "no fair comparison: several vocabularies, and not surely the same validation text;"
                " make their data with one fineweb.py --val_bytes N, and give a --val_tokens that "
                "covers it"
            )
        keys = [key for key in keys if key not in OF_TOKENS]
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


@dataclass
class Entry:
    """One config of a comparison: its arguments for train_gpt2.py, and all flags they stand for."""

    name: str
    argv: list
    flags: dict
    seen: dict = field(default_factory=dict)  # what the log of a run would say of this machine

    def job(self, folder, seed, **changes):
        """The run of a seed in a folder, with other flags changed."""
        own = {"seed": seed, "run_dir": str(folder)} | changes
        argv = [*self.argv, *(f"--{name}={value}" for name, value in own.items())]
        if not changes:
            return Job(self.name, folder, argv, self.flags | own, seen=self.seen)
        return Job(self.name, folder, argv, flat(argv), seen=self.seen)


def flat(argv):
    """Arguments for train_gpt2.py -> {flag: value} of all its flags."""
    model, train = read_flags(argv)
    model = surgery.config_of(model, train)
    return dataclasses.asdict(model) | dataclasses.asdict(train)


def read_entries(config, flags, own=None):
    """-> [Entry] of the inputs, in their order; ValueError for what would not be fair. own: {input:
    arguments of its own}, which win over the flags of all."""
    base = [config.base] if config.base else []
    entries, matched = [], None
    for path in config.inputs:
        argv = [*base, path, *flags, *(own or {}).get(path, [])]
        if config.match == "params" and matched:
            argv.append(f"--mlp_hidden={match_parameters(path, argv, matched)}")
        entries.append(Entry(name_of(path), argv, flat(argv)))
        if entries[-1].flags["dry_run"]:
            raise ValueError("dry_run trains nothing to compare; --plan tells what there is to do")
        if config.match == "params":
            matched = matched or num_params(model_of(entries[-1].flags))
    agree = (*MUST_AGREE, "seed", "data_dir", "hellaswag_data")
    check_fair(
        {
            path: entry.flags | {"val_text_sha256": text_of(entry.flags)}
            for path, entry in zip(config.inputs, entries, strict=True)
        },
        agree,
    )
    return entries


def text_of(flags):
    """The hash of the validation text of these flags, None where their data is not here."""
    with contextlib.suppress(ValueError, OSError):
        return val_text(flags["data_dir"], flags["val_tokens"], flags["block_size"])


def match_parameters(path, argv, wanted):
    """The mlp_hidden with which a config has `wanted` parameters within 1%."""

    def count(hidden):
        return num_params(model_of(flat([*argv, f"--mlp_hidden={hidden}"])))

    # the count is a straight line; of experts, whose widths are rounded, a staircase
    each = (count(4096) - count(2048)) / 2048
    exact = 2048 + (wanted - count(2048)) / each
    for unit in (64, 8, 1):  # round widths are faster
        hidden = round(exact / unit) * unit
        if hidden > 0 and abs(count(hidden) / wanted - 1) < 0.01:
            return hidden
    raise ValueError(
        f"no mlp_hidden brings {path} to {wanted:,} parameters within 1%; change its n_layer or "
        f"n_embd, or leave --match out"
    )


class Study:
    """The runs of a comparison: its configs at the common flags, and each at its own tuned value.

    Which runs there must be follows from the command and the logs alone, so that the same command
    goes on where another one stopped."""

    def __init__(self, config, entries):
        self.config, self.entries, self.failed = config, entries, []
        self.out, self.first_seed = Path(config.out), entries[0].flags["seed"]
        for entry in entries if not config.report_only and not config.plan else ():
            entry.seen = seen_here(entry.flags)
        start, names = self.first_seed, [entry.name for entry in entries]
        self.seeds = {name: list(range(start, start + config.seeds)) for name in names}
        self.searches, self.tuned = {}, {}  # {name: Search}, {name: (Entry, folder)} once known

    def sweep(self, jobs):
        at_once = self.config.jobs or torch.cuda.device_count() or 1
        return [] if self.config.report_only else sweep(jobs, at_once)

    def train(self, jobs):
        self.failed += self.sweep(jobs)

    def try_out(self, jobs):
        """train() for a search, where a value that diverges is an answer and no failure."""
        self.failed += [line for line in self.sweep(jobs) if DIVERGED not in line]

    def folder_of(self, entry):
        """The folder of a config's seeds at its own flags."""
        return self.out / "runs" / entry.name

    def places(self, tuned):
        """-> {name: (Entry, folder of its seeds)}"""
        if tuned:
            return self.tuned
        return {entry.name: (entry, self.folder_of(entry)) for entry in self.entries}

    def jobs(self, tuned=False):
        """Seed by seed, so that all configs have their first seed soon."""
        jobs = [
            entry.job(folder / f"seed_{seed}", seed)
            for name, (entry, folder) in self.places(tuned).items() for seed in self.seeds[name]
        ]  # fmt: skip
        return sorted(jobs, key=lambda job: job.config["seed"])

    def all_jobs(self):
        return [*self.jobs(), *self.jobs(tuned=True)]

    def groups(self, tuned=False):
        """{name: Runs that have begun}, in the order of the inputs."""
        groups = {name: [] for name in self.places(tuned)}
        for job in self.jobs(tuned):
            groups[job.name] += [run for run in [job.run()] if run]
        return groups

    def search(self):
        """Find each config's own value of the flag --tune; unfinished leaves self.tuned empty."""
        flag = self.config.tune
        for entry in self.entries:
            if not entry.flags[flag] > 0:
                has = f"{entry.name} has {flag} {entry.flags[flag]}"
                raise ValueError(f"{has}: nothing to vary; give a --{flag} above 0")
            for folder in (self.out / "tuned" / entry.name).glob("seed_*"):
                if run := read_run(folder):  # of another flag's search: say so before this one
                    own = config_then(run)[flag]
                    entry.job(folder, run.seed, **{flag: own}).check(run)
            self.searches[entry.name] = tune.Search(entry.flags[flag], self.trial(entry))
        tune.search(self.searches, self.try_out)
        own = {name: one.result()["best"] for name, one in self.searches.items()}
        if None in own.values():
            return
        for entry in self.entries:
            value, folder = own[entry.name], self.folder_of(entry)
            if value != entry.flags[flag]:  # else those runs are the same
                argv = [*entry.argv, f"--{flag}={value}"]
                entry = Entry(entry.name, argv, flat(argv), entry.seen)
                folder = self.out / "tuned" / entry.name
            self.tuned[entry.name] = entry, folder

    def trial(self, entry):
        """-> the function of a value of --tune that makes its run, or None where it cannot be. On
        all of the steps, that of the config's own value is a run of the comparison itself."""
        flag, frac = self.config.tune, self.config.tune_frac
        steps = steps_of(entry.flags)

        def shorter(warmup):
            return round(frac * warmup)

        quick = {
            "max_steps": max(1, round(frac * steps)),
            "warmup_steps": shorter(entry.flags["warmup_steps"]),
            "eval_every": 0, "hellaswag_every": 0, "sample_every": 0, "curve": "false",
        }  # fmt: skip

        def job(value):
            if frac == 1 and value == entry.flags[flag]:
                return entry.job(self.folder_of(entry) / f"seed_{self.first_seed}", self.first_seed)
            folder = self.out / "tune" / entry.name / f"{flag}_{value}"
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    tried = shorter(value) if flag == "warmup_steps" else value
                    return entry.job(folder, self.first_seed, **quick | {flag: tried})
            except SystemExit:  # such as a beta2 above 1
                return None

        return job

    def resolve(self):
        """Add seeds, the first's and a row's in pairs, until all intervals are narrow enough."""
        config, first = self.config, self.entries[0].name
        tuned = bool(self.tuned)
        while not self.failed:
            groups = self.groups(tuned)
            losses = final_losses(groups, metric_of(groups))
            lengths = {name: runs and planned_tokens(runs) for name, runs in groups.items()}
            losses = {name: of for name, of in losses.items() if lengths[name] == lengths[first]}
            if any(set(losses[name]) != set(self.seeds[name]) for name in losses):
                return  # not all are finished
            rows = stats.against_first(losses, pool=config.noise == "pooled")["rows"]
            wide = [name for name, diff in rows.items() if self.too_wide(diff)]
            wide = [name for name in wide if len(self.seeds[name]) < config.max_seeds]
            if not wide:
                return
            for name in wide:
                seed = self.seeds[name][-1] + 1
                self.seeds[name].append(seed)
                if seed not in self.seeds[first]:
                    self.seeds[first].append(seed)
            self.train(self.jobs(tuned))

    def too_wide(self, diff):
        low, high = diff["ci95"]
        return low is None or high - low >= self.config.resolve

    def do(self):
        """Train all that is missing -> the groups at the common flags, and those tuned or {}."""
        if self.config.tune:
            self.search()
        tuned = self.jobs(tuned=True) if self.tuned else []
        jobs = {job.folder: job for job in [*self.jobs(), *tuned]}
        self.train(list(jobs.values()))
        if self.config.resolve:
            self.resolve()
        return self.groups(), self.groups(tuned=True) if self.tuned else {}

    def plan(self):
        """What show_plan() asks: [(title, Study, full runs and trials of each config)]."""
        return [("", self, self.config.seeds * (1 + bool(self.config.tune)),
                 3 * bool(self.config.tune))]  # fmt: skip

    def searched(self):
        """What results.json says of the searches."""
        if not self.searches:
            return None
        found = {name: one.result() for name, one in self.searches.items()}
        return {
            "flag": self.config.tune, "frac": self.config.tune_frac, "seed": self.first_seed,
            "configs": found,
        }  # fmt: skip


def seen_here(flags):
    """What the log of a run with these flags would say of this machine's data and precision."""
    dtype = pick_dtype(flags["dtype"], pick_device(flags["device"]))
    seen = {"dtype": str(dtype)[6:]}
    with contextlib.suppress(ValueError):  # of what is wrong with the data, the run tells more
        seen["data_sha256"] = sha256_of(flags["data_dir"], flags["block_size"])
    return seen


@functools.lru_cache(maxsize=8)
def sha256_of(folder, block_size):
    """data_sha256 of a folder of shards."""
    splits = [Windows(load_shards(folder, split), block_size, N_VOCAB) for split in SPLITS]
    return data_sha256(*splits)


def merge(out, other, entries, jobs=()):
    """Copy the finished runs of another machine's OUT into this one -> how many. What is here
    already stays; ValueError before the first copy for runs that do not fit this machine's, or that
    one of the jobs would not have made."""
    out, other, seen = Path(out), Path(other), {entry.name: entry.seen for entry in entries}
    logs = [
        log for log in sorted(other.rglob("log.jsonl")) if is_run(log.parent.relative_to(other))
    ]
    if not logs or other.resolve() == out.resolve():
        raise ValueError(f"no runs to take from {other}; give another comparison's --out folder")
    found, by_place = [], {job.folder: job for job in jobs}
    for folder in (log.parent for log in logs):
        run = read_run(folder)
        if folder.parent.name in seen and run and run.over:
            check_seen(run, seen[folder.parent.name])
            if job := by_place.get(out / folder.relative_to(other)):
                job.check(run)
            found.append(folder)
    taken = 0
    for folder in found:
        place = out / folder.relative_to(other)
        if place.exists():
            continue
        beside = place.with_name(place.name + ".copying")
        shutil.rmtree(beside, ignore_errors=True)  # of a copy that was killed
        shutil.copytree(folder, beside)
        beside.rename(place)
        taken += 1
    return taken


def is_run(path):
    """Whether a path in a comparison's OUT is that of a run: [n_embd_N/]runs/NAME/seed_N, or so."""
    if len(path.parts) < 3:
        return False
    *size, kind, _, run = path.parts
    of_size = not size or (len(size) == 1 and size[0].startswith("n_embd_"))
    return of_size and kind in ("runs", "tune", "tuned") and not run.endswith(".copying")


def metric_of(groups):
    """What {name: Runs} are compared by: nats of two vocabularies are not the same."""
    vocabularies = {run.config.get("vocab_used") for runs in groups.values() for run in runs}
    return "val_bpb" if len(vocabularies) > 1 else "val_loss"


def final_losses(groups, metric="val_loss"):
    """{name: Runs} -> {name: {seed: last value of the metric}} of those that are finished."""
    return {
        name: {run.seed: run.last(metric) for run in runs if run.finished}
        for name, runs in groups.items()
    }


def planned_tokens(runs):
    """The tokens that Runs of one config were to see; --patience may have stopped them before."""
    start = runs[0].start
    steps = start.get("planned") or start.get("steps") or runs[0].curve("val_loss")[0][-1]
    return steps * runs[0].config["total_batch_tokens"]


def steps_of(flags):
    """The optimizer steps of a run with these flags."""
    if flags["max_steps"]:  # then the data may be elsewhere
        return flags["max_steps"]
    train = Windows(load_shards(flags["data_dir"], "train"), flags["block_size"])
    return count_steps(config_of(TrainConfig, flags), train)


# ----------------------------------------------------------------------------- the plan


def typical_sd(parameters):
    """The spread over seeds in nats at this size, on a straight line in log-log through 0.01 at 1M
    (this project's) and 0.0013 at 124M (modded-nanogpt's track 3)."""
    return 0.01 * (parameters / 1e6) ** (math.log(0.13) / math.log(124))


def show_plan(config, parts):
    """Print what a comparison will take, and what it can show. parts: [(title, Study, full runs and
    trials of each config)]."""
    device = parts[0][1].entries[0].flags["device"]
    dtype = parts[0][1].entries[0].flags["dtype"]
    rate, source = flop_rate(device, dtype)
    all_runs = all_tokens = all_flops = done = 0
    for title, study, times, trials in parts:
        runs = tokens = flops = 0
        for entry in study.entries:
            full = steps_of(entry.flags) * entry.flags["total_batch_tokens"]
            spent = (times + trials * config.tune_frac) * full
            runs, tokens = runs + times + trials, tokens + spent
            flops += spent * flops_per_token(on_meta(model_of(entry.flags)))
        done += sum(job.done() for job in study.jobs(tuned=bool(study.tuned)))
        all_runs, all_tokens, all_flops = all_runs + runs, all_tokens + tokens, all_flops + flops
        if title:
            size = num_params(model_of(study.entries[0].flags))
            print(
                f"{title}: {short(size)} parameters, {runs} runs of {short(full)} tokens"
                f"{epochs(study.entries[0].flags, full)}, {clock(flops / rate)} or more, "
                f"resolves {resolved(config, study)[0]}"
            )
    more = " or more" if any(trials for *_, trials in parts) else ""
    print(f"runs      {all_runs}{more}" + (f", {done} of them finished" if done else ""))
    print(f"tokens    {short(all_tokens)}")
    print(
        f"time      {clock(all_flops / rate)} or more: computed, {all_flops:.3g} FLOPs at the "
        f"{rate / 1e12:.2f} TFLOP/s of {source}"
    )
    most = len(parts[0][1].entries)  # a ladder's others may stop below the first
    study = next(study for _, study, *_ in reversed(parts) if len(study.entries) == most)
    effect, how, sd = resolved(config, study)
    print(f"resolves  {effect}{how}")
    rows = len(study.entries) - 1
    if config.resolve and rows:
        pooled = config.noise == "pooled"
        n = stats.seeds_for(config.resolve, math.sqrt(2) * sd, rows, pooled)
        about = f"about {n:,}" if n else "more than 10,000"
        print(f"          intervals narrower than {config.resolve:g} nats: {about} seeds, or more")


def flop_rate(device, dtype):
    """FLOP/s of a --device, and where the number is from."""
    if card := named_card(device):
        return card.flops, f"one {device}, its data sheet"
    device = pick_device(device)
    rate = matrix_rate(device, pick_dtype(dtype, device))
    return rate * max(1, torch.cuda.device_count()), "large products here"


def epochs(flags, tokens):
    """ ", 2.1 epochs" where a run passes over its data more than once."""
    with contextlib.suppress(ValueError):  # the data may be elsewhere
        there = sum(map(len, load_shards(flags["data_dir"], "train")))
        if tokens > there:
            return f", {tokens / there:.1f} epochs of {flags['data_dir']}"
    return ""


def resolved(config, study):
    """-> the least effect that a Study's seeds can show, why, and the spread that it rests on."""
    rows, sd, source = len(study.entries) - 1, config.sd, "stated"
    if not sd:
        losses = final_losses(study.groups(tuned=bool(study.tuned)))
        losses = {name: of for name, of in losses.items() if of}
        sd, source = stats.against_first(losses)["sd"] if len(losses) > 1 else None, "of these runs"
    if not sd:
        size = num_params(model_of(study.entries[0].flags))
        sd, source = typical_sd(size), f"typical of {short(size)} parameters"
    if not rows or config.seeds < 2:
        return "nothing", ": it takes two configs and two seeds to tell noise from effect", sd
    effect = stats.planned_effect(sd, rows, config.seeds, config.noise == "pooled")
    how = (
        f" in 8 cases of 10: {rows} row{'s' * (rows > 1)}, {config.seeds} seeds, a spread of "
        f"{sd:.4f} nats over seeds ({source})"
    )
    return f"{effect:.4f} nats", how, sd


def model_of(flags):
    return config_of(GPTConfig, flags)


def config_of(kind, flags):
    """{flag: value} of all flags -> the GPTConfig or TrainConfig."""
    return kind(**{name: flags[name] for name in kind.__dataclass_fields__ if name in flags})
