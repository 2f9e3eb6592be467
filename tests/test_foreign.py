"""Other people's checkpoints: nanoGPT's, build-nanogpt's, llm.c's, old Hugging Face files, and the
layouts that are only read. Against a plain forward pass written here, and against transformers."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from model import GPT
from nanoswitch import foreign, hf, load
from nanoswitch.load import load_config, load_model, own_tokenizer

ROOT = Path(__file__).parent.parent
V, T, L, NH, C = 97, 24, 2, 2, 128
IDX = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))


def tensors(bias=True, rows=V, tied=True, seed=0):
    """Parameters of a GPT-2 under nanoGPT's names, far from their initial values."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, mean=0.0):
        return mean + 0.2 * torch.randn(*shape, generator=generator)

    found = {"transformer.wte.weight": draw(rows, C), "transformer.wpe.weight": draw(T, C)}
    for i in range(L):
        for part, shape in (
            ("ln_1", (C,)), ("attn.c_attn", (3 * C, C)), ("attn.c_proj", (C, C)),
            ("ln_2", (C,)), ("mlp.c_fc", (4 * C, C)), ("mlp.c_proj", (C, 4 * C)),
        ):  # fmt: skip
            name = f"transformer.h.{i}.{part}"
            found[f"{name}.weight"] = draw(*shape, mean=float(len(shape) == 1))
            if bias:
                found[f"{name}.bias"] = draw(shape[0])
    found["transformer.ln_f.weight"] = draw(C, mean=1.0)
    if bias:
        found["transformer.ln_f.bias"] = draw(C)
    found["lm_head.weight"] = found["transformer.wte.weight"] if tied else draw(rows, C)
    return found


