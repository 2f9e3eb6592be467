r"""Documents of text files, whatever their format.

A reader yields (number, text, is_start, fraction of the file read) from record `start` on; numbers
may have gaps, and is_start is False for later pieces of a long .txt. A text is a str, None, or
bytes of UTF-8: to make strings of parquet takes as long as to read it. `column` names the column
that holds the texts, see choose_column; when it is another, the reader calls took(its name) once.

    .parquet            a row a document; text or dictionary of text. Unpacked to disk if in .gz
    .arrow .feather     likewise: an Arrow stream or file, as `datasets` saves it
    .jsonl .ndjson      an object, or a string, a line
    .json               an array of them, or one after the other; read in pieces, never whole
    .csv .tsv           a row a document, below a line of names; RFC 4180's quotes in both
    .txt .md            the file is one document
    .zip .tar           by `datasets`, streaming: a .zip of .jsonl, .json, .csv, .tsv, .txt or .md,
                        all of one kind; a .tar as WebDataset has it

All but .zip and .tar may be packed: .gz, .zst, .bz2, .xz. A byte-order mark is no text, and UTF-16
with a mark is read as well. Line ends inside a text stay as they are, "\r\n" too; `datasets`, in
a .zip or .tar, may make "\n" of them. Bytes that are not UTF-8 become U+FFFD in .txt and .md, with
a line that says so, and end the run elsewhere. Memory holds a few blocks and the longest document;
of packed .arrow, a record batch; of a .json array inside a .zip, all of it.
"""

import contextlib
import csv
import functools
import io
import itertools
import json
import os
import re
import shutil
import tempfile
import zipfile

from nanoswitch.files import say
from nanoswitch.streams import PACKED, Chunks, find_bad_byte, open_bytes, open_text
from nanoswitch.tokenizer import SPACE

TXT_PIECE = 1 << 22  # a .txt longer than this is encoded piece by piece
LONGEST_LINE = 1 << 30  # of .jsonl, in bytes
LONGEST_VALUE = 1 << 28  # of .json, in characters
JSON_READ = 1 << 20  # of .json at once, in characters
# of .csv, in bytes: the next when a row is longer; pyarrow reads some eight of them ahead
ROW_BLOCKS = (1 << 20, 1 << 23, 1 << 26)
COMMON = ("text", "content", "document")  # what a column of texts is usually called
CSV_HEADER = 1 << 20


def ignore(name):
    pass


def choose_column(names, strings, wanted="text"):
    """The column that holds the texts: `wanted`. In a table without it, if that is the default, a
    column with a usual name in any case, else the only one that holds strings; ValueError when
    there is none or more than one. names: all columns; strings: those that hold strings."""
    if wanted in names:
        return wanted
    usual = [[n for n in names if n.strip().lower() == common] for common in COMMON]
    guesses = next(filter(None, usual), [n for n in strings if not n.startswith("__")])
    if wanted == "text" and len(guesses) == 1:
        return guesses[0]
    raise no_column(names, wanted)


def no_column(names, wanted):
    shown = ", ".join(names[:20]) + ", ..." * (len(names) > 20) or "none at all"
    return ValueError(f"no '{wanted}' column; it has {shown}: name one with --text_column NAME")


def take(names, strings, wanted, took):
    name = choose_column(names, strings, wanted)
    if name != wanted:
        took(name)
    return name


# ---------------------------------------------------------------------------------------------
# Tables


def read_parquet(path, start, column="text", took=ignore):
    import pyarrow.parquet as pq

    with contextlib.ExitStack() as stack:
        if path.lower().endswith(PACKED):  # its footer is at the end: unpack all, onto the disk
            unpacked = stack.enter_context(tempfile.TemporaryFile())
            with open_bytes(path) as (stream, _):
                shutil.copyfileobj(stream, unpacked, 1 << 20)
            path = unpacked
        # the small buffer and no pre-buffering keep a file of one giant row group out of memory
        file = stack.enter_context(pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False))
        name = string_column(file.schema_arrow, column, took)
        rows = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        ends = list(itertools.accumulate(rows))
        skip = sum(end <= start for end in ends)  # row groups that lie wholly before `start`
        number = sum(rows[:skip])
        for batch in file.iter_batches(512, range(skip, len(rows)), columns=[name]):
            for text in utf8_texts(batch.column(0)):
                if number >= start:
                    yield number, text, True, (number + 1) / ends[-1]
                number += 1


