"""Tiny runs of train_gpt2.py: their data, their flags, and what they leave."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_gpt2
from model import GPTConfig
from nanoswitch import cli

ROOT = Path(__file__).parent.parent
MODEL = dict(block_size=16, n_layer=2, n_head=2, n_embd=16)
TRAIN = dict(
    device="cpu", dtype="float32", compile="false", total_batch_tokens=128, max_steps=6, lr=3e-3,
    warmup_steps=3, grad_clip=0.7, eval_every=2, val_tokens=100, sample_every=3, checkpoint_every=2,
    curve=False,
)  # fmt: skip
FLAGS = MODEL | TRAIN


def save_npy(path, tokens):
    np.save(path, np.asarray(tokens, dtype=np.uint16))


def save_bin(path, tokens):
    """llm.c's format: 256 int32, the first three magic, version and length, then uint16."""
    header = struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253)
    Path(path).write_bytes(header + np.asarray(tokens, dtype="<u2").tobytes())


def make_data(folder, train=1450, val=200, seed=0):
    """A folder of shards, two train ones of both formats -> its train and val tokens."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    train, val = rng.integers(0, 50257, train), rng.integers(0, 50257, val)
    save_npy(folder / "x_val_000000.npy", val)
    save_npy(folder / "x_train_000001.npy", train[: len(train) // 2])
    save_bin(folder / "x_train_000002.bin", train[len(train) // 2 :])
    return train, val


def configs(data, run, **changes):
    flags = FLAGS | {"data_dir": str(data), "run_dir": str(run)} | changes
    fields = GPTConfig.__dataclass_fields__
    model = GPTConfig(**{k: v for k, v in flags.items() if k in fields})
    return model, train_gpt2.TrainConfig(**{k: v for k, v in flags.items() if k not in fields})


def trainer(data, run, **changes):
    return train_gpt2.Trainer(*configs(data, run, **changes))


def train(data, run, **changes):
    made = trainer(data, run, **changes)
    train_gpt2.train(made)
    return made


def arguments(data, run, **changes):
    flags = FLAGS | {"data_dir": data, "run_dir": run} | changes
    return [f"--{name}={value}" for name, value in flags.items()]


def command(*args, **changes):
    return [sys.executable, str(ROOT / "train_gpt2.py"), *arguments(*args, **changes)]


def torchrun(ranks, *args, **changes):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    line = [sys.executable, *launch, *command(*args, **changes)[1:]]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def log(run, *keys):
    """The lines of log.jsonl that have all of these keys."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if all(key in line for key in keys)]


def column(run, key):
    return [line[key] for line in log(run, key)]


def results(run):
    """What must not depend on kills and layout: all but event lines, without the clock's."""
    lines = [line for line in log(run) if "event" not in line]
    clock = ("tok_per_s", "peak_memory_bytes")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def weights(run):
    return load_file(run / (run / "latest").read_text().strip() / "model.safetensors")


def equal_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def refusal(capsys, monkeypatch, *args):
    """Run the script's main in this process, which must end in one line -> the line."""
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *args])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(train_gpt2.main)
    err = capsys.readouterr().err
    assert stop.value.code in (1, 2) and err.count("\n") == 1 and err.startswith("error: "), err
    return err
