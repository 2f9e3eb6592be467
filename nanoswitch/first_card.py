"""python bench.py card --peers DIR --data DIR --out DIR

The first 25 minutes on a card: is it right there, how fast, and how far from the goals? The parts
below run in this order, each in processes of its own and under its own limit of time. What a part
finds is in OUT/PART.json as soon as it ends, and in OUT/table.md, which is printed at the end. A
part that fails is noted and passed over; only where the baseline itself is wrong all ends. The same
command goes on with the parts that have no result yet; --parts NAME,NAME runs those again.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nanoswitch.device import pick_device
from nanoswitch.files import python_path, read_json, say, write_beside
from nanoswitch.shards import load_shards

ROOT = Path(__file__).parent.parent
MINUTES = 25
GPT2 = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024)
TINY = dict(n_layer=1, n_head=1, n_embd=64, block_size=256)  # as long as HellaSwag's items
MASKS = [(0, False), (0, True), (256, False), (256, True)]  # (window, document_mask)

FULL = dict(
    model=GPT2, small_model=dict(n_layer=2, n_head=4, n_embd=256, block_size=1024), masks=MASKS,
    shares=2, copied=2**32, size=64, micro_steps=2, tokens=2**19, sizes=(32, 64, 128, 256),
    rounds=3, items=10042, new_tokens=256, longest=16384, first_size=8, first_steps=5, seconds=230,
    max_steps=100_000, checkpoint_every=20, val_tokens=2**20, tests=["tests"],
)  # fmt: skip
SMALL = FULL | dict(
    model=TINY, small_model=TINY, masks=[(w and 16, d) for w, d in MASKS], shares=1,
    copied=2**24, size=2, micro_steps=1, tokens=512, sizes=(2, 4), rounds=1, items=10,
    new_tokens=16, longest=1024, first_size=2, seconds=40, max_steps=200,
    checkpoint_every=5, val_tokens=256,
)  # fmt: skip


@dataclass
class Part:
    name: str
    limit: int
    """seconds, of which all limits together fill the 25 minutes"""
    commands: list
    """argument lists, one after the other"""
    at_once: bool = False
    skip: str = ""
    """why it cannot run here; nothing where it can"""
    vital: bool = False
    """whether all ends where it fails"""


# (part, beginning of the figure, column, sign, value, words, a part of the card's name or nothing)
GOALS = [
    ("train build-nanogpt", "tokens/s", "ours", ">=", 600_000, "600,000 on one H200", "H200"),
    ("train build-nanogpt", "tokens/s", "ratio", ">=", 1.5, "1.5 times", ""),
    ("train build-nanogpt", "peak memory", "ratio", "<=", 0.6, "0.6 times", ""),
    ("train nanoGPT", "tokens/s", "ratio", ">=", 1.25, "1.25 times", ""),
    ("hellaswag", "items/s", "ours", ">=", 10042 / 5, "10,042 items in 5 s", "H200"),
    ("generate", "tokens/s", "ratio", ">=", 10, "10 times", ""),
    ("run", "tokens/s", "ours", ">=", 600_000, "600,000 on one H200", "H200"),
    ("run", "MFU", "ours", ">=", 0.52, "52% on one H200", "H200"),
]


# ----------------------------------------------------------------------------- the parts


def plan(config, sizes):
    """All parts, in order. config: bench.py's flags, with whole paths."""
    out, device = Path(config.out), pick_device(config.device).type
    compile = config.compile == "true" or (config.compile == "auto" and device == "cuda")
    data = config.data or str(out / "data")
    settings = sizes | dict(
        device=device, dtype=config.dtype, compile=compile, data=data, out=str(out)
    )
    items = [*sorted(Path(data).glob("hellaswag*.json*")), ""][0]
    peers = {name: Path(config.peers, name) for name in ("build-nanogpt", "nanoGPT")}
    there = {name: bool(config.peers) and path.is_dir() for name, path in peers.items()}
    model = {k: v for k, v in sizes["model"].items() if k != "n_head"}

    def check(name, **changes):
        own = json.dumps(settings | changes)
        return [sys.executable, "-m", "nanoswitch.card_checks", name, own]

    def bench(work, part, peer="", **flags):
        flags = model | flags | dict(
            rounds=sizes["rounds"], out=out / f"{part}.bench.json", device=device,
            dtype=config.dtype, compile=str(compile).lower(),
        )  # fmt: skip
        if peer and there[peer]:
            flags["peer"] = peers[peer]
        given = [f"--{name}={value}" for name, value in flags.items()]
        return [[sys.executable, str(ROOT / "bench.py"), work, *given]]

    def absent(peer):
        missing = f"no folder {peer} in --peers {config.peers}" if config.peers else "no --peers"
        return "" if there[peer] else f"{missing}: git clone https://github.com/karpathy/{peer}"

    training = {} if device == "cuda" else dict(micro_batch=sizes["size"])
    fineweb = [sys.executable, str(ROOT / "fineweb.py"), "--source=pydocs", f"--out={data}"]
    attention = [
        check("attention", masks=[mask], share=(i, sizes["shares"]))
        for mask in sizes["masks"] for i in range(sizes["shares"])
    ]  # fmt: skip
    no_card = "" if device == "cuda" else f"the device is {device}"
    return [
        Part("data", 30, [fineweb], skip="--data has it" if config.data else ""),
        Part("machine", 20, [check("machine")]),
        Part("baseline", 60, [check("baseline")], vital=True),
        Part("gpu tests", 160, [check("gpu_tests")], skip=no_card),
        Part("attention", 180, attention, True),
        Part("train build-nanogpt", 130,
             bench("train", "train build-nanogpt", "build-nanogpt", **training)),
        Part("train nanoGPT", 120, bench("train", "train nanoGPT", "nanoGPT", **training),
             skip=absent("nanoGPT")),
        Part("profile", 50, [check("profile")]),
        Part("memory", 120, [check("memory", size=size) for size in sizes["sizes"]]),
        Part("hellaswag", 120,
             bench("hellaswag", "hellaswag", "build-nanogpt", items=sizes["items"], data=items)),
        Part("generate", 80,
             bench("generate", "generate", "nanoGPT", new_tokens=sizes["new_tokens"])),
        Part("scaling", 100, bench("scaling", "scaling", longest=sizes["longest"])),
        Part("first steps", 60, [check("first_steps")]),
        Part("run", 270, [check("run")]),
    ]  # fmt: skip


