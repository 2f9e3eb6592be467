"""python hellaswag.py runs/quickstart --out score.json

Checkpoint -> HellaSwag score (Zellers et al. 2019): which of four endings continues a text best?
CHECKPOINT is a run or step folder, a Hugging Face folder, or a hub name such as gpt2. There are
two protocols, and figures of one are not comparable with figures of the other:

completion  the raw text, as build-nanogpt and llm.c score it; acc_norm takes the mean loss per
            token (gpt2 scores acc 0.2859, acc_norm 0.2955)
harness     the activity's label first and WikiHow's markers cleaned away, as lm-evaluation-harness
            scores it; acc_norm divides by characters (gpt2 scores acc 0.2892, acc_norm 0.3114)

acc takes the ending of the lowest summed loss; a tie goes to the first ending. Two more figures
move before accuracy does: bpb, the bits per byte of the right ending, -log2 p(ending | context) /
its UTF-8 bytes (as in Heineman et al. 2025, arXiv 2508.13144), and margin, by how many bits per
byte the best wrong ending costs more than the right one. Errors are standard errors over the items:
of acc_norm sqrt(p (1 - p) / (n - 1)), as in lm-evaluation-harness, 0.0046 on all 10,042. --versus
takes another model's --out of the same items: the difference, with the error of paired items.
"""

import gzip
import json
import os
import random
import re
import zlib
from dataclasses import dataclass
from typing import Annotated, Literal

import pyarrow.parquet as pq
from tyro.conf import Positional, arg

from model import GPT
from nanoswitch import cli
from nanoswitch.device import autocast, pick_device, pick_dtype, tune_cpu
from nanoswitch.files import pointer_hint, read_json, write_beside
from nanoswitch.hub import hub_download
from nanoswitch.load import vocabulary_of
from nanoswitch.scoring import Example, join, paired, score_examples, utf8
from nanoswitch.tokenizer import EOT, N_VOCAB, get_tokenizer

DATASET, DATA_FILE = "Rowan/hellaswag", "data/validation-00000-of-00001.parquet"
DATA_FOLDER = "data/hellaswag"
OFFLINE = "without a network give HellaSwag's validation file (hellaswag_val.jsonl) as --data FILE"
TEXT_FIELDS = ("activity_label", "ctx_a", "ctx_b", "ctx")


@dataclass
class Config:
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")]
    """run folder (its latest step), step folder, Hugging Face folder, or hub name such as gpt2"""
    data: str = ""
    """validation file: json lines, also .gz, or parquet; empty fetches the official one once"""
    protocol: Literal["completion", "harness", "both"] = "both"
    """which texts are scored and how; see above"""
    limit: int = 0
    """score a random sample of this many items; 0 = all of them"""
    seed: int = 1337
    """same seed, same sample"""
    out: str = ""
    """JSON file for the scores and every item's predictions"""
    versus: str = ""
    """another model's --out FILE of the same items: shows the paired difference, this minus that"""
    batch_tokens: int = 0
    """token positions in one batch, padding included; 0 = 32768 on cuda, else 4096"""
    device: str = "auto"
    """auto takes cuda, else mps, else cpu"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of the matrix products; auto takes what is fast on the device"""

    def __post_init__(self):
        if min(self.limit, self.seed, self.batch_tokens) < 0:
            raise ValueError("limit, seed and batch_tokens must be 0 or more")


# ---------------------------------------------------------------------------------------------
# Items: the file's dicts, checked


def load_items(path="", limit=0, seed=1337):
    """The items of a validation file (empty: the official one) in its order: a list of dicts with
    ind, activity_label, ctx_a, ctx_b, ctx, endings (4 texts) and label (int).

    limit > 0 takes a random sample of the whole file, whose first third is ActivityNet and whose
    rest is WikiHow. ValueError names the file and line of what is wrong.
    """
    items = read_items(path or official_file())
    if 0 < limit < len(items):
        items = [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), limit))]
    return items


def official_file():
    path = os.path.join(DATA_FOLDER, DATA_FILE)
    if os.path.exists(path):
        return path
    return hub_download(DATASET, DATA_FILE, DATA_FOLDER, check=read_items, offline=OFFLINE)


def read_items(path):
    items = []
    for number, record in read_records(path):
        try:
            items.append(check_item(record))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not items:
        raise ValueError(f"{path} holds no items")
    return items


