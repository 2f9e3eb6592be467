"""GPT-2 and its variants in one file: every architecture switch is a field of GPTConfig.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig(pos="rope", n_kv_head=4, mlp="swiglu", norm="rmsnorm"))
    logits, _ = model(idx)          # every position
    _, loss = model(idx, targets)   # the mean loss, without ever holding all logits
    model = GPT.from_checkpoint("runs/quickstart")   # or "gpt2", or a Hugging Face folder

Papers: GPT-2 (Radford et al. 2019), sinusoidal positions (Vaswani et al. 2017), RoPE (Su et al.
2021), ALiBi (Press et al. 2022), Kerple (Chi et al. 2022), FIRE (Li et al. 2024), GQA (Ainslie et
al. 2023), SwiGLU (Shazeer 2020), ReLU^2 (So et al. 2021), RMSNorm (Zhang and Sennrich 2019),
sliding windows (Beltagy et al. 2020; Mistral, Jiang et al. 2023), QK-norm (Henry et al. 2020),
logit soft-capping (Gemma 2, 2024), FlexAttention (Dong et al. 2024).

Shapes: B batch, T positions (Tq queries, Tk keys), C = n_embd, nh = n_head, nkv = n_kv_head,
hs = C / nh, V = vocab_size. Parameter names are nanoGPT's.
"""

import contextlib
import copy
import ctypes
import functools
import itertools
import json
import math
import os
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

# MKL picks the code of a vector function at its first call. Threads that race there can get a less
# precise one, once (pytorch issue 188792), and the run other bits: so one thread calls each first.
for function in (torch.exp, torch.log, torch.log1p, torch.sin, torch.cos, torch.tanh, torch.sqrt):
    function(torch.ones(1))


# The choices of pos, norm and mlp are the keys of the dicts below: a new one is added in one place.
@dataclass
class GPTConfig:
    block_size: int = 1024
    """context length in tokens"""
    vocab_size: int = 50304
    """rows of the embedding and the head: GPT-2's 50,257 ids, padded to a multiple of 128"""
    vocab_used: int = 50257
    """ids from here up only pad the matrices: they are never sampled"""
    n_layer: int = 12
    """transformer blocks"""
    n_head: int = 12
    """query heads"""
    n_kv_head: int = 0
    """key and value heads: fewer than n_head is GQA, 1 is MQA, 0 means n_head"""
    n_embd: int = 768
    """width of the residual stream"""
    pos: "Literal[tuple(POSITIONS)]" = "learned"
    """position encoding"""
    norm: "Literal[tuple(NORMS)]" = "layernorm"
    """normalisation before attention, before the MLP and before the head"""
    norm_eps: float = 1e-5
    """epsilon inside the normalisation"""
    embd_norm: bool = False
    """a normalisation right after the embeddings too, as in Bloom"""
    mlp: "Literal[tuple(MLPS)]" = "gelu"
    """feed-forward network"""
    mlp_hidden: int = 0
    """hidden width of the MLP; 0 = 4 n_embd, or for swiglu the width of equal parameters"""
    attention: "Literal[tuple(ATTENTIONS)]" = "full"
    """full, or linformer: a token sees its own segment and summaries of the segments before"""
    linformer_segment: int = 64
    """tokens in a segment of linformer"""
    linformer_rank: int = 16
    """summary vectors a past segment is compressed to"""
    window: int = 0
    """sliding window: a query attends to this many keys, itself included; 0 = full attention"""
    window_pattern: str = ""
    """which layers are windowed, repeated over depth: S windowed, L full; empty = all are S"""
    bias: bool = True
    """biases in the linear layers and LayerNorms"""
    dropout: float = 0.0
    """dropout on embeddings, attention and residual branches"""
    tie_embeddings: bool = True
    """the head shares the token embedding's matrix"""
    rope_theta: float = 10000.0
    """base of RoPE's wavelengths"""
    rope_scaling: float = 1.0
    """RoPE's positions are divided by this: 2 fits twice the context into the trained angles"""
    qk_norm: bool = False
    """RMSNorm without weights on each head's queries and keys"""
    logit_softcap: float = 0.0
    """logits become cap * tanh(logits / cap); 0 = as they are"""
    zero_init: bool = False
    """residual projections start at zero, so that every block starts as the identity"""
    document_mask: bool = False
    """attention does not cross the end-of-text token, id vocab_used - 1"""
    attention_kernel: "Literal[tuple(KERNELS)]" = "auto"
    """auto lets torch choose; flash and math insist; flex is FlexAttention, made for CUDA"""

    def __post_init__(self):
        tables = {
            "pos": POSITIONS, "norm": NORMS, "mlp": MLPS, "attention": ATTENTIONS,
            "attention_kernel": KERNELS,
        }  # fmt: skip
        for name, table in tables.items():
            if getattr(self, name) not in table:
                valid = ", ".join(table)
                raise ValueError(f"{name} '{getattr(self, name)}' is none of: {valid}")
        for names, least in (
            (("block_size", "vocab_size", "vocab_used", "n_layer", "n_head", "n_embd"), 1),
            (("linformer_segment", "linformer_rank"), 1),
            (("n_kv_head", "mlp_hidden", "window", "logit_softcap"), 0),
        ):
            for name in names:
                if getattr(self, name) < least:
                    raise ValueError(f"{name} is {getattr(self, name)}; it must be {least} or more")
        for name in ("norm_eps", "rope_theta", "rope_scaling"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}; "
                f"try --n_embd {math.ceil(self.n_embd / self.n_head) * self.n_head}"
            )
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}; "
                f"each key head serves n_head / n_kv_head query heads"
            )
        if self.pos == "rope" and self.head_size % 2:
            raise ValueError(f"rope turns pairs of channels: head size {self.head_size} is odd")
        has_bias = POSITIONS[self.pos].bias is not NoPosition.bias
        if self.attention_kernel == "flash" and (has_bias or self.window or self.document_mask):
            raise ValueError(
                f"attention_kernel flash knows only plain causal attention, not pos '{self.pos}' "
                f"with window {self.window} and document_mask {self.document_mask}; use auto"
            )
        if self.attention == "linformer" and (self.window or self.document_mask):
            raise ValueError("linformer has segments of its own: drop window and document_mask")
        if self.attention == "linformer" and self.attention_kernel in ("flash", "flex"):
            raise ValueError(f"linformer has no {self.attention_kernel} kernel; use auto")
        if self.attention_kernel == "flex" and self.dropout:
            raise ValueError(f"flex attention has no dropout: set dropout {self.dropout} to 0")
        if self.window_pattern.strip("SL"):
            raise ValueError(f"window_pattern '{self.window_pattern}' may hold only S and L")
        if self.window_pattern and not self.window:
            raise ValueError("window_pattern needs a window: add --window W")
        if not self.mlp_hidden:
            self.mlp_hidden = MLPS[self.mlp].default_hidden(self.n_embd)

    @property
    def head_size(self):
        return self.n_embd // self.n_head

    @property
    def windows(self):
        """The window of each layer, 0 for full attention: a list of n_layer ints."""
        pattern = self.window_pattern or "S"
        return [self.window if pattern[i % len(pattern)] == "S" else 0 for i in range(self.n_layer)]

    def keys_per_token(self, T):
        """Keys that the last of T tokens meets, summed over the layers."""
        if self.attention == "linformer":
            S, R = self.linformer_segment, self.linformer_rank
            return self.n_layer * min(T, T * R // S + S)
        return sum(min(w, T) if w else T for w in self.windows)


# ----------------------------------------------------------------------------- normalisation

NORMS = {
    "layernorm": lambda config: nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias),
    # x / sqrt(mean(x^2) + eps) * weight, the mean over the C channels of one token
    "rmsnorm": lambda config: nn.RMSNorm(config.n_embd, config.norm_eps),
}


