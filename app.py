"""streamlit run app.py -- --runs runs        # needs: pip install -r requirements-app.txt

A page over sample.py: one prompt through one trained model, or through several side by side. The
text comes as it is drawn; below it each run's curve, what the model held likely at every step,
and what its attention heads looked at.
"""

import base64
import contextlib
import ctypes
import functools
import gc
import html
import math
import os
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch

import sample
from nanoswitch import cli
from nanoswitch.load import step_of
from nanoswitch.log import read_run
from nanoswitch.shards import recipe

try:
    import altair as alt  # streamlit brings it
    import streamlit as st
except ModuleNotFoundError:  # main() says it: importing this file needs no streamlit
    st = None

INK = (46, 123, 224)  # red, green, blue of an attention weight: seen on white and on black alike
TOP = 5  # likeliest tokens shown at each step
PICTURED = 32  # first tokens of the prompt whose attention is drawn: more would be unreadable
SCORES = {
    "val_loss": "validation loss",
    "val_bpb": "bits per byte",
    "hellaswag_acc_norm": "HellaSwag",
}
FIRST_RUN = f"{recipe('data/pydocs', vocab=4096)}\npython train_gpt2.py configs/quickstart.toml"
WRITE_FIRST = "Press Write first: this looks inside the models at what they wrote"
CACHE = dict(max_entries=8, show_spinner=False)
EXPECTED = (ValueError, OSError, ModuleNotFoundError, MemoryError, RuntimeError)


@dataclass
class AppConfig:
    runs: str = "runs"
    """folder of run folders to choose from"""
    device: str = "auto"
    """auto takes cuda, else mps, else cpu"""


class Slot:
    """The one model in memory. Hold `lock` while using it: pages take turns."""

    def __init__(self):
        self.lock, self.key, self.loaded = threading.Lock(), None, None
        with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc would keep it:
            ctypes.CDLL(None).mallopt(-3, 1 << 20)  # freed memory from 1 MB up goes back at once

    def load(self, name, device):
        """A checkpoint by path or hub name -> its model, and its tokenizer unless it is GPT-2's.

        The one before is freed first, so there are never two. A run that went on is read again."""
        key = step_of(name)
        file = next((f for f in (key / "config.json", key) if f.is_file()), None)
        key = key, file and state(file)  # another run may come to the same place
        if key != self.key:
            self.key = self.loaded = None
            gc.collect()
            self.loaded, self.key = sample.load(name, device), key
        return self.loaded


@dataclass
class Reply:
    """What a model made of a prompt, and a look inside; plain data, which outlives the model."""

    prompt: str
    text: str = ""
    about: str = ""  # the model, on one line
    error: str = ""  # why there is no text, on one line
    steps: list = field(default_factory=list)  # a row of the table for each drawn token
    tokens: list = field(default_factory=list)  # of the prompt, the first PICTURED
    attention: list = field(default_factory=list)  # of each layer, (nh, T, T)


@torch.no_grad()
def write(reply, slot, config, box):
    """Fill a reply, shown in the placeholder `box` as it comes."""
    try:
        model, own = slot.load(config.checkpoint, config.device)
        reply.about = describe(model)
        tokenizer, eot = sample.pick_tokenizer(own)
        ids = sample.encode(tokenizer, eot, reply.prompt)
        with watched([model], "stream", keep_tokens) as drawn:
            for piece in sample.stream_text(model, ids, config, own):
                reply.text += piece
                show_text(reply, box)
        reply.steps = probabilities(model, tokenizer, ids, drawn)
        reply.tokens = [spell(tokenizer, token) for token in ids[:PICTURED]]
        reply.attention = attention(model, ids[:PICTURED])  # causal: the rest changes nothing
    except EXPECTED as error:
        reply.error = one_line(error)


@contextlib.contextmanager
def watched(things, name, watcher):
    """Within the block these objects' method becomes watcher(method, kept, ...) -> list kept."""
    kept = []
    for thing in things:
        setattr(thing, name, functools.partial(watcher, getattr(thing, name), kept))
    try:
        yield kept
    finally:
        for thing in things:
            delattr(thing, name)  # the class's own method is seen again


def keep_tokens(stream, kept, *args, **kwargs):
    """GPT.stream, with the tokens that it draws kept."""
    for token in stream(*args, **kwargs):
        kept.append(token.item())
        yield token


