"""The promise: another switch is one class and one line. The additions below are written into a
copy of model.py, and everything else must follow: flags and help, counts, weight decay, training,
checkpoint and resume, comparison at equal parameters, sampling. The formulas stand here."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import model
import train_gpt2
from model import GPT, POSITIONS, GPTConfig
from nanoswitch import optimizers

ROOT = Path(__file__).parent.parent
SIZES = dict(
    n_layer=2, n_head=4, n_embd=32, block_size=16, total_batch_tokens=128, max_steps=4,
    val_tokens=64, warmup_steps=1, device="cpu", sample_every=0, weight_decay=0.5,
    lr=0.01, dtype="float32", curve="false",
)  # fmt: skip


@dataclass
class Addition:
    flag: str
    table: str
    code: str
    parameters: int  # beyond the baseline's, or in place of them
    own: tuple  # names of its parameters, of the first layer where layers have their own


GEGLU = Addition(
    "mlp",
    "MLPS",
    '''
class GEGLU(SwiGLU):
    """c_proj(gelu(gate) * up) (Shazeer 2020, eq. 6)."""

    def activation(self, x):
        gate, up = x.chunk(2, dim=-1)
        return F.gelu(gate) * up
''',
    # 88 wide instead of 128: three matrices, two biases, and two layers
    parameters=2 * ((3 * 32 * 88 + 2 * 88) - (2 * 32 * 128 + 128)),
    own=("transformer.h.0.mlp.c_fc.weight",),
)
T5 = Addition(
    "pos",
    "POSITIONS",
    '''
class T5(NoPosition):
    """Raffel et al. 2020: a learned number for each head and each bucket of distances; here every
    distance below 32 has a bucket of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Parameter(0.1 * torch.ones(config.n_head, 32))

    def bias(self, q_pos, k_pos):
        return self.table[:, distances(q_pos, k_pos).long().clamp(max=31)]
''',
    parameters=4 * 32 - 16 * 32,  # the learned positions go
    own=("transformer.wpe.table",),
)
GATED = Addition(
    "attention",
    "ATTENTIONS",
    '''
class Gated(Attention):
    """Qiu et al. 2025: what the heads found, times a gate of the token itself."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.gate = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def output(self, y, x, carry):
        return y * self.gate(x).sigmoid()
''',
    parameters=2 * 32 * 32,
    own=("transformer.h.0.attn.gate.weight",),
)


TOY = '''
class Toy(NoPosition):
    """The score falls by the square root of the distance."""

    def bias(self, q_pos, k_pos):
        return -distances(q_pos, k_pos).sqrt()[None].expand(self.nh, -1, -1)

    def __init__(self, config):
        super().__init__(config)
        self.nh = config.n_head
'''
TRY = """
import torch
from model import GPT, GPTConfig
from nanoswitch import cli
from nanoswitch.cache import KVCache

def main():
    config = cli.parse(GPTConfig)
    model, idx = GPT(config).eval(), torch.arange(10)[None]
    cache, out = KVCache(model, 10), model.generate(idx, 5, temperature=0)
    assert torch.equal(out, model.generate(idx, 5, temperature=0, use_cache=False))
    model(idx, idx)[1].backward()
    print(config.pos)
"""
# runs one command after another, so that torch is imported once and not for each of them
SERVE = """
import importlib, io, json, sys, traceback
from contextlib import redirect_stderr, redirect_stdout
from nanoswitch import cli

for line in sys.stdin:
    script, *flags = json.loads(line)
    sys.argv, status = [script + ".py", *flags], 0
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            cli.run(importlib.import_module(script).main)
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
    print(json.dumps([status, out.getvalue(), err.getvalue()]), flush=True)
