"""What a run folder holds, and how a run survives kills, full disks and damage.

    run_dir/log.jsonl       one JSON object a line, every step once
    run_dir/curve.png       drawn from it at each evaluation, where matplotlib is installed
    run_dir/latest          the name of the checkpoint to continue from
    run_dir/.lock           held by the run at work; the kernel frees it when that process dies
    run_dir/wandb_id        with --wandb true: the run's name at Weights & Biases
    run_dir/step_NNNNNN/    model.safetensors   the whole weights under their plain names
                            train_state.pt      optimizer and loss scale, no pickled objects
                            config.json         architecture, flags, step, tokens, data
                            SHA256SUMS          of these three; `sha256sum -c` reads it too

A checkpoint is written beside its place, synced to the disk, then renamed: a kill at any moment
leaves the ones before it whole. An old one is removed only after a newer one is in its place.
"""

import contextlib
import hashlib
import json
import math
import os
import pickle
import platform
import re
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
from collections import deque
from dataclasses import asdict
from pathlib import Path

import torch

from fineweb import write_beside
from model import GPTConfig

FILES = ("model.safetensors", "train_state.pt", "config.json")
SUMS = "SHA256SUMS"
MAX_SKIPPED = 5  # steps in a row without a finite loss and gradient before a run gives up
PIP = "pip install wandb"
SPIKE = 5.0  # standard deviations above the mean of the last 100 losses


# ----------------------------------------------------------------------------- one run a folder


@contextlib.contextmanager
def sole_user(run, active=True):
    """Make the run folder and hold its lock; ValueError when another process has it, or when
    nothing can be written there. Nothing when not active, on all ranks but the first."""
    if not active:
        yield
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = open(run / ".lock", "a")
        if not os.access(run, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise PermissionError(0, "the folder is read-only")
    except OSError as error:
        raise ValueError(
            f"cannot write into run_dir {run}: {error.strerror}; choose another --run_dir"
        ) from error
    with handle:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is training in {run}; let it end, or choose another --run_dir"
            ) from error
        except (ImportError, OSError):  # Windows, or a file system without locks: no guard
            pass
        yield


# ----------------------------------------------------------------------------- checkpoints


def step_folders(run):
    """The run's checkpoints, oldest first."""
    folders = [f for f in Path(run).glob("step_*") if re.fullmatch(r"step_\d+", f.name)]
    return sorted(folders, key=lambda folder: int(folder.name[5:]))


