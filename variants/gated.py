"""--attention gated: what the heads found, times a gate of the token itself.

Qiu et al. 2025 (arXiv 2505.06708), their best place for it: after attention, before c_proj,

    y <- y * sigmoid(x W_g),  x the normed input; W_g (C, C), a gate for every channel

It buys a lower loss, larger rates, and no attention sink: a head can say nothing. `--settings
gated.per_head=true` has one gate a head, W_g (C, nh), which keeps most of it. Pitfalls: per
channel it adds C^2 parameters a layer (compare at equal size: --match params); the gate starts
at 1/2, so the branch starts half as large.
"""

import torch.nn as nn

from model import Attention


class Gated(Attention):
    settings = {"per_head": False}

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.per_head = config.own_settings["gated"]["per_head"]
        self.gate = nn.Linear(config.n_embd, self.nh if self.per_head else self.nh * self.hs, False)

    def output(self, y, x, carry):
        gate = self.gate(x).sigmoid()  # (B, T, C) or (B, T, nh)
        if self.per_head:
            gate = gate.repeat_interleave(self.hs, dim=-1)
        return y * gate


attention = Gated