def reference(w, idx, erf, heads=NH):
    """GPT-2's forward pass, written out: (B, T) -> (B, T, V)."""

    def get(name, kind):
        return w.get(f"transformer.{name}.{kind}")

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        bias = get(name, "bias")
        return x * get(name, "weight") + (0 if bias is None else bias)

    def linear(x, name):
        bias = get(name, "bias")
        return x @ get(name, "weight").t() + (0 if bias is None else bias)

    def gelu(x):
        if erf:
            return x * (1 + torch.erf(x / 2**0.5)) / 2
        return x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2

    B, n = idx.shape
    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][:n]
    mask = torch.full((n, n), -torch.inf).triu(1)
    for i in range(L):
        h = f"h.{i}."
        qkv = linear(norm(x, h + "ln_1"), h + "attn.c_attn").split(C, dim=-1)
        q, k, v = (y.view(B, n, heads, C // heads).transpose(1, 2) for y in qkv)
        y = ((q @ k.transpose(-2, -1)) / (C // heads) ** 0.5 + mask).softmax(-1) @ v
        x = x + linear(y.transpose(1, 2).reshape(B, n, C), h + "attn.c_proj")
        x = x + linear(gelu(linear(norm(x, h + "ln_2"), h + "mlp.c_fc")), h + "mlp.c_proj")
    return norm(x, "ln_f") @ w["lm_head.weight"].t()


def close(ours, want, idx=IDX):
    with torch.no_grad():
        gap = (ours(idx)[0] - want).abs().max().item()
    print(f"\ngap {gap:.1e}")
    return gap < 1e-4


def refused(call, *words):
    with pytest.raises(ValueError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def nanogpt(path, bias=True, prefix="", tied=True, rows=V, **changes):
    """nanoGPT's ckpt.pt, as its train.py saves it -> its tensors."""
    w = tensors(bias, rows, tied)
    args = dict(
        n_layer=L, n_head=NH, n_embd=C, block_size=T, bias=bias, vocab_size=rows, dropout=0.1
    )
    parameter = torch.nn.Parameter(w["transformer.wte.weight"].clone())
    torch.save(
        {
            "model": collections.OrderedDict((prefix + n, x) for n, x in w.items()),
            "optimizer": torch.optim.AdamW([parameter]).state_dict(),
            "model_args": args | changes, "iter_num": 7, "best_val_loss": torch.tensor(3.2),
            "config": {"out_dir": "out", "learning_rate": 6e-4, "compile": True},
        },
        path,
    )  # fmt: skip
    return w


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_nanogpts_checkpoint_gives_its_logits(bias, prefix, tmp_path, capsys):
    w = nanogpt(tmp_path / "ckpt.pt", bias, prefix)
    model = GPT.from_pretrained(tmp_path / "ckpt.pt")
    assert close(model, reference(w, IDX, erf=True)) and not model.training
    assert not close(model, reference(w, IDX, erf=False))  # GELU matters this much
    c = model.config
    assert (c.n_layer, c.n_head, c.block_size, c.vocab_size, c.bias) == (L, NH, T, V, bias)
    assert c.dropout == 0.1 and c.tie_embeddings and c.mlp == "gelu_erf"
    assert "GELU" in capsys.readouterr().err
    assert load_config(tmp_path) == c  # nanoGPT's out_dir is a checkpoint too
    assert close(load_model(tmp_path), reference(w, IDX, erf=True))


def test_an_untied_head_and_half_precision_are_read(tmp_path):
    w = nanogpt(tmp_path / "ckpt.pt", tied=False)
    model = load_model(tmp_path / "ckpt.pt")
    assert not model.config.tie_embeddings and close(model, reference(w, IDX, erf=True))
    for dtype in (torch.bfloat16, torch.float16):
        half = {n: x.to(dtype) for n, x in w.items()}
        torch.save(half, tmp_path / "half.pt")
        model = load_model(tmp_path / "half.pt")
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert close(model, reference({n: x.float() for n, x in half.items()}, IDX, erf=False))


def buildnanogpt(path, monkeypatch, heads=NH, extra=None):
    """log/model_05000.pt: its config is an object of the class GPTConfig of its script."""
    w = tensors()
    mask = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, T, T).tril() for i in range(L)}
    made = type("GPTConfig", (), {"__module__": "__main__"})
    config = made()
    config.__dict__.update(n_layer=L, n_head=heads, n_embd=C, block_size=T, vocab_size=V)
    config.__dict__.update(extra or {})
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["__main__"], "GPTConfig", made, raising=False)
        torch.save({"model": w | mask, "config": config, "step": 5, "val_loss": 3.1}, path)
    return w


@pytest.mark.parametrize("heads", [2, 4])
def test_buildnanogpts_checkpoint_gives_its_logits(heads, tmp_path, monkeypatch):
    w = buildnanogpt(tmp_path / "model_00005.pt", monkeypatch, heads)
    model = load_model(tmp_path / "model_00005.pt")
    assert close(model, reference(w, IDX, False, heads)) and model.config.n_head == heads
    assert model.config.mlp == "gelu" and not hasattr(sys.modules["__main__"], "GPTConfig")


def test_tensors_alone_have_heads_of_64(tmp_path, capsys):
    w = tensors()
    torch.save(w, tmp_path / "model.pt")
    assert close(load_model(tmp_path / "model.pt"), reference(w, IDX, False))
    assert "n_head" in capsys.readouterr().err


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


class GPTConfig(Bomb):
    """A bomb under the one name that is let in."""

    def __reduce__(self):
        return GPTConfig, (self.path,)

    def __setstate__(self, state):
        open(self.path, "w").close()


def test_no_pickled_object_runs(tmp_path, monkeypatch):
    canary, path = tmp_path / "canary", tmp_path / "model.pt"
    w = tensors()
    for held in (
        Bomb(canary),
        {"model": w, "config": Bomb(canary)},
        {"model": w, "model_args": Bomb(canary)},
        {"model": w | {"x": Bomb(canary)}},
    ):
        torch.save(held, path)
        refused(lambda: load_model(path), "model.pt", "io.open", "no pickled object")
        refused(lambda: load_config(path), "no pickled object")
        refused(lambda: load_config(tmp_path / "model.pt"), "state_dict")
    buildnanogpt(path, monkeypatch, extra={"n_head": 2, "bias": Bomb(canary)})
    refused(lambda: load_model(path), "no pickled object")
    torch.save({"model": w, "config": GPTConfig(canary)}, path)
    load_model(path)  # a bag took its place
    assert not canary.exists()
    torch.load(path, weights_only=False)
    torch.save(Bomb(canary), path)
    torch.load(path, weights_only=False)
    assert canary.exists()  # the bombs do work


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(n_layer=3), ["n_layer 3", "tensors have 2"]),
        (dict(block_size=48), ["block_size 48", "24"]),
        (dict(vocab_size=65), ["vocab_size 65", "97"]),
        (dict(use_rmsnorm=True), ["changed nanoGPT", "use_rmsnorm"]),
        (dict(n_head=3), ["n_head 3"]),
        (dict(n_head="two"), ["wrong type"]),
    ],
    ids=str,
)
def test_what_is_no_gpt_of_theirs_is_refused_in_one_line(changes, words, tmp_path):
    nanogpt(tmp_path / "ckpt.pt", **changes)
    refused(lambda: load_model(tmp_path / "ckpt.pt"), *words)


