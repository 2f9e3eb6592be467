"""python model.py --pos rope --n_kv_head 4     the shapes, parameters, FLOPs and cache of a config
python switches.py > table.md                what every switch costs: the README's table
python model.py --plot assets                 pictures of the biases and masks (needs matplotlib)

Everything here is computed from a GPTConfig by formula; model.py is not asked, so that a test can
hold the two against each other.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import cli
from model import FIRE, POSITIONS, GPTConfig, attention_mask, linformer_mask, window_chunks

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
    over layers); N leaves out look-up tables."""
    parts, c = count_parameters(config), config
    N = parameters(config) - parts["positions"] - parts["head"]  # one of two vocabulary matrices
    return 6 * N + 12 * c.n_embd * c.keys_per_token(c.block_size)


def kv_bytes_per_token(config):
    """Bytes of the bf16 KV cache at a full context, divided by its tokens."""
    c = config
    held = sum(min(w, c.block_size) if w else c.block_size for w in c.windows)
    return 2 * c.n_kv_head * c.head_size * BYTES * held // c.block_size


def mask_bytes(config):
    """Bytes of bias and mask of a forward pass at T = block_size, shared by all layers."""
    c, T = config, config.block_size
    has_bias, total = POSITIONS[c.pos].bias is not POSITIONS["none"].bias, 0
    for window in {w if w < T else 0 for w in c.windows}:
        chunks = [(slice(0, T), slice(0, T))]
        if window:
            chunks = window_chunks(T, window, plain=not has_bias)
        pairs = sum((q.stop - q.start) * (k.stop - k.start) for q, k in chunks)
        if not has_bias:
            total += pairs - window**2 if window else 0  # the first chunk needs no mask
        else:
            total += pairs * 4 * (c.n_head + (FIRE.HIDDEN if c.pos == "fire" else 0))
    return total


# ----------------------------------------------------------------------------- the table

# switch, its flags, paper, what it buys, pitfalls
ROWS = [
    ("baseline", {}, "Radford et al. 2019", "GPT-2: learned positions, LayerNorm, GELU",
     "no position beyond block_size exists"),
    ("pos sinusoidal", {"pos": "sinusoidal"}, "Vaswani et al. 2017",
     "no position parameters, runs at any length",
     "quality beyond the trained length still falls; its scale against the embeddings matters"),
    ("pos rope", {"pos": "rope"}, "Su et al. 2021",
     "relative positions inside the flash kernel, no parameters",
     "rotate q and k along channels, never heads; beyond the trained length scale it"),
    ("pos alibi", {"pos": "alibi"}, "Press et al. 2022", "extrapolates best of the fixed ones",
     "a T x T bias, so no flash kernel; slopes must be geometric, also for 12 heads"),
    ("pos kerple", {"pos": "kerple"}, "Chi et al. 2022",
     "ALiBi with a learned, logarithmic fall",
     "r1, r2 must stay positive and must not decay; a T x T bias"),
    ("pos kerple_power", {"pos": "kerple_power"}, "Chi et al. 2022",
     "a learned power of the distance", "r2 beyond 2 is no kernel; 0^r2 has no finite gradient"),
    ("pos fire", {"pos": "fire"}, "Li et al. 2024", "a learned function of relative distance",
     "its MLP sees T x T inputs: here once a forward pass, not once a layer"),
    ("pos none", {"pos": "none"}, "Kazemnejad et al. 2023",
     "nothing to go wrong: the causal mask alone gives order", "learns more slowly"),
    ("n_kv_head 4 (GQA)", {"n_kv_head": 4}, "Ainslie et al. 2023",
     "a cache of a third, fewer parameters", "share keys and values, never queries"),
    ("n_kv_head 1 (MQA)", {"n_kv_head": 1}, "Shazeer 2019", "the smallest cache",
     "loses some quality; compare at equal parameters"),
    ("norm rmsnorm", {"norm": "rmsnorm"}, "Zhang and Sennrich 2019", "no mean, no bias: cheaper",
     "the mean is over channels of one token; over time it leaks the future"),
    ("mlp swiglu", {"mlp": "swiglu"}, "Shazeer 2020", "a gate, at the same parameters",
     "three matrices: hidden must be 8/3 n_embd, or the comparison is with a larger model"),
    ("mlp relu2", {"mlp": "relu2"}, "So et al. 2021", "sparse activations, cheap",
     "unbounded: watch fp16"),
    ("window 256", {"window": 256}, "Beltagy et al. 2020; Jiang et al. 2023",
     "a cache that stops growing", "W counts the query's own token; far facts only through layers"),
    ("window 256, SSSL", {"window": 256, "window_pattern": "SSSL"}, "Brown et al. 2020",
     "most of the saving, and full reach every fourth layer", "the full layers' cache remains"),
    ("attention linformer", {"attention": "linformer"}, "Wang et al. 2020",
     "cost a token T rank / segment + segment, not T",
     "the paper's form sees the future: here only past segments are summarised"),
    ("qk_norm", {"qk_norm": True}, "Henry et al. 2020", "attention logits cannot explode",
     "one more pass over q and k"),
    ("logit_softcap 30", {"logit_softcap": 30.0}, "Gemma 2, 2024", "bounded logits",
     "a tanh over all logits; sampling must apply it too"),
    ("zero_init", {"zero_init": True}, "Zhang et al. 2019", "blocks start as the identity",
     "the first step moves only the projections"),
    ("untied head", {"tie_embeddings": False}, "Press and Wolf 2017 (tied)",
     "input and output embeddings specialise", "38.6M more parameters at this vocabulary"),
    ("document_mask", {"document_mask": True}, "Dubey et al. 2024",
     "no attention across documents", "a mask per sequence, so no flash kernel outside flex"),
]  # fmt: skip


