"""Checkpoints that GPT.from_pretrained loads whole, and those that it refuses in one line."""

import pickle

import pytest
import torch
from builders import grown, refused, tiny, tokens, write_step

from model import GPT, POSITIONS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("pos", POSITIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_comes_back_whole(pos, tied, tmp_path):
    config = tiny(pos=pos, tie_embeddings=tied, n_kv_head=2, mlp="swiglu", window=3)
    model = grown(config)
    step = write_step(tmp_path / "run" / "step_000200", model)
    (tmp_path / "run" / "latest").write_text("step_000200\n")
    idx = tokens(config, 1, 6)
    for path in (step, str(step), tmp_path / "run"):
        loaded = GPT.from_pretrained(path)
        assert loaded.config == config and not loaded.training
        assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == tied
        assert torch.equal(loaded(idx)[0], model(idx)[0])
        assert loaded.num_params() == model.num_params()
        loaded(idx, idx)[1].backward()  # and it can be trained on


def test_a_checkpoint_in_bf16_loads_as_fp32(tmp_path):
    model = grown(tiny()).bfloat16()
    loaded = GPT.from_pretrained(write_step(tmp_path / "step", model))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight.float())


BROKEN_WEIGHTS = [
    ({"transformer.h.1.mlp.c_fc.bias": None}, ["lacks", "transformer.h.1.mlp.c_fc.bias"]),
    ({"transformer.wte.weight": None}, ["lacks", "transformer.wte.weight"]),
    ({"transformer.h.2.ln_1.weight": torch.ones(16)}, ["unknown", "transformer.h.2.ln_1.weight"]),
    ({"transformer.ln_f.weight": torch.ones(17)}, ["transformer.ln_f.weight", "(17,)", "(16,)"]),
    ({"transformer.wte.weight": torch.ones(60, 16)}, ["wte.weight", "(60, 16)", "(61, 16)"]),
]


@pytest.mark.parametrize("changes, words", BROKEN_WEIGHTS, ids=lambda v: str(v)[:40])
def test_weights_that_do_not_fit_are_refused_in_one_line(changes, words, tmp_path):
    step = write_step(tmp_path / "step", grown(tiny()), changes)
    with refused(step, *words):
        GPT.from_pretrained(step)


BROKEN_CONFIG = [
    ("{not json", ["config.json"]),
    ("", ["config.json"]),
    ("\udcff", ["config.json"]),
    ("[1, 2]", []),
    ("null", []),
    ('{"model": 3}', []),
    ('{"model": {"n_flux": 3}}', ["n_flux"]),
    ('{"model": {"n_embd": 30, "n_head": 4}}', ["30", "4"]),
    ('{"model_type": "bert"}', ["bert"]),
    ('{"model_type": "gpt2"}', []),
    ("{}", ["model_type"]),
]


@pytest.mark.parametrize("text, words", BROKEN_CONFIG)
def test_a_broken_config_is_refused_in_one_line(text, words, tmp_path):
    step = write_step(tmp_path / "step", grown(tiny()))
    (step / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with refused(*words):
        GPT.from_pretrained(step)


def test_missing_files_are_named_in_one_line(tmp_path, monkeypatch):
    step = write_step(tmp_path / "run" / "step", grown(tiny()))
    with refused("config.json"):  # the run folder of a run that saved nothing
        GPT.from_pretrained(tmp_path / "run")
    with refused("model.safetensors", "folder"):
        GPT.from_pretrained(step / "model.safetensors")
    (tmp_path / "run" / "latest").write_text("step_gone")
    with refused("run"):
        GPT.from_pretrained(tmp_path / "run")
    (step / "model.safetensors").unlink()
    with refused("model.safetensors"):
        GPT.from_pretrained(step)


def test_a_name_that_is_no_folder_is_refused_without_the_network(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("runs_nowhere", "runs/nowhere/step_000200", "/no/such/folder"):
        with refused(name):
            GPT.from_pretrained(name)


class Bomb:
    """Unpickling this creates the file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("dump", [lambda o, p: p.write_bytes(pickle.dumps(o)), torch.save])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt"])
def test_a_pickle_in_place_of_the_weights_is_refused_and_runs_nothing(name, dump, tmp_path):
    step, canary = write_step(tmp_path / "step", grown(tiny())), tmp_path / "canary"
    (step / "model.safetensors").unlink()
    dump(Bomb(canary), step / name)
    with refused("model.safetensors"):
        GPT.from_pretrained(step)
    assert not canary.exists()
    if dump is torch.save:  # the bomb does work
        with open(step / name, "rb") as file:
            torch.load(file, weights_only=False)
    else:
        pickle.loads((step / name).read_bytes())
    assert canary.exists()


def test_a_truncated_safetensors_file_is_refused_in_one_line(tmp_path):
    step = write_step(tmp_path / "step", grown(tiny()))
    whole = (step / "model.safetensors").read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        (step / "model.safetensors").write_bytes(whole[:size])
        with refused("model.safetensors"):
            GPT.from_pretrained(step)
