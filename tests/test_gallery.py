"""variants/README.md is what the committed docstrings, proof cards and ladders give; and on made-up
ones the page says what is in them."""

import json
import re

import pytest
import test_ladder
from test_ladder import climb  # noqa: F401  a fixture

from model import GPTConfig
from nanoswitch import gallery
from nanoswitch.counts import num_params


def test_the_page_is_up_to_date():
    again = "run: python -m nanoswitch.gallery"
    assert (gallery.ROOT / "variants/README.md").read_text() == gallery.page(), again


def test_every_committed_card_is_of_the_variant_as_it_is():
    for path in gallery.ROOT.glob("experiments/variants/*.json"):
        card = gallery.read_json(path)
        assert card["name"] == path.stem
        for proof in card["proofs"]:
            without, with_it = proof["costs"]["parameters"]
            assert num_params(GPTConfig(**{"pos": "rope"} | proof["choice"])) == with_it
            assert num_params(GPTConfig(pos="rope")) == without


def rows(text):
    """Markdown -> {first cell without its link: the other cells} of all its tables' rows."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    found = {}
    for name, *cells in lines:
        found.setdefault(re.sub(r"\[(\w+)\].*", r"\1", name), []).append(cells)
    return found


def test_a_card_is_shown_with_what_fails_and_what_it_costs(tmp_path):
    def proof(checks, refuses, factor):
        names = (
            "parameters",
            "training FLOPs a token",
            "cache bytes a token",
            "bytes of a sequence",
        )
        return {
            "choice": {}, "refuses": refuses, "speed": None,
            "checks": {str(i): {"holds": held, "says": ""} for i, held in enumerate(checks)},
            "costs": {name: [1000, round(1000 * factor)] for name in names},
        }  # fmt: skip

    proofs = [proof([True, True], ["no windows"], 1.5), proof([True, False], ["no windows"], 1.25)]
    (tmp_path / "x0.json").write_text(json.dumps({"name": "x0", "proofs": proofs}))
    text = gallery.page(tmp_path)
    (cells,) = rows(text)["x0"]
    assert cells == [gallery.about("x0"), "3 of 4", "+25.0%", "+25.0%", "+25.0%", "+25.0%"]
    assert "embedding, carried along" in cells[0] and "- x0: no windows\n" in text
    assert rows(text)["xsa"][0][1:] == ["not yet run", *"----"]
    assert "Without a row: " in text and rows(text)["nope"][0][1:] == list("-----")


GAIN = {"llama": 1.0, "x0": 2.0, "post": 0.4}


def test_a_ladder_is_shown_at_its_two_smallest_sizes(climb, tmp_path, monkeypatch):  # noqa: F811
    for name, gain in GAIN.items():
        (tmp_path / f"{name}.toml").write_text("weight_decay = 0.2\n")
        monkeypatch.setitem(test_ladder.BEST, name, 0.01)
        monkeypatch.setitem(test_ladder.GAIN, name, gain)
    parts = dict(tune='""', pos='"rope"', bias="false")
    climb("--bias", "true", names=tuple(GAIN), folder="experiments/some", **parts)
    text = gallery.page(tmp_path / "experiments")
    found = json.loads((tmp_path / "experiments/some/results.json").read_text())["ladder"]
    small, second = test_ladder.WIDTHS[:2]
    assert f"difference at {small} | gain at {small} | difference at {second} |" in text
    for name, word in (("x0", "better"), ("post", "worse")):
        *cells, says = rows(text)[name][1]
        for size, change, gain in zip(found["sizes"], cells[::2], cells[1::2], strict=False):
            losses = [size["results"]["configs"][n]["val_loss"]["mean"] for n in (name, "llama")]
            mean, low, high = map(float, re.findall(r"[+-][\d.]+", change))
            assert mean == pytest.approx(losses[0] - losses[1], abs=1e-4) and low < mean < high
            mean, low, high = map(float, re.findall(r"[\d.]+", gain))
            assert mean == pytest.approx(GAIN[name], rel=0.25) and low <= mean <= high
        assert says == word
    assert "Kept, though this table shows no gain but a loss: post." in text
    without = text.split("Without a row: ")[1]
    assert "x0" not in without and "xsa" in without
    assert (
        "Beside llama (pos rope, bias true) at n_embd" in text
        and "3 seeds; each config at the same rates" in text
    )


@pytest.mark.parametrize(
    "verdicts, says",
    [
        (["better", "better"], "better"),
        (["undecided", "better"], "better at one size"),
        (["worse", "equal"], "worse at one size"),
        (["better", "worse"], "better at one size, worse at another"),
        (["equal", "undecided"], "no gain shown"),
        ([None, None], "no gain shown"),
    ],
)
def test_what_two_sizes_say(verdicts, says):
    assert gallery.together(verdicts) == says
