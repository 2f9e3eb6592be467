"""The weights that a model begins with: GPT-2's, and one seed's in every variant."""

import math

import pytest
import torch
from builders import tiny

from model import GPT, MLPS, NORMS, POSITIONS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("mlp", MLPS)
def test_initial_weights_are_gpt2s(mlp):
    torch.manual_seed(0)
    model = GPT(tiny(mlp=mlp, n_embd=192, n_layer=3, block_size=100, tie_embeddings=False))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif ".ln_" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 3) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.04), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name


def fresh(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(tiny(**changes)).state_dict()


VARIANTS = [
    *({"pos": pos} for pos in POSITIONS),
    *({"norm": norm} for norm in NORMS),
    *({"mlp": mlp} for mlp in MLPS),
    {"n_kv_head": 1},
    {"bias": False},
    {"tie_embeddings": False},
    {"window": 3},
    {"dropout": 0.5},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_variants_at_one_seed_share_their_common_weights(changes):
    base, variant = fresh(), fresh(**changes)
    tied = {"lm_head.weight"} if not changes.get("tie_embeddings", True) else set()
    common = [
        n for n in base if n in variant and base[n].shape == variant[n].shape and n not in tied
    ]
    assert {"transformer.wte.weight", "transformer.h.0.attn.c_proj.weight"} <= set(common)
    for name in common:
        assert torch.equal(base[name], variant[name]), name


def test_seeds_and_layers_draw_different_weights():
    one, two = fresh(0), fresh(1)
    name = "transformer.h.{}.attn.c_attn.weight"
    assert not torch.equal(one[name.format(0)], one[name.format(1)])
    assert not torch.equal(one[name.format(0)], two[name.format(0)])
    untied = fresh(tie_embeddings=False)
    assert not torch.equal(untied["lm_head.weight"], untied["transformer.wte.weight"])


def test_zero_init_starts_every_block_as_the_identity():
    torch.manual_seed(0)
    model = GPT(tiny(zero_init=True))
    x = torch.randn(1, 5, 16)
    assert torch.equal(model.transformer.h[0](x, None, None), x)
    torch.manual_seed(0)
    plain = GPT(tiny()).state_dict()
    for name, w in model.state_dict().items():
        assert torch.equal(w, plain[name]) or name.endswith("c_proj.weight")
