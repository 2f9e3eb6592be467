"""model.py against other people's implementations of the same architectures: Hugging Face
transformers here, and checkouts of build-nanogpt and nanoGPT where an environment variable says
where they lie:

    NANOSWITCH_PEER=path/to/build-nanogpt NANOSWITCH_NANOGPT=path/to/nanoGPT \
        pytest tests/test_parity.py -m slow -s
"""

import ast
import dataclasses
import inspect
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from builders import gradients, refused, shake

from model import GPT, GPTConfig

transformers = pytest.importorskip("transformers")
SMALL = dict(block_size=24, vocab_size=97, n_layer=2, n_head=4, n_embd=32)


def token_ids(vocab_size, B, T):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(1))


def shifted_loss(model, idx):
    return model(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())[1]


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs)


# ----------------------------------------------------------------------------- GPT-2


def gpt2(**changes):
    config = transformers.GPT2Config(
        n_positions=24, vocab_size=97, n_layer=2, n_head=4, n_embd=32, **changes
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return shake(transformers.GPT2LMHeadModel(config))


def from_conv1d(tensors):
    """Hugging Face's GPT-2 keeps its linear weights as (in, out)."""
    kinds = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return {n: t.T if n.endswith(kinds) else t for n, t in tensors.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"n_inner": 40, "layer_norm_epsilon": 1e-2},
        {"activation_function": "gelu_pytorch_tanh"},
    ],
    ids=str,
)
def test_gpt2_logits_loss_and_gradients_equal_transformers(changes, tmp_path):
    theirs = gpt2(**changes)
    theirs.save_pretrained(tmp_path)
    idx = token_ids(97, 2, 24)
    for load in (GPT.from_pretrained, GPT.from_pretrained):
        ours = load(tmp_path)
        assert ours.config.block_size == 24 and not ours.training
        assert (ours(idx)[0] - theirs(idx).logits).abs().max() < 1e-4

    want = theirs(idx, labels=idx).loss  # transformers shifts the labels itself
    loss = shifted_loss(ours, idx)
    assert loss.item() == pytest.approx(want.item(), abs=1e-5)
    grads = from_conv1d(gradients(theirs, want))
    assert largest_difference(gradients(ours, loss), grads) < 1e-4


def test_gpt2_generates_what_transformers_generates(tmp_path):
    theirs = gpt2()
    theirs.save_pretrained(tmp_path)
    idx = token_ids(97, 1, 5)
    options = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
    mask = torch.ones_like(idx)
    want = theirs.generate(idx, attention_mask=mask, max_new_tokens=19, **options)
    assert torch.equal(GPT.from_pretrained(tmp_path).generate(idx, 19, temperature=0), want)


def test_the_bare_gpt2_of_older_uploads_loads(tmp_path):
    """The hub's gpt2 holds h.0..., without the prefix, with the causal masks as buffers."""
    from safetensors.torch import load_file, save_file

    theirs = gpt2()
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {n.removeprefix("transformer."): t for n, t in weights.items() if "lm_head" not in n}
    for i in range(2):
        weights[f"h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
        weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, tmp_path / "model.safetensors")
    idx = token_ids(97, 2, 24)
    assert (GPT.from_pretrained(tmp_path)(idx)[0] - theirs(idx).logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_function": "relu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"add_cross_attention": True},
    ],
    ids=str,
)
def test_a_gpt2_that_this_model_cannot_be_is_refused(changes, tmp_path):
    gpt2(**changes).save_pretrained(tmp_path)
    with refused():
        GPT.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------- Llama, Mistral


def interleave(weights, n_layer):
    """Llama's names and its separate q, k, v, gate and up -> ours."""
    ours = {
        "transformer.wte.weight": weights["model.embed_tokens.weight"],
        "transformer.ln_f.weight": weights["model.norm.weight"],
        "lm_head.weight": weights["lm_head.weight"],
    }
    for i in range(n_layer):
        theirs, name = f"model.layers.{i}.", f"transformer.h.{i}."
        for part, pieces in {
            "ln_1": ["input_layernorm"],
            "ln_2": ["post_attention_layernorm"],
            "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "attn.c_proj": ["self_attn.o_proj"],
            "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
            "mlp.c_proj": ["mlp.down_proj"],
        }.items():
            stacked = [weights[f"{theirs}{piece}.weight"] for piece in pieces]
            ours[f"{name}{part}.weight"] = torch.cat(stacked)
    return ours


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_rope_gqa_swiglu_rmsnorm_and_windows_equal_transformers(kind):
    window = {"Llama": {}, "Mistral": {"sliding_window": 5}}[kind]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=24,
        rms_norm_eps=1e-4, rope_parameters={"rope_type": "default", "rope_theta": 700.0}, **window,
    )  # fmt: skip
    theirs = shake(getattr(transformers, f"{kind}ForCausalLM")(config))
    ours = GPT(
        GPTConfig(
            block_size=24, vocab_size=97, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, pos="rope",
            rope_theta=700.0, norm="rmsnorm", norm_eps=1e-4, mlp="swiglu", mlp_hidden=56,
            bias=False, tie_embeddings=False, window=window.get("sliding_window", 0),
        )
    )  # fmt: skip
    ours.load_state_dict(interleave(theirs.state_dict(), 3))
    idx = token_ids(97, 2, 24)
    assert (ours(idx)[0] - theirs(idx).logits).abs().max() < 1e-4
    want, loss = theirs(idx, labels=idx).loss, shifted_loss(ours, idx)
    assert loss.item() == pytest.approx(want.item(), abs=1e-5)
    grads = interleave(gradients(theirs, want), 3)
    assert largest_difference(gradients(ours, loss), grads) < 1e-4


