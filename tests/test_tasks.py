"""Task scores against whole logits of one row at a time, on records in the published formats.

The slow tests hold every item's losses and both accuracies against lm-evaluation-harness (pip
install lm_eval[hf]), on random models that both load. NANOSWITCH_TASKS is a folder with files
arc_easy.jsonl, piqa.jsonl, blimp.jsonl and lambada.jsonl; what is missing is skipped:

    NANOSWITCH_TASKS=tasks pytest -m slow tests/test_tasks.py -s
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import GPT2_VOCABULARY, grown, refused, run_main, tiny, write_jsonl, write_step
from peer_harness import harness_scores, parity_model
from scipy.stats import ttest_rel

from nanoswitch import tasks
from nanoswitch.scoring import Example, Row, score_examples, score_rows, score_words
from nanoswitch.tokenizer import get_tokenizer

CHOICES = [{"text": t, "label": k} for t, k in (("café", "A"), ("a dog", "B"), ("tea", "C"))]
ARC = {"question": {"stem": "Who barks?", "choices": CHOICES}, "answerKey": "B"}
HUB_ARC = {
    "question": "Who barks?", "answerKey": "B",
    "choices": {"text": ["café", "a dog", "tea"], "label": ["A", "B", "C"]},
}  # fmt: skip
PIQA = {"goal": "Boil tea", "sol1": "Use a cup.", "sol2": "Use 東京.", "label": 1}
BLIMP = {"sentence_good": "Dogs bark.", "sentence_bad": "Dogs barks."}
RECORDS = {
    "arc_easy": [ARC, HUB_ARC | {"answerKey": "A"}],
    "piqa": [PIQA, PIQA | {"goal": "Wake up", "label": "0"}],
    "blimp": [BLIMP, BLIMP | {"sentence_good": "A man is on the roof."}],
    "lambada": [{"text": "I don't care about  signs"}, {"text": "He gave it to Harlin"}],
}
TEXTS = {  # the context, the answers and which is right
    "arc_easy": [
        ("Question: Who barks?\nAnswer:", ["café", "a dog", "tea"], 1),
        ("Question: Who barks?\nAnswer:", ["café", "a dog", "tea"], 0),
    ],
    "piqa": [
        ("Question: Boil tea\nAnswer:", ["Use a cup.", "Use 東京."], 1),
        ("Question: Wake up\nAnswer:", ["Use a cup.", "Use 東京."], 0),
    ],
    "blimp": [
        ("", ["Dogs bark.", "Dogs barks."], 0),
        ("", ["A man is on the roof.", "Dogs barks."], 0),
    ],
    "lambada": [("I don't care about", [" signs"], 0), ("He gave it to", ["Harlin"], 0)],
}


def scorer(**changes):
    config = dict(block_size=64, n_head=2) | GPT2_VOCABULARY | changes
    return grown(tiny(**config), 0.3, 0).eval()


@torch.no_grad()
def logits_and_targets(model, context, answer):
    encode = get_tokenizer().encode_ordinary
    start = encode(context) or [50256]
    ids = torch.tensor([start + encode(" " + answer)])
    return model(ids[:, :-1])[0][0, len(start) - 1 :], ids[0, len(start) :]


@pytest.mark.parametrize("task", TEXTS)
def test_scores_by_their_formulas(task, tmp_path):
    data = write_jsonl(tmp_path / "items.jsonl", RECORDS[task])
    examples = tasks.tokenize_items(tasks.load_items(task, str(data)))
    model, correct, bits = scorer(), {"acc": [], "acc_norm": []}, []
    scored = score_words if task == "lambada" else score_examples
    found, lines = scored(model, examples)
    for (context, answers, label), line in zip(TEXTS[task], lines, strict=True):
        pairs = [logits_and_targets(model, context, answer) for answer in answers]
        losses = [F.cross_entropy(*pair, reduction="sum").item() for pair in pairs]
        normed = [loss / len(text) for loss, text in zip(losses, answers, strict=True)]
        sizes = [len(text.strip().encode()) for text in answers]
        costs = [loss / math.log(2) / size for loss, size in zip(losses, sizes, strict=True)]
        bits.append(costs.pop(label))
        assert line["bpb"] == pytest.approx(bits[-1], rel=1e-4)
        if task == "lambada":
            logits, targets = pairs[0]
            correct["acc"].append(bool((logits.argmax(1) == targets).all()))
        else:
            assert line["margin"] == pytest.approx(min(costs) - bits[-1], abs=1e-3)
            correct["acc"].append(losses.index(min(losses)) == label)
            correct["acc_norm"].append(normed.index(min(normed)) == label)
    for name, hits in correct.items():
        assert found.get(name) == (pytest.approx(sum(hits) / 2) if hits else None)
    assert found["bpb"] == pytest.approx(sum(bits) / 2, rel=1e-4)
    assert found["bpb_se"] == pytest.approx(abs(bits[0] - bits[1]) / 2, rel=1e-3)  # sd / sqrt(2)


@torch.no_grad()
def test_greedy_words_of_several_tokens_count_only_whole():
    """Words that greedy decoding writes are right; with one other token they are wrong."""
    model, decode = scorer(), get_tokenizer().decode
    starts = [[32, 582, 318], [464], [5, 6, 7, 8, 9, 10, 11]]
    rows = [model.generate(torch.tensor([start]), 4, top_k=1)[0].tolist() for start in starts]
    examples = [
        Example([Row(tuple(ids), 4)], None, 0, [len(decode(ids[-4:]).encode())])
        for whole in rows
        for ids in [whole, *([*whole[:-i], 11, *whole[len(whole) - i + 1 :]] for i in (1, 3, 4))]
    ]
    for batch_tokens in (1, 4096):
        found, lines = score_words(model, examples, batch_tokens)
        assert [line["pred"] for line in lines] == [0, -1, -1, -1] * 3
        assert found["acc"] == 0.25
        assert found["acc_se"] == pytest.approx(math.sqrt(0.25 * 0.75 / 11))


@torch.no_grad()
def test_words_cost_one_product_of_the_head(monkeypatch):
    """Over 50,304 rows it is most of a small model's work: loss and greedy word share it."""
    rows, linear = [], F.linear

    def counted(x, weight, bias=None):
        rows.append(x.numel() // x.size(-1) if len(weight) == 50304 else 0)
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", counted)
    examples = tasks.tokenize_items([
        {"context": "He gave it to", "answers": ["Harlin"], "label": 0},
        {"context": "Who", "answers": ["barks"], "label": 0},
    ])  # fmt: skip
    score_words(scorer(logit_softcap=2.0), examples)
    assert sum(rows) == sum(row.scored for example in examples for row in example.rows)


def test_command_with_versus_chance_and_cut_items(tmp_path, capsys):
    """The paired error is that of the differences: SciPy's t statistic gives it back."""
    data = write_jsonl(tmp_path / "items.jsonl", RECORDS["arc_easy"] * 4 + [HUB_ARC] * 3)
    flags = ("--task=arc_easy", "--data", data, "--dtype=float32")
    for name, changes in (("a", {}), ("b", dict(pos="rope", n_layer=1))):
        write_step(tmp_path / name, scorer(**changes))
        versus = ("--versus", tmp_path / "a.json") if name == "b" else ()
        out = ("--out", tmp_path / f"{name}.json")
        assert run_main(tasks.main, tmp_path / name, *flags, *versus, *out) == 0
    a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert b["arc_easy"]["chance"] == pytest.approx(1 / 3) and b["n"] == 11
    values = [[i["arc_easy"]["bpb"] for i in scores["items"]] for scores in (b, a)]
    mean, error = b["arc_easy"]["versus"]["bpb"]
    assert mean / error == pytest.approx(ttest_rel(*values).statistic)
    assert "minus" in capsys.readouterr().out
    write_step(tmp_path / "short", scorer(block_size=4))
    assert run_main(tasks.main, tmp_path / "short", *flags, "--limit=5") == 0
    err = capsys.readouterr().err
    assert "arc_easy: 5 items are longer than this model's 4 positions: cut on the left" in err


@pytest.mark.parametrize(
    "task, record, words",
    [
        ("piqa", {"goal": "x"}, ["label, sol1, sol2"]),
        ("piqa", PIQA | {"label": -1}, ["label -1", "0, 1"]),
        ("piqa", PIQA | {"sol1": ""}, ["empty"]),
        ("arc_easy", ARC | {"answerKey": "D"}, ["'D'", "'C'"]),
        ("arc_easy", {"question": "Who?", "answerKey": "A"}, ["None"]),
        ("arc_easy", HUB_ARC | {"choices": ["a", "b"]}, ["not an item but a"]),
        ("arc_easy", HUB_ARC | {"choices": {"text": ["a"], "label": ["A", "B"]}}, ["as many"]),
        ("blimp", [1], ["not an item", "[1]"]),
        ("blimp", BLIMP | {"sentence_bad": 1}, ["sentence_bad is not a text"]),
        ("lambada", {"text": "ends with a space "}, ["empty"]),
    ],
)
def test_a_bad_record_is_named(task, record, words, tmp_path):
    path = write_jsonl(tmp_path / "items.jsonl", [*RECORDS[task], record])
    with refused("items.jsonl, line 3: ", *words):
        tasks.load_items(task, str(path))


def test_out_is_checked_first(tmp_path, capsys):
    assert run_main(tasks.main, "none", "--task=piqa", "--data=none", "--out", tmp_path) != 0
    err = capsys.readouterr().err
    assert "is a folder" in err and err.count("\n") == 1


# ---------------------------------------------------------------------------------------------
# lm-evaluation-harness on the same files, run by hand

YAML = {  # its own task file, and the split of it that is scored
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "piqa": ("piqa/piqa.yaml", "validation"),
    "blimp": ("blimp/_template_yaml", "validation"),
    "lambada": ("lambada/lambada_openai.yaml", "test"),
}


@torch.no_grad()
def with_words_of(model, records):
    """LAMBADA's records, of every other the last word the one that the model would write."""
    tokenizer, found = get_tokenizer(), []
    for i, record in enumerate(records):
        context = record["text"].rpartition(" ")[0]
        ids = torch.tensor([tokenizer.encode_ordinary(context)])
        word = tokenizer.decode([model(ids)[0][0, -1].argmax().item()])
        fits = i % 2 and word[0] == " " and word[1:].isalpha()
        found.append({"text": context + word} if fits else record)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("std", [0.02, 0.2])
@pytest.mark.parametrize("task", YAML)
def test_every_item_as_lm_evaluation_harness_scores_it(task, std, tmp_path):
    """Every answer's loss, which answers are chosen, which words greedy decoding writes, and the
    figures over all items with their errors."""
    pytest.importorskip("lm_eval")
    data = Path(os.environ.get("NANOSWITCH_TASKS", ""), f"{task}.jsonl").absolute()
    if not data.exists():
        pytest.skip(f"set NANOSWITCH_TASKS to a folder with {task}.jsonl")
    model = parity_model(std, seed=1)
    if task == "lambada":  # or a random model would write none of the words
        records = with_words_of(model, map(json.loads, data.read_text().splitlines()))
        data = write_jsonl(tmp_path / "words.jsonl", records)
    theirs, samples = harness_scores(model, tmp_path, *YAML[task], data)
    examples = tasks.tokenize_items(tasks.load_items(task, str(data)))
    ours, lines = (score_words if task == "lambada" else score_examples)(model, examples)
    losses, furthest = score_rows(model, {row for e in examples for row in e.rows}), 0.0
    hits = {"pred": "acc"} | ({"pred_norm": "acc_norm"} if "acc_norm,none" in theirs else {})
    for sample, example, line in zip(samples, examples, lines, strict=True):
        answers = sample["resps"]
        loglik = np.array([float(answer[0][0]) for answer in answers])
        mine = np.array([losses[row] for row in example.rows])
        furthest = max(furthest, np.abs(mine + loglik).max())
        np.testing.assert_allclose(-mine, loglik, rtol=1e-5, atol=1e-4)
        if task == "lambada":
            assert line["pred"] == (0 if str(answers[0][0][1]) == "True" else -1)
        bits = -loglik[example.label] / math.log(2) / example.bytes[example.label]
        assert line["bpb"] == pytest.approx(bits, rel=1e-5)
        for key, name in hits.items():
            assert (line[key] == example.label) == sample[name]
    print(f"\n{task}, std {std}: {len(samples)} items, losses within {furthest:.1e}, {ours}")
    for name in hits.values():
        assert 0 < ours[name] == pytest.approx(theirs[f"{name},none"])
        error = theirs[f"{name}_stderr,none"]
        assert ours["se" if name == "acc_norm" else f"{name}_se"] == pytest.approx(error)
    if task == "lambada":
        nats = [losses[row] for example in examples for row in example.rows]
        assert math.exp(np.mean(nats)) == pytest.approx(theirs["perplexity,none"], rel=1e-4)
