"""nanoswitch/muon.py and the cautious decay against torch.optim's classes and formulas in NumPy."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_runs as runs
import torch

import train_gpt2 as t
from model import GPT, GPTConfig
from nanoswitch import muon, optimizers, parallel

SHAPES = [(24, 8), (8, 8), (8, 24), (24, 8), (8, 8), (8, 24), (24, 8)]
JORDAN = [(3.4445, -4.7750, 2.0315)] * 5


def polynomials(s, steps):
    """a s + b s^3 + c s^5, one after the other, of numbers s."""
    for a, b, c in steps:
        s = a * s + b * s**3 + c * s**5
    return s


def exactly(matrix, steps=JORDAN, safety=1.0):
    """U S V^T -> U f(S) V^T in float64, f the steps on S of norm 1."""
    u, s, vt = np.linalg.svd(np.asarray(matrix, dtype=np.float64), full_matrices=False)
    scaled = [(a / safety, b / safety**3, c / safety**5) for a, b, c in steps]
    return (u * polynomials(s / np.sqrt((s**2).sum()) / safety, scaled)) @ vt


def parameters(seed=0, shapes=SHAPES):
    draw = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]


def gradients(step, *sides):
    """Give the parameters of all sides the same gradients."""
    draw = torch.Generator().manual_seed(100 + step)
    for together in zip(*sides, strict=True):
        grad = torch.randn(together[0].shape, generator=draw)
        for p in together:
            p.grad = grad.clone()


# ----------------------------------------------------------------------------- orthogonal


@pytest.mark.parametrize("name", muon.COEFFICIENTS)
@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (5, 5), (3, 8, 6), (2, 6, 8)])
def test_orthogonal_acts_on_singular_values_alone(shape, name):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours = muon.orthogonal(matrices, name).reshape(-1, *shape[-2:])
    for one, made in zip(matrices.reshape(ours.shape), ours, strict=True):
        np.testing.assert_allclose(made, exactly(one, *muon.COEFFICIENTS[name]), atol=2e-5)


def test_each_step_of_polar_express_is_centred_on_1():
    """The best polynomial of a step errs as much above 1 as below it: the smallest and the largest
    of what it makes of singular values from 0.001 to 1 add up to 2, and would not after a typo."""
    steps, safety = muon.COEFFICIENTS["polar_express"]
    s, left = np.geomspace(1e-3, 1, 100_001), []
    for step in steps:
        s = polynomials(s, [step])
        assert s.min() + s.max() == pytest.approx(2, abs=1e-6)
        left.append(s.max() - 1)
    assert left == sorted(left, reverse=True) and left[-1] < 0.13 and safety == 1.01
    assert polynomials(np.geomspace(1e-3, 1, 100_001), JORDAN).min() < 0.5


# ----------------------------------------------------------------------------- the step


@pytest.mark.parametrize("at_once", [2**26, 200])
def test_muon_makes_torchs_updates(monkeypatch, at_once):
    """In bf16, over steps, with matrices of one shape together, all of them or two at a time."""
    monkeypatch.setattr(muon, "AT_ONCE", at_once)
    ours, theirs = parameters(), parameters()
    mine = muon.Muon(ours, lr=1e-2, weight_decay=0.3)
    torchs = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        before = [p.detach().clone() for p in ours]
        gradients(step, ours, theirs)
        mine.step()
        torchs.step()
        for p, q, was in zip(ours, theirs, before, strict=True):
            assert (p - q).norm() < 1e-3 * (p - was).norm()
            assert torch.equal(
                *(o.state[x]["momentum_buffer"] for o, x in ((mine, p), (torchs, q)))
            )


def test_in_fp32_muon_is_torchs_with_the_exact_matrix(monkeypatch):
    ours, theirs = parameters(), parameters()
    mine = muon.Muon(ours, lr=1e-2, weight_decay=0.3, dtype=torch.float32)
    torchs = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    monkeypatch.setattr(
        "torch.optim._muon._zeropower_via_newtonschulz",
        lambda update, *_: torch.from_numpy(exactly(update)).float(),
    )
    for step in range(4):
        gradients(step, ours, theirs)
        mine.step()
        torchs.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_muon_takes_each_matrix_of_a_stack_as_torch_takes_it_alone():
    (stack,) = parameters(shapes=[(3, 8, 24)])
    alone = [torch.nn.Parameter(matrix) for matrix in stack.detach().clone()]
    mine = muon.Muon([stack], lr=1e-2, weight_decay=0.3)
    torchs = torch.optim.Muon(alone, lr=1e-2, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        before = stack.detach().clone()
        gradients(step, [stack])
        for p, grad in zip(alone, stack.grad, strict=True):
            p.grad = grad.clone()
        mine.step()
        torchs.step()
        for p, q, was in zip(stack, alone, before, strict=True):
            assert (p - q).norm() < 1e-3 * (p - was).norm()


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("beta2", [0.0, 0.9])
def test_normuon_and_cautious_decay_are_their_formulas(beta2, cautious):
    lr, weight_decay, momentum = 1e-2, 0.3, 0.9
    ours = parameters()
    mine = muon.Muon(
        ours, lr=lr, weight_decay=weight_decay, momentum=momentum, coefficients="polar_express",
        beta2=beta2, cautious=cautious, dtype=torch.float32,
    )  # fmt: skip
    state = [(p.detach().double().numpy(), 0.0, 0.0) for p in ours]
    for step in range(4):
        gradients(step, ours)
        mine.step()
        for i, (w, m, v) in enumerate(state):
            g = ours[i].grad.double().numpy()
            m = momentum * m + (1 - momentum) * g
            o = exactly((1 - momentum) * g + momentum * m, *muon.COEFFICIENTS["polar_express"])
            if beta2:
                v = beta2 * v + (1 - beta2) * (o**2).mean(axis=1, keepdims=True)
                size, o = np.linalg.norm(o), o / np.sqrt(v)
                o *= size / np.linalg.norm(o)
            shrinks = np.sign(w) == np.sign(o) if cautious else np.ones_like(w)
            update = 0.2 * np.sqrt(max(w.shape)) * o
            state[i] = w - lr * update - lr * weight_decay * shrinks * w, m, v
    for p, (w, _, _) in zip(ours, state, strict=True):
        np.testing.assert_allclose(p.detach(), w, atol=1e-5)


def test_cautious_adamw_is_its_formula():
    """And torch's own where nothing decays."""
    lr, weight_decay, b1, b2 = 1e-2, 0.3, 0.9, 0.95
    ours, plain, theirs = parameters(), parameters(1), parameters(1)
    groups = [{"params": ours, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0}]
    mine = optimizers.CautiousAdamW(groups, lr=lr, betas=(b1, b2), eps=1e-8, fused=True)
    torchs = torch.optim.AdamW(theirs, lr=lr, betas=(b1, b2), eps=1e-8, fused=True, weight_decay=0)
    state = [(p.detach().double().numpy(), 0.0, 0.0) for p in ours]
    for step in range(1, 5):
        gradients(step, ours, plain, theirs)
        mine.step()
        torchs.step()
        for i, (w, m, v) in enumerate(state):
            g = ours[i].grad.double().numpy()
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            update = m / (1 - b1**step) / (np.sqrt(v / (1 - b2**step)) + 1e-8)
            shrinks = np.sign(w) == np.sign(update)
            state[i] = w - lr * (update + weight_decay * shrinks * w), m, v
    for p, (w, _, _) in zip(ours, state, strict=True):
        np.testing.assert_allclose(p.detach(), w, atol=1e-6)
    assert all(torch.equal(p, q) for p, q in zip(plain, theirs, strict=True))
    assert [group["weight_decay"] for group in mine.param_groups] == [weight_decay, 0]


