"""python hellaswag.py runs/quickstart --out score.json

Checkpoint -> HellaSwag score (Zellers et al. 2019): which of four endings continues a text best?
CHECKPOINT is a run or step folder, a Hugging Face folder, or a hub name such as gpt2. There are
two protocols, and figures of one are not comparable with figures of the other:

    completion  the raw text, as build-nanogpt and llm.c score it; acc_norm takes the mean loss per
                token (gpt2 scores acc 0.2859, acc_norm 0.2955)
    harness     the activity's label first and WikiHow's markers cleaned away, as
                lm-evaluation-harness scores it; acc_norm divides by characters (gpt2 scores acc
                0.2892, acc_norm 0.3114)

acc takes the ending of the lowest summed loss; a tie goes to the first ending. Two more figures
move before accuracy does: bpb, the bits per byte of the right ending, -log2 p(ending | context) /
its UTF-8 bytes (as in Heineman et al. 2025, arXiv 2508.13144), and margin, by how many bits per
byte the best wrong ending costs more than the right one. Errors are standard errors over the items:
of acc_norm sqrt(p (1 - p) / (n - 1)), as in lm-evaluation-harness, 0.0046 on all 10,042. --versus
takes another model's --out of the same items: the difference, with the error of paired items.
"""

import os
import re
from dataclasses import dataclass
from functools import partial
from typing import Literal

from nanoswitch import cli
from nanoswitch.evaluation import Evaluation, check_fields, evaluate_checkpoint, read_items, sample
from nanoswitch.hub import hub_download
from nanoswitch.scoring import Example, as_one_text, join, utf8
from nanoswitch.tokenizer import EOT, N_VOCAB, get_tokenizer

DATASET, DATA_FILE = "Rowan/hellaswag", "data/validation-00000-of-00001.parquet"
DATA_FOLDER = "data/hellaswag"
OFFLINE = "without a network give HellaSwag's validation file (hellaswag_val.jsonl) as --data FILE"
TEXT_FIELDS = ("activity_label", "ctx_a", "ctx_b", "ctx")


@dataclass
class Config(Evaluation):
    data: str = ""
    """validation file: json lines, also .gz, or parquet; empty fetches the official one once"""
    protocol: Literal["completion", "harness", "both"] = "both"
    """which texts are scored and how; see above"""


# ---------------------------------------------------------------------------------------------
# Items: the file's dicts, checked


def load_items(path="", limit=0, seed=1337):
    """The items of a validation file (empty: the official one) in its order: a list of dicts with
    ind, activity_label, ctx_a, ctx_b, ctx, endings (4 texts) and label (int).

    limit > 0 takes a random sample of the whole file, whose first third is ActivityNet and whose
    rest is WikiHow. ValueError names the file and line of what is wrong.
    """
    return sample(read_items(path or official_file(), check_item), limit, seed)


def official_file():
    path = os.path.join(DATA_FOLDER, DATA_FILE)
    if os.path.exists(path):
        return path
    check = partial(read_items, check=check_item)
    return hub_download(DATASET, DATA_FILE, DATA_FOLDER, check=check, offline=OFFLINE)


def check_item(record):
    check_fields(record, ("ind", "endings", "label"), TEXT_FIELDS)
    endings, label = record["endings"], record["label"]
    if not isinstance(endings, list) or [type(e) for e in endings] != [str] * 4:
        raise ValueError("endings is not a list of four texts")
    if str(label) not in ("0", "1", "2", "3"):  # the hub's file holds labels as text
        raise ValueError(f"label {label!r} is none of 0, 1, 2, 3")
    return record | {"label": int(label)}


# ---------------------------------------------------------------------------------------------
# Protocols: an item -> four rows of tokens


def tokenize_items(items, protocol, vocab=N_VOCAB):
    """Items -> a list of Examples for "completion" or "harness", in GPT-2's first `vocab` ids (see
    get_tokenizer). Worth doing once."""
    encode = get_tokenizer(vocab).encode_ordinary
    return [PROTOCOLS[protocol](item, encode, vocab - 1) for item in items]


def completion(item, encode, eot=EOT):
    """Context and ending are encoded apart, and nothing is cleaned."""
    context = encode(item["ctx"])
    endings = [encode(" " + ending) for ending in item["endings"]]
    rows = [join(context, ending, eot) for ending in endings]
    return Example(rows, None, item["label"], utf8(item["endings"]))


def harness(item, encode, eot=EOT):
    """Context and ending are encoded as one text, cut where the context's own tokens end."""
    context = clean(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
    endings = [clean(ending) for ending in item["endings"]]
    rows = as_one_text(context, endings, encode, eot)
    return Example(rows, [len(ending) for ending in endings], item["label"], utf8(endings))


PROTOCOLS = {"completion": completion, "harness": harness}


def clean(text):
    """Take WikiHow's markers out: "[header] Mix it. [title] Stir it." -> " Mix it. . Stir it."

    What they leave behind stays: published figures were scored with every such space."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# ---------------------------------------------------------------------------------------------
# The command


def main():
    config = cli.parse(Config)
    protocols = PROTOCOLS if config.protocol == "both" else [config.protocol]
    evaluate_checkpoint(
        config,
        lambda: load_items(config.data, config.limit, config.seed),
        {name: partial(tokenize_items, protocol=name) for name in protocols},
    )


if __name__ == "__main__":
    cli.run(main)