"""


def name_of(code):
    return re.search(r"class (\w+)", code)[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(script, *args, **flags) in a copy of the scripts with every addition."""
    folder = tmp_path_factory.mktemp("scripts")
    source = (ROOT / "model.py").read_text()
    for code, table in (*((a.code, a.table) for a in (GEGLU, T5, GATED)), (TOY, "POSITIONS")):
        begins = re.search(rf"\n{table} = Table\(\s*\"\w+\",\s*{{", source)[0]
        entry = f'{begins}"{name_of(code).lower()}": {name_of(code)}, '
        source = source.replace(begins, f"\n{code}\n{entry}")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "nanoswitch", folder / "nanoswitch")
    (folder / "model.py").write_text(source)
    (folder / "try_toy.py").write_text(TRY)
    (folder / "serve.py").write_text(SERVE)
    process = subprocess.Popen(
        [sys.executable, "serve.py"], cwd=folder, text=True,
        env={"OMP_NUM_THREADS": "1", **os.environ, "COLUMNS": "200"},  # models this small: one core
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip

    def run(script, *args, **flags):
        line = [script, *map(str, args), *(f"--{name}={value}" for name, value in flags.items())]
        print(json.dumps(line), file=process.stdin, flush=True)
        status, out, err = json.loads(process.stdout.readline())
        return SimpleNamespace(status=status, out=out, err=err)

    yield run
    process.stdin.close()
    process.wait()


@pytest.fixture(scope="module")
def passed(run):
    """The same for a command that must succeed -> what it printed."""

    def passed(*args, **flags):
        done = run(*args, **flags)
        assert done.status == 0, done.err
        return done.out

    return passed


@pytest.mark.parametrize("addition", [GEGLU, T5, GATED], ids=lambda addition: addition.flag)
def test_one_class_and_one_line_are_a_switch(addition, run, passed, data, tmp_path):
    name = name_of(addition.code).lower()
    flags = SIZES | {"data_dir": data, addition.flag: name}
    assert name in passed("train_gpt2", "--help")
    wrong = run("train_gpt2", **flags | {addition.flag: name + "x"})
    assert wrong.status == 2 and f"did you mean {name}?" in wrong.err

    # counts: the baseline's by hand, and what the addition has instead
    block = 4 * 32 * 32 + 4 * 32 + 2 * 32 * 128 + 128 + 32 + 4 * 32
    every = 50304 * 32 + 16 * 32 + 2 * block + 2 * 32 + addition.parameters
    shown = passed("train_gpt2", **flags, dry_run="true")
    assert f"parameters {every:,}" in shown
    flops = int(re.search(r"FLOPs per token ([\d,]+)", shown)[1].replace(",", ""))
    tables = 4 * 32 if addition is T5 else 16 * 32  # looked up, not multiplied
    assert flops == 6 * (every - tables) + 12 * 32 * 2 * 16

    # half of the steps, then the rest, is the whole
    passed("train_gpt2", **flags, run_dir=tmp_path / "whole")
    passed("train_gpt2", **flags, run_dir=tmp_path / "parts", checkpoint_every=2)
    last = tmp_path / "parts" / "step_000004"
    last.rename(tmp_path / "gone")
    (tmp_path / "parts" / "latest").write_text("step_000002\n")
    passed("train_gpt2", **flags, run_dir=tmp_path / "parts", checkpoint_every=2)
    whole, parts = (
        load_file(tmp_path / n / "step_000004/model.safetensors") for n in ("whole", "parts")
    )
    assert whole.keys() == parts.keys() >= set(addition.own)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)

    # it trains, with weight decay for matrices that are no table of positions
    first = torch.load(tmp_path / "whole/step_000004/train_state.pt", weights_only=True)
    for key in addition.own:
        assert first["optimizer"][key]["exp_avg"].abs().max() > 0
    text = passed("sample", tmp_path / "whole", prompt="", max_new_tokens=4)
    assert "-" * 80 in text


@pytest.fixture(scope="module")
def compared(passed, data, tmp_path_factory):
    """The folder of a comparison of the baseline, an MLP and an encoding, each a process."""
    folder = tmp_path_factory.mktemp("compared")
    (folder / "base.toml").write_text("")
    for addition in (GEGLU, T5):
        value = name_of(addition.code).lower()
        (folder / f"{addition.flag}.toml").write_text(f'{addition.flag} = "{value}"\n')
    configs = [folder / f"{name}.toml" for name in ("base", "mlp", "pos")]
    sizes = SIZES | {"n_embd": 64, "jobs": 2, "match": "params"}
    passed("compare", *configs, **sizes, data_dir=data, out=folder / "out")
    return folder / "out"


