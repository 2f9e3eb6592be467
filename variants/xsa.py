"""--attention xsa: what a token says of itself, taken out of what its heads found.

Exclusive self-attention (Zhai 2026, arXiv 2603.09078): of each head's result the part along the
token's own value is dropped,

    z = y - (y . v / |v|^2) v,   v the value of the same token and head

The stream already carries what the token is, so the heads are left to carry what others say.
It buys a lower loss, more at long contexts, for no parameters. Pitfalls: the first token sees only
itself, so its result is zero; grouped queries take the value of their group.
"""

import torch.nn.functional as F

from model import Attention


class XSA(Attention):
    def heads(self, qkv, x, cache, carry):
        q, k, v = super().heads(qkv, x, cache, carry)
        carry.own_values = v  # of this layer, until its output
        return q, k, v

    def output(self, y, x, carry):
        v = self.share(carry.own_values).transpose(1, 2)  # (B, T, nh, hs)
        v = F.normalize(v.float(), dim=-1)
        z = y.view(v.shape)
        z = z - ((z * v).sum(-1, keepdim=True) * v).type_as(y)
        return z.flatten(2)


attention = XSA
