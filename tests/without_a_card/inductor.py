"""LD_PRELOAD=shim.so TRITON=folder python inductor.py
LD_PRELOAD=shim.so TRITON=folder python inductor.py count 64 '{"n_layer": 12}' ...

What torch.compile makes of a training step for a card of sm_90: Inductor's Triton source, and by
Triton and ptxas the machine code of every kernel, which must fit the card's shared memory, without
a card. Prints a JSON line for each of
CASES: {"case", "error", "graphs", "kernels", "flex", "peak", "eager"}; flex: whether FlexAttention
is among the kernels; peak: the most bytes of storages that are alive at once while the compiled
code runs on FakeTensors, and eager: without the compiler. test_without_a_card.py starts it.

count B: of configs of one's own with B sequences, what the compiled step's own kernels are, without
products and attention: how many launches, and the GB they read and write, the loss's apart."""

import contextlib
import functools
import importlib.util
import json
import os
import re
import sys
import tempfile
import traceback
import types
from pathlib import Path
from unittest import mock

sys.path.insert(0, os.environ["TRITON"])
import torch
import torch._inductor.async_compile
import torch._inductor.config
import torch._inductor.graph
import torch._inductor.runtime.triton_helpers
import triton
from card import efficient_attention, inserted, swap
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from model import GPTConfig
from nanoswitch import loss
from nanoswitch.compiled import compile_model
from nanoswitch.counts import Storages, on_meta
from nanoswitch.device import autocast

T = 1024
CASES = {
    "plain": {},
    "window": dict(window=256, window_pattern="SL"),
    "window and alibi": dict(window=256, pos="alibi"),
    "window and kerple": dict(window=256, pos="kerple"),
    "kerple by flex": dict(pos="kerple", attention_kernel="flex"),
    "documents": dict(document_mask=True),
    "documents and window and alibi": dict(document_mask=True, window=256, pos="alibi"),
    "llama": dict(pos="rope", norm="rmsnorm", mlp="swiglu", n_kv_head=4, bias=False),
}
SM_90 = GPUTarget("cuda", 90, 32)
H100 = dict(
    multi_processor_count=132, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    regs_per_multiprocessor=65536, warp_size=32, L2_cache_size=50 * 2**20, gcnArchName="",
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, type="cuda", index=0,
    shared_memory_per_multiprocessor=233472, is_integrated=False, is_multi_gpu_board=False,
    clock_rate=1980000, memory_clock_rate=2619000, memory_bus_width=5120,
)  # fmt: skip


class Driver:
    """What Inductor asks of Triton's driver."""

    def get_current_target(self):
        return SM_90

    def get_current_device(self):
        return 0

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def get_device_interface(self):
        return torch.cuda

    def get_current_stream(self, device):
        return 0

    def is_active(self):
        return True


def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, enable_gqa=False):
    """torch's own choice on a card, among the kernels that take a mask if there is one."""
    assert q.size(1) == k.size(1) or (enable_gqa and attn_mask is None)
    if attn_mask is not None:
        return efficient_attention(q, k, v, attn_mask, dropout_p, is_causal)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]


class Kernel:
    def run(self, *args, **kwargs):
        pass


class Inside(Storages):
    """Storages that looks into the operator of the loss."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.nanoswitch.loss_and_gradients.default:
            with self:
                return loss.loss_and_gradients(*args)
        return super().__torch_dispatch__(operator, types, args, kwargs)


def run_on_fakes(source, peaks):
    """Inductor's Python source -> what stands for its compiled code: it runs, but for the kernels,
    on FakeTensors, and notes its peak."""
    made = types.ModuleType("made")
    exec(source, made.__dict__)
    as_is = lambda tensor=None, *_, **__: tensor  # noqa: E731
    made.__dict__.update(
        empty_strided_cuda=lambda size, stride, dtype: torch.empty_strided(
            size, stride, dtype=dtype, device="cuda"
        ),
        reinterpret_tensor=lambda x, size, stride, offset=0: torch.as_strided(
            x, size, stride, x.storage_offset() + offset
        ),
        get_raw_stream=lambda device: 0,
        **dict.fromkeys(("assert_size_stride", "assert_alignment", "copy_if_misaligned"), as_is),
    )
    call = made.__dict__.get("call") or made.runner.call

    def run(inputs):
        with Inside() as storages:
            for x in inputs:
                if isinstance(x, torch.Tensor):
                    storages.add(x.untyped_storage())
            result = call(inputs)
        peaks.append(storages.peak)
        return result

    return types.SimpleNamespace(call=run, __file__="made", runner=None, key="made")


def to_machine_code(source):
    """Every Triton kernel of Inductor's source through Triton and ptxas -> how many there are."""
    kernels = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", source, re.S)
    for name, text in kernels:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.py"
            path.write_text(text)
            spec = importlib.util.spec_from_file_location(name, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            tuner = next(x for x in vars(module).values() if hasattr(x, "configs"))
            meta = tuner._create_compile_meta(tuner.configs[0])
            options = tuner._create_compile_options(tuner.configs[0], meta)
            kernel = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
            made = triton.compile(kernel, target=SM_90, options=options)
            assert made.asm["cubin"], name
            shared, most = made.metadata.shared, H100["shared_memory_per_block_optin"]
            assert shared <= most, f"{name} takes {shared} bytes of shared memory; {most} are there"
    return len(kernels)


@contextlib.contextmanager
def generated(peaks=None):
    """Inside, what is compiled ends as a source in this list, with run_on_fakes in its place."""
    sources = []

    def finish(graph):
        code, _ = graph.codegen()
        sources.append(getattr(code, "value", code))
        return run_on_fakes(sources[-1], [] if peaks is None else peaks)

    with mock.patch.object(torch._inductor.graph.GraphLowering, "compile_to_module", finish):
        yield sources


def step(case, B):
    """A compiled step -> (Inductor's sources, peak bytes); and that of the eager one."""
    peaks, idx = [], torch.empty(B, T, dtype=torch.int64, device="cuda")

    def on_card(**changes):
        with unset_fake_temporarily():
            model = on_meta(GPTConfig(block_size=T, **case | changes))
        return swap(model, lambda p: torch.empty_like(p, device="cuda"))

    def run(forward, model):
        with autocast(idx.device, torch.bfloat16):
            _, loss = forward(idx, idx)
        loss.backward()
        model.zero_grad()

    with Storages() as storages:
        model = on_card(attention_kernel="auto")  # uncompiled, flex makes all the scores
        for x in model.parameters():
            storages.add(x.untyped_storage())
        run(model, model)
    with generated(peaks) as sources:
        model = on_card()
        run(compile_model(model, idx.device, fullgraph=True), model)
    return sources, max(peaks), storages.peak


# ----------------------------------------------------------------------------- what is moved

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.addmm_}
NOTHING = {aten.empty, aten.empty_like, aten.new_empty}


