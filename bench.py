"""python bench.py train --peer ../build-nanogpt --out train.json

Speed beside a peer: WORK is one of

    train       a training step                   beside build-nanogpt or nanoGPT
    hellaswag   scoring items                     beside build-nanogpt
    fineweb     text -> shards                    beside build-nanogpt
    generate    256 new tokens, batch 1           beside nanoGPT
    scaling     a training step from 1k to 16k tokens of context, windowed beside full attention
    card        all of the first 25 minutes on a CUDA card, right results first: --peers DIR is the
                folder of both checkouts, --data DIR one of shards, --out DIR takes the results

--peer is a checkout of the peer's repository; without one, ours runs alone. Ours and the peer's own
code run in a process each, so that neither feels what the other does to torch or to the memory,
and take turns, round by round. Before they are timed they must agree on the result: the same loss,
the same predictions, the same token ids. Figures are medians over the rounds.
"""

import ast
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.multiprocessing as mp
from tyro.conf import Positional

import hellaswag
import train_gpt2
from model import GPT, GPTConfig
from nanoswitch import cli, first_card, scoring
from nanoswitch.counts import flops_per_token, on_meta
from nanoswitch.decode import decoder
from nanoswitch.device import (
    autocast,
    matrix_rate,
    peak_memory,
    pick_device,
    pick_dtype,
    to_device,
    tune_cpu,
)
from nanoswitch.files import prepare_out, sha256, write_beside
from nanoswitch.log import provenance
from nanoswitch.pydocs import write_pydocs
from nanoswitch.shards import load_shards, open_shard
from nanoswitch.tokenizer import (
    EOT,
    GPT2_URL,
    get_gigatoken,
    get_tokenizer,
    gpt2_vocabulary,
)
from nanoswitch.windows import Windows

PEERS = {"build-nanogpt": "hellaswag.py", "nanoGPT": "configurator.py"}  # a file only it has


@dataclass
class BenchConfig:
    work: Positional[Literal["train", "hellaswag", "fineweb", "generate", "scaling", "card"]]
    """what to time; see above"""
    peer: str = ""
    """folder of a checkout of build-nanogpt or nanoGPT; empty times ours alone"""
    rounds: int = 5
    """timed rounds of each side, after one that warms up"""
    out: str = ""
    """JSON file for the figures; card: a folder, which a second call goes on with"""
    device: str = "auto"
    """auto takes cuda, else mps, else cpu"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of both sides' matrix products; auto takes what is fast on the device"""
    compile: Literal["auto", "true", "false"] = "auto"
    """torch.compile for ours, and for nanoGPT, which does by default; auto: on CUDA only"""
    n_layer: int = 12
    """blocks of the GPT-2 that is timed; 12 is the 124M one"""
    n_embd: int = 768
    """its width, in heads of 64"""
    block_size: int = 1024
    """its context: the tokens of a training sequence"""
    micro_batch: int = 0
    """train: sequences in a forward pass, the same for both; 0 = 64 on CUDA, else 4"""
    micro_steps: int = 0
    """train: forward passes in a step; 0 = as many as make build-nanogpt's 2^19 tokens on CUDA,
    else 1"""
    items: int = 40
    """hellaswag: items in a round, a random sample"""
    data: str = ""
    """hellaswag: the validation file; empty = fetch the official one. fineweb: a folder of parquet
    files; empty = the documentation inside the Python environment. card: a folder of shards and, if
    it is there, hellaswag*.jsonl; empty = shards of that documentation"""
    new_tokens: int = 256
    """generate: tokens after a prompt of 16"""
    workers: int = 2
    """fineweb: processes or threads of both sides"""
    shard_tokens: int = 10_000_000
    """fineweb: tokens in a shard of both sides"""
    longest: int = 16384
    """scaling: the longest context"""
    peers: str = ""
    """card: the folder that holds build-nanogpt and nanoGPT; empty times ours alone"""
    parts: str = ""
    """card: names of parts to run again, with commas between; empty = all that have no result"""
    minutes: float = first_card.MINUTES
    """card: minutes for all parts together; the next call goes on with what is left"""
    small: bool = False
    """card: tiny sizes, to see on any machine that all parts run"""

    def __post_init__(self):
        cli.at_least(self, 1, "rounds n_layer n_embd block_size items new_tokens workers")
        cli.at_least(self, 1, "shard_tokens")
        cli.at_least(self, 1024, "longest")
        cli.at_least(self, 0, "micro_batch micro_steps minutes")
        if self.n_embd % 64:
            raise ValueError(f"n_embd is {self.n_embd}; heads are 64 wide, so try a multiple of 64")

    @property
    def gpt(self):
        """The model's sizes, under the names that both peers use too."""
        heads = self.n_embd // 64
        return {
            "n_layer": self.n_layer, "n_head": heads, "n_embd": self.n_embd,
            "block_size": self.block_size,
        }  # fmt: skip


