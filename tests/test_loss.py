"""The loss in chunks of rows, and its gradients, against cross-entropy of whole logits."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from builders import assert_same_gradients, documents, gradients, grown, tiny, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, POSITIONS
from nanoswitch.loss import MeanCrossEntropy, loss_chunks

pytestmark = pytest.mark.usefixtures("one_thread")


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
    model = grown(tiny(block_size=100, **changes))
    monkeypatch.setattr("nanoswitch.loss.CHUNK_BYTES", 400 * 4 * model.config.vocab_size)
    chunks = loss_chunks(torch.empty(B * T, 1), model.lm_head.weight)
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


def test_softcap_bounds_logits_in_loss_and_sampling():
    cap = 2.0
    model, plain, idx = grown(tiny(logit_softcap=cap)), grown(tiny()), documents()
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


@pytest.mark.parametrize("N", [0, 1, 1333, 1334, 1335, 8192, 2**18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_is_in_exactly_one_chunk(N, dtype):
    x, w = torch.empty(N, 8, dtype=dtype), torch.empty(50304, 8, dtype=dtype)
    chunks = loss_chunks(x, w)
    assert [i for s in chunks for i in range(N)[s]] == list(range(N))
    assert all(len(range(N)[s]) * 50304 * dtype.itemsize <= 2**28 for s in chunks)
    narrow = loss_chunks(x, w[:16])
    assert all(len(range(N)[s]) <= 4096 for s in narrow)


def test_chunks_are_larger_on_a_card():
    class OnCard(torch.Tensor):
        is_cuda = True

    x, w = (torch.empty(N, 8, dtype=torch.bfloat16) for N in (2**16, 50304))
    assert len(loss_chunks(x, w)) == 25 and len(loss_chunks(x.as_subclass(OnCard), w)) == 16
    wide = torch.empty(2**18, 8, dtype=torch.bfloat16)
    chunks = loss_chunks(x.as_subclass(OnCard), wide)
    assert max(len(range(2**16)[rows]) for rows in chunks) * 2**18 * 2 <= 2**29


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradients_on_cuda(dtype, monkeypatch):
    monkeypatch.setattr("nanoswitch.loss.CHUNK_BYTES", 100 * 997 * dtype.itemsize)  # 2 chunks
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(N, 64, generator=generator) for N in (300, 997))
    x, targets = x.to(dtype), torch.randint(997, (300,), generator=generator)
    targets[::7] = -1
    ours = x.cuda().requires_grad_(), weight.cuda().requires_grad_()
    loss = MeanCrossEntropy.apply(*ours, targets.cuda(), 0.0)
    exact = x.float().requires_grad_(), weight.requires_grad_()
    want = F.cross_entropy(exact[0] @ exact[1].T, targets, ignore_index=-1)
    for scale in (loss * 1024, want * 1024):
        scale.backward()
    rtol = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(loss.cpu(), want, rtol=rtol, atol=rtol)
    for got, true in zip(ours, exact, strict=True):
        error = (got.grad.cpu().float() - true.grad).norm()
        assert error < rtol * true.grad.norm() and got.grad.dtype == got.dtype


def test_the_logits_are_never_whole():
    """The largest tensor that the loss makes has a chunk's rows, not all of them."""
    sizes = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in [out] if isinstance(t, torch.Tensor))
            return out

    x = torch.randn(4096, 8, requires_grad=True)
    weight = torch.randn(50304, 8, requires_grad=True)
    with Largest():
        MeanCrossEntropy.apply(x, weight, torch.randint(50304, (4096,)), 0.0).backward()
    assert max(sizes) <= 2**28 / 4 < 4096 * 50304 / 3


@pytest.mark.parametrize("grad", [True, False])
def test_no_targets_at_all_is_a_loss_of_zero(grad):
    model = grown(tiny())
    with torch.set_grad_enabled(grad):
        loss = model(tokens(model.config, 2, 5), torch.full((2, 5), -1))[1]
    assert loss.item() == 0
    if grad:
        assert all((g == 0).all() for g in gradients(model, loss).values())


def test_token_losses_are_cross_entropies_position_by_position():
    model = grown(tiny())
    idx, targets = tokens(model.config, 3, 8), tokens(model.config, 3, 8, seed=2)
    targets[0, :5] = targets[2] = -1
    got = model.token_losses(model.features(idx), targets)
    logp = model(idx)[0].double().log_softmax(-1)
    for b, t in product(range(3), range(8)):
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


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_residual_stream_in_bf16_stays_close_to_fp32(norm):
    torch.manual_seed(0)
    model, seen = GPT(tiny(norm=norm, residual_dtype="autocast", dropout=0.0)), []
    idx = tokens(model.config, 4, 20)
    want = reference_loss(model, idx, idx)
    for block in model.transformer.h:
        block.register_forward_hook(lambda block, inputs, x: seen.append(x.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, idx)[1]
    assert set(seen) == {torch.bfloat16} and loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), abs=0.01)
    exact, rough = gradients(model, want), gradients(model, loss)
    for name, g in exact.items():
        assert rough[name].dtype == torch.float32
        assert (rough[name] - g).norm() < 0.05 * g.norm(), name
    torch.testing.assert_close(model(idx, idx)[1], want)  # without autocast nothing changes


def test_the_sum_over_very_many_rows_fits_fp16():
    """All features 16, all gradients about 1: the sum over more than 4,096 rows, which a vocabulary
    so small would let into one chunk, is more than fp16 can hold."""
    N, V = 2**15, 8
    x = torch.full((N, 1), 16.0, dtype=torch.float16, requires_grad=True)
    weight, targets = torch.zeros(V, 1, requires_grad=True), torch.zeros(N, dtype=torch.int64)
    MeanCrossEntropy.apply(x, weight, targets, 0.0).backward()
    want = torch.full((V, 1), 16 / V)
    want[0] -= 16
    torch.testing.assert_close(weight.grad, want, rtol=2e-3, atol=0)
