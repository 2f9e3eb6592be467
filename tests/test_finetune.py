"""Fine-tuning as a job: the best checkpoint, patience, what a resume says, its document."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train_gpt2 as t
from model import GPT, GPTConfig
from nanoswitch import checkpoints, hf
from nanoswitch.load import find_folder
from nanoswitch.log import read_run

ROOT = Path(__file__).parent.parent
MODEL = dict(block_size=16, n_layer=1, n_head=2, n_embd=8)
TRAIN = dict(
    device="cpu", dtype="float32", total_batch_tokens=64, max_steps=12, warmup_steps=0, lr=1e-3,
    schedule="constant", val_tokens=32, eval_every=1, sample_every=0, checkpoint_every=0,
    keep_checkpoints=1, curve=False,
)  # fmt: skip
LOSSES = [5.0, 4.0, 3.0, 3.5, 3.2, 3.1, 2.0, 2.5, 1.0, 1.5, 1.6, 1.7, 1.8]  # of steps 0, 1, ...


@pytest.fixture
def scripted(monkeypatch):
    """Validation losses by step, as LOSSES has them."""
    steps = []
    original = t.evaluate

    def evaluate(trainer, examples, log, done, known=()):
        steps.append(done)
        return original(trainer, examples, log, done, known)

    monkeypatch.setattr(t, "evaluate", evaluate)
    monkeypatch.setattr(t.Trainer, "validate", lambda self: LOSSES[steps[-1]])


def train(data, run, **changes):
    flags = TRAIN | dict(data_dir=str(data), run_dir=str(run)) | changes
    t.train(t.Trainer(GPTConfig(**MODEL), t.TrainConfig(**flags)))


def entries(run, key):
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line for line in lines if key in line]


def folders(run):
    return [int(folder.name[5:]) for folder in checkpoints.step_folders(run)]


def named(run, file):
    return (run / file).read_text()


@pytest.mark.parametrize(
    "patience, last, best",
    [(1, 3, 2), (3, 5, 2), (4, 12, 8), (9, 12, 8)],
)
def test_patience_ends_a_run_and_the_best_checkpoint_stays(
    patience, last, best, data, tmp_path, scripted, capsys
):
    train(data, tmp_path, patience=patience)
    assert entries(tmp_path, "train_loss")[-1]["step"] == last
    assert named(tmp_path, "best") == f"step_{best:06d}\n"
    assert named(tmp_path, "latest") == f"step_{last:06d}\n"
    assert folders(tmp_path) == [best, last]
    out = capsys.readouterr().out
    assert f"{LOSSES[best]:.4f}, is step {best}'s: {tmp_path}/best" in out
    assert ("stopped after step" in out) == (last < 12)
    assert read_run(tmp_path).finished
    # the best is a checkpoint like any other, and the run is as it was when started again
    assert find_folder(tmp_path / "best") == tmp_path / f"step_{best:06d}"
    GPT.from_pretrained(tmp_path / "best")
    before = entries(tmp_path, "train_loss")
    train(data, tmp_path, patience=patience)
    assert entries(tmp_path, "train_loss") == before and "is finished" in capsys.readouterr().out
    assert read_run(tmp_path).finished  # for a comparison too


def test_a_stopped_run_goes_on_with_more_patience(data, tmp_path, scripted):
    train(data, tmp_path, patience=1)
    train(data, tmp_path, patience=4)
    train(data, tmp_path / "whole", patience=4)
    for file in ("best", "latest"):
        assert named(tmp_path, file) == named(tmp_path / "whole", file)
    losses = [
        [e["train_loss"] for e in entries(r, "train_loss")] for r in (tmp_path, tmp_path / "whole")
    ]
    assert losses[0] == losses[1]
    assert read_run(tmp_path).finished


@pytest.mark.parametrize("kill_at", [1, 2, 4])
def test_a_continued_run_counts_on(kill_at, data, tmp_path, scripted):
    train(data, tmp_path, patience=3, max_steps=kill_at)
    train(data, tmp_path, patience=3)
    assert named(tmp_path, "best") == "step_000002\n"
    assert entries(tmp_path, "train_loss")[-1]["step"] == 5


def test_without_patience_best_follows_the_checkpoints(data, tmp_path, scripted):
    train(data, tmp_path, checkpoint_every=3, keep_checkpoints=2)  # losses 3.5 2.0 1.5 1.8
    assert named(tmp_path, "best") == "step_000009\n" and folders(tmp_path) == [9, 12]
    train(data, tmp_path / "b", checkpoint_every=2, max_steps=7)  # 3.0 3.2 2.0, and 2.5
    assert named(tmp_path / "b", "best") == "step_000006\n" and folders(tmp_path / "b") == [6, 7]


def test_a_damaged_best_is_named_and_found_anew(data, tmp_path, scripted, capsys):
    run = tmp_path / "run"
    train(data, run, checkpoint_every=3, keep_checkpoints=0, max_steps=11)
    weights = run / "step_000009" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"step_000009.*checksum"):
        GPT.from_pretrained(run / "best")
    capsys.readouterr()
    train(data, run, checkpoint_every=3, keep_checkpoints=0, max_steps=11)
    out = capsys.readouterr().out
    assert "step_000009/model.safetensors" in out and "found anew" in out
    assert named(run, "best") == "step_000011\n"  # 1.7, before step 6's 2.0
    for text in ("", "step_000004", "../x", "\0"):
        (run / "best").write_text(text)
        with pytest.raises(ValueError, match=r"best names no step|no checkpoint|config"):
            GPT.from_pretrained(run / "best")
        train(data, run, checkpoint_every=3, keep_checkpoints=0, max_steps=11)
        assert named(run, "best") == "step_000011\n"


def test_a_kill_before_best_is_written_loses_nothing(data, tmp_path, scripted):
    train(data, tmp_path, patience=3, max_steps=2)
    (tmp_path / "best").unlink()
    train(data, tmp_path, patience=3, max_steps=2)
    assert named(tmp_path, "best") == "step_000002\n"


@pytest.mark.slow
def test_two_ranks_stop_as_one(data, tmp_path):
    """At this rate the loss only rises."""
    flags = TRAIN | dict(lr=1.0, patience=2, curve="false", data_dir=data) | MODEL
    one, two = tmp_path / "one", tmp_path / "two"
    train(data, one, lr=1.0, patience=2)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = [f"--{k}={v}" for k, v in (flags | {"run_dir": two}).items()]
    line = [sys.executable, *launch, str(ROOT / "train_gpt2.py"), *argv]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert folders(one) == folders(two) and named(one, "best") == named(two, "best")
    assert len(entries(one, "train_loss")) == len(entries(two, "train_loss")) < 12


# ----------------------------------------------------------------------------- what a resume says


def test_a_patience_that_ends_saves_what_could_not_be_saved(data, tmp_path, monkeypatch, scripted):
    real, refused = checkpoints.save, []

    def save(run, step, *args):
        if step == 5 and not refused:
            refused.append(step)
            raise OSError("could not write")
        return real(run, step, *args)

    monkeypatch.setattr(checkpoints, "save", save)
    train(data, tmp_path, patience=3, checkpoint_every=5)
    assert entries(tmp_path, "event")[-1]["event"] == "early stop" and refused == [5]
    assert 5 in folders(tmp_path)


def test_a_run_keeps_what_it_is_validated_on(data, tmp_path):
    """Else losses of other texts would be held against each other."""
    train(data, tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="a run with val_tokens 32, this one has 64"):
        train(data, tmp_path, max_steps=4, val_tokens=64)
    with pytest.raises(ValueError, match="a run with overfit_single_batch False, this one has"):
        train(data, tmp_path, max_steps=4, overfit_single_batch=True)


def test_a_resume_with_other_rates_says_so_in_one_line(data, tmp_path, capsys):
    train(data, tmp_path, max_steps=2)
    train(data, tmp_path, max_steps=3)
    capsys.readouterr()
    train(data, tmp_path, max_steps=4, lr=5e-4, schedule="cosine")
    lines = [line for line in capsys.readouterr().out.splitlines() if "from step" in line]
    want = ["lr 0.001 -> 0.0005", "schedule constant -> cosine", "max_steps 3 -> 4"]
    assert lines == [f"from step 3 on: {', '.join(want)}"]
    assert entries(tmp_path, "changed")[-1]["changed"] == want
    train(data, tmp_path, max_steps=4, lr=5e-4, schedule="cosine")
    assert "from step" not in capsys.readouterr().out


# ----------------------------------------------------------------------------- its document


def test_the_documents_commands_run_offline_on_a_small_gpt2(tmp_path):
    text = (ROOT / "docs" / "finetune.md").read_text()
    section = re.search(r"\n## Fine-tune GPT-2 on your texts\n(.*?)\n## ", text, re.S)[1]
    commands = re.findall(r"^    (python .*)$", section, re.M)
    assert [shlex.split(line)[1] for line in commands] == [
        "fineweb.py", "train_gpt2.py", "sample.py",
    ]  # fmt: skip
    for name in ("configs", "nanoswitch"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "my_texts").mkdir()
    for i in range(40):
        (tmp_path / "my_texts" / f"{i}.txt").write_text(f"Number {i} is a text of mine. " * 20)
    shape = dict(vocab_size=50257, block_size=64, n_layer=2, n_head=2, n_embd=16)
    hf.save(GPT(GPTConfig(**shape)), tmp_path / "gpt2")  # a folder of the name that is typed
    small = "--block_size 32 --total_batch_tokens 256 --max_steps 6 --eval_every 2 --device cpu"
    for line in commands:
        argv = shlex.split(line)
        argv += shlex.split(small) if "train_gpt2.py" in argv else []
        argv += ["--max_new_tokens", "4", "--device", "cpu"] if "sample.py" in argv else []
        done = subprocess.run(
            [sys.executable, *argv[1:]], capture_output=True, text=True, cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, (line, done.stderr)
    run = tmp_path / "runs" / "finetune_gpt2"
    losses = [e["val_loss"] for e in entries(run, "val_loss")]
    assert losses[-1] < losses[0] and (run / "best").exists()
    start = entries(run, "event")[0]
    assert start["config"]["dropout"] == 0.1 and "block_size 64 -> 32" in " ".join(start["surgery"])
