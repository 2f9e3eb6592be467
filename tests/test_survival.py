"""A run against what ends runs: damage, full disks, a second run, signals, NaN, memory, other data.
Kills at random moments are torture.py's, a few of which are run here."""

import json
import math
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim import AdamW

sys.path.insert(0, str(Path(__file__).parent.parent))  # where this file is the script

import tiny_runs as runs

import train_gpt2
from nanoswitch import checkpoints, cli, files, parallel, signals
from nanoswitch.log import Log, spike

ROOT = Path(__file__).parent.parent
FEW = dict(keep_checkpoints=0, eval_every=3, val_tokens=32, sample_every=0)


@pytest.fixture(scope="module")
def whole(data):
    """An uninterrupted run of 6 steps with checkpoints at 2, 4 and 6."""
    run = data.parent / "whole"
    runs.train(data, run, **FEW)
    return run


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def steps(run):
    return [line["step"] for line in runs.log(run, "train_loss")]


def strict_log(run):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    lines = (run / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


# ----------------------------------------------------------------------------- damage


def cut_short(path):
    os.truncate(path, path.stat().st_size - 100)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = [
    (cut_short, "model.safetensors"), (flip_a_bit, "model.safetensors"),
    (flip_a_bit, "train_state.pt"), (Path.unlink, "config.json"), (cut_short, "SHA256SUMS"),
]  # fmt: skip


@pytest.mark.parametrize("damage, name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    whole, copy, data, capsys, damage, name
):  # fmt: skip
    damage(copy / "step_000006" / name)
    older = runs.snapshot(copy / "step_000004") | runs.snapshot(copy / "step_000002")
    runs.train(data, copy, **FEW)
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "warning" in line)
    assert "step_000006" in line and "continuing from step_000004" in line
    assert name == "SHA256SUMS" or name in line
    assert runs.results(copy) == runs.results(whole)
    assert runs.equal_weights(runs.weights(copy), runs.weights(whole))
    assert (copy / "latest").read_text() == "step_000006\n"
    after = runs.snapshot(copy)
    assert all(after[path] == content for path, content in older.items())


def test_sha256sum_reads_the_checksums(whole):
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=whole / "step_000004")
    assert done.returncode == 0


def test_a_checkpoint_from_before_checksums_still_counts(copy, data):
    (copy / "step_000006" / "SHA256SUMS").unlink()
    assert checkpoints.recover(copy).name == "step_000006"


def test_with_no_whole_checkpoint_left_nothing_is_touched(copy, data, capsys, monkeypatch):
    for folder in copy.glob("step_*"):
        flip_a_bit(folder / "model.safetensors")
    before = runs.snapshot(copy)
    err = runs.refusal(capsys, monkeypatch, *runs.arguments(data, copy, **FEW))
    assert "no whole checkpoint is left" in err and "step_000006/model.safetensors" in err
    assert runs.snapshot(copy) == before


def test_latest_naming_a_missing_checkpoint_is_said_and_mended(copy, data, capsys):
    shutil.rmtree(copy / "step_000006")
    assert checkpoints.recover(copy).name == "step_000004"
    assert "latest names step_000006, which is missing" in capsys.readouterr().out
    assert (copy / "latest").read_text() == "step_000004\n"


# ----------------------------------------------------------------------------- full disks


@pytest.fixture
def full_disk(monkeypatch):
    """full_disk(step): writing the checkpoint of that step fails after a megabyte."""

    def set_up(full_at):
        def save(run, step, *args):
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20 if step == full_at else soft, hard))
            try:
                real(run, step, *args)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        monkeypatch.setattr(checkpoints, "save", save)

    real = checkpoints.save
    return set_up


def test_a_save_that_fails_is_a_warning_and_the_run_goes_on(
    whole, data, tmp_path, full_disk, capsys
):  # fmt: skip
    full_disk(4)
    runs.train(data, tmp_path, **FEW)
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(lines) == 1 and "could not write" in lines[0] and "step_000004" in lines[0]
    assert runs.results(tmp_path) == runs.results(whole)
    assert runs.equal_weights(runs.weights(tmp_path), runs.weights(whole))
    assert [f.name for f in checkpoints.step_folders(tmp_path)] == ["step_000002", "step_000006"]
    assert not list(tmp_path.glob(".step*"))


def test_the_last_save_failing_fails_the_run(whole, data, tmp_path, full_disk, capsys, monkeypatch):
    full_disk(6)
    flags = FEW | dict(keep_checkpoints=1)
    err = runs.refusal(capsys, monkeypatch, *runs.arguments(data, tmp_path, **flags))
    assert "could not write" in err and "step_000006" in err
    assert checkpoints.find_damage(tmp_path / "step_000004") is None
    full_disk(None)
    runs.train(data, tmp_path, **flags)
    assert runs.results(tmp_path) == runs.results(whole)
    assert runs.equal_weights(runs.weights(tmp_path), runs.weights(whole))