def probabilities(model, tokenizer, ids, drawn):
    """A row of the table for each token drawn after ids: the token, its probability, the likeliest.

    The probabilities are the model's own, before temperature, top-k and top-p."""
    idx = torch.tensor([ids + drawn[:-1]], device=next(model.parameters()).device)  # (1, T)
    rows, x = [], model.features(idx)[0, len(ids) - 1 :]  # (steps, C)
    for part in x.split(64):  # 13 MB of logits at once
        probs = model.logits(part).float()[:, : model.config.vocab_used].softmax(-1).cpu()
        for p, token in zip(probs, drawn[len(rows) :], strict=False):
            row = {"drawn": spell(tokenizer, token), "probability": p[token].item()}
            likely = enumerate(p.topk(TOP).indices.tolist(), 1)
            rows.append(row | {f"{n}.": f"{spell(tokenizer, i)}  {p[i]:.0%}" for n, i in likely})
    return rows


def attention(model, ids):
    """Attention weights over the tokens ids: of each layer (nh, T, T), query by key, on the CPU;
    None of one that has none."""
    attns = [block.attn for block in model.transformer.h]
    with watched(attns, "attend", keep_weights) as kept:
        model.features(torch.tensor([ids], device=next(model.parameters()).device))
    return [next((w for attn, w in kept if attn is own), None) for own in attns]


def keep_weights(attend, kept, q, k, v, mask, cache, x):
    """Attention.attend, with its weights kept. Attention is linear in its values, so with the
    identity matrix for values it returns the weights, whatever the positions, windows and kernel.
    Linformer's summaries come out spread over the tokens they are made of, perhaps negative."""
    T, hs = v.shape[2:]  # slices as wide as a head: some kernels insist
    columns = torch.eye(T, math.ceil(T / hs) * hs, device=v.device, dtype=v.dtype).split(hs, dim=1)
    y = attend(q, k, v, mask, cache, x)
    if torch.allclose(attend(q, k, 2 * v, mask, cache, x), 2 * y, rtol=0.01):  # differential is not
        parts = [
            attend(q, k, eye.expand_as(v), mask, cache, x) for eye in columns
        ]  # (1, nh, T, hs) each
        kept.append((attend.__self__, torch.cat(parts, dim=3)[0, :, :, :T].float().cpu()))
    return y


def spell(tokenizer, token):
    """A token with its spaces and line ends visible."""
    return tokenizer.decode([token]).replace(" ", "·").replace("\n", "↵")


def describe(model):
    """A model's switches and size on one line."""
    c, size = model.config, f"{model.num_params() / 1e6:,.1f}M params"
    attends = f"window {c.window}" if c.window else f"{c.attention} attention"
    heads = f"{c.n_head}/{c.n_kv_head} heads"  # of queries, of keys
    return f"{c.pos} · {c.norm} · {c.mlp} · {attends} · {heads} · {size}"


# ----------------------------------------------------------------------------- what is shown
def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__  # a MemoryError says nothing


def show_text(reply, box):
    """Model, prompt and text as they are, neither markdown nor HTML; or what went wrong."""
    if reply.error:
        return box.error(reply.error)
    about, prompt, text = map(html.escape, (reply.about, reply.prompt, reply.text))
    box.html(
        f"<small style='opacity: .7'>{about}</small><div style='margin-top: .5rem; white-space: "
        f"pre-wrap; overflow-wrap: anywhere'><span style='opacity: .7'>{prompt}</span>{text}</div>"
    )


def show_curves(logs):
    """Validation loss and HellaSwag of {name: log.Run} against tokens."""
    drawn = 0
    for key, title in SCORES.items():
        points = [
            {"run": name, "tokens": step * run.config["total_batch_tokens"], title: value}
            for name, run in logs.items() for step, value in zip(*run.curve(key), strict=True)
        ]  # fmt: skip
        if len({point["tokens"] for point in points}) > 1:
            x, y = alt.X("tokens:Q").axis(format="~s"), alt.Y(f"{title}:Q").scale(zero=False)
            color = alt.Color("run:N", title=None, sort=list(logs)).legend(orient="top")
            chart = alt.Chart(alt.Data(values=points), height=300, description=f"{title} by tokens")
            st.altair_chart(chart.mark_line(point=True).encode(x, y, color))
            drawn += 1
    if not drawn:
        st.caption("A run's curve begins with the second validation in its log")


