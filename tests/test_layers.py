"""Imports run down only: each file may import those of earlier layers, and of its own those that
stand before it. And model.py imports nothing that is optional.

The plug-in rule: a file of variants/ stands above model.py, imports no other variant, and is itself
imported by name alone, by registry.py, when a switch asks for it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = """
    files registry cli device | kernels cache loss generation operators | model | counts | tokenizer
    shards streams readers pydocs windows hub web weights hf foreign load surgery | checkpoints
    tracker log stats curves best muon soap optimizers parallel micro_batch cards compiled progress
    signals scoring evaluation decode publish export | fineweb hellaswag tasks sample | train_gpt2
    sweep tune study ladder lengths archive report card_checks first_card | compare bench app
    switches prove gallery
"""
ORDER = LAYERS.replace("|", " ").split()
LAZY = {("model", "from_pretrained", "load")}  # the one that nanoGPT's users type


def imports(path):
    """[(function it stands in or "", name of the file of ours)] of all imports in a file."""
    found = []

    def visit(node, function):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole = node.module == "nanoswitch"
            names = [alias.name for alias in node.names] if whole else [node.module]
        found.extend((function, name.removeprefix("nanoswitch.")) for name in names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, getattr(node, "name", "a lambda") if inside else function)

    visit(ast.parse(path.read_text()), "")
    return [(function, name) for function, name in found if name in ORDER]


def test_imports_run_down_only():
    files = [*ROOT.glob("*.py"), *ROOT.glob("nanoswitch/*.py")]
    assert {path.stem for path in files} - {"__init__"} == set(ORDER)
    for path in files:
        for function, name in imports(path) if path.stem in ORDER else []:
            if (path.stem, function, name) in LAZY:
                continue
            assert not function, f"{path.name}: {function} imports {name} lazily"
            assert ORDER.index(name) < ORDER.index(path.stem), f"{path.name} imports {name}"


def test_variants_import_what_model_stands_on_and_no_other_variant():
    for path in ROOT.glob("variants/*.py"):
        for function, name in imports(path):
            assert not function, f"{path.name}: {function} imports {name} lazily"
            assert ORDER.index(name) <= ORDER.index("model"), f"{path.name} imports {name}"
        assert not re.search(r"^\s*(from|import) variants", path.read_text(), re.MULTILINE)


def test_only_the_registry_imports_by_name():
    files = [*ROOT.glob("*.py"), *ROOT.glob("nanoswitch/*.py"), *ROOT.glob("variants/*.py")]
    found = {p.name for p in files if "import_module" in p.read_text()}
    assert found == {"registry.py"}
    text = (ROOT / "nanoswitch/registry.py").read_text()
    assert re.findall(r"import_module\((.*)\)", text) == ['f"variants.{name}"']


def test_importing_model_is_quiet_and_light():
    """No optional package is needed to import it."""
    tree = ast.parse((ROOT / "model.py").read_text())
    names = [
        (n.module if isinstance(n, ast.ImportFrom) else n.names[0].name).split(".")[0]
        for n in tree.body
        if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    assert not {"transformers", "huggingface_hub", "datasets", "tiktoken", "wandb"} & set(names)
    assert not re.search(r"\bprint\(", (ROOT / "model.py").read_text())
