"""The tables in experiments/, EXPERIMENTS.md and SPEEDRUN.md are what compare.py makes of the
committed logs."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from builders import page_of, run_main

import compare
from nanoswitch.log import read_run

ROOT = Path(__file__).parent.parent
FOLDERS = sorted(path.parent for path in ROOT.glob("experiments/**/command.txt"))


def test_there_are_some():
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_tables_come_from_the_logs(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for path in [*folder.rglob("log.jsonl"), *folder.rglob("diverged")]:
        place = out / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    for name in ("draw", "draw_ladder", "draw_searches"):  # pictures take seconds
        monkeypatch.setattr(compare, name, lambda *args: None)
    monkeypatch.chdir(ROOT)
    argv = shlex.split((folder / "command.txt").read_text())
    name = folder.relative_to(ROOT).as_posix()
    assert argv[:2] == ["python", "compare.py"] and argv[-2:] == ["--out", name]
    assert run_main(compare.main, *argv[2:-1], out, "--report_only", "true") == 0
    text = (out / "results.md").read_text()
    assert text == (folder / "results.md").read_text()
    page = page_of(folder)
    assert f"{name}/" in page
    if "variants" in folder.parts:  # their tables are variants/README.md's, which has its own test
        return
    if "## The ladder" in text:
        ladder = text[text.index("## The ladder") :]
        table = ladder[ladder.index("| config |") :].split("\n\n")[0]
        assert table in page, f"its document has another table than {name}"
        return
    for name, row in json.loads((out / "results.json").read_text())["configs"].items():
        diff, loss = row["diff"]["mean"], row["val_loss"]["mean"]
        shown = f"{loss:.4f} | " + ("-" if diff is None or not diff else f"{diff:+.4f}")
        line = f"| {name} | {row['parameters']:,} | {row['kv_bytes_per_token']:,} | {shown} |"
        assert line in page, f"{name}'s document has no {line}"


@pytest.mark.parametrize("folder", ["repeats", "repeats_long", "positions_muon"])
def test_the_scores_at_longer_contexts_are_the_archives(folder):
    archive = ROOT / "experiments" / folder
    scores, page = json.loads((archive / "lengths.json").read_text()), page_of(archive)
    for name, by in scores["prose"].items():
        losses = [f"{np.mean(by[T]):.4f}" if by[T] else "-" for T in ("512", "1024", "2048")]
        rows = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
        assert any(line.endswith(f"| {' | '.join(losses)} |") for line in rows), name
    for name, by in scores["repeat"].items():
        gains = [spread(seeds) if seeds else "-" for seeds in by.values()]
        assert f"| {name} | {' | '.join(gains)} |" in page


def spread(seeds):
    return f"{np.mean(seeds):.3f}" + (f" ± {np.std(seeds, ddof=1):.3f}" if len(seeds) > 1 else "")


def test_the_losses_at_16m_are_the_logs():
    archive = ROOT / "experiments/speedrun_canon"
    page = page_of(archive)
    page = page[page.index("**A tuned baseline at this batch") : page.index("**On a card, a sixth")]
    folders = sorted(archive.iterdir())
    assert len(folders) == page.count("0.54M |") + page.count("3.28M |") + page.count("0.82M |")
    for folder in folders:
        losses = [read_run(run).last("val_loss") for run in sorted(folder.iterdir())]
        shown = f"{np.mean(losses):.4f}"
        shown += f" ± {np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""
        assert f" {shown} |" in page or f"**{shown}** |" in page, folder
    at_66, ends = {}, {}
    for name in ("baseline_16m", "canon_16m", "kerple_16m"):
        curves = [read_run(run).curve("val_loss") for run in sorted((archive / name).iterdir())]
        ends[name] = [losses[-1] for _, losses in curves]
        at_66[name] = [losses[steps.index(66)] for steps, losses in curves if 66 in steps]
    assert len(ends["baseline_16m"]) == len(at_66["kerple_16m"]) == 3 and 66 / 400 < 1 / 6
    assert max(at_66["kerple_16m"]) < min(ends["baseline_16m"])
    for found in (at_66["canon_16m"], at_66["kerple_16m"], ends["baseline_16m"]):
        assert ", ".join(f"{loss:.4f}" for loss in found) in " ".join(page.split())
