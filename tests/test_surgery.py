"""Weights under changed switches: against the formulas, and against the model before."""

import json
import re
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_compare import command as compare_command

import train_gpt2 as t
from model import GPT, GPTConfig
from nanoswitch import cli, surgery, switches
from nanoswitch.load import load_model

T, V, C, NH = 24, 97, 32, 4
SIZES = dict(block_size=T, vocab_size=V, vocab_used=V, n_layer=4, n_head=NH, n_embd=C)
IDX = torch.randint(V - 1, (2, 12), generator=torch.Generator().manual_seed(1))


def gpt(**changes):
    """A model whose weights are all far from their initial values."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3)
    return model.eval()


def plan(config, how=None, **wanted):
    return surgery.plan(config, wanted, t.TrainConfig(init_from="x", **how or {}))


def operate(model, how=None, **wanted):
    return surgery.perform(model, plan(model.config, how, **wanted))


@torch.no_grad()
def logits(model, idx=IDX):
    return model(idx)[0]


def near(a, b):
    return torch.allclose(a, b, atol=2e-5)


def weights(model):
    return {n: w.clone() for n, w in model.state_dict().items() if n != "lm_head.weight"}


# ----------------------------------------------------------------------------- the table


def test_the_document_shows_the_table():
    text = (Path(__file__).parent.parent / "docs" / "finetune.md").read_text()
    shown = re.search(r"<!-- surgery -->\n(.*)<!-- /surgery -->", text, re.S)[1]
    assert shown.splitlines() == surgery.table()


def test_every_switch_has_a_row():
    named = {name for row in surgery.ROWS for name in row.switches.split()}
    assert named == {field.name for field in fields(GPTConfig)}


# ----------------------------------------------------------------------------- taken


@pytest.mark.parametrize(
    "made, wanted, equal",
    [
        ({}, dict(dropout=0.3), True),
        ({}, dict(attention_kernel="math"), True),
        ({}, dict(document_mask=True), True),  # no end of text in these
        ({}, dict(window=12), True),
        ({}, dict(window=12, window_pattern="SL"), True),
        ({}, dict(window=3), False),
        ({}, dict(zero_init=True, linformer_rank=3), True),
        ({}, dict(qk_norm=True), False),
        (dict(pos="rope"), dict(block_size=4 * T), True),
        (dict(pos="rope"), dict(block_size=T // 3), True),
        (dict(pos="rope"), dict(rope_theta=500.0), False),
        (dict(pos="rope"), dict(rope_scaling=2.0), False),
        (dict(pos="fire"), dict(block_size=2 * T), True),
        (dict(vocab_size=51000, vocab_used=51000, n_embd=8), dict(vocab_used=50257), True),
    ],
    ids=str,
)
def test_what_changes_no_weight_is_taken(made, wanted, equal):
    model = gpt(**made)
    new = operate(model, **wanted)
    assert all(torch.equal(w, weights(model)[n]) for n, w in weights(new).items())
    assert all(getattr(new.config, name) == value for name, value in wanted.items())
    assert torch.allclose(logits(new), logits(model), atol=1e-5) == equal


def test_a_softcap_is_its_formula_on_the_logits_before():
    model = gpt()
    assert near(logits(operate(model, logit_softcap=5.0)), 5 * (logits(model) / 5).tanh())


def test_an_exact_gelu_is_the_error_function():
    x = torch.linspace(-5, 5, 101)
    exact = x * (1 + torch.erf(x / 2**0.5)) / 2
    assert near(gpt(mlp="gelu_erf").transformer.h[0].mlp.activation(x), exact)
    gap = (gpt().transformer.h[0].mlp.activation(x) - exact).abs().max()
    assert 1e-4 < gap < 5e-4  # what the table says of them
    assert operate(gpt(), mlp="gelu_erf").config.mlp == "gelu_erf"


# ----------------------------------------------------------------------------- surgeries


def test_cropped_positions_leave_short_texts_as_they_were():
    model = gpt()
    new = operate(model, block_size=12)
    assert torch.equal(logits(new), logits(model))
    assert torch.equal(new.transformer.wpe.weight, model.transformer.wpe.weight[:12])
    with pytest.raises(ValueError, match="13 tokens"):
        new(IDX.repeat(1, 2)[:, :13])


def heads(model, layer):
    """Rows of c_attn -> key and value heads, (nkv, hs, C) and (nkv, hs) each."""
    c, attn = model.config, model.transformer.h[layer].attn.c_attn
    hs = c.n_embd // c.n_head
    found = []
    for w in (attn.weight, attn.bias):
        k, v = w.detach()[c.n_embd :].chunk(2)
        found += [x.reshape(c.n_kv_head, hs, *w.shape[1:]) for x in (k, v)]
    return found


@pytest.mark.parametrize("before, after", [(4, 2), (4, 1), (2, 1)])
@pytest.mark.parametrize("how", ["mean", "first", "random"])
def test_pooled_heads_are_the_mean_of_their_group(before, after, how):
    model = gpt(n_kv_head=before)
    torch.manual_seed(7)
    new = operate(model, dict(init_heads=how), n_kv_head=after)
    torch.manual_seed(7)
    drawn = GPT(new.config)
    group = before // after
    for layer in range(4):
        old, now = heads(model, layer), heads(new, layer)
        for was, has, fresh in zip(old, now, heads(drawn, layer), strict=True):
            for j in range(after):
                members = [was[j * group + i] for i in range(group)]
                want = {"mean": sum(members) / group, "first": members[0], "random": fresh[j]}[how]
                assert near(has[j], want)
        q = model.transformer.h[layer].attn.c_attn.weight[:C]
        assert torch.equal(new.transformer.h[layer].attn.c_attn.weight[:C], q)


def test_a_pooled_model_is_the_full_one_with_the_mean_in_all_heads_of_a_group():
    model = gpt()
    new = operate(model, n_kv_head=2)
    hs = C // NH
    with torch.no_grad():
        for block in model.transformer.h:
            for w in (block.attn.c_attn.weight, block.attn.c_attn.bias):
                for start in range(C, 3 * C, 2 * hs):  # two neighbouring heads of k, then of v
                    mean = (w[start : start + hs] + w[start + hs : start + 2 * hs]) / 2
                    w[start : start + hs] = w[start + hs : start + 2 * hs] = mean
    assert near(logits(new), logits(model))


@pytest.mark.parametrize("before, after", [(1, 4), (2, 4), (1, 2)])
def test_repeated_heads_are_the_same_function(before, after):
    model = gpt(n_kv_head=before)
    assert near(logits(operate(model, n_kv_head=after)), logits(model))


@pytest.mark.parametrize("how, kept", [("even", [0, 3]), ("first", [0, 1]), ("last", [2, 3])])
def test_fewer_layers_are_those_that_are_asked_for(how, kept):
    model = gpt()
    new = operate(model, dict(init_layers=how), n_layer=2)
    for mine, theirs in enumerate(kept):
        state = model.transformer.h[theirs].state_dict()
        found = new.transformer.h[mine].state_dict()
        assert all(torch.equal(w, state[n]) for n, w in found.items())
    model.transformer.h = torch.nn.ModuleList(model.transformer.h[i] for i in kept)
    model.config.n_layer, model.alike = 2, [0, 0]
    assert torch.equal(logits(new), logits(model))


def test_evenly_spaced_layers_include_the_first_and_the_last():
    for old, new, kept in ((12, 4, [0, 4, 7, 11]), (12, 6, [0, 2, 4, 7, 9, 11]), (5, 1, [0])):
        assert plan(GPTConfig(n_layer=old), n_layer=new).kept == kept


OTHERS = ("sinusoidal", "rope", "alibi", "kerple", "kerple_power", "fire", "none")


@pytest.mark.parametrize("pos", OTHERS)
def test_a_table_is_dropped_for_another_encoding(pos):
    model = gpt()
    torch.manual_seed(3)
    new = operate(model, pos=pos)
    torch.manual_seed(3)
    drawn = GPT(new.config).transformer.wpe.state_dict()
    state = new.transformer.wpe.state_dict()
    assert state.keys() == drawn.keys() and all(torch.equal(drawn[n], w) for n, w in state.items())
    rest = {n: w for n, w in weights(new).items() if "wpe" not in n}
    assert all(torch.equal(weights(model)[n], w) for n, w in rest.items())
    if pos == "none":
        with torch.no_grad():
            model.transformer.wpe.weight.zero_()
        assert torch.equal(logits(new), logits(model))


@pytest.mark.parametrize("pos", ["sinusoidal", "none"])
def test_added_positions_become_a_table(pos):
    model = gpt(pos=pos)
    for length in (T, 2 * T):
        new = operate(model, pos="learned", block_size=length)
        assert near(logits(new), logits(model))
        assert new.transformer.wpe.weight.shape == (length, C)


def test_an_encoding_keeps_its_weights_where_it_stays():
    model = gpt(pos="kerple", pos_pattern="kerple,fire")
    new = operate(model, pos="fire", pos_pattern="fire,rope")
    old = {n.rpartition("fire.")[2]: w for n, w in weights(model).items() if "wpe_other" in n}
    own = {n.partition("wpe.")[2]: w for n, w in weights(new).items() if "wpe." in n}
    assert own.keys() == old.keys() and all(torch.equal(own[n], old[n]) for n in old)
    swapped = operate(gpt(pos="kerple", pos_pattern="kerple,rope"), pos="rope")
    assert near(logits(swapped), logits(gpt(pos="kerple", pos_pattern="kerple,rope")))


def test_an_untied_head_begins_as_a_copy():
    model = gpt()
    new = operate(model, tie_embeddings=False)
    assert torch.equal(logits(new), logits(model))
    assert new.lm_head.weight.data_ptr() != new.transformer.wte.weight.data_ptr()


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_only_pad_come_and_go(tied):
    model = gpt(tie_embeddings=tied)
    new = operate(model, vocab_size=128)
    assert torch.equal(logits(new)[..., :V], logits(model)) and new.config.vocab_used == V
    for w in (new.transformer.wte.weight, new.lm_head.weight):
        assert near(w[V:], w[:V].mean(0).expand(128 - V, C))
    assert logits(new)[..., V:].amax() < logits(new)[..., :V].amax()
    back = operate(new, vocab_size=V)
    assert torch.equal(logits(back), logits(model))


def test_biases_and_norms_come_and_go():
    model = gpt()
    bare = operate(model, bias=False)
    assert weights(bare).keys() == {n for n in weights(model) if not n.endswith("bias")}
    again = operate(bare, bias=True)
    assert near(logits(again), logits(bare)) and weights(again).keys() == weights(model).keys()
    rms = operate(model, norm="rmsnorm")
    assert torch.equal(rms.transformer.ln_f.weight, model.transformer.ln_f.weight)
    assert operate(rms, norm="layernorm").transformer.ln_f.bias.eq(0).all()
    normed = operate(model, embd_norm=True)
    assert (
        normed.transformer.ln_emb.weight.eq(1).all() and normed.transformer.ln_emb.bias.eq(0).all()
    )
    assert torch.equal(logits(operate(normed, embd_norm=False)), logits(model))


def test_many_changes_at_once_are_one_model():
    wanted = dict(
        n_layer=2, n_kv_head=1, pos="rope", block_size=64, norm="rmsnorm", bias=False,
        tie_embeddings=False, vocab_size=128, window=8, window_pattern="SL", dropout=0.1,
    )  # fmt: skip
    new = operate(gpt(), **wanted)
    assert new.config == replace(gpt().config, **wanted)
    assert logits(new).isfinite().all() and len(plan(gpt().config, **wanted).lines) == 9


# ----------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "made, wanted, words",
    [
        ({}, dict(n_layer=6), ["n_layer 4, not 6", "added layers"]),
        ({}, dict(n_embd=64), ["n_embd 32, not 64", "width"]),
        ({}, dict(n_head=2), ["n_head 4, not 2"]),
        ({}, dict(mlp_hidden=64), ["mlp_hidden 128, not 64"]),
        ({}, dict(mlp="relu2"), ["mlp gelu, not relu2", "activation"]),
        ({}, dict(mlp="swiglu"), ["mlp gelu, not swiglu"]),
        ({}, dict(block_size=48), ["block_size 24, not 48", "--pos rope"]),
        ({}, dict(attention="linformer"), ["attention full, not linformer", "weights"]),
        ({}, dict(vocab_size=90), ["vocab_size", "90"]),
        ({}, dict(vocab_used=90), ["vocab_used 97, not 90"]),
        (dict(tie_embeddings=False), dict(tie_embeddings=True), ["tie_embeddings False, not True"]),
        (dict(pos="rope"), dict(pos="learned"), ["pos rope, not learned", "table"]),
        (dict(n_head=8, n_kv_head=4), dict(n_kv_head=8, n_head=16), ["n_head 8, not 16"]),
        (dict(attention="linformer"), dict(linformer_rank=4), ["linformer_rank 16, not 4"]),
        (
            dict(attention="linformer", attention_pattern="linformer,full,full,linformer"),
            dict(n_layer=2),
            ["attention", "weights"],
        ),
    ],
    ids=str,
)
def test_what_has_no_surgery_is_refused_with_its_reason(made, wanted, words):
    with pytest.raises(ValueError) as error:
        plan(GPTConfig(**SIZES | made), **wanted)
    text = str(error.value)
    assert "\n" not in text and text.startswith("--init_from x"), text
    assert all(word in text for word in words), text


def test_a_switch_without_a_row_is_refused(monkeypatch):
    monkeypatch.setattr(surgery, "ROWS", [])
    with pytest.raises(ValueError, match=r"dropout 0\.0, not 0\.5: no surgery"):
        plan(GPTConfig(**SIZES), dropout=0.5)


# ----------------------------------------------------------------------------- a run from a run

SHAPE = dict(n_layer=4, n_head=4, n_embd=16, block_size=16)
TRAIN = dict(
    device="cpu", dtype="float32", total_batch_tokens=64, max_steps=2, warmup_steps=0,
    val_tokens=32, eval_every=1, sample_every=0, curve="false",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(data):
    made = data.parent / "run"
    with pytest.MonkeyPatch.context() as patch:
        command(patch, data, run_dir=made, **SHAPE | dict(pos="rope", dropout=0.2))
    return made


def command(patch, data, **flags):
    line = [f"--{name}={value}" for name, value in (TRAIN | {"data_dir": data} | flags).items()]
    patch.setattr(sys, "argv", ["train_gpt2.py", *line])
    cli.run(t.main)


def entries(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_run_from_a_run_begins_anew_and_says_where_it_came_from(run, data, tmp_path, monkeypatch):
    flags = dict(init_from=run, n_kv_head=2, block_size=32, max_steps=1)
    command(monkeypatch, data, run_dir=tmp_path / "new", **flags)
    start, *_ = lines = entries(tmp_path / "new")
    assert start["event"] == "start" and start["step"] == 0 and start["init_from"] == str(run)
    assert [line.partition(":")[0] for line in start["surgery"]] == [
        "n_kv_head 4 -> 2", "block_size 16 -> 32",
    ]  # fmt: skip
    assert [line["step"] for line in lines if "train_loss" in line] == [1]
    config = json.loads((tmp_path / "new/step_000001/config.json").read_text())
    assert config["init_from"] == str(run) and config["surgery"] == start["surgery"]
    assert (config["model"]["n_kv_head"], config["model"]["block_size"]) == (2, 32)
    assert config["model"]["dropout"] == 0.2  # not given, so as it was
    want = surgery.perform(load_model(run), plan(load_model(run).config, n_kv_head=2))
    x = torch.from_numpy(np.load(data / "x_val_000000.npy")[:33].astype(np.int64))[None]
    with torch.no_grad():
        loss = want(x[:, :-1], x[:, 1:])[1].item()
    assert lines[1]["val_loss"] == pytest.approx(loss, abs=1e-5)
    # and it goes on as any run does
    command(monkeypatch, data, run_dir=tmp_path / "new", **flags | dict(max_steps=2))
    assert entries(tmp_path / "new")[-1]["step"] == 2


def test_a_run_goes_on_when_what_it_came_from_is_gone(run, data, tmp_path, monkeypatch, capsys):
    base, flags = tmp_path / "base", dict(n_kv_head=2, dropout=0)
    shutil.copytree(run, base)
    whole = dict(init_from=base, run_dir=tmp_path / "whole", **flags)
    command(monkeypatch, data, **whole, max_steps=3)
    stopped = dict(init_from=base, run_dir=tmp_path / "stopped", **flags)
    command(monkeypatch, data, **stopped, max_steps=3, checkpoint_every=1)
    shutil.rmtree(tmp_path / "stopped/step_000003")
    shutil.rmtree(base)
    command(monkeypatch, data, **stopped, max_steps=3)
    ends = [load_file(tmp_path / name / "step_000003/model.safetensors")
            for name in ("whole", "stopped")]  # fmt: skip
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], w) for name, w in ends[1].items())
    config = json.loads((tmp_path / "stopped/step_000003/config.json").read_text())
    assert config["init_from"] == str(base) and any(
        "n_kv_head 4 -> 2" in line for line in config["surgery"]
    )
    with pytest.raises(SystemExit):  # as another model it still does not go on
        command(monkeypatch, data, **stopped | dict(n_kv_head=1), max_steps=3)
    assert "holds a run with n_kv_head 2, this one has 1" in capsys.readouterr().err


def test_a_run_has_one_origin(run, data, tmp_path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / "other")
    flags = dict(run_dir=tmp_path / "new", dropout=0, n_kv_head=2)
    command(monkeypatch, data, **flags, init_from=run, max_steps=1)
    with pytest.raises(SystemExit):
        command(monkeypatch, data, **flags, init_from=tmp_path / "other")
    assert f"holds a run with init_from {run}, this one has" in capsys.readouterr().err
    command(monkeypatch, data, **SHAPE | flags, pos="rope")  # without it, the run goes on as it is
    config = json.loads((tmp_path / "new/step_000002/config.json").read_text())
    assert config["init_from"] == str(run) and config["surgery"]
    fresh = dict(run_dir=tmp_path / "fresh", pos="rope", dropout=0.2) | SHAPE
    command(monkeypatch, data, **fresh, max_steps=1)
    with pytest.raises(SystemExit):
        command(monkeypatch, data, run_dir=tmp_path / "fresh", init_from=run)
    assert "holds a run with init_from '', this one has" in capsys.readouterr().err


@pytest.mark.parametrize("variant", ["canon", "gated_deltanet"])
def test_a_variants_own_weights_are_looked_at_before_the_run(variant, data, tmp_path, monkeypatch):
    own = dict(attention=variant, attention_pattern=variant, pos="rope")
    command(monkeypatch, data, run_dir=tmp_path / "base", **SHAPE | own, max_steps=1)
    flags = dict(dry_run="true", init_from=tmp_path / "base", dtype="float32")
    command(monkeypatch, data, **flags)
    with pytest.raises(SystemExit):
        command(monkeypatch, data, **flags, n_kv_head=1)


def test_the_data_order_begins_anew(run, data, tmp_path, monkeypatch):
    """A rate of almost 0 leaves the weights alone: the steps' losses are those of the batches."""
    command(monkeypatch, data, run_dir=tmp_path / "a", init_from=run, dropout=0, lr=1e-30)
    model, seen = load_model(run), t.open_windows(str(data), "train", load_model(run).config)
    for entry in entries(tmp_path / "a"):
        if "train_loss" in entry:
            x, y = seen.read(seen.batch(entry["step"] - 1, 4, 1337))
            with torch.no_grad():
                assert entry["train_loss"] == pytest.approx(model(x, y)[1].item(), abs=1e-5)