# ----------------------------------------------------------------------------- two sides
# A side is a generator: it first yields what both sides must agree on, then does one round of the
# work for every next() and yields how many units that was.


class Side:
    """A generator run in a process of its own, started by the first call."""

    def __init__(self, side, config):
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, side, config), daemon=True)
        self.process.start()
        theirs.close()
        self.result, self.start_up = self.ask()
        self.rates = []

    def ask(self, question=None):
        if question is not None:
            self.pipe.send(question)
        try:
            kind, *answer = self.pipe.recv()
        except EOFError:
            raise ValueError("a side's process died; it may have run out of memory") from None
        if kind == "error":
            raise ValueError(f"{answer[0]}\n{answer[1]}" if "--debug" in sys.argv else answer[0])
        return answer

    def round(self):
        units, seconds = self.ask("round")
        self.start_up += 0 if self.rates else seconds  # the first may compile
        self.rates.append(units / seconds)

    def close(self):
        """-> peak memory in bytes: of the card, or of the process beyond its libraries."""
        (peak,) = self.ask("close")
        self.process.join()
        return peak


def serve(pipe, side, config):
    try:
        device = pick_device(config.device)
        begin, before = time.perf_counter(), peak_memory(device)
        work = side(config)
        result = next(work)
        seconds = time.perf_counter() - begin
        make_room(device)
        pipe.send(("ready", result, seconds))
        made_room = False  # the first round is a warm-up, and part of the start-up
        while pipe.recv() == "round":
            if made_room and device.type == "cuda":
                finish(work, device)  # takes the card's memory again
            begin = time.perf_counter()
            units = finish(work, device)
            seconds = time.perf_counter() - begin
            make_room(device)
            made_room = True
            pipe.send(("done", units, seconds))
        pipe.send(("closed", peak_memory(device) - before))
    except EOFError:  # the other side failed, and with it the parent
        pass
    except Exception as error:
        name = getattr(side, "func", side).__name__
        pipe.send(("error", f"{name}: {error}", traceback.format_exc()))


def finish(work, device):
    """A round of a side, to the end of what the card has to do for it -> its units."""
    units = next(work)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return units


