"""What a run folder holds, and how a run survives kills, full disks and damage.

    run_dir/log.jsonl       one JSON object a line, every step once
    run_dir/curve.png       drawn from it at each evaluation, where matplotlib is installed
    run_dir/latest          the name of the checkpoint to continue from
    run_dir/best            the name of the one of the lowest validation loss, which is kept
    run_dir/.lock           held by the run at work; the kernel frees it when that process dies
    run_dir/wandb_id        with --wandb true: the run's name at Weights & Biases; trackio_id too
    run_dir/step_NNNNNN/    model.safetensors   the whole weights under their plain names
                            train_state.pt      optimizer and loss scale, no pickled objects
                            config.json         architecture, flags, step, tokens, data
                            SHA256SUMS          of these three; `sha256sum -c` reads it too

A checkpoint is written beside its place, synced to the disk, then renamed: a kill at any moment
leaves the ones before it whole. An old one is removed only after a newer one is in its place.
"""

import contextlib
import json
import os
import pickle
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from model import GPTConfig
from nanoswitch.files import SUMS, check_sum, locked, read_json, sha256, sync, write_beside

FILES = ("model.safetensors", "train_state.pt", "config.json")


@contextlib.contextmanager
def sole_user(run, active=True):
    """Make the run folder and hold its lock; ValueError when another process has it, or when
    nothing can be written there. Nothing when not active, on all ranks but the first."""
    if not active:
        yield
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        open(run / ".lock", "a").close()
        if not os.access(run, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise PermissionError(0, "the folder is read-only")
    except OSError as error:
        raise ValueError(
            f"cannot write into run_dir {run}: {error.strerror}; choose another --run_dir"
        ) from error
    busy = f"another process is training in {run}; let it end, or choose another --run_dir"
    with locked(run / ".lock", busy):
        yield


def step_folders(run):
    """The run's checkpoints, oldest first."""
    folders = [f for f in Path(run).glob("step_*") if re.fullmatch(r"step_\d+", f.name)]
    return sorted(folders, key=lambda folder: int(folder.name[5:]))


def save(run, step, weights, state, config, keep=0):
    """Write a checkpoint and prune those before it down to `keep` (0 = all) and the best one.

    weights {name: tensor}; state what torch.load(weights_only=True) reads; config what JSON holds.
    OSError, one line, when it could not be written; the checkpoints before it are then as they
    were."""
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
        if old.name != name_in(run / "best"):
            remove(old)


def recover(run, say=print):
    """The folder to continue from: the checkpoint that `latest` names, or if that one is damaged
    the newest whole one; None when there is none yet.

    Every damaged one passed over is named by say(line). Removes what a kill left half written.
    ValueError when there are checkpoints, and all are damaged."""
    for rest in run.glob(".step_*.tmp"):
        shutil.rmtree(rest, ignore_errors=True)
    latest, named = run / "latest", name_in(run / "latest")
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


def newest_config(run):
    """config.json of the run folder's newest checkpoint, {} where there is none that can be read:
    what recover() will say more of."""
    for folder in step_folders(run)[::-1]:
        with contextlib.suppress(ValueError, OSError):
            return read_json(folder / "config.json")
    return {}


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
        before = then.get(name)
        if before == value:
            continue
        if name == "data_sha256":
            hint = f"bring back the shards that {then['data_dir']} held"
            raise ValueError(
                f"{run} was begun with other tokens than data_dir holds; {hint}, or choose "
                f"another --run_dir"
            )
        raise ValueError(
            f"{run} holds a run with {name} {before or repr(before)}, this one has {value}; "
            f"use that value, or choose another --run_dir"
        )


def size(value):
    """Bytes of the tensors in nested dicts."""
    if isinstance(value, dict):
        return sum(map(size, value.values()))
    return value.nbytes if torch.is_tensor(value) else 0


# what a run may go on with otherwise than it began
RATES = (
    "lr", "min_lr_frac", "warmup_steps", "schedule", "cooldown_frac", "max_steps", "muon_lr",
    "muon_coefficients", "muon_momentum", "weight_decay", "cautious_decay", "beta1", "beta2",
    "grad_clip", "dtype",
)  # fmt: skip


def changed(then, now):
    """What a run's flags say otherwise than its checkpoint's about rates, schedule and length:
    {name: value} each -> ["lr 0.001 -> 0.0005", ...]"""
    names = [name for name in RATES if then.get(name, now[name]) != now[name]]
    return [f"{name} {then[name]} -> {now[name]}" for name in names]


def name_in(file):
    """The checkpoint that run/latest or run/best names, as it stands there; "" for none."""
    return file.read_text(errors="replace").strip() if file.is_file() else ""


def name_latest(run, folder, file="latest"):
    with write_beside(str(run / file)) as handle:
        handle.write(f"{folder.name}\n".encode())


def remove(folder):
    """Remove a checkpoint; first its name, so that no half of it is ever taken for a whole."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name}.old.tmp")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
