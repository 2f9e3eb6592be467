"""Which ending of a context does a model expect? Rows of tokens -> their losses, batched so that
what endings share is computed once; then per item and over items the figures that hellaswag.py and
tasks.py print. Sources of the figures are in hellaswag.py's head.
"""

import itertools
import math
import sys
from typing import NamedTuple

import torch
from torch.nn.attention import sdpa_kernel
from tqdm import tqdm

from nanoswitch.cache import KVCache
from nanoswitch.kernels import ANY_LENGTH
from nanoswitch.loss import logit_losses
from nanoswitch.tokenizer import N_VOCAB, trained_vocabulary


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

    rows: list  # Rows, four in HellaSwag
    chars: list | None  # what acc_norm divides a row's loss by; None: the number of tokens scored
    label: int
    bytes: list  # of each ending's text in UTF-8, without the space before it


def utf8(texts):
    return [len(text.encode()) for text in texts]


def join(context, ending, eot):
    context = context or [eot]  # a first token needs one before it to be predicted from
    return Row((*context, *ending), len(ending))


def as_one_text(context, endings, encode, eot):
    """Texts -> a Row of each ending after the context and a space, as lm-evaluation-harness makes
    them: encoded as one text, cut where the context's own tokens end."""
    length = len(encode(context.rstrip()))  # its trailing spaces belong to the ending
    texts = [encode(f"{context} {ending}") for ending in endings]
    return [join(ids[:length], ids[length:], eot) for ids in texts]


# ----------------------------------------------------------------------------- losses


def evaluate(model, examples, batch_tokens=0, rank=0, world=1, vocab=N_VOCAB):
    """Score the examples -> {"n"; "acc", "acc_norm", "bpb", "margin"; of each its standard error,
    NAME_se, of acc_norm "se"}, and of each example the four: (n, 4) fp64.

    Runs on the model's device under the caller's autocast, in eval mode, and puts the mode back.
    With world > 1 each rank calls it with all examples: it scores examples[rank::world] and gets
    the others over torch.distributed, so that all ranks return the same.
    """
    mine = examples[rank::world]
    found = torch.zeros(len(examples), len(NAMES), dtype=torch.float64)
    found[rank::world] = measures(ending_losses(model, mine, batch_tokens, vocab=vocab), mine)
    if world > 1:
        import torch.distributed as dist

        found = found.to(next(model.parameters()).device)
        dist.all_reduce(found)
    return summarize(add_up(found), len(examples)), found.cpu()


def predict(model, examples, batch_tokens=0, progress="", vocab=N_VOCAB):
    """The chosen ending of every example -> (n, 2) int64: by summed loss, and by normed loss. The
    options are those of ending_losses."""
    return ending_losses(model, examples, batch_tokens, progress, vocab).argmin(2)


def ending_losses(model, examples, batch_tokens=0, progress="", vocab=N_VOCAB):
    """What every example's endings cost, summed and normed -> (n, 2, most endings of an example)
    fp64, inf where an example has fewer.

    progress: what to write before a progress bar; empty shows none. vocab: that of the examples;
    ValueError when it is not the model's."""
    fitted = fit(model, examples, progress, vocab)
    pairs = list(zip(examples, fitted, strict=True))
    losses = score_rows(model, {row for rows in fitted for row in rows}, batch_tokens, progress)
    loss = table([[losses[row] for row in rows] for rows in fitted], math.inf)
    norm = table([example.chars or [row.scored for row in rows] for example, rows in pairs], 1.0)
    return torch.stack((loss, loss / norm), dim=1)


def fit(model, examples, progress="", vocab=N_VOCAB):
    """Each example's rows, no longer than the model's positions; with `progress` a notice says how
    many it cuts. ValueError when the vocabulary is not the model's."""
    config = model.config
    if trained_vocabulary(config) != vocab:
        raise ValueError(
            f"the tokens are GPT-2's {vocab}, this model's vocabulary is {config.vocab_size}: only "
            f"models of GPT-2's vocabulary, or of its beginning as fineweb.py cuts it, are scored"
        )
    longest = math.inf if model.extrapolates else config.block_size
    fitted = [[cut(row, longest) for row in example.rows] for example in examples]
    changed = sum(example.rows != rows for example, rows in zip(examples, fitted, strict=True))
    if progress and changed:
        note = f"{changed} items are longer than this model's {longest} positions: cut on the left"
        print(f"{progress}: {note}", file=sys.stderr)
    return fitted


def table(lists, fill):
    """Lists of numbers -> (n, longest) fp64, filled up behind the shorter ones."""
    most = max(map(len, lists), default=1)
    full = [[*numbers, *[fill] * (most - len(numbers))] for numbers in lists]
    return torch.tensor(full, dtype=torch.float64).view(len(lists), most)


def cut(row, longest):
    """Drop tokens on the left until the inputs, all tokens but the last, are at most `longest`."""
    if len(row.ids) <= longest + 1:
        return row
    return Row(row.ids[-longest - 1 :], min(row.scored, longest))


@torch.no_grad()
@sdpa_kernel(ANY_LENGTH)
def score_rows(model, rows, batch_tokens=0, progress="", score=None):
    """A set of Rows -> {row: the summed cross entropy of its ending in nats}, or what `score`, in
    summed_losses' place, makes of it.

    Equal rows are scored once, so that equal endings tie exactly."""
    device, was_training = next(model.parameters()).device, model.training
    # larger ones leave a CPU's cache
    batch_tokens = batch_tokens or (32768 if device.type == "cuda" else 4096)
    model.eval()
    losses = {}
    disable = None if progress else True  # None: only on a terminal
    with tqdm(total=len(rows), desc=progress, unit="row", disable=disable) as bar:
        for batch in batches(rows, batch_tokens):
            for part, scores in score_batch(model, batch, batch_tokens, device, score):
                losses.update(zip(part, scores, strict=True))
                bar.update(len(part))
    model.train(was_training)
    return losses


