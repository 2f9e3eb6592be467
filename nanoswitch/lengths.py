"""The loss of a comparison's last checkpoints at longer contexts than they were trained with."""

import statistics

import numpy as np
import torch

from model import GPT
from nanoswitch.device import autocast, pick_device, pick_dtype
from nanoswitch.progress import markdown
from nanoswitch.shards import load_shards, match_vocabulary
from nanoswitch.windows import Windows


def score_lengths(groups, multiples):
    """{name: Runs} -> {name: {context: [loss of each seed]}} in nats: the last checkpoints
    on the same validation tokens, cut into longer windows. None where positions end."""
    found = {}
    for name, runs in groups.items():
        found[name] = {}
        for T in [runs[0].config["block_size"] * k for k in multiples]:
            losses = [score_length(run, T) for run in runs]
            found[name][T] = None if None in losses else losses
    return found


def score_length(run, T):
    """The validation loss of a run's last checkpoint in windows of T tokens, or None."""
    model = GPT.from_pretrained(run.folder)
    if model.config.block_size < T and not model.extrapolates:
        return None
    device = pick_device(run.config.get("device", "auto"))
    model = model.to(device).eval()
    data_dir = run.config["data_dir"]
    vocab = match_vocabulary(data_dir, model.config)
    val = Windows(load_shards(data_dir, "val"), T, vocab)
    count = min(run.config["val_tokens"] // T, val.count)
    if not count:
        raise ValueError(f"{run.folder} validates on fewer than {T} tokens; give shorter --lengths")
    total, size = 0.0, max(1, 8192 // T)
    with torch.no_grad(), autocast(device, pick_dtype(run.config.get("dtype", "auto"), device)):
        for begin in range(0, count, size):
            x, y = val.read(np.arange(begin, min(begin + size, count)))
            total += model(x.to(device), y.to(device))[1].item() * len(x)
    return total / count


def lengths_table(found):
    """score_lengths()'s dict -> lengths.md."""
    lengths = list(next(iter(found.values())))
    head, rows = ["config", *(f"T = {T:,}" for T in lengths)], []
    for name, losses in found.items():
        cells = [name]
        for T in lengths:
            seeds = losses.get(T)
            spread = f" ± {statistics.stdev(seeds):.4f}" if seeds and len(seeds) > 1 else ""
            cells.append(f"{statistics.fmean(seeds):.4f}{spread}" if seeds else "-")
        rows.append(cells)
    note = (
        "Validation loss of the last checkpoints at contexts up to and beyond the trained one, the "
        "same tokens at every length, mean ± standard deviation over seeds."
    )
    return f"{markdown(head, rows)}\n\n{note}\n"
