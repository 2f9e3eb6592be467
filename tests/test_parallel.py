"""Every mode of parallel.py on 1, 2 and 4 CPU ranks against the run of a single process: the same
losses, scores and samples, and checkpoints that any of them can continue.

Ranks are slow to start, so torchrun starts this file once per number of them: run as a script, it
does a list of jobs, each a whole run of train_gpt2.py's train."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))  # where this file is the script

from tiny_runs import column, configs, log, make_data

import train_gpt2 as t
from model import GPT, GPTConfig
from nanoswitch import micro_batch, optimizers, parallel

MODES, OPTIMIZERS = ("ddp", "zero1", "fsdp"), ("adamw", "muon")
NORMUON = dict(muon_coefficients="polar_express", cautious_decay=True)  # for AdamW's part too
EVERY_FEW = 3
MIDDLE, STEPS = 2 * EVERY_FEW, 3 * EVERY_FEW
FLAGS = dict(
    block_size=32, n_layer=2, n_head=2, n_embd=16, total_batch_tokens=256, micro_batch=2,
    max_steps=STEPS, val_tokens=224, sample_every=STEPS, hellaswag_every=STEPS,
    eval_every=EVERY_FEW, checkpoint_every=EVERY_FEW, keep_checkpoints=0,
    norm="rmsnorm", mlp="swiglu", pos="rope", curve=False,
)  # fmt: skip


# ----------------------------------------------------------------------------- helpers


def write_items(path, n=5):
    """A HellaSwag file whose items no number of ranks shares out evenly."""
    endings = [" on the chair.", " in a sky of glass and iron.", " nine.", " the the the the"]
    with open(path, "w") as file:
        for i in range(n):
            item = dict(
                ind=i, label=i % 4, ctx_a="A man sits", ctx_b="", ctx="A man" + " sits" * i,
                activity_label="Sitting", endings=endings, split="val", split_type="indomain",
                source_id=f"activitynet~{i}",
            )  # fmt: skip
            file.write(json.dumps(item) + "\n")


def do(jobs, folder):
    """Do each job {"name", "flags", "continues": name of a run, "at": step} in this process."""
    for job in jobs:
        run = folder / job["name"]
        ranks = parallel.Ranks(job["flags"].get("device", "cpu"))
        if job.get("continues") and ranks.first:
            shutil.copytree(folder / job["continues"], run)
            (run / "latest").write_text(f"step_{job['at']:06d}\n")
        ranks.sum(0)
        flags = FLAGS | {"hellaswag_data": str(folder / "items.jsonl")} | job["flags"]
        made = t.Trainer(*configs(folder / "data", run, **flags))
        if flags.get("dtype") == "float16":  # the usual scale, 2^16, does not overflow here
            assert made.scaler.is_enabled()
            made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**21)
        t.train(made)


def launch(ranks, jobs, folder):
    """Do the jobs on as many ranks, under torchrun."""
    (folder / f"jobs{ranks}.json").write_text(json.dumps(jobs))
    line = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__]
    line = [sys.executable, *line, str(folder), str(folder / f"jobs{ranks}.json")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]


def job(name, mode, optimizer, continues=None, at=MIDDLE, **flags):
    flags |= NORMUON if optimizer == "normuon" else {}
    return {
        "name": name, "flags": {"parallel": mode, "optimizer": optimizer} | flags,
        "continues": continues, "at": at,
    }  # fmt: skip


def weights(run, step=STEPS):
    return load_file(run / f"step_{step:06d}" / "model.safetensors")


def assert_same_run(run, reference, close=1e-5, world=None):
    for key in ("train_loss", "val_loss"):
        assert column(run, key) == pytest.approx(column(reference, key), abs=close), key
        steps = [line["step"] for line in log(run, key)]
        assert steps == [line["step"] for line in log(reference, key)]
    assert len(column(run, "train_loss")) == STEPS
    # torch sums the squares of 800,000 numbers in fp32
    assert column(run, "grad_norm") == pytest.approx(column(reference, "grad_norm"), rel=1e-3)
    for key in ("lr", "hellaswag_acc", "hellaswag_acc_norm", "hellaswag_n"):
        assert column(run, key) == column(reference, key)
    assert len(column(run, "samples")) == 2  # the last ones hang on the last bits of the weights
    assert column(run, "samples")[0] == column(reference, "samples")[0]
    if world:
        assert log(run, "event")[-1]["world"] == world
    for step in (EVERY_FEW, MIDDLE, STEPS):
        ours, theirs = weights(run, step), weights(reference, step)
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=20 * close, msg=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, and the single process's run with each optimizer, by its name."""
    folder = tmp_path_factory.mktemp("parallel")
    make_data(folder / "data", train=4000, val=400)
    write_items(folder / "items.jsonl")
    do([job(optimizer, "fsdp", optimizer) for optimizer in (*OPTIMIZERS, "normuon")], folder)
    return folder


