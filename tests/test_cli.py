"""cli.py: who wins, what is refused, and that a refusal is one line with status 2."""

import ast
import itertools
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import tyro

from nanoswitch import cli
from nanoswitch.files import python_path

ROOT = Path(__file__).parent.parent


@dataclass
class Model:
    n_layer: int = 12
    """transformer blocks"""
    n_head: int = 4
    """query heads"""
    pos: Literal["learned", "rope"] = "learned"
    """position encoding"""
    bias: bool = True
    """biases in the linear layers"""

    def __post_init__(self):
        if self.n_layer % self.n_head:
            raise ValueError(f"n_layer {self.n_layer} is not\na multiple of n_head {self.n_head}")


@dataclass
class Train:
    lr: float = 6e-4
    """peak learning rate"""
    run_dir: str = "runs/out"
    """where checkpoints go"""
    top_k: int | None = None
    """keep the k likeliest"""
    compile: bool = False
    """use torch.compile"""


def parse(*argv):
    return cli.parse(Model, Train, argv=argv, configs=True, description="d")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("flag", ["--top_k=many", "--top_k=1.5"])
def test_the_error_is_one_sentence_on_any_terminal(encoding, flag, tmp_path):
    """tyro draws its frames with other characters where the terminal has no UTF-8."""
    lines = [
        "import sys",
        "from nanoswitch import cli",
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})",
        "from test_cli import Train",
        f"cli.parse(Train, argv=[{flag!r}], description='d')",
    ]
    env = {**os.environ, "PYTHONPATH": python_path(ROOT), "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert flag[2:].split("=")[0] in done.stderr and flag.split("=")[1] in done.stderr
    assert not re.search(r"[│╭╰─]|---|helptext", done.stderr), done.stderr


def test_text_that_the_output_cannot_show_ends_nothing():
    """Not every stream is UTF-8: a redirect on Windows, a Latin-1 locale."""
    code = "from nanoswitch import cli; cli.run(lambda: print('a \\u4e2d b'))"
    env = {**os.environ, "PYTHONPATH": python_path(ROOT), "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env)
    assert done.returncode == 0 and done.stdout.split() == [b"a", rb"\u4e2d", b"b"]


def refused(capsys, *argv, classes=(Model, Train), configs=True):
    """The one line on stderr."""
    with pytest.raises(SystemExit) as stop:
        cli.parse(*classes, argv=argv, configs=configs, description="d")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.count("\n") == 1 and err.endswith("\n"), err
    assert err.startswith("error: ") and "Traceback" not in err
    # a sentence, not what is left of a frame, and no advice for the parser's own users
    assert not re.search(r"[│╭╰─\x1b]|---|helptext", err), err
    return err


def toml(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


@pytest.mark.parametrize(
    "own", [[], ["--compile=True"], ["--top_k=5"], ["--run_dir="], ["--lr=-.5"], ["--run_dir=None"]]
)
def test_flags_are_read_as_tyro_reads_them(own):
    """Beside config files tyro is asked for help, and for kinds such as int | None, alone."""
    of_model, of_train = ["--n_layer=6", "--n_head=03", "--pos=rope"], ["--lr=2E-4", *own]
    flags = dict(config=(tyro.conf.FlagConversionOff,), use_underscores=True)
    want = tyro.cli(Model, args=of_model, **flags), tyro.cli(Train, args=of_train, **flags)
    assert parse(*of_model, *of_train) == want


# ----------------------------------------------------------------------------- who wins


def test_without_arguments_the_defaults_hold():
    assert parse() == (Model(), Train())
    assert cli.parse(Train, argv=[], description="d") == Train()  # one class: no tuple


def test_defaults_then_config_files_in_order_then_flags(tmp_path):
    one = toml(tmp_path, "one.toml", 'n_layer = 8\nn_head = 2\nlr = 1e-3\nrun_dir = "a"')
    two = toml(tmp_path, "two.toml", 'n_layer = 16\nrun_dir = "b"')
    model, train = parse(one, two)
    assert (model.n_layer, model.n_head, train.lr, train.run_dir) == (16, 2, 1e-3, "b")
    model, train = parse(two, one)
    assert (model.n_layer, train.run_dir) == (8, "a")
    # flags win wherever they stand
    for argv in (["--n_layer=4", one, two], [one, "--n_layer=4", two], [one, two, "--n_layer=4"]):
        model, train = parse(*argv)
        assert (model.n_layer, model.n_head, train.run_dir) == (4, 2, "b")


def test_the_last_of_a_flag_given_twice_wins():
    assert parse("--n_layer", "4", "--n_layer=8")[0].n_layer == 8
    assert parse("--n_layer=8", "--n-layer", "4")[0].n_layer == 4


@pytest.mark.parametrize(
    "argv", [["--n_layer=8"], ["--n_layer", "8"], ["--n-layer=8"], ["--n-layer", "8"]]
)
def test_ways_to_write_a_flag(argv):
    assert parse(*argv)[0].n_layer == 8


@pytest.mark.parametrize("text, value", [("true", True), ("false", False), ("True", True)])
@pytest.mark.parametrize("text2, value2", [("FALSE", False), ("1", True), ("0", False)])
def test_booleans(text, value, text2, value2, tmp_path):
    model, train = parse("--bias", text, f"--compile={text2}")
    assert (model.bias, train.compile) == (value, value2)
    config = toml(tmp_path, "c.toml", f"bias = {text.lower()}")
    assert parse(config)[0].bias is value
    assert parse(config, f"--bias={text2}")[0].bias is value2


@pytest.mark.parametrize("text", ["", "a=b", "-x", "--run", "two words", "naïve\n2", "a|b", "'q'"])
def test_a_string_arrives_as_it_was_written(text):
    assert parse("--run_dir", text)[1].run_dir == text
    assert parse(f"--run_dir={text}")[1].run_dir == text


def test_toml_values_keep_their_type(tmp_path):
    config = toml(tmp_path, "c.toml", 'lr = 3\nrun_dir = "8"\ntop_k = 5\npos = "rope"')
    model, train = parse(config)
    assert (train.lr, train.run_dir, train.top_k, model.pos) == (3.0, "8", 5, "rope")
    assert isinstance(train.lr, float) and parse()[1].top_k is None
    assert parse(toml(tmp_path, "s.toml", 'run_dir = "--a b=c"'))[1].run_dir == "--a b=c"
    assert parse(toml(tmp_path, "e.toml", ""))[0] == Model()
    assert parse("--lr=-1e-5")[1].lr == parse("--lr", "-1e-5")[1].lr == -1e-5


# ----------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "flag, nearest",
    [("--n_layers=3", "n_layer"), ("--n-haed=2", "n_head"), ("--run-dri=x", "run_dir")],
)
def test_an_unknown_flag_names_the_closest(flag, nearest, capsys):
    err = refused(capsys, flag)
    assert flag.split("=")[0] in err and f"did you mean {nearest}?" in err


def test_an_unknown_name_in_a_config_names_the_file_and_the_closest(tmp_path, capsys):
    path = toml(tmp_path, "c.toml", "n_layers = 3")
    err = refused(capsys, path)
    assert path in err and "n_layers" in err and "did you mean n_layer?" in err


@pytest.mark.parametrize(
    "flag",
    [
        "--n_layer=many",
        "--n_layer=1.5",
        "--n_layer=",
        "--lr=fast",
        "--bias=maybe",
        "--pos=ropes",
        "--top_k=x",
        "--n_layer=" + "9x" * 50,
    ],
)
@pytest.mark.parametrize("columns", ["20", "80", "400"])
def test_a_wrong_type_names_the_flag_and_the_value(flag, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    name, value = flag[2:].split("=")
    for argv in ([flag], [f"--{name}", value]):
        err = refused(capsys, *argv)
        # a long word may be wrapped
        assert name in err and value.replace(" ", "") in err.replace(" ", ""), err


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--n_layer=1e6"], "--n_layer is '1e6'; it must be a whole number"),
        (["--lr=fast"], "--lr is 'fast'; it must be a number"),
        # a switch without its value takes the word behind it
        (["--bias", "c.toml"], "--bias is 'c.toml'; it must be true or false"),
    ],
)
def test_a_wrong_type_says_what_is_wanted(argv, words, capsys):
    assert refused(capsys, *argv) == f"error: {words}\n"


def test_a_wrong_choice_lists_the_valid_ones(capsys):
    err = refused(capsys, "--pos=rpoe")
    assert "rpoe" in err and "learned" in err and "rope" in err


def test_a_wrong_type_in_a_config_names_the_key(tmp_path, capsys):
    for text in ('n_layer = "many"', "n_layer = 2.5", "n_layer = true", "n_layer = 2024-01-01"):
        assert "n_layer" in refused(capsys, toml(tmp_path, "c.toml", text))


def test_a_flag_without_a_value_says_so(capsys):
    assert "--n_layer" in refused(capsys, "--n_layer")
    assert "--compile" in refused(capsys, "--compile")


@pytest.mark.parametrize("text", ["n_layer = ", "n_layer 3", "[a\n", "n_layer = 1\nn_layer = 2"])
def test_a_config_that_is_not_toml_is_named(text, tmp_path, capsys):
    path = toml(tmp_path, "c.toml", text)
    assert path in refused(capsys, path)


@pytest.mark.parametrize("classes", [(Model,), (Model, Train)])
def test_a_combination_the_dataclass_refuses_is_one_line(classes, capsys):
    err = refused(capsys, "--n_layer=7", "--n_head=2", classes=classes)
    assert "n_layer 7 is not a multiple of n_head 2" in err


# ----------------------------------------------------------------------------- help


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--n_layer=3", "--help"]])
def test_help_documents_every_field_with_its_default(argv, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    out, err = capsys.readouterr()
    assert not stop.value.code and err == ""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╰╮╯─]", "", out).split())
    for name, doc, default in [
        ("n_layer", "transformer blocks", "12"),
        ("n_head", "query heads", "4"),
        ("pos", "position encoding", "learned"),
        ("bias", "biases in the linear layers", "True"),
        ("lr", "peak learning rate", "0.0006"),
        ("run_dir", "where checkpoints go", "runs/out"),
        ("top_k", "keep the k likeliest", "None"),
        ("compile", "use torch.compile", "False"),
    ]:
        # its flag, its docstring, and its default, in this order, before the next flag
        assert re.search(
            rf"--{name} (?:(?! --)[^\n])*?{re.escape(doc)} \(default: {re.escape(default)}\)", text
        ), f"{name}: {text}"


def test_help_of_the_model_documents_every_switch(capsys, monkeypatch):
    import ast

    from model import GPTConfig

    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        cli.parse(GPTConfig, argv=["--help"], description="d")
    text = re.sub(r"\x1b\[[0-9;]*m|[│╭╰╮╯─\s]", "", capsys.readouterr().out)
    tree = ast.parse((ROOT / "model.py").read_text())
    body = next(n for n in tree.body if getattr(n, "name", "") == "GPTConfig").body
    fields = [
        (a.target.id, ast.unparse(a.value).strip("'"), b.value.value)
        for a, b in itertools.pairwise(body)
        if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)
    ]
    assert {name for name, _, _ in fields} == set(GPTConfig.__dataclass_fields__)
    for name, default, doc in fields:
        doc = re.sub(r"\s", "", doc)
        default = default and f"(default:{default})"  # tyro shows an empty text its own way
        assert f"--{name}" in text and doc + default in text, (name, default)


