"""Text from a model: the prompt once, then token by token on a cache."""

import functools

import torch
from torch.nn.attention import sdpa_kernel

from nanoswitch.cache import KVCache
from nanoswitch.kernels import ANY_LENGTH


class Generation:
    """What GPT inherits to generate: it needs features, logits and config."""

    @torch.no_grad()
    def stream(
        self,
        idx,
        max_new_tokens,
        temperature=1.0,
        top_k=None,
        top_p=None,
        use_cache=True,
        generator=None,
        decoder=None,
    ):
        """Yield the next token of every row of idx (B, T), (B,) at a time.

        temperature 0 takes the likeliest token; top_k keeps the k likeliest, top_p the fewest
        likeliest whose probabilities reach p. Padding ids (vocab_used and up) are never drawn.
        decoder: what takes over after the prompt, see nanoswitch/decode.py: from the cache, the
        draw and its generator it makes a function of the newest tokens (B, 1) -> the next (B,).
        """
        cache = KVCache(self, idx.size(1) + max_new_tokens) if use_cache else None
        options = dict(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        pick = functools.partial(sample_token, **options)
        step, seen = functools.partial(self.next_token, pick=pick, cache=cache), idx
        for i in range(max_new_tokens):
            if i == 1 and decoder is not None:
                step = decoder(cache, pick, generator)
            token = step(seen)  # (B,)
            seen = token[:, None] if use_cache else torch.cat((seen, token[:, None]), dim=1)
            yield token

    def next_token(self, idx, pick, cache=None):
        """idx (B, T) -> (B,): what pick makes of next_logits. ValueError if one is not finite."""
        logits = self.next_logits(idx, cache)
        if not logits.isfinite().all():
            raise ValueError(
                "the model's logits are not finite numbers: its weights are broken; take an older "
                "checkpoint"
            )
        return pick(logits)

    def next_logits(self, idx, cache=None, pos=None):
        """idx (B, T), pos (T,) as for features -> (B, V used) fp32, the logits of what follows."""
        with sdpa_kernel(ANY_LENGTH):
            x = self.features(idx, cache, pos)
        return self.logits(x[:, -1]).float()[:, : self.config.vocab_used]

    def generate(self, idx, max_new_tokens, *args, **kwargs):
        """idx (B, T) -> (B, T + max_new_tokens); the options are those of stream."""
        new = [token[:, None] for token in self.stream(idx, max_new_tokens, *args, **kwargs)]
        return torch.cat([idx, *new], dim=1)


def sample_token(logits, temperature, top_k, top_p, generator=None):
    """Draw one token a row: logits (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    nucleus = top_p is not None and top_p < 1
    ids = None  # of the candidates, the likeliest first: to draw from a few is much faster
    if top_k:
        logits, ids = logits.topk(min(top_k, logits.size(-1)))
    elif nucleus:
        logits, ids = logits.sort(descending=True)
    probs = (logits / temperature).softmax(-1)
    if nucleus:
        before = probs.cumsum(-1) - probs  # of the likeliest exactly 0, so it stays
        probs = probs.masked_fill(before >= max(top_p, 1e-30), 0)  # reached without this token
    drawn = draw(probs, generator)  # (B, 1)
    return (drawn if ids is None else ids.gather(1, drawn))[:, 0]


def draw(probs, generator=None):
    """torch.multinomial for one draw a row, number for number, but without its checks, for which
    the host waits: probs (B, n) of any sum -> (B, 1). Of p_i / e_i with e_i from Exp(1) the i-th is
    largest with a probability proportional to p_i."""
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1, True)