def score_batch(model, batch, batch_tokens, device, score=None):
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
        yield part, (score or summed_losses)(model, x, targets)


def summed_losses(model, x, targets):
    """Features (R, T, C) and targets (R, T), -1 where there is none -> a number of nats a row."""
    return model.token_losses(x, targets).sum(1).tolist()


def losses_and_greedy(model, x, targets):
    """Of each row (its summed loss, whether every target is its position's most probable id)."""
    wanted = targets >= 0
    logits = model.logits(model.as_products(x[wanted]))  # (N, V)
    hits, losses = torch.ones_like(wanted), torch.zeros(targets.shape, device=x.device)
    hits[wanted] = logits[:, : model.config.vocab_used].argmax(1) == targets[wanted]
    losses[wanted] = logit_losses(logits, targets[wanted])  # which writes over the logits
    return list(zip(losses.sum(1).tolist(), hits.all(1).tolist(), strict=True))


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


# ----------------------------------------------------------------------------- figures


NAMES = "acc", "acc_norm", "bpb", "margin"


def measures(losses, examples):
    """ending_losses' result -> (n, 4) fp64, of each example the four of NAMES: 1.0 or 0.0 for the
    two accuracies, then bits per byte. An ending without bytes counts as one of one byte."""
    labels = torch.tensor([example.label for example in examples], dtype=torch.int64)[:, None]
    hits = losses.argmin(2) == labels  # (n, 2)
    sizes = table([example.bytes for example in examples], 1.0).clamp(min=1)
    bpb = losses[:, 0] / (sizes * math.log(2))  # (n, endings)
    right = bpb.gather(1, labels)
    wrong = bpb.scatter(1, labels, math.inf).min(1, keepdim=True).values
    return torch.cat((hits, right, wrong - right), dim=1)


def add_up(found):
    """(n, k) values of n examples -> their sums and sums of squares (2k,)."""
    return torch.cat((found.sum(0), found.square().sum(0)))


def summarize(sums, n, names=NAMES):
    """add_up's sums over n examples -> the scores of evaluate."""
    found = {"n": n}
    for name, total, squares in zip(names, *sums.view(2, len(names)).tolist(), strict=True):
        found[name] = total / n
        found[error_name(name)] = standard_error(total, squares, n)
    return found


def error_name(name):
    return "se" if name == "acc_norm" else f"{name}_se"


def at_chance(accuracy, error, chance):
    """Whether an accuracy does not stand out from guessing by two standard errors."""
    return accuracy - chance <= 2 * error


def standard_error(total, squares, n):
    """Of the mean of n numbers with this sum and sum of squares."""
    return math.sqrt(max(0.0, squares - total * total / n) / max(n - 1, 1) / n)


def score_examples(model, examples, batch_tokens=0, progress="", vocab=N_VOCAB):
    """-> what evaluate returns, and of each {"pred", "pred_norm", "bpb", "margin"}."""
    losses = ending_losses(model, examples, batch_tokens, progress, vocab)
    found = measures(losses, examples)
    lines = [
        dict(pred=pred, pred_norm=pred_norm, bpb=bpb, margin=margin)
        for (pred, pred_norm), (_, _, bpb, margin) in zip(
            losses.argmin(2).tolist(), found.tolist(), strict=True
        )
    ]
    return summarize(add_up(found), len(examples)), lines


def score_words(model, examples, batch_tokens=0, progress="", vocab=N_VOCAB):
    """Examples of one ending each -> {"n", "acc", "acc_se", "bpb", "bpb_se"} and of each {"pred",
    "bpb"}. acc: whether greedy decoding writes the ending; pred: 0, the ending, or -1, another.

    The options are those of ending_losses."""
    rows = [row for (row,) in fit(model, examples, progress, vocab)]
    scores = score_rows(model, set(rows), batch_tokens, progress, losses_and_greedy)
    lines = []
    for row, example in zip(rows, examples, strict=True):
        loss, greedy = scores[row]
        lines.append(dict(pred=greedy - 1, bpb=loss / math.log(2) / example.bytes[0]))
    found = [[float(line["pred"] == 0), line["bpb"]] for line in lines]
    sums = add_up(torch.tensor(found, dtype=torch.float64))
    return summarize(sums, len(examples), ("acc", "bpb")), lines


def paired(ours, theirs, labels):
    """Two models' items as score_examples or score_words returns them -> {name: (mean difference,
    ours minus theirs, its standard error)}: items that both find hard or easy drop out."""
    predictions, found = {"acc": "pred", "acc_norm": "pred_norm"}, {}
    for name in NAMES:
        key = predictions.get(name, name)
        if key not in ours[0]:
            continue

        def value(line, label, name=name, key=key):
            return float(line[key] == label) if name in predictions else line[key]

        both = zip(ours, theirs, labels, strict=True)
        diffs = [value(our, label) - value(their, label) for our, their, label in both]
        error = standard_error(sum(diffs), sum(d * d for d in diffs), len(diffs))
        found[name] = sum(diffs) / len(diffs), error
    return found
