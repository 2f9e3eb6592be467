"""nanoswitch/ladder.py on made-up losses whose curve and gain are known: given to it, or in logs
that are written instead of training."""

import json
import math
import os
import random
import re
import shutil

import numpy as np
import pytest
import test_study
from scipy.optimize import curve_fit
from test_compare import ROOT, command

from model import GPTConfig
from nanoswitch import cli, curves, ladder, study
from nanoswitch.counts import flops_per_token, num_params, on_meta

FIELDS = GPTConfig.__dataclass_fields__
E, A, ALPHA = 1.7, 400.0, 0.15
COMPUTE = np.array([1e12, 4e12, 1.6e13, 6.4e13])


def loss_at(compute):
    return E + A * compute**-ALPHA


def made(gain, sd=0.0, seeds=3, rng=None, compute=COMPUTE):
    """Losses of a config that gets gain(C) times as much out of its compute."""
    rng = rng or np.random.default_rng(0)
    return {
        float(c): {s: loss_at(c * gain(c)) + sd * rng.normal() for s in range(seeds)}
        for c in compute
    }


def test_a_fit_finds_the_curve_that_made_the_losses():
    losses = np.stack((loss_at(COMPUTE), 2 * loss_at(COMPUTE)))
    found = ladder.fit(COMPUTE, losses)
    assert found[0] == pytest.approx([E, A, ALPHA], rel=1e-3)
    assert found[1] == pytest.approx([2 * E, 2 * A, ALPHA], rel=1e-3)


def test_a_fit_is_scipys_least_squares():
    loss = loss_at(COMPUTE) + np.array([0.01, -0.02, 0.015, -0.004])
    x = COMPUTE / 1e12
    reference, _ = curve_fit(lambda c, e, a, b: e + a * c**-b, x, loss, p0=(2, 5, 0.2), maxfev=9999)
    e, a, alpha = ladder.fit(COMPUTE, loss[None])[0]
    assert (e, a * 1e12**-alpha, alpha) == pytest.approx(reference, rel=1e-3)


def test_neither_part_of_a_curve_is_negative():
    rising, steep = np.array([3.0, 3.1, 3.2, 3.3]), 9.0 - np.arange(4) * 2.9
    for e, a, _ in ladder.fit(COMPUTE, np.stack((rising, steep))):
        assert e >= 0 and a >= 0


@pytest.mark.parametrize("gain", [0.5, 1.0, 1.4, 3.0])
def test_a_known_gain_is_found_at_every_size(gain):
    losses = {"first": made(lambda c: 1), "row": made(lambda c: gain)}
    row = ladder.ladder(losses, draws=20)["row"]
    for way in ("equal_flops", "equal_tokens"):
        found = row[way]["gain"]
        assert [one["mean"] for one in found] == pytest.approx([gain] * 4, rel=1e-3)
        assert [one["compute"] for one in found] == list(COMPUTE)


def test_a_gain_holds_for_computes_that_are_not_the_firsts():
    losses = {"first": made(lambda c: 1), "row": made(lambda c: 2, compute=COMPUTE * 1.3)}
    row = ladder.ladder(losses, draws=20)["row"]
    assert [one["mean"] for one in row["equal_flops"]["gain"]] == pytest.approx([2] * 4, rel=1e-3)
    tokens = row["equal_tokens"]["gain"]  # 1.3 times the FLOPs a token are not counted
    assert [one["mean"] for one in tokens] == pytest.approx([2.6] * 4, rel=1e-3)


@pytest.mark.parametrize("power, word", [(0.2, "grows"), (-0.2, "shrinks"), (0.0, "undecided")])
def test_the_trend_of_a_gain(power, word):
    rng = np.random.default_rng(1)
    losses = {
        "first": made(lambda c: 1, 0.002, 5, rng),
        "row": made(lambda c: 1.5 * (c / 1e13) ** power, 0.002, 5, rng),
    }
    assert ladder.ladder(losses)["row"]["equal_flops"]["trend"] == word


