"""python compare.py runs/gpt2_124m runs/rope_gqa --out runs/comparison

Run folders -> a table on the terminal and curves.png: validation loss and HellaSwag against
tokens, from the logs alone, at any time. Drawing needs matplotlib: pip install matplotlib
"""

import json
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

import cli
from fineweb import write_beside

# acc_norm of all 10,042 items by the completion protocol; GPT-3's is its paper's, for 124M
HELLASWAG_MARKS = {"GPT-2 124M": 0.2955, "GPT-3 124M": 0.337}


@dataclass
class CompareConfig:
    runs: Positional[tuple[str, ...]]
    """run folders, each with a log.jsonl"""
    out: str = "runs/comparison"
    """folder of curves.png"""

    def __post_init__(self):
        if not self.runs:
            raise ValueError("name one run folder or more, such as runs/quickstart")


def read_log(run):
    """A run's log -> its start entry and, for each of val_loss, hellaswag_acc_norm, train_loss
    and tok_per_s, the list of (step, value)."""
    path = Path(run) / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"no {path}: give the folder of a run that train_gpt2.py started")
    start, series = None, {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number} is not JSON: {error}") from None
        if not isinstance(entry, dict):
            raise ValueError(f"{path} line {number} is no JSON object but {str(entry)[:40]}")
        if entry.get("event") == "start":
            start = entry
        for name in ("val_loss", "hellaswag_acc_norm", "train_loss", "tok_per_s"):
            if entry.get(name) is not None:  # null: a step that was skipped
                series.setdefault(name, []).append((entry["step"], entry[name]))
    if start is None:
        raise ValueError(f"{path} has no start entry: it is not a whole log")
    if "parameters" not in start or "total_batch_tokens" not in start.get("config", {}):
        raise ValueError(f"{path} is of another version: its start entry has no sizes")
    return start, series


def row(run, start, series):
    """One line of the table."""
    val = series.get("val_loss", [(0, float("nan"))])[-1]
    score = series.get("hellaswag_acc_norm")
    speeds = sorted(value for _, value in series.get("tok_per_s", [(0, float("nan"))]))
    tokens = val[0] * start["config"]["total_batch_tokens"]
    return (
        f"{Path(run).name:<24}{start['parameters']:>13,}{tokens:>16,}{val[1]:>10.4f}"
        f"{f'{score[-1][1]:.4f}' if score else '-':>11}{speeds[len(speeds) // 2]:>12,.0f}"
    )


def draw(logs, path):
    """Draw every run's curves against tokens into a PNG."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ModuleNotFoundError("drawing needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for run, (start, series) in logs.items():
        batch, name = start["config"]["total_batch_tokens"] / 1e6, Path(run).name
        for axis, key in ((left, "val_loss"), (right, "hellaswag_acc_norm")):
            points = series.get(key, [])
            x, y = [step * batch for step, _ in points], [value for _, value in points]
            axis.plot(x, y, marker=".", label=name)
        x = [step * batch for step, _ in series.get("train_loss", [])]
        y = [value for _, value in series.get("train_loss", [])]
        left.plot(x, y, color="grey", alpha=0.25, linewidth=0.7, zorder=0)
    for name, value in HELLASWAG_MARKS.items():
        right.axhline(value, linestyle="--", color="grey", linewidth=0.8)
        right.text(0.02, value, name, transform=right.get_yaxis_transform(), va="bottom", size=8)
    right.axhline(0.25, linestyle=":", color="grey", linewidth=0.8)
    right.text(0.02, 0.25, "chance", transform=right.get_yaxis_transform(), va="bottom", size=8)
    left.set(xlabel="million tokens", ylabel="loss (nats)", title="validation (grey: training)")
    right.set(xlabel="million tokens", ylabel="acc_norm", title="HellaSwag")
    left.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_beside(str(path)) as file:
        figure.savefig(file, format="png", dpi=130)
    plt.close(figure)


def main():
    config = cli.parse(CompareConfig)
    logs = {run: read_log(run) for run in config.runs}
    print(
        f"{'run':<24}{'parameters':>13}{'tokens':>16}{'val loss':>10}{'HellaSwag':>11}{'tok/s':>12}"
    )
    for run, (start, series) in logs.items():
        print(row(run, start, series))
    path = Path(config.out) / "curves.png"
    draw(logs, path)
    print(f"drawn: {path}")


if __name__ == "__main__":
    cli.run(main)