def test_other_files_are_named_with_what_is_read(tmp_path):
    path = tmp_path / "a.pt"
    for held, words in (
        ({"epoch": 3}, ["epoch", "llm.c"]),
        ([1, 2], ["a list", "nanoGPT"]),
        ({"model": {"wte.weight": torch.ones(3)}}, ["no GPT of nanoGPT's layout"]),
        ({"model": tensors() | {"transformer.h.0.gate": torch.ones(3)}}, ["unknown", "h.0.gate"]),
    ):
        torch.save(held, path)
        refused(lambda: load_model(path), "a.pt", *words)
    whole = nanogpt(path) and path.read_bytes()
    for size in (0, 10, 2000, len(whole) - 100):
        path.write_bytes(whole[:size])
        refused(lambda: load_model(path), "a.pt")
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(lambda: load_model(path), "git lfs pull")
    (tmp_path / "a.safetensors").write_bytes(b"x")
    refused(lambda: load_model(tmp_path / "a.safetensors"), "is a file", "llm.c")


# ----------------------------------------------------------------------------- llm.c

ORDER = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]


def llmc(path, version=3, used=V, rows=128, magic=20240326):
    w = tensors(rows=rows)
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    for part in ORDER:
        for kind in ("weight", "bias"):
            names += [f"transformer.h.{i}.{part}.{kind}" for i in range(L)]
    names += ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    flat = torch.cat([w[name].flatten() for name in names])
    if version == 5:
        flat, w = flat.bfloat16().view(torch.int16), {n: x.bfloat16().float() for n, x in w.items()}
    header = np.zeros(256, "<i4")
    header[:8] = magic, version, T, used, L, NH, C, rows
    path.write_bytes(header.tobytes() + flat.numpy().tobytes())
    return w


@pytest.mark.parametrize("version", [3, 5])
def test_llmcs_model_gives_its_logits(version, tmp_path):
    w = llmc(tmp_path / "model.bin", version)
    model = load_model(tmp_path / "model.bin")
    assert close(model, reference(w, IDX, erf=False))
    c = model.config
    assert (c.vocab_size, c.vocab_used, c.mlp, c.bias) == (128, V, "gelu", True)
    assert load_config(tmp_path / "model.bin") == c


