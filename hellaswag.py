"""python hellaswag.py runs/quickstart --out score.json

Checkpoint -> HellaSwag score (Zellers et al. 2019): which of four endings continues a text best?
CHECKPOINT is a run or step folder, a Hugging Face folder, or a hub name such as gpt2. There are
two protocols, and figures of one are not comparable with figures of the other:

completion  the raw text, as build-nanogpt and llm.c score it; acc_norm takes the mean loss per
            token (gpt2 scores acc 0.2859, acc_norm 0.2955)
harness     the activity's label first and WikiHow's markers cleaned away, as lm-evaluation-harness
            scores it; acc_norm divides by characters (gpt2 scores acc 0.2892, acc_norm 0.3114)

acc takes the ending of the lowest summed loss; a tie goes to the first ending. The standard error
is sqrt(p (1 - p) / (n - 1)), as in lm-evaluation-harness: 0.0046 on all 10,042 items.
"""

import gzip
import itertools
import json
import math
import os
import random
import re
import sys
import zlib
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import pyarrow.parquet as pq
import torch
from torch.nn.attention import sdpa_kernel
from tqdm import tqdm
from tyro.conf import Positional, arg

from model import GPT
from nanoswitch import cli
from nanoswitch.cache import KVCache
from nanoswitch.device import autocast, pick_device, pick_dtype, tune_cpu
from nanoswitch.files import pointer_hint, write_beside
from nanoswitch.hub import hub_download
from nanoswitch.kernels import ANY_LENGTH
from nanoswitch.load import vocabulary_of
from nanoswitch.tokenizer import EOT, N_VOCAB, get_tokenizer, trained_vocabulary

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


class Row(NamedTuple):
    """Context and ending: the last `scored` of the tokens `ids` are the ending."""

    ids: tuple
    scored: int

    @property
    def context(self):
        return self.ids[: -self.scored]

    @property
    def ending(self):
        return self.ids[-self.scored :]


class Example(NamedTuple):
    """An item as a model sees it."""

    rows: list  # four Rows
    chars: list | None  # what acc_norm divides a row's loss by; None: the number of tokens scored
    label: int


def tokenize_items(items, protocol, vocab=N_VOCAB):
    """Items -> a list of Examples for "completion" or "harness", in GPT-2's first `vocab` ids (see
    get_tokenizer). Worth doing once."""
    encode = get_tokenizer(vocab).encode_ordinary
    return [PROTOCOLS[protocol](item, encode, vocab - 1) for item in items]


def completion(item, encode, eot=EOT):
    """Context and ending are encoded apart, and nothing is cleaned."""
    context = encode(item["ctx"])
    endings = [encode(" " + ending) for ending in item["endings"]]
    return Example([join(context, ending, eot) for ending in endings], None, item["label"])


