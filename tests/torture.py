"""python tests/torture.py --kills 100 [--work train|fineweb|report|sweep] [--seed S]

Kills processes with SIGKILL at random moments, starts them again with the same command until they
are done, and compares what they leave with what undisturbed ones leave, byte for byte: the weights
and the log of train_gpt2.py, the shards of fineweb.py, the table, the pictures and the runs of
compare.py. Prints where the kills struck. Exit status 1 on any difference.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a busy machine then slows tiny models down less

import numpy as np

from nanoswitch import cli
from nanoswitch.tokenizer import get_tokenizer

STEPS = 12
KINDS = ("step", "evaluation", "checkpoint")


@dataclass
class TortureConfig:
    kills: int = 100
    """kills in all"""
    work: Literal["all", "train", "fineweb", "report", "sweep"] = "all"
    """whom to kill; all: of ten kills six go to train, two to fineweb, one each to compare.py's
    report of finished runs and to its sweep"""
    seed: int = 0
    """of the moments"""


def spawn(script, *flags):
    """Run a script's main in a child process, forked so that imports are paid once -> its pid."""
    module = __import__(script)
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        sys.argv = [f"{script}.py", *map(str, flags)]
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            cli.run(module.main)
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
        sys.__stderr__.write(err.getvalue())
    finally:
        os._exit(status)


def ended(pid):
    """Whether the process is done; RuntimeError when it failed by itself."""
    done, status = os.waitpid(pid, os.WNOHANG)
    if done and os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"a restart failed with status {os.waitstatus_to_exitcode(status)}")
    return bool(done)


def finish(pid):
    while not ended(pid):
        time.sleep(0.002)


def killed(pid, moment):
    """Wait until moment() is true, kill -> True; False when the process was done before."""
    while not moment():
        if ended(pid):
            return False
        time.sleep(0.0005)
    if ended(pid):
        return False
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def after(seconds):
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


# ----------------------------------------------------------------------------- the works


class Train:
    """train_gpt2.py: kills before the first step, in steps, in evaluations and in checkpoints."""

    script = "train_gpt2"

    def __init__(self, folder):
        get_tokenizer()  # a child should not pay for it
        data = folder / "data"
        data.mkdir()
        rng = np.random.default_rng(0)
        np.save(data / "train_1.npy", rng.integers(0, 50257, 1200).astype(np.uint16))
        np.save(data / "val_0.npy", rng.integers(0, 50257, 400).astype(np.uint16))
        self.flags = dict(
            data_dir=data, block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.1, device="cpu",
            dtype="float32", compile="false", total_batch_tokens=128, max_steps=STEPS,
            warmup_steps=3, eval_every=2, val_tokens=96, sample_every=6, checkpoint_every=3,
            curve="false",
        )  # fmt: skip

    def command(self, out):
        return [f"--{name}={value}" for name, value in (self.flags | {"run_dir": out}).items()]

    def moment(self, out, rng):
        """A random time after a random thing: the start, a step, an evaluation, a checkpoint."""
        log, kind, begun = out / "log.jsonl", rng.choice(("start", *KINDS)), []
        size = log.stat().st_size if log.exists() else 0
        wait = rng.uniform(0, 0.4 if kind == "start" else 0.02)

        def reached():
            grown = log.exists() and log.stat().st_size > size + 500
            return kind == "start" or (grown and self.where(out) == kind)

        def moment():
            if not begun and reached():
                begun.append(time.monotonic())
            return bool(begun) and time.monotonic() - begun[0] >= wait

        return moment

    def where(self, out):
        """What a run was at, from what it left."""
        if any(out.glob(".step_*.tmp")):
            return "checkpoint"
        try:
            last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
        except (OSError, IndexError, json.JSONDecodeError):
            return "start"
        if "event" in last:
            return "start"
        step, left = last["step"], []
        if "train_loss" in last and (step % 2 == 0 or step == STEPS):
            left = ["val_loss"]
        elif "val_loss" in last and (step % 6 == 0 or step == STEPS):
            left = ["samples"]
        return "evaluation" if left else "step"

    def result(self, out):
        """Weights and log, without what the clock and the restarts say in it."""
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines if "train_loss" in line]
        assert steps == list(range(1, STEPS + 1)), f"steps {steps}"
        kept = [strip(line) for line in lines if "event" not in line]
        latest = out / (out / "latest").read_text().strip()
        left = sorted(p.name for p in out.iterdir())
        return (latest / "model.safetensors").read_bytes(), kept, left


class Fineweb:
    """fineweb.py on local text, into many small shards."""

    script = "fineweb"

    def __init__(self, folder):
        rng = random.Random(0)
        words = [f"{rng.randrange(10**6)} {name}" for name in dir(np) for _ in range(4)]
        self.source = folder / "text.jsonl"
        with open(self.source, "w") as file:
            for _ in range(4000):
                file.write(json.dumps({"text": " ".join(rng.choices(words, k=60))}) + "\n")

    def command(self, out):
        return [
            "--source", self.source, "--out", out, "--shard_tokens", 20000, "--val_tokens", 5000,
            "--workers", 1,
        ]  # fmt: skip

    def moment(self, out, rng):
        return after(rng.uniform(0, 0.8))

    def where(self, out):
        if any(out.glob("*.tmp")):
            return "write"
        return "between shards" if any(out.glob("*.npy")) else "start"

    def result(self, out):
        assert not list(out.glob("*.tmp")), "a part file is left"
        return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.is_file()}


