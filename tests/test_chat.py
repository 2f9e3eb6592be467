"""sample.py --chat as its user meets it: a process at a terminal (a pty), typed at and read."""

import importlib.util
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from builders import write_step

import sample as s
from model import GPT, GPTConfig
from nanoswitch.tokenizer import get_tokenizer

pty = pytest.importorskip("pty")
ROOT = Path(__file__).parent.parent


def make(folder, **fields):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(n_layer=1, n_head=1, n_embd=4, block_size=64) | fields)).eval()
    write_step(folder, model)
    return model


class Terminal:
    """A process whose terminal this is."""

    def __init__(self, folder, *args):
        self.fd, theirs = pty.openpty()
        # where this process ignores Ctrl-C, as a background job does, its child would too
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "sample.py"), *args, "--device=cpu"],
            stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, start_new_session=True,
            env=os.environ | {"TERM": "dumb", "PYTHONUTF8": "1", "INPUTRC": os.devnull},
        )  # fmt: skip
        signal.signal(signal.SIGINT, before)
        os.close(theirs)
        self.seen = b""

    def until(self, ending):
        """What comes next, up to an ending; the terminal's line ends made plain."""
        ending, deadline = ending.replace("\n", "\r\n").encode(), time.monotonic() + 30
        while ending not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], deadline - time.monotonic())
            assert ready, f"waited for {ending}, have {self.seen[-2000:]}"
            try:
                piece = os.read(self.fd, 1 << 16)
            except OSError:  # Linux's way to say that the other side has closed
                piece = b""
            assert piece, f"ended before {ending}: {self.seen[-2000:]}"
            self.seen += piece
        text, _, self.seen = self.seen.partition(ending)
        return text.decode().replace("\r\n", "\n")

    def type(self, line):
        os.write(self.fd, line.encode() + b"\n")

    def ask(self, line):
        """Type a line -> what is printed before the next prompt."""
        self.type(line)
        self.until(line)  # the echo
        return self.until("\n> ").removeprefix("\n")

    def end(self):
        status = self.process.wait(30)
        os.close(self.fd)
        return status


@pytest.fixture
def at_terminal(tmp_path):
    terminals = []

    def start(*args):
        terminals.append(Terminal(tmp_path, *args))
        return terminals[-1]

    yield start
    for terminal in terminals:
        if terminal.process.poll() is None:
            terminal.process.kill()
            terminal.end()


def expected(model, text, **changes):
    flags = dict(checkpoint="", device="cpu", max_new_tokens=20)
    (reply,) = s.sample(model, text, s.SampleConfig(**flags | changes))
    return reply.translate(s.CONTROLS)


def test_a_conversation(at_terminal, tmp_path):
    model = make(tmp_path / "small", block_size=256)
    other = make(tmp_path / "other", pos="rope", n_embd=8, block_size=256)
    chat = at_terminal("small", "--chat", "--max_new_tokens=20", "--seed=5")
    hello = chat.until("> ")
    assert "continues your text" in hello and "context of 256" in hello

    first = chat.ask("hi")
    assert first == expected(model, "hi", seed=5)
    raw = s.sample(model, "hi", s.SampleConfig("", device="cpu", max_new_tokens=20, seed=5))[0]
    second = chat.ask("and")  # the conversation goes on, with the next seed
    assert second == expected(model, f"hi{raw}\nand", seed=6)

    assert chat.ask("/reset") == ""
    assert chat.ask("/temp 0") == ""
    greedy = chat.ask("hi")
    assert greedy == expected(model, "hi", temperature=0)
    # every mistake is one line, and changes nothing
    for line, words in {
        "/temp hot": "temperature 'hot'", "/temp": "temperature ''", "/temp -1": "0 or more",
        "/temp nan": "temperature 'nan'", "/topk 1.5": "top_k '1.5'", "/seed -3": "0 or more",
        "/model none/such/model": "none/such/model", "/model": "config.json", "/nonsense": "/help",
        "/seed 1" + "0" * 30: "2**63", "/resett": "unknown command",
    }.items():  # fmt: skip
        answer = chat.ask(line)
        assert answer.startswith("error: ") and words in answer and "\n" not in answer, answer
    assert chat.ask("/reset") == "" and chat.ask("hi") == greedy

    assert chat.ask("/temp 1") == chat.ask("/topk 3") == chat.ask("/seed 9") == ""
    assert chat.ask("/reset") == ""
    assert chat.ask("hi") == expected(model, "hi", temperature=1.0, top_k=3, seed=9)
    assert "context of 256" in chat.ask("/model other")
    assert chat.ask("/reset") == chat.ask("/seed 9") == ""
    assert chat.ask("yes") == expected(other, "yes", temperature=1.0, top_k=3, seed=9)
    commands = chat.ask("/help")
    assert all(
        name in commands for name in ["/reset", "/temp", "/topk", "/seed", "/model", "/quit"]
    )
    assert chat.ask("/reset") == chat.ask("/seed 9") == ""
    with_slash = chat.ask(" /help")  # text
    assert with_slash == expected(other, " /help", temperature=1.0, top_k=3, seed=9)
    chat.type("/quit")
    assert chat.end() == 0


