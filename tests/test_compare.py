"""compare.py: its numbers against logs written out here by hand and SciPy's paired test, its sweep
against runs of train_gpt2.py."""

import contextlib
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from builders import page_of, run_main, write_jsonl
from safetensors.numpy import save_file
from scipy.stats import ttest_rel

import compare
from model import GPT, GPTConfig
from nanoswitch.counts import flops_per_token
from nanoswitch.log import read_run

ROOT = Path(__file__).parent.parent
MODEL = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16}
BATCH = 100


def write_run(folder, losses, seed=1, speeds=(), steps=3, event="start", **changes):
    """A log as train_gpt2.py writes it: losses {step: validation loss}, speeds of steps 1, 2..."""
    folder.mkdir(parents=True)
    config = MODEL | {"total_batch_tokens": BATCH, "val_tokens": 64, "seed": seed} | changes
    lines = [
        {"event": event, "parameters": 1234, "steps": steps, "data_sha256": "d", "config": config},
        *(
            {"step": step, "train_loss": 9.0 - step, "tok_per_s": speed}
            for step, speed in enumerate(speeds, 1)
        ),
        *(
            {"step": step, "val_loss": loss, "val_bpb": loss / 2, "peak_memory_bytes": 1000 + step}
            for step, loss in losses.items()
        ),
    ]
    write_jsonl(folder / "log.jsonl", lines)
    return folder


def groups_of(tmp_path, **losses):
    """{name: Runs} of {name: final losses, one a seed}."""
    for name, finals in losses.items():
        for seed, loss in enumerate(finals, 1):
            write_run(tmp_path / name / f"seed_{seed}", {0: 10.0, 3: loss}, seed, [50.0, 25, 100])
    return {name: compare.read_folders(tmp_path / name) for name in losses}


