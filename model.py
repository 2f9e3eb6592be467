"""GPT-2 and its variants in one file: every architecture switch is a field of GPTConfig.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig(pos="rope", n_kv_head=4, mlp="swiglu", norm="rmsnorm"))
    logits, _ = model(idx)          # every position
    _, loss = model(idx, targets)   # the mean loss, without ever holding all logits
    model = GPT.from_pretrained("runs/quickstart")   # or "gpt2", or a Hugging Face folder

Papers: GPT-2 (Radford et al. 2019), sinusoidal positions (Vaswani et al. 2017), RoPE (Su et al.
2021), ALiBi (Press et al. 2022), Kerple (Chi et al. 2022), FIRE (Li et al. 2024), GQA (Ainslie et
al. 2023), SwiGLU (Shazeer 2020), ReLU^2 (So et al. 2021), RMSNorm (Zhang and Sennrich 2019),
sliding windows (Beltagy et al. 2020; Mistral, Jiang et al. 2023), QK-norm (Henry et al. 2020),
logit soft-capping (Gemma 2, 2024), FlexAttention (Dong et al. 2024).

Shapes: B batch, T positions (Tq queries, Tk keys), C = n_embd, nh = n_head, nkv = n_kv_head,
hs = C / nh, V = vocab_size. Parameter names are nanoGPT's.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanoswitch.cache import LayerCache
from nanoswitch.cli import at_least
from nanoswitch.generation import Generation
from nanoswitch.kernels import (
    KERNELS,
    as_floats,
    attention_mask,
    flex_mask,
    repeat_heads,
    takes_flex,
    window_masks,
)
from nanoswitch.loss import MeanCrossEntropy, cross_entropies, softcap
from nanoswitch.registry import Table, read_settings, unknown

RESIDUAL_DTYPES = ("float32", "autocast")


# The choices of pos, norm, mlp, attention and residual are the keys of tables below, and the files
# in variants/: one file makes another choice.
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
    pos: "Literal[POSITIONS.names()]" = "learned"
    """position encoding"""
    pos_pattern: str = ""
    """position encodings by layer, repeated over depth, such as rope,rope,none; empty = pos"""
    norm: "Literal[NORMS.names()]" = "layernorm"
    """normalisation before attention, before the MLP and before the head"""
    norm_eps: float = 1e-5
    """epsilon inside the normalisation"""
    embd_norm: bool = False
    """a normalisation right after the embeddings too, as in Bloom"""
    mlp: "Literal[MLPS.names()]" = "gelu"
    """feed-forward network"""
    mlp_hidden: int = 0
    """hidden width of the MLP; 0 = 4 n_embd, or for swiglu the width of equal parameters"""
    attention: "Literal[ATTENTIONS.names()]" = "full"
    """attention of all layers"""
    attention_pattern: str = ""
    """attentions by layer, repeated over depth, such as linformer,full; empty = attention"""
    residual: "Literal[RESIDUALS.names()]" = "plain"
    """how the branches of a block join the residual stream"""
    settings: str = ""
    """numbers of the variants in use, such as canon.width=3,dyt.alpha=0.8; their files say which"""
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
    residual_dtype: "Literal[RESIDUAL_DTYPES]" = "float32"
    """dtype of the residual stream; autocast: that of the matrix products, fewer bytes on CUDA"""
    zero_init: bool = False
    """residual projections start at zero, so that every block starts as the identity"""
    document_mask: bool = False
    """attention does not cross the end-of-text token, id vocab_used - 1"""
    attention_kernel: "Literal[tuple(KERNELS)]" = "auto"
    """auto lets torch choose, and takes FlexAttention for windows and documents in compiled CUDA
    runs; flash and math are torch's kernels of that name, flex is FlexAttention, for CUDA only"""

    def __post_init__(self):
        tables = {
            "pos": POSITIONS, "norm": NORMS, "mlp": MLPS, "attention": ATTENTIONS,
            "residual": RESIDUALS,
        }  # fmt: skip
        used = []  # (name, class)
        for flag, table in tables.items():
            for name in (getattr(self, flag), *split(getattr(self, f"{flag}_pattern", ""))):
                used.append((name, table[name]))  # ValueError where there is none
        for flag, names in (("attention_kernel", KERNELS), ("residual_dtype", RESIDUAL_DTYPES)):
            if getattr(self, flag) not in names:
                raise unknown(flag, getattr(self, flag), names)
        at_least(self, 1, "block_size vocab_size vocab_used n_layer n_head n_embd")
        for name, by_layer in (("pos", self.encodings), ("attention", self.attentions)):
            if getattr(self, name) not in by_layer:
                raise ValueError(
                    f"no layer has {name} {getattr(self, name)}: {name}_pattern gives them "
                    f"{', '.join(dict.fromkeys(by_layer))}; give --{name} one of these"
                )
        at_least(self, 0, "n_kv_head mlp_hidden window logit_softcap")
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
        if self.window_pattern.strip("SL"):
            raise ValueError(f"window_pattern '{self.window_pattern}' may hold only S and L")
        if self.window_pattern and not self.window:
            raise ValueError("window_pattern needs a window: add --window W")
        self.own_settings = read_settings(self.settings, used)  # {name: {key: value}}
        for _, kind in used:
            if hasattr(kind, "check"):
                kind.check(self)
        if not self.mlp_hidden:
            self.mlp_hidden = MLPS[self.mlp].default_hidden(self.n_embd)

    @property
    def head_size(self):
        return self.n_embd // self.n_head

    @property
    def windows(self):
        """The window of each layer, 0 for full attention: a list of n_layer ints."""
        short = self.by_layer(self.window_pattern or "S")
        return [self.window if letter == "S" else 0 for letter in short]

    @property
    def encodings(self):
        """The name of each layer's position encoding: a list of n_layer."""
        return self.by_layer(split(self.pos_pattern) or [self.pos])

    @property
    def attentions(self):
        """The name of each layer's attention: a list of n_layer."""
        return self.by_layer(split(self.attention_pattern) or [self.attention])

    def by_layer(self, pattern):
        return [pattern[i % len(pattern)] for i in range(self.n_layer)]


