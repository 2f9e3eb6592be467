"""Checkpoint -> repository on the hub, with its tokenizer and a model card."""

import json
import re
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import huggingface_hub
from safetensors.torch import save_file

from nanoswitch import hf
from nanoswitch.files import read_json
from nanoswitch.hub import with_retries
from nanoswitch.load import Tokenizer, step_of
from nanoswitch.log import parse
from nanoswitch.tokenizer import N_VOCAB

LOGIN = "`hf auth login`, or HF_TOKEN, gives the token; it must be allowed to write there"
# what a loader would read, so that none of it may stay from an earlier push
MODEL_FILES = r"[\w.-]+\.safetensors(\.index\.json)?|tokenizer[\w.]*\.json|generation_config\.json"


def push(model, own, checkpoint, repo, public=False):
    """Upload a GPT as the model repo OWNER/NAME, in one commit -> (its address, what it now is).

    In the Hugging Face layout that holds it, else as our step folder has it; with its tokenizer
    `own` (None: GPT-2's) and a model card. Makes the repo where there is none, private unless
    public. What an earlier push left is replaced; the repo's history keeps it. ValueError when the
    hub refuses, or when the repo is there and public, and this push is not meant to be."""
    huggingface_hub.utils.validate_repo_id(repo)
    if not huggingface_hub.get_token():
        raise ValueError(f"no token to push {repo} with: {LOGIN}")
    api = huggingface_hub.HfApi()

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
        changes = [
            huggingface_hub.CommitOperationAdd(name, folder / name) for name in sorted(names)
        ]
        changes += [
            huggingface_hub.CommitOperationDelete(name)
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
    name = "models--" + repo.replace("/", "--")
    (Path(huggingface_hub.constants.HF_HUB_CACHE) / name / "refs" / "main").unlink(missing_ok=True)


def export(model, own, folder):
    """Write a model and its tokenizer into a new folder -> the layout: a model_type of Hugging
    Face's, or "nanoswitch" where none can hold it."""
    foreign = isinstance(own, Tokenizer)
    cut = own and not foreign  # the beginning of GPT-2's vocabulary
    vocab = own.eot + 1 if cut else 0 if foreign else N_VOCAB
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
    folder = step_of(checkpoint)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "step" not in config:
        return []
    text = f"Trained for {config['step']:,} steps"
    text += f", {config['tokens']:,} tokens" if "tokens" in config else ""
    log = folder.resolve().parent / "log.jsonl"
    entries = map(parse, log.read_text(errors="replace").splitlines() if log.is_file() else [])
    losses = {e["step"]: e for e in entries if e.get("val_loss") is not None}
    known = [step for step in losses if step <= config["step"]]
    if known:
        at = max(known)
        text += f"; validation loss {losses[at]['val_loss']:.4f} nats"
        bpb = losses[at].get("val_bpb")
        text += f" ({bpb:.4f} bits per byte)" if bpb is not None else ""
        text += f" at step {at:,}"
    return [text + "."]