def make_room(device):
    """Give back what torch keeps of a card's memory: the other side may need it for its turn."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def duel(config, metric, ours, peer=None, agree=lambda a, b: None, memory=False, once=False):
    """Time the two sides in turns -> result rows. agree(result of ours, of the peer) raises a
    ValueError unless both did the same work. once: a round of the peer takes minutes, and after the
    one that makes the result to agree on, one is enough."""
    sides = [Side(side, config) for side in (ours, peer) if side]
    if peer:
        agree(sides[0].result, sides[1].result)
    for i in range(config.rounds + 1):
        for side in sides if i == 0 or not once else sides[:1]:
            side.round()
        shown = "  ".join(f"{side.rates[-1]:,.1f}" for side in sides)
        print(f"round {i or 'of warm-up'}: {shown} {metric}", flush=True)
    rows = [
        row(config, metric, *(statistics.median(side.rates[1:] or side.rates) for side in sides))
    ]
    peaks = [side.close() for side in sides]
    if memory:
        rows.append(row(config, "peak memory, GiB", *(peak / 2**30 for peak in peaks)))
        start_ups = [side.start_up for side in sides]
        rows.append(row(config, "start-up to the end of the first step, s", *start_ups))
    return rows


def row(config, metric, ours, peer=None):
    """One figure, in the form of --out."""
    device = pick_device(config.device)
    cores = f"{os.cpu_count()} cores, {cpu_name()}"
    versions = provenance()["versions"]
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cores
    return {
        "work": config.work, "metric": metric, "ours": ours, "peer": peer,
        "ratio": ours / peer if peer else None, "rounds": config.rounds, "machine": machine,
        "versions": versions | {"peer": peer_name(config) if peer else None},
        "settings": dataclasses.asdict(config),
    }  # fmt: skip


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# ----------------------------------------------------------------------------- the peers' code


def peer_name(config):
    for name, mark in PEERS.items():
        if (Path(config.peer) / mark).is_file():
            return name
    raise ValueError(
        f"{config.peer} is no checkout of build-nanogpt or nanoGPT; clone one beside this folder "
        f"and give it as --peer"
    )


def peer_code(path, **names):
    """The imports, classes and functions of a peer's script, as it ships them, as a namespace;
    what it does when run is left out. names are globals that its functions expect."""
    keep = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    try:
        tree = ast.parse(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"cannot read the peer's {path}: {error.strerror}") from None
    tree.body = [node for node in tree.body if isinstance(node, keep)]
    module = types.ModuleType(Path(path).stem)
    sys.modules[f"peer_{module.__name__}"] = module
    module.__dict__.update(names, __name__=f"peer_{module.__name__}")
    here = sys.modules.pop("hellaswag", None)  # build-nanogpt imports its own by this name
    sys.path.insert(0, str(Path(path).parent))
    try:
        with tempfile.TemporaryDirectory() as folder:
            cache_vocabulary(folder)
            exec(compile(tree, str(path), "exec"), module.__dict__)
    finally:
        sys.path.pop(0)
        if here is not None:
            sys.modules["hellaswag"] = here
    return module


def cache_vocabulary(folder):
    """Put GPT-2's vocabulary where the peer's tiktoken looks before it asks the network."""
    for name, source in gpt2_vocabulary().items():
        key = hashlib.sha1((GPT2_URL + name).encode()).hexdigest()
        shutil.copy(source, Path(folder, key))
    os.environ["TIKTOKEN_CACHE_DIR"] = folder


def peer_gpt(config, name):
    """The peer's GPT-2 with the weights that ours draws, and its script's namespace."""
    file = "train_gpt2.py" if name == "build-nanogpt" else "model.py"
    code = peer_code(Path(config.peer) / file, master_process=False)
    model = code.GPT(code.GPTConfig(**config.gpt, vocab_size=50304))
    missing = model.load_state_dict(our_gpt(config).state_dict(), strict=False)
    if missing.unexpected_keys or any(not k.endswith("attn.bias") for k in missing.missing_keys):
        raise ValueError(f"the peer's GPT has other parameters: {missing}")
    return model.to(pick_device(config.device)), code


def our_gpt(config):
    torch.manual_seed(1337)
    return GPT(GPTConfig(**config.gpt))


def close_to(tolerance, what, ours, peer):
    if abs(ours - peer) > tolerance:
        raise ValueError(f"the sides differ in {what}: {ours} and {peer}; nothing was timed")


def same(what, ours, peer):
    if ours != peer:
        raise ValueError(f"the sides differ in {what}; nothing was timed")


# ----------------------------------------------------------------------------- train


def train(config):
    device = pick_device(config.device)
    config.micro_batch = config.micro_batch or (64 if device.type == "cuda" else 4)
    tokens = config.micro_batch * config.block_size
    if not config.micro_steps:
        config.micro_steps = max(1, 2**19 // tokens) if device.type == "cuda" else 1
    with tempfile.TemporaryDirectory() as folder:
        # token ids without meaning: the work does not depend on them
        ids = np.random.default_rng(0).integers(0, EOT, 2 * tokens * config.micro_steps + 1)
        for split, number in (("val", 0), ("train", 1)):
            np.save(f"{folder}/random_{split}_{number:06d}.npy", ids.astype(np.uint16))
        config.data = folder
        peer = peer_trains if config.peer else None
        # autocast rounds differently where the two form their loss; fp32 must agree closely
        tolerance = 1e-4 if pick_dtype(config.dtype, device) == torch.float32 else 2e-2
        agree = functools.partial(close_to, tolerance, "the loss of one batch")
        rows = duel(config, "tokens/s", we_train, peer, agree, memory=True)
        upkeep = time_upkeep(config, rows[0]["ours"])
    flops = flops_per_token(on_meta(GPTConfig(**config.gpt)))
    rate = matrix_rate(device, pick_dtype(config.dtype, device))
    shares = [flops * speed / rate for speed in (rows[0]["ours"], rows[0]["peer"]) if speed]
    rows.append(row(config, f"share of {rate / 1e12:.2f} TFLOP/s, the matrix rate", *shares))
    return rows + upkeep


def our_trainer(config):
    tokens = config.micro_batch * config.block_size
    return train_gpt2.Trainer(
        GPTConfig(**config.gpt),
        train_gpt2.TrainConfig(
            data_dir=config.data, device=config.device, dtype=config.dtype, compile=config.compile,
            micro_batch=config.micro_batch, total_batch_tokens=tokens * config.micro_steps,
            val_tokens=tokens, max_steps=10**6,
        ),
    )  # fmt: skip


def we_train(config):
    trainer = our_trainer(config)
    x, y = trainer.load(trainer.train, np.arange(config.micro_batch))
    with torch.no_grad(), trainer.autocast():
        yield trainer.model(x, y)[1].item()
    for step in itertools.count():
        trainer.step(step)
        yield trainer.config.total_batch_tokens


def time_upkeep(config, rate):
    """What else a run at `rate` tokens/s spends its time on -> result rows: reading batches, and
    validation at train_gpt2.py's default intervals."""
    config = dataclasses.replace(config, compile="false")
    trainer, default = our_trainer(config), train_gpt2.TrainConfig()
    size, loading, validating = trainer.config.total_batch_tokens, [], []
    for step in range(config.rounds):
        begin = time.perf_counter()
        trainer.load(trainer.train, trainer.train.batch(step, trainer.batch_windows, seed=0))
        loading.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        trainer.validate()
        validating.append((time.perf_counter() - begin) / trainer.config.val_tokens)
    validation = statistics.median(validating) * default.val_tokens
    between = default.eval_every * default.total_batch_tokens / rate
    return [
        row(config, "reading a batch, share of a step", statistics.median(loading) * rate / size),
        row(config, "validation, share of a run", validation / (validation + between)),
    ]


