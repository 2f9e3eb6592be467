"""HellaSwag: both protocols against texts written out by hand, scores against an unbatched loop.

The slow tests hold every item's prediction against lm-evaluation-harness (pip install lm_eval[hf])
and against a checkout of build-nanogpt, on random models that both load:

    NANOSWITCH_HELLASWAG=hellaswag_val.jsonl NANOSWITCH_PEER=../build-nanogpt \\
        pytest -m slow tests/test_hellaswag.py -s
"""

import importlib.util
import json
import math
import os
import random
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import GPT2_VOCABULARY, grown, tiny, write_jsonl, write_step
from hub_server import point_client_at, serve
from peer_harness import as_transformers, harness_scores, parity_model
from scipy.stats import ttest_rel

import hellaswag
from hellaswag import load_items, tokenize_items
from nanoswitch import cli, scoring
from nanoswitch.scoring import evaluate, predict, score_examples, score_rows
from nanoswitch.tokenizer import get_tokenizer


def item(**changes):
    return {
        "ind": 24,
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man is sitting on a roof.",
        "ctx_b": "he",
        "ctx": "A man is sitting on a roof. he",
        "endings": [
            "is using wrap to wrap a pair of skis.",
            "is ripping level tiles off.",
            "is holding a rubik's cube.",
            "starts pulling up roofing on a roof.",
        ],
        "label": 3,
    } | changes


WORDS = [
    "the",
    "a",
    "man",
    "he",
    "is",
    "on",
    "Wash",
    "slowly",
    "dog",
    ".",
    ",",
    "[step]",
    "[title]",
]


def random_items(n, seed=0):
    rng = random.Random(seed)

    def text(least, most):
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    return [
        item(
            ind=i,
            activity_label=text(1, 3),
            ctx_a=(a := text(3, 20)),
            ctx_b=(b := text(0, 4)),
            ctx=f"{a} {b}",
            endings=[rng.choice(["", "[substeps] "]) + text(1, 12) for _ in range(4)],
            label=rng.randrange(4),
        )
        for i in range(n)
    ]


def scorer(std=0.3, seed=0, **changes):
    """A model of GPT-2's vocabulary to whose weights four endings differ clearly."""
    config = tiny(**dict(block_size=128, n_head=2) | GPT2_VOCABULARY | changes)
    return grown(config, std, seed)


def texts(row):
    """A Row -> its context and its ending, as text."""
    decode, at = get_tokenizer().decode, len(row.ids) - row.scored
    return decode(row.ids[:at]), decode(row.ids[at:])


# ---------------------------------------------------------------------------------------------
# The protocols, written out by hand

PAINT = "[header] How to mix  [title] Get paint. [step] Stir   it."
HARNESS = {
    "ActivityNet": (
        item(),
        "Roof shingle removal: A man is sitting on a roof. He",
        {" starts pulling up roofing on a roof.": 36},
    ),
    "capitalize lowers the rest": (
        item(ctx_b="the USA Team's McDonald"),
        "Roof shingle removal: A man is sitting on a roof. The usa team's mcdonald",
        {},
    ),
    "brackets, one pass over double spaces": (
        item(activity_label="Home", ctx_a=PAINT, ctx_b="", ctx=PAINT),
        "Home: How to mix . Get paint. Stir  it.",
        {},
    ),
    "no second strip: the context's trailing space goes to the ending": (
        item(activity_label="Home", ctx_a="Do it. [step]", ctx_b="", endings=["Wash it."] * 4),
        "Home: Do it.",
        {"  Wash it.": 8},
    ),
    "two trailing spaces": (
        item(ctx_a="Do it.   [step]", ctx_b="", endings=["[substeps] Wash it."] * 4),
        "Roof shingle removal: Do it.",
        {"    Wash it.": 9},
    ),
    "substeps": (
        item(endings=["[substeps] Wash it.", "a", "[step] b [x]", "  [title] Now [step] [y]go  "]),
        "Roof shingle removal: A man is sitting on a roof. He",
        {"  Wash it.": 9, " a": 1, "  b ": 3, "  Now go": 7},
    ),
    "title inside": (
        item(ctx_a="Sew [title] Cut[a]it [not closed", ctx_b="", endings=["Sew. [title] Cut"] * 4),
        "Roof shingle removal: Sew. Cutit [not closed",
        {" Sew.. Cut": 9},
    ),
}