def show_steps(name, reply):
    """The table of the likeliest tokens at each step."""
    bar = st.column_config.ProgressColumn(format="percent", max_value=1.0)
    st.dataframe(reply.steps, column_config={"probability": bar}, height=320)


def show_attention(name, reply):
    """One layer: a head with its tokens written out, and every head as a thumbnail."""
    layers = [i for i, weights in enumerate(reply.attention) if weights is not None]
    if not layers:
        return st.caption("This attention has no weights to draw")
    left, right = st.columns(2)
    layer = left.selectbox("Layer", layers, key=f"layer {name}")
    weights = reply.attention[layer]  # (nh, T, T)
    head = right.selectbox("Head", range(len(weights)), key=f"head {name}")
    names = [f"{i} {token}" for i, token in enumerate(reply.tokens)]
    cells = [
        {"query": q, "key": k, "weight": round(weights[head, i, j].item(), 3)}
        for i, q in enumerate(names) for j, k in enumerate(names[: i + 1])
    ]  # fmt: skip
    words = alt.Axis(labelExpr="split(datum.label, ' ')[1]", labelOverlap=False)  # every token
    axes = {"sort": names, "title": None, "axis": words}
    what = f"attention of head {head} in layer {layer}: a row is a token, a column what it reads"
    chart = alt.Chart(alt.Data(values=cells), height=360, description=what).mark_rect(
        color=f"rgb{INK}", stroke="gray", strokeOpacity=0.2
    ).encode(
        alt.X("key:N", **axes), alt.Y("query:N", **axes),
        alt.FillOpacity("weight:Q", scale=alt.Scale(domain=[0, 1], range=[0, 1]), legend=None),
        tooltip=["query:N", "key:N", "weight:Q"],
    )  # fmt: skip
    st.altair_chart(chart)
    times = math.ceil(84 / len(names))  # pixels a token
    w = weights.clamp(0, 1).repeat_interleave(times, 1).repeat_interleave(times, 2)
    w = torch.nn.functional.pad(w, (6, 6, 6, 6))  # the page rounds a picture's corners
    inks = torch.tensor(INK).expand(*w.shape, 3)
    pictures = torch.cat([inks, (w * 255)[..., None]], dim=3)  # (nh, T', T', red to opacity)
    st.image(list(pictures.byte().numpy()), [f"head {i}" for i in range(len(w))], width=96)


def show_report(folder):
    """The report of a comparison in folder, as compare.py wrote it: one page without anything
    outside it."""
    reports = find(folder, "report.html")
    if not reports:
        command = f"compare.py A.toml B.toml --out {folder}/NAME"
        return st.caption(f"A comparison writes a report, which is then shown here: `{command}`")
    name = st.selectbox("Comparison", reports, key="report")
    read = st.cache_resource(lambda file, state: file.read_bytes(), **CACHE)
    text = read(reports[name], state(reports[name]))
    file = f"{reports[name].parent.name}.html"
    st.download_button("Download", text, file, "text/html", on_click="ignore")
    # an address of its own origin: a report from elsewhere reaches nothing of this page
    address = f"data:text/html;base64,{base64.b64encode(text).decode()}"
    st.iframe(address, height=900, alt=f"the report of {name}")


# ----------------------------------------------------------------------------- the page
def find(folder, *names):
    """{where: file} of the folders below a folder that hold files of these names, newest first,
    steps of runs left out; each folder with the first name that it has."""
    found = {}
    for here, inside, files in os.walk(folder):
        inside[:] = [name for name in inside if not re.fullmatch(r"step_\d+", name)]
        if held := [name for name in names if name in files]:
            found[os.path.relpath(here, folder)] = Path(here, held[0])
    return dict(sorted(found.items(), key=lambda item: -item[1].stat().st_mtime))


def state(file):
    """What is another after a file was written: its time in ns and its size in bytes."""
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size


