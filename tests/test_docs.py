"""The documents: every link leads somewhere, and every command runs.

A command is a line of an indented block. One that needs the network, a card, or a peer's checkout
says so in its comment: of those only the flags are read. All others run with -m slow, one document
at a time, in a folder of its own, at tiny sizes; the README's in every run of the tests, without
its proof."""

import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from builders import GPT2_VOCABULARY, grown, tiny, write_jsonl, write_step

import fineweb
import train_gpt2
from model import GPT, GPTConfig
from nanoswitch import cli, hf, registry, switches

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
LAUNCH = ROOT / "sky.yaml"
DOCUMENTS = [*PAGES, NOTEBOOK, LAUNCH]
LINKED = [*PAGES, *sorted(set(ROOT.glob("*.md")) - {ROOT / "README.md"})]
NEEDS = re.compile(r"# .*\bneeds? ")
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)


def blocks(text):
    """The indented blocks of a Markdown text -> [[line, ...], ...], continued lines joined."""
    found = re.findall(r"(?:(?<=\n\n)|\A)((?:    .*\n?|\n(?=    ))+)", text)
    joined = [re.sub(r"\\\n\s*", "", block) for block in found]
    return [[line[4:] for line in block.splitlines() if line.strip()] for block in joined]


def commands(path):
    """The command lines of a document, without Python, Slurm scripts and lists of files."""
    lines = []
    if path == NOTEBOOK:
        return re.findall(r"^!(python .*)$", "\n".join(map(source, code_cells())), re.M)
    if path == LAUNCH:
        task = yaml.safe_load(path.read_text())
        return (task["setup"] + task["run"]).splitlines()
    for block in blocks(path.read_text()):
        if block[0].startswith(("#!", "from ", "model.py ")):
            continue
        lines += [line for line in block if not line.startswith("#")]
    return lines


