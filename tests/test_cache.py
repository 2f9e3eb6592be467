"""A pass through the KV cache against the same pass without it."""

import pytest
import torch
import torch.nn.functional as F
from builders import GQA, MASKS, WINDOWS, documents, grown, refused, tiny, tokens

from model import POSITIONS
from nanoswitch.cache import KVCache

pytestmark = pytest.mark.usefixtures("one_thread")


def cached_logits(model, idx, chunks):
    """Feed idx in pieces of the given sizes through a cache -> the logits of every position."""
    cache, parts = KVCache(model, idx.size(1)), []
    with torch.no_grad():
        for piece in idx.split(chunks, dim=1):
            parts.append(model.logits(model.features(piece, cache)))
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
    model, T = grown(config), 16
    idx = tokens(config, 2, T)
    with torch.no_grad():
        want = model(idx)[0]
    # 16 positions wrap a ring of 3 five times; chunks shorter, equal and longer than it
    for chunks in ([5] + [1] * 11, [1, 1, 6, 2, 1, 5], [3, 3, 3, 7], [16]):
        got = cached_logits(model, idx, chunks)
        torch.testing.assert_close(
            got, want, rtol=1e-4, atol=1e-4, msg=lambda s, c=chunks: f"{c}: {s}"
        )


FLEX = [
    dict(attention_kernel="flex", pos="rope", window=5, window_pattern="SL"),
    dict(attention_kernel="flex", pos="alibi", document_mask=True),
]


@pytest.mark.parametrize("changes", MASKS + FLEX, ids=str)
def test_cached_equals_uncached(changes):
    model, idx = grown(tiny(**changes)), documents()
    with torch.no_grad():
        want, _ = model(idx)
        for chunks in ([5, 1, 1, 9, 1, 6], [1] * 23, [3, 4, 4, 4, 8]):
            cache, start, got = KVCache(model, 23), 0, []
            for n in chunks:
                got.append(model.logits(model.features(idx[:, start : start + n], cache)))
                start += n
            torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pos", POSITIONS)
def test_generation_far_beyond_the_window_and_the_block_is_the_same_with_a_cache(pos):
    room = 30 if POSITIONS[pos].extrapolates else 0
    for window, pattern in ((3, ""), (5, "LSS")):
        config = tiny(pos=pos, window=window, window_pattern=pattern, block_size=24)
        model = grown(config)
        idx, new = tokens(config, 2, 4), 20 + room
        plain = model.generate(idx, new, temperature=0, use_cache=False)
        assert plain.shape == (2, 4 + new)
        assert torch.equal(model.generate(idx, new, temperature=0), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_holds_windows_and_key_heads_only(dtype):
    config = tiny(pos="rope", n_layer=3, window=5, window_pattern="SL", n_kv_head=2)
    model = grown(config).to(dtype)
    cache = KVCache(model, 24)
    with torch.no_grad():
        model.features(tokens(config, 3, 9), cache)
    held = [t.numel() * t.element_size() for layer in cache.layers for t in layer.tensors]
    B, nkv, hs, size = 3, 2, 4, dtype.itemsize
    assert held == [B * nkv * n * hs * size for n in (5, 5, 24, 24, 5, 5)]


def test_a_full_cache_says_so():
    model = grown(tiny(pos="rope"))
    cache = KVCache(model, 4)
    model.features(tokens(model.config, 1, 3), cache)
    with refused(4, 2):
        model.features(tokens(model.config, 1, 2), cache)


# ----------------------------------------------------------------------------- in bf16


@pytest.mark.parametrize("pos", POSITIONS)
def test_autocast_and_bf16_weights_generate_with_a_cache(pos):
    config = tiny(pos=pos, window=3, window_pattern="SL", n_kv_head=2)
    model = grown(config)
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
    model = grown(config)
    idx = tokens(config, 2, 6)
    want = model(idx)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rough = cached_logits(model, idx, [4, 1, 1])
    assert (rough - want).abs().mean() < 0.1 * want.abs().mean()
