"""model.py against formulas written out here, plain loops, and gradients: never against itself,
except where one computation must equal another (cached = uncached, compiled = eager).

The loops run over POSITIONS, NORMS and MLPS, so a new entry is tested as soon as it is registered.
"""

import cmath
import itertools
import json
import math
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import model as m
from model import GPT, MLPS, NORMS, POSITIONS, GPTConfig
from nanoswitch import generation
from nanoswitch import loss as loss_file
from nanoswitch.cache import KVCache
from nanoswitch.counts import flops_per_token, on_meta

ROOT = Path(m.__file__).parent

TINY = dict(block_size=24, vocab_size=61, vocab_used=53, n_layer=2, n_head=4, n_embd=16)
# (window, window_pattern): full, windowed, and both orders of mixing them
WINDOWS = [(0, ""), (3, ""), (3, "SL"), (3, "LSS")]
GQA = [4, 2, 1]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are slower on many threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(**changes):
    return GPTConfig(**{**TINY, **changes})


def build(config, seed=0):
    """A model in which no parameter is at a value that hides it: attention is far from uniform,
    biases are not 0, norm weights not 1. Position parameters stay near their initial values."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".wpe." in name:
                p.add_(torch.randn_like(p), alpha=0.3)
            else:
                p.normal_(0, 0.4)
    return model


def tokens(config, B, T, seed=1):
    return torch.randint(config.vocab_used, (B, T), generator=torch.Generator().manual_seed(seed))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(ours, reference, rtol=1e-4):
    """To rtol of a tensor's largest entry. The floor is for gradients that are zero but for
    rounding, such as FIRE's last bias: a constant added to every score moves no softmax."""
    assert ours.keys() == reference.keys()
    for name, g in reference.items():
        torch.testing.assert_close(
            ours[name], g, rtol=rtol, atol=rtol * g.abs().max().item() + 1e-7
        )


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and all(str(w) in text for w in words), text


# ----------------------------------------------------------------------------- a model of loops


def naive_layernorm(x, w, eps):
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    y = (x - mean) / math.sqrt(variance + eps) * w["weight"]
    return y + w["bias"] if "bias" in w else y


def naive_rmsnorm(x, w, eps):
    return x / math.sqrt(sum(v * v for v in x) / len(x) + eps) * w["weight"]


def naive_gelu(x):
    return torch.tensor(
        [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x]
    )


def naive_relu2(x):
    return torch.tensor([max(v, 0) ** 2 for v in x])


def naive_swiglu(x):
    n = len(x) // 2
    return torch.tensor([x[i] / (1 + math.exp(-x[i])) * x[i + n] for i in range(n)])


def naive_rope(x, p, theta):
    """One head's vector as complex numbers x_i + j x_(i + hs/2), times e^(j p theta^(-2i/hs))."""
    n = len(x) // 2
    z = [complex(x[i], x[i + n]) * cmath.exp(1j * p * theta ** (-i / n)) for i in range(n)]
    return torch.tensor([v.real for v in z] + [v.imag for v in z])


NAIVE_NORM = {"layernorm": naive_layernorm, "rmsnorm": naive_rmsnorm}
NAIVE_MLP = {"gelu": naive_gelu, "relu2": naive_relu2, "swiglu": naive_swiglu}


