"""The masks that CUDA's kernels take: chunks of a window, and the blocks of FlexAttention."""

import math
from types import SimpleNamespace

import pytest
import torch
from builders import documents, grown, tiny
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import POSITIONS
from nanoswitch import kernels


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("window", [1, 7, 100, 256, 512])
@pytest.mark.parametrize("T", [1024, 1000, 4000])
def test_chunks_of_a_window_can_begin_and_end_at_multiples_of_8(T, window, plain):
    """CUDA's kernel for masks pads rows of another length, which Inductor fails to compile."""
    chunks = kernels.window_chunks(T, window, plain, 8)
    assert [i for rows, _ in chunks for i in range(T)[rows]] == list(range(T))
    for rows, keys in chunks:
        assert rows.start % 8 == keys.start % 8 == keys.stop % 8 == 0
        assert keys.start <= max(0, rows.start - window + 1) and keys.stop == rows.stop
        assert rows.start - window + 1 - keys.start < 8
    if plain:  # the first has no mask: all its queries reach all before them
        assert chunks[0][0] == chunks[0][1] and (window < 8 or chunks[0][0].stop <= window)


def test_such_chunks_attend_to_the_same_keys(monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 400, 8) for _ in range(3))
    pos, plain_chunks = torch.arange(400), kernels.window_chunks
    for window, bias in ((5, None), (20, None), (100, POSITIONS["alibi"](tiny()).bias)):
        want = kernels.sdpa(q, k, v, kernels.window_masks(pos, window, bias), 0.0)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "window_chunks", lambda *args: plain_chunks(*args[:3], 8))
            masks = kernels.window_masks(pos, window, bias)
        assert all(keys.start % 8 == 0 for _, keys, _ in masks)
        torch.testing.assert_close(kernels.sdpa(q, k, v, masks, 0.0), want)


