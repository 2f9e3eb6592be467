"""Combinations of switches: any valid one trains, counts and comes back; those that cannot be say
why in one line."""

import math

import formulas
import pytest
import torch
from builders import documents, refused, tiny, write_step
from hypothesis import given, settings
from hypothesis import strategies as st

from model import GPT, MLPS, NORMS, POSITIONS, RESIDUAL_DTYPES
from nanoswitch import counts
from nanoswitch.optimizers import make_optimizers
from train_gpt2 import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def configs(draw):
    n_kv_head = draw(st.sampled_from([1, 2, 4]))
    n_head = n_kv_head * draw(st.sampled_from([1, 2, 3]))
    changes = dict(
        n_layer=draw(st.integers(1, 3)), n_head=n_head, n_kv_head=n_kv_head,
        n_embd=n_head * draw(st.sampled_from([4, 8])), block_size=draw(st.sampled_from([16, 32])),
        pos=draw(st.sampled_from(sorted(POSITIONS))), norm=draw(st.sampled_from(sorted(NORMS))),
        mlp=draw(st.sampled_from(sorted(MLPS))), bias=draw(st.booleans()),
        attention=draw(st.sampled_from(["full", "linformer"])),
        tie_embeddings=draw(st.booleans()), qk_norm=draw(st.booleans()),
        logit_softcap=draw(st.sampled_from([0.0, 15.0])), zero_init=draw(st.booleans()),
        residual_dtype=draw(st.sampled_from(RESIDUAL_DTYPES)),
        dropout=draw(st.sampled_from([0.0, 0.1])), linformer_segment=draw(st.integers(1, 9)),
    )  # fmt: skip
    if changes["attention"] == "full":
        changes["window"] = draw(st.sampled_from([0, 1, 5, 100]))
        changes["document_mask"] = draw(st.booleans())
        if changes["window"]:
            changes["window_pattern"] = draw(st.sampled_from(["", "SL", "SSSL"]))
    return tiny(**changes)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(configs())
def test_any_valid_config_trains_counts_and_comes_back(tmp_path_factory, config):
    torch.manual_seed(0)
    model, idx = GPT(config), documents(T=config.block_size)
    assert model.num_params() == formulas.parameters(config)
    assert counts.flops_per_token(model) == formulas.flops_per_token(config)
    [optimizer] = make_optimizers(model, TrainConfig(lr=1e-3))
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert (p.dim() >= 2) == (group["weight_decay"] > 0)
    _, loss = model(idx, idx.roll(-1, 1))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    optimizer.step()
    folder = tmp_path_factory.mktemp("step")
    again, _ = GPT.from_pretrained(write_step(folder, model))(idx)
    torch.testing.assert_close(again, model.eval()(idx)[0], rtol=0, atol=0)
    assert torch.isfinite(again).all()


# ----------------------------------------------------------------------------- refusals


REFUSED = [
    (dict(pos="rpoe"), ["pos", "rpoe", *POSITIONS]),
    (dict(norm="batch"), ["norm", "batch", *NORMS]),
    (dict(mlp="relu"), ["mlp", "relu", *MLPS]),
    *(
        ({name: value}, [name, value])
        for name in ("block_size", "vocab_size", "vocab_used", "n_layer", "n_head", "n_embd")
        for value in (0, -3)
    ),
    *(({name: -3}, [name, -3]) for name in ("n_kv_head", "mlp_hidden", "window")),
    *((dict(dropout=value), ["dropout", value]) for value in (1.0, -0.1, math.nan)),
    (dict(n_embd=30), ["n_embd 30", "n_head 4", "--n_embd 32"]),
    (dict(n_kv_head=3), ["n_head 4", "n_kv_head 3"]),
    (dict(n_kv_head=8), ["n_head 4", "n_kv_head 8"]),
    (dict(pos="rope", n_embd=12), ["rope", 3]),
    (dict(window=4, window_pattern="SXL"), ["window_pattern", "SXL"]),
    (dict(window_pattern="SL"), ["window_pattern", "--window"]),
    (dict(pos="rope", rope_theta=-1.0), ["rope_theta", -1.0]),
    (dict(pos="rope", rope_theta=0.0), ["rope_theta", 0.0]),
    (dict(norm_eps=-1.0), ["norm_eps", -1.0]),
]


@pytest.mark.parametrize("changes, words", REFUSED, ids=str)
def test_an_impossible_config_is_refused_in_one_line_with_its_values(changes, words):
    with refused(*words):
        tiny(**changes)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(pos="fire", attention_kernel="flash"), "flash knows only plain causal attention"),
        (dict(window=4, attention_kernel="flash"), "flash knows only plain causal attention"),
        (dict(document_mask=True, attention_kernel="flash"), "use auto"),
        (dict(attention="linformer", window=4), "drop window"),
        (dict(attention="linformer", document_mask=True), "drop window and document_mask"),
        (dict(attention="linformer", attention_kernel="flex"), "use auto"),
        (dict(attention_kernel="flex", dropout=0.1), "dropout"),
        (dict(attention="sparse"), "none of: full"),
        (dict(attention="linfromer"), "did you mean linformer?"),
        (dict(rope_scaling=0.0), "rope_scaling"),
        (dict(logit_softcap=-1.0), "logit_softcap"),
        (dict(attention="linformer", linformer_segment=0), "linformer_segment is 0"),
    ],
    ids=str,
)
def test_combinations_that_cannot_be_say_why_in_one_line(changes, words):
    with refused(words):
        tiny(**changes)
