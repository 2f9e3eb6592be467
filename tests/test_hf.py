"""hf.py against transformers, in both directions: logits, greedy text, tokenizer, round trips."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import grown, refused, shake, write_step
from hub_server import point_client_at, serve
from safetensors.torch import load_file, save_file

from model import GPT, GPTConfig
from nanoswitch import export, hf, load
from nanoswitch.tokenizer import EOT, get_tokenizer, gpt2_json

transformers = pytest.importorskip("transformers")
V, T = 97, 24
OURS = dict(block_size=T, vocab_size=V, vocab_used=V, n_layer=2, n_head=4, n_embd=32)
SIZES = dict(vocab_size=V, num_hidden_layers=2, hidden_size=32, num_attention_heads=4)
LLAMA = dict(pos="rope", norm="rmsnorm", mlp="swiglu", bias=False, n_kv_head=2)
BLOOM = dict(pos="alibi", embd_norm=True)
THEIR_LLAMA = SIZES | dict(
    num_key_value_heads=2, intermediate_size=56, max_position_embeddings=T, rms_norm_eps=1e-4
)
IDX = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1))


def gpt(**fields):
    return grown(GPTConfig(**OURS | fields))


def gap(ours, theirs, idx=IDX):
    with torch.no_grad():
        return (ours(idx)[0] - theirs(idx).logits).abs().max().item()


def greedy(theirs, idx, new):
    """Greedy text that does not stop at the end-of-text id, which ours does not either."""
    options = dict(do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
    return theirs.generate(idx, attention_mask=torch.ones_like(idx), **options)


# ----------------------------------------------------------------------------- import


THEIRS = {
    "gpt2": dict(n_positions=T, vocab_size=V, n_layer=2, n_head=4, n_embd=32, n_inner=40),
    "gpt2 untied": dict(
        n_positions=T, vocab_size=V, n_layer=2, n_head=4, n_embd=32, tie_word_embeddings=False
    ),
    "llama": THEIR_LLAMA,
    "llama tied": THEIR_LLAMA | dict(tie_word_embeddings=True),
    "llama biases": THEIR_LLAMA | dict(attention_bias=True, mlp_bias=True),
    "llama theta": THEIR_LLAMA
    | dict(rope_parameters={"rope_type": "default", "rope_theta": 700.0}),
    "llama linear": THEIR_LLAMA
    | dict(rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}),
    "mistral": THEIR_LLAMA | dict(sliding_window=5),
    "mistral full": THEIR_LLAMA | dict(sliding_window=None),
    "starcoder2": {k: v for k, v in THEIR_LLAMA.items() if k != "rms_norm_eps"}
    | dict(sliding_window=5, norm_epsilon=1e-4),
    "bloom": dict(vocab_size=V, n_layer=2, n_head=8, hidden_size=32),
    "bloom 12 heads": dict(vocab_size=V, n_layer=2, n_head=12, hidden_size=48),
    "bloom untied": dict(
        vocab_size=V, n_layer=2, n_head=4, hidden_size=32, tie_word_embeddings=False
    ),
}


def their_model(name, **changes):
    config = transformers.AutoConfig.for_model(name.split()[0], **THEIRS[name] | changes)
    return shake(transformers.AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("name", THEIRS)
def test_a_model_of_transformers_gives_its_logits_here(name, tmp_path):
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    difference = gap(ours, theirs)
    print(f"\nimport {name}: {difference:.1e}")
    assert difference < 1e-4
    assert ours.config.vocab_used == V and not ours.training
    if name == "mistral":
        assert ours.config.window == 5 < T
    # and back: the same folder, by our hand
    hf.save(ours, tmp_path / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert {n: p.tolist() for n, p in again.state_dict().items()} == {
        n: p.tolist() for n, p in theirs.state_dict().items()
    }


def test_rope_is_read_from_the_keys_of_transformers_4(tmp_path):
    for scaling in ({"type": "linear", "factor": 2.5}, {"rope_type": "linear", "factor": 2.5}):
        theirs = their_model("llama linear")
        theirs.save_pretrained(tmp_path)
        edit(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=scaling)
        assert gap(GPT.from_pretrained(tmp_path), theirs) < 1e-4
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert gap(GPT.from_pretrained(tmp_path), again) < 1e-4


def edit(folder, drop=(), **changes):
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))


def test_blooms_first_uploads_load(tmp_path):
    """The hub's bloom has other key names and no prefix on its tensors."""
    theirs = their_model("bloom")
    theirs.save_pretrained(tmp_path)
    drop = ("hidden_size", "n_head", "tie_word_embeddings")
    edit(tmp_path, drop, n_embed=32, num_attention_heads=8, seq_length=2048)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {n.removeprefix("transformer."): w for n, w in weights.items()}
    save_file(weights, tmp_path / "model.safetensors")
    assert gap(GPT.from_pretrained(tmp_path), theirs) < 1e-4


