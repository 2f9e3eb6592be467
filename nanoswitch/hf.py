"""Hugging Face's layouts of the model: folder -> GPT and back.

    checkpoint --choose a Layout--> rename, split, transpose --save--> folder
    folder --load--> transpose, stack, rename --> GPT

LAYOUTS says how each model_type of Hugging Face spells a GPTConfig and its parameters; one table
serves both ways. A model that no layout holds exactly is refused, with the switch to blame.
This file exists so that model.py knows no layout but its own.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from model import GPTConfig
from nanoswitch.counts import on_meta
from nanoswitch.files import read_json
from nanoswitch.hub import hub_download, with_retries
from nanoswitch.tokenizer import EOT, N_VOCAB, gpt2_json, has_gpt2_vocabulary
from nanoswitch.weights import check_whole, empty, fill, read_safetensors, read_torch

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD_WEIGHTS, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
WHERE = (INDEX, WEIGHTS, OLD_INDEX, OLD_WEIGHTS)  # a model's weights, in this order
VOCABULARIES = ("tokenizer.json", "vocab.json")  # the first holds all of the second
OFFLINE = "without a network weights load only from a folder"
# buffers of older uploads: the causal mask, RoPE's wavelengths
BUFFERS = (
    ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias",
    ".rotary_emb.inv_freq",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The layouts


def conv1d(name, w, config, reading):
    """GPT-2's linear layers hold (in, out) where nn.Linear holds (out, in)."""
    return w.t() if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")) else w


def per_head(name, w, config, reading):
    """Bloom's fused rows are q, k, v of head 0, q, k, v of head 1, ...; ours all q, all k, all v:
    (3 C, ...) -> (3 C, ...)."""
    if ".c_attn." not in name:
        return w
    groups = (config.n_head, 3) if reading else (3, config.n_head)
    return w.unflatten(0, (*groups, config.head_size)).transpose(0, 1).flatten(0, 2)


@dataclass
class Layout:
    architecture: str
    """its class in transformers"""
    stem: str
    """what their parameter names begin with"""
    blocks: str
    """their name for h, the list of blocks"""
    modules: dict[str, str]
    """our module -> theirs, or several whose rows ours stacks"""
    keys: dict[str, str]
    """GPTConfig field -> its name in config.json"""
    switches: dict[str, tuple]
    """GPTConfig field -> the value that the layout implies, then those that can take its form:
    no biases are biases of zero, and a table holds any positions that are added"""
    only: dict[str, tuple]
    """config.json key -> the values this model can have; the first where it is absent"""
    defaults: dict
    """config.json key -> its value where it is absent"""
    rearrange: Callable = lambda name, w, config, reading: w
    """(our name, w, config, reading or writing) -> w in the other's order of elements"""
    act: str = ""
    """config.json key of the activation, where both of our GELUs can be"""
    unbiased: tuple = ()
    """their modules without a bias where others have one: ours has one of zeros"""