def check_runs(ranks, combinations, folder):
    """Runs of these modes and optimizers, some continued under another mode, and some of those
    by a single process."""
    jobs = [job(f"{mode}_{optimizer}_{ranks}", mode, optimizer) for mode, optimizer in combinations]
    for origin, mode in (
        ("adamw", "fsdp"), (f"fsdp_adamw_{ranks}", "zero1"), (f"zero1_muon_{ranks}", "fsdp"),
    ):  # fmt: skip
        optimizer = "muon" if "muon" in origin else "adamw"
        jobs.append(job(f"{origin}_then_{mode}_{ranks}", mode, optimizer, continues=origin))
    low = dict(norm="layernorm", max_steps=4, sample_every=0, hellaswag_every=0, checkpoint_every=0)
    low = [job(f"{mode}_low_{ranks}", mode, "adamw", dtype="bfloat16", **low)
           for mode in ("ddp", "fsdp")]  # fmt: skip
    launch(ranks, [*jobs, *low], folder)
    ddp, fsdp = (column(folder / made["name"], "train_loss") for made in low)
    assert fsdp == pytest.approx(ddp, abs=0.01) and len(fsdp) == 4
    for made in jobs:
        assert_same_run(folder / made["name"], folder / made["flags"]["optimizer"], world=ranks)
    for origin in (f"zero1_muon_{ranks}_then_fsdp_{ranks}", f"zero1_adamw_{ranks}"):
        optimizer = "muon" if "muon" in origin else "adamw"
        do([job(f"{origin}_then_single", "ddp", optimizer, origin, at=MIDDLE)], folder)
        assert_same_run(folder / f"{origin}_then_single", folder / optimizer, world=1)


# ----------------------------------------------------------------------------- on ranks

EVERY = list(itertools.product(MODES, OPTIMIZERS))


def test_two_ranks_train_as_one_process_in_every_mode(folder):
    own = [mode for mode in EVERY if mode not in (("ddp", "muon"), ("fsdp", "muon"))]
    own += [("zero1", "normuon"), ("fsdp", "normuon")]
    check_runs(2, own, folder)  # muon under zero1 alone, from where fsdp goes on


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_number_of_ranks_trains_as_one_process_in_every_mode(folder, tmp_path, ranks):
    for name in ("data", "items.jsonl", *OPTIMIZERS):
        (tmp_path / name).symlink_to(folder / name)
    check_runs(ranks, EVERY, tmp_path)


@pytest.mark.slow
def test_a_checkpoint_of_any_mode_and_ranks_continues_under_any_other(folder):
    """The whole cross table: 0 (no torchrun), 1, 2 and 4 ranks, each mode, to the same again."""
    written = {}
    plain = dict(hellaswag_every=0, sample_every=0, max_steps=4, checkpoint_every=2)

    def on_ranks(ranks, jobs):
        launch(ranks, jobs, folder) if ranks else do(jobs, folder)

    for ranks in (0, 1, 2, 4):
        combinations = itertools.product(MODES if ranks else ("ddp",), OPTIMIZERS)
        jobs = [job(f"x_{m}_{o}_{ranks}", m, o, **plain) for m, o in combinations]
        on_ranks(ranks, jobs)
        written |= {j["name"]: j["flags"]["optimizer"] for j in jobs}
    for ranks in (0, 1, 2, 4):
        jobs = [
            job(f"{origin}_to_{mode}_{ranks}", mode, o, origin, at=2, **plain)
            for (origin, o), mode in itertools.product(written.items(), MODES)
        ]
        on_ranks(ranks, jobs)
        for j in jobs:
            run, reference = folder / j["name"], folder / f"x_ddp_{j['flags']['optimizer']}_0"
            assert log(run, "event")[-1]["step"] == 2
            for key in ("train_loss", "val_loss"):
                assert column(run, key) == pytest.approx(column(reference, key), abs=1e-5)
            shutil.rmtree(run)