# ----------------------------------------------------------------------------- run

SCRIPT = """
import sys
from nanoswitch import cli
from dataclasses import dataclass

@dataclass
class Config:
    fail: str = ""
    \"\"\"what to raise\"\"\"

def main():
    config = cli.parse(Config, description="d")
    if config.fail == "value":
        raise ValueError("n_embd 7 is odd;\\n  try 8")
    if config.fail == "os":
        open("/no/such/file")
    if config.fail == "module":
        import no_such_package
    if config.fail == "bug":
        raise AttributeError("a bug")
    if config.fail == "interrupt":
        raise KeyboardInterrupt
    if config.fail == "pipe":
        for i in range(100000):
            print(i)
    print("fine", config.fail)

cli.run(main)
"""


def script(tmp_path, *argv, **options):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": python_path(ROOT)}
    return subprocess.run(
        [sys.executable, path, *argv], capture_output=True, text=True, env=env, **options
    )


@pytest.mark.parametrize(
    "kind, status, words",
    [
        ("value", 1, "n_embd 7 is odd; try 8"),
        ("os", 1, "/no/such/file"),
        ("module", 1, "no_such_package"),
        ("interrupt", 130, "interrupted"),
    ],
)
def test_an_expected_failure_is_one_line(kind, status, words, tmp_path):
    done = script(tmp_path, "--fail", kind)
    assert done.returncode == status and done.stdout == ""
    assert done.stderr.count("\n") == 1 and words in done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize("argv", [["--debug", "--fail", "value"], ["--fail", "value", "--debug"]])