def split(pattern):
    """A text of names with commas between them -> a list of them."""
    return [name.strip() for name in pattern.split(",")] if pattern else []


# ----------------------------------------------------------------------------- normalisation


class LayerNorm(nn.LayerNorm):
    """Ba et al. 2016, as GPT-2 has it."""

    def __init__(self, config):
        super().__init__(config.n_embd, config.norm_eps, bias=config.bias)


class RMSNorm(nn.RMSNorm):
    """Zhang and Sennrich 2019: x / sqrt(mean(x^2) + eps) * weight, the mean over the C channels of
    one token."""

    def __init__(self, config):
        super().__init__(config.n_embd, config.norm_eps)


NORMS = Table("norm", {"layernorm": LayerNorm, "rmsnorm": RMSNorm})


# ----------------------------------------------------------------------------- positions


class NoPosition(nn.Module):
    """What a position encoding may do; each one below overrides only what it uses.

    Everything is a function of absolute positions (int64), computed once a forward pass and
    shared by all layers. On its own: no encoding, order is known only through the causal mask.
    """

    extrapolates = True  # runs beyond block_size
    own_init = True  # __init__ gives the parameters their initial values

    def __init__(self, config):
        super().__init__()

    @staticmethod
    def check(config):
        """ValueError where the encoding cannot serve this config."""

    def embed(self, pos):
        """(T,) -> (T, C) added to the token embeddings, or None."""

    def rotation(self, pos):
        """(T,) -> cos and sin, (T, hs / 2) each, that turn queries and keys, or None."""

    def bias(self, q_pos, k_pos):
        """(Tq,), (Tk,) -> (nh, Tq, Tk) added to the attention scores, or None."""

    def flex_bias(self, q_pos, k_pos):
        """The bias for FlexAttention: the same tensor, or a function of a score and its place that
        reads no tensor of Tq x Tk."""
        return self.bias(q_pos, k_pos)

    @property
    def no_decay(self):
        """Names of this module's own parameters that weight decay leaves alone, whatever their
        shape."""
        return [name for name, _ in self.named_parameters(recurse=False)]

    def uses(self, T):
        """How often each weight is multiplied for one token of T; a table is only looked up."""
        return 0


