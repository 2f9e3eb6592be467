"""python -m nanoswitch.archive runs/positions --out experiments/positions

The logs of a comparison alone, thinned, to keep or to commit: without checkpoints, and of the
training steps every `every`-th. The speed in a line that stays is that of all steps since the one
before, so that training times stay; evaluations stay as they are. compare.py with --report_only
and --out makes the same table of the copy as of the runs.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from nanoswitch import cli
from nanoswitch.files import write_beside
from nanoswitch.log import DIVERGED_MARK, ITEMS, read_run, whole_lines

ALSO = DIVERGED_MARK, ITEMS  # what compare.py reads beside a log


@dataclass
class ArchiveConfig:
    source: Positional[str]
    """a comparison's --out folder, or any folder of runs"""
    out: str
    """folder of the copies; what is there of other runs stays"""
    every: int = 20
    """of the training steps every so many stay, and the last"""

    def __post_init__(self):
        cli.at_least(self, 1, "every")


def thin(lines, every):
    """The lines of a log.jsonl -> those that stay."""
    entries = [json.loads(line) for line in lines]
    last = max((e["step"] for e in entries if "train_loss" in e), default=0)
    kept, seconds, since = [], 0.0, 0
    for line, entry in zip(lines, entries, strict=True):
        if entry.get("tok_per_s"):
            seconds, since = seconds + 1 / entry["tok_per_s"], since + 1
        if "train_loss" in entry and entry["step"] % every and entry["step"] < last:
            continue
        if entry.get("tok_per_s"):
            line, seconds, since = json.dumps(entry | {"tok_per_s": since / seconds}), 0.0, 0
        kept.append(line)
    return kept


def main():
    config = cli.parse(ArchiveConfig)
    source, out = Path(config.source), Path(config.out)
    logs = sorted(source.rglob("log.jsonl"))
    if not logs:
        raise ValueError(f"no log.jsonl under {source}; give a comparison's --out folder")
    if out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"out {out} lies in {source}; give a folder outside")
    copied = 0
    for log in logs:
        there = out / log.relative_to(source)
        if any(there.parent.glob("step_*")):
            raise ValueError(f"{there} is a run's own, beside its checkpoints: give another out")
        if there.exists() and len(whole_lines(there)) > len(whole_lines(log)):
            raise ValueError(f"{there} holds more than {log}: the two folders may be swapped")
    for log in logs:
        run = read_run(log.parent)
        if not run or not run.over:
            continue
        place = out / log.parent.relative_to(source)
        place.mkdir(parents=True, exist_ok=True)
        lines = thin([line.decode() for line in whole_lines(log) if line], config.every)
        with write_beside(str(place / "log.jsonl")) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
        for name in ALSO:
            if (log.parent / name).exists():
                (place / name).write_bytes((log.parent / name).read_bytes())
        copied += 1
    print(f"{copied} logs written to {out}, {len(logs) - copied} are not finished")


if __name__ == "__main__":
    cli.run(main)
