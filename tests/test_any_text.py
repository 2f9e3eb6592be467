"""Every kind of text file through fineweb.py, against tiktoken called on the texts themselves.

Files are written by Python's own csv, json, gzip, bz2, lzma and zipfile, by zstandard and pyarrow;
what is read from them must have the ids of the texts that went in.
"""

import bz2
import contextlib
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import test_fineweb as tf
import zstandard
from builders import write_texts
from hub_server import serve
from test_fineweb import expected_ids, make_texts, stream

import fineweb
from nanoswitch import cli, readers, streams
from nanoswitch.web import file_name

reference, client = tf.reference, tf.client  # fixtures

NASTY = [
    'quotes "here" and ""there""',
    "commas, semicolons; tabs\tand\nline\nbreaks",
    "windows\r\nline ends\r\n",
    "  spaces around  ",
    "NULL",
    "NA",
    "42",
    "3.10",
    "été 中文 🎉 \u2028 \u00a0 end",
    "nul \x00 inside",
    "\ufeffa mark inside",
    "{'text': [1, 2]}",
    "<|endoftext|>",
    "word " * 3000,
    "",
]
TEXTS = [*NASTY, *make_texts(25, seed=1)]


def table(texts):
    return [{"id": i, "text": text, "url": f"http://a/{i},b"} for i, text in enumerate(texts)]


def as_csv(texts, delimiter=",", end="\n", names=("id", "text", "url"), quoting=csv.QUOTE_MINIMAL):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerows([names, *([i, text, f"http://a/{i},b"] for i, text in enumerate(texts))])
    return file.getvalue().encode()


def as_arrow(texts, new, rows=7):
    import pyarrow as pa

    held, file = pa.table({"id": list(range(len(texts))), "text": texts}), io.BytesIO()
    with new(file, held.schema) as writer:
        writer.write_table(held, max_chunksize=rows)
    return file.getvalue()


def as_parquet(texts):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file, row_group_size=7)
    return file.getvalue()


def arrow_stream(texts):
    import pyarrow as pa

    return as_arrow(texts, pa.ipc.new_stream)


def arrow_file(texts):
    import pyarrow as pa

    return as_arrow(texts, pa.ipc.new_file)


def as_lines(texts):
    return "".join(json.dumps(row) + "\n" for row in table(texts)).encode()


WRITERS = {
    "csv": as_csv,
    "tsv": lambda texts: as_csv(texts, "\t"),
    "jsonl": as_lines,
    "ndjson": as_lines,
    "json": lambda texts: json.dumps(table(texts), indent=2, ensure_ascii=False).encode(),
    "arrow": arrow_stream,
    "feather": arrow_file,
    "parquet": as_parquet,
    "txt": lambda texts: "\n".join(texts).encode(),
    "md": lambda texts: "\n".join(texts).encode(),
}
PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def texts_of(kind, texts):
    return ["\n".join(texts)] if kind in ("txt", "md") else texts


def tokenize(source, out, *flags):
    tf.run("--source", source, "--out", out, *flags)
    return stream(out)


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_in_every_packing(tmp_path, reference, kind, packed):
    path = tmp_path / f"a.{kind}{packed}"
    data = WRITERS[kind](TEXTS)
    half = len(data) // 2
    # two members, as `cat a.gz b.gz` and parallel packers leave them
    parts = (data[:half], data[half:]) if packed else (data,)
    path.write_bytes(b"".join(PACKERS[packed](part) for part in parts))
    found = tokenize(path, tmp_path / "out")
    assert found == expected_ids(texts_of(kind, TEXTS), reference)


ZIPPED = [("zip", inner) for inner in ("csv", "tsv", "jsonl", "json", "txt", "md")]


@pytest.mark.parametrize("kind, inner", [*ZIPPED, ("tar", "txt")])
def test_archives(tmp_path, reference, kind, inner):
    # `datasets` makes \n of the line ends of a text file
    plain = [text for text in TEXTS if "\r" not in text]
    first, second = plain[:15], plain[15:]
    if kind == "tar":
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            for i, text in enumerate(plain):
                info = tarfile.TarInfo(f"{i:03d}.txt")
                info.size = len(text.encode())
                archive.addfile(info, io.BytesIO(text.encode()))
        expected = plain
    else:
        with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("__MACOSX/._a", "of the system")
            archive.writestr(f"in/a.{inner}", WRITERS[inner](first))
            archive.writestr(f"in/b.{inner}", WRITERS[inner](second))
        expected = texts_of(inner, first) + texts_of(inner, second)
    assert tokenize(tmp_path / f"a.{kind}", tmp_path / "out") == expected_ids(expected, reference)


# --- marks and line ends


MARKED = ["utf-8-sig", "utf-16", "utf-32", "utf-16-be", "utf-32-be"]