def command(*argv, fails=False):
    """Run compare.py's main in this process -> what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run_main(compare.main, *argv)
    assert bool(status) == fails, err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


# ----------------------------------------------------------------------------- numbers


def test_a_row_holds_what_the_logs_say(tmp_path):
    groups = groups_of(tmp_path, gpt2=[5.0, 5.2, 4.9], rope=[4.0, 4.2, 3.8])
    found = compare.results(groups)
    row = found["configs"]["rope"]
    assert found["first"] == "gpt2" and row["parameters"] == 1234
    assert row["tokens"] == 3 * BATCH and row["tok_per_s"] == 50
    assert row["wall_s"] == pytest.approx(BATCH / 50 + BATCH / 25 + BATCH / 100)
    assert row["peak_memory_bytes"] == 1003
    assert row["val_loss"]["seeds"] == [4.0, 4.2, 3.8]
    assert row["val_loss"]["mean"] == pytest.approx(4.0)
    assert row["val_loss"]["sd"] == pytest.approx(0.2)
    assert row["diff"]["mean"] == pytest.approx((-1.0 - 1.0 - 1.1) / 3)
    reference = ttest_rel([4.0, 4.2, 3.8], [5.0, 5.2, 4.9])  # of one row nothing is adjusted
    assert row["diff"]["p"] == row["diff"]["p_adjusted"] == pytest.approx(reference.pvalue)
    interval = reference.confidence_interval(0.95)
    assert row["diff"]["ci95"] == pytest.approx([interval.low, interval.high])
    assert row["diff"]["verdict"] == "better" and row["diff"]["least_effect"] > 0
    assert row["val_bpb"]["mean"] == pytest.approx(2.0) == 2 * row["val_bpb"]["sd"] / 0.1
    assert row["kv_bytes_per_token"] == 2 * 8 * 2  # keys and values, 8 wide, bf16, one layer
    gpt = GPT(GPTConfig(**MODEL))
    assert row["flops_per_token"] == flops_per_token(gpt)
    # the mean curve falls from 10 to 4.0 in 3 steps and passes 15.1 / 3 on the way
    part = (10 - 15.1 / 3) / (10 - 4.0)
    assert row["reaches_first"]["tokens"] == pytest.approx(part * 3 * BATCH, abs=1)
    assert row["reaches_first"]["s"] == pytest.approx(
        2 + 4 * (part * 3 - 1) if part * 3 < 2 else 6 + (part * 3 - 2)
    )
    assert "reaches_first" in found["configs"]["gpt2"]


def test_hellaswag_differs_by_item(tmp_path):
    """The error is that of paired items: SciPy's t statistic gives it back. The third seed of rope
    has no partner, and an older step's items do not count."""
    rng, values = np.random.default_rng(0), {}
    for name, seeds in {"gpt2": (1, 2), "rope": (1, 2, 3), "none": (1,)}.items():
        for seed in seeds:
            folder = write_run(tmp_path / name / f"seed_{seed}", {3: 5.0}, seed, [1.0] * 3)
            found = values[name, seed] = rng.normal(size=(40, 4))
            held = {"step": np.array(1 if name == "none" else 3), "values": found}
            save_file(held, folder / "hellaswag_items.safetensors")
            with open(folder / "log.jsonl", "a") as file:
                scores = dict(n=40, acc=0.3, acc_norm=0.3, se=0.1, bpb=1.0, bpb_se=0.1, margin=0.1)
                file.write(
                    json.dumps({"step": 3, **{f"hellaswag_{k}": v for k, v in scores.items()}})
                    + "\n"
                )
    groups = {name: compare.read_folders(tmp_path / name) for name in ("gpt2", "rope", "none")}
    found = compare.results(groups)
    scores = {name: row["hellaswag"] for name, row in found["configs"].items()}
    assert "diff" not in scores["gpt2"] and scores["none"]["diff"] is None
    means = {name: (values[name, 1] + values[name, 2]) / 2 for name in ("gpt2", "rope")}
    for i, name in enumerate(("acc", "acc_norm", "bpb", "margin")):
        diff = scores["rope"]["diff"][name]
        reference = ttest_rel(means["rope"][:, i], means["gpt2"][:, i])
        assert diff["mean"] / diff["se"] == pytest.approx(reference.statistic)
        if name in ("acc_norm", "bpb"):
            shown = f"; {diff['mean']:+.4f} ± {diff['se']:.4f} |"
            assert shown in compare.table(found, "none", [])


def test_a_worse_config_never_reaches_the_first(tmp_path):
    groups = groups_of(tmp_path, gpt2=[5.0], rope=[5.5])
    assert compare.results(groups)["configs"]["rope"]["reaches_first"] is None


def test_runs_of_other_lengths_get_no_difference(tmp_path):
    write_run(tmp_path / "a", {3: 5.0}, speeds=[1.0] * 3)
    write_run(tmp_path / "b", {2: 4.0}, speeds=[1.0] * 2, steps=2)
    groups = {name: compare.read_folders(tmp_path / name) for name in "ab"}
    found = compare.results(groups)
    assert found["configs"]["b"]["diff"]["mean"] is None
    assert "another experiment" in compare.table(found, "none", [])


def test_the_table_names_noise_and_what_differs(tmp_path):
    write_run(tmp_path / "gpt2", {3: 5.0}, speeds=[1.0] * 3)
    write_run(tmp_path / "rope", {3: 4.0}, speeds=[1.0] * 3, pos="rope", lr=1.0)
    groups = {name: compare.read_folders(tmp_path / name) for name in ("gpt2", "rope")}
    text = compare.table(compare.results(groups), "none", ["runs/x"])
    rope = next(line for line in text.splitlines() if line.startswith("| rope"))
    assert "-1.0000" in rope and "one seed: noise unknown" in rope
    assert "- rope: lr 1.0, pos rope" in text
    assert "Parameters are not matched" in text and "left out: runs/x" in text


