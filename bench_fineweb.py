"""Tokenising to shards, beside build-nanogpt's fineweb.py: to be merged into bench.py.

python bench_fineweb.py PEER ROUNDS PARQUET [TOKENIZER ...]
"""

import contextlib
import glob
import io
import os
import statistics
import sys
import tempfile
import time
import types
from unittest import mock

import numpy as np

import fineweb as ours_module

SHARD_TOKENS, WORKERS = 10_000_000, 2


def fineweb(peer, rounds, source="", tokenizer="tiktoken"):
    """Our fineweb.py and the peer's, end to end from one parquet file to shards, same workers.

    -> ("Mtok/s", ours, theirs), a list of `rounds` figures each, interleaved. RuntimeError when
    the shards of both differ in one byte. source: a parquet file; "" makes one of pydocs.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = source or pydocs_parquet(folder)
        sides = {
            "ours": lambda out: run_ours(out, source, tokenizer),
            "peer": lambda out: run_peer(out, source, peer),
        }
        rates = {side: [] for side in sides}
        for i in range(rounds + 1):  # the first is the check, and warms both up
            shards = {}
            for side, run in sides.items():
                out = os.path.join(folder, f"{side}{i}")
                os.makedirs(out)
                start = time.perf_counter()
                with contextlib.redirect_stderr(io.StringIO()):
                    run(out)
                seconds = time.perf_counter() - start
                shards[side] = {os.path.basename(p): p for p in glob.glob(f"{out}/*.npy")}
                tokens = sum(len(np.load(p, mmap_mode="r")) for p in shards[side].values())
                rates[side].append(tokens / seconds / 1e6)
            if digests(shards["ours"]) != digests(shards["peer"]):
                raise RuntimeError(f"our shards of {source} differ from those of {peer}")
            for path in [p for side in shards.values() for p in side.values()]:
                os.remove(path)
    return "Mtok/s", rates["ours"][1:], rates["peer"][1:]


def pydocs_parquet(folder):
    """The documents of the installed Python packages as one parquet file; its path."""
    import pyarrow.json
    import pyarrow.parquet

    path = os.path.join(folder, "pydocs.parquet")
    table = pyarrow.json.read_json(ours_module.write_pydocs(folder))
    pyarrow.parquet.write_table(table, path, row_group_size=1000, compression="zstd")
    return path


def digests(shards):
    return {name: ours_module.sha256(path) for name, path in shards.items()}


def run_ours(out, source, tokenizer):
    size = f"--shard_tokens={SHARD_TOKENS}", f"--val_tokens={SHARD_TOKENS}"
    where = f"--source={source}", f"--out={out}", f"--workers={WORKERS}"
    flags = *where, *size, f"--tokenizer={tokenizer}"
    with (
        mock.patch.object(sys, "argv", ["fineweb.py", *flags]),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        ours_module.main()


def run_peer(out, source, peer):
    """The text of the peer's module, run as it stands but for three stand-ins: load_dataset reads
    `source`, the machine has 2 * WORKERS cores (it takes half), and shards are smaller."""
    import pyarrow.parquet as pq
    import tiktoken.registry

    def load_dataset(*args, **kwargs):
        for batch in pq.ParquetFile(source).iter_batches(512, columns=["text"]):
            for text in batch.column(0).to_pylist():
                yield {"text": text}

    path = os.path.join(peer, "fineweb.py")
    with open(path, encoding="utf-8") as file:
        code = file.read()
    if code.count("int(1e8)") != 1:
        raise ValueError(f"{path} does not set its shard size to int(1e8)")
    code = code.replace("int(1e8)", str(SHARD_TOKENS))
    module = types.ModuleType("peer_fineweb")  # its workers find `tokenize` here, being forks
    module.__file__ = os.path.join(out, "fineweb.py")
    module.local_dir = out
    tiktoken.registry.ENCODINGS["gpt2"] = ours_module.get_tokenizer()  # needs no network
    stubs = {"datasets": types.SimpleNamespace(load_dataset=load_dataset), "peer_fineweb": module}
    with (
        mock.patch.dict(sys.modules, stubs),
        mock.patch.object(os, "cpu_count", lambda: 2 * WORKERS),
    ):
        exec(compile(code, path, "exec"), module.__dict__)
    for path in glob.glob(f"{out}/edu_fineweb10B/*.npy"):
        os.rename(path, os.path.join(out, os.path.basename(path)))


if __name__ == "__main__":
    peer, rounds, source = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    for tokenizer in sys.argv[4:] or ["tiktoken"]:
        metric, ours, theirs = fineweb(peer, rounds, source, tokenizer)
        a, b = statistics.median(ours), statistics.median(theirs)
        print(f"{tokenizer}: ours {a:.2f} peer {b:.2f} {metric}, {a / b:.2f}x")
        print([round(x, 2) for x in ours], [round(x, 2) for x in theirs])