# ----------------------------------------------------------------------------- running them


def card(config):
    """Run what has no result yet -> the whole table, as Markdown lines. ValueError for flags that
    would waste the time."""
    if not config.out:
        raise ValueError("card needs a folder for its results: --out card")
    for name in ("out", "peers", "data"):
        if getattr(config, name):
            setattr(config, name, os.path.abspath(getattr(config, name)))
    if config.peers and not os.path.isdir(config.peers):
        raise ValueError(f"no folder {config.peers}; --peers holds build-nanogpt and nanoGPT")
    if config.data:
        load_shards(config.data, "train"), load_shards(config.data, "val")
    parts = plan(config, SMALL if config.small else FULL)
    names = [part.name for part in parts]
    again = [name.strip() for name in config.parts.split(",") if name.strip()]
    if unknown := set(again) - set(names):
        raise ValueError(f"no part '{unknown.pop()}'; the parts are {', '.join(names)}")
    os.makedirs(config.out, exist_ok=True)
    end = time.monotonic() + 60 * config.minutes
    patience = 4 if config.small else 1  # a small machine starts a process in 10 s
    return work_through(parts, Path(config.out), again, end, header(config), patience)


def work_through(parts, out, again, end, head, patience=1):
    """Run the parts named in `again`, or all without a result, until time.monotonic() is `end`;
    patience multiplies their limits."""
    for part in parts:
        known = read_result(out, part)
        if again and part.name not in again:
            continue
        if known and not again and known["status"] != "skipped":
            say(f"{part.name}: {known['status']} before")
            continue
        left = end - time.monotonic()
        if left < 1:
            say(f"{part.name}: no time left; the same command goes on here")
            continue
        result = do(part, out, min(part.limit * patience, left))
        write_result(out, part, result)
        write_table(out, parts, head)
        say(f"{part.name}: {result['status']} in {result['seconds']:.0f} s {result['note']}")
        if part.vital and result["status"] == "failed":
            say(f"{part.name} is wrong on this card: nothing else would mean anything")
            break
    return write_table(out, parts, head)


