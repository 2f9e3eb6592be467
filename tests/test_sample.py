"""sample.py on models rigged so that the right text is known: constant logits make every token
an independent draw from a distribution written out here."""

import gc
import json
import math
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from builders import rig, write_jsonl, write_step
from hub_server import point_client_at, serve

import sample as s
from model import GPT, GPTConfig
from nanoswitch import cli, decode
from nanoswitch.tokenizer import get_tokenizer

ROOT = Path(__file__).parent.parent
EOT = 50256
PROBS = {"a": 0.5, "b": 0.3, "c": 0.2}
LETTERS = {letter: get_tokenizer().encode_ordinary(letter)[0] for letter in "abcd"}


def random_model(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**dict(block_size=32, n_layer=1, n_head=2, n_embd=16) | changes)).eval()


def rigged(logits, **changes):
    return rig(random_model(tie_embeddings=False, **changes), logits)


def letters(**changes):
    """A model that knows a, b and c; drawing from the first 128 ids only makes draws cheap."""
    small = dict(vocab_used=128) | changes
    return rigged({LETTERS[x]: math.log(p) for x, p in PROBS.items()}, **small)


def config(**changes):
    flags = dict(checkpoint="", dtype="float32", device="cpu", temperature=1.0, top_k=0)
    return s.SampleConfig(**flags | changes)


def frequencies(**changes):
    """How often each letter comes in 3,000 draws."""
    texts = s.sample(letters(), "", config(num_samples=100, max_new_tokens=30, **changes))
    text = "".join(texts)
    assert len(texts) == 100 and len(text) == 3000 and set(text) <= set("abc")
    return {x: text.count(x) / 3000 for x in "abc"}


def close_to(probs):
    total = sum(probs.values())
    want = {x: probs.get(x, 0) / total for x in "abc"}
    # five standard deviations; a letter of probability 0 must never come
    return {x: pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 3000)) for x, p in want.items()}


def test_draws_follow_the_models_probabilities():
    assert frequencies() == close_to(PROBS)


def test_temperature_sharpens_by_its_power():
    assert frequencies(temperature=0.5) == close_to({x: p**2 for x, p in PROBS.items()})
    assert frequencies(temperature=2.0) == close_to({x: p**0.5 for x, p in PROBS.items()})


def test_top_k_keeps_the_k_likeliest():
    assert frequencies(top_k=2) == close_to({"a": 0.5, "b": 0.3})
    assert frequencies(top_k=10**6) == close_to(PROBS)  # more than there are


def test_top_p_keeps_the_fewest_that_reach_p():
    assert frequencies(top_p=0.45) == close_to({"a": 1})
    assert frequencies(top_p=0.6) == close_to({"a": 0.5, "b": 0.3})
    assert frequencies(top_p=0.9) == close_to(PROBS)


@pytest.mark.parametrize("greedy", [dict(temperature=0), dict(top_k=1), dict(top_p=1e-6)])
def test_greedy_takes_the_likeliest_token_each_time(greedy):
    model, prompt = random_model(), "one two"
    with torch.no_grad():
        model.transformer.wpe.weight.normal_()  # so that the likeliest token varies
    ids = get_tokenizer().encode_ordinary(prompt)
    begin = len(ids)
    with torch.no_grad():
        for _ in range(10):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1, :50257].argmax()))
    expected = get_tokenizer().decode(ids[begin:])
    assert len(set(ids[begin:])) > 3
    for seed in (1, 2):
        flags = config(seed=seed, num_samples=2, max_new_tokens=10, **greedy)
        assert s.sample(model, prompt, flags) == [expected, expected]


def test_the_seed_decides_the_text():
    first = s.sample(random_model(), "x", config(num_samples=3, max_new_tokens=15, seed=1))
    assert len(set(first)) == 3  # rows are drawn independently
    assert s.sample(random_model(), "x", config(num_samples=3, max_new_tokens=15, seed=1)) == first
    assert s.sample(random_model(), "x", config(num_samples=3, max_new_tokens=15, seed=2)) != first