def naive_sinusoidal(p, C):
    """Vaswani et al.: sin on even channels, cos on odd, here divided by sqrt(C)."""
    angles = [p / 10000 ** (2 * (c // 2) / C) for c in range(C)]
    waves = [math.cos(a) if c % 2 else math.sin(a) for c, a in enumerate(angles)]
    return torch.tensor(waves) / math.sqrt(C)


def naive_alibi(w, head, nh, i, j):
    return -(2 ** (-8 * (head + 1) / nh)) * (i - j)  # nh a power of two


def naive_kerple(w, head, nh, i, j):
    r1, r2 = math.exp(w["log_r1"][head]), math.exp(w["log_r2"][head])
    return -r1 * math.log(1 + r2 * (i - j))


def naive_kerple_power(w, head, nh, i, j):
    r1, r2 = math.exp(w["log_r1"][head]), min(2, math.exp(w["log_r2"][head]))
    return -r1 * (i - j) ** r2


def naive_fire(w, head, nh, i, j):
    c, L = abs(w["c"].item()), abs(w["L"].item())
    x = math.log(c * (i - j) + 1) / math.log(c * max(i, L) + 1)
    hidden = [max(0, float(a * x + b)) for a, b in zip(w["mlp.0.weight"], w["mlp.0.bias"])]  # noqa: B905
    return sum(float(a) * h for a, h in zip(w["mlp.2.weight"][head], hidden)) + float(  # noqa: B905
        w["mlp.2.bias"][head]
    )


NAIVE_BIAS = {
    "alibi": naive_alibi,
    "kerple": naive_kerple,
    "kerple_power": naive_kerple_power,
    "fire": naive_fire,
}
# those that naive_logits knows
NAIVE_POSITION = {"learned", "sinusoidal", "rope", "none", *NAIVE_BIAS}


def naive_logits(model, idx):
    """GPT-2 and its variants one token, one head, one query at a time, in float64."""
    c, T = model.config, len(idx)
    weights = {k: v.double() for k, v in model.state_dict().items()}
    hs, group = c.n_embd // c.n_head, c.n_head // c.n_kv_head

    def part(prefix):
        return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}

    def linear(x, prefix):
        w = part(prefix)
        return w["weight"] @ x + w.get("bias", 0)

    def norm(x, prefix):
        return NAIVE_NORM[c.norm](x, part(prefix), c.norm_eps)

    x = [weights["transformer.wte.weight"][i] for i in idx]
    if c.pos == "learned":
        x = [x[p] + weights["transformer.wpe.weight"][p] for p in range(T)]
    if c.pos == "sinusoidal":
        x = [x[p] + naive_sinusoidal(p, c.n_embd) for p in range(T)]
    for i in range(c.n_layer):
        h = f"transformer.h.{i}."
        windowed = c.window and (c.window_pattern or "S")[i % len(c.window_pattern or "S")] == "S"
        qkv = [linear(norm(x[p], h + "ln_1."), h + "attn.c_attn.") for p in range(T)]
        heads = [v.view(-1, hs) for v in qkv]  # nh queries, nkv keys, nkv values
        for p in range(T):
            out = []
            for head in range(c.n_head):
                k_head = c.n_head + head // group
                v_head = k_head + c.n_kv_head
                seen = range(max(0, p - c.window + 1) if windowed else 0, p + 1)
                scores = []
                for s in seen:
                    q, k = heads[p][head], heads[s][k_head]
                    if c.qk_norm:
                        q, k = (v / math.sqrt(sum(v * v) / hs) for v in (q, k))
                    if c.pos == "rope":
                        q, k = naive_rope(q, p, c.rope_theta), naive_rope(k, s, c.rope_theta)
                    score = float(q @ k) / math.sqrt(hs)
                    if c.pos in NAIVE_BIAS:
                        score += NAIVE_BIAS[c.pos](part("transformer.wpe."), head, c.n_head, p, s)
                    scores.append(math.exp(score))
                total = sum(scores)
                out.append(
                    sum(a / total * heads[s][v_head] for a, s in zip(scores, seen, strict=1))
                )
            x[p] = x[p] + linear(torch.cat(out), h + "attn.c_proj.")
        for p in range(T):
            inner = linear(norm(x[p], h + "ln_2."), h + "mlp.c_fc.")
            x[p] = x[p] + linear(NAIVE_MLP[c.mlp](inner).double(), h + "mlp.c_proj.")
    logits = torch.stack([linear(norm(v, "transformer.ln_f."), "lm_head.") for v in x])
    cap = c.logit_softcap
    return cap * torch.tanh(logits / cap) if cap else logits


@pytest.fixture
def float64_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


NAIVE_VARIANTS = [
    # every mechanism alone, then together
    *({"pos": pos} for pos in sorted(NAIVE_POSITION)),
    *({"norm": norm} for norm in NAIVE_NORM),
    *({"mlp": mlp} for mlp in NAIVE_MLP),
    *({"pos": "rope", "window": w, "window_pattern": p} for w, p in WINDOWS),
    *({"pos": "rope", "n_kv_head": n} for n in GQA),
    {"qk_norm": True, "pos": "rope", "n_kv_head": 2},
    {"logit_softcap": 3.0},
    {"bias": False, "tie_embeddings": False, "norm_eps": 1e-2},
    {"pos": "rope", "rope_theta": 50.0, "norm": "rmsnorm", "bias": False},
    {"mlp_hidden": 7, "mlp": "swiglu", "n_kv_head": 2},
    {"pos": "none", "norm": "rmsnorm", "mlp": "relu2", "n_kv_head": 1, "window": 1},
    dict(pos="rope", norm="rmsnorm", mlp="swiglu", n_kv_head=2, window=2, window_pattern="SL"),
]


@pytest.mark.parametrize("changes", NAIVE_VARIANTS, ids=str)
def test_logits_equal_a_model_of_plain_loops(changes, float64_default):
    model = build(tiny(**changes))
    idx = tokens(model.config, 2, 7)
    logits, loss = model(idx)
    assert logits.shape == (2, 7, 61) and loss is None
    for row, want in zip(logits, map(lambda r: naive_logits(model, r), idx.tolist()), strict=True):
        torch.testing.assert_close(row, want, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------- positions


def test_rope_scores_depend_on_the_distance_only():
    rope = m.RoPE(tiny(n_embd=64))
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).double()

    def score(q_pos, k_pos):
        turned = [
            m.rotate(x.float(), *rope.rotation(torch.tensor([p])))
            for x, p in ((q, q_pos), (k, k_pos))
        ]
        return (turned[0] * turned[1]).sum().item()

    for distance in (0, 1, 7):
        want = score(distance, 0)
        for shift in (1, 13, 200):
            assert score(distance + shift, shift) == pytest.approx(want, abs=1e-3)
    assert abs(score(1, 0) - score(7, 0)) > 0.01  # and they do depend on it


def test_rope_is_the_identity_at_position_zero_and_keeps_lengths():
    rope, x = m.RoPE(tiny(n_embd=64)), torch.randn(1, 1, 5, 16)
    turned = m.rotate(x, *rope.rotation(torch.arange(5)))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("pos", POSITIONS)
def test_beyond_block_size_runs_or_is_refused_in_one_line(pos):
    model = build(tiny(pos=pos))
    idx = tokens(model.config, 1, 25)
    if POSITIONS[pos].extrapolates:
        assert torch.isfinite(model(idx)[0]).all()
        assert model.generate(idx, 3).shape == (1, 28)
    else:
        for call in (lambda: model(idx), lambda: model.generate(idx[:, :24], 2)):
            with pytest.raises(ValueError) as error:
                call()
            one_line(error, 25, 24, pos, "--pos")
        assert model.generate(idx[:, :23], 1).shape == (1, 24)


def test_learned_positions_are_the_ones_refused_beyond_block_size():
    assert not POSITIONS["learned"].extrapolates
    assert POSITIONS["rope"].extrapolates and POSITIONS["none"].extrapolates


def test_alibi_slopes_of_a_power_of_two_and_of_gpt2s_twelve_heads():
    """Press et al.'s released code: 8 heads' slopes, then every other of 16 heads'."""
    eight = [2.0**-h for h in range(1, 9)]
    assert m.Alibi(tiny(n_head=8)).slopes().tolist() == eight
    twelve = eight + [2.0**-h for h in (0.5, 1.5, 2.5, 3.5)]
    assert m.Alibi(GPTConfig(n_head=12)).slopes().tolist() == pytest.approx(twelve)


# ----------------------------------------------------------------------------- who sees whom


def influence(model, T=9):
    """(T, T): how strongly the logits of position t move with the token embedded at s. Row t is
    a sequence of its own, so a leak between rows shows as well."""
    embedded = []
    hook = model.transformer.wte.register_forward_hook(lambda *a: embedded.append(a[-1]))
    logits, _ = model(tokens(model.config, 1, T).expand(T, T))
    hook.remove()
    weights = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(3))
    own = logits[torch.arange(T), torch.arange(T)] @ weights
    (grad,) = torch.autograd.grad(own.sum(), embedded)
    return grad.abs().sum(-1)  # (T, T)


@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("pos", POSITIONS)
def test_no_gradient_reaches_the_future(pos, norm, mlp):
    for (window, pattern), n_kv_head in itertools.product(WINDOWS, GQA):
        config = tiny(
            pos=pos, norm=norm, mlp=mlp, window=window, window_pattern=pattern, n_kv_head=n_kv_head
        )
        seen = influence(build(config))
        assert (seen.triu(1) == 0).all(), config  # exactly
        assert (seen.diagonal() > 0).all(), config


@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("W", [1, 2, 4, 8, 9, 20])
def test_a_window_is_exactly_w_keys_itself_included(pos, W):
    distance = torch.arange(9)[:, None] - torch.arange(9)
    seen = influence(build(tiny(pos=pos, n_layer=1, window=W)))
    assert torch.equal(seen > 0, (distance >= 0) & (distance < W))


def test_windows_reach_further_with_depth_and_a_full_layer_reaches_all():
    distance = torch.arange(9)[:, None] - torch.arange(9)
    two = influence(build(tiny(pos="rope", n_layer=2, window=3)))
    assert torch.equal(two > 0, (distance >= 0) & (distance < 5))  # W - 1 more keys a layer
    mixed = influence(build(tiny(pos="rope", n_layer=2, window=3, window_pattern="SL")))
    assert torch.equal(mixed > 0, distance >= 0)


def test_window_pattern_repeats_over_depth():
    assert tiny(n_layer=7, window=5, window_pattern="SSL").windows == [5, 5, 0, 5, 5, 0, 5]
    assert tiny(n_layer=3, window=5, window_pattern="L").windows == [0, 0, 0]
    assert tiny(n_layer=3, window=5).windows == [5, 5, 5]
    assert tiny(n_layer=3).windows == [0, 0, 0]
    assert tiny(n_layer=2, window=5, window_pattern="SLLL").windows == [5, 0]


# ----------------------------------------------------------------------------- GQA, norms, MLPs


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_gqa_equals_attention_whose_keys_and_values_are_repeated(n_kv_head):
    config = tiny(pos="rope", n_kv_head=n_kv_head)
    model, plain = build(config), build(tiny(pos="rope"))
    C, hs, weights = 16, 4, model.state_dict()
    for name, w in list(weights.items()):
        if ".c_attn." in name:
            q, k, v = w.split([C, n_kv_head * hs, n_kv_head * hs])
            rows = [h // (4 // n_kv_head) * hs + i for h in range(4) for i in range(hs)]
            weights[name] = torch.cat((q, k[rows], v[rows]))
    plain.load_state_dict(weights)
    idx = tokens(config, 2, 9)
    torch.testing.assert_close(model(idx)[0], plain(idx)[0], rtol=1e-4, atol=1e-4)


def test_one_key_head_per_query_head_is_plain_attention():
    assert tiny().n_kv_head == 4
    torch.manual_seed(0)
    one = GPT(tiny())
    torch.manual_seed(0)
    other = GPT(tiny(n_kv_head=4))
    idx = tokens(one.config, 1, 5)
    assert torch.equal(one(idx)[0], other(idx)[0])


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_reads_one_token_only(norm):
    x = torch.randn(3, 5, 16)
    layer = NORMS[norm](tiny(norm=norm))
    alone = torch.stack([torch.stack([layer(token) for token in row]) for row in x])
    torch.testing.assert_close(layer(x), alone)


def test_bias_false_leaves_no_bias_anywhere():
    for norm, mlp in itertools.product(NORMS, MLPS):
        names = [n for n, _ in GPT(tiny(bias=False, norm=norm, mlp=mlp)).named_parameters()]
        assert not [n for n in names if n.endswith("bias")]
    assert "bias" in dict(NORMS["layernorm"](tiny()).named_parameters())
    assert "bias" not in dict(NORMS["rmsnorm"](tiny()).named_parameters())


def test_hidden_widths():
    assert GPTConfig(mlp="gelu").mlp_hidden == GPTConfig(mlp="relu2").mlp_hidden == 3072
    for n_embd in (64, 384, 768, 1024, 1600):
        hidden = GPTConfig(mlp="swiglu", n_head=1, n_embd=n_embd).mlp_hidden
        assert 0 <= hidden - 8 * n_embd / 3 < 8 and hidden % 8 == 0
    assert tiny(mlp="swiglu", mlp_hidden=10).mlp_hidden == 10


def test_every_mlp_has_gelus_parameters_within_one_percent():
    def size(mlp):
        config = GPTConfig(mlp=mlp)
        return sum(p.numel() for p in MLPS[mlp](config).parameters())

    for mlp in MLPS:
        assert size(mlp) == pytest.approx(size("gelu"), rel=0.01)


# ----------------------------------------------------------------------------- the KV cache


def cached_logits(model, idx, chunks):
    """Feed idx in pieces of the given sizes through a cache -> the logits of every position."""
    cache, parts = KVCache(model, idx.size(1)), []
    with torch.no_grad():
        for piece in idx.split(chunks, dim=1):
            parts.append(model.lm_head(model.features(piece, cache)))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("n_kv_head", GQA)
@pytest.mark.parametrize("window, pattern", [*WINDOWS, (1, ""), (8, "SL"), (100, "")])
@pytest.mark.parametrize("pos", POSITIONS)
def test_cached_logits_equal_uncached_ones(pos, window, pattern, n_kv_head):
    config = tiny(
        pos=pos,
        window=window,
        window_pattern=pattern,
        n_kv_head=n_kv_head,
        norm="rmsnorm",
    )
    model, T = build(config), 16
    idx = tokens(config, 2, T)
    with torch.no_grad():
        want = model(idx)[0]
    # 16 positions wrap a ring of 3 five times; chunks shorter, equal and longer than it
    for chunks in ([5] + [1] * 11, [1, 1, 6, 2, 1, 5], [3, 3, 3, 7], [16]):
        got = cached_logits(model, idx, chunks)
        torch.testing.assert_close(
            got, want, rtol=1e-4, atol=1e-4, msg=lambda s, c=chunks: f"{c}: {s}"
        )


@pytest.mark.parametrize("pos", POSITIONS)
def test_generation_far_beyond_the_window_and_the_block_is_the_same_with_a_cache(pos):
    room = 30 if POSITIONS[pos].extrapolates else 0
    for window, pattern in ((3, ""), (5, "LSS")):
        config = tiny(pos=pos, window=window, window_pattern=pattern, block_size=24)
        model = build(config)
        idx, new = tokens(config, 2, 4), 20 + room
        plain = model.generate(idx, new, temperature=0, use_cache=False)
        assert plain.shape == (2, 4 + new)
        assert torch.equal(model.generate(idx, new, temperature=0), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_holds_windows_and_key_heads_only(dtype):
    config = tiny(pos="rope", n_layer=3, window=5, window_pattern="SL", n_kv_head=2)
    model = build(config).to(dtype)
    cache = KVCache(model, 24)
    with torch.no_grad():
        model.features(tokens(config, 3, 9), cache)
    held = [t.numel() * t.element_size() for layer in cache.layers for t in layer.tensors]
    B, nkv, hs, size = 3, 2, 4, dtype.itemsize
    assert held == [B * nkv * n * hs * size for n in (5, 5, 24, 24, 5, 5)]


def test_a_full_cache_says_so():
    model = build(tiny(pos="rope"))
    cache = KVCache(model, 4)
    model.features(tokens(model.config, 1, 3), cache)
    with pytest.raises(ValueError) as error:
        model.features(tokens(model.config, 1, 2), cache)
    one_line(error, 4, 2)


# ----------------------------------------------------------------------------- the loss


def reference_loss(model, idx, targets):
    logits = model(idx)[0]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


@pytest.mark.parametrize(
    "changes, B, T",
    [
        ({}, 2, 9),
        ({"tie_embeddings": False}, 2, 9),
        ({"logit_softcap": 3.0}, 2, 9),
        ({"tie_embeddings": False, "mlp": "swiglu", "bias": False}, 11, 100),  # 3 chunks of rows
        ({}, 11, 100),
    ],
)
def test_loss_and_gradients_are_those_of_cross_entropy(changes, B, T, monkeypatch):
    model = build(tiny(block_size=100, **changes))
    monkeypatch.setattr(loss_file, "CHUNK_BYTES", 400 * 4 * model.config.vocab_size)
    chunks = loss_file.loss_chunks(torch.empty(B * T, 1), model.lm_head.weight)
    assert len(chunks) == (3 if B * T > 400 else 1)
    idx, targets = tokens(model.config, B, T), tokens(model.config, B, T, seed=2)
    targets[0, ::3] = -1
    want = reference_loss(model, idx, targets)
    logits, loss = model(idx, targets)
    assert logits is None and loss.dtype == torch.float32 and loss.dim() == 0
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    # the scale is what loss scaling and gradient accumulation multiply by
    assert_same_gradients(gradients(model, loss * 3), gradients(model, want * 3))
    with torch.no_grad():
        torch.testing.assert_close(model(idx, targets)[1], want.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("N", [1, 1333, 1334, 1335, 8192, 30000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_is_in_exactly_one_chunk(N, dtype):
    x, w = torch.empty(N, 8, dtype=dtype), torch.empty(50304, 8, dtype=dtype)
    chunks = loss_file.loss_chunks(x, w)
    assert [i for s in chunks for i in range(N)[s]] == list(range(N))
    assert len(chunks) <= 16
    most = max(2**28, N * 50304 * dtype.itemsize / 16 + 50304 * dtype.itemsize)
    assert all(len(range(N)[s]) * 50304 * dtype.itemsize <= most for s in chunks)


def test_the_logits_are_never_whole(monkeypatch):
    """The largest tensor that the loss makes has a chunk's rows, not all of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in [out] if isinstance(t, torch.Tensor))
            return out

    x = torch.randn(4096, 8, requires_grad=True)
    weight = torch.randn(50304, 8, requires_grad=True)
    with Largest():
        loss_file.MeanCrossEntropy.apply(x, weight, torch.randint(50304, (4096,)), 0.0).backward()
    assert max(sizes) <= 2**28 / 4 < 4096 * 50304 / 3


@pytest.mark.parametrize("grad", [True, False])
def test_no_targets_at_all_is_a_loss_of_zero(grad):
    model = build(tiny())
    with torch.set_grad_enabled(grad):
        loss = model(tokens(model.config, 2, 5), torch.full((2, 5), -1))[1]
    assert loss.item() == 0
    if grad:
        assert all((g == 0).all() for g in gradients(model, loss).values())


def test_token_losses_are_cross_entropies_position_by_position():
    model = build(tiny())
    idx, targets = tokens(model.config, 3, 8), tokens(model.config, 3, 8, seed=2)
    targets[0, :5] = targets[2] = -1
    got = model.token_losses(model.features(idx), targets)
    logp = model(idx)[0].double().log_softmax(-1)
    for b, t in itertools.product(range(3), range(8)):
        y = targets[b, t].item()
        want = 0 if y < 0 else -logp[b, t, y].item()
        assert got[b, t].item() == pytest.approx(want, abs=1e-4)
    assert got.dtype == torch.float32 and not got.requires_grad
    assert (model.token_losses(model.features(idx), torch.full_like(idx, -1)) == 0).all()


@pytest.mark.parametrize("pos", POSITIONS)
def test_bf16_autocast_stays_close_to_fp32(pos):
    torch.manual_seed(0)
    for changes in ({}, {"n_kv_head": 2, "window": 3, "mlp": "swiglu", "norm": "rmsnorm"}):
        model = GPT(tiny(pos=pos, n_embd=64, **changes))
        idx, targets = tokens(model.config, 4, 20), tokens(model.config, 4, 20, seed=2)
        want = reference_loss(model, idx, targets)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(idx, targets)[1]
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(want.item(), abs=0.01)
        exact, rough = gradients(model, want), gradients(model, loss)
        for name, g in exact.items():
            assert torch.isfinite(rough[name]).all(), name
            if ".wpe." not in name or pos == "learned":
                error = (rough[name] - g).norm() / g.norm()
                assert error < 0.05, f"{name}: {error}"


@pytest.mark.parametrize("pos", POSITIONS)
def test_autocast_and_bf16_weights_generate_with_a_cache(pos):
    config = tiny(pos=pos, window=3, window_pattern="SL", n_kv_head=2)
    model = build(config)
    idx = tokens(config, 2, 6)
    want = model(idx)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(idx, 8, temperature=0).shape == (2, 14)
        rough = cached_logits(model, idx, [4, 1, 1])
    assert (rough - want).abs().mean() < 0.1 * want.abs().mean()
    rough = cached_logits(model.bfloat16(), idx, [4, 1, 1])
    assert (rough - want).abs().mean() < 0.1 * want.abs().mean()


def test_qk_norm_fits_the_cache_where_autocast_runs_it_in_fp32(monkeypatch):
    """As CUDA's autocast does from torch 2.12 on, and CPU's does not."""
    norm = F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda x, shape: norm(x.float(), shape))
    config = tiny(qk_norm=True, pos="rope", n_kv_head=2)
    model = build(config)
    idx = tokens(config, 2, 6)
    want = model(idx)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rough = cached_logits(model, idx, [4, 1, 1])
    assert (rough - want).abs().mean() < 0.1 * want.abs().mean()


# ----------------------------------------------------------------------------- initial weights


@pytest.mark.parametrize("mlp", MLPS)
def test_initial_weights_are_gpt2s(mlp):
    torch.manual_seed(0)
    model = GPT(tiny(mlp=mlp, n_embd=192, n_layer=3, block_size=100, tie_embeddings=False))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif ".ln_" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 3) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.04), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name


def fresh(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(tiny(**changes)).state_dict()


VARIANTS = [
    *({"pos": pos} for pos in POSITIONS),
    *({"norm": norm} for norm in NORMS),
    *({"mlp": mlp} for mlp in MLPS),
    {"n_kv_head": 1},
    {"bias": False},
    {"tie_embeddings": False},
    {"window": 3},
    {"dropout": 0.5},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_variants_at_one_seed_share_their_common_weights(changes):
    base, variant = fresh(), fresh(**changes)
    tied = {"lm_head.weight"} if not changes.get("tie_embeddings", True) else set()
    common = [
        n for n in base if n in variant and base[n].shape == variant[n].shape and n not in tied
    ]
    assert {"transformer.wte.weight", "transformer.h.0.attn.c_proj.weight"} <= set(common)
    for name in common:
        assert torch.equal(base[name], variant[name]), name


def test_seeds_and_layers_draw_different_weights():
    one, two = fresh(0), fresh(1)
    name = "transformer.h.{}.attn.c_attn.weight"
    assert not torch.equal(one[name.format(0)], one[name.format(1)])
    assert not torch.equal(one[name.format(0)], two[name.format(0)])
    untied = fresh(tie_embeddings=False)
    assert not torch.equal(untied["lm_head.weight"], untied["transformer.wte.weight"])


# ----------------------------------------------------------------------------- sampling


def test_padding_ids_are_never_drawn_even_when_they_are_likeliest():
    model = build(tiny(pos="rope", tie_embeddings=False))
    with torch.no_grad():  # the head reads a vector of ones: a padding id's logit is 16, others' 0
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
        model.lm_head.weight.zero_()
        model.lm_head.weight[53:] = 1
    assert (model(tokens(model.config, 1, 3))[0].argmax(-1) >= 53).all()
    for options in ({}, {"temperature": 0}, {"temperature": 50.0}, {"top_k": 60}, {"top_p": 0.99}):
        new = model.generate(tokens(model.config, 20, 3), 10, **options)[:, 3:]
        assert new.max() < 53, options
    assert set(model.generate(tokens(model.config, 99, 3), 10)[:, 3:].flatten().tolist()) == set(
        range(53)
    )


def test_temperature_zero_takes_the_likeliest():
    model = build(tiny(pos="rope"))
    idx = tokens(model.config, 2, 4)
    out = model.generate(idx, 6, temperature=0)
    for t in range(4, 10):
        assert torch.equal(out[:, t], model(out[:, :t])[0][:, -1, :53].argmax(-1))


def naive_distribution(logits, temperature, top_k, top_p):
    """One row's probabilities with plain lists: temperature, then top k, then the nucleus."""
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or len(logits)]
    weight = {i: math.exp(logits[i] / temperature) for i in ranked}
    kept, reached = [], 0.0
    for i in ranked:
        kept.append(i)
        reached += weight[i] / sum(weight.values())
        if top_p is not None and reached >= top_p:
            break
    total = sum(weight[i] for i in kept)
    return [weight[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 100])
@pytest.mark.parametrize("top_p", [None, 1.0, 0.9, 0.3, 1e-9])
def test_top_k_and_top_p_draw_from_the_right_distribution(temperature, top_k, top_p, monkeypatch):
    logits = torch.randn(3, 12, generator=torch.Generator().manual_seed(0)) * 2
    found, rows, candidate, weights = torch.zeros(3, 12), torch.arange(3), 0, torch.ones(3, 1)

    def draw(probs, n, generator):  # each candidate in turn
        nonlocal weights
        weights = probs / probs.sum(1, keepdim=True)
        return torch.full((3, 1), candidate)

    monkeypatch.setattr(torch, "multinomial", draw)
    while candidate < weights.size(1):
        ids = generation.sample_token(logits, temperature, top_k, top_p)  # (3,)
        found[rows, ids] += weights[:, candidate]
        candidate += 1
    for row, probs in zip(logits.tolist(), found.tolist(), strict=True):
        assert probs == pytest.approx(naive_distribution(row, temperature, top_k, top_p), abs=1e-5)


def test_top_p_zero_keeps_the_likeliest():
    logits = torch.randn(5, 12)
    assert torch.equal(generation.sample_token(logits, 1.0, None, 0.0), logits.argmax(-1))


def test_draws_follow_the_probabilities():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    generator = torch.Generator().manual_seed(0)
    drawn = generation.sample_token(probs.log().expand(20000, 4), 1.0, None, None, generator)
    shares = drawn.bincount(minlength=4) / 20000
    torch.testing.assert_close(shares, probs, rtol=0, atol=0.015)  # four standard errors


def test_the_same_generator_seed_gives_the_same_text():
    model = build(tiny(pos="rope"))
    idx = tokens(model.config, 2, 4)

    def text(seed, **options):
        return model.generate(idx, 12, generator=torch.Generator().manual_seed(seed), **options)

    torch.manual_seed(7)
    state = torch.get_rng_state()
    one = text(0)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    assert torch.equal(one, text(0)) and not torch.equal(one, text(1))
    assert torch.equal(one, text(0, use_cache=False))


def test_a_batch_continues_every_row_on_its_own():
    model = build(tiny(pos="rope"))
    idx = tokens(model.config, 3, 5)
    out = model.generate(idx, 9, temperature=0)
    assert torch.equal(out[:, :5], idx)
    for row in range(3):
        assert torch.equal(out[row], model.generate(idx[row : row + 1], 9, temperature=0)[0])
    same = model.generate(idx[:1].expand(4, 5), 9, temperature=2.0)
    assert len({tuple(row) for row in same.tolist()}) == 4  # samples of one prompt differ
    assert torch.equal(model.generate(idx, 0), idx)


# ----------------------------------------------------------------------------- configuration

REFUSED = [
    (dict(pos="rpoe"), ["pos", "rpoe", *POSITIONS]),
    (dict(norm="batch"), ["norm", "batch", *NORMS]),
    (dict(mlp="relu"), ["mlp", "relu", *MLPS]),
    *(
        ({name: value}, [name, value])
        for name in ("block_size", "vocab_size", "vocab_used", "n_layer", "n_head", "n_embd")
        for value in (0, -3)
    ),
    *(({name: -3}, [name, -3]) for name in ("n_kv_head", "mlp_hidden", "window")),
    *((dict(dropout=value), ["dropout", value]) for value in (1.0, -0.1, math.nan)),
    (dict(n_embd=30), ["n_embd 30", "n_head 4", "--n_embd 32"]),
    (dict(n_kv_head=3), ["n_head 4", "n_kv_head 3"]),
    (dict(n_kv_head=8), ["n_head 4", "n_kv_head 8"]),
    (dict(pos="rope", n_embd=12), ["rope", 3]),
    (dict(window=4, window_pattern="SXL"), ["window_pattern", "SXL"]),
    (dict(window_pattern="SL"), ["window_pattern", "--window"]),
    (dict(pos="rope", rope_theta=-1.0), ["rope_theta", -1.0]),
    (dict(pos="rope", rope_theta=0.0), ["rope_theta", 0.0]),
    (dict(norm_eps=-1.0), ["norm_eps", -1.0]),
]


@pytest.mark.parametrize("changes, words", REFUSED, ids=str)
def test_an_impossible_config_is_refused_in_one_line_with_its_values(changes, words):
    with pytest.raises(ValueError) as error:
        tiny(**changes)
    one_line(error, *words)


# ----------------------------------------------------------------------------- size and cost


def analytic_parameters(c):
    """Without the position encoding's own."""
    C, hs, norms = c.n_embd, c.n_embd // c.n_head, 2 if c.norm == "layernorm" and c.bias else 1
    qkv, wide = C + 2 * c.n_kv_head * hs, c.mlp_hidden * (2 if c.mlp == "swiglu" else 1)
    block = C * qkv + C * C + C * wide + c.mlp_hidden * C + 2 * norms * C
    if c.bias:
        block += qkv + C + wide + C
    heads = 1 if c.tie_embeddings else 2
    return heads * c.vocab_size * C + c.n_layer * block + norms * C


@pytest.mark.parametrize("mlp", NAIVE_MLP)
@pytest.mark.parametrize("norm", NAIVE_NORM)
def test_parameters_and_flops_follow_the_formulas(norm, mlp):
    for pos, bias, tied, nkv, (window, pattern) in itertools.product(
        POSITIONS, (True, False), (True, False), (4, 1), WINDOWS
    ):
        config = tiny(
            pos=pos,
            norm=norm,
            mlp=mlp,
            bias=bias,
            tie_embeddings=tied,
            n_kv_head=nkv,
            window=window,
            window_pattern=pattern,
        )
        model, N = GPT(config), analytic_parameters(config)
        table = sum(p.numel() for p in model.transformer.wpe.parameters())
        if pos == "learned":
            assert table == 24 * 16
        assert model.num_params() == N + table
        if not tied:
            N -= 61 * 16  # the embedding is a look-up: only the head multiplies
        spans = {"": [window] * 2, "SL": [3, 0], "LSS": [0, 3]}[pattern]
        for T in (24, 2):
            keys = sum(min(w, T) if w else T for w in spans)
            network = T * table if pos == "fire" else 0  # once for every key
            assert flops_per_token(model, T) == 6 * (N + network) + 12 * 16 * keys
        assert flops_per_token(model) == flops_per_token(model, 24)


def test_gpt2_has_124_million_parameters():
    model = on_meta(GPTConfig(vocab_size=50257))
    assert model.num_params() == 124_439_808
    # 6 N + 12 n_layer n_embd T, N without the 1024 x 768 positions
    assert flops_per_token(model) == 6 * (124_439_808 - 786_432) + 12 * 12 * 768 * 1024


# ----------------------------------------------------------------------------- training, compile


def test_dropout_acts_in_training_only():
    model = build(tiny(dropout=0.3))
    idx = tokens(model.config, 2, 8)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    zero = build(tiny(dropout=0.0))
    assert torch.equal(zero.train()(idx)[0], zero.eval()(idx)[0])


COMPILED = [
    {"mlp": "swiglu", "n_kv_head": 2, "window": 3, "window_pattern": "SL"},
    {"mlp": "relu2", "norm": "rmsnorm", "bias": False, "tie_embeddings": False},
    {},
]


def assert_compiled_equals_eager(config, B=3, T=9, **options):
    torch._dynamo.reset()
    model = build(config)
    compiled = torch.compile(model, fullgraph=True, **options)
    idx, targets = tokens(config, B, T), tokens(config, B, T, seed=2)
    want, loss = model(idx, targets)[1], compiled(idx, targets)[1]
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model, loss), gradients(model, want), rtol=1e-3)


@pytest.mark.parametrize("pos", POSITIONS)
def test_no_graph_breaks(pos):
    """Traced whole, loss included, and run as traced; what the compiler then makes of it is for
    the slow tests below."""
    config = tiny(pos=pos, n_layer=1, mlp="swiglu", n_kv_head=2, window=3)
    assert_compiled_equals_eager(config, backend="eager")


def test_a_second_length_is_traced_too():
    """The compiler then takes the length for a symbol."""
    torch._dynamo.reset()
    model = build(tiny(pos="rope"))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for T in (9, 7, 12):
        idx = tokens(model.config, 2, T)
        torch.testing.assert_close(compiled(idx)[0], model(idx)[0], rtol=1e-5, atol=1e-5)


def cpp_compiler():
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("torch.compile on a CPU needs a C++ compiler, none is on the PATH")


@pytest.mark.slow
@pytest.mark.parametrize("changes", COMPILED, ids=str)
@pytest.mark.parametrize("pos", POSITIONS)
def test_compiled_code_computes_the_same(pos, changes):
    cpp_compiler()
    assert_compiled_equals_eager(tiny(pos=pos, **changes))


@pytest.mark.slow
def test_compiled_loss_of_several_chunks_and_compiled_logits(monkeypatch):
    cpp_compiler()
    config = tiny(block_size=100, pos="rope")
    monkeypatch.setattr(loss_file, "CHUNK_BYTES", 400 * 4 * config.vocab_size)  # 3 chunks
    assert_compiled_equals_eager(config, B=11, T=100)
    model, idx = build(config), tokens(config, 2, 9)
    logits = torch.compile(model, fullgraph=True)(idx)[0]
    torch.testing.assert_close(logits, model(idx)[0], rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------- checkpoints


def write_step(folder, model, **changes):
    """A step folder as the documentation describes it, written without model.py."""
    folder.mkdir(parents=True)
    weights = {k: v.contiguous().clone() for k, v in model.state_dict().items()}
    if model.config.tie_embeddings:
        del weights["lm_head.weight"]
    weights.update(changes)
    save_file({k: v for k, v in weights.items() if v is not None}, folder / "model.safetensors")
    names = [f for f in GPTConfig.__dataclass_fields__]
    config = {"model": {name: getattr(model.config, name) for name in names}, "step": 200}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_comes_back_whole(pos, tied, tmp_path):
    config = tiny(pos=pos, tie_embeddings=tied, n_kv_head=2, mlp="swiglu", window=3)
    model = build(config)
    step = write_step(tmp_path / "run" / "step_000200", model)
    (tmp_path / "run" / "latest").write_text("step_000200\n")
    idx = tokens(config, 1, 6)
    for path in (step, str(step), tmp_path / "run"):
        loaded = GPT.from_pretrained(path)
        assert loaded.config == config and not loaded.training
        assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == tied
        assert torch.equal(loaded(idx)[0], model(idx)[0])
        assert loaded.num_params() == model.num_params()
        loaded(idx, idx)[1].backward()  # and it can be trained on


def test_a_checkpoint_in_bf16_loads_as_fp32(tmp_path):
    model = build(tiny()).bfloat16()
    loaded = GPT.from_pretrained(write_step(tmp_path / "step", model))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight.float())


BROKEN_WEIGHTS = [
    ({"transformer.h.1.mlp.c_fc.bias": None}, ["lacks", "transformer.h.1.mlp.c_fc.bias"]),
    ({"transformer.wte.weight": None}, ["lacks", "transformer.wte.weight"]),
    ({"transformer.h.2.ln_1.weight": torch.ones(16)}, ["unknown", "transformer.h.2.ln_1.weight"]),
    ({"transformer.ln_f.weight": torch.ones(17)}, ["transformer.ln_f.weight", "(17,)", "(16,)"]),
    ({"transformer.wte.weight": torch.ones(60, 16)}, ["wte.weight", "(60, 16)", "(61, 16)"]),
]


@pytest.mark.parametrize("changes, words", BROKEN_WEIGHTS, ids=lambda v: str(v)[:40])
def test_weights_that_do_not_fit_are_refused_in_one_line(changes, words, tmp_path):
    step = write_step(tmp_path / "step", build(tiny()), **changes)
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(step)
    one_line(error, step, *words)


BROKEN_CONFIG = [
    ("{not json", ["config.json"]),
    ("", ["config.json"]),
    ("\udcff", ["config.json"]),
    ("[1, 2]", []),
    ("null", []),
    ('{"model": 3}', []),
    ('{"model": {"n_flux": 3}}', ["n_flux"]),
    ('{"model": {"n_embd": 30, "n_head": 4}}', ["30", "4"]),
    ('{"model_type": "bert"}', ["bert"]),
    ('{"model_type": "gpt2"}', []),
    ("{}", ["model_type"]),
]


@pytest.mark.parametrize("text, words", BROKEN_CONFIG)
def test_a_broken_config_is_refused_in_one_line(text, words, tmp_path):
    step = write_step(tmp_path / "step", build(tiny()))
    (step / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(step)
    one_line(error, *words)


def test_missing_files_are_named_in_one_line(tmp_path, monkeypatch):
    step = write_step(tmp_path / "run" / "step", build(tiny()))
    with pytest.raises(ValueError) as error:  # the run folder of a run that saved nothing
        GPT.from_pretrained(tmp_path / "run")
    one_line(error, "config.json")
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(step / "model.safetensors")
    one_line(error, "model.safetensors", "folder")
    (tmp_path / "run" / "latest").write_text("step_gone")
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(tmp_path / "run")
    one_line(error, "run")
    (step / "model.safetensors").unlink()
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(step)
    one_line(error, "model.safetensors")


def test_a_name_that_is_no_folder_is_refused_without_the_network(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("runs_nowhere", "runs/nowhere/step_000200", "/no/such/folder"):
        with pytest.raises(ValueError) as error:
            GPT.from_pretrained(name)
        one_line(error, name)


class Bomb:
    """Unpickling this creates the file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("dump", [lambda o, p: p.write_bytes(pickle.dumps(o)), torch.save])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt"])
def test_a_pickle_in_place_of_the_weights_is_refused_and_runs_nothing(name, dump, tmp_path):
    step, canary = write_step(tmp_path / "step", build(tiny())), tmp_path / "canary"
    (step / "model.safetensors").unlink()
    dump(Bomb(canary), step / name)
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(step)
    one_line(error, "model.safetensors")
    assert not canary.exists()
    if dump is torch.save:  # the bomb does work
        with open(step / name, "rb") as file:
            torch.load(file, weights_only=False)
    else:
        pickle.loads((step / name).read_bytes())
    assert canary.exists()


def test_a_truncated_safetensors_file_is_refused_in_one_line(tmp_path):
    step = write_step(tmp_path / "step", build(tiny()))
    whole = (step / "model.safetensors").read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        (step / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError) as error:
            GPT.from_pretrained(step)
        one_line(error, "model.safetensors")


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or "LD_PRELOAD" in os.environ, reason="it is glibc's malloc"
)
def test_a_cpu_process_keeps_what_it_freed():
    # the last 256 MB of a block of 2.3 GB: a size that an int holds ends below. Each block is a
    # page smaller than the last: in a hole of its own size there may be no room to align it
    code = """
import resource, torch
from nanoswitch import device
device.tune_cpu(torch.device("cpu"))
faults = []
for pages in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(600 * 2**20 - pages * 1024)[-(2**26):].fill_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    first, *others = map(int, done.stdout.split())
    assert max(others) < first / 100


def test_importing_model_is_quiet_and_light():
    """No optional package is needed to import it."""
    import ast

    tree = ast.parse(Path(m.__file__).read_text())
    names = [
        (n.module if isinstance(n, ast.ImportFrom) else n.names[0].name).split(".")[0]
        for n in tree.body
        if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    assert not {"transformers", "huggingface_hub", "datasets", "tiktoken", "wandb"} & set(names)
    assert not re.search(r"\bprint\(", Path(m.__file__).read_text())