def code_cells():
    return [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def parts(line):
    """A command line -> its commands as lists of words, without the environment's .venv/bin."""
    words = shlex.split(line.replace(".venv/bin/", ""), comments=True)
    while words:
        end = words.index("&&") if "&&" in words else len(words)
        yield words[:end]
        words = words[end + 1 :]


def all_parts(path):
    return [(line, argv) for line in commands(path) for argv in parts(line)]


# ----------------------------------------------------------------------------- links


def anchors(path):
    """The fragments that GitHub gives a document's headings."""
    heads = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    text = path.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    used = set(re.findall(r"\]\[(\w+)\]", text))
    defined = dict(re.findall(r"^\[(\w+)\]: (\S+)$", text, re.M))
    assert used == set(defined)
    for link in [*links, *defined.values()]:
        if link.startswith("https://"):
            continue
        target, _, fragment = link.partition("#")
        file = path.parent / target if target else path
        assert file.exists(), f"{path.name} links to {link}"
        assert not fragment or fragment in anchors(file), f"{path.name} links to {link}"


def test_every_page_of_docs_is_linked_from_the_readme():
    linked = set(re.findall(r"docs/\w+\.md", (ROOT / "README.md").read_text()))
    assert linked == {f"docs/{path.name}" for path in ROOT.glob("docs/*.md")}


# ----------------------------------------------------------------------------- commands: flags


class Parsed(BaseException):
    """Raised once a command line was read."""


def script(argv):
    """A command of ours -> its module's name and its arguments; None for another program's."""
    if "torchrun" in argv:  # perhaps in a container
        [place] = [i for i, word in enumerate(argv) if word == "train_gpt2.py"]
        return "train_gpt2", argv[place + 1 :]
    if argv[0] in ("python", "python3") and argv[1] == "-m":
        return (argv[2], argv[3:]) if argv[2].startswith("nanoswitch.") else None
    if argv[0] in ("python", "python3") and argv[1].endswith(".py"):
        return argv[1].removesuffix(".py").replace("/", "."), argv[2:]
    return None


def typed_in_tables(path):
    return re.findall(r"`((?:python|torchrun) [^`]+)`", path.read_text())


@each_document
def test_flags_and_files_of_every_command_are_known(path, monkeypatch):
    def parse(*classes, parse=cli.parse, **options):
        parse(*classes, **options)
        raise Parsed

    monkeypatch.setattr(cli, "parse", parse)
    monkeypatch.chdir(ROOT)
    extras = ["page", "dev"]
    for line in [*commands(path), *typed_in_tables(path)]:
        for argv in parts(line.replace(" ...", "")):
            for name in [word for word in argv if word.startswith(("requirements", "configs/"))]:
                assert Path(name).exists(), line
            assert all(extra in extras for extra in re.findall(r"\[(\w+)\]", " ".join(argv)))
            if argv[0] == "streamlit":
                flags = argv[argv.index("--") + 1 :] if "--" in argv else []
                with pytest.raises(Parsed):
                    cli.parse(
                        importlib.import_module(argv[2].removesuffix(".py")).AppConfig, argv=flags
                    )
            name, flags = script(argv) or ("", [])
            if name in ("", "tests.torture", "nanoswitch.parallel", "nanoswitch.surgery"):
                continue
            if flags[0] in ("info", "table", "--help"):
                continue
            monkeypatch.setattr(sys, "argv", [name, *flags])
            with pytest.raises(Parsed):
                importlib.import_module(name).main()


# ----------------------------------------------------------------------------- commands: running

TRAINING = dict(
    total_batch_tokens=256, max_steps=1, eval_every=1, val_tokens=64, warmup_steps=1,
    curve="false", device="cpu",
)  # fmt: skip
SHAPE = dict(n_layer=2, n_head=4, n_embd=32, block_size=32)


def flags(table):
    return [f"--{name}={value}" for name, value in table.items()]


def small(name, argv):
    """A command's arguments, with what makes it small."""
    if name == "train_gpt2":
        shape = {} if any("init_from" in word or "finetune" in word for word in argv) else SHAPE
        device = [word for word in argv if word.startswith("cuda:")]
        sizes = TRAINING | shape | (dict(device=device[0]) if device else {})
        return [*argv, *flags(sizes)]
    if name == "sample":
        return [*argv, "--max_new_tokens=3", "--device=cpu"]
    if name == "compare" and argv[0].endswith(".toml") and "--ladder" not in argv:
        return [*argv, *flags(TRAINING | SHAPE | dict(seeds=2, jobs=2))]
    if name == "nanoswitch.prove":
        return [*argv, "--quick=true"]
    if name in ("hellaswag", "nanoswitch.tasks"):
        return [*argv, "--device=cpu"]
    return argv


def small_line(name, argv):
    where = ["-m", name] if "." in name else [f"{name}.py"]
    return [*where, *small(name, argv)]


def heavy(name, argv):
    """What takes longer than a few seconds."""
    trains = name == "compare" and "--plan" not in argv and argv[0].endswith(".toml")
    return trains or name in ("nanoswitch.prove", "tests.torture", "bench")


def write_corpus(folder):
    os.makedirs(folder, exist_ok=True)
    texts = [f"The function returns number {i} of many words. " * 30 for i in range(200)]
    return str(write_jsonl(Path(folder) / "pydocs.jsonl", ({"text": text} for text in texts)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """What the documents take for granted: texts, runs, tasks' files, others' checkpoints."""
    home = tmp_path_factory.mktemp("models")
    (home / "my_texts").mkdir()
    for i in range(40):
        (home / "my_texts" / f"{i}.txt").write_text(f"Number {i} is a text of mine. " * 60)
    write_jsonl(home / "reviews.csv", [])
    (home / "reviews.csv").write_text("id,review\n" + "1,some good words again\n" * 400)
    subprocess.run(["gzip", home / "reviews.csv"], check=True)
    model = grown(tiny(n_embd=32, block_size=32, **GPT2_VOCABULARY))
    for name in ("tiny_16m", "llama_style"):
        step = write_step(home / "runs" / name / "step_000002", model)
        (home / "runs" / name / "latest").write_text(step.name)
    plain = GPT(GPTConfig(**SHAPE | dict(vocab_size=50257, block_size=512)))
    hf.save(plain, home / "gpt2")  # of the name that is typed
    names = ["n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout"]
    about = {name: getattr(plain.config, name) for name in names}
    (home / "out").mkdir()
    torch.save({"model": plain.state_dict(), "model_args": about}, home / "out" / "ckpt.pt")
    item = dict(ind=1, activity_label="A", ctx_a="a man", ctx_b="he", ctx="a man he", label=0)
    write_jsonl(home / "hellaswag_val.jsonl", [item | dict(endings=["a.", "b c.", "d.", "e."])] * 3)
    choices = [dict(text=text, label=label) for text, label in (("a dog", "A"), ("a cat", "B"))]
    item = dict(question=dict(stem="What barks?", choices=choices), answerKey="A")
    write_jsonl(home / "ARC-Easy-Test.jsonl", [item] * 3)
    return home


@pytest.fixture
def home(models, tmp_path, monkeypatch):
    """A folder to run commands in: the models' files, and copies of ours."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    for name in ("configs", "variants", "nanoswitch", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "FOLDER", tmp_path / "variants")
    monkeypatch.setattr(fineweb, "write_pydocs", write_corpus)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def run(line, home, monkeypatch, every):
    """Run a line's commands in this process, where the modules are loaded already; those that take
    long in one of their own, and only if every one shall run."""
    for argv in parts(line):
        found = script(argv)
        if not found:
            if argv[0] in ("cp", "echo"):
                subprocess.run(line, shell=True, check=True, cwd=home)
            continue
        name, args = found[0], small(*found)
        if heavy(name, found[1]):
            if every and "bench" not in name:
                line = [sys.executable, *small_line(name, found[1])]
                done = subprocess.run(line, cwd=home, capture_output=True, text=True)
                assert done.returncode == 0, (line, done.stdout, done.stderr)
            continue
        if name == "train_gpt2":
            folder = Path(train_gpt2.read_flags(args)[1].run_dir)
            if not list(folder.glob("*/train_state.pt")):  # no run, but what `models` put there
                shutil.rmtree(folder, ignore_errors=True)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *args])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        importlib.import_module(name).main()


def run_all(path, home, monkeypatch, every):
    for line in commands(path):
        if "data/mine" in line and "fineweb.py" not in line and not Path("data/mine").exists():
            run("python fineweb.py --source my_texts/ --out data/mine", home, monkeypatch, every)
        ours = [argv[0] for argv in parts(line)]
        if not NEEDS.search(line) and "streamlit" not in ours:
            if "pytest" in line:  # this very run
                continue
            try:
                run(line, home, monkeypatch, every)
            except (SystemExit, ValueError, OSError) as error:
                if not isinstance(error, SystemExit) or error.code:
                    raise AssertionError(f"{path.name}: {line}: {error}") from error


LONG = [pytest.param(path, True, marks=pytest.mark.slow, id=path.stem) for path in PAGES]


@pytest.mark.parametrize("path, every", [pytest.param(DOCUMENTS[0], False, id="light"), *LONG])
def test_commands_run(path, every, home, monkeypatch, one_thread):
    run_all(path, home, monkeypatch, every)


def test_the_notebook_is_clean_and_its_python_is_python():
    for cell in code_cells():
        assert cell["outputs"] == [] and cell["execution_count"] is None
        compile(re.sub(r"^( *)[!%].*$", r"\1pass", source(cell), flags=re.M), "cell", "exec")


@pytest.mark.slow  # needs pip install nbclient ipykernel
def test_the_notebook_runs(home, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    write_corpus("texts")  # in the place of the installed packages' documentation
    book = nbformat.read(NOTEBOOK, as_version=4)
    for cell in book.cells:
        lines = cell.source.splitlines()
        for i, line in enumerate(lines):
            if line.startswith("!python"):
                name, args = script(next(parts(line[1:])))
                line = shlex.join([sys.executable, *small_line(name, args)])
                line = line.replace(" --curve=false", "")  # the notebook shows the picture
                lines[i] = "!" + line.replace("--source pydocs", "--source texts")
            elif line.startswith("%pip"):
                lines[i] = "pass"
        cell.source = "\n".join(lines)
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3").execute(cwd=str(home))
    shown = "".join(str(cell.get("outputs")) for cell in book.cells)
    assert "error:" not in shown and "rope" in shown and shown.count("image/png") == 2
    assert {"quickstart", "positions"} <= {path.name for path in (home / "runs").iterdir()}


def test_the_python_of_the_readme_runs():
    [block] = [b for b in blocks((ROOT / "README.md").read_text()) if b[0].startswith("from model")]
    names = dict(idx=torch.ones(1, 8, dtype=torch.long), targets=torch.ones(1, 8, dtype=torch.long))
    small = partial(GPTConfig, **SHAPE | dict(block_size=64, vocab_size=512, vocab_used=512))
    names |= dict(GPT=GPT, GPTConfig=small)
    assert block[0] == "from model import GPT, GPTConfig"
    exec("\n".join(block[1:]), names)
    assert names["loss"].ndim == 0 and names["logits"].shape[:2] == (1, 8)


# ----------------------------------------------------------------------------- figures


def test_figures_of_the_assignment_are_those_that_its_commands_print():
    """Sizes by the commands; losses and intervals stand in the documents that tests hold."""
    text = (ROOT / "docs" / "assignment.md").read_text()
    sizes = {  # the changes of each row
        "GPT-2": {},
        "`--pos rope`": dict(pos="rope"),
        "`--n_kv_head 4`": dict(n_kv_head=4),
        "`--window 256`": dict(window=256),
        "`--window 256 --window_pattern SSSL`": dict(window=256, window_pattern="SSSL"),
        "RoPE, 4 key/value heads, window 256, SSSL": dict(
            pos="rope", n_kv_head=4, window=256, window_pattern="SSSL"
        ),
    }
    for name, changes in sizes.items():
        every = " ".join(switches.summary(GPTConfig(**changes)))
        [row] = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", text, re.M)
        for figure in row.split(" | "):
            assert re.search(rf"(?<![\d,.]){re.escape(figure)}(?![\d,])", every), (name, figure)
    documents = (ROOT / "EXPERIMENTS.md").read_text() + (ROOT / "SPEEDRUN.md").read_text()
    figures = re.findall(r"\d\.\d{4} ± \d\.\d{4}|[+-]\d\.\d{4} \[[^]]*\]|[-+]?\d\.\d{4}", text)
    assert len(figures) > 12 and not [f for f in figures if f not in documents]
