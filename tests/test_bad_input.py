"""What users get wrong, at every entry point: one line that names the value and a hint.

A row of a table is what the user types, what is broken before that, the words that the one line
must have, and, where the hint can be followed, what following it means. Every row is held to the
same: status not 0, one line on stderr, no traceback, no file of the user's changed or gone, and
the command works once the hint is followed. A new entry point is a line in SCRIPTS and its rows.
"""

import ast
import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import run_main, write_step
from hub_server import point_client_at, serve
from safetensors.torch import load_file, save_file

import bench
import compare
import fineweb
import hellaswag
import sample
import train_gpt2
from model import GPT, GPTConfig
from nanoswitch import cli, export, hf, switches
from nanoswitch.hub import check_hash
from nanoswitch.shards import MANIFEST
from nanoswitch.windows import open_windows

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "fineweb": fineweb, "train_gpt2": train_gpt2, "hellaswag": hellaswag, "sample": sample,
    "compare": compare, "model": switches, "export": export, "bench": bench,
}  # fmt: skip
CONFIG = """
data_dir = "data"
run_dir = "out"
n_layer = 1
n_head = 1
n_embd = 4
block_size = 16
device = "cpu"
dtype = "float32"
total_batch_tokens = 64
max_steps = 1
val_tokens = 32
sample_every = 0
curve = false
warmup_steps = 0
"""
ITEM = {
    "ind": 1, "activity_label": "Tea", "ctx_a": "A cup", "ctx_b": "it", "ctx": "A cup it",
    "endings": ["is hot.", "sings.", "is old.", "runs."], "label": 2,
}  # fmt: skip
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 9\n"

# ---------------------------------------------------------------------------------------------
# A folder in which every command works, and ways to break it. Paths are relative to it


def shard(path, ids, dtype=np.uint16):
    np.save(path, np.asarray(ids, dtype=dtype))


def llmc(path, ids=(1, 2, 3), magic=20240520, version=1, length=None):
    length = len(ids) if length is None else length
    header = struct.pack("<256i", magic, version, length, *[0] * 253)
    Path(path).write_bytes(header + np.asarray(ids, "<u2").tobytes())


def step_folder(path, **fields):
    """A checkpoint with GPT-2's vocabulary; fields change its architecture."""
    small = dict(n_layer=1, n_head=1, n_embd=4, block_size=16) | fields
    write_step(Path(path), GPT(GPTConfig(**small)))


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    folder, back = tmp_path_factory.mktemp("whole"), os.getcwd()
    os.chdir(folder)
    rng = np.random.default_rng(0)
    os.mkdir("data")
    shard("data/x_val_000000.npy", rng.integers(0, 50257, 200))
    shard("data/x_train_000001.npy", rng.integers(0, 50257, 500))
    llmc("data/x_train_000002.bin", rng.integers(0, 50257, 500))
    Path("c.toml").write_text(CONFIG)
    Path("note.txt").write_text("mine")
    lines = [json.dumps({"text": f"Text number {i} of some length."}) for i in range(30)]
    Path("text.jsonl").write_text("\n".join(lines))
    Path("val.jsonl").write_text(json.dumps(ITEM) + "\n")
    step_folder("step")
    vocabulary = dict(vocab_size=97, vocab_used=97, tie_embeddings=False)
    llama = dict(pos="rope", norm="rmsnorm", mlp="swiglu", bias=False, n_embd=8, n_head=2)
    hf.save(GPT(GPTConfig(**vocabulary, **llama, n_layer=1, block_size=16)), "llama")
    status, error = run("train_gpt2 c.toml --run_dir run")
    assert status == 0, error
    os.chdir(back)
    return folder


