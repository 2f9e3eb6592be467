"""nanoswitch/study.py: which runs --tune, --resolve and --plan ask for. Instead of training, logs
are written with losses that are known."""

import dataclasses
import json
import math
import random
import shutil

import pytest
import torch
from scipy.stats import nct, t
from test_compare import command
from tiny_runs import make_data, trainer

from model import GPT, GPTConfig
from nanoswitch import study

BEST = {"a": 0.0012, "b": 0.0003}  # each config's best rate


class Trainer:
    """Stands in for sweep(): writes the logs of jobs, in all `most` of them, then is killed."""

    def __init__(self, noise=0.02, most=10**9, **start):
        self.noise, self.most, self.trained, self.start = noise, most, [], start

    def __call__(self, jobs, at_once):
        for job in [job for job in jobs if not job.done()]:
            if len(self.trained) == self.most:
                raise KeyboardInterrupt
            self.trained.append(str(job.folder))
            job.folder.mkdir(parents=True)
            steps, (parameters, losses) = job.config["max_steps"], self.result(job)
            start = {"event": "start", "step": 0, "config": job.config, "parameters": parameters}
            start |= {"steps": steps} | job.seen | self.start
            lines = [start]
            for step, loss in losses.items():
                lines.append({"step": step, "val_loss": loss, "val_bpb": loss / 100})
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (job.folder / "log.jsonl").write_text(text)
        return []

    def result(self, job):
        """-> parameters, {step: validation loss}"""
        config = job.config
        luck = random.Random(f"{job.name} {config['seed']}").gauss(0, self.noise)
        loss = 4 + math.log(config["lr"] / BEST[job.name]) ** 2 + luck
        return 9, {0: 9.0, config["max_steps"]: loss}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs compare.py on two configs -> its output and the Trainer."""
    for name in BEST:
        (tmp_path / f"{name}.toml").write_text("n_layer = 1\nn_head = 2\nn_embd = 8\n")
    monkeypatch.setattr("compare.draw", lambda *args: None)  # that takes a second each

    def call(*argv, trainer=None, fails=False, folder="out", names=BEST, common=True):
        trainer = trainer or Trainer()
        monkeypatch.setattr(study, "sweep", trainer)
        always = ["--max_steps", 100] * common + ["--warmup_steps", 10, "--out", tmp_path / folder]
        always += ["--device", "cpu", "--seed", 1]
        configs = [tmp_path / f"{name}.toml" for name in names]
        return command(*configs, *always, *argv, fails=fails), trainer

    return call


def read(folder):
    return json.loads((folder / "out" / "results.json").read_text())


def test_each_config_is_compared_at_the_common_rate_and_at_its_own(run, tmp_path):
    _, trainer = run("--tune", "lr", "--seeds", 3, "--tune_frac", 0.5, "--lr", 6e-4)
    found = read(tmp_path)
    search = found["search"]
    assert search["flag"] == "lr" and search["frac"] == 0.5
    own = {name: one["best"] for name, one in search["configs"].items()}
    assert own == {"a": pytest.approx(0.0012), "b": pytest.approx(0.0003)}
    for name, row in found["configs"].items():
        assert row["lr"] == 6e-4
        assert row["val_loss"]["mean"] == pytest.approx(4 + math.log(2) ** 2, abs=0.05)
        assert found["tuned"]["configs"][name]["lr"] == own[name]
        assert found["tuned"]["configs"][name]["val_loss"]["mean"] == pytest.approx(4, abs=0.05)
    assert len(trainer.trained) == len(set(trainer.trained))
    log = (tmp_path / "out/tune/a/lr_0.0012/log.jsonl").read_text().splitlines()[0]
    config = json.loads(log)["config"]
    assert (config["max_steps"], config["warmup_steps"], config["seed"]) == (50, 5, 1)
    text = (tmp_path / "out" / "results.md").read_text()
    assert "## Each at its own lr" in text and "| a | 0.0012 | 0.0006 |" in text
    assert "its own lr" in (tmp_path / "out" / "report.html").read_text()


def test_the_common_rate_that_is_the_best_is_trained_once(run, tmp_path):
    _, trainer = run("--tune", "lr", "--seeds", 2, "--lr", 0.0012)
    assert [f for f in trainer.trained if "/tuned/a/" in f] == []
    assert len([f for f in trainer.trained if "/tuned/b/" in f]) == 2
    assert read(tmp_path)["tuned"]["configs"]["a"] == read(tmp_path)["configs"]["a"]


def test_a_killed_study_goes_on_without_a_run_lost_or_repeated(run, tmp_path):
    argv = ["--tune", "lr", "--seeds", 2, "--resolve", 0.12, "--max_seeds", 6]
    _, whole = run(*argv, folder="whole")
    trained = []
    for most in (1, 3, 4, 5, 1, 99):
        _, part = run(*argv, trainer=Trainer(most=most), fails=most < 99)
        trained += part.trained
    inside = [name.split("/out/")[1] for name in trained]
    assert sorted(inside) == sorted(name.split("/whole/")[1] for name in whole.trained)
    both = [json.loads((tmp_path / f / "results.json").read_text()) for f in ("out", "whole")]
    assert both[0] == both[1]


def test_two_machines_folders_merge(run, tmp_path):
    argv = ["--tune", "lr", "--seeds", 2]
    run(*argv, folder="whole")
    run(*argv, folder="other", names="b")
    (tmp_path / "other/runs/b/seed_2/log.jsonl").write_text("")  # that one it has just begun
    run(*argv, names="a")
    before = (tmp_path / "out/runs/a/seed_1/log.jsonl").stat().st_mtime_ns
    done, trainer = run(*argv, "--merge", tmp_path / "other")
    assert [name.split("/out/")[1] for name in trainer.trained] == ["runs/b/seed_2"]
    assert f"{tmp_path}/other: 8 runs taken" in done.stdout  # five of the search, three seeds
    both = [json.loads((tmp_path / f / "results.json").read_text()) for f in ("out", "whole")]
    assert both[0] == both[1]
    assert (tmp_path / "out/runs/a/seed_1/log.jsonl").stat().st_mtime_ns == before
    done, trainer = run(*argv, "--merge", tmp_path / "other")
    assert "0 runs taken" in done.stdout and not trainer.trained


@pytest.mark.parametrize(
    "start, argv, words",
    [
        ({"data_sha256": "e" * 64}, [], "on data of hash eeeeeeeeeeee, here it would be"),
        ({"dtype": "bfloat16"}, ["--dtype", "float32"], "in bfloat16, here it would be float32"),
        ({}, ["--grad_clip", 2], "was made with grad_clip 1.0, not 2.0"),
        ({"versions": {"torch": "2.12.0+cu130"}}, [], None),  # said, not refused
    ],
)
def test_runs_that_do_not_fit_are_one_clear_line(run, tmp_path, start, argv, words):
    make_data(tmp_path / "data")
    given = ["--block_size", 16, "--data_dir", tmp_path / "data", "--dtype", "float32"]
    run(*given, folder="other", names="b")
    log = tmp_path / "other/runs/b/seed_1/log.jsonl"
    first, *rest = log.read_text().splitlines()  # as the other machine would have written it
    log.write_text("\n".join([json.dumps(json.loads(first) | start), *rest, ""]))
    here = {"versions": {"torch": "2.13.0+cpu"}}
    fails = words is not None
    done, trainer = run(
        *given, *argv, "--merge", tmp_path / "other", trainer=Trainer(**here), fails=fails
    )
    if fails:
        assert words in done.stderr and done.stderr.count("\n") == 1 and not trainer.trained
    else:
        assert (
            "Runs of more than one torch: 2.12.0, 2.13.0."
            in (tmp_path / "out" / "results.md").read_text()
        )
    if "data_sha256" in start or "dtype" in start:
        assert not (tmp_path / "out").exists()
    # copied by hand they are refused as well
    if "data_sha256" in start:
        (tmp_path / "out").mkdir()
        (tmp_path / "other" / "runs").rename(tmp_path / "out" / "runs")
        done, trainer = run(*given, fails=True)
        assert words in done.stderr and not trainer.trained


def test_the_precision_counts_not_the_flag_that_chose_it(run, monkeypatch):
    """auto is another precision on another machine: there --dtype names what the runs are in."""
    monkeypatch.setattr(study, "pick_dtype", lambda flag, device: torch.float32)
    assert run()[1].trained  # with auto
    monkeypatch.setattr(
        study, "pick_dtype",
        lambda flag, device: torch.bfloat16 if flag == "auto" else getattr(torch, flag),
    )  # fmt: skip
    assert not run("--dtype", "float32")[1].trained
    for argv in ([], ["--dtype", "bfloat16"]):
        done, trainer = run(*argv, fails=True)
        assert "was trained in float32, here it would be bfloat16" in done.stderr
        assert not trainer.trained


def test_flags_are_checked_before_a_run_is_copied(run, tmp_path):
    run(folder="other", names="b")
    done, trainer = run("--grad_clip", 2, "--merge", tmp_path / "other", fails=True)
    assert "was made with grad_clip 1.0, not 2.0" in done.stderr
    assert not trainer.trained and not list(tmp_path.glob("out/**/log.jsonl"))


def test_only_whole_runs_in_their_places_are_merged(run, tmp_path):
    run(folder="other", names="b")
    half = tmp_path / "other/runs/b/seed_1.copying"
    shutil.copytree(tmp_path / "other/runs/b/seed_1", half)  # another merge was killed there
    done, _ = run("--merge", tmp_path / "other/runs", fails=True)
    assert "give another comparison's --out folder" in done.stderr
    done, trainer = run("--merge", tmp_path / "other")
    assert "1 runs taken" in done.stdout and len(trainer.trained) == 1
    assert not list(tmp_path.glob("out/**/*.copying"))


def forget(tmp_path, flag):
    """Make the logs older than a flag."""
    for log in tmp_path.glob("out/**/log.jsonl"):
        first, *rest = log.read_text().splitlines()
        start = json.loads(first)
        del start["config"][flag]
        log.write_text("\n".join([json.dumps(start), *rest, ""]))


def test_a_flag_newer_than_the_logs_was_at_its_default(run, tmp_path):
    run("--seeds", 2)
    forget(tmp_path, "qk_norm")
    _, trainer = run("--seeds", 3)
    assert len(trainer.trained) == 2  # a seed more of each, and no complaint
    done, trainer = run("--seeds", 3, "--qk_norm", "true", fails=True)
    assert "was made with qk_norm False, not True" in done.stderr and not trainer.trained


def test_a_second_search_in_the_same_folder_is_refused_before_it_runs(run, tmp_path):
    run("--tune", "lr", "--lr", 6e-4)
    done, trainer = run("--tune", "weight_decay", "--lr", 6e-4, fails=True)
    assert "was made with lr 0.0012, not 0.0006" in done.stderr and not trainer.trained


def test_a_trial_of_the_warmup_is_as_short_as_its_run(run, tmp_path):
    run("--tune", "warmup_steps", "--tune_frac", 0.5)
    logs = [log.read_text().splitlines()[0] for log in tmp_path.glob("out/tune/a/*/log.jsonl")]
    found = {json.loads(line)["config"]["warmup_steps"] for line in logs}
    assert 5 in found and max(found) < 10  # half of 10, and its neighbours


def test_no_seeds_are_added_for_a_row_of_another_length(run, tmp_path):
    for name, steps in {"a": 100, "b": 50}.items():
        sizes = "n_layer = 1\nn_head = 2\nn_embd = 8\n"
        (tmp_path / f"{name}.toml").write_text(f"{sizes}max_steps = {steps}\n")
    argv = ["--seeds", 2, "--resolve", 0.001, "--max_seeds", 9]
    _, trainer = run(*argv, common=False)
    assert len(trainer.trained) == 4


def test_a_run_says_what_the_study_expects_of_it(tmp_path):
    make_data(tmp_path / "data")
    made = trainer(tmp_path / "data", tmp_path / "run")
    flags = dataclasses.asdict(made.model_config) | dataclasses.asdict(made.config)
    seen = study.seen_here(flags)
    assert seen == {"data_sha256": made.data_sha256, "dtype": str(made.dtype)[6:]}


@pytest.mark.parametrize("batch, steps", [(64, None), (2**20, "fewer than one batch of 1,048,576")])
def test_a_plan_counts_an_epoch_as_a_run_does(run, tmp_path, batch, steps):
    """Where the data is less than a batch, a run ends at once: so does its plan."""
    make_data(data := tmp_path / "data")
    flags = ["--max_steps", 0, "--block_size", 16, "--total_batch_tokens", batch, "--plan"]
    done, _ = run(*flags, "--data_dir", data, "--sd", 0.01, fails=bool(steps))
    if steps:
        assert steps in done.stderr and done.stderr.count("\n") == 1
        return
    made = trainer(data, tmp_path / "run", max_steps=0, block_size=16, total_batch_tokens=batch)
    assert f"tokens    {2 * made.max_steps * batch / 1e3:.3g}k\n" in done.stdout


@pytest.mark.parametrize("width, limit", [(0.1, 12), (0.001, 5)])
def test_seeds_are_added_in_pairs_until_the_interval_is_narrow(run, tmp_path, width, limit):
    _, trainer = run("--seeds", 2, "--resolve", width, "--max_seeds", limit)
    a, b = read(tmp_path)["configs"].values()
    low, high = b["diff"]["ci95"]
    assert a["seeds"] == b["seeds"] and 2 < len(a["seeds"]) <= limit
    assert (high - low < width) == (limit == 12) == (b["diff"]["more_seeds"] == 0)
    assert len(trainer.trained) == 2 * len(a["seeds"])
    # not one pair more than needed
    (tmp_path / "out" / "results.json").unlink()
    _, again = run("--seeds", len(a["seeds"]) - 1, "--report_only")
    low, high = read(tmp_path)["configs"]["b"]["diff"]["ci95"]
    assert high - low >= width and not again.trained


def test_between_vocabularies_intervals_are_of_bits_per_byte(run, tmp_path, monkeypatch):
    """As the table's are: they are narrow at once where a byte's spread is a hundredth of a nat."""
    monkeypatch.setattr(study, "text_of", lambda flags: "the same")
    (tmp_path / "b.toml").write_text("n_layer = 1\nn_head = 2\nn_embd = 8\nvocab_used = 50256\n")
    argv = ["--seeds", 2, "--resolve", 0.1, "--max_seeds", 4]
    _, trainer = run(*argv, trainer=Trainer(val_text_sha256="the same"))
    assert read(tmp_path)["metric"] == "val_bpb"
    assert read(tmp_path)["configs"]["b"]["diff"]["more_seeds"] == 0
    assert len(trainer.trained) == 4


def test_experts_are_matched_in_parameters_though_their_widths_are_rounded():
    sizes = dict(n_layer=2, n_head=2, n_embd=64, vocab_size=64, vocab_used=64, block_size=16)
    argv = [f"--{name}={value}" for name, value in sizes.items()]
    wanted = GPT(GPTConfig(**sizes, mlp_hidden=16384)).num_params()
    hidden = study.match_parameters("moe.toml", [*argv, "--mlp=moe"], wanted)
    found = GPT(GPTConfig(**sizes, mlp="moe", mlp_hidden=hidden)).num_params()
    assert found == pytest.approx(wanted, rel=0.01)


def test_a_plan_trains_nothing_and_counts_what_will_be(run, tmp_path):
    done, trainer = run("--plan", "--seeds", 3, "--sd", 0.01, "--tune", "lr", "--tune_frac", 0.25)
    assert not trainer.trained and not (tmp_path / "out").exists()
    assert "runs      18 or more" in done.stdout  # two configs, 3 seeds twice, 3 trials each
    tokens = 2 * (3 * 2 + 3 * 0.25) * 100 * 524288
    assert f"tokens    {tokens / 1e6:.0f}M\n" in done.stdout
    assert "computed" in done.stdout and "0.01" in done.stdout.split("spread of")[1]
    # one row of 2 degrees of freedom: the noncentral t
    effect = float(done.stdout.split("resolves  ")[1].split()[0])
    found = nct(2, effect / (0.01 * math.sqrt(2 / 3))).sf(t.isf(0.025, 2))
    assert found == pytest.approx(0.8, abs=0.005)


def test_typical_noise_goes_through_what_was_measured():
    assert study.typical_sd(1e6) == pytest.approx(0.01)
    assert study.typical_sd(124e6) == pytest.approx(0.0013)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--tune", "lrr"], "did you mean lr?"),
        (["--tune", "pos"], "tune is pos, no flag with a number to vary"),
        (["--tune", "muon_lr"], "nothing to vary"),
        (["--tune", "lr", "--tune_frac", 0], "above 0, up to 1"),
        (["--require", "c"], "it must be one of b"),
        (["--resolve", -1], "0 or more"),
        (["--dry_run", "true"], "--plan tells what there is to do"),
    ],
)
def test_bad_input_ends_before_anything_runs(run, argv, words):
    done, trainer = run(*argv, fails=True)
    assert words in done.stderr and done.stderr.count("\n") == 1 and not trainer.trained