def has_bias(kind):
    """Whether an encoding, or a class of them, adds to the attention scores."""
    return (kind if isinstance(kind, type) else type(kind)).bias is not NoPosition.bias


def learns_bias(encoding):
    """Whether what an encoding adds to the attention scores has weights."""
    return has_bias(encoding) and len(list(encoding.parameters())) > 0


class Learned(NoPosition):
    """A trained vector per position (GPT-2): none exist beyond block_size."""

    extrapolates = False
    own_init, no_decay = False, ()  # drawn and decayed as other matrices are

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

    @staticmethod
    def check(config):
        if config.head_size % 2:
            raise ValueError(f"rope turns pairs of channels: head size {config.head_size} is odd")

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

    def flex_bias(self, q_pos, k_pos):
        slopes = self.slopes(q_pos.device)
        return lambda score, b, h, i, j: score - slopes[h] * (q_pos[i] - k_pos[j])


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

    def uses(self, T):
        return T  # once for every key

    def psi(self, x):
        return torch.log1p(self.c.abs() * x)

    def bias(self, q_pos, k_pos):
        threshold = torch.maximum(q_pos.float(), self.L.abs())[:, None]  # (Tq, 1)
        ratio = self.psi(distances(q_pos, k_pos)) / self.psi(threshold)  # (Tq, Tk)
        return self.mlp(ratio[..., None].type_as(self.c)).permute(2, 0, 1)  # (nh, Tq, Tk)


def distances(q_pos, k_pos):
    """How far each key lies behind each query, (Tq,), (Tk,) -> (Tq, Tk) fp32; 0 if ahead."""
    return (q_pos[:, None] - k_pos[None, :]).clamp(min=0).float()


POSITIONS = Table(
    "pos",
    {
        "learned": Learned, "sinusoidal": Sinusoidal, "rope": RoPE, "alibi": Alibi,
        "kerple": Kerple, "kerple_power": KerplePower, "fire": FIRE, "none": NoPosition,
    },
)  # fmt: skip


# ----------------------------------------------------------------------------- attention


