"""--residual canon, --attention canon: each token mixed with the three before it.

Canon layers (Allen-Zhu 2025, "Physics of Language Models", part 4.1): a causal depthwise
convolution of width 4 that is added to what it reads,

    h'_t = h_t + w_0 h_t + w_1 h_{t-1} + w_2 h_{t-2} + w_3 h_{t-3}     (w: one number a channel)

--residual canon has it where attention reads (A) and where the MLP reads (C), both after the norm;
--attention canon on the queries, keys and values before they are rotated (B). All start as 0,
so that the model starts as one without; the paper draws them.
It buys reasoning depth and makes up for missing positions, for 4 C parameters a place. Pitfalls:
it reaches across the ends of documents, so document_mask is refused; a window reads 3 tokens more.
Decoding keeps the last three inputs of each place.
"""

from model import Attention, Residual
from nanoswitch.operators import CausalConv


class Conv(CausalConv):
    """x + the convolution of x over time; x (B, T, channels)."""

    own_init = True  # zeros

    def forward(self, x, cache, name):
        return x + super().forward(x, cache, name)


def check(config):
    if config.document_mask:
        raise ValueError("canon mixes neighbours across the ends of documents: drop document_mask")


class CanonResidual(Residual):
    settings, check = {"width": 4}, staticmethod(check)

    def __init__(self, config, layer):
        super().__init__(config, layer)
        width, self.layer = config.own_settings["canon"]["width"], layer
        self.conv_1, self.conv_2 = Conv(config.n_embd, width), Conv(config.n_embd, width)

    def forward(self, x, ln_1, attn, ln_2, mlp, carry):
        cache = carry.cache and carry.cache.layers[self.layer]
        x = x + attn(self.conv_1(ln_1(x), cache, "A"))
        return x + mlp(self.conv_2(ln_2(x), cache, "C"))


class CanonAttention(Attention):
    settings = {"width": 4}

    def __init__(self, config, layer):
        super().__init__(config, layer)
        width = config.own_settings["canon"]["width"]
        self.conv = Conv((self.nh + 2 * self.nkv) * self.hs, width)

    @staticmethod
    def check(config):
        Attention.check(config)
        check(config)

    def heads(self, qkv, x, cache, carry):
        return super().heads(self.conv(qkv, cache, "B"), x, cache, carry)


residual = CanonResidual
attention = CanonAttention