@pytest.mark.parametrize(
    "name, changes, words",
    [
        ("gpt2", {"model_type": "opt"}, ["model_type 'opt'", "llama"]),
        ("gpt2", {"activation_function": "relu"}, ["activation_function", "relu"]),
        ("gpt2", {"n_layer": "two"}, ["wrong type"]),
        ("llama", {"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ("llama", {"mlp_bias": True}, ["attention_bias", "mlp_bias"]),
        ("llama", {"head_dim": 16}, ["head_dim 16"]),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["llama3"]),
        ("starcoder2", {"use_bias": False}, ["use_bias"]),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, ["apply_residual"]),
        ("llama", {"vocab_size": 96}, [".weight", "(97, 32)", "(96, 32)"]),
        ("llama", {"num_key_value_heads": 1}, ["k_proj.weight", "(16, 32)", "(8, 32)"]),
        ("llama", {"num_hidden_layers": 3}, ["lacks", "model.layers.2."]),
        ("llama", {"num_hidden_layers": 1}, ["unknown", "model.layers.1."]),
    ],
    ids=str,
)
def test_what_this_model_cannot_be_is_refused_in_one_line(name, changes, words, tmp_path):
    their_model(name).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with refused(*words):
        GPT.from_pretrained(tmp_path)


def test_shards_are_read_and_a_bad_index_is_refused(tmp_path):
    theirs = their_model("llama")
    theirs.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and not (tmp_path / "model.safetensors").exists()
    assert gap(GPT.from_pretrained(tmp_path), theirs) < 1e-4
    shards[0].rename(tmp_path / "away")
    with refused(shards[0].name):
        GPT.from_pretrained(tmp_path)
    for index in ("{}", "[]", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": 3}'):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with refused("index.json"):
            GPT.from_pretrained(tmp_path)


def test_half_precision_weights_become_fp32(tmp_path):
    their_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in GPT.from_pretrained(tmp_path).parameters()} == {torch.float32}


# ----------------------------------------------------------------------------- the hub