@pytest.mark.parametrize("name", ["mlp", "pos"])
def test_an_added_class_is_matched_and_compared(name, compared):
    found = json.loads((compared / "results.json").read_text())["configs"]
    for row in ("base", name):
        weights = load_file(compared / f"runs/{row}/seed_1337/step_000004/model.safetensors")
        assert found[row]["parameters"] == sum(w.numel() for w in weights.values())
    ratio = found[name]["parameters"] / found["base"]["parameters"]
    assert abs(ratio - 1) < 0.01


def test_another_encoding_is_one_class_and_one_line(run):
    """The diff: Toy and its line in POSITIONS. Flags, help, checks and the model follow."""
    sizes = ("--n_layer=1", "--n_head=2", "--n_embd=8", "--vocab_size=64")
    done = run("try_toy", *sizes, "--pos=toy")
    assert done.out.strip() == "toy", done.err
    assert "toy" in run("try_toy", *sizes, "--help").out
    wrong = run("try_toy", *sizes, "--pos=tox")
    assert wrong.status == 2 and "did you mean toy?" in wrong.err
    refused = run("try_toy", *sizes, "--pos=toy", "--attention_kernel=flash")
    assert refused.status == 2 and "pos 'toy'" in refused.err


def test_weight_decay_asks_the_module(tmp_path, monkeypatch):
    """A table of numbers for each distance is no matrix, whatever its shape."""
    space = dict(vars(model))
    exec(T5.code, space)
    monkeypatch.setitem(POSITIONS, "t5", space["T5"])
    sizes = dict(block_size=16, vocab_size=64, vocab_used=64, n_layer=1, n_head=4, n_embd=32)
    made = GPT(GPTConfig(**sizes, pos="t5"))
    decayed = optimizers.decays(made)
    assert not decayed["transformer.wpe.table"] and decayed["transformer.h.0.mlp.c_fc.weight"]
    assert torch.equal(made.transformer.wpe.table, torch.full((4, 32), 0.1))  # its own values
    plain = optimizers.decays(GPT(GPTConfig(**sizes)))
    assert plain["transformer.wpe.weight"]  # GPT-2's positions decay


def test_an_optimizer_whose_state_has_other_shapes_resumes(data, tmp_path, monkeypatch):
    """Adafactor (Shazeer and Stern 2018) keeps a row and a column for each matrix."""

    def adafactor(model, config, dtype):
        groups = optimizers.groups_by_decay(model, config)
        return [(torch.optim.Adafactor, groups, {}, 1.0)]

    monkeypatch.setitem(optimizers.OPTIMIZERS, "adafactor", adafactor)
    sizes = dict(n_layer=2, n_head=4, n_embd=32, block_size=16)

    def trainer(run):
        flags = {k: v for k, v in SIZES.items() if k not in sizes and k != "curve"}
        config = train_gpt2.TrainConfig(
            **flags, data_dir=str(data), run_dir=str(run), optimizer="adafactor", curve=False
        )
        return train_gpt2.Trainer(GPTConfig(**sizes), config)

    whole, parts = trainer(tmp_path), trainer(tmp_path)
    for step in range(4):
        whole.step(step)
    for step in range(2):
        parts.step(step)
    parts.save(2, tmp_path)
    again = trainer(tmp_path)
    assert again.resume(tmp_path) == 2
    state = torch.load(tmp_path / "step_000002/train_state.pt", weights_only=True)["optimizer"]
    kept = state["transformer.h.0.mlp.c_fc.weight"]
    assert kept["row_var"].shape == (128, 1) and kept["col_var"].shape == (1, 32)
    for step in (2, 3):
        again.step(step)
    theirs = dict(again.model.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in whole.model.named_parameters())