def save(run, step, weights, state, config, keep=0):
    """Write a checkpoint and prune those before it down to `keep` (0 = all).

    weights {name: tensor}; state what torch.load(weights_only=True) reads; config what JSON holds.
    OSError, one line, when it could not be written; the checkpoints before it are then as they
    were."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder, beside = run / f"step_{step:06d}", run / f".step_{step:06d}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        save_file(weights, beside / "model.safetensors")
        torch.save(state, beside / "train_state.pt")
        (beside / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        sums = "".join(f"{sha256(beside / name)}  {name}\n" for name in FILES)
        (beside / SUMS).write_text(sums)
        for path in (*beside.iterdir(), beside):
            sync(path)
        remove(folder)
        beside.rename(folder)
        sync(run)
        name_latest(run, folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have kinds
        shutil.rmtree(beside, ignore_errors=True)
        reason, free = str(error).splitlines()[0], shutil.disk_usage(run).free
        need = size(weights) + size(state)
        if free < 1.01 * need:  # torch does not say so
            reason = f"{free / 1e6:,.0f} MB are free, {need / 1e6:,.0f} MB needed"
        raise OSError(f"could not write {folder}: {reason}") from error
    # a later one may be left of a run that was killed, or damaged: it is none of the newest
    done = [f for f in step_folders(run) if int(f.name[5:]) <= step]
    for old in done[:-keep] if keep else []:
        remove(old)


def recover(run, say=print):
    """The folder to continue from: the checkpoint that `latest` names, or if that one is damaged
    the newest whole one; None when there is none yet.

    Every damaged one passed over is named by say(line). Removes what a kill left half written.
    ValueError when there are checkpoints, and all are damaged."""
    for rest in run.glob(".step_*.tmp"):
        shutil.rmtree(rest, ignore_errors=True)
    latest = run / "latest"
    named = latest.read_text(errors="replace").strip() if latest.is_file() else ""
    folders = step_folders(run)[::-1]
    folders.sort(key=lambda folder: folder.name != named)  # stable: the others newest first
    damaged = []
    if named and named not in [folder.name for folder in folders]:
        damaged.append(f"{latest} names {named[:40]}, which is missing")
    for folder in folders:
        damage = find_damage(folder)
        if damage:
            damaged.append(damage)
            continue
        for line in damaged:
            say(f"warning: {line}; continuing from {folder.name}")
        if folder.name != named:
            name_latest(run, folder)
        return folder
    if damaged:
        raise ValueError(
            f"no whole checkpoint is left in {run}: {damaged[0]}; restore it, or choose another "
            f"--run_dir"
        )
    return None


def find_damage(folder):
    """What is wrong with a checkpoint, as one line; None when it is whole.

    One without SHA256SUMS, from before there were any, is trusted when its files are there."""
    for name in FILES:
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
    try:
        for name in FILES:
            check_sum(folder, name)
    except ValueError as error:
        return str(error).partition(";")[0]  # the rest is for who asked for this folder
    except OSError as error:
        return f"{error.filename or folder} cannot be read: {error.strerror}"
    return None


def check_sum(folder, name):
    """ValueError unless a file of a checkpoint matches SHA256SUMS, if there is one."""
    if not (folder / SUMS).is_file():
        return
    lines = (folder / SUMS).read_text(errors="replace").splitlines()
    sums = dict(line.split("  ", 1)[::-1] for line in lines if "  " in line)
    if sums.get(name) != sha256(folder / name):
        size = (folder / name).stat().st_size
        raise ValueError(
            f"{folder / name} ({size:,} bytes) does not match its checksum in {SUMS}; take another "
            f"step's folder, or remove {SUMS} to trust it"
        )


def read_state(path):
    """What torch.save wrote, tensors and plain values only, on the CPU; ValueError for anything
    else."""
    try:
        state = torch.load(path, "cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is no whole training state: {reason}") from None
    if not isinstance(state, dict) or not {"optimizer", "scaler"} <= state.keys():
        raise ValueError(f"{path} is no training state: it lacks optimizer or scaler")
    return state


def check_same(run, saved, now):
    """ValueError when a checkpoint's config differs from what this run is, {name: value}."""
    lacks = {"model", "train", "step", "data_tokens"} - saved.keys()
    if lacks:
        raise ValueError(f"{run} is of another version: it lacks {', '.join(sorted(lacks))}")
    # a switch that is newer than the run was off in it
    then = asdict(GPTConfig()) | saved["model"] | saved["train"] | saved
    if "data_sha256" not in then:  # from before it was kept
        then["data_sha256"] = now["data_sha256"]
    for name, value in now.items():
        if then.get(name) == value:
            continue
        if name == "data_sha256":
            hint = f"bring back the shards that {then['data_dir']} held"
            raise ValueError(
                f"{run} was begun with other tokens than data_dir holds; {hint}, or choose "
                f"another --run_dir"
            )
        raise ValueError(
            f"{run} holds a run with {name} {then.get(name)}, this one has {value}; "
            f"use that value, or choose another --run_dir"
        )


def size(value):
    """Bytes of the tensors in nested dicts."""
    if isinstance(value, dict):
        return sum(map(size, value.values()))
    return value.nbytes if torch.is_tensor(value) else 0


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def name_latest(run, folder):
    with write_beside(str(run / "latest")) as file:
        file.write(f"{folder.name}\n".encode())


