"""python -m nanoswitch.prove NAME [NAME ...] [--quick true] [--out experiments/variants]

Proves what a file variants/NAME.py must hold, without a line written for it, and prints a card: who
reads whom, cache, precisions, compiler, counts, checkpoints, ranks, cards, and what it costs.
Every check compares with something else than the variant: gradients, a pass without a cache, fp32,
eager code, torch's own counter of operations.
"""

import contextlib
import copy
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from tyro.conf import Positional

from model import GPT, POSITIONS, GPTConfig
from nanoswitch import cli, counts, hf
from nanoswitch.cache import KVCache
from nanoswitch.device import autocast
from nanoswitch.files import python_path, write_beside
from nanoswitch.load import load_model
from nanoswitch.log import provenance
from nanoswitch.registry import flags_of, place_in_variant, unknown, variants
from nanoswitch.weights import grown
from train_gpt2 import TrainConfig, Trainer, train

ROOT = Path(__file__).parent.parent
FAKE_CARDS = ROOT / "tests" / "without_a_card"
SIZES = dict(block_size=24, vocab_size=61, vocab_used=53, n_layer=3, n_head=4, n_embd=32)
END = 52  # the end-of-text id of this vocabulary
# what a variant is tried with, beside every encoding alone
BESIDE = [
    dict(n_kv_head=2, pos="rope", qk_norm=True),
    dict(window=3, pos="rope"),
    dict(window=5, window_pattern="SL", pos="alibi", n_kv_head=1),
    dict(document_mask=True, pos="rope"),
    dict(document_mask=True, window=5, window_pattern="LS", pos="alibi"),
    dict(norm="rmsnorm", mlp="swiglu", bias=False, pos="rope", rope_scaling=2.0),
]


def choices(name):
    """The flags that bring a variant in, {flag: NAME}: of a file for several each alone, then all
    together."""
    each = [{flag: name} for flag in flags_of(name)]
    if not each:
        raise ValueError(f"variants/{name}.py is for no switch; end it with: attention = YourClass")
    together = {flag: name for choice in each for flag in choice}
    return each if len(each) == 1 else [*each, together]


def configs(choice, refused):
    """The tiny configs that a variant is tried in; `refused` takes the reasons of those that it
    refuses."""
    places = [dict(pos=pos) for pos in POSITIONS] + BESIDE
    made = []
    for changes in places:
        if "pos" in choice:
            changes = {k: v for k, v in changes.items() if k != "pos"}
        if changes not in [seen for seen, _ in made]:
            with noted(refused):
                made.append((changes, GPTConfig(**SIZES | changes | choice)))
    return [config for _, config in made]


@contextlib.contextmanager
def noted(refused):
    try:
        yield
    except ValueError as error:
        refused[str(error)] = None


def tokens(B, T, seed=1):
    return torch.randint(END, (B, T), generator=torch.Generator().manual_seed(seed))


def close(got, want, what, tolerance=1e-3):
    """AssertionError that says how far apart two tensors are, beside the larger's spread."""
    off = (got.float() - want.float()).abs().max().item()
    size = want.float().abs().max().item()
    assert off <= tolerance * max(size, 1), (
        f"{what}: off by {off:.2g} where values reach {size:.2g}"
    )


def influences(model, idx, at):
    """(B, T): how strongly the logits of each row's position at move with the token at s."""
    embedded = []
    hook = model.transformer.wte.register_forward_hook(lambda *a: embedded.append(a[-1]))
    logits, _ = model(idx)
    hook.remove()
    weights = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(3))
    own = logits[torch.arange(len(idx)), at] @ weights  # a plain sum can cancel
    (grad,) = torch.autograd.grad(own.sum(), embedded)
    return grad.abs().sum(-1)


# ----------------------------------------------------------------------------- the checks


