"""Every position encoding against its paper's formula, and what each does beyond block_size."""

import math
from itertools import product

import pytest
import torch
from builders import grown, refused, tiny, tokens

from model import POSITIONS, Alibi, GPTConfig, RoPE, rotate

pytestmark = pytest.mark.usefixtures("one_thread")


def test_sinusoidal_is_vaswani_et_al():
    C, T = 10, 7
    got = POSITIONS["sinusoidal"](tiny(n_embd=C, n_head=1)).embed(torch.arange(T)) * math.sqrt(C)
    for pos, i in product(range(T), range(C // 2)):
        angle = pos / 10000 ** (2 * i / C)
        assert got[pos, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
        assert got[pos, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_alibi_slopes_are_the_authors():
    def slopes(n):
        pos, encoding = torch.arange(5), POSITIONS["alibi"](tiny(n_head=n, n_embd=n * 2))
        bias = encoding.bias(pos, pos)
        for i, j in product(range(5), range(5)):
            if j <= i:  # the future is masked elsewhere
                torch.testing.assert_close(bias[:, i, j], (i - j) * bias[:, 1, 0])
        return [-x for x in bias[:, 1, 0].tolist()]

    eight = [2.0**-h for h in range(1, 9)]  # 1/2, 1/4, ..., 1/256
    assert slopes(8) == pytest.approx(eight)
    between = [2 ** (-8 * h / 16) for h in (1, 3, 5, 7)]  # every other slope of sixteen heads
    assert slopes(12) == pytest.approx(eight + between)


def test_alibi_slopes_of_a_power_of_two_and_of_gpt2s_twelve_heads():
    """Press et al.'s released code: 8 heads' slopes, then every other of 16 heads'."""
    eight = [2.0**-h for h in range(1, 9)]
    assert Alibi(tiny(n_head=8)).slopes().tolist() == eight
    twelve = eight + [2.0**-h for h in (0.5, 1.5, 2.5, 3.5)]
    assert Alibi(GPTConfig(n_head=12)).slopes().tolist() == pytest.approx(twelve)


@pytest.mark.parametrize("pos", ["kerple", "kerple_power"])
def test_kerple_is_chi_et_al(pos):
    encoding = POSITIONS[pos](tiny(n_head=3, n_embd=6))
    r1, r2 = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.3, 1.0, 1.7])
    encoding.log_r1.data, encoding.log_r2.data = r1.log(), r2.log()
    bias = encoding.bias(torch.arange(9), torch.arange(9))
    for h, i in product(range(3), range(9)):
        for j in range(i + 1):
            a, b, d = r1[h].item(), r2[h].item(), i - j
            want = -a * math.log(1 + b * d) if pos == "kerple" else -a * d**b
            assert bias[h, i, j].item() == pytest.approx(want, abs=1e-5)


def test_kerple_gradients_are_finite_and_its_parameters_stay_positive():
    for pos in ("kerple", "kerple_power"):
        encoding = POSITIONS[pos](tiny())
        encoding.bias(torch.arange(9), torch.arange(9)).sum().backward()
        for p in encoding.parameters():
            assert p.dim() == 1 and torch.isfinite(p.grad).all() and (p.exp() > 0).all()
            assert (p.grad != 0).all()


def test_fire_is_li_et_al():
    torch.manual_seed(0)
    encoding = POSITIONS["fire"](tiny(n_head=3, n_embd=6))
    encoding.c.data.fill_(0.7)
    encoding.L.data.fill_(4.0)
    w1, b1 = encoding.mlp[0].weight[:, 0].tolist(), encoding.mlp[0].bias.tolist()
    w2, b2 = encoding.mlp[2].weight.tolist(), encoding.mlp[2].bias.tolist()
    bias = encoding.bias(torch.arange(9), torch.arange(9))
    for i in range(9):
        for j in range(i + 1):
            x = math.log(0.7 * (i - j) + 1) / math.log(0.7 * max(i, 4.0) + 1)
            hidden = [max(0.0, w * x + b) for w, b in zip(w1, b1, strict=True)]
            for h in range(3):
                want = sum(w * y for w, y in zip(w2[h], hidden, strict=True)) + b2[h]
                assert bias[h, i, j].item() == pytest.approx(want, abs=1e-5)


def test_rope_scores_depend_on_the_distance_only():
    rope = RoPE(tiny(n_embd=64))
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).double()

    def score(q_pos, k_pos):
        turned = [
            rotate(x.float(), *rope.rotation(torch.tensor([p])))
            for x, p in ((q, q_pos), (k, k_pos))
        ]
        return (turned[0] * turned[1]).sum().item()

    for distance in (0, 1, 7):
        want = score(distance, 0)
        for shift in (1, 13, 200):
            assert score(distance + shift, shift) == pytest.approx(want, abs=1e-3)
    assert abs(score(1, 0) - score(7, 0)) > 0.01  # and they do depend on it


def test_rope_is_the_identity_at_position_zero_and_keeps_lengths():
    rope, x = RoPE(tiny(n_embd=64)), torch.randn(1, 1, 5, 16)
    turned = rotate(x, *rope.rotation(torch.arange(5)))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_rope_scaling_divides_positions():
    pos = torch.arange(12)
    plain, half = (POSITIONS["rope"](tiny(pos="rope", rope_scaling=s)) for s in (1.0, 2.0))
    for a, b in zip(half.rotation(2 * pos), plain.rotation(pos), strict=True):
        torch.testing.assert_close(a, b)


# ----------------------------------------------------------------------------- beyond block_size


@pytest.mark.parametrize("pos", POSITIONS)
def test_beyond_block_size_runs_or_is_refused_in_one_line(pos):
    model = grown(tiny(pos=pos))
    idx = tokens(model.config, 1, 25)
    if POSITIONS[pos].extrapolates:
        assert torch.isfinite(model(idx)[0]).all()
        assert model.generate(idx, 3).shape == (1, 28)
    else:
        for call in (lambda: model(idx), lambda: model.generate(idx[:, :24], 2)):
            with refused(25, 24, pos, "--pos"):
                call()
        assert model.generate(idx[:, :23], 1).shape == (1, 24)


def test_learned_positions_are_the_ones_refused_beyond_block_size():
    assert not POSITIONS["learned"].extrapolates
    assert POSITIONS["rope"].extrapolates and POSITIONS["none"].extrapolates
