"""The optimizers of a run, their steps, and their state by parameter name.

OPTIMIZERS maps a flag's value to a function (model, config, dtype) -> [(class, parameter groups,
keyword arguments, its share of the scheduled rate)], one for each optimizer that the run steps;
dtype is the precision of the run. A new one is a function and its line there.
"""

import copy
import itertools
import sys
from collections import defaultdict

import torch


def decays(model):
    """{name of a parameter: whether weight decay pulls on it}: matrices, but for those that their
    module lists in no_decay; norms, biases and other vectors never."""
    result = {}
    for name, p in model.named_parameters():
        module, _, own = name.rpartition(".")
        spared = getattr(model.get_submodule(module), "no_decay", ())
        result[name] = p.dim() >= 2 and own not in spared
    return result


def groups_by_decay(model, config, without=()):
    """The parameters, but for the names in `without` and those that go by_sign, in two groups: with
    weight decay, and not."""
    named, decayed = dict(model.named_parameters()), decays(model)
    without = {*without, *by_sign(model)}
    return [
        {
            "params": [p for n, p in named.items() if decayed[n] == decay and n not in without],
            "weight_decay": config.weight_decay if decay else 0.0,
        }
        for decay in (True, False)
    ]


def by_sign(model):
    """{name of a parameter that moves by a fixed length against its gradient's sign, and by no
    other optimizer: that length}, as their modules have it in by_sign."""
    return {
        f"{module}.{name}": rate
        for module, part in model.named_modules()
        for name, rate in getattr(part, "by_sign", {}).items()
    }


class BySign(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad.sign())


def signed(model, config):
    """What OPTIMIZERS' functions give, for the parameters of by_sign."""
    named, rates = dict(model.named_parameters()), by_sign(model)
    return [
        (BySign, [{"params": [named[n] for n in rates if rates[n] == rate]}], {}, rate / config.lr)
        for rate in sorted({*rates.values()})
    ]


def adamw(model, config, dtype, without=()):
    groups = groups_by_decay(model, config, without)
    betas, device = (config.beta1, config.beta2), next(model.parameters()).device
    flags = dict(betas=betas, eps=1e-8, fused=device.type in ("cuda", "cpu"))
    return [(torch.optim.AdamW, groups, flags, 1.0)]


def muon(model, config, dtype):
    """Muon (Jordan et al. 2024) for the matrices inside the blocks, AdamW for all else. Its updates
    are scaled to the size of AdamW's (Liu et al. 2025), so that one rate can serve both."""
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"torch {torch.__version__} has no Muon: pip install -U torch")
    named, decayed = dict(model.named_parameters()), decays(model)
    hidden = [n for n in named if n.startswith("transformer.h.") and named[n].dim() == 2]
    hidden = [n for n in hidden if decayed[n]]
    kind = PreciseMuon if dtype == torch.float32 else torch.optim.Muon
    flags = dict(weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    scale = config.muon_lr / config.lr if config.muon_lr else 1.0
    own = (kind, [{"params": [named[n] for n in hidden]}], flags, scale)
    return [*adamw(model, config, dtype, without=hidden), own]


OPTIMIZERS = {"adamw": adamw, "muon": muon}


class PreciseMuon(getattr(torch.optim, "Muon", torch.optim.Optimizer)):
    """torch.optim.Muon for runs in fp32. Torch rounds to bf16 inside it, whatever the run's
    precision, and so makes 1e-4 of the loss out of the last bit of a sum over ranks."""

    def step(self, closure=None):
        module, name = sys.modules["torch.optim._muon"], "_zeropower_via_newtonschulz"
        torchs = getattr(module, name)
        setattr(module, name, newton_schulz)
        try:
            return super().step(closure)
        finally:
            setattr(module, name, torchs)


def newton_schulz(matrix, coefficients, steps, eps):
    """A matrix (m, n) = U S V^T -> about U V^T: `steps` times X <- a X + b X X^T X + c (X X^T)^2 X
    from X of norm 1 on (Jordan et al. 2024), in the matrix's own precision."""
    a, b, c = coefficients
    x = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if matrix.size(0) > matrix.size(1) else x


def make_optimizers(model, config, ranks=None, dtype=None):
    """The optimizers that config asks for -> a list; a group's lr_scale is its share of the
    scheduled rate. dtype: the run's precision."""
    optimizers = []
    wanted = OPTIMIZERS[config.optimizer](model, config, dtype)
    for kind, groups, flags, scale in (*wanted, *signed(model, config)):
        flags = flags | dict(lr=config.lr * scale)
        groups = [group | {"lr_scale": scale} for group in groups]
        if config.parallel == "zero1" and ranks and ranks.distributed:
            # a second of every start, which only zero1 needs
            from torch.distributed.optim import ZeroRedundancyOptimizer

            kind, flags = ZeroRedundancyOptimizer, flags | dict(optimizer_class=kind)
        optimizers.append(kind(groups, **flags))
    return optimizers


def clip_gradients(model, most):
    """Scale all gradients so that their norm is at most `most` (0: no limit) -> the norm before,
    a scalar tensor, the same on all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most or torch.inf)
    return norm.full_tensor() if is_sharded(norm) else norm


def step_unless(skip, optimizers):
    """Step the optimizers, unless skip, a bool scalar tensor that is the same on all ranks: then
    weights and state stay as they are. The host never learns which it was, so it need not wait:
    a fused kernel obeys found_inf, after another one the tensors are put back (on mps that waits,
    for its step counts are on the CPU)."""
    for optimizer in optimizers:
        inner = getattr(optimizer, "optim", optimizer)  # what zero1 wraps
        if inner.defaults.get("fused"):
            inner.found_inf = skip.float()
            optimizer.step()
            continue
        before = [t.clone() for t in held(optimizer)]
        optimizer.step()
        for now, was in itertools.zip_longest(held(optimizer), before):
            # state that the first step makes begins at zero
            now.copy_(torch.where(skip, torch.zeros_like(now) if was is None else was, now))


def held(optimizer):
    """What a step changes on this rank: its parts of the parameters, then, from the first step on,
    its state; always in this order."""
    inner = getattr(optimizer, "optim", optimizer)
    state = (t for values in inner.state.values() for t in values.values() if torch.is_tensor(t))
    tensors = itertools.chain((p.detach() for p in parameters(optimizer)), state)
    return [t.to_local() if is_sharded(t) else t for t in tensors]


def is_sharded(value):
    """Whether fsdp has spread it over the ranks: a DTensor, asked without a second's import."""
    return hasattr(value, "full_tensor")


def parameters(optimizer):
    """In the order of the indices of its state dict."""
    return list(itertools.chain(*(group["params"] for group in optimizer.param_groups)))


def first_state(optimizer, p):
    """The state that an optimizer would begin for parameter p: {key: tensor}, spread as p is."""
    trial, x = copy.copy(optimizer), torch.zeros_like(p)
    x.grad = torch.zeros_like(x)
    trial.state = defaultdict(dict)
    trial.param_groups = [optimizer.param_groups[0] | {"params": [x]}]
    trial.step()
    return trial.state[x]