def causal(choice, made):
    """No gradient from a position to a later token, and one to its own; batch rows apart."""
    T = 12
    for config in made:
        idx = tokens(1, T).expand(T, T)
        seen = influences(grown(config), idx, torch.arange(T))
        early = (seen.triu(1) > 0).nonzero().tolist()
        assert not early, f"position {early[0][0]} reads position {early[0][1]}, its future"
        assert (seen.diagonal() > 0).all(), "a token does not reach its own logits"
    return f"{len(made)} configs"


def documents(choice, made):
    """With document_mask, no gradient from one document to another."""
    made, ends = [config for config in made if config.document_mask], (7, 15)
    for config in made:
        idx = tokens(2, 23)
        for row, end in zip(idx, ends, strict=True):
            row[end] = END  # the first token of the next document
        seen = influences(grown(config), idx, 22)
        for row, end in zip(seen, ends, strict=True):
            assert (row[:end] == 0).all(), f"a token reads across the end of a document, at {end}"
    return f"{len(made)} configs" if made else "refuses document_mask"


def windows(choice, made):
    """How far a query reads in one layer with a window of 3: the window, and what it adds."""
    T, W = 16, 3
    if not any(config.window for config in made):
        return "refuses windows"
    changes = {} if "pos" in choice else {"pos": "rope"}
    config = GPTConfig(**SIZES | dict(n_layer=1, window=W) | changes | choice)
    seen = influences(grown(config), tokens(1, T).expand(T, T), torch.arange(T))
    reach = max(t - s for t, s in (seen > 0).nonzero().tolist()) + 1
    assert reach < T, f"a window of {W} tokens is not kept to: a layer reads all {T}"
    return f"a window of {W} reads {reach} tokens a layer"


def cached(choice, made):
    """Logits in pieces through a cache, also of picked rows, against one pass without; greedy
    texts too, beyond block_size where positions go on."""
    idx = tokens(2, 23)
    idx[0, 7] = idx[1, 15] = END
    for config in made:
        model = grown(config)
        with torch.no_grad():
            want = model(idx)[0]
            for sizes in ([5, 1, 1, 9, 1, 6], [1] * 23, [3, 4, 4, 4, 8]):
                cache, parts = KVCache(model, 23), []
                for piece in idx.split(sizes, dim=1):
                    parts.append(model.logits(model.features(piece, cache)))
                close(torch.cat(parts, 1), want, f"pieces {sizes} through the cache")
            cache, rows = KVCache(model, 23), torch.tensor([1, 0, 1])
            model.features(idx[:, :9], cache)
            for _ in range(2):  # twice from one cache: a pick changes nothing of it
                got = model.logits(model.features(idx[rows, 9:], cache.pick(rows)))
                close(got, want[rows, 9:], "rows picked from a cache")
        plain = model.generate(idx[:, :5], 12, temperature=0, use_cache=False)
        assert torch.equal(model.generate(idx[:, :5], 12, temperature=0), plain), "greedy texts"
    note = "" if model.caches else "; no cache: the text is read again for every token"
    return f"{len(made)} configs{note}"


def kernels(choice, made):
    """The results of every attention kernel against those of torch's own choice."""
    tried, idx = [], tokens(2, 23)
    for kernel in ("math", "flash", "flex"):
        for changes in ({}, dict(window=5, document_mask=True)):
            changes |= {} if "pos" in choice else {"pos": "rope"}
            with contextlib.suppress(ValueError):
                config = GPTConfig(**SIZES | changes | choice | {"attention_kernel": kernel})
                tried.append(kernel)
                model, usual = (
                    grown(c) for c in (config, replace(config, attention_kernel="auto"))
                )
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # flex is slow unless it is compiled
                    close(model(idx)[0], usual(idx)[0], f"attention_kernel {kernel}")
    return ", ".join(dict.fromkeys(tried))