class Attention(nn.Module):
    """Causal self-attention; query head h reads key head h // (nh / nkv) (GQA, Ainslie 2023).

    Another attention is a subclass that overrides what it does otherwise: its check of the config,
    mask, cache, heads, attend, output, or all of forward."""

    replayable = True  # with a cache, shapes stay the same: a CUDA graph can replay a step
    may_flex = True  # until the compiler fails at FlexAttention

    def __init__(self, config, layer):
        super().__init__()
        self.nh, self.nkv, self.hs = config.n_head, config.n_kv_head, config.head_size
        self.dropout, self.qk_norm = config.dropout, config.qk_norm
        self.window, self.kernel = config.windows[layer], KERNELS[config.attention_kernel]
        self.c_attn = nn.Linear(config.n_embd, (self.nh + 2 * self.nkv) * self.hs, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    @staticmethod
    def check(config):
        """ValueError where this attention cannot be what the config asks for."""
        kernel = config.attention_kernel
        biased = any(has_bias(POSITIONS[name]) for name in config.encodings)
        if kernel == "flash" and (biased or config.window or config.document_mask):
            raise ValueError(
                f"attention_kernel flash knows only plain causal attention, not pos '{config.pos}' "
                f"with window {config.window} and document_mask {config.document_mask}; use auto"
            )
        if kernel == "flex" and config.dropout:
            raise ValueError(f"flex attention has no dropout: set dropout {config.dropout} to 0")

    def forward(self, x, rotation, mask, cache=None, carry=None):
        """x (B, T, C); rotation and mask as GPT.features makes them; cache this layer's; carry
        what the layers of a pass share."""
        q, k, v = self.heads(self.c_attn(x), x, cache, carry)
        if self.qk_norm:
            # CUDA's autocast runs rms_norm in fp32, and its result must fit beside v in a cache
            q, k = (F.rms_norm(x, (self.hs,)).type_as(v) for x in (q, k))
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, nkv, Tk, hs)
        # a cache may hold another dtype
        y = self.attend(q.type_as(k), k, v, mask, cache, x).type_as(q)  # (B, nh, T, hs)
        return self.project(y, x, carry)

    def heads(self, qkv, x, cache, carry):
        """qkv, what c_attn made of x (B, T, C) -> q (B, nh, T, hs), k and v (B, nkv, T, hs)."""
        qkv = qkv.view(*x.shape[:2], -1, self.hs).transpose(1, 2)  # (B, nh + 2 nkv, T, hs)
        return qkv.split((self.nh, self.nkv, self.nkv), dim=1)

    def attend(self, q, k, v, mask, cache, x):
        """q (B, nh, T, hs), k and v (B, nkv, Tk, hs) -> (B, nh, T, hs); x (B, T, C) what the layer
        was given."""
        return self.kernel(q, k, v, mask, self.dropout * self.training)

    def output(self, y, x, carry):
        """The heads' results (B, T, C), side by side, and what the layer was given (B, T, C) ->
        what c_proj reads."""
        return y

    def project(self, y, x, carry):
        """The heads' results (B, nh, T, hs) -> the layer's, (B, T, C)."""
        y = self.output(y.transpose(1, 2).flatten(2), x, carry)  # (B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)

    def share(self, x):
        """Key or value heads, (B, nkv, T, hs) -> one for every query head, (B, nh, T, hs)."""
        return repeat_heads(x, self.nh)

    def mask(self, pos, wpe, docs=None, cache=None):
        """What the queries at pos (T,) may attend to, as kernels.py has it; the layers of one
        class, window and encoding share it. wpe: their position encoding; docs: the documents
        (B, T) of the queries and (B, Tk) of the keys, if attention keeps within them."""
        bias, T = wpe.bias if has_bias(wpe) else None, len(pos)
        masked = 0 < self.window < T or docs is not None
        flex = cache is None and takes_flex(self, pos, masked, learns_bias(wpe))
        k_pos = pos if cache is None else cache.ring.k_pos
        if k_pos is pos and 0 < self.window < T and not flex:
            return window_masks(pos, self.window, bias, docs and docs[0])
        # one query may see all that a ring keeps, if there are no empty slots
        plain = k_pos is pos or (T == 1 and not cache.ring.static)
        if plain and bias is None and docs is None and not flex:
            return None
        if flex:
            return flex_mask(pos, k_pos, self.window, wpe.flex_bias(pos, k_pos), *(docs or ()))
        mask = attention_mask(pos, k_pos, self.window, bias and bias(pos, k_pos), *(docs or ()))
        # in a CUDA graph torch's own change of a mask to floats would be three launches a layer
        recorded = cache is not None and cache.ring.static
        return as_floats(mask, cache.tensors[0].dtype) if recorded else mask

    def new_cache(self, length):
        """What this layer keeps of up to `length` positions."""
        return LayerCache(min(self.window, length) if self.window else length)

    def keys(self, T):
        """Keys that the last of T tokens meets."""
        return min(self.window, T) if self.window else T

    def products(self, T):
        """Multiply-adds for the last of T tokens that are none of a weight's."""
        return 2 * self.nh * self.hs * self.keys(T)  # its scores, and the sum of values


ATTENTIONS = Table("attention", {"full": Attention})


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


class GELUErf(MLP):
    """x times the normal distribution function of x: nanoGPT's, GPT-NeoX's."""

    def activation(self, x):
        return F.gelu(x)


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


MLPS = Table("mlp", {"gelu": GELU, "gelu_erf": GELUErf, "relu2": ReLU2, "swiglu": SwiGLU})


class Residual(nn.Module):
    """How the branches of block `layer` join the residual stream: x + branch(norm(x)) (GPT-2).

    Another one is a subclass. It may keep in carry what later blocks need, and hand on more than x,
    if the last layer makes (B, T, C) of it again."""

    own_init = True  # __init__ gives the parameters their initial values

    def __init__(self, config, layer):
        super().__init__()

    def forward(self, x, ln_1, attn, ln_2, mlp, carry):
        """x (B, T, C); ln_1, attn, ln_2, mlp: functions of (B, T, C); carry: the pass's Carry."""
        x = x + attn(ln_1(x))
        return x + mlp(ln_2(x))


RESIDUALS = Table("residual", {"plain": Residual})