def test_other_bins_are_refused(tmp_path):
    path = tmp_path / "x.bin"
    for kind, words in (
        (dict(version=2), ["version 2", "3 (fp32)"]),
        (dict(magic=20240520), ["shard of tokens"]),
        (dict(magic=1), ["no model of llm.c"]),
    ):
        llmc(path, **kind)
        refused(lambda: load_model(path), "x.bin", *words)
    llmc(path)
    path.write_bytes(path.read_bytes()[:-4])
    refused(lambda: load_model(path), "not whole")
    path.write_bytes(b"")
    refused(lambda: load_model(path), "no model of llm.c")


# ----------------------------------------------------------------------------- everywhere


@pytest.mark.parametrize("rows, used", [(50257, 50257), (50304, 50257), (65, 65), (60000, 60000)])
def test_gpt2s_vocabulary_is_known_however_it_is_padded(rows, used, tmp_path):
    nanogpt(tmp_path / "ckpt.pt", rows=rows)
    config = load_config(tmp_path / "ckpt.pt")
    assert (config.vocab_size, config.vocab_used) == (rows, used)
    if used == 50257:
        assert own_tokenizer(tmp_path / "ckpt.pt", config) is None
        assert own_tokenizer(tmp_path, config) is None
    else:
        pytest.importorskip("tokenizers")
        refused(lambda: own_tokenizer(tmp_path / "ckpt.pt", config), "tokenizer.json", "GPT-2's")


@pytest.mark.slow
def test_it_is_a_checkpoint_for_every_script(tmp_path):
    path = tmp_path / "ckpt.pt"
    nanogpt(path, rows=50304)
    for line in (
        f"sample.py {path} --device cpu --max_new_tokens 3 --num_samples 1",
        f"sample.py {tmp_path} --device cpu --max_new_tokens 3 --num_samples 1",
        f"-m nanoswitch.export {path} --out {tmp_path / 'out'}",
        f"sample.py {tmp_path / 'out'} --device cpu --max_new_tokens 3 --num_samples 1",
    ):
        done = subprocess.run(
            [sys.executable, *line.split(), *(["--prompt", "Hi"] if "sample" in line else [])],
            capture_output=True, text=True, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["activation_function"] == "gelu"


# ----------------------------------------------------------------------------- Hugging Face


def theirs(kind, **fields):
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        vocab_size=V, num_hidden_layers=2, hidden_size=32, num_attention_heads=4,
        intermediate_size=56, max_position_embeddings=T,
    )  # fmt: skip
    gpt2 = dict(vocab_size=V, n_positions=T, n_layer=2, n_head=4, n_embd=32)
    config = transformers.AutoConfig.for_model(kind, **(gpt2 if kind == "gpt2" else sizes) | fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3)
    return model


def same(folder, model):
    with torch.no_grad():
        return close(load_model(folder), model(IDX).logits)