def test_three_seeds_show_no_more_than_they_know():
    """The true gain is inside about as often as the interval says, and one that holds is not seen
    to grow or shrink much more often than in one case of twenty."""
    rng, inside, moves, tables = np.random.default_rng(0), 0, 0, 50
    for _ in range(tables):
        first, row = (made(lambda c, g=g: g, 0.01, 3, rng, COMPUTE[:3]) for g in (1, 1.3))
        found = ladder.ladder({"first": first, "row": row}, draws=100)["row"]["equal_flops"]
        low, high = found["gain"][1]["ci95"]
        inside += (low or 0) <= 1.3 <= (high or np.inf)
        moves += found["trend"] != "undecided"
    assert inside / tables > 0.88 and moves / tables < 0.13


def test_a_seed_that_lowers_all_alike_is_no_noise():
    rng = np.random.default_rng(0)
    luck = rng.normal(size=4) * 0.1
    losses = {
        name: {c: {s: loss_at(c * g) + luck[s] for s in range(4)} for c in COMPUTE}
        for name, g in (("first", 1), ("same", 1))
    }
    for one in ladder.ladder(losses, draws=100)["same"]["equal_flops"]["gain"]:
        assert one["ci95"] == pytest.approx([1, 1], rel=1e-3)


def test_gains_do_not_depend_on_the_curves_form():
    """The first config's losses follow no power law, and the row has them after half the compute:
    that its loss is that of a larger size of the first's says so without any curve."""
    bent = dict(zip(COMPUTE, (5.0, 4.6, 4.5, 3.9), strict=True))
    first = {c: {0: loss, 1: loss} for c, loss in bent.items()}
    ahead = {c / 2: of for c, of in first.items()}
    found = ladder.ladder({"first": first, "same": first, "ahead": ahead}, draws=20)
    for name, gain in (("same", 1), ("ahead", 2)):
        means = [one["mean"] for one in found[name]["equal_flops"]["gain"]]
        assert means == pytest.approx([gain] * 4, rel=1e-6), name


def test_what_no_compute_reaches_is_none_and_json():
    losses = {"first": made(lambda c: 1), "row": {c: {0: 1.0, 1: 1.0, 2: 1.0} for c in COMPUTE}}
    found = ladder.ladder(losses, draws=20)
    assert [one["mean"] for one in found["row"]["equal_flops"]["gain"]] == [None] * 4
    json.dumps(found, allow_nan=False)


def test_two_sizes_are_no_ladder():
    losses = {"first": made(lambda c: 1, compute=COMPUTE[:2])}
    with pytest.raises(ValueError, match="three sizes of first"):
        ladder.ladder(losses)
    losses = {"first": made(lambda c: 1), "row": made(lambda c: 2, compute=COMPUTE[:1])}
    with pytest.raises(ValueError, match="two sizes or more"):
        ladder.ladder(losses)


def test_a_row_may_stop_at_two_sizes():
    losses = {"first": made(lambda c: 1), "row": made(lambda c: 2, compute=COMPUTE[:2] * 1.3)}
    row = ladder.ladder(losses, draws=20)["row"]
    assert row["fit"] is None
    for way, gain in (("equal_flops", 2), ("equal_tokens", 2.6)):
        means = [one["mean"] for one in row[way]["gain"]]
        assert means == pytest.approx([gain] * 2, rel=1e-3)


# ----------------------------------------------------------------------------- runs

WIDTHS = (16, 32, 64)
GAIN = {"a": 1.0, "b": 1.5}  # what b gets out of its compute
BEST = {"a": 0.01, "b": 0.02}  # each config's best rate at the smallest width