class Report:
    """compare.py on finished runs: table and pictures, whole or not there."""

    script = "compare"

    def __init__(self, folder):
        import matplotlib.pyplot  # noqa: F401  a child should not pay for it

        self.run = folder / "finished"
        self.run.mkdir()
        start = {"event": "start", "parameters": 1, "config": {"total_batch_tokens": 100}}
        lines = [start, *({"step": i, "train_loss": 9 - i / 9, "tok_per_s": 5} for i in range(50)),
                 {"step": 49, "val_loss": 3.5}]  # fmt: skip
        (self.run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def command(self, out):
        return [self.run, "--out", out]

    def moment(self, out, rng):
        return after(rng.uniform(0, 1.0))

    def where(self, out):
        picture = out / "curves.png"
        if picture.exists():  # whole, at every moment
            content = picture.read_bytes()
            assert content[:4] == b"\x89PNG" and content[-8:-4] == b"IEND", "half a picture"
        return "write" if any(out.glob("*.tmp")) else "drawing"

    def result(self, out):
        return {p.name: p.read_bytes() for p in sorted(out.iterdir())}


class Sweep:
    """compare.py that trains: two configs, one after the other. A kill strikes compare.py alone:
    the run that it started goes on, and the next compare.py must wait for it."""

    script = "compare"

    def __init__(self, folder):
        train = Train(folder)
        self.flags = [f"--{name}={value}" for name, value in train.flags.items()]
        self.configs = [folder / "gpt2.toml", folder / "rope.toml"]
        for path in self.configs:
            path.write_text(f'pos = "{"rope" if path.stem == "rope" else "learned"}"\n')

    def command(self, out):
        return [*self.configs, "--out", out, *self.flags]

    def moment(self, out, rng):
        return after(rng.uniform(0, 12))

    def where(self, out):
        if (out / "curves.png.tmp").exists() or (out / "results.json").exists():
            return "report"
        return f"run {max(1, len(list(out.glob('runs/*/*'))))}"

    def result(self, out):
        """Every run's weights and log, and the table, without what the clock says in them."""
        logs, weights = [], []
        for run in sorted(out.glob("runs/*/*")):
            lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
            logs.append([strip(line) for line in lines if "event" not in line])
            latest = run / (run / "latest").read_text().strip()
            weights.append((latest / "model.safetensors").read_bytes())
        return weights, logs, strip(json.loads((out / "results.json").read_text()))


def strip(value):
    """A JSON value without times and memory."""
    clock = {"tok_per_s", "peak_memory_bytes", "wall_s", "s"}
    if isinstance(value, dict):
        return {key: strip(inner) for key, inner in value.items() if key not in clock}
    return value


WORKS = {
    "train": (Train, 0.6), "fineweb": (Fineweb, 0.2), "report": (Report, 0.1), "sweep": (Sweep, 0.1)
}  # fmt: skip


def torture(name, kills, rng, folder):
    """Kill a work `kills` times; run after run is brought to its end and compared -> the tally."""
    folder.mkdir()
    work, tally, runs = WORKS[name][0](folder), Counter(), 0
    reference = folder / "reference"
    finish(spawn(work.script, *work.command(reference)))
    wanted = work.result(reference)
    while sum(tally.values()) < kills:
        out = folder / f"run{runs}"
        for _ in range(min(rng.randint(1, 5), kills - sum(tally.values()))):
            if killed(spawn(work.script, *work.command(out)), work.moment(out, rng)):
                tally[work.where(out)] += 1
        finish(spawn(work.script, *work.command(out)))
        runs += 1
        if work.result(out) != wanted:
            raise RuntimeError(f"run {runs} of {name} differs from an undisturbed one")
        shutil.rmtree(out)
    return tally, runs


def main():
    config = cli.parse(TortureConfig)
    names = list(WORKS) if config.work == "all" else [config.work]
    share = sum(WORKS[name][1] for name in names)
    left = config.kills
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            kills = left if name == names[-1] else round(config.kills * WORKS[name][1] / share)
            left -= kills
            try:
                begin, rng = time.time(), random.Random(f"{config.seed} {name}")
                tally, runs = torture(name, kills, rng, Path(folder) / name)
            except (RuntimeError, AssertionError) as error:
                raise ValueError(f"{name}: {error}") from None
            kinds = ", ".join(f"{n} in {kind}" for kind, n in sorted(tally.items()))
            print(
                f"{name:8} {kills} kills ({kinds}), {runs} runs brought to their end, all as "
                f"undisturbed ones; {time.time() - begin:.0f} s",
                flush=True,
            )
    print(f"{config.kills} kills, nothing lost")


if __name__ == "__main__":
    cli.run(main)
