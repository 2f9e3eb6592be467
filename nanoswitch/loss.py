"""The cross entropy of a language model's head, without ever holding all logits.

Inside a compiled graph it is one operator, whose chunks the compiler does not see: Inductor would
make the logits of all of them before it used any.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

CHUNK_BYTES = 2**28  # of logits: large products are faster, and so much hardly matters for memory
CHUNK_ROWS = 4096  # whose sum, of gradients of at most 1 times features of at most 16, fp16 holds


def loss_chunks(x, w):
    """Equal slices over the rows of x, (N, C): as few as keep the logits x @ w.T of each within
    CHUNK_ROWS and CHUNK_BYTES, on a card twice that: each chunk moves all of w's gradient."""
    most = CHUNK_BYTES * (2 if x.is_cuda else 1)
    rows = min(CHUNK_ROWS, max(1, most // (len(w) * x.element_size())))
    size = max(1, math.ceil(len(x) / max(1, math.ceil(len(x) / rows))))
    return [slice(i, i + size) for i in range(0, len(x), size)]


class MeanCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of the logits x @ weight.T over the rows with target >= 0.

    x (N, C), weight (V, C), targets (N,), logit_softcap -> a scalar, in fp32. The logits exist
    a chunk of rows at a time, and are turned into their gradient while they do: none are kept
    for the backward pass.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, cap):
        compiling = torch.compiler.is_compiling()
        summed = torch.ops.nanoswitch.loss_and_gradients if compiling else loss_and_gradients
        loss, dx, dw = summed(x, weight, targets, cap)
        count = (targets >= 0).sum().clamp(min=1)
        ctx.save_for_backward(dx, dw, count)
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        dx, dw, count = ctx.saved_tensors
        scale = grad / count
        # in place: a second backward pass would be an error, as torch itself finds out
        return dx.mul_(scale), dw.mul_(scale), None, None


def loss_and_gradients(x, weight, targets, cap, gradient=None):
    """x (N, C), weight (V, C), targets (N,) -> the sum of the cross entropies, in fp32, and its
    gradients with respect to x and weight. gradient: into_gradient, or what computes the same."""
    gradient = gradient or into_gradient
    w, dx, loss = weight.to(x.dtype), torch.empty_like(x), x.new_zeros((), dtype=torch.float32)
    if x.is_cuda:  # its products read either layout
        wT, dw = w.T, torch.zeros_like(weight)
        dwT = dw.T
    else:
        wT, dwT = transposed(w), weight.new_zeros(weight.T.shape)
    for rows in loss_chunks(x, w):
        logits = softcap(x[rows] @ wT, cap)  # (chunk, V)
        part, logits = gradient(logits, targets[rows], cap)
        loss = loss + part
        dx[rows] = logits @ w
        if logits.dtype == dwT.dtype:
            dwT.addmm_(x[rows].T, logits)
        elif x.is_cuda:  # one kernel multiplies and adds to the sum, in fp32
            torch.addmm(dw, logits.T, x[rows], out_dtype=dw.dtype, out=dw)
        else:  # each product is rounded once, their sum is kept in fp32
            dwT += transposed(x[rows]) @ logits
        del logits  # before the next chunk's are made
    return loss, dx, dw if x.is_cuda else transposed(dwT)  # in the weight's own layout


def into_gradient(logits, targets, cap):
    """Logits (n, V), after softcap, and targets (n,) -> the sum of their cross entropies, a scalar
    in fp32, and the logits, overwritten with its gradient with respect to them, before softcap."""
    keep, target = targets >= 0, targets.clamp(min=0)
    at_target = torch.arange(len(logits), device=logits.device), target

    def slope(z):  # the derivative of softcap, whose value is z
        return 1 - (z / cap) ** 2 if cap else 1

    own, own_logp = logits[at_target].float(), []
    for rows in logit_blocks(logits):
        slopes, z = slope(logits[rows]), logits[rows].float()
        top, total = exponentiate(z)
        own_logp.append(own[rows] - top - total.log())
        z.mul_((keep[rows] / total)[:, None])
        logits[rows] = z.mul_(slopes) if cap else z
    own_logp = torch.cat(own_logp)  # (n,)
    # softmax - one-hot; the division by their count waits for the backward pass, where it meets
    # the loss scale, so that fp16 does not underflow
    logits[at_target] = ((own_logp.exp() - 1) * keep * slope(own)).type_as(logits)
    return -(own_logp * keep).sum(), logits


def cache_blocks(x, size):
    """Slices over the rows of x: on a CPU `size` for each of its threads, for their caches; else
    all at once."""
    on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
    on_cpu = on_cpu and not isinstance(x, FakeTensor)  # shapes alone have no cache
    size = size * torch.get_num_threads() if on_cpu else max(1, len(x))
    return [slice(i, i + size) for i in range(0, len(x), size)]


def logit_blocks(logits):
    """cache_blocks of 1 MB in fp32, in which several passes are three times as fast."""
    return cache_blocks(logits, max(1, 2**18 // logits.size(1)))


def transposed(w):
    """w.T, its rows contiguous: the layout in which CPUs multiply bf16 up to twice as fast."""
    wT = w.new_empty(w.T.shape)
    for rows in cache_blocks(w, 128):
        wT[:, rows] = w[rows].T
    return wT


def cross_entropies(x, weight, targets, cap):
    """Cross entropy of every row, (N, C), (V, C), (N,) -> (N,) fp32, 0 where target is -1; for
    evaluation: no logits outlive their chunk."""
    if torch.compiler.is_compiling():
        return torch.ops.nanoswitch.cross_entropies(x, weight.to(x.dtype), targets, cap)
    return losses_by_chunk(x, weight, targets, cap)


def losses_by_chunk(x, weight, targets, cap, of_logits=None):
    """cross_entropies. of_logits: logit_losses, or what computes the same."""
    of_logits, losses = of_logits or logit_losses, [x.new_zeros(0, dtype=torch.float32)]
    for rows in loss_chunks(x, weight):
        # autocast keeps the weight that it casts for F.linear from one call to the next
        losses.append(of_logits(softcap(F.linear(x[rows], weight), cap), targets[rows]))
    return torch.cat(losses)


def logit_losses(logits, targets):
    """Cross entropy of every row of logits (n, V), (n,) -> (n,) fp32, 0 where target is -1."""
    own = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0].float()
    losses = []
    for rows in logit_blocks(logits):
        top, total = exponentiate(logits[rows].float())
        losses.append((total.log() - (own[rows] - top)).masked_fill(targets[rows] < 0, 0))
    return torch.cat(losses)


def exponentiate(z):
    """z (n, V) becomes exp(z - top) -> top (n,), its largest values, and total (n,), its sum now:
    the log-probability of a logit z_i is z_i - top - log(total)."""
    top = z.amax(-1)
    return top, z.sub_(top[:, None]).exp_().sum(-1)


def softcap(logits, cap):
    """cap * tanh(logits / cap), which keeps logits within +-cap (Gemma 2); cap 0 leaves them."""
    return cap * torch.tanh(logits / cap) if cap else logits


# ----------------------------------------------------------------------------- when compiled


@torch.library.custom_op("nanoswitch::loss_and_gradients", mutates_args=())
def compiled_loss(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss_and_gradients as one operator."""
    return loss_and_gradients(x, weight, targets, cap, fused(into_gradient_anew, x))


@compiled_loss.register_fake
def _(x, weight, targets, cap):
    return x.new_empty((), dtype=torch.float32), torch.empty_like(x), torch.empty_like(weight)


@torch.library.custom_op("nanoswitch::cross_entropies", mutates_args=())
def compiled_cross_entropies(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float
) -> torch.Tensor:
    """cross_entropies as one operator."""
    return losses_by_chunk(x, weight, targets, cap, fused(logit_losses, x))


@compiled_cross_entropies.register_fake
def _(x, weight, targets, cap):
    return x.new_empty(len(x), dtype=torch.float32)


def fused(function, x):
    """A function of one chunk, compiled on its own where x is on CUDA: step by step it would read
    and write the logits five times as often. A CPU's caches hold its blocks."""
    return compiled(function) if x.is_cuda else function


def into_gradient_anew(logits, targets, cap):
    """into_gradient in memory of its own: compiled, it would write there first and copy."""
    return into_gradient(logits.clone(), targets, cap)


@functools.cache
def compiled(function):
    return torch.compile(function, dynamic=False)
