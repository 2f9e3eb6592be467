"""Any CHECKPOINT -> its model and its tokenizer: a step folder, a run folder (its latest step, or
as RUN/best that of the lowest validation loss), a Hugging Face folder that this model can hold, a
hub name such as gpt2, or a file of nanoGPT, build-nanogpt or llm.c (foreign.py)."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

from model import GPTConfig
from nanoswitch import foreign, hf
from nanoswitch.files import check_sum, read_json
from nanoswitch.hub import hub_download
from nanoswitch.tokenizer import (
    LEAST_VOCAB,
    N_VOCAB,
    get_tokenizer,
    gpt2_json,
    has_gpt2_vocabulary,
)
from nanoswitch.weights import empty, fill, read_safetensors


def load_model(checkpoint):
    """The GPT of a checkpoint, in fp32 and in eval mode. ValueError (one line) when there is none,
    or it cannot be fetched, is damaged, or is a model that this one cannot be."""
    if file := foreign.find(checkpoint):
        return foreign.load(file)
    folder = find_folder(checkpoint)
    if "model" not in read_json(folder / "config.json"):
        return hf.load(folder)
    model = empty(read_config(folder))
    fill(model, read_safetensors(folder / hf.WEIGHTS), folder)
    check_sum(folder, hf.WEIGHTS)  # a flipped bit is a weight like any other
    return model


def load_config(checkpoint):
    """The GPTConfig of a checkpoint, without its weights."""
    if file := foreign.find(checkpoint):
        return foreign.read(file)[0]
    folder = find_folder(checkpoint)
    ours = "model" in read_json(folder / "config.json")
    return read_config(folder) if ours else hf.read_config(folder)[0]


def find_folder(checkpoint):
    """The folder that holds a checkpoint's files; a hub name's is fetched."""
    folder = step_of(checkpoint)
    if folder.is_dir():
        if (folder / "log.jsonl").is_file() and not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no checkpoint yet; --checkpoint_every sets when")
        return folder
    if folder.exists():
        raise ValueError(
            f"{checkpoint} is a file; give the folder that holds {hf.WEIGHTS}, or {foreign.KINDS}"
        )
    if len(folder.parts) > 2 or (len(folder.parts) == 2 and folder.parent.is_dir()):
        raise ValueError(
            f"no checkpoint folder {folder}; give a run, step or Hugging Face folder, or a hub name"
        )
    return hf.download(str(checkpoint))


def step_of(checkpoint):
    """The step folder that a run folder's latest, or RUN/best, names; any other path as it is."""
    file = Path(checkpoint)
    if (file / "latest").is_file():
        file = file / "latest"
    elif file.name != "best" or not file.is_file():
        return file
    name = file.read_text(errors="replace").strip()
    if not name.startswith("step_") or not name.isprintable() or Path(name).name != name:
        raise ValueError(f"{file} names no step folder: {name[:40]!r}")
    return file.parent / name


def read_config(folder):
    """The GPTConfig of a step folder; ValueError where its config.json is not one of ours."""
    config, known = read_json(folder / "config.json"), {f.name for f in fields(GPTConfig)}
    if not isinstance(config["model"], dict):
        raise ValueError(f"{folder}/config.json: model is {config['model']!r}, no table of fields")
    unknown = sorted(set(config["model"]) - known)
    if unknown:
        raise ValueError(f"{folder} is of another version: it sets {', '.join(unknown)}")
    for name, value in config["model"].items():
        kind = type(getattr(GPTConfig, name))
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{folder}/config.json: {name} is {value!r}, not {kind.__name__}")
    return GPTConfig(**config["model"])


# ----------------------------------------------------------------------------- its tokenizer


def vocabulary_of(checkpoint, config):
    """How many of GPT-2's ids (get_tokenizer's vocab) a checkpoint was trained on; None when its
    ids are not GPT-2's.

    Fewer than all of them only a run, a step or an export made here has: its config.json has our
    "model", or our "vocab_used" with the end-of-text id that save() writes. Any other small
    vocabulary is one of its own."""
    folder, used = step_of(checkpoint), config.vocab_used
    if has_gpt2_vocabulary(config):
        return None if has_other_ids(checkpoint, used) else N_VOCAB
    if not folder.is_dir() or foreign.find(folder) or not LEAST_VOCAB <= used < N_VOCAB:
        return None
    about = read_json(folder / "config.json")
    exported = "vocab_used" in about and about.get("eos_token_id") == used - 1
    return used if "model" in about or exported else None


def has_other_ids(checkpoint, used=N_VOCAB):
    """Whether the first `used` ids of the vocabulary of a Hugging Face folder or hub name are not
    GPT-2's, though it is of that size."""
    if foreign.find(checkpoint):
        return False
    folder = find_folder(checkpoint)
    path, old = (folder / name for name in hf.VOCABULARIES)
    if "model" in read_json(folder / "config.json") or not (path.is_file() or old.is_file()):
        return False
    ids = read_json(path if path.is_file() else old)
    if path.is_file():
        added = {token["content"]: token["id"] for token in ids.get("added_tokens", ())}
        ids = ids.get("model", {}).get("vocab")
        ids = {**ids, **added} if isinstance(ids, dict) else {}
    ids = {token: i for token, i in ids.items() if i < used}
    return ids != gpt2_json()["model"]["vocab"]


def own_tokenizer(checkpoint, config):
    """None for GPT-2's vocabulary, else the checkpoint's own: encode(), decode() and eot."""
    vocab = vocabulary_of(checkpoint, config)
    if vocab == N_VOCAB:
        return None
    if vocab is None:
        return Tokenizer(checkpoint)
    cut = get_tokenizer(vocab)
    return SimpleNamespace(encode=cut.encode, decode=cut.decode, eot=vocab - 1)


class Tokenizer:
    """The vocabulary of a Hugging Face folder or hub name that is not GPT-2's: tokenizer.json.

    eot is the end-of-text id of its config.json. ValueError when it has none."""

    def __init__(self, checkpoint):
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"the vocabulary of {checkpoint} is not GPT-2's: pip install tokenizers"
            ) from None
        file = foreign.find(checkpoint)
        folder = file.parent if file else Path(checkpoint)
        path, config = (folder / name for name in ("tokenizer.json", "config.json"))
        if not folder.is_dir():
            path = hub_download(
                str(checkpoint), path.name, None, "model", None, read_json, hf.OFFLINE
            )
            config = Path(path).with_name("config.json")
        elif not path.is_file():
            raise ValueError(
                f"the vocabulary of {checkpoint} is not GPT-2's, and its ids mean nothing without "
                f"its own: put its tokenizer.json into {folder}"
            )
        read_json(path)  # whose error is one line
        eot = None if file else read_json(config).get("eos_token_id")
        self.eot = eot[0] if isinstance(eot, list) and eot else eot
        try:
            self.vocabulary = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no other kind
            raise ValueError(f"{path} is no tokenizer: {error}") from None

    def encode(self, text, **_):
        return self.vocabulary.encode(text).ids

    def decode(self, ids):
        return self.vocabulary.decode(ids)