@pytest.mark.parametrize("encoding", MARKED)
@pytest.mark.parametrize("kind", ["txt", "md", "csv", "tsv", "jsonl", "json"])
def test_byte_order_marks_are_no_text(tmp_path, reference, kind, encoding):
    text = WRITERS[kind](TEXTS).decode()
    mark = "\ufeff" if encoding.endswith("-be") else ""
    (tmp_path / f"a.{kind}").write_bytes((mark + text).encode(encoding))
    (tmp_path / f"b.{kind}.gz").write_bytes(gzip.compress((mark + text).encode(encoding)))
    for name in (f"a.{kind}", f"b.{kind}.gz"):
        found = tokenize(tmp_path / name, tmp_path / name[0])
        assert found == expected_ids(texts_of(kind, TEXTS), reference)


def test_windows_line_ends(tmp_path, reference):
    """Between records they are nothing, inside a text they stay."""
    lines = as_lines(TEXTS).replace(b"\n", b"\r\n")
    files = {
        "a.csv": as_csv(TEXTS, end="\r\n"),
        "a.tsv": as_csv(TEXTS, "\t", end="\r\n"),
        "old_mac.csv": as_csv(TEXTS, end="\r", quoting=csv.QUOTE_ALL),
        "a.jsonl": lines,
        "a.json": json.dumps(table(TEXTS), indent=1).replace("\n", "\r\n").encode(),
        "lines.json": lines,
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert tokenize(tmp_path / name, tmp_path / f"{name}-out") == expected_ids(TEXTS, reference)
    text = "one\r\ntwo\r\n\r\nthree and some more of it\r\n"
    for name in ("a.txt", "a.md"):
        (tmp_path / name).write_bytes(text.encode())
        out = tmp_path / f"{name}-out"
        assert tokenize(tmp_path / name, out) == expected_ids([text], reference)


# --- memory


def test_a_long_array_is_read_in_pieces():
    """When the first record comes, no more than two megabytes of the array were read."""
    read = 0

    def blocks():
        nonlocal read
        for block in (b"[", *[json.dumps({"text": "x" * 1000}).encode() + b","] * 20_000, b"{}]"):
            read += len(block)
            yield block

    values = readers.json_values(io.BufferedReader(streams.Chunks(blocks())))
    assert next(values) == {"text": "x" * 1000} and read < 2 << 20
    assert sum(1 for _ in values) == 20_000 and read > 20_000_000


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "txt", "md"])
def test_reading_takes_a_few_blocks_at_once(tmp_path, monkeypatch, kind):
    """Before the first record comes, a small part of 40 megabytes is read."""
    path, read = tmp_path / f"a.{kind}.gz", 0
    path.write_bytes(gzip.compress(WRITERS[kind](["a few words " * 100] * 33_000), 1))

    class Counted(gzip.GzipFile):
        def read(self, *size):
            return self.count(super().read(*size))

        def read1(self, *size):
            return self.count(super().read1(*size))

        def readline(self, *size):
            return self.count(super().readline(*size))

        def count(self, data):
            nonlocal read
            read += len(data)
            return data

    monkeypatch.setattr(streams.gzip, "GzipFile", Counted)
    records = readers.READERS[f".{kind}.gz"](str(path), 0)
    next(records)
    assert 1000 < read < 24 << 20
    assert sum(1 for _ in records) > (5 if kind in ("txt", "md") else 32_000)
    assert read > 39_000_000


def test_records_across_blocks(tmp_path, monkeypatch, reference):
    """Records longer and shorter than what is read at once, cut at every place."""
    monkeypatch.setattr(readers, "ROW_BLOCKS", (300, 3000, 1 << 20))
    for kind in ("csv", "tsv"):
        (tmp_path / f"a.{kind}").write_bytes(WRITERS[kind](TEXTS))
        found = tokenize(tmp_path / f"a.{kind}", tmp_path / kind)
        assert found == expected_ids(TEXTS, reference)
    data = json.dumps([{"n": -1.5e3, "text": t, "b": [True, None]} for t in TEXTS]).encode()
    whole = json.loads(data)
    for size in (1, 7, 64):
        pieces = (data[i : i + size] for i in range(0, len(data), size))
        assert list(readers.json_values(io.BufferedReader(streams.Chunks(pieces), 16))) == whole


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 21])
def test_json_is_decoded_however_it_is_cut(monkeypatch, size):
    monkeypatch.setattr(readers, "JSON_READ", size)
    values = [{"a": '\u00e9 \\" é', "b": [1, -2.5e-7, True, False, None, "x"]}, [], "s", {}]
    for shift in range(12):
        for text in (json.dumps(values), json.dumps(values, indent=1, ensure_ascii=False)):
            assert list(readers.json_values(io.BytesIO(b" " * shift + text.encode()))) == values
        lines = "\n".join(json.dumps(value) for value in values if value != [])
        found = list(readers.json_values(io.BytesIO(b" " * shift + lines.encode())))
        assert found == [value for value in values if value != []]


