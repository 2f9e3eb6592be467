"""pyproject.toml beside the requirements files, which pin what was tested, the lock that has their
pins, and our files."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def pins(name):
    """{package: version} of a requirements file itself, without those it reads with -r."""
    lines = (ROOT / name).read_text().splitlines()
    found = [Requirement(line) for line in lines if line and line[0] not in "#-"]
    assert all(re.fullmatch(r"==[\w.]+", str(r.specifier)) for r in found), name
    return {r.name: str(r.specifier)[2:] for r in found}


@pytest.mark.parametrize(
    "file, wanted",
    [
        ("requirements.txt", PROJECT["dependencies"]),
        ("requirements-app.txt", PROJECT["optional-dependencies"]["page"]),
        ("requirements-dev.txt", PROJECT["optional-dependencies"]["dev"]),
    ],
)
def test_the_requirements_are_pyprojects_at_tested_versions(file, wanted):
    pinned = pins(file)
    wanted = {r.name: r for r in map(Requirement, wanted) if r.name != PROJECT["name"]}
    assert pinned.keys() == wanted.keys()
    for name, version in pinned.items():
        assert wanted[name].specifier.contains(version), name


def test_the_lock_has_every_pin_with_hashes_and_no_address():
    lock = (ROOT / "requirements.lock").read_text()
    entry = r"^([\w.-]+)==([\w.]+)( ; .+)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$"
    found = [match[:2] for match in re.findall(entry, lock, re.M)]
    assert len(found) == len(re.findall(r"^[^#\s]", lock, re.M))  # it has nothing else
    assert "://" not in lock and "index" not in lock
    for file in ("requirements.txt", "requirements-app.txt", "requirements-dev.txt"):
        for name, version in pins(file).items():
            versions = [v for n, v in found if n == canonicalize_name(name)]
            assert versions == [version], f"{name}: the lock's first lines say how to renew it"


def test_every_module_and_folder_of_ours_is_packaged():
    tool = PYPROJECT["tool"]["setuptools"]
    assert sorted(tool["py-modules"]) == sorted(path.stem for path in ROOT.glob("*.py"))
    for name in tool["packages"]:
        assert list((ROOT / name).glob("*.py"))


def test_version_is_the_changelogs_and_the_citations():
    newest = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)[0]
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
    assert newest.split()[0] == cited == PROJECT["version"]


INSTALLED = """
import model, train_gpt2, fineweb, hellaswag, sample, compare, bench, app, nanoswitch.prove
from model import GPT, GPTConfig
sizes = dict(block_size=8, vocab_size=16, vocab_used=16, n_layer=1, n_head=2, n_embd=8)
GPT(GPTConfig(attention="gated", **sizes))
print(model.__file__)
"""


@pytest.mark.slow  # the build fetches setuptools
def test_an_installed_package_works_from_elsewhere(tmp_path):
    ignored = shutil.ignore_patterns(".*", "data", "runs", "build", "experiments")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)  # the build writes beside the source
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "lib"]
    subprocess.run([*pip, tmp_path / "copy"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(tmp_path / "lib"), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "lib" / "model.py")


# ----------------------------------------------------------------------------- Dockerfile, sky.yaml


def steps(instruction):
    """The arguments of these instructions of the Dockerfile, continued lines joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    return re.findall(rf"^{instruction} (.*)$", text, re.M)


def copies():
    """[(file or folder of ours, its place in the image)], of each COPY of the Dockerfile."""
    lines = [line.split() for line in steps("COPY")]
    found = [(list(ROOT.glob(name)), line[-1]) for line in lines for name in line[:-1]]
    assert all(paths for paths, _ in found), "a COPY of nothing"
    return [(path, target) for paths, target in found for path in paths]


def test_the_image_has_every_module_folder_and_config():
    names = {path.name for path, _ in copies()}
    tool = PYPROJECT["tool"]["setuptools"]
    ours = [f"{name}.py" for name in tool["py-modules"]] + tool["packages"]
    assert names == {*ours, "configs", "requirements.txt"}


@pytest.mark.slow  # 10 s
def test_the_images_files_are_enough_to_work(tmp_path):
    for path, target in copies():
        if path.is_dir():
            shutil.copytree(path, tmp_path / target)
        else:
            shutil.copy(path, tmp_path / target)
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED], cwd=tmp_path, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "model.py")


def test_the_image_and_the_launch_file_take_what_was_tested():
    docker, sky, ci = (
        (ROOT / name).read_text() for name in ("Dockerfile", "sky.yaml", ".github/workflows/ci.yml")
    )
    [tested] = re.findall(r'python-version: "(\S+)"', ci)
    assert SpecifierSet(PROJECT["requires-python"]).contains(tested)
    assert [v.removesuffix("-slim") for v in steps("FROM")] == [f"python:{tested}"]
    assert re.findall(r"--python (\S+)", sky) == [tested]
    for text in (docker, sky):  # the pins are those of this file, and no others
        assert "uv pip install" in text and "-r requirements.txt" in text
        assert "==" not in text and "torch=" not in text
    [build] = [arg.removeprefix("TORCH_BACKEND=cu") for arg in steps("ARG") if "TORCH" in arg]
    [locked] = re.findall(
        r"^cuda-toolkit==(\d+)\.(\d)", (ROOT / "requirements.lock").read_text(), re.M
    )
    assert build == "".join(locked)  # torch's own default
    assert steps("USER")[-1] not in ("root", "0")
