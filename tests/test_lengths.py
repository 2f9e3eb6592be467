"""compare.py --lengths: its two scores against sums over whole logits, token by token."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import grown, tiny

from model import GPT
from nanoswitch import lengths
from nanoswitch.lengths import lengths_table, score_lengths

TOKENS = np.random.default_rng(0).integers(0, 53, 200)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs of two models, one whose positions end at 24, as score_lengths reads them."""
    np.save(tmp_path / "val_0.npy", TOKENS.astype(np.uint16))
    monkeypatch.setattr(lengths, "match_vocabulary", lambda *args: 53)
    models = {pos: grown(tiny(pos=pos), seed=i) for i, pos in enumerate(("learned", "rope"))}
    monkeypatch.setattr(GPT, "from_pretrained", models.__getitem__)
    config = dict(block_size=24, data_dir=str(tmp_path), val_tokens=150, device="cpu")
    return models, {
        pos: [SimpleNamespace(folder=pos, config=config | {"dtype": "float32"})] for pos in models
    }


def losses(model, row):
    """-log p of each token of a row but the first, from the logits of all positions."""
    with torch.no_grad():
        logits = model(torch.tensor(row[:-1])[None])[0][0].double()
    return [-logits[i].log_softmax(0)[t].item() for i, t in enumerate(row[1:])]


def test_both_scores_equal_sums_token_by_token(runs):
    models, groups = runs
    rows = []
    for found in score_lengths(groups, [1, 2]):
        rows.append(list(found["prose"]))  # what is done is there while the rest is scored
    assert rows == [["learned"], ["learned", "rope"]]
    for pos, T in (("learned", 24), ("rope", 24), ("rope", 48)):
        windows = 150 // T
        prose, gains = [], []
        for w in range(windows):
            prose += losses(models[pos], TOKENS[w * T : w * T + T + 1].tolist())
            half = TOKENS[w * T // 2 : w * T // 2 + T // 2].tolist()
            cost = losses(models[pos], half + half)
            # the same T / 2 - 1 tokens; the first one has no token before it the first time
            gains.append(np.mean(cost[: T // 2 - 1]) - np.mean(cost[T // 2 :]))
        assert found["prose"][pos][T] == pytest.approx([np.mean(prose)], abs=1e-5)
        assert found["repeat"][pos][T] == pytest.approx([np.mean(gains)], abs=1e-5)
    assert found["prose"]["learned"][48] is found["repeat"]["learned"][48] is None
    assert lengths_table(found).count("| - |") == 2