@pytest.mark.parametrize(
    "flags, found",
    [
        (dict(dropout="0.0"), dict(dropout=0.0)),  # the default, but asked for
        (dict(), dict(dropout=0.2, pos="rope")),
        (dict(n_kv_head="0"), dict(n_kv_head=4)),
        (dict(n_kv_head="1", window_pattern="SL", window="4"), dict(n_kv_head=1, window=4)),
    ],
    ids=str,
)
def test_a_default_that_is_given_is_a_wish(flags, found, run, data, monkeypatch):
    made = []
    monkeypatch.setattr(t, "dry_run", made.append)
    command(monkeypatch, data, dry_run="true", init_from=run, **flags)
    config = made[0].model_config
    assert {name: getattr(config, name) for name in found} == found


def test_a_given_default_may_be_refused(run, data, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, data, dry_run="true", init_from=run, pos="learned")
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "brings pos rope, not learned" in err


def test_flags_are_checked_against_the_checkpoint_not_the_defaults(data, tmp_path, monkeypatch):
    """8 key heads fit 16 heads, though not the default of 12."""
    big = SHAPE | dict(n_head=16, n_embd=32)
    command(monkeypatch, data, run_dir=tmp_path / "big", **big)
    made = []
    monkeypatch.setattr(t, "dry_run", made.append)
    command(monkeypatch, data, dry_run="true", init_from=tmp_path / "big", n_kv_head=8)
    assert made[0].model_config.n_kv_head == 8


