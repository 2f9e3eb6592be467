"""--residual x0: the embedding, carried along to every block beside the stream.

    x <- a_l x + b_l x0,  then the block;   a_l = 1, b_l = 0 at the start

x0 is what the first block was given. The form is modded-nanogpt's (2024) and nanochat's (2025).
It buys a lower loss for two numbers a layer: no layer has to keep the token in the stream.
Pitfalls: its gain falls with size; a_l and b_l are vectors, which weight decay leaves alone.
"""

import torch
import torch.nn as nn

from model import Residual


class X0(Residual):
    settings = {"start": 0.0}  # of b

    def __init__(self, config, layer):
        super().__init__(config, layer)
        start = config.own_settings["x0"]["start"]
        self.mix, self.layer = nn.Parameter(torch.tensor([1.0, start])), layer
        self.channels = config.n_embd

    def forward(self, x, ln_1, attn, ln_2, mlp, carry):
        if self.layer == 0:
            carry.x0 = x
        a, b = self.mix.type_as(x)
        return super().forward(a * x + b * carry.x0, ln_1, attn, ln_2, mlp, carry)

    def uses(self, T):
        return self.channels  # each number multiplies every channel


residual = X0
