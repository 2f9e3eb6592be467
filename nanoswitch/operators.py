"""Operators of the files in variants/: a causal convolution, a norm of heads, the gated delta rule,
products by group, and a gradient that a module gives itself.

Shapes: B batch, T positions, nh heads, hs their size.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class CausalConv(nn.Module):
    """Each channel's convolution over time, of the token itself and the width - 1 before it."""

    no_decay = ("weight",)
    replayable = False  # a CUDA graph would keep what there was when it was recorded

    def __init__(self, channels, width):
        super().__init__()
        if width < 1:
            raise ValueError(f"a convolution of width {width}: its width must be 1 or more")
        # the last column is the token's own, as F.conv1d has it
        self.weight = nn.Parameter(torch.zeros(channels, width))
        self.init_std = (3 * width) ** -0.5  # that of nn.Conv1d

    def forward(self, x, cache, name):
        """x (B, T, channels), the layer's cache or None, the name of the place -> (B, T,
        channels)."""
        n = self.weight.size(1) - 1
        seen = F.pad(x, (0, 0, n, 0)) if cache is None else cache.with_last(name, x, n)
        weight = self.weight[:, None].type_as(x)  # (channels, 1, width)
        return F.conv1d(seen.transpose(1, 2), weight, groups=len(weight)).transpose(1, 2)


class HeadNorm(nn.RMSNorm):
    """RMSNorm of each of `heads` heads, (.., size), with one weight for all of them."""

    def __init__(self, size, eps, heads):
        super().__init__(size, eps)
        self.heads = heads

    def forward(self, x):
        # CUDA's autocast runs it in fp32; a CPU's has no fused norm for two dtypes
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps).type_as(x)

    def uses(self, T):
        return self.heads


# ----------------------------------------------------------------------------- the delta rule


def gated_delta_rule(q, k, v, fade, beta, state=None):
    """S <- alpha S (I - beta k k^T) + beta v k^T, y = S q for each token (Yang et al. 2024, arXiv
    2412.06464, eq. 10). q, k, v (B, nh, T, hs), fade, the logarithm of alpha, and beta (B, nh, T),
    all fp32; state: S^T (B, nh, hs, hs) of the tokens before, or None -> y (B, nh, T, hs), S^T.

    In chunks of c tokens (section 3.3): what they write is U - W S^T for the S before the chunk,
    where U and W solve a triangular system, and what they read is products of c x c."""
    T, c = q.size(2), chunk_of(q.size(2))
    q, k, v = (F.pad(y, (0, 0, 0, -T % c)).unflatten(2, (-1, c)) for y in (q, k, v))
    g, beta = (F.pad(y, (0, -T % c)).unflatten(2, (-1, c)) for y in (fade, beta))  # (B, nh, n, c)
    g, beta = g.cumsum(-1)[..., None], beta[..., None]  # (B, nh, n, c, 1)
    later = torch.ones(c, c, dtype=torch.bool, device=q.device).triu(1)
    left = (g - g.transpose(3, 4)).masked_fill(later, -math.inf).exp()  # of token j at token i
    system = (beta * k @ k.transpose(3, 4)) * left  # (B, nh, n, c, c)
    both = torch.cat((beta * v, beta * g.exp() * k), dim=-1)
    u, w = (unit_triangular_inverse(system) @ both).split((v.size(-1), k.size(-1)), dim=-1)
    seen, end = (q @ k.transpose(3, 4)) * left, g[..., -1:, :]
    parts = u, w, seen, q * g.exp(), (k * (end - g).exp()).transpose(3, 4), end.exp()
    if state is None:
        state = q.new_zeros(*q.shape[:2], k.size(-1), v.size(-1))
    found = []
    for u, w, seen, q, k, end in zip(*(part.unbind(2) for part in parts), strict=True):
        written = u - w @ state
        found.append(q @ state + seen @ written)
        state = end * state + k @ written
    return torch.cat(found, dim=2)[:, :, :T], state


class Fade(nn.Module):
    """x (B, nh, T) -> log alpha = -exp(A) softplus(x + b); A and b are numbers, one for each head.

    At the start exp(A) is spread over (0, 16) and softplus(b) over 0.001 to 0.1, from which the
    authors draw them."""

    own_init = True

    def __init__(self, nh):
        super().__init__()
        h = torch.arange(nh) + 0.5
        self.A = nn.Parameter((16 * h / nh).log())
        step = 0.001 * 100 ** (0.618 * h % 1)  # in another order
        self.b = nn.Parameter(step.expm1().log())

    def forward(self, x):
        return -self.A.float().exp()[:, None] * F.softplus(x + self.b.float()[:, None])


