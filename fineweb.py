"""python fineweb.py --source HuggingFaceFW/fineweb-edu --name sample-10BT --out data/fineweb-edu

    python fineweb.py --source pydocs --out data/docs       # no network needed
    python fineweb.py --source my_texts/ --out data/mine    # txt, md, csv, jsonl, parquet ...
    python fineweb.py --source reviews.csv.gz --text_column review
    python fineweb.py --source https://example.org/texts.jsonl.zst
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
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Literal
from urllib.parse import urlsplit

import numpy as np

from nanoswitch import cli
from nanoswitch.files import first_line, locked, pointer_hint, say, sha256, write_beside
from nanoswitch.hub import FINEWEB, FINEWEB_SUBSET, check_inside, hub_download, hub_files
from nanoswitch.pydocs import write_pydocs
from nanoswitch.readers import PREFERRED, READABLE, READERS, choose_files, ending, is_hidden
from nanoswitch.shards import (
    MANIFEST,
    check_ids,
    check_parts,
    is_manifest,
    list_shards,
    open_shard,
    part_of,
    read_manifests,
    shard_split,
    vocabulary,
    write_shard,
)
from nanoswitch.tokenizer import (
    LEAST_VOCAB,
    N_VOCAB,
    PROVEN,
    encode_texts,
    get_gigatoken,
    get_tokenizer,
    token_bytes,
    utf8,
)
from nanoswitch.web import fetch, is_address, own_folder

VAL_TOKENS = 10_485_760  # the automatic val shard: 20 batches of 2^19 tokens
BATCH_BYTES = 1 << 21  # text in one encoding task; bounds memory and amortises the thread hop
# gigatoken remembers words, of text without spaces 5 MB a MB. Every so many tasks it is made anew
# if the process holds too many bytes; newer versions will bound it themselves
FORGET_AFTER = 128
FORGET_BEYOND = 1 << 30
# a document, or a piece of one; its text in UTF-8
Record = namedtuple("Record", "file number text is_start done")
Batch = namedtuple("Batch", "file numbers tokens starts done")  # encoded records of one file
Source = namedtuple("Source", "files identity fetch remote")  # files: [[name, bytes], ...]


@dataclass
class Config:
    source: str = FINEWEB
    """a hub dataset; a local file, a folder of them, of any kinds, or the http(s) address of one:
    parquet, arrow, feather, jsonl, ndjson, json, csv, tsv, txt, md, also packed by gz, zst, bz2 or
    xz, or a zip or tar of such files; or pydocs: the documentation inside the installed Python
    packages. In a folder, hidden files and those of other kinds are passed over and named"""
    name: str = FINEWEB_SUBSET
    """subset of a hub dataset; "" takes every file of its train split. Parquet files if it has any,
    else arrow, jsonl, csv, tsv, json, txt, md, zip or tar, the first of these that it has"""
    text_column: str = "text"
    """column, or key of a JSON object, that holds the texts. A file without a text column gives its
    column content or document, else the only one of strings: a line says so, the manifest too"""
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
    val_bytes: int = 0
    """end the val shard with the document in which this many bytes of text are reached, instead of
    after val_tokens: the same text for every --vocab_size, so that their models compare"""
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
        for name, least in dict(
            max_tokens=0, shard_tokens=1, val_tokens=0, val_bytes=0, workers=0
        ).items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, not {getattr(self, name)}")
        if max(self.shard_tokens, self.val_tokens) >= 2**31:
            raise ValueError("--shard_tokens and --val_tokens must be below 2**31")
        if self.val_tokens and self.val_bytes:
            raise ValueError("give --val_tokens or --val_bytes, not both")
        if not LEAST_VOCAB <= self.vocab_size <= N_VOCAB:
            limits = f"{LEAST_VOCAB} (the bytes and end-of-text) to {N_VOCAB} (GPT-2's)"
            raise ValueError(f"--vocab_size must be from {limits}, not {self.vocab_size}")
        part = re.fullmatch(r"(\d+)/(\d+)", self.part or "1/1")
        if not part or not 1 <= int(part[1]) <= int(part[2]):
            raise ValueError(f"--part must be I/N with I from 1 to N, not {self.part}")
        self.first, self.parts = int(part[1]), int(part[2])
        # in the name of everything that a part leaves in the folder
        self.tag = f"_part{self.first:03d}of{self.parts:03d}" if self.part else ""
        tokenising = ("text_column", "shard_tokens", "val_tokens", "val_bytes", "format", "part",
                      "vocab_size")  # fmt: skip
        for name in ("source", "name", *tokenising):
            if self.pretokenized and getattr(self, name) != getattr(Config, name):
                raise ValueError(f"--{name} has no effect on --pretokenized shards: leave it out")
        if not self.out:
            source = self.pretokenized or self.source
            source = urlsplit(source).path if is_address(source) else source
            stem = os.path.basename(source.rstrip("/"))
            self.out = os.path.join("data", stem.split(".")[0])
        self.downloads = os.path.join(self.out, f"downloads{self.tag}")


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


def read_source(source, position, column="text", taken=None):
    """Yield Records from a resume position on; done is the fraction of the source's bytes read.

    Yields None before a file that must first be downloaded, so that the encoders can finish
    what they have: it may already be enough. taken: {file: its column of texts} where that is not
    `column`, filled as files are opened.
    """
    taken, said = {} if taken is None else taken, set()
    sizes = [size for _, size in source.files]
    before = [0, *itertools.accumulate(sizes)]
    for i in range(position["file"], len(sizes)):
        if source.remote and i > position["file"]:
            yield None
        path, start = source.fetch(i), position["record"] if i == position["file"] else 0
        reader = READERS[ending(path)]

        def took(name, i=i, path=path):
            taken[i] = name
            if name not in said:
                say(f"{path} has no '{column}' column: takes '{name}', else give --text_column")
            said.add(name)

        try:
            for number, text, is_start, part in reader(path, start, column, took):
                if not isinstance(text, str | bytes | None):
                    raise ValueError(f"record {number} has a {type(text).__name__} as its text")
                text = utf8(text) if isinstance(text, str) else text or b""
                done = (before[i] + part * sizes[i]) / max(1, before[-1])
                yield Record(i, number, text, is_start, done)
        except Exception as error:  # every reader library raises kinds of its own
            why = first_line(error) + pointer_hint(path)
            if re.search("codec can't decode|UTF-?8", why):
                why += "; write it in UTF-8: iconv -f latin1 -t utf-8"
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
    if is_address(config.source):
        path = fetch(config.source, config.downloads)
        files = [[os.path.basename(path), os.path.getsize(path)]]
        return Source(files, {"sha256": sha256(path)}, lambda i: path, remote=False)
    if is_local(config.source):
        paths = [config.source]
        if os.path.isdir(config.source):
            paths = find_texts(config.source, config.out)
        if not paths or not ending(paths[0]):
            raise ValueError(f"no {READABLE} file at {config.source}")
        files = [[os.path.relpath(p, config.source), os.path.getsize(p)] for p in paths]
        return Source(files, {"files": files}, lambda i: paths[i], remote=False)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", config.source):
        raise ValueError(f"no file, folder or hub dataset (OWNER/NAME) is called {config.source}")
    identity = recorded or hub_files(config.source, PREFERRED, config.name)
    for name, _ in identity["files"]:  # downloads are removed by these names
        check_inside(name, config.source)
    get = functools.partial(fetch_file, config.source, identity, config.downloads)
    return Source(identity["files"], identity, get, remote=True)


def is_local(source):
    return source != "pydocs" and os.path.exists(source)


def find_texts(folder, out):
    """The paths of the files in a folder that hold texts, sorted; says which it passes over. The
    shards' own folder `out` holds none, unless it is the folder itself; its manifests are none."""
    found, links, out = [], [], os.path.realpath(out)
    for place, folders, names in os.walk(folder):
        if os.path.realpath(place) == out:  # the shards may lie among the texts
            names = [name for name in names if not is_manifest(name)]
        found += [os.path.relpath(os.path.join(place, name), folder) for name in names]
        linked = [name for name in folders if os.path.islink(os.path.join(place, name))]
        hidden = [name for name in folders if is_hidden(name)]
        found += [os.path.relpath(os.path.join(place, name), folder) + os.sep for name in hidden]
        own = [name for name in folders if os.path.realpath(os.path.join(place, name)) == out]
        links += [os.path.relpath(os.path.join(place, name), folder) + os.sep for name in linked]
        folders[:] = set(folders) - {*hidden, *own}
    texts, *passed = *choose_files(found), links
    kinds = ("hidden", "about the others", "of kinds that are not read", "links to folders")
    parts = [f"{len(n)} {kind} ({listed(n)})" for n, kind in zip(passed, kinds, strict=True) if n]
    if parts:
        say(f"{folder}: passed over {'; '.join(parts)}")
    return sorted(os.path.join(folder, name) for name in texts)