def test_a_bias_of_heads_does_not_take_torchs_math_kernel():
    """Allowed the flash kernel alone, torch refuses what would have gone to the other."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 40, 8) for _ in range(3))
    seen = torch.ones(40, 40, dtype=torch.bool).tril()
    mask = torch.randn(4, 40, 40).masked_fill(~seen, -math.inf)  # (nh, Tq, Tk)
    scores = q @ k.transpose(-2, -1) / math.sqrt(8) + mask
    got = kernels.sdpa(q, k, v, mask, 0.0, [kernels.SDPBackend.FLASH_ATTENTION])
    torch.testing.assert_close(got, scores.softmax(-1) @ v)


@pytest.mark.parametrize("T", [1, 127, 128, 300, 1024])
@pytest.mark.parametrize("window", [0, 1, 5, 128, 200, 600])
@pytest.mark.parametrize("documents", [0, 2, 40])
def test_flex_gets_the_blocks_that_torch_itself_finds(T, window, documents):
    pos, docs = torch.arange(T), ()
    if documents:
        torch.manual_seed(T + window)
        begins = torch.rand(3, T) < documents / T
        begins[0] = False  # one without an end
        docs = (begins.cumsum(1),) * 2
    got, _ = kernels.flex_mask(pos, pos, window, None, *docs)
    want = create_block_mask(got.mask_mod, 3 if documents else None, None, T, T, "cpu")

    def blocks(numbers, indices):
        rows = zip(numbers.flatten().tolist(), indices.flatten(0, 2).tolist(), strict=True)
        return [sorted(row[:n]) for n, row in rows]

    assert got.seq_lengths == want.seq_lengths and got.BLOCK_SIZE == want.BLOCK_SIZE
    for kind in ("kv", "full_kv", "q", "full_q"):
        names = f"{kind}_num_blocks", f"{kind}_indices"
        assert blocks(*(getattr(got, n) for n in names)) == blocks(
            *(getattr(want, n) for n in names)
        )
    if T <= 300:  # and what is seen in them is the mask
        seen = kernels.attention_mask(pos, pos, window, None, *docs)
        b, i, j = torch.meshgrid(
            *map(torch.arange, (len(docs[0]) if docs else 1, T, T)), indexing="ij"
        )
        assert torch.equal(got.mask_mod(b, None, i, j), seen.view(-1, T, T))


def test_the_mask_of_flex_is_never_whole():
    B, T, sizes = 4, 2048, []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    docs = torch.zeros(B, T, dtype=torch.int64)
    with Sizes():
        kernels.flex_mask(torch.arange(T), torch.arange(T), 0, None, docs, docs)
    assert B * (T // 128) ** 2 <= max(sizes) <= T * T / 100


def test_flex_attention_serves_masks_in_a_compiled_graph_on_a_card(monkeypatch):
    class OnCard(list):  # positions
        is_cuda = True

    class OnHost(list):
        is_cuda = False

    def taken(pos, masked=True, learned=False, compiling=True, **attributes):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        attn = dict(kernel=kernels.KERNELS["auto"], may_flex=True, hs=64, dropout=0.0)
        return kernels.takes_flex(SimpleNamespace(**attn | attributes), pos, masked, learned)

    card = OnCard(range(1024))
    assert taken(card)
    assert not taken(OnHost(card)) and not taken(card, compiling=False)
    assert not taken(card, masked=False) and not taken(card, learned=True)
    assert not taken(OnCard(range(100))) and not taken(card, may_flex=False)
    assert not taken(card, hs=8) and not taken(card, dropout=0.1)
    assert not taken(card, kernel=kernels.KERNELS["math"])
    assert taken(OnHost(range(9)), masked=False, kernel=kernels.KERNELS["flex"])


@pytest.mark.parametrize(
    "changes", [dict(window=5), dict(document_mask=True), dict(pos="alibi", window=5, n_kv_head=2)]
)
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@torch.no_grad()
def test_by_flex_attention_a_model_computes_the_same(changes, monkeypatch):
    model, exact = (grown(tiny(**changes, attention_kernel=kernel)) for kernel in ("auto", "math"))
    flex = kernels.flex
    own, seen = model.transformer.h[0].attn.kernel, []
    monkeypatch.setattr("model.takes_flex", lambda attn, *_: attn.kernel is own)
    monkeypatch.setattr(kernels, "flex", lambda *args: (seen.append(args), flex(*args))[1])
    torch.testing.assert_close(model(documents())[0], exact(documents())[0], rtol=1e-4, atol=1e-4)
    assert len(seen) == model.config.n_layer


# ----------------------------------------------------------------------------- shared key heads


def written_out(q, k, v, causal):
    """Query head h attends to key head h // (nh / nkv), one head and one query at a time."""
    B, nh, T, hs = q.shape
    nkv, Tk, rows = k.size(1), k.size(2), []
    for b in range(B):
        for h in range(nh):
            keys, values = k[b, h // (nh // nkv)], v[b, h // (nh // nkv)]
            for t in range(T):
                n = t + 1 if causal else Tk
                weights = (keys[:n] @ q[b, h, t] / math.sqrt(hs)).softmax(0)
                rows.append(weights @ values[:n])
    return torch.stack(rows).view(q.shape)


def heads(T, nkv, dtype, device):
    generator = torch.Generator().manual_seed(nkv)
    shapes = (2, 6, T, 16), (2, nkv, 12, 16), (2, nkv, 12, 16)
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return [x.requires_grad_() for x in drawn]


def check_shared_heads(T, nkv, dtype=torch.float32, device="cpu", tolerance=1e-5):
    q, k, v = heads(T, nkv, dtype, device)
    exact = [x.detach().float().cpu().requires_grad_() for x in (q, k, v)]
    want = written_out(*exact, causal=T > 1)
    got = kernels.sdpa(q, k, v, None, 0.0)
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((got.float() * weights.to(device)).sum(), (q, k, v))
    wanted = torch.autograd.grad((want * weights).sum(), exact)
    for ours, theirs in zip((got, *found), (want, *wanted), strict=True):
        torch.testing.assert_close(ours.float().cpu(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("nkv", [1, 2, 3, 6])
@pytest.mark.parametrize("T", [1, 12])
def test_heads_that_share_keys_copied_or_not(T, nkv, grouped, monkeypatch):
    monkeypatch.setattr(kernels, "takes_groups", lambda *_: grouped)
    check_shared_heads(T, nkv)


@pytest.mark.gpu
@pytest.mark.parametrize("nkv", [1, 2, 3, 6])
@pytest.mark.parametrize("T", [1, 12])
def test_heads_that_share_keys_on_cuda(T, nkv):
    q = heads(T, nkv, torch.bfloat16, "cuda")[0]
    assert kernels.takes_groups(q, None, None)
    check_shared_heads(T, nkv, torch.bfloat16, "cuda", 0.05)
