"""A file of variants/ as a switch: found by its name, listed, imported only when it is asked for,
its errors told with its own line."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import grown, refused, run_main, tiny, tokens

import train_gpt2
from model import ATTENTIONS
from nanoswitch import registry

ROOT = Path(__file__).parent.parent


def test_nothing_is_imported_that_is_not_asked_for():
    code = (
        "import sys; from model import GPTConfig; GPTConfig(attention='linformer');"
        "print(sorted(n for n in sys.modules if n.startswith('variants')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "['variants', 'variants.linformer']", done.stderr


def test_names_are_listed_for_their_own_switch(capsys):
    assert {"full", "linformer", "gated"} <= set(ATTENTIONS.names())
    assert "x0" not in ATTENTIONS.names()
    assert run_main(train_gpt2.main, "--help") == 0
    assert "linformer" in capsys.readouterr().out


def test_an_unknown_name_names_the_closest_one(capsys):
    assert run_main(train_gpt2.main, "--attention", "gaetd") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "did you mean gated?" in err and "linformer" in err
    with refused("variants/x0.py", "no attention", "--residual x0"):
        ATTENTIONS["x0"]


@pytest.mark.parametrize(
    "code, words",
    [
        ("class Wrong(Attention:\n    pass", ["line 5", "invalid syntax"]),
        ("class Wrong(Attention):\n    x = torch.nothing", ["line 6", "AttributeError"]),
        ("import no_such_package\nWrong = 1", ["line 5", "no_such_package"]),
    ],
)
def test_a_broken_file_is_one_line_with_its_own_place(variant_file, code, words):
    variant_file("broken", code)
    with refused("variants/broken.py", *words):
        tiny(attention="broken")


def test_an_error_in_a_pass_is_one_line_with_its_own_place(variant_file, capsys, data, tmp_path):
    code = "class Wrong(Attention):\n    def output(self, y, x, carry):\n        return y @ y"
    variant_file("clumsy", code)
    flags = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, total_batch_tokens=16, max_steps=1)
    flags |= dict(data_dir=data, run_dir=tmp_path / "run", attention="clumsy", device="cpu")
    assert run_main(train_gpt2.main, *(f"--{k}={v}" for k, v in flags.items())) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "variants/clumsy.py, line 7: RuntimeError" in err


def test_a_file_without_its_line_says_which_one(variant_file):
    variant_file("lost", "class Wrong(Attention):\n    pass")
    path = registry.FOLDER / "lost.py"
    path.write_text(path.read_text().replace("attention = Wrong", ""))
    with refused("variants/lost.py", "attention = YourClass"):
        tiny(attention="lost")


def test_settings_are_read_by_name_and_type():
    config = tiny(attention="template", settings="template.start=0.25")
    scale = grown(config, std=0.0).transformer.h[0].attn.scale.weight
    assert torch.equal(scale, torch.full((4,), 0.25))
    plain = grown(tiny(attention="template"), std=0.0).transformer.h[0].attn.scale.weight
    assert torch.equal(plain, torch.ones(4))


@pytest.mark.parametrize(
    "text, words",
    [
        ("template.strat=1", ["template.strat", "template.start"]),
        ("gated.per_head=true", ["gated.per_head", "template.start"]),
        ("template.start=much", ["template.start", "much", "float"]),
        ("template.start=nan", ["template.start", "nan", "below 2**63"]),
        ("template.start=-inf", ["template.start", "-inf", "below 2**63"]),
        ("start", ["start", "NAME.KEY=VALUE"]),
    ],
)
def test_settings_that_are_wrong_are_one_line(text, words):
    with refused(*words):
        tiny(attention="template", settings=text)


def test_settings_without_their_variant_are_one_line():
    with refused("'canon.width' fits no variant that is in use"):
        tiny(settings="canon.width=3")


def test_a_template_that_starts_at_one_is_the_baseline():
    idx = tokens(tiny(), 2, 9)
    torch.manual_seed(0)
    plain, other = (grown(tiny(attention=a), std=0.0) for a in ("full", "template"))
    for model in (plain, other):
        for p in model.parameters():
            torch.nn.init.ones_(p) if p.dim() < 2 else torch.nn.init.eye_(p.data)
    assert torch.equal(plain(idx)[0], other(idx)[0])


def test_a_copy_of_the_template_works_as_it_is(variant_file):
    variant_file("copied", (ROOT / "variants" / "template.py").read_text() + "Wrong = Template")
    model = grown(tiny(attention="copied", settings="copied.start=0.25"), std=0.0)
    assert model.transformer.h[0].attn.scale.weight.tolist() == [0.25] * model.config.n_head