def test_a_dry_run_takes_no_weights(run, data, monkeypatch, capsys):
    monkeypatch.setattr(surgery, "load_model", None)
    monkeypatch.setattr("nanoswitch.load.load_model", None)
    command(monkeypatch, data, dry_run="true", init_from=run, n_kv_head=2, micro_batch=2)
    out = capsys.readouterr().out
    assert f"from {run}: n_kv_head 4 -> 2: key and value heads pooled" in out
    V, C = 50304, 16
    attention = C * (C + 2 * 2 * 4) + (C + 2 * 2 * 4) + C * C + C
    N = V * C + 4 * (attention + 8 * C * C + 5 * C + 4 * C) + 2 * C
    assert f"parameters {N:,} " in out


def test_the_switches_shown_are_the_checkpoints(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["switches", "--init_from", str(run), "--n_kv_head", "2"])
    cli.run(switches.main)
    out = capsys.readouterr().out
    assert out.count("q 4 x 4, k v 2 x 4") == 4 and "wpe: rope" in out and "T = 16" in out


def test_without_changes_the_weights_are_the_checkpoints(run, data, tmp_path):
    config = t.TrainConfig(**{**TRAIN, "curve": False}, data_dir=str(data), run_dir=str(tmp_path),
                           init_from=str(run))  # fmt: skip
    made = t.Trainer(GPTConfig(), config)
    state, saved = made.model.state_dict(), load_file(run / "step_000002" / "model.safetensors")
    assert all(torch.equal(state[n], w) for n, w in saved.items()) and not made.surgery.lines


