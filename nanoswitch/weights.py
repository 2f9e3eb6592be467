"""Weights in safetensors files, and a model to hold them."""

import os

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from nanoswitch.counts import on_meta
from nanoswitch.files import pointer_hint


def read_safetensors(path):
    """{name: tensor} of a file; ValueError when it is missing or not whole."""
    if not os.path.exists(path):
        raise ValueError(f"no {path}; weights load from safetensors files only")
    try:
        return load_file(path)
    except SafetensorError as error:
        hint = pointer_hint(path)
        raise ValueError(f"{path} is not a whole safetensors file: {error}{hint}") from None


def check_whole(path):
    """ValueError if a safetensors file is truncated or none; reads its header only."""
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def empty(config):
    """A model whose weights are about to be loaded: no time is spent on drawing them."""
    model = on_meta(config).to_empty(device="cpu")
    if config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    return model.eval()


def fill(model, weights, origin):
    """Give a GPT every parameter from a state dict -> the GPT; ValueError unless names and shapes
    match exactly and all numbers are finite."""
    weights = dict(weights)
    if model.config.tie_embeddings:
        weights.setdefault("lm_head.weight", weights.get("transformer.wte.weight"))
    own = model.state_dict()
    for word, names in (("lacks", own.keys() - weights.keys()),
                        ("has unknown", weights.keys() - own.keys())):  # fmt: skip
        if names:
            raise ValueError(f"{origin} {word} tensors {', '.join(sorted(names)[:3])}")
    for name, w in weights.items():
        if w.shape != own[name].shape:
            have, want = tuple(w.shape), tuple(own[name].shape)
            raise ValueError(f"{origin}: {name} has shape {have}, the config asks for {want}")
        if not w.isfinite().all():
            raise ValueError(f"{origin}: {name} holds nan or infinity; take an older checkpoint")
    model.load_state_dict(weights)
    return model
