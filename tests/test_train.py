"""train_gpt2.py against loops and formulas written out here: the data order, the schedule, whole
runs, kills and resumes, ranks, checkpoints, the log, and what it says about bad input."""

import itertools
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_runs import (
    FLAGS,
    MODEL,
    TRAIN,
    arguments,
    column,
    command,
    equal_weights,
    log,
    make_data,
    refusal,
    results,
    save_bin,
    save_npy,
    snapshot,
    torchrun,
    train,
    trainer,
    weights,
)

import train_gpt2 as t
from model import GPT, GPTConfig
from nanoswitch import checkpoints, cli, micro_batch, optimizers, progress
from nanoswitch.log import Log, read_run
from nanoswitch.shards import load_shards
from nanoswitch.tokenizer import get_tokenizer
from nanoswitch.windows import Windows, shuffled

ROOT = Path(__file__).parent.parent
EOT = 50256


# ----------------------------------------------------------------------------- data and runs


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def tokens(shared):
    return make_data(shared / "data")


@pytest.fixture(scope="module")
def data(shared, tokens):
    return shared / "data"


@pytest.fixture(scope="module")
def plain(shared, data):
    """An ordinary run of 6 steps in this process."""
    train(data, shared / "plain")
    return shared / "plain"


@pytest.fixture(scope="module")
def dropped(shared, data):
    """An uninterrupted run with dropout, of 12 steps."""
    train(data, shared / "dropped", dropout=0.1, max_steps=12)
    return shared / "dropped"


# ----------------------------------------------------------------------------- data order


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000, 4097])
def test_shuffled_is_a_permutation_and_a_pure_function(n):
    everything = shuffled(np.arange(n), n, (1, 0))
    assert sorted(everything.tolist()) == list(range(n))
    some = np.random.default_rng(0).integers(0, n, 20)
    assert [shuffled(np.array([i]), n, (1, 0))[0] for i in some] == everything[some].tolist()


@pytest.mark.parametrize("n", [64, 1000, 4097])
def test_shuffled_differs_by_seed_and_from_the_identity(n):
    a, b = (
        shuffled(np.arange(n), n, (1, 0)),
        shuffled(np.arange(n), n, (2, 0)),
    )
    # of two random permutations, one place on average is equal; ten are beyond any luck
    assert (a == b).sum() < 10 and (a == np.arange(n)).sum() < 10
    assert (np.abs(np.diff(a)) == 1).sum() < 12  # two neighbours on average stay neighbours
    assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 5 / math.sqrt(n)
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(n)


def test_shuffled_sends_each_index_everywhere_equally_often():
    n, seeds = 7, 1400
    count = np.zeros((n, n))
    for seed in range(seeds):
        count[np.arange(n), shuffled(np.arange(n), n, (seed, 0))] += 1
    sigma = math.sqrt(seeds / n * (1 - 1 / n))
    assert np.abs(count - seeds / n).max() < 5 * sigma


def test_shuffled_sends_neighbours_any_distance_apart():
    n, seeds = 64, 300
    count = np.zeros(n)
    for seed in range(seeds):
        count += np.bincount(np.diff(shuffled(np.arange(n), n, (seed, 0))) % n, minlength=n)
    assert ((count[1:] - seeds) ** 2 / seeds).sum() / (n - 1) < 2  # chi-squared per degree


def test_windows_equal_the_concatenation_cut_by_hand(tmp_path):
    stream = np.random.default_rng(0).integers(0, 50257, 101)
    cuts = [0, 20, 23, 24, 60, 101]  # a window of 8 spans up to four of these shards
    for i, (a, b) in enumerate(itertools.pairwise(cuts)):
        save, suffix = [(save_npy, "npy"), (save_bin, "bin")][i % 2]
        save(tmp_path / f"train_{i:06d}.{suffix}", stream[a:b])
    for T in (1, 8, 50, 100):
        windows = Windows(load_shards(tmp_path, "train"), T)
        assert windows.tokens == 101 and windows.count == 100 // T
        x, y = windows.read(np.arange(windows.count)[::-1])
        for row, w in enumerate(reversed(range(windows.count))):
            assert x[row].tolist() == stream[w * T : w * T + T].tolist()
            assert y[row].tolist() == stream[w * T + 1 : w * T + T + 1].tolist()


