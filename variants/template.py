"""--attention template: what each head found, times a number that it learns. Copy this file.

    cp variants/template.py variants/mine.py    # the file's name is the choice: --attention mine
    python -m nanoswitch.prove mine             # causal? cached? on a card? what does it cost?

Say here what yours is: the paper and its formula, what it buys, its pitfalls.

A variant is a subclass of one of these in model.py, and overrides what it does otherwise:

    attention   Attention(config, layer)   heads, attend, output, or mask, new_cache, all of forward
    mlp         MLP(config)                activation, or __init__ and forward, default_hidden
    norm        nn.Module, from (config)   forward
    pos         NoPosition(config)         embed, rotation, bias
    residual    Residual(config, layer)    forward: how the branches of a block join the stream

Rules, which the proof checks: no parameter of shape (), for fsdp has no rows to share out: take
(1,). A token reads others only where a cache holds them (cache.with_last), or the class says
caches = False. A weight that a token is not multiplied with once has a line in uses(T), and work
that is none of a weight's in products(T). Parameters of fewer than two dimensions keep the values
of __init__ and never decay; matrices are drawn, unless the module says own_init = True.
"""

import torch
import torch.nn as nn

from model import Attention

NAME = __name__.rpartition(".")[2]  # of this file, also once it is copied


class Template(Attention):
    settings = {"start": 1.0}  # numbers of its own: --settings NAME.start=0.5

    def __init__(self, config, layer):
        super().__init__(config, layer)
        start = config.own_settings[NAME]["start"]
        self.scale = HeadScale(torch.full((self.nh,), start), self.hs)

    def output(self, y, x, carry):
        """What the heads found, (B, T, C) -> what c_proj reads."""
        return self.scale(y)


class HeadScale(nn.Module):
    def __init__(self, values, hs):
        super().__init__()
        self.weight, self.hs = nn.Parameter(values), hs

    def forward(self, y):
        return y * self.weight.repeat_interleave(self.hs).type_as(y)  # (B, T, C)

    def uses(self, T):
        return self.hs  # a head's number multiplies each of its channels


attention = Template  # the switch that this file is for
