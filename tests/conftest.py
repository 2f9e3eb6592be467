"""Fixtures of several test files. What they build is in builders.py and tiny_runs.py, which are
imported late here: not every test file needs torch."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # files run side by side, a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
pytest.register_assert_rewrite("builders", "tiny_runs")


@pytest.fixture(scope="module")
def one_thread():
    """Models this small are slower on many threads than on one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of shards, which stands in a folder of the test file's own."""
    from tiny_runs import make_data

    folder = tmp_path_factory.mktemp("runs") / "data"
    make_data(folder)
    return folder


@pytest.fixture
def variant_file(tmp_path, monkeypatch):
    """variant_file(name, code) writes variants/NAME.py, an attention, into a folder that stands in
    for ours; the class in code is called Wrong."""
    from nanoswitch import registry

    folder = tmp_path / "variants"
    folder.mkdir()
    monkeypatch.setattr(registry, "FOLDER", folder)
    monkeypatch.syspath_prepend(tmp_path)
    head = "import torch\nimport torch.nn as nn\nimport torch.nn.functional as F\n"
    head += "from model import Attention\n"

    def write(name, code):
        (folder / f"{name}.py").write_text(f"{head}{code}\nattention = Wrong\n")

    return write