@pytest.fixture
def cache(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("nanoswitch.hub.BACKOFF_SECONDS", 0.01)


def files_of(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}


def test_a_hub_name_loads_through_faults_and_once(tmp_path, cache, monkeypatch):
    theirs = their_model("llama")
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    repos = {"me/one": files_of(tmp_path / "one"), "me/many": files_of(tmp_path / "many")}
    faults = {
        "GET config.json": [503, "truncate"],
        "GET .safetensors": [429, "drop", "damage", "truncate"],
        "HEAD index.json": [500],
    }
    for name in repos:
        with serve(repos, faults=faults) as hub:
            point_client_at(hub.url, monkeypatch)
            assert gap(GPT.from_pretrained(name), theirs) < 1e-4
            asked = sum(hub.requests.values())
            GPT.from_pretrained(name)
            assert sum(hub.requests.values()) == asked  # from the cache


def test_a_hub_name_comes_with_its_own_vocabulary(tmp_path, cache, monkeypatch):
    """As a GPT-2 of another language is: of GPT-2's size, but other ids."""
    fields = dict(block_size=8, vocab_size=50257, n_layer=1, n_head=1, n_embd=2)
    hf.save(GPT(GPTConfig(**fields)), tmp_path / "theirs")
    files, made = files_of(tmp_path / "theirs"), gpt2_json()
    ids = made["model"]["vocab"]
    ids.update({token: (i + 1000) % 50256 for token, i in ids.items() if i < 50256})
    about = json.loads(files["config.json"])
    about.pop("vocab_used", None)
    files["config.json"] = json.dumps(about).encode()
    english = dict(files)
    files["tokenizer.json"] = json.dumps(made).encode()
    old = files | {"vocab.json": json.dumps(ids).encode()}
    del old["tokenizer.json"]
    repos = {"me/german": files, "me/older": old, "me/english": english}
    with serve(repos) as hub:
        point_client_at(hub.url, monkeypatch)
        models = {name: GPT.from_pretrained(name) for name in repos}
        asked = sum(hub.requests.values())
        vocabularies = {name: load.vocabulary_of(name, m.config) for name, m in models.items()}
        assert vocabularies == {"me/german": None, "me/older": None, "me/english": 50257}
        own = load.own_tokenizer("me/german", models["me/german"].config)
        assert own.encode("cat") == [ids["cat"]]
        assert sum(hub.requests.values()) == asked  # all of it from the cache


def test_older_hub_repos_and_names_that_are_none(tmp_path, cache, monkeypatch):
    theirs = their_model("gpt2")
    theirs.save_pretrained(tmp_path / "m")
    files = files_of(tmp_path / "m")
    del files["model.safetensors"]
    torch.save(theirs.state_dict(), tmp_path / "weights")
    old = files | {"pytorch_model.bin": (tmp_path / "weights").read_bytes()}
    with serve({"me/old": old, "me/empty": files}) as hub:
        point_client_at(hub.url, monkeypatch)
        assert gap(GPT.from_pretrained("me/old"), theirs) < 1e-4
        asked = sum(hub.requests.values())
        GPT.from_pretrained("me/old")
        assert sum(hub.requests.values()) == asked  # from the cache
        with refused("me/empty", "none of model.safetensors.index.json"):
            GPT.from_pretrained("me/empty")
        with refused("me/none", "config.json"):
            GPT.from_pretrained("me/none")
        with refused("-no name-"):
            GPT.from_pretrained("-no name-")


# ----------------------------------------------------------------------------- export


EXPORTS = {
    "gpt2": dict(),
    "gpt2 untied": dict(tie_embeddings=False, mlp_hidden=40, norm_eps=1e-3),
    "gpt2 padded": dict(vocab_used=90),
    "llama": LLAMA | dict(tie_embeddings=False),
    "llama tied": LLAMA | dict(rope_theta=700.0, rope_scaling=2.5, norm_eps=1e-3),
    "llama biases": LLAMA | dict(bias=True, n_kv_head=1),
    "llama no window": LLAMA | dict(window=5, window_pattern="L"),
    "mistral": LLAMA | dict(window=5),
    "starcoder2": dict(pos="rope", n_kv_head=2, rope_theta=700.0),
    "starcoder2 windows": dict(pos="rope", window=5, window_pattern="SS"),
    "bloom": BLOOM | dict(n_head=8),
    "bloom 12 heads": BLOOM | dict(n_head=12, n_embd=48, tie_embeddings=False),
    # their form changes, their function does not
    "gpt2 no biases": dict(bias=False),
    "gpt2 sinusoidal": dict(pos="sinusoidal"),
    "gpt2 no positions": dict(pos="none"),
    "starcoder2 no biases": dict(pos="rope", bias=False),
    "bloom no biases": BLOOM | dict(bias=False),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_an_exported_model_is_the_same_in_transformers_and_back(name, tmp_path):
    ours = gpt(**EXPORTS[name])
    assert hf.save(ours, tmp_path / "out") == name.split()[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.float32 and type(theirs).__name__.lower().startswith(name[:4])
    difference = gap(ours, theirs)
    print(f"\nexport {name}: {difference:.1e}")
    assert difference < 1e-4
    prompt = IDX[:, :6]
    assert torch.equal(greedy(theirs, prompt, 18), ours.generate(prompt, 18, temperature=0))

    back = GPT.from_pretrained(tmp_path / "out")
    assert (back(IDX)[0] - ours(IDX)[0]).abs().max() < 1e-5
    assert back.config.vocab_used == ours.config.vocab_used
    state, again = ours.state_dict(), back.state_dict()
    added = again.keys() - state.keys()
    assert all(torch.equal(again[n], w) for n, w in state.items())
    assert all("bias" in n or "wpe" in n for n in added)
    assert bool(added) == (name.endswith(("no biases", "sinusoidal", "no positions")))


def test_every_switch_of_ours_changes_the_logits():
    """So that the equalities above say something."""
    base = gpt(**LLAMA)(IDX)[0]
    for change in ({"rope_theta": 700.0}, {"rope_scaling": 2.5}, {"window": 5}, {"norm_eps": 0.1}):
        assert (gpt(**LLAMA | change)(IDX)[0] - base).abs().max() > 1e-2
    assert (gpt(**BLOOM)(IDX)[0] - gpt(pos="alibi")(IDX)[0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(pos="fire"), ["pos 'fire'", "gpt2"]),
        (dict(pos="kerple"), ["pos 'kerple'"]),
        (dict(pos="alibi"), ["embd_norm False", "bloom"]),
        (LLAMA | dict(pos="alibi"), ["mlp 'swiglu'", "norm 'rmsnorm'", "bloom"]),
        (LLAMA | dict(mlp="relu2"), ["mlp 'relu2'", "llama"]),
        (LLAMA | dict(mlp="gelu"), ["mlp 'gelu'", "llama"]),
        (LLAMA | dict(embd_norm=True), ["embd_norm True"]),
        (LLAMA | dict(qk_norm=True), ["qk_norm True"]),
        (LLAMA | dict(bias=True, window=5), ["window 5"]),
        (LLAMA | dict(window=5, window_pattern="SL"), ["window_pattern 'SL'"]),
        (dict(logit_softcap=15.0), ["logit_softcap 15.0"]),
        (dict(document_mask=True), ["document_mask True"]),
        (dict(attention="linformer"), ["attention 'linformer'"]),
        (dict(n_kv_head=2), ["n_kv_head 2", "gpt2"]),
        (dict(window=5), ["window 5", "gpt2"]),
        (BLOOM | dict(mlp_hidden=40), ["mlp_hidden 40"]),
    ],
    ids=str,
)
def test_what_no_layout_holds_is_refused_by_its_switch(fields, words, tmp_path):
    with refused("no Hugging Face layout", *words):
        hf.save(gpt(**fields), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused_and_an_empty_one_is_not(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note.txt").write_text("mine")
    with refused("used", "not an empty folder"):
        hf.save(gpt(), tmp_path / "used")
    with refused("not an empty folder"):
        hf.save(gpt(), tmp_path / "used" / "note.txt")
    (tmp_path / "empty").mkdir()
    hf.save(gpt(), tmp_path / "empty")
    GPT.from_pretrained(tmp_path / "empty")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "used"]


# ----------------------------------------------------------------------------- tokenizer

TEXTS = [
    "Hello, I'm a language model,", "", " ", "  two  spaces  ", "\n\n\tTabs\r\nand lines \n ",
    "we'll we've I'd it's DON'T", "naïve café Ünïcödé", "日本語のテキスト", "🙂👍🏽 emoji 👩‍👩‍👧",
    "a\u00a0b\u2003c\u3000d\u200be\u0085f\x1cg\x0bh\x0ci", "x" * 300,
    "def f(x):\n    return x  # y\n", "1234567 3.14",
    "Ⅷ ½ ٣ ͏ \u0301combining", "\u00ad\ufeffBOM", "<|endoftext", "[CLS] <s> <unk>",
]  # fmt: skip


SMALL = dict(n_embd=16, n_layer=1)


def export_gpt2_vocabulary(folder, **fields):
    model = gpt(vocab_size=50304, vocab_used=50257, **fields)
    with torch.no_grad():  # padding that an unguarded sampler would draw
        model.lm_head.weight[50257:] *= 10
    hf.save(model, folder)
    return model


@pytest.mark.parametrize("kind", hf.LAYOUTS)
def test_the_exported_tokenizer_encodes_as_tiktoken(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ours = export_gpt2_vocabulary(tmp_path / "out", **EXPORTS[kind] | SMALL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    enc = get_tokenizer()
    for text in TEXTS:
        ids = enc.encode_ordinary(text)
        assert tokenizer(text)["input_ids"] == ids, repr(text)
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    mark = "a<|endoftext|>b"
    plain = tokenizer(mark, split_special_tokens=True)["input_ids"]
    assert plain == enc.encode_ordinary(mark)
    assert tokenizer(mark)["input_ids"] == enc.encode(mark, allowed_special="all")
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == EOT
    assert tokenizer.model_max_length == T and len(tokenizer) == 50257

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.config.eos_token_id == EOT
    idx = torch.tensor([enc.encode_ordinary("Hello, I'm a")])
    want = ours.generate(idx, 12, temperature=0)
    assert torch.equal(greedy(theirs, idx, 12), want) and want.max() < 50257
    raw = theirs(want).logits.argmax(-1)
    assert raw.max() >= 50257  # the guard did something


def test_the_command_line(tmp_path, monkeypatch, capsys):
    model, step = gpt(**LLAMA), tmp_path / "run" / "step_000003"
    write_step(step, model)
    (tmp_path / "run" / "latest").write_text("step_000003")
    args = ["export.py", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    root = Path(__file__).parent.parent
    line = [sys.executable, "-m", "nanoswitch.export", *args[1:]]
    done = subprocess.run(line, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "llama layout" in done.stdout and "without a tokenizer" in done.stdout
    assert torch.equal(GPT.from_pretrained(tmp_path / "out")(IDX)[0], model(IDX)[0])
    monkeypatch.setattr(sys, "argv", args)
    with refused("not an empty folder"):
        export.main()
    monkeypatch.setattr(sys, "argv", args[:2])
    with pytest.raises(SystemExit) as stop:
        export.main()
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# ----------------------------------------------------------------------------- lm-eval


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, LLAMA, LLAMA | {"window": 5}, BLOOM], ids=str)
def test_the_evaluation_harness_scores_the_exported_folder_as_we_do(fields, tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    ours, enc = (
        export_gpt2_vocabulary(tmp_path / "out", **fields | SMALL),
        get_tokenizer(),
    )
    pairs = [
        ("A man is sitting on a roof. He", " starts pulling up roofing."),
        ("A man is sitting on a roof. He", " is using wrap."),
        ("Bread: Mix flour and water.", " Bake it."),
        ("Bread: Mix flour and water.", " Paint it blue."),
    ]
    lm = HFLM(pretrained=str(tmp_path / "out"), device="cpu", batch_size=2, dtype="float32")
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for (context, ending), (score, _) in zip(pairs, lm.loglikelihood(requests), strict=True):
        ids, n = enc.encode_ordinary(context + ending), len(enc.encode_ordinary(context))
        idx, targets = torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])
        targets[:, : n - 1] = -1
        loss = -ours.token_losses(ours.features(idx), targets).sum().item()
        assert score == pytest.approx(loss, abs=1e-3)
