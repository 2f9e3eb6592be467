"""nanoswitch/ladder.py on made-up losses whose curve and gain are known."""

import json

import numpy as np
import pytest
from scipy.optimize import curve_fit

from nanoswitch import ladder

E, A, ALPHA = 1.7, 400.0, 0.15
COMPUTE = np.array([1e12, 4e12, 1.6e13, 6.4e13])


def loss_at(compute):
    return E + A * compute**-ALPHA


def made(gain, sd=0.0, seeds=3, rng=None, compute=COMPUTE):
    """Losses of a config that gets gain(C) times as much out of its compute."""
    rng = rng or np.random.default_rng(0)
    return {
        float(c): {s: loss_at(c * gain(c)) + sd * rng.normal() for s in range(seeds)}
        for c in compute
    }


def test_a_fit_finds_the_curve_that_made_the_losses():
    losses = np.stack((loss_at(COMPUTE), 2 * loss_at(COMPUTE)))
    found = ladder.fit(COMPUTE, losses)
    assert found[0] == pytest.approx([E, A, ALPHA], rel=1e-3)
    assert found[1] == pytest.approx([2 * E, 2 * A, ALPHA], rel=1e-3)


def test_a_fit_is_scipys_least_squares():
    loss = loss_at(COMPUTE) + np.array([0.01, -0.02, 0.015, -0.004])
    x = COMPUTE / 1e12
    reference, _ = curve_fit(lambda c, e, a, b: e + a * c**-b, x, loss, p0=(2, 5, 0.2), maxfev=9999)
    e, a, alpha = ladder.fit(COMPUTE, loss[None])[0]
    assert (e, a * 1e12**-alpha, alpha) == pytest.approx(reference, rel=1e-3)


def test_neither_part_of_a_curve_is_negative():
    rising, steep = np.array([3.0, 3.1, 3.2, 3.3]), 9.0 - np.arange(4) * 2.9
    for e, a, _ in ladder.fit(COMPUTE, np.stack((rising, steep))):
        assert e >= 0 and a >= 0


@pytest.mark.parametrize("gain", [0.5, 1.0, 1.4, 3.0])
def test_a_known_gain_is_found_at_every_size(gain):
    losses = {"first": made(lambda c: 1), "row": made(lambda c: gain)}
    row = ladder.ladder(losses, draws=20)["row"]
    for way in ("equal_flops", "equal_tokens"):
        found = row[way]["gain"]
        assert [one["mean"] for one in found] == pytest.approx([gain] * 4, rel=1e-3)
        assert [one["compute"] for one in found] == list(COMPUTE)


def test_a_gain_holds_for_computes_that_are_not_the_firsts():
    losses = {"first": made(lambda c: 1), "row": made(lambda c: 2, compute=COMPUTE * 1.3)}
    row = ladder.ladder(losses, draws=20)["row"]
    assert [one["mean"] for one in row["equal_flops"]["gain"]] == pytest.approx([2] * 4, rel=1e-3)
    tokens = row["equal_tokens"]["gain"]  # 1.3 times the FLOPs a token are not counted
    assert [one["mean"] for one in tokens] == pytest.approx([2.6] * 4, rel=1e-3)


@pytest.mark.parametrize("power, word", [(0.2, "grows"), (-0.2, "shrinks"), (0.0, "holds")])
def test_the_trend_of_a_gain(power, word):
    rng = np.random.default_rng(1)
    losses = {
        "first": made(lambda c: 1, 0.002, 5, rng),
        "row": made(lambda c: 1.5 * (c / 1e13) ** power, 0.002, 5, rng),
    }
    assert ladder.ladder(losses)["row"]["equal_flops"]["trend"] == word


def test_intervals_hold_the_true_gain_about_as_often_as_they_say():
    rng, inside, tables = np.random.default_rng(0), 0, 60
    for _ in range(tables):
        losses = {
            "first": made(lambda c: 1, 0.01, 6, rng), "row": made(lambda c: 1.3, 0.01, 6, rng)
        }  # fmt: skip
        low, high = ladder.ladder(losses, draws=100)["row"]["equal_flops"]["gain"][2]["ci95"]
        inside += (low or 0) <= 1.3 <= (high or np.inf)
    assert 0.83 < inside / tables < 1  # 95%, less what six seeds cannot show


def test_a_seed_that_lowers_all_alike_is_no_noise():
    rng = np.random.default_rng(0)
    luck = rng.normal(size=4) * 0.1
    losses = {
        name: {c: {s: loss_at(c * g) + luck[s] for s in range(4)} for c in COMPUTE}
        for name, g in (("first", 1), ("same", 1))
    }
    for one in ladder.ladder(losses, draws=100)["same"]["equal_flops"]["gain"]:
        assert one["ci95"] == pytest.approx([1, 1], rel=1e-3)


def test_what_no_compute_reaches_is_none_and_json():
    losses = {"first": made(lambda c: 1), "row": {c: {0: 1.0, 1: 1.0, 2: 1.0} for c in COMPUTE}}
    found = ladder.ladder(losses, draws=20)
    assert [one["mean"] for one in found["row"]["equal_flops"]["gain"]] == [None] * 4
    json.dumps(found, allow_nan=False)


def test_two_sizes_are_no_ladder():
    losses = {"first": made(lambda c: 1, compute=COMPUTE[:2])}
    with pytest.raises(ValueError, match="three sizes"):
        ladder.ladder(losses)
