"""What `bench.py card` measures by itself: each check is a generator of rows, run in a process of
its own by nanoswitch/first_card.py, which reads the rows as JSON lines.

A row: {"figure", "ours", "other", "goal", "met"}; all but the first may be missing. `other` is what
stands beside our figure: a reference, a prediction or a total.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from model import GPT, POSITIONS, GPTConfig
from nanoswitch.compiled import compile_model
from nanoswitch.device import (
    autocast,
    matrix_rate,
    peak_flops,
    peak_memory,
    pick_device,
    pick_dtype,
)
from nanoswitch.log import provenance
from nanoswitch.micro_batch import expected_bytes
from train_gpt2 import TrainConfig, Trainer

ROOT = Path(__file__).parent.parent
GIB = 2**30
LOSS_ERROR = 0.01  # nats: what bf16's 8 bits may change
GRADIENT_ERROR = 0.1  # of a tensor's norm; bf16 makes some 0.03


def row(figure, ours=None, other=None, goal="", met=None):
    return {"figure": figure, "ours": ours, "other": other, "goal": goal, "met": met}


# ----------------------------------------------------------------------------- the machine


def machine(s):
    """Versions, and the card's two rates: of copies in its memory, and of products."""
    device = pick_device(s["device"])
    dtype = pick_dtype(s["dtype"], device)
    known = provenance()
    versions = known["versions"] | {"cuda": torch.version.cuda, "code": known["git"]}
    if device.type == "cuda":
        cards = torch.cuda.get_device_properties(device)
        versions |= {"cudnn": torch.backends.cudnn.version()}
        yield row(f"memory of {cards.name}, GiB", cards.total_memory / GIB)
    yield row(", ".join(f"{name} {version}" for name, version in versions.items() if version))
    yield row("copy rate, read and written, GB/s", copy_rate(device, s["copied"]) / 1e9)
    rate, peak = matrix_rate(device, dtype), peak_flops(device)
    peak = peak / 1e12 if peak and dtype != torch.float32 else None
    n = 8192 if device.type == "cuda" else 2048
    kind = str(dtype)[6:]
    yield row(f"{kind} products of {n}^3 beside the data sheet, TFLOP/s", rate / 1e12, peak)


def copy_rate(device, size):
    """Bytes/s that copies of `size` bytes read and write: the median of five."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(6):  # the first warms up
        begin = time.perf_counter()
        target.copy_(source)
        finish(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * size / statistics.median(seconds[1:])


def finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


# ----------------------------------------------------------------------------- right results


def gpu_tests(s):
    """`pytest -m gpu`, and by name each test that fails."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "--tb=line", *s["tests"]]
    if importlib.util.find_spec("xdist"):  # they wait for processes and the compiler, not the card
        command += ["-n", str(min(8, os.cpu_count()))]
    lines, found = [], {}
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:  # fmt: skip
        for line in process.stdout:
            lines.append(line)
            print(line, end="", file=sys.stderr)
            if match := pytest_result(line):
                name, result = match
                found[name] = result
                if result in ("FAILED", "ERROR"):
                    yield row(f"{result.lower()}: {name}", met=False)
    passed = sum(result == "PASSED" for result in found.values())
    yield row("tests that pass, of all", passed, len(found), "all", passed == len(found) > 0)
    if process.returncode and not found:
        raise ValueError(f"pytest ran nothing: {lines[-1].strip() if lines else 'no output'}")


def pytest_result(line):
    """A line of pytest's, by one process or by several -> (a test's name, how it ended) or None."""
    ends = "(PASSED|FAILED|ERROR|SKIPPED)"
    if match := re.match(rf"\[gw\d+\] \[ *\d+%\] {ends} (tests/\S+?::.*)", line):
        return match[2].strip(), match[1]
    if match := re.match(rf"(tests/\S+?::.*) {ends}", line):
        return match[1].strip(), match[2]
    return None


def baseline(s):
    yield compare("learned", 0, False, s)


def attention(s):
    """The position encodings, or of n shares the i-th, (i, n) = s["share"], under the masks of
    s["masks"], [(window, document_mask)]."""
    i, n = s.get("share", (0, 1))
    for (window, documents), pos in itertools.product(s["masks"], [*POSITIONS][i::n]):
        yield compare(pos, window, documents, s)


def compare(pos, window, documents, s):
    """Loss and gradients of the model as a run trains it, compiled and in half precision, beside
    those by fp32 and the math kernel -> a row; an exception is a row too."""
    name = pos + (f", window {window}" if window else "") + (", documents" if documents else "")
    try:
        torch.compiler.reset()
        config = GPTConfig(**s["small_model"], pos=pos, window=window, document_mask=documents)
        ours, theirs = (loss_and_gradients(config, s, exact) for exact in (False, True))
    except Exception as error:  # of the card, the compiler or a kernel: the next case may work
        reason = " ".join(str(error).split())[:200]
        print(f"{name}: {type(error).__name__}: {reason}", file=sys.stderr)
        return row(f"{name}: {type(error).__name__}: {reason[:100]}", met=False)
    error = gradient_error(ours[1], theirs[1])
    close = abs(ours[0] - theirs[0]) <= LOSS_ERROR and error <= GRADIENT_ERROR
    goal = f"loss to {LOSS_ERROR}, gradients to {GRADIENT_ERROR:.0%}: {error:.2%}"
    return row(f"loss by {name}", ours[0], theirs[0], goal, close)


