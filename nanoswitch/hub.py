"""Files of the hub's repositories, fetched with patience. The real client does the work
(huggingface_hub, so HF_ENDPOINT and HF_TOKEN hold); this adds retries that say what they wait for,
and one line at the end that names the way without a network.
"""

import errno
import fnmatch
import hashlib
import os
import random
import re
import socket
import sys
import time

from nanoswitch.files import first_line
from nanoswitch.readers import choose_files

FINEWEB, FINEWEB_SUBSET = "HuggingFaceFW/fineweb-edu", "sample-10BT"
BACKOFF_SECONDS, TRIES = 1.0, 6  # waits of 1, 2, 4, 8, 16 seconds (plus jitter)
OFFLINE = "without a network use --source pydocs or a local file or folder"
answered = False  # whether the hub has answered this process


def hub_files(repo, kinds, subset=""):
    """{"revision": commit, "files": [[path, bytes], ...]} of a hub dataset, or of one subset: those
    of the first of `kinds`, tuples of endings, that it has."""
    from huggingface_hub import HfApi

    api, kind = HfApi(), {"repo_type": "dataset"}
    about = with_retries(f"dataset {repo}", lambda: api.repo_info(repo, **kind))
    options = {"recursive": True, "revision": about.sha, **kind}
    tree = with_retries(f"dataset {repo}", lambda: list(api.list_repo_tree(repo, **options)))
    files = sorted([f.path, f.size] for f in tree if hasattr(f, "size"))  # the others are folders
    if (".bin",) not in kinds:
        texts = set(choose_files([name for name, _ in files if name != "README.md"])[0])
        files = [file for file in files if file[0] in texts]
    # a dataset's card maps its subsets to paths; FineWeb keeps sample-10BT in sample/10BT
    cards = {c["config_name"]: str(c) for c in (about.card_data or {}).get("configs") or []}
    paths = [subset + "/*", subset.replace("-", "/", 1) + "/*"]
    paths = re.findall(r"[\w./*-]+[/*.][\w./*-]+", cards.get(subset, "")) or paths
    chosen = [f for f in files if any(fnmatch.fnmatch(f[0], path) for path in paths)]
    for endings in kinds:
        some = [f for f in chosen if f[0].lower().endswith(endings)]
        if not subset or (not some and subset == FINEWEB_SUBSET and repo != FINEWEB):
            # the default subset is FineWeb's: of another dataset take everything
            some = [f for f in files if f[0].lower().endswith(endings)]
        if endings != (".bin",):
            some = [f for f in some if "train" in f[0]] or some
        if some:
            return {"revision": about.sha, "files": some}
    known = f"; it has {', '.join(cards)}" if cards else ""
    what = ", ".join(endings[0] for endings in kinds)
    raise ValueError(f"dataset {repo} has no {what} files for --name {subset}{known}")


def check_inside(filename, repo):
    """ValueError when a repo's file would land outside the folder it is fetched to."""
    if os.path.isabs(filename) or ".." in re.split(r"[/\\]", filename):
        raise ValueError(f"{repo} lists {filename}, which lies outside its folder: not fetched")


def hub_download(
    repo, filename, folder=None, repo_type="dataset", revision=None, check=None, offline=OFFLINE
):
    """Download one file of a hub repo and return its path.

    Tries again, ever later, after 408, 429, 5xx, a lost connection or a damaged file, and says
    on stderr what it waits for. folder: lands at folder/filename; None: in the hub's cache, and
    is not asked for again. check(path) raises ValueError when the file is not whole. In the end
    ValueError; it names `offline`, what to do without a network.
    """
    import huggingface_hub as hub

    check_inside(filename, repo)
    where = {"repo_type": repo_type, "revision": revision}
    if folder is None:
        cached = hub.try_to_load_from_cache(repo, filename, **where)
        if isinstance(cached, str):  # else None, or the mark of a file that does not exist
            return cached

    def attempt():
        # the client reports an unreachable hub as a cache miss; this asks openly
        about = hub.get_hf_file_metadata(hub.hf_hub_url(repo, filename, **where))
        path = hub.hf_hub_download(repo, filename, local_dir=folder, **where)
        try:
            check_hash(path, about.etag or "")
            if check:
                check(path)
        except ValueError:
            os.remove(os.path.realpath(path))  # or the client would hand out the same file again
            raise
        return path

    return with_retries(f"{filename} of {repo}", attempt, offline)


def check_hash(path, etag):
    """ValueError if a file is not what its ETag says: the hub's is the sha256 of a large file, of
    a small one git's sha1. The client itself compares sizes only."""
    algorithm = {64: "sha256", 40: "sha1"}.get(len(etag))
    if not algorithm:
        return
    digest = hashlib.new(algorithm, usedforsecurity=False)
    if algorithm == "sha1":
        digest.update(b"blob %d\0" % os.path.getsize(path))
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != etag:
        raise ValueError(f"damaged on the way: its {algorithm} is not {etag}")


def with_retries(what, call, offline=OFFLINE, verb="fetch"):
    """call(), again after exponential back-off with jitter while its failure may pass. A hub that
    was never reached is given up at once: most likely there is no network."""
    global answered
    for tries in range(1, TRIES + 1):
        try:
            result = call()
            answered = True
            return result
        except Exception as error:  # the client's network errors share no base class
            response, problem = getattr(error, "response", None), first_line(error)
            status = getattr(response, "status_code", None)
            lasting = type(error).__name__ == "OfflineModeIsEnabled"
            lasting |= getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES)
            lasting |= not answered and unreachable(error)
            answered |= bool(status)
            if status:
                lasting = status < 500 and status not in (408, 429)
            if lasting or tries == TRIES:
                count = f" after {tries} tries" if tries > 1 else ""
                raise ValueError(f"cannot {verb} {what}{count}: {problem}; {offline}") from error
            asked = response.headers.get("Retry-After", "") if status else ""
            wait = BACKOFF_SECONDS * 2 ** (tries - 1) * random.uniform(1, 1.5)
            wait = max(wait, min(int(asked), 300)) if asked.isdigit() else wait
            note = f"{what}: {problem}; try {tries + 1} of {TRIES} in {wait:.1f} s"
            print(note, file=sys.stderr)
            time.sleep(wait)


def unreachable(error):
    """Whether the cause is that there is no such host, or nobody listens there."""
    while error and not isinstance(error, socket.gaierror | ConnectionRefusedError):
        error = error.__cause__ or error.__context__
    return error is not None
