"""Muon (Jordan et al. 2024) for matrices W (m, n) with gradient G, and NorMuon (Li et al. 2025,
arXiv 2510.05491):

    M <- M + (1 - momentum) (G - M),    U = G + momentum (M - G)
    O = orthogonal(U),                  about U's nearest orthogonal matrix
    v <- v + (1 - beta2) (mean of O^2 over a row - v),    O <- O / sqrt(v) of O's own norm: NorMuon
    W <- W - lr weight_decay W - 0.2 lr sqrt(max(m, n)) O

0.2 sqrt(max(m, n)) makes the update's size that of AdamW's (Liu et al. 2025). Without NorMuon this
is torch.optim.Muon, whose state it takes over; matrices of one shape go through it together, which
saves a GPU hundreds of small kernels. A stack (groups, m, n) is so many matrices.
"""

import math

import torch

from nanoswitch.device import is_sharded

AT_ONCE = 2**26  # numbers of the matrices that go through orthogonal() at once: 128 MiB in bf16

# (a, b, c) of each step X <- a X + b X X^T X + c (X X^T)^2 X of orthogonal(), and a safety factor:
# divided by it, X stays below what a step is made for, whatever rounding adds
COEFFICIENTS = {
    "jordan": ([(3.4445, -4.7750, 2.0315)] * 5, 1.0),
    # Amsel et al. 2025 (arXiv 2505.16932), algorithm 1: each step the best for what the last leaves
    "polar_express": ([
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    ], 1.01),
}  # fmt: skip


def orthogonal(x, coefficients="jordan"):
    """Matrices (..., m, n) = U S V^T -> about U V^T, in their own precision."""
    steps, safety = COEFFICIENTS[coefficients]
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (safety * x.norm(dim=(-2, -1), keepdim=True)).clamp(min=1e-7)
    added = torch.baddbmm if x.dim() == 3 else torch.addmm
    for a, b, c in steps:
        a, b, c = a / safety, b / safety**3, c / safety**5
        gram = x @ x.mT
        x = added(x, added(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """coefficients, dtype: orthogonal()'s. beta2: NorMuon's, 0 for Muon. cautious: see decay()."""

    def __init__(
        self, params, lr=1e-3, weight_decay=0.1, momentum=0.95, coefficients="jordan", beta2=0.0,
        cautious=False, dtype=torch.bfloat16,
    ):  # fmt: skip
        super().__init__(params, dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, coefficients=coefficients,
            beta2=beta2, cautious=cautious, dtype=dtype,
        ))  # fmt: skip

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for params in batches(p for p in group["params"] if p.grad is not None):
                x = together([self.moved(p, group) for p in params])
                x = orthogonal(x, group["coefficients"])
                if is_sharded(x):  # back to the rows that this rank holds of the matrix
                    x = x.redistribute(params[0].device_mesh, params[0].placements)
                if group["beta2"]:
                    x = self.normalized(x, params, group["beta2"])
                for p, update in zip(params, apart(x, params), strict=True):
                    apply(p, update, group)

    def moved(self, p, group):
        """Update p's momentum -> U, in the group's dtype."""
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        momentum = self.state[p]["momentum_buffer"]
        momentum.lerp_(p.grad, 1 - group["momentum"])
        return p.grad.lerp(momentum, group["momentum"]).to(group["dtype"])

    def normalized(self, x, params, beta2):
        """x (..., m, n) with every row divided by its running size, and the norm that it had."""
        x = x.float()
        rows = x.square().mean(-1, keepdim=True)  # (..., m, 1)
        for p, row in zip(params, apart(rows, params), strict=True):
            if "second_moment" not in self.state[p]:
                self.state[p]["second_moment"] = torch.zeros_like(row)
            self.state[p]["second_moment"].lerp_(row, 1 - beta2)
        seen = together([self.state[p]["second_moment"] for p in params])
        y = x / (seen.sqrt() + 1e-10)
        before, now = (z.norm(dim=(-2, -1), keepdim=True) for z in (x, y))
        return y * (before / (now + 1e-10))


def alone(p):
    """Whether p goes through orthogonal() by itself: a stack, or one that fsdp has spread."""
    return p.dim() == 3 or is_sharded(p)


def together(matrices):
    """[(m, n)] -> (how many, m, n); one that goes alone as it is."""
    return matrices[0] if alone(matrices[0]) else torch.stack(matrices)


def apart(x, params):
    return [x] if alone(params[0]) else x.unbind()


def batches(params):
    """Parameters -> lists of those that go through orthogonal() together: of one shape, no more
    than AT_ONCE numbers or one matrix."""
    shapes, made = {}, []
    for p in params:
        shapes.setdefault(p.shape, []).append(p)
    for of in shapes.values():
        n = 1 if alone(of[0]) else max(1, AT_ONCE // max(1, of[0].numel()))
        made += [of[i : i + n] for i in range(0, len(of), n)]
    return made


def apply(p, update, group):
    """The last line above, on what this rank holds of p (..., m, n)."""
    rate = 0.2 * math.sqrt(max(p.shape[-2:])) * group["lr"]
    if is_sharded(p):
        p, update = p.to_local(), update.to_local()
    decay(p, update, group["lr"] * group["weight_decay"], group["cautious"])
    p.add_(update, alpha=-rate)


def decay(p, update, rate, cautious):
    """p <- p - rate p. Cautious (Chen et al. 2025, arXiv 2510.12402): only where p and the update
    that is taken from it have the same sign, so that decay never works against the update."""
    p.mul_(1 - rate * (p * update >= 0) if cautious else 1 - rate)
