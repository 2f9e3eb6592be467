"""Which token comes next: temperature, top k and top p against plain lists, and GPT.generate."""

import math

import pytest
import torch
from builders import grown, refused, tiny, tokens

from nanoswitch.generation import draw, sample_token

pytestmark = pytest.mark.usefixtures("one_thread")


def test_padding_ids_are_never_drawn_even_when_they_are_likeliest():
    model = grown(tiny(pos="rope", tie_embeddings=False))
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
    model = grown(tiny(pos="rope"))
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

    def draw(probs, generator):  # each candidate in turn
        nonlocal weights
        weights = probs / probs.sum(1, keepdim=True)
        return torch.full((3, 1), candidate)

    monkeypatch.setattr("nanoswitch.generation.draw", draw)
    while candidate < weights.size(1):
        ids = sample_token(logits, temperature, top_k, top_p)  # (3,)
        found[rows, ids] += weights[:, candidate]
        candidate += 1
    for row, probs in zip(logits.tolist(), found.tolist(), strict=True):
        assert probs == pytest.approx(naive_distribution(row, temperature, top_k, top_p), abs=1e-5)


def test_top_p_zero_keeps_the_likeliest():
    logits = torch.randn(5, 12)
    assert torch.equal(sample_token(logits, 1.0, None, 0.0), logits.argmax(-1))


def test_draws_follow_the_probabilities():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    generator = torch.Generator().manual_seed(0)
    drawn = sample_token(probs.log().expand(20000, 4), 1.0, None, None, generator)
    shares = drawn.bincount(minlength=4) / 20000
    torch.testing.assert_close(shares, probs, rtol=0, atol=0.015)  # four standard errors


@pytest.mark.parametrize("n", [1, 2, 50, 50257])
def test_a_draw_is_torchs_own_number_for_number(n):
    probs = torch.rand(3, n, generator=torch.Generator().manual_seed(0)) ** 4
    probs[0, : n // 2] = 0
    for seed in range(20):
        one, other = (torch.Generator().manual_seed(seed) for _ in range(2))
        assert torch.equal(draw(probs, one), torch.multinomial(probs, 1, generator=other))
        assert torch.equal(one.get_state(), other.get_state())


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_no_numbers_are_an_error_of_one_line(temperature):
    model = grown(tiny())
    model.transformer.ln_f.weight.data[3] = math.nan
    with refused("logits", "not finite"):
        model.generate(tokens(model.config, 2, 4), 3, temperature=temperature)


def test_the_same_generator_seed_gives_the_same_text():
    model = grown(tiny(pos="rope"))
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
    model = grown(tiny(pos="rope"))
    idx = tokens(model.config, 3, 5)
    out = model.generate(idx, 9, temperature=0)
    assert torch.equal(out[:, :5], idx)
    for row in range(3):
        assert torch.equal(out[row], model.generate(idx[row : row + 1], 9, temperature=0)[0])
    same = model.generate(idx[:1].expand(4, 5), 9, temperature=2.0)
    assert len({tuple(row) for row in same.tolist()}) == 4  # samples of one prompt differ
    assert torch.equal(model.generate(idx, 0), idx)
