"""app.py: what it computes against formulas, its page without a browser (Streamlit's AppTest), and
in headless Chromium:

    python -m pytest tests/test_app.py -m browser     # needs requirements-dev.txt and chromium

The browser's tests are skipped, with the reason, where one of these is missing.
"""

import base64
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pyarrow
import pytest
import torch
from builders import GPT2_VOCABULARY, grown, rig, tiny, write_jsonl, write_step

import app
import sample
from model import POSITIONS
from nanoswitch.kernels import KERNELS
from nanoswitch.tokenizer import get_tokenizer

ROOT = Path(__file__).parent.parent
PIN = next(
    line for line in (ROOT / "requirements-app.txt").read_text().split() if "streaml" in line
)
MISSING = [
    what
    for what, found in (
        (PIN, app.st), ("selenium", find_spec("selenium")),
        ("chromium", shutil.which("chromium")), ("chromedriver", shutil.which("chromedriver")),
    ) if not found
]  # fmt: skip
needs_streamlit = pytest.mark.skipif(app.st is None, reason=f"needs {PIN}: requirements-app.txt")


def writer(**changes):
    """A small model of GPT-2's vocabulary."""
    return grown(tiny(**dict(block_size=48, n_head=2, n_embd=32) | GPT2_VOCABULARY | changes))


def save_run(folder, model, log=True):
    """A finished run folder, as train_gpt2.py leaves it."""
    step = write_step(folder / "step_000004", model)
    (folder / "latest").write_text(step.name)
    start = {"event": "start", "parameters": 1, "config": {"total_batch_tokens": 1000}}
    entries = [start, {"step": 0, "val_loss": 10.8}, {"step": 4, "val_loss": 8.125}]
    entries += [{"step": 2, "hellaswag_acc_norm": 0.25}, {"step": 4, "hellaswag_acc_norm": 0.2625}]
    if log:
        write_jsonl(folder / "log.jsonl", entries)
    return folder


# ----------------------------------------------------------------------------- what it computes