def read_arrow(path, start, column="text", took=ignore):
    import pyarrow as pa

    with contextlib.ExitStack() as stack:
        stream, done = stack.enter_context(open_bytes(path))
        is_file = stream.peek(8)[:8] == b"ARROW1\0\0"  # then a stream, and a table of contents
        if path.lower().endswith(PACKED):
            source = pa.PythonFile(stream, mode="r")
        else:
            stream = source = stack.enter_context(pa.memory_map(path))  # a batch may be all of it
            size = source.size()
            done = lambda: source.tell() / size  # noqa: E731
        stream.read(8 if is_file else 0)
        with pa.ipc.open_stream(source) as batches:
            index = batches.schema.names.index(string_column(batches.schema, column, took))
            number = 0
            for batch in batches:
                texts = batch.column(index)
                for first in range(max(0, start - number), len(texts), 512):
                    some = utf8_texts(texts.slice(first, 512))
                    for i, text in enumerate(some, number + first):
                        yield i, text, True, done()
                number += len(texts)
        if is_file and not stream.read().endswith(b"ARROW1"):
            raise EOFError("it is cut short: its end is missing")


def string_column(schema, wanted, took):
    """The name of an Arrow schema's column of texts; ValueError when it holds something else."""
    kinds = {field.name: field_kind(field) for field in schema}
    strings = [name for name, kind in kinds.items() if is_string(kind) and str(kind) != "null"]
    name = take(schema.names, strings, wanted, took)
    if not is_string(kinds[name]):
        raise ValueError(f"its '{name}' column is of type {kinds[name]}, not string")
    return name


def field_kind(field):
    import pyarrow as pa

    return field.type.value_type if pa.types.is_dictionary(field.type) else field.type


def is_string(kind):
    import pyarrow as pa

    return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def utf8_texts(column):
    """The values of an Arrow array of strings, as bytes or None; ValueError unless in UTF-8."""
    import pyarrow as pa

    column = column.cast(pa.large_string())
    column.validate(full=True)
    return column.cast(pa.large_binary()).to_pylist()


def read_csv(path, start, column="text", took=ignore, delimiter=","):
    with open_text(path) as (stream, _):
        head = io.StringIO(stream.read(CSV_HEADER).decode("utf-8", "replace"), newline="")
    names = next(filter(None, csv.reader(head, delimiter=delimiter)), [])
    if not names:
        return  # nothing, or blank lines
    # a file without a line of names would lose its first text: an only column needs a name that
    # looks like one
    strings = names if len(names) == 1 and re.fullmatch(r"\w+", names[0]) else []
    name = take(names, strings, column, took)
    if names.count(name) > 1:
        raise ValueError(f"it has {names.count(name)} columns called '{name}'")
    for block in ROW_BLOCKS:
        try:
            for record in csv_rows(path, start, len(names), names.index(name), delimiter, block):
                start = record[0] + 1
                yield record
            return
        except ValueError as error:
            if "straddl" not in str(error):
                raise csv_error(error) from error
    raise ValueError(f"a row is longer than {block:,} bytes, or a quote in it is never closed")


def csv_rows(path, start, columns, index, delimiter, block):
    """What read_csv yields; ValueError with "straddl" in it when a row does not fit in a block."""
    import pyarrow as pa
    import pyarrow.csv as pc

    # one more row behind the last: if it does not come out, a quote was left open before it
    end = b"the end of the file"
    with open_text(path) as (stream, done):
        last = b"\n" + delimiter.encode().join([end] * columns) + b"\n"
        blocks = itertools.chain(iter(lambda: stream.read(1 << 20), b""), [last])
        rows = pc.open_csv(
            io.BufferedReader(Chunks(blocks), 1 << 20),
            # the names come out as a row too: so they may be repeated, and stand below blank lines
            pc.ReadOptions(
                use_threads=False, block_size=block, column_names=[*map(str, range(columns))]
            ),
            pc.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            pc.ConvertOptions(include_columns=[str(index)], column_types={str(index): pa.string()}),
        )
        number, held = -1, None
        for batch in rows:
            for text in batch.column(0).cast(pa.binary()).to_pylist():
                if held is not None and number - 1 >= start:
                    yield number - 1, held, True, done()
                held = text if number >= 0 else None
                number += 1
        if held != end:
            raise ValueError("a quote is never closed in its last rows: it may be cut short")


