"""--attention mla: keys and values of all heads, made from one small vector a token.

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, eq. 9 to 19; queries are not compressed,
as in V2-Lite). Of a token's normed input x (C,), and for each head:

    c = RMSNorm(x W_c)  (latent,)   k^R = rope(x W_k)  (rope,)   both shared by the heads
    k = [c U_k, k^R]    v = c U_v   q = [x W_q, rope(x W_r)]   scores q . k / sqrt(hs + rope)

It buys a small cache: latent + rope numbers a token and layer, by default 4.5 hs; plain attention
keeps 2 nh hs. A decoded token needs no keys and values: U_k moves into its queries, U_v behind the
sum. Pitfalls: that takes about four times the multiply-adds of plain attention; only the rope part
turns, by every (hs / rope)-th angle of the encoding. `--settings mla.latent=256,mla.rope=32`.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Attention, rotate
from nanoswitch.kernels import KERNELS
from nanoswitch.operators import HeadNorm


class MLA(Attention):
    settings = {"latent": 0, "rope": 0}  # 0: 4 hs, hs / 2

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.latent, self.rope = sizes(config)
        self.widths = self.nh * (self.hs + self.rope), self.latent, self.rope  # of q, c, k^R
        self.c_attn = nn.Linear(config.n_embd, sum(self.widths), bias=False)
        self.norm = HeadNorm(self.latent, config.norm_eps, 1)
        self.up = nn.Linear(self.latent, self.nh * 2 * self.hs, bias=False)  # U_k, U_v by head

    @staticmethod
    def check(config):
        Attention.check(config)
        if config.n_kv_head != config.n_head or config.qk_norm:
            raise ValueError("mla has heads and a norm of its own: drop n_kv_head and qk_norm")
        (latent, rope), hs = sizes(config), config.head_size
        if latent < 1 or rope < 2 or rope % 2 or hs % rope:
            raise ValueError(
                f"mla.latent is {latent}, mla.rope {rope}; give 1 or more, and an even divisor of "
                f"the head size, {hs}"
            )

    def forward(self, x, rotation, mask, cache=None, carry=None):
        q, c, k_rope = self.c_attn(x).split(self.widths, dim=-1)
        q = q.unflatten(-1, (self.nh, -1)).transpose(1, 2)  # (B, nh, T, hs + rope)
        c, k_rope = self.norm(c)[:, None], k_rope[:, None]  # (B, 1, T, ..)
        if rotation is not None:
            own = [part[:, :: self.hs // self.rope] for part in rotation]  # (T, rope / 2)
            q = torch.cat((q[..., : self.hs], rotate(q[..., self.hs :], *own)), dim=-1)
            k_rope = rotate(k_rope, *own)
        if cache is not None:
            c, k_rope = cache.update(c, k_rope)  # (B, 1, Tk, ..)
        attend = self.on_latents if cache is not None and x.size(1) <= self.hs else self.on_heads
        return self.project(attend(q, c, k_rope, mask), x, carry)

    def on_heads(self, q, c, k_rope, mask):
        """q (B, nh, T, hs + rope), c (B, 1, Tk, latent), k_rope -> (B, nh, T, hs)."""
        c, k_rope = c.type_as(q), k_rope.type_as(q)  # a cache may hold another dtype
        k, v = self.up(c[:, 0]).unflatten(-1, (self.nh, -1)).transpose(1, 2).chunk(2, dim=-1)
        k = torch.cat((k, k_rope.expand(-1, self.nh, -1, -1)), dim=-1)
        v = F.pad(v, (0, self.rope))  # fused kernels want one size
        return self.kernel(q, k, v, mask, self.dropout * self.training)[..., : self.hs]

    def on_latents(self, q, c, k_rope, mask):
        """on_heads without keys and values of the heads."""
        k_up, v_up = self.up.weight.view(self.nh, 2 * self.hs, -1).type_as(q).chunk(2, dim=1)
        q = torch.cat((q[..., : self.hs] @ k_up, q[..., self.hs :]), dim=-1)
        # the kernel divides by the root of its own size
        q = q * ((self.latent + self.rope) / (self.hs + self.rope)) ** 0.5
        k = torch.cat((c, k_rope), dim=-1).expand(-1, self.nh, -1, -1)  # its beginning: the values
        y = KERNELS["auto"](q.type_as(k), k, k, mask, 0.0)  # flash has no heads of such size
        return y[..., : self.latent].type_as(v_up) @ v_up.transpose(1, 2)

    def products(self, T):
        return 2 * self.nh * (self.hs + self.rope) * self.keys(T)


def sizes(config):
    """The size of the latent, and of the key that turns."""
    own, hs = config.own_settings["mla"], config.head_size
    return own["latent"] or 4 * hs, own["rope"] or hs // 2


attention = MLA
