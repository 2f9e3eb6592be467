"""Files of variants/ against the same in transformers: an attention or MLP each, with equal weights
on equal inputs, with and without a cache where that is what a variant is for."""

import math

import pytest
import torch
from builders import grown, tiny

from model import Carry
from nanoswitch.cache import KVCache

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
B, T, C, nh, hs = 2, 11, 32, 4, 8
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
X = torch.randn(B, T, C, generator=torch.Generator().manual_seed(5))


def layer(**changes):
    """One grown block's model."""
    return grown(tiny(**dict(n_layer=1, n_embd=C, bias=False, norm_eps=1e-6, pos="rope") | changes))


def ours(model, x=X):
    """What the layer's attention makes of x."""
    attn, wpe = model.transformer.h[0].attn, model.transformer.wpe
    pos = torch.arange(T)
    with torch.no_grad():
        return attn(x, wpe.rotation(pos), attn.mask(pos, wpe), None, Carry(None, None))


def causal(window=T):
    distance = torch.arange(T)[:, None] - torch.arange(T)
    hidden = (distance < 0) | (distance >= window)
    return torch.zeros(T, T).masked_fill(hidden, -math.inf)[None, None]


def theirs(attention, weights, config, rotary=None, x=X, window=T):
    """What their attention, a class, makes of x with these weights, {name: tensor}."""
    config._attn_implementation = "eager"
    module = attention(config, 0).eval()
    module.load_state_dict(weights)
    with torch.no_grad():
        inputs = {"attention_mask": causal(window)}
        if rotary is not None:
            inputs["position_embeddings"] = rotary(config)(x, torch.arange(T)[None])
        return module(x, **inputs)[0]


def close(got, want):
    assert want.abs().max() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def qkv(attn, nkv=nh, kind="weight"):
    """Our c_attn's rows -> {their name: rows}."""
    parts = getattr(attn.c_attn, kind).split((nh * hs, nkv * hs, nkv * hs))
    return {f"{n}_proj.{kind}": w for n, w in zip("qkv", parts, strict=True)}


@pytest.mark.parametrize("nkv, window", [(4, 0), (2, 4)])
def test_sinks_are_gpt_oss(nkv, window):
    from transformers.models.gpt_oss import modeling_gpt_oss as peer

    model = layer(attention="sinks", n_kv_head=nkv, window=window, bias=True)
    attn = model.transformer.h[0].attn
    config = transformers.GptOssConfig(
        hidden_size=C, num_attention_heads=nh, num_key_value_heads=nkv, head_dim=hs,
        num_hidden_layers=1, rope_parameters=DEFAULT, layer_types=["full_attention"],
    )  # fmt: skip
    weights = qkv(attn, nkv) | qkv(attn, nkv, "bias") | {"sinks": attn.sink}
    weights |= {f"o_proj.{n}": p for n, p in attn.c_proj.named_parameters()}
    want = theirs(
        peer.GptOssAttention, weights, config, peer.GptOssRotaryEmbedding, window=window or T
    )
    close(ours(model), want)


def test_gated_is_qwen3_nexts_with_partial_rope_as_it_has_it():
    """Its channels that turn are the first 4, in pairs (i, i + 2); ours are pairs (i, i + hs/2)."""
    from transformers.models.qwen3_next import modeling_qwen3_next as peer

    part = dict(pos="partial_rope", settings="partial_rope.part=0.5")
    model = layer(attention="gated", n_kv_head=2, qk_norm=True, **part)
    attn = model.transformer.h[0].attn
    eps = torch.finfo(torch.float32).eps  # F.rms_norm's own, which qk_norm takes
    config = transformers.Qwen3NextConfig(
        hidden_size=C, num_attention_heads=nh, num_key_value_heads=2, head_dim=hs, rms_norm_eps=eps,
        num_hidden_layers=1, rope_parameters=DEFAULT | {"partial_rotary_factor": 0.5},
    )  # fmt: skip
    weights, order = qkv(attn, 2), neox_order(2)
    q, gate = weights["q_proj.weight"].view(nh, hs, C)[:, order], attn.gate.weight.view(nh, hs, C)
    weights["q_proj.weight"] = torch.cat((q, gate), 1).flatten(0, 1)
    weights["k_proj.weight"] = weights["k_proj.weight"].view(2, hs, C)[:, order].flatten(0, 1)
    weights |= {f"{n}_norm.weight": torch.zeros(hs) for n in "qk"}  # of 1 + weight
    weights["o_proj.weight"] = attn.c_proj.weight
    want = theirs(peer.Qwen3NextAttention, weights, config, peer.Qwen3NextRotaryEmbedding)
    close(ours(model), want)


