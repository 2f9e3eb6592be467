"""python sample.py runs/quickstart --prompt "The function returns" --num_samples 3

    python sample.py runs/quickstart --chat
    python sample.py runs/quickstart --push OWNER/NAME

Checkpoint -> text. CHECKPOINT is a run or step folder, a Hugging Face folder or a hub name.
"""

import contextlib
import re
import sys
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from tyro.conf import Positional, arg

from model import GPT
from nanoswitch import cli
from nanoswitch.decode import LOADED, kept_decoder
from nanoswitch.device import autocast, pick_device, pick_dtype
from nanoswitch.load import own_tokenizer
from nanoswitch.publish import push
from nanoswitch.tokenizer import EOT, N_VOCAB, get_tokenizer

with contextlib.suppress(ImportError):  # gives input() arrow keys and a history
    import readline  # noqa: F401


@dataclass
class SampleConfig:
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")]
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
    chat: bool = False
    """talk to the model in the terminal, from the prompt if one is given; /help lists commands"""
    push: str = ""
    """upload the checkpoint to this hub repo, OWNER/NAME, instead; the hub name to load it by"""
    public: bool = False
    """whether everyone may read the repo that push makes"""

    def __post_init__(self):
        cli.at_least(self, 1, "max_new_tokens num_samples")
        cli.at_least(self, 0, "temperature top_k seed")
        if 0 < self.temperature < 1e-6:  # the logits would overflow
            raise ValueError(f"temperature is {self.temperature}; 0 takes the likeliest token")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.chat and self.num_samples > 1:
            raise ValueError("a chat has one reply at a time; leave out --chat or --num_samples")
        if self.push and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push):
            raise ValueError(f"push is '{self.push}'; it must be OWNER/NAME, such as me/model")
        if self.public and not self.push:
            raise ValueError("public says who may read what --push OWNER/NAME uploads; give both")
        if self.push and self.chat:
            raise ValueError("push and chat are two commands; leave out one")


def sample(model, prompt, config, own=None):
    """Continue a prompt -> a list of num_samples texts, the prompt left out.

    Tokens after a sample's end-of-text token are not part of it. own: the model's
    load.own_tokenizer, unless its vocabulary is GPT-2's."""
    tokenizer, eot = pick_tokenizer(own)
    ids = encode(tokenizer, eot, prompt)
    columns = list(draw(model, ids, config, eot))
    rows = torch.stack(columns, dim=1).tolist() if columns else [[]] * config.num_samples
    rows = [row[: row.index(eot)] if eot in row else row for row in rows]
    # decoded with the prompt: alone, some tokenizers drop a text's first space
    begin = len(tokenizer.decode(ids))
    return [tokenizer.decode(ids + row)[begin:] for row in rows]


def stream_text(model, prompt, config, own=None):
    """Yield one continuation of a prompt piece by piece, as its tokens come.

    Together the pieces are what sample() gives with num_samples 1. prompt: text, or token ids. A
    character of several tokens comes whole, with the last of them."""
    tokenizer, eot = pick_tokenizer(own)
    ids = encode(tokenizer, eot, prompt)
    text = tokenizer.decode(ids)
    shown = len(text)
    for token in draw(model, ids, replace(config, num_samples=1), eot):
        ids = ids + token.tolist()
        text = tokenizer.decode(ids)
        whole = text.rstrip("\ufffd")  # what the bytes of an unfinished character decode to
        if len(whole) > shown:
            yield whole[shown:]
            shown = len(whole)
    if len(text) > shown:  # the end leaves it unfinished
        yield text[shown:]


def pick_tokenizer(own):
    """The tokenizer and its end-of-text id (or None): the model's own, if it has one, or GPT-2's"""
    return (own, own.eot) if own else (get_tokenizer(), EOT)


def encode(tokenizer, eot, prompt):
    """Text, or token ids as they are -> a list of ids; an empty prompt starts a new document."""
    if isinstance(prompt, str):
        prompt = tokenizer.encode(prompt, allowed_special="all")
    return prompt or [0 if eot is None else eot]


def draw(model, ids, config, eot):
    """Yield the next token of each of num_samples continuations of ids, (B,) at a time, until all
    have ended. ValueError when the model's context has no room for any."""
    if max(ids) >= model.config.vocab_size:
        raise ValueError(
            f"the prompt has id {max(ids)}, the model's vocabulary is {model.config.vocab_size}: "
            f"the tokenizer is not its own"
        )
    device, new = next(model.parameters()).device, config.max_new_tokens
    if not model.extrapolates:
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
    options = (config.temperature, config.top_k, config.top_p)
    dtype = pick_dtype(config.dtype, device)
    fast = kept_decoder(model, dtype, config.num_samples) if config.dtype == "auto" else None
    tokens = model.stream(idx, new, *options, generator=generator, decoder=fast)
    while True:
        with autocast(device, dtype):  # not around a yield, or the caller's code would run in it
            token = next(tokens, None)
        if token is None:
            return
        ended |= token == (-1 if eot is None else eot)
        if ended.all():
            return
        yield token