def do(part, out, limit):
    """Run a part's commands for at most `limit` seconds -> its result; what they printed is in
    OUT/PART.log."""
    if part.skip:
        return {"status": "skipped", "seconds": 0, "note": part.skip, "rows": []}
    (out / f"{part.name}.bench.json").unlink(missing_ok=True)  # of an earlier try
    begin, notes, texts = time.monotonic(), [], []
    own = {"PYTHONPATH": python_path(ROOT), "PYTHONUNBUFFERED": "1"}
    with open(out / f"{part.name}.log", "w") as log:
        running = []
        for command in part.commands:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | own, stdout=subprocess.PIPE, stderr=log,
                text=True, start_new_session=True,
            )  # fmt: skip
            running.append(process)
            if not part.at_once:
                texts.append(collect(process, begin + limit, limit, notes))
        if part.at_once:
            texts = [collect(process, begin + limit, limit, notes) for process in running]
        log.writelines(texts)
    rows = [json.loads(line) for text in texts for line in text.splitlines() if is_row(line)]
    rows += bench_rows(out / f"{part.name}.bench.json")
    wrong = sum(row.get("met") is False for row in rows)
    if wrong:
        notes.append(f"{wrong} of {len(rows)} figures are wrong")
    last = last_line(out / f"{part.name}.log") if any("status" in note for note in notes) else ""
    notes += [last] if last else []
    return {
        "status": "failed" if notes else "done", "seconds": time.monotonic() - begin,
        "note": "; ".join(dict.fromkeys(notes)), "rows": rows,
    }  # fmt: skip


def collect(process, end, limit, notes):
    """What a process prints until it ends, or is ended at `end` with all that it started."""
    try:
        text, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        kill(process)
        text, _ = process.communicate()
        notes.append(f"ended at its limit of {limit:.0f} s")
        return text
    except BaseException:  # Ctrl-C: nothing is left behind at work on the card
        kill(process)
        raise
    if process.returncode:
        notes.append(f"exit status {process.returncode}")
    return text


def kill(process):
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:  # Windows
        process.kill()


def is_row(line):
    return line.startswith('{"figure"')


def last_line(path):
    """The error at the end of a log, without what is around it."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
    lines = [line for line in lines if line and not is_row(line)]
    return lines[-1].removeprefix("error: ")[:200] if lines else ""


def bench_rows(path):
    """The rows of a file of bench.py, which may not be there."""
    try:
        rows = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return []
    return [
        {"figure": row["metric"], "ours": row["ours"], "other": row["peer"], "ratio": row["ratio"]}
        for row in rows
    ]


# ----------------------------------------------------------------------------- results


def read_result(out, part):
    path = out / f"{part.name}.json"
    return read_json(path) if path.is_file() else None


def write_result(out, part, result):
    with write_beside(str(out / f"{part.name}.json")) as file:
        file.write(json.dumps({"part": part.name} | result, indent=1).encode())


def header(config):
    device = pick_device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"no card: {device}"
    lines = [f"# The first {MINUTES} minutes on {name}", ""]
    if config.small:
        lines += ["At small sizes: the figures show that the parts run, nothing else.", ""]
    return lines


def write_table(out, parts, head):
    """OUT/table.md from all results that are there -> its lines."""
    card = head[0]
    cells = [("part", "figure", "ours", "other", "ratio", "goal", "met"), ("---",) * 7]
    for part in parts:
        result = read_result(out, part)
        if not result:
            cells.append((part.name, "not run yet", "", "", "", "", ""))
            continue
        rows = [filled(part, row, card, small="small sizes" in " ".join(head))
                for row in result["rows"]]  # fmt: skip
        cells += [(part.name, *row) for row in rows]
        took = f"{result['status']} in {result['seconds']:.0f} s"
        note = f"{took}: {result['note']}" if result["note"] else took
        cells.append((part.name, note, "", "", "", "", ""))
    lines = head + ["| " + " | ".join(safe(cell) for cell in row) + " |" for row in cells]
    with write_beside(str(out / "table.md")) as file:
        file.write(("\n".join(lines) + "\n").encode())
    return lines


def filled(part, row, card, small=False):
    """A row as text, with the project's goals beside it where the card is a real one."""
    words, met = [row["goal"]] if row.get("goal") else [], row.get("met")
    for name, figure, column, sign, value, text, only in [] if small else GOALS:
        if name != part.name or not row["figure"].startswith(figure) or row.get(column) is None:
            continue
        words.append(text)
        if only in card and "no card" not in card:
            reached = row[column] >= value if sign == ">=" else row[column] <= value
            met = reached if met is None else met and reached
    numbers = [number(row.get(key)) for key in ("ours", "other", "ratio")]
    return row["figure"], *numbers, ", ".join(words), {None: "", True: "yes", False: "**no**"}[met]


def number(value):
    if value is None:
        return ""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def safe(cell):
    """Text that ends no cell of a Markdown table."""
    return re.sub(r"\s+", " ", str(cell)).replace("|", "\\|")
