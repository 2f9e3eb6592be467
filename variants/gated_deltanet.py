"""--attention gated_deltanet: a memory of fixed size that corrects itself, for the keys and values.

Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464, eq. 10). Each head keeps a matrix S (hs, hs),
which a token first lets fade by alpha, and then tells its own value for its own key:

    S <- alpha S (I - beta k k^T) + beta v k^T,   y = S q / sqrt(hs)
    beta = sigmoid(x W_b),  log alpha = -exp(A) softplus(x W_a + b)
    q, k, v: silu of a causal convolution of width 4; q and k of length 1
    y <- RMSNorm(y) silu(x W_g)

It buys time and a cache that do not grow with the text, and a memory that can be overwritten.
Recall of exact strings is worse, so mix it: `--attention_pattern
gated_deltanet,gated_deltanet,gated_deltanet,full`. Pitfalls: it knows order without an encoding and
takes no rotation; biased encodings, windows and document_mask are refused for its layers. Chunks of
64 tokens are products in fp32, one chunk after another, where fla-org has kernels of their own: a
pass of GPT-2 124M takes 2.6 times the memory of plain attention's.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import POSITIONS, Attention, has_bias
from nanoswitch.device import own_precision
from nanoswitch.operators import CausalConv, HeadNorm, delta_rule_products, gated_delta_rule


class GatedDeltaNet(Attention):
    settings = {"width": 4}

    def __init__(self, config, layer):
        super().__init__(config, layer)
        width = config.own_settings["gated_deltanet"]["width"]
        self.conv, self.fade = CausalConv(self.c_attn.out_features, width), Fade(self.nh)
        self.gates = nn.Linear(config.n_embd, 2 * self.nh, bias=False)  # W_a, W_b
        self.gate = nn.Linear(config.n_embd, config.n_embd, bias=False)  # W_g
        self.norm = HeadNorm(self.hs, config.norm_eps, self.nh)

    @staticmethod
    def check(config):
        for layer, name in enumerate(config.attentions):
            pos, wrong = config.encodings[layer], []
            wrong += ["window"] if config.windows[layer] else []
            wrong += ["document_mask"] if config.document_mask else []
            wrong += [f"pos '{pos}'"] if has_bias(POSITIONS[pos]) else []
            if name == "gated_deltanet" and wrong:
                raise ValueError(
                    f"gated_deltanet has no scores to mask or bias: layer {layer} must do without "
                    f"{' and '.join(wrong)}"
                )

    def forward(self, x, rotation, mask, cache=None, carry=None):
        B, T, C = x.size()
        qkv = F.silu(self.conv(self.c_attn(x), cache, "qkv"))
        q, k, v = (y.float() for y in self.heads(qkv, x, cache, carry))  # (B, n, T, hs)
        q, k, v = unit(q) / math.sqrt(self.hs), unit(self.share(k)), self.share(v)
        a, b = self.gates(x).float().transpose(1, 2).chunk(2, dim=1)  # (B, nh, T)
        state = cache.tensors[0].float() if cache is not None and cache.tensors else None
        with own_precision(x):
            y, state = gated_delta_rule(q, k, v, self.fade(a), b.sigmoid(), state)
        if cache is not None:
            cache.tensors = [state]  # in fp32, whatever the weights are: it adds up
        y = self.norm(y.transpose(1, 2)).reshape(B, T, C).type_as(qkv)
        y = self.output(y * F.silu(self.gate(x)), x, carry)
        return F.dropout(self.c_proj(y), self.dropout, self.training)

    def mask(self, pos, wpe, docs=None, cache=None):
        """None: the memory holds what came before."""

    def products(self, T):
        return self.nh * delta_rule_products(T, self.hs)


def unit(x):
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


class Fade(nn.Module):
    """(B, nh, T) -> log alpha. At the start exp(A) is spread over (0, 16) and softplus(b) over
    0.001 to 0.1, from which the authors draw them."""

    own_init = True

    def __init__(self, nh):
        super().__init__()
        h = torch.arange(nh) + 0.5
        self.A = nn.Parameter((16 * h / nh).log())
        step = 0.001 * 100 ** (0.618 * h % 1)  # in another order
        self.b = nn.Parameter(step.expm1().log())

    def forward(self, x):
        return -self.A.float().exp()[:, None] * F.softplus(x + self.b.float()[:, None])


attention = GatedDeltaNet
