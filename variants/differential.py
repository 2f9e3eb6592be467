"""--attention differential: each head attends twice, and takes one map from the other.

Differential Transformer (Ye et al. 2024, arXiv 2410.05258, eq. 1 to 3). Each of nh / 2 heads
has two queries and two keys of size hs and one value of 2 hs, as many numbers as before:

    y_i = (softmax(q_1 k_1^T / sqrt(hs)) - lambda softmax(q_2 k_2^T / sqrt(hs))) v
    y <- (1 - lambda_init) RMSNorm(y_i), side by side,  one weight of 2 hs for all heads
    lambda = exp(a . b) - exp(c . d) + lambda_init,  a, b, c, d (hs,) drawn from N(0, 0.1)
    lambda_init = 0.8 - 0.6 exp(-0.3 (l - 1)) in layer l = 1, 2, ...

It buys maps without noise, so recall from long contexts and fewer outliers; the paper's smallest
model has 830M parameters. Pitfalls: half as many heads; the scores are computed once for each half
of the value, so that torch's fused kernels fit, at twice the products of plain attention; dropout
draws for each half anew. Head i pairs query heads i and i + nh / 2, and so key and value heads.
"""

import math

import torch
import torch.nn as nn

from model import Attention
from nanoswitch.operators import HeadNorm


class Differential(Attention):
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.start = 0.8 - 0.6 * math.exp(-0.3 * layer)  # layer counts from 0
        self.scale = Lambda(self.hs)
        self.norm = HeadNorm(2 * self.hs, config.norm_eps, self.nh // 2)

    @staticmethod
    def check(config):
        Attention.check(config)
        if config.n_kv_head % 2:
            raise ValueError(f"differential pairs heads: n_kv_head {config.n_kv_head} must be even")

    def attend(self, q, k, v, mask, cache, x):
        k, dropout, halves = self.share(k), self.dropout * self.training, []
        for half in v.chunk(2, dim=1):  # of the values, for both maps: (B, nkv / 2, Tk, hs)
            half = self.share(torch.cat((half, half), dim=1))  # (B, nh, Tk, hs)
            halves.append(self.kernel(q, k, half, mask, dropout))
        first, second = torch.cat(halves, dim=-1).chunk(2, dim=1)  # (B, nh / 2, T, 2 hs)
        y = first - (self.scale() + self.start).type_as(first) * second
        return (1 - self.start) * self.norm(y)

    def products(self, T):
        return 2 * super().products(T)


class Lambda(nn.Module):
    """exp(a . b) - exp(c . d), of the rows a, b, c, d (hs,): a scalar, once a pass."""

    init_std, no_decay = 0.1, ("weight",)

    def __init__(self, hs):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, hs))

    def forward(self):
        a, b, c, d = self.weight.float()
        return (a * b).sum().exp() - (c * d).sum().exp()

    def uses(self, T):
        return 0


attention = Differential
