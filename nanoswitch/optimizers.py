"""The optimizers of a run, their steps, and their state by parameter name.

OPTIMIZERS maps a flag's value to a function (model, config, dtype) -> [(class, parameter groups,
keyword arguments, its share of the scheduled rate)], one for each optimizer that the run steps;
dtype is the precision of the run. A new one is a function and its line there.
"""

import copy
import itertools
from collections import defaultdict

import torch

from nanoswitch import muon
from nanoswitch.device import is_sharded
from nanoswitch.soap import soap_class


def listed(model, attribute):
    """The names of the parameters that their modules list in an attribute, such as no_decay."""
    return {
        f"{module}.{name}"
        for module, part in model.named_modules()
        for name in getattr(part, attribute, ())
    }


def decays(model):
    """{name of a parameter: whether weight decay pulls on it}: matrices, but for those that their
    module lists in no_decay; norms, biases and other vectors never."""
    spared = listed(model, "no_decay")
    return {n: p.dim() >= 2 and n not in spared for n, p in model.named_parameters()}


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
    return [(CautiousAdamW if config.cautious_decay else torch.optim.AdamW, groups, flags, 1.0)]


class CautiousAdamW(torch.optim.AdamW):
    """AdamW whose weight decay is muon.decay's cautious one."""

    @torch.no_grad()
    def step(self, closure=None):
        rates = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            if group["weight_decay"]:
                self.decay(group)
            group["weight_decay"] = 0.0
        super().step(closure)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["weight_decay"] = rate

    def decay(self, group):
        rate, skipped = group["lr"] * group["weight_decay"], getattr(self, "found_inf", 0.0)
        for p in group["params"]:
            if p.grad is None:
                continue
            # the update's sign is that of the first moment, once it has met this gradient
            update, moment = p.grad, self.state[p].get("exp_avg")
            if moment is not None:
                update = moment.lerp(p.grad, 1 - group["betas"][0])
            if is_sharded(p):
                p, update = p.to_local(), update.to_local()
            muon.decay(p, update, rate * (1 - skipped), cautious=True)


def beside_adamw(model, config, dtype, kind, flags, scale=1.0, also=()):
    """An optimizer for the matrices inside the blocks and the names in `also`, but for those that
    their modules spare; AdamW for all else."""
    named, decayed = dict(model.named_parameters()), decays(model)
    inside = [n for n in named if n.startswith("transformer.h.")]
    hidden = [n for n in inside if decayed[n] and (named[n].dim() == 2 or n in also)]
    flags = flags | dict(weight_decay=config.weight_decay)
    own = (kind, [{"params": [named[n] for n in hidden]}], flags, scale)
    return [*adamw(model, config, dtype, without=hidden), own]


def by_muon(model, config, dtype, beta2=0.0):
    """Muon for the matrices inside the blocks, stacks of them too, AdamW for all else: one rate can
    serve both. In a run in fp32 Muon computes in fp32 too: in bf16 the last bit of a sum over ranks
    would be 1e-4 of the loss."""
    flags = dict(
        momentum=config.muon_momentum, coefficients=config.muon_coefficients, beta2=beta2,
        cautious=config.cautious_decay,
        dtype=torch.float32 if dtype == torch.float32 else torch.bfloat16,
    )  # fmt: skip
    scale = config.muon_lr / config.lr if config.muon_lr else 1.0
    return beside_adamw(model, config, dtype, muon.Muon, flags, scale, also=listed(model, "stacks"))


def by_normuon(model, config, dtype):
    return by_muon(model, config, dtype, beta2=0.95)  # the paper's


def by_soap(model, config, dtype):
    """SOAP for the matrices inside the blocks, AdamW for all else."""
    if config.parallel == "fsdp":
        raise ValueError("optimizer soap cannot share out a matrix: use --parallel ddp or zero1")
    if config.cautious_decay:
        raise ValueError("optimizer soap has no cautious_decay: leave it out")
    flags = dict(betas=(config.beta1, config.beta2))
    return beside_adamw(model, config, dtype, soap_class(), flags)


OPTIMIZERS = {"adamw": adamw, "muon": by_muon, "normuon": by_normuon, "soap": by_soap}


def make_optimizers(model, config, ranks=None, dtype=None):
    """The optimizers that config asks for -> a list; a group's lr_scale is its share of the
    scheduled rate. dtype: the run's precision."""
    spread = ranks and ranks.distributed
    if dtype == torch.float16 and config.parallel == "fsdp" and spread and by_sign(model):
        raise ValueError(
            f"{next(iter(by_sign(model)))} has no gradient in float16 under fsdp; use --dtype "
            f"bfloat16, or --parallel zero1"
        )
    optimizers = []
    wanted = OPTIMIZERS[config.optimizer](model, config, dtype)
    for kind, groups, flags, scale in (*wanted, *signed(model, config)):
        flags = flags | dict(lr=config.lr * scale)
        groups = [group | {"lr_scale": scale} for group in groups]
        if config.parallel == "zero1" and spread:
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
    for its step counts are on the CPU). One whose state is more than tensors says waits = True."""
    for optimizer in optimizers:
        inner = getattr(optimizer, "optim", optimizer)  # what zero1 wraps
        if getattr(inner, "waits", False):
            if not skip:
                optimizer.step()
            continue
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
