"""python train_gpt2.py configs/quickstart.toml [--flags]
torchrun --nproc_per_node=8 train_gpt2.py configs/gpt2_124m.toml

Shards -> checkpoints. Config files are read in order, flags win; --help lists every one of them.
Run the same command again to continue a run from its last checkpoint.

    data_dir/*.npy --Windows--> batches --GPT--> loss --AdamW--> run_dir/step_NNNNNN/
                                           run_dir/log.jsonl, one JSON object a line
"""

import contextlib
import functools
import hashlib
import itertools
import math
import sys
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import checkpoints
import cli
import hellaswag
import parallel
from fineweb import N_VOCAB, check_ids, get_tokenizer, load_shards, match_vocabulary
from model import GPT, GPTConfig, autocast, pick_dtype, read_json, read_safetensors, tune_cpu

PEAK_FLOPS = {  # dense bf16 tensor-core peak, from the makers' data sheets
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "RTX 4090": 165e12,
}  # fmt: skip
SAMPLE_PROMPT = "Hello, I'm a language model,"


@dataclass
class TrainConfig:
    data_dir: str = "data/fineweb-edu"
    """folder of token shards, as fineweb.py makes them"""
    run_dir: str = "runs/gpt2"
    """folder of this run: its log and checkpoints"""
    init_from: str = ""
    """start from these weights and their architecture: a checkpoint, folder or hub name"""
    seed: int = 1337
    """seed of the initial weights, the data order, dropout and samples"""
    device: str = "auto"
    """auto takes cuda, else mps, else cpu"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of the matrix products; the weights stay fp32. auto: bfloat16 where the hardware
    has it, float16 with loss scaling on older CUDA cards, float32 elsewhere"""
    compile: Literal["auto", "true", "false"] = "auto"
    """use torch.compile; auto does on CUDA, where it pays, and not on CPU"""
    total_batch_tokens: int = 524288
    """tokens of one optimizer step, over all micro-batches and ranks"""
    micro_batch: int = 0
    """sequences in one forward pass on one rank; 0 = the largest that fits"""
    max_steps: int = 0
    """optimizer steps; 0 = one epoch of the data"""
    lr: float = 6e-4
    """peak learning rate"""
    min_lr_frac: float = 0.1
    """final learning rate as a fraction of lr"""
    warmup_steps: int = 715
    """steps of linear warm-up"""
    schedule: Literal["cosine", "trapezoid", "constant"] = "cosine"
    """learning rate after the warm-up; trapezoid is constant, then linear down"""
    cooldown_frac: float = 0.2
    """fraction of all steps in the trapezoid's linear cooldown"""
    parallel: Literal["ddp", "zero1", "fsdp"] = "ddp"
    """what torchrun's ranks share out: nothing, the optimizer's state, or the weights too"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon updates the matrices inside the blocks by Muon, all else by AdamW"""
    muon_lr: float = 0.0
    """Muon's peak learning rate; 0 = lr, for its updates are scaled to the size of AdamW's"""
    weight_decay: float = 0.1
    """decay of matrices; norms, biases and other vectors never decay"""
    beta1: float = 0.9
    """AdamW's first moment"""
    beta2: float = 0.95
    """AdamW's second moment"""
    grad_clip: float = 1.0
    """largest gradient norm; 0 = no clipping"""
    eval_every: int = 250
    """steps between validations; 0 = only at the end"""
    val_tokens: int = 10485760
    """validation tokens, always the first ones of the val shard"""
    hellaswag_every: int = 0
    """steps between HellaSwag evaluations; 0 = never"""
    hellaswag_data: str = ""
    """HellaSwag's validation file (json lines, also .gz); empty = fetch the official one"""
    hellaswag_limit: int = 0
    """score a seeded sample of this many items; 0 = all 10,042"""
    sample_every: int = 250
    """steps between samples; 0 = never"""
    checkpoint_every: int = 1000
    """steps between checkpoints; the last step always has one; 0 = only that"""
    keep_checkpoints: int = 2
    """how many of the newest checkpoints stay; 0 = all"""
    print_every: int = 10
    """steps between progress lines; log.jsonl has every step"""
    curve: bool = True
    """draw run_dir/curve.png at each validation, where matplotlib is installed"""
    resume: Literal["auto", "never"] = "auto"
    """auto continues from run_dir's latest checkpoint if there is one"""
    wandb: bool = False
    """send the log to Weights & Biases too; WANDB_MODE=offline keeps it in run_dir/wandb"""
    overfit_single_batch: bool = False
    """train on the first batch only: the loss must fall towards 0"""
    dry_run: bool = False
    """print sizes, memory, steps and expected time, then exit"""

    def __post_init__(self):
        for name in ("total_batch_tokens", "val_tokens", "print_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        for name in (
            "micro_batch", "max_steps", "warmup_steps", "eval_every", "hellaswag_every",
            "hellaswag_limit", "sample_every", "checkpoint_every", "keep_checkpoints",
            "weight_decay", "grad_clip", "seed", "muon_lr",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("min_lr_frac", "cooldown_frac", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        if not self.lr > 0:
            raise ValueError(f"lr is {self.lr}; it must be above 0")
        if not self.run_dir:
            raise ValueError("run_dir is empty; name a folder, such as --run_dir runs/mine")


# ----------------------------------------------------------------------------- set-up


def can_compile(device):
    """Whether torch.compile works here: it needs a C++ compiler on CPU, Triton on CUDA."""
    if device.type == "mps":
        return False
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever the tool chain raises, training works without it
        print(f"torch.compile does not work here ({type(error).__name__}): training without it")
        return False
    return True


def refuse_conflicts(given, loaded, init_from):
    """ValueError where flags ask for another architecture than the loaded checkpoint has."""
    for name, default in asdict(GPTConfig()).items():
        wish, has = getattr(given, name), getattr(loaded, name)
        if wish not in (default, has):
            raise ValueError(
                f"--init_from {init_from} brings {name} {has}, not {wish}: leave --{name} out"
            )


# ----------------------------------------------------------------------------- data


def shuffled(i, n, seed):
    """Where a seeded permutation of range(n) takes the indices i: computed, never stored.

    A Feistel network over the next even power of two, walked until it lands inside (Black and
    Rogaway 2002). i int64 array -> int64 array."""
    half = np.uint64(max(1, math.ceil((n - 1).bit_length() / 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.default_rng(seed).integers(0, 2**63, size=6, dtype=np.uint64)
    out, outside = i.astype(np.uint64), np.ones(len(i), dtype=bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0xFF51AFD7ED558CCD)  # MurmurHash3's finaliser
            mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
            mixed ^= mixed >> np.uint64(33)
            left, right = right, left ^ (mixed & mask)
        out[outside] = (left << half) | right
        outside = out >= n
    return out.astype(np.int64)


class Windows:
    """All windows of T inputs and T targets in the shards, read as one stream.

    Window w covers tokens w T to w T + T, the last of them as a target only."""

    def __init__(self, shards, T, vocab=N_VOCAB):
        self.shards, self.T, self.vocab = shards, T, vocab
        self.starts = np.cumsum([0] + [len(s) for s in shards])  # of each shard in the stream
        self.tokens = int(self.starts[-1])
        self.count = (self.tokens - 1) // T

    def read(self, numbers):
        """Window numbers (n,) -> inputs and targets, (n, T) int64 each."""
        rows = np.empty((len(numbers), self.T + 1), dtype=np.int64)
        for row, number in zip(rows, numbers, strict=True):
            begin, end, filled = int(number) * self.T, int(number) * self.T + self.T + 1, 0
            s = int(np.searchsorted(self.starts, begin, side="right")) - 1
            while filled < len(row):  # a window may run on into the next shards
                piece = self.shards[s][max(0, begin - self.starts[s]) : end - self.starts[s]]
                if len(piece) and piece.max() >= self.vocab:
                    check_ids(piece.filename, self.shards[s], self.vocab)  # says where
                row[filled : filled + len(piece)] = piece
                filled, s = filled + len(piece), s + 1
        rows = torch.from_numpy(rows)
        return rows[:, :-1], rows[:, 1:]

    def batch(self, step, size, seed):
        """The window numbers of training step `step`, (size,): a pure function of seed and step.
        Every epoch passes over all windows in an order of its own."""
        sample = np.arange(step * size, (step + 1) * size)
        epoch = sample // self.count
        numbers = np.empty_like(sample)
        for e in np.unique(epoch):
            numbers[epoch == e] = shuffled(
                sample[epoch == e] % self.count, self.count, (seed, int(e))
            )
        return numbers

    def some(self):
        """The bytes of 64 windows all over the stream, however it is cut into shards."""
        numbers = np.unique(np.linspace(0, self.count - 1, 64).astype(np.int64))
        return self.read(numbers)[0].numpy().tobytes()


def open_windows(config, split, model_config):
    shards, T = load_shards(config.data_dir, split), model_config.block_size
    windows = Windows(shards, T, match_vocabulary(config.data_dir, model_config))
    if windows.count < 1:
        raise ValueError(
            f"{config.data_dir} has {windows.tokens:,} {split} tokens, fewer than one window of "
            f"block_size {T} + 1; give it more text or lower --block_size"
        )
    return windows


# ----------------------------------------------------------------------------- schedule


def learning_rate(step, config, max_steps):
    """The rate of update `step`, 0-based."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "trapezoid":
        cooldown = max(1, round(config.cooldown_frac * max_steps))
        height = min(1.0, (max_steps - step) / cooldown)
    else:
        progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
        height = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_frac + (1 - config.min_lr_frac) * height)


# ----------------------------------------------------------------------------- the trainer


class Trainer:
    """Everything a run needs, set up once: model, data, optimizer, place among the ranks."""

    def __init__(self, model_config, config):
        self.config, self.ranks = config, parallel.Ranks(config.device)
        self.device = self.ranks.device
        self.dtype = pick_dtype(config.dtype, self.device)
        tune_cpu(self.device)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # fp32 products in TF32
        torch.manual_seed(config.seed)
        self.model = (
            GPT.from_checkpoint(config.init_from) if config.init_from else GPT(model_config)
        )
        self.model = parallel.place(self.model, config.parallel, self.ranks, self.dtype).train()
        self.model_config = self.model.config
        if config.init_from:
            refuse_conflicts(model_config, self.model_config, config.init_from)

        c = self.model_config
        if c.attention_kernel == "flex" and self.device.type != "cuda":
            raise ValueError(
                f"attention_kernel flex trains on CUDA only, not {self.device}; use auto"
            )
        if (c.attention_kernel, self.device.type, self.dtype) == ("flash", "cuda", torch.float32):
            raise ValueError("attention_kernel flash has no float32 on CUDA; use auto")
        self.train = open_windows(config, "train", c)
        self.val = open_windows(config, "val", c)
        self.batch_windows = self.count_batch_windows()
        epoch = self.train.count / self.batch_windows  # in steps; the last one may wrap around
        self.max_steps = config.max_steps or (round(epoch) if epoch >= 1 else 0)
        if not self.max_steps:
            raise ValueError(
                f"{config.data_dir} has {self.train.tokens:,} train tokens, fewer than one batch "
                f"of {config.total_batch_tokens:,}; lower --total_batch_tokens"
            )
        self.optimizers = parallel.make_optimizers(self.model, config, self.ranks, self.dtype)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.dtype == torch.float16 and self.device.type != "mps"
        )
        self.micro_batch = self.find_micro_batch()
        self.micro_steps = self.batch_windows // self.ranks.world // self.micro_batch

        # the compiled module shares its weights with self.model, which stays as it is for
        # checkpoints, HellaSwag and samples, whose shapes vary
        wanted = config.compile == "true" or (
            config.compile == "auto" and self.device.type == "cuda"
        )
        compiled = wanted and not config.dry_run and can_compile(self.device)
        forward = torch.compile(self.model) if compiled else self.model
        self.forward = parallel.average_gradients(forward, config.parallel, self.ranks)

    def count_batch_windows(self):
        T, world = self.model_config.block_size, self.ranks.world
        windows, left = divmod(self.config.total_batch_tokens, T)
        if left or windows % world:
            unit = T * world
            near = max(unit, round(self.config.total_batch_tokens / unit) * unit)
            raise ValueError(
                f"total_batch_tokens {self.config.total_batch_tokens} is not a multiple of "
                f"block_size {T} x {world} ranks; try --total_batch_tokens {near}"
            )
        return windows

    def autocast(self):
        return autocast(self.device, self.dtype)

    def find_micro_batch(self):
        """Sequences a forward pass on this rank: the flag, or the largest divisor that fits."""
        per_rank = self.batch_windows // self.ranks.world
        if self.config.micro_batch:
            if per_rank % self.config.micro_batch:
                fits = max(d for d in divisors(per_rank) if d <= self.config.micro_batch)
                raise ValueError(
                    f"micro_batch {self.config.micro_batch} does not divide the {per_rank} "
                    f"sequences of a rank's batch; try --micro_batch {fits}"
                )
            return self.config.micro_batch
        # far beyond what fills a card; a CPU has no thousands of cores to fill
        tokens = 2**18 if self.device.type == "cuda" else 8192
        most = max(1, tokens // self.model_config.block_size)
        ran_out = int(self.ranks.sum(self.memory_limit() if self.ranks.first else 0)[0])
        if ran_out and self.ranks.first:
            print(f"micro_batch at most {ran_out}, for memory ran out: {self.memory_limit_file}")
        most = min(most, ran_out or most)
        sizes = [d for d in reversed(divisors(per_rank)) if d <= most]
        if self.device.type != "cuda":
            return sizes[0]
        for size in sizes:
            if self.ranks.sum(self.fits_cuda(size))[0] == self.ranks.world:
                return size
        raise ValueError("not even micro_batch 1 fits the card; lower --block_size or the model")

    def memory_limit(self):
        """The largest micro_batch since a start in this run_dir ran out of memory, else 0."""
        with contextlib.suppress(OSError, ValueError):
            return int(self.memory_limit_file.read_text())
        return 0

    @property
    def memory_limit_file(self):
        return Path(self.config.run_dir) / "micro_batch"

    def expected_bytes(self, size):
        """Of a rank with `size` sequences in its forward pass, by formula."""
        c = self.model_config
        # a block keeps about 16 n_embd numbers a token for the backward pass
        width = 4 if self.dtype == torch.float32 else 2.5  # norms and residuals stay fp32
        kept = 16 * c.n_embd * c.n_layer * width * size * c.block_size
        return parallel.bytes_held(c, self.config.parallel, self.ranks.world) + kept

    def fits_cuda(self, size):
        total = torch.cuda.get_device_properties(self.device).total_memory
        if self.config.parallel == "fsdp" and self.ranks.world > 1:
            # no trying: where one rank ran out of memory, the others would wait for it
            return size == 1 or self.expected_bytes(size) < 0.8 * total
        try:
            left = self.memory_left(size)
        except torch.OutOfMemoryError:
            left = 0
        self.model.zero_grad()
        torch.cuda.empty_cache()
        return left > 0.05 * total  # room for fragments and for the compiler's choices

    def memory_left(self, size):
        """Bytes of the card still free at the peak of a forward and backward pass over `size`
        sequences, with AdamW's two moments beside it."""
        torch.cuda.reset_peak_memory_stats()
        moments = torch.empty(2, self.model.num_params(), device=self.device)  # noqa: F841
        x, y = self.load(self.train, np.arange(size) % self.train.count)
        with self.autocast():
            _, loss = self.model(x, y)
        loss.backward()
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.max_memory_allocated()

    # ------------------------------------------------------------------------- one step

    def load(self, windows, numbers):
        return [to_device(x, self.device) for x in windows.read(numbers)]

    def step(self, step, stop=0):
        """Update number `step` (0-based) -> (3,): mean loss over all ranks, gradient norm, and the
        sum of `stop` over the ranks, on the device, which may still be at work on them.

        If the loss or the norm is not finite, weights and optimizer state stay as they are."""
        rate = learning_rate(step, self.config, self.max_steps)
        for group in itertools.chain(*(o.param_groups for o in self.optimizers)):
            group["lr"] = rate * group["lr_scale"]
        loss, stop = self.ranks.total(self.gradients(step), stop)
        loss = loss / self.ranks.world
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = parallel.clip_gradients(self.model, self.config.grad_clip)
        parallel.step_unless(~torch.isfinite(loss + norm), self.optimizers)
        self.scaler.update()
        self.model.zero_grad()
        return torch.stack((loss, norm.to(loss), stop))

    def launch(self, step, stop):
        """step(), and a copy of its numbers on its way to the host -> a function that waits for
        them only, not for what the device was given later -> three floats."""
        on_cuda = self.device.type == "cuda"
        numbers = self.step(step, stop).to("cpu", non_blocking=on_cuda)
        arrived = torch.cuda.current_stream().record_event() if on_cuda else None

        def read():
            if arrived:
                arrived.synchronize()
            return numbers.tolist()

        return read

    def gradients(self, step):
        """Forward and backward passes over this rank's part of batch `step` -> its mean loss, ().

        When one process runs out of memory and may choose micro_batch, again with a smaller one."""
        while True:
            try:
                return self.accumulate(step)
            except torch.OutOfMemoryError:
                if self.ranks.distributed:  # the others, or DDP itself, already wait for a sum
                    raise
                smaller = self.smaller_micro_batch()
            # only here, where no traceback holds on to them any more, can the tensors go
            self.model.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            print(f"out of memory at step {step + 1}: micro_batch {self.micro_batch} -> {smaller}")
            self.micro_steps = self.micro_steps * self.micro_batch // smaller
            self.micro_batch = smaller

    def smaller_micro_batch(self):
        """The micro-batch to go on with after one that did not fit; ValueError if there is none
        or it is not ours to choose."""
        size = self.micro_batch
        if size == 1:
            raise ValueError(
                "out of memory even with micro_batch 1; lower --block_size or the model's size"
            )
        smaller = max(d for d in divisors(self.micro_steps * size) if d <= size // 2)
        if self.config.micro_batch:
            raise ValueError(f"out of memory with micro_batch {size}; try --micro_batch {smaller}")
        return smaller

    def start_smaller(self):
        """End this process, so that the next start in this run_dir takes a smaller micro-batch."""
        size, smaller = self.micro_batch, self.smaller_micro_batch()
        if self.config.dry_run or self.config.resume == "never":
            raise ValueError(f"out of memory with micro_batch {size}; try --micro_batch {smaller}")
        self.memory_limit_file.write_text(f"{smaller}\n")
        raise ValueError(
            f"out of memory with micro_batch {size}: the same command goes on with {smaller}, "
            f"under torchrun --max-restarts=3 by itself"
        )

    def accumulate(self, step):
        # dropout too is a function of seed and step, so that a resumed run draws the same
        config, ranks = self.config, self.ranks
        torch.manual_seed(hash((config.seed, step, ranks.rank)) % 2**63)
        numbers = self.train.batch(
            0 if config.overfit_single_batch else step, self.batch_windows, config.seed
        )
        own = np.split(numbers, ranks.world)[ranks.rank]
        mean = torch.zeros((), device=self.device)
        for i, micro in enumerate(np.split(own, self.micro_steps)):
            x, y = self.load(self.train, micro)
            if ranks.distributed:  # DDP averages gradients once, in the last backward pass
                self.forward.require_backward_grad_sync = i == self.micro_steps - 1
            with self.autocast():
                _, loss = self.forward(x, y)
            mean += loss.detach() / self.micro_steps
            self.scaler.scale(loss / self.micro_steps).backward()
        return mean

    # ------------------------------------------------------------------------- evaluation

    @contextlib.contextmanager
    def evaluation(self):
        """Inside, ranks may run forward passes of their own number; all ranks must enter."""
        self.model.eval()
        with torch.no_grad(), self.autocast(), parallel.whole_weights(self.model):
            yield
        self.model.train()

    def validate(self):
        """Mean loss over the first val_tokens validation tokens, the same for any layout."""
        T, size, ranks = self.model_config.block_size, self.micro_batch, self.ranks
        numbers = np.arange(max(1, min(self.config.val_tokens // T, self.val.count)))
        own = numbers[ranks.rank :: ranks.world]
        total, count = torch.zeros((), dtype=torch.float32, device=self.device), 0
        with self.evaluation():
            for begin in range(0, len(own), size):
                x, y = self.load(self.val, own[begin : begin + size])
                missing = size - len(x)
                if missing:  # one shape only, so that nothing compiles again; -1 has no loss
                    x = torch.cat((x, x.new_zeros(missing, T)))
                    y = torch.cat((y, y.new_full((missing, T), -1)))
                _, loss = self.forward(x, y)
                total += loss * (size - missing) * T
                count += (size - missing) * T
        total, count = ranks.sum(total, count)
        return total / count

    def hellaswag(self, examples):
        """HellaSwag by the completion protocol -> {"n", "acc", "acc_norm", "se"}."""
        with self.evaluation():
            ranks, vocab, tokens = self.ranks, self.train.vocab, 0
            if self.device.type == "cuda":  # what fits a training step fits here
                tokens = min(32768, self.micro_batch * self.model_config.block_size)
            return hellaswag.evaluate(self.model, examples, tokens, ranks.rank, ranks.world, vocab)

    def sample(self, tokens=32, rows=2):
        """A few continuations of a fixed prompt -> list of texts."""
        tokenizer = get_tokenizer(self.train.vocab)
        idx = torch.tensor([tokenizer.encode_ordinary(SAMPLE_PROMPT)] * rows, device=self.device)
        new = min(tokens, max(0, self.model_config.block_size - idx.size(1)))
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        with self.evaluation():
            out = self.model.generate(idx, new, top_k=50, generator=generator)
        return [tokenizer.decode(row) for row in out.tolist()]

    # ------------------------------------------------------------------------- checkpoints

    @functools.cached_property
    def data_sha256(self):
        return hashlib.sha256(self.train.some() + self.val.some()).hexdigest()

    def save(self, step, run, log=None):
        """All ranks gather; the first writes run_dir/step_NNNNNN, after the log up to it. OSError
        when that fails, and nothing is lost."""
        weights, moments = parallel.whole_state(self.model, self.optimizers, self.ranks)
        if not self.ranks.first:
            return
        if log:
            log.sync()
        config = {
            "model": asdict(self.model_config), "train": asdict(self.config), "step": step,
            "tokens": step * self.config.total_batch_tokens, "data_tokens": self.train.tokens,
            "data_sha256": self.data_sha256,
        }  # fmt: skip
        state = {"optimizer": moments, "scaler": self.scaler.state_dict()}
        checkpoints.save(run, step, weights, state, config, self.config.keep_checkpoints)

    def resume(self, run):
        """Load the run folder's newest whole checkpoint, if any -> the number of steps done."""
        begun = (run / "latest").is_file() or (run / "log.jsonl").is_file()
        if begun and self.config.resume == "never":
            raise ValueError(f"{run} already holds a run; choose another --run_dir")
        folder = checkpoints.recover(run) if self.ranks.first else None
        # the first rank's choice is everyone's
        step = int(self.ranks.sum(int(folder.name[5:]) if folder else 0)[0])
        if not step:
            return 0
        folder = run / f"step_{step:06d}"
        if self.ranks.sum(folder.is_dir())[0] != self.ranks.world:
            raise ValueError(
                f"not all ranks find step {step} in {run}; it must be on a shared disk"
            )
        saved = read_json(folder / "config.json")
        checkpoints.check_same(run, saved, asdict(self.model_config) | {
            "seed": self.config.seed, "total_batch_tokens": self.config.total_batch_tokens,
            "data_tokens": self.train.tokens, "data_sha256": self.data_sha256,
            "optimizer": self.config.optimizer,
        })  # fmt: skip
        weights = read_safetensors(folder / "model.safetensors")
        state = checkpoints.read_state(folder / "train_state.pt")
        parallel.load_state(self.model, self.optimizers, weights, state["optimizer"], folder)
        if state["scaler"]:  # empty from a run that was not in fp16
            self.scaler.load_state_dict(state["scaler"])
        return step

    # ------------------------------------------------------------------------- dry run

    def describe(self):
        """What this run is, in a few lines: sizes, cost, memory and the expected time."""
        c, ranks, T = self.config, self.ranks, self.model_config.block_size
        flops, params = self.model.flops_per_token(), self.model.num_params()
        memory = self.expected_bytes(self.micro_batch)
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type
        return [
            f"parameters {params:,}  training FLOPs per token {flops:,}",
            f"device {device} x {ranks.world}  dtype {str(self.dtype)[6:]}  "
            f"memory about {memory / 2**30:.1f} GiB each",
            f"data {self.train.tokens:,} train tokens, {self.val.tokens:,} val tokens",
            f"tokens per step {c.total_batch_tokens:,} = {self.micro_batch} sequences x {T} x "
            f"{self.micro_steps} micro-steps x {ranks.world} ranks",
            f"steps {self.max_steps:,} = {self.max_steps * c.total_batch_tokens:,} tokens, "
            f"{self.max_steps * c.total_batch_tokens / self.train.tokens:.2f} epochs",
        ]

    def measure_rate(self):
        """Tokens/s of forward and backward passes over one micro-batch (one sequence on CPU)."""
        size = self.micro_batch if self.device.type == "cuda" else 1
        x, y = self.load(self.train, np.arange(size))
        for repeat in range(3):  # the first warms up
            if repeat == 1:
                begin = time.perf_counter()
            with self.autocast():
                _, loss = self.model(x, y)
            loss.backward()
            self.model.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        return 2 * x.numel() * self.ranks.world / (time.perf_counter() - begin)


def to_device(x, device):
    """A host tensor on the device, contiguous; CUDA copies it while the host goes on."""
    # a copy from strided memory would go through a temporary that is not pinned, and wait for it
    x = x.contiguous()
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def divisors(n):
    """All of them, rising."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})


# ----------------------------------------------------------------------------- what is logged


def short(number):
    """1234567 -> 1.23M, 65432 -> 65.4k: three digits that fit a progress line."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def clock(seconds):
    """7509 -> 2h05m, 200000 -> 2d07h: the two largest units."""
    sizes, units, seconds = (86400, 3600, 60, 1), "dhms", int(seconds)
    i = next((i for i, size in enumerate(sizes[:2]) if seconds >= size), 2)
    large, rest = divmod(seconds, sizes[i])
    return f"{large}{units[i]}{rest // sizes[i + 1]:02d}{units[i + 1]}"


# ----------------------------------------------------------------------------- main


def due(every, done, last):
    return done == last or (every and done % every == 0)


def train(trainer):
    """The whole run, or what is left of it."""
    config, ranks, last = trainer.config, trainer.ranks, trainer.max_steps
    run = Path(config.run_dir)
    with checkpoints.sole_user(run, ranks.first):
        start = trainer.resume(run)
        if not ranks.agree(int(trainer.data_sha256[:8], 16), last):
            raise ValueError(f"not all ranks have the same tokens in data_dir {config.data_dir}")
        log = checkpoints.Log(run, start, ranks.first, config.wandb)
        for line in trainer.describe():
            log.say(line)
        log.write(
            event="resume" if start else "start", step=start,
            config=asdict(trainer.model_config) | asdict(config),
            parameters=trainer.model.num_params(), steps=last, data_sha256=trainer.data_sha256,
            **checkpoints.provenance(), seed=config.seed,
            device=str(trainer.device), dtype=str(trainer.dtype)[6:], world=ranks.world,
        )  # fmt: skip
        examples = load_examples(config, ranks, trainer.train.vocab)
        kinds = ("val_loss", "hellaswag_acc", "samples")
        known = ranks.sum(*[kind in log.evaluated for kind in kinds])  # to the first rank alone
        known = [kind for kind, there in zip(kinds, known, strict=True) if there]
        evaluate(trainer, examples, log, start, known)
        if start >= last:
            log.say(f"{run} is finished at step {start}; more steps: --max_steps N")

        meter = Meter(trainer, log, start)
        with checkpoints.StopSignal(ranks.first) as signal, log:
            for done in range(start + 1, last + 1):
                meter.waiting.append((done, trainer.launch(done - 1, signal.number)))
                stop = meter.read() or (signal.number and not ranks.distributed)
                if stop or due(config.checkpoint_every, done, last):
                    save(trainer, run, log, done, must=stop or done == last)
                if stop:
                    log.say(f"stopped after step {done}; the same command continues {run} there")
                    sys.exit(signal.status())
                # after the checkpoint: a kill in here costs no step
                evaluate(trainer, examples, log, done)
                meter.skip_pause()
        log.say(f"next: python sample.py {run} --prompt 'Once upon a time'")
        log.say(f"      python hellaswag.py {run}")


def load_examples(config, ranks, vocab):
    if not config.hellaswag_every:
        return []
    load = functools.partial(
        hellaswag.load_items, config.hellaswag_data, config.hellaswag_limit
    )  # the same items for every seed
    return hellaswag.tokenize_items(ranks.first_alone(load), "completion", vocab)


def evaluate(trainer, examples, log, done, known=()):
    """What is due after `done` updates and not `known` yet: validation, HellaSwag, samples."""
    config, last = trainer.config, trainer.max_steps

    def wanted(every, kind):
        return due(every, done, last) and kind not in known

    if wanted(config.eval_every, "val_loss"):
        loss = trainer.validate()
        log.write(step=done, val_loss=loss, peak_memory_bytes=peak_memory(trainer.device))
        log.say(f"{done:>5}/{last} validation loss {loss:.4f}")
    if examples and done and wanted(config.hellaswag_every, "hellaswag_acc"):
        score = trainer.hellaswag(examples)
        log.write(step=done, **{f"hellaswag_{k}": v for k, v in score.items()})
        log.say(
            f"{done:>5}/{last} HellaSwag acc_norm {score['acc_norm']:.4f} "
            f"± {score['se']:.4f} (n {score['n']:,})"
        )
    if config.sample_every and wanted(config.sample_every, "samples"):
        samples = trainer.sample()
        log.write(step=done, samples=samples)
        for text in samples:
            text = f"sample > {' '.join(text.split())}"
            log.say(textwrap.fill(text, 80, subsequent_indent=" " * 9))
    if config.curve and due(config.eval_every, done, last):
        log.draw()


def save(trainer, run, log, done, must):
    """Save a checkpoint; one that fails stops the run only if it must be there."""
    try:
        trainer.save(done, run, log)
        log.track(step=done, checkpoint=f"step_{done:06d}")
    except OSError as error:
        if must:
            raise
        log.say(f"warning: {error}; training goes on until the next checkpoint")
        log.write(event="save failed", step=done, error=str(error))


class Meter:
    """Takes the steps' numbers from the device to the log.

    waiting: steps done or under way, (number, function that reads its numbers). A card is at its
    next step while the host reads those of the one before."""

    def __init__(self, trainer, log, start):
        self.trainer, self.log, self.first = trainer, log, start + 1
        self.waiting, self.begin, self.average = [], time.perf_counter(), None
        self.peak, self.flops = peak_flops(trainer.device), trainer.model.flops_per_token()

    def read(self):
        """Log the steps but the last, and that too on CPU or if something else is due after it ->
        whether any rank was told to stop."""
        config, (done, _), stop = self.trainer.config, self.waiting[-1], False
        intervals = (
            config.eval_every, config.hellaswag_every, config.sample_every, config.checkpoint_every,
        )  # fmt: skip
        now = self.trainer.device.type != "cuda"
        now = now or any(due(every, done, self.trainer.max_steps) for every in intervals)
        while self.waiting and (now or stop or len(self.waiting) > 1):
            stop = self.report(*self.waiting.pop(0)) or stop
        return stop

    def report(self, done, read):
        config, last = self.trainer.config, self.trainer.max_steps
        loss, norm, stop = read()
        seconds = time.perf_counter() - self.begin
        self.begin += seconds
        self.average = 0.9 * (self.average or seconds) + 0.1 * seconds
        rate, speed = learning_rate(done - 1, config, last), config.total_batch_tokens / seconds
        world = self.trainer.ranks.world
        mfu = self.flops * speed / (self.peak * world) if self.peak else None
        note = self.log.step(
            step=done, train_loss=loss, lr=rate, grad_norm=norm,
            tokens=done * config.total_batch_tokens, tok_per_s=speed, mfu=mfu,
        )  # fmt: skip
        if done == self.first or note or due(config.print_every, done, last):
            usage = f"mfu {mfu:.0%}" if mfu else "unknown card"
            note = note or f" {usage} eta {clock(self.average * (last - done))}"  # 80 columns
            power = f"{rate:.1e}".replace("e-0", "e-")
            self.log.say(
                f"{done:>5}/{last} loss {loss:.4f} lr {power} norm {norm:.2f} "
                f"{short(speed)} tok/s{note}"
            )
        self.log.check_skipped(self.trainer.scaler.is_enabled())
        return bool(stop)

    def skip_pause(self):
        """Leave what came after the last step out of the next one's time."""
        if not self.waiting:
            self.begin = time.perf_counter()


def peak_memory(device):
    """The most bytes this process has held so far: on the card, or in all on other devices."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def peak_flops(device):
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in PEAK_FLOPS.items() if card in name), None)


def main():
    model_config, config = cli.parse(GPTConfig, TrainConfig, configs=True, description=__doc__)
    trainer = Trainer(model_config, config)
    try:
        with trainer.ranks:
            if not config.dry_run:
                train(trainer)
                return
            rate = trainer.measure_rate()
            seconds = trainer.max_steps * config.total_batch_tokens / rate
            if trainer.ranks.first:
                print("\n".join(trainer.describe()))
                print(f"expected time {clock(seconds)} at a measured {rate:,.0f} tokens/s")
    except torch.OutOfMemoryError:
        trainer.start_smaller()


if __name__ == "__main__":
    cli.run(main)