def dtypes(choice, made):
    """Under autocast, and with weights in bf16 as decoding has them, results near fp32's; fp32
    gradients, all finite and none missing."""
    idx = tokens(2, 23)
    for config in made[-5:]:
        model = grown(config)
        want, loss = model(idx)[0], model(idx, idx)[1]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            model.zero_grad()
            with autocast(idx.device, dtype):
                low = model(idx, idx)[1]
            close(low, loss, f"the loss in {dtype}", 0.1)
            low.backward()
            for name, p in model.named_parameters():
                assert p.grad is not None, f"{name} has no gradient: is it used?"
                assert p.grad.isfinite().all(), f"{name} has a gradient that is not finite"
        with torch.no_grad(), autocast(idx.device, torch.bfloat16):
            cache = KVCache(model, 23)
            rough = [model.logits(model.features(p, cache)) for p in idx.split([9, 1, 13], 1)]
        low = copy.deepcopy(model).bfloat16()
        with torch.no_grad():
            cache = KVCache(low, 23)
            halves = [low.logits(low.features(p, cache)) for p in idx.split([9, 1, 13], 1)]
        for what, parts in (("autocast", rough), ("bf16 weights", halves)):
            off = (torch.cat(parts, 1).float() - want).abs().mean() / want.abs().mean()
            assert off < 0.2, f"{what} with a cache: off by {off:.0%} on average"
    return "fp32, bf16, fp16"


def compiled(choice, made):
    """A training step as one graph with eager's loss."""
    idx, some = tokens(2, 12), made[-3:]
    for config in some:
        torch._dynamo.reset()
        model = grown(config)
        loss = torch.compile(model, fullgraph=True, backend="eager")(idx, idx)[1]
        loss.backward()
        close(loss, model(idx, idx)[1], "the compiled loss", 1e-4)
    return f"{len(some)} configs without a graph break"


def decoding(choice, made):
    """Cached decoding as whole graphs with eager's logits."""
    idx, model = tokens(2, 12), grown(made[0])
    if not model.caches:
        return "no cache"
    torch._dynamo.reset()
    with torch.no_grad():
        features = torch.compile(model.features, fullgraph=True, backend="eager")
        cache = KVCache(model, 12)
        parts = [model.logits(features(p, cache)) for p in idx.split([9, 1, 1, 1], 1)]
        close(torch.cat(parts, 1), model(idx)[0], "compiled decoding")
    return "without a graph break"


def counted(choice, made):
    """Parameters against the real model's numbers, FLOPs against torch's counter of the matrix
    products that really run, cache against the tensors that it really holds."""
    T, flops, tried, refused = 128, 0, [], {}
    for changes in ({}, dict(n_kv_head=2, mlp="swiglu", norm="rmsnorm", bias=False)):
        changes = dict(n_embd=128, block_size=T, attention_kernel="math", dropout=0.0) | changes
        changes |= {} if "pos" in choice else {"pos": "rope"}
        with noted(refused):
            tried.append(GPTConfig(**SIZES | changes | choice))
    assert tried, next(iter(refused))
    for config in tried:
        model = GPT(config).eval()
        real = sum(p.numel() for p in model.parameters())
        assert counts.num_params(config) == real, "parameters differ from the real model's"
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, T, dtype=torch.int64))
        found, claimed = counter.get_total_flops() / 2 / T, matrix_work(config, T)
        apart = claimed - matrix_work(config, T, linear_only=True)
        low, high = found * 0.999, found * 1.001 + apart
        assert low <= claimed <= high, (
            f"the matrix products of a token take {found:,.0f} multiply-adds, and it counts "
            f"{claimed:,.0f}: say uses(T) for weights, products(T) for the rest"
        )
        cache = KVCache(model, T)
        with torch.no_grad():
            model.features(torch.zeros(1, T, dtype=torch.int64), cache)
        held = [t for layer in cache.layers for t in (*layer.tensors, *layer.kept.values())]
        held = sum(t.numel() for t in held) * counts.CACHE_WIDTH // T
        assert counts.kv_bytes_per_token(model) == held, "bytes of the cache"
        flops = flops or found
    return f"{flops:,.0f} multiply-adds a token at the size of this check"


