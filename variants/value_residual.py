"""--attention value_residual: the first layer's values, mixed into every later layer's.

ResFormer (Zhou et al. 2024, arXiv 2410.17897), its learnable form: in layer l > 1

    v_l <- a_l v_l + b_l v_1,   a_l = b_l = 0.5 at the start, and a_1 = 1, b_1 = 0

It buys lower loss at equal size for two numbers a layer: deep layers keep what the tokens said.
Pitfalls: the mix comes before the cache, so that what is cached is mixed; layers of another kind,
by attention_pattern, neither give values nor take them.
"""

import torch
import torch.nn as nn

from model import Attention


class ValueResidual(Attention):
    settings = {"start": 0.5}  # of a and b

    def __init__(self, config, layer):
        super().__init__(config, layer)
        kinds = config.attentions
        start = config.own_settings["value_residual"]["start"]
        first = "value_residual" not in kinds[:layer]
        self.mix = None if first else Mix(start, self.nkv * self.hs)

    def heads(self, qkv, x, cache, carry):
        q, k, v = super().heads(qkv, x, cache, carry)
        if self.mix is None:
            carry.first_values = v  # (B, nkv, T, hs)
        else:
            v = self.mix(v, carry.first_values)
        return q, k, v


class Mix(nn.Module):
    def __init__(self, start, channels):
        super().__init__()
        self.weight, self.channels = nn.Parameter(torch.full((2,), start)), channels

    def forward(self, own, first):
        a, b = self.weight.type_as(own)
        return a * own + b * first

    def uses(self, T):
        return self.channels  # each number multiplies every channel of the values


attention = ValueResidual
