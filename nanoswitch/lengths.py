"""What a comparison's last checkpoints make of longer contexts than they were trained with.

Prose hardly tells: most of what helps to guess its next word is near. So there is a second score,
the gain of a repeat. A text of T / 2 tokens stands twice in a context of T: whoever sees T / 2
tokens back knows each token of the second one. The gain is the loss of its tokens the first time
minus that the second time (Olsson et al. 2022, arXiv 2209.11895, score copying in this way).
"""

import statistics

import numpy as np
import torch

from model import GPT
from nanoswitch.device import autocast, pick_device, pick_dtype
from nanoswitch.progress import markdown
from nanoswitch.shards import load_shards, match_vocabulary
from nanoswitch.windows import Windows


def prose(x, y):
    """Inputs and targets (B, T) of T tokens each -> rows, and [(targets, sign)] of their score."""
    return x, [(y, 1)]


def repeat(x, y):
    """The same of T / 2 tokens each -> rows of T, and the targets that they hold twice."""
    hidden = torch.full_like(x, -1)
    same = torch.cat((x[:, 1:], hidden[:, :1]), dim=1)  # the next token, where both rounds have one
    return torch.cat((x, x), 1), [
        (torch.cat((same, hidden), 1), 1), (torch.cat((hidden, same), 1), -1)
    ]  # fmt: skip


SCORES = {"prose": (prose, 1), "repeat": (repeat, 2)}  # how, and how often a row's tokens stand


def score_lengths(groups, multiples):
    """{name: Runs} -> after each name {"prose", "repeat": {name: {context: [of each seed]}}} of
    those done, in nats: the validation loss of the last checkpoints in windows of `context`
    tokens, the same text at every length, and the gain of a repeat. None where positions end."""
    found = {score: {} for score in SCORES}
    for name, runs in groups.items():
        lengths = [runs[0].config["block_size"] * k for k in multiples]
        scored = [score_run(run, lengths) for run in runs]
        for score in SCORES:
            found[score][name] = {}
            for T in lengths:
                values = [one[score, T] for one in scored]
                found[score][name][T] = None if None in values else values
        yield found


def score_run(run, lengths):
    """{(score, T): that of a run's last checkpoint in windows of T tokens, or None}."""
    device = pick_device(run.config.get("device", "auto"))
    model = GPT.from_pretrained(run.folder).to(device).eval()
    scores = {
        (score, T): score_length(run, model, device, T, *how)
        for score, how in SCORES.items()
        for T in lengths
    }
    prose = [(scores["prose", T], T) for T in lengths if scores["prose", T] is not None]
    print(f"{run.folder}:", ", ".join("{:.4f} at {}".format(*each) for each in prose), flush=True)
    return scores


def score_length(run, model, device, T, make, times):
    if model.config.block_size < T and not model.extrapolates:
        return None
    data_dir = run.config["data_dir"]
    vocab = match_vocabulary(data_dir, model.config)
    val = Windows(load_shards(data_dir, "val"), T // times, vocab)
    count = min(run.config["val_tokens"] // T, val.count)
    if not count:
        raise ValueError(f"{run.folder} validates on fewer than {T} tokens; give shorter --lengths")
    total, size = 0.0, max(1, 8192 // T)
    with torch.no_grad(), autocast(device, pick_dtype(run.config.get("dtype", "auto"), device)):
        for begin in range(0, count, size):
            rows, targets = make(*val.read(np.arange(begin, min(begin + size, count))))
            for y, sign in targets:
                loss = model(rows.to(device), y.to(device))[1].item()
                total += sign * loss * len(rows)
    return total / count


TEXTS = {
    "prose": "Validation loss of the last checkpoints at contexts up to and beyond the trained "
    "one, the same tokens at every length",
    "repeat": "What a repeat gains: T / 2 tokens stand twice in a context of T; their loss the "
    "first time minus that the second time, for which a model must look T / 2 tokens back",
}


def lengths_table(found):
    """A dict of score_lengths() -> lengths.md."""
    parts = []
    for score, of in found.items():
        lengths = list(next(iter(of.values())))
        head, rows = ["config", *(f"T = {T:,}" for T in lengths)], []
        for name, values in of.items():
            rows.append([name, *(cell(values.get(T)) for T in lengths)])
        note = f"{TEXTS[score]}; nats, mean ± standard deviation over seeds."
        parts += [markdown(head, rows), note]
    return "\n\n".join(parts) + "\n"


def cell(seeds):
    if not seeds:
        return "-"
    spread = f" ± {statistics.stdev(seeds):.4f}" if len(seeds) > 1 else ""
    return f"{statistics.fmean(seeds):.4f}{spread}"