GPT2_KEYS = {
    "vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head",
    "norm_eps": "layer_norm_epsilon", "tie_embeddings": "tie_word_embeddings",
}  # fmt: skip
GPT2_SWITCHES = {"norm": ("layernorm",), "mlp": ("gelu",), "bias": (True, False)}
LLAMA_KEYS = {
    "block_size": "max_position_embeddings", "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size",
    "mlp_hidden": "intermediate_size", "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}  # fmt: skip
LLAMA_SWITCHES = {"pos": ("rope",), "norm": ("rmsnorm",), "mlp": ("swiglu",)}
LLAMA_MODULES = {
    "wte": "embed_tokens", "ln_f": "norm",
    "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
    "attn.c_attn": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.gate_proj mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
}  # fmt: skip
TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # names of GPT-2's GELU
ACTIVATIONS = dict.fromkeys(TANH, "gelu") | {"gelu": "gelu_erf"}
LAYOUTS = {
    "gpt2": Layout(
        "GPT2LMHeadModel", "transformer", "h",
        {name: name for name in ("wte", "wpe", "ln_f", "ln_1", "ln_2", "attn.c_attn",
                                 "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
        GPT2_KEYS | {"block_size": "n_positions", "n_embd": "n_embd", "mlp_hidden": "n_inner"},
        GPT2_SWITCHES | {"pos": ("learned", "sinusoidal", "none")},
        {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
         "add_cross_attention": (False,)},
        {"n_inner": None, "tie_word_embeddings": True, "activation_function": TANH[0]},
        conv1d, "activation_function",
    ),
    "llama": Layout(
        "LlamaForCausalLM", "model", "layers", LLAMA_MODULES,
        LLAMA_KEYS | {"bias": "attention_bias"},
        LLAMA_SWITCHES,
        {"hidden_act": ("silu",)},
        {"num_key_value_heads": None, "tie_word_embeddings": False, "attention_bias": False},
    ),
    "mistral": Layout(
        "MistralForCausalLM", "model", "layers", LLAMA_MODULES,
        LLAMA_KEYS | {"window": "sliding_window"},
        LLAMA_SWITCHES | {"bias": (False,)},
        {"hidden_act": ("silu",)},
        {"tie_word_embeddings": False},
    ),
    "starcoder2": Layout(
        "Starcoder2ForCausalLM", "model", "layers",
        LLAMA_MODULES | {"mlp.c_fc": "mlp.c_fc", "mlp.c_proj": "mlp.c_proj"},
        LLAMA_KEYS | {"norm_eps": "norm_epsilon", "window": "sliding_window"},
        GPT2_SWITCHES | {"pos": ("rope",)},
        {"use_bias": (True,)},
        {"tie_word_embeddings": True, "sliding_window": None, "hidden_act": TANH[1]},
        act="hidden_act",
    ),
    "bloom": Layout(
        "BloomForCausalLM", "transformer", "h",
        {"wte": "word_embeddings", "ln_emb": "word_embeddings_layernorm", "ln_f": "ln_f",
         "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
         "attn.c_attn": "self_attention.query_key_value", "attn.c_proj": "self_attention.dense",
         "mlp.c_fc": "mlp.dense_h_to_4h", "mlp.c_proj": "mlp.dense_4h_to_h"},
        GPT2_KEYS | {"block_size": "seq_length", "n_embd": "hidden_size"},
        GPT2_SWITCHES | {"pos": ("alibi",), "embd_norm": (True,)},
        {"apply_residual_connection_post_layernorm": (False,)},
        {"tie_word_embeddings": True, "seq_length": 2048},
        per_head,
    ),
}  # fmt: skip

# read, but not written: another layout holds all that these can
READ_ONLY = {
    "qwen2": Layout(
        "Qwen2ForCausalLM", "model", "layers", LLAMA_MODULES, LLAMA_KEYS,
        LLAMA_SWITCHES | {"bias": (True,)},
        {"hidden_act": ("silu",), "use_sliding_window": (False,)},
        {"num_key_value_heads": None, "tie_word_embeddings": False},
        unbiased=("o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    "gpt_neox": Layout(
        "GPTNeoXForCausalLM", "gpt_neox", "layers",
        {"wte": "embed_in", "ln_f": "final_layer_norm",
         "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm",
         "attn.c_attn": "attention.query_key_value", "attn.c_proj": "attention.dense",
         "mlp.c_fc": "mlp.dense_h_to_4h", "mlp.c_proj": "mlp.dense_4h_to_h"},
        {name: key for name, key in LLAMA_KEYS.items() if name != "n_kv_head"}
        | {"norm_eps": "layer_norm_eps"},
        GPT2_SWITCHES | {"pos": ("rope",)},
        {"use_parallel_residual": (False,), "attention_bias": (True,)},
        {"use_parallel_residual": True, "rotary_pct": 0.25, "rotary_emb_base": 10000,
         "tie_word_embeddings": False, "hidden_act": "gelu"},
        per_head, "hidden_act",
    ),
}  # fmt: skip
REFUSED = {"qwen3": "its norms of queries and keys have weights, those of qk_norm have none"}


def misfits(config, layout):
    """{GPTConfig field: the values that the layout has for it} of each that differs."""
    plain = {
        "attention": ("full",), "n_kv_head": (config.n_head,), "mlp_hidden": (4 * config.n_embd,),
        "window": (0,), "window_pattern": ("",), "pos_pattern": ("",), "attention_pattern": ("",),
        "qk_norm": (False,), "embd_norm": (False,),
        "logit_softcap": (0,), "document_mask": (False,), "residual": ("plain",),
    }  # fmt: skip
    has = {k: v for k, v in (plain | layout.switches).items() if k not in layout.keys}
    if layout.act:
        has["mlp"] = ("gelu", "gelu_erf")
    return {name: values for name, values in has.items() if getattr(config, name) not in values}


def choose(config):
    """The model_type that holds this config exactly; ValueError naming the switches if none does,
    by the layout that comes nearest."""
    problems = {kind: misfits(config, layout) for kind, layout in LAYOUTS.items()}
    kind = min(problems, key=lambda k: ("pos" in problems[k], len(problems[k])))
    if problems[kind]:
        texts = [
            f"{name} {getattr(config, name)!r} ({kind} has {' or '.join(map(repr, values))})"
            for name, values in problems[kind].items()
        ]
        raise ValueError(f"no Hugging Face layout holds {' with '.join(texts)}")
    return kind


# ---------------------------------------------------------------------------------------------
# Parameters


def their_names(name, layout):
    """transformer.h.3.mlp.c_fc.weight -> [model.layers.3.mlp.gate_proj.weight, ...]"""
    if name.startswith("lm_head."):
        return [name]
    module, kind = name.removeprefix("transformer.").rsplit(".", 1)
    stem = layout.stem
    if module.startswith("h."):
        _, i, module = module.split(".", 2)
        stem = f"{stem}.{layout.blocks}.{i}"
    return [f"{stem}.{part}.{kind}" for part in layout.modules[module].split()]


def parameters(config):
    """{name: meta tensor} of this config's parameters; a tied head is not one of its own."""
    state = on_meta(config).state_dict()
    return {n: w for n, w in state.items() if n != "lm_head.weight" or not config.tie_embeddings}


def to_theirs(state, config, layout):
    """Our parameters -> theirs, {name: tensor}."""
    kv, theirs = config.n_kv_head * config.head_size, {}
    for name, w in state.items():
        names = their_names(name, layout)
        w = layout.rearrange(name, w, config, False)
        rows = {1: [len(w)], 2: [len(w) // 2] * 2, 3: [config.n_embd, kv, kv]}[len(names)]
        theirs |= zip(names, w.split(rows), strict=True)
    return theirs


def to_ours(weights, config, layout, origin):
    """Their parameters -> ours; ValueError for one that is missing, unknown or misshapen."""
    state = parameters(config)
    expected, weights = to_theirs(state, config, layout), dict(weights)
    for name in list(weights):
        head = name in ("lm_head.weight", "embed_out.weight")  # the second is GPT-NeoX's
        if name.endswith(BUFFERS) or (head and config.tie_embeddings):
            del weights[name]
        elif head:
            weights["lm_head.weight"] = weights.pop(name)
        elif not name.startswith((f"{layout.stem}.", "lm_head.")):  # as the hub's gpt2 has it
            weights[f"{layout.stem}.{name}"] = weights.pop(name)
    for name in expected.keys() - weights.keys():
        if name.endswith(tuple(f".{part}.bias" for part in layout.unbiased)):
            weights[name] = torch.zeros(expected[name].shape)
    for word, names in (("lacks", expected.keys() - weights.keys()),
                        ("has unknown", weights.keys() - expected.keys())):  # fmt: skip
        if names:
            raise ValueError(f"{origin} {word} tensors {', '.join(sorted(names)[:3])}")
    for name, w in weights.items():
        have, want = tuple(w.shape), tuple(expected[name].shape)
        if have != want:
            raise ValueError(f"{origin}: {name} has shape {have}, config.json asks for {want}")
    ours = {name: torch.cat([weights[n] for n in their_names(name, layout)]) for name in state}
    return {name: layout.rearrange(name, w, config, True) for name, w in ours.items()}


# ---------------------------------------------------------------------------------------------
# Folder -> model


def load(folder):
    """The GPT of a Hugging Face folder, in fp32, whatever dtype its files have.

    ValueError (one line) when it is damaged, or is a model that this one cannot be."""
    config, layout = read_config(folder)
    weights = to_ours(read_weights(folder), config, layout, folder)
    return fill(empty(config), weights, folder)


def read_config(folder):
    """config.json -> GPTConfig and Layout."""
    hf = read_json(folder / "config.json")
    kind = hf.get("model_type")
    layouts = LAYOUTS | READ_ONLY
    if kind not in layouts:
        reason = f", for {REFUSED[kind]}" if kind in REFUSED else ""
        raise ValueError(f"{folder}: model_type '{kind}' is none of: {', '.join(layouts)}{reason}")
    layout = layouts[kind]
    for old, new in {"n_embed": "hidden_size", "num_attention_heads": "n_head"}.items():
        if new in layout.keys.values() and old in hf:  # Bloom's first uploads
            hf.setdefault(new, hf[old])
    hf = {key: values[0] for key, values in layout.only.items()} | layout.defaults | hf
    for key, values in layout.only.items():
        if hf[key] not in values:
            known = " or ".join(map(str, values))
            raise ValueError(f"{folder}: {key} '{hf[key]}' has no switch here, only {known}")
    if layout.act and hf[layout.act] not in ACTIVATIONS:
        known = " or ".join(ACTIVATIONS)
        raise ValueError(
            f"{folder}: {layout.act} '{hf[layout.act]}' has no switch here, only {known}"
        )
    if kind == "llama" and hf.get("mlp_bias", False) != hf["attention_bias"]:
        raise ValueError(f"{folder}: attention_bias and mlp_bias differ; here one switch is both")
    try:
        fields = {ours: 0 if hf[key] is None else hf[key] for ours, key in layout.keys.items()}
        fields |= {name: values[0] for name, values in layout.switches.items()}
        if layout.act:
            fields["mlp"] = ACTIVATIONS[hf[layout.act]]
        if fields["pos"] == "rope":
            fields |= read_rope(hf, folder)
        # a foreign folder does not say which rows only pad
        fields["vocab_used"] = hf.get("vocab_used", hf["vocab_size"])
        config = GPTConfig(**fields)
        if "vocab_used" not in hf and hf.get("eos_token_id") == EOT and has_gpt2_vocabulary(config):
            config.vocab_used = N_VOCAB
        return config, layout
    except KeyError as error:
        raise ValueError(f"{folder}: config.json lacks {error}") from None
    except (TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{folder}: config.json has a value of a wrong type: {error}") from None


def read_rope(hf, folder):
    """RoPE's fields, from transformers 5's rope_parameters or the older rope_theta and
    rope_scaling."""
    width = hf["hidden_size"] // hf["num_attention_heads"]
    if (hf.get("head_dim") or width) != width:
        raise ValueError(f"{folder}: head_dim {hf['head_dim']} has no switch here, only {width}")
    rope = {"rope_theta": hf.get("rope_theta", hf.get("rotary_emb_base", 10000.0))}
    rope |= hf.get("rope_parameters") or {}
    part = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", hf.get("rotary_pct")))
    if part not in (None, 1):
        raise ValueError(f"{folder}: only {part} of a head's channels turn, here all do")
    rope |= hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ValueError(f"{folder}: rope_type '{kind}' has no switch here, only linear")
    factor = rope["factor"] if kind == "linear" else 1.0
    return {"rope_theta": float(rope["rope_theta"]), "rope_scaling": float(factor)}


def read_weights(folder):
    """All tensors of a folder: of safetensors, else of torch.save's files; of the shards that an
    index names, or of one file."""
    name = weights_in(folder) or WEIGHTS
    if name == WEIGHTS:
        return read_safetensors(folder / WEIGHTS)
    weights = {}
    for file in files_of(folder / name):
        if file.endswith(".safetensors"):
            weights |= read_safetensors(folder / file)
            continue
        found = read_torch(folder / file)
        if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
            raise ValueError(f"{folder / file} holds more than named tensors: no weights file")
        weights |= found
    return weights


def weights_in(folder):
    """The first of WHERE that a folder holds, or None."""
    return next((name for name in WHERE if (folder / name).is_file()), None)


def files_of(path):
    """The files that one of WHERE stands for: itself, or the shards that an index names."""
    return shard_names(path) if path.name in (INDEX, OLD_INDEX) else [path.name]


def shard_names(index):
    suffix = ".bin" if Path(index).name == OLD_INDEX else ".safetensors"
    try:
        shards = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} has no weight_map of file names") from None
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(suffix):
            raise ValueError(f"{index} names {shard}, which is no {suffix} file beside it")
    return shards


def download(name):
    """Fetch a hub model's config, vocabulary and weights -> their folder in the hub's cache."""
    from huggingface_hub import file_exists

    def fetch(file, check, revision=None):
        def check_or_forget(path):
            try:
                check(path)
            except ValueError:
                if os.path.islink(path):  # the cache would link to the same damaged file again
                    os.remove(os.path.realpath(path))
                raise

        check_it = check and check_or_forget
        path = hub_download(name, file, None, "model", revision, check_it, OFFLINE)
        return Path(path).parent

    folder = fetch("config.json", read_json)
    commit = folder.name  # all files of one commit, also when the repo changes meanwhile

    def there(file):
        return with_retries(name, lambda: file_exists(name, file, revision=commit), OFFLINE)

    found = weights_in(folder)
    if not found:  # the vocabulary first: where weights are, it was looked for
        if vocabulary := next(filter(there, VOCABULARIES), None):
            fetch(vocabulary, read_json, commit)
        found = next(filter(there, WHERE), None)
    if not found:
        raise ValueError(f"{name} has no weights that this reads: none of {', '.join(WHERE)}")
    if found in (INDEX, OLD_INDEX):
        fetch(found, shard_names, commit)
    for file in files_of(folder / found):
        # of a pickle the hash alone; nothing in it is run when it is read
        fetch(file, check_whole if file.endswith(".safetensors") else None, commit)
    return folder


# ---------------------------------------------------------------------------------------------
# Model -> folder


def save(model, folder, vocab=N_VOCAB):
    """Write a GPT as a new Hugging Face folder, in fp32 -> its model_type.

    vocab: the checkpoint's vocabulary_of(); only a model of that many ids gets the tokenizer.
    ValueError when no layout holds the model, or the folder exists and is not empty."""
    config, folder = model.config, Path(folder)
    if len(set(config.windows)) == 1:  # a pattern without a mix
        config = replace(
            config, window=config.windows[0], window_pattern="", attention_kernel="auto"
        )
    kind = choose(config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; give a new one as --out")
    layout = LAYOUTS[kind]
    # the config as it will be read back
    held = replace(config, **{name: values[0] for name, values in layout.switches.items()})
    held.mlp = config.mlp
    state = model.state_dict()
    if config.pos != held.pos:  # sinusoidal or none: tabulated
        table = model.transformer.wpe.embed(torch.arange(config.block_size))
        state |= {} if table is None else {"transformer.wpe.weight": table}
    # what it lacks are zeros: biases, or the position table of none
    state = {name: state.get(name, torch.zeros(w.shape)) for name, w in parameters(held).items()}
    weights = {
        name: w.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
        for name, w in to_theirs(state, held, layout).items()
    }
    eot = vocab - 1 if config.vocab_used == vocab else None
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    if eot:
        write_tokenizer(beside, config.block_size, vocab)
    try:
        save_file(weights, beside / WEIGHTS, {"format": "pt"})
    except SafetensorError as error:  # a full disk
        shutil.rmtree(beside, ignore_errors=True)
        raise OSError(f"could not write {folder}: {error}") from None
    write_json(beside / "config.json", write_config(held, kind, eot))
    generation = {"bos_token_id": eot, "eos_token_id": eot}
    if config.vocab_used < config.vocab_size:  # padding, never to be sampled
        generation["suppress_tokens"] = list(range(config.vocab_used, config.vocab_size))
    write_json(beside / "generation_config.json", generation)
    os.replace(beside, folder)
    return kind


def write_config(config, kind, eot):
    """GPTConfig -> the dict of config.json; eot is the end-of-text id or None."""
    layout = LAYOUTS[kind]
    hf = {"architectures": [layout.architecture], "model_type": kind, "torch_dtype": "float32"}
    hf |= {"bos_token_id": eot, "eos_token_id": eot, "vocab_used": config.vocab_used}
    hf |= {key: values[0] for key, values in layout.only.items()}
    hf |= {key: getattr(config, ours) for ours, key in layout.keys.items()}
    if layout.act:
        hf[layout.act] = layout.defaults[layout.act] if config.mlp == "gelu" else "gelu"
    if "sliding_window" in hf:
        hf["sliding_window"] = config.window or None
    if "attention_bias" in hf:
        hf["mlp_bias"] = config.bias
    if config.pos == "rope":
        linear = {"rope_type": "linear", "factor": config.rope_scaling}
        scaling = linear if config.rope_scaling != 1 else None
        rope = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
        # transformers 5 reads the first, 4 the others
        hf |= {"rope_parameters": rope, "rope_theta": config.rope_theta, "rope_scaling": scaling}
    if kind == "gpt2":  # where absent, transformers trains with 0.1
        hf |= {f"{part}_pdrop": config.dropout for part in ("resid", "embd", "attn")}
    return hf


def write_tokenizer(folder, block_size, vocab):
    """GPT-2's vocabulary, cut to `vocab` ids: those of tiktoken's encode_ordinary, except that
    <|endoftext|> in a text is the end-of-text id unless split_special_tokens=True is passed."""
    name, verbatim = "<|endoftext|>", ("single_word", "lstrip", "rstrip", "normalized")
    special = {"id": vocab - 1, "content": name, "special": True, **dict.fromkeys(verbatim, False)}
    # vocab.json and merges.txt would do for GPT-2, but not beside a Mistral config
    write_json(folder / "tokenizer.json", gpt2_json([special], vocab))
    about = dict.fromkeys(("bos_token", "eos_token", "unk_token"), name)
    about |= {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size}
    write_json(folder / "tokenizer_config.json", about)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