def csv_error(error):
    why = re.sub(r"^CSV parse error: |^In CSV column #\d+: ", "", str(error))
    if "columns, got" in why:
        return ValueError(f'{why.splitlines()[0][:200]}; put "..." round a text with separators')
    return ValueError(why)


# ---------------------------------------------------------------------------------------------
# JSON


def read_jsonl(path, start, column="text", took=ignore):
    text_of = Texts(column, took)
    with open_text(path) as (lines, done):
        for number, line in enumerate(iter(lambda: lines.readline(LONGEST_LINE + 1), b"")):
            if len(line) > LONGEST_LINE:
                raise ValueError(f"line {number + 1} is longer than {LONGEST_LINE:,} bytes")
            if (number < start and text_of.name) or not line.strip():
                continue
            try:
                text = text_of(json.loads(line))
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number + 1} is not UTF-8: {error}") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number + 1} is not JSON: {error}") from error
            except ValueError as error:
                raise ValueError(f"line {number + 1}: {error}") from error
            if number >= start:
                yield number, text, True, done()


def read_json(path, start, column="text", took=ignore):
    text_of = Texts(column, took)
    with open_text(path) as (stream, done):
        for number, value in enumerate(json_values(stream)):
            try:
                text = text_of(value)
            except ValueError as error:
                raise ValueError(f"record {number}: {error}") from error
            if number >= start:
                yield number, text, True, done()


class Texts:
    """Finds the text in a JSON value; which column it is, the first object decides."""

    def __init__(self, wanted, took):
        self.wanted, self.took, self.name = wanted, took, None

    def __call__(self, value):
        if isinstance(value, str):
            return value
        if not isinstance(value, dict):
            raise ValueError(f'it is no {{"text": ...}} object but {str(value)[:40]}')
        if self.name is None:
            strings = [name for name, held in value.items() if isinstance(held, str)]
            self.name = take(list(value), strings, self.wanted, self.took)
        if self.name not in value:
            raise no_column(list(value), self.name)
        return value[self.name]


def json_values(stream):
    """The values of a JSON array, or of JSON texts one after the other, each as soon as it is read.
    ValueError for what is not JSON, or longer than LONGEST_VALUE."""
    decode = json.JSONDecoder().raw_decode
    file = io.TextIOWrapper(stream, encoding="utf-8")
    # raw: from `at` on what is not decoded yet; want: how much to read when that is not enough
    raw, at, ended, want, state = "", 0, False, JSON_READ, "first"
    blanks = re.compile(r"[ \t\r\n]*")
    while True:
        at = blanks.match(raw, at).end()
        error = None
        if at < len(raw):
            if state == "first":
                state = "array" if raw[at] == "[" else "values"
                at += state == "array"
                continue
            if state == "comma" and raw[at] in ",]":
                state, at = ("array" if raw[at] == "," else "over"), at + 1
                continue
            if state in ("comma", "over"):
                raise ValueError(f"not JSON: {raw[at : at + 20]!r} where the array should go on")
            if state == "array" and raw[at] == "]":
                state, at = "over", at + 1
                continue
            try:
                value, at = decode(raw, at)
            except json.JSONDecodeError as problem:
                error = problem
            else:
                yield value
                want, state = JSON_READ, "comma" if state == "array" else state
                continue
        near_end = not error or error.pos > len(raw) - 12 or error.msg.startswith("Unterminated")
        if ended and (error or state not in ("first", "values", "over")):
            raise ValueError(f"not JSON, or cut short: {error.msg if error else 'no ] at its end'}")
        if ended:
            return
        if error and not near_end:
            raise ValueError(f"not JSON: {error.msg} at {raw[error.pos : error.pos + 20]!r}")
        if len(raw) - at > LONGEST_VALUE:
            split = "jq -c '.NAME[]' makes a .jsonl of a list inside an object"
            long = f"a record is longer than {LONGEST_VALUE:,} characters"
            raise ValueError(f"{long}, or a quote in it is never closed; {split}")
        block = file.read(want)
        raw, at, ended, want = raw[at:] + block, 0, len(block) < want, 2 * want


