"""--norm dyt: dynamic tanh in the place of a normalisation.

Zhu et al. 2025 (arXiv 2503.10622):  y = weight * tanh(alpha x) + bias,  alpha one number, learned.

It buys an operation without a mean over channels. Pitfalls: no gain of loss is promised, and alpha
matters: 0.5 at the start, and for language models larger in front of attention and smaller in wide
models. `--settings dyt.alpha=0.8`.
"""

import torch
import torch.nn as nn


class DyT(nn.Module):
    settings = {"alpha": 0.5}

    def __init__(self, config):
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), config.own_settings["dyt"]["alpha"]))
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x):
        y = self.weight * torch.tanh(self.alpha * x)
        return y if self.bias is None else y + self.bias


norm = DyT