def unit(x):
    """x (.., hs) of length 1."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def chunk_of(T, most=64):
    """The least power of 2 that holds T tokens, at most `most`."""
    while most // 2 >= T:
        most //= 2
    return most


def unit_triangular_inverse(x):
    """Of lower triangular matrices (.., c, c), c a power of 2, whose diagonals are taken for ones:
    the inverse of [[A, 0], [B, D]] is [[A', 0], [-D' B A', D']], of both halves at once. As exact
    as substitution, and all of it products."""
    h = x.size(-1) // 2
    if not h:
        return torch.ones_like(x)
    a, d = unit_triangular_inverse(torch.stack((x[..., :h, :h], x[..., h:, h:])))
    below = torch.cat((-d @ x[..., h:, :h] @ a, d), dim=-1)
    return torch.cat((F.pad(a, (0, h)), below), dim=-2)


def delta_rule_products(T, hs):
    """Multiply-adds of gated_delta_rule for one of T tokens and one head."""
    c = chunk_of(T)
    return 5 * c * hs + (c**2 - 1) / 3 + 3 * hs**2


# ----------------------------------------------------------------------------- products by group


class GroupedLinear(nn.Module):
    """A matrix (n_in, n_out) for each of `groups` groups of rows. share: of all tokens, those that
    a group multiplies."""

    stacks = ("weight",)

    def __init__(self, groups, n_in, n_out, share):
        super().__init__()
        self.weight, self.share = nn.Parameter(torch.zeros(groups, n_in, n_out)), share

    def forward(self, x, ends):
        """As grouped_product's."""
        return grouped_product(x, self.weight.type_as(x), ends)

    def uses(self, T):
        return self.share


def grouped_product(x, weight, ends):
    """x (N, n_in), its rows sorted by group, times each group's matrix, weight (G, n_in, n_out);
    ends (G,) int32, where each group's rows end -> (N, n_out). All groups at once on CUDA in
    bf16, where torch has that; elsewhere one by one."""
    grouped = getattr(F, "grouped_mm", getattr(torch, "_grouped_mm", None))
    fits = x.dtype == torch.bfloat16 and x.size(1) % 8 == weight.size(2) % 8 == 0
    if grouped and fits and x.is_cuda:
        return grouped(x, weight, offs=ends)
    return one_by_one(x, weight, ends)


# an operator each: their lengths are numbers, which a compiler and tensors on meta know nothing of


@torch.library.custom_op("nanoswitch::one_by_one", mutates_args=())
def one_by_one(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    parts = zip(x.split(lengths(ends)), weight, strict=True)
    return torch.cat([rows @ matrix for rows, matrix in parts])


@torch.library.custom_op("nanoswitch::outer_by_group", mutates_args=())
def outer_by_group(x: torch.Tensor, grad: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The gradient of one_by_one's weight, where that of its result is grad (N, n_out)."""
    parts = zip(x.split(lengths(ends)), grad.split(lengths(ends)), strict=True)
    return torch.stack([rows.T @ own for rows, own in parts])


def lengths(ends):
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


@one_by_one.register_fake
def _(x, weight, ends):
    return x.new_empty(len(x), weight.size(2))


@outer_by_group.register_fake
def _(x, grad, ends):
    return x.new_empty(len(ends), x.size(1), grad.size(1))


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def gradients(ctx, grad):
    x, weight, ends = ctx.saved_tensors
    return one_by_one(grad, weight.transpose(1, 2), ends), outer_by_group(x, grad, ends), None


one_by_one.register_autograd(gradients, setup_context=keep)


# ----------------------------------------------------------------------------- given gradients


class WithGradient(torch.autograd.Function):
    """apply(y, p, gradient) -> y as it is; p's gradient is the one that is given, whatever y's is.

    Times 2^-40: a power of 2, so that sums stay exact, and too small to count in a norm of all."""

    @staticmethod
    def forward(ctx, y, p, gradient):
        ctx.save_for_backward(gradient.type_as(p) * 2.0**-40)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        return grad, *ctx.saved_tensors, None
