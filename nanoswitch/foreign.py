"""Other people's checkpoints that are one file -> a GPTConfig and weights under our names.

    nanoGPT's ckpt.pt          {"model": tensors, "model_args": their shape}
    build-nanogpt's model_*.pt {"model": tensors, "config": an object of its class GPTConfig}
    tensors alone              as state_dict() names them in either
    llm.c's *.bin              versions 3 (fp32) and 5 (bf16)

No pickled object runs: torch's restricted reader takes tensors and plain values, and for
build-nanogpt's config a bag that keeps what it is given.
This file exists so that load.py knows folders only.
"""

import functools
import math
import sys
from pathlib import Path

import numpy as np
import torch

from model import GPTConfig
from nanoswitch.counts import on_meta
from nanoswitch.hf import BUFFERS
from nanoswitch.tokenizer import N_VOCAB, has_gpt2_vocabulary
from nanoswitch.weights import empty, fill, read_torch

KINDS = "nanoGPT's or build-nanogpt's .pt, llm.c's .bin"
SUFFIXES = (".pt", ".pth", ".bin")
WRAPPERS = ("_orig_mod.", "module.")  # torch.compile's and DDP's
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
HEAD_SIZE = 64  # of every GPT-2
MAGIC, SHARD_MAGIC = 20240326, 20240520  # llm.c's models, and its token shards
DTYPES = {3: ("<f4", torch.float32), 5: ("<i2", torch.bfloat16)}


def find(checkpoint):
    """The one file that a CHECKPOINT is: itself, or ckpt.pt in nanoGPT's out_dir; else None."""
    path = Path(checkpoint)
    if path.is_file():
        return path if path.suffix in SUFFIXES else None
    ours = any((path / name).exists() for name in ("latest", "config.json"))
    return None if ours or not (path / "ckpt.pt").is_file() else path / "ckpt.pt"


def load(path):
    """The GPT of such a file, in fp32 and in eval mode; ValueError (one line) when it is none."""
    config, weights = read(path)
    return fill(empty(config), weights, path)


def read(path):
    """-> GPTConfig and {name: tensor}; a tied head is not one of them."""
    return read_bin(path) if path.suffix == ".bin" else read_pt(path)


# ----------------------------------------------------------------------------- .pt


def read_pt(path):
    found = read_torch(path, bags=("GPTConfig",))
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; what is read is {KINDS}")
    weights = found.get("model", found)
    if not isinstance(weights, dict) or "wte.weight" not in "".join(map(str, weights)):
        keys = ", ".join(map(str, list(found)[:3]))
        raise ValueError(f"{path} holds {keys}, no GPT under model; what is read is {KINDS}")
    weights = {plain_name(name): w for name, w in weights.items()}
    weights = {n: w for n, w in weights.items() if torch.is_tensor(w) and not n.endswith(BUFFERS)}
    args = found.get("model_args")
    if args is not None and not isinstance(args, dict):
        raise ValueError(f"{path}: model_args is a {type(args).__name__}, no table of sizes")
    config = shape_of(path, weights, args, getattr(found.get("config"), "__dict__", {}))
    if config.tie_embeddings:
        weights.pop("lm_head.weight", None)
    return config, weights


def plain_name(name):
    name = str(name)
    for wrapper in WRAPPERS * 2:  # either may be around the other
        name = name.removeprefix(wrapper)
    return name


