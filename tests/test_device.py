"""What device.py sets before a run."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanoswitch.device import peak_flops

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or "LD_PRELOAD" in os.environ, reason="it is glibc's malloc"
)
def test_a_cpu_process_keeps_what_it_freed():
    # the last 256 MB of a block of 2.3 GB: a size that an int holds ends below. Each block is a
    # page smaller than the last: in a hole of its own size there may be no room to align it
    code = """
import resource, torch
from nanoswitch import device
device.tune_cpu(torch.device("cpu"))
faults = []
for pages in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(600 * 2**20 - pages * 1024)[-(2**26):].fill_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    first, *others = map(int, done.stdout.split())
    assert max(others) < first / 100


@pytest.mark.parametrize(
    "name, peak",  # as torch names them
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("Tesla T4", 65e12),
        ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 5090", 209e12), ("Tesla V100-SXM2-16GB", None),
        ("NVIDIA H200", 989e12), ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA RTX A1000", None), ("NVIDIA T400 4GB", None),
    ],
)  # fmt: skip
def test_a_cards_peak_is_that_of_its_data_sheet(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None
