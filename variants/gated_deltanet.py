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
takes no rotation; its layers refuse biased encodings, windows and document_mask. Chunks of 64
tokens are products in fp32, one chunk after another, where fla-org has kernels of its own: in
training a sequence takes 3.8 times the memory that it takes in GPT-2 124M.
"""

import torch.nn as nn
import torch.nn.functional as F

from model import POSITIONS, Attention, has_bias
from nanoswitch.device import own_precision
from nanoswitch.operators import (
    CausalConv,
    Fade,
    HeadNorm,
    delta_rule_products,
    gated_delta_rule,
    unit,
)


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
        for layer, pos in enumerate(config.encodings):
            there = {"window": config.windows[layer], "document_mask": config.document_mask}
            there[f"pos '{pos}'"] = has_bias(POSITIONS[pos])
            wrong = " and ".join(what for what in there if there[what])
            if wrong and config.attentions[layer] == "gated_deltanet":
                why = "gated_deltanet has no scores to mask or bias"
                raise ValueError(f"{why}: layer {layer} must do without {wrong}")

    def forward(self, x, rotation, mask, cache=None, carry=None):
        qkv = F.silu(self.conv(self.c_attn(x), cache, "qkv"))
        q, k, v = (y.float() for y in self.heads(qkv, x, cache, carry))  # (B, n, T, hs)
        q, k, v = unit(q) / self.hs**0.5, unit(self.share(k)), self.share(v)
        a, b = self.gates(x).float().transpose(1, 2).chunk(2, dim=1)  # (B, nh, T)
        state = cache.tensors[0].float() if cache is not None and cache.tensors else None
        with own_precision(x):
            y, state = gated_delta_rule(q, k, v, self.fade(a), b.sigmoid(), state)
        if cache is not None:
            cache.tensors = [state]  # in fp32, whatever the weights are: it adds up
        return self.project(self.norm(y).type_as(qkv), x, carry)

    def output(self, y, x, carry):
        return y * F.silu(self.gate(x))

    def mask(self, pos, wpe, docs=None, cache=None):
        """None: the memory holds what came before."""

    def products(self, T):
        return self.nh * delta_rule_products(T, self.hs)


attention = GatedDeltaNet
