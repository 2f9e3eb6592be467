"""torchrun --nproc_per_node=8 train_gpt2.py CONFIG.toml --parallel fsdp
python -m nanoswitch.parallel    what each mode holds and sends: docs/scale_out.md's

How a run is spread over ranks, all of it by torch.distributed. Without torchrun there is one rank
and every mode just trains.

    ddp     every rank holds everything; gradients are averaged once a step
    zero1   the optimizer's state is shared out, whole parameters at a time
    fsdp    weights, gradients and state are shared out; blocks are gathered as they are needed

A file of its own, so that the trainer reads the same for any mode: it wraps what it made, steps
`optimizers`, and reads and writes one kind of checkpoint, the plain model's.
"""

import contextlib
import itertools
import os
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from model import GPTConfig
from nanoswitch.counts import on_meta
from nanoswitch.device import is_sharded, pick_device
from nanoswitch.optimizers import first_state, parameters
from nanoswitch.weights import fill


class Ranks:
    """This process among those that torchrun started; a single one without it."""

    def __init__(self, device):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        local = os.environ.get("LOCAL_RANK", "")
        if local and (device == "auto" or device.startswith("cuda")) and torch.cuda.is_available():
            device = f"cuda:{local}"  # else its first tensor leaves a context on card 0
        self.device = pick_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.first = self.rank == 0
        self.distributed = "RANK" in os.environ
        if self.distributed and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def total(self, *values):
        """Add up numbers over all ranks -> (n,) on the device, without waiting for it."""
        # gloo has no AVG, mps no float64; sums of counts and losses fit fp64 elsewhere
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.zeros(len(values), dtype=dtype, device=self.device)
        for place, value in zip(total, values, strict=True):
            place += value  # a number is no copy to the device, which would wait
        if self.distributed:
            dist.all_reduce(total)
        return total

    def sum(self, *values):
        """Add up numbers over all ranks -> a list of floats."""
        return self.total(*values).tolist()

    def agree(self, *numbers):
        """Whether all ranks have the same whole numbers, below 2^32: their sum is exact in fp64."""
        return self.world == 1 or self.sum(*numbers) == [self.world * n for n in numbers]

    def first_alone(self, call):
        """call() on the first rank, then on the others: what it downloads is then there."""
        result = call() if self.first else None
        self.sum(0)
        return result if self.first else call()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        # one that failed leaves at once: the others may wait in a sum, and never say goodbye
        if self.distributed and kind in (None, SystemExit):
            # gloo's threads need the interpreter to let go of the last tensors, and torch waits
            # for them without giving it up: let them finish first
            time.sleep(0.2)
            dist.destroy_process_group()


# ----------------------------------------------------------------------------- the model


def place(model, parallel, ranks, dtype):
    """Move the model to its device; under fsdp each rank keeps only its rows of every tensor.

    There blocks are gathered in dtype, what their products run in under autocast anyway, and
    gradients are summed in fp32. On CPU they stay in fp32: its LayerNorm takes one dtype alone."""
    if parallel != "fsdp" or not ranks.distributed:
        return model.to(ranks.device)
    # a second of every start, which only fsdp needs
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    gathered = dtype if ranks.device.type == "cuda" else None
    low = MixedPrecisionPolicy(gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=low)
    fully_shard(model, mesh=mesh)  # embeddings, head and last norm, as one unit
    for part in sharded(model):  # gloo has no AVG: sum, then divide
        part.set_force_sum_reduction_for_comms(ranks.device.type != "cuda")
    for name in ("generate", "token_losses"):
        register_fsdp_forward_method(model, name)
    return model


def average_gradients(forward, parallel, ranks):
    """Wrap the module to train so that its backward pass averages gradients over the ranks."""
    if parallel == "fsdp" or not ranks.distributed:  # place already did
        return forward
    return DistributedDataParallel(forward, gradient_as_bucket_view=True)


def sharded(model):
    return [module for module in model.modules() if hasattr(module, "reshard")]


@contextlib.contextmanager
def whole_weights(model):
    """Inside, every rank holds all weights: a forward pass sends nothing, so that each rank may
    run as many as it has work for. For evaluation; does nothing outside fsdp."""
    blocks = [part for part in sharded(model) if part is not model]
    for part in sharded(model):
        part.unshard()
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(True, recurse=False)
        for part in sharded(model):
            part.reshard()


# ----------------------------------------------------------------------------- the whole state


def whole_state(model, optimizers, ranks):
    """What a checkpoint holds, the same for every mode and number of ranks: {name: weight} of the
    plain model, a tied head once, and {name: {"exp_avg": ...}} of the optimizers, all on the CPU.

    All ranks must call it; only the first one gets the tensors, and holds all of them: 12 bytes a
    parameter with AdamW."""
    weights = model.state_dict()
    names = {p: name for name, p in model.named_parameters()}
    whole = {name: gather(weights[name], ranks) for name in names.values()}
    moments = {name: {} for name in whole}  # none yet where every step so far was skipped
    for optimizer in optimizers:
        for p, state in state_of(optimizer, ranks).items():
            moments[names[p]] = {key: gather(value, ranks) for key, value in state.items()}
    return (whole, moments) if ranks.first else ({}, {})


def gather(value, ranks):
    if isinstance(value, list):
        return [gather(one, ranks) for one in value]
    if is_sharded(value):
        value = value.full_tensor()
    if not torch.is_tensor(value):
        return value
    return value.detach().cpu().contiguous() if ranks.first else None


