"""--residual hyper: several residual streams, and what is read from and written to each, learned.

Hyper-connections (Zhu et al. 2024, arXiv 2409.19606, eq. 2 to 5 and 10 to 13). H (n, C) holds the
n streams of a token. Each branch reads h and leaves H anew:

    h = A_m^T H,   H <- A_r^T H + B (x) branch(norm(h))
    A_m, A_r, B = a static part + s tanh(layernorm(H) W)

At the start W = 0, A_m picks stream k mod n for the k-th branch, A_r = I and B = 1, so that the
model starts as one without. In the end the streams are added up.
It buys streams that stay different and a faster fall of the loss, for few weights. Pitfall: the
stream is n times as large, in memory and in what a pass moves. `--settings hyper.streams=2`.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Residual
from nanoswitch.device import own_precision


class Hyper(Residual):
    settings = {"streams": 4}

    def __init__(self, config, layer):
        super().__init__(config, layer)
        n, C = config.own_settings["hyper"]["streams"], config.n_embd
        self.n, self.begins, self.ends = n, layer == 0, layer == config.n_layer - 1
        self.attn, self.mlp = Connection(C, n, 2 * layer), Connection(C, n, 2 * layer + 1)

    @staticmethod
    def check(config):
        if config.own_settings["hyper"]["streams"] < 1:
            raise ValueError("hyper.streams must be 1 or more")

    def forward(self, x, ln_1, attn, ln_2, mlp, carry):
        H = x[:, :, None].expand(-1, -1, self.n, -1) if self.begins else x  # (B, T, n, C)
        for connect, ln, branch in ((self.attn, ln_1, attn), (self.mlp, ln_2, mlp)):
            h, H, write = connect(H)
            H = H + write * branch(ln(h))[:, :, None].type_as(write)
        return H.sum(2) if self.ends else H


class Connection(nn.Module):
    no_decay = ("static",)

    def __init__(self, C, n, k):
        super().__init__()
        self.n, self.C = n, C
        pick = F.one_hot(torch.tensor(k % n), n)[:, None]  # (n, 1)
        static = torch.cat((pick, torch.eye(n), torch.ones(n, 1)), dim=1)
        self.static = nn.Parameter(static)  # A_m, A_r, B side by side: (n, n + 2)
        self.scale = nn.Parameter(torch.full((n + 2,), 0.01))
        self.dynamic = nn.Linear(C, n + 2, bias=False)
        nn.init.zeros_(self.dynamic.weight)

    def forward(self, H):
        """H (B, T, n, C) -> h (B, T, C), A_r^T H (B, T, n, C) and B (B, T, n, 1)."""
        dynamic = self.dynamic(F.layer_norm(H, (self.C,))).tanh()
        mix = (self.static + self.scale * dynamic).type_as(H)  # (B, T, n, n + 2)
        with own_precision(H):  # the stream stays as exact as it is
            read = mix[..., :-1].transpose(2, 3) @ H  # (B, T, 1 + n, C)
        return read[:, :, 0], read[:, :, 1:], mix[..., -1:]

    def uses(self, T):
        return self.n

    def products(self, T):
        return self.n * (self.n + 1) * self.C


residual = Hyper