def test_every_row_is_judged_among_all(tmp_path):
    """By test_stats.py's tests; here, that the table says what they find."""
    groups = groups_of(
        tmp_path, a=[5.0, 5.2, 4.9], b=[4.6, 4.9, 4.46], c=[5.08, 5.15, 4.9], d=[5.4, 5.65, 5.2]
    )
    found = compare.results(groups, margin=0.2)
    rows = [row["diff"] for row in found["configs"].values()][1:]
    assert [row["verdict"] for row in rows] == ["better", "equal", "worse"]
    assert all(row["p_adjusted"] > row["p"] for row in rows)
    assert found["statistics"]["method"] == "dunnett" and found["statistics"]["df"] == 6
    text = compare.table(found, "none", [])
    assert "Dunnett" in text and "within 0.2 nats of the first is equal" in text
    for row in rows:
        p, adjusted = ("<0.001" if x < 0.001 else f"{x:.2g}" for x in (row["p"], row["p_adjusted"]))
        assert f"{p} | {adjusted} | {row['least_effect']:.4f}" in text
    own = compare.table(compare.results(groups, pool=False), "none", [])
    assert "Holm" in own and "equal |" not in own


def test_a_log_without_bits_per_byte_is_still_read(tmp_path):
    groups = groups_of(tmp_path, a=[5.0], b=[4.0])
    log = tmp_path / "b" / "seed_1" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        line.pop("val_bpb", None)
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    groups["b"] = compare.read_folders(tmp_path / "b")
    found = compare.results(groups)
    assert found["configs"]["b"]["val_bpb"] is None
    assert "| 4.0000 | - | -1.0000 |" in compare.table(found, "none", [])


# ----------------------------------------------------------------------------- logs


def test_a_log_that_is_being_written_is_read_up_to_its_last_whole_line(tmp_path):
    run = write_run(tmp_path / "a", {0: 10.0})
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 3, "val_l')
    found = read_run(run)
    assert found.curve("val_loss") == ([0], [10.0]) and not found.finished
    (run / "log.jsonl").write_text("")
    assert read_run(run) is None


def test_a_skipped_step_has_no_loss(tmp_path):
    run = write_run(tmp_path / "a", {3: 5.0})
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 4, "train_loss": null, "tok_per_s": 3.0}\n')
    assert read_run(run).curve("train_loss") == ([], [])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"block_size": 32}, ["block_size 16", "b has 32", "--block_size"]),
        ({"val_tokens": 128}, ["val_tokens"]),
        ({"hellaswag_limit": 9}, []),  # the other log does not know of it: nothing to compare
        ({"lr": 1.0}, []),
    ],
)
def test_an_unfair_comparison_is_not_printed(tmp_path, changes, words):
    write_run(tmp_path / "a", {3: 5.0})
    write_run(tmp_path / "b", {3: 5.0}, **changes)
    done = command(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "o", fails=bool(words))
    for word in ["no fair comparison"] * bool(words) + words:
        assert word in done.stderr
    assert (tmp_path / "o").exists() != bool(words)


def test_other_data_is_no_fair_comparison(tmp_path):
    write_run(tmp_path / "a", {3: 5.0})
    log = write_run(tmp_path / "b", {3: 5.0}) / "log.jsonl"
    log.write_text(log.read_text().replace('"data_sha256": "d"', '"data_sha256": "e"'))
    with pytest.raises(ValueError, match=r"no fair comparison.*same data"):
        compare.check_runs({name: compare.read_folders(tmp_path / name) for name in "ab"})


def test_the_seeds_of_a_config_differ_in_nothing_else(tmp_path):
    write_run(tmp_path / "a" / "seed_1", {3: 5.0}, seed=1, lr=1e-3, device="cpu")
    write_run(tmp_path / "a" / "seed_2", {3: 5.0}, seed=2, lr=2e-3, device="cuda")
    with pytest.raises(ValueError, match=r"seed_2 .*differ in lr"):
        compare.check_runs({"a": compare.read_folders(tmp_path / "a")})