def matrix_work(config, T, linear_only=False):
    """What counts.py says of a config's model without targets, with all vectors left out, which
    torch's counter knows nothing of; linear_only: and all matrices that no nn.Linear holds."""
    model = counts.on_meta(config)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if getattr(child, "training_only", False):
                delattr(module, name)
        for name, p in module.named_parameters(recurse=False):
            if p.dim() < 2 or (linear_only and not isinstance(module, nn.Linear)):
                module.register_parameter(name, nn.Parameter(p.new_empty(0)))
    return counts.multiply_adds(model, T)


def saved(choice, made):
    """A written checkpoint comes back with the same logits; a Hugging Face export holds the model
    exactly or is refused in one line."""
    idx, config, note = tokens(2, 23), made[0], "exported too"
    model = grown(config)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        weights = {name: p.clone() for name, p in model.named_parameters()}
        save_file(weights, f"{folder}/model.safetensors")
        entries = {"model": {k: getattr(config, k) for k in GPTConfig.__dataclass_fields__}}
        Path(folder, "config.json").write_text(json.dumps(entries))
        assert torch.equal(load_model(folder)(idx)[0], model(idx)[0]), "it comes back otherwise"
        try:
            hf.save(model, f"{folder}/export")
            close(load_model(f"{folder}/export")(idx)[0], model(idx)[0], "the export", 1e-5)
        except ValueError as error:
            assert "\n" not in str(error), "the refusal to export has more than one line"
            note = "export refused"
    return note


CHECKS = [causal, documents, windows, cached, kernels, dtypes, counted, saved, compiled, decoding]


# ----------------------------------------------------------------------------- ranks and cards


def rank_flags(folder, run, mode, choice):
    model = dict(block_size=16, n_layer=3, n_head=2, n_embd=16) | choice
    return GPTConfig(**model), TrainConfig(
        data_dir=str(folder), run_dir=str(run), device="cpu", dtype="float32", compile="false",
        parallel=mode, total_batch_tokens=64, max_steps=4, warmup_steps=1, checkpoint_every=2,
        keep_checkpoints=0, eval_every=4, val_tokens=32, sample_every=0, curve=False,
        optimizer="muon", lr=0.01,  # AdamW too, for the rest
    )  # fmt: skip


def train_on_ranks(folder, modes, chosen):
    """What a rank does: a run of four steps under each mode, and from its middle on again."""
    for i, choice in enumerate(chosen):
        for mode in modes:
            run = folder / f"{i}_{mode}"
            made = Trainer(*rank_flags(folder, run, mode, choice))
            train(made)
            again = folder / f"{i}_{mode}_again"
            if made.ranks.first:
                shutil.copytree(run, again)
                (again / "latest").write_text("step_000002\n")
            made.ranks.sum(0)
            train(Trainer(*rank_flags(folder, again, mode, choice)))