@pytest.mark.parametrize("size", [4, 7, 25])  # 25: a batch of more than one epoch
def test_an_epoch_covers_every_window_once_and_the_next_in_another_order(size):
    windows = Windows([np.zeros(10 * 3 + 1)], 3)
    order = np.concatenate([windows.batch(step, size, seed=5) for step in range(100 // size)])
    epochs = order[: len(order) // 10 * 10].reshape(-1, 10).tolist()
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    assert windows.batch(3, size, 5).tolist() == order[3 * size : 4 * size].tolist()


# ----------------------------------------------------------------------------- schedule, optimizer


@pytest.mark.parametrize("warmup", [0, 10])
def test_learning_rate_follows_its_formula(warmup):
    lr, least, steps, cooldown = 3e-3, 0.1, 100, 20
    made = {
        kind: t.TrainConfig(lr=lr, min_lr_frac=least, warmup_steps=warmup, schedule=kind)
        for kind in ("cosine", "trapezoid", "constant")
    }
    for s in range(steps):
        rates = {kind: t.learning_rate(s, config, steps) for kind, config in made.items()}
        if s < warmup:
            assert all(rate == pytest.approx(lr * (s + 1) / warmup) for rate in rates.values())
            continue
        low = lr * least
        angle = math.pi * (s - warmup) / (steps - warmup)
        assert rates["constant"] == lr
        assert rates["cosine"] == pytest.approx(low + (lr - low) * (1 + math.cos(angle)) / 2)
        down = min(1, (steps - s) / cooldown)
        assert rates["trapezoid"] == pytest.approx(low + (lr - low) * down)
    for kind in ("cosine", "trapezoid"):  # where both end
        assert t.learning_rate(steps, made[kind], steps) == pytest.approx(lr * least)


@pytest.mark.parametrize("norm, mlp", [("layernorm", "gelu"), ("rmsnorm", "swiglu")])
def test_only_matrices_decay(norm, mlp):
    model = GPT(GPTConfig(**MODEL, norm=norm, mlp=mlp))
    [optimizer] = optimizers.make_optimizers(model, t.TrainConfig(weight_decay=0.3))
    groups = optimizer.param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay)
    for name, p in model.named_parameters():
        vector = name.endswith("bias") or "ln_" in name
        assert decay.pop(id(p)) == (0 if vector else 0.3), name
    assert not decay


# ----------------------------------------------------------------------------- whole runs


def cut(tokens, windows, T=16):
    """Inputs and targets of these windows, cut out of one list of tokens."""
    x = torch.tensor(np.stack([tokens[w * T : w * T + T] for w in windows]))
    return x, torch.tensor(np.stack([tokens[w * T + 1 : w * T + T + 1] for w in windows]))


def naive_loss(model, x, y):
    return F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())


def test_a_run_equals_a_loop_written_out(plain, tokens):
    torch.manual_seed(1337)
    model = GPT(GPTConfig(**MODEL))
    named = dict(model.named_parameters())
    matrices = [n for n in named if n.endswith(("wte.weight", "wpe.weight")) or ".c_" in n]
    matrices = [n for n in matrices if n.endswith("weight")]
    groups = [
        {"params": [named[n] for n in matrices], "weight_decay": 0.1},
        {"params": [p for n, p in named.items() if n not in matrices], "weight_decay": 0},
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=False, foreach=False)
    order = Windows([tokens[0]], 16)
    losses, norms = [], []
    for step in range(6):
        loss = naive_loss(model, *cut(tokens[0], order.batch(step, 8, 1337)))
        adam.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in named.values()))
        for p in named.values():
            p.grad *= min(1, 0.7 / norm)
        for group in adam.param_groups:  # 3 steps of warm-up, then half a cosine over 3
            height = (1 + math.cos(math.pi * (step - 3) / 3)) / 2
            group["lr"] = 3e-3 * ((step + 1) / 3 if step < 3 else 0.1 + 0.9 * height)
        adam.step()
        losses.append(loss.item())
        norms.append(norm)
    assert min(norms) < 0.7 < max(norms)  # some are clipped
    assert column(plain, "train_loss") == pytest.approx(losses, abs=1e-5)
    # torch sums the squares of 800,000 numbers in fp32, which alone is off by up to 1e-4
    assert column(plain, "grad_norm") == pytest.approx(norms, rel=3e-4)
    for name, w in weights(plain).items():
        torch.testing.assert_close(w, named[name].data, rtol=0, atol=1e-5, msg=name)


