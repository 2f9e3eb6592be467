"""decode.py's decoders, in half precision and recorded, against whole passes of the model."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from builders import MASKS, documents, grown, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import POSITIONS
from nanoswitch import decode
from nanoswitch.cache import KVCache

pytestmark = pytest.mark.usefixtures("one_thread")


def decoder(model):
    """What sample.py gives GPT.stream, for any dtype."""
    return partial(decode.decode_step, model)


@pytest.mark.parametrize("pos", POSITIONS)
def test_a_decoder_in_another_dtype_takes_over_after_the_prompt(pos):
    model = grown(tiny(pos=pos, block_size=32, window=9, document_mask=True))
    fine, idx = copy.deepcopy(model).double(), documents()[:, :12]
    want = fine.generate(idx, 15, temperature=0, use_cache=False)
    assert torch.equal(model.generate(idx, 15, temperature=0, decoder=decoder(fine)), want)
    coarse = copy.deepcopy(model)
    for p in coarse.parameters():  # one that surely says something else shows that it is asked
        p.data *= -1
    assert not torch.equal(model.generate(idx, 15, temperature=0, decoder=decoder(coarse)), want)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(pos="rope", mlp="swiglu", bias=False, n_kv_head=2, tie_embeddings=False),
        dict(pos="fire", window=5, window_pattern="SL", document_mask=True),
        dict(attention="linformer", linformer_segment=4, linformer_rank=2),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_half_precision_decoder_says_what_whole_passes_say(changes):
    model, idx = grown(tiny(**changes), std=0.1), documents()
    cache = KVCache(model, 23)
    model.next_logits(idx[:, :9], cache)
    step = decode.decoder(model, torch.bfloat16, rows=2)(cache)  # -> logits
    for t in range(9, 23):
        want = model(idx[:, : t + 1])[0][:, -1, : model.config.vocab_used]
        got = step(idx[:, t : t + 1])
        assert (got - want).abs().max() < 0.03 * want.abs().max()


# ----------------------------------------------------------------------------- recorded steps


class Recorder(TorchDispatchMode):
    """decode.record on a CPU. Like a CUDA graph, what it records is kernels alone: their results
    come to lie where they first did, Python does not run again, and no value reaches it."""

    HOST = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default)

    def __init__(self, step, device, generator):
        super().__init__()
        self.calls = []
        with self:
            self.result = step()

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        assert kernel not in self.HOST, "a value would leave the device, or come from the host"
        out = kernel(*args, **(kwargs or {}))
        self.calls.append((kernel, args, kwargs or {}, out))
        return out

    @torch.inference_mode()  # as in the step: what is made in it may be written only there
    def __call__(self):
        for kernel, args, kwargs, out in self.calls:
            again = kernel(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return self.result


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(decode, "record", Recorder)
    monkeypatch.setattr(decode, "decode_step", decode.GraphedStep)


@pytest.mark.parametrize("changes", [c for c in MASKS if "attention" not in c], ids=str)
def test_a_recorded_step_decodes_as_whole_passes_do(changes, recorded):
    config = tiny(**changes)
    model, idx = grown(config), documents()[:, :7]
    new = 16 if POSITIONS[config.pos].extrapolates else config.block_size - 7
    want = model.generate(idx, new, temperature=0, use_cache=False)
    assert torch.equal(model.generate(idx, new, temperature=0, decoder=decoder(model)), want)


@pytest.mark.parametrize("pos", ["rope", "alibi"])
def test_all_layers_of_a_recorded_step_read_one_mask_of_floats(pos, recorded, monkeypatch):
    """On a card each launch counts, and torch would make floats of it in every layer."""
    attend, masks = torch.nn.functional.scaled_dot_product_attention, []

    def watched(q, k, v, attn_mask=None, **flags):
        masks.append(attn_mask)
        assert attn_mask.dtype == q.dtype
        return attend(q, k, v, attn_mask=attn_mask, **flags)

    model = grown(tiny(pos=pos, n_layer=3))
    cache = KVCache(model, 16)
    model.next_logits(documents()[:, :7], cache)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    decoder(model)(cache)
    assert len(masks) == 3 and len({mask.data_ptr() for mask in masks}) == 1


DRAWS = [dict(), dict(top_k=5), dict(temperature=0.7, top_p=0.8), dict(top_k=9, top_p=0.5)]


def assert_the_same_draws(model, idx, options):
    """A recorded step draws what the model itself does without one, from the same seed."""
    texts, device = [], idx.device
    for fast in (None, decoder(model), decoder(model)):
        generator = torch.Generator(device).manual_seed(len(texts) // 2)
        texts.append(model.generate(idx, 14, **options, generator=generator, decoder=fast))
        after = torch.rand(3, generator=generator, device=device)
        texts[-1] = torch.cat((texts[-1].flatten(), after))  # nor did it draw more
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[1], texts[2])


@pytest.mark.parametrize("options", DRAWS, ids=str)
def test_a_recorded_step_draws_as_the_model_itself_does(options, recorded):
    model = grown(tiny(pos="rope", window=9, n_kv_head=2), std=0.1)
    assert_the_same_draws(model, documents()[:, :7], options)


@pytest.mark.gpu
@pytest.mark.parametrize("options", DRAWS, ids=str)
@pytest.mark.filterwarnings("error:no CUDA graph")
def test_a_cuda_graph_draws_as_the_model_itself_does(options):
    model = grown(tiny(pos="rope", window=9, n_kv_head=2), std=0.1).cuda()
    assert_the_same_draws(model, documents()[:, :7].cuda(), options)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", MASKS, ids=str)
@pytest.mark.filterwarnings("error:no CUDA graph")
def test_a_cuda_graph_decodes_as_whole_passes_do(changes):
    model, idx = grown(tiny(**changes)).cuda(), documents()[:, :7].cuda()
    want = model.generate(idx, 16, temperature=0, use_cache=False)
    assert torch.equal(model.generate(idx, 16, temperature=0, decoder=decoder(model)), want)


def test_where_nothing_can_be_recorded_decoding_goes_on_without(monkeypatch):
    def fails(*args):
        raise RuntimeError("not permitted\nwhen capturing")

    monkeypatch.setattr(decode, "GraphedStep", fails)
    model, on_card = grown(tiny()), torch.device("cuda")
    cache = SimpleNamespace(device=on_card, to=lambda dtype: None)
    with pytest.warns(UserWarning, match="no CUDA graph .not permitted when capturing.: decoding"):
        step = decode.decode_step(model, cache)
    assert step.func == decode.in_own_dtype and step.args == (model, cache, decode.same)
    assert not cache.static


def test_a_recorded_step_still_knows_the_models_last_position(recorded):
    model, idx = grown(tiny(block_size=12)), documents()[:, :8]
    with pytest.raises(ValueError, match="13 tokens are more than block_size 12"):
        model.generate(idx, 6, temperature=0, decoder=decoder(model))
    full = documents()[:, :12]
    with pytest.raises(ValueError, match="13 tokens are more than block_size 12"):
        model.generate(full, 2, temperature=0, decoder=decoder(model))
    whole = model.generate(full, 1, temperature=0, decoder=decoder(model))
    assert torch.equal(whole, model.generate(full, 1, temperature=0, use_cache=False))