def table():
    """Every switch at GPT-2 124M's size -> lines of a Markdown table."""
    lines = [
        "| switch | parameters | FLOPs/token | KV bytes/token | mask or bias | paper | "
        "what it buys | pitfalls |",
        "|---|--:|--:|--:|--:|---|---|---|",
    ]
    for name, changes, paper, buys, pitfalls in ROWS:
        c = GPTConfig(**changes)
        extra = mask_bytes(c)
        if c.document_mask:
            memory = "1 MiB a sequence"
        else:
            memory = f"{extra / 2**20:,.{0 if extra > 2**20 else 2}f} MiB" if extra else "-"
        lines.append(
            f"| {name} | {parameters(c) / 1e6:.2f}M | {flops_per_token(c) / 1e6:,.0f}M | "
            f"{kv_bytes_per_token(c):,} | {memory} | {paper} | {buys} | {pitfalls} |"
        )
    return lines


# ----------------------------------------------------------------------------- summary


def summary(config):
    """A config's shapes layer by layer, parameters, FLOPs and cache -> lines."""
    c, parts, hs = config, count_parameters(config), config.head_size
    inner = c.mlp_hidden * (2 if c.mlp == "swiglu" else 1)
    lines = [
        f"{'part':<22}{'shape':<44}{'parameters':>14}",
        f"{'wte':<22}{f'({c.vocab_size}, {c.n_embd})':<44}{parts['token embedding']:>14,}",
        f"{'wpe: ' + c.pos:<22}{'':<44}{parts['positions']:>14,}",
    ]
    for layer, window in enumerate(c.windows):
        kind = c.attention if c.attention != "full" or not window else f"window {window}"
        shape = (
            f"q {c.n_head} x {hs}, k v {c.n_kv_head} x {hs}; "
            f"{c.mlp} {c.n_embd} > {inner} > {c.n_embd}"
        )
        lines.append(f"{f'h.{layer} {kind}':<22}{shape:<44}{parts['block']:>14,}")
    lines += [
        f"{'ln_f: ' + c.norm:<22}{'':<44}{parts['last norm']:>14,}",
        f"{'lm_head':<22}{'tied to wte' if c.tie_embeddings else '':<44}{parts['head']:>14,}",
        f"{'all':<66}{parameters(c):>14,}",
        f"training FLOPs per token at T = {c.block_size}: {flops_per_token(c):,}",
        f"KV cache in bf16: {kv_bytes_per_token(c):,} bytes per token, "
        f"{kv_bytes_per_token(c) * c.block_size / 2**20:.1f} MiB at T = {c.block_size}",
    ]
    return lines


# ----------------------------------------------------------------------------- pictures


def plot(config, folder, T=64):
    """Draw each encoding's bias (the first four heads, as seen by the last query) and each
    attention mask into folder/biases.png and folder/masks.png."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ModuleNotFoundError("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import torch

    torch.manual_seed(1337)
    folder, pos = Path(folder), torch.arange(T)
    folder.mkdir(parents=True, exist_ok=True)
    biased = [n for n in POSITIONS if POSITIONS[n].bias is not POSITIONS["none"].bias]
    figure, axes = plt.subplots(1, len(biased), figsize=(3.2 * len(biased), 2.8))
    for name, axis in zip(biased, axes, strict=True):
        with torch.no_grad():
            bias = POSITIONS[name](replace(config, pos=name)).bias(pos, pos)  # (nh, T, T)
        for head in range(min(4, len(bias))):
            axis.plot(range(T), bias[head, -1].flip(0), label=f"head {head}")
        axis.set(title=name, xlabel="distance")
    axes[0].set_ylabel("added to the score, at initialisation")
    axes[0].legend(fontsize=7)
    save(figure, folder / "biases.png")

    doc = (pos % 24 == 17).long().cumsum(0)[None]  # three documents
    masks = {
        "full": attention_mask(pos, pos, 0, None),
        "window 16": attention_mask(pos, pos, 16, None),
        "document_mask": attention_mask(pos, pos, 0, None, doc, doc)[0, 0],
        "linformer, S = 16": linformer_picture(T, 16),
    }
    figure, axes = plt.subplots(1, len(masks), figsize=(3.2 * len(masks), 3.2))
    for (name, mask), axis in zip(masks.items(), axes, strict=True):
        axis.imshow(mask.float(), cmap="Blues", vmin=0, vmax=1.3)
        axis.set(title=name, xlabel="key", ylabel="query")
    save(figure, folder / "masks.png")


def linformer_picture(T, S):
    """1 where a query sees a token itself, 0.4 where only its segment's summary, (T, T)."""
    config = GPTConfig(attention="linformer", linformer_segment=S, linformer_rank=1, pos="none")
    mask = linformer_mask(0, T, config, POSITIONS["none"](config), "cpu")[0]  # (n, S, n + S)
    n = T // S
    picture = 0.4 * mask[:, :, :n].flatten(0, 1).repeat_interleave(S, dim=1)
    for i in range(n):
        picture[i * S : i * S + S, i * S : i * S + S] = mask[i, :, n:]
    return picture


def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"drawn: {path}")


@dataclass
class ShowConfig:
    plot: str = ""
    """folder for pictures of the biases and masks; empty prints the summary"""


def main():
    from train_gpt2 import TrainConfig  # config files hold its fields too

    config, _, show = cli.parse(
        GPTConfig, TrainConfig, ShowConfig, configs=True, description=__doc__
    )
    if show.plot:
        plot(config, show.plot)
    else:
        print("\n".join(summary(config)))


if __name__ == "__main__":
    print("\n".join(table()))
