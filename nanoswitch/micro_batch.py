"""How many sequences one forward pass takes: the largest micro-batch that fits, and a smaller one
when memory runs out after all."""

import contextlib
import math
from pathlib import Path

import numpy as np
import torch

from nanoswitch.counts import pass_bytes
from nanoswitch.parallel import bytes_held


def divisors(n):
    """All of them, rising."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})


def find(plan, fits):
    """Sequences of a forward pass on one rank: the flag, or the largest divisor of a rank's part of
    the batch with which fits(size) is true on all of them. ValueError where there is none."""
    config, per_rank = plan.config, plan.rank_windows
    if config.micro_batch:
        if per_rank % config.micro_batch:
            near = max(d for d in divisors(per_rank) if d <= config.micro_batch)
            raise ValueError(
                f"micro_batch {config.micro_batch} does not divide the {per_rank} "
                f"sequences of a rank's batch; try --micro_batch {near}"
            )
        return config.micro_batch
    # far beyond what fills a card; a CPU has no thousands of cores to fill
    on_card = plan.device.type == "cuda" or plan.card
    tokens = 2**18 if on_card else 8192
    most = max(1, tokens // plan.model_config.block_size)
    ran_out = int(plan.ranks.sum(remembered(config.run_dir) if plan.ranks.first else 0)[0])
    if ran_out and plan.ranks.first:
        print(f"micro_batch at most {ran_out}, for memory ran out: {limit_file(config.run_dir)}")
    most = min(most, ran_out or most)
    sizes = [d for d in reversed(divisors(per_rank)) if d <= most]
    return largest(plan, sizes, fits) if on_card else sizes[0]


def confirm(trainer, fits):
    """The trainer's micro_batch, or the largest below it with which fits(size) is true on all ranks
    now: a compiled model may need more than the one that find() tried. A flag stands."""
    size = trainer.micro_batch
    if not may_choose(trainer):
        return size
    return largest(trainer, [d for d in divisors(trainer.rank_windows)[::-1] if d <= size], fits)


def may_choose(trainer):
    return trainer.device.type == "cuda" and not trainer.config.micro_batch


def largest(plan, sizes, fits):
    """The first of the sizes, which fall, with which fits(size) is true on all ranks."""
    for size in sizes:
        if plan.ranks.sum(fits(size))[0] == plan.ranks.world:
            return size
    raise ValueError("not even micro_batch 1 fits the card; lower --block_size or the model")


def limit_file(run_dir):
    return Path(run_dir) / "micro_batch"


def remembered(run_dir):
    """The largest micro_batch since a start in this run_dir ran out of memory, else 0."""
    with contextlib.suppress(OSError, ValueError):
        return int(limit_file(run_dir).read_text())
    return 0


def fits_by_count(plan, size):
    """Whether `size` sequences leave a tenth of the card, by what the operators of a pass allocate:
    room for fragments, the libraries' work space and the compiler's choices."""
    if plan.card:
        total = plan.card.memory * 2**30
    elif size == 1:  # then the run itself finds out
        return True
    else:
        total = torch.cuda.get_device_properties(plan.device).total_memory
    return expected_bytes(plan, size) < 0.9 * total


def expected_bytes(plan, size):
    """Of a rank with `size` sequences in its forward pass: weights, gradients, AdamW's moments, and
    what a forward and backward pass adds."""
    held = bytes_held(plan.model_config, plan.config.parallel, plan.ranks.world)
    return held + pass_bytes(plan.model_config, size, plan.dtype)


def fits_by_trying(trainer, size):
    """Whether a forward and backward pass over `size` sequences, of the compiled model if there is
    one by now, leaves a twentieth of the card."""
    if trainer.config.parallel == "fsdp" and trainer.ranks.world > 1:
        # no trying: where one rank ran out of memory, the others would wait for it
        return fits_by_count(trainer, size)
    total = torch.cuda.get_device_properties(trainer.device).total_memory
    try:
        left = memory_left(trainer, size)
    except torch.OutOfMemoryError:
        left = 0
    trainer.model.zero_grad()
    torch.cuda.empty_cache()
    return left > 0.05 * total  # room for fragments


def memory_left(trainer, size):
    """Bytes of the card still free at the peak of a forward and backward pass over `size`
    sequences, beside gradients of the pass before it and AdamW's two moments."""
    for w in trainer.model.parameters():
        w.grad = torch.zeros_like(w)
    torch.cuda.reset_peak_memory_stats()
    moments = torch.empty(2, trainer.model.num_params(), device=trainer.device)  # noqa: F841
    x, y = trainer.load(trainer.train, np.arange(size) % trainer.train.count)
    with trainer.autocast():
        _, loss = trainer.forward(x, y)
    loss.backward()
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.max_memory_allocated()


# ----------------------------------------------------------------------------- out of memory


def retried(trainer, update):
    """update(); where one process runs out of memory before any weight has changed, and may choose
    micro_batch, again with a smaller one."""
    while True:
        try:
            return update()
        except torch.OutOfMemoryError:
            # the other ranks, or DDP itself, already wait for a sum
            if trainer.ranks.distributed or trainer.changing:
                raise
            before, after = trainer.micro_batch, smaller(trainer)
        # only here, where no traceback holds on to them any more, can the tensors go
        trainer.model.zero_grad()
        if trainer.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"out of memory: micro_batch {before} -> {after}")
        trainer.micro_batch = after


def smaller(trainer):
    """The micro-batch to go on with after one that did not fit; ValueError if there is none or it
    is not ours to choose."""
    size = trainer.micro_batch
    if size == 1:
        raise ValueError(
            "out of memory even with micro_batch 1; lower --block_size or the model's size"
        )
    less = max(d for d in divisors(trainer.rank_windows) if d <= size // 2)
    if trainer.config.micro_batch:
        raise ValueError(f"out of memory with micro_batch {size}; try --micro_batch {less}")
    return less


def start_smaller(trainer):
    """End this process, so that the next start in this run_dir takes a smaller micro-batch."""
    size, less = trainer.micro_batch, smaller(trainer)
    if trainer.config.resume == "never":
        raise ValueError(f"out of memory with micro_batch {size}; try --micro_batch {less}")
    limit_file(trainer.config.run_dir).write_text(f"{less}\n")
    raise ValueError(
        f"out of memory with micro_batch {size}: the same command goes on with {less}, "
        f"under torchrun --max-restarts=3 by itself"
    )