# ---------------------------------------------------------------------------------------------
# Texts


def read_txt(path, start, column="text", took=ignore):
    number, rest, checked = 0, "", False
    with open_text(path) as (stream, done):
        file = io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="")
        while True:
            block = file.read(TXT_PIECE)
            if "\ufffd" in block and not checked:
                checked, bad = True, find_bad_byte(path)
                if bad is not None:
                    say(f"{path}: from byte {bad:,} on not all is UTF-8; the rest became U+FFFD")
            text, last = rest + block, len(block) < TXT_PIECE
            cut = len(text) if last else space_boundary(text)
            if cut or (last and number == 0):
                if number >= start:
                    yield number, text[:cut], number == 0, done()
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


# ---------------------------------------------------------------------------------------------
# Archives


def read_archive(path, start, column="text", took=ignore):
    """By `datasets`, which streams what is inside; the order is its own and always the same."""
    import datasets

    builder, options = "webdataset", {}
    if path.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if not (n.endswith("/") or is_hidden(n))]
        kinds = sorted({os.path.splitext(name)[1].lower() for name in names})
        if not names:
            return
        if len(kinds) != 1 or kinds[0] not in BUILDERS:
            one = f"one of {', '.join(BUILDERS)}"
            raise ValueError(f"it holds {', '.join(kinds)} files, not only {one}: unpack it")
        builder, options = BUILDERS[kinds[0]]

    def load(**more):
        files = {"train": path}
        return datasets.load_dataset(
            builder, data_files=files, split="train", streaming=True, **options, **more
        )

    data = load()
    first = next(iter(data), None)
    if first is None:
        return
    strings = [name for name, value in first.items() if isinstance(value, str)]
    name = take(list(first), strings, column, took)
    if builder == "csv":  # or it would make numbers of some texts
        data = load(converters={name: str})
    for number, record in enumerate(data.skip(start), start):
        yield number, record[name], True, 1.0


BUILDERS = {  # what a .zip may hold: datasets' name for it, and its settings
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"na_filter": False}),
    ".tsv": ("csv", {"na_filter": False, "sep": "\t"}),
    ".txt": ("text", {"sample_by": "document", "keep_linebreaks": True}),
    ".md": ("text", {"sample_by": "document", "keep_linebreaks": True}),
}


# ---------------------------------------------------------------------------------------------
# Which reader, which files

KINDS = {  # in the order of preference, where a dataset has the same in several
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".tsv": functools.partial(read_csv, delimiter="\t"),
    ".json": read_json,
    ".txt": read_txt,
    ".md": read_txt,
}
READERS = {kind + packed: reader for kind, reader in KINDS.items() for packed in ("", *PACKED)}
READERS |= dict.fromkeys((".zip", ".tar"), read_archive)
PREFERRED = [tuple(kind + packed for packed in ("", *PACKED)) for kind in KINDS]
PREFERRED += [(".zip",), (".tar",)]  # endings, the kind first that a dataset is best read from
READABLE = f"{', '.join(KINDS)} (each also with {', '.join(PACKED)}), .zip or .tar"
ABOUT = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}


def ending(name):
    """The part of a file's name that chooses its reader, or ""."""
    return next((suffix for suffix in READERS if name.lower().endswith(suffix)), "")


def is_hidden(name):
    """Whether a path inside a source is hidden, or what macOS puts beside files."""
    parts = [part for part in re.split(r"[/\\]", name) if part not in (".", "..")]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def choose_files(names):
    """Paths inside a folder or repository -> (those that hold texts, [hidden], [about the others],
    [not readable]). README.md is about the others, unless all that is read is .md."""
    hidden = [name for name in names if is_hidden(name)]
    rest = [name for name in names if not is_hidden(name)]
    others = [name for name in rest if not ending(name)]
    texts = [name for name in rest if ending(name)]
    cards = {"readme.md"} if any(ending(name)[:3] != ".md" for name in texts) else set()
    about = [name for name in texts if re.split(r"[/\\]", name)[-1].lower() in ABOUT | cards]
    return [name for name in texts if name not in set(about)], hidden, about, others