def test_validation_is_the_mean_over_the_first_val_tokens(plain, tokens, data, tmp_path):
    torch.manual_seed(1337)
    first = GPT(GPTConfig(**MODEL))
    with torch.no_grad():
        some, every = (naive_loss(first, *cut(tokens[1], range(n))).item() for n in (6, 12))
    assert column(plain, "val_loss")[0] == pytest.approx(some, abs=1e-5)  # 100 // 16 windows
    assert trainer(data, tmp_path, val_tokens=10**9).validate() == pytest.approx(every, abs=1e-5)
    with torch.no_grad():
        last = naive_loss(GPT.from_pretrained(plain), *cut(tokens[1], range(6))).item()
    assert column(plain, "val_loss")[-1] == pytest.approx(last, abs=1e-5)
    assert [line["step"] for line in log(plain, "val_loss")] == [0, 2, 4, 6]
    # bits per byte, by tiktoken's own bytes of the 6 windows' targets; end-of-text has none
    decode, targets = get_tokenizer().decode_single_token_bytes, tokens[1][1 : 6 * 16 + 1]
    n_bytes = sum(len(decode(int(i))) for i in targets if i != 50256)
    for loss, bpb in zip(column(plain, "val_loss"), column(plain, "val_bpb"), strict=True):
        assert bpb == pytest.approx(loss * 6 * 16 / math.log(2) / n_bytes)


def test_a_run_needs_no_vocabulary_for_its_loss(data, tmp_path, monkeypatch, plain):
    def missing(vocab):
        raise ValueError("no GPT-2 vocabulary")

    monkeypatch.setattr(t, "token_bytes", missing)
    train(data, tmp_path, max_steps=2, sample_every=0)
    assert column(tmp_path, "val_loss")[0] == column(plain, "val_loss")[0]
    assert not log(tmp_path, "val_bpb")


@pytest.mark.parametrize("micro_batch", [1, 4])  # 4 does not divide the 6 val windows
def test_the_micro_batch_does_not_matter(plain, data, tmp_path, micro_batch):
    made = train(data, tmp_path, micro_batch=micro_batch, max_steps=6, sample_every=0)
    assert made.micro_steps == 8 // micro_batch
    for key in ("train_loss", "val_loss"):
        assert column(tmp_path, key) == pytest.approx(column(plain, key), abs=1e-5)