# ----------------------------------------------------------------------------- in a run


def tiny():
    return GPT(GPTConfig(vocab_size=64, vocab_used=64, n_layer=2, n_head=2, n_embd=16))


def test_it_updates_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, pos="fire", tie_embeddings=False))
    for name, cautious in (("muon", False), ("normuon", True)):
        config = t.TrainConfig(
            optimizer=name, lr=1e-3, muon_lr=2e-2, weight_decay=0.3, cautious_decay=cautious,
            muon_momentum=0.8,
        )  # fmt: skip
        kinds = {}
        for optimizer in optimizers.make_optimizers(model, config):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    assert id(p) not in kinds
                    kinds[id(p)] = (type(optimizer).__name__, group["weight_decay"], group["lr"])
                    assert group.get("momentum", 0.8) == 0.8
        for name, p in model.named_parameters():
            hidden = p.dim() == 2 and name.startswith("transformer.h.")
            kind = "Muon" if hidden else "CautiousAdamW" if cautious else "AdamW"
            rate = pytest.approx(2e-2 if hidden else 1e-3)
            assert kinds[id(p)] == (kind, 0.3 * (p.dim() == 2), rate)


def test_experts_are_matrices_for_muon_and_soap_leaves_them_to_adamw():
    model = GPT(GPTConfig(vocab_size=64, vocab_used=64, n_layer=1, n_head=2, n_embd=16, mlp="moe"))
    experts = [model.transformer.h[0].mlp.c_fc.weight, model.transformer.h[0].mlp.c_proj.weight]
    assert [w.dim() for w in experts] == [3, 3]
    for name, kind in (("muon", "Muon"), ("soap", "AdamW")):
        if name == "soap":
            pytest.importorskip("pytorch_optimizer")
        found = {
            id(p): (type(optimizer).__name__, group.get("weight_decay"))
            for optimizer in optimizers.make_optimizers(model, t.TrainConfig(optimizer=name))
            for group in optimizer.param_groups
            for p in group["params"]
        }
        assert [found[id(w)] for w in experts] == [(kind, 0.1)] * 2