def listed(names, most=5):
    return ", ".join(sorted(names)[:most]) + ", ..." * (len(names) > most)


def fetch_file(repo, identity, folder, i):
    def check(path):
        import pyarrow.parquet as pq

        with pq.ParquetFile(path):  # ValueError when its footer is damaged
            pass

    name, revision = identity["files"][i][0], identity["revision"]
    check = check if name.lower().endswith(".parquet") else None
    return hub_download(repo, name, folder, revision=revision, check=check)


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


def hold_documents(batches, val_bytes, vocab):
    """Read up to the end of the document in which `val_bytes` bytes are reached. -> as
    hold_for_val()"""
    lengths, held, total, size = token_bytes(vocab), deque(), 0, 0
    for batch in batches:
        held.append(batch)
        reached = total + np.cumsum(lengths[batch.tokens])
        ends = (batch.tokens == vocab - 1) & (reached >= val_bytes)  # end-of-text begins the next
        if ends.any():
            size += int(ends.argmax())
            return size, itertools.chain((held.popleft() for _ in range(len(held))), batches)
        size, total = size + len(batch.tokens), int(reached[-1]) if len(reached) else total
    raise ValueError(f"only {total} bytes in the source: no train text is left after val_bytes")


# ---------------------------------------------------------------------------------------------
# Runs


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
    if manifest and not manifest["shards"] and manifest["settings"] != settings:
        manifest = None  # it ended before the first shard: nothing holds these settings
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
    with contextlib.ExitStack() as stack:
        for folder in [config.out] + [config.downloads] * bool(config.part):
            os.makedirs(folder, exist_ok=True)
            busy = f"another fineweb.py is at work in {folder}; let it end"
            shared = bool(config.part) and folder == config.out
            stack.enter_context(locked(folder, busy, shared))
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
    workers, taken = config.workers or os.cpu_count() or 1, {}
    records = read_source(source, position, config.text_column, taken)
    batches = encode_source(records, workers, by_gigatoken, config.vocab_size)
    batches = trim(batches, position["token"], left)
    batches = show_progress(batches, manifest["tokens"], limit)
    sizes = itertools.repeat(config.shard_tokens)
    first = config.first == 1  # the part that has val, as shard 0
    if first and not shards:
        if config.val_bytes:
            val_tokens, batches = hold_documents(batches, config.val_bytes, config.vocab_size)
        else:
            val_tokens, batches = hold_for_val(batches, config.val_tokens)
        sizes = itertools.chain([val_tokens], sizes)
    for parts, position in cut_shards(batches, sizes):
        index = len(shards) + (not first)
        made = (config.out, index, parts, config.format, config.tag, config.vocab_size)
        shards.append(write_shard(*made))
        manifest["position"] = position
        # of files beyond it nothing is in a shard yet, and the reading may be ahead
        columns = {source.files[i][0]: taken[i] for i in taken if i <= position["file"]}
        manifest["text_columns"] |= columns
        save_manifest(config, manifest)
        for name, _ in source.files[: position["file"]] if source.remote else []:
            if not config.keep_downloads:  # no resume needs these files again
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(config.downloads, name))