def on_ranks(chosen, modes=("ddp", "zero1", "fsdp")):
    """Each choice trained on two CPU ranks under every mode: the second half again from the
    checkpoint gives the same weights, and all modes those of one process without ranks. Returns
    the first error of each choice, or ""."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        ids = np.random.default_rng(0).integers(0, 50257, 800).astype(np.uint16)
        for split in ("train", "val"):
            np.save(folder / f"x_{split}_000000.npy", ids)
        here = ["-m", "nanoswitch.prove", "--ranks", str(folder), json.dumps([modes, chosen])]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        own = {"OMP_NUM_THREADS": "1"}
        out = subprocess.run(
            [sys.executable, *launch, *here], capture_output=True, text=True, cwd=ROOT,
            env=os.environ | own, timeout=600 * len(chosen),
        )  # fmt: skip
        for i, choice in enumerate(chosen):
            with contextlib.redirect_stdout(None):
                train(Trainer(*rank_flags(folder, folder / f"{i}_alone", "ddp", choice)))
            want, error = load_file(folder / f"{i}_alone/step_000004/model.safetensors"), ""
            for mode in modes:
                path = "step_000004/model.safetensors"
                if not (folder / f"{i}_{mode}_again" / path).exists():
                    lines = [line for line in out.stderr.splitlines() if "Error" in line]
                    error = error or f"{mode}: {(lines or [out.stderr[-300:]])[0].strip()}"
                    continue
                got, again = (
                    load_file(folder / run / path) for run in (f"{i}_{mode}", f"{i}_{mode}_again")
                )
                for name, w in want.items():
                    if not torch.equal(got[name], again[name]):
                        error = error or f"{mode}: resumed, {name} ends otherwise"
                    if (got[name] - w).abs().max() > 1e-3:
                        error = error or f"{mode}: {name} ends otherwise than on one process"
            results.append(error)
    return results


def build_shim(folder):
    """Compile what tells torch that there is a card -> its path."""
    libraries, path = Path(torch.__file__).parent, Path(folder) / "shim.so"
    command = [
        "g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{libraries}/include",
        FAKE_CARDS / "shim.cpp", "-o", path, f"-L{libraries}/lib", f"-Wl,-rpath,{libraries}/lib",
        "-lc10", "-ltorch_cpu",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"g++ cannot build {path.name}: {done.stderr[-2000:]}")
    return path


def no_fake_cards():
    """Why no card can be faked here; "" where one can."""
    if not shutil.which("g++"):
        return "no g++ to build the shim of a card"
    if sys.platform != "linux" or torch.backends.cuda.is_built():
        return "a card is faked on Linux with a CPU build of torch only"
    return "" if FAKE_CARDS.is_dir() else "tests/without_a_card is not here"


def on_fake_cards(chosen, part="variants", shim=None):
    """The trainer, generation and scoring with each choice on two kinds of card that are not there:
    {card: the lines that cases.py prints}, both at once."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"LD_PRELOAD": str(shim or build_shim(folder)), "PYTHONPATH": python_path(ROOT)}
        own |= {"OMP_NUM_THREADS": "1"}
        running = {
            card: subprocess.Popen(
                [sys.executable, FAKE_CARDS / "cases.py", card, part, *map(json.dumps, chosen)],
                env=os.environ | own, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True,
            )
            for card in ("ampere", "hopper")
        }  # fmt: skip
        found = {}
        for card, process in running.items():
            out, _ = process.communicate(timeout=1800)
            if process.returncode:
                raise ValueError(f"cases.py {card} {part} ended with {process.returncode}")
            found[card] = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return found


# ----------------------------------------------------------------------------- what it costs


def sequence_bytes(config):
    """What one more sequence adds to the memory of a training step in bf16."""
    few, many = (counts.pass_bytes(config, B, torch.bfloat16) for B in (8, 16))
    return (many - few) // 8


@functools.cache
def cost(**choice):
    """Of GPT-2 124M with rope and a variant: {what: number}."""
    config = GPTConfig(**{"pos": "rope"} | choice)
    model = counts.on_meta(config)
    return {
        "parameters": model.num_params(),
        "training FLOPs a token": counts.flops_per_token(model),
        "cache bytes a token": counts.kv_bytes_per_token(model),
        "bytes of a sequence": sequence_bytes(config),
    }


def costs(choice):
    """{what: [without the variant, with it]}."""
    without, with_it = cost(), cost(**choice)
    return {what: [without[what], with_it[what]] for what in without}


def costs_table(found):
    """costs' dict -> lines of a Markdown table."""
    rows = [f"| {name} | {a:,} | {b:,} | {b / a - 1:+.1%} |" for name, (a, b) in found.items()]
    return ["| GPT-2 124M with rope | without | with it | |", "|---|--:|--:|--:|", *rows]