# ----------------------------------------------------------------------------- nanoGPT's names


def test_parameter_names_and_shapes_are_nanogpts():
    C, V, T = 24, 53, 8
    names = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (T, C)}
    for i in range(12):
        h = f"transformer.h.{i}."
        for ln in ("ln_1", "ln_2"):
            names |= {f"{h}{ln}.weight": (C,), f"{h}{ln}.bias": (C,)}
        for linear, shape in {
            "attn.c_attn": (3 * C, C),
            "attn.c_proj": (C, C),
            "mlp.c_fc": (4 * C, C),
            "mlp.c_proj": (C, 4 * C),
        }.items():
            names |= {f"{h}{linear}.weight": shape, f"{h}{linear}.bias": shape[:1]}
    names |= {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}
    names |= {"lm_head.weight": (V, C)}
    state = GPT(GPTConfig(block_size=T, vocab_size=V, n_embd=C, n_head=12)).state_dict()
    assert {n: tuple(t.shape) for n, t in state.items()} == names


# ----------------------------------------------------------------------------- the peers' own code


def peer_classes(path):
    """The classes of a peer's script, without running the script: importing build-nanogpt's
    train_gpt2.py would start a training run."""
    tree = ast.parse(Path(path).read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    space = {
        "__name__": "peer", "torch": torch, "nn": nn, "F": F, "math": math, "inspect": inspect,
        "dataclass": dataclasses.dataclass,
    }  # fmt: skip
    exec(compile(tree, str(path), "exec"), space)
    return space


def checkout(variable, file):
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"set {variable} to a checkout that holds {file}")
    return peer_classes(Path(folder) / file)


def compare(ours, theirs, idx, tag):
    """Load their weights into ours and print the largest differences, in fp32."""
    ours.load_state_dict(theirs.state_dict(), strict=True)
    logits = (ours(idx)[0] - theirs(idx, idx)[0]).abs().max().item()
    want, loss = shifted_loss(theirs, idx), shifted_loss(ours, idx)
    gap = abs(loss.item() - want.item())
    grads = largest_difference(gradients(ours, loss), gradients(theirs, want))
    print(f"\n{tag}: logits {logits:.2e}  loss {gap:.2e}  gradients {grads:.2e}")
    return logits, gap, grads


FULL = dict(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768)


@pytest.mark.slow
@pytest.mark.parametrize("sizes, B, T", [(SMALL, 2, 24), (FULL, 1, 64)], ids=["small", "124M"])
def test_loss_and_gradients_equal_build_nanogpts(sizes, B, T):
    peer = checkout("NANOSWITCH_PEER", "train_gpt2.py")
    torch.manual_seed(0)
    theirs = peer["GPT"](peer["GPTConfig"](**sizes))
    if sizes is SMALL:
        shake(theirs)
    ours = GPT(GPTConfig(**sizes))
    idx = token_ids(sizes["vocab_size"], B, T)
    logits, loss, grads = compare(ours, theirs, idx, f"build-nanogpt {sizes['n_layer']} layers")
    assert logits < 1e-4 and loss < 1e-5 and grads < 1e-4
    theirs.load_state_dict(ours.state_dict(), strict=True)  # and back


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_differs_by_its_exact_gelu_only(bias):
    peer = checkout("NANOSWITCH_NANOGPT", "model.py")
    theirs = shake(peer["GPT"](peer["GPTConfig"](**SMALL, bias=bias, dropout=0.0)))
    ours = GPT(GPTConfig(**SMALL, bias=bias))
    idx = token_ids(97, 2, 24)
    assert compare(ours, theirs, idx, "nanoGPT as it is")[0] > 1e-4
    for block in theirs.transformer.h:
        block.mlp.gelu = nn.GELU(approximate="tanh")
    logits, loss, grads = compare(ours, theirs, idx, "nanoGPT with the tanh GELU")
    assert logits < 1e-4 and loss < 1e-5 and grads < 1e-4
    theirs.load_state_dict(ours.state_dict(), strict=True)
