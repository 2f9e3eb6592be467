"""run_dir/log.jsonl: one JSON object a line, every step once; written by Log, read by read_run."""

import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections import deque
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as to_bytes

from model import GPTConfig
from nanoswitch.files import write_beside
from nanoswitch.tracker import TRACKERS

MAX_SKIPPED = 5  # steps in a row without a finite loss and gradient before a run gives up
ITEMS = "hellaswag_items.safetensors"  # beside log.jsonl
DIVERGED_MARK = "diverged"  # beside it too: the mark that sweep.py leaves
DIVERGED = "NaN or infinite"  # what such a run's last words hold
LOSSES = {"val_loss": "validation loss", "val_bpb": "bits per byte"}  # in the words of a table
SPIKE = 5.0  # standard deviations above the mean of the last 100 losses


class Log:
    """log.jsonl, the terminal and, if wanted, trackers (names of TRACKERS), on the first rank; on
    the others it writes nothing. As a context, it closes the trackers.

    losses: the last 100 training losses; evaluated: the keys that the log has of step `step`
    already; validated: {step: validation loss} up to there; skipped: steps in a row that were, up
    to now. What a full disk keeps out of the file waits in memory."""

    def __init__(self, run, step, active, trackers=()):
        self.run, self.file, self.waiting, self.skipped = run, None, b"", 0
        self.losses, self.evaluated, self.validated = deque(maxlen=100), set(), {}
        self.trackers = [TRACKERS[name](run, self.say) for name in trackers if active]
        if not active:
            return
        path = run / "log.jsonl"
        if path.exists():  # a step after the checkpoint is about to be done again
            lines = path.read_text(errors="replace").splitlines() if step else []
            entries = [entry for entry in map(parse, lines) if entry.get("step", 0) <= step]
            try:
                with write_beside(str(path)) as file:
                    for entry in filter(None, entries):
                        file.write(dump(entry))
            except OSError as error:
                raise OSError(f"could not write {path}: {error.strerror}") from error
            steps = (e for e in entries if "skipped" not in e)
            self.losses.extend(e["train_loss"] for e in steps if e.get("train_loss") is not None)
            self.evaluated = {key for e in entries if e.get("step") == step for key in e}
            for entry in entries:
                if entry.get("val_loss") is not None:
                    self.validated[entry["step"]] = entry["val_loss"]
                if "train_loss" in entry:
                    self.skipped = self.skipped + 1 if "skipped" in entry else 0
        self.file = open(path, "ab", buffering=0)

    def write(self, **entry):
        if not self.file:
            return
        self.waiting += dump(entry)
        try:
            self.flush()
        except OSError as error:
            self.say(f"warning: {error}; its lines wait in memory")
        self.track(**entry)

    def track(self, **entry):
        """To the trackers only."""
        for tracker in self.trackers:
            tracker.attempt(tracker.write, dict(entry))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        stopped = kind is SystemExit  # by a signal, to be continued
        for tracker in self.trackers:
            tracker.attempt(tracker.finish, 0 if kind is None or stopped else 1)

    def step(self, **entry):
        """Write a training step -> what is remarkable about it, for the terminal."""
        loss, note = entry["train_loss"], ""
        if math.isfinite(loss + entry["grad_norm"]):
            self.skipped = 0
            self.write(**entry)
            if z := spike(loss, self.losses):
                note = f" SPIKE z {z:.1f}"
                self.write(event="spike", step=entry["step"], loss=loss, z=z)
            self.losses.append(loss)
        else:
            self.skipped, note = self.skipped + 1, " SKIPPED"
            self.write(**entry, skipped=True)
        return note

    def check_skipped(self, scaled):
        """ValueError after too many steps in a row without a finite loss and gradient.

        scaled: fp16's loss scale starts too high and halves with each step that overflows."""
        if self.skipped < MAX_SKIPPED * (5 if scaled else 1):
            return
        latest = self.run / "latest"
        where = f"{self.run / latest.read_text().strip()} is whole" if latest.exists() else ""
        raise ValueError(
            f"the loss or gradient was {DIVERGED} {self.skipped} steps in a row; "
            f"{where or 'there is no checkpoint yet'}: run again with a lower --lr, a longer "
            f"--warmup_steps or --grad_clip 1"
        )

    def flush(self):
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            raise OSError(f"could not write {self.file.name}: {error.strerror}") from error

    def sync(self):
        """Have all lines on the disk, or OSError: a checkpoint stands for the log up to it."""
        if self.file:
            self.flush()
            os.fsync(self.file.fileno())

    def save_items(self, step, values):
        """Keep what each HellaSwag item scored at this step, (n, 4) in the order of
        scoring.NAMES, for comparisons item by item."""
        if self.file:
            self.attempt(ITEMS, write_items, self.run / ITEMS, step, values.numpy())

    def attempt(self, what, call, *args):
        """call(*args), whose failure costs a warning that names `what`: it is not worth a run."""
        try:
            call(*args)
        except Exception as error:
            self.say(f"warning: no {what}: {type(error).__name__} {error}")

    def say(self, text):
        """Print a line; a terminal or pipe that is gone is no reason to stop training."""
        if self.file:
            with contextlib.suppress(OSError):
                print(text, flush=True)


