"""python -m nanoswitch.tasks runs/quickstart --task arc_easy --data ARC-Easy-Test.jsonl

Checkpoint -> score on a task that tells small models apart, from a local file (json lines, also
.gz, or parquet) in the format of its authors or of the hub:

    arc_easy  AI2's ARC (Clark et al. 2018, arXiv 1803.05457): a question and its choices
    piqa      PIQA (Bisk et al. 2020, arXiv 1911.11641): a goal and two solutions, with the label
    blimp     BLiMP (Warstadt et al. 2020, arXiv 1912.00582): which of two sentences is English?
    lambada   LAMBADA (Paperno et al. 2016, arXiv 1606.06031): the last word of a text

Texts and tokens are lm-evaluation-harness's (its lambada is lambada_openai), and so are acc, the
answer of the lowest summed loss, and acc_norm, the lowest loss per character. LAMBADA's acc: greedy
decoding writes the word. bpb is the right answer's bits per byte, margin by how much more the best
wrong answer costs: see hellaswag.py. Errors are standard errors over items; chance is the mean of 1
over the number of answers.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from nanoswitch import cli
from nanoswitch.evaluation import Evaluation, check_fields, evaluate_checkpoint, read_items, sample
from nanoswitch.scoring import Example, as_one_text, score_examples, score_words, utf8
from nanoswitch.tokenizer import N_VOCAB, get_tokenizer


@dataclass(kw_only=True)
class Config(Evaluation):
    task: Literal["arc_easy", "piqa", "blimp", "lambada"]
    """see above"""
    data: str
    """the task's file"""


# ----------------------------------------------------------------------------- records


def arc_easy(record):
    check_fields(record, ("question", "answerKey"))
    question, choices = record["question"], record.get("choices")
    if isinstance(question, dict):  # AI2's own file; the hub's has the two side by side
        check_fields(question, ["choices"], ["stem"])
        question, choices = question["stem"], question["choices"]
    if isinstance(choices, list):
        for choice in choices:
            check_fields(choice, ["label"], ["text"])
        choices = {key: [choice[key] for choice in choices] for key in ("text", "label")}
    check_fields(choices, ("text", "label"))
    texts, labels, key = choices["text"], choices["label"], record["answerKey"]
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
        raise ValueError("choices are not a list of texts and as many labels")
    if key not in labels or len(labels) < 2:
        raise ValueError(f"answerKey {key!r} is none of two labels or more: {labels}")
    return f"Question: {question}\nAnswer:", texts, labels.index(key)


def piqa(record):
    check_fields(record, ["label"], ("goal", "sol1", "sol2"))
    if str(record["label"]) not in ("0", "1"):
        raise ValueError(f"label {record['label']!r} is none of 0, 1")
    answers = [record["sol1"], record["sol2"]]
    return f"Question: {record['goal']}\nAnswer:", answers, int(record["label"])


def blimp(record):
    check_fields(record, (), ("sentence_good", "sentence_bad"))
    return "", [record["sentence_good"], record["sentence_bad"]], 0


def lambada(record):
    check_fields(record, (), ["text"])
    context, _, word = record["text"].rpartition(" ")
    return context, [word], 0


TASKS = {"arc_easy": arc_easy, "piqa": piqa, "blimp": blimp, "lambada": lambada}


def load_items(task, path, limit=0, seed=1337):
    """A task's file -> items {"ind": its place in the file, "context", "answers": texts, "label":
    which is right}; limit > 0 takes a random sample. ValueError names the line of what is wrong."""

    def check(record):
        context, answers, label = TASKS[task](record)
        if not all(isinstance(answer, str) and answer for answer in answers):
            raise ValueError(f"an answer of {answers} is empty or no text")
        return dict(context=context, answers=answers, label=label)

    items = [{"ind": i} | item for i, item in enumerate(read_items(path, check))]
    return sample(items, limit, seed)


def tokenize_items(items, vocab=N_VOCAB):
    """-> a list of Examples in GPT-2's first `vocab` ids."""
    encode = get_tokenizer(vocab).encode_ordinary
    return [
        Example(
            as_one_text(item["context"], item["answers"], encode, vocab - 1),
            [len(answer) for answer in item["answers"]],
            item["label"],
            utf8(item["answers"]),
        )
        for item in items
    ]


def main():
    config = cli.parse(Config)
    load = partial(load_items, config.task, config.data, config.limit, config.seed)
    score = score_words if config.task == "lambada" else score_examples
    evaluate_checkpoint(config, load, {config.task: tokenize_items}, score)


if __name__ == "__main__":
    cli.run(main)
