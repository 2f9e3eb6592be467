"""LD_PRELOAD=shim.so python cases.py ampere|hopper most|rest
LD_PRELOAD=shim.so python cases.py ampere|hopper variants|quick '{"attention": "NAME"}' ...

Runs the works below on cases enough to hold all pairs of switches, with FakeTensors on a card that
is not there, and prints a JSON line each: {"work", "case", "error", "kernels", "grouped"}.
test_without_a_card.py and nanoswitch/prove.py start it."""

import importlib.util
import itertools
import json
import os
import random
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from card import flex_attention, inserted, swap
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from model import GPT, MLPS, NORMS, POSITIONS, GPTConfig
from nanoswitch import decode, kernels, parallel
from nanoswitch.decode import decoder
from nanoswitch.scoring import Row, score_rows
from train_gpt2 import TrainConfig, Trainer

ROOT = Path(__file__).parent.parent.parent
T = 256  # of which windows make several chunks
SIZES = dict(block_size=T, n_layer=2, n_head=4, n_embd=64)
# every switch, its first value the default; and what a run chooses beside the model
SWITCHES = {
    "pos": list(POSITIONS),
    "pos_pattern": ["", "{},none"],
    "norm": list(NORMS),
    "embd_norm": [False, True],
    "mlp": list(MLPS),
    "attention": ["full", "linformer"],
    "attention_pattern": ["", "{},full"],
    "residual": ["plain"],
    "window": [0, 16, 20],
    "window_pattern": ["", "SL"],
    "n_kv_head": [0, 2, 1],
    "bias": [True, False],
    "dropout": [0.0, 0.1],
    "tie_embeddings": [True, False],
    "qk_norm": [False, True],
    "logit_softcap": [0.0, 30.0],
    "residual_dtype": ["float32", "autocast"],
    "document_mask": [False, True],
    "attention_kernel": ["auto", "flash", "math", "flex"],
}
RUN = {"dtype": ["bfloat16", "float16"], "optimizer": ["adamw", "muon"]}
# what only the optimizers see, so that it needs no pairs
STEPS = {"muon_coefficients": ["jordan"], "cautious_decay": [False]}
OPTIMIZERS = [
    {"optimizer": "normuon", "cautious_decay": True},
    {"optimizer": "muon", "muon_coefficients": "polar_express"},
    {"optimizer": "soap"},
]


def model_config(case):
    """The GPTConfig of a case; ValueError where its switches do not go together."""
    case = {name: value for name, value in case.items() if name in SWITCHES}
    for name in ("pos", "attention"):
        case[f"{name}_pattern"] = case[f"{name}_pattern"].format(case[name])
    return GPTConfig(**SIZES, linformer_segment=64, linformer_rank=4, **case)


def allowed(case):
    try:
        model_config(case)
    except ValueError:
        return False
    return True


def pairs(case):
    return set(itertools.combinations(case.items(), 2))


def possible_pairs():
    """All pairs of values that some config holds, with nothing else changed but what they need."""
    table, found = SWITCHES | RUN, set()
    first = {name: values[0] for name, values in table.items()}
    for a, b in itertools.combinations(table, 2):
        for x, y in itertools.product(table[a], table[b]):
            wide = {"window": 16} if "window_pattern" in (a, b) else {}
            if allowed(first | wide | {a: x, b: y}):
                found.add(((a, x), (b, y)))
    return found


def all_pairs():
    """Few cases that hold all possible pairs: of many draws around a missing pair, again and again
    the one with the most that are missing."""
    table, draw, missing, cases = SWITCHES | RUN, random.Random(0), possible_pairs(), []
    order = {name: i for i, name in enumerate(table)}
    while missing:
        best, gain = None, -1
        wanted = dict(min(missing, key=str))
        for _ in range(40):
            case = {name: draw.choice(values) for name, values in table.items()} | wanted
            for name in draw.sample(list(table), len(table)):  # back to the default until allowed
                if allowed(case):
                    break
                if name not in wanted:
                    case[name] = table[name][0]
            if not allowed(case):
                case |= {name: values[0] for name, values in table.items()} | wanted
                case |= {"window": case["window"] or 16} if case["window_pattern"] else {}
            case = dict(sorted(case.items(), key=lambda item: order[item[0]]))
            new = len(pairs(case) & missing)
            if new > gain:
                best, gain = case, new
        missing -= pairs(best)
        cases.append(best)
    return cases


# ----------------------------------------------------------------------------- the work


def make_trainer(case, folder, world=1):
    return Trainer(
        model_config(case),
        TrainConfig(
            data_dir=folder, run_dir=f"{folder}/run", device="cuda", compile="false",
            dtype=case["dtype"], optimizer=case["optimizer"], total_batch_tokens=2 * T * world,
            micro_batch=2, val_tokens=T, max_steps=10, parallel=case.get("parallel", "ddp"),
            **{name: case[name] for name in STEPS if name in case},
        ),
    )  # fmt: skip