def test_one_config_has_a_seed_once(tmp_path):
    write_run(tmp_path / "a" / "seed_1", {3: 5.0}, seed=1)
    write_run(tmp_path / "a" / "seed_2", {3: 5.0}, seed=1)
    with pytest.raises(ValueError, match="two runs with the same seed"):
        compare.check_runs({"a": compare.read_folders(tmp_path / "a")})


# ----------------------------------------------------------------------------- the command


def test_finished_runs_are_compared_from_their_logs_alone(tmp_path):
    groups_of(tmp_path, gpt2=[5.0, 5.2], rope=[4.0, 4.2])
    out = tmp_path / "out"
    folders = (tmp_path / "gpt2", tmp_path / "rope")
    done = command(*folders, "--out", out)
    assert "4.1000" in done.stdout and "better" not in done.stdout.splitlines()[1]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (out / "curves.svg").read_bytes()[:500]
    found = json.loads((out / "results.json").read_text())
    wanted = {  # the interface that others script against
        "parameters", "flops_per_token", "kv_bytes_per_token", "tok_per_s", "peak_memory_bytes",
        "wall_s", "val_loss", "diff", "hellaswag",
    }  # fmt: skip
    assert wanted <= found["configs"]["rope"].keys() and found["first"] == "gpt2"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    command(*folders, "--out", out)  # the same again, byte for byte
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    "name, words",
    [
        ("rope", None),
        ("none", "none is not better than gpt2: undecided"),
        ("gpt2", "it must be one of rope, none"),
    ],
)
def test_a_script_can_require_a_gain(tmp_path, name, words):
    groups_of(tmp_path, gpt2=[5.0, 5.2, 4.9], rope=[4.0, 4.2, 3.9], none=[5.1, 5.1, 4.9])
    folders = [tmp_path / name for name in ("gpt2", "rope", "none")]
    done = command(*folders, "--out", tmp_path / "o", "--require", name, fails=bool(words))
    assert (words or "") in done.stderr and done.stderr.count("\n") == bool(words)
    if name != "gpt2":
        found = json.loads((tmp_path / "o" / "results.json").read_text())
        assert (found["configs"][name]["diff"]["verdict"] == "better") == (not words)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep of two configs and two seeds that was killed once -> its folder and command."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    np.save(folder / "data" / "train_1.npy", rng.integers(0, 50257, 3000).astype(np.uint16))
    np.save(folder / "data" / "val_0.npy", rng.integers(0, 50257, 400).astype(np.uint16))
    (folder / "base.toml").write_text("".join(f"{k} = {v}\n" for k, v in MODEL.items()))
    (folder / "gpt2.toml").write_text("")
    (folder / "rope_gqa.toml").write_text('pos = "rope"\nn_kv_head = 1\nlr = 2e-3\n')
    argv = [
        folder / "gpt2.toml", folder / "rope_gqa.toml", "--base", folder / "base.toml",
        "--seeds", 2, "--out", folder / "out", "--match", "params", "--jobs", 2,
        "--data_dir", folder / "data",
        "--device", "cpu", "--dtype", "float32",
        "--total_batch_tokens", 64, "--max_steps", 6, "--warmup_steps", 2,
        "--eval_every", 2, "--val_tokens", 64, "--sample_every", 0, "--checkpoint_every", 2,
        "--curve", "false",
    ]  # fmt: skip
    process = subprocess.Popen([sys.executable, ROOT / "compare.py", *map(str, argv)])
    log = folder / "out" / "runs" / "gpt2" / "seed_1337" / "log.jsonl"
    while not log.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()  # its runs go on by themselves, and the next one waits for them
    process.wait()
    return folder, argv, command(*argv)


def runs_of(folder):
    return {path.parent.parent.name + "/" + path.parent.name: path
            for path in sorted(folder.glob("out/runs/*/*/log.jsonl"))}  # fmt: skip


