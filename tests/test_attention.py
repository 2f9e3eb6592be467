"""Attention's variants against the same written out here, and its kernels against one another."""

import math
from itertools import product

import pytest
import torch
from builders import END, documents, grown, tiny, tokens

from model import GPT, POSITIONS, has_bias
from nanoswitch.kernels import KERNELS, sdpa, window_masks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_gqa_equals_attention_whose_keys_and_values_are_repeated(n_kv_head):
    config = tiny(pos="rope", n_kv_head=n_kv_head)
    model, plain = grown(config), grown(tiny(pos="rope"))
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


def test_qk_norm_divides_by_the_root_mean_square_of_each_head():
    model, plain = (
        grown(tiny(n_embd=32, qk_norm=True, pos="none")),
        grown(tiny(n_embd=32, pos="none")),
    )
    attn, x, hs = plain.transformer.h[0].attn, torch.randn(1, 5, 32), 8
    q, k, v = (p.view(5, 4, hs) for p in attn.c_attn(x[0]).split(32, dim=1))
    q, k = (y / y.square().mean(-1, keepdim=True).sqrt() for y in (q, k))
    scores = torch.einsum("qhc,khc->hqk", q, k) / math.sqrt(hs)
    scores += torch.full((5, 5), -math.inf).triu(1)
    want = attn.c_proj(torch.einsum("hqk,khc->qhc", scores.softmax(-1), v).reshape(5, 32))
    got = model.transformer.h[0].attn(x, None, None)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_linformer_equals_attention_over_summaries_written_out():
    S, R, T, nh = 3, 2, 8, 2
    config = tiny(
        attention="linformer", linformer_segment=S, linformer_rank=R, n_head=nh, n_embd=8,
        n_layer=1, pos="none",
    )  # fmt: skip
    model = grown(config)
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


# ----------------------------------------------------------------------------- windows


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize(("T", "window"), [(300, 40), (300, 299), (129, 128), (40, 1)])
@pytest.mark.parametrize("pos", ["rope", "alibi", "fire"])
def test_window_chunks_make_up_the_whole_mask(pos, T, window, document_mask):
    model = grown(tiny(pos=pos, window=window, document_mask=document_mask, block_size=T))
    idx, places = documents(T=T), torch.arange(T)
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
    chunks = window_masks(places, window, wpe.bias if has_bias(wpe) else None)
    assert len(chunks) > 2 or window > T / 2
    got = sdpa(q, k, v, chunks, 0.0)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    found, expected = (torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (got, want))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------- kernels


KERNEL_CASES = [
    dict(pos=pos, n_kv_head=nkv, document_mask=doc) | window
    for pos, nkv, doc, window in product(
        ("rope", "alibi", "fire"), (0, 2), (False, True), ({}, dict(window=5, window_pattern="SL"))
    )
]


@pytest.mark.parametrize("changes", KERNEL_CASES, ids=str)
def test_kernels_agree(changes):
    idx, results = documents(T=32), {}
    for kernel in KERNELS:
        try:
            config = tiny(n_embd=64, block_size=32, attention_kernel=kernel, **changes)
        except ValueError:
            assert kernel == "flash"  # which can only do plain causal attention
            continue
        model = grown(config)
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
    idx, results = documents(T=32).cuda(), {}
    for kernel in ("math", "auto", "flex"):
        config = tiny(n_embd=64, block_size=32, attention_kernel=kernel, **changes)
        model = grown(config).cuda()
        logits, _ = model(idx)
        logits.square().mean().backward()
        results[kernel] = logits, {n: p.grad for n, p in model.named_parameters()}
    for kernel in ("auto", "flex"):
        torch.testing.assert_close(results[kernel][0], results["math"][0], rtol=1e-3, atol=1e-3)
        for name, grad in results[kernel][1].items():
            torch.testing.assert_close(grad, results["math"][1][name], rtol=1e-2, atol=1e-3)


def test_flash_is_used_where_it_can_be():
    model, idx = grown(tiny(pos="rope", attention_kernel="flash")), documents()
    other = grown(tiny(pos="rope", attention_kernel="math"))
    torch.testing.assert_close(model(idx)[0], other(idx)[0], rtol=1e-4, atol=1e-4)