@pytest.mark.slow
def test_a_comparison_takes_the_checkpoints_shape(run, data, tmp_path):
    """compare.py plans, checks and trains configs with init_from by what the checkpoint says."""
    same = "".join(f"{name} = {json.dumps(value)}\n" for name, value in SHAPE.items())
    new = f"{same}pos = 'rope'\nn_kv_head = 1\n"
    for name, text in dict(pooled=f"init_from = '{run}'\nn_kv_head = 1\n", new=new).items():
        (tmp_path / f"{name}.toml").write_text(text)
    flags = [f"--{name}={value}" for name, value in (TRAIN | {"data_dir": data}).items()]
    configs = [tmp_path / "pooled.toml", tmp_path / "new.toml"]
    assert "runs      2" in compare_command(*configs, *flags, "--plan", "true").stdout
    compare_command(*configs, *flags, "--out", tmp_path / "out")
    rows = json.loads((tmp_path / "out/results.json").read_text())["configs"]
    C, hs, V = 16, 4, 50304
    attention = C * (C + 2 * hs) + (C + 2 * hs) + C * C + C
    assert rows["pooled"]["parameters"] == V * C + 4 * (attention + 8 * C * C + 9 * C) + 2 * C
    assert rows["new"]["parameters"] == rows["pooled"]["parameters"]
    (tmp_path / "new.toml").write_text(new.replace("block_size = 16", "block_size = 8"))
    refused = compare_command(*configs, *flags, "--plan", "true", fails=True).stderr
    assert refused.count("\n") == 1 and "block_size" in refused and "16" in refused
