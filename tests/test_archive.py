"""python -m nanoswitch.archive: the table of a thinned copy is that of the runs."""

import json

import pytest
from builders import run_main
from test_compare import write_run

import compare
from nanoswitch import archive
from nanoswitch.log import read_run


def test_a_copy_gives_the_same_table(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "draw", lambda *args: None)  # pictures take seconds
    for name, loss in {"gpt2": 5.0, "rope": 4.5}.items():
        speeds = [50.0, 20.0, 40.0, 80.0, 30.0, 60.0, 10.0]
        folder = write_run(tmp_path / "a" / name, {3: loss + 1, 7: loss}, 1, speeds, steps=7)
        (folder / "model.safetensors").write_bytes(bytes(1000))
        with open(folder / "log.jsonl", "a") as log:
            log.write('{"step": 7, "samp')  # a kill left it half written
    write_run(tmp_path / "a" / "half", {3: 4.0}, 1, [1.0] * 3, steps=7)
    assert run_main(archive.main, tmp_path / "a", "--out", tmp_path / "b", "--every", 3) == 0
    found = sorted(p.relative_to(tmp_path / "b").as_posix() for p in tmp_path.glob("b/**/*.*"))
    assert found == ["gpt2/log.jsonl", "rope/log.jsonl"]
    for name in ("gpt2", "rope"):
        before, after = (read_run(tmp_path / of / name) for of in "ab")
        assert after.curve("train_loss")[0] == [3, 6, 7]
        assert after.seconds([3, 6, 7]) == pytest.approx(before.seconds([3, 6, 7]))
        assert after.seconds([7]) == pytest.approx([100 * sum(1 / s for s in speeds)])
        assert after.curve("val_loss") == before.curve("val_loss")
    tables = []
    for of in "ab":
        folders = [tmp_path / of / name for name in ("gpt2", "rope")]
        assert run_main(compare.main, *folders, "--out", tmp_path / f"out_{of}") == 0
        tables.append(json.loads((tmp_path / f"out_{of}" / "results.json").read_text()))
    for rows in (table["configs"].values() for table in tables):
        for row in rows:  # medians over steps, and times on the way
            del row["tok_per_s"], row["reaches_first"]
            row["wall_s"] = pytest.approx(row["wall_s"])
    assert tables[0]["configs"] == tables[1]["configs"]


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run_main(archive.main, tmp_path / "empty", "--out", tmp_path / "b") == 1
    assert "no log.jsonl under" in capsys.readouterr().err
    write_run(tmp_path / "a" / "gpt2", {3: 5.0}, 1, [1.0] * 3)
    assert run_main(archive.main, tmp_path / "a", "--out", tmp_path / "a" / "b") == 1
    assert "give a folder outside" in capsys.readouterr().err


@pytest.mark.parametrize("live, words", [(True, "beside its checkpoints"), (False, "swapped")])
def test_a_fuller_log_is_not_overwritten(tmp_path, capsys, live, words):
    full = write_run(tmp_path / "a" / "gpt2", {3: 5.0, 7: 4.0}, 1, [1.0] * 7, steps=7)
    assert run_main(archive.main, tmp_path / "a", "--out", tmp_path / "b", "--every", 7) == 0
    if live:
        (full / "step_000007").mkdir()
    before = (full / "log.jsonl").read_bytes()
    capsys.readouterr()
    assert run_main(archive.main, tmp_path / "b", "--out", tmp_path / "a") == 1
    assert words in capsys.readouterr().err and (full / "log.jsonl").read_bytes() == before