# ----------------------------------------------------------------------------- positions


class NoPosition(nn.Module):
    """What a position encoding may do; each one below overrides only what it uses.

    Everything is a function of absolute positions (int64), computed once a forward pass and
    shared by all layers. On its own: no encoding, order is known only through the causal mask.
    """

    extrapolates = True  # runs beyond block_size

    def __init__(self, config):
        super().__init__()

    def embed(self, pos):
        """(T,) -> (T, C) added to the token embeddings, or None."""

    def rotation(self, pos):
        """(T,) -> cos and sin, (T, hs / 2) each, that turn queries and keys, or None."""

    def bias(self, q_pos, k_pos):
        """(Tq,), (Tk,) -> (nh, Tq, Tk) added to the attention scores, or None."""


class Learned(NoPosition):
    """A trained vector per position (GPT-2): none exist beyond block_size."""

    extrapolates = False

    def __init__(self, config):
        super().__init__(config)
        self.weight = nn.Parameter(torch.zeros(config.block_size, config.n_embd))

    def embed(self, pos):
        return F.embedding(pos, self.weight)  # (T, C)


class Sinusoidal(NoPosition):
    """Vaswani et al. 2017, section 3.5: sin and cos of pos / 10000^(2i/C), interleaved.

    Divided by sqrt(C), where that paper multiplies the token embeddings by it."""

    def __init__(self, config):
        super().__init__(config)
        self.C = config.n_embd

    def embed(self, pos):
        i = torch.arange(0, self.C, 2, device=pos.device)
        angle = pos[:, None] * 10000.0 ** (-i / self.C)  # (T, ceil(C/2))
        waves = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)
        return waves[:, : self.C] / math.sqrt(self.C)  # (T, C)


class RoPE(NoPosition):
    """Su et al. 2021, eq. 34: channels (i, i + hs/2) turn by the angle pos * theta^(-2i/hs).

    The pairing is GPT-NeoX's and Llama's, so that their weights load unchanged. rope_scaling is
    position interpolation (Chen et al. 2023)."""

    def __init__(self, config):
        super().__init__(config)
        self.hs, self.theta, self.scaling = (
            config.head_size,
            config.rope_theta,
            config.rope_scaling,
        )

    def rotation(self, pos):
        i = torch.arange(0, self.hs, 2, device=pos.device)
        angle = pos[:, None] / self.scaling * self.theta ** (-i / self.hs)  # (T, hs/2)
        return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the channel pairs of x (B, nh, T, hs) by the angles behind cos, sin (T, hs/2)."""
    a, b = x.float().chunk(2, dim=-1)  # (B, nh, T, hs/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


class Alibi(NoPosition):
    """Press et al. 2022: the score falls by slope * distance, slopes 2^(-8h/nh) for h = 1..nh.

    When nh is no power of two, the authors' released code: the slopes of the power of two below,
    then every other slope of the power above."""

    def __init__(self, config):
        super().__init__(config)
        self.nh, self.below = config.n_head, 2 ** math.floor(math.log2(config.n_head))

    def slopes(self, device=None):
        h = torch.arange(1, self.nh + 1, device=device)
        every_other = (2 * (h - self.below) - 1) / (2 * self.below)
        return torch.exp2(-8 * torch.where(h <= self.below, h / self.below, every_other))  # (nh,)

    def bias(self, q_pos, k_pos):
        slopes = self.slopes(q_pos.device)
        return -slopes[:, None, None] * distances(q_pos, k_pos)  # (nh, Tq, Tk)


class Kerple(NoPosition):
    """Chi et al. 2022, the logarithmic kernel: -r1 log(1 + r2 distance), r1, r2 > 0 learned per
    head. Like all encodings here it is shared by the layers."""

    def __init__(self, config):
        super().__init__(config)
        # r1 spread over the paper's range of initial values, (0, 2]
        r1 = torch.arange(1, config.n_head + 1) * (2 / config.n_head)
        self.log_r1 = nn.Parameter(r1.log())  # (nh,)
        self.log_r2 = nn.Parameter(torch.zeros(config.n_head))  # (nh,)

    def bias(self, q_pos, k_pos):
        r1, r2 = self.log_r1.exp()[:, None, None], self.log_r2.exp()[:, None, None]
        return self.kernel(r1, r2, distances(q_pos, k_pos))  # (nh, Tq, Tk)

    def kernel(self, r1, r2, distance):
        return -r1 * torch.log1p(r2 * distance)


class KerplePower(Kerple):
    """Chi et al. 2022, the power kernel: -r1 distance^r2, r1 > 0 and 0 < r2 <= 2."""

    def kernel(self, r1, r2, distance):
        # the gradient of 0^r2 is not finite, and a token's distance to itself costs nothing
        return -r1 * distance.clamp(min=1) ** r2.clamp(max=2) * (distance > 0)


class FIRE(NoPosition):
    """Li et al. 2024, eq. 13 and 19: MLP(psi(i - j) / psi(max(i, L))), psi(x) = log(c x + 1),
    with c and L learned. Shared by the layers, the paper's FIRE-S."""

    HIDDEN = 32

    def __init__(self, config):
        super().__init__(config)
        self.c = nn.Parameter(torch.tensor([0.1]))
        self.L = nn.Parameter(torch.tensor([config.block_size / 4]))
        self.mlp = nn.Sequential(
            nn.Linear(1, self.HIDDEN), nn.ReLU(), nn.Linear(self.HIDDEN, config.n_head)
        )

    def psi(self, x):
        return torch.log1p(self.c.abs() * x)

    def bias(self, q_pos, k_pos):
        threshold = torch.maximum(q_pos.float(), self.L.abs())[:, None]  # (Tq, 1)
        ratio = self.psi(distances(q_pos, k_pos)) / self.psi(threshold)  # (Tq, Tk)
        return self.mlp(ratio[..., None].type_as(self.c)).permute(2, 0, 1)  # (nh, Tq, Tk)


