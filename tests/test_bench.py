"""bench.py: both sides must agree before anything is timed, and the figures have DESIGN's form.

The peer here is a stand-in with the peers' file names and signatures; the real ones are checkouts
that a user gives as --peer."""

import json
import textwrap

import pytest

import bench
from nanoswitch import cli

PEER = """
    import torch, model
    open({canary!r}, "w").write("the script's own work was run")

    class GPTConfig(model.GPTConfig):
        pass

    class GPT(model.GPT):
        def forward(self, idx, targets=None):
            logits, _ = super().forward(idx)
            if targets is None:
                return logits, None
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            return logits, loss + {error}

        def configure_optimizers(self, decay, rate, *rest):
            return torch.optim.AdamW(self.parameters(), lr=rate)

    def get_most_likely_row(tokens, mask, logits):
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        mask = mask[:, 1:]
        return ((losses * mask).sum(1) / mask.sum(1)).argmin().item()
"""
RENDER = """
    import torch
    def render_example(example):
        rows = [(enc.encode(example["ctx"]), enc.encode(" " + e)) for e in example["endings"]]
        longest = max(len(c) + len(e) for c, e in rows)
        pad = lambda row: row + [0] * (longest - len(row))
        tokens = torch.tensor([pad(c + e) for c, e in rows])
        mask = torch.tensor([pad([0] * len(c) + [1] * len(e)) for c, e in rows])
        return None, tokens, mask, example["label"]
"""
SMALL = ["--n_layer=1", "--n_embd=64", "--block_size=64", "--rounds=1", "--dtype=float32"]


@pytest.fixture
def peer(tmp_path):
    def make(error=0.0, script="train_gpt2.py", mark="hellaswag.py"):
        folder = tmp_path / "peer"
        folder.mkdir()
        text = PEER.format(canary=str(tmp_path / "canary"), error=error)
        (folder / mark).write_text(textwrap.dedent(RENDER))
        (folder / script).write_text(textwrap.dedent(text))
        return folder

    return make


def run(*argv):
    config = cli.parse(bench.BenchConfig, argv=[*argv, *SMALL])
    return bench.WORKS[config.work](config)


def test_train_gives_rows_in_the_documented_form(peer, tmp_path, monkeypatch):
    out = tmp_path / "train.json"
    argv = ["bench.py", "train", f"--peer={peer()}", "--micro_batch=2", f"--out={out}", *SMALL]
    monkeypatch.setattr("sys.argv", argv)
    bench.main()
    rows = json.loads(out.read_text())
    keys = {"work", "metric", "ours", "peer", "ratio", "rounds", "machine", "versions"}
    assert all(keys <= row.keys() and row["work"] == "train" for row in rows)
    speed = rows[0]
    assert speed["metric"] == "tokens/s" and speed["ratio"] == speed["ours"] / speed["peer"] > 0
    assert speed["rounds"] == 1 and speed["versions"]["peer"] == "build-nanogpt"
    assert [row["metric"].split()[0].strip(",") for row in rows[1:]] == [
        "peak", "start-up", "share", "reading", "validation",
    ]  # fmt: skip
    assert not (tmp_path / "canary").exists()  # only its imports, classes and functions were


def test_a_table_shows_large_figures_in_full():
    row = dict(work="train", machine="a card", rounds=5, versions={"torch": "2", "peer": None})
    rows = [row | dict(metric="tokens/s", ours=1040.4, peer=521.25, ratio=1.996)]
    rows.append(row | dict(metric="s", ours=0.52, peer=None, ratio=None))
    lines = [line.split() for line in bench.table(rows).splitlines()[1:3]]
    assert lines == [
        ["train", "tokens/s", "1,040", "521.2", "1.996"],
        ["train", "s", "0.52", "-", "-"],
    ]


@pytest.mark.slow  # a second whole bench
def test_sides_that_disagree_are_not_timed(peer, capsys):
    with pytest.raises(ValueError, match=r"differ in the loss .* nothing was timed"):
        run("train", f"--peer={peer(error=0.01)}", "--micro_batch=2")
    assert "round" not in capsys.readouterr().out


def write_items(path, n):
    items = [
        {
            "ind": i, "activity_label": "Roofing", "ctx_a": "A man sits on a roof.", "ctx_b": "he",
            "ctx": f"A man sits on roof {i}. he", "label": 3,
            "endings": ["is using wrap.", "rips tiles off.", "holds a cube", "starts pulling up"],
        }
        for i in range(n)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, items)))
    return path


def test_hellaswag_agrees_with_the_stand_in(peer, tmp_path):
    data = write_items(tmp_path / "items.jsonl", 3)
    (row,) = run("hellaswag", f"--peer={peer()}", f"--data={data}", "--items=3")
    assert row["metric"] == "items/s" and row["ours"] > 0 and row["peer"] > 0


def test_a_peer_scores_some_of_very_many_items_and_only_once(tmp_path, monkeypatch):
    """Both sides in this process, with their calls counted."""
    asked = []

    class Side:
        def __init__(self, side, config):
            self.side, self.rates = side, []
            self.result = [[1.0, 2.0, 3.0, 4.0]] if side is bench.we_score else [0]

        def round(self):
            asked.append(self.side.__name__)
            self.rates.append(len(asked))

        def close(self):
            return 0

    monkeypatch.setattr(bench, "Side", Side)
    monkeypatch.setattr(bench, "peer_name", lambda config: "build-nanogpt")
    data = write_items(tmp_path / "items.jsonl", 30)
    for most, peers in ((10, 1), (30, 4)):
        asked.clear()
        monkeypatch.setattr(bench, "PEER_ITEMS", most)
        config = bench.BenchConfig("hellaswag", peer="there", data=str(data), items=30, rounds=3)
        (row,) = bench.score(config)
        assert asked.count("we_score") == 4 and asked.count("peer_scores") == peers
        assert row["peer"] == 2 if peers == 1 else row["peer"] == 6
    monkeypatch.setattr(bench, "PEER_ITEMS", 1000)
    for n, most in ((40, 40), (1000, 1000), (1001, 501), (10042, 913)):
        assert len(bench.both_score(range(n))) == most


def test_only_near_ties_may_be_decided_otherwise():
    ours = [[3.0, 2.5, 2.5 + 4e-5, 4.0], [1.0, 2.0, 3.0, 4.0]]
    bench.same_choices(ours, [1, 0])
    bench.same_choices(ours, [2, 0])
    for wrong in ([0, 0], [1, 1]):
        with pytest.raises(ValueError, match=r"differ in the predictions .* nothing was timed"):
            bench.same_choices(ours, wrong)
    with pytest.raises(ValueError, match="nothing was timed"):
        bench.same_choices([[float("nan")] * 4], [0])


def test_a_folder_that_is_no_peer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no checkout of build-nanogpt or nanoGPT"):
        bench.peer_name(bench.BenchConfig("train", peer=str(tmp_path)))


@pytest.mark.slow  # a second whole bench
def test_a_side_that_fails_says_why(peer):
    folder = peer()
    (folder / "train_gpt2.py").write_text("class GPTConfig: pass\n")
    with pytest.raises(ValueError, match="peer_trains: "):
        run("train", f"--peer={folder}", "--micro_batch=2")