def choose(folder):
    """The checkpoints that the reader picks or types: {name on the page: path or hub name}."""
    # runs, those of comparisons too, and Hugging Face folders; a run that begins has its log only
    runs = find(folder, "latest", "model.safetensors", "log.jsonl")
    if not runs:
        st.info(f"There are no runs in `{folder}` yet. These two commands make one, in minutes:")
        st.code(FIRST_RUN, language="shell", wrap_lines=True)
    left, right = st.columns(2)
    picked = left.multiselect(
        "Runs, newest first", runs, list(runs)[:1], max_selections=4, key="runs"
    )  # with a key, the choice stays when a run's new step changes the list
    typed = right.text_input("or a folder, or a hub repository", placeholder="gpt2").strip()
    return {name: str(runs[name].parent) for name in picked} | ({typed: typed} if typed else {})


def settings():
    """The sampling controls, in the side bar -> fields of SampleConfig."""
    first, bar = sample.SampleConfig(""), st.sidebar
    bar.header("Sampling")
    return dict(
        temperature=bar.slider("Temperature", 0.0, 2.0, first.temperature, 0.05),
        top_k=bar.slider("Top-k", 0, 200, first.top_k, help="0 draws from all tokens"),
        top_p=bar.slider("Top-p", 0.05, 1.0, first.top_p, 0.05),
        max_new_tokens=bar.slider("Tokens", 1, 400, first.max_new_tokens),
        seed=bar.number_input("Seed", 0, 2**31, first.seed, help="same seed, same text"),
    )  # fmt: skip


def read_logs(chosen):
    """{name: path} -> {name: log.Run} of those with a log, and {name: what is wrong with it}."""
    read = st.cache_resource(lambda path, state: read_run(path), **CACHE)
    logs, broken = {}, {}
    for name, path in chosen.items():
        log = Path(path) / "log.jsonl"
        try:
            run = read(path, state(log)) if log.is_file() else None
        except (ValueError, OSError) as error:
            broken[name] = one_line(error)
        else:
            logs |= {name: run} if run else {}
    return logs, broken


def page(config, slot):
    st.header("nanoswitch", anchor=False)
    st.caption("Base models: they continue a text, they do not answer")
    chosen, options = choose(config.runs), settings() | {"device": config.device}
    prompt = st.text_area("Prompt", sample.SampleConfig("").prompt, max_chars=20_000, height=100)
    if pressed := st.button("Write", type="primary"):
        st.session_state.replies = {name: Reply(prompt) for name in chosen}
        if not chosen:
            st.warning("Choose a run first, or name a folder or a hub repository")
    logs, broken = read_logs(chosen)
    replies = {n: r for n, r in st.session_state.get("replies", {}).items() if n in chosen}

    columns = st.columns(len(chosen), border=True) if chosen else []
    for column, name in zip(columns, chosen, strict=True):
        with column:
            st.subheader(name, anchor=False)
            last = {what: logs[name].last(key) for key, what in SCORES.items() if name in logs}
            st.caption(" · ".join(f"{what} {x:.3f}" for what, x in last.items() if x is not None))
            if name in broken:
                st.warning(f"no curve: {broken[name]}")
            box = st.empty()
            if pressed:
                with slot.lock:
                    write(replies[name], slot, sample.SampleConfig(chosen[name], **options), box)
            if name in replies:
                show_text(replies[name], box)

    curves, *inside, report = st.tabs(["Curves", "Next token", "Attention", "Report"])
    with curves:
        show_curves(logs)
    with report:
        show_report(config.runs)
    whole = [(n, replies[n]) for n in chosen if n in replies and replies[n].attention]
    for tab, show, least in zip(inside, (show_steps, show_attention), (1, 2), strict=True):
        if not whole:
            tab.caption(WRITE_FIRST)
        columns = tab.columns(max(len(whole), least))  # attention alone would be drawn too wide
        for column, (name, reply) in zip(columns, whole, strict=False):
            with column:
                st.markdown(f"**{name}**")
                show(name, reply)


def main():
    if st is None:
        raise ModuleNotFoundError("the page needs streamlit: pip install streamlit==1.67.0")
    if not st.runtime.exists():
        raise ValueError("the page is served, not run: streamlit run app.py")
    st.set_page_config("nanoswitch", layout="wide")
    # Streamlit runs this file anew at each click, and keeps the slot for the whole server
    slot = st.cache_resource(lambda: Slot(), show_spinner=False)()
    try:
        page(cli.parse(AppConfig), slot)
    except SystemExit:
        st.error("a flag is wrong, the terminal says which: streamlit run app.py -- --runs DIR")
    except EXPECTED as error:
        st.error(one_line(error))


if __name__ == "__main__":
    cli.run(main)
