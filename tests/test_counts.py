"""What counts.py counts, against the formulas of tests/formulas.py and against tensors that were
made; and the table in docs/switches.md against both."""

import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import formulas
import pytest
import torch
from builders import WINDOWS, tiny

from model import ATTENTIONS, GPT, MLPS, NORMS, POSITIONS, GPTConfig
from nanoswitch import counts, switches
from nanoswitch.cache import KVCache

ROOT = Path(__file__).parent.parent
SWITCHES = ROOT / "docs" / "switches.md"


@pytest.mark.parametrize("name, changes", [row[:2] for row in switches.ROWS])
def test_counts_are_those_of_the_formulas(name, changes):
    config = GPTConfig(**changes)
    model = counts.on_meta(config)
    assert counts.num_params(config) == formulas.parameters(config)
    assert counts.flops_per_token(model) == formulas.flops_per_token(config)
    assert counts.kv_bytes_per_token(model) == formulas.kv_bytes_per_token(config)
    if not any(p.requires_grad for p in model.transformer.wpe.parameters()) and name not in (
        "attention linformer", "document_mask"
    ):  # fmt: skip
        small = 2**14  # slopes and the like
        held = counts.mask_bytes(model)
        assert 0 <= held - formulas.mask_bytes(config) <= small


def test_masks_of_other_kinds():
    T, S, R = 1024, 64, 16
    documents = counts.mask_bytes(counts.on_meta(GPTConfig(document_mask=True)))
    assert T * T <= documents < 1.02 * T * T
    # of each of n segments: S queries meet n R summaries and S keys
    linformer = counts.mask_bytes(counts.on_meta(GPTConfig(attention="linformer")))
    n = T // S
    assert n * S * (n * R + S) <= linformer < 1.02 * n * S * (n * R + S)
    # a learned bias keeps its own steps for the backward pass too
    kerple = counts.mask_bytes(counts.on_meta(GPTConfig(pos="kerple")))
    assert kerple > 2 * 12 * T * T * 4


def analytic_parameters(c):
    """Without the position encoding's own."""
    C, hs, norms = c.n_embd, c.n_embd // c.n_head, 2 if c.norm == "layernorm" and c.bias else 1
    qkv, wide = C + 2 * c.n_kv_head * hs, c.mlp_hidden * (2 if c.mlp == "swiglu" else 1)
    block = C * qkv + C * C + C * wide + c.mlp_hidden * C + 2 * norms * C
    if c.bias:
        block += qkv + C + wide + C
    heads = 1 if c.tie_embeddings else 2
    return heads * c.vocab_size * C + c.n_layer * block + norms * C


