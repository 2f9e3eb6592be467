"""python train_gpt2.py configs/quickstart.toml [--flags]

    torchrun --nproc_per_node=8 train_gpt2.py configs/gpt2_124m.toml

Shards -> checkpoints. Config files are read in order, flags win; --help lists every one of them.
Run the same command again to continue a run from its last checkpoint.

    data_dir/*.npy --Windows--> batches --GPT--> loss --AdamW--> run_dir/step_NNNNNN/
                                           run_dir/log.jsonl, one JSON object a line
"""

import contextlib
import functools
import itertools
import math
import sys
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import hellaswag
from model import GPT, GPTConfig
from nanoswitch import cards, checkpoints, cli, curves, micro_batch, scoring, surgery
from nanoswitch.best import Best
from nanoswitch.cards import named_card
from nanoswitch.cli import at_least
from nanoswitch.compiled import compiled
from nanoswitch.counts import flops_per_token, on_meta
from nanoswitch.device import (
    autocast,
    available_memory,
    matrix_rate,
    peak_flops,
    peak_memory,
    pick_dtype,
    to_device,
    tune_cpu,
)
from nanoswitch.files import read_json
from nanoswitch.log import Log, provenance
from nanoswitch.muon import COEFFICIENTS
from nanoswitch.optimizers import OPTIMIZERS, clip_gradients, make_optimizers, step_unless
from nanoswitch.parallel import (
    Ranks,
    average_gradients,
    bytes_held,
    load_state,
    place,
    whole_state,
    whole_weights,
)
from nanoswitch.progress import Meter, clock, due, launched
from nanoswitch.registry import unknown
from nanoswitch.shards import val_text
from nanoswitch.signals import StopSignal
from nanoswitch.tokenizer import bits_per_byte, get_tokenizer, token_bytes
from nanoswitch.tracker import TRACKERS
from nanoswitch.weights import read_safetensors
from nanoswitch.windows import data_sha256, open_windows


