"""Every file in configs/ parses, builds, and says only what differs from the defaults."""

import re
import subprocess
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from model import GPT, GPTConfig
from nanoswitch import cli, ladder
from nanoswitch.registry import flags_of, variants
from train_gpt2 import TrainConfig

CONFIGS = Path(__file__).parent.parent / "configs"
VARIANTS = sorted(CONFIGS.glob("variants/*.toml"))
LADDERS = sorted(CONFIGS.glob("ladder*.toml"))
FILES = sorted(set(CONFIGS.glob("*.toml")) - set(LADDERS))
EXPERIMENTS = sorted(CONFIGS.glob("experiments/*.toml"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def parse(path):
    return cli.parse(GPTConfig, TrainConfig, argv=[str(path)], configs=True)


def parameters(name):
    path = next(path for path in FILES if path.stem == name)
    with torch.device("meta"):
        return GPT(parse(path)[0]).num_params()


@each_file
def test_parses_to_what_it_says_and_builds(path):
    model, train = parse(path)
    parsed = asdict(model) | asdict(train)
    for name, value in tomllib.loads(path.read_text()).items():
        assert parsed[name] == value
    with torch.device("meta"):
        GPT(model)
    assert train.total_batch_tokens % model.block_size == 0
    assert train.warmup_steps < (train.max_steps or 10**10 // train.total_batch_tokens)


@each_file
def test_says_only_what_differs_from_the_defaults(path):
    defaults = asdict(GPTConfig()) | asdict(TrainConfig())
    table = tomllib.loads(path.read_text())
    assert [name for name, value in table.items() if value == defaults[name]] == []


@each_file
def test_run_folder_is_named_after_the_file(path):
    assert parse(path)[1].run_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_is_the_tiny_model_with_few_switches_changed(path):
    base = CONFIGS / "tiny_1m.toml"
    argv = [str(base), str(path)]
    model, train = cli.parse(GPTConfig, TrainConfig, argv=argv, configs=True)
    plain, same = parse(base)
    table = tomllib.loads(path.read_text())
    for name, value in table.items():
        assert getattr(model, name) == value
    derived = {"mlp_hidden"} if "mlp" in table else {"n_kv_head"}  # by the other switches
    changed = {n for n, value in asdict(model).items() if value != getattr(plain, n)}
    assert changed <= table.keys() | derived and train == same
    with torch.device("meta"):
        size, reference = GPT(model).num_params(), GPT(plain).num_params()
    assert size == pytest.approx(reference, rel=0.1)


@pytest.mark.parametrize("path", VARIANTS, ids=lambda path: path.stem)
def test_a_variants_config_adds_it_to_llama_at_every_size_of_their_ladder(path):
    llama, table = (tomllib.loads(p.read_text()) for p in (CONFIGS / "variants/llama.toml", path))
    rule = ladder.read_rule(CONFIGS / "ladder_variants.toml")
    assert {name: rule.flags[name] for name in llama} == {k: cli.as_flag(llama[k]) for k in llama}
    if path.stem in variants():
        patterns = {f"{flag}_pattern" for flag in flags_of(path.stem)}
        assert set(flags_of(path.stem)) == table.keys() - patterns
        assert {table[flag] for flag in flags_of(path.stem)} == {path.stem}
    for width in rule.widths:
        flags = {k: v for k, v in rule.flags.items() if k not in table} | rule.sizes(width)
        model, _ = cli.parse(
            GPTConfig, TrainConfig, argv=[str(path), *ladder.words(flags)], configs=True
        )
        with torch.device("meta"):
            GPT(model)
        for name, value in (llama | table).items():
            assert getattr(model, name) == value


def test_every_committed_variant_has_a_config_and_all_stand_in_their_ladders_command():
    names = {path.stem for path in VARIANTS}
    command = ["git", "ls-files", "variants/*.py"]
    listed = subprocess.run(command, cwd=CONFIGS.parent, capture_output=True, text=True).stdout
    assert {Path(line).stem for line in listed.split()} - {"template"} <= names
    text = (CONFIGS / "ladder_variants.toml").read_text()
    listed = re.findall(r"configs/variants/\{([\w,]+)\}", text)
    # yarn is rope at the length of training; the other is a row of the table of positions
    trained = sorted(names - {"yarn", "scaled_sinusoidal"})
    assert sorted(",".join(listed).split(",")) == trained and listed[0].startswith("llama,")


SPEEDRUNS = {"speedrun_1m": "tiny_1m", "speedrun_16m": "tiny_16m", "speedrun_124m": "gpt2_124m"}


@pytest.mark.parametrize("name, baseline", SPEEDRUNS.items())
def test_a_speedrun_has_its_baselines_size_and_the_recipe_of_all(name, baseline):
    ours, plain = parse(CONFIGS / f"{name}.toml")[0], parse(CONFIGS / f"{baseline}.toml")[0]
    for key in ("n_layer", "n_embd", "block_size", "vocab_size", "vocab_used"):
        assert getattr(ours, key) == getattr(plain, key)
    if name == "speedrun_124m":  # at 1M the position table is 2.4%
        assert parameters(name) == pytest.approx(parameters(baseline), rel=0.01)
    tables = [tomllib.loads((CONFIGS / f"{n}.toml").read_text()) for n in (name, "speedrun_16m")]
    own = {"n_layer", "n_head", "n_embd", "block_size", "vocab_size", "vocab_used", "run_dir"}
    own |= {"total_batch_tokens", "max_steps", "warmup_steps", "val_tokens", "lr", "muon_lr"}
    own |= {"eval_every", "sample_every", "hellaswag_every"}
    own |= {"checkpoint_every", "keep_checkpoints"}
    recipes = [{k: v for k, v in table.items() if k not in own} for table in tables]
    assert recipes[0] == recipes[1] and recipes[0]["optimizer"] == "muon"
    for rate in ("lr", "muon_lr"):  # as SPEEDRUN.md says: they fall with the root of the width
        scaled = tables[1][rate] * (256 / ours.n_embd) ** 0.5
        assert tables[0][rate] == pytest.approx(scaled, rel=0.03)  # two digits


def test_canon_16m_is_the_recipe_and_what_pays_at_its_baselines_batch():
    names = "speedrun_16m", "speedrun/canon_16m", "speedrun/baseline_16m"
    recipe, ours, base = (tomllib.loads((CONFIGS / f"{n}.toml").read_text()) for n in names)
    ours = recipe | ours
    plain = tomllib.loads((CONFIGS / "tiny_16m.toml").read_text())
    changed = {k for k, v in recipe.items() if plain.get(k) != v} - {"run_dir", "warmup_steps"}
    assert {k: ours[k] for k in changed} == {k: recipe[k] for k in changed}
    assert ours["total_batch_tokens"] == base["total_batch_tokens"]
    assert 4 * ours["max_steps"] == base["max_steps"]
    train = {"max_steps", "warmup_steps", "eval_every", "total_batch_tokens", "lr"}
    assert base.keys() == train and ours["warmup_steps"] == base["warmup_steps"]


ABLATIONS = sorted([*CONFIGS.glob("speedrun/add_*.toml"), *CONFIGS.glob("speedrun/drop_*.toml")])


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda p: p.stem)
def test_an_ablation_adds_or_drops_one_ingredient(path):
    kind, ingredient = path.stem.split("_", 1)
    recipe, plain = (
        asdict(model) | asdict(train)
        for model, train in (parse(CONFIGS / f"{n}.toml") for n in ("speedrun_1m", "tiny_1m"))
    )
    in_recipe = path.with_stem(f"drop_{ingredient}").exists()
    for name, value in tomllib.loads(path.read_text()).items():
        if kind == "drop":
            assert value == plain[name] != recipe[name]
        else:
            assert plain[name] != value and (recipe[name] == value) == in_recipe


@pytest.mark.parametrize("batch, share", [("half", 0.5), ("double", 2), ("fourfold", 4)])
def test_another_batch_takes_the_same_tokens(batch, share):
    table = tomllib.loads((CONFIGS / f"speedrun/batch_{batch}.toml").read_text())
    for name in ("tiny_1m", "speedrun_1m"):
        train = parse(CONFIGS / f"{name}.toml")[1]
        assert table["total_batch_tokens"] == share * train.total_batch_tokens
        assert table["max_steps"] * share == train.max_steps
        assert table["eval_every"] in (train.eval_every / share, train.eval_every * 2 / share)


def test_all_that_the_recipe_changes_has_an_ablation():
    plain, recipe = (
        tomllib.loads((CONFIGS / f"{name}.toml").read_text()) for name in ("tiny_1m", "speedrun_1m")
    )
    changed = {name for name in recipe if recipe[name] != plain.get(name)}
    for kind in ("add", "drop"):
        tables = [tomllib.loads(p.read_text()) for p in CONFIGS.glob(f"speedrun/{kind}_*.toml")]
        covered = set().union(*tables)
        assert changed - covered <= {"run_dir", "warmup_steps", "muon_lr"}  # which Muon alone reads


def test_tiny_1m_has_the_size_it_is_named_for():
    V, T, C, L = 4096, 256, 128, 4
    assert parameters("tiny_1m") == V * C + T * C + L * (12 * C * C + 13 * C) + 2 * C == 1_350_400


def test_gpt2_124m_has_gpt2s_size():
    V, T, C, L = 50304, 1024, 768, 12
    formula = V * C + T * C + L * (12 * C * C + 13 * C) + 2 * C
    assert parameters("gpt2_124m") == formula == 124_475_904


def test_rope_swiglu_124m_has_the_same_size_but_for_the_position_table():
    table = 1024 * 768
    assert parameters("rope_swiglu_124m") == pytest.approx(
        parameters("gpt2_124m") - table, rel=0.01
    )


def test_tiny_16m_and_350m_have_the_sizes_they_are_named_for():
    assert parameters("tiny_16m") == pytest.approx(16e6, rel=0.05)
    assert parameters("gpt2_350m_2048") == pytest.approx(355e6, rel=0.02)