def loss_and_gradients(config, s, exact):
    """-> float, {name: gradient}; exact: in fp32, by the math kernel and without the compiler."""
    device, T = pick_device(s["device"]), config.block_size
    dtype = torch.float32 if exact else pick_dtype(s["dtype"], device)
    if exact:
        config = replace(config, attention_kernel="math")
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.manual_seed(1337)
    model = GPT(config)
    with torch.no_grad():  # scores far from uniform, so that each position and mask counts
        for key, p in model.named_parameters():
            if ".c_attn.weight" in key:
                p.normal_(0, 1.5 / p.size(1) ** 0.5)
    model = model.to(device).train()
    end = config.vocab_used - 1  # of a document
    idx = torch.randint(end, (2, T + 1), generator=torch.Generator().manual_seed(1))
    idx[0, T // 3 :: T // 3] = end
    idx = idx.to(device)
    compiles = not exact and s["compile"]
    forward = compile_model(model, device) if compiles else model
    with autocast(device, dtype):
        _, loss = forward(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
    scale = 2**10 if dtype == torch.float16 else 1
    (loss * scale).backward()
    gradients = {key: p.grad.double().cpu() / scale for key, p in model.named_parameters()}
    return loss.item(), gradients


def gradient_error(ours, theirs):
    """Of all tensors of two dicts of gradients the largest difference, as a share of the second's
    norm; NaN where a gradient is. A tensor whose norm is below a thousandth of all is measured by
    that: FIRE's last bias, added to every score, has a gradient of nothing but rounding."""
    floor = 1e-3 * sum(g.square().sum() for g in theirs.values()).sqrt()
    errors = [(ours[key] - g).norm() / g.norm().clamp(min=floor) for key, g in theirs.items()]
    return torch.stack(errors).max().item()


# ----------------------------------------------------------------------------- speed and memory


def make_trainer(s, size, tokens, **changes):
    flags = dict(
        data_dir=s["data"], run_dir=s["out"], device=s["device"], dtype=s["dtype"],
        compile="true" if s["compile"] else "false", micro_batch=size, total_batch_tokens=tokens,
        max_steps=10**6, val_tokens=s["model"]["block_size"], curve=False,
    )  # fmt: skip
    return Trainer(GPTConfig(**s["model"]), TrainConfig(**flags | changes))


def profile(s):
    """Three training steps under torch's profiler: their longest kernels, and how long the card
    waits. The whole table is OUT/profile.txt."""
    trainer = make_trainer(s, s["size"], s["size"] * s["model"]["block_size"] * s["micro_steps"])
    device, kinds = trainer.device, [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    for step in range(2):
        trainer.step(step)
    finish(device)
    begin = time.perf_counter()
    with torch.profiler.profile(activities=kinds) as trace:
        for step in range(2, 5):
            trainer.step(step)
        finish(device)
    seconds = time.perf_counter() - begin
    averages = trace.key_averages()
    where = "device" if device.type == "cuda" else "cpu"
    key = f"self_{where}_time_total"
    table = averages.table(sort_by=key, row_limit=60, max_name_column_width=80)
    Path(s["out"], "profile.txt").write_text(table)
    spent = {}  # microseconds; on a card those of kernels, which alone are the device's own
    for event in averages:
        if where == "cpu" or event.device_type != torch.autograd.DeviceType.CPU:
            spent[event.key] = spent.get(event.key, 0) + getattr(event, key)
    total = sum(spent.values())
    yield row("a step under the profiler, ms", seconds / 3 * 1e3)
    yield row("kernels' share of it", total / 1e6 / seconds)
    for name in sorted(spent, key=spent.get, reverse=True)[:12]:
        yield row(f"share of {name[:60]}", spent[name] / total)


def memory(s):
    """Two steps, each of one micro-batch of s["size"] sequences: peak memory beside the prediction,
    and the second step's speed."""
    size = s["size"]
    trainer = make_trainer(s, size, size * s["model"]["block_size"])
    predicted = expected_bytes(trainer, size) / GIB
    begin = seconds = 0.0
    for step in range(3):
        begin = time.perf_counter()
        trainer.update(step).tolist()
        seconds = time.perf_counter() - begin
    peak = peak_memory(trainer.device) / GIB
    on_card = trainer.device.type == "cuda"
    goal, met = ("no more than predicted", peak <= predicted) if on_card else ("", None)
    yield row(f"peak beside the prediction, micro-batch {size}, GiB", peak, predicted, goal, met)
    yield row(f"tokens/s, micro-batch {size}", trainer.config.total_batch_tokens / seconds)


# ----------------------------------------------------------------------------- a run


def first_steps(s):
    """The losses of a run's first steps, on the device and on the CPU in fp32."""
    tokens, losses = s["first_size"] * s["model"]["block_size"], []
    for device, own in ((s["device"], {}), ("cpu", dict(dtype="float32", compile="false"))):
        changes = dict(micro_batch=s["first_size"], device=device, warmup_steps=1) | own
        trainer = make_trainer(s, s["first_size"], tokens, **changes)
        losses.append([trainer.update(step)[0].item() for step in range(s["first_steps"])])
        del trainer
    for step, (ours, theirs) in enumerate(zip(*losses, strict=True), 1):
        met = abs(ours - theirs) <= 0.02
        yield row(f"loss of step {step} beside the CPU's", ours, theirs, "to 0.02", met)


def run(s):
    """train_gpt2.py on the data for s["seconds"], killed once on the way and started again."""
    folder = Path(s["out"], "card_run")
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier try
    size = {} if s["device"] == "cuda" else {"micro_batch": s["size"]}
    flags = s["model"] | size | dict(
        data_dir=s["data"], run_dir=folder, device=s["device"], dtype=s["dtype"],
        compile="true" if s["compile"] else "false", total_batch_tokens=s["tokens"],
        max_steps=s["max_steps"], schedule="constant", warmup_steps=100, eval_every=0,
        val_tokens=s["val_tokens"], sample_every=0, checkpoint_every=s["checkpoint_every"],
        keep_checkpoints=1, curve="false",
    )  # fmt: skip
    command = [sys.executable, str(ROOT / "train_gpt2.py")]
    command += [f"--{name}={value}" for name, value in flags.items()]
    end, before = time.monotonic() + s["seconds"], {}
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        while process.poll() is None and time.monotonic() < end:
            losses, saved = read_losses(folder), newest_step(folder)
            if saved and max(losses, default=0) >= saved + 3:  # so that some are lost
                before = losses
                process.kill()
                break
            time.sleep(0.2)
        process.terminate()
    if before:
        with subprocess.Popen(command, stdout=sys.stderr) as process:
            while process.poll() is None and (time.monotonic() < end or not resumed(folder)):
                time.sleep(0.2)
            process.terminate()  # it saves, and ends
        if process.returncode not in (0, 128 + signal.SIGTERM):
            raise ValueError(f"the run that was started again ended with {process.returncode}")
    yield from figures(folder, before, s)


def figures(folder, before, s):
    """What a run's log says after a kill, which `before`, {step: loss}, came before -> rows."""
    entries = read_log(folder)
    steps = [entry for entry in entries if "train_loss" in entry]
    if not steps:
        raise ValueError("the run logged no step: see its output in run.log")
    begins = [entry["step"] for entry in entries if entry.get("event") == "resume"]
    settled = steps[len(steps) // 2 :]  # without the starts, which compile
    rate = statistics.median(entry["tok_per_s"] for entry in settled)
    yield row("tokens/s, median of the second half", rate)
    if settled[-1].get("mfu"):
        yield row("MFU", statistics.median(entry["mfu"] for entry in settled))
    yield row("steps", len(steps))
    yield row("loss of the first and the last step", steps[0]["train_loss"],
              steps[-1]["train_loss"], "falls",
              steps[-1]["train_loss"] < steps[0]["train_loss"])  # fmt: skip
    once = [entry["step"] for entry in steps] == list(range(1, len(steps) + 1))
    if not before:
        yield row("resume after a kill: no checkpoint came in time", met=False)
        return
    yield row("step at the kill, and the one resumed from", max(before),
              begins[0] if begins else None, "each step logged once",
              bool(begins) and once)  # fmt: skip
    after = {entry["step"]: entry["train_loss"] for entry in steps}
    again = [step for step in before if begins and step > begins[0] and step in after]
    if again:
        largest = max(abs(before[step] - after[step]) for step in again)
        yield row("largest change of a loss done again", largest, None, "to 0.02", largest <= 0.02)


def read_log(folder):
    """The whole lines of a log that another process may be writing."""
    try:
        lines = (folder / "log.jsonl").read_text().splitlines()
    except OSError:
        return []
    entries = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries


def resumed(folder):
    """Whether a run that was started again has done a step."""
    events = [entry.get("event") for entry in read_log(folder)]
    return "resume" in events and None in events[events.index("resume") :]


def newest_step(folder):
    """The step of a run's newest checkpoint; 0 before there is one."""
    with contextlib.suppress(OSError, ValueError):
        return int((folder / "latest").read_text().strip()[5:])
    return 0


def read_losses(folder):
    return {e["step"]: e["train_loss"] for e in read_log(folder) if "train_loss" in e}


CHECKS = {
    check.__name__: check
    for check in (machine, gpu_tests, baseline, attention, profile, memory, first_steps, run)
}


def main(name, settings):
    """python -m nanoswitch.card_checks NAME SETTINGS, these as JSON -> a JSON line for each row."""
    np.random.seed(0)
    for line in CHECKS[name](json.loads(settings)):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main(*sys.argv[1:])
