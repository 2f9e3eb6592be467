"""Who sees whom, by gradients: not the future, not another document, no key beyond the window,
and all that is left."""

from itertools import product

import pytest
import torch
from builders import END, GQA, MASKS, WINDOWS, documents, grown, tiny, tokens

from model import MLPS, NORMS, POSITIONS

pytestmark = pytest.mark.usefixtures("one_thread")


def influence(model, idx, at):
    """(B, T): how strongly the logits of each row's position at move with the token embedded at s.
    Rows are sequences of their own, so a leak between rows shows as well."""
    embedded = []
    hook = model.transformer.wte.register_forward_hook(lambda *a: embedded.append(a[-1]))
    logits, _ = model(idx)
    hook.remove()
    # a plain sum can cancel
    weights = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(3))
    own = logits[torch.arange(len(idx)), at] @ weights
    (grad,) = torch.autograd.grad(own.sum(), embedded)
    return grad.abs().sum(-1)


def influences(model, T=9):
    """(T, T): how strongly the logits of position t move with the token embedded at s."""
    return influence(model, tokens(model.config, 1, T).expand(T, T), torch.arange(T))


@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("pos", POSITIONS)
def test_no_gradient_reaches_the_future(pos, norm, mlp):
    for (window, pattern), n_kv_head in product(WINDOWS, GQA):
        config = tiny(
            pos=pos, norm=norm, mlp=mlp, window=window, window_pattern=pattern, n_kv_head=n_kv_head
        )
        seen = influences(grown(config))
        assert (seen.triu(1) == 0).all(), config  # exactly
        assert (seen.diagonal() > 0).all(), config


@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("W", [1, 2, 4, 8, 9, 20])
def test_a_window_is_exactly_w_keys_itself_included(pos, W):
    distance = torch.arange(9)[:, None] - torch.arange(9)
    seen = influences(grown(tiny(pos=pos, n_layer=1, window=W)))
    assert torch.equal(seen > 0, (distance >= 0) & (distance < W))


def test_windows_reach_further_with_depth_and_a_full_layer_reaches_all():
    distance = torch.arange(9)[:, None] - torch.arange(9)
    two = influences(grown(tiny(pos="rope", n_layer=2, window=3)))
    assert torch.equal(two > 0, (distance >= 0) & (distance < 5))  # W - 1 more keys a layer
    mixed = influences(grown(tiny(pos="rope", n_layer=2, window=3, window_pattern="SL")))
    assert torch.equal(mixed > 0, distance >= 0)


def test_window_pattern_repeats_over_depth():
    assert tiny(n_layer=7, window=5, window_pattern="SSL").windows == [5, 5, 0, 5, 5, 0, 5]
    assert tiny(n_layer=3, window=5, window_pattern="L").windows == [0, 0, 0]
    assert tiny(n_layer=3, window=5).windows == [5, 5, 5]
    assert tiny(n_layer=3).windows == [0, 0, 0]
    assert tiny(n_layer=2, window=5, window_pattern="SLLL").windows == [5, 0]


@pytest.mark.parametrize("changes", MASKS, ids=str)
def test_no_gradient_from_the_future_or_from_another_document(changes):
    model, idx = grown(tiny(**changes)), documents()
    for t in (6, 11, 22):
        grad = influence(model, idx, t)
        assert (grad[:, t + 1 :] == 0).all()
        assert (grad[:, t] > 0).all()
        if changes.get("document_mask"):
            for b, start in ((0, 7), (1, 15)):
                assert (grad[b, : start if t >= start else 0] == 0).all()
                seen = grad[b, start if t >= start else 0 : t]
                assert len(seen) == 0 or (seen > 0).any()


def test_document_mask_makes_documents_independent_of_what_stands_before_them():
    """With relative positions, a document reads the same wherever it stands."""
    model = grown(tiny(pos="rope", document_mask=True))
    document = torch.tensor([[END, 3, 1, 4, 1, 5]])
    before = torch.tensor([[9, 2, 6, 5, 3]])
    alone, _ = model(document)
    after, _ = model(torch.cat((before, document), 1))
    torch.testing.assert_close(after[:, 5:], alone, rtol=1e-4, atol=1e-4)


def test_linformer_reads_its_whole_past_and_summaries_are_of_whole_past_segments():
    config = tiny(attention="linformer", linformer_segment=4, linformer_rank=2, n_layer=1)
    grad = influence(grown(config), documents(), 22)
    assert (grad[:, :23] > 0).all()
    # within one layer a query at the start of a segment reads itself and summaries only: change
    # E's weight for one offset and only that offset's tokens matter less
    model = grown(config)
    for proj in (model.transformer.h[0].attn.e_proj, model.transformer.h[0].attn.f_proj):
        proj.weight.data[:, 1] = 0  # the second token of every segment is left out
    grad = influence(model, documents(), 20)
    assert (grad[:, 1:20:4] == 0).all() and (grad[:, 0:20:4] > 0).all()
