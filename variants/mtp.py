"""--residual mtp: in training, the tokens after the next one are predicted too.

Multi-token prediction (Gloeckle et al. 2024, arXiv 2404.19737, eq. 2): one trunk z, n heads of one
block each, and the same last norm and output matrix for all,

    loss = sum over i = 1..n of cross entropy(softmax(W_out norm(block_i(z_t))), token t + i)

block_1 is the model's last block, so that without the others it is what it was: they run only where
a gradient is wanted, and the losses that are printed are the next token's alone.
It buys, in the paper, better code from some billions of parameters on; small models lose a little.
Pitfall: each of the n - 1 heads adds a block and a pass over the vocabulary to a training step.
`--settings mtp.tokens=4`; mtp.weight, 1 in the paper, multiplies all losses but the next token's.
"""

import copy

import torch.nn as nn
import torch.nn.functional as F

from model import Block, Residual


class MTP(Residual):
    settings = {"tokens": 2, "weight": 1.0}
    own_init = False  # the heads' matrices are drawn as other blocks' are

    def __init__(self, config, layer):
        super().__init__(config, layer)
        own = config.own_settings["mtp"]
        self.weight = own["weight"]
        self.heads = Heads(config, own["tokens"] - 1) if layer == config.n_layer - 1 else ()

    @staticmethod
    def check(config):
        if config.own_settings["mtp"]["tokens"] < 2:
            raise ValueError("mtp.tokens must be 2 or more: the next token is the first")

    def forward(self, x, ln_1, attn, ln_2, mlp, carry):
        if carry.targets is not None:
            for i, head in enumerate(self.heads, start=1):
                later = F.pad(carry.targets[:, i:], (0, i), value=-1)  # (B, T): i tokens further on
                z = head(x, carry.rotation, carry.mask, None, carry)
                carry.losses.append((z, later, self.weight))
        return super().forward(x, ln_1, attn, ln_2, mlp, carry)


class Heads(nn.ModuleList):
    training_only = True

    def __init__(self, config, n):
        plain = copy.copy(config)
        plain.residual = "plain"
        super().__init__(Block(plain, config.n_layer - 1) for _ in range(n))
        self.output = n * config.vocab_size * config.n_embd

    def products(self, T):
        return self.output  # the output matrix, once more for each head


residual = MTP
