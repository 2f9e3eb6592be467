"""Files that are whole or not there: what every script reads and writes with.

A file is written beside its place and then renamed, a folder is locked while it is at work, and a
checkpoint's files are proven by their SHA-256.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None

SUMS = "SHA256SUMS"
WINDOWS = os.name == "nt"


@contextlib.contextmanager
def write_beside(path):
    """A binary file that appears under its name only once all of it is on the disk."""
    with open(path + ".tmp", "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def prepare_out(path, name):
    """Make the folder of a file that is to be written in the end, before the work for it. name: one
    to suggest, for the ValueError where the path is a folder itself."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    if os.path.isdir(path):
        raise ValueError(f"--out {path} is a folder; name a file: {os.path.join(path, name)}")
    with tempfile.TemporaryFile(dir=os.path.dirname(path) or "."):  # OSError before the work
        pass


def python_path(folder):
    """PYTHONPATH for a process that imports from `folder`, and then from where this one does."""
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(folder), *([before] if before else [])])


@contextlib.contextmanager
def locked(path, busy="", shared=False):
    """Inside, this process holds the kernel's lock on a file or folder that exists; it goes with
    the process. When another one has it: ValueError(busy), or without `busy` wait for it. shared:
    beside others that share it. No guard where the system or the file system has no locks."""
    if fcntl is None:
        yield
        return
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        try:
            fcntl.flock(handle, kind | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError as error:
            raise ValueError(busy) from error
        except OSError:  # a network file system without locks
            pass
        yield
    finally:
        os.close(handle)  # which unlocks


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sum(folder, name):
    """ValueError unless a file of a checkpoint matches SHA256SUMS, if there is one."""
    if not (folder / SUMS).is_file():
        return
    lines = (folder / SUMS).read_text(errors="replace").splitlines()
    sums = dict(line.split("  ", 1)[::-1] for line in lines if "  " in line)
    if sums.get(name) != sha256(folder / name):
        size = (folder / name).stat().st_size
        raise ValueError(
            f"{folder / name} ({size:,} bytes) does not match its checksum in {SUMS}; take another "
            f"step's folder, or remove {SUMS} to trust it"
        )


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk. Windows opens no folder, and
    syncs no file that is open for reading alone."""
    if WINDOWS and os.path.isdir(path):
        return
    handle = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path):
    """The object in a JSON file, as a dict; ValueError when there is none."""
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"no {path}: give a step, run or Hugging Face folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}{pointer_hint(path)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object but {str(content)[:40]}")
    return content


def pointer_hint(path):
    """What to add to an error about a file that Git LFS has not fetched yet; else nothing."""
    try:
        with open(path, "rb") as file:
            is_pointer = file.read(24) == b"version https://git-lfs."
    except OSError:
        is_pointer = False
    return "; it is a Git LFS pointer, fetch the file itself: git lfs pull" if is_pointer else ""


def say(note):
    """Print a line to stderr, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(note, file=sys.stderr)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