def peer_trains(config):
    """The peer's model and optimizer in its training loop's own order."""
    name, device = peer_name(config), pick_device(config.device)
    torch.set_float32_matmul_precision("high")
    model, _ = peer_gpt(config, name)
    decay, rate, betas = 0.1, 6e-4, (0.9, 0.95)
    if name == "build-nanogpt":
        optimizer = model.configure_optimizers(decay, rate, device.type)
    else:
        optimizer = model.configure_optimizers(decay, rate, betas, device.type)
        if config.compile == "true" or (config.compile == "auto" and device.type == "cuda"):
            model = torch.compile(model)
    windows = Windows(load_shards(config.data, "train"), config.block_size)

    def batch(i):
        first = (i * config.micro_batch) % (windows.count - config.micro_batch + 1)
        x, y = windows.read(np.arange(first, first + config.micro_batch))
        return [to_device(part, device) for part in (x, y)]

    half = autocast(device, pick_dtype(config.dtype, device))
    with torch.no_grad(), half:
        yield model(*batch(0))[1].item()
    while True:
        optimizer.zero_grad()
        for i in range(config.micro_steps):
            x, y = batch(i)
            with half:
                _, loss = model(x, y)
            (loss / config.micro_steps).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        yield config.micro_steps * x.numel()


# ----------------------------------------------------------------------------- hellaswag


PEER_ITEMS = 1000  # it scores an item at a time, and all 10,042 take it minutes
ROUNDING = 1e-4  # nats per token: more than fp32 makes of the order of a sum


def score(config):
    hellaswag.load_items(config.data, config.items)  # a bad file is named before anything starts
    peer = peer_scores if config.peer else None
    once = config.items > PEER_ITEMS
    return duel(config, "items/s", we_score, peer, same_choices, once=once)


def same_choices(ours, peer):
    """ValueError unless the peer's choices, (n,), are those of the lowest losses of ours, (n, 4):
    random weights make near ties, which rounding decides."""
    for losses, choice in zip(ours, peer, strict=True):
        if not losses[choice] - min(losses) <= ROUNDING:
            raise ValueError("the sides differ in the predictions of acc_norm; nothing was timed")


def both_score(items):
    """Those of the items that the peer scores too: all, or PEER_ITEMS from all over the file."""
    return items[:: math.ceil(len(items) / PEER_ITEMS)]


