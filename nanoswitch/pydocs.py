"""pydocs: the English inside the installed Python environment, a corpus that needs no network."""

import ast
import contextlib
import hashlib
import json
import os
import re
import sysconfig
import warnings
from collections import deque
from importlib import metadata
from pydoc_data.topics import topics

from nanoswitch.files import write_beside

PYDOCS_PACKAGES = (
    "torch", "numpy", "datasets", "huggingface_hub", "pyarrow", "requests", "safetensors",
    "tiktoken", "tqdm", "tyro", "zstandard",
)  # fmt: skip


def write_pydocs(folder):
    """Write the corpus as folder/pydocs.jsonl and return its path: the language reference's topics
    and the docstrings of the standard library, of PYDOCS_PACKAGES and of what they depend on."""

    def docstrings(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            code = file.read()
        # parsing takes most of the time: leave out files that are mostly code
        if sum(map(len, code.split('"""')[1::2])) < 0.35 * len(code):
            return
        try:
            with warnings.catch_warnings(action="ignore"):
                nodes = [ast.parse(code)]
        except (SyntaxError, ValueError):
            return
        while nodes:
            node = nodes.pop()
            yield ast.get_docstring(node) or ""
            kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            nodes += [child for child in reversed(node.body) if isinstance(child, kinds)]

    texts = [topics[name] for name in sorted(topics)]
    for path in python_files():
        texts += docstrings(path)
    seen, kept = set(), []
    for text in texts:
        # a near-duplicate is a text most of whose paragraphs came before
        paragraphs = {re.sub(r"\W+", " ", p).lower(): len(p) for p in text.split("\n\n")}
        new = sum(size for p, size in paragraphs.items() if p not in seen)
        if len(text) >= 200 and new > len(text) / 2:
            kept.append(text)
            seen.update(paragraphs)
    # an order that is always the same and mixes the packages, so that val resembles train
    kept.sort(key=lambda text: hashlib.sha256(text.encode("utf-8", "replace")).digest())
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "pydocs.jsonl")
    with write_beside(path) as file:
        for text in kept:
            file.write(json.dumps({"text": text}).encode() + b"\n")
    return path


def python_files():
    """Source files of the standard library, then of PYDOCS_PACKAGES and their dependencies."""
    stdlib = sysconfig.get_path("stdlib")
    for folder, folders, names in os.walk(stdlib):
        folders[:] = sorted(set(folders) - {"site-packages", "test", "tests", "idlelib", "lib2to3"})
        yield from (os.path.join(folder, name) for name in sorted(names) if name.endswith(".py"))
    queue, seen = deque(PYDOCS_PACKAGES), set()
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.popleft()).lower()
        if name in seen:
            continue
        seen.add(name)
        with contextlib.suppress(metadata.PackageNotFoundError):
            package = metadata.distribution(name)
            needs = [r for r in package.requires or [] if "extra ==" not in r]
            queue.extend(re.match(r"[\w.-]+", need)[0] for need in needs)
            files = sorted(str(f) for f in package.files or [] if f.suffix == ".py")
            paths = (str(package.locate_file(f)) for f in files if "/tests/" not in f)
            yield from (path for path in paths if os.path.exists(path))
