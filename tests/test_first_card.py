"""bench.py card: its parts run under limits, one that fails stops no other, a second call goes on,
and what its checks call right or wrong is so. The figures of a real card no test can have."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import make_data

import bench
from model import POSITIONS, GPTConfig
from nanoswitch import card_checks, cli, first_card
from nanoswitch.first_card import Part

ROOT = Path(__file__).parent.parent
GOOD = '{"figure": "a figure", "ours": 3.0, "other": 4.0}'


def python(code):
    return [sys.executable, "-S", "-c", code]


def work(parts, out, again=(), seconds=60):
    end = time.monotonic() + seconds
    return first_card.work_through(parts, out, again, end, ["# no card: cpu", ""])


def result(out, name):
    return json.loads((out / f"{name}.json").read_text())


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]


def test_a_part_that_fails_or_hangs_is_noted_and_passed_over(tmp_path):
    """The one that hangs has a child of its own, as a side of bench.py is."""
    child = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60'])\n"
    hangs = f"{child}print('{GOOD}', flush=True); open('{tmp_path}/pid', 'w').write(str(p.pid))\n"
    parts = [
        Part("falls", 20, [python(f"print('{GOOD}'); raise SystemExit('error: of the card')")]),
        Part("hangs", 3, [python(hangs + "time.sleep(60)")]),
        Part("wrong", 20, [python('print(\'{"figure": "x", "met": false}\')')]),
        Part("absent", 20, [], skip="no peer"),
        Part("works", 20, [python(f"print('{GOOD}')"), python(f"print('noise'); print('{GOOD}')")]),
    ]
    begin = time.monotonic()
    lines = work(parts, tmp_path)
    assert time.monotonic() - begin < 30
    found = {part.name: result(tmp_path, part.name) for part in parts}
    statuses = {name: r["status"] for name, r in found.items()}
    assert statuses == {
        "falls": "failed", "hangs": "failed", "wrong": "failed", "absent": "skipped",
        "works": "done",
    }  # fmt: skip
    assert found["falls"]["note"] == "exit status 1; of the card"
    assert found["hangs"]["note"] == "ended at its limit of 3 s"
    assert [len(r["rows"]) for r in found.values()] == [1, 1, 1, 0, 2]  # what was there by then
    time.sleep(0.2)
    assert not alive(int((tmp_path / "pid").read_text()))
    assert (tmp_path / "table.md").read_text().splitlines() == lines
    assert "| works | a figure | 3 | 4 |  |  |  |" in lines


def test_a_second_call_goes_on_and_named_parts_run_again(tmp_path, capsys):
    def counting(name):
        return python(f"open('{tmp_path}/{name}.count', 'a').write('x'); print('{GOOD}')")

    def counts():
        return [len(path.read_text()) if path.exists() else 0
                for path in (tmp_path / f"{name}.count" for name in "ab")]  # fmt: skip

    parts = [Part(name, 20, [counting(name)]) for name in "ab"]
    lines = work(parts, tmp_path, seconds=0)
    assert counts() == [0, 0] and "| a | not run yet |  |  |  |  |  |" in lines
    work(parts[:1], tmp_path)
    work(parts, tmp_path)
    assert counts() == [1, 1] and "a: done before" in capsys.readouterr().err
    work(parts, tmp_path, again=["b"])
    assert counts() == [1, 2]


def test_parts_find_the_packages_that_this_process_finds(tmp_path, monkeypatch):
    """A card's machine may have some in a folder of their own, named by PYTHONPATH."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "carried.py").write_text(f"LINE = {GOOD!r}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lib"))
    code = "import carried, nanoswitch.files; print(carried.LINE)"
    work([Part("a", 20, [[sys.executable, "-c", code]])], tmp_path)
    assert result(tmp_path, "a")["status"] == "done"