ARCHITECTURES = (
    [dict(pos=pos, n_kv_head=1) for pos in POSITIONS]
    + [dict(pos=pos, window=3, window_pattern="SL") for pos in ("learned", "alibi")]
    + [dict(attention=a, linformer_segment=4, linformer_rank=3) for a in ("full", "linformer")]
    + [dict(attention_kernel=kernel) for kernel in KERNELS]
    + [dict(qk_norm=True, document_mask=True), dict(attention_kernel="flex", window=3)]
)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("changes", ARCHITECTURES, ids=str)
def test_attention_weights_are_those_that_made_the_heads_outputs(changes):
    """A head's output is y = W v. With fewer tokens than channels in a head, v has a right
    inverse, so y and v alone tell what W was."""
    model, seen, hooks = writer(n_embd=64, vocab_size=128, vocab_used=100, **changes), [], []
    ids = [5, 9, 99, 3, 4, 7, 98, 1, 2, 6]  # 10 tokens, 32 channels; 99 ends a text
    for block in model.transformer.h:
        hooks += [block.attn.c_attn.register_forward_hook(lambda m, x, y: seen.append(y))]
        hooks += [block.attn.c_proj.register_forward_hook(lambda m, x, y: seen.append(x[0]))]
    with torch.no_grad():
        before, _ = model(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        layers = app.attention(model, ids)
        after, _ = model(torch.tensor([ids]))
    assert torch.equal(before, after) and len(layers) == 2
    assert not any("attend" in vars(block.attn) for block in model.transformer.h)
    for weights, qkv, y in zip(layers, seen[::2], seen[1::2], strict=True):
        for head in range(2):
            group = head * model.config.n_kv_head // 2
            begin = 64 + (model.config.n_kv_head + group) * 32
            v, out = qkv[0, :, begin : begin + 32], y[0, :, head * 32 : head * 32 + 32]  # (T, hs)
            torch.testing.assert_close(weights[head], out @ torch.linalg.pinv(v), atol=1e-4, rtol=0)
        assert weights.triu(1).abs().max() == 0
        if model.config.attention == "full":
            torch.testing.assert_close(weights.sum(2), torch.ones(2, 10))


def test_attention_of_more_tokens_than_a_head_has_channels():
    model, ids = writer(n_embd=8), list(range(37))
    with torch.no_grad():
        first, whole = app.attention(model, ids[:4]), app.attention(model, ids)
    for few, many in zip(first, whole, strict=True):
        assert many.shape == (2, 37, 37)
        torch.testing.assert_close(many[:, :4, :4], few)
        torch.testing.assert_close(many.sum(2), torch.ones(2, 37))


@pytest.mark.parametrize(
    "changes, drawn",
    [
        (dict(attention="differential"), []),  # a norm after its weights: they do not tell
        (dict(attention="mla", n_kv_head=2), []),
        (dict(attention="gated_deltanet", attention_pattern="gated_deltanet,full"), [1]),
    ],
)
def test_attention_that_has_no_weights_is_left_out(changes, drawn):
    model = writer(n_embd=64, pos="rope", **changes)
    with torch.no_grad():
        layers = app.attention(model, list(range(10)))
    assert [i for i, weights in enumerate(layers) if weights is not None] == drawn
    for weights in filter(lambda one: one is not None, layers):
        torch.testing.assert_close(weights.sum(2), torch.ones(2, 10))


def test_the_table_holds_the_models_probabilities():
    """Constant logits, so that they are known: a 1/2, b 3/10, newline 1/5."""
    model = writer(block_size=128, tie_embeddings=False)
    known = {"a": 0.5, "·b": 0.3, "↵": 0.2}
    ids = [get_tokenizer().encode_ordinary(text)[0] for text in ("a", " b", "\n")]
    rig(model, {token: math.log(p) for token, p in zip(ids, known.values(), strict=True)})
    with torch.no_grad():
        model.lm_head.weight[model.config.vocab_used :, 0] = 1e4  # padding, which is never drawn
        rows = app.probabilities(model, get_tokenizer(), [7, 8], ids * 30)
    assert [row["drawn"] for row in rows] == list(known) * 30
    for row in rows:
        assert row["probability"] == pytest.approx(known[row["drawn"]], abs=1e-5)
        assert [row["1."], row["2."], row["3."]] == ["a  50%", "·b  30%", "↵  20%"]


class Box:
    """A placeholder of the page, which remembers what it showed."""

    def __init__(self):
        self.shown = []

    def html(self, text):
        self.shown.append(text)

    error = html


def written(tmp_path, prompt="Hello <b>*you*</b>", **changes):
    """A tiny model's reply, written without a page -> the reply, what was shown, the model."""
    run, box, slot = save_run(tmp_path / "run", writer(**changes)), Box(), app.Slot()
    reply = app.Reply(prompt)
    config = sample.SampleConfig(str(run), prompt=prompt, max_new_tokens=20, device="cpu")
    app.write(reply, slot, config, box)
    return reply, box.shown, slot.loaded[0], config


def test_a_reply_is_samples_text_and_its_steps_are_the_drawn_tokens(tmp_path):
    reply, shown, model, config = written(tmp_path)
    assert not reply.error
    assert reply.text == sample.sample(model, reply.prompt, config)[0]
    drawn = "".join(row["drawn"] for row in reply.steps)
    assert drawn.replace("·", " ").replace("↵", "\n") == reply.text and len(reply.steps) == 20
    assert "".join(reply.tokens) == "Hello·<b>*you*</b>"
    assert "stream" not in vars(model)
    lengths = [len(text) for text in shown]
    assert len(shown) > 10 and lengths == sorted(set(lengths))  # each longer than the one before
    assert "Hello &lt;b&gt;*you*&lt;/b&gt;</span>" in shown[0]


def test_a_prompt_beyond_the_context_is_one_line_and_the_slot_goes_on(tmp_path):
    reply, _, model, _ = written(tmp_path, prompt="word " * 60)
    assert "context of 48" in reply.error and "shorten it" in reply.error
    assert "stream" not in vars(model) and not reply.attention


def test_a_run_that_went_on_is_read_again(tmp_path):
    run, slot = save_run(tmp_path / "run", writer()), app.Slot()
    first, _ = slot.load(str(run), "cpu")
    assert slot.load(str(run), "cpu")[0] is first
    (run / "step_000004").rename(run / "step_000008")
    (run / "latest").write_text("step_000008")
    second, _ = slot.load(str(run), "cpu")
    assert second is not first
    shutil.rmtree(run)  # and another one begun in its place comes to the same step
    other = save_run(tmp_path / "run", writer())
    (other / "step_000004").rename(other / "step_000008")
    (other / "latest").write_text("step_000008")
    assert slot.load(str(run), "cpu")[0] is not second


def test_importing_needs_no_streamlit_and_running_names_it():
    code = (
        "import runpy, sys; sys.modules['streamlit'] = None  # as if it were not installed\n"
        "import app; runpy.run_path('app.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: the page needs streamlit: pip install {PIN}\n"


# ----------------------------------------------------------------------------- the page, no browser


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two whole runs, one with a bad log, one without weights, and one that has only begun."""
    folder = tmp_path_factory.mktemp("runs")
    wide = dict(n_embd=64, n_head=4, block_size=256)
    save_run(folder / "gpt2", writer(**wide))
    save_run(
        folder / "llama", writer(**wide, pos="rope", norm="rmsnorm", mlp="swiglu", n_kv_head=2)
    )
    save_run(folder / "badlog", writer())
    (folder / "badlog" / "log.jsonl").write_text("not json\n")
    save_run(folder / "hollow", writer(), log=False)
    (folder / "hollow" / "step_000004" / "model.safetensors").unlink()
    save_run(folder / "begun", writer())
    shutil.rmtree(folder / "begun" / "step_000004")
    (folder / "begun" / "latest").unlink()
    for age, name in enumerate(("gpt2", "llama", "badlog", "hollow", "begun")):  # the list's order
        newest = folder / name / ("log.jsonl" if name == "begun" else "latest")
        os.utime(newest, (time.time() - age - 9,) * 2)
    return folder


@pytest.fixture
def page(runs, monkeypatch):
    return open_page(monkeypatch, runs)


def open_page(monkeypatch, folder):
    from streamlit.testing.v1 import AppTest

    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(folder), "--device", "cpu"])
    return AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()


def write(page, names, prompt="Once upon a time", tokens=5, typed=""):
    page.multiselect[0].set_value(names)
    page.text_input[0].set_value(typed)
    page.text_area[0].set_value(prompt)
    next(s for s in page.slider if s.label == "Tokens").set_value(tokens)
    page.button[0].click().run()
    assert not page.exception
    return page


def texts(page):
    """What the replies say, without the line about the model and the prompt."""
    bodies = [element.proto.body for element in page.get("html")]
    return [re.search(r"</span>(.*)</div>", body, re.DOTALL)[1] for body in bodies]


def drawn(chart):
    """The points of a chart."""
    return pyarrow.ipc.open_stream(chart.proto.data.data).read_all().to_pylist()


@needs_streamlit
def test_the_page_lists_runs_and_shows_their_scores(page):
    assert page.multiselect[0].options == ["gpt2", "llama", "badlog", "hollow", "begun"]
    assert page.multiselect[0].value == ["gpt2"] and not page.error and not page.exception
    assert page.caption[1].value == "validation loss 8.125 · HellaSwag 0.263"
    loss, score = map(drawn, page.get("vega_lite_chart"))
    assert loss == [
        {"run": "gpt2", "tokens": 0, "validation loss": 10.8},
        {"run": "gpt2", "tokens": 4000, "validation loss": 8.125},
    ]
    assert score == [
        {"run": "gpt2", "tokens": 2000, "HellaSwag": 0.25},
        {"run": "gpt2", "tokens": 4000, "HellaSwag": 0.2625},
    ]


@needs_streamlit
def test_runs_of_a_comparison_and_hugging_face_folders_are_found(runs, tmp_path, monkeypatch):
    (tmp_path / "exported").mkdir()
    shutil.copy(runs / "gpt2" / "step_000004" / "model.safetensors", tmp_path / "exported")
    shutil.copytree(runs / "llama", tmp_path / "comparison" / "runs" / "rope" / "seed_1337")
    page = open_page(monkeypatch, tmp_path)
    assert sorted(page.multiselect[0].options) == ["comparison/runs/rope/seed_1337", "exported"]


@needs_streamlit
def test_a_comparisons_report_is_shown_and_can_be_kept(page, runs, tmp_path, monkeypatch):
    assert not page.get("iframe") and any("compare.py A.toml" in c.value for c in page.caption)
    for name in ("rope", "heads"):
        (tmp_path / "all" / name).mkdir(parents=True)
        (tmp_path / "all" / name / "report.html").write_text(f"<p>the report of {name} ±</p>")
    os.utime(tmp_path / "all" / "rope" / "report.html", (1, 1))
    page = open_page(monkeypatch, tmp_path / "all")
    [chosen] = [box for box in page.selectbox if box.label == "Comparison"]
    assert chosen.options == ["heads", "rope"] and not page.exception
    for name in ("heads", "rope"):
        page = chosen.set_value(name).run()
        [frame] = page.get("iframe")
        kind, _, content = frame.proto.src.partition(",")
        assert kind == "data:text/html;base64"  # an origin of its own
        assert base64.b64decode(content).decode() == f"<p>the report of {name} ±</p>"
    assert [button.proto.label for button in page.get("download_button")] == ["Download"]


@needs_streamlit
def test_several_runs_side_by_side_write_what_sample_writes(page, runs):
    write(page, ["gpt2", "llama"])
    config = sample.SampleConfig("", max_new_tokens=5, device="cpu")
    for name, text in zip(("gpt2", "llama"), texts(page), strict=True):
        model, _ = sample.load(runs / name, "cpu")
        expected = sample.sample(model, "Once upon a time", config)[0]
        assert text == expected.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert [len(table.value) for table in page.dataframe] == [5, 5]
    page.selectbox[0].set_value(1).run()  # another layer: the replies stay
    assert not page.exception and len(texts(page)) == 2


BAD = {
    "without weights": (dict(names=["hollow"]), "no .*model.safetensors"),
    "no such folder": (dict(names=[], typed="runs/nothing/here"), "no checkpoint folder"),
    "a file": (dict(names=[], typed="README.md"), "is a file"),
    "a hub name offline": (dict(names=[], typed="someone/some-model"), "without a network"),
    "too long": (dict(names=["gpt2"], prompt="word " * 300), "context of 256 .*shorten it"),
    "no step yet": (dict(names=["begun"]), "begun has no checkpoint yet"),
}


@needs_streamlit
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, page, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    arguments, message = BAD[name]
    write(page, **arguments)
    assert len(page.error) == 1
    assert re.search(message, page.error[0].value) and "\n" not in page.error[0].value
    write(page, ["llama"])  # and the page goes on
    assert not page.error and len(texts(page)) == 1


@needs_streamlit
def test_a_broken_log_costs_its_own_curve_only(page):
    write(page, ["badlog", "llama"])
    assert len(texts(page)) == 2 and not page.error
    assert ["log.jsonl line 1 is not JSON" in w.value for w in page.warning] == [True]
    points = [point for chart in page.get("vega_lite_chart") for point in drawn(chart)]
    assert {point["run"] for point in points if "run" in point} == {"llama"}


def luminance(colour):
    """WCAG 2's relative luminance of "rgb(r, g, b)"."""
    channels = [int(x) / 255 for x in re.findall(r"\d+", colour)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@needs_streamlit
def test_attention_can_be_read_in_light_and_in_dark(page):
    """In one colour for both: a chart that is open stays as it is when the theme changes."""
    write(page, ["llama"])
    marks = [json.loads(chart.proto.spec)["mark"] for chart in page.get("vega_lite_chart")]
    [ink] = [mark["color"] for mark in marks if mark["type"] == "rect"]
    for paper in ("rgb(255, 255, 255)", "rgb(23, 22, 20)"):  # Streamlit's, which our themes keep
        low, high = sorted(map(luminance, (ink, paper)))
        assert (high + 0.05) / (low + 0.05) > 3  # WCAG 1.4.11, where a weight is 1


def test_the_browser_chooses_between_light_and_dark():
    config = tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text())
    assert config["theme"].keys() == {"light", "dark"}  # another key would be one theme for all


@needs_streamlit
def test_what_is_missing_is_said(page):
    assert sum("Press Write first" in c.value for c in page.caption) == 2  # in two tabs
    write(page, ["hollow"])
    assert any("curve begins" in c.value for c in page.caption)
    write(page, [])
    assert ["Choose a run" in w.value for w in page.warning] == [True]
    write(page, ["llama"])
    assert not page.warning and not any("Press Write" in c.value for c in page.caption)


@needs_streamlit
def test_a_log_is_read_again_only_when_it_was_written(runs, tmp_path, monkeypatch):
    from nanoswitch import log

    reads, read = [], log.read_run
    monkeypatch.setattr(log, "read_run", lambda path: reads.append(path) or read(path))
    run = shutil.copytree(runs / "llama", tmp_path / "run")
    page = open_page(monkeypatch, tmp_path).run()
    assert len(reads) == 1 and page.caption[1].value.startswith("validation loss 8.125")
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "val_loss": 7.5}\n')
    page.run()
    assert len(reads) == 2 and page.caption[1].value.startswith("validation loss 7.500")


@needs_streamlit
def test_the_choice_stays_when_another_run_gets_newer(runs, tmp_path, monkeypatch):
    for age, name in enumerate(("gpt2", "llama")):
        shutil.copytree(runs / name, tmp_path / name)
        os.utime(tmp_path / name / "latest", (time.time() - age - 9,) * 2)
    page = write(open_page(monkeypatch, tmp_path), ["gpt2"])
    os.utime(tmp_path / "llama" / "latest")
    page.run()
    assert page.multiselect[0].options == ["llama", "gpt2"]
    assert page.multiselect[0].value == ["gpt2"] and len(texts(page)) == 1


@needs_streamlit
def test_no_runs_is_said_and_one_can_still_be_named(tmp_path, runs, monkeypatch):
    page = open_page(monkeypatch, tmp_path / "nowhere")
    assert not page.exception and not page.error
    assert "no runs in" in page.info[0].value
    config = tomllib.loads((ROOT / "configs" / "quickstart.toml").read_text())
    assert page.code[0].value.splitlines() == [
        f"python fineweb.py --source pydocs --vocab_size {config['vocab_size']} "
        f"--out {config['data_dir']}",
        "python train_gpt2.py configs/quickstart.toml",
    ]
    write(page, [], typed=str(runs / "llama"))
    assert len(texts(page)) == 1


@needs_streamlit
def test_a_wrong_flag_is_said_on_the_page_and_named_on_the_terminal(monkeypatch, capsys):
    from streamlit.testing.v1 import AppTest

    monkeypatch.setattr(sys, "argv", ["app.py", "--rusn", "x"])
    page = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    assert [e.value[:15] for e in page.error] == ["a flag is wrong"] and not page.exception
    assert "unknown name --rusn; did you mean runs?" in capsys.readouterr().err


SWITCHES = """
from streamlit.testing.v1 import AppTest

def status(key):
    return next(int(x.split()[1]) / 1024 for x in open("/proc/self/status") if key in x)

page = AppTest.from_file("app.py", default_timeout=60).run()
page.slider[3].set_value(3)
for name in page.multiselect[0].options:
    page.multiselect[0].set_value([name])
    page.button[0].click().run()
    assert not page.exception and not page.error and len(page.dataframe) == 1
    print(status("VmRSS"), status("VmHWM"))
"""


@pytest.mark.slow
@needs_streamlit
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_stays_bounded_over_ten_models_of_100_megabytes(tmp_path):
    first = save_run(tmp_path / "runs" / "0", writer(n_embd=256, tie_embeddings=False))
    weights = first / "step_000004" / "model.safetensors"
    assert weights.stat().st_size > 100 * 2**20
    for i in range(1, 10):
        shutil.copytree(first, tmp_path / "runs" / str(i), copy_function=os.link)
    done = subprocess.run(
        [sys.executable, "-c", SWITCHES, "--runs", tmp_path / "runs", "--device", "cpu"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rss, peak = zip(*(map(float, line.split()) for line in done.stdout.splitlines()), strict=True)
    print([round(x) for x in rss], [round(x) for x in peak])
    assert len(rss) == 10
    # half a model's size for what else may grow: eight models kept would be 800
    assert max(rss) - rss[1] < 50 and peak[-1] - peak[1] < 50


# ----------------------------------------------------------------------------- the page, browser


def in_browser(test):
    skip = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
    return pytest.mark.browser(skip(test))


@pytest.fixture(scope="module")
def url(runs, tmp_path_factory):
    """The page's server, on a free port, without a network."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", f"--server.port={port}"]
    command += ["--server.headless=true", "--", "--runs", str(runs), "--device", "cpu"]
    log = tmp_path_factory.mktemp("server") / "log"
    env = os.environ | {"HF_ENDPOINT": "http://localhost:9", "HF_HUB_OFFLINE": "0"}
    env["OMP_NUM_THREADS"] = "1"  # tiny products: threads would only wait for each other
    with (
        log.open("w") as out,
        subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out) as server,
    ):
        try:
            until(lambda: "localhost" in log.read_text() or server.poll() is not None)
            assert server.poll() is None, log.read_text()
            yield f"http://localhost:{port}"
            assert "Traceback" not in log.read_text()
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    flags = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        "disable-component-update disable-sync disable-dev-shm-usage"
    )
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


def until(condition, seconds=60):
    """Wait for a condition, which may fail to be computed while the page changes -> its value."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + seconds
    while True:
        try:
            if value := condition():
                return value
        except WebDriverException:
            pass
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.2)  # looking takes time from the page


class Visitor:
    """Someone who looks at the page and uses it, in a window of this size."""

    def __init__(self, driver, url, width=1280, height=1000):
        self.driver = driver
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(url)
        until(lambda: self.all("[data-testid=stTabs]"))
        self.wait()

    def all(self, selector):
        return [e for e in self.driver.find_elements("css selector", selector) if e.is_displayed()]

    def wait(self):
        until(lambda: self.all("[data-testid=stApp][data-test-script-state=notRunning]"))

    def one(self, selector, text=""):
        """The first of these that is to be seen, waited for: a side bar slides in."""
        return until(lambda: next((e for e in self.all(selector) if text in e.text), None))

    def pick(self, name):
        box = self.one("[data-testid=stMultiSelect] input")
        box.send_keys(name + "\n\ue004")  # tab: the list closes
        until(lambda: name in [e.text for e in self.all("h3")])
        self.wait()

    def type(self, name):
        self.one("[data-testid=stTextInput] input").send_keys(name + "\n")
        until(lambda: name in [e.text for e in self.all("h3")])
        self.wait()

    def one_token(self):
        """Pull the slider of the tokens to its left end, which makes writing quick."""
        from selenium.webdriver import ActionChains, Keys

        slider = self.one("[data-testid=stSlider]", "Tokens")
        hidden = slider.find_element("css selector", "input")
        self.driver.execute_script("arguments[0].focus()", hidden)
        ActionChains(self.driver).send_keys(Keys.HOME).perform()
        until(lambda: slider.text.split()[1] == "1")
        self.wait()

    def write(self):
        """Press the button -> the texts, each with the line about its model."""
        self.one("button", "Write").click()
        until(lambda: len(self.all(OUTCOMES)) == len(self.all("h3")))
        self.wait()
        return [e.text for e in self.all("[data-testid=stHtml]")]


OUTCOMES = "[data-testid=stHtml], [data-testid=stAlert]"
WATCH = """
window.lengths = [];
new MutationObserver(() => {
    const text = document.querySelector("[data-testid=stHtml] div")?.innerText ?? "";
    if (text.length && text.length !== lengths.at(-1)) lengths.push(text.length);
}).observe(document.body, {childList: true, subtree: true, characterData: true});
"""


@in_browser
def test_text_streams_another_model_is_chosen_and_both_side_by_side(chromium, url):
    page = Visitor(chromium, url)
    assert [e.text for e in page.all("h3")] == ["gpt2"]
    chromium.execute_script(WATCH)
    (text,) = page.write()
    assert "learned · layernorm · gelu" in text and "Hello, I'm a language model," in text
    lengths = chromium.execute_script("return window.lengths")
    assert len(lengths) > 3 and lengths == sorted(lengths)  # it grew while one looked

    page.one_token()
    page.one("[data-testid=stMultiSelect] input").send_keys("\ue003")  # backspace
    until(lambda: not page.all("h3"))
    page.pick("llama")
    (other,) = page.write()
    assert "rope · rmsnorm · swiglu" in other

    page.pick("gpt2")
    assert len(page.write()) == 2
    left, right = (e.rect for e in page.all("h3"))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    assert page.all("[data-testid=stVegaLiteChart] canvas, [data-testid=stVegaLiteChart] svg")
    for tab, seen in (("Next token", "stDataFrame"), ("Attention", "stVegaLiteChart")):
        page.one("[role=tab]", tab).click()
        until(lambda seen=seen: len(page.all(f"[data-testid={seen}]")) == 2)
    assert len(page.all("[data-testid=stImage] img")) == 8  # a thumbnail a head
    assert not page.all("[data-testid=stException]")


@in_browser
def test_bad_input_is_one_line_in_the_browser(chromium, url):
    page = Visitor(chromium, url)
    page.one_token()
    page.type("someone/no-such-model")
    assert len(page.write()) == 1  # the run's, beside the one that fails
    (alert,) = page.all("[data-testid=stAlert]")
    assert "without a network" in alert.text and "\n" not in alert.text
    assert not page.all("[data-testid=stException]")


@in_browser
def test_on_a_phone_nothing_scrolls_sideways(chromium, url):
    page = Visitor(chromium, url, 390, 844)
    page.pick("llama")
    page.write()
    first, second = (e.rect for e in page.all("h3"))
    assert first["y"] < second["y"] and first["x"] == second["x"]  # one below the other
    for tab in page.all("[role=tab]"):
        tab.click()
        for part in ("html", "[data-testid=stMain]"):
            width = f"return document.querySelector('{part}').scrollWidth"
            assert chromium.execute_script(width) <= 390