def fetch_pretokenized(config, manifest):
    """Ready .bin shards of a hub dataset -> config.out: val, then train until max_tokens."""
    repo, shards = config.pretokenized, manifest["shards"]
    manifest["source"] = manifest["source"] or hub_files(repo, [(".bin",)])
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


def remove_downloads(config, manifest):
    """Remove what this run fetched, and the folders that are then empty: the user's own files may
    lie there too, even the source itself."""
    if is_local(config.source) and not config.pretokenized:
        return
    files = [name for name, _ in manifest["source"].get("files", [])]
    for name in files or ["pydocs.jsonl"] * (config.source == "pydocs"):
        with contextlib.suppress(OSError):
            os.remove(os.path.join(config.downloads, name))
    own = own_folder(config.source, config.downloads) if is_address(config.source) else ".cache"
    shutil.rmtree(os.path.join(config.downloads, own), ignore_errors=True)
    for folder, _, _ in os.walk(config.downloads, topdown=False):
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(folder)


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
                remove_downloads(config, manifest)
            speed = (manifest["tokens"] - before) / (time.time() - start)
            state = f"finished at {speed:,.0f} tok/s"
        elif is_local(config.source) and not config.pretokenized:
            check_unchanged(config, manifest, open_source(config, None))
    counts = f"{manifest['tokens']:,} tokens, {manifest['documents']:,} documents"
    name = f"part {config.part} of {config.out}" if config.part else config.out
    print(f"{name} {state}: {counts}, {len(manifest['shards'])} shards")


if __name__ == "__main__":
    cli.run(main)