def we_score(config):
    device = pick_device(config.device)
    tune_cpu(device)
    model = our_gpt(config).to(device).eval()
    items = hellaswag.load_items(config.data, config.items)

    def losses():  # in fp32: bf16 makes more ties
        examples = hellaswag.tokenize_items(both_score(items), "completion")
        return scoring.ending_losses(model, examples)[:, 1].tolist()

    def run():
        examples = hellaswag.tokenize_items(items, "completion")
        with autocast(device, pick_dtype(config.dtype, device)):
            return len(scoring.predict(model, examples))

    return once_then(losses, run)


def peer_scores(config):
    """build-nanogpt's evaluation in its training loop: its own functions, an item at a time."""
    model, code = peer_gpt(config, "build-nanogpt")
    render = peer_code(Path(config.peer) / "hellaswag.py", enc=get_tokenizer()).render_example
    device = pick_device(config.device)
    items = both_score(hellaswag.load_items(config.data, config.items))

    def predictions(dtype=torch.float32):
        found = []
        for item in items:
            _, tokens, mask, _ = render(item)
            tokens, mask = tokens.to(device), mask.to(device)
            with torch.no_grad(), autocast(device, dtype):
                logits, _ = model(tokens)
                found.append(code.get_most_likely_row(tokens, mask, logits))
        return found

    return once_then(predictions, lambda: len(predictions(pick_dtype(config.dtype, device))))


# ----------------------------------------------------------------------------- fineweb


STUB = """
import glob, os
import pyarrow.parquet as pq
os.cpu_count = lambda: 2 * {workers}  # build-nanogpt starts a process on half the cores

def load_dataset(*args, **kwargs):
    for path in sorted(glob.glob({data!r} + "/*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(512, columns=["text"]):
            for text in batch.column(0).to_pylist():
                yield {{"text": text}}
"""


def tokenize(config):
    """Whole commands, from parquet files to shards on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        if not config.data:
            config.data = pydocs_parquet(folder)
        if not list(Path(config.data).glob("*.parquet")):
            raise ValueError(f"no parquet file in {config.data}; leave --data out to use pydocs")
        peer = peer_tokenizes if config.peer else None
        kind = "gigatoken" if get_gigatoken() else "tiktoken"
        agree = functools.partial(same, "a shard's bytes")
        return duel(config, f"Mtok/s with {kind}", we_tokenize, peer, agree)


def pydocs_parquet(folder):
    """The offline corpus as a parquet file, which is all that the peer's stand-in reads."""
    import pyarrow.json
    import pyarrow.parquet

    table = pyarrow.json.read_json(write_pydocs(folder))
    pyarrow.parquet.write_table(table, f"{folder}/pydocs.parquet", row_group_size=1000)
    return folder


def we_tokenize(config):
    with tempfile.TemporaryDirectory() as folder:
        yield from tokenize_by(
            [Path(__file__).with_name("fineweb.py"),
             f"--source={os.path.abspath(config.data)}", "--out=shards",
             f"--workers={config.workers}", f"--shard_tokens={config.shard_tokens}",
             f"--val_tokens={config.shard_tokens}"],
            folder, "shards",
        )  # fmt: skip


def peer_tokenizes(config):
    """build-nanogpt's fineweb.py as it stands, but for its source, its place and shard size."""
    path = Path(config.peer) / "fineweb.py"
    code = path.read_text()
    if code.count("int(1e8)") != 1:
        raise ValueError(f"{path} does not set its shard size to int(1e8)")
    with tempfile.TemporaryDirectory() as folder:
        stub = STUB.format(workers=config.workers, data=os.path.abspath(config.data))
        Path(folder, "datasets.py").write_text(stub)
        Path(folder, "fineweb.py").write_text(code.replace("int(1e8)", str(config.shard_tokens)))
        cache_vocabulary(folder)
        yield from tokenize_by(["fineweb.py"], folder, "edu_fineweb10B")


def tokenize_by(command, folder, out):
    """A side: its shards' hashes, then millions of tokens a round."""

    def run():
        shutil.rmtree(Path(folder, out), ignore_errors=True)
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            raise ValueError(done.stderr.strip().splitlines()[-1])
        return sorted(Path(folder, out).glob("*.npy"))

    def hashes():
        return [(path.name, sha256(path)) for path in run()]

    def millions():
        return sum(len(open_shard(str(path))) for path in run()) / 1e6

    return once_then(hashes, millions)


