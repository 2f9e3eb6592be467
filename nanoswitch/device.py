"""Where the model runs: device, precision, and how much memory there is."""

import contextlib
import ctypes
import os
import re
import statistics
import sys
import time
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

PEAK_FLOPS = {  # dense tensor-core peak in bf16 (T4: fp16), from the makers' data sheets
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "RTX 5090": 209e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12, "T4": 65e12,
}  # fmt: skip


def pick_device(name):
    """The flag --device -> a torch device; auto takes cuda, else mps, else cpu."""
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"this machine has no device '{name}': {reason}") from None


def pick_dtype(name, device):
    """The flag --dtype -> the dtype of the matrix products, under autocast; auto takes bfloat16
    where the hardware has it, float16 on CUDA cards before Ampere, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        newer = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if newer else torch.float16
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():  # AMX comes with it
        return torch.bfloat16  # without such units bf16 is several times slower than fp32
    return torch.float32


def tune_cpu(device):
    """Settings of a process whose products are a CPU's, before the first; on others none."""
    if device.type != "cpu":
        return
    # oneDNN makes a kernel of megabytes for every new shape, and evaluation meets hundreds
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    # glibc gives back what a step frees, and every step faults the same pages in again, which can
    # take a third of it; other systems have no such library
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no separate mapping for large blocks
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: give nothing back; a size would end at 2 GB
        libc.mallopt(-2, 2**28)  # M_TOP_PAD: grow the heap by 256 MB at a time


def autocast(device, dtype):
    """The context in which the model runs its products in dtype; does nothing for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def own_precision(x):
    """The context in which products of x keep its dtype, whatever autocast says."""
    if x.device.type == "meta":  # it knows no autocast
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def is_sharded(value):
    """Whether fsdp has spread it over the ranks: a DTensor, asked without a second's import."""
    return hasattr(value, "full_tensor")


def peak_memory(device):
    """The most bytes this process has held so far: on the card, or in all on other devices; None
    where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def available_memory(device):
    """Bytes that this process may take: all of its card, or on a CPU its share of what the machine
    and its container have free; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        free = 1024 * (kib["MemAvailable"] + kib["SwapFree"])
    except (OSError, KeyError, ValueError, IndexError):  # not Linux
        return None
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{n}").read_text()) for n in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat["file"]))  # cached files give way
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def matrix_rate(device, dtype):
    """FLOP/s of a large square product in dtype, the most that a model could reach: the median of
    five."""
    n, seconds = 8192 if device.type == "cuda" else 2048, []
    a = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(6):  # the first warms up
        begin = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return 2 * n**3 / statistics.median(seconds[1:])


def peak_flops(device):
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if name.endswith((" Ti", " D", "Laptop GPU")):  # other cards under the same name
        return None
    return next((peak for card, peak in PEAK_FLOPS.items() if re.search(rf"{card}\b", name)), None)


def to_device(x, device):
    """A host tensor on the device, contiguous; CUDA copies it while the host goes on."""
    # a copy from strided memory would go through a temporary that is not pinned, and wait for it
    x = x.contiguous()
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