class Trainer(test_study.Trainer):
    """With the losses of two configs at every size."""

    def __init__(self, most=10**9, power=-0.5):
        super().__init__(most=most)
        self.power = power

    def result(self, job):
        config, model = job.config, study.model_of(job.config)
        steps = config["max_steps"]
        compute = flops_per_token(on_meta(model)) * steps * config["total_batch_tokens"]
        best = BEST[job.name] * (config["n_embd"] / WIDTHS[0]) ** self.power
        luck = random.Random(f"{job.folder.name} {config['n_embd']} {job.name}").gauss(0, 0.002)
        loss = loss_at(compute * GAIN[job.name]) + math.log(config["lr"] / best) ** 2 + luck
        return num_params(model), {steps: loss}


@pytest.fixture
def climb(tmp_path, monkeypatch):
    """A function that runs compare.py --ladder on two configs -> its output and the Trainer."""
    for name in BEST:
        (tmp_path / f"{name}.toml").write_text("weight_decay = 0.2\n")
    monkeypatch.setattr("compare.draw", lambda *args: None)  # pictures take a second each
    monkeypatch.setattr("compare.draw_ladder", lambda *args: None)

    def call(*argv, trainer=None, fails=False, folder="out", names="ab", **changes):
        rule = {
            "widths": list(WIDTHS), "width_per_head": 8, "width_per_layer": 16, "block_size": 32,
            "vocab_size": 512, "vocab_used": 512, "total_batch_tokens": 64, "lr": 0.01,
            "tokens_per_parameter": 2, "weight_decay": 0.1, "device": '"cpu"',
        } | changes  # fmt: skip
        path = tmp_path / "rule.toml"
        path.write_text("".join(f"{k} = {v}\n" for k, v in rule.items() if v is not None))
        trainer = trainer or Trainer()
        monkeypatch.setattr(study, "sweep", trainer)
        always = ["--ladder", path, "--seeds", 3, "--out", tmp_path / folder]
        configs = [tmp_path / f"{name}.toml" for name in names]
        return command(*configs, *always, *argv, fails=fails), trainer

    return call


def test_heads_of_every_size_can_be_the_same(climb, tmp_path):
    climb("--tune", "lr", heads=4)
    logs = list(tmp_path.glob("out/n_embd_*/*/*/*/log.jsonl"))
    configs = [json.loads(path.read_text().splitlines()[0])["config"] for path in logs]
    assert {(c["n_embd"], c["n_head"]) for c in configs} == {(w, 4) for w in WIDTHS}


def test_the_others_may_stop_below_the_first(climb, tmp_path):
    done, trainer = climb(others=2)
    found = read(tmp_path / "out")
    largest = [name for name in trainer.trained if f"n_embd_{WIDTHS[2]}" in name]
    assert len(largest) == 3 and all(f"{os.sep}a{os.sep}" in name for name in largest)
    gains = found["ladder"]["curves"]["b"]["equal_flops"]["gain"]
    assert [one["mean"] for one in gains] == pytest.approx([1.5] * 2, rel=0.2)
    assert found["configs"]["b"]["compute_gain"]["mean"] == gains[1]["mean"]
    assert not found["ladder"]["lagging"] and "b is worth" in done.stdout
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| a | 64 |" in text and "| b | 64 |" not in text
    assert "| b | undecided | undecided | - |" in text
    assert "<h2>At n_embd 32</h2>" in (tmp_path / "out" / "report.html").read_text()


def read(folder):
    return json.loads((folder / "results.json").read_text())