@pytest.mark.parametrize("mlp", ["gelu", "relu2", "swiglu"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_parameters_and_flops_follow_the_formulas(norm, mlp):
    for pos, bias, tied, nkv, (window, pattern) in product(
        POSITIONS, (True, False), (True, False), (4, 1), WINDOWS
    ):
        config = tiny(
            pos=pos,
            norm=norm,
            mlp=mlp,
            bias=bias,
            tie_embeddings=tied,
            n_kv_head=nkv,
            window=window,
            window_pattern=pattern,
        )
        model, N = GPT(config), analytic_parameters(config)
        table = sum(p.numel() for p in model.transformer.wpe.parameters())
        if pos == "learned":
            assert table == 24 * 16
        assert model.num_params() == N + table
        if not tied:
            N -= 61 * 16  # the embedding is a look-up: only the head multiplies
        spans = {"": [window] * 2, "SL": [3, 0], "LSS": [0, 3]}[pattern]
        for T in (24, 2):
            keys = sum(min(w, T) if w else T for w in spans)
            network = T * table if pos == "fire" else 0  # once for every key
            assert counts.flops_per_token(model, T) == 6 * (N + network) + 12 * 16 * keys
        assert counts.flops_per_token(model) == counts.flops_per_token(model, 24)


def test_gpt2_has_124_million_parameters():
    model = counts.on_meta(GPTConfig(vocab_size=50257))
    assert model.num_params() == 124_439_808
    # 6 N + 12 n_layer n_embd T, N without the 1024 x 768 positions
    assert counts.flops_per_token(model) == 6 * (124_439_808 - 786_432) + 12 * 12 * 768 * 1024


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu", "relu2"])
def test_parameters_without_biases(bias, norm, mlp):
    config = GPTConfig(bias=bias, norm=norm, mlp=mlp, n_layer=3, n_head=4, n_kv_head=2, n_embd=36)
    assert counts.num_params(config) == formulas.parameters(config)


@pytest.mark.parametrize(
    "changes", [{}, {"n_kv_head": 2}, {"n_kv_head": 1, "window": 5}, {"window": 6,
     "window_pattern": "SL"}]
)  # fmt: skip
def test_cache_bytes_are_those_of_a_filled_cache(changes):
    config = GPTConfig(
        block_size=16, vocab_size=64, vocab_used=64, n_layer=4, n_head=4, n_embd=32, **changes
    )
    model = GPT(config).eval().bfloat16()
    cache = KVCache(model, 16)
    with torch.no_grad():
        model.features(torch.zeros(1, 16, dtype=torch.long), cache)
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in layer.tensors)
    assert counts.kv_bytes_per_token(model) == held // 16


def test_a_count_changes_nothing():
    """Neither the model nor torch's randomness: a run that was asked is a run that was not."""
    config = GPTConfig(block_size=16, vocab_size=64, vocab_used=64, n_layer=1, n_head=2, n_embd=8)
    torch.manual_seed(3)
    model = GPT(config)
    before, state = {n: w.clone() for n, w in model.state_dict().items()}, torch.get_rng_state()
    counts.num_params(config), counts.flops_per_token(model), counts.kv_bytes_per_token(model)
    counts.mask_bytes(model), counts.pass_bytes(config, 2)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())


PEAK = """
import re, sys, torch
from model import GPT, GPTConfig
from nanoswitch.device import tune_cpu
torch.set_num_threads(1)
config = GPTConfig(512, 4096, 4096, n_layer=4, n_embd=256, n_head=4)
model, idx = GPT(config), torch.zeros(int(sys.argv[1]), 512, dtype=torch.long)
model(idx[:1, :8], idx[:1, :8])[1].backward()
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
model(idx, idx)[1].backward()
print((peak() - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it reads Linux's /proc")
def test_bytes_of_a_pass_are_those_of_a_process():
    config = GPTConfig(n_layer=4, n_embd=256, n_head=4, vocab_size=4096, vocab_used=4096)
    config = replace(config, block_size=512)
    grown = []
    for size in (2, 16):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(size)], cwd=ROOT, capture_output=True, text=True
        )
        assert not done.returncode, done.stderr
        grown.append(int(done.stdout))
    counted = [counts.pass_bytes(config, size) for size in (2, 16)]
    # of the difference nothing is the libraries' own
    assert counted[1] - counted[0] == pytest.approx(grown[1] - grown[0], rel=0.15)


def test_bytes_of_a_pass_are_those_of_a_steps_second_one():
    """Counted as the tensors of two passes come and go, with real numbers."""
    config = GPTConfig(
        block_size=8, vocab_size=4096, vocab_used=4096, n_layer=2, n_head=2, n_embd=64
    )
    idx = torch.zeros(2, 8, dtype=torch.long)
    with counts.Storages() as storages:
        model = GPT(config).train()
        model(idx, idx)[1].backward()
        storages.peak = storages.now
        model(idx, idx)[1].backward()
    held = 2 * 4 * sum(w.numel() for w in model.parameters())
    assert counts.pass_bytes(config, 2) == pytest.approx(storages.peak - held, rel=0.02)


def test_the_documents_table_is_current():
    text = SWITCHES.read_text()
    shown = re.search(r"<!-- switches -->\n(.*)<!-- /switches -->", text, re.S)[1]
    assert shown.splitlines() == switches.table(), "python -m nanoswitch.switches table"


def test_every_choice_of_a_switch_has_a_row():
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