def check_ranks(ranks, plain, data, run):
    torchrun(ranks, data, run, micro_batch=1)
    for key in ("train_loss", "val_loss"):
        assert column(run, key) == pytest.approx(column(plain, key), abs=1e-5)
    assert column(run, "grad_norm") == pytest.approx(column(plain, "grad_norm"), rel=1e-4)
    assert [line["world"] for line in log(run, "event")] == [ranks]
    ours, reference = weights(run), weights(plain)
    assert ours.keys() == reference.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], reference[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow  # CI has test_parallel.py's, ddp among its modes
def test_two_ranks_train_as_one(plain, data, tmp_path):
    check_ranks(2, plain, data, tmp_path / "run")


@pytest.mark.slow
def test_four_ranks_train_as_one_and_continue_its_run(plain, data, tmp_path):
    check_ranks(4, plain, data, tmp_path / "run")
    run = tmp_path / "begun"
    shutil.copytree(plain, run)
    (run / "latest").write_text("step_000004\n")
    torchrun(4, data, run)
    for key in ("train_loss", "val_loss"):
        assert column(run, key) == pytest.approx(column(plain, key), abs=1e-5)


def test_bf16_stays_close_to_fp32(plain, data, tmp_path):
    train(data, tmp_path, dtype="bfloat16", sample_every=0, checkpoint_every=0)
    for key in ("train_loss", "val_loss"):
        ours, reference = column(tmp_path, key), column(plain, key)
        assert ours == pytest.approx(reference, abs=0.03) and ours != reference
    assert all(w.dtype == torch.float32 for w in weights(tmp_path).values())


def test_one_batch_can_be_learnt_by_heart(data, tmp_path):
    run = dict(overfit_single_batch=True, total_batch_tokens=32, max_steps=50, n_embd=32, lr=2e-2)
    train(data, tmp_path, **run, eval_every=0, sample_every=0, checkpoint_every=0, grad_clip=0)
    losses = column(tmp_path, "train_loss")
    assert losses[0] > 10 and losses[-1] < 0.5  # from ln 50,304


def test_dropout_acts_in_training_only(data, tmp_path, plain):
    made = trainer(data, tmp_path, dropout=0.5)
    assert made.validate() == pytest.approx(column(plain, "val_loss")[0], abs=1e-5)
    assert abs(made.step(0)[0] - column(plain, "train_loss")[0]) > 1e-4


# ----------------------------------------------------------------------------- kill and resume


class Kill(BaseException):
    """Stops a run at a given instruction as SIGKILL would: no code of the script catches it."""


def assert_same_run(run, reference):
    assert results(run) == results(reference)
    assert equal_weights(weights(run), weights(reference))
    names = sorted(p.name for p in run.iterdir())
    assert names == sorted(p.name for p in reference.iterdir())


@pytest.mark.parametrize("wait_for", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_run_continues_to_the_same_bits(dropped, data, tmp_path, wait_for):
    run, flags = tmp_path / "run", dict(dropout=0.1, max_steps=12)
    process = subprocess.Popen(command(data, run, **flags), stdout=subprocess.DEVNULL)
    try:
        begin = time.time()
        while (
            not (run / "log.jsonl").exists()
            or (run / "log.jsonl").read_text().count("train_loss") < wait_for
        ):
            assert process.poll() is None and time.time() - begin < 120
            time.sleep(0.002)
        time.sleep(random.random() * 0.1)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run(command(data, run, **flags), check=True, stdout=subprocess.DEVNULL)
    assert column(run, "train_loss") == column(dropped, "train_loss")
    assert [line["step"] for line in log(run, "train_loss")] == list(range(1, 13))
    assert_same_run(run, dropped)


@pytest.mark.slow
def test_every_process_begins_with_the_same_bits(data, tmp_path):
    """MKL's first calls race (see model.py): without care 1 process in 20 or 30 went astray."""
    ends = set()
    for i in range(60):
        run = tmp_path / str(i)
        subprocess.run(command(data, run, dropout=0.1, max_steps=1, sample_every=0), check=True)
        ends.add((run / "step_000001" / "model.safetensors").read_bytes())
    assert len(ends) == 1


def in_the_state(monkeypatch):
    def save(state, path):
        Path(path).write_bytes(b"half of it")
        if ".step_000006" in str(path):
            raise Kill
        real(state, path)

    real = torch.save
    monkeypatch.setattr(torch, "save", save)


def in_the_first_checkpoint(monkeypatch):
    monkeypatch.setattr("nanoswitch.checkpoints.save_file", lambda *_: (_ for _ in ()).throw(Kill))


def before_latest(monkeypatch):
    def write(path):
        if path.endswith("latest") and (Path(path).parent / "step_000006").exists():
            raise Kill
        return real(path)

    real = checkpoints.write_beside
    monkeypatch.setattr(checkpoints, "write_beside", write)


def while_removing(monkeypatch):
    def remove(path, **options):
        if Path(path).name == ".step_000002.old.tmp":  # step 4 is the best, and stays
            (Path(path) / "config.json").unlink(missing_ok=True)
            if (Path(path) / "model.safetensors").exists():
                raise Kill
        real(path, **options)

    real = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", remove)


@pytest.mark.parametrize(
    "when, last",
    [(in_the_first_checkpoint, None), (in_the_state, 4), (before_latest, 4), (while_removing, 6)],
)
def test_a_kill_in_a_checkpoint_loses_nothing(dropped, data, tmp_path, monkeypatch, when, last):
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Kill):
        when(patch)
        train(data, run, dropout=0.1, max_steps=12)
    if last:
        assert (run / "latest").read_text().strip() == f"step_{last:06d}"
        GPT.from_pretrained(run)  # is whole
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 7, "train_lo')  # a line cut short
    train(data, run, dropout=0.1, max_steps=12)
    events = [line["event"] for line in log(run, "event")]
    assert events == (["start", "resume"] if last else ["start"])
    assert_same_run(run, dropped)


def test_steps_that_are_read_at_once_have_each_its_own_time(data, tmp_path):
    """As before a checkpoint on a card: the host reads two steps together, long after the first."""

    class Moment:
        def __init__(self, milliseconds):
            self.at = milliseconds

        def elapsed_time(self, end):
            return end.at - self.at

    made = trainer(data, tmp_path / "run", total_batch_tokens=512, checkpoint_every=2)
    meter = progress.Meter(made, Log(tmp_path, 0, False), 0)
    made.device, meter.begin = torch.device("cuda"), Moment(100.0)
    speeds, meter.log.step = [], lambda **line: speeds.append(line["tok_per_s"])
    for done, end in ((1, 1100.0), (2, 1600.0)):
        meter.waiting.append((done, lambda: (5.0, 1.0, 0), Moment(end)))
        meter.read()
    assert speeds == [512, 1024]
    made.config.eval_every = made.config.sample_every = made.config.hellaswag_every = 0
    made.config.checkpoint_every, made.max_steps = 0, 100
    for done, ends, seen in ((3, False, 2), (4, True, 4)):  # a run that is told to stop says all
        meter.waiting.append((done, lambda: (5.0, 1.0, 0), Moment(1600.0 + done)))
        meter.read(ends)
        assert len(speeds) == seen


def test_progress_fits_80_columns_and_a_log_file(data, tmp_path, capsys):
    """With the numbers of a day on eight cards, and with a card that is not known."""
    made = trainer(data, tmp_path / "run", max_steps=19073)
    for speed, peak in ((1.2345e6, 1e15), (12.3e3, None)):
        log = Log(tmp_path / f"{speed}", 0, False)
        log.say = print
        meter = progress.Meter(made, log, 12344)
        made.config.total_batch_tokens, meter.peak, meter.average = 524288, peak, 60.0
        meter.report(12345, lambda: (10.8235, 0.553, 0), meter.begin + 524288 / speed)
    made.device = torch.device("cuda")
    meter.report(12345, lambda: (10.8235, 0.553, 0), meter.begin + 524288 / speed)
    log.losses.pop()
    log.say = lambda text: print(text)
    log.losses.extend([2.5, 2.6] * 20)
    meter.report(12346, lambda: (10.82345, 1234.5, 0), meter.begin + 524288 / speed)
    meter.report(12347, lambda: (math.nan, math.nan, 0), meter.begin + 524288 / speed)
    out = capsys.readouterr().out
    lines = [line for line in out.split("\n") if "tok/s" in line]
    assert re.fullmatch(
        r"12345/19073 loss 10.8235 lr \d.\de-\d norm 0.55 1.23M tok/s mfu \d+% eta \d+d\d\dh",
        lines[0],
    )
    assert "12.3k tok/s eta" in lines[1]  # a CPU has no peak to be held against
    assert "12.3k tok/s eta" in lines[2]
    assert "SPIKE z " in lines[3] and "SKIPPED" in lines[4]
    assert all(len(line) <= 80 for line in lines) and "\r" not in out


@pytest.mark.parametrize(
    "seconds, shown",
    [(0, "0m00s"), (65.9, "1m05s"), (7509, "2h05m"), (86399, "23h59m"), (200_000, "2d07h")],
)
def test_times_show_their_two_largest_units(seconds, shown):
    assert progress.clock(seconds) == shown


@pytest.mark.parametrize(
    "number, shown",
    [
        (999, "999"),
        (999.7, "1k"),
        (65_432, "65.4k"),
        (999_990, "1M"),
        (1_234_567, "1.23M"),
        (999_900_000, "1B"),
        (2_673_868_800, "2.67B"),
        (10**10, "10B"),
        (15 * 10**12, "15000B"),
    ],
)
def test_short_numbers_have_three_digits(number, shown):
    assert progress.short(number) == shown


def test_pruning_never_removes_what_latest_names(plain, data, tmp_path, monkeypatch):
    """A kill left a step_000006 that `latest` does not name yet; step 5 is saved before it."""
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    (run / "latest").write_text("step_000004\n")
    made = trainer(data, run, keep_checkpoints=1)
    made.save(made.resume(run) + 1, run)
    assert (run / "latest").read_text() == "step_000005\n"
    GPT.from_pretrained(run)


def test_a_run_draws_its_curve_and_goes_on_without_matplotlib(data, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    train(data, tmp_path / "drawn", max_steps=2, curve=True)
    assert (tmp_path / "drawn" / "curve.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    train(data, tmp_path / "plain", max_steps=2, curve=True)
    assert results(tmp_path / "plain") == results(tmp_path / "drawn")
    assert not (tmp_path / "plain" / "curve.png").exists()


def test_a_finished_run_stays_as_it_is_and_can_be_prolonged(plain, data, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    train(data, run)
    assert results(run) == results(plain) and equal_weights(weights(run), weights(plain))
    train(data, run, max_steps=8)
    assert [line["step"] for line in log(run, "train_loss")] == list(range(1, 9))
    assert (run / "latest").read_text() == "step_000008\n"


CHANGES = [("n_layer", 3), ("n_embd", 32), ("seed", 7), ("total_batch_tokens", 64), ("data_dir", 0)]


@pytest.mark.parametrize("name, value", CHANGES)
def test_resuming_another_run_is_refused(
    plain, data, tmp_path, capsys, monkeypatch, name, value
):  # fmt: skip
    if name == "data_dir":
        make_data(tmp_path / "other", train=1400)
        value = tmp_path / "other"
    before = snapshot(plain)
    err = refusal(capsys, monkeypatch, *arguments(data, plain, max_steps=9, **{name: value}))
    assert str(plain) in err and ("data_tokens" if name == "data_dir" else name) in err
    assert snapshot(plain) == before


# ----------------------------------------------------------------------------- checkpoints


def nanogpt_names(n_layer):
    """Parameter names of nanoGPT's state dict; the tied head is stored once."""
    yield from ("transformer.wte.weight", "transformer.wpe.weight")
    for i in range(n_layer):
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            yield from (f"transformer.h.{i}.{part}.{kind}" for kind in ("weight", "bias"))
    yield from ("transformer.ln_f.weight", "transformer.ln_f.bias")


def test_a_checkpoint_holds_plain_names_and_all_that_a_reader_needs(plain, data):
    folder = plain / "step_000006"
    assert set(load_file(folder / "model.safetensors")) == set(nanogpt_names(2))
    config = json.loads((folder / "config.json").read_text())
    assert config["model"] | MODEL == config["model"]
    assert config["train"] | TRAIN == config["train"]
    assert (config["step"], config["tokens"]) == (6, 6 * 128)
    state = torch.load(folder / "train_state.pt", weights_only=True)
    moments = state["optimizer"]
    assert set(moments) == set(nanogpt_names(2))
    assert all(m["step"] == 6 for m in moments.values())
    assert sorted(p.name for p in folder.iterdir()) == [
        "SHA256SUMS", "config.json", "model.safetensors", "train_state.pt",
    ]  # fmt: skip


def test_a_checkpoint_reloads_to_equal_logits(plain, data, tmp_path, tokens):
    made = train(data, tmp_path, sample_every=0)
    x, _ = cut(tokens[1], range(3))
    made.model.eval()
    with torch.no_grad():
        for path in (tmp_path, tmp_path / "step_000006"):
            assert torch.equal(GPT.from_pretrained(path)(x)[0], made.model(x)[0])


@pytest.mark.parametrize("keep, every, left", [(0, 2, [2, 4, 5]), (1, 1, [5]), (3, 1, [3, 4, 5])])
def test_the_newest_checkpoints_stay(data, tmp_path, keep, every, left):
    flags = dict(max_steps=5, eval_every=0, sample_every=0)
    train(data, tmp_path, keep_checkpoints=keep, checkpoint_every=every, **flags)
    folders = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert folders == [f"step_{step:06d}" for step in left]
    assert (tmp_path / "latest").read_text() == "step_000005\n"


def test_init_from_a_checkpoint_takes_its_weights_and_architecture(plain, data, tmp_path):
    made = train(data, tmp_path, init_from=str(plain), max_steps=1)
    assert made.model_config.n_layer == 2 and made.model_config.n_embd == 16
    assert column(tmp_path, "val_loss")[0] == column(plain, "val_loss")[-1]
    assert log(tmp_path)[0]["config"]["n_layer"] == 2


def test_init_from_a_hugging_face_folder(data, tmp_path, tokens):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=50257, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = hf.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "hf")
    made = trainer(data, tmp_path / "run", init_from=str(tmp_path / "hf"), n_layer=1)
    x, y = cut(tokens[1], range(6))
    with torch.no_grad():
        loss = F.cross_entropy(model(x).logits.flatten(0, 1), y.flatten()).item()
    assert made.validate() == pytest.approx(loss, abs=1e-5)


# ----------------------------------------------------------------------------- the log


def test_the_log_says_what_design_names(plain):
    first, *others = log(plain)
    assert first["event"] == "start" and first["seed"] == 1337 and first["device"] == "cpu"
    assert first["config"] | FLAGS == first["config"]
    V, C, T, L = 50304, 16, 16, 2
    assert first["parameters"] == V * C + T * C + L * (12 * C * C + 13 * C) + 2 * C
    assert first["versions"]["torch"] == torch.__version__ and "git" in first
    wanted = [
        {"step", "train_loss", "lr", "grad_norm", "tokens", "tok_per_s", "mfu"},
        {"step", "val_loss", "val_bpb", "peak_memory_bytes"},
        {"step", "samples"},
    ]
    assert all(set(line) in wanted for line in others)
    assert [line["step"] for line in others] == sorted(line["step"] for line in others)
    assert column(plain, "tokens") == [128 * step for step in range(1, 7)]
    assert [line["step"] for line in log(plain, "samples")] == [0, 3, 6]
    for samples in column(plain, "samples"):
        assert all(text.startswith("Hello, I'm a language model,") for text in samples)
    rates = [3e-3 * (s + 1) / 3 for s in range(3)]
    rates += [3e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * s / 3)) / 2) for s in range(3)]
    assert column(plain, "lr") == pytest.approx(rates)