def distances(q_pos, k_pos):
    """How far each key lies behind each query, (Tq,), (Tk,) -> (Tq, Tk) fp32; 0 if ahead."""
    return (q_pos[:, None] - k_pos[None, :]).clamp(min=0).float()


POSITIONS = {
    "learned": Learned,
    "sinusoidal": Sinusoidal,
    "rope": RoPE,
    "alibi": Alibi,
    "kerple": Kerple,
    "kerple_power": KerplePower,
    "fire": FIRE,
    "none": NoPosition,
}


# ----------------------------------------------------------------------------- attention


class Attention(nn.Module):
    """Causal self-attention; query head h reads key head h // (nh / nkv) (GQA, Ainslie 2023)."""

    def __init__(self, config):
        super().__init__()
        self.nh, self.nkv, self.hs = config.n_head, config.n_kv_head, config.head_size
        self.dropout, self.qk_norm = config.dropout, config.qk_norm
        self.kernel = KERNELS[config.attention_kernel]
        self.c_attn = nn.Linear(config.n_embd, (self.nh + 2 * self.nkv) * self.hs, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, rotation, mask, cache=None):
        """x (B, T, C); rotation and mask as GPT.features makes them; cache one layer's KVCache."""
        B, T, C = x.size()
        heads = self.c_attn(x).view(B, T, -1, self.hs).transpose(1, 2)  # (B, nh + 2 nkv, T, hs)
        q, k, v = heads.split((self.nh, self.nkv, self.nkv), dim=1)
        if self.qk_norm:
            # CUDA's autocast runs rms_norm in fp32, and its result must fit beside v in a cache
            q, k = (F.rms_norm(x, (self.hs,)).type_as(v) for x in (q, k))
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, nkv, Tk, hs)
        # a cache may hold another dtype
        y = self.attend(q.type_as(k), k, v, mask, cache).type_as(q)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)

    def attend(self, q, k, v, mask, cache):
        """q (B, nh, T, hs), k and v (B, nkv, Tk, hs) -> (B, nh, T, hs)."""
        return self.kernel(q, self.share(k), self.share(v), mask, self.dropout * self.training)

    def share(self, x):
        """Key or value heads, (B, nkv, T, hs) -> one for every query head, (B, nh, T, hs)."""
        # SDPA's own enable_gqa falls to its slowest kernel in fp32 and with a mask
        return x if self.nkv == self.nh else x.repeat_interleave(self.nh // self.nkv, dim=1)


class Linformer(Attention):
    """Linformer (Wang et al. 2020), made causal: a query sees the tokens of its own segment up to
    itself, and each segment before that as `rank` weighted sums of its keys and values.

    The paper compresses the whole sequence, the future with it, and has no causal form; here a
    summary is visible only once its segment is past. Cost grows with T rank / segment + segment
    keys per token instead of T. S = linformer_segment, R = linformer_rank."""

    def __init__(self, config):
        super().__init__(config)
        self.S = config.linformer_segment
        self.e_proj = nn.Linear(self.S, config.linformer_rank, bias=False)  # E, for keys
        self.f_proj = nn.Linear(self.S, config.linformer_rank, bias=False)  # F, for values

    def attend(self, q, k, v, mask, cache):
        B, nh, T, hs = q.size()
        n, S = mask.size(-3), self.S  # n segments hold the queries, the last of `end` segments
        start = cache.ring.start if cache is not None else 0
        first = start // S
        end = first + n
        q = F.pad(q, (0, 0, start - first * S, end * S - start - T))
        q = q.view(B, nh, n, S, hs)
        k, v = self.segments(k, end), self.segments(v, end)  # (B, nh, end, S, hs)
        k_past = self.summarize(k, self.e_proj, n)  # (B, nh, n, end R, hs)
        v_past = self.summarize(v, self.f_proj, n)
        k = torch.cat((k_past, k[:, :, first:]), dim=3)  # (B, nh, n, end R + S, hs)
        v = torch.cat((v_past, v[:, :, first:]), dim=3)
        y = self.kernel(q, k, v, mask, self.dropout * self.training)  # (B, nh, n, S, hs)
        return y.flatten(2, 3)[:, :, start - first * S :][:, :, :T]

    def segments(self, x, end):
        """(B, nkv, Tk, hs) -> its first `end` segments, (B, nh, end, S, hs)."""
        x = self.share(x)[:, :, : end * self.S]
        x = F.pad(x, (0, 0, 0, end * self.S - x.size(2)))
        return x.unflatten(2, (end, self.S))

    def summarize(self, x, proj, n):
        """(B, nh, end, S, hs) -> every segment's summaries, once per query segment:
        (B, nh, n, end R, hs)."""
        past = F.linear(x.transpose(3, 4), proj.weight.type_as(x))  # (B, nh, end, hs, R)
        past = past.transpose(3, 4).flatten(2, 3)  # (B, nh, end R, hs)
        return past[:, :, None].expand(-1, -1, n, -1, -1)


def linformer_mask(start, T, config, wpe, device):
    """Linformer's attention_mask, for queries start to start + T: (1 or nh, n, S, end R + S).

    A summary counts as standing at the last position of its segment."""
    S, R = config.linformer_segment, config.linformer_rank
    first, end = start // S, math.ceil((start + T) / S)
    masks = []
    for segment in range(first, end):
        q_pos = torch.arange(segment * S, segment * S + S, device=device)
        past = torch.arange(S - 1, end * S, S, device=device).repeat_interleave(R)  # (end R,)
        k_pos = torch.cat((past, q_pos))
        mask = attention_mask(q_pos, k_pos, 0, wpe.bias(q_pos, k_pos))  # (.., S, end R + S)
        # the last query would see the summary of its own, just finished segment: it must not
        own = torch.zeros(end * R + S, dtype=torch.bool, device=device)
        own[segment * R : segment * R + R] = True
        hidden = False if mask.dtype == torch.bool else -math.inf
        masks.append(mask.masked_fill(own, hidden).expand(-1 if mask.dim() == 3 else 1, -1, -1))
    return torch.stack(masks, dim=1)


ATTENTIONS = {"full": Attention, "linformer": Linformer}


def attention_mask(q_pos, k_pos, window, bias, q_doc=None, k_doc=None):
    """Who may look at whom: (Tq,), (Tk,) -> True where query may see key (Tq, Tk), or with a
    bias (nh, Tq, Tk) that bias, -inf where it may not. Causal, within the window if there is one,
    and within the document if there are documents (B, Tq), (B, Tk); then the mask is (B, ...)."""
    distance = q_pos[:, None] - k_pos[None, :]  # (Tq, Tk)
    visible = distance >= 0
    if window:
        visible = visible & (distance < window)
    if q_doc is not None:
        visible = visible & (q_doc[:, None, :, None] == k_doc[:, None, None, :])  # (B, 1, Tq, Tk)
    return visible if bias is None else bias.masked_fill(~visible, -math.inf)


def window_masks(pos, window, wpe, doc=None):
    """attention_mask for a sliding window over the positions pos (T,), in chunks: a list of
    (slice of queries, slice of the keys they reach, mask), so that time and memory grow with
    T window, not T^2. doc (B, T) if attention keeps within documents."""
    masks, plain = [], type(wpe).bias is NoPosition.bias and doc is None
    for rows, keys in window_chunks(len(pos), window, plain):
        if plain and rows.start == 0:
            masks.append((rows, keys, None))
            continue
        docs = () if doc is None else (doc[:, rows], doc[:, keys])
        bias = wpe.bias(pos[rows], pos[keys])
        masks.append((rows, keys, attention_mask(pos[rows], pos[keys], window, bias, *docs)))
    return masks


def window_chunks(T, window, plain):
    """[(slice of queries, slice of keys)]. plain: nothing but the window masks, so that the first
    queries, which reach all keys before them, are one chunk for torch's causal kernel."""
    step = max(192, T // 16)  # for fewer queries torch's CPU kernel takes smaller blocks
    edges = [0, *range(window if plain else step, T, step), T]
    return [(slice(a, b), slice(max(0, a - window + 1), b)) for a, b in itertools.pairwise(edges)]


def sdpa(q, k, v, mask, dropout):
    """torch's fused attention. No mask means plain causal, for which it has its fastest kernel, or
    one query that sees all keys: torch's causal mask would let it see the first only."""
    if isinstance(mask, list):
        return sdpa_in_chunks(q, k, v, mask, dropout)
    if mask is None and q.size(2) == 1:  # a branch, for is_causal may be no symbol of torch.compile
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout
    )


def sdpa_in_chunks(q, k, v, chunks, dropout):
    """sdpa with chunks as window_masks makes them. Keys and values are cut at all their edges and
    put together for every chunk: each slice of them would have a gradient as long as all."""
    cuts = sorted({edge for _, keys, _ in chunks for edge in (keys.start, keys.stop)})
    sizes = [b - a for a, b in itertools.pairwise(cuts)]
    q = q.split([rows.stop - rows.start for rows, _, _ in chunks], dim=2)
    k, v = k.split(sizes, dim=2), v.split(sizes, dim=2)
    parts = []
    for queries, (_, keys, mask) in zip(q, chunks, strict=True):
        own = slice(cuts.index(keys.start), cuts.index(keys.stop))
        own_k, own_v = torch.cat(k[own], dim=2), torch.cat(v[own], dim=2)
        parts.append(sdpa(queries, own_k, own_v, mask, dropout))
    return torch.cat(parts, dim=2)


def sdpa_flash(q, k, v, mask, dropout):
    # several queries on a cache have a mask, and CUDA's flash kernel knows no fp32
    if mask is not None or (q.is_cuda and q.dtype == torch.float32):
        return sdpa(q, k, v, mask, dropout)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa(q, k, v, mask, dropout)


def sdpa_math(q, k, v, mask, dropout):
    """Attention step by step, all T x T scores in memory: "regular" attention."""
    with sdpa_kernel(SDPBackend.MATH):
        return sdpa(q, k, v, mask, dropout)


def flex(q, k, v, mask, dropout):
    """FlexAttention: skips the blocks that a window or documents mask out; mask as flex_mask's."""
    if not isinstance(mask, tuple):  # with a cache: it would compile anew for every length
        return sdpa(q, k, v, mask, dropout)
    block_mask, bias = mask
    score_mod = None if bias is None else lambda score, b, h, i, j: score + bias[h, i, j]
    if q.is_cuda and not torch.compiler.is_compiling():
        return compiled_flex()(q, k, v, score_mod, block_mask)  # unfused unless compiled
    return flex_attention(q, k, v, score_mod, block_mask)


@functools.cache
def compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


def flex_mask(q_pos, k_pos, window, bias, q_doc=None, k_doc=None):
    """attention_mask in the form that flex takes: a BlockMask, and the bias (nh, Tq, Tk)."""

    def visible(b, h, i, j):
        distance = q_pos[i] - k_pos[j]
        see = (distance >= 0) & (distance < window) if window else distance >= 0
        return see if q_doc is None else see & (q_doc[b, i] == k_doc[b, j])

    B = None if q_doc is None else len(q_doc)
    return create_block_mask(visible, B, None, len(q_pos), len(k_pos), q_pos.device), bias


KERNELS = {"auto": sdpa, "flash": sdpa_flash, "math": sdpa_math, "flex": flex}
# for lengths that vary: all but cuDNN, which plans each new shape for tenths of a second
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Ring:
    """Slots for the newest `size` positions: position p lies in slot p % size. Shared by the layers
    of one window. Only which of three cases it is Python decides, so that a graph can replay it."""

    FAR = 2**62  # the position of an empty slot: in every query's future, so never visible

    def __init__(self, size):
        self.size = size

    def place(self, start, pos, static):
        """The keys of the positions pos (T,), from start on, come next -> (Tk,) the positions of
        what their queries attend to; pos itself where that is nothing else. static: empty slots
        are among them, so that Tk stays the same."""
        self.start, self.slots, T = start, pos[-self.size :] % self.size, len(pos)
        if start == 0 and T > 1:
            self.seen_as = "chunk"  # nothing came before: the chunk attends to itself
            return pos
        if T == 1 or start + T <= self.size:
            self.seen_as = "ring"  # what is overwritten is out of every query's window
            self.filled = self.size if static else min(self.size, start + T)
            return self.positions(pos[-1])[: self.filled]
        self.seen_as = "both"  # the first queries need what the last keys overwrite
        return torch.cat((self.positions(pos[0] - 1), pos))

    def positions(self, newest):
        """The position in each slot, (size,), once position `newest`, (), is the last."""
        behind = (newest - torch.arange(self.size, device=newest.device)) % self.size
        return (newest - behind).masked_fill(behind > newest, self.FAR)


class LayerCache:
    """One layer's keys and values, (B, nkv, size, hs) each."""

    def __init__(self, ring):
        self.ring, self.k, self.v = ring, None, None

    def update(self, k, v):
        """Store k, v (B, nkv, T, hs) of the newest positions -> what their queries attend to."""
        ring = self.ring
        if self.k is None:
            self.k = k.new_zeros(*k.shape[:2], ring.size, k.size(3))
            self.v = torch.zeros_like(self.k)
        new = k, v = k.type_as(self.k), v.type_as(self.v)
        if ring.seen_as == "both":
            new = torch.cat((self.k, k), dim=2), torch.cat((self.v, v), dim=2)
        self.k.index_copy_(2, ring.slots, k[:, :, -ring.size :])
        self.v.index_copy_(2, ring.slots, v[:, :, -ring.size :])
        if ring.seen_as == "ring":
            return self.k[:, :, : ring.filled], self.v[:, :, : ring.filled]
        return new


class KVCache:
    """Keys and values of the positions seen so far, for generation of up to `length` positions.

    They are stored after rotation, nkv heads of them, and a windowed layer keeps its last W only.
    """

    def __init__(self, config, length):
        self.length, self.seen = length, 0
        self.static = False  # whether shapes must stay the same, see Ring.place
        sizes = [min(w, length) if w else length for w in config.windows]
        self.rings = {size: Ring(size) for size in sizes}
        self.layers = [LayerCache(self.rings[size]) for size in sizes]
        self.documents = None  # (B, length) the document of each position, if the model asks

    def place(self, pos):
        """Make room for the tokens at pos (T,), contiguous -> {ring size: (Tk,) the positions of
        what their queries attend to, masks still to be applied}."""
        start, T = self.seen, len(pos)
        if start + T > self.length:
            raise ValueError(f"the cache holds {self.length} positions, {T} more do not fit")
        self.seen += T
        rings = self.rings.items()
        return {size: ring.place(start, pos, self.static) for size, ring in rings}

    def number_documents(self, pos, begun):
        """Count on: begun (B, T), the documents that began since pos[0] -> (B, T) the document of
        each token at pos."""
        if self.documents is None:
            self.documents = begun.new_zeros(len(begun), self.length)
        before = self.documents[:, (pos[:1] - 1).clamp(min=0)]  # (B, 1), at the very start 0
        self.documents[:, pos] = before + begun
        return before + begun

    def documents_at(self, pos):
        return self.documents[:, pos.clamp(max=self.length - 1)]  # an empty slot's is never seen

    def pick(self, rows):
        """A new cache whose batch is these rows of this one's, (B',) int64 with repeats: several
        continuations of one context then share the work on it."""
        picked = copy.copy(self)
        picked.layers = [copy.copy(layer) for layer in self.layers]
        for layer in picked.layers:
            layer.k, layer.v = layer.k[rows], layer.v[rows]
        if self.documents is not None:
            picked.documents = self.documents[rows]
        return picked

    def to(self, dtype):
        for layer in self.layers:
            layer.k, layer.v = layer.k.to(dtype), layer.v.to(dtype)


# ----------------------------------------------------------------------------- MLP and block


class MLP(nn.Module):
    """c_proj(activation(c_fc(x))), four times as wide inside."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_hidden, bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_hidden, config.n_embd, bias=config.bias)

    @staticmethod
    def default_hidden(n_embd):
        return 4 * n_embd

    def forward(self, x):
        return self.c_proj(self.activation(self.c_fc(x)))


class GELU(MLP):
    """GPT-2's: the tanh approximation (Hendrycks and Gimpel 2016)."""

    def activation(self, x):
        return F.gelu(x, approximate="tanh")


class ReLU2(MLP):
    """Squared ReLU (So et al. 2021)."""

    def activation(self, x):
        return F.relu(x).square()


class SwiGLU(MLP):
    """c_proj(silu(gate) * up) (Shazeer 2020, eq. 6); c_fc holds gate and up, in this order."""

    def __init__(self, config):
        super().__init__(config)
        self.c_fc = nn.Linear(config.n_embd, 2 * config.mlp_hidden, bias=config.bias)

    @staticmethod
    def default_hidden(n_embd):
        """8/3 n_embd, three matrices of it as large as GELU's two, to the next multiple of 8."""
        return math.ceil(8 * n_embd / 3 / 8) * 8

    def activation(self, x):
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


MLPS = {"gelu": GELU, "relu2": ReLU2, "swiglu": SwiGLU}


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config)
        self.attn = ATTENTIONS[config.attention](config)
        self.ln_2 = NORMS[config.norm](config)
        self.mlp = MLPS[config.mlp](config)
        self.dropout = config.dropout

    def forward(self, x, rotation, mask, cache=None):
        x = x + self.attn(self.ln_1(x), rotation, mask, cache)
        return x + F.dropout(self.mlp(self.ln_2(x)), self.dropout, self.training)