def neox_order(turning):
    """Of GPT-NeoX's channels of a head, the places of ours: there the pairs that turn come first,
    (i, i + turning)."""
    pairs = hs // 2
    a, b = list(range(pairs)), list(range(pairs, hs))
    return a[:turning] + b[:turning] + a[turning:] + b[turning:]


@pytest.mark.parametrize("part", [0.25, 0.5])
def test_partial_rope_is_gpt_neoxs(part):
    from transformers.models.gpt_neox import modeling_gpt_neox as peer

    model = layer(pos="partial_rope", settings=f"partial_rope.part={part}", bias=True)
    attn, order = model.transformer.h[0].attn, neox_order(int(part * hs / 2))
    config = transformers.GPTNeoXConfig(
        hidden_size=C, num_attention_heads=nh, num_hidden_layers=1,
        rope_parameters=DEFAULT | {"partial_rotary_factor": part},
    )  # fmt: skip
    weights = {f"dense.{n}": p for n, p in attn.c_proj.named_parameters()}
    for kind, p in attn.c_attn.named_parameters():
        q, k, v = p.view(3, nh, hs, -1)  # theirs has the three of each head side by side
        heads = torch.stack((q[:, order], k[:, order], v), dim=1)
        weights[f"query_key_value.{kind}"] = heads.reshape(p.shape)
    want = theirs(peer.GPTNeoXAttention, weights, config, peer.GPTNeoXRotaryEmbedding)
    close(ours(model), want)


@pytest.mark.parametrize("nkv", [4, 2])
def test_xsa_is_neommes_at_full_strength(nkv):
    from transformers.models.neomme import modeling_neomme as peer

    model = layer(attention="xsa", n_kv_head=nkv)
    attn, kept = model.transformer.h[0].attn, []
    attn.c_proj.register_forward_hook(lambda module, args, y: kept.append(args[0]))
    ours(model)
    plain = layer(n_kv_head=nkv).transformer.h[0].attn  # the same draws
    plain.c_proj.register_forward_hook(lambda module, args, y: kept.append(args[0]))
    with torch.no_grad():
        plain(X, model.transformer.wpe.rotation(torch.arange(T)), None)
        config = transformers.NeoMMEConfig(num_attention_heads=nh, num_key_value_heads=nkv)
        removed = peer.NeoMMEExclusiveSelfAttention(config)
        removed.alpha.fill_(20.0)  # tanh of it is 1
        v = plain.c_attn(X)[..., -nkv * hs :].view(B, T, nkv, hs).transpose(1, 2)
        want = removed(kept[1].view(B, T, nh, hs), v).flatten(2)
    close(kept[0], want)


