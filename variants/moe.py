"""--mlp moe: many small SwiGLU networks, of which each token meets a few that it chooses.

Mixture of experts as DeepSeek-V3 has it (2024, arXiv 2412.19437, eq. 12 to 16), balanced without a
loss (Wang et al. 2024, 2408.15664). Of E experts a token meets `active`, and `shared` ones always:

    s = sigmoid(x W_r),  chosen: the largest s_i + b_i,  g_i = s_i / (sum of s over the chosen)
    y = shared(x) + sum over the chosen of g_i expert_i(x)
    after each step  b_i <- b_i - rate sign(load_i - mean load)

It buys parameters without FLOPs: mlp_hidden is the width that a token meets, divided among active +
shared experts. b chooses, and weighs nothing. The loads are the whole batch's, over all ranks and
micro-batches: they travel as b's gradient, whose sign the optimizer takes; `rate` follows lr's
schedule. Pitfalls: every rank holds all experts; a rounding can send a token to other experts, so
bf16 differs from fp32 by more than elsewhere; the experts run one by one, except on CUDA in bf16.
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, SwiGLU
from nanoswitch.device import own_precision
from nanoswitch.operators import GroupedLinear, WithGradient


class MoE(nn.Module):
    settings = {"experts": 8, "active": 3, "shared": 1, "rate": 0.001}
    default_hidden = staticmethod(SwiGLU.default_hidden)
    replayable = False  # a step may ask for the loads, which a CUDA graph does not know

    def __init__(self, config):
        super().__init__()
        own, C = config.own_settings["moe"], config.n_embd
        E, self.active, shared = own["experts"], own["active"], own["shared"]
        hidden = math.ceil(config.mlp_hidden / (self.active + shared) / 8) * 8
        self.router, self.balance = nn.Linear(C, E, bias=False), Balance(E, own["rate"])
        self.c_fc = GroupedLinear(E, C, 2 * hidden, self.active / E)
        self.c_proj = GroupedLinear(E, hidden, C, self.active / E)
        part = copy.copy(config)
        part.mlp_hidden = shared * hidden
        self.shared = SwiGLU(part) if shared else None

    @staticmethod
    def check(config):
        own = config.own_settings["moe"]
        if not (0 < own["active"] <= own["experts"] and own["shared"] >= 0 and own["rate"] >= 0):
            raise ValueError(f"moe needs 0 < active <= experts, shared and rate from 0, not {own}")

    def forward(self, x):
        rows = x.flatten(0, -2)  # (N, C)
        with own_precision(x):
            scores = F.linear(rows.float(), self.router.weight.float()).sigmoid()  # (N, E)
        chosen = (scores + self.balance.bias).detach().topk(self.active).indices  # (N, active)
        gates = scores.gather(1, chosen)
        gates = gates / gates.sum(1, keepdim=True)
        load = (chosen[..., None] == torch.arange(scores.size(1), device=x.device)).sum((0, 1))
        order, ends = chosen.flatten().argsort(stable=True), load.cumsum(0).int()
        y = rows if x.is_meta else GPT.as_products(rows)  # meta knows no autocast
        y = y[order // self.active]  # (N active, C), by expert
        gate, up = self.c_fc(y, ends).chunk(2, dim=-1)
        y = self.c_proj(F.silu(gate) * up, ends)[order.argsort()].unflatten(0, chosen.shape)
        y = self.balance((gates[..., None].type_as(y) * y).sum(1), load).view(x.shape)
        return y if self.shared is None else y + self.shared(x)


class Balance(nn.Module):
    """b. It hands on (N, C), and its gradient is what each expert's load (E,) is above the mean."""

    def __init__(self, experts, rate):
        super().__init__()
        self.bias, self.by_sign = nn.Parameter(torch.zeros(experts)), {"bias": rate}

    def forward(self, y, load):
        return WithGradient.apply(y, self.bias, load * len(load) - load.sum())

    def uses(self, T):
        return 0


mlp = MoE
