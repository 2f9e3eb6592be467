"""The formulas of switches.py against the modules of model.py, and the README against both."""

import re
from pathlib import Path

import pytest
import torch

import switches
from model import GPT, GPTConfig, KVCache

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("name, changes", [row[:2] for row in switches.ROWS])
def test_parameters_and_flops_are_those_of_the_model(name, changes):
    config = GPTConfig(**changes)
    with torch.device("meta"):
        model = GPT(config)
    assert switches.parameters(config) == sum(p.numel() for p in model.parameters())
    assert switches.flops_per_token(config) == model.flops_per_token()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu", "relu2"])
def test_parameters_without_biases(bias, norm, mlp):
    config = GPTConfig(bias=bias, norm=norm, mlp=mlp, n_layer=3, n_head=4, n_kv_head=2, n_embd=36)
    with torch.device("meta"):
        model = GPT(config)
    assert switches.parameters(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_head": 2}, {"n_kv_head": 1, "window": 5}, {"window": 6,
     "window_pattern": "SL"}]
)  # fmt: skip
def test_cache_bytes_are_those_of_a_filled_cache(changes):
    config = GPTConfig(
        block_size=16, vocab_size=64, vocab_used=64, n_layer=4, n_head=4, n_embd=32, **changes
    )
    model, cache = GPT(config).eval().bfloat16(), KVCache(config, 16)
    with torch.no_grad():
        model.features(torch.zeros(1, 16, dtype=torch.long), cache)
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.k, layer.v))
    assert switches.kv_bytes_per_token(config) == held // 16


def test_readme_table_is_current():
    shown = re.search(r"<!-- switches -->\n(.*)<!-- /switches -->", README.read_text(), re.S)[1]
    assert shown.splitlines() == switches.table(), "run: python switches.py, and paste its table"


def test_every_choice_of_a_switch_has_a_row():
    from model import ATTENTIONS, MLPS, NORMS, POSITIONS

    shown = {(k, v) for _, changes, *_ in switches.ROWS for k, v in changes.items()}
    base = GPTConfig()
    for field, table in dict(pos=POSITIONS, norm=NORMS, mlp=MLPS, attention=ATTENTIONS).items():
        for choice in table:
            assert choice == getattr(base, field) or (field, choice) in shown


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    switches.plot(GPTConfig(), tmp_path)
    for name in ("biases.png", "masks.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_linformer_picture_is_causal_and_summarises_only_the_past():
    picture = switches.linformer_picture(12, 4)
    for q in range(12):
        for k in range(12):
            own, past = q // 4 == k // 4 and k <= q, k // 4 < q // 4
            assert picture[q, k] == pytest.approx(1.0 if own else 0.4 if past else 0.0)
