"""python -m nanoswitch.surgery    what may stand beside --init_from: docs/finetune.md's

A checkpoint's weights under changed switches. ROWS says of every change what happens to the
weights: nothing, a known surgery, or that there is none and why. Flags that were not given stay
the checkpoint's. The first row that fits a changed switch holds for it.
This file exists so that neither the model nor the trainer knows of any surgery.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace

import torch

from model import GPT, POSITIONS, GPTConfig
from nanoswitch.counts import on_meta
from nanoswitch.hf import parameters
from nanoswitch.load import load_config, load_model
from nanoswitch.tokenizer import N_VOCAB
from nanoswitch.weights import empty, fill

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"


@dataclass
class Surgery:
    """How a checkpoint's config becomes another. heads: how key and value heads are pooled, mean,
    first or random; layers: which stay, even, first or last."""

    old: GPTConfig
    new: GPTConfig
    heads: str = "mean"
    layers: str = "even"
    rows: list = field(default_factory=list)
    lines: list = field(default_factory=list)
    """every change and what it means, one line each"""
    begun: bool = False
    """whether the weights come with the run's own checkpoint"""

    @property
    def kept(self):
        """Of each new layer, the old one that it comes from: a list of ints."""
        old, new = self.old.n_layer, self.new.n_layer
        if self.layers == "first" or new >= old:
            return list(range(new))
        if self.layers == "last":
            return list(range(old - new, old))
        return [round(i * (old - 1) / max(1, new - 1)) for i in range(new)]

    @property
    def dropped(self):
        return set(self.old.encodings) - set(self.new.encodings)

    @property
    def added(self):
        return set(self.new.encodings) - set(self.old.encodings)


# ----------------------------------------------------------------------------- operations
# (weights {name: tensor}, a Surgery, a function that gives newly drawn weights) -> weights


def keep_layers(weights, s, drawn):
    result = {}
    for name, w in weights.items():
        layer = re.match(r"transformer\.h\.(\d+)\.", name)
        if not layer:
            result[name] = w
        elif int(layer[1]) in s.kept:
            i = s.kept.index(int(layer[1]))
            result[f"transformer.h.{i}.{name[layer.end() :]}"] = w
    return result


