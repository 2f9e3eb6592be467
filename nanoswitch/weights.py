"""Weights in files, a model to hold them, and weights to test one with."""

import os
import pickle
import re
import warnings
import zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from model import GPT
from nanoswitch.counts import allocated, on_meta
from nanoswitch.files import first_line, pointer_hint


def read_safetensors(path):
    """{name: tensor} of a file; ValueError when it is missing or not whole."""
    if not os.path.exists(path):
        raise ValueError(f"no {path}; weights load from safetensors files only")
    try:
        return load_file(path)
    except SafetensorError as error:
        hint = pointer_hint(path)
        raise ValueError(f"{path} is not a whole safetensors file: {error}{hint}") from None


class Bag:
    """What stands in for a class in somebody's file: it keeps values and does nothing."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __init__(self, *_):
        pass


def read_torch(path, bags=()):
    """What torch.save wrote, on the CPU: tensors, plain values and their containers. ValueError
    (one line) for anything else; none of it runs. bags: names of classes, wherever defined, whose
    objects are read as a Bag."""
    if not os.path.exists(path):
        raise ValueError(f"no {path}")
    zipped = zipfile.is_zipfile(path)
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        known = [(Bag, name) for name in unknown if name.rpartition(".")[2] in bags]
        with torch.serialization.safe_globals(known), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a pickle that is about to be refused
            return torch.load(path, "cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not name:
            raise ValueError(f"{path} is no file of torch.save{pointer_hint(path)}") from None
        raise ValueError(
            f"{path} holds an object of {name[1]}, and no pickled object is run here; save its "
            f"state_dict() alone"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = first_line(error)
        raise ValueError(
            f"{path} is no whole file of torch.save: {reason}{pointer_hint(path)}"
        ) from None


def check_whole(path):
    """ValueError if a safetensors file is truncated or none; reads its header only."""
    try:
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def empty(config):
    """A model whose weights are about to be loaded: no time is spent on drawing them."""
    return allocated(on_meta(config)).eval()


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


# ----------------------------------------------------------------------------- to test with


def grown(config, std=0.3, seed=0):
    """A GPT in eval mode whose weights are large enough for attention to be far from uniform."""
    torch.manual_seed(seed)
    return shake(GPT(config), std, seed)


def shake(model, std=0.3, seed=0):
    """Draw weights far from the initial ones, so that no bias, norm or score is negligible: biases
    are not 0, norm weights not 1. Position parameters stay near their initial values."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2 or ".wpe" in name:
                p.add_(torch.randn_like(p), alpha=std)
            else:
                p.normal_(0, std)
    return model.eval()