def train(case, folder, card):
    """A step and a validation, both of them the trainer's own; then what the gradients are."""
    trainer = make_trainer(case, folder)
    numbers = trainer.update(0)
    assert numbers.shape == (3,) and numbers.is_cuda and numbers.dtype == torch.float64
    trainer.validate()
    x, y = trainer.load(trainer.train, np.arange(2))
    with trainer.autocast():
        _, loss = trainer.model(x, y)
    assert loss.dtype == torch.float32 and loss.shape == () and loss.is_cuda
    loss.backward()
    for name, p in trainer.model.named_parameters():
        assert p.is_cuda and p.dtype == p.grad.dtype == torch.float32, name
        assert p.grad.stride() == p.stride(), name
    # on a card Inductor does not compile such a mask within a window
    assert not card.odd_masks, f"masks of widths {card.odd_masks} are padded"


def generate(case, folder, card):
    """The trainer's own samples, then a prompt and single tokens by the fast decoder."""
    trainer = make_trainer(case, folder)
    trainer.sample(tokens=2)
    model, dtype = trainer.model.eval(), getattr(torch, case["dtype"])
    idx = torch.empty(2, 5, dtype=torch.int64, device="cuda")
    options = {"top_p": 0.9} if case["bias"] else {"temperature": 0}
    with trainer.autocast():
        fast = decoder(model, dtype, 2)
        tokens = list(model.stream(idx, 3, decoder=fast, **options))
    assert [(t.shape, t.dtype, t.is_cuda) for t in tokens] == [((2,), torch.int64, True)] * 3


def score(case, folder, card):
    """Rows as HellaSwag's are: contexts of two lengths, endings of several, some shared."""
    contexts = [tuple(range(12)), tuple(range(1, 14))]
    rows = [Row((*context, *range(n)), n) for context in contexts for n in (1, 9)]
    trainer = make_trainer(case, folder)
    with trainer.evaluation():
        losses = score_rows(trainer.model, set(rows), 64)
    assert losses.keys() == set(rows)


def decoder_copy(model):
    """copy.deepcopy, which FakeTensors have none of."""
    with torch.device("meta"):
        new = GPT(model.config)
    return swap(new, lambda p: torch.empty_like(p, device="cuda")).eval()


def record(step, device, generator):
    """decode.record without a graph: the step has to run twice, and give the same shape."""
    first = step()

    def replay():
        again = step()
        assert (again.shape, again.dtype, again.device) == (first.shape, first.dtype, first.device)
        return again

    return replay


def share(case, folder, card):
    """A step, a validation and a sample as the first of 8 ranks; torch only pretends that there are
    others."""
    place = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}
    with mock.patch.dict(os.environ, place), unset_fake_temporarily():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
        mesh = dist.init_device_mesh("cuda", (8,))
    try:
        with (
            mock.patch.dict(os.environ, place),
            mock.patch.object(parallel, "init_device_mesh", lambda *_: mesh),
            # its buckets are C++ that looks for the numbers
            mock.patch.object(parallel, "DistributedDataParallel", lambda module, **_: module),
            torch.device("cuda"),
        ):
            trainer = make_trainer(case, folder, world=8)
            numbers = trainer.update(0)
            assert numbers.shape == (3,) and numbers.is_cuda
            kind = DTensor if case["parallel"] == "fsdp" else torch.nn.Parameter
            assert all(isinstance(p, kind) for p in trainer.model.parameters())
            trainer.validate()
            trainer.sample(tokens=2)
    finally:
        dist.destroy_process_group()


def refuse(case, folder, card):
    """What a card refuses: each of these must fail, and say why."""
    half = dict(dtype=torch.bfloat16, device="cuda", requires_grad=True)
    q, bias = torch.empty(2, 4, T, 64, **half), torch.empty(4, T, T, **half)
    attend = torch.nn.functional.scaled_dot_product_attention
    faults = {
        "not differentiable": lambda: attend(q, q, q, attn_mask=bias).sum().backward(),
        "same device": lambda: q.float() + torch.empty(64),
        "expected scalar type": lambda: q @ q.float(),
    }
    for words, fault in faults.items():
        try:
            fault()
        except Exception as error:
            assert words in str(error), error
        else:
            assert card.name != "hopper" and words == "not differentiable", words


WORKS = {"train": train, "generate": generate, "score": score, "share": share, "refuse": refuse}
RANKS = {"parallel": ["ddp", "zero1", "fsdp"]}


def to(model, what):
    return swap(model, lambda p: p.to(what))