# ----------------------------------------------------------------------------- the loss


CHUNK_BYTES = 2**28  # of logits: large products are faster, and so much hardly matters for memory


def loss_chunks(x, w):
    """Equal slices over the rows of x, (N, C): as few as keep the logits x @ w.T of each within
    CHUNK_BYTES and 4,096 rows, for fp16 to hold their sum, but at most 16, for they unroll."""
    rows = min(4096, max(1, CHUNK_BYTES // (len(w) * x.element_size())))
    number = max(1, min(16, math.ceil(len(x) / rows)))
    size = max(1, math.ceil(len(x) / number))
    return [slice(i, i + size) for i in range(0, len(x), size)]


class MeanCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of the logits x @ weight.T over the rows with target >= 0.

    x (N, C), weight (V, C), targets (N,), logit_softcap -> a scalar, in fp32. The logits exist
    a chunk of rows at a time, and are turned into their gradient while they do: none are kept
    for the backward pass.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, cap):
        w = weight.to(x.dtype)
        wT = transposed(w)
        count = (targets >= 0).sum().clamp(min=1)
        loss = x.new_zeros((), dtype=torch.float32)
        dx, dwT = torch.empty_like(x), weight.new_zeros(weight.T.shape)
        for rows in loss_chunks(x, w):
            logits = softcap(x[rows] @ wT, cap)  # (chunk, V)
            loss = loss + into_gradient(logits, targets[rows], cap)
            dx[rows] = logits @ w
            if logits.dtype == dwT.dtype:
                dwT.addmm_(x[rows].T, logits)
            else:  # each chunk's product is rounded once, their sum is kept in fp32
                dwT += transposed(x[rows]) @ logits
            del logits  # before the next chunk's are made
        ctx.save_for_backward(dx, transposed(dwT), count)  # in the weight's own layout
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        dx, dw, count = ctx.saved_tensors
        scale = grad / count
        # in place: a second backward pass would be an error, as torch itself finds out
        return dx.mul_(scale), dw.mul_(scale), None, None


def into_gradient(logits, targets, cap):
    """Sum of the cross entropies of logits (n, V), after softcap, and targets (n,) -> a scalar in
    fp32; overwrites the logits with its gradient with respect to them, before softcap."""
    keep, target = targets >= 0, targets.clamp(min=0)
    at_target = torch.arange(len(logits), device=logits.device), target

    def slope(z):  # the derivative of softcap, whose value is z
        return 1 - (z / cap) ** 2 if cap else 1

    own, own_logp = logits[at_target].float(), []
    for rows in logit_blocks(logits):
        slopes, z = slope(logits[rows]), logits[rows].float()
        top, total = exponentiate(z)
        own_logp.append(own[rows] - top - total.log())
        z.mul_((keep[rows] / total)[:, None])
        logits[rows] = z.mul_(slopes) if cap else z
    own_logp = torch.cat(own_logp)  # (n,)
    # softmax - one-hot; the division by their count waits for the backward pass, where it meets
    # the loss scale, so that fp16 does not underflow
    logits[at_target] = ((own_logp.exp() - 1) * keep * slope(own)).type_as(logits)
    return -(own_logp * keep).sum()


def cache_blocks(x, size):
    """Slices over the rows of x: on a CPU `size` for each of its threads, for their caches; else
    all at once."""
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    size = size * torch.get_num_threads() if on_cpu else max(1, len(x))
    return [slice(i, i + size) for i in range(0, len(x), size)]


def logit_blocks(logits):
    """cache_blocks of 1 MB in fp32, in which several passes are three times as fast."""
    return cache_blocks(logits, max(1, 2**18 // logits.size(1)))


def transposed(w):
    """w.T, its rows contiguous: the layout in which CPUs multiply bf16 up to twice as fast."""
    wT = w.new_empty(w.T.shape)
    for rows in cache_blocks(w, 128):
        wT[:, rows] = w[rows].T
    return wT


def cross_entropies(x, weight, targets, cap):
    """Cross entropy of every row, (N, C), (V, C), (N,) -> (N,) fp32, 0 where target is -1; for
    evaluation: no logits outlive their chunk."""
    losses = [x.new_zeros(0, dtype=torch.float32)]
    for rows in loss_chunks(x, weight):
        # autocast keeps the weight that it casts for F.linear from one call to the next
        logits, target = softcap(F.linear(x[rows], weight), cap), targets[rows]  # (chunk, V)
        own = logits.gather(1, target.clamp(min=0)[:, None])[:, 0].float()
        for block in logit_blocks(logits):
            top, total = exponentiate(logits[block].float())
            loss = total.log() - (own[block] - top)
            losses.append(loss.masked_fill(target[block] < 0, 0))
        del logits  # before the next chunk's are made
    return torch.cat(losses)


def exponentiate(z):
    """z (n, V) becomes exp(z - top) -> top (n,), its largest values, and total (n,), its sum now:
    the log-probability of a logit z_i is z_i - top - log(total)."""
    top = z.amax(-1)
    return top, z.sub_(top[:, None]).exp_().sum(-1)


def softcap(logits, cap):
    """cap * tanh(logits / cap), which keeps logits within +-cap (Gemma 2); cap 0 leaves them."""
    return cap * torch.tanh(logits / cap) if cap else logits


# ----------------------------------------------------------------------------- the model


class GPT(nn.Module):
    """The language model. Initial weights depend only on torch's seed and the parameter's name,
    so two variants built after the same torch.manual_seed start with equal shared weights."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # drawn before anything else is: how much randomness that takes depends on the variant
        seed = int(torch.randint(2**31, (), device="cpu"))
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=POSITIONS[config.pos](config),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=NORMS[config.norm](config),
            )
        )
        if config.embd_norm:
            self.transformer["ln_emb"] = NORMS[config.norm](config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        if not self.lm_head.weight.is_meta:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed):
        """GPT-2's: N(0, 0.02), residual projections by 1/sqrt(2 n_layer) smaller, biases 0."""
        for name, p in self.named_parameters():
            if name.startswith("transformer.wpe.") and self.config.pos != "learned":
                continue  # Kerple and FIRE come with initial values of their own
            if name.endswith("bias") or (self.config.zero_init and name.endswith("c_proj.weight")):
                p.zero_()
            elif p.dim() == 2:
                std = 0.02
                if name.endswith(("e_proj.weight", "f_proj.weight")):
                    std = self.config.linformer_segment**-0.5  # summaries as large as keys
                if name.endswith("c_proj.weight"):
                    std /= math.sqrt(2 * self.config.n_layer)
                generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
                p.copy_(torch.empty(p.shape).normal_(0.0, std, generator=generator))

    def forward(self, idx, targets=None):
        """idx (B, T) -> logits (B, T, V) and None; with targets (B, T), -1 where there is none,
        None and the mean cross entropy in nats (fp32 scalar)."""
        x = self.features(idx)
        if targets is None:
            return self.logits(x), None
        x, targets = self.head_input(x.flatten(0, 1)), targets.flatten()
        if torch.is_grad_enabled():
            cap = self.config.logit_softcap
            return None, MeanCrossEntropy.apply(x, self.lm_head.weight, targets, cap)
        losses = self.cross_entropies(x, targets)
        return None, losses.sum() / (targets >= 0).sum().clamp(min=1)

    def features(self, idx, cache=None, pos=None):
        """idx (B, T) -> what the head reads, (B, T, C). With a cache, idx continues it. pos (T,):
        the positions of idx, where the caller has them on the device."""
        wpe = self.transformer.wpe
        if pos is None:
            start = cache.seen if cache else 0
            self.check_length(start + idx.size(1))
            pos = torch.arange(start, start + idx.size(1), device=idx.device)
        x = self.transformer.wte(idx)  # (B, T, C)
        embedded = wpe.embed(pos)
        if embedded is not None:
            x = x + embedded.type_as(x)
        if self.config.embd_norm:
            x = self.transformer.ln_emb(x)
        x = F.dropout(x, self.config.dropout, self.training)
        rotation = wpe.rotation(pos)

        masks, windows = self.masks(pos, idx, cache), self.config.windows
        for i, block in enumerate(self.transformer.h):
            x = block(x, rotation, masks[windows[i]], cache.layers[i] if cache else None)
        return self.transformer.ln_f(x)

    def check_length(self, length):
        """ValueError when the model has no positions for so many tokens."""
        if length > self.config.block_size and not self.transformer.wpe.extrapolates:
            raise ValueError(
                f"{length} tokens are more than block_size {self.config.block_size}, and pos "
                f"'{self.config.pos}' has no positions beyond it; shorten the text, or train with "
                f"a relative encoding such as --pos rope"
            )

    def masks(self, pos, idx, cache):
        """What the tokens idx (B, T) at pos (T,) may attend to: {window: a mask as attention_mask
        or window_masks makes it, or None for plain causal attention and for one token that sees all
        keys}, one for all layers of that window."""
        config, wpe, T = self.config, self.transformer.wpe, len(pos)
        flex = config.attention_kernel == "flex" and not cache
        attended = cache.place(pos) if cache else {}
        docs = None
        if config.document_mask:  # the end-of-text token begins a document
            docs = (idx == config.vocab_used - 1).cumsum(1)  # (B, T)
            docs = cache.number_documents(pos, docs) if cache else docs
        masks = {}
        for i, window in enumerate(config.windows):
            if window in masks:
                continue
            if config.attention == "linformer":
                start = cache.layers[i].ring.start if cache else 0
                masks[window] = linformer_mask(start, T, config, wpe, pos.device)
                continue
            k_pos = attended[cache.layers[i].ring.size] if cache else pos
            if k_pos is pos and 0 < window < T and not flex:
                masks[window] = window_masks(pos, window, wpe, docs)
                continue
            bias = wpe.bias(pos, k_pos)
            # one query may see all that a ring keeps, if there are no empty slots
            plain = k_pos is pos or (T == 1 and not cache.static)
            if plain and bias is None and not config.document_mask and not flex:
                masks[window] = None
                continue
            make, k_docs = flex_mask if flex else attention_mask, docs
            if config.document_mask and k_pos is not pos:
                k_docs = cache.documents_at(k_pos)
            masks[window] = make(pos, k_pos, window, bias, docs, k_docs)
        return masks

    @torch.no_grad()
    def token_losses(self, x, targets):
        """Cross entropy in nats of each target, features (B, T, C) and (B, T) -> (B, T) fp32; 0
        where target is -1.

        Only positions that have a target cost logits. For evaluation: no gradient."""
        wanted = targets >= 0
        x = self.head_input(x[wanted])  # (N, C)
        result = torch.zeros(targets.shape, device=x.device)
        result[wanted] = self.cross_entropies(x, targets[wanted])
        return result

    def cross_entropies(self, x, targets):
        return cross_entropies(x, self.lm_head.weight, targets, self.config.logit_softcap)

    def logits(self, x):
        return softcap(self.lm_head(x), self.config.logit_softcap)

    @staticmethod
    def head_input(x):
        """Autocast leaves the last norm's output in fp32; the head's product runs in its dtype."""
        device = x.device.type
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x

    # ------------------------------------------------------------------------- generation

    @torch.no_grad()
    def stream(
        self,
        idx,
        max_new_tokens,
        temperature=1.0,
        top_k=None,
        top_p=None,
        use_cache=True,
        generator=None,
        decoder=None,
    ):
        """Yield the next token of every row of idx (B, T), (B,) at a time.

        temperature 0 takes the likeliest token; top_k keeps the k likeliest, top_p the fewest
        likeliest whose probabilities reach p. Padding ids (vocab_used and up) are never drawn.
        decoder: what takes over after the prompt, see sample.py: from the cache it makes a function
        of the newest tokens (B, 1), whose result is next_logits'.
        """
        cache = KVCache(self.config, idx.size(1) + max_new_tokens) if use_cache else None
        step, fresh = functools.partial(self.next_logits, cache=cache), idx
        for i in range(max_new_tokens):
            if i == 1 and decoder is not None:
                step = decoder(cache)
            logits = step(fresh if use_cache else idx)
            fresh = sample_token(logits, temperature, top_k, top_p, generator)[:, None]  # (B, 1)
            idx = torch.cat((idx, fresh), dim=1)
            yield fresh[:, 0]

    def next_logits(self, idx, cache=None, pos=None):
        """idx (B, T), pos (T,) as for features -> (B, V used) fp32, the logits of what follows."""
        with sdpa_kernel(ANY_LENGTH):
            x = self.features(idx, cache, pos)
        return self.logits(x[:, -1]).float()[:, : self.config.vocab_used]

    def generate(self, idx, max_new_tokens, *args, **kwargs):
        """idx (B, T) -> (B, T + max_new_tokens); the options are those of stream."""
        new = [token[:, None] for token in self.stream(idx, max_new_tokens, *args, **kwargs)]
        return torch.cat([idx, *new], dim=1)

    # ------------------------------------------------------------------------- size and cost

    def num_params(self):
        """All parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T=None):
        """Training FLOPs per token at context T (default block_size): 6 N + 12 n_layer n_embd T
        (PaLM, appendix B), where N counts the head but no position table, and T the keys that
        the layers really meet."""
        c, T = self.config, T or self.config.block_size
        N = self.num_params() - sum(p.numel() for p in self.transformer.wpe.parameters())
        if not c.tie_embeddings:
            N -= self.transformer.wte.weight.numel()  # a look-up, not a product
        return 6 * N + 12 * c.n_embd * c.keys_per_token(T)

    # ------------------------------------------------------------------------- loading

    @classmethod
    def from_checkpoint(cls, path):
        """Load a step folder, a run folder (its latest step), a Hugging Face folder or hub name."""
        folder = Path(path)
        if (folder / "latest").is_file():
            folder = latest_step(folder)
        if not folder.is_dir():
            if folder.exists():
                raise ValueError(f"{path} is a file; give the folder that holds model.safetensors")
            if len(folder.parts) > 2 or (len(folder.parts) == 2 and folder.parent.is_dir()):
                raise ValueError(f"no checkpoint folder {folder}")
            return cls.from_pretrained(str(path))
        config = read_json(folder / "config.json")
        if "model" not in config:
            return cls.from_pretrained(folder)
        known = {f.name for f in fields(GPTConfig)}
        if not isinstance(config["model"], dict):
            raise ValueError(
                f"{folder}/config.json: model is {config['model']!r}, no table of fields"
            )
        unknown = sorted(set(config["model"]) - known)
        if unknown:
            raise ValueError(f"{folder} is of another version: it sets {', '.join(unknown)}")
        for name, value in config["model"].items():
            kind = type(getattr(GPTConfig, name))
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(f"{folder}/config.json: {name} is {value!r}, not {kind.__name__}")
        model = cls.empty(GPTConfig(**config["model"]))
        model.load_weights(read_safetensors(folder / "model.safetensors"), folder)
        from checkpoints import check_sum

        check_sum(folder, "model.safetensors")  # a flipped bit is a weight like any other
        return model

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """Load a Hugging Face model, from a folder or from the hub ("gpt2"); see hf.py."""
        import hf

        return hf.load(name_or_folder)

    @classmethod
    def empty(cls, config):
        """A model whose weights are about to be loaded: no time is spent on drawing them."""
        with torch.device("meta"):
            model = cls(config)
        model = model.to_empty(device="cpu")
        if config.tie_embeddings:
            model.lm_head.weight = model.transformer.wte.weight
        return model.eval()

    def load_weights(self, weights, origin):
        """Fill every parameter from a state dict; names and shapes must match exactly."""
        weights = dict(weights)
        if self.config.tie_embeddings:
            weights.setdefault("lm_head.weight", weights.get("transformer.wte.weight"))
        own = self.state_dict()
        for word, names in (("lacks", own.keys() - weights.keys()),
                            ("has unknown", weights.keys() - own.keys())):  # fmt: skip
            if names:
                raise ValueError(f"{origin} {word} tensors {', '.join(sorted(names)[:3])}")
        for name, w in weights.items():
            if w.shape != own[name].shape:
                have, want = tuple(w.shape), tuple(own[name].shape)
                raise ValueError(f"{origin}: {name} has shape {have}, the config asks for {want}")
            if not w.isfinite().all():
                raise ValueError(
                    f"{origin}: {name} holds nan or infinity; take an older checkpoint"
                )
        self.load_state_dict(weights)
        return self


def sample_token(logits, temperature, top_k, top_p, generator=None):
    """Draw one token a row: logits (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(-1)
    nucleus = top_p is not None and top_p < 1
    ids = None  # of the candidates, the likeliest first: to draw from a few is much faster
    if top_k:
        logits, ids = logits.topk(min(top_k, logits.size(-1)))
    elif nucleus:
        logits, ids = logits.sort(descending=True)
    probs = (logits / temperature).softmax(-1)
    if nucleus:
        beyond = probs.cumsum(-1) - probs >= top_p  # reached before this token, so not needed
        beyond[:, 0] = False
        probs = probs.masked_fill(beyond, 0)
    drawn = torch.multinomial(probs, 1, generator=generator)  # (B, 1), makes them sum to 1
    return (drawn if ids is None else ids.gather(1, drawn))[:, 0]


def latest_step(run):
    """The step folder that run/latest names."""
    name = (run / "latest").read_text(errors="replace").strip()
    if not name.startswith("step_") or not name.isprintable() or Path(name).name != name:
        raise ValueError(f"{run}/latest names no step folder: {name[:40]!r}")
    return run / name


def read_json(path):
    """The object in a JSON file, as a dict; ValueError when there is none."""
    from cli import pointer_hint

    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"no {path}: give a step, run or Hugging Face folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}{pointer_hint(path)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object but {str(content)[:40]}")
    return content


def read_safetensors(path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from cli import pointer_hint

    if not os.path.exists(path):
        raise ValueError(f"no {path}; weights load from safetensors files only")
    try:
        return load_file(path)
    except SafetensorError as error:
        hint = pointer_hint(path)
        raise ValueError(f"{path} is not a whole safetensors file: {error}{hint}") from None


# ----------------------------------------------------------------------------- where it runs


def pick_device(name):
    """The flag --device -> a torch device; auto takes cuda, else mps, else cpu."""
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device '{name}' is not to be had: {reason}") from None


def pick_dtype(name, device):
    """The flag --dtype -> the dtype of the matrix products, under autocast; auto takes bfloat16
    where the hardware has it, float16 on CUDA cards before Ampere, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        newer = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if newer else torch.float16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():  # AMX comes with it
        return torch.bfloat16  # without such units bf16 is several times slower than fp32
    return torch.float32


def tune_cpu(device):
    """Settings of a process whose products are a CPU's, before the first; on others none."""
    if device.type != "cpu":
        return
    # oneDNN makes a kernel of megabytes for every new shape, and evaluation meets hundreds
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    # glibc gives back what a step frees, and every step faults the same pages in again, which can
    # take a third of it; other systems have no such library
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate mapping for large blocks
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back; a size would end at 2 GB
        libc.mallopt(-2, 2**28)  # M_TOP_PAD: grow the heap by 256 MB at a time


def autocast(device, dtype):
    """The context in which the model runs its products in dtype; does nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


if __name__ == "__main__":
    import cli
    import switches  # what the switches cost, by formula, and pictures of them

    cli.run(switches.main)