def test_all_ends_where_the_baseline_is_wrong(tmp_path):
    wrong = python('print(\'{"figure": "loss", "met": false}\')')
    later = Part("later", 20, [python(f"print('{GOOD}')")])
    work([Part("baseline", 20, [wrong], vital=True), later], tmp_path)
    assert not (tmp_path / "later.json").exists()
    work([Part("other", 20, [wrong]), later], tmp_path)
    assert (tmp_path / "later.json").exists()


def test_the_parts_stand_in_order_and_fill_25_minutes(tmp_path):
    for name in ("build-nanogpt", "nanoGPT"):
        (tmp_path / name).mkdir()
    config = bench.BenchConfig("card", out=str(tmp_path), peers=str(tmp_path), device="cpu")
    parts = first_card.plan(config, first_card.FULL)
    assert [part.name for part in parts] == [
        "data", "machine", "baseline", "gpu tests", "attention", "train build-nanogpt",
        "train nanoGPT", "profile", "memory", "hellaswag", "generate", "scaling", "first steps",
        "run",
    ]  # fmt: skip
    assert sum(part.limit for part in parts) <= 25 * 60
    assert [part.name for part in parts if part.vital] == ["baseline"]
    settings = [json.loads(c[-1]) for c in parts[4].commands]
    masks = [s["masks"] for s in settings]
    assert masks == [m for m in ([[0, False]], [[0, True]], [[256, False]], [[256, True]])
                     for _ in range(2)]  # fmt: skip
    assert [s["share"] for s in settings] == [[0, 2], [1, 2]] * 4
    assert all(s["small_model"]["block_size"] == 1024 for s in settings)
    assert [json.loads(c[-1])["size"] for c in parts[8].commands] == [32, 64, 128, 256]
    for part in parts:  # every flag of bench.py is one
        for command in part.commands:
            if command[1].endswith("bench.py"):
                cli.parse(bench.BenchConfig, argv=command[2:])


@pytest.mark.parametrize(
    "card, name, row, met",
    [
        ("NVIDIA H200", "run", dict(figure="tokens/s, median", ours=600_001), "yes"),
        ("NVIDIA H200", "run", dict(figure="tokens/s, median", ours=599_999), "**no**"),
        ("NVIDIA A100", "run", dict(figure="tokens/s, median", ours=599_999), ""),
        ("NVIDIA H200", "run", dict(figure="MFU", ours=0.51), "**no**"),
        ("NVIDIA A100", "generate", dict(figure="tokens/s", ours=1, ratio=10.0), "yes"),
        ("NVIDIA A100", "train nanoGPT", dict(figure="tokens/s", ours=1, ratio=1.2), "**no**"),
        ("NVIDIA H200", "train build-nanogpt", dict(figure="tokens/s", ours=7e5, ratio=1.4),
         "**no**"),
        ("NVIDIA H200", "train build-nanogpt", dict(figure="tokens/s", ours=7e5, ratio=1.6), "yes"),
        ("NVIDIA H200", "train build-nanogpt", dict(figure="peak memory, GiB", ratio=0.7),
         "**no**"),
        ("NVIDIA H200", "hellaswag", dict(figure="items/s", ours=2009.0), "yes"),
        ("no card: cpu", "generate", dict(figure="tokens/s", ours=1, ratio=1.0), ""),
    ],
    ids=str,
)  # fmt: skip
def test_goals_stand_beside_what_was_measured(card, name, row, met):
    *_, goal, said = first_card.filled(SimpleNamespace(name=name), row, f"# on {card}")
    assert said == met and goal
    assert not first_card.filled(SimpleNamespace(name=name), row, card, small=True)[-2]


def test_what_would_waste_the_time_is_refused_first(tmp_path):
    def start(**flags):
        first_card.card(bench.BenchConfig("card", device="cpu", **flags))

    with pytest.raises(ValueError, match="--out"):
        start()
    with pytest.raises(ValueError, match=r"no folder .*away.*build-nanogpt and nanoGPT"):
        start(out=str(tmp_path), peers=str(tmp_path / "away"))
    with pytest.raises(ValueError, match="train shard"):
        start(out=str(tmp_path), data=str(tmp_path))
    with pytest.raises(ValueError, match="no part 'nothing'; the parts are data, machine"):
        start(out=str(tmp_path), parts="nothing")