def write_items(path, step, values):
    with write_beside(str(path)) as file:
        file.write(to_bytes({"step": np.array(step), "values": values}))


def spike(loss, losses):
    """The z-score of a loss against the last ones, if it is a spike upwards; else None."""
    if len(losses) < 20 or not math.isfinite(loss):
        return None
    spread = statistics.stdev(losses)
    z = (loss - statistics.fmean(losses)) / spread if spread else 0.0
    return z if z > SPIKE else None


def parse(line):
    """A line of the log -> dict; an empty one when it was cut short."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return entry if isinstance(entry, dict) else {}


def dump(entry):
    """A dict -> its line; JSON has no NaN and no infinity, so that they become null."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v
             for k, v in entry.items()}  # fmt: skip
    return json.dumps(clean, allow_nan=False).encode() + b"\n"


def provenance():
    """The code and libraries of a run."""
    versions = {n: str(sys.modules[n].__version__)
                for n in ("torch", "numpy", "tiktoken") if n in sys.modules}  # fmt: skip
    return {"versions": {"python": platform.python_version()} | versions, "git": git_commit()}


def git_commit():
    here = Path(__file__).parent.parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        out = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return None
    return out.stdout.strip()


@dataclass
class Run:
    """What a log says. values: {key: {step: value}} for all that was logged by step."""

    folder: Path
    start: dict
    values: dict

    @property
    def config(self):
        return self.start["config"]

    @property
    def model_config(self):
        """The GPTConfig; a switch that is newer than the run is off in it."""
        known = [field.name for field in fields(GPTConfig) if field.name in self.config]
        return GPTConfig(**{name: self.config[name] for name in known})

    @property
    def seed(self):
        return self.config.get("seed", 0)

    @property
    def finished(self):
        """Whether the last step's evaluations are logged too."""
        if self.start.get("stopped"):  # early, for want of a lower validation loss
            return True
        last, config = self.start.get("steps", 0), self.config
        wanted = ["val_loss"] + ["hellaswag_acc_norm"] * bool(config.get("hellaswag_every"))
        return all(max(self.values.get(key, {-1: 0})) >= last for key in wanted)

    @property
    def over(self):
        """Whether a comparison is done with it: it is finished, or was found to diverge."""
        return self.finished or (self.folder / DIVERGED_MARK).exists()

    def curve(self, key):
        """-> steps and values of a key, two lists."""
        points = self.values.get(key, {})
        return sorted(points), [points[step] for step in sorted(points)]

    def last(self, key):
        _, values = self.curve(key)
        return values[-1] if values else None

    def items(self):
        """What each HellaSwag item scored last, (n, 4) in the order of scoring.NAMES, or None:
        older runs have none, and those of another step are none of the log's last score."""
        try:
            found = load_file(self.folder / ITEMS)
            step, values = int(found["step"]), found["values"]
        except (OSError, KeyError, SafetensorError):
            return None
        steps, counts = self.curve("hellaswag_n")
        return values if steps and (steps[-1], counts[-1]) == (step, len(values)) else None

    def seconds(self, steps):
        """Training time in s after each of the steps: evaluations and checkpoints left out."""
        done, speeds = self.curve("tok_per_s")
        new = np.diff([0, *done]) * self.config["total_batch_tokens"]  # tokens; archives skip steps
        spent = np.cumsum([0.0, *(new / speeds)])
        return np.interp(steps, [0, *done], spent).tolist()


def whole_lines(path):
    """The lines of a log, as bytes, without the last one, which a kill may have left half there."""
    return path.read_bytes().split(b"\n")[:-1]


def read_run(folder):
    """The Run of a run folder, or None when its log has no whole line yet; ValueError for a foreign
    one."""
    path = Path(folder) / "log.jsonl"
    lines = whole_lines(path) if path.is_file() else []
    if not lines:
        return None
    start, values = None, {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(entry, dict):
            raise ValueError(f"{path} line {number} is no JSON object but {str(entry)[:40]}")
        if entry.get("event") in ("start", "resume"):  # a resumed run may have got more steps
            start = entry
        if entry.get("event") == "early stop" and start:
            start = {"planned": start.get("steps")} | start | {"steps": entry["step"]}
            start["stopped"] = True
        for name, value in entry.items():
            if "step" in entry and isinstance(value, int | float):  # null: a step was skipped
                values.setdefault(name, {})[entry["step"]] = value
    if start is None:
        raise ValueError(f"{path} has no start entry: it is not a whole log")
    if "parameters" not in start or "total_batch_tokens" not in start.get("config", {}):
        raise ValueError(f"{path} is of another version: its start entry has no sizes")
    return Run(Path(folder), start, values)