@pytest.mark.parametrize("name", HARNESS)
def test_harness_texts(name):
    record, context, endings = HARNESS[name]
    (example,) = tokenize_items([record], "harness")
    assert {texts(row)[0] for row in example.rows} == {context}
    seen = dict(zip([texts(row)[1] for row in example.rows], example.chars, strict=True))
    assert endings.items() <= seen.items()


def test_harness_encodes_the_whole_text():
    record = item(activity_label="X", ctx_a="Do it. [step]", ctx_b="", endings=["Wash it."] * 4)
    (example,) = tokenize_items([record], "harness")
    assert example.rows[0] == ((55, 25, 2141, 340, 13, 220, 22892, 340, 13), 4)


def test_completion_is_raw_and_encoded_apart():
    (example,) = tokenize_items([item()], "completion")
    roof = (32, 582, 318, 5586, 319, 257, 9753, 13, 339)
    assert example.rows[3] == ((*roof, 4940, 10427, 510, 9753, 278, 319, 257, 9753, 13), 9)
    assert example.chars is None and example.label == 3
    raw = "roof.  [header] [title] x "
    (example,) = tokenize_items([item(ctx=raw, endings=["[substeps]  he "] * 4)], "completion")
    assert texts(example.rows[0]) == (raw, " [substeps]  he ")
    # encoded as one text the two spaces would meet otherwise
    (example,) = tokenize_items([item(ctx="roof. ", endings=["he"] * 4)], "completion")
    assert example.rows[0] == ((305, 1659, 13, 220, 339), 1)


def test_empty_context_is_predicted_from_end_of_text():
    (example,) = tokenize_items([item(ctx="", endings=["he"] * 4)], "completion")
    assert example.rows[0] == ((50256, 339), 1)


# ---------------------------------------------------------------------------------------------
# Scores against a loop over single rows


@torch.no_grad()
def by_hand(model, items, protocol):
    """-> [(pred, pred_norm)], from whole logits of one row at a time, no padding."""
    model.eval()
    result = []
    for record, example in zip(items, tokenize_items(items, protocol), strict=True):
        sums, norms = [], []
        for ending, row in zip(record["endings"], example.rows, strict=True):
            ids = torch.tensor([row.ids[-model.config.block_size - 1 :]])
            logits, _ = model(ids[:, :-1])
            losses = F.cross_entropy(logits[0], ids[0, 1:], reduction="none")[-row.scored :]
            kept = re.sub(r"\[.*?\]", "", ending)
            sums.append(losses.sum().item())
            norms.append(sums[-1] / (len(losses) if protocol == "completion" else len(kept)))
        result.append((sums.index(min(sums)), norms.index(min(norms))))
    return result


def clean_items(n, seed=0):
    """Items on which by_hand's short version of the clean-up is the whole of it."""
    items = random_items(n, seed)
    for record in items:
        for name in ("ctx_a", "ctx_b", "ctx", "activity_label"):
            record[name] = record[name].replace("[title]", "x").replace("[step]", "y")
        record["endings"] = [
            e.replace("[title]", "x").replace("[step]", "y") for e in record["endings"]
        ]
    return items


@pytest.mark.parametrize("protocol", ["completion", "harness"])
@pytest.mark.parametrize("config", [{}, dict(pos="rope", n_kv_head=1, window=7)], ids=str)
def test_predictions_equal_an_unbatched_loop(protocol, config):
    model, items = scorer(**config), clean_items(8)
    expected = by_hand(model, items, protocol)
    assert len(set(expected)) > 3
    examples = tokenize_items(items, protocol)
    assert predict(model, examples).tolist() == [list(pair) for pair in expected]
    score, values = evaluate(model, examples)
    for i, name in enumerate(("acc", "acc_norm")):
        hits = sum(pair[i] == record["label"] for pair, record in zip(expected, items, strict=True))
        assert score[name] == pytest.approx(hits / 8)
    p = score["acc_norm"]
    assert score["n"] == 8 and score["se"] == pytest.approx(math.sqrt(p * (1 - p) / 7))
    assert list(score) == [
        "n", "acc", "acc_se", "acc_norm", "se", "bpb", "bpb_se", "margin", "margin_se"
    ]  # fmt: skip
    lines = score_examples(model, examples)[1]
    assert values[:, 2].tolist() == [line["bpb"] for line in lines]  # the same items, in order
    bits = [bits_by_hand(model, record, protocol) for record in items]
    for line, costs, record in zip(lines, bits, items, strict=True):
        right = costs.pop(record["label"])
        assert line["bpb"] == pytest.approx(right, rel=1e-4)
        assert line["margin"] == pytest.approx(min(costs) - right, abs=1e-3)
    for name in ("bpb", "margin"):
        values = [line[name] for line in lines]
        assert score[name] == pytest.approx(np.mean(values))
        assert score[f"{name}_se"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(8))


