"""Planning for a card that is not here: bytes and memory against numbers worked out by hand."""

import re
from types import SimpleNamespace

import pytest
import torch
from builders import run_main
from tiny_runs import make_data

import train_gpt2
from model import GPTConfig
from nanoswitch import cards, counts, micro_batch


def test_bytes_moved_are_those_that_operators_read_and_write():
    a, b = torch.ones(100), torch.ones(100)
    with counts.Storages() as storages:
        a + b  # two read, one written, 400 bytes each
    assert storages.moved == 1200
    with counts.Storages() as storages:
        a.view(10, 10).T[2:]
    assert storages.moved == 0
    with counts.Storages() as storages:
        a.add_(b)
    assert storages.moved == 1200


def test_gpt2_in_bf16_takes_what_its_tensors_take():
    """64 sequences: weights, gradients and moments, 16 bytes of 124M; of 12 layers and 65,536
    tokens about 160 KiB a layer and token; the head's chunks."""
    config = GPTConfig()
    ranks = SimpleNamespace(world=1)
    plan = SimpleNamespace(
        model_config=config, dtype=torch.bfloat16, ranks=ranks, card=cards.CARDS["h100"],
        config=SimpleNamespace(parallel="ddp"),
    )  # fmt: skip
    one, many = (micro_batch.expected_bytes(plan, size) for size in (8, 64))
    assert many / 2**30 == pytest.approx(23.7, rel=0.03)
    # inputs of both norms and what they make, q k v, the heads' result, GELU's input and output:
    # 2 x (4 + 4 + 2) + 3 x 2 + 2 + 2 x 8 bytes of 768 channels, and the residual stream
    a_token = 12 * 768 * (2 * (4 + 2) + 6 + 2 + 16 + 2 * 4)
    assert (many - one) / (56 * 1024) == pytest.approx(a_token, rel=0.25)
    fits = micro_batch.fits_by_count
    assert fits(plan, 128) and not fits(plan, 256)  # of 79 GiB


def test_a_card_is_known_by_its_name_and_by_no_place_on_this_machine():
    for name in ("t4", "3090", "4090", "5090", "a100", "H100", "h200"):
        assert cards.named_card(f"cuda:{name}") is cards.CARDS[name.lower()]
    for device in ("cuda", "cuda:0", "cuda:7", "cpu"):
        assert cards.named_card(device) is None


def test_a_card_that_is_not_here_is_planned_for(tmp_path, capsys):
    make_data(tmp_path / "data")
    flags = dict(
        n_layer=2, n_head=2, n_embd=32, block_size=16, total_batch_tokens=128, val_tokens=64,
        data_dir=tmp_path / "data", run_dir=tmp_path / "run",
    )  # fmt: skip
    line = [f"--{k}={v}" for k, v in flags.items()]

    def run(*more):
        return run_main(train_gpt2.main, *line, *more), capsys.readouterr()

    shown = run("--dry_run=true", "--device=cuda:t4")[1].out
    assert "dtype float16" in shown and "device cuda:t4" in shown
    found = re.findall(r"micro_batch +(\d+): +[\d.]+ GiB, at most ([\d,]+) tokens/s", shown)
    assert [int(size) for size, _ in found] == [1, 2, 4, 8]
    speeds = [int(speed.replace(",", "")) for _, speed in found]
    assert speeds == sorted(speeds)
    status, said = run("--dry_run=true", "--device=cuda:h1")
    assert status == 1 and "4090" in said.err
    status, said = run("--device=cuda:h100")
    assert status == 1 and "--dry_run true" in said.err
    assert not (tmp_path / "run").exists()