def remove(folder):
    """Remove a checkpoint; first its name, so that no half of it is ever taken for a whole."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name}.old.tmp")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


# ----------------------------------------------------------------------------- the log


class Log:
    """log.jsonl, the terminal and, if wanted, wandb, on the first rank; on the others it writes
    nothing. As a context, it closes wandb.

    losses: the last 100 training losses; evaluated: the keys that the log has of step `step`
    already; skipped: steps in a row that were, up to now. What a full disk keeps out of the file
    waits in memory."""

    def __init__(self, run, step, active, wandb=False):
        self.run, self.file, self.waiting, self.skipped = run, None, b"", 0
        self.losses, self.evaluated = deque(maxlen=100), set()
        self.tracker = Tracker(run, self.say) if wandb and active else None
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
        """To wandb only."""
        if self.tracker:
            self.tracker.attempt(self.tracker.write, entry)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.tracker:
            stopped = kind is SystemExit  # by a signal, to be continued
            self.tracker.attempt(self.tracker.finish, 0 if kind is None or stopped else 1)

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
            f"the loss or gradient was NaN or infinite {self.skipped} steps in a row; "
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

    def draw(self):
        """Draw the curves so far into curve.png, where matplotlib is installed."""
        if not self.file:
            return
        import compare

        try:
            compare.draw({self.run.name: [compare.read_run(self.run)]}, self.run / "curve.png")
        except ModuleNotFoundError:
            pass
        except Exception as error:  # a picture is not worth a run
            self.say(f"warning: no curve.png: {type(error).__name__} {error}")

    def say(self, text):
        """Print a line; a terminal or pipe that is gone is no reason to stop training."""
        if self.file:
            with contextlib.suppress(OSError):
                print(text, flush=True)


class Tracker:
    """Sends what the log gets to Weights & Biases too, as one run there however often this one is
    continued. Whatever fails in it costs a warning, and training goes on without.

    ModuleNotFoundError, before anything is done, when the package is missing."""

    def __init__(self, folder, say):
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"--wandb true needs wandb: {PIP} ({error})") from None
        self.wandb, self.folder, self.say, self.run = wandb, folder, say, None

    def attempt(self, call, *args):
        if not self.wandb:
            return
        try:
            call(*args)
        except Exception as error:  # of any kind: it talks to another process, and to a server
            if isinstance(error, ConnectionError):  # its process died: it shall not wait for it
                with contextlib.suppress(Exception, SystemExit):
                    self.wandb.teardown()
            self.wandb, reason = None, (str(error).splitlines() or [""])[0]
            key = os.environ.get("WANDB_API_KEY") or None
            reason = f"{type(error).__name__}: {reason.replace(key, '***') if key else reason}"
            self.say(f"warning: wandb failed ({reason}); training goes on without it")

    def start(self, entry):
        name = self.folder / "wandb_id"
        if not name.is_file():
            with write_beside(str(name)) as file:
                file.write(secrets.token_hex(8).encode())
        # neither the terminal's lines nor git's remote, whose address may hold a password
        quiet = self.wandb.Settings(console="off", disable_git=True, save_code=False, quiet=True)
        self.run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", "nanoswitch"), name=self.folder.resolve().name,
            id=name.read_text().strip(), resume="allow", dir=self.folder, settings=quiet,
        )  # fmt: skip
        about = {name: entry[name] for name in entry.keys() - {"config", "event", "step"}}
        self.run.config.update(entry["config"] | about, allow_val_change=True)
        # not wandb's own count, which takes no step twice: after a kill some are done again
        self.run.define_metric("*", step_metric="step")

    def write(self, entry):
        if "config" in entry:
            self.start(entry)
        else:
            if "samples" in entry:
                rows = [[entry["step"], text] for text in entry["samples"]]
                entry["samples"] = self.wandb.Table(["step", "text"], rows)
            self.run.log({name: value for name, value in entry.items() if value is not None})

    def finish(self, status):
        self.run.finish(status)


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
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        out = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return None
    return out.stdout.strip()


# ----------------------------------------------------------------------------- signals, bad steps


class StopSignal:
    """SIGTERM or SIGINT as a wish to read at step boundaries: `number` is 0 before there is one.

    A second Ctrl-C stops at once."""

    def __init__(self, active):
        self.active, self.number = active, 0

    def __enter__(self):
        self.before = {n: signal.signal(n, self.note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number, frame):
        if self.number == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        if self.active:  # print() is not safe in here: it may have been interrupted itself
            name, more = signal.Signals(number).name, "; Ctrl-C again stops at once"
            text = f"{name}: saving after this step{more if number == signal.SIGINT else ''}\n"
            os.write(2, text.encode())

    def status(self):
        """The exit status of a run that was stopped, 128 + signal as shells have it: not 0, so
        that Slurm and torchrun do not take it for finished, and unlike that of an error."""
        return 128 + (self.number or signal.SIGTERM)  # another rank may have got it

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def spike(loss, losses):
    """The z-score of a loss against the last ones, if it is a spike upwards; else None."""
    if len(losses) < 20 or not math.isfinite(loss):
        return None
    spread = statistics.stdev(losses)
    z = (loss - statistics.fmean(losses)) / spread if spread else 0.0
    return z if z > SPIKE else None
