"""Files of the hub's repositories, fetched with patience: what fineweb.py, hellaswag.py and hf.py
share. The real client does the work (huggingface_hub, so HF_ENDPOINT and HF_TOKEN hold); this adds
retries that say what they wait for, and one line at the end that names the way without a network.
The other way, push() makes a checkpoint a repository of its own.
"""

import errno
import fnmatch
import hashlib
import json
import os
import random
import re
import socket
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

FINEWEB, FINEWEB_SUBSET = "HuggingFaceFW/fineweb-edu", "sample-10BT"
BACKOFF_SECONDS, TRIES = 1.0, 6  # waits of 1, 2, 4, 8, 16 seconds (plus jitter)
OFFLINE = "without a network use --source pydocs or a local file or folder"
LOGIN = "`hf auth login`, or HF_TOKEN, gives the token; it must be allowed to write there"
# what a loader would read, so that none of it may stay from an earlier push
MODEL_FILES = r"[\w.-]+\.safetensors(\.index\.json)?|tokenizer[\w.]*\.json|generation_config\.json"
answered = False  # whether the hub has answered this process


def hub_files(repo, suffix, subset=""):
    """{"revision": commit, "files": [[path, bytes], ...]} of a hub dataset, or of one subset."""
    from huggingface_hub import HfApi

    api, kind = HfApi(), {"repo_type": "dataset"}
    about = with_retries(f"dataset {repo}", lambda: api.repo_info(repo, **kind))
    options = {"recursive": True, "revision": about.sha, **kind}
    tree = with_retries(f"dataset {repo}", lambda: list(api.list_repo_tree(repo, **options)))
    files = sorted([f.path, f.size] for f in tree if f.path.endswith(suffix))
    # a dataset's card maps its subsets to paths; FineWeb keeps sample-10BT in sample/10BT
    cards = {c["config_name"]: str(c) for c in (about.card_data or {}).get("configs") or []}
    paths = [subset + "/*", subset.replace("-", "/", 1) + "/*"]
    paths = re.findall(r"[\w./*-]+[/*.][\w./*-]+", cards.get(subset, "")) or paths
    chosen = [f for f in files if any(fnmatch.fnmatch(f[0], path) for path in paths)]
    if not subset or (not chosen and subset == FINEWEB_SUBSET and repo != FINEWEB):
        chosen = files  # the default subset is FineWeb's: of another dataset take everything
    if suffix == ".parquet":
        chosen = [f for f in chosen if "train" in f[0]] or chosen
    if not chosen:
        known = f"; it has {', '.join(cards)}" if cards else ""
        raise ValueError(f"dataset {repo} has no {suffix} files for --name {subset}{known}")
    return {"revision": about.sha, "files": chosen}


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

    if os.path.isabs(filename) or ".." in re.split(r"[/\\]", filename):
        raise ValueError(f"{repo} lists {filename}, which lies outside its folder: not fetched")
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


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------------------------------
# Checkpoint -> repository


def push(model, own, checkpoint, repo, public=False):
    """Upload a GPT as the model repo OWNER/NAME, in one commit -> (its address, what it now is).

    In the Hugging Face layout that holds it, else as our step folder has it; with its tokenizer
    `own` (None: GPT-2's) and a model card. Makes the repo where there is none, private unless
    public. What an earlier push left is replaced; the repo's history keeps it. ValueError when the
    hub refuses, or when the repo is there and public, and this push is not meant to be."""
    import huggingface_hub as hub

    hub.utils.validate_repo_id(repo)
    if not hub.get_token():
        raise ValueError(f"no token to push {repo} with: {LOGIN}")
    api = hub.HfApi()

    def patiently(call):
        return with_retries(repo, call, LOGIN, "push")

    with tempfile.TemporaryDirectory() as beside:
        folder = Path(beside) / "model"
        kind = export(model, own, folder)
        card = model_card(model.config, model.num_params(), kind, checkpoint, repo)
        (folder / "README.md").write_text(card, encoding="utf-8")
        patiently(lambda: api.create_repo(repo, private=not public, exist_ok=True))
        about = patiently(lambda: api.model_info(repo))
        if not (about.private or public):
            raise ValueError(f"{repo} is there and public: --public true, or choose another name")
        names = {file.name for file in folder.iterdir()}
        stale = {file.rfilename for file in about.siblings} - names
        changes = [hub.CommitOperationAdd(name, folder / name) for name in sorted(names)]
        changes += [
            hub.CommitOperationDelete(name)
            for name in sorted(stale)
            if re.fullmatch(MODEL_FILES, name)
        ]
        message = f"{kind} layout, from {Path(checkpoint).name}"
        patiently(lambda: api.create_commit(repo, changes, commit_message=message))
    forget(repo)
    access = "private" if about.private else "public"
    return f"{api.endpoint}/{repo}", f"{access}, {kind} layout, {model.num_params():,} parameters"


