"""Cards to plan for without having one: train_gpt2.py CONFIG --dry_run true --device cuda:h100

Everything here is computed: memory by counting what the operators of a pass allocate, speed from
their FLOPs and bytes and the makers' data sheets.
"""

from dataclasses import dataclass

import torch

from nanoswitch.counts import flops_per_token, on_meta, pass_costs
from nanoswitch.device import PEAK_FLOPS
from nanoswitch.micro_batch import divisors
from nanoswitch.parallel import bytes_held


@dataclass
class Card:
    memory: float
    """GiB that torch reports"""
    flops: float
    """dense FLOP/s of half-precision products summed in fp32"""
    bandwidth: float
    """bytes/s of its memory"""
    dtype: torch.dtype = torch.bfloat16


CARDS = {
    "t4": Card(14.7, PEAK_FLOPS["T4"], 320e9, torch.float16),
    "3090": Card(23.6, PEAK_FLOPS["RTX 3090"], 936e9),
    "4090": Card(23.6, PEAK_FLOPS["RTX 4090"], 1008e9),
    "5090": Card(31.4, PEAK_FLOPS["RTX 5090"], 1792e9),
    "a100": Card(79.2, PEAK_FLOPS["A100"], 2039e9),
    "h100": Card(79.1, PEAK_FLOPS["H100"], 3350e9),
    "h200": Card(139.8, PEAK_FLOPS["H200"], 4800e9),
}


def named_card(device):
    """The Card that a --device such as cuda:h100 names; None for a device that may be here."""
    kind, _, name = device.partition(":")
    if kind == "cuda" and name.lower() in CARDS:  # 4090 is a card too, not the 4,091st one here
        return CARDS[name.lower()]
    if kind != "cuda" or not name or name.isdigit():
        return None
    raise ValueError(f"no card '{name}' is known; the cards are {', '.join(CARDS)}")


def table(plan, most):
    """What a card can do with micro-batches up to `most` -> lines: memory, and two bounds on
    tokens/s: one where every operator reads and writes its tensors, as without torch.compile, one
    where nothing but the products takes time. A compiled run lies between them."""
    card, lines = plan.card, []
    held = bytes_held(plan.model_config, plan.config.parallel, plan.ranks.world)
    flops = flops_per_token(on_meta(plan.model_config))
    sizes = [d for d in divisors(plan.rank_windows) if d <= most]
    for size in sizes[-8:]:
        added, moved = pass_costs(plan.model_config, size, plan.dtype)
        need = (held + added) / 2**30
        tokens = size * plan.model_config.block_size
        products = tokens * flops / card.flops
        slow, fast = (
            plan.ranks.world * tokens / s for s in (products + moved / card.bandwidth, products)
        )
        lines.append(
            f"micro_batch {size:>4}: {need:6.1f} GiB, at most {slow:,.0f} tokens/s eager, "
            f"{fast:,.0f} by products alone (computed)"
        )
    return lines