def kernels_of(sources):
    """Launches of Triton kernels in Inductor's sources, and the GB that they read and write."""
    launches = 0, 0.0
    for source in sources:
        found = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", source, re.S)
        gb = {name: re.search(r"'kernel_num_gb': ([\d.e-]+)", text) for name, text in found}
        runs = re.findall(r"(triton_\w+)\.run\(", source)
        moved = sum(float(gb[name][1]) for name in runs if gb.get(name))
        launches = launches[0] + len(runs), launches[1] + moved
    return launches


class Launches(TorchDispatchMode):
    """Counts operators but for products and views, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.count, self.moved = 0, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        storages = {x.untyped_storage()._cdata for x in given}
        is_view = all(x.untyped_storage()._cdata in storages for x in made)
        kind = operator.overloadpacket
        if kind in PRODUCTS | NOTHING or (is_view and not operator._schema.is_mutable):
            return result
        if kind in (aten.copy_, aten.zero_, aten.fill_):  # they read nothing of what they write
            given = given[1:]
        self.count += 1
        self.moved += sum(x.nbytes for x in given + made)
        return result


def loss_kernels(config, B):
    """kernels_of for the loss's operator, whose chunks are compiled apart."""
    half = dict(dtype=torch.bfloat16, device="cuda")
    x = torch.empty(B * T, config.n_embd, **half)
    weight = torch.empty(config.vocab_size, config.n_embd, device="cuda")
    targets = torch.empty(B * T, dtype=torch.int64, device="cuda")
    chunks = loss.loss_chunks(x, weight.to(x.dtype))
    with generated() as sources, torch.no_grad():
        logits = torch.empty(len(targets[chunks[0]]), config.vocab_size, **half)
        apart = functools.partial(loss.into_gradient_anew, cap=config.logit_softcap)
        torch.compile(apart, fullgraph=True)(logits, targets[chunks[0]])
    launches, gb = kernels_of(sources)
    # the operator itself, without what its chunks' kernels move
    without = lambda logits, *_: (x.new_empty(()), torch.empty_like(logits))  # noqa: E731
    with Launches() as rest, torch.no_grad():
        loss.loss_and_gradients(x, weight, targets, config.logit_softcap, without)
    return launches * len(chunks) + rest.count, gb * len(chunks) + rest.moved / 1e9


def count(B, *cases):
    for case in map(json.loads, cases):
        torch._dynamo.reset()
        with a_compiler_without_a_card(), torch._inductor.config.patch(profile_bandwidth=True):
            sources, peak, eager = step(case, int(B))
            parts = {"step": kernels_of(sources), "forward": kernels_of(sources[:1])}
            parts["loss"] = loss_kernels(GPTConfig(block_size=T, **case), int(B))
        line = {k: {"launches": n, "GB": round(gb, 1)} for k, (n, gb) in parts.items()}
        line |= {"peak GiB": round(peak / 2**30, 1), "eager GiB": round(eager / 2**30, 1)}
        print(json.dumps({"case": case} | line), flush=True)


@contextlib.contextmanager
def a_compiler_without_a_card():
    """Inductor asks the card about itself and times kernels on it: here it does neither."""
    driver.set_active(Driver())
    settings = dict(compile_threads=1, force_disable_caches=True, shape_padding=False)
    settings["joint_graph_constant_folding"] = False  # it computes, and fakes have no numbers
    compiler = torch._inductor.async_compile.AsyncCompile
    helpers = torch._inductor.runtime.triton_helpers
    with (
        torch._inductor.config.patch(settings),
        mock.patch.object(compiler, "triton", lambda *_, **__: Kernel()),
        mock.patch.object(compiler, "wait", lambda *_, **__: None),
        mock.patch.object(helpers, "set_driver_to_gpu", lambda: None),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, create=True),
        inserted("hopper", watched=False),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attend),
    ):
        properties = torch.cuda.get_device_properties()
        vars(properties).update(H100)
        with mock.patch.object(
            torch.cuda, "_get_device_properties", lambda _: properties, create=True
        ):
            yield


def main(B=32):
    for name, case in CASES.items():
        line = {"case": name, "error": "", "graphs": 0, "kernels": 0}
        torch._dynamo.reset()
        try:
            with a_compiler_without_a_card():
                sources, line["peak"], line["eager"] = step({"n_layer": 1} | case, B)
                line["graphs"] = len(sources)
                line["flex"] = any("flex_attention" in source for source in sources)
                line["kernels"] = sum(map(to_machine_code, sources))
        except Exception as error:
            if "--debug" in sys.argv:
                traceback.print_exc()
            line["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["count"]:
        count(*sys.argv[2:])
    else:
        main()
