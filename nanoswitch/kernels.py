"""Who may look at whom, and the kernels that attend under it.

A mask is None for plain causal attention (and for one query that sees all keys), a tensor as
attention_mask makes it, a list of chunks as window_masks makes it, or a tuple as flex_mask does.

Shapes: B batch, Tq queries, Tk keys, nh heads, nkv of keys and values, hs their size.
"""

import collections
import contextlib
import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# MKL picks the code of a vector function at its first call. Threads that race there can get a less
# precise one, once (pytorch issue 188792), and the run other bits: so one thread calls each first.
for function in (torch.exp, torch.log, torch.log1p, torch.sin, torch.cos, torch.tanh, torch.sqrt):
    function(torch.ones(1))


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


def as_floats(mask, dtype):
    """A mask of True and False, or a bias -> what is added to scores of a dtype."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)
    return mask.to(dtype)


def window_masks(pos, window, bias=None, doc=None):
    """attention_mask for a sliding window over the positions pos (T,), in chunks: a list of
    (slice of queries, slice of the keys they reach, mask), so that time and memory grow with
    T window, not T^2. bias: a position encoding's, a function of query and key positions, or None;
    doc (B, T) if attention keeps within documents."""
    masks, plain = [], bias is None and doc is None
    unit = 8 if pos.is_cuda else 1  # other masks must be padded for CUDA; Inductor fails at that
    for rows, keys in window_chunks(len(pos), window, plain, unit):
        if plain and rows.stop <= window:  # all that causal attention sees lies in the window
            masks.append((rows, keys, None))
            continue
        docs = () if doc is None else (doc[:, rows], doc[:, keys])
        added = None if bias is None else bias(pos[rows], pos[keys])
        masks.append((rows, keys, attention_mask(pos[rows], pos[keys], window, added, *docs)))
    return masks


def window_chunks(T, window, plain, unit=1):
    """[(slice of queries, slice of keys)]. plain: nothing but the window masks, so that the first
    queries, which reach all keys before them, are one chunk for torch's causal kernel. All edges
    but T are multiples of unit."""
    step = max(192, T // 16)  # for fewer queries torch's CPU kernel takes smaller blocks
    step, first = whole(step, unit), whole(window, unit)
    edges = [0, *range(first if plain and first else step, T, step), T]
    return [
        (slice(a, b), slice(whole(max(0, a - window + 1), unit), b))
        for a, b in itertools.pairwise(edges)
    ]


def whole(n, unit):
    """The largest multiple of unit that is at most n."""
    return n // unit * unit


def sdpa(q, k, v, mask, dropout, kernels=None):
    """torch's fused attention: q (B, nh, Tq, hs), k and v (B, nkv, Tk, hs) -> (B, nh, Tq, hs). No
    mask means plain causal, for which it has its fastest kernel, or one query that sees all keys:
    torch's causal mask would let it see the first only. kernels: those that torch may choose from;
    None leaves it to torch."""
    if isinstance(mask, tuple):
        return flex(q, k, v, mask, dropout)
    grouped = q.size(1) != k.size(1)
    if grouped and not takes_groups(q, mask, kernels):
        grouped, k, v = False, repeat_heads(k, q.size(1)), repeat_heads(v, q.size(1))
    if isinstance(mask, list):
        return sdpa_in_chunks(q, k, v, mask, dropout, kernels)
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        if mask.dim() == 3:
            mask = mask[None]  # torch's fused CPU kernel takes two dimensions or four
        if q.is_cuda:
            kernels = kernels or MASKED
    with sdpa_kernel(kernels) if kernels else contextlib.nullcontext():
        if mask is None and q.size(2) == 1:  # a branch: torch.compile takes no symbol as is_causal
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, enable_gqa=grouped)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, enable_gqa=grouped
        )


def repeat_heads(x, nh):
    """Key or value heads, (B, nkv, T, hs) -> one for every query head, (B, nh, T, hs)."""
    return x if x.size(1) == nh else x.repeat_interleave(nh // x.size(1), dim=1)


def takes_groups(q, mask, kernels):
    """Whether the kernel that torch takes for q reads one key head for several query heads: flash
    and cuDNN do, on cards from Ampere on, which alone have bf16, and without a mask. Elsewhere
    torch would fall to its math kernel, all Tq x Tk scores in memory."""
    free = kernels is None or SDPBackend.FLASH_ATTENTION in kernels
    return free and q.is_cuda and q.dtype == torch.bfloat16 and mask is None and q.size(-1) <= 128


def sdpa_in_chunks(q, k, v, chunks, dropout, kernels):
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
        parts.append(sdpa(queries, own_k, own_v, mask, dropout, kernels))
    return torch.cat(parts, dim=2)


def sdpa_flash(q, k, v, mask, dropout):
    # several queries on a cache have a mask, and CUDA's flash kernel knows no fp32
    if mask is not None or (q.is_cuda and q.dtype == torch.float32):
        return sdpa(q, k, v, mask, dropout)
    return sdpa(q, k, v, mask, dropout, [SDPBackend.FLASH_ATTENTION])


def sdpa_math(q, k, v, mask, dropout):
    """Attention step by step, all T x T scores in memory: "regular" attention."""
    return sdpa(q, k, v, mask, dropout, [SDPBackend.MATH])


def takes_flex(attn, pos, masked, learned):
    """Whether FlexAttention serves an Attention from positions pos: by name, or by choice inside a
    compiled graph on a card."""
    compiled = pos.is_cuda and torch.compiler.is_compiling() and len(pos) >= BLOCK
    return attn.kernel is flex or (compiled and chooses_flex(attn, masked, learned))


def chooses_flex(attn, masked, learned):
    """Whether an Attention whose kernel is auto takes FlexAttention in a compiled graph on a card:
    for what is masked (a window, documents), which it alone skips there. It has no dropout and no
    heads below 16, and would add up the gradient of a learned bias score by score."""
    free = attn.kernel is sdpa and attn.may_flex and attn.hs >= 16 and not attn.dropout
    return bool(free and masked and not learned)


def flex(q, k, v, mask, dropout):
    """FlexAttention: skips the blocks that a window or documents mask out; mask as flex_mask's."""
    if not isinstance(mask, tuple):  # with a cache: it would compile anew for every length
        return sdpa(q, k, v, mask, dropout)
    block_mask, bias = mask
    score_mod, options = bias, None
    if isinstance(bias, torch.Tensor):
        score_mod = lambda score, b, h, i, j: score + bias[h, i, j]  # noqa: E731
        options = {"num_stages": 1}  # three blocks of it at once are too many for shared memory
    outside = q.is_cuda and not torch.compiler.is_compiling()  # unfused unless compiled
    attend, grouped = compiled_flex() if outside else flex_attention, q.size(1) != k.size(1)
    return attend(q, k, v, score_mod, block_mask, enable_gqa=grouped, kernel_options=options)


