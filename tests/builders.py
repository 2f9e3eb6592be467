"""What several test files build: small models whose attention is far from uniform, their inputs,
checkpoints written by hand, and the one line in which a refusal must come. Runs of train_gpt2.py
are in tiny_runs.py."""

import contextlib
import gzip
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model import POSITIONS, GPTConfig
from nanoswitch import cli
from nanoswitch.weights import grown, shake

__all__ = ["grown", "shake"]  # for the test files, beside what is made here

SIZES = dict(block_size=24, vocab_size=61, vocab_used=53, n_layer=2, n_head=4, n_embd=16)
END = 52  # the end-of-text id of this vocabulary
GPT2_VOCABULARY = dict(vocab_size=50304, vocab_used=50257)  # for models that read and write text

# (window, window_pattern): full, windowed, and both orders of mixing them
WINDOWS = [(0, ""), (3, ""), (3, "SL"), (3, "LSS")]
GQA = [4, 2, 1]
# every encoding under every kind of mask but the plain one, with and without shared key heads
MASKS = [
    dict(pos=pos, n_kv_head=nkv, qk_norm=nkv == 2) | kind
    for pos in POSITIONS
    for nkv in (0, 2)
    for kind in (
        dict(attention="linformer", linformer_segment=4, linformer_rank=2),
        dict(document_mask=True),
        dict(document_mask=True, window=5, window_pattern="SL"),
    )
]


def tiny(**changes):
    return GPTConfig(**SIZES | changes)


def rig(model, logits):
    """Make the model's logits these, {id: logit}, at every position, and all others -10,000."""
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()[0] = 1  # so the head, which is not tied, reads 1, 0, 0
        model.lm_head.weight[:, 0] = -1e4
        for token, logit in logits.items():
            model.lm_head.weight[token, 0] = logit
    return model


def tokens(config, B, T, seed=1):
    return torch.randint(config.vocab_used, (B, T), generator=torch.Generator().manual_seed(seed))


def documents(B=2, T=23, seed=1):
    """Tokens among which documents end: one in the first row, one in the last."""
    idx = torch.randint(0, END, (B, T), generator=torch.Generator().manual_seed(seed))
    idx[0, 7] = idx[-1, 15] = END
    return idx


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(ours, reference, rtol=1e-4):
    """To rtol of a tensor's largest entry. The floor is for gradients that are zero but for
    rounding, such as FIRE's last bias: a constant added to every score moves no softmax."""
    assert ours.keys() == reference.keys()
    for name, g in reference.items():
        torch.testing.assert_close(
            ours[name], g, rtol=rtol, atol=rtol * g.abs().max().item() + 1e-7
        )


def write_step(folder, model, weights=(), **entries):
    """A step folder as the documentation describes it, written without the package. weights
    replace the model's; None leaves one out. entries join the model's in config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {name: w.contiguous().clone() for name, w in model.state_dict().items()}
    if model.config.tie_embeddings:
        del held["lm_head.weight"]
    held.update(weights)
    save_file({k: w for k, w in held.items() if w is not None}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model": asdict(model.config)} | entries))
    return folder


def write_jsonl(path, records):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


def write_texts(path, texts):
    return write_jsonl(path, ({"text": text} for text in texts))


def run_main(main, *flags):
    """A script's main with these flags, in this process -> its exit status."""
    before, sys.argv = sys.argv, ["script.py", *map(str, flags)]
    try:
        cli.run(main)
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = before
    return 0


@contextlib.contextmanager
def refused(*words):
    """What runs in it must fail with one line that has these words."""
    with pytest.raises(ValueError) as error:
        yield
    text = str(error.value)
    assert "\n" not in text and all(str(word) in text for word in words), text


def page_of(archive):
    """The text of the document that shows a folder of experiments/."""
    name = "SPEEDRUN.md" if archive.name.startswith("speedrun") else "EXPERIMENTS.md"
    return (Path(__file__).parent.parent / name).read_text()