def speed(choice, rounds=7):
    """Tokens a second of forward and backward passes on this machine, the variant's as a share of
    the baseline's: the median of rounds in which both run, and their range."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = dict(n_layer=4, n_head=4, n_embd=256, block_size=256, vocab_size=1024, vocab_used=1000)
    made = [GPTConfig(**sizes | {"pos": "rope"} | changes) for changes in ({}, choice)]
    models, ratios = [GPT(config).to(device) for config in made], []
    idx = torch.randint(1000, (2, 256), device=device)

    def seconds(model):
        begun = time.perf_counter()
        model(idx, idx)[1].backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    for model in models:
        seconds(model)
    for _ in range(rounds):
        a, b = map(seconds, models)
        ratios.append(a / b)
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    return (
        f"speed beside the baseline here, on {device.type}: {middle:.2f} ({low:.2f} to {high:.2f})"
    )


# ----------------------------------------------------------------------------- the card


@dataclass
class ProveConfig:
    names: Positional[tuple[str, ...]]
    """files of variants/, without .py"""
    quick: bool = False
    """true leaves out ranks, cards and speed"""
    out: str = ""
    """folder that takes each card as NAME.json too: experiments/variants for variants/README.md"""


def attempt(check, *args):
    """-> (whether it holds, what to say)."""
    try:
        return True, check(*args)
    except AssertionError as error:
        return False, str(error)
    except Exception as error:  # a variant may raise anything
        return False, place_in_variant(error) or f"{type(error).__name__}: {error}"


def prove(name, quick=False):
    """Print a variant's card -> {"name", "proofs", "versions"}; a proof for each way to bring it
    in: {"choice", "checks": {what: {"holds", "says"}}, "refuses", "costs", "speed"}."""
    proofs = []
    for choice in choices(name):
        refused, checks = {}, {}
        found = {"choice": choice, "checks": checks, "costs": None, "speed": None}
        proofs.append(found)

        def row(what, held, text, checks=checks):
            text = " ".join(str(text).split())[:300]
            checks[what] = {"holds": held, "says": text}
            print(f"  {what:<11}{'ok' if held else 'FAILED':<9}{text}", flush=True)

        print(" ".join(f"--{flag} {value}" for flag, value in choice.items()))
        made = configs(choice, refused)
        found["refuses"] = list(refused)
        if not made:
            row("configs", False, next(iter(refused)))
            continue
        for check in CHECKS:
            row(check.__name__, *attempt(check, choice, made))
        if not quick:
            (error,) = on_ranks([choice])
            row("ranks", not error, error or "ddp, zero1, fsdp on two; resumed to the bit")
            row("cards", *attempt(cards, choice))
        for reason in refused:
            print(f"  refuses: {reason}")
        counted, costing = attempt(costs, choice)
        print("\n".join(costs_table(costing)) if counted else f"  costs: {costing}")
        found["costs"] = costing if counted else None
        if not quick:
            _, found["speed"] = attempt(speed, choice)
            print(found["speed"])
    return {"name": name, "proofs": proofs, "versions": provenance()["versions"]}


def holds(card):
    """Whether all of a card of prove() holds."""
    return all(one["holds"] for proof in card["proofs"] for one in proof["checks"].values())


def cards(choice):
    if reason := no_fake_cards():
        return f"skipped: {reason}"
    lines = [line for found in on_fake_cards([choice]).values() for line in found]
    wrong = [
        f"{line['work']}: {line['error']} in {line['case']}" for line in lines if line["error"]
    ]
    assert not wrong, wrong[0]
    return f"{len(lines)} cases on ampere and hopper, faked"


def main():
    if sys.argv[1:2] == ["--ranks"]:
        modes, chosen = json.loads(sys.argv[3])
        return train_on_ranks(Path(sys.argv[2]), modes, chosen)
    config = cli.parse(ProveConfig)
    if not config.names:
        raise ValueError(f"name a variant: {', '.join(variants())}")
    for name in config.names:
        if name not in variants():
            raise unknown("variant", name, variants())
    if config.out:
        Path(config.out).mkdir(parents=True, exist_ok=True)
    results = []
    for name in config.names:
        card = prove(name, config.quick)
        results.append(holds(card))
        if config.out:
            with write_beside(f"{config.out}/{name}.json") as file:
                file.write(f"{json.dumps(card, indent=1)}\n".encode())
    if not all(results):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