def test_ctrl_c_stops_a_reply_and_ctrl_d_the_program(at_terminal, tmp_path):
    model = make(tmp_path / "long", block_size=20000)
    flags = ["--max_new_tokens=9999", "--temperature=0", "--dtype=float32"]
    chat = at_terminal("long", "--chat", "true", *flags)
    chat.until("> ")
    time.sleep(0.5)  # the prompt is written shortly before the wait that a signal ends
    os.kill(chat.process.pid, signal.SIGINT)
    assert "/quit or Ctrl-D" in chat.until("\n> ")
    whole = expected(model, "go", temperature=0, dtype="float32", max_new_tokens=500)
    chat.type("go")
    chat.until("go\n")
    first = chat.until(whole[:50])  # it streams: this is here long before the end
    os.kill(chat.process.pid, signal.SIGINT)
    rest = chat.until("\n> ")
    assert first == "" and rest.endswith("\n(stopped)")
    assert chat.ask("/reset") == ""  # and the chat goes on
    chat.type("go")
    chat.until("go\n")
    chat.until(whole[:50])
    os.kill(chat.process.pid, signal.SIGINT)
    assert chat.until("\n> ").endswith("\n(stopped)")
    if importlib.util.find_spec("readline"):
        chat.type("/temp 7x")
        assert "'7x'" in chat.until("\n> ")
        os.write(chat.fd, b"\x1b[A\n")  # the arrow key brings the last line back
        assert "'7x'" in chat.until("\n> ")
    os.write(chat.fd, b"\x04")
    assert chat.end() == 0


def test_what_the_context_cannot_hold_is_dropped_oldest_first(monkeypatch, capsys, tmp_path):
    """Token by token: what each reply was given is the tail of the whole conversation's tokens."""
    make(tmp_path / "small", block_size=24)
    given = []

    def reply(model, ids, config, own):
        given.append((ids, config.max_new_tokens))
        yield from [" one", " two"]

    monkeypatch.setattr(s, "stream_text", reply)
    chat = s.Chat(s.SampleConfig(str(tmp_path / "small"), device="cpu", max_new_tokens=8))
    tokenizer, text = get_tokenizer(), ""
    for i in range(6):
        chat.reply(f"a b {i} 日 c")
        text += ("\n" if text else "") + f"a b {i} 日 c"
        ids = tokenizer.encode(text)
        have, room = given[-1]
        assert room == 8 and len(have) <= 24 - 8 and have == ids[-len(have) :]
        cut = len(ids) - len(have)
        # at most the rest of a cut character is dropped beyond what must be
        assert cut == 0 or len(have) >= 24 - 8 - 2
        assert not tokenizer.decode(have).startswith("\ufffd")
        text += " one two"
    assert cut > 0
    assert capsys.readouterr().out.count("oldest text is dropped") == 1


def test_no_reply_steers_the_terminal(monkeypatch, capsys, tmp_path):
    make(tmp_path / "small")
    monkeypatch.setattr(s, "stream_text", lambda *_: iter(["a\x1b[2Jb\n\tc\r\x07\x9b é日"]))
    chat = s.Chat(s.SampleConfig(str(tmp_path / "small"), device="cpu"))
    capsys.readouterr()
    chat.reply("hi")
    assert capsys.readouterr().out == "a\ufffd[2Jb\n\tc\ufffd\ufffd\ufffd é日\n"