# ----------------------------------------------------------------------------- sizes


class FakeShard:
    """As long as a real data set, and holds nothing."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length


@pytest.mark.parametrize(
    "shards, T, batch, steps",
    [
        ([5 * 128 + 1], 16, 128, 5),  # the very last token is a target only
        ([300, 200, 141], 16, 128, 5),
        ([10**8] * 98 + [53_989_344], 1024, 2**19, 18_795),  # FineWeb-Edu 10BT
    ],
)
def test_one_epoch_is_derived_from_the_shards(tmp_path, monkeypatch, shards, T, batch, steps):
    monkeypatch.setattr("nanoswitch.windows.load_shards", lambda *_: [FakeShard(n) for n in shards])
    flags = dict(block_size=T, total_batch_tokens=batch, max_steps=0, n_layer=1)
    assert trainer(tmp_path, tmp_path, **flags).max_steps == steps


def test_dry_run_prints_sizes_and_writes_nothing(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = arguments(data, "runs/x", dry_run="true", max_steps=0, micro_batch=2)
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *flags])
    cli.run(t.main)
    out = capsys.readouterr().out
    V, C, T, L = 50304, 16, 16, 2
    N = V * C + L * (12 * C * C + 13 * C) + 2 * C  # all but the position table
    steps = (1450 - 1) // 16 // 8
    assert f"parameters {N + T * C:,} " in out
    assert f"FLOPs per token {6 * N + 12 * L * C * T:,}\n" in out
    assert f"tokens per step 128 = 2 sequences x {T} x 4 micro-steps x 1 ranks" in out
    assert f"steps {steps} = {steps * 128:,} tokens" in out
    assert re.search(r"expected time \d+[dhm]\d\d[hms] .* tokens/s", out)
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------- compiled


def make_items(path):
    """HellaSwag's format, five items."""
    endings = [" on the chair.", " in a sky of glass and iron.", " nine.", " the the the the"]
    item = dict(
        activity_label="Sitting", ctx_a="A man sits", ctx_b="", ctx="A man", endings=endings
    )
    with open(path, "w") as file:
        for i in range(5):
            line = item | dict(ind=i, label=i % 4, split="val", split_type="indomain")
            file.write(json.dumps(line | dict(source_id=f"activitynet~{i}")) + "\n")
    return path