# ----------------------------------------------------------------------------- the checks


@pytest.fixture
def settings(tmp_path):
    make_data(tmp_path / "data")
    s = first_card.SMALL | dict(
        device="cpu", dtype="float32", compile=False, data=str(tmp_path / "data"),
        out=str(tmp_path), size=1, micro_steps=1, first_size=2,
    )  # fmt: skip
    small = dict(n_layer=1, n_head=1, n_embd=16, block_size=64)
    few = dict(vocab_size=128, vocab_used=100)
    return s | dict(model=small | dict(block_size=16), small_model=small | few)


@pytest.mark.parametrize(
    "line, found",
    [
        ("tests/test_a.py::test_b[{'c': 1, 'd': 'e'}] PASSED   [ 12%]",
         ("tests/test_a.py::test_b[{'c': 1, 'd': 'e'}]", "PASSED")),
        ("[gw3] [  7%] FAILED tests/test_a.py::test_b[x y] ",
         ("tests/test_a.py::test_b[x y]", "FAILED")),
        ("tests/test_a.py::test_b[x y] ", None),
        ("FAILED tests/test_a.py::test_b - assert 1 == 2", None),
    ],
)  # fmt: skip
def test_results_are_read_of_one_process_and_of_several(line, found):
    assert card_checks.pytest_result(line) == found


def test_every_encoding_and_mask_is_compared(settings):
    rows = list(card_checks.attention(settings))
    assert len(rows) == 4 * len(POSITIONS)
    shares = [card_checks.attention(settings | dict(share=(i, 3))) for i in range(3)]
    assert sorted(row["figure"] for share in shares for row in share) == sorted(
        row["figure"] for row in rows
    )
    names = {row["figure"].removeprefix("loss by ") for row in rows}
    assert names == {
        pos + window + documents
        for pos in POSITIONS for window in ("", ", window 16") for documents in ("", ", documents")
    }  # fmt: skip
    assert all(row["met"] for row in rows)
    assert all(abs(row["ours"] - math.log(128)) < 1 for row in rows)


def test_a_wrong_kernel_is_called_wrong(settings, monkeypatch):
    """A mask that ends too early, a gradient that is NaN, a compiler that fails."""
    honest = card_checks.loss_and_gradients

    def narrow(config, s, exact):
        config = GPTConfig(**vars(config) | ({} if exact else {"window": 12}))
        return honest(config, s, exact)

    def nan(config, s, exact):
        loss, gradients = honest(config, s, exact)
        if not exact:
            gradients["transformer.ln_f.bias"][3] = math.nan
        return loss, gradients

    def fails(config, s, exact):
        raise RuntimeError("InductorError: not\ncomparable")

    assert card_checks.compare("rope", 16, False, settings)["met"]
    for broken in (narrow, nan):
        monkeypatch.setattr(card_checks, "loss_and_gradients", broken)
        assert card_checks.compare("rope", 16, False, settings)["met"] is False
    monkeypatch.setattr(card_checks, "loss_and_gradients", fails)
    row = card_checks.compare("rope", 16, False, settings)
    assert row["met"] is False and "RuntimeError: InductorError: not comparable" in row["figure"]


def test_gradients_are_judged_tensor_by_tensor():
    """By hand: a small one that is wrong counts, one of nothing but rounding does not."""
    theirs = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.1]), "c": torch.tensor([1e-9])}
    ours = theirs | {"b": torch.tensor([0.12]), "c": torch.tensor([1e-5])}
    assert card_checks.gradient_error(ours, theirs) == pytest.approx(0.2)
    assert card_checks.gradient_error(theirs, theirs) == 0


