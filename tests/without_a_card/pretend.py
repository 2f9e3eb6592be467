"""LD_PRELOAD=shim.so PYTHONPATH=.:tests/without_a_card python -m pytest -p pretend -m gpu tests/...

A pytest plugin: the tests that need a card, on one that is not there but has numbers. A tensor
says cuda:0 and holds its values on the CPU: autocast, autograd and the project take the way of a
card, and every operator first refuses what a card would refuse, then runs by the CPU's kernel. The
compiler, CUDA graphs, FlexAttention's kernel and other processes are not there."""

import contextlib

import pytest
import torch
from card import answering, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import train_gpt2
from nanoswitch import decode, kernels

aten = torch.ops.aten
CARD = torch.device("cuda", 0)
# what takes tensors of the host beside the card's own
MIXED = {
    aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default,
    aten.index_put.default, aten._index_put_impl_.default, aten._unsafe_index.Tensor,
}  # fmt: skip
# what waits until a value has reached the host, which no CUDA graph can hold
WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
    aten.equal.default,
}  # fmt: skip
PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.baddbmm_}
PRIVATE = ("test_every_mode_trains_on_cuda_as_one_process",)  # starts processes of its own


class OnCard(torch.Tensor):
    """A tensor that says cuda:0; `host` holds its values."""

    @staticmethod
    def __new__(cls, host):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(),
            dtype=host.dtype, layout=host.layout, device=CARD,
        )  # fmt: skip
        tensor.host = host
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return operate(operator, args, kwargs or {})

    def __repr__(self):
        return f"OnCard({self.host})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = self.detach().clone()
            if isinstance(self, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, self.requires_grad)
            memo[id(self)] = copy
        return memo[id(self)]

    def tolist(self):
        return self.host.tolist()

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def host(x):
    return x.host if isinstance(x, OnCard) else x


def is_cuda(device):
    return torch.device(device).type == "cuda"


def plainly(operator, args, kwargs):
    return operator(*args, **kwargs)


def by_fp32(operator, args, kwargs):
    """A product of halves summed in fp32, as a card does it; CPUs without units for halves take
    500 times as long by their own kernel."""
    if operator is aten.addmm.dtype_out:  # which no CPU has
        return kwargs["out"].copy_(args[0] + args[1].float() @ args[2].float())
    half = next((x.dtype for x in args if isinstance(x, torch.Tensor)), None)
    if half not in (torch.float16, torch.bfloat16) or "out" in kwargs:
        return operator(*args, **kwargs)
    wide = [x.float() if isinstance(x, torch.Tensor) else x for x in args]
    out = operator(*wide, **kwargs).to(half)
    return args[0].copy_(out) if operator._schema.is_mutable else out


def operate(operator, args, kwargs):
    """An operator as a card would take it -> its result, on the card where that would be."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    own = [x for x in given if isinstance(x, OnCard)]
    if own and operator not in MIXED:
        for x in given:  # a number that is a tensor may come from anywhere
            if not isinstance(x, OnCard) and x.dim():
                raise RuntimeError(f"Expected all tensors to be on the same device: {operator}")
    device = kwargs.get("device")
    on_card = bool(own) if device is None else is_cuda(device)
    if device is not None and is_cuda(device):  # others, such as meta, stay what they are
        kwargs = kwargs | {"device": torch.device("cpu")}
    kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"}
    run = by_fp32 if operator.overloadpacket in PRODUCTS else plainly
    out = run(operator, tree_map(host, args), tree_map(host, kwargs))
    if operator is aten.copy_.default:  # into a tensor on either side
        return args[0]
    if not on_card:
        return out
    before = {id(host(x)): x for x in given}  # an operator in place returns what it was given

    def place(x):
        if not isinstance(x, torch.Tensor):
            return x
        return before[id(x)] if id(x) in before else OnCard(x)

    return tree_map(place, out)


class Mode(TorchDispatchMode):
    """Sends to the card what is made there without a tensor to begin from."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return operate(operator, args, kwargs or {})


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator in WAITS and any(isinstance(x, OnCard) for x in tree_leaves((args, kwargs))):
            raise RuntimeError(f"operation not permitted when stream is capturing: {operator}")
        out = operator(*args, **kwargs)
        self.calls.append((operator, args, kwargs, out))
        return out


def record(step, device, generator):
    """decode.record: what runs again are the operators alone, on the tensors that they had."""
    step()
    tape = Tape()
    with tape:
        result = step()

    def replay():
        with torch.no_grad():
            for operator, args, kwargs, out in tape.calls:
                again = operator(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, OnCard) and old.host.data_ptr() != new.host.data_ptr():
                        old.host.copy_(new.host)
        return result

    return replay


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(torch, "inference_mode", torch.no_grad)  # its tensors cannot be swapped
        patch.setattr(decode, "record", record)
        patch.setattr(kernels, "compiled_flex", lambda: flex_attention)
        patch.setattr(train_gpt2, "compiled", lambda trainer: trainer.model)
        stack.enter_context(answering("ampere"))
        stack.enter_context(Mode())
        return (yield)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.function.__name__ in PRIVATE:
            item.add_marker(pytest.mark.skip(reason="starts processes that would need a card"))


def pytest_configure():
    torch.__future__.set_swap_module_params_on_conversion(True)  # a module may move to the card
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(list) goes there as a copy
