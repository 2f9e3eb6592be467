"""The CUDA path on a machine without a card: training, validation, generation and scoring on
tensors that say cuda:0 and have no numbers. Every operator must accept what it is given there, for
all pairs of switches, with the attention kernels that torch takes on two generations of cards."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "without_a_card"))

import cases

from model import GPTConfig
from nanoswitch import prove
from nanoswitch.files import python_path

ROOT, FOLDER = prove.ROOT, prove.FAKE_CARDS
CARDS = ("ampere", "hopper")

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="the shim of a card needs g++"),
    pytest.mark.skipif(sys.platform != "linux", reason="the shim of a card is made for Linux"),
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="torch itself knows CUDA here"),
]


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    return prove.build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def found(shim):
    return prove.on_fake_cards([], "most", shim)


def check(lines):
    """Fails with each error once, the number of its cases, and one of them."""
    errors = {}
    for line in lines:
        if line["error"]:
            errors.setdefault(f"{line['work']}: {line['error']}", []).append(line["case"])
    summary = [f"{len(cases)} x {error}, such as {cases[0]}" for error, cases in errors.items()]
    assert lines and not errors, "\n".join([f"of {len(lines)}:", *summary])


@pytest.mark.parametrize("work", ["refuse", "train", "generate", "score"])
@pytest.mark.parametrize("card", CARDS)
def test_a_card_takes_all_that_it_is_given(found, card, work):
    check([line for line in found[card] if line["work"] == work])


def test_one_of_eight_cards_takes_all_that_it_is_given(found):
    """ddp, zero1 and fsdp with torch's fake process group."""
    check([line for line in found["ampere"] if line["work"] == "share"])


@pytest.mark.slow
def test_a_card_takes_what_is_left_too(shim):
    for lines in prove.on_fake_cards([], "rest", shim).values():
        check(lines)


@pytest.mark.slow
def test_what_needs_a_card_passes_on_one_that_is_not_there(shim):
    """The tests of attention, loss and decoding that are marked gpu, with numbers: pretend.py."""
    own = {"LD_PRELOAD": str(shim), "PYTHONPATH": python_path(f"{ROOT}:{FOLDER}")}
    own |= {"OMP_NUM_THREADS": "1"}
    names = ("test_attention.py", "test_kernels.py", "test_loss.py", "test_decoding.py")
    files = [ROOT / "tests" / name for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pretend", "-m", "gpu", *files]
    done = subprocess.run(
        command, env=os.environ | own, cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0 and "passed" in last, done.stdout[-4000:]


@pytest.mark.slow
def test_a_compiled_step_is_machine_code_and_takes_no_more_memory_than_an_eager_one(shim):
    """Inductor, Triton and ptxas for sm_90, and each kernel within the shared memory there is: an
    H200 refused FlexAttention's with a table of ALiBi's biases."""
    triton = importlib.util.find_spec("triton")
    folder = os.environ.get("TRITON") or (triton and Path(triton.origin).parent.parent)
    if not folder:
        pytest.skip("needs Triton: pip install --no-deps --target DIR triton, then TRITON=DIR")
    own = {"LD_PRELOAD": str(shim), "PYTHONPATH": python_path(ROOT), "TRITON": str(folder)}
    done = subprocess.run(
        [sys.executable, FOLDER / "inductor.py"], env=os.environ | own, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=3600,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and len(found) == 8
    for line in found:
        assert not line["error"], line
        assert line["graphs"] == 2 and line["kernels"] > 20, line
        assert line["peak"] <= 1.02 * line["eager"], line
        # what is masked, but by a learned bias, whose gradient it would add up score by score
        masked = {"window", "documents"} & {*line["case"].split()}
        chosen = masked and "kerple" not in line["case"]
        assert line["flex"] == bool("by flex" in line["case"] or chosen), line


def test_each_card_takes_the_kernels_of_its_own(found):
    """Else the test above would prove nothing: cuDNN on Hopper, and never under a mask."""
    taken = {card: {k for line in found[card] for k in line["kernels"]} for card in CARDS}
    assert taken["ampere"] == {"FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"}
    assert taken["hopper"] == taken["ampere"] | {"CUDNN_ATTENTION"}


def test_kernels_that_know_shared_key_heads_get_them_uncopied_and_only_those(found):
    """Else torch takes its math kernel, which holds all T x T scores."""
    for card, kernel in (("ampere", "FLASH_ATTENTION"), ("hopper", "CUDNN_ATTENTION")):
        grouped = {k for line in found[card] for k in line["grouped"]}
        assert kernel in grouped <= {"FLASH_ATTENTION", "CUDNN_ATTENTION"}
        for line in found[card]:
            if line["grouped"]:
                assert line["case"]["n_kv_head"] in (1, 2) and "dtype" not in line["case"]


def test_the_cases_hold_every_switch_and_all_pairs_that_go_together():
    sizes = {"vocab_size", "vocab_used", "block_size", "n_layer", "n_head", "n_embd"}
    numbers = {"norm_eps", "mlp_hidden", "linformer_segment", "linformer_rank", "rope_theta"}
    numbers |= {"rope_scaling", "zero_init", "settings"}
    assert set(GPTConfig.__dataclass_fields__) - sizes - numbers == set(cases.SWITCHES)
    every = cases.all_pairs()
    assert cases.possible_pairs() <= set().union(*map(cases.pairs, every))
    for case in every:
        cases.model_config(case)
    # those that must be there, written out
    for a, b in [(("pos", "fire"), ("dtype", "float16")), (("window", 20), ("pos", "alibi"))]:
        assert any({a, b} <= set(case.items()) for case in every)