class Carry:
    """What a forward pass takes along from layer to layer: idx (B, T), the KVCache or None, of each
    block in turn its rotation and mask, and any attribute that a variant's layer sets for later
    ones.

    In training targets (B, T), and losses, to which a layer may add what else the head is to
    predict: (x (B, T, C), targets (B, T), the weight of their mean cross entropy)."""

    def __init__(self, idx, cache, targets=None):
        self.idx, self.cache, self.targets, self.losses = idx, cache, targets, []
        self.rotation = self.mask = None


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config)
        self.attn = ATTENTIONS[config.attentions[layer]](config, layer)
        self.ln_2 = NORMS[config.norm](config)
        self.mlp = MLPS[config.mlp](config)
        self.residual = RESIDUALS[config.residual](config, layer)
        self.dropout = config.dropout

    def forward(self, x, rotation, mask, cache=None, carry=None):
        def attn(x):
            return self.attn(x, rotation, mask, cache, carry)

        def mlp(x):
            return F.dropout(self.mlp(x), self.dropout, self.training)

        return self.residual(x, self.ln_1, attn, self.ln_2, mlp, carry)


# ----------------------------------------------------------------------------- the model


class GPT(nn.Module, Generation):
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
                h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                ln_f=NORMS[config.norm](config),
            )
        )
        others = sorted({*config.encodings} - {config.pos})
        others = {name: POSITIONS[name](config) for name in others}
        self.transformer["wpe_other"] = nn.ModuleDict(others)
        if config.embd_norm:
            self.transformer["ln_emb"] = NORMS[config.norm](config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        self.encoded_by = config.encodings  # the name of each layer's encoding
        kinds = list(zip(config.attentions, config.windows, self.encoded_by, strict=True))
        self.alike = [kinds.index(kind) for kind in kinds]  # of each layer the first of its kind
        # whether a cache can hold what tokens read of earlier ones
        self.caches = all(getattr(module, "caches", True) for module in self.modules())
        if not self.lm_head.weight.is_meta:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed):
        """GPT-2's: N(0, 0.02), residual projections by 1/sqrt(2 n_layer) smaller, biases 0. A
        module may say otherwise: own_init, that its values stand; init_std."""
        own = [f"{name}." for name, m in self.named_modules() if getattr(m, "own_init", False)]
        for name, p in self.named_parameters():
            if name.startswith(tuple(own)):
                continue
            if name.endswith("bias") or (self.config.zero_init and name.endswith("c_proj.weight")):
                p.zero_()
            elif p.dim() >= 2:
                std = getattr(self.get_submodule(name.rpartition(".")[0]), "init_std", 0.02)
                if name.endswith("c_proj.weight"):
                    std /= math.sqrt(2 * self.config.n_layer)
                generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
                p.copy_(torch.empty(p.shape).normal_(0.0, std, generator=generator))

    def forward(self, idx, targets=None):
        """idx (B, T) -> logits (B, T, V) and None; with targets (B, T), -1 where there is none,
        None and the mean cross entropy in nats (fp32 scalar)."""
        carry = Carry(idx, None, targets if torch.is_grad_enabled() else None)
        x = self.features(idx, carry=carry)
        if targets is None:
            return self.logits(x), None
        if torch.is_grad_enabled():
            loss = self.mean_loss(x, targets)
            for x, others, weight in carry.losses:
                extra = weight * self.mean_loss(self.transformer.ln_f(x), others)
                loss = loss + (extra - extra.detach())  # its gradient, and the next token's value
            return None, loss
        losses = self.cross_entropies(self.as_products(x.flatten(0, 1)), targets.flatten())
        return None, losses.sum() / (targets >= 0).sum().clamp(min=1)

    def mean_loss(self, x, targets):
        """What the head reads, (B, T, C), and targets (B, T) -> their mean cross entropy."""
        x, cap = self.as_products(x.flatten(0, 1)), self.config.logit_softcap
        return MeanCrossEntropy.apply(x, self.lm_head.weight, targets.flatten(), cap)

    @property
    def encodings(self):
        """{name: position encoding} of all that layers use."""
        return {self.config.pos: self.transformer.wpe} | dict(self.transformer.wpe_other.items())

    @property
    def extrapolates(self):
        """Whether there are positions beyond block_size."""
        return all(encoding.extrapolates for encoding in self.encodings.values())

    def features(self, idx, cache=None, pos=None, carry=None):
        """idx (B, T) -> what the head reads, (B, T, C). With a cache, idx continues it. pos (T,):
        the positions of idx, where the caller has them on the device; carry: what layers share."""
        config, encodings = self.config, self.encodings
        if cache and not self.caches:
            return self.features(cache.read(idx))[:, -idx.size(1) :]
        if pos is None:
            start = cache.seen if cache else 0
            self.check_length(start + idx.size(1))
            pos = torch.arange(start, start + idx.size(1), device=idx.device)
        x = self.transformer.wte(idx)  # (B, T, C)
        for encoding in encodings.values():
            embedded = encoding.embed(pos)
            if embedded is not None:
                x = x + embedded.type_as(x)
        if config.embd_norm:
            x = self.transformer.ln_emb(x)
        if config.residual_dtype == "autocast":
            x = self.as_products(x)
        x = F.dropout(x, config.dropout, self.training)
        rotations = {name: encoding.rotation(pos) for name, encoding in encodings.items()}

        docs = None
        if cache:
            cache.advance(pos)
        if config.document_mask:  # the end-of-text token begins a document
            docs = (idx == config.vocab_used - 1).cumsum(1)  # (B, T)
            docs = cache.number_documents(pos, docs) if cache else docs
        masks = self.masks(pos, docs, cache, encodings)
        layers = cache.layers if cache else [None] * config.n_layer
        carry = carry or Carry(idx, cache)
        for i, block in enumerate(self.transformer.h):
            carry.rotation, carry.mask = rotations[self.encoded_by[i]], masks[i]
            x = block(x, carry.rotation, carry.mask, layers[i], carry)
        return self.transformer.ln_f(x)

    def masks(self, pos, docs=None, cache=None, encodings=None):
        """Of each layer, what the tokens at pos (T,) may attend to; docs (B, T) their documents, if
        attention keeps within them; cache, advanced to pos. Layers of one kind share one mask."""
        masks, encodings = [], encodings or self.encodings
        for i, first in enumerate(self.alike):
            if first < i:
                masks.append(masks[first])
                continue
            layer, both = cache.layers[i] if cache else None, docs
            if docs is not None:
                k_pos = layer.ring.k_pos if cache else pos
                both = docs, docs if k_pos is pos else cache.documents_at(k_pos)
            attn = self.transformer.h[i].attn
            masks.append(attn.mask(pos, encodings[self.encoded_by[i]], both, layer))
        return masks

    def check_length(self, length):
        """ValueError when the model has no positions for so many tokens."""
        if length > self.config.block_size and not self.extrapolates:
            raise ValueError(
                f"{length} tokens are more than block_size {self.config.block_size}, and pos "
                f"'{self.config.pos}' has no positions beyond it; shorten the text, or train with "
                f"a relative encoding such as --pos rope"
            )

    @torch.no_grad()
    def token_losses(self, x, targets):
        """Cross entropy in nats of each target, features (B, T, C) and (B, T) -> (B, T) fp32; 0
        where target is -1.

        Only positions that have a target cost logits. For evaluation: no gradient."""
        wanted = targets >= 0
        x = self.as_products(x[wanted])  # (N, C)
        result = torch.zeros(targets.shape, device=x.device)
        result[wanted] = self.cross_entropies(x, targets[wanted])
        return result

    def cross_entropies(self, x, targets):
        return cross_entropies(x, self.lm_head.weight, targets, self.config.logit_softcap)

    def logits(self, x):
        return softcap(self.lm_head(x), self.config.logit_softcap)

    @staticmethod
    def as_products(x):
        """x in the dtype in which autocast runs products, if it is on; it leaves embeddings and,
        on CUDA, norms in fp32."""
        device = x.device.type
        return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x

    # ------------------------------------------------------------------------- size and loading

    def num_params(self):
        """All parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    @classmethod
    def from_pretrained(cls, checkpoint):
        """Load a step folder, a run folder (its latest step), a Hugging Face folder, or a hub name
        such as gpt2, in eval mode; see nanoswitch/load.py."""
        from nanoswitch.load import load_model

        return load_model(checkpoint)