def regroup_heads(weights, s, drawn):
    """Each group of key heads, and of value heads, becomes one; where there are more heads than
    before, each is repeated, which changes no result."""
    hs, before, after = s.old.head_size, s.old.n_kv_head, s.new.n_kv_head

    def regroup(w):  # (before hs, ...) -> (after hs, ...)
        if after > before:
            return w.unflatten(0, (before, hs)).repeat_interleave(after // before, 0).flatten(0, 1)
        groups = w.unflatten(0, (after, before // after, hs))
        return (groups.mean(1) if s.heads == "mean" else groups[:, 0]).flatten(0, 1)

    result = dict(weights)
    for name, w in weights.items():
        if ".attn.c_attn." in name:
            q, k, v = w.split((s.old.n_embd, before * hs, before * hs))
            if s.heads == "random" and after < before:
                new = drawn()
                kv = new[name][s.old.n_embd :] if name in new else k[:0]
            else:
                kv = torch.cat((regroup(k), regroup(v)))
            result[name] = torch.cat((q, kv))
    return result


def place_of(config, encoding):
    """Where the model keeps an encoding: the beginning of its parameters' names."""
    part = "wpe" if encoding == config.pos else f"wpe_other.{encoding}"
    return f"transformer.{part}."


def replace_positions(weights, s, drawn):
    result = {n: w for n, w in weights.items() if not n.startswith("transformer.wpe")}
    for encoding in set(s.old.encodings) & set(s.new.encodings):
        before, after = place_of(s.old, encoding), place_of(s.new, encoding)
        for name, w in weights.items():
            if name.startswith(before):
                result[after + name.removeprefix(before)] = w
    if "learned" in s.added:  # what was added to the embeddings, as a table
        table = POSITIONS[s.old.pos](s.old).embed(torch.arange(s.new.block_size))
        if table is None:
            table = torch.zeros(s.new.block_size, s.new.n_embd)
        result[place_of(s.new, "learned") + "weight"] = table
    return result


def crop_positions(weights, s, drawn):
    name = place_of(s.new, "learned") + "weight"
    return weights | {name: weights[name][: s.new.block_size]}


def copy_head(weights, s, drawn):
    return weights | {HEAD: weights[WTE].clone()}


def pad_vocabulary(weights, s, drawn):
    """A mean row's logit is far from the largest: a row of zeros could be above all others."""
    result, more = dict(weights), s.new.vocab_size - s.old.vocab_size
    for name in {WTE, HEAD} & weights.keys():
        w = weights[name]
        mean = w[: min(s.old.vocab_used, s.new.vocab_used)].mean(0, keepdim=True)
        result[name] = torch.cat((w, mean.expand(more, -1))) if more > 0 else w[:more]
    return result


# ----------------------------------------------------------------------------- the table


@dataclass
class Row:
    kind: str
    """taken: changes no weight; surgery; or refused"""
    switches: str
    """GPTConfig fields"""
    change: str
    """which change of theirs, for the reader"""
    done: str
    """what happens, or why nothing can"""
    fits: Callable = lambda s: True
    """Surgery -> whether the row is for its change"""
    operate: Callable = None


def only(s, names):
    """Whether the encodings that end are of these, and they were all that there was."""
    return s.dropped == set(s.old.encodings) <= set(names) and len(set(s.old.encodings)) == 1


def same_attention(s):
    return s.new.attentions == [s.old.attentions[i] for i in s.kept]


ROWS = [
    Row("taken", "dropout attention_kernel window window_pattern document_mask logit_softcap "
        "rope_theta rope_scaling qk_norm norm_eps zero_init residual_dtype", "any",
        "taken as given"),
    Row("surgery", "n_layer", "fewer", "those that --init_layers names stay: even, first, last",
        lambda s: s.new.n_layer < s.old.n_layer, keep_layers),
    Row("refused", "n_layer", "more", "the added layers have no weights; you can take fewer"),
    Row("surgery", "n_kv_head", "fewer", "key and value heads pooled in their groups (Ainslie et "
        "al. 2023, section 2.1), by --init_heads: mean, first, random",
        lambda s: s.old.n_kv_head % s.new.n_kv_head == 0, regroup_heads),
    Row("surgery", "n_kv_head", "more", "each key and value head repeated: the same function",
        lambda s: s.new.n_kv_head % s.old.n_kv_head == 0, regroup_heads),
    Row("refused", "n_kv_head", "neither divides the other", "heads do not form equal groups"),
    Row("surgery", "pos pos_pattern", "sinusoidal or none -> learned",
        "what was added to the embeddings becomes the table: the same function",
        lambda s: set(s.new.encodings) == {"learned"} and only(s, ("sinusoidal", "none")),
        replace_positions),
    Row("refused", "pos pos_pattern", "any other -> learned",
        "no table of positions does what that encoding did; take another encoding",
        lambda s: "learned" in s.added),
    Row("surgery", "pos pos_pattern", "learned -> any other",
        "the table dropped; a learned bias begins at its initial values",
        lambda s: "learned" in s.dropped, replace_positions),
    Row("surgery", "pos pos_pattern", "among all others",
        "an encoding's own weights go with it; a new one's begin at their initial values",
        operate=replace_positions),
    Row("surgery", "block_size", "shorter, learned positions", "positions cropped",
        lambda s: "learned" in s.new.encodings and "learned" not in s.added
        and s.new.block_size < s.old.block_size, crop_positions),
    Row("refused", "block_size", "longer, learned positions",
        "there are no positions beyond; add --pos rope, or shorten it",
        lambda s: "learned" in s.new.encodings and "learned" not in s.added),
    Row("taken", "block_size", "any, other positions", "taken as given"),
    Row("surgery", "bias", "off", "biases dropped", lambda s: not s.new.bias),
    Row("surgery", "bias", "on", "biases of zero added: the same function"),
    Row("surgery", "norm", "layernorm <-> rmsnorm",
        "the norms' weights kept; LayerNorm's biases dropped, or added as zero",
        lambda s: {s.old.norm, s.new.norm} == {"layernorm", "rmsnorm"}),
    Row("refused", "norm", "any other", "its weights mean something else"),
    Row("surgery", "embd_norm", "on or off", "a norm of weights 1 added, or its weights dropped"),
    Row("surgery", "tie_embeddings", "untied", "the head is a copy of the embedding: the same "
        "function", lambda s: not s.new.tie_embeddings, copy_head),
    Row("refused", "tie_embeddings", "tied", "two matrices cannot become one"),
    Row("surgery", "vocab_size", "more", "padding rows added, each the mean of the others",
        lambda s: s.new.vocab_size > s.old.vocab_size, pad_vocabulary),
    Row("surgery", "vocab_size", "fewer, not below vocab_used", "padding rows cut off",
        lambda s: s.new.vocab_size >= s.new.vocab_used, pad_vocabulary),
    Row("refused", "vocab_size", "below vocab_used", "tokens would lose their rows"),
    Row("taken", "vocab_used", f"{N_VOCAB}, where more rows are there", "taken as given",
        lambda s: s.new.vocab_used == N_VOCAB <= s.old.vocab_used),
    Row("refused", "vocab_used", "any other", "its ids would stand for other tokens"),
    Row("taken", "mlp", "gelu <-> gelu_erf", "taken as given: they differ by up to 0.0005",
        lambda s: {s.old.mlp, s.new.mlp} == {"gelu", "gelu_erf"}),
    Row("refused", "mlp", "any other", "its matrices were trained for another activation"),
    Row("refused", "attention attention_pattern", "any layer's",
        "the weights that one adds cannot be made of weights without them, nor left out",
        lambda s: not same_attention(s)),
    Row("taken", "attention attention_pattern", "another text for the same layers",
        "taken as given"),
    Row("taken", "linformer_segment linformer_rank", "full attention", "taken as given",
        lambda s: set(s.new.attentions) == {"full"}),
    Row("refused", "linformer_segment linformer_rank", "linformer",
        "its summaries were trained for another size"),
    Row("refused", "residual", "any", "every block was trained for the stream that it was given"),
    Row("refused", "settings", "any", "a variant's weights were trained for its numbers"),
    Row("refused", "n_embd", "any", "every matrix would have another width"),
    Row("refused", "n_head", "any", "heads would have another width"),
    Row("refused", "mlp_hidden", "any", "matrices would have another width"),
]  # fmt: skip


def table():
    """ROWS as lines of a Markdown table."""
    lines = ["| switch | change | what happens |", "|---|---|---|"]
    for row in ROWS:
        names = ", ".join(f"`{name}`" for name in row.switches.split())
        done = f"refused: {row.done}" if row.kind == "refused" else row.done
        lines.append(f"| {names} | {row.change} | {done} |")
    return lines


# ----------------------------------------------------------------------------- the plan


class Wishes(GPTConfig):
    """The flags that stand beside --init_from, not checked yet: only with a checkpoint do they
    make a config. given: the names that count; without it those that differ from the defaults."""

    given = None

    def __post_init__(self):
        pass


def wishes(flags):
    """A Wishes, or any GPTConfig -> {name: value} of what is asked of the checkpoint."""
    given, default = getattr(flags, "given", None), asdict(GPTConfig())
    flags = asdict(flags)
    return {n: v for n, v in flags.items() if (v != default[n] if given is None else n in given)}


def plan(old, wanted, config):
    """The checkpoint's GPTConfig, {name: value} that is asked of it, and a TrainConfig -> Surgery;
    ValueError (one line) where there is none. Takes no memory: no weight is looked at."""
    if wanted.get("n_head", old.n_head) != old.n_head:  # refused below, by its own row
        wanted = {"n_kv_head": 0} | wanted
    new = replace(old, **wanted)
    s = Surgery(old, new, config.init_heads, config.init_layers)
    changed = {f.name for f in fields(GPTConfig) if getattr(old, f.name) != getattr(new, f.name)}
    if new.n_layer <= old.n_layer and not same_attention(s):
        changed.add("attention")  # its pattern may fall otherwise on the layers that stay
    for row in ROWS:
        names = [name for name in row.switches.split() if name in changed]
        if not names or not row.fits(s):
            continue
        changed -= set(names)
        if row.kind == "refused":
            refuse(s, names[0], row.done, config)
        s.rows.append(row)
        changes = ", ".join(difference(s, name) for name in names)
        s.lines.append(f"{changes}: {row.done}{chosen(s, row)}")
    for name in changed:  # a switch that no row knows
        refuse(s, name, "no surgery for it is known", config)
    if s.lines:
        check_shapes(s, config)
    return s


def check_shapes(s, config):
    """ValueError where a variant's own weights would need an operation that no row has."""
    wanted = on_meta(s.new).state_dict()
    for name, w in operated(on_meta(s.old), s, lambda: wanted).items():
        if name in wanted and w.shape != wanted[name].shape:
            raise ValueError(
                f"--init_from {config.init_from} brings {name} of shape {tuple(w.shape)}, not "
                f"{tuple(wanted[name].shape)}: no surgery for it is known; change fewer switches"
            )


def of_run(flags, config):
    """The flags of a run with --init_from, a Wishes or any GPTConfig, and its TrainConfig ->
    Surgery."""
    return plan(load_config(config.init_from), wishes(flags), config)


def config_of(flags, config):
    """The GPTConfig of a run's flags, with or without --init_from."""
    return of_run(flags, config).new if config.init_from else flags


def of_this_run(flags, config, begun):
    """of_run, given the config.json of the run's own newest checkpoint or {}. One that has begun
    holds its own weights, and goes on where the checkpoint that it came from is gone."""
    if begun.get("init_from") != config.init_from:
        return of_run(flags, config)
    model = GPTConfig(**begun["model"])
    s = Surgery(model, replace(model, **wishes(flags)), config.init_heads, config.init_layers)
    s.lines, s.begun = begun["surgery"], True
    return s


def difference(s, name):
    old, new = (str(getattr(config, name)) or "''" for config in (s.old, s.new))
    return f"{name} {old} -> {new}"


def chosen(s, row):
    """What the flags chose of what a row offers."""
    if row.operate is keep_layers:
        return f": {s.layers}, {', '.join(map(str, s.kept))}"
    pooled = row.operate is regroup_heads and s.new.n_kv_head < s.old.n_kv_head
    return f": {s.heads}" if pooled else ""


def refuse(s, name, reason, config):
    has, wish = getattr(s.old, name), getattr(s.new, name)
    raise ValueError(
        f"--init_from {config.init_from} brings {name} {has}, not {wish}: {reason}; "
        f"or leave --{name} out"
    )


def begin(checkpoint, s):
    """The GPT of a checkpoint after surgery, in fp32. What it lacks is drawn from torch's seed."""
    if s.begun:
        return GPT(s.new)
    model = load_model(checkpoint)
    return perform(model, s, checkpoint) if s.lines else model


def perform(model, s, origin="the model"):
    """A GPT of config s.old -> a GPT of config s.new, which shares no memory with it."""
    fresh = {}

    def drawn():
        if not fresh:
            fresh.update(GPT(s.new).state_dict())
        return fresh

    with torch.no_grad():
        weights = operated(model, s, drawn)
        # what the new form lacks goes, what it adds begins as in a new model
        weights = {n: weights[n] if n in weights else drawn()[n] for n in parameters(s.new)}
        return fill(empty(s.new), weights, origin)


def operated(model, s, drawn):
    """The weights of a GPT of config s.old after the operations of all rows, {name: tensor}."""
    weights = dict(model.state_dict())
    if s.old.tie_embeddings:
        del weights[HEAD]
    for row in s.rows:
        weights = row.operate(weights, s, drawn) if row.operate else weights
    return weights


if __name__ == "__main__":
    print("\n".join(table()))