def test_end_of_text_ends_a_sample(monkeypatch):
    assert s.sample(rigged({EOT: 0}), "hi", config(num_samples=3)) == ["", "", ""]
    monkeypatch.setattr(s, "EOT", LETTERS["c"])  # an id within the small vocabulary
    texts = s.sample(letters(pos="rope"), "a", config(num_samples=400, max_new_tokens=80))
    assert all(set(text) <= {"a", "b"} for text in texts)
    # geometric: 0.2 of them are empty, the mean length is 0.8 / 0.2; five standard errors
    assert sum(not text for text in texts) / 400 == pytest.approx(0.2, abs=0.1)
    assert sum(map(len, texts)) / 400 == pytest.approx(4, abs=5 * math.sqrt(0.8) / 0.2 / 20)


@pytest.mark.parametrize("flags", [dict(), dict(temperature=0), dict(top_k=3), dict(top_p=0.5)])
def test_padding_ids_are_never_drawn(flags):
    pads = {token: 50.0 for token in range(50257, 50304)}
    model = rigged(pads | {LETTERS["d"]: 0.0})
    assert s.sample(model, "x", config(max_new_tokens=7, **flags)) == ["ddddddd"]


def test_an_empty_prompt_starts_after_end_of_text():
    """A model that answers each token with a fixed one: EOT with a, anything else with b."""
    model = random_model(n_layer=1, tie_embeddings=False)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.transformer.ln_f.weight.fill_(1)
        model.transformer.wte.weight[:, 0] = 1
        model.transformer.wte.weight[EOT] = torch.eye(16)[1]
        model.lm_head.weight[LETTERS["a"], 1] = 1
        model.lm_head.weight[LETTERS["b"], 0] = 1
    flags = config(temperature=0, max_new_tokens=3)
    assert s.sample(model, "", flags) == ["abb"]
    assert s.sample(model, "<|endoftext|>", flags) == ["abb"]
    assert s.sample(model, "a", flags) == ["bbb"]


def test_learned_positions_end_at_block_size_and_relative_ones_do_not(capsys):
    text = "a b c d e f"  # 6 tokens
    model = letters(block_size=8)
    assert len(s.sample(model, text, config(max_new_tokens=100))[0]) == 2
    assert "only 2 tokens fit" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"the prompt has 11 tokens.* 8 "):
        s.sample(model, text + " g h i j k", config())
    assert (
        len(s.sample(letters(block_size=8, pos="rope"), text, config(max_new_tokens=100))[0]) == 100
    )


# ----------------------------------------------------------------------------- streaming


def bytewise(text):
    """A model that spells out a text byte by byte, then ends it, by looking at the position."""
    data = text if isinstance(text, bytes) else text.encode()
    tokenizer = get_tokenizer()
    ids = [tokenizer.encode_single_token(bytes([b])) for b in data] + [EOT]
    model = random_model(tie_embeddings=False, n_embd=64, block_size=64)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.transformer.ln_f.weight.fill_(1)
        model.transformer.wpe.weight[: len(ids)] = torch.eye(64)[: len(ids)]
        for i, token in enumerate(ids):
            model.lm_head.weight[token, i] += 1
    return model


@pytest.mark.parametrize("seed", [1, 2])
def test_the_pieces_of_a_stream_are_the_sample(seed):
    model, flags = random_model(), config(max_new_tokens=20, seed=seed)
    pieces = list(s.stream_text(model, "x", flags))
    assert len(pieces) > 5 and [("").join(pieces)] == s.sample(model, "x", flags)


def test_characters_are_never_split_between_pieces():
    text = "naïve €5 🦜 日本"
    pieces = list(s.stream_text(bytewise(text), "a", config(temperature=0)))
    assert pieces == list(text)  # one byte a token, one character a piece
    broken = "é🦜".encode()[:-1] + b"x" + "🦜".encode()[:2]  # cut short inside, and at the end
    pieces = list(s.stream_text(bytewise(broken), "a", config(temperature=0)))
    assert pieces == ["é", "\ufffdx", "\ufffd"]
    assert "".join(pieces) == broken.decode(errors="replace")


def test_a_stream_ends_with_the_text_or_at_max_new_tokens():
    model = bytewise("abc")
    assert list(s.stream_text(model, "a", config(temperature=0))) == ["a", "b", "c"]
    assert list(s.stream_text(model, "a", config(temperature=0, max_new_tokens=2))) == ["a", "b"]
    assert list(s.stream_text(rigged({EOT: 0}), "hi", config(num_samples=3))) == []


def test_a_stream_leaves_autocast_to_itself():
    stream = s.stream_text(random_model(), "x", config(dtype="bfloat16"))
    next(stream)
    assert not torch.is_autocast_enabled("cpu")


