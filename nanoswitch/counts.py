"""What a model costs, asked of the model itself, without memory for its numbers: parameters, FLOPs
per token, bytes of cache, masks and passes. Whatever class the tables of model.py hold is counted.

A module may say how its weights are multiplied: uses(T), how often each of them is for one token
of T (once, unless it or a module around it says otherwise; a table is only looked up), and
products(T), multiply-adds of one token that are none of a weight's.
"""

import weakref
from typing import NamedTuple

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT
from nanoswitch.cache import KVCache
from nanoswitch.device import autocast

CACHE_WIDTH = 2  # bytes of a cached number: bf16


def on_meta(config):
    """A model of this config that has shapes and no numbers: it takes no memory."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), NoDraws():
        return GPT(config)


class NoDraws(TorchFunctionMode):
    """Weights keep what they are. On meta to draw them changes nothing, but imports the compiler,
    which takes seconds of every start."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.__name__ == "normal_":  # a tensor's, or torch.nn.init's
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def allocated(model):
    """A model on meta with memory for its numbers, on the CPU, none of them set."""
    model = model.to_empty(device="cpu")
    if model.config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    return model


def num_params(config):
    return on_meta(config).num_params()


def multiply_adds(module, T, uses=1):
    """Of a forward pass, for one of T tokens."""
    if isinstance(module, nn.Embedding):
        uses = 0
    elif hasattr(module, "uses"):
        uses = module.uses(T)
    own = uses * sum(p.numel() for p in module.parameters(recurse=False))
    own += module.products(T) if hasattr(module, "products") else 0
    return own + sum(multiply_adds(child, T, uses) for child in module.children())


def flops_per_token(model, T=None):
    """Training FLOPs of one token at context T (default block_size): two for every multiply-add,
    and the backward pass costs two forward ones. For GPT-2 that is 6 N + 12 n_layer n_embd T
    (PaLM, Chowdhery et al. 2022, appendix B), N without the look-up tables."""
    return round(6 * multiply_adds(model, T or model.config.block_size))


def kv_bytes_per_token(model):
    """Bytes of the cache in bf16 at a full context, divided by its tokens."""
    model, T = on_meta(model.config).eval(), model.config.block_size
    cache = KVCache(model, T)
    with torch.no_grad():
        model.features(torch.zeros(1, 1, dtype=torch.int64, device="meta"), cache)
    tensors = (x for layer in cache.layers for x in (*layer.tensors, *layer.kept.values()))
    kept = sum(x[0].numel() for x in tensors)
    return CACHE_WIDTH * kept // T


def mask_bytes(model):
    """Bytes of the masks and biases of one sequence of block_size tokens, and what the backward
    pass keeps of how they were made."""
    model, T = on_meta(model.config), model.config.block_size
    docs = None
    if model.config.document_mask:
        docs = torch.zeros(1, T, dtype=torch.int64, device="meta")
    pos = torch.arange(T, device="meta")
    with Storages() as storages:
        masks = model.masks(pos, docs)
        held = storages.now
    del masks
    return held


class PassCosts(NamedTuple):
    """Of a forward and backward pass: the peak bytes beyond those of the weights and their
    gradients, and the bytes that its operators read and write."""

    added: int
    moved: int


def pass_costs(config, size, dtype=torch.float32):
    """PassCosts over `size` sequences of block_size tokens: every operator runs on shapes alone.
    dtype: that of the products, under autocast."""
    model = on_meta(config)
    weights = 4 * model.num_params()
    with FakeTensorMode(allow_non_fake_inputs=True), Storages() as storages:
        model = allocated(model)
        for w in model.parameters():  # as a step's second pass finds them
            w.grad = torch.empty_like(w)
        idx = torch.empty(size, config.block_size, dtype=torch.int64, device="cpu")
        storages.moved = 0
        with autocast(idx.device, dtype):
            _, loss = model.train()(idx, idx)
        loss.backward()
    return PassCosts(storages.peak - 2 * weights, storages.moved)


def pass_bytes(config, size, dtype=torch.float32):
    return pass_costs(config, size, dtype).added


class Storages(TorchDispatchMode):
    """Adds up the bytes of the storages that are made inside: `now` those alive, `peak` the most
    there were at once; and `moved`, what the operators read and write, but for views."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.moved, self.alive = 0, 0, 0, set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        before = {x.untyped_storage()._cdata for x in given}
        is_view = all(x.untyped_storage()._cdata in before for x in made)
        if operator._schema.is_mutable or not is_view:
            self.moved += sum(x.nbytes for x in given + made)
        for x in made:
            self.add(x.untyped_storage())
        return result

    def add(self, storage):
        key = storage._cdata
        if key in self.alive:
            return
        self.alive.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, key, storage.nbytes())

    def free(self, key, size):
        self.alive.discard(key)
        self.now -= size
