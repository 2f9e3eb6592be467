"""compare.py reads logs that are written out here by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import compare

ROOT = Path(__file__).parent.parent


def write_log(folder, *entries):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


@pytest.fixture
def run(tmp_path):
    return write_log(
        tmp_path / "runs" / "rope",
        {"event": "start", "parameters": 1234, "config": {"total_batch_tokens": 100}},
        {"step": 0, "val_loss": 10.8},
        {"step": 1, "train_loss": 10.5, "tok_per_s": 30.0},
        {"step": 2, "train_loss": 9.5, "tok_per_s": 10.0},
        {"step": 3, "train_loss": 9.0, "tok_per_s": 20.0},
        {"step": 3, "val_loss": 8.25},
        {"step": 3, "hellaswag_acc": 0.2, "hellaswag_acc_norm": 0.26, "hellaswag_n": 50},
    )


def test_a_row_holds_the_last_scores_and_the_median_speed(run):
    start, series = compare.read_log(run)
    assert series["val_loss"] == [(0, 10.8), (3, 8.25)]
    cells = compare.row(run, start, series).split()
    assert cells == ["rope", "1,234", "300", "8.2500", "0.2600", "20"]


def test_the_command_draws_a_png_and_prints_the_table(run, tmp_path):
    pytest.importorskip("matplotlib")
    done = subprocess.run(
        [sys.executable, "compare.py", run, run, "--out", tmp_path / "out"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "8.2500" in done.stdout
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
