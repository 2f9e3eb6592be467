"""torch.compile: no graph breaks, and compiled code that computes what eager code does."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from builders import assert_same_gradients, documents, gradients, grown, tiny, tokens
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from model import POSITIONS
from nanoswitch import compiled
from nanoswitch.cache import KVCache

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_compiled_equals_eager(config, B=3, T=9, **options):
    torch._dynamo.reset()
    model = grown(config)
    compiled = torch.compile(model, fullgraph=True, **options)
    idx, targets = tokens(config, B, T), tokens(config, B, T, seed=2)
    want, loss = model(idx, targets)[1], compiled(idx, targets)[1]
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(model, loss), gradients(model, want), rtol=1e-3)


@pytest.mark.parametrize("pos", POSITIONS)
def test_no_graph_breaks(pos):
    """Traced whole, loss included, and run as traced; what the compiler then makes of it is for
    the slow tests below."""
    config = tiny(pos=pos, n_layer=1, mlp="swiglu", n_kv_head=2, window=3)
    assert_compiled_equals_eager(config, backend="eager")


def test_a_second_length_is_traced_too():
    """The compiler then takes the length for a symbol."""
    torch._dynamo.reset()
    model = grown(tiny(pos="rope"))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for T in (9, 7, 12):
        idx = tokens(model.config, 2, T)
        torch.testing.assert_close(compiled(idx)[0], model(idx)[0], rtol=1e-5, atol=1e-5)


WHOLE_GRAPHS = [  # the encodings are above
    dict(pos="rope", n_kv_head=2, mlp="swiglu", norm="rmsnorm", bias=False),
    dict(pos="fire", window=4, window_pattern="SL"),
    dict(attention="linformer", linformer_segment=8, linformer_rank=2),
    dict(document_mask=True, mlp="relu2", dropout=0.1),
    dict(qk_norm=True, logit_softcap=5.0, attention_kernel="math"),
    dict(pos="rope", attention_kernel="flash", tie_embeddings=False),
]


@pytest.mark.parametrize("changes", WHOLE_GRAPHS, ids=str)
def test_training_evaluation_and_sampling_are_whole_graphs(changes):
    torch._dynamo.reset()
    model, idx = grown(tiny(n_layer=1, **changes)), documents()
    # fullgraph raises at a graph break; the "eager" backend leaves code generation out
    compiled = torch.compile(model.train(), fullgraph=True, backend="eager")
    compiled(idx, idx)[1].backward()
    model.eval()
    with torch.no_grad():
        compiled(idx, idx)
        features = torch.compile(model.features, fullgraph=True, backend="eager")
        cache, want = KVCache(model, 12), model.features(idx[:, :12])
        chunks = idx[:, :9], idx[:, 9:10], idx[:, 10:11], idx[:, 11:12]
        got = [features(chunk, cache) for chunk in chunks]
        torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("train", [True, False])
def test_a_compiled_graph_never_sees_the_logits(train, monkeypatch):
    """What the compiler sees it may keep: the loss is one operator, and no tensor of the graph is
    as large as a chunk's logits."""
    torch._dynamo.reset()
    model, graphs = grown(tiny(n_layer=1, vocab_size=997)), []
    V, B, T = model.config.vocab_size, 5, 16
    monkeypatch.setattr("nanoswitch.loss.CHUNK_BYTES", 20 * V * 4)  # 4 chunks

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    idx = tokens(model.config, B, T)
    with torch.set_grad_enabled(train):
        want, loss = model(idx, idx)[1], compiled(idx, idx)[1]
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    if train:
        assert_same_gradients(gradients(model, loss), gradients(model, want), rtol=1e-3)
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    own = [node for node in nodes if str(node.target).startswith("nanoswitch.")]
    assert len(graphs) == 1 + train and len(own) == 1
    weights = max(p.numel() for p in model.parameters())
    made = [node.meta["val"] for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert 20 * V > weights >= max(x.numel() for x in made)


@pytest.mark.parametrize(
    "changes, fails, tries",
    [
        (dict(window=3), lambda flex: flex, [True, False]),
        (dict(document_mask=True), lambda flex: True, [True, False]),
        (dict(window=3), lambda flex: False, [True]),
        (dict(), lambda flex: True, [True]),
        (dict(window=3, attention_kernel="math"), lambda flex: True, [True]),
        # where no layer takes it, it cannot be the reason
        (dict(window=3, dropout=0.1), lambda flex: True, [True]),
        (dict(window=3, pos="kerple"), lambda flex: True, [True]),
        (dict(window=3, n_head=16), lambda flex: True, [True]),
    ],
)
def test_a_card_that_fails_at_flex_attention_compiles_without(
    changes, fails, tries, monkeypatch, capsys
):
    model, seen = grown(tiny(**dict(n_embd=64) | changes)), []

    def failure(trainer, forward):
        flex = {block.attn.may_flex for block in model.transformer.h}
        seen.extend(flex)
        return "it broke" if fails(*flex) else ""

    monkeypatch.setattr(compiled, "failure", failure)
    ranks = SimpleNamespace(sum=lambda x: [float(x)])
    trainer = SimpleNamespace(
        model=model, model_config=model.config, device=torch.device("cuda"), ranks=ranks,
        config=SimpleNamespace(compile="auto"),
    )  # fmt: skip
    forward = compiled.compiled(trainer)
    assert seen == tries and (forward is model) == fails(tries[-1])
    words = ["FlexAttention", "it"][-len(tries) :][: sum(map(fails, tries))]
    assert capsys.readouterr().out.splitlines() == [
        f"torch.compile does not work here (it broke): training without {word}" for word in words
    ]


# ----------------------------------------------------------------------------- a C++ compiler


def cpp_compiler():
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        pytest.skip("torch.compile on a CPU needs a C++ compiler, none is on the PATH")


COMPILED = [
    {"mlp": "swiglu", "n_kv_head": 2, "window": 3, "window_pattern": "SL"},
    {"mlp": "relu2", "norm": "rmsnorm", "bias": False, "tie_embeddings": False},
    {},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", COMPILED, ids=str)
@pytest.mark.parametrize("pos", POSITIONS)
def test_compiled_code_computes_the_same(pos, changes):
    cpp_compiler()
    assert_compiled_equals_eager(tiny(pos=pos, **changes))


@pytest.mark.slow
def test_compiled_loss_of_several_chunks_and_compiled_logits(monkeypatch):
    cpp_compiler()
    config = tiny(block_size=100, pos="rope")
    monkeypatch.setattr("nanoswitch.loss.CHUNK_BYTES", 400 * 4 * config.vocab_size)  # 3 chunks
    assert_compiled_equals_eager(config, B=11, T=100)
    model, idx = grown(config), tokens(config, 2, 9)
    logits = torch.compile(model, fullgraph=True)(idx)[0]
    torch.testing.assert_close(logits, model(idx)[0], rtol=1e-4, atol=1e-4)


def test_a_compiler_that_is_not_used_is_named(capsys):
    model, mps = object(), torch.device("mps")
    for asked, said in (("auto", ""), ("true", "torch.compile is not used on mps")):
        trainer = SimpleNamespace(config=SimpleNamespace(compile=asked), device=mps, model=model)
        assert compiled.compiled(trainer) is model
        assert said in capsys.readouterr().out if said else not capsys.readouterr().out