def check_scores_and_samples(run):
    assert [line["step"] for line in log(run, "samples")] == [0, 3, 6]
    names = ("acc", "acc_norm", "n", "se", "bpb", "bpb_se", "margin")
    scores = log(run, *(f"hellaswag_{name}" for name in names))
    assert [(line["step"], line["hellaswag_n"]) for line in scores] == [(3, 5), (6, 5)]
    means = read_run(run).items().mean(0)
    wanted = [scores[-1][f"hellaswag_{name}"] for name in ("acc", "acc_norm", "bpb", "margin")]
    assert means.tolist() == pytest.approx(wanted)


def fake_compiler(monkeypatch, backend):
    """torch.compile with a backend of the test's own in the place of Inductor."""
    torch._dynamo.reset()
    torchs = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: torchs(*a, **k, backend=backend))


def test_what_does_not_compile_trains_without(data, tmp_path, monkeypatch, capsys):
    """A compiler that takes small functions and fails at the model."""
    failures = []

    def backend(graph, inputs):
        if len(graph.graph.nodes) > 20:
            failures.append(len(graph.graph.nodes))
            raise AssertionError("'255 - ((0))' is not\ncomparable")
        return graph.forward

    fake_compiler(monkeypatch, backend)
    train(data, tmp_path / "run", compile="true", micro_batch=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if "torch.compile" in line]
    assert len(lines) == 1 and failures, lines
    assert "does not work here" in lines[0] and "is not comparable" in lines[0]
    assert lines[0].endswith("training without it")
    monkeypatch.undo()
    train(data, tmp_path / "eager", compile="false", micro_batch=2)
    for key in ("train_loss", "val_loss", "samples"):
        assert column(tmp_path / "run", key) == column(tmp_path / "eager", key)


