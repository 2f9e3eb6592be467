"""--attention sinks: a logit for each head that takes attention and gives nothing.

gpt-oss (OpenAI 2025), after StreamingLLM's sinks (Xiao et al. 2024):

    weights = softmax([q . k_1 / sqrt(hs), ..., q . k_t / sqrt(hs), s]), s learned, its own dropped

so that a head may attend to nothing: without it heads use the first token for that.
It buys streams without huge activations, and windows that lose the first token unharmed.
Pitfall: as written here s is a column of a T x T bias, so the flash and flex kernels are refused
and memory grows as with alibi; gpt-oss has a kernel of its own.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Attention, has_bias
from nanoswitch.kernels import as_floats, attention_mask

WIDTH = 8  # columns for the sink, one of which counts: CUDA's kernel wants multiples of 8


class Sinks(Attention):
    settings = {"start": 0.0}

    def __init__(self, config, layer):
        super().__init__(config, layer)
        start = config.own_settings["sinks"]["start"]
        self.sink = nn.Parameter(torch.full((self.nh,), start))

    @staticmethod
    def check(config):
        if config.attention_kernel in ("flash", "flex"):
            raise ValueError(f"sinks has no {config.attention_kernel} kernel; use auto")

    def mask(self, pos, wpe, docs=None, cache=None):
        k_pos = pos if cache is None else cache.ring.k_pos
        bias = wpe.bias(pos, k_pos) if has_bias(wpe) else None
        return attention_mask(pos, k_pos, self.window, bias, *(docs or ()))  # (.., Tq, Tk)

    def attend(self, q, k, v, mask, cache, x):
        mask = as_floats(mask, self.sink.dtype)
        sink = F.pad(self.sink[:, None, None], (WIDTH - 1, 0), value=-math.inf)  # (nh, 1, WIDTH)
        mask = mask.expand(*mask.shape[:-3], self.nh, -1, -1) if mask.dim() > 2 else mask
        mask = mask.expand(self.nh, -1, -1) if mask.dim() == 2 else mask
        sink = sink.expand(*mask.shape[:-1], -1).type_as(mask)
        k, v = (F.pad(self.share(y), (0, 0, WIDTH, 0)) for y in (k, v))  # keys and values of 0
        return self.kernel(q, k, v, torch.cat((sink, mask), dim=-1), self.dropout * self.training)

    def keys(self, T):
        return super().keys(T) + WIDTH


attention = Sinks
