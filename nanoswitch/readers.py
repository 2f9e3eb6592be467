"""Documents of text files, whatever their format.

A reader yields (number, text, is_start, fraction of the file read) from record `start` on; numbers
may have gaps, and is_start is False for later pieces of a long .txt. A text is a str, None, or
bytes of UTF-8: to make strings of parquet takes as long as to read it.
"""

import gzip
import io
import itertools
import json
import os
import re

from nanoswitch.tokenizer import SPACE

TXT_PIECE = 1 << 22  # a .txt longer than this is encoded piece by piece


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