def test_value_residual_is_resformers_in_llama():
    """The authors' line in their copy of transformers' Llama: 0.5 first + 0.5 own values."""
    model = grown(tiny(n_layer=3, n_embd=C, bias=False, pos="rope", norm="rmsnorm", mlp="swiglu",
                       attention="value_residual", tie_embeddings=False))  # fmt: skip
    for block in model.transformer.h[1:]:
        torch.nn.init.constant_(block.attn.mix.weight, 0.5)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=C, num_attention_heads=nh, num_hidden_layers=3, vocab_size=61,
        intermediate_size=model.config.mlp_hidden, rms_norm_eps=1e-5, rope_parameters=DEFAULT,
    )).eval()  # fmt: skip
    part, first = model.transformer, []
    weights = {"model.embed_tokens.weight": part.wte.weight, "model.norm.weight": part.ln_f.weight}
    weights["lm_head.weight"] = model.lm_head.weight
    for i, (block, their) in enumerate(zip(part.h, llama.model.layers, strict=True)):
        gate, up = block.mlp.c_fc.weight.chunk(2)
        own = {"input_layernorm.weight": block.ln_1.weight, "mlp.gate_proj.weight": gate}
        own |= {"post_attention_layernorm.weight": block.ln_2.weight, "mlp.up_proj.weight": up}
        own |= {"mlp.down_proj.weight": block.mlp.c_proj.weight}
        own |= {f"self_attn.{name}": w for name, w in qkv(block.attn).items()}
        own |= {"self_attn.o_proj.weight": block.attn.c_proj.weight}
        weights |= {f"model.layers.{i}.{name}": w for name, w in own.items()}

        def mix(module, args, v, i=i):
            first.append(v)
            return 0.5 * first[0] + 0.5 * v if i else v

        their.self_attn.v_proj.register_forward_hook(mix)
    llama.load_state_dict(weights)
    idx = torch.randint(53, (B, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        close(model(idx)[0], llama(idx).logits)


@pytest.mark.parametrize("nkv", [4, 2])
def test_differential_is_diffllamas(nkv):
    from transformers.models.diffllama import modeling_diffllama as peer

    model = layer(attention="differential", n_kv_head=nkv)
    attn = model.transformer.h[0].attn
    torch.nn.init.ones_(attn.norm.weight)  # theirs has none
    config = transformers.DiffLlamaConfig(
        hidden_size=C, num_attention_heads=nh, num_key_value_heads=nkv, num_hidden_layers=1,
        rms_norm_eps=1e-6, rope_parameters=DEFAULT,
    )  # fmt: skip
    weights = qkv(attn, nkv) | {"o_proj.weight": attn.c_proj.weight}
    names = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
    weights |= dict(zip(names, attn.scale.weight, strict=True))
    want = theirs(peer.DiffLlamaAttention, weights, config, peer.DiffLlamaRotaryEmbedding)
    close(ours(model), want)


def test_gated_deltanet_is_qwen3_nexts():
    from transformers.models.qwen3_next import modeling_qwen3_next as peer

    model = layer(attention="gated_deltanet", pos="none")
    attn = model.transformer.h[0].attn
    config = transformers.Qwen3NextConfig(
        hidden_size=C, num_hidden_layers=1, linear_num_key_heads=nh, linear_num_value_heads=nh,
        linear_key_head_dim=hs, linear_value_head_dim=hs, rms_norm_eps=1e-6, hidden_act="silu",
    )  # fmt: skip
    # theirs has all that belongs to a head side by side
    parts = [*attn.c_attn.weight.view(3, nh, hs, C), attn.gate.weight.view(nh, hs, C)]
    a, b = attn.gates.weight.view(2, nh, 1, C)
    weights = {
        "in_proj_qkvz.weight": torch.cat(parts, dim=1).flatten(0, 1),
        "in_proj_ba.weight": torch.cat((b, a), dim=1).flatten(0, 1),
        "conv1d.weight": attn.conv.weight[:, None], "dt_bias": attn.fade.b,
        "A_log": attn.fade.A, "norm.weight": attn.norm.weight,
        "out_proj.weight": attn.c_proj.weight,
    }  # fmt: skip
    module = peer.Qwen3NextGatedDeltaNet(config, 0).eval()
    module.load_state_dict(weights)
    with torch.no_grad():
        close(ours(model), module(X))


@pytest.mark.parametrize("latent, rope", [(0, 0), (12, 2)])
def test_mla_is_deepseeks(latent, rope):
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as peer

    model = layer(attention="mla", settings=f"mla.latent={latent},mla.rope={rope}")
    attn, latent, rope = model.transformer.h[0].attn, latent or 4 * hs, rope or hs // 2
    config = transformers.DeepseekV3Config(
        hidden_size=C, num_attention_heads=nh, num_key_value_heads=nh, num_hidden_layers=1,
        q_lora_rank=None, kv_lora_rank=latent, qk_rope_head_dim=rope, v_head_dim=hs,
        qk_nope_head_dim=hs, rope_interleave=False, rope_parameters=DEFAULT,
    )  # fmt: skip
    q, kv = attn.c_attn.weight.split((nh * (hs + rope), latent + rope))
    weights = {
        "q_proj.weight": q, "kv_a_proj_with_mqa.weight": kv, "kv_a_layernorm.weight":
        attn.norm.weight, "kv_b_proj.weight": attn.up.weight, "o_proj.weight": attn.c_proj.weight,
    }  # fmt: skip
    want = theirs(peer.DeepseekV3Attention, weights, config, peer.DeepseekV3RotaryEmbedding)
    close(ours(model), want)
    # token by token, on the latents themselves
    cache, pos, found = KVCache(model, T), torch.arange(T), []
    with torch.no_grad():
        for t in range(T):
            cache.advance(pos[t : t + 1])
            rotation, held = model.transformer.wpe.rotation(pos[t : t + 1]), cache.layers[0]
            mask = attn.mask(pos[t : t + 1], model.transformer.wpe, None, held)
            found.append(attn(X[:, t : t + 1], rotation, mask, held))
    close(torch.cat(found, dim=1), want)
    assert [x.shape for x in held.tensors] == [(B, 1, T, latent), (B, 1, T, rope)]


@pytest.mark.parametrize("factor, trained, theta", [(4, 512, 1e4), (16, 4096, 5e5), (1, 512, 1e4)])
def test_yarns_angles_are_transformers(factor, trained, theta):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=4 * 64, num_attention_heads=4, max_position_embeddings=factor * trained,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": theta, "factor": float(factor),
            "original_max_position_embeddings": trained,
        },
    )  # fmt: skip
    turns, scale = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    sizes = dict(n_embd=4 * 64, block_size=factor * trained)
    own = tiny(**sizes, pos="yarn", rope_theta=theta, rope_scaling=float(factor))
    pos = torch.arange(0, 64)
    cos, sin = grown(own, std=0.0).transformer.wpe.rotation(pos)
    angle = pos[:, None] * turns
    torch.testing.assert_close(cos, angle.cos() * scale, rtol=0, atol=2e-5)
    torch.testing.assert_close(sin, angle.sin() * scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize("active, shared", [(3, 1), (1, 2)])
def test_moe_is_deepseek_v3s(active, shared):
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as peer

    settings = f"moe.experts=6,moe.active={active},moe.shared={shared}"
    mlp = layer(mlp="moe", settings=settings).transformer.h[0].mlp
    hidden = mlp.c_proj.weight.size(1)
    config = transformers.DeepseekV3Config(
        hidden_size=C, n_routed_experts=6, num_experts_per_tok=active, n_shared_experts=shared,
        moe_intermediate_size=hidden, n_group=1, topk_group=1, routed_scaling_factor=1.0,
    )  # fmt: skip
    config._experts_implementation = "eager"
    module = peer.DeepseekV3MoE(config).eval()
    gate, up = mlp.shared.c_fc.weight.chunk(2)
    module.load_state_dict({
        "gate.weight": mlp.router.weight, "gate.e_score_correction_bias": mlp.balance.bias,
        "experts.gate_up_proj": mlp.c_fc.weight.transpose(1, 2),
        "experts.down_proj": mlp.c_proj.weight.transpose(1, 2),
        "shared_experts.gate_proj.weight": gate, "shared_experts.up_proj.weight": up,
        "shared_experts.down_proj.weight": mlp.shared.c_proj.weight,
    })  # fmt: skip
    with torch.no_grad():
        close(mlp(X), module(X))
