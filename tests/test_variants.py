"""Each file of variants/ against its paper's formula, written out here token by token and head by
head, with no line of the variant's."""

import cmath
import itertools
import math

import pytest
import torch
from builders import grown, refused, tiny, tokens

from model import GPT, NORMS, POSITIONS, rotate
from nanoswitch import counts, surgery
from nanoswitch.cache import KVCache
from nanoswitch.operators import gated_delta_rule, grouped_product
from nanoswitch.optimizers import decays, make_optimizers
from train_gpt2 import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")
IDX = tokens(tiny(), 2, 9)
nh, hs = 4, 4


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def norm(x, ln):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return x * ln.weight + ln.bias


def linear(x, layer):
    return x @ layer.weight.T + layer.bias


def split(x):
    """(T, C) -> one (T, hs) a head."""
    return [x[:, h * hs : h * hs + hs] for h in range(x.size(1) // hs)]


def attend(q, k, v):
    """One head, (T, hs) each."""
    rows = []
    for t in range(len(q)):
        weights = torch.softmax(k[: t + 1] @ q[t] / math.sqrt(q.size(1)), 0)
        rows.append(weights @ v[: t + 1])
    return torch.stack(rows)


def full(x, attn):
    """What the heads of plain attention find in x (T, C), side by side."""
    q, k, v = linear(x, attn.c_attn).split(nh * hs, dim=1)
    return torch.cat([attend(*head) for head in zip(*map(split, (q, k, v)), strict=True)], 1)


def gelu_mlp(x, mlp):
    x = linear(x, mlp.c_fc)
    x = x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return linear(x, mlp.c_proj)


def branches(block):
    """A plain block's two branches, functions of (T, C) with their norms."""
    return (
        lambda x: linear(full(norm(x, block.ln_1), block.attn), block.attn.c_proj),
        lambda x: gelu_mlp(norm(x, block.ln_2), block.mlp),
    )


def check(model, stream, idx=IDX):
    """stream(x, blocks): embeddings (T, C) -> what the last norm reads; against all logits."""
    part = model.transformer
    with torch.no_grad():
        got = model(idx)[0]
        for row, ids in zip(got, idx, strict=True):
            x = stream(part.wte.weight[ids], part.h)
            close(row, norm(x, part.ln_f) @ model.lm_head.weight.T)


def make(**changes):
    return grown(tiny(**dict(n_layer=4, pos="none") | changes))


def plain(x, blocks):
    for block in blocks:
        for branch in branches(block):
            x = x + branch(x)
    return x


def test_the_formulas_hold_for_the_baseline():
    check(make(), plain)


# ----------------------------------------------------------------------------- residual streams


@pytest.mark.parametrize("tokens_, weight", [(2, 1.0), (3, 0.5)])
def test_mtp_trains_heads_of_a_block_each_on_the_tokens_after_the_next(tokens_, weight):
    """All gradients are those of the sum of the losses; the loss is the next token's."""
    model = make(residual="mtp", settings=f"mtp.tokens={tokens_},mtp.weight={weight}")
    check(model, plain)  # the logits know nothing of it
    targets = IDX.roll(-1, 1)
    targets[0, 4] = targets[1, -1] = -1
    _, loss = model(IDX, targets)
    loss.backward()
    part, losses = model.transformer, {i: [] for i in range(tokens_)}
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for ids, row in zip(IDX, targets, strict=True):
        z = plain(part.wte.weight[ids], part.h[:-1])
        for i, block in enumerate([part.h[-1], *part.h[-1].residual.heads]):
            logp = torch.log_softmax(norm(plain(z, [block]), part.ln_f) @ part.wte.weight.T, -1)
            for t, target in enumerate(row[i:].tolist()):
                losses[i] += [-logp[t, target]] if target >= 0 else []
    means = [torch.stack(of).mean() for of in losses.values()]
    (means[0] + weight * sum(means[1:])).backward()
    close(loss, means[0])
    for name, p in model.named_parameters():
        close(got[name], p.grad)


def test_mtp_costs_a_block_and_an_output_more_in_training_alone():
    configs = tiny(residual="mtp", settings="mtp.tokens=3"), tiny()
    more, less = map(counts.on_meta, configs)
    C, T, V = less.config.n_embd, less.config.block_size, less.config.vocab_size
    block = 12 * C * C + 13 * C
    assert more.num_params() - less.num_params() == 2 * block
    more_flops, flops = map(counts.flops_per_token, (more, less))
    assert more_flops - flops == 6 * 2 * (block + 2 * T * C + V * C)
    assert counts.kv_bytes_per_token(more) == counts.kv_bytes_per_token(less)
    with refused("mtp.tokens must be 2 or more"):
        tiny(residual="mtp", settings="mtp.tokens=1")


def test_x0_is_the_embedding_carried_along():
    def stream(x, blocks):
        x0 = x
        for block in blocks:
            a, b = block.residual.mix
            x = a * x + b * x0
            for branch in branches(block):
                x = x + branch(x)
        return x

    check(make(residual="x0"), stream)
    start = tiny(residual="x0", settings="x0.start=0.5")
    assert torch.equal(grown(start, std=0.0).transformer.h[1].residual.mix, torch.tensor([1, 0.5]))


@pytest.mark.parametrize("n_layer, pairs", [(4, {2: 1, 3: 0}), (5, {3: 1, 4: 0}), (1, {})])
def test_unet_skips_go_from_the_first_half_to_the_second(n_layer, pairs):
    def stream(x, blocks):
        outputs = []
        for i, block in enumerate(blocks):
            if i in pairs:
                x = x + block.residual.skip * outputs[pairs[i]]
            for branch in branches(block):
                x = x + branch(x)
            outputs.append(x)
        return x

    check(make(residual="unet", n_layer=n_layer), stream)


@pytest.mark.parametrize("streams", [1, 3])
def test_hyper_connections_read_and_write_streams(streams):
    """Zhu et al. 2024, eq. 2 to 5 with the dynamic parts of eq. 10 to 13."""

    def stream(x, blocks):
        result = []
        H = [[token.clone() for _ in range(streams)] for token in x]  # H[t][i]
        for block in blocks:
            places = (block.residual.attn, block.residual.mlp)
            for connect, branch in zip(places, branches(block), strict=True):
                mixes, inputs = [], []
                for token in H:
                    rows = []
                    for i, h in enumerate(token):
                        level = (h - h.mean()) / (h.var(correction=0) + 1e-5).sqrt()
                        dynamic = torch.tanh(connect.dynamic.weight @ level)
                        rows.append(connect.static[i] + connect.scale * dynamic)
                    mixes.append(rows)
                    inputs.append(sum(rows[i][0] * token[i] for i in range(streams)))
                found = branch(torch.stack(inputs))
                for t, rows in enumerate(mixes):
                    H[t] = [
                        sum(rows[i][1 + j] * H[t][i] for i in range(streams))
                        + rows[j][1 + streams] * found[t]
                        for j in range(streams)
                    ]
        for token in H:
            result.append(sum(token))
        return torch.stack(result)

    check(make(residual="hyper", settings=f"hyper.streams={streams}"), stream)


def test_hyper_connections_begin_as_a_plain_stream():
    small = dict(n_layer=3, norm_eps=1e-12)  # the last norm then does not see that streams add up
    torch.manual_seed(0)
    hyper = GPT(tiny(residual="hyper", **small))
    torch.manual_seed(0)
    close(hyper(IDX)[0], GPT(tiny(**small))(IDX)[0])
    for i, block in enumerate(hyper.transformer.h):
        picked = [c.static[:, 0].argmax().item() for c in (block.residual.attn, block.residual.mlp)]
        assert picked == [2 * i % 4, (2 * i + 1) % 4]


# ----------------------------------------------------------------------------- attention


def heads_with(own):
    """A stream whose attention is own(normed x, block's attention) before c_proj."""

    def stream(x, blocks):
        for block in blocks:
            x = x + linear(own(norm(x, block.ln_1), block.attn), block.attn.c_proj)
            x = x + branches(block)[1](x)
        return x

    return stream


def test_value_residual_mixes_the_first_layers_values():
    """ResFormer, eq. 4 with learned numbers: all later layers take layer 1's values."""

    def stream(x, blocks):
        first = None
        for block in blocks:
            q, k, v = linear(norm(x, block.ln_1), block.attn.c_attn).split(nh * hs, dim=1)
            if first is None:
                first = v
            else:
                a, b = block.attn.mix.weight
                v = a * v + b * first
            found = [attend(*head) for head in zip(*map(split, (q, k, v)), strict=True)]
            x = x + linear(torch.cat(found, 1), block.attn.c_proj)
            x = x + branches(block)[1](x)
        return x

    model = make(attention="value_residual")
    check(model, stream)
    assert model.transformer.h[0].attn.mix is None
    start = grown(tiny(attention="value_residual"), std=0.0)
    assert torch.equal(start.transformer.h[1].attn.mix.weight, torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("per_head", [False, True])
def test_gated_attention_is_the_heads_result_times_a_sigmoid_of_the_input(per_head):
    """Qiu et al. 2025, eq. 5 at position G1: elementwise, or one gate a head."""

    def own(x, attn):
        gate = 1 / (1 + torch.exp(-(x @ attn.gate.weight.T)))
        if per_head:
            gate = torch.cat([gate[:, h : h + 1].expand(-1, hs) for h in range(nh)], 1)
        return full(x, attn) * gate

    check(make(attention="gated", settings=f"gated.per_head={per_head}".lower()), heads_with(own))


def test_xsa_leaves_nothing_along_a_tokens_own_value():
    def own(x, attn):
        rows = []
        for y, v in zip(split(full(x, attn)), split(linear(x, attn.c_attn)[:, 32:]), strict=True):
            rows.append(torch.stack([a - (a @ b) / (b @ b) * b for a, b in zip(y, v, strict=True)]))
        return torch.cat(rows, 1)

    model = make(attention="xsa")
    assert nh * hs * 2 == 32
    check(model, heads_with(own))
    kept = []
    model.transformer.h[2].attn.c_proj.register_forward_hook(lambda m, a, y: kept.append(a[0]))
    inputs = []
    model.transformer.h[2].attn.c_attn.register_forward_hook(lambda m, a, y: inputs.append(y))
    with torch.no_grad():
        model(IDX)
    y, v = (x.view(2, 9, nh, hs) for x in (kept[0], inputs[0][..., 32:]))
    assert ((y * v).sum(-1).abs() < 1e-4 * v.norm(dim=-1) * (1 + y.norm(dim=-1))).all()


def test_sinks_are_a_logit_more_that_brings_no_value():
    def own(x, attn):
        qkv, heads = linear(x, attn.c_attn).split(nh * hs, dim=1), []
        for h, (q, k, v) in enumerate(zip(*map(split, qkv), strict=True)):
            rows = []
            for t in range(len(q)):
                e = torch.exp(k[: t + 1] @ q[t] / math.sqrt(hs))
                rows.append(e @ v[: t + 1] / (e.sum() + torch.exp(attn.sink[h])))
            heads.append(torch.stack(rows))
        return torch.cat(heads, 1)

    check(make(attention="sinks"), heads_with(own))


def test_value_embeddings_are_looked_up_by_the_token():
    def stream(ids):
        def run(x, blocks):
            for block in blocks:
                q, k, v = linear(norm(x, block.ln_1), block.attn.c_attn).split(nh * hs, dim=1)
                a, b = block.attn.mix.weight
                v = a * v + b * torch.stack([block.attn.table.weight[i] for i in ids])
                found = [attend(*head) for head in zip(*map(split, (q, k, v)), strict=True)]
                x = x + linear(torch.cat(found, 1), block.attn.c_proj)
                x = x + branches(block)[1](x)
            return x

        return run

    model = make(attention="value_embedding")
    for row in IDX:
        check(model, stream(row), row[None])
    decayed = decays(model)
    assert not decayed["transformer.h.0.attn.table.weight"]
    few = tiny(n_layer=4, attention="value_embedding", attention_pattern="full,value_embedding")
    names = [name for name, _ in GPT(few).named_parameters() if "table" in name]
    assert names == [f"transformer.h.{i}.attn.table.weight" for i in (1, 3)]


# ----------------------------------------------------------------------------- positions, norms


@pytest.mark.parametrize("part, turning", [(0.5, 2), (0.25, 1), (1.0, 4)])
def test_partial_rope_turns_the_first_pairs_only(part, turning):
    """Complex numbers x_i + j x_(i + 4), of a head of 8."""
    config = tiny(n_embd=32, pos="partial_rope", settings=f"partial_rope.part={part}")
    cos, sin = POSITIONS["partial_rope"](config).rotation(torch.arange(5))
    x = torch.randn(1, 1, 5, 8)
    got = rotate(x, cos, sin)[0, 0]
    for p in range(5):
        for i in range(4):
            z = complex(x[0, 0, p, i], x[0, 0, p, i + 4])
            if i < turning:
                z *= cmath.exp(1j * p * 10000.0 ** (-i / turning))
            close(got[p, [i, i + 4]], torch.tensor([z.real, z.imag]))


@pytest.mark.parametrize("rms, C", [(0.02, 32), (0.5, 48)])
def test_scaled_sinusoidal_has_the_size_that_is_asked_for(rms, C):
    config = tiny(n_embd=C, pos="scaled_sinusoidal", settings=f"scaled_sinusoidal.rms={rms}")
    got = POSITIONS["scaled_sinusoidal"](config).embed(torch.arange(50))
    for p, c in itertools.product((0, 1, 49), range(C)):
        wave = math.cos if c % 2 else math.sin
        wanted = rms * math.sqrt(2) * wave(p / 10000 ** (2 * (c // 2) / C))
        assert got[p, c].item() == pytest.approx(wanted, abs=1e-5)
    close(got.square().mean().sqrt(), torch.tensor(rms))
    with refused("rms", "above 0"):
        tiny(pos="scaled_sinusoidal", settings="scaled_sinusoidal.rms=0")


def test_partial_rope_goes_with_layers_without_positions():
    config = tiny(n_layer=4, pos="partial_rope", pos_pattern="partial_rope,partial_rope,none")
    assert config.encodings == ["partial_rope", "partial_rope", "none", "partial_rope"]
    with refused("part", 1.5):
        tiny(pos="partial_rope", settings="partial_rope.part=1.5")
    with refused("turns no pair"):
        tiny(pos="partial_rope", settings="partial_rope.part=0.1")


@pytest.mark.parametrize("bias", [True, False])
def test_dyt_is_a_scaled_tanh(bias):
    layer = NORMS["dyt"](tiny(norm="dyt", bias=bias, settings="dyt.alpha=0.8"))
    assert layer.alpha.item() == pytest.approx(0.8) and (layer.bias is not None) == bias
    with torch.no_grad():
        layer.weight.normal_()
        x = torch.randn(3, 16)
        want = [[layer.weight[i] * math.tanh(0.8 * v) for i, v in enumerate(row)] for row in x]
        close(layer(x), torch.tensor(want) + (0 if layer.bias is None else layer.bias))


def test_post_norm_and_sandwich_norm():
    def post(x, blocks):
        for block in blocks:
            x = norm(x + linear(full(x, block.attn), block.attn.c_proj), block.ln_1)
            x = norm(x + gelu_mlp(x, block.mlp), block.ln_2)
        return x

    def sandwich(x, blocks):
        for block in blocks:
            for branch, ln in zip(
                branches(block), (block.residual.post_1, block.residual.post_2), strict=True
            ):
                x = x + norm(branch(x), ln)
        return x

    check(make(residual="post"), post)
    check(make(residual="sandwich"), sandwich)


@torch.no_grad()
def test_sandwich_branches_start_at_size_1_or_with_zero_init_at_0():
    x = 0.02 * torch.randn(1, 9, 256)
    for zero, size in ((False, 1.0), (True, 0.0)):
        config = tiny(residual="sandwich", n_embd=256, zero_init=zero)
        block = GPT(config).transformer.h[0]
        branch = block.residual.post_1(block.attn(block.ln_1(x), None, None))
        assert branch.square().mean().sqrt().item() == pytest.approx(size, abs=0.05)


# ----------------------------------------------------------------------------- short convolutions


def canon(x, conv):
    """x (T, C) plus, of each channel, w_j times the token j before."""
    rows, w = [], conv.weight.flip(1)  # held with the oldest token first
    for t in range(len(x)):
        rows.append(x[t] + sum(w[:, j] * x[t - j] for j in range(w.size(1)) if t >= j))
    return torch.stack(rows)


@pytest.mark.parametrize("width", [4, 2])
def test_canon_a_and_c_mix_what_attention_and_mlp_read(width):
    def stream(x, blocks):
        for block in blocks:
            mixed = canon(norm(x, block.ln_1), block.residual.conv_1)
            x = x + linear(full(mixed, block.attn), block.attn.c_proj)
            x = x + gelu_mlp(canon(norm(x, block.ln_2), block.residual.conv_2), block.mlp)
        return x

    check(make(residual="canon", settings=f"canon.width={width}"), stream)


def test_canon_b_mixes_queries_keys_and_values():
    def own(x, attn):
        qkv = canon(linear(x, attn.c_attn), attn.conv)
        heads = zip(*map(split, qkv.split(nh * hs, dim=1)), strict=True)
        return torch.cat([attend(*head) for head in heads], 1)

    check(make(attention="canon"), heads_with(own))


@pytest.mark.parametrize("width", [0, -1])
@pytest.mark.parametrize(
    "changes", [dict(residual="canon"), dict(attention="canon"), dict(attention="gated_deltanet")]
)
def test_a_convolution_of_no_token_is_one_line(changes, width):
    (name,) = changes.values()
    with refused(f"width {width}", "1 or more"):
        GPT(tiny(**changes, settings=f"{name}.width={width}"))


def test_canon_starts_as_the_model_without_it():
    for block in GPT(tiny(residual="canon", attention="canon")).transformer.h:
        convs = (block.residual.conv_1, block.residual.conv_2, block.attn.conv)
        assert all((conv.weight == 0).all() for conv in convs)
        x = torch.randn(1, 5, 16)
        assert torch.equal(convs[0](x, None, ""), x)


# ----------------------------------------------------------------------------- other attentions


@pytest.mark.parametrize("nkv", [4, 2])
def test_differential_attention_takes_one_map_from_another(nkv):
    """Ye et al. 2024, eq. 1 to 3, head by head; lambda_init by the layer."""

    def own(x, attn, layer):
        start = 0.8 - 0.6 * math.exp(-0.3 * layer)
        a, b, c, d = attn.scale.weight
        factor = torch.exp(a @ b) - torch.exp(c @ d) + start
        q, k, v = linear(x, attn.c_attn).split((nh * hs, nkv * hs, nkv * hs), dim=1)
        q, k, v, rows = split(q), split(k), split(v), []
        for i in range(nh // 2):
            g = i * nkv // nh  # the first of its two key heads
            value = torch.cat((v[g], v[g + nkv // 2]), 1)
            first = attend(q[i], k[g], value)
            second = attend(q[i + nh // 2], k[g + nkv // 2], value)
            y = first - factor * second
            y = y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt() * attn.norm.weight
            rows.append((1 - start) * y)
        return torch.cat(rows, 1)

    def stream(x, blocks):
        for layer, block in enumerate(blocks):
            found = own(norm(x, block.ln_1), block.attn, layer)
            x = x + linear(found, block.attn.c_proj)
            x = x + branches(block)[1](x)
        return x

    check(make(attention="differential", n_kv_head=nkv), stream)
    drawn = GPT(tiny(attention="differential", n_embd=512)).transformer.h[0].attn.scale.weight
    assert drawn.std().item() == pytest.approx(0.1, rel=0.2)
    with refused("n_kv_head 1"):
        tiny(attention="differential", n_kv_head=1)


def delta_rule(q, k, v, fade, beta):
    """One head, a token at a time: (T, hs) each, fade and beta (T,) -> (T, hs)."""
    S, rows = torch.zeros(v.size(1), k.size(1), dtype=v.dtype), []
    for t in range(len(q)):
        S = torch.exp(fade[t]) * (S - beta[t] * torch.outer(S @ k[t], k[t]))
        S = S + beta[t] * torch.outer(v[t], k[t])
        rows.append(S @ q[t])
    return torch.stack(rows)


@pytest.mark.parametrize("T, cuts", [(1, []), (9, [4]), (150, []), (150, [70, 71, 73])])
@pytest.mark.parametrize("same", [False, True])
def test_the_gated_delta_rule_in_chunks_is_that_of_single_tokens(T, cuts, same):
    """Also where all keys are the same and nothing fades, which is hardest to solve."""
    g = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, 3, T, 6, generator=g, dtype=torch.float64) for _ in range(3))
    fade, beta = -torch.rand(2, 3, T, generator=g).double(), torch.rand(2, 3, T, generator=g)
    beta = beta.double()
    if same:
        k, fade, beta = k[:, :, :1].expand(-1, -1, T, -1), fade * 0, beta * 0 + 1
    k = k / k.norm(dim=-1, keepdim=True)
    inputs = q, k, v, fade, beta
    want = [[delta_rule(*(x[b, h] for x in inputs)) for h in range(3)] for b in range(2)]
    state, parts, edges = None, [], [0, *cuts, T]
    for begin, end in itertools.pairwise(edges):
        piece = (x[:, :, begin:end].float() for x in inputs)
        y, state = gated_delta_rule(*piece, state)
        parts.append(y)
    close(torch.cat(parts, 2).double(), torch.stack([torch.stack(row) for row in want]))


def test_gated_deltanet_keeps_a_matrix_a_head():
    def own(x, attn):
        qkv, w, rows = linear(x, attn.c_attn), attn.conv.weight, []
        for t in range(len(x)):
            rows.append(sum(w[:, 3 - j] * qkv[t - j] for j in range(4) if t >= j))
        mixed = torch.stack(rows)
        mixed = mixed / (1 + torch.exp(-mixed))
        q, k, v = map(split, mixed.split(nh * hs, dim=1))
        a, b = (x @ attn.gates.weight.T).split(nh, dim=1)
        heads = []
        for h in range(nh):
            step = torch.log(1 + torch.exp(a[:, h] + attn.fade.b[h]))
            fade, beta = -torch.exp(attn.fade.A[h]) * step, 1 / (1 + torch.exp(-b[:, h]))
            unit_q, unit_k = (z[h] / z[h].norm(dim=1, keepdim=True) for z in (q, k))
            y = delta_rule(unit_q / math.sqrt(hs), unit_k, v[h], fade, beta)
            heads.append(y / (y.square().mean(1, keepdim=True) + 1e-5).sqrt() * attn.norm.weight)
        gate = x @ attn.gate.weight.T
        return torch.cat(heads, 1) * gate / (1 + torch.exp(-gate))

    check(make(attention="gated_deltanet"), heads_with(own))
    fade = GPT(tiny(attention="gated_deltanet", n_head=16, n_embd=32)).transformer.h[0].attn.fade
    rates, steps = fade.A.exp(), torch.log1p(fade.b.exp())
    assert 0 < rates.min() < 1 < 15 < rates.max() < 16 and steps.unique().numel() == 16
    assert 0.001 <= steps.min() < 0.002 and 0.05 < steps.max() <= 0.1


def test_gated_deltanet_goes_with_full_attention_and_refuses_what_has_no_scores():
    pattern = dict(attention="gated_deltanet", attention_pattern="gated_deltanet,full")
    model = make(**pattern, window=4, window_pattern="LS", pos="rope", n_kv_head=2)
    cache = KVCache(model, 9)
    with torch.no_grad():
        pieces = [model.logits(model.features(x, cache)) for x in IDX.split([3, 1, 5], 1)]
        close(torch.cat(pieces, 1), model(IDX)[0])
    state = cache.layers[0].tensors[0]
    assert state.shape == (2, nh, hs, hs) and cache.layers[0].kept["qkv"].shape == (2, 3, 32)
    for name, value in (("window", 4), ("document_mask", True), ("pos", "alibi")):
        with refused("gated_deltanet", "layer 0", name):
            tiny(attention="gated_deltanet", **{name: value})


@pytest.mark.parametrize("latent, rope", [(0, 0), (6, 4)])
def test_mla_makes_keys_and_values_of_one_vector(latent, rope):
    """DeepSeek-V2, eq. 9 to 19, with complex numbers for the channels that turn; heads of 8."""
    C, size = 32, 8
    r = rope or 4

    def turned(z, t):
        pairs = torch.complex(z[: r // 2], z[r // 2 :])
        turn = torch.tensor([cmath.exp(1j * t * 10000.0 ** (-2 * i / r)) for i in range(r // 2)])
        pairs = pairs * turn.to(pairs.dtype)
        return torch.cat((pairs.real, pairs.imag))

    def own(x, attn):
        c_size = latent or 4 * size
        q, c, shared = (x @ attn.c_attn.weight.T).split((nh * (size + r), c_size, r), dim=1)
        c = c / (c.square().mean(1, keepdim=True) + 1e-5).sqrt() * attn.norm.weight
        shared, heads = torch.stack([turned(z, t) for t, z in enumerate(shared)]), []
        for h in range(nh):
            up = attn.up.weight[h * 2 * size : (h + 1) * 2 * size]
            mine = q[:, h * (size + r) : (h + 1) * (size + r)]
            turning = torch.stack([turned(z, t) for t, z in enumerate(mine[:, size:])])
            k = torch.cat((c @ up[:size].T, shared), 1)
            heads.append(attend(torch.cat((mine[:, :size], turning), 1), k, c @ up[size:].T))
        return torch.cat(heads, 1)

    settings = f"mla.latent={latent},mla.rope={rope}"
    model = make(attention="mla", pos="rope", n_embd=C, settings=settings)
    check(model, heads_with(own))
    kept = 2 * 4 * ((latent or 32) + r)  # bytes of bf16 in four layers
    assert counts.kv_bytes_per_token(counts.on_meta(model.config)) == kept
    for changes in (dict(n_kv_head=2), dict(qk_norm=True), dict(settings="mla.rope=3")):
        with refused("mla"):
            tiny(**dict(attention="mla", n_embd=C) | changes)


# ----------------------------------------------------------------------------- yarn


def test_yarn_leaves_fast_pairs_and_stretches_slow_ones():
    """Peng et al. 2023, section 3.2: pairs of 32 turns and more in the text of training stay, those
    of fewer than one are interpolated, and those between lie between."""
    s, trained, size = 4, 1024, 64
    config = tiny(n_embd=4 * size, block_size=s * trained, pos="yarn", rope_scaling=4.0)
    cos, sin = POSITIONS["yarn"](config).rotation(torch.arange(2))
    scale = 0.1 * math.log(s) + 1
    close(cos[0], torch.full((size // 2,), scale))
    share = []
    for i in range(size // 2):
        turn = 10000.0 ** (-2 * i / size)
        got = math.atan2(sin[1, i], cos[1, i]) / turn
        assert math.hypot(sin[1, i], cos[1, i]) == pytest.approx(scale, rel=1e-5)
        turns = trained * turn / (2 * math.pi)
        if turns > 32 * 1.4:  # the ramp begins and ends at whole pairs
            assert got == pytest.approx(1, rel=1e-4)
        if turns < 1 / 1.4:
            assert got == pytest.approx(1 / s, rel=1e-4)
        share.append(got)
    inside = [x for x in share if 1 / s + 1e-3 < x < 1 - 1e-3]
    steps = {round(a - b, 3) for a, b in itertools.pairwise(inside)}
    assert len(inside) > 5 and len(steps) <= 2 and min(steps) > 0  # a straight line down
    given = tiny(n_embd=256, pos="yarn", rope_scaling=4.0, settings="yarn.trained=1024")
    torch.testing.assert_close(POSITIONS["yarn"](given).rotation(torch.arange(2))[0], cos)
    for changes in (dict(rope_scaling=0.5), dict(settings="yarn.slow=64"), dict(rope_theta=1.0)):
        with refused("yarn"):
            tiny(pos="yarn", **changes)


def test_yarn_takes_over_weights_that_were_trained_with_rope():
    model = grown(tiny(pos="rope"))
    wanted = dict(pos="yarn", rope_scaling=2.0, block_size=48)
    made = surgery.perform(model, surgery.plan(model.config, wanted, TrainConfig(init_from="RUN")))
    assert made.config == tiny(**wanted)
    own = {name: p.tolist() for name, p in model.named_parameters()}
    assert {name: p.tolist() for name, p in made.named_parameters()} == own


# ----------------------------------------------------------------------------- mixture of experts


def test_products_by_group_and_their_gradients_are_torchs_own():
    """With a group that has no rows. On a CPU torch has them too, but cannot compile them."""
    x, weight = torch.randn(20, 8, requires_grad=True), torch.randn(4, 8, 12, requires_grad=True)
    ends, grad = torch.tensor([3, 3, 10, 20], dtype=torch.int32), torch.randn(20, 12)
    results = []
    for product in (grouped_product, lambda x, w, e: torch.nn.functional.grouped_mm(x, w, offs=e)):
        y = product(x, weight, ends)
        results.append((y, *torch.autograd.grad(y, (x, weight), grad)))
    for got, want in zip(*results, strict=True):
        close(got, want)


def silu_experts(x, mlp, active):
    """(T, C) -> (T, C), and how often each expert is chosen."""
    rows, load = [], [0] * len(mlp.balance.bias)
    for token in x:
        scores = 1 / (1 + torch.exp(-(mlp.router.weight @ token)))
        order = sorted(range(len(load)), key=lambda i: -(scores[i] + mlp.balance.bias[i]).item())
        total = sum(scores[i] for i in order[:active])
        y = 0
        for i in order[:active]:
            load[i] += 1
            gate, up = (token @ mlp.c_fc.weight[i]).chunk(2)
            hidden = gate / (1 + torch.exp(-gate)) * up
            y = y + scores[i] / total * (hidden @ mlp.c_proj.weight[i])
        rows.append(y)
    result = torch.stack(rows)
    if mlp.shared is not None:
        gate, up = linear(x, mlp.shared.c_fc).chunk(2, dim=1)
        result = result + linear(gate / (1 + torch.exp(-gate)) * up, mlp.shared.c_proj)
    return result, load


@pytest.mark.parametrize("experts, active, shared", [(8, 3, 1), (5, 1, 0)])
def test_experts_are_chosen_with_the_bias_and_weighed_without_it(experts, active, shared):
    """DeepSeek-V3, eq. 12 to 16, token by token."""

    def stream(x, blocks):
        for block in blocks:
            x = x + branches(block)[0](x)
            x = x + silu_experts(norm(x, block.ln_2), block.mlp, active)[0]
        return x

    settings = f"moe.experts={experts},moe.active={active},moe.shared={shared}"
    model = make(mlp="moe", n_layer=2, settings=settings)
    check(model, stream)
    mlp = model.transformer.h[0].mlp
    width = math.ceil(model.config.mlp_hidden / (active + shared) / 8) * 8
    one = 3 * 16 * width
    held = sum(p.numel() for p in mlp.parameters()) - 2 * width * shared * 1 - 16 * bool(shared)
    assert held == one * (experts + shared) + 16 * experts + experts
    met = counts.multiply_adds(mlp, 9) - (2 * width * shared + 16 * bool(shared))  # its biases
    assert met == pytest.approx(one * (active + shared) + 16 * experts)


def test_the_bias_of_busy_experts_falls_and_of_idle_ones_rises():
    """Wang et al. 2024, algorithm 1, over a batch of two micro-batches; all else is AdamW's."""
    model = make(mlp="moe", n_layer=1, settings="moe.rate=0.25").train()
    optimizers = make_optimizers(model, TrainConfig(lr=0.1))
    assert [type(o).__name__ for o in optimizers] == ["AdamW", "BySign"]
    before, load, seen = model.transformer.h[0].mlp.balance.bias.tolist(), [0] * 8, []
    model.transformer.h[0].mlp.register_forward_hook(lambda m, args, y: seen.append(args[0]))
    for rows in IDX:
        model(rows[None], rows[None])[1].backward()
    with torch.no_grad():
        for x in seen:
            for i, n in enumerate(silu_experts(x[0], model.transformer.h[0].mlp, 3)[1]):
                load[i] += n
    for group in (group for o in optimizers for group in o.param_groups):
        group["lr"] = 0.1 / 2 * group["lr_scale"]  # the schedule half way down
    for optimizer in optimizers:
        optimizer.step()
    mean, after = sum(load) / 8, model.transformer.h[0].mlp.balance.bias.tolist()
    assert min(load) < mean < max(load) and sum(load) == 3 * IDX.numel()
    for b, n, now in zip(before, load, after, strict=True):
        assert now == pytest.approx(b - 0.125 * ((n > mean) - (n < mean)))
    gradient = model.transformer.h[0].mlp.balance.bias.grad
    assert gradient.abs().max() < 1e-6  # of no weight in the norm of all gradients
