"""What the commands that score a checkpoint share: their flags, records of a file -> items, and
items -> figures that are printed, compared with another model's and written.
"""

import gzip
import json
import random
import statistics
import zlib
from dataclasses import dataclass
from typing import Annotated, Literal

import pyarrow.parquet as pq
from tyro.conf import Positional, arg

from model import GPT
from nanoswitch.cli import at_least
from nanoswitch.device import autocast, pick_device, pick_dtype, tune_cpu
from nanoswitch.files import pointer_hint, prepare_out, read_json, write_beside
from nanoswitch.load import has_other_ids, vocabulary_of
from nanoswitch.scoring import NAMES, at_chance, error_name, paired, score_examples
from nanoswitch.tokenizer import N_VOCAB, has_gpt2_vocabulary


@dataclass
class Evaluation:
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")]
    """run folder (its latest step), step folder, Hugging Face folder, or hub name such as gpt2"""
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
        at_least(self, 0, "limit seed batch_tokens")


# ----------------------------------------------------------------------------- items of a file


def read_items(path, check):
    """A file's records, each as `check` returns it -> a list. ValueError names the file, and the
    line of the record that `check` refuses with a ValueError."""
    items = []
    for number, record in read_records(path):
        try:
            items.append(check(record))
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


def check_fields(record, fields, texts=()):
    """ValueError unless the record is a dict that has `fields` and `texts`, the latter as texts."""
    if not isinstance(record, dict):
        raise ValueError(f"not an item but {str(record)[:40]}")
    missing = {*fields, *texts} - record.keys()
    if missing:
        raise ValueError(f"no field {', '.join(sorted(missing))}")
    for name in texts:
        if not isinstance(record[name], str):
            raise ValueError(f"{name} is not a text: {record[name]!r}")


def sample(items, limit, seed):
    """A random sample of `limit` items in their order; limit 0: all."""
    if not 0 < limit < len(items):
        return items
    return [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), limit))]


# ----------------------------------------------------------------------------- figures


def evaluate_checkpoint(config, load, tokenizers, score=score_examples):
    """Score a checkpoint on items; print, compare (--versus) and write (--out) what is found.

    load() -> items, dicts with "ind" and "label". tokenizers: {name: (items, vocab) -> Examples}.
    score: score_examples or score_words.
    """
    if config.out:
        prepare_out(config.out, "score.json")
    items = load()
    versus = read_scores(config.versus, items, tokenizers) if config.versus else {}
    device = pick_device(config.device)
    tune_cpu(device)
    model = GPT.from_pretrained(config.checkpoint).to(device)
    vocab = vocabulary_of(config.checkpoint, model.config)
    if has_gpt2_vocabulary(model.config) and has_other_ids(config.checkpoint):
        raise ValueError(
            f"the vocabulary of {config.checkpoint} has GPT-2's size but is its own: only models "
            f"of GPT-2's vocabulary, or of its beginning as fineweb.py cuts it, are scored"
        )
    vocab = vocab or N_VOCAB  # another size is refused by score
    result = {"n": len(items)}
    lines = [{"ind": item["ind"], "label": item["label"]} for item in items]
    for name, tokenize in tokenizers.items():
        examples = tokenize(items, vocab=vocab)
        with autocast(device, pick_dtype(config.dtype, device)):
            found, of_items = score(model, examples, config.batch_tokens, name, vocab)
        found["chance"] = statistics.fmean(map(chance, examples))
        result[name] = {key: value for key, value in found.items() if key != "n"}
        for line, values in zip(lines, of_items, strict=True):
            line[name] = values
        show(name, found)
        if versus:
            labels = [item["label"] for item in items]
            result[name]["versus"] = paired(of_items, versus[name], labels)
            show_paired(name, result[name]["versus"], config.versus)
    if config.out:
        with write_beside(config.out) as file:
            file.write(json.dumps(result | {"items": lines}).encode())


def chance(example):
    """Of guessing right; 0 where there is nothing to choose among."""
    return 1 / len(example.rows) if len(example.rows) > 1 else 0.0


def show(name, score):
    """Print a task's scores, and which accuracy says nothing yet."""
    texts, weak = [], []
    for what in NAMES:
        if what not in score:
            continue
        value, error = score[what], score[error_name(what)]
        shown = f"{value:+.4f}" if what == "margin" else f"{value:.4f}"
        texts.append(f"{'bits per byte' if what == 'bpb' else what} {shown} ± {error:.4f}")
        if what.startswith("acc") and at_chance(value, error, score["chance"]):
            weak.append(what)
    note = f" ({' and '.join(weak)} at chance, {score['chance']:.4f})" if weak else ""
    print(f"{name:10}  {'  '.join(texts)}  n {score['n']:,}{note}")


def show_paired(name, found, versus):
    """Print what paired() found."""
    texts = (f"{what} {mean:+.4f} ± {error:.4f}" for what, (mean, error) in found.items())
    print(f"{name:10}  minus {versus}, paired: {'  '.join(texts)}")


def read_scores(path, items, names):
    """Another model's --out -> {name: [its line of each item]}; ValueError unless it scored these
    items under these names."""
    lines = read_json(path).get("items", [])
    if [line.get("ind") for line in lines] != [item["ind"] for item in items]:
        raise ValueError(f"{path} is of other items: take the same --data, --limit and --seed")
    found = {name: [line.get(name, {}) for line in lines] for name in names}
    for name, scores in found.items():
        if not all({"pred", "bpb"} <= score.keys() for score in scores):
            raise ValueError(f"{path} has no {name} scores with bpb: make it anew")
    return found