def test_what_is_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "ROW_BLOCKS", (100, 1000))
    monkeypatch.setattr(readers, "LONGEST_VALUE", 1000)
    monkeypatch.setattr(readers, "LONGEST_LINE", 1000)
    long = ["short", "x" * 2_000_000]
    for kind, words in [
        ("csv", "a row is longer than 1,000 bytes"),
        ("json", "a record is longer than 1,000 characters.*jq"),
        ("jsonl", "line 2 is longer than 1,000 bytes"),
    ]:
        (tmp_path / f"a.{kind}").write_bytes(WRITERS[kind](long))
        with pytest.raises(ValueError, match=words):
            tokenize(tmp_path / f"a.{kind}", tmp_path / kind)


# --- which column


@pytest.mark.parametrize(
    "names, strings, wanted, expected",
    [
        (["text", "content"], ["text", "content"], "text", "text"),
        (["text", "content"], ["text", "content"], "content", "content"),
        (["id", "Text"], ["id", "Text"], "text", "Text"),
        (["id", " content"], ["id", " content"], "text", " content"),
        (["document", "content"], ["document", "content"], "text", "content"),
        (["id", "story"], ["story"], "text", "story"),
        (["__key__", "txt", "__url__"], ["__key__", "txt", "__url__"], "text", "txt"),
        (["text"], [], "text", "text"),
        (["id", "story"], ["id", "story"], "text", None),
        (["id", "n"], [], "text", None),
        (["content"], ["content"], "body", None),  # what was asked for is not there
        (["TEXT", "Text"], ["TEXT", "Text"], "text", None),
        ([], [], "text", None),
    ],
)
def test_choose_column(names, strings, wanted, expected):
    if expected:
        assert readers.choose_column(names, strings, wanted) == expected
        return
    with pytest.raises(ValueError, match=f"no '{wanted}' column; it has .*--text_column NAME"):
        readers.choose_column(names, strings, wanted)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "arrow", "parquet"])
