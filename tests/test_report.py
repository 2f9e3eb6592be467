"""report.html: parsed again by Python's own HTML parser."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanoswitch import report

VOID = {"meta", "br", "path", "use", "circle", "line", "image", "rect"}


class Reader(HTMLParser):
    """Collects what a test asks for; tags must close in their order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.cells, self.text = [], [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.links += [attributes[k] for k in ("src", "href", "xlink:href") if k in attributes]
        if tag == "td":
            self.cells.append(attributes["data-key"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def row(*seeds):
    mean = sum(seeds) / len(seeds)
    return {"val_loss": {"mean": mean, "sd": 0.1, "seeds": list(seeds)},
            "seeds": list(range(len(seeds)))}  # fmt: skip


def make_run(**config):
    start = {"git": "abc123", "data_sha256": "d" * 64, "device": "cpu", "dtype": "float32",
             "world": 1, "versions": {"torch": "2.13.0"}}  # fmt: skip
    return SimpleNamespace(config=config, start=start, folder=Path("x"))


def make_page(tmp_path):
    (tmp_path / "curves.svg").write_text(
        '<?xml version="1.0"?><!DOCTYPE svg>\n<svg width="792pt" height="576pt" '
        'viewBox="0 0 792 576"><metadata><a href="http://purl.org/"/></metadata><g></g></svg>'
    )
    rows = {"gpt2": row(5.0, 5.2), '<rope> & "co"': row(4.9, 5.1)}
    found = {"first": "gpt2", "metric": "val_loss", "configs": rows,
             "odd": "</script><script>alert(1)</script>"}  # fmt: skip
    rows = [["gpt2", "1,350,400", "5.1000 ± 0.1", "-"], ['<rope> & "co"', "12", "5.0", "better"]]
    tables = [("Results", ["config", "parameters", "loss", "verdict"], rows, ["A <note>."])]
    groups = {"gpt2": [make_run(lr=6e-4, seed=1, bias=False)], "rope": [make_run(pos="rope")]}
    pictures = [("Curves", tmp_path / "curves.svg"), ("Missing", tmp_path / "missing.svg")]
    return found, report.page(found, tables, groups, pictures)


def test_a_page_is_whole_and_needs_nothing_outside(tmp_path):
    found, text = make_page(tmp_path)
    reader = Reader(text)
    assert not [link for link in reader.links if not link.startswith("#")]
    assert "http" not in re.sub(r"xmlns(:\w+)?=\"[^\"]*\"", "", text)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in (
        reader.tags
    )
    for words in ('<rope> & "co"', "A <note>.", "abc123", "d" * 64, "2.13.0"):
        assert words in reader.text
    assert "Missing" not in reader.text  # a picture that is not there
    data = re.search(r'id="results">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(data) == found  # and no text ends the script early
    assert text.count("</script>") == 2


def test_every_seed_is_a_point_at_its_loss(tmp_path):
    _, text = make_page(tmp_path)
    circles = [tag for name, tag in Reader(text).tags if name == "circle"]
    assert len(circles) == 4
    at = [float(circle["cx"]) for circle in circles]
    losses = [5.0, 5.2, 4.9, 5.1]
    scale = (at[1] - at[0]) / 0.2  # one straight scale for all
    assert at == pytest.approx([at[0] + scale * (loss - 5.0) for loss in losses], abs=0.2)
    assert "seed 1: 5.2000" in text


@pytest.mark.parametrize(
    "shown",
    # each list from the least to the most; what has no value comes last
    [
        ["12", "1,350,400", "12,000,000", "-"],
        ["999", "1.2k", "410k", "1.23M", "2M"],
        ["0m45s", "1m27s", "2h05m", "2d07h"],
        ["-0.3000 [-0.4, -0.2]", "+0.0100 [-0.1, +0.1]", "+0.5", "-"],
        ["0.99 [0.50, 1.20]", "2.52 [0.20, no end]", "120 [2.10, no end]", "no end [2.00, no end]"],
        ["1e-07", "0.0023", "0.14", "1"],
        ["206k tokens, 0m45s", "1.2M tokens, 0m20s", "not yet"],
        ["0.64 GB", "12.00 GB"],
        ["4.1000 ± 0.3", "5.0000 ± 0.1"],
    ],
)
def test_cells_sort_by_their_values(shown):
    keys = [float(report.key(text)) for text in shown]
    assert keys == sorted(keys) and len(set(keys)) == len(keys)


def test_a_command_holds_the_flags_that_are_not_defaults():
    run = make_run(lr=2e-3, pos="rope", bias=False, run_dir="a folder", n_layer=12)
    expected = {"--pos=rope", "--lr=0.002", "'--run_dir=a folder'"}
    words = report.command(run)
    assert words.startswith("python train_gpt2.py --") and all(flag in words for flag in expected)
    assert ("--bias=false" in words) and "n_layer" not in words  # GPT-2's own 12