def test_windows_syncs_files_that_it_may_write_and_no_folder(tmp_path, monkeypatch):
    """Its os.open refuses every folder, its os.fsync a file opened for reading."""
    opened, real = [], os.open

    def windows_open(path, flags, *rest):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        opened.append(flags)
        return real(path, flags, *rest)

    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(os, "open", windows_open)
    (tmp_path / "file").write_text("a")
    files.sync(tmp_path / "file")
    files.sync(tmp_path)
    assert opened == [os.O_RDWR]


class FullFile:
    """A raw file that takes a few bytes at a time, and none while the disk is full."""

    name, full, content = "log.jsonl", False, b""

    def write(self, content):
        if self.full:
            raise OSError(28, "No space left on device")
        self.content += content[:7]
        return min(7, len(content))


def test_the_log_keeps_what_a_full_disk_refuses(tmp_path, capsys):
    log = Log(tmp_path, 0, active=True)
    log.file = file = FullFile()
    for step in range(1, 6):
        file.full = step in (2, 3)
        log.write(step=step, train_loss=1.0)
        if step == 3:
            with pytest.raises(OSError, match="No space left"):
                log.sync()
    assert [json.loads(line)["step"] for line in file.content.splitlines()] == [1, 2, 3, 4, 5]
    assert "could not write log.jsonl" in capsys.readouterr().out


def test_a_read_only_folder_is_refused_before_any_training():
    other = 65534 if os.geteuid() == 0 else os.geteuid()  # to root nothing is read-only
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        user = os.geteuid()
        os.seteuid(other)
        try:
            for run in (Path(folder), Path(folder) / "deeper"):
                lock = checkpoints.sole_user(run)
                with pytest.raises(ValueError, match="cannot write into run_dir"), lock:
                    pass
        finally:
            os.seteuid(user)


# ----------------------------------------------------------------------------- one run a folder


def test_a_second_run_in_the_folder_is_refused(copy, data, capsys, monkeypatch):
    before = runs.snapshot(copy)
    with checkpoints.sole_user(copy):
        err = runs.refusal(capsys, monkeypatch, *runs.arguments(data, copy, **FEW, max_steps=9))
        assert "another process is training" in err and str(copy) in err
    assert runs.snapshot(copy) == before
    with checkpoints.sole_user(copy):  # is free again
        pass


def test_other_tokens_of_the_same_number_are_refused(copy, data, tmp_path, capsys, monkeypatch):
    runs.make_data(tmp_path / "other", seed=1)
    before = runs.snapshot(copy)
    flags = FEW | dict(max_steps=9)
    err = runs.refusal(capsys, monkeypatch, *runs.arguments(tmp_path / "other", copy, **flags))
    assert "other tokens" in err and str(data) in err and runs.snapshot(copy) == before


def test_the_same_tokens_in_other_shards_are_accepted(copy, tmp_path):
    rng = np.random.default_rng(0)
    train, val = rng.integers(0, 50257, 1450), rng.integers(0, 50257, 200)
    (tmp_path / "cut").mkdir()
    runs.save_bin(tmp_path / "cut" / "val_0.bin", val)
    runs.save_npy(tmp_path / "cut" / "train_1.npy", train)
    assert runs.trainer(tmp_path / "cut", copy, **FEW).resume(copy) == 6


# ----------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_next_step_boundary(whole, data, tmp_path, capfd, number):
    made = runs.trainer(data, tmp_path, **FEW)
    real, before = made.step, signal.getsignal(signal.SIGINT)

    def step(step, *args):
        if step == 2:
            os.kill(os.getpid(), number)
        return real(step, *args)

    made.step = step
    with pytest.raises(SystemExit) as stop:
        train_gpt2.train(made)
    assert stop.value.code == 128 + number
    assert (tmp_path / "latest").read_text().strip() == "step_000003"  # the third was at work
    assert "the same command continues" in capfd.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before
    runs.train(data, tmp_path, **FEW)
    assert runs.results(tmp_path) == runs.results(whole)
    assert runs.equal_weights(runs.weights(tmp_path), runs.weights(whole))


def test_a_second_interrupt_stops_at_once(capfd):
    with signals.StopSignal(active=True) as wish:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert wish.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert "Ctrl-C again" in capfd.readouterr().err