def precisions(ranks):
    """One batch learnt by heart in every mode and precision, compiled or not."""
    flags = dict(
        max_steps=8, overfit_single_batch=True, lr=3e-3, warmup_steps=0, schedule="constant",
        eval_every=0, hellaswag_every=0, sample_every=0, checkpoint_every=0,
        total_batch_tokens=128, micro_batch=1,
    )  # fmt: skip
    kinds = itertools.product(MODES, OPTIMIZERS, CLOSE, ("false", "true"))
    for mode, optimizer, dtype, compiled in kinds:
        name = f"{dtype}_{compiled}_{mode}_{optimizer}_{ranks}"
        yield job(name, mode, optimizer, dtype=dtype, compile=compiled, **flags)


CLOSE = {"float32": 1e-4, "bfloat16": 0.01, "float16": 0.005}  # of a loss to the one of fp32


@pytest.mark.slow
def test_every_mode_trains_in_every_precision_compiled_or_not(folder):
    """fp16 by loss scaling, from a scale that overflows: the skipped steps leave no trace but the
    scale, so that with constant rate and batch the losses are those of fp32, that much later."""
    alone = [made for made in precisions(0) if made["flags"]["parallel"] == "ddp"]
    do(alone, folder)
    launch(2, list(precisions(2)), folder)
    for made in (*alone, *precisions(2)):
        flags, run = made["flags"], folder / made["name"]
        expected = column(folder / f"float32_false_ddp_{flags['optimizer']}_0", "train_loss")
        assert expected[-1] < expected[0] - 0.3
        losses = column(run, "train_loss")
        skipped = sum("skipped" in line for line in log(run, "train_loss"))
        assert (2 <= skipped <= 4) if flags["dtype"] == "float16" else skipped == 0
        close = pytest.approx(expected[: 8 - skipped], abs=CLOSE[flags["dtype"]])
        assert losses[skipped:] == close, made["name"]
        assert losses[:skipped] == pytest.approx(expected[:1] * skipped, abs=0.01)


# ----------------------------------------------------------------------------- one process


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_whose_steps_were_all_skipped_can_be_continued(folder, tmp_path, optimizer):
    flags = FLAGS | {"optimizer": optimizer, "max_steps": 4, "hellaswag_every": 0}
    made = t.Trainer(*configs(folder / "data", tmp_path, **flags))
    start = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    for p in made.model.parameters():
        p.grad = torch.zeros_like(p)
    real = made.forward
    made.forward = lambda x, y: (None, real(x, y)[1] * float("nan"))
    made.step(0)
    made.save(1, tmp_path)
    again = t.Trainer(*configs(folder / "data", tmp_path, **flags))
    assert again.resume(tmp_path) == 1
    assert all(torch.equal(p, start[name]) for name, p in again.model.named_parameters())
    again.step(1)
    assert not all(torch.equal(p, start[name]) for name, p in again.model.named_parameters())


def test_moments_of_another_shape_are_refused(folder, tmp_path):
    shutil.copytree(folder / "adamw", tmp_path / "run")
    step = tmp_path / "run" / (tmp_path / "run" / "latest").read_text().strip()
    state = torch.load(step / "train_state.pt", weights_only=True)
    state["optimizer"]["transformer.wte.weight"]["exp_avg"] = torch.zeros(3, 5)
    torch.save(state, step / "train_state.pt")
    (step / "SHA256SUMS").unlink()
    made = t.Trainer(*configs(folder / "data", tmp_path / "run", **FLAGS))
    with pytest.raises(ValueError, match=r"wte.weight has exp_avg of shape \(3, 5\)"):
        made.resume(tmp_path / "run")


