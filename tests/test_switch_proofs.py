"""Encodings, kernels and attention variants against the papers' formulas; random combinations."""

import copy
import json
import math
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import formulas
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_file
from model import ATTENTIONS, GPT, MLPS, NORMS, POSITIONS, GPTConfig, has_bias
from nanoswitch import counts, decode, kernels
from nanoswitch.cache import KVCache
from nanoswitch.kernels import KERNELS
from nanoswitch.optimizers import make_optimizers
from train_gpt2 import TrainConfig

END = 89  # the end-of-text id of the tiny vocabulary


def tiny(**changes):
    sizes = dict(block_size=32, vocab_size=97, vocab_used=END + 1, n_layer=2, n_head=4, n_embd=32)
    return GPTConfig(**(sizes | changes))


def build(config, seed=0, scale=3.0):
    """A model whose matrices are large enough for attention to be far from uniform."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    for p in model.parameters():
        if p.dim() == 2:
            p.data *= scale
    return model


def tokens(B=2, T=23, seed=1):
    idx = torch.randint(0, END, (B, T), generator=torch.Generator().manual_seed(seed))
    idx[0, 7] = idx[-1, 15] = END
    return idx


# ------------------------------------------------------------------------------- formulas


def test_sinusoidal_is_vaswani_et_al():
    C, T = 10, 7
    got = POSITIONS["sinusoidal"](tiny(n_embd=C, n_head=1)).embed(torch.arange(T)) * math.sqrt(C)
    for pos, i in product(range(T), range(C // 2)):
        angle = pos / 10000 ** (2 * i / C)
        assert got[pos, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
        assert got[pos, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_alibi_slopes_are_the_authors():
    def slopes(n):
        pos, encoding = torch.arange(5), POSITIONS["alibi"](tiny(n_head=n, n_embd=n * 2))
        bias = encoding.bias(pos, pos)
        for i, j in product(range(5), range(5)):
            if j <= i:  # the future is masked elsewhere
                torch.testing.assert_close(bias[:, i, j], (i - j) * bias[:, 1, 0])
        return [-x for x in bias[:, 1, 0].tolist()]

    eight = [2.0**-h for h in range(1, 9)]  # 1/2, 1/4, ..., 1/256
    assert slopes(8) == pytest.approx(eight)
    between = [2 ** (-8 * h / 16) for h in (1, 3, 5, 7)]  # every other slope of sixteen heads
    assert slopes(12) == pytest.approx(eight + between)


@pytest.mark.parametrize("pos", ["kerple", "kerple_power"])
def test_kerple_is_chi_et_al(pos):
    encoding = POSITIONS[pos](tiny(n_head=3, n_embd=6))
    r1, r2 = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.3, 1.0, 1.7])
    encoding.log_r1.data, encoding.log_r2.data = r1.log(), r2.log()
    bias = encoding.bias(torch.arange(9), torch.arange(9))
    for h, i in product(range(3), range(9)):
        for j in range(i + 1):
            a, b, d = r1[h].item(), r2[h].item(), i - j
            want = -a * math.log(1 + b * d) if pos == "kerple" else -a * d**b
            assert bias[h, i, j].item() == pytest.approx(want, abs=1e-5)


def test_kerple_gradients_are_finite_and_its_parameters_stay_positive():
    for pos in ("kerple", "kerple_power"):
        encoding = POSITIONS[pos](tiny())
        encoding.bias(torch.arange(9), torch.arange(9)).sum().backward()
        for p in encoding.parameters():
            assert p.dim() == 1 and torch.isfinite(p.grad).all() and (p.exp() > 0).all()
            assert (p.grad != 0).all()


def test_fire_is_li_et_al():
    torch.manual_seed(0)
    encoding = POSITIONS["fire"](tiny(n_head=3, n_embd=6))
    encoding.c.data.fill_(0.7)
    encoding.L.data.fill_(4.0)
    w1, b1 = encoding.mlp[0].weight[:, 0].tolist(), encoding.mlp[0].bias.tolist()
    w2, b2 = encoding.mlp[2].weight.tolist(), encoding.mlp[2].bias.tolist()
    bias = encoding.bias(torch.arange(9), torch.arange(9))
    for i in range(9):
        for j in range(i + 1):
            x = math.log(0.7 * (i - j) + 1) / math.log(0.7 * max(i, 4.0) + 1)
            hidden = [max(0.0, w * x + b) for w, b in zip(w1, b1, strict=True)]
            for h in range(3):
                want = sum(w * y for w, y in zip(w2[h], hidden, strict=True)) + b2[h]
                assert bias[h, i, j].item() == pytest.approx(want, abs=1e-5)


def test_rope_scaling_divides_positions():
    pos = torch.arange(12)
    plain, half = (POSITIONS["rope"](tiny(pos="rope", rope_scaling=s)) for s in (1.0, 2.0))
    for a, b in zip(half.rotation(2 * pos), plain.rotation(pos), strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------- masks

VARIANTS = [
    dict(pos=pos, n_kv_head=nkv, qk_norm=nkv == 2) | kind
    for pos, nkv, kind in product(
        POSITIONS,
        (0, 2),
        (
            dict(attention="linformer", linformer_segment=4, linformer_rank=2),
            dict(document_mask=True),
            dict(document_mask=True, window=5, window_pattern="SL"),
        ),
    )
]


def input_gradient(model, idx, t):
    """d logits[:, t] / d token embeddings, summed over channels -> (B, T)."""
    x = model.transformer.wte(idx).detach().requires_grad_()
    hook = model.transformer.wte.register_forward_hook(lambda *_: x)
    logits, _ = model(idx)
    hook.remove()
    weights = torch.linspace(-1, 1, logits.size(-1))  # a plain sum can cancel
    (grad,) = torch.autograd.grad((logits[:, t] * weights).sum(), x)
    return grad.abs().sum(-1)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_no_gradient_from_the_future_or_from_another_document(changes):
    model, idx = build(tiny(**changes)), tokens()
    for t in (6, 11, 22):
        grad = input_gradient(model, idx, t)
        assert (grad[:, t + 1 :] == 0).all()
        assert (grad[:, t] > 0).all()
        if changes.get("document_mask"):
            for b, start in ((0, 7), (1, 15)):
                assert (grad[b, : start if t >= start else 0] == 0).all()
                seen = grad[b, start if t >= start else 0 : t]
                assert len(seen) == 0 or (seen > 0).any()


def test_linformer_reads_its_whole_past_and_summaries_are_of_whole_past_segments():
    config = tiny(attention="linformer", linformer_segment=4, linformer_rank=2, n_layer=1)
    grad = input_gradient(build(config), tokens(), 22)
    assert (grad[:, :23] > 0).all()
    # within one layer a query at the start of a segment reads itself and summaries only: change
    # E's weight for one offset and only that offset's tokens matter less
    model = build(config)
    for proj in (model.transformer.h[0].attn.e_proj, model.transformer.h[0].attn.f_proj):
        proj.weight.data[:, 1] = 0  # the second token of every segment is left out
    grad = input_gradient(model, tokens(), 20)
    assert (grad[:, 1:20:4] == 0).all() and (grad[:, 0:20:4] > 0).all()


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize(("T", "window"), [(300, 40), (300, 299), (129, 128), (40, 1)])
@pytest.mark.parametrize("pos", ["rope", "alibi", "fire"])
def test_window_chunks_make_up_the_whole_mask(pos, T, window, document_mask):
    model = build(tiny(pos=pos, window=window, document_mask=document_mask, block_size=T))
    idx, places = tokens(T=T), torch.arange(T)
    idx[1, T // 2] = END
    whole, docs = torch.full((2, 4, T, T), math.nan), (idx == END).cumsum(1)
    chunks, bias = (
        model.masks(places, docs if document_mask else None)[0],
        model.transformer.wpe.bias,
    )
    for rows, keys, mask in chunks:
        n = rows.stop - rows.start
        whole[:, :, rows] = -math.inf
        if mask is None:
            assert (rows, n) == (keys, len(range(T)[keys]))
            mask = torch.ones(n, n, dtype=torch.bool).tril()
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
        whole[:, :, rows, keys] = mask
    away = places[:, None] - places
    see = ((away >= 0) & (away < window)).expand(2, 1, T, T)
    if document_mask:
        document = (idx == END).cumsum(1)
        see = see & (document[:, None, :, None] == document[:, None, None, :])
    scores = bias(places, places) if pos != "rope" else torch.zeros(1, 1, 1)
    want = torch.where(see, scores, -math.inf).expand(2, 4, T, T)
    torch.testing.assert_close(whole, want)
    # linear in T: no chunk meets more keys than its own and a window of those before
    assert all(keys.stop - keys.start < window + rows.stop - rows.start for rows, keys, _ in chunks)


@pytest.mark.parametrize("pos", ["rope", "alibi"])
@pytest.mark.parametrize("window", [1, 40, 192, 300, 499])
def test_attention_in_chunks_has_the_gradients_of_one_masked_product(window, pos):
    T, places, wpe = 500, torch.arange(500), POSITIONS[pos](tiny())
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, T, 8, requires_grad=True) for _ in range(3))
    weights = torch.randn(2, 4, T, 8)
    behind = places[:, None] - places
    slopes = torch.tensor([2.0 ** (-2 * h) for h in range(1, 5)])[:, None, None]
    scores = q @ k.transpose(2, 3) / math.sqrt(8) - (slopes * behind if pos == "alibi" else 0)
    seen = (behind >= 0) & (behind < window)
    want = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v
    chunks = kernels.window_masks(places, window, wpe.bias if has_bias(wpe) else None)
    assert len(chunks) > 2 or window > T / 2
    got = kernels.sdpa(q, k, v, chunks, 0.0)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    found, expected = (torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (got, want))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def decoder(model):
    """What sample.py gives GPT.stream, for any dtype."""
    return partial(decode.decode_step, model)


@pytest.mark.parametrize("pos", POSITIONS)
def test_a_decoder_in_another_dtype_takes_over_after_the_prompt(pos):
    model = build(tiny(pos=pos, window=9, document_mask=True))
    fine, idx = copy.deepcopy(model).double(), tokens()[:, :12]
    want = fine.generate(idx, 15, temperature=0, use_cache=False)
    assert torch.equal(model.generate(idx, 15, temperature=0, decoder=decoder(fine)), want)
    coarse = copy.deepcopy(model)
    for p in coarse.parameters():  # one that surely says something else shows that it is asked
        p.data *= -1
    assert not torch.equal(model.generate(idx, 15, temperature=0, decoder=decoder(coarse)), want)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(pos="rope", mlp="swiglu", bias=False, n_kv_head=2, tie_embeddings=False),
        dict(pos="fire", window=5, window_pattern="SL", document_mask=True),
        dict(attention="linformer", linformer_segment=4, linformer_rank=2),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_half_precision_decoder_says_what_whole_passes_say(changes):
    model, idx = build(tiny(**changes), scale=2.0), tokens()
    for p in model.parameters():
        if p.dim() == 1:  # biases, which begin at 0
            p += 0.1 * torch.randn_like(p)
    cache = KVCache(model, 23)
    model.next_logits(idx[:, :9], cache)
    step = decode.decoder(model, torch.bfloat16, rows=2)(cache)
    for t in range(9, 23):
        want = model(idx[:, : t + 1])[0][:, -1, : model.config.vocab_used]
        got = step(idx[:, t : t + 1])
        assert (got - want).abs().max() < 0.03 * want.abs().max()


class Recorder(TorchDispatchMode):
    """decode.record on a CPU. Like a CUDA graph, what it records is kernels alone: their results
    come to lie where they first did, Python does not run again, and no value reaches it."""

    HOST = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default)

    def __init__(self, step, device):
        super().__init__()
        self.calls = []
        with self:
            self.result = step()

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        assert kernel not in self.HOST, "a value would leave the device, or come from the host"
        out = kernel(*args, **(kwargs or {}))
        self.calls.append((kernel, args, kwargs or {}, out))
        return out

    @torch.inference_mode()  # as in the step: what is made in it may be written only there
    def __call__(self):
        for kernel, args, kwargs, out in self.calls:
            again = kernel(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return self.result


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(decode, "record", Recorder)
    monkeypatch.setattr(decode, "decode_step", decode.GraphedStep)


@pytest.mark.parametrize("changes", [c for c in VARIANTS if "attention" not in c], ids=str)
def test_a_recorded_step_decodes_as_whole_passes_do(changes, recorded):
    config = tiny(**changes)
    model, idx = build(config), tokens()[:, :7]
    new = 16 if POSITIONS[config.pos].extrapolates else config.block_size - 7
    want = model.generate(idx, new, temperature=0, use_cache=False)
    assert torch.equal(model.generate(idx, new, temperature=0, decoder=decoder(model)), want)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.filterwarnings("error:no CUDA graph")
def test_a_cuda_graph_decodes_as_whole_passes_do(changes):
    model, idx = build(tiny(**changes)).cuda(), tokens()[:, :7].cuda()
    want = model.generate(idx, 16, temperature=0, use_cache=False)
    assert torch.equal(model.generate(idx, 16, temperature=0, decoder=decoder(model)), want)


def test_where_nothing_can_be_recorded_decoding_goes_on_without(monkeypatch):
    def fails(*args):
        raise RuntimeError("not permitted\nwhen capturing")

    monkeypatch.setattr(decode, "GraphedStep", fails)
    model, on_card = build(tiny()), torch.device("cuda")
    cache = SimpleNamespace(device=on_card, to=lambda dtype: None)
    with pytest.warns(UserWarning, match="no CUDA graph .not permitted when capturing.: decoding"):
        step = decode.decode_step(model, cache)
    assert step.func == decode.in_own_dtype and step.args == (model, cache) and not cache.static


def test_a_recorded_step_still_knows_the_models_last_position(recorded):
    model, idx = build(tiny(block_size=12)), tokens()[:, :8]
    with pytest.raises(ValueError, match="13 tokens are more than block_size 12"):
        model.generate(idx, 6, temperature=0, decoder=decoder(model))
    full = tokens()[:, :12]
    with pytest.raises(ValueError, match="13 tokens are more than block_size 12"):
        model.generate(full, 2, temperature=0, decoder=decoder(model))
    whole = model.generate(full, 1, temperature=0, decoder=decoder(model))
    assert torch.equal(whole, model.generate(full, 1, temperature=0, use_cache=False))


def test_linformer_equals_attention_over_summaries_written_out():
    S, R, T, nh = 3, 2, 8, 2
    config = tiny(
        attention="linformer", linformer_segment=S, linformer_rank=R, n_head=nh, n_embd=8,
        n_layer=1, pos="none",
    )  # fmt: skip
    model = build(config)
    attn, x = model.transformer.h[0].attn, torch.randn(1, T, 8)
    masks = model.masks(torch.arange(T))
    got = attn(x, None, masks[0])[0]
    q, k, v = attn.c_attn(x[0]).split(8, dim=1)
    for t in range(T):
        heads = []
        for h in range(nh):
            c = slice(4 * h, 4 * h + 4)
            keys, values = [], []
            for s in range(t // S):  # past segments, as R weighted sums
                rows = slice(s * S, s * S + S)
                keys += list(attn.e_proj.weight @ k[rows, c])
                values += list(attn.f_proj.weight @ v[rows, c])
            for j in range(t // S * S, t + 1):
                keys.append(k[j, c])
                values.append(v[j, c])
            weights = torch.softmax(torch.stack(keys) @ q[t, c] / math.sqrt(4), dim=0)
            heads.append(weights @ torch.stack(values))
        want = attn.c_proj(torch.cat(heads))
        torch.testing.assert_close(got[t], want, rtol=1e-4, atol=1e-5)


def test_document_mask_makes_documents_independent_of_what_stands_before_them():
    """With relative positions, a document reads the same wherever it stands."""
    model = build(tiny(pos="rope", document_mask=True))
    document = torch.tensor([[END, 3, 1, 4, 1, 5]])
    before = torch.tensor([[9, 2, 6, 5, 3]])
    alone, _ = model(document)
    after, _ = model(torch.cat((before, document), 1))
    torch.testing.assert_close(after[:, 5:], alone, rtol=1e-4, atol=1e-4)


FLEX = [
    dict(attention_kernel="flex", pos="rope", window=5, window_pattern="SL"),
    dict(attention_kernel="flex", pos="alibi", document_mask=True),
]


@pytest.mark.parametrize("changes", VARIANTS + FLEX, ids=str)
def test_cached_equals_uncached(changes):
    model, idx = build(tiny(**changes)), tokens()
    with torch.no_grad():
        want, _ = model(idx)
        for chunks in ([5, 1, 1, 9, 1, 6], [1] * 23, [3, 4, 4, 4, 8]):
            cache, start, got = KVCache(model, 23), 0, []
            for n in chunks:
                got.append(model.logits(model.features(idx[:, start : start + n], cache)))
                start += n
            torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------- kernels

KERNEL_CASES = [
    dict(pos=pos, n_kv_head=nkv, document_mask=doc) | window
    for pos, nkv, doc, window in product(
        ("rope", "alibi", "fire"), (0, 2), (False, True), ({}, dict(window=5, window_pattern="SL"))
    )
]


@pytest.mark.parametrize("changes", KERNEL_CASES, ids=str)
def test_kernels_agree(changes):
    idx, results = tokens(T=32), {}
    for kernel in KERNELS:
        try:
            config = tiny(n_embd=64, attention_kernel=kernel, **changes)
        except ValueError:
            assert kernel == "flash"  # which can only do plain causal attention
            continue
        model = build(config)
        if kernel == "flex":  # has no backward pass on a CPU
            with torch.no_grad():
                results[kernel] = model(idx)[0], {}
            continue
        logits, _ = model(idx)
        logits.square().mean().backward()
        results[kernel] = logits.detach(), {n: p.grad for n, p in model.named_parameters()}
    logits, grads = results.pop("math")
    assert {"auto", "flex"} <= results.keys()
    for others, other_grads in results.values():
        torch.testing.assert_close(others, logits, rtol=1e-4, atol=1e-4)
        for name, grad in other_grads.items():
            torch.testing.assert_close(grad, grads[name], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", KERNEL_CASES, ids=str)
def test_kernels_agree_on_cuda(changes):
    idx, results = tokens(T=32).cuda(), {}
    for kernel in ("math", "auto", "flex"):
        config = tiny(n_embd=64, attention_kernel=kernel, **changes)
        model = build(config).cuda()
        logits, _ = model(idx)
        logits.square().mean().backward()
        results[kernel] = logits, {n: p.grad for n, p in model.named_parameters()}
    for kernel in ("auto", "flex"):
        torch.testing.assert_close(results[kernel][0], results["math"][0], rtol=1e-3, atol=1e-3)
        for name, grad in results[kernel][1].items():
            torch.testing.assert_close(grad, results["math"][1][name], rtol=1e-2, atol=1e-3)


def test_flash_is_used_where_it_can_be():
    model, idx = build(tiny(pos="rope", attention_kernel="flash")), tokens()
    other = build(tiny(pos="rope", attention_kernel="math"))
    torch.testing.assert_close(model(idx)[0], other(idx)[0], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------- smaller switches


def test_qk_norm_divides_by_the_root_mean_square_of_each_head():
    model, plain = build(tiny(qk_norm=True, pos="none")), build(tiny(pos="none"))
    attn, x, hs = plain.transformer.h[0].attn, torch.randn(1, 5, 32), 8
    q, k, v = (p.view(5, 4, hs) for p in attn.c_attn(x[0]).split(32, dim=1))
    q, k = (y / y.square().mean(-1, keepdim=True).sqrt() for y in (q, k))
    scores = torch.einsum("qhc,khc->hqk", q, k) / math.sqrt(hs)
    scores += torch.full((5, 5), -math.inf).triu(1)
    want = attn.c_proj(torch.einsum("hqk,khc->qhc", scores.softmax(-1), v).reshape(5, 32))
    got = model.transformer.h[0].attn(x, None, None)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_softcap_bounds_logits_in_loss_and_sampling():
    cap = 2.0
    model, plain, idx = build(tiny(logit_softcap=cap), scale=20), build(tiny(), scale=20), tokens()
    raw, _ = plain(idx)
    logits, _ = model(idx)
    torch.testing.assert_close(logits, cap * torch.tanh(raw / cap))
    assert raw.abs().max() > 2 * cap
    targets = idx.roll(-1, 1)
    _, loss = model(idx, targets)
    loss.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    want = F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten())
    want.backward()
    torch.testing.assert_close(loss, want)
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-3, atol=1e-5)


def test_zero_init_starts_every_block_as_the_identity():
    torch.manual_seed(0)
    model = GPT(tiny(zero_init=True))
    x = torch.randn(1, 5, 32)
    assert torch.equal(model.transformer.h[0](x, None, None), x)
    torch.manual_seed(0)
    plain = GPT(tiny()).state_dict()
    for name, w in model.state_dict().items():
        assert torch.equal(w, plain[name]) or name.endswith("c_proj.weight")


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(pos="fire", attention_kernel="flash"), "flash knows only plain causal attention"),
        (dict(window=4, attention_kernel="flash"), "flash knows only plain causal attention"),
        (dict(document_mask=True, attention_kernel="flash"), "use auto"),
        (dict(attention="linformer", window=4), "drop window"),
        (dict(attention="linformer", document_mask=True), "drop window and document_mask"),
        (dict(attention="linformer", attention_kernel="flex"), "use auto"),
        (dict(attention_kernel="flex", dropout=0.1), "dropout"),
        (dict(attention="sparse"), "none of: full, linformer"),
        (dict(rope_scaling=0.0), "rope_scaling"),
        (dict(logit_softcap=-1.0), "logit_softcap"),
        (dict(linformer_segment=0), "linformer_segment is 0"),
    ],
    ids=str,
)
def test_combinations_that_cannot_be_say_why_in_one_line(changes, words):
    with pytest.raises(ValueError) as error:
        tiny(**changes)
    assert words in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------- any combination


@st.composite
def configs(draw):
    n_kv_head = draw(st.sampled_from([1, 2, 4]))
    n_head = n_kv_head * draw(st.sampled_from([1, 2, 3]))
    changes = dict(
        n_layer=draw(st.integers(1, 3)), n_head=n_head, n_kv_head=n_kv_head,
        n_embd=n_head * draw(st.sampled_from([4, 8])), block_size=draw(st.sampled_from([16, 32])),
        pos=draw(st.sampled_from(sorted(POSITIONS))), norm=draw(st.sampled_from(sorted(NORMS))),
        mlp=draw(st.sampled_from(sorted(MLPS))), bias=draw(st.booleans()),
        attention=draw(st.sampled_from(sorted(ATTENTIONS))),
        tie_embeddings=draw(st.booleans()), qk_norm=draw(st.booleans()),
        logit_softcap=draw(st.sampled_from([0.0, 15.0])), zero_init=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.1])), linformer_segment=draw(st.integers(1, 9)),
    )  # fmt: skip
    if changes["attention"] == "full":
        changes["window"] = draw(st.sampled_from([0, 1, 5, 100]))
        changes["document_mask"] = draw(st.booleans())
        if changes["window"]:
            changes["window_pattern"] = draw(st.sampled_from(["", "SL", "SSSL"]))
    return tiny(**changes)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(configs())
def test_any_valid_config_trains_counts_and_comes_back(tmp_path_factory, config):
    torch.manual_seed(0)
    model, idx = GPT(config), tokens(T=config.block_size)
    assert model.num_params() == formulas.parameters(config)
    assert counts.flops_per_token(model) == formulas.flops_per_token(config)
    [optimizer] = make_optimizers(model, TrainConfig(lr=1e-3))
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert (p.dim() >= 2) == (group["weight_decay"] > 0)
    _, loss = model(idx, idx.roll(-1, 1))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    optimizer.step()
    folder = tmp_path_factory.mktemp("step")
    weights = {k: v for k, v in model.state_dict().items()
               if not (config.tie_embeddings and k == "lm_head.weight")}  # fmt: skip
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model": asdict(config)}))
    again, _ = GPT.from_pretrained(folder)(idx)
    torch.testing.assert_close(again, model.eval()(idx)[0], rtol=0, atol=0)
    assert torch.isfinite(again).all()


# ------------------------------------------------------------------------------- an eighth encoding

TOY = '''
class Toy(NoPosition):
    """The score falls by the square root of the distance."""

    def bias(self, q_pos, k_pos):
        return -distances(q_pos, k_pos).sqrt()[None].expand(self.nh, -1, -1)

    def __init__(self, config):
        super().__init__(config)
        self.nh = config.n_head


'''


def test_another_encoding_is_one_class_and_one_line(tmp_path):
    """The diff: Toy and its line in POSITIONS. Flags, help, checks and the model follow."""
    source = Path(model_file.__file__).read_text()
    source = source.replace("POSITIONS = {\n", TOY + 'POSITIONS = {\n    "toy": Toy,\n', 1)
    (tmp_path / "model.py").write_text(source)
    (tmp_path / "try.py").write_text(
        "import torch\n"
        "from model import GPT, GPTConfig\n"
        "from nanoswitch import cli\n"
        "from nanoswitch.cache import KVCache\n"
        "config = cli.parse(GPTConfig)\n"
        "model, idx = GPT(config).eval(), torch.arange(10)[None]\n"
        "cache, out = KVCache(model, 10), model.generate(idx, 5, temperature=0)\n"
        "assert torch.equal(out, model.generate(idx, 5, temperature=0, use_cache=False))\n"
        "model(idx, idx)[1].backward()\n"
        "print(config.pos)\n"
    )
    here = str(Path(model_file.__file__).parent)

    def run(*flags):
        sizes = ("--n_layer=1", "--n_head=2", "--n_embd=8", "--vocab_size=64")
        return subprocess.run(
            [sys.executable, str(tmp_path / "try.py"), *sizes, *flags],
            capture_output=True, text=True, env={"PYTHONPATH": here, "PATH": "", "COLUMNS": "200"},
        )  # fmt: skip

    done = run("--pos=toy")
    assert done.stdout.strip() == "toy", done.stderr
    assert "toy" in run("--help").stdout
    wrong = run("--pos=tox")
    assert wrong.returncode == 2 and "'toy'" in wrong.stderr
    refused = run("--pos=toy", "--attention_kernel=flash")
    assert refused.returncode == 2 and "pos 'toy'" in refused.stderr


# ------------------------------------------------------------------------------- compilation

WHOLE_GRAPHS = [  # test_model.py has every encoding
    dict(pos="rope", n_kv_head=2, mlp="swiglu", norm="rmsnorm", bias=False),
    dict(pos="fire", window=4, window_pattern="SL"),
    dict(attention="linformer", linformer_segment=8, linformer_rank=2),
    dict(document_mask=True, mlp="relu2", dropout=0.1),
    dict(qk_norm=True, logit_softcap=5.0, attention_kernel="math"),
    dict(pos="rope", attention_kernel="flash", tie_embeddings=False),
]


@pytest.mark.parametrize("changes", WHOLE_GRAPHS, ids=str)
def test_training_evaluation_and_sampling_are_whole_graphs(changes):
    torch._dynamo.reset()
    model, idx = build(tiny(n_layer=1, **changes)), tokens()
    # fullgraph raises at a graph break; the "eager" backend leaves code generation out
    compiled = torch.compile(model.train(), fullgraph=True, backend="eager")
    compiled(idx, idx)[1].backward()
    model.eval()
    with torch.no_grad():
        compiled(idx, idx)
        features = torch.compile(model.features, fullgraph=True, backend="eager")
        cache, want = KVCache(model, 12), model.features(idx[:, :12])
        chunks = idx[:, :9], idx[:, 9:10], idx[:, 10:11], idx[:, 11:12]
        got = [features(chunk, cache) for chunk in chunks]
        torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)