def read_records(path):
    """Yield (line number, record) of a file of json lines; of a parquet file its rows."""
    if path.endswith(".parquet"):
        try:
            rows = pq.read_table(path).to_pylist()
        except (ValueError, OSError) as error:  # pyarrow raises either for a damaged file
            raise ValueError(f"cannot read {path} as parquet: {error}") from None
        yield from enumerate(rows, 1)
        return
    number = 0
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        hint = pointer_hint(path)
        raise ValueError(f"{path}, line {number} is not JSON: {error}{hint}") from None
    except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}, after line {number}: {error}") from None


def check_item(record):
    if not isinstance(record, dict):
        raise ValueError(f"not an item but {str(record)[:40]}")
    missing = {"ind", "endings", "label", *TEXT_FIELDS} - record.keys()
    if missing:
        raise ValueError(f"no field {', '.join(sorted(missing))}")
    for name in TEXT_FIELDS:
        if not isinstance(record[name], str):
            raise ValueError(f"{name} is not a text: {record[name]!r}")
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
    length = len(encode(context.rstrip()))  # its trailing spaces belong to the ending
    rows = []
    for ending in endings:
        ids = encode(context + " " + ending)
        rows.append(join(ids[:length], ids[length:], eot))
    return Example(rows, [len(ending) for ending in endings], item["label"], utf8(endings))


PROTOCOLS = {"completion": completion, "harness": harness}


def clean(text):
    """Take WikiHow's markers out: "[header] Mix it. [title] Stir it." -> " Mix it. . Stir it."

    What they leave behind stays: published figures were scored with every such space."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


# ---------------------------------------------------------------------------------------------
# The command


def show(name, score):
    """Print a protocol's scores, and whether accuracy says anything yet."""
    chance = 1 / 4
    word = "" if score["acc_norm"] - chance > 2 * score["se"] else ", at chance"
    print(
        f"{name:10}  acc {score['acc']:.4f}  acc_norm {score['acc_norm']:.4f} "
        f"± {score['se']:.4f} (standard error{word})  bits per byte {score['bpb']:.4f} "
        f"± {score['bpb_se']:.4f}  margin {score['margin']:+.4f} ± {score['margin_se']:.4f}  "
        f"n {score['n']:,}"
    )


def show_paired(name, found, versus):
    """Print what paired() found."""
    texts = (f"{what} {mean:+.4f} ± {error:.4f}" for what, (mean, error) in found.items())
    print(f"{name:10}  minus {versus}, paired: {'  '.join(texts)}")


def read_scores(path, items, protocols):
    """Another model's --out -> {protocol: [its line of each item]}; ValueError unless it scored
    these items by these protocols."""
    lines = read_json(path).get("items", [])
    if [line.get("ind") for line in lines] != [item["ind"] for item in items]:
        raise ValueError(f"{path} is of other items: take the same --data, --limit and --seed")
    found = {name: [line.get(name, {}) for line in lines] for name in protocols}
    for name, scores in found.items():
        if not all({"pred_norm", "bpb", "margin"} <= score.keys() for score in scores):
            raise ValueError(f"{path} has no {name} scores with bpb: make it anew")
    return found


def main():
    config = cli.parse(Config)
    if config.out:
        os.makedirs(os.path.dirname(config.out) or ".", exist_ok=True)
        if os.path.isdir(config.out):
            raise ValueError(
                f"--out {config.out} is a folder; name a file: {config.out}/score.json"
            )
    items = load_items(config.data, config.limit, config.seed)
    device = pick_device(config.device)
    tune_cpu(device)
    protocols = list(PROTOCOLS) if config.protocol == "both" else [config.protocol]
    versus = read_scores(config.versus, items, protocols) if config.versus else {}
    model = GPT.from_pretrained(config.checkpoint).to(device)
    vocab = vocabulary_of(config.checkpoint, model.config) or N_VOCAB  # which predict refuses
    result = {"n": len(items)}
    lines = [{"ind": item["ind"], "label": item["label"]} for item in items]
    for name in protocols:
        examples = tokenize_items(items, name, vocab)
        with autocast(device, pick_dtype(config.dtype, device)):
            score, found = score_examples(model, examples, config.batch_tokens, name, vocab)
        result[name] = {key: value for key, value in score.items() if key != "n"}
        for line, values in zip(lines, found, strict=True):
            line[name] = values
        show(name, score)
        if versus:
            labels = [item["label"] for item in items]
            result[name]["versus"] = paired(found, versus[name], labels)
            show_paired(name, result[name]["versus"], config.versus)
    if config.out:
        with write_beside(config.out) as file:
            file.write(json.dumps(result | {"items": lines}).encode())


if __name__ == "__main__":
    cli.run(main)