def bits_by_hand(model, record, protocol):
    """Bits per byte of each ending: its probability a product over whole logits' softmax."""
    (example,), bits = tokenize_items([record], protocol), []
    for ending, row in zip(record["endings"], example.rows, strict=True):
        text = re.sub(r"\[.*?\]", "", ending) if protocol == "harness" else ending
        with torch.no_grad():
            log2_p = model(torch.tensor([row.ids]))[0][0].double().softmax(-1).log2()
        places = range(len(row.ids) - row.scored, len(row.ids))
        bits.append(-sum(log2_p[i - 1, row.ids[i]].item() for i in places) / len(text.encode()))
    return bits


def test_another_models_scores_are_compared_item_by_item(tmp_path, monkeypatch, capsys):
    """The paired error is that of the differences: SciPy's t statistic gives it back."""
    data = write_jsonl(tmp_path / "val.jsonl", clean_items(8))
    for name, changes in (("a", {}), ("b", dict(pos="rope"))):
        write_step(tmp_path / name, scorer(**changes))
    flags = ("--data", data, "--dtype", "float32", "--protocol", "completion")
    command(monkeypatch, tmp_path / "a", *flags, "--out", tmp_path / "a.json")
    versus = ("--versus", tmp_path / "a.json")
    command(monkeypatch, tmp_path / "b", *flags, *versus, "--out", tmp_path / "b.json")
    a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    found = b["completion"]["versus"]
    for name in ("bpb", "margin"):
        values = [[i["completion"][name] for i in scores["items"]] for scores in (b, a)]
        mean, error = found[name]
        assert mean == pytest.approx(b["completion"][name] - a["completion"][name])
        assert mean / error == pytest.approx(ttest_rel(*values).statistic)
        assert error < math.hypot(b["completion"][f"{name}_se"], a["completion"][f"{name}_se"])
    assert f"minus {tmp_path / 'a.json'}, paired: acc " in capsys.readouterr().out
    for changed, words in ((("--limit", 5), "other items"), (("--protocol", "both"), "no harness")):
        with pytest.raises(SystemExit):
            command(monkeypatch, tmp_path / "b", *flags, *versus, *changed)
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "config",
    [
        dict(pos="alibi", window=6), dict(pos="rope", document_mask=True, n_kv_head=1),
        dict(pos="fire", window=20, window_pattern="SL"),
        dict(attention="linformer", linformer_segment=8, linformer_rank=2),
    ],
    ids=str,
)  # fmt: skip
def test_endings_that_share_a_context_score_as_whole_rows_do(config):
    model = scorer(**config).eval()
    examples = tokenize_items(random_items(5), "harness")
    rows = [row for example in examples for row in example.rows]
    rows += [row._replace(scored=1) for row in rows[:3]]  # a context of its own each
    got = score_rows(model, set(rows), batch_tokens=300)
    for row in rows:
        ids = torch.tensor([row.ids])
        losses = F.cross_entropy(model(ids[:, :-1])[0][0], ids[0, 1:], reduction="none")
        assert got[row] == pytest.approx(losses[-row.scored :].sum().item(), abs=2e-4)


def test_batches_and_order_change_nothing():
    model, examples = scorer(), tokenize_items(random_items(6), "harness")
    rows = {row for example in examples for row in example.rows}
    one = score_rows(model, rows, batch_tokens=1)
    for batch_tokens in (100, 10**6):
        many = score_rows(model, rows, batch_tokens)
        assert many.keys() == one.keys()
        assert max(abs(many[row] - one[row]) for row in rows) < 1e-4
    forward, backward = predict(model, examples, 100), predict(model, examples[::-1], 100)
    assert torch.equal(forward, backward.flip(0))


