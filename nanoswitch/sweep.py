"""Runs of train_gpt2.py, several at a time: what is finished is not done again, what another
process trains is left to it."""

import contextlib
import io
import os
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from tqdm import tqdm

from model import GPTConfig
from nanoswitch import checkpoints
from nanoswitch.log import DIVERGED, DIVERGED_MARK, read_run
from nanoswitch.signals import StopSignal
from train_gpt2 import TrainConfig

DEFAULTS = {f.name: f.default for c in (GPTConfig, TrainConfig) for f in fields(c)}
INCIDENTAL = {  # where and how a run was done, not what it computes
    "run_dir", "data_dir", "hellaswag_data", "device", "compile", "parallel", "micro_batch",
    "print_every", "sample_every", "checkpoint_every", "keep_checkpoints", "resume", "curve",
    "wandb", "trackio", "sample_prompt",
}  # fmt: skip


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
    seen: dict = field(default_factory=dict)  # of its log's start, as it would be here

    def run(self):
        """Its Run if it has begun; ValueError if that was made by other flags or on other data."""
        return self.check(read_run(self.folder))

    def check(self, run):
        check_seen(run, self.seen)
        then = config_then(run) if run else {}
        for key, value in self.config.items() if run else ():
            if (key, value) == ("dtype", "auto"):
                continue  # what that is here, check_seen looks at
            if then[key] != value and key not in INCIDENTAL:
                raise ValueError(
                    f"{run.folder} was made with {key} {then[key]}, not {value}; give the same "
                    f"flags or another --out"
                )
        return run

    def done(self):
        run = self.run()
        return bool(run and run.finished)

    def look(self):
        if self.share < 1 and (run := read_run(self.folder)) and run.start.get("steps"):
            done = max(run.values.get("train_loss", {0: 0}))
            self.share = 1.0 if run.finished else min(0.99, done / run.start["steps"])


def config_then(run):
    """All flags of a Run: one that is newer than its log was at its default, and dtype auto is what
    it came to on that machine."""
    then = DEFAULTS | run.config
    return then | {"dtype": run.start.get("dtype", then["dtype"])}


def check_seen(run, seen):
    """ValueError where a Run's log says otherwise than {"data_sha256", "dtype"} of this machine."""
    what = {"data_sha256": "on data of hash", "dtype": "in"}
    for key, value in seen.items() if run else ():
        there = run.start.get(key, value)
        if there != value:
            raise ValueError(
                f"{run.folder} was trained {what[key]} {there[:12]}, here it would be {value[:12]}:"
                f" such runs do not mix; give the same data and --dtype, or another --out"
            )


def busy(folder):
    """Whether another process trains there."""
    if not (folder / ".lock").is_file():  # sole_user would make it
        return False
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
                    why = last_line(job.folder / "output.txt")
                    if DIVERGED in why:
                        (job.folder / DIVERGED_MARK).touch()
                    failed.append(f"{job.folder}: {why}")
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
    script = Path(__file__).parent.parent / "train_gpt2.py"
    with open(job.folder / "output.txt", "ab") as output:
        job.process = subprocess.Popen(
            [sys.executable, str(script), *job.argv], env=environment,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip


def last_line(path):
    lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")
