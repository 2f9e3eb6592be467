"""The promise: another switch is one class and one line. Each addition below is written into a copy
of model.py, and everything else must follow: flags and help, counts, weight decay, training,
checkpoint and resume, comparison at equal parameters, sampling. The formulas stand here."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import make_data

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

    def output(self, y, x):
        return y * self.gate(x).sigmoid()
''',
    parameters=2 * 32 * 32,
    own=("transformer.h.0.attn.gate.weight",),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("promise") / "data"
    make_data(folder)
    return folder


@pytest.fixture(params=[GEGLU, T5, GATED], ids=lambda addition: addition.flag, scope="module")
def added(request, tmp_path_factory):
    """An addition, and a folder of the scripts with it."""
    addition, folder = request.param, tmp_path_factory.mktemp(request.param.flag)
    source = (ROOT / "model.py").read_text()
    name = re.search(r"class (\w+)", addition.code)[1]
    table = f"\n{addition.table} = {{"
    assert source.count(table) == 1
    source = source.replace(table, f'\n{addition.code}\n{table}"{name.lower()}": {name}, ')
    (folder / "model.py").write_text(source)
    for path in ROOT.glob("*.py"):
        if path.name != "model.py":
            shutil.copy(path, folder)
    shutil.copytree(ROOT / "nanoswitch", folder / "nanoswitch")
    return addition, name.lower(), folder


def run(folder, script, *args, **flags):
    line = [sys.executable, f"{folder}/{script}", *map(str, args)]
    line += [f"--{name}={value}" for name, value in flags.items()]
    env = os.environ | {"COLUMNS": "200"}
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, env=env)


def passed(*args, **flags):
    done = run(*args, **flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_class_and_one_line_are_a_switch(added, data, tmp_path):
    addition, name, folder = added
    flags = SIZES | {"data_dir": data, addition.flag: name}
    assert name in passed(folder, "train_gpt2.py", "--help")
    wrong = run(folder, "train_gpt2.py", **flags | {addition.flag: name + "x"})
    assert wrong.returncode == 2 and f"'{name}'" in wrong.stderr

    # counts: the baseline's by hand, and what the addition has instead
    block = 4 * 32 * 32 + 4 * 32 + 2 * 32 * 128 + 128 + 32 + 4 * 32
    every = 50304 * 32 + 16 * 32 + 2 * block + 2 * 32 + addition.parameters
    shown = passed(folder, "train_gpt2.py", **flags, dry_run="true")
    assert f"parameters {every:,}" in shown
    flops = int(re.search(r"FLOPs per token ([\d,]+)", shown)[1].replace(",", ""))
    tables = 4 * 32 if addition is T5 else 16 * 32  # looked up, not multiplied
    assert flops == 6 * (every - tables) + 12 * 32 * 2 * 16

    # half of the steps, then the rest, is the whole
    passed(folder, "train_gpt2.py", **flags, run_dir=tmp_path / "whole")
    passed(folder, "train_gpt2.py", **flags, run_dir=tmp_path / "parts", checkpoint_every=2)
    last = tmp_path / "parts" / "step_000004"
    last.rename(tmp_path / "gone")
    (tmp_path / "parts" / "latest").write_text("step_000002\n")
    passed(folder, "train_gpt2.py", **flags, run_dir=tmp_path / "parts", checkpoint_every=2)
    whole, parts = (
        load_file(tmp_path / n / "step_000004/model.safetensors") for n in ("whole", "parts")
    )
    assert whole.keys() == parts.keys() >= set(addition.own)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)

    # it trains, with weight decay for matrices that are no table of positions
    first = torch.load(tmp_path / "whole/step_000004/train_state.pt", weights_only=True)
    for key in addition.own:
        assert first["optimizer"][key]["exp_avg"].abs().max() > 0
    text = passed(folder, "sample.py", tmp_path / "whole", prompt="", max_new_tokens=4)
    assert "-" * 80 in text


@pytest.mark.parametrize("added", [GEGLU, T5], indirect=True, ids=["mlp", "pos"])
def test_an_added_class_is_matched_and_compared(added, data, tmp_path):
    addition, name, folder = added
    (tmp_path / "base.toml").write_text("")
    (tmp_path / "other.toml").write_text(f'{addition.flag} = "{name}"\n')
    configs = [tmp_path / "base.toml", tmp_path / "other.toml"]
    sizes = {k: v for k, v in SIZES.items() if k != "curve"} | {"n_embd": 64}
    passed(
        folder, "compare.py", *configs, **sizes, data_dir=data, match="params", out=tmp_path / "out"
    )
    found = json.loads((tmp_path / "out/results.json").read_text())["configs"]
    for row in (name_ for name_ in ("base", "other")):
        weights = load_file(tmp_path / f"out/runs/{row}/seed_1337/step_000004/model.safetensors")
        assert found[row]["parameters"] == sum(w.numel() for w in weights.values())
    ratio = found["other"]["parameters"] / found["base"]["parameters"]
    assert abs(ratio - 1) < 0.01


def test_weight_decay_asks_the_module(tmp_path, monkeypatch):
    """A table of numbers for each distance is no matrix, whatever its shape."""
    import model as model_file
    from nanoswitch.optimizers import decays

    space = dict(vars(model_file))
    exec(T5.code, space)
    monkeypatch.setitem(model_file.POSITIONS, "t5", space["T5"])
    sizes = dict(block_size=16, vocab_size=64, vocab_used=64, n_layer=1, n_head=4, n_embd=32)
    model = model_file.GPT(model_file.GPTConfig(**sizes, pos="t5"))
    decayed = decays(model)
    assert not decayed["transformer.wpe.table"] and decayed["transformer.h.0.mlp.c_fc.weight"]
    assert torch.equal(model.transformer.wpe.table, torch.full((4, 32), 0.1))  # its own values
    plain = decays(model_file.GPT(model_file.GPTConfig(**sizes)))
    assert plain["transformer.wpe.weight"]  # GPT-2's positions decay


def test_an_optimizer_whose_state_has_other_shapes_resumes(data, tmp_path, monkeypatch):
    """Adafactor (Shazeer and Stern 2018) keeps a row and a column for each matrix."""
    import train_gpt2 as t
    from nanoswitch import optimizers

    def adafactor(model, config, dtype):
        groups = optimizers.groups_by_decay(model, config)
        return [(torch.optim.Adafactor, groups, {}, 1.0)]

    monkeypatch.setitem(optimizers.OPTIMIZERS, "adafactor", adafactor)
    model = dict(n_layer=2, n_head=4, n_embd=32, block_size=16)

    def trainer(run):
        flags = {k: v for k, v in SIZES.items() if k not in model and k != "curve"}
        config = t.TrainConfig(
            **flags, data_dir=str(data), run_dir=str(run), optimizer="adafactor", curve=False
        )
        return t.Trainer(t.GPTConfig(**model), config)

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