def test_another_column_is_said_and_recorded(tmp_path, reference, kind, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / f"a.{kind}"
    rows = [{"n": i, "content": t, "other": "no"} for i, t in enumerate(TEXTS)]
    held = pa.Table.from_pylist(rows)
    if kind in ("csv", "tsv"):
        names = ("n", "content", "other")
        path.write_bytes(as_csv(TEXTS, {"csv": ",", "tsv": "\t"}[kind], names=names))
    elif kind in ("jsonl", "json"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "arrow":
        with pa.ipc.new_stream(path, held.schema) as writer:
            writer.write_table(held)
    else:
        pq.write_table(held, path)
    assert tokenize(path, tmp_path / "out") == expected_ids(TEXTS, reference)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "column" in line]
    assert f"a.{kind}" in line and "takes 'content'" in line and "--text_column" in line
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["settings"]["text_column"] == "text"
    assert list(manifest["text_columns"].values()) == ["content"]
    named = tokenize(path, tmp_path / "named", "--text_column", "content")
    assert named == stream(tmp_path / "out")
    assert "takes" not in capsys.readouterr().err
    manifest = json.loads((tmp_path / "named/manifest.json").read_text())
    assert (manifest["settings"]["text_column"], manifest["text_columns"]) == ("content", {})
    with pytest.raises(ValueError, match="no 'body' column; it has n, content, other: name one"):
        tokenize(path, tmp_path / "no", "--text_column", "body")


def test_the_column_is_a_setting_of_the_shards(tmp_path):
    source, out = write_texts(tmp_path / "a.jsonl", make_texts(30)), tmp_path / "out"
    tokenize(source, out)
    with pytest.raises(ValueError, match="--text_column text, not id"):
        tokenize(source, out, "--text_column", "id")
    with pytest.raises(ValueError, match="--text_column has no effect"):
        fineweb.Config(pretokenized="me/ready", text_column="content")
    path = out / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["settings"]["text_column"], manifest["text_columns"]  # as older ones are
    path.write_text(json.dumps(manifest))
    tokenize(source, out)
    with pytest.raises(ValueError, match="--text_column text, not id"):
        tokenize(source, out, "--text_column", "id")


def test_settings_bind_once_there_is_a_shard(tmp_path, reference):
    source = write_texts(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(ValueError, match="no 'body' column"):
        tokenize(source, tmp_path / "out", "--text_column", "body")
    assert tokenize(source, tmp_path / "out") == expected_ids(TEXTS, reference)
    with pytest.raises(ValueError, match="--text_column text, not body"):
        tokenize(source, tmp_path / "out", "--text_column", "body")


def test_columns_are_recorded_for_what_is_in_the_shards_only(tmp_path):
    """Reading runs ahead of the shards: which files it has opened must not show."""
    (tmp_path / "in").mkdir()
    for i in range(4):
        rows = [json.dumps({f"c{i}": text}) for text in make_texts(20, seed=i)]
        (tmp_path / f"in/{i}.jsonl").write_text("\n".join(rows))
    tokenize(tmp_path / "in", tmp_path / "all")
    manifest = json.loads((tmp_path / "all/manifest.json").read_text())
    assert manifest["text_columns"] == {f"{i}.jsonl": f"c{i}" for i in range(4)}
    flags = ["--max_tokens", 100, "--val_tokens", 20]
    tokenize(tmp_path / "in", tmp_path / "few", *flags)
    manifest = json.loads((tmp_path / "few/manifest.json").read_text())
    assert manifest["text_columns"] == {"0.jsonl": "c0"}


# --- folders


def test_a_folder_of_everything(tmp_path, reference, capsys):
    folder, texts, n = tmp_path / "in", [], 0
    folder.mkdir()
    for n, (kind, packed) in enumerate((k, p) for k in WRITERS for p in PACKERS):
        some = make_texts(3, seed=n, words=20)
        (folder / f"{n:03d}.{kind}{packed}").write_bytes(PACKERS[packed](WRITERS[kind](some)))
        texts += texts_of(kind, some)
    (folder / "999.TXT").write_text("loud names too")
    texts.append("loud names too")
    for name in ("._000.csv", ".DS_Store", ".git/x.txt", "__MACOSX/y.txt", "sub/.z.jsonl"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\x00\x05\x16\x07 hidden")
    for name in ("README.md", "dataset_info.json", "state.json", "a.html", "b.pdf"):
        (folder / name).write_text("no text of this folder")
    out = folder / "shards"  # inside: its own manifest.json is no source
    for _ in range(2):
        assert tokenize(folder, out, "--shard_tokens", 1000) == expected_ids(texts, reference)
    (line,) = {line for line in capsys.readouterr().err.splitlines() if "passed over" in line}
    hidden = "5 hidden (.DS_Store, ._000.csv, .git/, __MACOSX/, sub/.z.jsonl)"
    about = "3 about the others (README.md, dataset_info.json, state.json)"
    assert hidden in line and about in line
    assert "2 of kinds that are not read (a.html, b.pdf)" in line


def test_a_folder_of_markdown_has_its_readme(tmp_path, reference):
    (tmp_path / "in").mkdir()
    texts = ["# README\nabout this", "# a\nsome words here", "# b\nand some more of them"]
    for name, text in zip(("README.md", "a.md", "b.md"), texts, strict=True):
        (tmp_path / "in" / name).write_text(text)
    assert tokenize(tmp_path / "in", tmp_path / "out") == expected_ids(texts, reference)


def test_what_datasets_saves(tmp_path, reference):
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "in", num_shards=3)
    assert tokenize(tmp_path / "in", tmp_path / "out") == expected_ids(TEXTS, reference)


def test_parts_of_mixed_formats(tmp_path, reference):
    (tmp_path / "in").mkdir()
    texts = [make_texts(20, seed) for seed in range(4)]
    kinds = ("csv.gz", "json", "arrow", "txt")
    for i, (kind, some) in enumerate(zip(kinds, texts, strict=True)):
        data = WRITERS[kind.split(".")[0]](some)
        data = gzip.compress(data) if kind.endswith(".gz") else data
        (tmp_path / f"in/{i}.{kind}").write_bytes(data)
    for part in ("2/2", "1/2"):
        tf.run_part(part, tmp_path / "in", tmp_path / "out")
    kept = [*texts[0], *texts[2], *texts[1], "\n".join(texts[3])]
    split = {s: fineweb_shards(tmp_path / "out", s) for s in ("val", "train")}
    assert split["val"] + split["train"] == expected_ids(kept, reference)


def fineweb_shards(folder, split):
    from nanoswitch.shards import load_shards

    return [i for shard in load_shards(str(folder), split) for i in shard.tolist()]


# --- resuming

RESUMED = ["csv", "tsv.zst", "jsonl.xz", "json", "json.gz", "arrow", "feather", "arrow.bz2"]
RESUMED += ["parquet.gz", "md", "txt.zst", "zip", "tar"]


@pytest.mark.parametrize("kind", RESUMED)
def test_killed_and_resumed_is_byte_identical(tmp_path, kind, monkeypatch):
    texts = make_texts(80, seed=len(kind))
    name, _, packed = kind.partition(".")
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.jsonl", as_lines(texts))
    elif kind == "tar":
        with tarfile.open(path, "w") as archive:
            for i, text in enumerate(texts):
                info = tarfile.TarInfo(f"{i:03d}.txt")
                info.size = len(text.encode())
                archive.addfile(info, io.BytesIO(text.encode()))
    else:
        if "jsonl" in kind:  # and the column is not called text
            data = as_lines(texts).replace(b'"text"', b'"content"')
        else:
            data = WRITERS[name](texts)
        path.write_bytes(PACKERS["." + packed if packed else ""](data))
    flags = ["--source", path, "--shard_tokens", 700, "--val_tokens", 500]
    tf.run(*flags, "--out", tmp_path / "whole")
    code = tf.KILLER.format(root=str(tf.ROOT))
    command = [sys.executable, "-c", code, "7", "after", *map(str, flags), "--out"]
    killed = subprocess.run([*command, tmp_path / "out"], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(tf.done_shards(tmp_path / "out")) == 3
    tf.run(*flags, "--out", tmp_path / "out")
    assert len(tf.done_shards(tmp_path / "out")) > 5
    assert tf.tree_bytes(tmp_path / "out") == tf.tree_bytes(tmp_path / "whole")


# --- the hub


@pytest.mark.parametrize("kind", ["csv", "jsonl.gz", "json", "arrow", "txt.xz", "zip"])
def test_a_hub_dataset_that_is_not_parquet(tmp_path, reference, client, kind):
    texts, files = [make_texts(20, seed) for seed in range(3)], {"README.md": b"# about"}
    for i, some in enumerate(texts):
        data = WRITERS["jsonl" if kind == "zip" else kind.split(".")[0]](some)
        if kind == "zip":
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("a.jsonl", data)
            data = file.getvalue()
        packed = "." + kind.partition(".")[2] if "." in kind else ""
        files[f"data/train-{i}.{kind}"] = PACKERS[packed](data)
    files |= {"data/test.csv": b"text\nof another split", "dataset_infos.json": b"{}"}
    files |= {"notes.md": b"of a kind that comes later"}
    faults = {f"GET train-1.{kind}": [503, "drop"]}
    expected = [text for some in texts for text in texts_of(kind.split(".")[0], some)]
    if kind not in ("csv", "jsonl.gz", "arrow"):
        del files["data/test.csv"], files["notes.md"]
    with serve({"datasets/me/set": files}, faults) as hub:
        client(hub)
        found = tokenize("me/set", tmp_path / "out", "--shard_tokens", 400)
        assert found == expected_ids(expected, reference)
        assert not any("test.csv" in line or "notes" in line for line in hub.requests)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert [name for name, _ in manifest["source"]["files"]] == [
        f"data/train-{i}.{kind}" for i in range(3)
    ]
    assert not (tmp_path / "out/downloads").exists()


def test_a_hub_dataset_resumes(tmp_path, reference, client):
    texts = [make_texts(20, seed) for seed in range(3)]
    files = {f"{i}.csv": as_csv(some) for i, some in enumerate(texts)}
    flags = ["--shard_tokens", 300, "--val_tokens", 100]
    with serve({"datasets/me/set": files}, {"HEAD 2.csv": [404]}) as hub:
        client(hub)
        with pytest.raises(ValueError, match=r"2\.csv"):
            tokenize("me/set", tmp_path / "out", *flags)
        done = len(tf.done_shards(tmp_path / "out"))
        assert done > 2
        found = tokenize("me/set", tmp_path / "out", *flags)
        assert found == expected_ids([t for some in texts for t in some], reference)
        tokenize("me/set", tmp_path / "whole", *flags)
    assert tf.tree_bytes(tmp_path / "out") == tf.tree_bytes(tmp_path / "whole")


def test_a_hub_dataset_without_text(tmp_path, client):
    with serve({"datasets/me/set": {"README.md": b"# x", "a.png": b"x", ".x.csv": b"y"}}) as hub:
        client(hub)
        with pytest.raises(ValueError, match=r"me/set has no \.parquet, .*\.csv.* files"):
            tokenize("me/set", tmp_path / "out")


# --- the web


class Web:
    """A server of one file that knows Range and If-Range; `cut`: after how many bytes each next
    answer ends early; `asked`: the Range of each request."""

    def __init__(self, data, kind="application/octet-stream", etag='"1"', cut=(), ranges=True):
        self.data, self.kind, self.etag, self.cut, self.asked = data, kind, etag, list(cut), []
        self.ranges, self.status = ranges, []


@contextlib.contextmanager
def web(state):
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            asked, data = self.headers.get("Range", ""), state.data
            state.asked.append(asked)
            if state.status:
                self.send_response(state.status.pop(0))
                self.end_headers()
                return
            same = self.headers.get("If-Range") in (None, state.etag)
            first = int(asked[6:].rstrip("-")) if asked and same and state.ranges else 0
            if asked and first >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.end_headers()
                return
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - first))
            self.send_header("Content-Type", state.kind)
            if state.etag:
                self.send_header("ETag", state.etag)
            self.end_headers()
            self.wfile.write(data[first : first + state.cut.pop(0) if state.cut else None])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("nanoswitch.hub.BACKOFF_SECONDS", 0.001)


LINES = gzip.compress(as_lines(TEXTS))


def test_an_address_is_fetched_in_pieces(tmp_path, reference, quick):
    third = len(LINES) // 3
    state = Web(LINES, cut=[third, third])
    with web(state) as url:
        source = f"{url}/deep/some%20file.jsonl.gz?download=true"
        assert tokenize(source, tmp_path / "out") == expected_ids(TEXTS, reference)
        assert state.asked == ["", f"bytes={third}-", f"bytes={2 * third}-"]
        tokenize(source, tmp_path / "out")  # done: nothing is asked for
        assert len(state.asked) == 3
    assert not (tmp_path / "out/downloads").exists()
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["source"] == {"sha256": hashlib.sha256(LINES).hexdigest()}
    assert fineweb.Config(source=source).out == os.path.join("data", "some%20file")


def begun_download(folder, url, data, mark):
    """What a download that was killed leaves."""
    parts = folder / "downloads" / hashlib.sha256(f"{url}/a.jsonl.gz".encode()).hexdigest()[:16]
    parts.mkdir(parents=True)
    (parts / "a.jsonl.gz.part").write_bytes(data)
    if mark:
        (parts / "a.jsonl.gz.part.etag").write_text(mark)


def test_a_killed_download_goes_on(tmp_path, reference, quick):
    state = Web(LINES)
    with web(state) as url:
        begun_download(tmp_path / "out", url, LINES[:100], '"1"')
        found = tokenize(f"{url}/a.jsonl.gz", tmp_path / "out")
    assert found == expected_ids(TEXTS, reference) and state.asked == ["bytes=100-"]


@pytest.mark.parametrize("change", ["etag", "no ranges", "no etag", "whole", "longer", "503"])
def test_a_download_that_cannot_simply_go_on(tmp_path, reference, quick, change):
    begun = {"whole": LINES, "longer": LINES + b"xx", "503": LINES[:50]}.get(change, b"other")
    mark = {"no etag": "", "etag": '"0"'}.get(change, '"1"')
    state = Web(LINES, ranges=change != "no ranges")
    state.status = [503] if change == "503" else []
    with web(state) as url:
        begun_download(tmp_path / "out", url, begun, mark)
        found = tokenize(f"{url}/a.jsonl.gz", tmp_path / "out")
    assert found == expected_ids(TEXTS, reference)
    asked = {"no etag": [""], "longer": [f"bytes={len(LINES) + 2}-", ""], "503": ["bytes=50-"] * 2}
    assert state.asked == asked.get(change, [f"bytes={len(begun)}-"])


def test_what_cannot_be_fetched_is_one_line(tmp_path, quick, monkeypatch):
    state = Web(LINES, cut=[10] * 99, etag="")
    with web(state) as url:
        with pytest.raises(ValueError, match=r"after 6 tries: .*pydocs"):
            tokenize(f"{url}/a.jsonl.gz", tmp_path / "out")
        state.status = [404]
        with pytest.raises(ValueError, match=r"cannot fetch .*a\.jsonl\.gz: 404"):
            tokenize(f"{url}/a.jsonl.gz", tmp_path / "out")
        state.kind = "text/html; charset=utf-8"
        with pytest.raises(ValueError, match="sends a web page, not the file"):
            tokenize(f"{url}/a.csv", tmp_path / "out")
        asked = len(state.asked)
        for end in ("a.html", "data", ".csv", ""):
            with pytest.raises(ValueError, match="does not end as a file that can be read"):
                tokenize(f"{url}/{end}", tmp_path / "out")
        assert len(state.asked) == asked
    monkeypatch.setattr("nanoswitch.hub.answered", False)
    with pytest.raises(ValueError, match=r"cannot fetch .*refused") as caught:
        tokenize(f"{url}/a.jsonl.gz", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out/downloads").rglob("*.part"))  # what came is kept for the next run
    assert file_name("https://x/a%2F..%2F..%2Fb.csv") == "b.csv"  # lands nowhere else


# --- odd files: the texts that each gives, or the words that its one line must have

ROW = '{"text": "one two"}\n'
ODD = [
    # empty and nearly so
    ("empty.txt", b"", [""]),
    ("empty.md.gz", b"", [""]),
    ("empty.jsonl", b"", []),
    ("empty.json", b"", []),
    ("empty.csv", b"", []),
    ("empty.tsv.xz", lzma.compress(b""), []),
    ("empty.parquet", b"", ["empty.parquet"]),
    ("empty.arrow", b"", ["empty.arrow"]),
    ("empty.zip", b"PK\x05\x06" + bytes(18), []),
    ("blank.csv", b"\n\r\n\n", []),
    ("blank.jsonl", b"\n \n\r\n", []),
    ("array.json", b"[]", []),
    ("header.csv", b"id,text\n", []),
    ("header_only.csv", b"id,text", []),
    ("header_blank.csv", b"\n\nid,text\n1,late names\n", ["late names"]),
    # quotes and shapes of .csv
    ("quoted.csv", b'id,text\n1,"two\nlines, ""quoted"""\n', ['two\nlines, "quoted"']),
    ("quote_inside.csv", b'id,text\n1,5" pipe\n2,x\n', ['5" pipe', "x"]),
    ("all_quoted.csv", b'"id","text"\r\n"1","a"\r\n"2",""\r\n', ["a", ""]),
    ("open_quote.csv", b'id,text\n1,"never closed\n2,x\n', ["quote is never closed"]),
    ("cut.csv", b'id,text\n1,fine\n2,"cut he', ["quote is never closed"]),
    ("too_many.csv", b"id,text\n1,hello, world\n", ["Expected 2 columns, got 3", "..."]),
    ("too_few.csv", b"id,text\n1,fine\n2\n", ["Expected 2 columns, got 1"]),
    ("no_newline.csv", b"text\nlast", ["last"]),
    ("twice.csv", b"text,text\na,b\n", ["2 columns called 'text'"]),
    ("semicolons.csv", b"id;text\n1;a\n", ["no 'text' column; it has id;text"]),
    ("no_header.csv", b"It was night.\nIt rained.\n", ["it has It was night."]),
    ("one_column.csv", b"review\ngood\nbad\n", ["good", "bad"]),
    ("columns.csv", b"id,body,title\n1,a,b\n", ["it has id, body, title", "--text_column"]),
    ("upper.CSV", b"ID,TEXT\n1,loud\n", ["loud"]),
    ("numbers.csv", b"text\n42\n1e5\n007\n", ["42", "1e5", "007"]),
    ("nulls.csv", b"id,text\n1,NULL\n2,NaN\n3,\n", ["NULL", "NaN", ""]),
    ("nul.csv", b"text\na\x00b\n", ["a\x00b"]),
    ("latin.csv", b"text\ncaf\xe9\n", ["UTF", "iconv"]),
    ("long.csv", b"text\n" + b"word " * 2_000_000, ["word " * 2_000_000]),
    ("quotes.tsv", b'id\ttext\n1\t"a\tb"\n', ["a\tb"]),
    ("commas.tsv", b"id\ttext\n1\ta, b\n", ["a, b"]),
    # JSON
    ("number.jsonl", b'{"text": 42}', ["record 0", "int"]),
    ("list.jsonl", b'{"text": ["a"]}', ["record 0", "list"]),
    ("null.jsonl", b'{"text": null}\n', [""]),
    ("strings.jsonl", b'"a"\n"b"\n', ["a", "b"]),
    ("content.jsonl", b'{"content": "a"}\n{"content": "b"}', ["a", "b"]),
    ("changes.jsonl", b'{"text": "a"}\n{"content": "b"}\n', ["line 2", "it has content"]),
    ("two_strings.jsonl", b'{"title": "a", "story": "b"}', ["it has title, story"]),
    ("cut.jsonl", ROW.encode() + b'{"text": "o', ["line 2 is not JSON"]),
    ("array.jsonl", b'[{"text": "a"}]', ["line 1", "no {"]),
    ("latin.jsonl", b'{"text": "caf\xe9"}', ["line 1 is not UTF-8", "iconv"]),
    ("surrogate.jsonl", b'{"text": "\\ud800x"}', ["\ufffdx"]),
    ("nul.jsonl", b'{"text": "a\\u0000b"}', ["a\x00b"]),
    ("raw_nul.jsonl", b'{"text": "a\x00b"}', ["line 1 is not JSON"]),
    ("long.jsonl", json.dumps({"text": "x y" * 3_000_000}).encode(), ["x y" * 3_000_000]),
    ("deep.jsonl", b"[" * 100_000, ["recursion"]),
    ("one.json", b'{\n "text": "an object"\n}', ["an object"]),
    ("lines.json", ROW.encode() * 3, ["one two"] * 3),
    ("nested.json", b'{"data": [{"text": "a"}]}', ["it has data"]),
    ("nested_rows.json", b'[{"a": {"text": "x"}}]', ["it has a"]),
    ("by_column.json", b'{"text": ["a", "b"]}', ["record 0", "list"]),
    ("strings.json", b'["a", "b"]', ["a", "b"]),
    ("numbers.json", b"[1, 2]", ["record 0", "but 1"]),
    ("cut.json", b'[{"text": "a"}, {"text": "b"', ["cut short"]),
    ("cut_after.json", b'[{"text": "a"},', ["cut short"]),
    ("no_comma.json", b'[{"text": "a"} {"text": "b"}]', ["not JSON"]),
    ("more.json", b'[{"text": "a"}] and so on', ["not JSON"]),
    ("python.json", b"[{'text': 'a'}]", ["not JSON"]),
    ("latin.json", b'[{"text": "caf\xe9"}]', ["iconv"]),
    ("marked.json", '[{"text": "é"}]'.encode("utf-16"), ["é"]),
    # plain text
    ("latin.txt", b"caf\xe9 au lait", ["caf\ufffd au lait"]),
    ("nul.txt", b"a\x00b", ["a\x00b"]),
    ("only_mark.txt", b"\xef\xbb\xbf", [""]),
    ("half_mark.txt", "é".encode("utf-16") + b"x", ["truncated data"]),
    ("long.md", b"no spaces" * 100_000, ["no spaces" * 100_000]),
    # packings
    ("cut.jsonl.gz", gzip.compress(ROW.encode() * 999)[:-20], ["cut.jsonl.gz", "ended"]),
    ("cut.csv.bz2", bz2.compress(b"text\n" + b"a\n" * 9999)[:-9], ["cut.csv.bz2", "ended"]),
    ("cut.json.xz", lzma.compress(ROW.encode() * 999)[:-9], ["cut.json.xz", "ended"]),
    ("cut.txt.zst", PACKERS[".zst"](os.urandom(300_000))[:-9], ["cut.txt.zst", "ended"]),
    ("cut.jsonl.zst", PACKERS[".zst"](ROW.encode() * 999)[:-9], ["cut.jsonl.zst", "ended"]),
    ("plain.txt.gz", b"no gzip at all", ["plain.txt.gz", "gzip"]),
    ("plain.csv.zst", b"no zstd at all", ["plain.csv.zst"]),
    ("plain.csv.xz", b"no xz at all", ["plain.csv.xz"]),
    ("garbage.csv.gz", gzip.compress(b"text\na\n") + b"garbage", ["garbage.csv.gz"]),
    ("twice.csv.gz", gzip.compress(gzip.compress(b"text\na\n")), ["packed by gzip"]),
    # wrong endings
    ("packed.txt", gzip.compress(b"x"), ["packed by gzip", ".gz"]),
    ("packed.jsonl", bz2.compress(b"x"), ["packed by bzip2", ".bz2"]),
    ("packed.csv", lzma.compress(b"x"), ["packed by xz", ".xz"]),
    ("packed.json", PACKERS[".zst"](b"x"), ["packed by zstd", ".zst"]),
    ("parquet.csv", as_parquet(["a"]), ["parquet: its name"]),
    ("arrow.json", arrow_file(["a"]), ["arrow: its name"]),
    ("csv.parquet", b"text\na\n", ["csv.parquet"]),
    ("csv.arrow", b"text\na\n", ["csv.arrow"]),
    ("csv.zip", b"text\na\n", ["csv.zip"]),
    ("jsonl.csv", b'{"text": "a"}\n', ["no 'text' column"]),
    ("lines.txt", ROW.encode(), [ROW]),
    ("a_pdf.txt", b"%PDF-1.7 ...", ["a PDF"]),
    ("pointer.md", b"version https://git-lfs.github.com/spec/v1\n", ["git lfs pull"]),
    ("pointer.csv.gz", b"version https://git-lfs.github.com/spec/v1\n", ["git lfs pull"]),
    # tables of other shapes
    ("cut.arrow", arrow_file(["a"] * 999)[:-99], ["cut.arrow"]),
    ("cut_stream.arrow", arrow_stream(["a"] * 999)[:-999], ["cut_stream.arrow"]),
    ("cut.parquet", as_parquet(["a"] * 99)[:-9], ["cut.parquet"]),
]


@pytest.mark.parametrize("name, data, expected", ODD, ids=[row[0] for row in ODD])
def test_odd_files(tmp_path, reference, monkeypatch, capsys, name, data, expected):
    """Beside a file that is well, which comes out whole, or nothing of it is lost."""
    folder, words = (
        tmp_path / "in",
        "a file that is well, with enough words for two shards, is here",
    )
    folder.mkdir()
    (folder / name).write_bytes(gzip.compress(data) if name == "empty.md.gz" else data)
    (folder / "zz.txt").write_text(words)
    before = tf.tree_bytes(folder)
    command = ["fineweb.py", "--source", str(folder), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    try:
        cli.run(fineweb.main)
        failed = False
    except SystemExit as stop:
        failed = stop.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert tf.tree_bytes(folder) == before
    if failed:
        assert len(lines) == 1 and all(word in lines[0] for word in [name, *expected]), lines
        assert not list((tmp_path / "out").glob("*.npy"))
        (folder / name).unlink()
        expected = []
        cli.run(fineweb.main)
    else:
        assert not lines
    assert stream(tmp_path / "out") == expected_ids([*expected, words], reference)


def test_latin1_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"x" * 70_000 + b" caf\xe9 and some more")
    (tmp_path / "b.txt").write_text("a true \ufffd is none, and here are some more words")
    tokenize(tmp_path / "a.txt", tmp_path / "a")
    assert "a.txt: from byte 70,004 on" in capsys.readouterr().err
    tokenize(tmp_path / "b.txt", tmp_path / "b")
    assert "byte" not in capsys.readouterr().err