def test_all_ranks_stop_at_the_step_where_one_is_told_to(data, tmp_path):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    line += runs.command(data, tmp_path, **FEW, max_steps=2000, checkpoint_every=0)[1:]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begin = time.time()
    while not (tmp_path / "log.jsonl").exists() or len(steps(tmp_path)) < 2:
        assert process.poll() is None and time.time() - begin < 120
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [Path(f"/proc/{pid}/environ").read_bytes() for pid in children]
    second = next(pid for pid, env in zip(children, ranks, strict=True) if b"\0RANK=1\0" in env)
    os.kill(int(second), signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    last = steps(tmp_path)[-1]
    assert last < 2000 and f"stopped after step {last};" in out
    assert checkpoints.find_damage(tmp_path / f"step_{last:06d}") is None
    assert steps(tmp_path) == list(range(1, last + 1))
    assert (tmp_path / "latest").read_text() == f"step_{last:06d}\n"


# ----------------------------------------------------------------------------- bad steps


def poison(made, bad, kind):
    """Have these steps (0-based) give a loss or gradient that is not finite."""
    real_step, real_forward, now = made.step, made.forward, [0]

    def step(step, *args):
        now[0] = step
        return real_step(step, *args)

    def forward(x, y):
        _, loss = real_forward(x, y)
        return None, loss * math.nan if now[0] in bad and kind == "loss" else loss

    made.step, made.forward = step, forward
    if kind == "gradient":
        last = made.model.transformer.ln_f.weight
        last.register_hook(lambda g: g * math.inf if now[0] in bad else g)


def state_of(made):
    state = {n: w.clone() for n, w in made.model.state_dict().items()}
    for number, optimizer in enumerate(made.optimizers):
        for i, moments in enumerate(optimizer.state.values()):
            state |= {f"{number}.{i}.{k}": v.clone() for k, v in moments.items()}
    return state


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["fused", "plain", "scaled", "muon", "cautious"])
def test_a_bad_step_leaves_weights_and_optimizer_as_they_are(data, tmp_path, kind, optimizer):
    name = {"muon": "muon", "cautious": "normuon"}.get(optimizer, "adamw")
    cautious = optimizer == "cautious"
    made = runs.trainer(data, tmp_path, **FEW, optimizer=name, cautious_decay=cautious)
    if optimizer == "plain":
        groups = [{"params": list(made.model.parameters()), "lr_scale": 1.0}]
        made.optimizers = [AdamW(groups, fused=False)]
    if optimizer == "scaled":
        made.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    poison(made, {1}, kind)
    assert made.step(0).isfinite().all()
    before = state_of(made)
    loss, norm, _ = made.step(1).tolist()
    assert not math.isfinite(loss + norm)
    after = state_of(made)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    if optimizer == "scaled":
        assert made.scaler.get_scale() == 512
    assert made.step(2).isfinite().all()
    changed = state_of(made)
    assert not torch.equal(changed["lm_head.weight"], before["lm_head.weight"])
    assert changed["0.0.step"] == before["0.0.step"] + 1


def check_a_bad_step_of_one_rank(data):
    """Under torchrun: one rank's loss is NaN, and no rank's weights or moments change."""
    modes = [(mode, how) for mode in ("ddp", "zero1", "fsdp") for how in ("adamw", "muon")]
    for mode, optimizer in modes:
        made = runs.trainer(data, "nowhere", **FEW, parallel=mode, optimizer=optimizer)

        def whole(made=made):
            weights, moments = parallel.whole_state(made.model, made.optimizers, made.ranks)
            moments = {f"{n} {k}": v for n, state in moments.items() for k, v in state.items()}
            return {name: value.clone() for name, value in (weights | moments).items()}

        poison(made, {1} if made.ranks.rank == 1 else (), "loss")
        made.step(0)
        before, numbers, after = whole(), made.step(1), whole()
        assert not numbers[:2].isfinite().any(), mode
        assert all(torch.equal(before[name], after[name]) for name in before), mode
        assert made.step(2)[:2].isfinite().all()
        now = whole()
        assert sum(not torch.equal(after[name], now[name]) for name in now) == len(now), mode


def test_a_bad_step_of_one_rank_is_skipped_by_all(data):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*line, __file__, data], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


