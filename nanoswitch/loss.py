"""The cross entropy of a language model's head, without ever holding all logits."""

import math

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

CHUNK_BYTES = 2**28  # of logits: large products are faster, and so much hardly matters for memory
FP16_ROWS = 4096  # whose sum, of gradients of at most 1 times features of at most 16, fp16 holds


def loss_chunks(x, w):
    """Equal slices over the rows of x, (N, C): as few as keep the logits x @ w.T of each within
    CHUNK_BYTES and 4,096 rows, but at most 16, for they unroll: of very many rows they are
    larger."""
    rows = min(4096, max(1, CHUNK_BYTES // (len(w) * x.element_size())))
    number = max(1, min(16, math.ceil(len(x) / rows)))
    size = max(1, math.ceil(len(x) / number))
    return [slice(i, i + size) for i in range(0, len(x), size)]


class MeanCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of the logits x @ weight.T over the rows with target >= 0.

    x (N, C), weight (V, C), targets (N,), logit_softcap -> a scalar, in fp32. The logits exist
    a chunk of rows at a time, and are turned into their gradient while they do: none are kept
    for the backward pass.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, cap):
        w = weight.to(x.dtype)
        wT = transposed(w)
        count = (targets >= 0).sum().clamp(min=1)
        loss = x.new_zeros((), dtype=torch.float32)
        dx, dwT = torch.empty_like(x), weight.new_zeros(weight.T.shape)
        for rows in loss_chunks(x, w):
            logits = softcap(x[rows] @ wT, cap)  # (chunk, V)
            loss = loss + into_gradient(logits, targets[rows], cap)
            dx[rows] = logits @ w
            if logits.dtype == dwT.dtype:
                dwT.addmm_(x[rows].T, logits)
            else:  # each product is rounded once, their sum is kept in fp32
                most = FP16_ROWS if x.dtype == torch.float16 else max(1, len(logits))
                for a, b in zip(x[rows].split(most), logits.split(most), strict=True):
                    dwT += transposed(a) @ b
            del logits  # before the next chunk's are made
        ctx.save_for_backward(dx, transposed(dwT), count)  # in the weight's own layout
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        dx, dw, count = ctx.saved_tensors
        scale = grad / count
        # in place: a second backward pass would be an error, as torch itself finds out
        return dx.mul_(scale), dw.mul_(scale), None, None


def into_gradient(logits, targets, cap):
    """Sum of the cross entropies of logits (n, V), after softcap, and targets (n,) -> a scalar in
    fp32; overwrites the logits with its gradient with respect to them, before softcap."""
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
    return -(own_logp * keep).sum()


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
    losses = [x.new_zeros(0, dtype=torch.float32)]
    for rows in loss_chunks(x, weight):
        # autocast keeps the weight that it casts for F.linear from one call to the next
        logits, target = softcap(F.linear(x[rows], weight), cap), targets[rows]  # (chunk, V)
        own = logits.gather(1, target.clamp(min=0)[:, None])[:, 0].float()
        for block in logit_blocks(logits):
            top, total = exponentiate(logits[block].float())
            loss = total.log() - (own[block] - top)
            losses.append(loss.masked_fill(target[block] < 0, 0))
        del logits  # before the next chunk's are made
    return torch.cat(losses)


def exponentiate(z):
    """z (n, V) becomes exp(z - top) -> top (n,), its largest values, and total (n,), its sum now:
    the log-probability of a logit z_i is z_i - top - log(total)."""
    top = z.amax(-1)
    return top, z.sub_(top[:, None]).exp_().sum(-1)


def softcap(logits, cap):
    """cap * tanh(logits / cap), which keeps logits within +-cap (Gemma 2); cap 0 leaves them."""
    return cap * torch.tanh(logits / cap) if cap else logits