def test_speed_memory_and_first_steps_give_their_rows(settings, tmp_path):
    rows = {row["figure"]: row for check in ("profile", "memory", "first_steps")
            for row in card_checks.CHECKS[check](settings)}  # fmt: skip
    assert rows["a step under the profiler, ms"]["ours"] > 0
    assert sum(row["ours"] for name, row in rows.items() if name.startswith("share of")) <= 1
    assert "aten::" in (tmp_path / "profile.txt").read_text()
    assert rows["tokens/s, micro-batch 1"]["ours"] > 0
    peak = rows["peak beside the prediction, micro-batch 1, GiB"]
    assert peak["ours"] > peak["other"] > 0  # a CPU's holds the libraries too
    losses = [rows[f"loss of step {step} beside the CPU's"] for step in range(1, 6)]
    assert all(row["met"] and row["ours"] == row["other"] for row in losses)  # this is the CPU
    assert losses[-1]["ours"] != losses[0]["ours"]


def write_log(folder, entries):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_a_killed_run_must_go_on_with_the_same_losses(tmp_path):
    def steps(losses, first=1):
        return [{"step": i, "train_loss": loss, "tok_per_s": 100.0 + i, "mfu": 0.5}
                for i, loss in enumerate(losses, first)]  # fmt: skip

    def judge(entries):
        write_log(tmp_path / "run", entries)
        rows = list(card_checks.figures(tmp_path / "run", before, {}))
        return [row["met"] for row in rows if row["met"] is not None], rows

    before = {1: 9.0, 2: 8.0, 3: 7.0, 4: 6.0}
    good = [*steps([9.0, 8.0]), {"event": "resume", "step": 2}, *steps([7.001, 6.0], 3)]
    met, rows = judge(good)
    assert met == [True] * 3 and rows[0]["ours"] == 103.5 and rows[1]["ours"] == 0.5
    assert rows[-1]["ours"] == pytest.approx(0.001)
    met, _ = judge([*good[:3], *steps([7.5, 6.0], 3)])
    assert met == [True, True, False]  # other losses
    met, _ = judge([*steps([9.0, 8.0, 7.0]), {"event": "resume", "step": 2}, *steps([7.0], 3)])
    assert met == [True, False, True]  # step 3 twice
    met, _ = judge(steps([9.0, 8.0, 7.0, 6.0]))
    assert met == [True, False]  # not resumed


@pytest.mark.slow
def test_a_run_is_killed_and_goes_on(settings):
    fast = dict(seconds=600, max_steps=60, checkpoint_every=20, tokens=128, size=2)  # ends before
    rows = list(card_checks.run(settings | fast))
    found = {row["figure"]: row for row in rows}
    kill = found["step at the kill, and the one resumed from"]
    assert kill["met"] and kill["ours"] > kill["other"] >= 20
    assert found["largest change of a loss done again"]["ours"] == 0  # a CPU does the same again
    assert found["steps"]["ours"] == 60


@pytest.mark.slow
def test_the_whole_command_runs_on_a_cpu_at_small_sizes(tmp_path):
    items = [{"ind": i, "activity_label": "", "ctx_a": "A man", "ctx_b": "", "ctx": f"Man {i}",
              "label": 0, "endings": ["a", "b", "c", "d"]} for i in range(10)]  # fmt: skip
    make_data(tmp_path / "data", train=3000, val=600)
    (tmp_path / "data" / "hellaswag.jsonl").write_text("\n".join(map(json.dumps, items)))
    flags = [f"--data={tmp_path}/data", f"--out={tmp_path}/out", "--small=true", "--device=cpu"]
    command = [sys.executable, str(ROOT / "bench.py"), "card", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    ran = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    statuses = {name: r["status"] for name, r in ran.items() if isinstance(r, dict)}
    skipped = {"data", "gpu tests", "train nanoGPT"}
    assert {name for name, status in statuses.items() if status == "skipped"} == skipped
    assert {s for name, s in statuses.items() if name not in skipped} == {"done"}, done.stdout