def test_validation_alone_may_fail_to_compile(data, tmp_path, monkeypatch, capsys):
    def backend(graph, inputs):
        if not torch.is_grad_enabled():
            raise NotImplementedError("no gradients, no graph")
        return graph.forward

    fake_compiler(monkeypatch, backend)
    made = trainer(data, tmp_path, compile="true", micro_batch=2)
    assert "no gradients, no graph" in capsys.readouterr().out
    assert made.forward is made.model and made.model.training
    assert all(p.grad is None for p in made.model.parameters())


def test_the_micro_batch_is_one_that_fits_compiled(data, tmp_path, monkeypatch):
    """A card of 100 bytes, of which a sequence takes 10, and 20 in the compiled model."""
    took = {}

    def backend(graph, inputs):
        def run(*args):
            took["each"] = 20
            return graph.forward(*args)

        return run

    def note_size(model, inputs):
        took["size"] = len(inputs[0])

    def on_card(plan, fits):
        return next(size for size in (8, 4, 2, 1) if fits(size))

    make, card = t.place, SimpleNamespace(total_memory=100)
    answers = dict(
        get_device_properties=lambda device: card, mem_get_info=lambda: (100, 100),
        memory_reserved=lambda: 0, reset_peak_memory_stats=took.clear,
        max_memory_allocated=lambda: took["size"] * took.get("each", 10),
    )  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)

    def placed(*args):
        model = make(*args)
        model.transformer.wte.register_forward_pre_hook(note_size)
        return model

    fake_compiler(monkeypatch, backend)
    monkeypatch.setattr(t, "place", placed)
    monkeypatch.setattr(micro_batch, "find", on_card)
    monkeypatch.setattr(micro_batch, "may_choose", lambda trainer: True)
    assert trainer(data, tmp_path, compile="false").micro_batch == 8
    made = trainer(data, tmp_path, compile="true")
    assert made.micro_batch == 4 and made.micro_steps == 2
    made.update(0)