@dataclass
class TrainConfig:
    data_dir: str = "data/fineweb-edu"
    """folder of token shards, as fineweb.py makes them"""
    run_dir: str = "runs/gpt2"
    """folder of this run: its log and checkpoints"""
    init_from: str = ""
    """start from these weights: a checkpoint, folder or hub name. Switches that are given change
    them where that can be done, all others stay the checkpoint's"""
    init_heads: Literal["mean", "first", "random"] = "mean"
    """how init_from makes fewer key and value heads: their mean, the first of each group, or new"""
    init_layers: Literal["even", "first", "last"] = "even"
    """which layers stay where init_from has more: evenly spaced ones, the first or the last"""
    seed: int = 1337
    """seed of the initial weights, the data order, dropout and samples"""
    device: str = "auto"
    """auto takes cuda, else mps, else cpu; with dry_run also a card that is not here: cuda:4090,
    cuda:5090, cuda:a100, cuda:h100, cuda:h200, cuda:3090, cuda:t4"""
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
    optimizer: "Literal[tuple(OPTIMIZERS)]" = "adamw"
    """muon, normuon and soap update the matrices inside the blocks, AdamW all else"""
    muon_lr: float = 0.0
    """Muon's peak learning rate; 0 = lr, for its updates are scaled to the size of AdamW's"""
    muon_coefficients: "Literal[tuple(COEFFICIENTS)]" = "jordan"
    """of the steps that make Muon's updates orthogonal: Jordan's, or Polar Express's"""
    muon_momentum: float = 0.95
    """of the mean of gradients that Muon makes orthogonal: what stays of it at each step"""
    weight_decay: float = 0.1
    """decay of matrices; norms, biases and other vectors never decay"""
    cautious_decay: bool = False
    """weights decay only where the update shrinks them too"""
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
    sample_prompt: str = "Hello, I'm a language model,"
    """what they continue; empty starts a new document"""
    checkpoint_every: int = 1000
    """steps between checkpoints; the last step always has one; 0 = only that"""
    keep_checkpoints: int = 2
    """how many of the newest checkpoints stay, and the best one; 0 = all"""
    patience: int = 0
    """stop after this many validations without a lower loss; 0 = never"""
    print_every: int = 10
    """steps between progress lines; log.jsonl has every step"""
    curve: bool = True
    """draw run_dir/curve.png at each validation, where matplotlib is installed"""
    resume: Literal["auto", "never"] = "auto"
    """auto continues from run_dir's latest checkpoint if there is one"""
    wandb: bool = False
    """send the log to Weights & Biases too; WANDB_MODE=offline keeps it in run_dir/wandb"""
    trackio: bool = False
    """send the log to trackio too, which keeps it on this machine; `trackio show` is its page"""
    overfit_single_batch: bool = False
    """train on the first batch only: the loss must fall towards 0"""
    dry_run: bool = False
    """print sizes, memory, steps and expected time, then exit"""

    def __post_init__(self):
        at_least(self, 1, "total_batch_tokens val_tokens print_every")
        at_least(self, 0, "micro_batch max_steps warmup_steps eval_every hellaswag_every")
        at_least(self, 0, "hellaswag_limit sample_every checkpoint_every keep_checkpoints patience")
        at_least(self, 0, "weight_decay grad_clip seed muon_lr")
        choices = {"optimizer": OPTIMIZERS, "muon_coefficients": COEFFICIENTS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        for name in ("min_lr_frac", "cooldown_frac", "beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        if not self.lr > 0:
            raise ValueError(f"lr is {self.lr}; it must be above 0")
        if not self.run_dir:
            raise ValueError("run_dir is empty; name a folder, such as --run_dir runs/mine")


# ----------------------------------------------------------------------------- set-up


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


def count_steps(config, train):
    """The updates of a run on Windows: max_steps, or one epoch of them. ValueError where they are
    fewer than a batch."""
    epoch = train.count * train.T / config.total_batch_tokens  # the last one may wrap around
    steps = config.max_steps or (round(epoch) if epoch >= 1 else 0)
    if not steps:
        raise ValueError(
            f"{config.data_dir} has {train.tokens:,} train tokens, fewer than one batch of "
            f"{config.total_batch_tokens:,}; lower --total_batch_tokens"
        )
    return steps


# ----------------------------------------------------------------------------- the plan


class Plan:
    """A run before it takes any memory: its place among the ranks, its data, batches and steps, and
    what they cost. ValueError for what cannot be trained."""

    def __init__(self, model_config, config):
        self.config, self.card, self.surgery = config, named_card(config.device), None
        self.origin = {}  # where the weights came from, for the log and every checkpoint
        if self.card and not config.dry_run:
            raise ValueError(f"device {config.device} is a card to plan for: add --dry_run true")
        self.ranks = Ranks("cpu" if self.card else config.device)
        self.device = self.ranks.device
        self.dtype = pick_dtype(config.dtype, self.device)
        if self.card and config.dtype == "auto":
            self.dtype = self.card.dtype
        tune_cpu(self.device)
        if config.init_from:
            begun = checkpoints.newest_config(config.run_dir)
            self.surgery = surgery.of_this_run(model_config, config, begun)
            model_config = self.surgery.new
            self.origin = {"init_from": config.init_from, "surgery": self.surgery.lines}
        self.model_config = c = model_config
        if c.attention_kernel == "flex" and self.device.type != "cuda" and not self.card:
            raise ValueError(
                f"attention_kernel flex trains on CUDA only, not {self.device}; use auto"
            )
        if (c.attention_kernel, self.device.type, self.dtype) == ("flash", "cuda", torch.float32):
            raise ValueError("attention_kernel flash has no float32 on CUDA; use auto")
        if c.attention_kernel == "flash" and self.device.type == "cpu" and c.dropout:
            raise ValueError("attention_kernel flash has no dropout on a CPU; use auto")
        if not config.dry_run:
            self.check_memory(bytes_held(c, config.parallel, self.ranks.world))
        self.train = open_windows(config.data_dir, "train", c)
        self.val = open_windows(config.data_dir, "val", c)
        self.batch_windows = self.count_batch_windows()
        self.max_steps = count_steps(config, self.train)

    def check_memory(self, need):
        """ValueError where a rank needs more bytes than its card or machine has."""
        there = self.card.memory * 2**30 if self.card else available_memory(self.device)
        if there and need > there:
            raise ValueError(
                f"not enough memory: the run needs {need / 2**30:,.1f} GiB, and "
                f"{there / 2**30:,.1f} GiB are there; lower the model's sizes, or share it out: "
                f"torchrun with --parallel fsdp"
            )

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

    @property
    def rank_windows(self):
        """Sequences of a batch on one rank."""
        return self.batch_windows // self.ranks.world

    @functools.cached_property
    def data_sha256(self):
        return data_sha256(self.train, self.val)

    def rate(self, step):
        """The learning rate of update `step`, 0-based."""
        return learning_rate(step, self.config, self.max_steps)

    def autocast(self):
        return autocast(self.device, self.dtype)

    def describe(self, size):
        """What this run is with `size` sequences in a forward pass, in a few lines."""
        c, ranks, T = self.config, self.ranks, self.model_config.block_size
        model, on_cuda = on_meta(self.model_config), self.device.type == "cuda"
        device = torch.cuda.get_device_name() if on_cuda else self.device.type
        device = self.config.device if self.card else device
        known = not on_cuda or peak_flops(self.device)
        unknown = "" if known else "  (no mfu: its peak is not known)"
        steps = self.rank_windows // size
        return [
            *(f"from {self.origin['init_from']}: {x}" for x in self.origin.get("surgery", ())),
            f"parameters {model.num_params():,}  training FLOPs per token "
            f"{flops_per_token(model):,}",
            f"device {device} x {ranks.world}  dtype {str(self.dtype)[6:]}{unknown}",
            f"data {self.train.tokens:,} train tokens, {self.val.tokens:,} val tokens",
            f"tokens per step {c.total_batch_tokens:,} = {size} sequences x {T} x "
            f"{steps} micro-steps x {ranks.world} ranks",
            f"steps {self.max_steps:,} = {self.max_steps * c.total_batch_tokens:,} tokens, "
            f"{self.max_steps * c.total_batch_tokens / self.train.tokens:.2f} epochs",
        ]


def dry_run(plan):
    """Print what a run would be and need, without its model."""
    size = micro_batch.find(plan, functools.partial(micro_batch.fits_by_count, plan))
    need = micro_batch.expected_bytes(plan, size)
    flops = flops_per_token(on_meta(plan.model_config))
    flop_rate = plan.card.flops if plan.card else matrix_rate(plan.device, plan.dtype)
    rate = flop_rate / flops * plan.ranks.world
    seconds = plan.max_steps * plan.config.total_batch_tokens / rate
    if not plan.ranks.first:
        return
    print("\n".join(plan.describe(size)))
    print(f"memory about {need / 2**30:.3g} GiB each")
    for line in cards.table(plan, size) if plan.card else []:
        print(line)
    source = "its data sheet" if plan.card else "large products, measured"
    print(
        f"expected time {clock(seconds)} or more, at a computed {rate:,.0f} tokens/s: the FLOPs at "
        f"{flop_rate / 1e12:.2f} TFLOP/s ({source})"
    )
    plan.check_memory(need)


# ----------------------------------------------------------------------------- the trainer


class Trainer(Plan):
    """Everything a run needs, set up once: model, data, optimizer, place among the ranks."""

    def __init__(self, model_config, config):
        super().__init__(model_config, config)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # fp32 products in TF32
        torch.manual_seed(config.seed)
        init = config.init_from
        model = surgery.begin(init, self.surgery) if init else GPT(self.model_config)
        self.model = place(model, config.parallel, self.ranks, self.dtype).train()
        self.optimizers = make_optimizers(self.model, config, self.ranks, self.dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        fits = functools.partial(micro_batch.fits_by_trying, self)
        self.forward = self.model
        self.micro_batch = micro_batch.find(self, fits)
        # self.model stays as it is for checkpoints, HellaSwag and samples, whose shapes vary
        self.forward = compiled(self)
        if self.forward is not self.model:
            self.micro_batch = micro_batch.confirm(self, fits)
        self.forward = average_gradients(self.forward, config.parallel, self.ranks)
        self.changing = False  # whether an update is past its gradients
        self.changes = {}  # what a resumed run does otherwise than before

    @property
    def micro_steps(self):
        """Forward passes of an update on one rank."""
        return self.rank_windows // self.micro_batch

    # ------------------------------------------------------------------------- one step

    def load(self, windows, numbers):
        return [to_device(x, self.device) for x in windows.read(numbers)]

    def update(self, step, stop=0):
        """Update number `step` (0-based) -> (3,): mean loss over all ranks, gradient norm, and the
        sum of `stop` over the ranks, on the device, which may still be at work on them.

        If the loss or the norm is not finite, weights and optimizer state stay as they are."""
        config, ranks, self.changing = self.config, self.ranks, False
        for group in itertools.chain(*(o.param_groups for o in self.optimizers)):
            group["lr"] = self.rate(step) * group["lr_scale"]
        # dropout too is a function of seed and step, so that a resumed run draws the same
        torch.manual_seed(hash((config.seed, step, ranks.rank)) % 2**63)
        number = 0 if config.overfit_single_batch else step
        numbers = self.train.batch(number, self.batch_windows, config.seed)
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

        self.changing = True
        loss, stop = ranks.total(mean, stop)
        loss = loss / ranks.world
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = clip_gradients(self.model, config.grad_clip)
        step_unless(~torch.isfinite(loss + norm), self.optimizers)
        self.scaler.update()
        self.model.zero_grad()
        return torch.stack((loss, norm.to(loss), stop))

    def step(self, step, stop=0):
        """update(), with a smaller micro-batch where memory runs out."""
        return micro_batch.retried(self, functools.partial(self.update, step, stop))

    # ------------------------------------------------------------------------- evaluation

    @contextlib.contextmanager
    def evaluation(self):
        """Inside, ranks may run forward passes of their own number; all ranks must enter."""
        self.model.eval()
        with torch.no_grad(), self.autocast(), whole_weights(self.model):
            yield
        self.model.train()

    @property
    def val_windows(self):
        T = self.model_config.block_size
        return np.arange(max(1, min(self.config.val_tokens // T, self.val.count)))

    def validate(self):
        """Mean loss over the first val_tokens validation tokens, the same for any layout."""
        T, size, ranks = self.model_config.block_size, self.micro_batch, self.ranks
        own = self.val_windows[ranks.rank :: ranks.world]
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

    @functools.cached_property
    def val_bytes(self):
        """Bytes of text that validation's targets stand for; 0 where no vocabulary says."""
        try:
            lengths = token_bytes(self.val.vocab)
        except (ValueError, ModuleNotFoundError):  # training itself needs none
            return 0
        pieces = np.array_split(self.val_windows, 1 + len(self.val_windows) // 1024)
        return sum(int(lengths[self.val.read(piece)[1].numpy()].sum()) for piece in pieces)

    def bits_per_byte(self, loss):
        """validate()'s loss -> {"val_bpb": in bits per byte}, {} where that is not known."""
        if not self.val_bytes:
            return {}
        tokens = len(self.val_windows) * self.model_config.block_size
        return {"val_bpb": bits_per_byte(loss, tokens, self.val_bytes)}

    def hellaswag(self, examples):
        """HellaSwag by the completion protocol -> scoring.evaluate's figures and items."""
        with self.evaluation():
            ranks, vocab, tokens = self.ranks, self.train.vocab, 0
            if self.device.type == "cuda":  # what fits a training step fits here
                tokens = min(32768, self.micro_batch * self.model_config.block_size)
            return scoring.evaluate(self.model, examples, tokens, ranks.rank, ranks.world, vocab)

    def sample(self, tokens=32, rows=2):
        """A few continuations of the prompt, each up to its end of text -> list of texts."""
        tokenizer = get_tokenizer(self.train.vocab)
        ids, eot = tokenizer.encode_ordinary(self.config.sample_prompt), tokenizer.eot_token
        idx = torch.tensor([ids or [eot]] * rows, device=self.device)
        new = min(tokens, max(0, self.model_config.block_size - idx.size(1)))
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        with self.evaluation():
            out = self.model.generate(idx, new, top_k=50, generator=generator)
        added = [[*row, eot] for row in out[:, idx.size(1) :].tolist()]
        return [tokenizer.decode(ids + row[: row.index(eot)]) for row in added]

    # ------------------------------------------------------------------------- checkpoints

    def save(self, step, run, log=None):
        """All ranks gather; the first writes run_dir/step_NNNNNN, after the log up to it. OSError
        when that fails, and nothing is lost."""
        weights, moments = whole_state(self.model, self.optimizers, self.ranks)
        if not self.ranks.first:
            return
        if log:
            log.sync()
        config = {
            "model": asdict(self.model_config), "train": asdict(self.config), "step": step,
            "tokens": step * self.config.total_batch_tokens, "data_tokens": self.train.tokens,
            "data_sha256": self.data_sha256, **self.origin,
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
            "optimizer": self.config.optimizer, "val_tokens": self.config.val_tokens,
            "overfit_single_batch": self.config.overfit_single_batch,
            **({"init_from": self.config.init_from} if self.config.init_from else {}),
        })  # fmt: skip
        self.origin = {key: saved[key] for key in ("init_from", "surgery") if key in saved}
        changed = checkpoints.changed(saved["train"], asdict(self.config))
        self.changes = {"changed": changed} if changed else {}
        weights = read_safetensors(folder / "model.safetensors")
        state = checkpoints.read_state(folder / "train_state.pt")
        load_state(self.model, self.optimizers, weights, state["optimizer"], folder)
        if state["scaler"]:  # empty from a run that was not in fp16
            self.scaler.load_state_dict(state["scaler"])
        return step


# ----------------------------------------------------------------------------- main


def train(trainer):
    """The whole run, or what is left of it."""
    config, ranks, last = trainer.config, trainer.ranks, trainer.max_steps
    run = Path(config.run_dir)
    with checkpoints.sole_user(run, ranks.first):
        start = trainer.resume(run)
        if not ranks.agree(int(trainer.data_sha256[:8], 16), last):
            raise ValueError(f"not all ranks have the same tokens in data_dir {config.data_dir}")
        log = Log(run, start, ranks.first, [n for n in TRACKERS if getattr(config, n)])
        best = Best(run, log, ranks)
        for line in trainer.describe(trainer.micro_batch):
            log.say(line)
        if trainer.changes:
            log.say(f"from step {start} on: {', '.join(trainer.changes['changed'])}")
        log.write(
            event="resume" if start else "start", step=start,
            config=asdict(trainer.model_config) | asdict(config),
            parameters=trainer.model.num_params(), steps=last, data_sha256=trainer.data_sha256,
            val_text_sha256=val_text(config.data_dir, config.val_tokens, trainer.val.T),
            **trainer.origin, **trainer.changes, **provenance(), seed=config.seed,
            device=str(trainer.device), dtype=str(trainer.dtype)[6:], world=ranks.world,
        )  # fmt: skip
        examples = load_examples(config, ranks, trainer.train.vocab)
        kinds = ("val_loss", "hellaswag_acc", "samples")
        known = ranks.sum(*[kind in log.evaluated for kind in kinds])  # to the first rank alone
        known = [kind for kind, there in zip(kinds, known, strict=True) if there]
        loss = evaluate(trainer, examples, log, start, known)
        best.falls(start, loss)
        best.name(start, loss)
        if start >= last:
            log.say(f"{run} is finished at step {start}; more steps: --max_steps N")
        elif 0 < config.patience <= best.waited:
            log.write(event="early stop", step=start)  # the resume above began another log
            log.say(f"{run} is finished at step {start}: {best}; more steps: --patience 0")
            last = start

        meter = Meter(trainer, log, start)
        with StopSignal(ranks.first) as signal, log:
            for done in range(start + 1, last + 1):
                meter.waiting.append((done, *launched(trainer.step(done - 1, signal.number))))
                told = signal.number and not ranks.distributed
                stop = meter.read(told) or told
                tried = stop or due(config.checkpoint_every, done, last)
                saved = tried and save(trainer, run, log, done, must=stop or done == last)
                if stop:
                    log.say(f"stopped after step {done}; the same command continues {run} there")
                    sys.exit(signal.status())
                # after the checkpoint: a kill in here costs no step
                loss = evaluate(trainer, examples, log, done)
                if best.falls(done, loss) and config.patience and not tried:
                    saved = save(trainer, run, log, done, must=False)
                best.name(done, loss)
                if 0 < config.patience <= best.waited and done < last:
                    if not saved:
                        save(trainer, run, log, done, must=True)
                    log.write(event="early stop", step=done)
                    log.say(f"stopped after step {done}: {best}")
                    break
                meter.skip_pause()
        if best.named and best.waited:
            log.say(
                f"the lowest validation loss, {best.kept:.4f}, is step {best.named}'s: {run}/best"
            )
        log.say(f"next: python sample.py {run} --prompt 'Once upon a time'")
        log.say(f"      python hellaswag.py {run}")
        log.say("      streamlit run app.py    # the page, at http://localhost:8501")


def load_examples(config, ranks, vocab):
    if not config.hellaswag_every:
        return []
    load = functools.partial(
        hellaswag.load_items, config.hellaswag_data, config.hellaswag_limit
    )  # the same items for every seed
    return hellaswag.tokenize_items(ranks.first_alone(load), "completion", vocab)


def evaluate(trainer, examples, log, done, known=()):
    """What is due after `done` updates and not `known` yet: validation, HellaSwag, samples -> the
    validation loss, or None where none was due."""
    config, last, loss = trainer.config, trainer.max_steps, None

    def wanted(every, kind):
        return due(every, done, last) and kind not in known

    if wanted(config.eval_every, "val_loss"):
        loss = trainer.validate()
        bpb = trainer.bits_per_byte(loss) if trainer.ranks.first else {}
        peak = peak_memory(trainer.device)
        log.write(step=done, val_loss=loss, **bpb, peak_memory_bytes=peak)
        also = "".join(f", {value:.4f} bits per byte" for value in bpb.values())
        log.say(f"{done:>5}/{last} validation loss {loss:.4f}{also}")
    if examples and done and wanted(config.hellaswag_every, "hellaswag_acc"):
        score, items = trainer.hellaswag(examples)
        log.save_items(done, items)
        log.write(step=done, **{f"hellaswag_{k}": v for k, v in score.items()})
        log.say(
            f"{done:>5}/{last} HellaSwag acc_norm {score['acc_norm']:.4f} "
            f"± {score['se']:.4f}, {score['bpb']:.4f} bits per byte (n {score['n']:,})"
        )
    if config.sample_every and wanted(config.sample_every, "samples"):
        samples = trainer.sample()
        log.write(step=done, samples=samples)
        for text in samples:
            text = f"sample > {' '.join(text.split())}"
            log.say(textwrap.fill(text, 80, subsequent_indent=" " * 9))
    if config.curve and trainer.ranks.first and due(config.eval_every, done, last):
        log.attempt("curve.png", curves.draw_run, log.run)
    return loss


def save(trainer, run, log, done, must):
    """Save a checkpoint -> whether that went well; one that fails stops the run only if it must be
    there."""
    try:
        trainer.save(done, run, log)
        log.track(step=done, checkpoint=f"step_{done:06d}")
        return True
    except OSError as error:
        if must:
            raise
        log.say(f"warning: {error}; training goes on until the next checkpoint")
        log.write(event="save failed", step=done, error=str(error))
        return False


def read_flags(argv=None, more=(), description=__doc__):
    """A command line (the process's own without argv) -> [GPTConfig, TrainConfig, one of each class
    in `more`]. Beside --init_from the first is surgery.Wishes: what the flags leave open, the
    checkpoint says."""
    given = cli.given(argv, configs=True)
    kind = surgery.Wishes if given.get("init_from") else GPTConfig
    read = cli.parse(kind, TrainConfig, *more, argv=argv, configs=True, description=description)
    read[0].given = given
    return read


def main():
    model_config, config = read_flags()
    if config.dry_run:
        plan = Plan(model_config, config)
        with plan.ranks:
            return dry_run(plan)
    trainer = Trainer(model_config, config)
    try:
        with trainer.ranks:
            train(trainer)
    except torch.OutOfMemoryError:
        micro_batch.start_smaller(trainer)


if __name__ == "__main__":
    cli.run(main)