def test_every_config_is_trained_at_every_size_by_the_rule(climb, tmp_path):
    done, trainer = climb()
    found = read(tmp_path / "out")
    assert len(trainer.trained) == len(set(trainer.trained))
    logs = [p for p in tmp_path.glob("out/n_embd_*/*/*/*/log.jsonl") if p.parts[-4] != "tune"]
    assert len(logs) == 2 * 3 * len(WIDTHS)
    for path in logs:
        config = json.loads(path.read_text().splitlines()[0])["config"]
        w, name = config["n_embd"], path.parts[-3]
        assert (config["n_layer"], config["n_head"]) == (w // 16, w // 8)
        # GPT-2's count, written out: tables, 12 w^2 + 13 w a block, the last norm
        size = (512 + 32) * w + w // 16 * (12 * w * w + 13 * w) + 2 * w
        steps = round(2 * size / 64)
        assert config["max_steps"] == steps and config["warmup_steps"] == round(0.02 * steps)
        assert config["weight_decay"] == 0.2  # a config's own flag wins
        assert config["lr"] == pytest.approx(BEST[name] * (w / 16) ** -0.5, rel=0.01)
    for size, width in zip(found["ladder"]["sizes"], WIDTHS, strict=True):
        assert size["n_embd"] == width and set(size["results"]["configs"]) == {"a", "b"}
    row = found["configs"]["b"]
    low, high = row["compute_gain"]["ci95"]
    assert row["compute_gain"]["mean"] == pytest.approx(1.5, rel=0.2) and low < 1.5 < high
    assert found["configs"]["a"]["compute_gain"] is None
    assert found["ladder"]["curves"]["b"]["equal_flops"]["trend"] == "undecided"
    assert [one["factor"] for one in checks(found)] == [1, 1]
    text = (tmp_path / "out" / "results.md").read_text()
    assert "## The ladder" in text and "| b | 64 |" in text and "| b | undecided |" in text
    diff = found["ladder"]["sizes"][-1]["results"]["configs"]["b"]["diff"]
    assert diff["p_adjusted"] < 0.001 and diff["verdict"] == "better"
    shown = f"| {diff['mean']:+.4f} | <0.001 | better |"
    assert shown in next(line for line in text.splitlines() if line.startswith("| b | 64 |"))
    assert "Does it last?" in (tmp_path / "out" / "report.html").read_text()
    assert "b is worth" in done.stdout


def test_a_search_on_all_steps_takes_the_runs_of_the_comparison(climb, tmp_path):
    _, trainer = climb("--tune_frac", 1, names="a")  # whose best rate is the common one
    tried = {path.name for path in tmp_path.glob("out/n_embd_*/tune/a/*")}
    assert tried == {"lr_0.00707", "lr_0.0141", "lr_0.005", "lr_0.01"}  # beside 0.01, and 0.00707
    assert len(trainer.trained) == len(set(trainer.trained)) == 3 * 3 + 2 + 2
    row = read(tmp_path / "out")["ladder"]["search"]["configs"]["a"]
    assert row["best"] == 0.01 and set(row["losses"]) == {"0.00707", "0.01", "0.0141"}


def checks(found):
    return [
        one | {"factor": pytest.approx(one["best"] / one["rule"], rel=0.02)}
        for one in found["ladder"]["check"].values()
    ]


def test_a_rule_of_the_rates_that_fails_is_seen_at_the_second_size(climb, tmp_path):
    climb(trainer=Trainer(power=0.5))  # the best rate grows with the width instead
    for one in read(tmp_path / "out")["ladder"]["check"].values():
        assert one["best"] / one["rule"] == pytest.approx(2, rel=0.02)
        assert one["lost"] == pytest.approx(math.log(2) ** 2, abs=0.01)
    assert "off by 2" in (tmp_path / "out" / "results.md").read_text()


def test_a_killed_ladder_goes_on_without_a_run_lost_or_repeated(climb, tmp_path):
    _, whole = climb(folder="whole")
    trained = []
    for most in (4, 13, 99):  # in a search, and at the second size
        _, part = climb(trainer=Trainer(most), fails=most < 99)
        trained += part.trained
    inside = [name.split("/out/")[1] for name in trained]
    assert sorted(inside) == sorted(name.split("/whole/")[1] for name in whole.trained)
    assert read(tmp_path / "out") == read(tmp_path / "whole")


@pytest.mark.parametrize("missing", [16, 32])
def test_a_size_that_the_first_config_lacks_is_left_out(climb, tmp_path, missing):
    """The gains stay those beside the first config, and are of the other sizes."""
    widths = [16, 32, 48, 64]
    climb(widths=widths)
    first = "tuned" if missing == 16 else "runs"
    for kind in {first, "runs"}:
        shutil.rmtree(tmp_path / f"out/n_embd_{missing}/{kind}/a", ignore_errors=True)
    done, _ = climb("--report_only", "true", widths=widths)
    found = read(tmp_path / "out")["ladder"]
    assert [size["n_embd"] for size in found["sizes"]] == [w for w in widths if w != missing]
    assert found["lagging"] == [] and "a" in found["curves"]
    gains = [one["mean"] for one in found["curves"]["b"]["equal_flops"]["gain"]]
    assert gains == pytest.approx([1.5] * 3, rel=0.2) and "b is worth" in done.stdout
    text = (tmp_path / "out" / "results.md").read_text()
    assert f"a has no finished run at n_embd {missing}." in text


def test_gains_beyond_all_bounds_have_no_trend_and_can_be_drawn(tmp_path):
    losses = {
        name: dict(zip(COMPUTE, [{1: x, 2: x + 0.01} for x in of], strict=True))
        for name, of in {"a": [4.6, 4.4, 4.25, 4.15], "b": [1.0, 1.0, 1.0, 1.0]}.items()
    }
    way = ladder.ladder(losses)["b"]["equal_flops"]
    assert way["trend"] == "undecided" and {one["mean"] for one in way["gain"]} == {None}
    gain = [{"compute": c, "mean": 1e-5, "ci95": [None, 1e-4]} for c in COMPUTE[:2]]
    rows = [{name: {"flops_per_token": c, "tokens": 1, "val_loss": {"mean": 4.0, "sd": 0.1}}
             for name in "ab"} for c in COMPUTE[:2]]  # fmt: skip
    sizes = [{"results": {"configs": row, "metric": "val_loss", "first": "a"}} for row in rows]
    curves_of = {"a": {"fit": None}, "b": {"fit": None, "equal_flops": {"gain": gain}}}
    curves.draw_ladder({"sizes": sizes, "curves": curves_of}, tmp_path / "ladder")
    assert (tmp_path / "ladder.png").stat().st_size


def test_a_ladder_without_its_largest_size_reports_the_others(climb, tmp_path):
    climb()
    shutil.rmtree(tmp_path / "out" / f"n_embd_{WIDTHS[2]}")
    done, _ = climb("--report_only", "true")
    found = read(tmp_path / "out")
    assert [size["n_embd"] for size in found["ladder"]["sizes"]] == list(WIDTHS[:2])
    assert "a ladder needs three sizes" in done.stdout
    text = (tmp_path / "out" / "results.md").read_text()
    assert f"a has no finished run at n_embd {WIDTHS[2]}." in text


@pytest.mark.slow  # test_study.py's merge is in CI
def test_two_machines_share_a_ladder_by_its_configs(climb, tmp_path):
    climb(folder="whole")
    climb(folder="out", names="a")
    climb(folder="other", names="b")
    done, trainer = climb("--merge", tmp_path / "other")
    assert not trainer.trained and read(tmp_path / "out") == read(tmp_path / "whole")
    assert "runs taken" in done.stdout


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/ladder*.toml")), ids=lambda p: p.stem)
def test_the_ladders_that_come_with_it(path):
    rule, sizes = ladder.read_rule(path), []
    for width in rule.widths:
        flags = {k: v for k, v in (rule.flags | rule.sizes(width)).items() if k in FIELDS}
        flags = [f"--{name}={value}" for name, value in flags.items()]
        sizes.append(num_params(cli.parse(GPTConfig, argv=flags)))
    said = [float(number) for number in re.findall(r"([\d.]+)M\b", path.read_text())]
    assert [size / 1e6 for size in sizes] == pytest.approx(said, rel=0.01)


def test_a_ladder_file_may_build_on_another(tmp_path):
    (tmp_path / "small.toml").write_text("widths = [16, 32, 64]\nheads = 4\nlr = 0.01\n")
    (tmp_path / "more.toml").write_text('base = "small.toml"\nwidths = [16, 32, 48]\nlr = 0.02\n')
    rule = ladder.read_rule(tmp_path / "more.toml")
    assert (rule.widths, rule.heads, rule.flags) == ([16, 32, 48], 4, {"lr": "0.02"})


def test_a_plan_of_a_ladder_trains_nothing(climb, tmp_path):
    done, trainer = climb("--plan", "--sd", 0.01)
    assert not trainer.trained and not (tmp_path / "out").exists()
    sizes = [544 * w + w // 16 * (12 * w * w + 13 * w) + 2 * w for w in WIDTHS]
    full = [round(2 * size / 64) * 64 for size in sizes]
    tokens = 2 * sum(n * (3 + tries * 0.25) for n, tries in zip(full, (3, 3, 0), strict=True))
    assert "runs      30 or more" in done.stdout
    assert float(done.stdout.split("tokens    ")[1].split("M")[0]) == pytest.approx(
        tokens / 1e6, rel=0.01
    )
    assert all(f"n_embd {w}: " in done.stdout for w in WIDTHS)


def test_a_plan_resolves_what_the_largest_size_of_all_configs_does(climb):
    done, _ = climb("--plan", "--sd", 0.01, others=2)
    size = next(line for line in done.stdout.splitlines() if f"n_embd {WIDTHS[1]}: " in line)
    effect = size.split("resolves ")[1]
    assert effect != "nothing" and f"resolves  {effect} in 8 cases of 10" in done.stdout


def test_a_plan_counts_what_is_finished_where_a_config_is_added(climb, tmp_path):
    """b has a rate of its own, which its runs at the larger sizes follow."""
    climb(names="b")
    done, _ = climb("--plan", names="ba")
    finished = len(list(tmp_path.glob("out/n_embd_*/runs/b/seed_*/log.jsonl")))
    assert finished and f", {finished} of them finished" in done.stdout


@pytest.mark.parametrize(
    "changes, argv, words",
    [
        ({"widths": "[16, 32]"}, [], "three or more, rising"),
        ({"widths": None}, [], "has no widths"),
        ({"widths": "[16, 20, 32]"}, [], "no multiple of width_per_head"),
        ({"heads": 3}, [], "no multiple of heads 3"),
        ({"widht": 3}, [], "did you mean widths?"),
        ({"n_layer": 3}, [], "leave it out"),
        ({"tune": '"beta1"'}, [], "lr or muon_lr"),
        ({"others": 1}, [], "give 0, or 2 to 3 sizes"),
        ({"others": 2.0}, [], "it must be a whole number"),
        ({"widths": "[0, 16, 32]"}, [], "three or more, rising"),
        ({"tokens_per_parameter": '"ten"'}, [], "is 'ten'; it must be a number"),
        ({"tune": 3}, [], "tune is 3; it must be a text"),
        ({"base": 3}, [], "base is 3; it must name another ladder file"),
        ({"base": '"rule.toml"'}, [], "it must name another ladder file"),
        ({"base": '"none.toml"'}, [], "cannot read config"),
        ({}, ["--n_embd", 8], "--n_embd follows from the ladder"),
        ({}, ["--resolve", 0.1], "leave --resolve"),
        ({}, ["--report_only"], "not finished"),
    ],
)
def test_a_bad_ladder_ends_before_anything_runs(climb, changes, argv, words):
    done, trainer = climb(*argv, fails=True, **changes)
    assert words in done.stderr and done.stderr.count("\n") == 1 and not trainer.trained