def test_a_smaller_micro_batch_is_compiled_for_its_own_size(data, tmp_path, monkeypatch):
    shapes = []

    def backend(graph, inputs):
        shapes.append([n for x in inputs for n in (x.shape if torch.is_tensor(x) else [x])])
        return graph.forward

    fake_compiler(monkeypatch, backend)
    made = trainer(data, tmp_path, compile="true", micro_batch=4)
    made.update(0)
    before = len(shapes)
    made.micro_batch = 2
    made.update(0)
    assert len(shapes) > before > 0
    assert all(type(n) is int for shape in shapes for n in shape)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "switches",
    [
        dict(dtype="float16"),
        dict(pos="rope", qk_norm=True, optimizer="muon", muon_lr=1e-3, compile="true"),
        dict(pos="fire", norm="rmsnorm", mlp="swiglu", n_kv_head=1, bias=False),
        dict(pos="alibi", window=8, window_pattern="SL", document_mask=True),
        dict(pos="rope", window=8, document_mask=True, attention_kernel="flex"),
        dict(attention="linformer", linformer_segment=8, linformer_rank=2),
    ],
    ids=str,
)
def test_cuda_trains_validates_scores_and_samples_as_a_cpu_does(data, tmp_path, switches):
    flags = dict(block_size=32, total_batch_tokens=256, n_embd=64, hellaswag_every=3)
    flags |= dict(hellaswag_data=str(make_items(tmp_path / "hellaswag.jsonl")))
    train(data, tmp_path / "cuda", **flags | dict(device="cuda", dtype="bfloat16") | switches)
    switches = switches | dict(dtype="float32", attention_kernel="auto", compile="false")
    train(data, tmp_path / "cpu", **flags | switches)
    for key in ("train_loss", "val_loss"):
        want = column(tmp_path / "cpu", key)
        assert column(tmp_path / "cuda", key) == pytest.approx(want, abs=0.02)
    check_scores_and_samples(tmp_path / "cuda")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_validates_scores_and_samples(plain, data, tmp_path):
    items = make_items(tmp_path / "hellaswag.jsonl")
    run, flags = tmp_path / "run", dict(hellaswag_every=3, hellaswag_data=items, compile="true")
    line = command(data, run, **flags, block_size=32, total_batch_tokens=256)
    out = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr
    assert "does not work here" not in out.stdout
    train(data, tmp_path / "eager", block_size=32, total_batch_tokens=256)
    for key in ("train_loss", "val_loss"):
        assert column(run, key) == pytest.approx(column(tmp_path / "eager", key), abs=1e-4)
    check_scores_and_samples(run)
    assert set(load_file(run / "step_000006" / "model.safetensors")) == set(nanogpt_names(2))