def test_a_run_in_fp32_is_continued_in_fp16(folder, tmp_path):
    shutil.copytree(folder / "adamw", tmp_path / "run")
    flags = FLAGS | {"dtype": "float16", "max_steps": STEPS + 1}
    made = t.Trainer(*configs(folder / "data", tmp_path / "run", **flags))
    assert made.scaler.is_enabled() and made.resume(tmp_path / "run") == STEPS


def test_a_run_is_continued_by_its_own_optimizer_only(folder, tmp_path):
    shutil.copytree(folder / "muon", tmp_path / "run")
    made = t.Trainer(*configs(folder / "data", tmp_path / "run", **FLAGS, optimizer="adamw"))
    with pytest.raises(ValueError, match="optimizer muon, this one has adamw"):
        made.resume(tmp_path / "run")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_is_the_plain_whole_model_and_state_by_name(folder, optimizer):
    step = folder / optimizer / f"step_{STEPS:06d}"
    model = GPT.from_pretrained(step)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {k: v.shape for k, v in load_file(step / "model.safetensors").items()} == shapes
    moments = torch.load(step / "train_state.pt", weights_only=True)["optimizer"]
    assert moments.keys() == shapes.keys()
    for name, state in moments.items():
        if optimizer == "muon" and name.startswith("transformer.h.") and len(shapes[name]) == 2:
            assert state.keys() == {"momentum_buffer"}
        else:
            assert state.keys() == {"step", "exp_avg", "exp_avg_sq"} and state["step"] == STEPS
        assert all(v.shape in (shapes[name], ()) for v in state.values())


def test_a_state_that_lacks_a_parameter_is_refused(folder, tmp_path):
    made = t.Trainer(*configs(folder / "data", tmp_path, **FLAGS))
    made.step(0)
    weights, moments = parallel.whole_state(made.model, made.optimizers, made.ranks)
    del moments["transformer.ln_f.weight"]
    with pytest.raises(ValueError, match=r"here lacks .* transformer\.ln_f\.weight"):
        parallel.load_state(made.model, made.optimizers, weights, moments, "here")


def test_a_run_folder_that_the_ranks_do_not_share_is_refused(folder, tmp_path, monkeypatch):
    made = t.Trainer(*configs(folder / "data", tmp_path / "run", **FLAGS))
    monkeypatch.setattr(made.ranks, "world", 2)
    monkeypatch.setattr(made.ranks, "sum", lambda own: [own + 20])  # the other rank found step 20
    with pytest.raises(ValueError, match="not all ranks find step 20"):
        t.train(made)


@pytest.mark.parametrize(
    "gigabytes, size", [(1000, 32), (8, 8), pytest.param(1, 1, marks=pytest.mark.slow)]
)
def test_fsdp_on_cuda_takes_what_fits_by_formula(monkeypatch, gigabytes, size):
    """124M on 2 ranks: 1 GB of state each, 0.5 GB gathered, 0.4 GB of activations a sequence."""
    made = t.Trainer.__new__(t.Trainer)
    made.card = None
    made.config, made.model_config = t.TrainConfig(parallel="fsdp", run_dir="nowhere"), GPTConfig()
    made.batch_windows, made.device, made.dtype = 64, torch.device("cuda"), torch.bfloat16
    both = lambda *values: [2 * float(value) for value in values]  # noqa: E731
    made.ranks = SimpleNamespace(world=2, first=True, sum=both)
    card = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    fits = partial(micro_batch.fits_by_trying, made)
    assert micro_batch.find(made, fits) == size


# ----------------------------------------------------------------------------- the formulas