def test_a_sweep_trains_every_config_with_every_seed(sweep):
    folder, _, done = sweep
    logs = runs_of(folder)
    assert list(logs) == [
        "gpt2/seed_1337", "gpt2/seed_1338", "rope_gqa/seed_1337", "rope_gqa/seed_1338"
    ]  # fmt: skip
    found = json.loads((folder / "out" / "results.json").read_text())["configs"]
    for name in ("gpt2", "rope_gqa"):
        runs = [read_run(logs[f"{name}/seed_{seed}"].parent) for seed in (1337, 1338)]
        losses = [run.values["val_loss"][6] for run in runs]
        assert found[name]["val_loss"]["seeds"] == losses and losses[0] != losses[1]
        for run in runs:  # every step once, in spite of the kill
            entries = map(json.loads, (run.folder / "log.jsonl").read_text().splitlines())
            steps = [entry["step"] for entry in entries if "train_loss" in entry]
            assert steps == [1, 2, 3, 4, 5, 6]
    counts = [found[name]["parameters"] for name in ("gpt2", "rope_gqa")]
    assert (
        counts[0] == GPT(GPTConfig(**MODEL)).num_params() != counts[1]
        and abs(counts[1] / counts[0] - 1) < 0.01
    )
    assert "Parameters are matched" in (folder / "out" / "results.md").read_text()
    assert "runs, " in done.stderr  # progress


def test_its_runs_see_the_same_tokens_and_start_alike(sweep):
    """A config that only names another kernel computes what the first one does, step by step."""
    folder, argv, _ = sweep
    (folder / "math.toml").write_text('attention_kernel = "math"\n')
    argv = [folder / "gpt2.toml", folder / "math.toml", *argv[2:]]
    command(*argv, "--seeds", 1, "--out", folder / "out", "--match", "none")
    runs = [read_run(folder / "out/runs" / name / "seed_1337") for name in ("gpt2", "math")]
    assert len({run.start["data_sha256"] for run in runs}) == 1
    ours, other = (run.curve("train_loss") for run in runs)
    assert ours[0] == other[0] and ours[1] == pytest.approx(other[1], abs=1e-5)


def test_finished_runs_are_not_done_again(sweep):
    folder, argv, _ = sweep
    before = {name: path.stat().st_mtime_ns for name, path in runs_of(folder).items()}
    command(*argv)
    report = (folder / "out" / "results.json").read_bytes()
    command(*argv, "--report_only")
    assert {name: path.stat().st_mtime_ns for name, path in runs_of(folder).items()} == before
    assert (folder / "out" / "results.json").read_bytes() == report


@pytest.mark.parametrize(
    "flag, value, words",
    [
        ("grad_clip", 0.5, "was made with grad_clip 1.0, not 0.5"),
        ("max_steps", 8, "was made with max_steps 6, not 8"),  # another schedule
    ],
)
def test_other_flags_need_another_folder(sweep, flag, value, words):
    _, argv, _ = sweep
    done = command(*argv, f"--{flag}", value, fails=True)
    assert words in done.stderr and "another --out" in done.stderr


