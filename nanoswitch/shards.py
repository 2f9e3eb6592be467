"""Token shards: folders of .npy files as build-nanogpt writes them, or of llm.c's .bin, with a
manifest.json of how they were made."""

import hashlib
import io
import itertools
import json
import os
import re
import struct

import numpy as np

from nanoswitch.files import first_line, pointer_hint, write_beside
from nanoswitch.tokenizer import (
    GPT2_SHA256,
    LEAST_VOCAB,
    N_VOCAB,
    text_sha256,
    trained_vocabulary,
)

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024  # llm.c's .bin header: 256 int32
MANIFEST = {  # manifest.json of a run that has done nothing yet
    "settings": {},  # the flags that decide what the shards hold
    "source": None,  # which data it was: revision and files, names and sizes, or a hash
    "tokenizer": {"name": "gpt2", "sha256": GPT2_SHA256},
    "tokens": 0,
    "documents": 0,
    "done": False,
    "position": {"file": 0, "record": 0, "token": 0},  # where the next shard begins
    "text_columns": {},  # {file: its column of texts} where that is not --text_column
    # {"file", "split", "tokens", "documents", "sha256"} of each finished one; of val also
    "shards": [],  # "text_sha256", that of its text
}


def shard_split(name):
    """'val', 'train' or None, from a shard's file name: ours, the peers' or the hub's."""
    stem, suffix = os.path.splitext(os.path.basename(name))
    found = re.search("val|train", stem) if suffix in (".npy", ".bin") else None
    return found and found[0]


def list_shards(folder, vocab=N_VOCAB):
    """Sorted paths of all shards in a folder; ValueError, which says how to make it with this
    vocabulary, when it does not exist."""
    if not os.path.isdir(folder):
        make = recipe(folder, vocab)
        raise ValueError(f"there is no folder {folder}; make one with shards: {make}")
    return [os.path.join(folder, n) for n in sorted(os.listdir(folder)) if shard_split(n)]


def recipe(folder, vocab=N_VOCAB):
    """The command that fills a folder of shards, as its name has it."""
    cut = "" if vocab == N_VOCAB else f" --vocab_size {vocab}"
    if os.path.basename(os.path.normpath(folder)) != "fineweb-edu":
        return f"python fineweb.py --source pydocs{cut} --out {folder}"
    here = "data/pydocs" if cut else "data/docs"
    own = f"python fineweb.py --source pydocs{cut} --out {here}, then --data_dir {here}"
    return f"python fineweb.py{cut} --out {folder}; without a network: {own}"


def load_shards(folder, split, vocab=N_VOCAB):
    """The shards of "train" or "val": a list of (n,) uint16 memmaps, sorted by file name.

    Reads headers and beginnings only. ValueError (one line) for a missing folder or split, for
    parts that are not all there, and for a file that is truncated, foreign, of another dtype or
    vocabulary, or not as long as its header says.
    """
    paths = list_shards(folder, vocab)
    check_parts(folder)
    shards = [open_shard(path) for path in paths if shard_split(path) == split]
    for manifest in read_manifests(folder).values():
        if manifest["tokenizer"] != MANIFEST["tokenizer"]:
            found = manifest["tokenizer"]
            raise ValueError(f"{folder} holds ids of the tokenizer {found}, not of gpt2's")
    if not shards:
        raise ValueError(
            f"no {split} shard (.npy or .bin) in {folder}; make them: {recipe(folder, vocab)}"
        )
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


def val_text(folder, tokens, T):
    """The hash of the validation text that `tokens` in windows of T cover, by the folder's
    manifest: all of the val shard but what is left after its last window. None where it is not
    known, or not all is covered."""
    for manifest in read_manifests(folder).values():
        for shard in manifest["shards"]:
            if shard["split"] == "val" and tokens // T >= (shard["tokens"] - 1) // T:
                return shard.get("text_sha256")
    return None


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
    old = {"vocab_size": N_VOCAB, "val_bytes": 0}  # not in old ones
    own = {"source": "", "part": ""}
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
                raise ValueError(short + pointer_hint(path))
            magic, version, length = struct.unpack("<3i", header[:12])
            if (magic, version) != (MAGIC, VERSION):
                found = f"magic {magic} version {version}, not {MAGIC} version {VERSION}"
                raise ValueError(f"{path} is not a shard of GPT-2 tokens: {found}")
        else:
            try:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            except Exception as error:  # numpy parses the header as Python, with its kinds
                why = first_line(error) + pointer_hint(path)
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
    if not index:
        entry["text_sha256"] = text_sha256(np.concatenate(parts), vocab)
    return entry | {"sha256": digest.hexdigest()}


def is_manifest(name):
    return bool(re.fullmatch(r"manifest(_part\d+of\d+)?\.json", name))


def read_manifests(out):
    """{file name: manifest} of the folder: one of a whole run, or one of each part begun."""
    manifests = {}
    for name in filter(is_manifest, sorted(os.listdir(out))):
        path = os.path.join(out, name)
        try:
            with open(path, encoding="utf-8") as file:
                manifest = {"text_columns": {}} | json.load(file)  # older ones have none
            manifests[name] = {key: manifest[key] for key in MANIFEST}
        except (ValueError, KeyError, TypeError) as error:
            hint = "restore it, or delete the folder and start again"
            raise ValueError(f"{path} is damaged ({first_line(error)}); {hint}") from error
    return manifests


def match_vocabulary(folder, config):
    """vocabulary(folder); ValueError unless a model of this config fits it."""
    vocab = vocabulary(folder)
    rows = 50304 if vocab == N_VOCAB else vocab  # GPT-2's is padded for speed
    if config.vocab_size < vocab:
        raise ValueError(
            f"vocab_size {config.vocab_size} is smaller than the shards' vocabulary of {vocab} ids;"
            f" give --vocab_size {rows} --vocab_used {vocab}"
        )
    if config.vocab_used != vocab or trained_vocabulary(config) != vocab:
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