def test_a_matrix_moves_by_an_orthogonal_one_of_adamws_size():
    """After one step from rest, W moves by 0.2 lr sqrt(max(m, n)) times a matrix whose singular
    values are near 1 (Liu et al. 2025), so that its entries move by about 0.2 lr, whatever m, n."""
    torch.manual_seed(0)
    model = tiny()
    config = t.TrainConfig(optimizer="muon", lr=1e-2, weight_decay=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    idx = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(0))
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    for optimizer in optimizers.make_optimizers(model, config):
        optimizer.step()
    for name, p in model.named_parameters():
        if name.startswith("transformer.h.") and p.dim() == 2:
            moved = (p - before[name]).detach()
            values = torch.linalg.svdvals(moved) / (0.2 * 1e-2 * max(p.shape) ** 0.5)
            # the iteration ends between 0.7 and 1.2, and does not lift what is nearly 0
            assert values.median() == pytest.approx(1, abs=0.3) and values.max() < 1.3, name


def test_a_run_of_torchs_muon_goes_on_as_it_would_have():
    """From a checkpoint's state by name, as runs before this file's Muon wrote it."""
    torch.manual_seed(0)
    models = tiny(), tiny()
    config = t.TrainConfig(optimizer="muon", lr=1e-2)
    first, second = (optimizers.make_optimizers(model, config) for model in models)
    first[1] = torch.optim.Muon(
        [{"params": first[1].param_groups[0]["params"]}], lr=1e-2,
        weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip

    def step(number, *sides):
        gradients(number, *(list(model.parameters()) for model, _ in sides))
        for _, made in sides:
            for optimizer in made:
                optimizer.step()

    for number in range(2):
        step(number, (models[0], first))
    ranks = parallel.Ranks("cpu")
    weights, moments = parallel.whole_state(models[0], first, ranks)
    parallel.load_state(models[1], second, weights, moments, "here")
    for number in (2, 3):
        step(number, (models[0], first), (models[1], second))
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


NORMUON = dict(optimizer="normuon", muon_coefficients="polar_express", cautious_decay=True)


@pytest.mark.parametrize("own", [NORMUON, dict(optimizer="soap")], ids=lambda own: own["optimizer"])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(data, tmp_path, own):
    if own["optimizer"] == "soap":
        pytest.importorskip("pytorch_optimizer")

    steps = 14 if own["optimizer"] == "soap" else 4  # its bases are found anew after ten

    def trainer():
        return runs.trainer(data, tmp_path, **own, max_steps=steps)

    whole, parts = trainer(), trainer()
    for step in range(steps):
        whole.step(step)
    for step in range(steps - 2):
        parts.step(step)
    parts.save(steps - 2, tmp_path)
    again = trainer()
    assert again.resume(tmp_path) == steps - 2
    for step in range(steps - 2, steps):
        again.step(step)
    state = again.optimizers[1].state[again.model.transformer.h[0].mlp.c_fc.weight]
    if own["optimizer"] == "soap":
        assert [q.shape for q in state["Q"]] == [(64, 64), (16, 16)] and state["step"] == steps
    else:
        assert state["second_moment"].shape == (64, 1)
    theirs = dict(again.model.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in whole.model.named_parameters())


def test_a_bad_step_of_soap_changes_nothing(data, tmp_path):
    pytest.importorskip("pytorch_optimizer")
    made = runs.trainer(data, tmp_path, optimizer="soap")
    real = made.forward

    def weights():
        return [p.detach().clone() for p in made.model.parameters()]

    for bad in (True, False, True, False, False):
        made.forward = (lambda x, y: (None, real(x, y)[1] * float("nan"))) if bad else real
        before = weights()
        made.step(0)
        changed = [not torch.equal(a, b) for a, b in zip(before, weights(), strict=True)]
        assert not any(changed) if bad else any(changed)
    assert all(changed)  # the package's first step only looks at the gradient


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, "pip install pytorch-optimizer=="),
        ({"parallel": "fsdp"}, "use --parallel ddp or zero1"),
        ({"cautious_decay": True}, "no cautious_decay"),
    ],
)
def test_what_soap_cannot_do_is_said(monkeypatch, changes, words):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises((ValueError, ModuleNotFoundError), match=words):
        optimizers.make_optimizers(tiny(), t.TrainConfig(optimizer="soap", **changes))


def test_experts_balance_needs_more_than_fp16_under_fsdp():
    """Its gradient is scaled by 2^-40, which fp16 does not hold."""
    config = t.TrainConfig(parallel="fsdp")
    model = GPT(GPTConfig(vocab_size=64, vocab_used=64, n_layer=2, n_head=2, n_embd=16, mlp="moe"))
    ranks = SimpleNamespace(distributed=True)
    with pytest.raises(ValueError, match=r"balance\.bias has no gradient in float16"):
        optimizers.make_optimizers(model, config, ranks, torch.float16)
    assert optimizers.make_optimizers(model, config, ranks, torch.bfloat16)