@functools.cache
def compiled_flex():
    return torch.compile(flex_attention, dynamic=False)


def flex_mask(q_pos, k_pos, window, bias, q_doc=None, k_doc=None):
    """attention_mask in the form that flex takes: a BlockMask, and the bias (nh, Tq, Tk) or as a
    function of a score and its place. Positions and documents must rise, so that a block's first
    and last tell about all of it: torch's own create_block_mask first makes the whole mask, 8 bytes
    for each of B Tq Tk."""

    def visible(b, h, i, j):
        distance = q_pos[i] - k_pos[j]
        see = (distance >= 0) & (distance < window) if window else distance >= 0
        return see if q_doc is None else see & (q_doc[b, i] == k_doc[b, j])

    q, k = edges_of_blocks(len(q_pos), q_pos.device), edges_of_blocks(len(k_pos), k_pos.device)
    nearest = q_pos[q.first][:, None] - k_pos[k.last]  # (nq, nk) the least distance in a block
    farthest = q_pos[q.last][:, None] - k_pos[k.first]
    some, every = farthest >= 0, (nearest >= 0) & q.full[:, None] & k.full
    if window:
        some, every = some & (nearest < window), every & (farthest < window)
    some, every = some[None], every[None]
    if q_doc is not None:  # (B, nq, nk)
        some = some & (q_doc[:, q.first, None] <= k_doc[:, None, k.last])
        every = every & (q_doc[:, q.last, None] == k_doc[:, None, k.first])
    blocks = [*ordered(some & ~every), *ordered(every)]
    lengths = len(q_pos), len(k_pos)
    return BlockMask.from_kv_blocks(*blocks, BLOCK, visible, seq_lengths=lengths), bias


BLOCK = 128  # tokens of a block of flex
Blocks = collections.namedtuple("Blocks", "first last full")


def edges_of_blocks(T, device):
    """The first and the last place of every block of T, and whether it is whole: (n,) each."""
    first = torch.arange(0, T, BLOCK, device=device)
    return Blocks(first, (first + BLOCK - 1).clamp(max=T - 1), first + BLOCK <= T)


def ordered(blocks):
    """(B, nq, nk) bool -> of each row of blocks how many there are, (B, 1, nq), and their numbers,
    followed by the others' (B, 1, nq, nk); int32 both."""
    numbers = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1)[:, None].int(), numbers[:, None].int()


KERNELS = {"auto": sdpa, "flash": sdpa_flash, "math": sdpa_math, "flex": flex}
# under a mask: cuDNN, which torch takes first on Hopper, has no gradient for one that is learned,
# and gives NaN at lengths of 64 mod 128 (pytorch issue 196678)
MASKED = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# for lengths that vary: all but cuDNN, which plans each new shape for tenths of a second
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
