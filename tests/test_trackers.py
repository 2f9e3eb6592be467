"""--wandb true and --trackio true: what they get, read back from their own files, and that training
does not care what becomes of it."""

import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import tiny_runs as runs

import train_gpt2 as t
from nanoswitch.log import Log

FEW = dict(
    n_layer=1, n_embd=8, max_steps=4, eval_every=2, val_tokens=32, sample_every=0,
    checkpoint_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def plain(data):
    """The run without wandb, which did not even import it."""
    known = "wandb" in sys.modules
    runs.train(data, data.parent / "plain", **FEW)
    assert known or "wandb" not in sys.modules
    return data.parent / "plain"


def results(run):
    """The log's lines but for what differs from run to run: times and flags."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    other = {"tok_per_s", "peak_memory_bytes", "config", "git", "versions"}
    return [{k: v for k, v in entry.items() if k not in other} for entry in entries]


# ----------------------------------------------------------------------------- the real package


def records(path):
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format, blocks of
    32 KiB with pieces of records: checksum (4 bytes), length (2), whether it is the last (1)."""
    from wandb.proto import wandb_internal_pb2 as pb

    content, place, whole = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        left = 2**15 - place % 2**15
        if left < 7:  # no room for a piece: zeros
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            yield pb.Record.FromString(whole)
            whole = b""


def values(items):
    """{name: value}, a nested one's name being a/b."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_wandb_gets_the_whole_log_and_a_continued_run_stays_one(
    data, plain, tmp_path, monkeypatch
):  # fmt: skip
    package = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    run = tmp_path / "mine"
    for steps in (2, 4):
        runs.train(data, run, **FEW | dict(max_steps=steps, sample_every=4), wandb=True)
    package.teardown()  # its process may still be writing
    parts = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(parts) == 2
    written = [list(records(part)) for part in parts]
    ids = {r.run.run_id for part in written for r in part if r.HasField("run")}
    assert ids == {(run / "wandb_id").read_text()}
    got, texts = {}, {}
    for part in written:
        about = next(r.run for r in part if r.HasField("run"))
        assert (about.project, about.display_name) == ("nanoswitch", "mine")
        assert [r.exit.exit_code for r in part if r.HasField("exit")] == [0]
        assert not any(r.HasField("output_raw") or r.HasField("output") for r in part)
        config = next(values(r.config.update) for r in part if r.HasField("config"))
        assert (config["n_embd"], config["lr"], config["parameters"]) == (8, 3e-3, 403_448)
        assert config["versions"]["torch"] and config["seed"] == 1337
        for entry in [values(r.history.item) for r in part if r.HasField("history")]:
            step = entry.pop("step")
            if path := entry.get("samples/path"):
                [file] = (run / "wandb").glob(f"offline-run-*/files/{path}")
                texts[step] = [text for _, text in json.loads(file.read_text())["data"]]
            for name in [name for name in entry if not name.startswith(("_", "samples/"))]:
                assert (name, step) not in got
                got[name, step] = entry[name]
    expected = {("checkpoint", 2): "step_000002", ("checkpoint", 4): "step_000004"}
    for line in runs.log(run):
        if "samples" in line:
            assert texts.pop(line["step"]) == line["samples"]
        elif "event" not in line:
            items = line.items() - {("step", line["step"]), ("mfu", None)}
            expected |= {(name, line["step"]): value for name, value in items}
    assert got == expected and not texts
    assert {step for name, step in got if name == "train_loss"} == {1, 2, 3, 4}


READ_BACK = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage as storage
[run] = storage.get_run_records("nanoswitch")
config = storage.get_run_config("nanoswitch", run["name"])
print(json.dumps([run["name"], config, storage.get_logs("nanoswitch", run["name"])]))
"""


@pytest.mark.slow  # needs pip install trackio
def test_trackio_gets_the_whole_log_and_a_continued_run_stays_one(data, tmp_path):
    pytest.importorskip("trackio")
    run, home = tmp_path / "mine", {**os.environ, "TRACKIO_DIR": str(tmp_path / "kept")}
    for steps in (2, 4):
        line = runs.command(
            data, run, **FEW | dict(max_steps=steps, sample_every=4), trackio="true"
        )
        done = subprocess.run(line, env=home, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    read = subprocess.run(
        [sys.executable, "-c", READ_BACK], env=home, capture_output=True, text=True, check=True
    )
    name, config, logs = json.loads(read.stdout.splitlines()[-1])
    assert name == f"mine-{(run / 'trackio_id').read_text()[:6]}"
    assert (config["n_embd"], config["lr"], config["parameters"]) == (8, 3e-3, 403_448)
    expected = {("checkpoint", 2): "step_000002", ("checkpoint", 4): "step_000004"}
    for line in runs.log(run):
        if "event" not in line:
            items = line.items() if "samples" not in line else {}
            expected |= {(k, line["step"]): v for k, v in items if k != "step" and v is not None}
    got = {(k, entry["step"]): v for entry in logs for k, v in entry.items()}
    written = {line["step"]: line["samples"] for line in runs.log(run) if "samples" in line}
    kept = {s: [row["text"] for row in v["_value"]] for (k, s), v in got.items() if k == "samples"}
    assert kept == written and written.keys() == {0, 2, 4}
    names = {name for name, _ in expected}
    assert {key: value for key, value in got.items() if key[0] in names} == expected


# ----------------------------------------------------------------------------- failures


class Fails(ModuleType):
    """A stand-in for the package that fails when it comes to `where`, and counts its calls."""

    def __init__(self, where, name="wandb"):
        super().__init__(name)
        self.where, self.calls = where, []
        self.Settings, self.Table = SimpleNamespace, lambda **_: None

    def call(self, name):
        self.calls.append(name)
        if name == self.where:
            raise ConnectionError("key SECRET refused\nand more lines")

    def teardown(self):
        raise SystemExit(1)  # as it does at times

    def init(self, **_):
        self.call("init")
        config = SimpleNamespace(update=lambda *_, **__: self.call("config"))
        return SimpleNamespace(
            config=config, define_metric=lambda *_, **__: None,
            log=lambda *_, **__: self.call("log"), finish=lambda *_: self.call("finish"),
        )  # fmt: skip


@pytest.mark.parametrize(
    "name, where",
    [("wandb", w) for w in ("init", "config", "log", "finish")]
    + [("trackio", w) for w in ("init", "log", "finish")],
)
def test_a_run_survives_whatever_fails_in_it(
    data, plain, tmp_path, monkeypatch, capsys, name, where
):  # fmt: skip
    package = Fails(where, name)
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setenv("WANDB_API_KEY", "SECRET")
    runs.train(data, tmp_path / "run", **FEW | {name: True})
    assert package.calls.count(where) == 1 and package.calls[-1] == where  # left alone after it
    assert results(tmp_path / "run") == results(plain)
    assert runs.equal_weights(runs.weights(tmp_path / "run"), runs.weights(plain))
    out, err = capsys.readouterr()
    [warning] = [line for line in (out + err).splitlines() if "warning" in line]
    assert warning.startswith(f"warning: {name} failed (ConnectionError: key *** refused)")
    assert "SECRET" not in out + err + (tmp_path / "run" / "log.jsonl").read_text()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_named_before_anything_is_done(
    data, plain, tmp_path, monkeypatch, capsys, name
):  # fmt: skip
    monkeypatch.setitem(sys.modules, name, None)
    before = runs.snapshot(plain)
    arguments = runs.arguments(data, plain, **FEW | {"max_steps": 8, name: "true"})
    err = runs.refusal(capsys, monkeypatch, *arguments)
    assert f"pip install {name}" in err
    assert runs.snapshot(plain) == before


def test_only_the_first_rank_talks_to_wandb(tmp_path, monkeypatch):
    package = Fails("never")
    monkeypatch.setitem(sys.modules, "wandb", package)
    for active in (False, True):
        with Log(tmp_path, 0, active, ["wandb"]) as log:
            log.write(event="start", step=0, config={"lr": 1})
            log.write(step=1, train_loss=2.0)
        assert package.calls == (["init", "config", "log", "finish"] if active else [])
    assert not t.TrainConfig().wandb and not t.TrainConfig().trackio
