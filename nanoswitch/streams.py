"""The bytes of a text file: unpacked, in UTF-8, without its byte-order mark.

.gz, .bz2 and .xz are unpacked by Python's own modules, .zst by zstandard, all block by block; what
was cut short ends in an EOFError. A file that begins with the byte-order mark of UTF-16 or UTF-32
(a spreadsheet's "Unicode text") becomes UTF-8.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import os
import re

PACKED = (".gz", ".zst", ".bz2", ".xz")
BLOCK = 1 << 16
MARKS = {  # the longest first: that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8",
}
FOREIGN = {  # how files begin that are no text, whatever their names say
    rb"\x1f\x8b\x08": "packed by gzip: its name must end in .gz",
    rb"\x28\xb5\x2f\xfd": "packed by zstd: its name must end in .zst",
    rb"BZh[1-9]1AY&SY": "packed by bzip2: its name must end in .bz2",
    rb"\xfd7zXZ\0": "packed by xz: its name must end in .xz",
    rb"PK\x03\x04": "a zip archive: its name must end in .zip",
    rb"PAR1[\x00-\x1f]": "parquet: its name must end in .parquet",
    rb"ARROW1\0\0": "arrow: its name must end in .arrow",
    rb"%PDF-\d\.\d": "a PDF",
    rb"\x89PNG|\xff\xd8\xff|GIF8[79]a": "a picture",
    rb"SQLite format 3\0": "a database",
    rb"version https://git-lfs\.": "a pointer to it",
}


class Chunks(io.RawIOBase):
    """An iterator of bytes as a binary stream."""

    def __init__(self, chunks):
        self.chunks, self.rest = chunks, memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.rest:
            chunk = next(self.chunks, None)
            if chunk is None:
                return 0
            self.rest = memoryview(chunk)
        size = min(len(buffer), len(self.rest))
        buffer[:size], self.rest = self.rest[:size], self.rest[size:]
        return size


def unpack_zstd(raw):
    import zstandard

    # not its stream_reader, which ends a frame that is cut short as if it were whole
    frame = None
    while chunk := raw.read(BLOCK):
        while chunk:
            if frame is None:
                frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            yield frame.decompress(chunk)
            chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")


def recode(stream, encoding):
    """Blocks of UTF-8 of a stream in another encoding."""
    decoder = codecs.getincrementaldecoder(encoding)()
    while block := stream.read(BLOCK):
        yield decoder.decode(block).encode()
    yield decoder.decode(b"", final=True).encode()


@contextlib.contextmanager
def open_bytes(path):
    """A buffered binary stream of a file's content, unpacked as its name says, and a function that
    says how much of the file is read, from 0 to 1."""
    with open(path, "rb") as raw:
        size, ending = max(1, os.path.getsize(path)), os.path.splitext(path)[1].lower()
        if ending == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif ending == ".bz2":
            stream = bz2.BZ2File(raw)
        elif ending == ".xz":
            stream = lzma.LZMAFile(raw)
        elif ending == ".zst":
            stream = io.BufferedReader(Chunks(unpack_zstd(raw)), 1 << 17)
        else:
            stream = raw
        yield stream, lambda: raw.tell() / size


@contextlib.contextmanager
def open_text(path):
    """open_bytes of a file that should hold text: UTF-8 without a mark. ValueError when its first
    bytes are those of another kind of file."""
    with open_bytes(path) as (stream, done):
        head = stream.peek(32)
        for begin, kind in FOREIGN.items():
            if re.match(begin, head):
                raise ValueError(f"it is no text but {kind}")
        mark = next((mark for mark in MARKS if head.startswith(mark)), b"")
        if MARKS.get(mark, "utf-8") == "utf-8":
            stream.read(len(mark))
        else:
            stream = io.BufferedReader(Chunks(recode(stream, MARKS[mark])), 1 << 17)
        yield stream, done


def find_bad_byte(path):
    """Where a text file stops being UTF-8 (counted without its mark); None when it does not."""
    decoder, before = codecs.getincrementaldecoder("utf-8")(), 0
    with open_text(path) as (stream, _):
        while True:
            block = stream.read(BLOCK)
            held = len(decoder.getstate()[0])  # the beginning of a character that was cut
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return before - held + error.start
            if not block:
                return None
            before += len(block)