def load(checkpoint, device="auto"):
    """A checkpoint, by path or hub name -> its model and its load.own_tokenizer."""
    model = GPT.from_pretrained(checkpoint).to(pick_device(device)).eval()
    LOADED[model] = {}
    own = own_tokenizer(checkpoint, model.config)
    if own is None and not model.config.document_mask:  # ids beyond GPT-2's have no text
        model.config.vocab_used = min(model.config.vocab_used, N_VOCAB)
    return model, own


# ----------------------------------------------------------------------------- the chat

COMMANDS = """\
/reset             forget the conversation
/temp X            temperature: 0 takes the likeliest token, 1 the model's own probabilities
/topk K            draw from the K likeliest tokens; 0 = from all
/seed S            same seed, same replies from here on
/model CHECKPOINT  go on with another model
/help              these lines
/quit              end, as Ctrl-D does
An empty line lets the model go on. Ctrl-C stops a reply. A space before / makes it text."""
SETTINGS = {"/temp": ("temperature", float), "/topk": ("top_k", int), "/seed": ("seed", int)}
# a model's text must not steer the terminal: no escape sequences, bells, backspaces
CONTROLS = {i: "\ufffd" for i in (*range(32), *range(127, 160)) if chr(i) not in "\t\n"}


class Chat:
    """A text that the user and a base model continue in turns."""

    def __init__(self, config):
        self.config, self.replies = config, 0
        self.text = config.prompt if config.prompt != SampleConfig.prompt else ""
        self.warned = False
        self.use(config.checkpoint)
        print("A base model: it continues your text rather than answers it. /help lists commands.")

    def use(self, checkpoint):
        self.model, self.own = load(checkpoint, self.config.device)
        size, context = self.model.num_params() / 1e6, self.model.config.block_size
        print(f"{checkpoint}: {size:.1f}M parameters, a context of {context} tokens")

    def run(self):
        sys.stdin.reconfigure(errors="replace")
        while True:
            replying = False
            try:
                line = input("> ")
                replying = True
                if line.split() == ["/quit"]:
                    return
                (self.command if line.startswith("/") else self.reply)(line)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(stopped)" if replying else "\n(/quit or Ctrl-D ends the chat)")
            except (ValueError, OSError, ModuleNotFoundError, RuntimeError, MemoryError) as error:
                if not replying:  # the terminal is gone
                    raise
                print("error: " + " ".join(str(error).split()))

    def command(self, line):
        name, _, value = map(str.strip, line.partition(" "))
        if name == "/reset":
            self.text, self.warned = "", False
        elif name == "/help":
            print(COMMANDS)
        elif name == "/model":
            self.use(value)
        elif name in SETTINGS:
            self.set(*SETTINGS[name], value)
        else:
            raise ValueError(f"unknown command {line}; /help lists them")

    def set(self, field, kind, text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not abs(value) < 2**63:  # nan neither
            whole = "whole " if kind is int else ""
            raise ValueError(f"{field} '{text}' is no {whole}number below 2**63")
        self.config = replace(self.config, **{field: value})
        self.replies = 0 if field == "seed" else self.replies

    def reply(self, line):
        """Print what the model makes of the conversation and this line. A seed of its own for
        each reply, or the same line would always get the same one."""
        self.text += ("\n" if self.text and line else "") + line
        ids, room = self.fit()
        seed, self.replies = self.config.seed + self.replies, self.replies + 1
        config = replace(self.config, seed=seed, max_new_tokens=room)
        for piece in stream_text(self.model, ids, config, self.own):
            self.text += piece
            print(piece.translate(CONTROLS), end="", flush=True)
        print()

    def fit(self):
        """The conversation as token ids, its oldest text dropped where the context would not hold
        it and a reply, and how many tokens there are for the reply."""
        tokenizer, eot = pick_tokenizer(self.own)
        ids, context = encode(tokenizer, eot, self.text), self.model.config.block_size
        room = min(self.config.max_new_tokens, context // 2)
        if len(ids) + room > context:
            ids = ids[room - context :]
            while len(ids) > 1 and tokenizer.decode(ids).startswith("\ufffd"):
                del ids[0]  # the rest of a character that was cut
            self.text = tokenizer.decode(ids)
            if not self.warned:
                print(f"(the context of {context} tokens is full: the oldest text is dropped)")
            self.warned = True
        return ids, room


def main():
    config = cli.parse(SampleConfig, argv=cli.bare_switch(sys.argv[1:], "chat"))
    if config.chat:
        return Chat(config).run()
    model, own = load(config.checkpoint, config.device)
    if config.push:
        address, what = push(model, own, config.checkpoint, config.push, config.public)
        return print(f"{address}: {what}\nnext: python sample.py {config.push} --chat")
    for text in sample(model, config.prompt, config, own):
        print(config.prompt + text)
        print("-" * 80)


if __name__ == "__main__":
    cli.run(main)