def shape_of(path, weights, args, bag):
    """The GPTConfig of nanoGPT's tensors. args: its model_args, or None where the file is not its;
    bag: build-nanogpt's config. Sizes come from the tensors, and must agree with what is said."""
    names = ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight")
    try:
        wte, wpe, c_fc = (weights[f"transformer.{name}"] for name in names)
        (V, C), (T, _), (hidden, _) = wte.shape, wpe.shape, c_fc.shape
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is no GPT of nanoGPT's layout: {error}") from None
    said = args or bag
    unknown = [name for name in said if name not in SHAPE and said[name]]
    if unknown:
        raise ValueError(f"{path} is of a changed nanoGPT: it sets {', '.join(map(str, unknown))}")
    head = weights.get("lm_head.weight", wte)
    heads = said.get("n_head")
    if heads is None:
        heads, rest = divmod(C, HEAD_SIZE)
        if rest:
            raise ValueError(f"{path} does not say n_head, and {C} is no multiple of {HEAD_SIZE}")
        note(f"{path} does not say n_head: {heads}, for heads of {HEAD_SIZE} as GPT-2's")
    layers = {int(name.split(".")[2]) for name in weights if name.startswith("transformer.h.")}
    sizes = {
        "n_layer": max(layers) + 1, "n_embd": C, "block_size": T, "vocab_size": V,
        "bias": "transformer.ln_f.bias" in weights,
    }  # fmt: skip
    for name, value in sizes.items():
        if said.get(name, value) != value:
            raise ValueError(f"{path} says {name} {said[name]}, its tensors have {value}")
    if args is not None:
        note(f"{path}: GELU as nanoGPT has it since 2023, by erf; --init_from with --mlp gelu "
             f"takes GPT-2's")  # fmt: skip
    try:
        return GPTConfig(
            n_head=heads, mlp_hidden=hidden, vocab_used=used_of(V), **sizes,
            tie_embeddings=head.data_ptr() == wte.data_ptr() or torch.equal(head, wte),
            dropout=float(said.get("dropout", 0)), mlp="gelu" if args is None else "gelu_erf",
        )  # fmt: skip
    except TypeError as error:
        raise ValueError(f"{path} has a value of a wrong type: {error}") from None


def used_of(rows):
    """vocab_used of a matrix of that many rows: of GPT-2's vocabulary, however it is padded."""
    padded = has_gpt2_vocabulary(GPTConfig(vocab_size=rows, vocab_used=max(rows, 1)))
    return N_VOCAB if padded else rows


@functools.cache  # once, though config and weights are read one after the other
def note(text):
    print(f"note: {text}", file=sys.stderr)


# ----------------------------------------------------------------------------- llm.c


def read_bin(path):
    """Header of 256 int32: magic, version, block_size, vocab_size, n_layer, n_head, n_embd, rows of
    the padded vocabulary. Then every kind of parameter for all layers, the head being tied."""
    with open(path, "rb") as file:
        head = file.read(1024)
    header = np.frombuffer(head, "<i4") if len(head) == 1024 else np.zeros(256, "<i4")
    magic, version, T, used, L, nh, C, rows = header[:8].tolist()
    if magic == SHARD_MAGIC:
        raise ValueError(f"{path} is a shard of tokens: give it as data_dir's, not as a model")
    if magic != MAGIC:
        raise ValueError(f"{path} is no model of llm.c; a Hugging Face file is read by its folder")
    if version not in DTYPES:
        raise ValueError(
            f"{path} is llm.c's version {version}; read are 3 (fp32) and 5 (bf16), which its "
            f"train_gpt2.py writes"
        )
    config = GPTConfig(
        block_size=T, vocab_size=rows, vocab_used=used, n_layer=L, n_head=nh, n_embd=C
    )
    shapes = {n: w.shape for n, w in on_meta(config).state_dict().items() if n != "lm_head.weight"}
    kind, dtype = DTYPES[version]
    total, size = sum(map(math.prod, shapes.values())), path.stat().st_size
    if size != 1024 + total * np.dtype(kind).itemsize:
        wanted = 1024 + total * np.dtype(kind).itemsize
        raise ValueError(f"{path} has {size:,} bytes, its header asks for {wanted:,}: not whole")
    numbers = torch.from_numpy(np.fromfile(path, kind, offset=1024)).view(dtype)
    weights, start = {}, 0
    for name in llmc_order(L):
        count = math.prod(shapes[name])
        weights[name] = numbers[start : start + count].view(shapes[name])
        start += count
    return config, weights


def llmc_order(n_layer):
    yield from ("transformer.wte.weight", "transformer.wpe.weight")
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for kind in ("weight", "bias"):
            yield from (f"transformer.h.{i}.{part}.{kind}" for i in range(n_layer))
    yield from ("transformer.ln_f.weight", "transformer.ln_f.bias")