def test_debug_shows_the_traceback(argv, tmp_path):
    done = script(tmp_path, *argv)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "n_embd 7 is odd" in done.stderr


def test_an_unexpected_failure_keeps_its_traceback(tmp_path):
    done = script(tmp_path, "--fail", "bug")
    assert done.returncode == 1 and "Traceback" in done.stderr and "a bug" in done.stderr


def test_success_and_bad_flags_through_run(tmp_path):
    done = script(tmp_path, "--debug")
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine \n", "")
    done = script(tmp_path, "--fial=x")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "fail" in done.stderr


def test_a_reader_that_leaves_is_no_error(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    done = subprocess.run(
        f"'{sys.executable}' '{path}' --fail pipe | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": python_path(ROOT)},
    )
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_importing_cli_needs_the_standard_library_only():
    code = "import sys, nanoswitch.cli; print({n.split('.')[0] for n in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    light = subprocess.run(
        [sys.executable, "-c", "import sys; print({n.split('.')[0] for n in sys.modules})"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    new = ast.literal_eval(done.stdout) - ast.literal_eval(light.stdout)
    assert new <= set(sys.stdlib_module_names) | {"nanoswitch"}


def test_a_card_without_memory_is_one_line(capsys):
    import torch

    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1536.00 MiB. GPU 0 has")

    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    err = capsys.readouterr().err
    assert ended.value.code == 1 and err.count("\n") == 1 and "for 1.5 GiB at once; lower" in err
