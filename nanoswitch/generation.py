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
        decoder: what takes over after the prompt, see nanoswitch/decode.py: from the cache it makes
        a function of the newest tokens (B, 1), whose result is next_logits'.
        """
        cache = KVCache(self, idx.size(1) + max_new_tokens) if use_cache else None
        step, fresh = functools.partial(self.next_logits, cache=cache), idx
        for i in range(max_new_tokens):
            if i == 1 and decoder is not None:
                step = decoder(cache)
            logits = step(fresh if use_cache else idx)
            fresh = sample_token(logits, temperature, top_k, top_p, generator)[:, None]  # (B, 1)
            idx = torch.cat((idx, fresh), dim=1)
            yield fresh[:, 0]

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
        beyond = probs.cumsum(-1) - probs >= top_p  # reached before this token, so not needed
        beyond[:, 0] = False
        probs = probs.masked_fill(beyond, 0)
    drawn = torch.multinomial(probs, 1, generator=generator)  # (B, 1), makes them sum to 1
    return (drawn if ids is None else ids.gather(1, drawn))[:, 0]