# ----------------------------------------------------------------------------- the decoder


def test_a_loaded_model_keeps_its_decoder(checkpoint, monkeypatch):
    made, make = [], decode.decoder
    monkeypatch.setattr(decode, "decoder", lambda *args: (made.append(args), make(*args))[1])
    loaded, auto = s.load(checkpoint, "cpu")[0], config(dtype="auto", max_new_tokens=20)
    texts = [s.sample(loaded, "", auto) for _ in range(3)]
    assert texts[0] == texts[1] == texts[2] and len(made) == 1
    s.sample(loaded, "", config(dtype="auto", num_samples=2))
    assert s.sample(loaded, "", auto) == texts[0] and len(made) == 3  # it keeps the last only
    kept = weakref.ref(loaded)
    del loaded, made[:]
    gc.collect()
    assert kept() is None


def test_a_model_in_training_is_sampled_as_it_is():
    model, auto = letters(), config(dtype="auto", max_new_tokens=20)
    before = s.sample(model, "", auto)[0]
    with torch.no_grad():
        model.lm_head.weight[LETTERS["d"], 0] = 1e3
    assert set(before) <= set("abc") and set(s.sample(model, "", auto)[0]) == {"d"}


# ----------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run folder whose latest step holds the model of letters."""
    run = tmp_path_factory.mktemp("run")
    model = letters(vocab_used=50257)
    for step, weights in ((1, random_model(tie_embeddings=False)), (2, model)):
        write_step(run / f"step_{step:06d}", weights)
    (run / "latest").write_text("step_000002\n")
    return run


def test_the_script_prints_the_samples_of_a_run_folder(checkpoint):
    flags = ["--prompt=hi", "--num_samples=3", "--max_new_tokens=9"]
    line = [sys.executable, str(ROOT / "sample.py"), str(checkpoint), *flags, "--device=cpu"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    texts = done.stdout.split("\n" + "-" * 80 + "\n")
    assert texts.pop() == "" and len(texts) == 3
    for text in texts:
        assert text.startswith("hi") and len(text) == 11 and set(text[2:]) <= set("abc")


# ----------------------------------------------------------------------------- the hub

TOKEN = "hf_SECRETsecretSECRET"


@pytest.fixture
def client(tmp_path, monkeypatch):
    """huggingface_hub with a cache and a token of its own."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("nanoswitch.hub.BACKOFF_SECONDS", 0.001)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def private_step(folder, model, **entries):
    """A checkpoint that says where its user's data lie."""
    write_step(folder, model, train={"data_dir": "/home/me/private"}, **entries)


def call(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, argv)])
    cli.run(s.main)


@pytest.mark.parametrize("fields, layout", [
    (dict(), "gpt2"),
    (dict(pos="rope", norm="rmsnorm", mlp="swiglu", bias=False, n_kv_head=1), "llama"),
    (dict(pos="fire", attention_kernel="math"), "nanoswitch"),
    (dict(attention="linformer", pos="none", block_size=64, qk_norm=True), "nanoswitch"),
])  # fmt: skip
def test_a_pushed_model_loads_back_by_name(fields, layout, client, tmp_path, monkeypatch, capfd):
    model, run = random_model(**fields), tmp_path / "run"
    private_step(run / "step_000030", model, step=30, tokens=4000)
    (run / "latest").write_text("step_000030\n")
    log = [
        {"step": 20, "val_loss": 3.5},
        {"step": 30, "train_loss": 1},
        {"step": 40, "val_loss": 2},
    ]
    write_jsonl(run / "log.jsonl", log)
    # each kind of request meets a fault that passes
    faults = {"POST create": [503], "POST commit/main": [500]}
    with serve({}, faults, token=TOKEN) as hub:
        point_client_at(hub.url, monkeypatch)
        call(monkeypatch, run, "--push", "me/m")
        files = hub.repos["me/m"]
        assert hub.private == {"me/m"} and ("tokenizer.json" in files) == (layout != "nanoswitch")
        loaded = GPT.from_pretrained("me/m")
        assert call(monkeypatch, "me/m", "--max_new_tokens", "3", "--device", "cpu") is None
    idx = torch.arange(20)[None]
    assert torch.equal(loaded(idx)[0], model(idx)[0])
    card = files["README.md"].decode()
    assert "30 steps, 4,000 tokens; validation loss 3.5000 nats at step 20" in card
    assert f"| pos | '{model.config.pos}' |" in card and f"Layout: {layout}." in card
    assert f"{model.num_params():,} parameters" in card
    assert not any(b"/home/me" in data or str(run).encode() in data for data in files.values())
    out, err = capfd.readouterr()
    assert f"{hub.url}/me/m: private, {layout} layout" in out
    assert "SECRET" not in out + err and ("no Hugging Face layout" in err) == (
        layout == "nanoswitch"
    )