def forget(repo):
    """Have this machine's next load by name fetch what the repo holds by then: the cache is never
    asked whether it is still the latest."""
    from huggingface_hub import constants

    name = "models--" + repo.replace("/", "--")
    (Path(constants.HF_HUB_CACHE) / name / "refs" / "main").unlink(missing_ok=True)


def export(model, own, folder):
    """Write a model and its tokenizer into a new folder -> the layout: a model_type of Hugging
    Face's, or "nanoswitch" where none can hold it."""
    from safetensors.torch import save_file

    import hf  # which imports this file

    foreign = isinstance(own, hf.Tokenizer)
    cut = own and not foreign  # the beginning of GPT-2's vocabulary
    vocab = own.eot + 1 if cut else hf.N_VOCAB
    try:
        kind = hf.save(model, folder, vocab)
    except ValueError as error:
        if not str(error).startswith("no Hugging Face layout"):
            raise
        print(f"{error}: pushed as a step folder, which only nanoswitch reads", file=sys.stderr)
        kind = "nanoswitch"
        folder.mkdir()
        weights = {name: model.state_dict()[name] for name in hf.parameters(model.config)}
        weights = {name: w.cpu().contiguous() for name, w in weights.items()}
        save_file(weights, folder / hf.WEIGHTS, {"format": "pt"})
        hf.write_json(folder / "config.json", {"model": asdict(model.config)})
        if cut:
            hf.write_tokenizer(folder, model.config.block_size, vocab)
    if foreign:
        own.vocabulary.save(str(folder / "tokenizer.json"))
    if own:
        config = json.loads((folder / "config.json").read_text())
        hf.write_json(folder / "config.json", config | {"eos_token_id": own.eot})
    return kind


def model_card(config, parameters, kind, checkpoint, repo):
    """The README.md of a repo: what the model is, how far it was trained, how to run it. No path of
    this machine is in it."""
    about = training_record(checkpoint)
    rows = [f"| {name} | {value!r} |" for name, value in asdict(config).items()]
    library = "" if kind == "nanoswitch" else "library_name: transformers\n"
    lines = [
        f"---\n{library}pipeline_tag: text-generation\ntags:\n- nanoswitch\n---",
        f"# {repo.partition('/')[2]}",
        f"A base language model of {parameters:,} parameters, trained with nanoswitch: it "
        f"continues text rather than answers, and may be wrong, biased or offensive.",
        *about,
        f"    python sample.py {repo} --chat",
        f"Layout: {kind}. The architecture:",
        "\n".join(["| switch | value |", "|---|---|", *rows]),
    ]
    return "\n\n".join(lines) + "\n"


def training_record(checkpoint):
    """[one sentence] on a run's or step's training, from its config.json and its run's log; [] for
    any other checkpoint."""
    from checkpoints import parse
    from model import latest_step, read_json

    folder = Path(checkpoint)
    if (folder / "latest").is_file():
        folder = latest_step(folder)
    config = read_json(folder / "config.json") if folder.is_dir() else {}
    if "step" not in config:
        return []
    text = f"Trained for {config['step']:,} steps"
    text += f", {config['tokens']:,} tokens" if "tokens" in config else ""
    log = folder.resolve().parent / "log.jsonl"
    entries = map(parse, log.read_text(errors="replace").splitlines() if log.is_file() else [])
    losses = {e["step"]: e["val_loss"] for e in entries if e.get("val_loss") is not None}
    known = [step for step in losses if step <= config["step"]]
    if known:
        text += f"; validation loss {losses[max(known)]:.4f} nats at step {max(known):,}"
    return [text + "."]