@pytest.fixture
def eight_ranks():
    """Rank 0 of 8 that do not exist: torch's stand-in whose collectives send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    cpu = torch.device("cpu")
    yield SimpleNamespace(rank=0, world=8, first=True, device=cpu, distributed=True)
    torch.distributed.destroy_process_group()


SMALL = GPTConfig(block_size=64, vocab_size=1024, vocab_used=1024, n_layer=3, n_head=4, n_embd=128)


def test_largest_share_is_what_torch_deals_out(eight_ranks):
    config = t.TrainConfig(parallel="zero1")
    [optimizer] = optimizers.make_optimizers(GPT(SMALL), config, eight_ranks)
    mine = sum(p.numel() for p in optimizers.parameters(optimizer.optim))  # the first has the most
    assert parallel.largest_share(SMALL, 8) == mine
    every = parallel.parameter_counts(SMALL)[0]
    assert parallel.bytes_held(SMALL, "zero1", 8) == 8 * every + 8 * mine


def test_fsdp_holds_an_eighth_between_steps(eight_ranks):
    model = parallel.place(GPT(SMALL), "fsdp", eight_ranks, torch.float32)
    mine = sum(p.to_local().numel() for p in model.parameters())
    every, block, outside = parallel.parameter_counts(SMALL)
    assert mine == pytest.approx(every / 8, rel=0.01)
    extra = parallel.bytes_held(SMALL, "fsdp", 8) - 16 * every // 8
    assert every == outside + 3 * block and extra == 8 * outside + 10 * block


def test_bytes_are_those_of_rings():
    N, B, rest = parallel.parameter_counts(SMALL)
    for world in (1, 2, 8, 512):
        share = (world - 1) / world
        sent = {mode: parallel.bytes_sent(SMALL, mode, world, micro_steps=3) for mode in MODES}
        assert sent["ddp"] == pytest.approx(share * 2 * N * 4, abs=1)
        assert sent["zero1"] == pytest.approx(share * 3 * N * 4, abs=1)
        # 3 times: each block's bf16 weights twice, the others in fp32, all gradients in fp32
        once = 2 * 3 * B * 2 + rest * 4 + N * 4
        assert sent["fsdp"] == pytest.approx(3 * share * once, abs=1)


def test_the_documents_table_is_current():
    text = (Path(__file__).parent.parent / "docs" / "scale_out.md").read_text()
    shown = re.search(r"<!-- scaling -->\n(.*)<!-- /scaling -->", text, re.S)[1]
    assert shown.splitlines() == parallel.table(), "python -m nanoswitch.parallel"


# ----------------------------------------------------------------------------- CUDA


@pytest.mark.parametrize("flag", ["auto", "cuda", "cuda:0"])
def test_a_rank_makes_nothing_on_another_ones_card(monkeypatch, flag):
    """A tensor on card 0 before set_device would leave a context there, of half a GB, for every
    rank."""
    current, met = [0], []

    def empty(*size, device):
        device = torch.device(device)
        met.append(current[0] if device.index is None else device.index)
        return SimpleNamespace(device=torch.device("cuda", met[-1]))

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "empty", empty)
    answers = {
        "is_available": lambda: True,
        "set_device": lambda device: current.__setitem__(0, torch.device(device).index),
        "current_device": lambda: current[0],
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    assert parallel.Ranks(flag).device == torch.device("cuda", 3)
    assert set(met) == {3} and current == [3]


@pytest.mark.gpu
@pytest.mark.parametrize("mode, optimizer", EVERY)
def test_every_mode_trains_on_cuda_as_one_process(folder, mode, optimizer):
    """One rank per card, as many as there are up to 4, under nccl in bf16."""
    cards = max(n for n in (1, 2, 4) if n <= torch.cuda.device_count())
    flags = dict(device="cuda", dtype="bfloat16", max_steps=12)
    name = f"cuda_{mode}_{optimizer}"
    launch(cards, [job(name, mode, optimizer, **flags)], folder)
    do([job(f"{name}_single", mode, optimizer, **flags)], folder)
    for key in ("train_loss", "val_loss"):
        ours, reference = column(folder / name, key), column(folder / f"{name}_single", key)
        assert ours == pytest.approx(reference, abs=0.02)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with parallel.Ranks("cpu"):
        do(json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[1]))