@pytest.fixture
def here(whole, tmp_path, monkeypatch):
    """A fresh copy of it, as the working directory; the hub is a port where nobody listens."""
    shutil.copytree(whole, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    point_client_at("http://127.0.0.1:1", monkeypatch)
    monkeypatch.setattr("nanoswitch.hub.answered", False)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "w"
    shutil.rmtree(tmp_path)


def run(line):
    """Call a script's main with a command line -> status, stderr without progress bars."""
    script, *argv = shlex.split(line)
    with (
        contextlib.redirect_stderr(io.StringIO()) as err,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        status = run_main(SCRIPTS[script].main, *argv)
    bar = re.compile(r"[^\r\n]*(tok/s|row/s|\?tok|it/s)[^\r\n]*\]")
    return status, "\n".join(x for x in bar.sub("", err.getvalue()).splitlines() if x.strip())


def tree(folder="."):
    paths = [p for p in Path(folder).rglob("*") if p.is_file()]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def refuse(line, words):
    """Run a command that must fail as every bad input does -> its line."""
    before = tree()
    status, error = run(line)
    assert status in (1, 2), f"it went well: {error}"
    assert error.startswith("error: ") and "\n" not in error, error
    missing = [word for word in words if word not in error]
    assert not missing, f"{missing} not in: {error}"
    after = tree()
    assert {path: after.get(path) for path in before} == before
    # what is new lies where the user told the script to write
    assert all(path.startswith("out") for path in after.keys() - before.keys()), after.keys()
    assert not os.path.exists("CANARY")
    return error


# ways to break one thing


def write(path, data=b""):
    def prepare():
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        Path(path).write_bytes(data if isinstance(data, bytes) else data.encode())

    return prepare


def remove(*paths):
    def prepare():
        for path in paths:
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)

    return prepare


def cut(path, size):
    return lambda: os.truncate(path, size)


def flip(path):
    """Flip a bit of the last byte, in a safetensors file one of a weight."""

    def prepare():
        content = bytearray(Path(path).read_bytes())
        content[-1] ^= 1
        Path(path).write_bytes(content)

    return prepare


def edit(path, drop=(), **changes):
    """Change keys of a JSON object; model=dict(...) changes those of the table "model"."""

    def prepare():
        content = json.loads(Path(path).read_text())
        for key, value in changes.items():
            content[key] = content[key] | value if isinstance(value, dict) else value
        for key in drop:
            del content[key]
        Path(path).write_text(json.dumps(content))

    return prepare


def tensors(path, **changes):
    """Replace tensors of a safetensors file; None takes one away. Dots are written __."""

    def prepare():
        weights = load_file(path) | {k.replace("__", "."): v for k, v in changes.items()}
        save_file({k: v for k, v in weights.items() if v is not None}, path)

    return prepare


class Bomb:
    """Unpickling this creates the file CANARY."""

    def __reduce__(self):
        return open, (os.path.abspath("CANARY"), "w")


def bomb(path, dump=None):
    """Put a pickle there that leaves a trace if anything unpickles it."""

    def prepare():
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        dump(Bomb(), path) if dump else Path(path).write_bytes(pickle.dumps(Bomb()))

    return prepare


def object_array(bomb, path):
    with open(path, "wb") as file:
        np.save(file, np.array([bomb], dtype=object), allow_pickle=True)


def parquet(path, **columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    return lambda: pq.write_table(pa.table(columns), path)


def item(**changes):
    line = {k: v for k, v in (ITEM | changes).items() if v is not ...}
    return write("val.jsonl", json.dumps(ITEM) + "\n" + json.dumps(line) + "\n")


def both(*steps):
    return lambda: [step() for step in steps]


def shards(*steps):
    """Have fineweb.py make the folder shards, then break something."""

    def prepare():
        assert run("fineweb --source text.jsonl --out shards")[0] == 0
        both(*steps)()

    return prepare


def nothing():
    pass


TRAIN, SCORE, INFO = "train_gpt2 c.toml", "hellaswag step --data val.jsonl", "fineweb info data"
SAMPLE, TOKENIZE = "sample step --max_new_tokens 2", "fineweb --source text.jsonl --out out"
NPY, BIN = "data/x_train_000001.npy", "data/x_train_000002.bin"
WEIGHTS, STATE = "step/model.safetensors", "run/step_000001/train_state.pt"
SUMMED = "run/step_000001/model.safetensors"
SUMS = "run/step_000001/SHA256SUMS"  # a checkpoint without is from before there were any
RESUME = "train_gpt2 c.toml --run_dir run --max_steps 2"
PYDOCS = "python fineweb.py --source pydocs --out"
# A fix is a command line that follows the hint, a way to mend the input, or AS_SAID: the flag
# that the line itself tells the user to try
AS_SAID = "as said"

CASES = {
    "flags": [
        ("train_gpt2 c.toml --learning_rate 1", nothing, ["--learning_rate"]),
        ("train_gpt2 c.toml --n_heads 2", nothing, ["--n_heads", "did you mean n_head?"],
         "train_gpt2 c.toml --n_head 2"),
        ("fineweb --max_token 3", nothing, ["--max_token", "did you mean max_tokens?"]),
        ("hellaswag step --limits 3", nothing, ["--limits", "did you mean limit?"]),
        ("sample step --max_token 5", nothing, ["--max_token", "max_new_tokens"]),
        ("compare run --outt x", nothing, ["--outt", "did you mean out?"]),
        ("model --n_layers 3", nothing, ["--n_layers", "did you mean n_layer?"],
         "model --n_layer 3"),
        ("export step --outt x", nothing, ["--outt", "did you mean out?"]),
        ("model --zzqq 1", nothing, ["--zzqq", "--help"]),
        ("train_gpt2 c.toml --lr", nothing, ["--lr needs a value"]),
        ("export step", nothing, ["out"], "export llama --out out/x"),
        ("sample", nothing, ["Missing", "run folder", "hub name"], SAMPLE),
        ("compare", nothing, ["name config files to train, or run folders"]),
        ("compare run c.toml", nothing, ["config files (.toml) or run folders, not both"]),
        ("compare c.toml c.toml", nothing, ["two of the inputs are called c"]),
        ("compare c.toml --seeds 0", nothing, ["seeds is 0; it must be 1 or more"]),
        ("compare c.toml --match size", nothing, ["none", "params"]),
        ("compare c.toml --run_dir x", nothing, ["--run_dir", "leave it out"]),
        ("compare c.toml --n_haed 2", nothing, ["--n_haed", "did you mean n_head?"]),
        ("compare c.toml --n_head 3", nothing, ["n_embd", "n_head 3"]),
        ("compare run --lr 1e-3", nothing, ["--lr has no effect on finished runs"]),
        ("compare run --seeds 3", nothing, ["--seeds has no effect on finished runs"]),
        ("compare run --match params", nothing, ["--match has no effect on finished runs"]),
        ("compare run --lengths 0", nothing, ["lengths is 0", "1,2,4"]),
        ("compare c.toml --report_only --out out", nothing, ["c has no finished run yet"]),
        ("compare nowhere.toml", nothing, ["cannot read config nowhere.toml"]),
        ("compare c.toml --base note.txt", nothing, ["note.txt is not a TOML config"]),
        ("fineweb info", nothing, ["fineweb.py info DIR"], INFO),
        ("sample step stray", nothing, ["stray"]),
        ("sample --chat", nothing, ["Missing", "run folder", "hub name"]),
        ("sample step --chat maybe", nothing, ["maybe"]),
        ("sample step --chat --num_samples 2", nothing, ["one reply", "leave out --chat"],
         "sample step --num_samples 2"),
        ("sample no/such/folder --chat", nothing, ["no/such/folder"]),
        ("sample step --push nowhere", nothing, ["push is 'nowhere'", "OWNER/NAME"]),
        ("sample step --push me/..", nothing, ["me/.."]),
        ("sample step --push me/m --chat", nothing, ["push and chat"]),
        ("sample step --public true", nothing, ["--push OWNER/NAME"]),
    ],
    "types": [
        ("train_gpt2 c.toml --lr fast", nothing, ["lr", "fast"]),
        ("train_gpt2 c.toml --n_layer 1.5", nothing, ["n_layer", "1.5"]),
        ("train_gpt2 c.toml --bias maybe", nothing, ["bias", "maybe"]),
        ("fineweb --max_tokens 10M", nothing, ["max_tokens", "10M"]),
        ("hellaswag step --limit all", nothing, ["limit", "all"]),
        ("sample step --temperature 1e-40", nothing, ["1e-40", "0 takes the likeliest"],
         SAMPLE + " --temperature 0"),
        ("sample step --temperature warm", nothing, ["temperature", "warm"]),
        ("model --pos ropes", nothing, ["pos", "ropes", "rope", "alibi"], "model --pos rope"),
        ("train_gpt2 c.toml --schedule linear", nothing, ["schedule", "linear", "trapezoid"],
         "train_gpt2 c.toml --schedule trapezoid"),
        ("fineweb --source text.jsonl --out out --format txt", nothing, ["txt", "npy", "bin"]),
        ("hellaswag step --protocol all", nothing, ["protocol", "all", "harness"]),
        ("sample step --dtype fp8", nothing, ["dtype", "fp8", "bfloat16"]),
    ],
    "ranges": [
        ("train_gpt2 c.toml --lr 0", nothing, ["lr is 0"]),
        ("train_gpt2 c.toml --lr nan", nothing, ["lr", "nan"]),
        ("train_gpt2 c.toml --weight_decay nan", nothing, ["weight_decay", "nan"]),
        ("train_gpt2 c.toml --grad_clip inf", nothing, ["grad_clip", "inf", "number"]),
        ("train_gpt2 c.toml --beta1 1.5", nothing, ["beta1 is 1.5"]),
        ("train_gpt2 c.toml --grad_clip -1", nothing, ["grad_clip is -1"]),
        ("train_gpt2 c.toml --val_tokens 0", nothing, ["val_tokens is 0"]),
        ("train_gpt2 c.toml --seed 99999999999999999999", nothing, ["seed", "9999", "2**63"]),
        ("train_gpt2 c.toml --n_layer 0", nothing, ["n_layer is 0"]),
        ("train_gpt2 c.toml --dropout 1", nothing, ["dropout is 1"]),
        ("train_gpt2 c.toml --device cuda:99", nothing, ["cuda:99"]),
        ("train_gpt2 c.toml --device toaster", nothing, ["toaster"]),
        ("fineweb --source text.jsonl --out out --shard_tokens 0", nothing, ["--shard_tokens"]),
        ("fineweb --source text.jsonl --out out --val_tokens -1", nothing, ["--val_tokens", "-1"]),
        ("fineweb --source text.jsonl --out out --shard_tokens 3000000000", nothing, ["2**31"]),
        (f"{SCORE} --limit -1", nothing, ["limit", "0 or more"]),
        (f"{SCORE} --batch_tokens -1", nothing, ["batch_tokens"]),
        (f"{SAMPLE} --top_p 0", nothing, ["top_p is 0"]),
        (f"{SAMPLE} --temperature -1", nothing, ["temperature", "0 or more"]),
        (f"{SAMPLE} --temperature nan", nothing, ["temperature", "nan"]),
        (f"{SAMPLE} --num_samples 0", nothing, ["num_samples is 0"]),
        (f"{SAMPLE} --seed 99999999999999999999", nothing, ["seed", "2**63"]),
        ("train_gpt2 c.toml --n_embd 100000000", nothing, ["not enough memory", "GiB", "lower"],
         "train_gpt2 c.toml --n_embd 8"),
    ],
    "combinations": [
        ("train_gpt2 c.toml --n_embd 6 --n_head 4", nothing, ["n_embd 6", "n_head 4"],
         "train_gpt2 c.toml --n_embd 8 --n_head 4"),
        ("model --mlp moe --n_head 5", nothing, ["n_embd 768", "n_head 5"],
         "model --mlp moe --n_head 6"),
        ("model --n_head 5", nothing, ["n_embd 768", "n_head 5"], AS_SAID),
        ("model --n_head 4 --n_kv_head 3", nothing, ["n_head 4", "n_kv_head 3"]),
        ("model --window_pattern SL", nothing, ["window_pattern", "--window W"],
         "model --window_pattern SL --window 8"),
        ("model --pos kerple --pos_pattern rope,kerple --n_layer 1", nothing,
         ["no layer has pos kerple", "gives them rope"], "model --pos rope --n_layer 1"),
        ("model --attention_kernel flash --pos alibi", nothing, ["flash", "alibi", "use auto"],
         "model --attention_kernel auto --pos alibi"),
        ("train_gpt2 c.toml --attention_kernel flash --dropout 0.1", nothing, ["flash", "dropout"],
         "train_gpt2 c.toml --attention_kernel auto --dropout 0.1"),
        ("train_gpt2 c.toml --attention_kernel flex", nothing, ["flex", "use auto"],
         "train_gpt2 c.toml --attention_kernel auto"),
        ("train_gpt2 c.toml --total_batch_tokens 100", nothing, ["100", "block_size 16"], AS_SAID),
        ("train_gpt2 c.toml --micro_batch 3", nothing, ["micro_batch 3", "4 sequences"], AS_SAID),
        ("train_gpt2 c.toml --vocab_size 50256", nothing, ["vocab_size 50256", "50257"],
         "train_gpt2 c.toml --vocab_size 50304"),
        ("train_gpt2 c.toml --init_from step --n_layer 3", nothing,
         ["--init_from step", "n_layer", "3", "1"], "train_gpt2 c.toml --init_from step"),
        ("train_gpt2 c.toml --init_from step --n_embd 8", nothing, ["n_embd 4, not 8", "width"],
         "train_gpt2 c.toml --init_from step --dropout 0.5"),
        ("train_gpt2 c.toml --init_from step --block_size 32", nothing, ["block_size 16, not 32"],
         "train_gpt2 c.toml --init_from step --block_size 32 --pos rope"),
        ("train_gpt2 c.toml --patience -1", nothing, ["patience is -1"]),
        ("train_gpt2 --data_dir data --device cpu --init_from llama", nothing, ["97", "50257"]),
        ("train_gpt2 c.toml --run_dir run --seed 7", nothing, ["run", "seed", "1337", "7"],
         "train_gpt2 c.toml --run_dir out/x --seed 7"),
        ("train_gpt2 c.toml --run_dir run --resume never", nothing, ["already holds a run"],
         "train_gpt2 c.toml --run_dir out/x --resume never"),
        ("fineweb --source text.jsonl --out out --vocab_size 256", nothing, ["257", "50257", "256"],
         "fineweb --source text.jsonl --out out --vocab_size 257"),
        ("fineweb --source text.jsonl --out out --vocab_size 50258", nothing, ["50257", "50258"]),
        ("fineweb --pretokenized me/ready --vocab_size 512", nothing,
         ["--vocab_size", "--pretokenized", "leave it out"]),
        ("fineweb --source text.jsonl --out shards --shard_tokens 60", shards(),
         ["--shard_tokens", "100000000", "60"],
         "fineweb --source text.jsonl --out out --shard_tokens 60"),
    ],
    "configs": [
        ("train_gpt2 gone.toml", nothing, ["gone.toml"]),
        ("train_gpt2 data", nothing, ["cannot read config data"]),
        ("train_gpt2 c.toml", write("c.toml", "n_layer 3"), ["c.toml is not a TOML config"]),
        ("train_gpt2 c.toml", write("c.toml", b"\xff\xfe\0"), ["c.toml is not a TOML config"]),
        ("train_gpt2 c.yaml", write("c.yaml", "n_layer: 3\n"), ["c.yaml is not a TOML config"]),
        ("train_gpt2 c.json", write("c.json", '{"n_layer": 3}'), ["c.json is not a TOML config"]),
        ("train_gpt2 c.py", write("c.py", "open('CANARY', 'w')"), ["c.py is not a TOML config"]),
        ("train_gpt2 c.toml", write("c.toml", "[model]\nn_layer = 3"), ["c.toml", "model"]),
        ("train_gpt2 c.toml", write("c.toml", "n_layers = 3"),
         ["c.toml: n_layers", "did you mean n_layer?"]),
        ("train_gpt2 c.toml", write("c.toml", 'n_layer = "many"'), ["n_layer", "many"]),
        ("model c.toml", write("c.toml", "n_layer = [1]"), ["c.toml", "n_layer"]),
        ("train_gpt2 c.toml", write("c.toml", LFS), ["c.toml", "git lfs pull"]),
        ("train_gpt2 c.toml", write("c.toml", "a = " + "[" * 10**4), ["c.toml is not a TOML"]),
    ],
    "shards": [
        (f"{TRAIN} --data_dir nowhere", nothing, ["no folder nowhere", f"{PYDOCS} nowhere"]),
        (f"{TRAIN} --data_dir empty", lambda: os.mkdir("empty"), ["no train", f"{PYDOCS} empty"]),
        (TRAIN, remove("data/x_val_000000.npy"), ["no val shard", "data"]),
        (f"{TRAIN} --data_dir note.txt", nothing, ["note.txt"]),
        (TRAIN, cut(NPY, 300), [NPY, "is truncated"]),
        (TRAIN, cut(BIN, 1500), [BIN, "is truncated"]),
        (TRAIN, cut(BIN, 5), [BIN, "is truncated"]),
        (TRAIN, write(NPY), [NPY, "not a .npy file"]),
        (TRAIN, write(NPY, "one two"), [NPY, "not a .npy file"]),
        (TRAIN, write(NPY, b"\x93NUMPY\x01\0\x08\0{'a': ( "), [NPY, "not a .npy file"]),
        (TRAIN, write(NPY, LFS), [NPY, "git lfs pull"]),
        (TRAIN, write(BIN, LFS), [BIN, "git lfs pull"]),
        (TRAIN, lambda: llmc(BIN, length=2), [BIN, "longer than its header says"]),
        (TRAIN, lambda: llmc(BIN, length=-1), [BIN, "-1"]),
        (TRAIN, lambda: llmc(BIN, magic=20240801, version=7), [BIN, "magic 20240801"]),
        (TRAIN, lambda: llmc(BIN, version=2), [BIN, "version 2"]),
        (TRAIN, lambda: shard(NPY, [1] * 9, np.int32), [NPY, "int32", "uint16"]),
        (TRAIN, lambda: shard(NPY, [[1, 2]]), [NPY, "(1, 2)", "1-D"]),
        (TRAIN, lambda: shard(NPY, []), [NPY, "no tokens"]),
        (TRAIN, lambda: shard(NPY, [7] * 99 + [60000]), [NPY, "id 60000 at 99"]),
        (TRAIN, lambda: shard("data/x_val_000000.npy", [50257] * 99), ["x_val_000000", "50257"]),
        (TRAIN, both(
            write("data/manifest.json", json.dumps(MANIFEST)),
            edit("data/manifest.json", tokenizer={"name": "llama"})), ["data", "llama", "gpt2"]),
        (TRAIN, both(
            write("data/manifest.json", json.dumps(MANIFEST)),
            edit("data/manifest.json", settings={"vocab_size": 9})), ["data", "vocab_size 9"]),
        (INFO, lambda: shard(NPY, [7, 60000]), [NPY, "id 60000 at 1"]),
        (INFO, cut(NPY, 300), [NPY, "is truncated"]),
        ("fineweb info gone", nothing, ["no folder gone", f"{PYDOCS} gone"]),
        ("fineweb info empty", lambda: os.mkdir("empty"), ["no shards in empty"]),
        (f"{TRAIN} --total_batch_tokens 4096 --max_steps 0", nothing,
         ["1,000 train tokens", "4,096", "lower --total_batch_tokens"],
         f"{TRAIN} --total_batch_tokens 512 --max_steps 0"),
        (f"{TRAIN} --block_size 256 --total_batch_tokens 256", nothing,
         ["200 val tokens", "block_size 256", "--block_size"],
         f"{TRAIN} --block_size 128 --total_batch_tokens 256"),
    ],
    "sources": [
        ("fineweb --source gone.jsonl --out out", nothing, ["gone.jsonl", "OWNER/NAME"]),
        ("fineweb --source d --out out", lambda: os.mkdir("d"), [".parquet", ".jsonl", "d"]),
        ("fineweb --source a.html --out out", write("a.html", "text\nhi"), [".jsonl", "a.html"]),
        ("fineweb --source a.csv --out out", write("a.csv", "id,say\n1,hi there\n" * 9),
         ["a.csv", "no 'text' column", "id, say", "--text_column NAME"],
         "fineweb --source a.csv --out out --text_column say"),
        ("fineweb --source http://127.0.0.1:1/a.csv --out out", nothing,
         ["127.0.0.1:1/a.csv", "refused", "a local file"]),
        (TOKENIZE, write("text.jsonl", '{"text": "a"}\n{"txt": "b"}\n'), ["text.jsonl", "line 2"]),
        (TOKENIZE, write("text.jsonl", '{"text": "a"}\n{"text"'), ["text.jsonl", "line 2"]),
        (TOKENIZE, write("text.jsonl", '{"text": 7}'), ["text.jsonl", "record 0", "int"]),
        ("fineweb --source a.parquet --out out", parquet("a.parquet", body=["x"], title=["y"]),
         ["a.parquet", "no 'text' column", "body, title"],
         parquet("a.parquet", text=["one two"] * 20)),
        (TOKENIZE, write("text.jsonl", '{"text": "hi"}'), ["tokens", "too few"]),
        (TOKENIZE, write("text.jsonl"), ["tokens", "too few"]),
        (TOKENIZE, write("text.jsonl", LFS), ["text.jsonl", "git lfs pull"]),
        ("fineweb --source a.jsonl.gz --out out", write("a.jsonl.gz", b"no gzip"), ["a.jsonl.gz"]),
        ("fineweb --source a.jsonl.gz --out out",
         write("a.jsonl.gz", gzip.compress(b'{"text": "fine"}\n' * 99)[:-20]), ["a.jsonl.gz"]),
        ("fineweb --source a.jsonl.zst --out out", write("a.jsonl.zst", b"no"), ["a.jsonl.zst"]),
        ("fineweb --source a.parquet --out out", write("a.parquet", b"PAR1 no PAR1"),
         ["a.parquet"]),
        ("fineweb --source text.jsonl --out data", nothing,
         ["not made by this command", "--out"], TOKENIZE),
        ("fineweb --source text.jsonl --out shards", shards(write("shards/manifest.json", "{")),
         ["manifest.json is damaged"]),
        ("fineweb --source text.jsonl --out shards",
         shards(edit("shards/manifest.json", drop=["position"])), ["manifest.json", "position"]),
        ("fineweb --source text.jsonl --out shards",
         shards(cut("shards/edufineweb_train_000001.npy", 200)), ["edufineweb_train_000001.npy"]),
        ("fineweb --source text.jsonl --out shards",
         shards(write("text.jsonl", '{"text": "new and other"}\n' * 9)),
         ["text.jsonl changed", "--out"], TOKENIZE),
    ],
    "checkpoints": [
        ("sample no/such/folder", nothing, ["no/such/folder"]),
        ("train_gpt2 c.toml --init_from no/such/folder", nothing, ["no/such/folder"]),
        ("hellaswag step/model.safetensors --data val.jsonl", nothing, ["is a file", "folder"],
         SCORE),
        ("sample empty", lambda: os.mkdir("empty"), ["empty", "config.json"]),
        (SAMPLE, remove(WEIGHTS), [WEIGHTS, "safetensors"]),
        (SAMPLE, remove("step/config.json"), ["step/config.json"]),
        (SAMPLE, cut(WEIGHTS, 1000), [WEIGHTS, "not a whole safetensors"]),
        (SAMPLE, write(WEIGHTS), [WEIGHTS, "not a whole safetensors"]),
        (SAMPLE, write(WEIGHTS, LFS), [WEIGHTS, "git lfs pull"]),
        (SAMPLE, write("step/config.json", LFS), ["step/config.json", "git lfs pull"]),
        (SAMPLE, tensors(WEIGHTS, transformer__ln_f__bias=None), ["step lacks", "ln_f.bias"]),
        (SAMPLE, tensors(WEIGHTS, more=torch.ones(2)), ["step has unknown", "more"]),
        (SCORE, tensors(WEIGHTS, transformer__ln_f__bias=torch.ones(5)), ["ln_f", "(5,)", "(4,)"]),
        (SAMPLE, write("step/config.json", "{"), ["step/config.json is not JSON"]),
        (SAMPLE, write("step/config.json", b"\xff\xfe"), ["step/config.json is not JSON"]),
        (SAMPLE, write("step/config.json", "[]"), ["step/config.json"]),
        (SAMPLE, edit("step/config.json", model={"n_flux": 3}), ["another version", "n_flux"]),
        (SAMPLE, edit("step/config.json", model={"pos": "warp"}), ["warp", "rope"]),
        (SAMPLE, edit("step/config.json", model={"n_embd": "4"}), ["n_embd is '4', not int"]),
        (SAMPLE, edit("step/config.json", model={"bias": "no"}), ["bias is 'no', not bool"]),
        (SAMPLE, edit("step/config.json", model={"window_pattern": None}),
         ["window_pattern is None"]),
        (SAMPLE, edit("step/config.json", model={"vocab_size": 10**18}), ["not enough memory"]),
        (SAMPLE, write("step/config.json", "[" * 10**5), ["step/config.json is not JSON"]),
        (SCORE, tensors(WEIGHTS, transformer__ln_f__bias=torch.full((4,), torch.nan)),
         ["step", "ln_f.bias", "nan"]),
        (SAMPLE, tensors(WEIGHTS, transformer__ln_f__bias=torch.full((4,), torch.inf)),
         ["step", "ln_f.bias", "infinity"]),
        (SAMPLE, edit("step/config.json", model={"n_layer": 1.5}),
         ["step/config.json", "n_layer is 1.5"]),
        ("sample run", write("run/latest", "step_000009\n"), ["run", "step_000009"],
         write("run/latest", "step_000001\n")),
        ("sample run", flip(SUMMED), ["checksum", "remove SHA256SUMS"]),
        ("hellaswag run --data val.jsonl", flip(SUMMED), ["checksum"]),
        ("train_gpt2 c.toml --init_from run", flip(SUMMED), ["checksum"]),
        (RESUME, both(remove(SUMS), write("run/step_000001/config.json", "{}")),
         ["run", "another version"]),
        (RESUME, write("run/step_000001/config.json", "{}"), ["config.json", "checksum"]),
        (RESUME, cut(STATE, 1000), [STATE]),
        ("export step --out note.txt", nothing, ["note.txt", "--out"], "export llama --out out/n"),
        ("export step --out data", nothing, ["data", "empty folder"], "export llama --out out/n"),
        ("compare nowhere", nothing, ["nowhere", "give the folder of a run"]),
        ("compare run", write("run/log.jsonl", "{oops\n"), ["run/log.jsonl", "line 1"]),
        ("compare run", write("run/log.jsonl", "{oops"), ["run/log.jsonl with a whole line"]),
        ("compare run", write("run/log.jsonl", "[1]\n"), ["run/log.jsonl", "line 1"]),
        ("compare run", write("run/log.jsonl", b"\xff\xfe\n"), ["run/log.jsonl"]),
        ("compare run", write("run/log.jsonl", '{"step": 0, "val_loss": 3}\n'), ["no start entry"]),
        ("compare run", write("run/log.jsonl", '{"event": "start"}\n'),
         ["run/log.jsonl", "another version"]),
    ],
    "hugging face": [
        ("sample llama", edit("llama/config.json", model_type="opt"), ["model_type 'opt'", "gpt2"]),
        ("sample llama", edit("llama/config.json", hidden_act="gelu"), ["hidden_act", "gelu"]),
        ("sample llama", edit("llama/config.json", drop=["rms_norm_eps"]),
         ["config.json lacks 'rms_norm_eps'"]),
        ("sample llama", edit("llama/config.json", num_hidden_layers="two"), ["wrong type"]),
        ("sample llama", edit("llama/config.json", num_hidden_layers=2),
         ["llama lacks", "model.layers.1."]),
        ("sample llama", edit("llama/config.json", vocab_size=96), ["(97, 8)", "(96, 8)"]),
        ("sample llama", edit("llama/config.json", rope_parameters=7), ["llama", "wrong type"]),
        ("sample llama", write("llama/model.safetensors", LFS), ["llama", "git lfs pull"]),
        ("sample llama", write("llama/model.safetensors.index.json", "{}"), ["index.json"]),
        ("sample llama", write("llama/model.safetensors.index.json",
         '{"weight_map": {"a": "../step/model.safetensors"}}'), ["../step/model.safetensors"]),
        ("sample llama", nothing, ["llama", "tokenizer.json"]),
        ("sample llama --prompt hi", write("llama/tokenizer.json", "{}"), ["tokenizer.json"]),
        (SCORE.replace("step", "llama"), nothing, ["50257", "97"]),
        ("hellaswag wide --data val.jsonl",
         lambda: step_folder("wide", vocab_size=128256, vocab_used=128256), ["50257", "128256"]),
    ],
    "hellaswag": [
        ("hellaswag step --data gone.jsonl", nothing, ["gone.jsonl"], SCORE),
        (SCORE, write("val.jsonl", "{not json"), ["val.jsonl, line 1 is not JSON"]),
        (SCORE, write("val.jsonl", "[" * 10**5), ["val.jsonl, line 1 is not JSON"]),
        (SCORE, write("val.jsonl", "[1, 2]"), ["val.jsonl, line 1", "[1, 2]"]),
        (SCORE, item(ctx_b=..., ind=...), ["val.jsonl, line 2", "ctx_b, ind"]),
        (SCORE, item(endings=["a", "b", "c"]), ["val.jsonl, line 2", "four texts"]),
        (SCORE, item(endings="abcd"), ["val.jsonl, line 2", "four texts"]),
        (SCORE, item(label=4), ["val.jsonl, line 2", "label 4", "0, 1, 2, 3"]),
        (SCORE, item(endings=["a", "b", "c", 4]), ["val.jsonl, line 2", "four texts"]),
        (SCORE, item(label=""), ["val.jsonl, line 2", "label ''"]),
        (SCORE, item(label=True), ["val.jsonl, line 2", "label True"]),
        (SCORE, item(ctx=None), ["val.jsonl, line 2", "ctx is not a text"]),
        (SCORE, write("val.jsonl", "\n"), ["val.jsonl holds no items"]),
        (SCORE, write("val.jsonl", b"\xff\xfe"), ["val.jsonl"]),
        (SCORE, write("val.jsonl", LFS), ["val.jsonl", "git lfs pull"]),
        ("hellaswag step --data v.jsonl.gz", write("v.jsonl.gz", b"no gzip"), ["v.jsonl.gz"]),
        ("hellaswag step --data v.jsonl.gz",
         write("v.jsonl.gz", gzip.compress(json.dumps(ITEM).encode())[:-9]), ["v.jsonl.gz"]),
        ("hellaswag step --data v.parquet", write("v.parquet", b"none"), ["v.parquet"]),
        (f"{TRAIN} --hellaswag_every 1 --hellaswag_data gone.jsonl", nothing, ["gone.jsonl"],
         f"{TRAIN} --hellaswag_every 1 --hellaswag_data val.jsonl"),
    ],
    "prompts": [
        (f"{SAMPLE} --prompt '{'word ' * 20}'", nothing, ["tokens", "16", "shorten it"],
         f"{SAMPLE} --prompt word"),
    ],
    "places": [
        (f"{TRAIN} --run_dir note.txt", nothing, ["note.txt", "another --run_dir"],
         f"{TRAIN} --run_dir out/x"),
        (f"{TRAIN} --run_dir note.txt/x", nothing, ["note.txt/x", "another --run_dir"]),
        (f"{TRAIN} --run_dir /proc/no/run", nothing, ["/proc/no", "another --run_dir"]),
        ("fineweb --source text.jsonl --out note.txt", nothing, ["note.txt", "another path"],
         TOKENIZE),
        ("fineweb --source text.jsonl --out /proc/no", nothing, ["/proc/no", "another path"]),
        (f"{SCORE} --out note.txt/x.json", nothing, ["note.txt", "another path"],
         f"{SCORE} --out out/x.json"),
        (f"{SCORE} --out data", nothing, ["data is a folder"], f"{SCORE} --out out/x.json"),
        ("export step --out note.txt/x", nothing, ["note.txt", "another path"]),
        ("compare run --out note.txt", nothing, ["note.txt", "another path"],
         "compare run --out out"),
        ("model --plot note.txt", nothing, ["note.txt", "another path"]),
    ],
    "no network": [
        ("sample gpt2", nothing, ["gpt2", "Connection refused", "from a folder"], SAMPLE),
        ("train_gpt2 c.toml --init_from me/model", nothing, ["me/model", "from a folder"],
         "train_gpt2 c.toml --init_from step"),
        ("hellaswag gpt2 --data val.jsonl", nothing, ["gpt2", "from a folder"], SCORE),
        ("export gpt2 --out out/x", nothing, ["gpt2", "from a folder"]),
        ("fineweb --out out", nothing, ["HuggingFaceFW/fineweb-edu", "--source pydocs"], TOKENIZE),
        ("fineweb --pretokenized me/ready --out out", nothing, ["me/ready", "--source pydocs"]),
        ("hellaswag step", nothing, ["Rowan/hellaswag", "--data FILE"], SCORE),
    ],
    "bench": [
        ("bench train --peer nowhere", nothing, ["nowhere", "no checkout of build-nanogpt"]),
        ("bench train --peer data", nothing, ["data", "no checkout of build-nanogpt"]),
        ("bench drive", nothing, ["drive", "scaling"]),
        ("bench scaling --longest 512", nothing, ["longest is 512", "1024 or more"]),
        ("bench train --rounds 0", nothing, ["rounds is 0", "1 or more"]),
        ("bench train --n_embd 100", nothing, ["n_embd is 100", "multiple of 64"]),
        ("bench hellaswag --data nowhere.jsonl", nothing, ["nowhere.jsonl"]),
        ("bench fineweb --data nowhere", nothing, ["nowhere"]),
        ("bench generate --device cuda:9", nothing, ["cuda:9"]),
        ("bench train --out note.txt/x.json", nothing, ["note.txt", "another path"]),
        ("bench train --out data", nothing, ["data is a folder", "data/train.json"]),
    ],
    "pickles": [
        (SAMPLE, both(remove(WEIGHTS), bomb("step/pytorch_model.bin", torch.save)),
         ["step/model.safetensors", "safetensors"]),
        (SAMPLE, bomb(WEIGHTS), [WEIGHTS]),
        (SAMPLE, bomb(WEIGHTS, torch.save), [WEIGHTS]),
        (SAMPLE, bomb("step/config.json"), ["step/config.json"]),
        (RESUME, bomb(STATE), [STATE]),
        (RESUME, bomb(STATE, torch.save), [STATE]),
        (RESUME, both(remove(SUMS), bomb(STATE)), [STATE, "whole training state"]),
        (RESUME, both(remove(SUMS), bomb(STATE, torch.save)), [STATE, "training state"]),
        ("sample run", bomb("run/latest"), ["run"]),
        (RESUME, bomb("run/step_000001/config.json"), ["step_000001/config.json"]),
        ("sample llama",
         both(remove("llama/model.safetensors"), bomb("llama/pytorch_model.bin", torch.save)),
         ["llama/pytorch_model.bin", "no pickled object"]),
        ("sample llama", both(remove("llama/model.safetensors"), bomb("llama/pytorch_model.bin")),
         ["llama/pytorch_model.bin"]),
        ("sample ckpt.pt", bomb("ckpt.pt", torch.save), ["ckpt.pt", "no pickled object"], SAMPLE),
        ("sample ckpt.pt", bomb("ckpt.pt"), ["ckpt.pt", "torch.save"]),
        ("sample nano", bomb("nano/ckpt.pt", torch.save), ["nano/ckpt.pt", "no pickled object"]),
        ("train_gpt2 c.toml --init_from ckpt.pt", bomb("ckpt.pt", torch.save), ["ckpt.pt"]),
        ("hellaswag ckpt.pt --data val.jsonl", bomb("ckpt.pt", torch.save), ["ckpt.pt"], SCORE),
        ("export ckpt.pt --out out/x", bomb("ckpt.pt", torch.save), ["ckpt.pt"]),
        ("sample model.bin", bomb("model.bin", torch.save), ["model.bin", "no model of llm.c"]),
        ("sample run/best", bomb("run/best"), ["run/best names no step"]),
        ("sample llama", bomb("llama/model.safetensors", torch.save), ["model.safetensors"]),
        ("sample llama", bomb("llama/config.json"), ["config.json"]),
        ("sample llama", bomb("llama/model.safetensors.index.json"), ["index.json"]),
        ("sample llama", bomb("llama/tokenizer.json"), ["tokenizer.json"]),
        (TRAIN, bomb(NPY, object_array), [NPY, "object"]),
        (TRAIN, bomb(NPY), [NPY]),
        (TRAIN, bomb(BIN), [BIN]),
        (INFO, bomb(NPY, object_array), [NPY, "object"]),
        ("fineweb --source text.jsonl --out shards", shards(bomb("shards/manifest.json")),
         ["manifest.json is damaged"]),
        (TOKENIZE, bomb("text.jsonl"), ["text.jsonl"]),
        ("fineweb --source a.parquet --out out", bomb("a.parquet"), ["a.parquet"]),
        (SCORE, bomb("val.jsonl"), ["val.jsonl"]),
        ("hellaswag step --data v.parquet", bomb("v.parquet"), ["v.parquet"]),
        ("train_gpt2 c.toml", bomb("c.toml"), ["c.toml is not a TOML config"]),
        ("compare run", bomb("run/log.jsonl"), ["run/log.jsonl"]),
    ],
}  # fmt: skip
ROWS = [
    pytest.param(*row, *[""] * (4 - len(row)), id=f"{kind}: {row[0]} > {row[2][-1]}")
    for kind, rows in CASES.items()
    for row in rows
]


@pytest.mark.parametrize("line, prepare, words, fix", ROWS)
def test_bad_input_is_one_line_with_a_hint_that_works(here, line, prepare, words, fix):
    prepare()
    error = refuse(line, words)
    if fix == AS_SAID:
        line += " " + re.search(r"try (--\w+ \S+)", error)[1]
    elif isinstance(fix, str):
        line = fix or line
    else:
        fix()
    if fix:
        assert run(line)[0] == 0, run(line)[1]


def test_an_id_beyond_the_vocabulary_is_found_where_it_is_read(here):
    """The first 65,536 of every shard are checked at the start, the rest as it is read."""
    shard(NPY, [7] * 70000 + [60000] + [7] * 99)
    config = train_gpt2.TrainConfig(data_dir="data")
    windows = open_windows(config.data_dir, "train", GPTConfig(block_size=16))
    windows.read([0, 4373])
    with pytest.raises(ValueError, match=rf"{NPY} holds id 60000 at 70000"):
        windows.read([0, 4374])


@pytest.mark.parametrize("dump", [None, torch.save, object_array])
def test_the_bomb_goes_off_where_pickles_are_trusted(here, dump):
    bomb("bomb", dump)()
    assert not os.path.exists("CANARY")
    if dump is torch.save:
        torch.load("bomb", weights_only=False)
    elif dump is object_array:
        np.load("bomb", allow_pickle=True)
    else:
        pickle.loads(Path("bomb").read_bytes())
    assert os.path.exists("CANARY")


def test_a_batch_that_the_ranks_cannot_share_is_refused(here, monkeypatch):
    """As the first of three ranks, which get no further than this: nothing is sent yet."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *a, **k: None)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    error = refuse(TRAIN, ["total_batch_tokens 64", "block_size 16 x 3 ranks"])
    batch = int(re.search(r"try --total_batch_tokens (\d+)", error)[1])
    assert batch % (16 * 3) == 0 and batch // 16 // 3 >= 1


@pytest.mark.parametrize(
    "line, package",
    [
        ("compare run --out out", "matplotlib"),
        ("model --plot out", "matplotlib"),
        ("sample llama", "tokenizers"),
    ],
)
def test_a_missing_package_is_named_with_its_pip_line(here, monkeypatch, line, package):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    refuse(line, [f"pip install {package}"])


# ---------------------------------------------------------------------------------------------
# A vocabulary that is not GPT-2's


def words_tokenizer(path):
    """w0 w1 ... w96, a word each."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(path)


@pytest.mark.parametrize("where", ["a folder", "the hub"])
def test_a_foreign_model_speaks_by_its_own_tokenizer(here, monkeypatch, capsys, where):
    pytest.importorskip("tokenizers")
    words_tokenizer("llama/tokenizer.json")
    model = GPT.from_pretrained("llama")
    ids = model.generate(torch.tensor([[5, 6]]), 4, temperature=0)[0].tolist()
    name = "llama" if where == "a folder" else "me/llama"
    files = {p.name: p.read_bytes() for p in Path("llama").iterdir()}
    # in fp32: with bf16's rounding one random model in sixty has another likeliest token
    flags = ["--prompt=w5 w6", "--max_new_tokens=4", "--temperature=0", "--dtype=float32"]
    with serve({"me/llama": files}) as hub:
        point_client_at(hub.url, monkeypatch)
        monkeypatch.setattr(sys, "argv", ["sample.py", name, *flags])
        cli.run(sample.main)
    assert capsys.readouterr().out.splitlines()[0] == " ".join(f"w{i}" for i in ids)


# ---------------------------------------------------------------------------------------------
# The hub: what it lists and sends is not trusted, and secrets stay secret


def shard_bytes(ids=(5, 50256, 9)):
    llmc("made.bin", ids)
    return Path("made.bin").read_bytes()


@pytest.mark.parametrize(
    "name", ["../../x_train_1.bin", "a/../../../x_train_1.bin", "/x_train_1.bin"]
)
def test_a_listed_name_outside_the_folder_is_refused(here, monkeypatch, name):
    with serve({"datasets/me/ready": {name: shard_bytes()}}) as hub:
        point_client_at(hub.url, monkeypatch)
        refuse("fineweb --pretokenized me/ready --out out", [name, "outside its folder"])
        assert hub.count("GET", "x_train_1.bin") == 0
    assert not list(here.parent.rglob("x_train_1.bin")) and not os.path.exists("/x_train_1.bin")


def test_a_parquet_listed_outside_the_folder_is_refused(here, monkeypatch):
    with serve({"datasets/me/set": {"sample/10BT/../../../../x_train.parquet": b"PAR1"}}) as hub:
        point_client_at(hub.url, monkeypatch)
        refuse("fineweb --source me/set --out out", ["x_train.parquet", "outside its folder"])
    assert not list(here.parent.rglob("x_train.parquet"))


def test_a_download_that_its_hash_disowns_is_fetched_again(here, monkeypatch, capsys):
    """Same size, a whole shard by its header, one id changed: only the hash tells."""
    good, bad = shard_bytes((5, 50256, 9)), shard_bytes((5, 50256, 8))
    monkeypatch.setattr("nanoswitch.hub.BACKOFF_SECONDS", 0.001)
    files = {"x_val_0.bin": good, "x_train_1.bin": good}
    with serve({"datasets/me/ready": files}, {"GET train_1.bin": [bad]}) as hub:
        point_client_at(hub.url, monkeypatch)
        status, error = run("fineweb --pretokenized me/ready --out out")
        assert status == 0 and "damaged on the way: its sha256 is not" in error
        assert hub.count("GET", "train_1.bin") == 2
    assert Path("out/x_train_1.bin").read_bytes() == good


def test_gits_hash_of_small_files_counts_too(tmp_path):
    """The value is what `git hash-object` prints for a file that holds "hello" and a newline."""
    (tmp_path / "a").write_text("hello\n")
    check_hash(tmp_path / "a", "ce013625030ba8dba906f756967f9e9ca394464a")
    with pytest.raises(ValueError, match="damaged"):
        check_hash(tmp_path / "a", "ce013625030ba8dba906f756967f9e9ca394464b")


@pytest.mark.parametrize("fault", [401, 403, 500])
def test_the_hubs_token_is_in_no_message(here, monkeypatch, fault):
    monkeypatch.setenv("HF_TOKEN", "hf_SECRETsecretSECRET")
    monkeypatch.setattr("nanoswitch.hub.BACKOFF_SECONDS", 0.001)
    with serve({"me/m": {}}, {"HEAD config.json": [fault] * 9}) as hub:
        point_client_at(hub.url, monkeypatch)
        for line in ("sample me/m", f"{TRAIN} --init_from me/m"):
            status, error = run(line)
            assert status == 1 and "me/m" in error and "SECRET" not in error


# ---------------------------------------------------------------------------------------------
# As processes


def process(line, **env):
    script, *argv = shlex.split(line)
    command = [sys.executable, str(ROOT / f"{script}.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env)


def test_a_name_that_does_not_resolve_fails_at_once(here):
    """.invalid never resolves (RFC 2606); six tries with back-off would take half a minute."""
    done = process("sample gpt22", HF_ENDPOINT="http://hub.invalid", HF_HUB_OFFLINE="0")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "gpt22" in done.stderr and "tries" not in done.stderr and "a folder" in done.stderr


def test_the_scripts_themselves_end_in_one_line_and_debug_shows_the_traceback(here):
    lines = {
        f"{TRAIN} --data_dir nowhere": 1,
        "fineweb info nowhere": 1,
        "train_gpt2 --n_layer x": 2,
    }
    for line, status in lines.items():
        done = process(line)
        assert done.returncode == status and done.stdout == "", done
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    done = process("fineweb info nowhere --debug")
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
    assert "list_shards" in done.stderr and "no folder nowhere" in done.stderr


def test_no_script_evaluates_unpickles_or_starts_a_shell():
    """By syntax tree: exec and eval, pickles, YAML, shells; torch.load only with weights only."""
    banned = {"eval", "exec", "compile", "__import__", "system", "popen"}
    unsafe = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "yaml"}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("nanoswitch/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            words = {k.arg: ast.unparse(k.value) for k in node.keywords}
            call = ast.unparse(node.func)
            if path.name == "bench.py" and call in ("exec", "compile"):
                continue  # the peer's scripts, which the user asks it to run
            assert call not in banned and call.split(".")[0] not in unsafe, (path.name, call)
            assert call not in ("os.system", "os.popen"), (path.name, call)
            assert "shell" not in words and words.get("allow_pickle", "False") == "False", path
            assert call != "np.load", path  # shards are mapped, their headers parsed
            if call == "torch.load":
                assert words["weights_only"] == "True", path
