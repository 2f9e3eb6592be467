"""python -m nanoswitch.switches [CONFIG.toml ...] [--flags]

What a config is made of and costs; or

    python -m nanoswitch.switches --init_from gpt2 [--flags]    of a checkpoint
    python -m nanoswitch.switches table          what each switch costs
    python -m nanoswitch.switches --plot DIR     pictures of the biases and masks

Every figure is counts.py's, of the model that the config makes.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model import ATTENTIONS, POSITIONS, GPTConfig, has_bias
from nanoswitch import cli, surgery
from nanoswitch.counts import flops_per_token, kv_bytes_per_token, mask_bytes, on_meta
from nanoswitch.kernels import attention_mask
from train_gpt2 import read_flags

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
    ("mlp gelu_erf", {"mlp": "gelu_erf"}, "Hendrycks and Gimpel 2016",
     "nanoGPT's and GPT-NeoX's weights as they are", "within 0.0005 of gelu: no better"),
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
        model = on_meta(GPTConfig(**changes))
        extra = mask_bytes(model) / 2**20
        memory = f"{extra:,.{0 if extra > 1 else 2}f} MiB" if extra else "-"
        lines.append(
            f"| {name} | {model.num_params() / 1e6:.2f}M | {flops_per_token(model) / 1e6:,.0f}M | "
            f"{kv_bytes_per_token(model):,} | {memory} | {paper} | {buys} | {pitfalls} |"
        )
    return lines


# ----------------------------------------------------------------------------- summary


def summary(config):
    """A config's shapes layer by layer, parameters, FLOPs and cache -> lines."""
    model, c, hs = on_meta(config), config, config.head_size
    part, others = model.transformer, model.transformer.wpe_other

    def line(name, shape, module):
        count = module if isinstance(module, int) else sum(p.numel() for p in module.parameters())
        return f"{name:<22}{shape:<44}{count:>14,}"

    lines = [
        f"{'part':<22}{'shape':<44}{'parameters':>14}",
        line("wte", f"({c.vocab_size}, {c.n_embd})", part.wte),
        line(f"wpe: {c.pos}", "", part.wpe),
        *(line(f"wpe: {name}", "", encoding) for name, encoding in others.items()),
    ]
    if c.embd_norm:
        lines.append(line(f"ln_emb: {c.norm}", "", part.ln_emb))
    for layer, block in enumerate(part.h):
        window, kind, pos = c.windows[layer], c.attentions[layer], c.encodings[layer]
        kind = f"window {window}" if kind == "full" and window else kind
        kind += f" {pos}" if len(others) else ""
        inner = getattr(getattr(block.mlp, "c_fc", None), "out_features", c.mlp_hidden)
        shape = (
            f"q {c.n_head} x {hs}, k v {c.n_kv_head} x {hs}; "
            f"{c.mlp} {c.n_embd} > {inner} > {c.n_embd}"
        )
        lines.append(line(f"h.{layer} {kind}", shape, block))
    head = 0 if c.tie_embeddings else model.lm_head
    cache = kv_bytes_per_token(model)
    return [
        *lines,
        line(f"ln_f: {c.norm}", "", part.ln_f),
        line("lm_head", "tied to wte" if c.tie_embeddings else "", head),
        line("all", "", model),
        f"training FLOPs per token at T = {c.block_size}: {flops_per_token(model):,}",
        f"KV cache in bf16: {cache:,} bytes per token, "
        f"{cache * c.block_size / 2**20:.1f} MiB at T = {c.block_size}",
    ]


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

    torch.manual_seed(1337)
    folder, pos = Path(folder), torch.arange(T)
    folder.mkdir(parents=True, exist_ok=True)
    biased = [n for n in POSITIONS if has_bias(POSITIONS[n])]
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
    attention = ATTENTIONS["linformer"](config, 0)
    mask = attention.mask(torch.arange(T), POSITIONS["none"](config))[0]  # (n, S, n + S)
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
    if sys.argv[1:] == ["table"]:
        return print("\n".join(table()))
    config, train, show = read_flags(more=(ShowConfig,), description=__doc__)
    config = surgery.config_of(config, train)
    if show.plot:
        plot(config, show.plot)
    else:
        print("\n".join(summary(config)))


if __name__ == "__main__":
    cli.run(main)
