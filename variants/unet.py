"""--residual unet: the second half of the blocks gets what the first half gave.

    x <- x + s_i x_j  before block n - 1 - j,  j < n // 2;   s_i = 1 at the start

x_j is the output of block j, so that the last block meets the first one's, as in U-nets
(Ronneberger et al. 2015); in language models modded-nanogpt's (2024), with a learned number each.
It buys short ways for gradients. Pitfall: with an odd number of blocks the middle one has no
partner; a stream that grows twice as fast wants the last norm.
"""

import torch
import torch.nn as nn

from model import Residual


class UNet(Residual):
    settings = {"start": 1.0}

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.layer, self.channels = layer, config.n_embd
        # of the second half: the block whose output it gets
        self.partner = config.n_layer - 1 - layer
        self.gives = layer < config.n_layer // 2
        start = config.own_settings["unet"]["start"]
        takes = self.partner < config.n_layer // 2
        self.skip = nn.Parameter(torch.full((1,), start)) if takes else None

    def forward(self, x, ln_1, attn, ln_2, mlp, carry):
        if self.layer == 0:
            carry.outputs = {}
        if self.skip is not None:
            x = x + self.skip.type_as(x) * carry.outputs[self.partner]
        x = super().forward(x, ln_1, attn, ln_2, mlp, carry)
        if self.gives:
            carry.outputs[self.layer] = x
        return x

    def uses(self, T):
        return self.channels


residual = UNet