def harness(item, encode, eot=EOT):
    """Context and ending are encoded as one text, cut where the context's own tokens end."""
    context = clean(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
    endings = [clean(ending) for ending in item["endings"]]
    length = len(encode(context.rstrip()))  # its trailing spaces belong to the ending
    rows = []
    for ending in endings:
        ids = encode(context + " " + ending)
        rows.append(join(ids[:length], ids[length:], eot))
    return Example(rows, [len(ending) for ending in endings], item["label"])


PROTOCOLS = {"completion": completion, "harness": harness}


def clean(text):
    """Take WikiHow's markers out: "[header] Mix it. [title] Stir it." -> " Mix it. . Stir it."

    What they leave behind stays: published figures were scored with every such space."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def join(context, ending, eot):
    context = context or [eot]  # a first token needs one before it to be predicted from
    return Row((*context, *ending), len(ending))


# ---------------------------------------------------------------------------------------------
# Scores


def evaluate(model, examples, batch_tokens=0, rank=0, world=1, vocab=N_VOCAB):
    """Score the examples -> {"n", "acc", "acc_norm", "se"}, se the standard error of acc_norm.

    Runs on the model's device under the caller's autocast, in eval mode, and puts the mode back.
    With world > 1 each rank calls it with all examples: it scores examples[rank::world] and the
    hits are summed over torch.distributed, so that all ranks return the same.
    """
    mine = examples[rank::world]
    hits = count_hits(predict(model, mine, batch_tokens, vocab=vocab), mine)  # (2,)
    if world > 1:
        import torch.distributed as dist

        hits = hits.to(next(model.parameters()).device)
        dist.all_reduce(hits)
    return summarize(hits, len(examples))


def predict(model, examples, batch_tokens=0, progress="", vocab=N_VOCAB):
    """The chosen ending of every example -> (n, 2) int64: by summed loss, and by normed loss. The
    options are those of ending_losses."""
    return ending_losses(model, examples, batch_tokens, progress, vocab).argmin(2)


def ending_losses(model, examples, batch_tokens=0, progress="", vocab=N_VOCAB):
    """What every example's four endings cost, summed and normed -> (n, 2, 4) fp64.

    progress: what to write before a progress bar; empty shows none. vocab: that of the examples;
    ValueError when it is not the model's."""
    config = model.config
    if trained_vocabulary(config) != vocab:
        raise ValueError(
            f"the tokens are GPT-2's {vocab}, this model's vocabulary is {config.vocab_size}"
        )
    longest = math.inf if model.extrapolates else config.block_size
    fitted = [[cut(row, longest) for row in example.rows] for example in examples]
    pairs = list(zip(examples, fitted, strict=True))
    changed = sum(example.rows != rows for example, rows in pairs)
    if progress and changed:
        note = f"{changed} items are longer than this model's {longest} positions: cut on the left"
        print(f"{progress}: {note}", file=sys.stderr)
    losses = score_rows(model, {row for rows in fitted for row in rows}, batch_tokens, progress)
    loss = torch.tensor([[losses[row] for row in rows] for rows in fitted], dtype=torch.float64)
    norm = torch.tensor([example.chars or [row.scored for row in rows] for example, rows in pairs])
    loss, norm = loss.view(-1, 4), norm.view(-1, 4)  # (n, 4) also when n is 0
    return torch.stack((loss, loss / norm), dim=1)


def cut(row, longest):
    """Drop tokens on the left until the inputs, all tokens but the last, are at most `longest`."""
    if len(row.ids) <= longest + 1:
        return row
    return Row(row.ids[-longest - 1 :], min(row.scored, longest))


@torch.no_grad()
@sdpa_kernel(ANY_LENGTH)
def score_rows(model, rows, batch_tokens=0, progress=""):
    """A set of Rows -> {row: the summed cross entropy of its ending in nats}.

    Equal rows are scored once, so that equal endings tie exactly."""
    device, was_training = next(model.parameters()).device, model.training
    # larger ones leave a CPU's cache
    batch_tokens = batch_tokens or (32768 if device.type == "cuda" else 4096)
    model.eval()
    losses = {}
    disable = None if progress else True  # None: only on a terminal
    with tqdm(total=len(rows), desc=progress, unit="row", disable=disable) as bar:
        for batch in batches(rows, batch_tokens):
            for part, scores in score_batch(model, batch, batch_tokens, device):
                losses.update(zip(part, scores, strict=True))
                bar.update(len(part))
    model.train(was_training)
    return losses


def score_batch(model, batch, batch_tokens, device):
    """Rows whose contexts are of about one length -> yields (some of the rows, their losses). What
    all of them have of their contexts runs through the model once, its keys and values then serve
    all endings, those of about one length together: half the work of whole rows."""
    shared = min(len(row.context) for row in batch)
    starts = {row.context[:shared]: None for row in batch}  # in order, each once
    numbers = {start: i for i, start in enumerate(starts)}
    cache = KVCache(model, max(len(row.ids) for row in batch) - 1)
    contexts = model.features(torch.tensor(list(starts), device=device), cache)
    for part in parts(batch, shared, batch_tokens):
        owner = torch.tensor([numbers[row.context[:shared]] for row in part], device=device)  # (R,)
        longest = len(part[0].ids) - shared
        rests, targets = [], []
        for row in part:
            # padding on the right: no token sees it, for attention is causal
            missing = shared + longest - len(row.ids)
            rests.append(row.ids[shared:] + (0,) * missing)
            targets.append((-1,) * (len(row.context) - shared) + row.ending + (-1,) * missing)
        x = contexts[owner, -1:]  # (R, 1, C) predicts the first token
        if longest > 1:
            rests = torch.tensor(rests, device=device)[:, :-1]
            x = torch.cat((x, model.features(rests, cache.pick(owner))), dim=1)
        targets = torch.tensor(targets, device=device)
        yield part, model.token_losses(x, targets).sum(1).tolist()


ALIKE = 8  # contexts in a batch differ by less than so many tokens, which every ending repeats


def batches(rows, batch_tokens):
    """Yield lists of rows for score_batch, whose shared contexts fill at most batch_tokens
    positions, the longest first so that memory peaks at once. The order depends on the rows alone,
    not on the order in which they came."""
    groups = {}
    for row in sorted(rows):
        groups.setdefault(row.context, []).append(row)

    contexts = sorted(groups, key=len, reverse=True)
    for _, alike in itertools.groupby(contexts, key=lambda context: len(context) // ALIKE):
        alike = list(alike)
        size = max(1, batch_tokens // len(alike[0]))
        for i in range(0, len(alike), size):
            yield [row for context in alike[i : i + size] for row in groups[context]]


def parts(batch, shared, batch_tokens):
    """Yield the rows of a batch, the longest first, in lists that beyond the `shared` tokens fill
    at most batch_tokens positions, of about one length once there is work enough for a call."""
    part, longest = [], 0
    for row in sorted(batch, key=lambda row: len(row.ids), reverse=True):
        length, used = len(row.ids) - shared, len(part) * longest
        much_shorter = length < 0.9 * longest and used >= batch_tokens // 8
        if part and (much_shorter or used + longest > batch_tokens):
            yield part
            part = []
        if not part:
            longest = length
        part.append(row)
    yield part


def count_hits(predictions, examples):
    """(n, 2) predictions -> (2,) how many are right."""
    labels = torch.tensor([example.label for example in examples], dtype=torch.int64)
    return (predictions == labels[:, None]).sum(0)


def summarize(hits, n):
    acc, acc_norm = (hit / n for hit in hits.tolist())
    se = math.sqrt(acc_norm * (1 - acc_norm) / max(n - 1, 1))
    return {"n": n, "acc": acc, "acc_norm": acc_norm, "se": se}


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
    model = GPT.from_pretrained(config.checkpoint).to(device)
    vocab = vocabulary_of(config.checkpoint, model.config) or N_VOCAB  # which predict refuses
    result = {"n": len(items)}
    lines = [{"ind": item["ind"], "label": item["label"]} for item in items]
    for name in PROTOCOLS if config.protocol == "both" else [config.protocol]:
        examples = tokenize_items(items, name, vocab)
        with autocast(device, pick_dtype(config.dtype, device)):
            predictions = predict(model, examples, config.batch_tokens, name, vocab)
        score = summarize(count_hits(predictions, examples), len(items))
        result[name] = {key: score[key] for key in ("acc", "acc_norm", "se")}
        for line, (pred, pred_norm) in zip(lines, predictions.tolist(), strict=True):
            line[name] = {"pred": pred, "pred_norm": pred_norm}
        print(
            f"{name:10}  acc {score['acc']:.4f}  acc_norm {score['acc_norm']:.4f} "
            f"± {score['se']:.4f} (standard error)  n {score['n']:,}"
        )
    if config.out:
        with write_beside(config.out) as file:
            file.write(json.dumps(result | {"items": lines}).encode())


if __name__ == "__main__":
    cli.run(main)
