"""A card that is not there: what the CUDA path meets on a machine without one, but for the numbers.

Tensors are torch's FakeTensors: they have shape, dtype, device and strides, and every operator
checks them as a card would. What a CPU build knows nothing of stands here: which attention kernel
torch takes on which card, and what that kernel refuses. shim.cpp must be loaded before torch."""

import contextlib
import math
import types
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
HALVES = (torch.float16, torch.bfloat16)
COMPUTE = {"ampere": (8, 0), "hopper": (9, 0)}


class Card(TorchDispatchMode):
    """What on FakeTensors is not as on a card. kernels: those that attention took; grouped: those
    that got fewer key heads than query heads; odd_masks: widths of masks that it had to pad to a
    multiple of 8."""

    def __init__(self, name):
        super().__init__()
        self.name, self.kernels, self.grouped, self.odd_masks = name, set(), set(), set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator is aten._local_scalar_dense.default:  # a number that the host reads
            return ones(args[0])
        if operator is aten.exponential_.default:  # fakes know no generator
            return args[0]
        if operator in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            args = (args[0], [part for i in args[1] for part in places(i)], *args[2:])
        return operator(*args, **kwargs)

    def choose(self, q, mask, grouped=False):
        """The kernel that torch 2.11 and later take for q (B, nh, T, hs), as sdp_utils.cpp has it,
        among those that sdpa_kernel allows. grouped: keys and values have fewer heads."""
        allowed, half = torch.backends.cuda, q.dtype in HALVES
        fused = q.dim() == 4 and q.size(-1) % 8 == 0
        if fused and half and self.name == "hopper" and allowed.cudnn_sdp_enabled():
            return SDPBackend.CUDNN_ATTENTION
        if fused and half and mask is None and allowed.flash_sdp_enabled():
            return SDPBackend.FLASH_ATTENTION
        if fused and not grouped and allowed.mem_efficient_sdp_enabled():
            return SDPBackend.EFFICIENT_ATTENTION
        if allowed.math_sdp_enabled():
            return SDPBackend.MATH
        raise RuntimeError("No available kernel. Aborting execution.")

    def attend(
        self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        """torch.nn.functional.scaled_dot_product_attention, whose own choice a CPU build makes
        without asking: for tensors on a card always the math kernel."""
        assert enable_gqa or q.size(1) == k.size(1) == v.size(1)
        kernel = self.choose(q, attn_mask, enable_gqa)
        bias, train = attn_mask, torch.is_grad_enabled()
        self.kernels.add(kernel.name)
        if enable_gqa:
            self.grouped.add(kernel.name)
        if kernel == SDPBackend.MATH:
            return math_attention(
                q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if kernel == SDPBackend.FLASH_ATTENTION:
            return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
        if kernel == SDPBackend.CUDNN_ATTENTION:
            fused = aten._scaled_dot_product_cudnn_attention
            return fused(q, k, v, as_bias(bias, q), train, dropout_p, is_causal)[0]
        if bias is not None and bias.size(-1) % 8:
            self.odd_masks.add(bias.size(-1))
        return efficient_attention(q, k, v, bias, dropout_p, is_causal)


def as_bias(mask, q):
    """A mask of True and False -> what is added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)


def efficient_attention(q, k, v, mask, dropout_p, is_causal):
    """The memory-efficient kernel, which takes masks whose width is a multiple of 8."""
    bias = as_bias(mask, q)
    if bias is not None:
        width = bias.size(-1)
        if width % 8:
            bias = torch.nn.functional.pad(bias, (0, -width % 8))[..., :width]
        bias = bias.expand(*q.shape[:3], k.size(2))
    fused = aten._scaled_dot_product_efficient_attention
    return fused(q, k, v, bias, torch.is_grad_enabled(), dropout_p, is_causal)[0]


math_attention = torch.nn.functional.scaled_dot_product_attention


def flex_attention(q, k, v, score_mod, block_mask, enable_gqa=False, kernel_options=None):
    """FlexAttention written out: compiled it would need the card, whose options these are."""
    (B, nh, Tq, hs), Tk = q.shape, k.size(2)
    assert enable_gqa or q.size(1) == k.size(1) == v.size(1)
    k, v = (x.repeat_interleave(nh // x.size(1), dim=1) for x in (k, v))
    b, h, i, j = (
        torch.arange(n, device=q.device).view(-1, *[1] * (3 - dim))
        for dim, n in enumerate((B, nh, Tq, Tk))
    )
    scores = q @ k.transpose(2, 3) / math.sqrt(hs)
    if score_mod is not None:
        scores = score_mod(scores, b, h, i, j)
    assert block_mask.seq_lengths == (Tq, Tk) and block_mask.kv_indices.device == q.device
    seen = block_mask.mask_mod(b, h, i, j)
    return scores.masked_fill(~seen, -math.inf).softmax(-1).type_as(v) @ v


def places(index):
    """An index that is a mask -> one for each of its dimensions, as if all of it were true: how
    many are, only numbers could say."""
    if index is None or index.dtype != torch.bool:
        return [index]
    return [
        torch.empty(index.numel(), dtype=torch.int64, device=index.device)
        for _ in range(index.dim())
    ]


class Stream:
    device, device_index, stream_id, device_type, cuda_stream = torch.device("cuda", 0), 0, 0, 1, 0

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, other):
        pass

    wait_event = wait_stream

    def record_event(self, event=None):
        return Event()


class Event:
    def __init__(self, *args, **kwargs):
        pass

    def synchronize(self, *_):
        pass

    record = wait = synchronize

    def elapsed_time(self, end):
        return 1.0


def ones(x):
    """What a tensor's numbers are taken for where the host reads them."""
    kind = float if x.is_floating_point() else bool if x.dtype == torch.bool else int
    return np.ones(x.shape, kind).tolist()


def swap(module, change):
    """module.to(...) for FakeTensors, whose data torch cannot exchange: ties stay ties."""
    new = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                if p not in new:
                    new[p] = torch.nn.Parameter(change(p.detach()), p.requires_grad)
                part._parameters[name] = new[p]
    return module


@contextlib.contextmanager
def answering(name, count=1):
    """Inside, torch.cuda answers for `count` cards called `name`."""
    properties = types.SimpleNamespace(
        name=name, total_memory=80 * 2**30, major=COMPUTE[name][0], minor=0, multi_processor_count=1
    )
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: count,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: COMPUTE[name],
        "get_device_name": lambda device=None: name,
        "is_bf16_supported": lambda *_, **__: True,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (79 * 2**30, 80 * 2**30),
        "memory_reserved": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "current_stream": lambda *_: Stream(),
        "Stream": Stream,
        "Event": Event,
        "stream": lambda _: contextlib.nullcontext(),
    }
    common = torch.cuda.amp.common
    with contextlib.ExitStack() as stack:
        for what, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, what, answer))
        stack.enter_context(
            mock.patch.object(common, "amp_definitely_not_available", lambda: False)
        )
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda self: self))
        yield


@contextlib.contextmanager
def inserted(name, count=1, watched=True):
    """answering(), and all tensors are fake -> the Card. It watches all operators; torch.compile
    refuses to work under such a mode."""
    card, functional = Card(name), torch.nn.functional
    with contextlib.ExitStack() as stack:
        stack.enter_context(answering(name, count))
        stack.enter_context(mock.patch.object(torch.Tensor, "tolist", ones))
        stack.enter_context(
            mock.patch.object(functional, "scaled_dot_product_attention", card.attend)
        )
        stack.enter_context(
            mock.patch.object(FakeTensorMode, "avoid_device_init", True, create=True)
        )
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        if watched:
            stack.enter_context(card)
        yield card
