"""Fast decoding of one token at a time: a half-precision copy of the model, on CUDA as a graph."""

import copy
import functools
import warnings
import weakref

import torch
import torch.nn as nn

from nanoswitch.device import autocast, pick_dtype

LOADED = weakref.WeakKeyDictionary()  # a model from load(), whose weights stay: its last decoder


def kept_decoder(model, dtype, rows):
    """decoder(), which for a loaded model is made once, not for every reply."""
    kept, key = LOADED.get(model, {}), (next(model.parameters()).device, dtype, rows)
    if key not in kept:
        kept.clear()
        kept[key] = decoder(model, dtype, rows)
    return kept[key]


def decoder(model, dtype, rows):
    """Make what GPT.stream decodes `rows` texts with, after the prompt: a copy of the model, its
    weights in half precision, for each token reads all of them. None where that is not faster.
    dtype: that of the matrix products. The prompt runs through the model itself: on most CPUs the
    products of many tokens are faster in fp32."""
    device = next(model.parameters()).device
    on_cpu = device.type == "cpu"
    if on_cpu and rows <= 4:
        dtype = torch.bfloat16
    if dtype == torch.float32:
        return None
    model = copy.deepcopy(model).to(dtype)
    vars(model).pop("stream", None)  # the page's watcher: it holds the copy, which holds it
    if on_cpu and dtype == torch.bfloat16 == pick_dtype("auto", device):  # it has units for that
        for module in list(model.modules()):
            for name in ("c_attn", "c_proj", "c_fc", "lm_head"):
                if isinstance(getattr(module, name, None), nn.Linear):
                    setattr(module, name, PackedLinear(getattr(module, name), rows))
    return functools.partial(decode_step, model)


class PackedLinear(nn.Module):
    """A linear layer whose bf16 weight lies as oneDNN likes to read it, which torch.compile would
    do too after half a minute: the same result, for a few rows 1.4 to 2 times as fast."""

    def __init__(self, linear, rows):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def same(logits):
    return logits


def decode_step(model, cache, pick=same, generator=None):
    """The function that maps the newest token of every row of a KVCache, (B, 1), to what pick makes
    of the logits of the next, (B, V used): the model's next_logits and the draw, on CUDA as one
    graph. generator: what pick draws from, if not torch's own."""
    device = cache.device
    # CPUs attend from one query several times as fast in fp32
    cache.to(torch.float32 if device.type == "cpu" else model.lm_head.weight.dtype)
    parts = model.modules()
    replayable = model.caches and all(getattr(part, "replayable", True) for part in parts)
    if device.type == "cuda" and replayable:
        try:
            return GraphedStep(model, cache, pick, generator)
        except RuntimeError as error:  # slower without, but the same
            cache.static = False
            reason = " ".join(str(error.__context__ or error).split())[:100]
            warnings.warn(f"no CUDA graph ({reason}): decoding without", stacklevel=2)
    return functools.partial(in_own_dtype, model, cache, pick)


def in_own_dtype(model, cache, pick, token, pos=None):
    """pick of next_logits without autocast: the weights have been cast."""
    with torch.inference_mode(), autocast(token.device, torch.float32):
        return pick(model.next_logits(token, cache, pos))


class GraphedStep:
    """decode_step as a CUDA graph, which launches all its kernels at once: one by one that takes
    many times as long as to run them. It reads the token and its position from two tensors."""

    def __init__(self, model, cache, pick=same, generator=None):
        model.check_length(cache.seen + 1)
        rows, device = len(cache.layers[0].tensors[0]), cache.device
        self.model, self.cache, self.pick, cache.static = model, cache, pick, True
        self.token = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.pos = torch.full((1,), cache.seen, device=device)
        state = generator and generator.get_state()
        # what this leaves in the cache, the first token overwrites
        self.replay = record(self.step, device, generator)
        if generator:  # what it drew is drawn again
            generator.set_state(state)

    def step(self):
        seen = self.cache.seen
        try:
            return in_own_dtype(self.model, self.cache, self.pick, self.token, self.pos)
        finally:
            self.cache.seen = seen  # counted below: Python does not run when a graph does

    def __call__(self, token):
        self.model.check_length(self.cache.seen + 1)
        self.token.copy_(token)
        result = self.replay().clone()  # the next replay writes over it
        self.pos += 1
        self.cache.seen += 1
        return result


def record(step, device, generator=None):
    """Record the kernels that step() launches on a CUDA device -> a function that runs them again
    and returns the tensor that step() did, with new content. generator: what step() draws from, if
    it is not torch's own."""
    with torch.cuda.device(device):
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        if generator:
            graph.register_generator_state(generator)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # its own: torch's default one serves one card
            step()  # libraries make at their first call what cannot be recorded
            # other threads of the page may be at work on the card meanwhile
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = step()
        torch.cuda.current_stream().wait_stream(stream)

    def replay():
        graph.replay()
        return result

    return replay