READ = {
    "gpt2 erf": ("gpt2", dict(activation_function="gelu")),
    "starcoder2 erf": ("starcoder2", dict(hidden_act="gelu", num_key_value_heads=2)),
    "qwen2": ("qwen2", dict(num_key_value_heads=2)),
    "qwen2 tied": ("qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "smollm": (
        "llama",
        dict(hidden_size=36, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
             rope_parameters={"rope_type": "default", "rope_theta": 1e5}, rms_norm_eps=1e-5),
    ),
    "gpt_neox": ("gpt_neox", dict(use_parallel_residual=False, rotary_pct=1.0)),
    "gpt_neox tanh": (
        "gpt_neox",
        dict(use_parallel_residual=False, rotary_pct=1.0, hidden_act="gelu_new",
             tie_word_embeddings=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_a_layout_that_this_model_can_be_gives_its_logits(name, tmp_path):
    model = theirs(READ[name][0], **READ[name][1])
    model.save_pretrained(tmp_path)
    assert same(tmp_path, model)


@pytest.mark.parametrize(
    "kind, fields, words",
    [
        ("gpt_neox", dict(rotary_pct=1.0), ["use_parallel_residual", "only False"]),
        ("gpt_neox", dict(use_parallel_residual=False, rotary_pct=0.25), ["0.25", "channels"]),
        ("gpt_neox", dict(use_parallel_residual=False, rotary_pct=1.0, attention_bias=False),
         ["attention_bias"]),
        ("qwen3", dict(head_dim=8, num_key_value_heads=2), ["qwen3", "llama", "weights"]),
        ("qwen2", dict(use_sliding_window=True, num_key_value_heads=2), ["use_sliding_window"]),
        ("opt", dict(ffn_dim=56), ["model_type 'opt'", "qwen2", "gpt_neox"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_layout_that_it_cannot_be_is_refused_in_one_line(kind, fields, words, tmp_path):
    theirs(kind, **fields).save_pretrained(tmp_path)
    refused(lambda: load_model(tmp_path), *words)


def as_torch(folder, model, parts=1):
    """A folder as transformers 4 wrote it: pytorch_model.bin, or several with an index."""
    model.config.save_pretrained(folder)
    state = model.state_dict()
    names = sorted(state)
    if parts == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    index = {}
    for part in range(parts):
        file = f"pytorch_model-{part + 1:05d}-of-{parts:05d}.bin"
        torch.save({n: state[n].clone() for n in names[part::parts]}, folder / file)
        index |= dict.fromkeys(names[part::parts], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_files_of_a_folder_are_read(kind, parts, dtype, tmp_path):
    as_torch(tmp_path, theirs(kind).to(dtype), parts)
    model = theirs(kind)
    with torch.no_grad():  # the weights alone: a model that was half has a half rotation too
        for p in model.parameters():
            p.copy_(p.to(dtype))
    assert same(tmp_path, model)
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.float32}


def test_torchs_old_format_is_read(tmp_path):
    """The hub's first uploads are no zip files."""
    model = theirs("gpt2")
    as_torch(tmp_path, model)
    state = model.state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert same(tmp_path, model)


def test_a_bad_torch_file_of_a_folder_is_refused(tmp_path):
    as_torch(tmp_path, theirs("gpt2"), parts=2)
    index = tmp_path / "pytorch_model.bin.index.json"
    first = tmp_path / "pytorch_model-00001-of-00002.bin"
    for zipped in (True, False):
        torch.save(Bomb(tmp_path / "canary"), first, _use_new_zipfile_serialization=zipped)
        refused(lambda: load_model(tmp_path), first.name, "no pickled object")
    torch.save({"a": 3}, first)
    refused(lambda: load_model(tmp_path), first.name, "named tensors")
    os.remove(first)
    refused(lambda: load_model(tmp_path), first.name)
    index.write_text('{"weight_map": {"a": "../x.bin"}}')
    refused(lambda: load_model(tmp_path), "../x.bin")
    assert not (tmp_path / "canary").exists()


def test_padded_rows_of_a_foreign_folder_are_told_by_its_end_of_text(tmp_path):
    hf.save(GPT(load.GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=8)), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    about = json.loads(path.read_text())
    assert about.pop("vocab_used") == 50257 and about["vocab_size"] == 50304
    path.write_text(json.dumps(about))
    assert load_config(tmp_path / "m").vocab_used == 50257
    path.write_text(json.dumps(about | {"eos_token_id": None}))
    assert load_config(tmp_path / "m").vocab_used == 50304


def test_the_reader_of_a_data_shard_or_model_is_not_confused(tmp_path):
    assert foreign.find(tmp_path) is None and foreign.find("gpt2") is None
    (tmp_path / "ckpt.pt").write_bytes(b"x")
    (tmp_path / "latest").write_text("step_000001")
    assert foreign.find(tmp_path) is None  # a run folder of ours, whatever lies there


def test_a_tied_head_that_is_stored_twice_is_one(tmp_path):
    name = "gpt_neox tanh"
    model = theirs(READ[name][0], **READ[name][1])
    as_torch(tmp_path, model)
    assert same(tmp_path, model)