def test_a_second_push_replaces_the_first(client, tmp_path, monkeypatch, capfd):
    private_step(tmp_path / "one", random_model())
    second = random_model(pos="fire")
    private_step(tmp_path / "two", second)
    with serve({}, token=TOKEN) as hub:
        point_client_at(hub.url, monkeypatch)
        call(monkeypatch, tmp_path / "one", "--push", "me/m", "--public", "true")
        assert not hub.private and "public, gpt2 layout" in capfd.readouterr().out
        GPT.from_pretrained("me/m")
        hub.repos["me/m"]["notes.txt"] = b"mine"
        with pytest.raises(SystemExit):  # what is public is not added to by accident
            call(monkeypatch, tmp_path / "two", "--push", "me/m")
        error = capfd.readouterr().err.splitlines()[-1]
        assert "me/m is there and public: --public true" in error
        assert "tokenizer.json" in hub.repos["me/m"]
        call(monkeypatch, tmp_path / "two", "--push", "me/m", "--public", "true")
        kept = {".gitattributes", "README.md", "config.json", "model.safetensors", "notes.txt"}
        assert hub.repos["me/m"].keys() == kept
        loaded = GPT.from_pretrained("me/m")
    idx = torch.arange(20)[None]
    assert torch.equal(loaded(idx)[0], second(idx)[0])


def check_pushed(folder, flags, monkeypatch, capsys):
    """A checkpoint, once pushed, writes by its hub name what it wrote before -> the hub."""
    call(monkeypatch, folder, *flags)
    expected = capsys.readouterr().out
    with serve({}, token=TOKEN) as hub:
        point_client_at(hub.url, monkeypatch)
        call(monkeypatch, folder, "--push", "me/m")
        capsys.readouterr()
        call(monkeypatch, "me/m", *flags)
    assert capsys.readouterr().out == expected
    return hub


@pytest.mark.parametrize("fields", [dict(), dict(pos="fire")])
def test_a_vocabulary_of_its_own_is_pushed_along(fields, client, tmp_path, monkeypatch, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model = random_model(vocab_size=97, vocab_used=97, **fields)
    private_step(tmp_path / "m", model, eos_token_id=8)
    made.save(str(tmp_path / "m" / "tokenizer.json"))
    flags = ["--prompt", "w5 w6", "--max_new_tokens", "9", "--seed", "3"]
    hub = check_pushed(tmp_path / "m", flags, monkeypatch, capsys)
    assert json.loads(hub.repos["me/m"]["config.json"])["eos_token_id"] == 8


@pytest.mark.parametrize("fields", [dict(), dict(pos="fire")])
def test_a_cut_vocabulary_is_pushed_along(fields, client, tmp_path, monkeypatch, capsys):
    """The beginning of GPT-2's vocabulary: a hub name says nothing of it but by tokenizer.json."""
    private_step(tmp_path / "m", random_model(vocab_size=384, vocab_used=300, **fields))
    flags = ["--prompt", "the naïve", "--max_new_tokens", "12", "--seed", "3"]
    hub = check_pushed(tmp_path / "m", flags, monkeypatch, capsys)
    assert json.loads(hub.repos["me/m"]["config.json"])["eos_token_id"] == 299


@pytest.mark.parametrize("token", ["", "hf_WRONGwrong"])
def test_a_push_without_the_right_token_says_how_to_log_in(
    token, client, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    private_step(tmp_path / "m", random_model())
    with serve({}, token=TOKEN) as hub:
        point_client_at(hub.url, monkeypatch)
        with pytest.raises(SystemExit):
            call(monkeypatch, tmp_path / "m", "--push", "me/m")
        assert not hub.repos
    out, err = capfd.readouterr()
    assert err.count("\n") == 1 and "me/m" in err and "hf auth login" in err and out == ""
    assert "WRONG" not in err and "SECRET" not in err