# ----------------------------------------------------------------------------- generate


def generate(config):
    agree = functools.partial(same, "the likeliest tokens")
    return duel(config, "tokens/s", we_generate, peer_generates if config.peer else None, agree)


def prompt(config):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(EOT, (1, 16), generator=generator).to(pick_device(config.device))


def we_generate(config):
    """As sample.py does it."""
    device = pick_device(config.device)
    model, idx, n = our_gpt(config).to(device).eval(), prompt(config), config.new_tokens
    dtype = pick_dtype(config.dtype, device)
    fast = decoder(model, dtype, 1) if config.dtype == "auto" else None

    def likeliest():
        return model.generate(idx, 32, temperature=0)[0].tolist()

    def run():
        with autocast(device, dtype):
            return model.generate(idx, n, top_k=50, decoder=fast).size(1) - idx.size(1)

    return once_then(likeliest, run)


def peer_generates(config):
    """nanoGPT's generate, under the autocast that its sample.py uses."""
    device = pick_device(config.device)
    (model, _), idx, n = peer_gpt(config, "nanoGPT"), prompt(config), config.new_tokens
    model.eval()

    def likeliest():
        # its GELU is the exact one, GPT-2's and ours the tanh form: for this check, as GPT-2
        exact = [block.mlp.gelu for block in model.transformer.h]
        for block in model.transformer.h:
            block.mlp.gelu = torch.nn.GELU(approximate="tanh")
        found = model.generate(idx, 32, top_k=1)[0].tolist()
        for block, gelu in zip(model.transformer.h, exact, strict=True):
            block.mlp.gelu = gelu
        return found

    def run():
        with torch.no_grad(), autocast(device, pick_dtype(config.dtype, device)):
            return model.generate(idx, n, top_k=50).size(1) - idx.size(1)

    return once_then(likeliest, run)


def once_then(check, run):
    """A side: the result to agree on, then a round's units again and again."""
    yield check()
    while True:
        yield run()


# ----------------------------------------------------------------------------- scaling


def scaling(config):
    """The blocks' forward and backward pass over one sequence of T tokens: ours is windowed, the
    "peer" is our own full attention."""
    rows = []
    cases = [(T, 512) for T in (1024, 2048, 4096, 8192, 16384)]
    cases += [(1024, window) for window in (64, 256, 768, 960)]
    for T, window in [case for case in cases if case[0] <= config.longest]:
        metric = f"tokens/s of the blocks, T={T}, window {window} beside full"
        windowed = dataclasses.replace(config, block_size=T)
        sides = [functools.partial(pass_over_blocks, window=w) for w in (window, 0)]
        rows += duel(windowed, metric, *sides)
        write(config, rows)  # what comes later may run out of memory
    return rows


def pass_over_blocks(config, window):
    device = pick_device(config.device)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(**config.gpt, window=window)).to(device)
    tune_cpu(device)
    idx = torch.randint(EOT, (1, config.block_size), device=device)

    def run():
        with autocast(device, pick_dtype(config.dtype, device)):
            x = model.features(idx)
        x.float().square().mean().backward()
        model.zero_grad()
        return config.block_size

    return once_then(run, run)


# ----------------------------------------------------------------------------- main

WORKS = {
    "train": train, "hellaswag": score, "fineweb": tokenize, "generate": generate,
    "scaling": scaling,
}  # fmt: skip


def table(rows):
    cells = [["work", "metric", "ours", "peer", "ratio"]]
    for r in rows:
        numbers = [first_card.number(r[key]) or "-" for key in ("ours", "peer", "ratio")]
        cells.append([r["work"], r["metric"], *numbers])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    known = [f"{name} {version}" for name, version in rows[0]["versions"].items() if version]
    return "\n".join([*lines, f"{rows[0]['machine']}; {', '.join(known)}; medians of "
                      f"{rows[0]['rounds']} rounds"])  # fmt: skip


def main():
    config = cli.parse(BenchConfig)
    pick_device(config.device)
    if config.work == "card":
        return print("\n".join(first_card.card(config)))
    if config.peer:
        peer_name(config)
    if config.out:
        prepare_out(config.out, f"{config.work}.json")
    rows = WORKS[config.work](config)
    print(table(rows))
    write(config, rows)


def write(config, rows):
    if config.out:
        with write_beside(config.out) as file:
            file.write(json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    cli.run(main)
