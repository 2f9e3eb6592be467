"""--attention value_embedding: each token's value in a layer also looked up in a table.

    v <- a v + b E[token],   E (V, nkv hs) the layer's own;  a = b = 0.5 at the start

From modded-nanogpt (2024) and nanochat (2025), after value residual (Zhou et al. 2024).
It buys parameters that cost no FLOPs. Pitfalls: V nkv hs of them a layer, 38.6M at GPT-2's size, so
give it to few: `--attention_pattern full,full,full,value_embedding`; compare the loss at equal
memory too. Weight decay and Muon leave the table alone, as it is no matrix that multiplies.
"""

import torch
import torch.nn as nn

from model import Attention


class ValueEmbedding(Attention):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.table = Values(config.vocab_size, self.nkv * self.hs)
        self.mix = Mix(self.nkv * self.hs)

    def heads(self, qkv, x, cache, carry):
        q, k, v = super().heads(qkv, x, cache, carry)
        looked_up = self.table(carry.idx).view(*x.shape[:2], -1, self.hs)  # (B, T, nkv, hs)
        return q, k, self.mix(v, looked_up.transpose(1, 2))


class Values(nn.Embedding):
    no_decay = ("weight",)


class Mix(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight, self.channels = nn.Parameter(torch.full((2,), 0.5)), channels

    def forward(self, own, looked_up):
        a, b = self.weight.type_as(own)
        return a * own + b * looked_up.type_as(own)

    def uses(self, T):
        return self.channels


attention = ValueEmbedding