def where(error):
    """The line of the project that failed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename.startswith(str(ROOT)) and "/tests/" not in f.filename]
    own = [f for f in own if "site-packages" not in f.filename] or frames[-1:]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}"


def run(work, case, folder, name):
    """-> the line to print."""
    error, taken, grouped = "", [], []
    try:
        with (
            mock.patch.object(GPT, "to", to),
            mock.patch.object(kernels, "compiled_flex", lambda: flex_attention),
            mock.patch.object(decode, "record", record),
            mock.patch.object(decode.copy, "deepcopy", decoder_copy),
            inserted(name) as card,
        ):
            WORKS[work](case, folder, card)
            taken, grouped = sorted(card.kernels), sorted(card.grouped)
    except Exception as problem:
        reason = " ".join(str(problem).split())[:300]
        error = f"{type(problem).__name__}: {reason} at {where(problem)}"
        if "--debug" in sys.argv:
            traceback.print_exc()
    changed = {k: v for k, v in case.items() if v != (SWITCHES | RUN | RANKS | STEPS)[k][0]}
    found = {"work": work, "case": changed, "error": error}
    return found | {"kernels": taken, "grouped": grouped}


def plan(name, part):
    """[(work, case)] of a card. Part "most" trains each case, and generates from it or scores it,
    on one of the two cards. Part "rest" is what that leaves."""
    hopper, jobs = name == "hopper", []
    for i, case in enumerate(all_pairs()):
        most = {
            "train": hopper == (i % 2 == 0),
            "generate": i % 4 == (0 if hopper else 2),
            "score": i % 4 == (1 if hopper else 3),
        }
        jobs += [(work, case) for work, now in most.items() if now == (part == "most")]
    plain = {name: values[0] for name, values in (SWITCHES | RUN).items()}
    if hopper != (part == "most"):
        changes = [{}, {"pos": "fire", "window": 16, "n_kv_head": 1, "tie_embeddings": False}]
        modes = itertools.product(RANKS["parallel"], RUN["optimizer"], changes)
        jobs += [("share", plain | c | {"parallel": p, "optimizer": o}) for p, o, c in modes]
        jobs += [("share", plain | OPTIMIZERS[0] | {"parallel": p}) for p in RANKS["parallel"]]
        soap = importlib.util.find_spec("pytorch_optimizer")  # a package of its own
        jobs += [("train", plain | o) for o in (OPTIMIZERS if soap else OPTIMIZERS[:-1])]
    shared = plain | {"pos": "rope", "n_kv_head": 2}  # where kernels know shared key heads
    return [("refuse", plain), ("train", shared), ("generate", shared), *jobs]


# what variants are tried with beside the plain config
BESIDE = [
    {"n_kv_head": 2, "pos": "rope", "qk_norm": True, "dtype": "float16"},
    {"window": 20, "window_pattern": "SL", "pos": "alibi", "dropout": 0.1},
    {"document_mask": True, "pos": "rope", "mlp": "swiglu", "norm": "rmsnorm", "bias": False},
    {"attention_kernel": "flex", "window": 16, "pos": "rope"},
    {"attention_kernel": "flash", "tie_embeddings": False, "pos": "rope", "optimizer": "muon"},
    {"attention_kernel": "math", "pos": "fire", "n_kv_head": 1},
]


def plan_variants(card, choices, quick):
    """[(work, case)] for variants, each {flag: name}: plain and with each of BESIDE that it takes.
    quick: the plain one on one card, one of the others on the other."""
    plain, jobs = {name: values[0] for name, values in (SWITCHES | RUN).items()}, []
    for i, choice in enumerate(choices):
        cases = [plain | beside | choice for beside in [{}, *BESIDE]]
        cases = [case for case in cases if allowed(case)]
        if quick:
            cases = cases[:1] if (card == "hopper") == (i % 2 == 0) else cases[1 + i % 2 :][:1]
        jobs += [(work, case) for case in cases for work in ("train", "generate", "score")]
        if card == "ampere" and not quick:
            jobs += [("share", plain | choice | {"parallel": p}) for p in RANKS["parallel"]]
    return jobs


def main(name, part, *choices):
    torch.set_num_threads(1)
    if part in ("variants", "quick"):
        jobs = plan_variants(name, [json.loads(choice) for choice in choices], part == "quick")
    else:
        jobs = plan(name, part)
    with tempfile.TemporaryDirectory() as folder:
        make_data(folder)
        for work, case in jobs:
            print(json.dumps(run(work, case, folder, name)), flush=True)


def make_data(folder):
    ids = np.random.default_rng(0).integers(0, 500, 20 * T + 1)
    for split in ("train", "val"):
        np.save(f"{folder}/x_{split}_000000.npy", ids.astype(np.uint16))


if __name__ == "__main__":
    main(*(argument for argument in sys.argv[1:] if argument != "--debug"))