def test_batches_hold_contexts_of_about_one_length_and_keep_to_the_budget():
    examples = tokenize_items(random_items(40), "completion")
    rows = {row for example in examples for row in example.rows}
    batches = list(scoring.batches(rows, 800))
    assert sorted(row for batch in batches for row in batch) == sorted(rows)
    shortest, computed = [], 0
    for batch in batches:
        contexts = {row.ids[: -row.scored] for row in batch}
        lengths = sorted(map(len, contexts))
        assert lengths[-1] - lengths[0] < 8
        assert lengths[0] * len(contexts) <= 800 or len(contexts) == 1
        shortest.append(lengths[0] // 8)
        computed += lengths[0] * len(contexts)
        parts = list(scoring.parts(batch, lengths[0], 800))
        assert sorted(row for part in parts for row in part) == sorted(batch)
        for part in parts:
            size = len(part) * (max(len(row.ids) for row in part) - lengths[0])
            assert size <= 800 or len(part) == 1
            computed += size
    assert shortest == sorted(shortest, reverse=True)
    assert len(batches) < 30  # of 40 items
    # contexts once and endings without padding would be all there is to compute
    least = sum(len(row.ids) for row in rows)
    least -= sum(3 * len(example.rows[0].context) for example in examples)
    assert computed < 1.4 * least


def test_a_tie_goes_to_the_first():
    model = scorer()
    endings = ["is ripping level tiles off."] * 4
    for protocol in ("completion", "harness"):
        examples = tokenize_items([item(endings=endings), *random_items(5)], protocol)
        assert predict(model, examples, 100)[0].tolist() == [0, 0]


def test_an_ending_of_markers_alone_never_wins_acc_norm():
    # its length is 0: lm-evaluation-harness divides all the same and gets minus infinity
    examples = tokenize_items([item(endings=["[title]", "b", "c", "d"])], "harness")
    assert examples[0].chars == [0, 1, 1, 1]
    assert predict(scorer(), examples)[0, 1] != 0


@pytest.mark.parametrize("protocol", ["completion", "harness"])
def test_rows_beyond_block_size_lose_tokens_on_the_left(protocol, capsys):
    model, items = scorer(block_size=8), clean_items(6)  # some endings alone are longer
    examples = tokenize_items(items, protocol)
    assert any(row.scored > 8 for example in examples for row in example.rows)
    expected = by_hand(model, items, protocol)
    assert predict(model, examples, progress=protocol).tolist() == [list(p) for p in expected]
    assert "longer than this model's 8 positions" in capsys.readouterr().err


def test_a_relative_encoding_runs_beyond_block_size():
    short, long = scorer(pos="rope", block_size=8), scorer(pos="rope", block_size=128)
    examples = tokenize_items(random_items(5), "completion")
    rows = {row for example in examples for row in example.rows}
    assert score_rows(short, rows, 500) == score_rows(long, rows, 500)
    assert torch.equal(predict(short, examples), predict(long, examples))


def test_eval_mode_for_the_while():
    model, examples = scorer(dropout=0.5), tokenize_items(random_items(3), "completion")
    rows = {row for example in examples for row in example.rows}
    model.train()
    noisy = score_rows(model, rows, 500)
    assert model.training and score_rows(model, rows, 500) == noisy
    model.eval()
    assert score_rows(model, rows, 500) == noisy and not model.training


def test_the_callers_autocast_counts():
    model, examples = scorer(), tokenize_items(random_items(3), "completion")
    rows = {row for example in examples for row in example.rows}
    plain = score_rows(model, rows, 500)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = score_rows(model, rows, 500)
    assert rounded != plain
    assert all(abs(rounded[row] / plain[row] - 1) < 0.1 for row in rows)


def test_ranks_share_the_items(monkeypatch):
    model, examples = scorer(), tokenize_items(random_items(7), "completion")
    (alone, values), hits = evaluate(model, examples), []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "all_reduce", hits.append)
        assert evaluate(model, examples, rank=rank, world=3)[0]["n"] == 7
    total = torch.stack(hits).sum(0)  # what all_reduce makes of them
    assert total.numpy() == pytest.approx(values.numpy())
    means = [alone[name] for name in ("acc", "acc_norm", "bpb", "margin")]
    assert total.mean(0).tolist() == pytest.approx(means)
    # more ranks than items: the last one has nothing to score, yet takes part
    evaluate(model, examples[:1], rank=1, world=2)
    assert hits[-1].tolist() == [[0] * 4]


def test_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="this model's vocabulary is 32000"):
        predict(scorer(vocab_size=32000, vocab_used=32000), [])


