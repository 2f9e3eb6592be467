"""What a config costs, by formula: the independent reference of nanoswitch/counts.py."""

from model import FIRE
from nanoswitch.kernels import window_chunks

BYTES = 2  # of a number in bf16


def count_parameters(config):
    """{part: its parameters} of a model; "block" stands for each of the n_layer ones."""
    c, hs = config, config.head_size
    norm = c.n_embd * (2 if c.norm == "layernorm" and c.bias else 1)
    positions = {
        "learned": c.block_size * c.n_embd,
        "kerple": 2 * c.n_head,
        "kerple_power": 2 * c.n_head,
        "fire": 2 + 2 * FIRE.HIDDEN + FIRE.HIDDEN * c.n_head + c.n_head,
    }
    attention = linear(c.n_embd, c.n_embd + 2 * c.n_kv_head * hs, c.bias)
    attention += linear(c.n_embd, c.n_embd, c.bias)
    if c.attention == "linformer":
        attention += 2 * c.linformer_segment * c.linformer_rank
    inner = c.mlp_hidden * (2 if c.mlp == "swiglu" else 1)
    mlp = linear(c.n_embd, inner, c.bias) + linear(c.mlp_hidden, c.n_embd, c.bias)
    return {
        "token embedding": c.vocab_size * c.n_embd,
        "positions": positions.get(c.pos, 0),
        "block": 2 * norm + attention + mlp,
        "last norm": norm,
        "head": 0 if c.tie_embeddings else c.vocab_size * c.n_embd,
    }


def linear(n_in, n_out, bias):
    return n_in * n_out + (n_out if bias else 0)


def parameters(config):
    parts = count_parameters(config)
    return sum(parts.values()) + (config.n_layer - 1) * parts["block"]


def flops_per_token(config):
    """Training FLOPs per token at T = block_size: 6 N + 12 n_embd (keys a token meets, summed
    over layers); N leaves out look-up tables, holds FIRE's network once for every key, and
    Linformer's E and F, (R, S) each, once for every channel of a segment."""
    parts, c, T = count_parameters(config), config, config.block_size
    N = parameters(config) - parts["positions"] - parts["head"]  # one of two vocabulary matrices
    if c.pos == "fire":
        N += T * parts["positions"]
    keys = sum(min(w, T) if w else T for w in c.windows)
    if c.attention == "linformer":
        S, R = c.linformer_segment, c.linformer_rank
        N += c.n_layer * 2 * (c.n_embd * R - S * R)
        keys = c.n_layer * min(T, T * R // S + S)
    return 6 * N + 12 * c.n_embd * keys


def kv_bytes_per_token(config):
    """Bytes of the bf16 KV cache at a full context, divided by its tokens."""
    c = config
    held = sum(min(w, c.block_size) if w else c.block_size for w in c.windows)
    return 2 * c.n_kv_head * c.head_size * BYTES * held // c.block_size


def mask_bytes(config):
    """Bytes of the masks of a forward pass at T = block_size, shared by all layers, for encodings
    without parameters: a byte a pair of tokens, or a bias of 4 for every head."""
    c, T, total = config, config.block_size, 0
    heads = c.n_head * 4 if c.pos == "alibi" else 0
    for window in {w if w < T else 0 for w in c.windows}:
        chunks = [(slice(0, T), slice(0, T))] * bool(heads)
        if window:
            chunks = window_chunks(T, window, plain=not heads)
        pairs = sum((q.stop - q.start) * (k.stop - k.start) for q, k in chunks)
        if window and not heads:
            pairs -= window**2  # the first chunk needs no mask
        total += pairs * (heads or 1)
    return total
