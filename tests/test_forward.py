"""The forward pass against a model of plain loops written out here, and its parts against what
each must be.

The loops run over POSITIONS, NORMS and MLPS, so a new entry is tested as soon as it is registered.
"""

import cmath
import math
from itertools import product

import pytest
import torch
from builders import GQA, WINDOWS, grown, tiny, tokens

from model import GPT, MLPS, NORMS, GPTConfig

pytestmark = pytest.mark.usefixtures("one_thread")


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


def naive_gelu_erf(x):
    return torch.tensor([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x])


NAIVE_MLP = {
    "gelu": naive_gelu,
    "gelu_erf": naive_gelu_erf,
    "relu2": naive_relu2,
    "swiglu": naive_swiglu,
}


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
    model = grown(tiny(**changes))
    idx = tokens(model.config, 2, 7)
    logits, loss = model(idx)
    assert logits.shape == (2, 7, 61) and loss is None
    for row, want in zip(logits, map(lambda r: naive_logits(model, r), idx.tolist()), strict=True):
        torch.testing.assert_close(row, want, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------- norms, MLPs, dropout


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_reads_one_token_only(norm):
    x = torch.randn(3, 5, 16)
    layer = NORMS[norm](tiny(norm=norm))
    alone = torch.stack([torch.stack([layer(token) for token in row]) for row in x])
    torch.testing.assert_close(layer(x), alone)


def test_bias_false_leaves_no_bias_anywhere():
    for norm, mlp in product(NORMS, MLPS):
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


def test_dropout_acts_in_training_only():
    model = grown(tiny(dropout=0.3))
    idx = tokens(model.config, 2, 8)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    zero = grown(tiny(dropout=0.0))
    assert torch.equal(zero.train()(idx)[0], zero.eval()(idx)[0])