def test_bad_steps_are_logged_as_skipped_and_five_in_a_row_end_the_run(data, tmp_path):
    made = runs.trainer(data, tmp_path, **FEW, max_steps=20)
    poison(made, {2, *range(5, 20)}, "loss")
    with pytest.raises(ValueError, match="5 steps in a row") as error:
        train_gpt2.train(made)
    assert "--lr" in str(error.value) and "\n" not in str(error.value)
    lines = [line for line in strict_log(tmp_path) if "train_loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 11))
    skipped = [line for line in lines if "skipped" in line]
    assert [line["step"] for line in skipped] == [3, 6, 7, 8, 9, 10]
    assert all(line["train_loss"] is None and line["grad_norm"] is None for line in skipped)
    named = str(error.value).split(" is whole")[0].split()[-1]
    assert checkpoints.find_damage(Path(named)) is None
    assert all(w.isfinite().all() for w in runs.weights(tmp_path).values())


def test_spikes_have_the_z_score_of_the_losses_before(tmp_path):
    rng = np.random.default_rng(0)
    losses = (3 + 0.1 * rng.standard_normal(100)).tolist()
    mean, sd = np.mean(losses), np.std(losses, ddof=1)
    assert spike(mean + 4.9 * sd, losses) is None
    assert spike(mean + 6 * sd, losses) == pytest.approx(6)
    assert spike(mean - 60 * sd, losses) is None
    assert spike(99.0, losses[:19]) is None
    assert spike(math.nan, losses) is None
    assert statistics.stdev([3.0] * 50) == 0 and spike(9.0, [3.0] * 50) is None


def test_a_run_from_before_a_switch_existed_had_it_off(copy, data):
    made = runs.trainer(data, copy, **FEW)
    saved = json.loads((copy / "step_000006" / "config.json").read_text())
    now = asdict(made.model_config)
    del saved["model"]["qk_norm"]
    checkpoints.check_same(copy, saved, now)
    with pytest.raises(ValueError, match="qk_norm False, this one has True"):
        checkpoints.check_same(copy, saved, now | {"qk_norm": True})


def test_the_losses_before_outlive_a_resume(copy):
    log = Log(copy, 4, active=True)
    assert list(log.losses) == runs.column(copy, "train_loss") and len(log.losses) == 4


# ----------------------------------------------------------------------------- memory


def limit_memory(made, most):
    def check(module, inputs):
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    made.forward.register_forward_pre_hook(check)


def test_out_of_memory_lowers_a_micro_batch_of_its_own_choice(whole, data, tmp_path, capsys):
    made = runs.trainer(data, tmp_path, **FEW)
    assert made.micro_batch == 8
    limit_memory(made, 3)
    made.step(0)
    assert (made.micro_batch, made.micro_steps) == (2, 4)
    out = capsys.readouterr().out
    assert "8 -> 4" in out and "4 -> 2" in out
    losses = [made.step(step)[0].item() for step in range(1, 6)]
    assert losses == pytest.approx(runs.column(whole, "train_loss")[1:], abs=1e-5)


def run_out_of_memory(flags):
    """Under torchrun, as one of its ranks: the last rank's memory holds 3 sequences."""

    class Limited(train_gpt2.Trainer):
        def __init__(self, *configs):
            super().__init__(*configs)
            if self.ranks.rank == 1:
                limit_memory(self, 3)

    train_gpt2.Trainer, sys.argv = Limited, ["train_gpt2.py", *flags]
    cli.run(train_gpt2.main)


@pytest.mark.parametrize(
    "restarts, eval_every",
    [pytest.param(0, 0, marks=pytest.mark.slow), (1, 3)],  # in a step, in validation
)
def test_out_of_memory_on_one_of_two_ranks_goes_on_with_less(
    whole, data, tmp_path, restarts, eval_every
):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    line += [f"--max-restarts={restarts}", __file__]
    line += runs.arguments(data, tmp_path, **FEW | {"eval_every": eval_every})

    def start():
        # torchrun's own store still has the addresses of the workers before a restart
        own = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return subprocess.run(line, capture_output=True, text=True, timeout=200, env=own)

    done = start()
    assert "error: out of memory with micro_batch 4: the same command goes on with 2" in done.stderr
    if not restarts:
        assert done.returncode != 0
        done = start()
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 sequences x 16 x 2 micro-steps x 2 ranks" in done.stdout
    ours, theirs = runs.column(tmp_path, "train_loss"), runs.column(whole, "train_loss")
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("size, words", [(8, "try --micro_batch 4"), (1, "lower --block_size")])
def test_out_of_memory_with_a_given_micro_batch_says_what_to_try(data, tmp_path, size, words):
    made = runs.trainer(data, tmp_path, **FEW, micro_batch=size)
    limit_memory(made, 0)
    with pytest.raises(ValueError, match=words):
        made.step(0)


# ----------------------------------------------------------------------------- kills


@pytest.mark.parametrize(
    "work, kills", [("train", 2), pytest.param("all", 4, marks=pytest.mark.slow)]
)
def test_a_few_kills_at_random_moments_lose_nothing(work, kills):
    line = [sys.executable, ROOT / "tests" / "torture.py", "--kills", str(kills), "--work", work]
    done = subprocess.run([*line, "--seed", "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout


if __name__ == "__main__":
    if len(sys.argv) > 2:
        run_out_of_memory(sys.argv[1:])
    else:
        with parallel.Ranks("cpu"):  # else gloo's threads may outlive the interpreter, and abort
            check_a_bad_step_of_one_rank(sys.argv[1])