# ---------------------------------------------------------------------------------------------
# The file


@pytest.mark.parametrize("name", ["val.jsonl", "val.jsonl.gz"])
def test_items_of_a_file(tmp_path, name):
    records = random_items(5)
    path = write_jsonl(tmp_path / name, records)
    assert load_items(str(path)) == records


def test_limit_samples_the_whole_file(tmp_path):
    path = str(write_jsonl(tmp_path / "val.jsonl", random_items(200)))
    inds = [[r["ind"] for r in load_items(path, 50, seed)] for seed in (1, 1, 2)]
    assert inds[0] == inds[1] != inds[2]
    assert len(set(inds[0])) == 50 and inds[0] == sorted(inds[0])
    assert sum(i >= 100 for i in inds[0]) > 10
    assert len(load_items(path, 200)) == len(load_items(path, 10**6)) == 200


def parquet_bytes(tmp_path, records):
    """As the hub's file is: labels are texts, there are more columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [r | {"label": str(r["label"]), "split": "val"} for r in records]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "made.parquet")
    return (tmp_path / "made.parquet").read_bytes()


def test_the_official_file_is_fetched_once(tmp_path, monkeypatch, capsys):
    records = random_items(30)
    data = parquet_bytes(tmp_path, records)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nanoswitch.hub.BACKOFF_SECONDS", 0.01)
    name = "data/validation-00000-of-00001.parquet"
    faults = {"HEAD .parquet": [429], "GET .parquet": [503, "truncate"]}
    with serve({"datasets/Rowan/hellaswag": {name: data}}, faults) as hub:
        point_client_at(hub.url, monkeypatch)
        assert [r["label"] for r in load_items()] == [r["label"] for r in records]
        assert "429" in capsys.readouterr().err
        asked = sum(hub.requests.values())
        sample = load_items("", 10, 3)
        assert len(sample) == 10 and sum(hub.requests.values()) == asked
    assert (tmp_path / "data/hellaswag" / name).read_bytes() == data
    assert load_items("", 10, 3) == sample  # the hub is gone


# ---------------------------------------------------------------------------------------------
# The command


def command(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["hellaswag.py", *map(str, args)])
    cli.run(hellaswag.main)


@pytest.fixture
def files(tmp_path):
    step = write_step(tmp_path / "step", scorer())
    return str(step), str(write_jsonl(tmp_path / "val.jsonl", clean_items(8)))


def test_command_writes_both_scores_and_every_prediction(files, tmp_path, monkeypatch, capsys):
    checkpoint, data = files
    out = tmp_path / "new/score.json"
    command(monkeypatch, checkpoint, "--data", data, "--out", out, "--dtype", "float32")
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(out.read_text())
    assert list(result) == ["n", "completion", "harness", "items"] and result["n"] == 8
    items = clean_items(8)
    assert [(i["ind"], i["label"]) for i in result["items"]] == [
        (r["ind"], r["label"]) for r in items
    ]
    for line, protocol in zip(printed, ("completion", "harness"), strict=True):
        scores = ["acc", "acc_se", "acc_norm", "se", "bpb", "bpb_se", "margin", "margin_se"]
        assert list(result[protocol]) == [*scores, "chance"] and result[protocol]["chance"] == 0.25
        number = r"0\.\d{4} ± 0\.\d{4}"
        assert re.match(rf"{protocol} +acc {number}  acc_norm {number}  bits per byte ", line)
        pairs = predict(scorer(), tokenize_items(items, protocol)).tolist()
        names = ("pred", "pred_norm")
        assert [[i[protocol][name] for name in names] for i in result["items"]] == pairs
        wins = sum(i[protocol]["pred_norm"] == i["label"] for i in result["items"])
        assert result[protocol]["acc_norm"] == pytest.approx(wins / 8)
    assert os.listdir(out.parent) == ["score.json"]


def test_command_of_one_protocol_and_a_sample(files, tmp_path, monkeypatch):
    checkpoint, data = files
    out = tmp_path / "score.json"
    flags = ("--data", data, "--protocol", "harness", "--limit", "5", "--seed", "3", "--out", out)
    command(monkeypatch, checkpoint, *flags, "--batch_tokens=64", "--device=cpu")
    result = json.loads(out.read_text())
    assert list(result) == ["n", "harness", "items"] and result["n"] == 5
    assert [i["ind"] for i in result["items"]] == [i["ind"] for i in load_items(data, 5, 3)]


# ---------------------------------------------------------------------------------------------
# Other people's code on the same file, run by hand


@pytest.fixture(scope="module")
def official():
    path = os.environ.get("NANOSWITCH_HELLASWAG")
    if not path:
        pytest.skip("set NANOSWITCH_HELLASWAG to a HellaSwag validation file (json lines)")
    return os.path.abspath(path)


@pytest.mark.slow
@pytest.mark.parametrize("std", [0.02, 0.2])
def test_every_item_as_lm_evaluation_harness_scores_it(official, std, tmp_path):
    pytest.importorskip("lm_eval")
    model = parity_model(std, seed=1)
    yaml = "hellaswag/hellaswag.yaml"
    theirs, samples = harness_scores(model, tmp_path, yaml, "validation", official)
    items = load_items(official)
    examples = tokenize_items(items, "harness")
    ours, lines = score_examples(model, examples)
    losses = score_rows(model, {row for example in examples for row in example.rows})
    differ, furthest, bits = 0, 0.0, 0.0
    for sample, example, line in zip(samples, examples, lines, strict=True):
        loglik = np.array([float(answer[0]) for answer in sample["filtered_resps"]])
        chars = np.array([len(choice) for choice in sample["doc"]["choices"]])
        assert example.chars == chars.tolist()
        prediction = [line["pred"], line["pred_norm"]]
        theirs_of = [int(loglik.argmax()), int((loglik / chars).argmax())]
        hits = [float(pred == example.label) for pred in prediction]
        differ += prediction != theirs_of or hits != [sample["acc"], sample["acc_norm"]]
        for row, value in zip(example.rows, loglik, strict=True):
            furthest = max(furthest, abs(losses[row] + value))
        size = len(sample["doc"]["choices"][example.label].encode())
        bpb = -loglik[example.label] / math.log(2) / size
        bits = max(bits, abs(line["bpb"] - bpb))
    print(
        f"\nstd {std}: {len(items)} items, {differ} differ, losses within {furthest:.1e}, ", end=""
    )
    print(f"bits per byte within {bits:.1e}, {ours}")
    assert differ == 0 and furthest < 1e-2 and bits < 1e-4
    names = {"acc": "acc,none", "acc_norm": "acc_norm,none", "se": "acc_norm_stderr,none"}
    assert {k: theirs[v] for k, v in names.items()} == pytest.approx({k: ours[k] for k in names})


@pytest.mark.slow
@pytest.mark.parametrize("std", [0.02, 0.2])
def test_every_item_as_build_nanogpt_scores_it(official, std, tmp_path, monkeypatch, capsys):
    if not (peer := os.environ.get("NANOSWITCH_PEER")):
        pytest.skip("set NANOSWITCH_PEER to a checkout of build-nanogpt")
    import tiktoken

    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: get_tokenizer())
    spec = importlib.util.spec_from_file_location("peer", os.path.join(peer, "hellaswag.py"))
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)

    model = parity_model(std, seed=1)
    as_transformers(model).save_pretrained(tmp_path)
    items = load_items(official)
    monkeypatch.setattr(peer, "iterate_examples", lambda split: iter(items))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: None)
    peer.evaluate(str(tmp_path), "cpu")  # its own loop prints the hits of acc_norm item by item
    counts = [int(n) for n in re.findall(r"acc_norm: (\d+)/", capsys.readouterr().out)]
    assert len(counts) == len(items)

    examples = tokenize_items(items, "completion")
    predictions = predict(model, examples)
    hits = [b - a for a, b in zip([0, *counts], counts, strict=False)]
    ours = [int(p == r["label"]) for p, r in zip(predictions[:, 1], items, strict=True)]
    differ = 0
    for record, prediction in zip(items, predictions.tolist(), strict=True):
        _, tokens, mask, _ = peer.render_example(record)
        with torch.no_grad():
            logits, _ = model(tokens)
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        sums = (losses * mask[:, 1:]).sum(1)
        theirs = [int(sums.argmin()), int((sums / mask[:, 1:].sum(1)).argmin())]
        differ += prediction != theirs
    with capsys.disabled():
        score = score_examples(model, examples)[0]
        print(
            f"\nstd {std}: {len(items)} items, {differ} differ, theirs {counts[-1]} right, {score}"
        )
    assert differ == 0 and hits == ours