@pytest.mark.slow  # CI has test_study.py's and test_ladder.py's, with a stand-in for the training
def test_two_at_once_share_the_work(sweep, tmp_path):
    _, argv, _ = sweep
    argv = [
        sys.executable,
        ROOT / "compare.py",
        *argv,
        "--out",
        tmp_path,
        "--jobs",
        1,
        "--seeds",
        1,
    ]
    both = [subprocess.Popen(list(map(str, argv)), stderr=subprocess.PIPE) for _ in range(2)]
    for process in both:
        _, err = process.communicate()
        assert process.returncode == 0, err
    for log in tmp_path.glob("runs/*/*/log.jsonl"):
        entries = map(json.loads, log.read_text().splitlines())
        assert [e["step"] for e in entries if "train_loss" in e] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_fails_is_named_and_the_others_go_on(sweep, tmp_path):
    _, argv, _ = sweep
    argv = list(map(str, argv[1:]))  # one sound config is enough
    argv[argv.index("--out") + 1] = str(tmp_path / "out")
    argv[argv.index("--seeds") + 1] = "1"
    argv[argv.index("--match") + 1] = "none"
    (tmp_path / "wide.toml").write_text("micro_batch = 3\n")  # does not divide the batch
    done = command(tmp_path / "wide.toml", *argv, fails=True)
    assert "wide/seed_1337" in done.stderr and "micro_batch 3" in done.stderr
    assert read_run(tmp_path / "out/runs/rope_gqa/seed_1337").finished
    # nothing stands in for the first, with which all are compared
    assert "wide has no finished run yet" in done.stderr
    assert not (tmp_path / "out/results.json").exists()
    argv = [argv[0], tmp_path / "wide.toml", *argv[1:]]
    done = command(*argv, fails=True)
    assert "1 of 2 runs failed" in done.stderr
    assert "left out: wide" in (tmp_path / "out/results.md").read_text()


def test_configs_that_see_other_tokens_are_refused_before_anything_runs(sweep, tmp_path):
    _, argv, _ = sweep
    (tmp_path / "long.toml").write_text("block_size = 32\n")
    done = command(*argv, tmp_path / "long.toml", "--out", tmp_path / "out", fails=True)
    assert "no fair comparison" in done.stderr and "--block_size" in done.stderr
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------- the documents


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("experiments/*/results.json")), ids=lambda path: path.parent.name
)
def test_the_documents_say_what_the_results_hold(path):
    if path.with_name("command.txt").exists():
        pytest.skip("test_experiments.py makes it again from its logs")
    lines = page_of(path.parent).splitlines()
    found = json.loads(path.read_text())
    for name, row in found["configs"].items():
        losses = row["val_loss"]["seeds"]
        shown = f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}"
        if name != found["first"] and row["diff"]["p"] is not None:  # runs of one length
            low, high = row["diff"]["ci95"]
            word = "within noise" if low <= 0 <= high else "better" if high < 0 else "worse"
            shown += f" | {row['diff']['mean']:+.4f} [{low:+.4f}, {high:+.4f}] | "
            shown += f"{row['diff']['p']:.2g} | {word}"
        assert any(line.startswith(f"| {name} |") and shown in line for line in lines), (
            name,
            shown,
        )


def test_runs_that_patience_stopped_are_compared_by_what_they_were_to_see(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "draw", lambda *args: None)
    for name, of, loss in (("a", (3, 6, 9), 5.0), ("b", (6, 9, 3), 4.9)):
        for seed, step in enumerate(of, 1):
            losses = {s: loss - 0.1 * s for s in range(0, step + 1, 3)}
            run = write_run(tmp_path / name / f"seed_{seed}", losses, seed, [9.0] * step, 30)
            with open(run / "log.jsonl", "a") as log:
                log.write(json.dumps({"event": "early stop", "step": step}) + "\n")
    command(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "results.json").read_text())["configs"]
    assert [row["tokens"] for row in found.values()] == [6 * BATCH] * 2
    assert found["b"]["diff"]["mean"] == pytest.approx(-0.1) and found["b"]["diff"]["n"] == 3
    assert "--patience stopped runs early" in (tmp_path / "out" / "results.md").read_text()


def test_two_vocabularies_without_bits_per_byte_are_one_line(tmp_path):
    for name, used in (("a", 64), ("b", 32)):
        run = write_run(tmp_path / name, {0: 5.0, 3: 4.0}, vocab_used=used)
        text = re.sub(r'"val_bpb": [0-9.]+, ', "", (run / "log.jsonl").read_text())
        text = text.replace('"data_sha256"', '"val_text_sha256": "t", "data_sha256"', 1)
        (run / "log.jsonl").write_text(text)
    done = command(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out", fails=True)
    assert "no val_bpb" in done.stderr and done.stderr.count("\n") == 1
