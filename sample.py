"""python sample.py runs/quickstart --prompt "The function returns" --num_samples 3

Checkpoint -> text. CHECKPOINT is a run or step folder, a Hugging Face folder or a hub name.
"""

import copy
import sys
from dataclasses import dataclass
from typing import Literal

import torch
from tyro.conf import Positional

import cli
from fineweb import EOT, get_tokenizer
from hf import own_tokenizer
from model import GPT, autocast, pick_device, pick_dtype


@dataclass
class SampleConfig:
    checkpoint: Positional[str]
    """run folder (its latest step), step folder, Hugging Face folder, or hub name such as gpt2"""
    prompt: str = "Hello, I'm a language model,"
    """text to continue; empty starts a new document"""
    max_new_tokens: int = 100
    """tokens to add at most; a sample ends sooner at the end of its text"""
    num_samples: int = 1
    """continuations of the prompt"""
    temperature: float = 0.8
    """1 samples from the model's probabilities, lower is safer, 0 takes the likeliest token"""
    top_k: int = 50
    """draw from the k likeliest tokens only; 0 = from all"""
    top_p: float = 1.0
    """draw from the fewest likeliest tokens whose probabilities reach p"""
    seed: int = 1337
    """same seed, same text"""
    device: str = "auto"
    """auto takes cuda, else mps, else cpu"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of the matrix products; auto takes what is fast on the device"""

    def __post_init__(self):
        for name in ("max_new_tokens", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.temperature < 0 or self.top_k < 0 or self.seed < 0:
            raise ValueError("temperature, top_k and seed must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


def sample(model, prompt, config, own=None):
    """Continue a prompt -> a list of num_samples texts, the prompt left out.

    Tokens after a sample's end-of-text token are not part of it. own: the model's
    hf.own_tokenizer, unless its vocabulary is GPT-2's."""
    tokenizer, eot = (own, own.eot) if own else (get_tokenizer(), EOT)
    device = next(model.parameters()).device
    ids = tokenizer.encode(prompt, allowed_special="all") or [0 if eot is None else eot]
    if max(ids) >= model.config.vocab_size:
        raise ValueError(
            f"the prompt has id {max(ids)}, the model's vocabulary is {model.config.vocab_size}: "
            f"the tokenizer is not its own"
        )
    new = config.max_new_tokens
    if not model.transformer.wpe.extrapolates:
        room = model.config.block_size - len(ids)
        if room < 1:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, and this model's context of "
                f"{model.config.block_size} leaves no room for more; shorten it"
            )
        if room < new:
            new = room
            print(f"only {room} tokens fit the model's context", file=sys.stderr)
    idx = torch.tensor([ids] * config.num_samples, device=device)  # (B, T)
    generator = torch.Generator(device).manual_seed(config.seed)
    ended = torch.zeros(config.num_samples, dtype=torch.bool, device=device)
    columns = []
    options = (config.temperature, config.top_k, config.top_p)
    dtype = pick_dtype(config.dtype, device)
    fast = decoder(model, dtype, config.num_samples) if config.dtype == "auto" else None
    with autocast(device, dtype):
        for token in model.stream(idx, new, *options, generator=generator, decoder=fast):
            ended |= token == (-1 if eot is None else eot)
            if ended.all():
                break
            columns.append(token)
    rows = torch.stack(columns, dim=1).tolist() if columns else [[]] * config.num_samples
    rows = [row[: row.index(eot)] if eot in row else row for row in rows]
    # decoded with the prompt: alone, some tokenizers drop a text's first space
    begin = len(tokenizer.decode(ids))
    return [tokenizer.decode(ids + row)[begin:] for row in rows]


def decoder(model, dtype, rows):
    """The copy of the model, its weights in half precision, that GPT.stream decodes `rows` texts
    with; None where that is not faster. dtype is that of the matrix products."""
    if next(model.parameters()).device.type == "cpu" and rows <= 4:
        dtype = torch.bfloat16  # reading the weights is all that a token costs
    return None if dtype == torch.float32 else copy.deepcopy(model).to(dtype)


def main():
    config = cli.parse(SampleConfig)
    model = GPT.from_checkpoint(config.checkpoint).to(pick_device(config.device)).eval()
    own = own_tokenizer(config.checkpoint, model.config)
    for text in sample(model, config.prompt, config, own):
        print(config.prompt + text)
        print("-" * 80)


if __name__ == "__main__":
    cli.run(main)