def state_of(optimizer, ranks):
    """{parameter: its state}; under zero1 on the first rank only."""
    if not hasattr(optimizer, "consolidate_state_dict"):  # zero1's alone has it
        return optimizer.state
    optimizer.consolidate_state_dict(to=0)
    if ranks.device.type == "cuda":  # it does not wait for its own copies to the host
        torch.cuda.synchronize()
    if not ranks.first:
        return {}
    state = optimizer.state_dict()["state"]
    return {p: state[i] for i, p in enumerate(parameters(optimizer)) if i in state}


def load_state(model, optimizers, weights, moments, origin):
    """Take over what whole_state gave, under any mode and number of ranks; each rank reads all
    and keeps its share. Rates and decay are the optimizers' own. Names and shapes must match."""
    own = model.state_dict()
    fill(model, {n: share(w, own[n]) if n in own else w for n, w in weights.items()}, origin)
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        # what zero1 wraps: its own loader puts fused AdamW's step counts on the CPU, where CUDA's
        # kernel fails (pytorch issue 124133), and keeps a second copy of the state
        optimizer = getattr(optimizer, "optim", optimizer)
        state = {}
        for i, p in enumerate(parameters(optimizer)):
            if names[p] not in moments:
                raise ValueError(f"{origin} lacks the optimizer's state of {names[p]}")
            shapes = {getattr(value, "shape", None) for value in moments[names[p]].values()}
            # most optimizers keep numbers and tensors like the parameter; others are asked
            begun = {} if shapes <= {p.shape, ()} else first_state(optimizer, p)
            for key, value in moments[names[p]].items():
                like = begun.get(key, p)
                shape, wanted = getattr(value, "shape", None), getattr(like, "shape", None)
                if shape not in (wanted, ()):
                    found = f"{key} of shape {shape and tuple(shape)}, not {tuple(p.shape)}"
                    raise ValueError(f"{origin}: {names[p]} has {found}")
                state.setdefault(i, {})[key] = share(value, like)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def share(value, like):
    """A copy of this rank's part of a whole tensor, spread as the tensor `like` is."""
    if is_sharded(like) and value.shape == like.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value.to(like.device, copy=True) if torch.is_tensor(value) else value


# ----------------------------------------------------------------------------- what it costs


def parameter_counts(config):
    """Parameters of a model: (all, its largest block, what is outside the blocks)."""
    model = on_meta(config)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.transformer.h]
    return model.num_params(), max(blocks), model.num_params() - sum(blocks)


def bytes_held(config, parallel, world):
    """Bytes of weights, gradients and AdamW's two moments on one rank of `world`, in fp32, without
    activations. fsdp: and what is gathered at the peak, the parts outside the blocks (weights and
    gradients in fp32) and two blocks' weights in bf16 with one's gradient, bf16 and fp32."""
    every, block, outside = parameter_counts(config)
    if parallel == "ddp":
        return 16 * every
    if parallel == "zero1":
        return 8 * every + 8 * largest_share(config, world)
    return 16 * every // world + 8 * outside + (2 * 2 + 2 + 4) * block


def largest_share(config, world):
    """Parameters of the rank that has most, when whole ones are dealt out, largest first, each to
    the rank that has least, matrices before vectors (ZeroRedundancyOptimizer's rule)."""
    shapes = [p.shape for p in on_meta(config).parameters()]
    shares = [0] * world
    for shape in sorted(shapes, key=lambda s: (len(s) < 2, -s.numel())):
        shares[shares.index(min(shares))] += shape.numel()
    return max(shares)


def bytes_sent(config, parallel, world, micro_steps=1, width=2):
    """Bytes one rank sends in an optimizer step, by ring algorithms: gathering, scattering or
    broadcasting a tensor sends (world - 1) / world of it, an all-reduce twice that.

    ddp all-reduces fp32 gradients, zero1 then broadcasts the fp32 weights (on average over the
    ranks: the one that owns the embedding sends more); fsdp, in every
    micro-step, gathers the blocks in bf16 (width 4: fp32) forward and backward and the rest in
    fp32 once, and scatters fp32 gradients."""
    every, _, outside = parameter_counts(config)
    if parallel == "ddp":
        sent = 2 * 4 * every
    elif parallel == "zero1":
        sent = 2 * 4 * every + 4 * every
    else:
        sent = micro_steps * (2 * width * (every - outside) + 4 * outside + 4 * every)
    return sent * (world - 1) // world


SIZES = {
    "124M": {},
    "350M": dict(n_layer=24, n_head=16, n_embd=1024, block_size=2048),
    "1.5B": dict(n_layer=48, n_head=25, n_embd=1600),
    "7B": dict(
        n_layer=32, n_head=32, n_embd=4096, block_size=4096, mlp_hidden=11008,
        pos="rope", norm="rmsnorm", mlp="swiglu", bias=False,
    ),
}  # fmt: skip


def table(worlds=(8, 64, 512)):
    """GB held by a GPU and GB it sends per step of one micro-step -> lines of a Markdown table."""
    modes = ("ddp", "zero1", "fsdp")
    lines = [
        "| model | GPUs | " + " | ".join(f"{m} holds | {m} sends" for m in modes) + " |",
        "|---|" + "--:|" * (1 + 2 * len(modes)),
    ]
    for (name, changes), world in itertools.product(SIZES.items(), worlds):
        config = GPTConfig(**changes)
        costs = [f(config, mode, world) for mode in modes for f in (bytes_held, bytes_sent)]
        cells = " | ".join(f"{cost / 1e9:.2f}" for cost in costs)
        lines.append(f"| {name} | {world} | {cells} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
