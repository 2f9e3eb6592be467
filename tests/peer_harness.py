"""lm-evaluation-harness on a model of ours, for the slow tests of scores: our random model in
transformers' form, and its own task file on a local file of items."""

import json
import shutil
from pathlib import Path

import pytest
from builders import GPT2_VOCABULARY, grown, tiny

from nanoswitch.tokenizer import vocabulary_files


def parity_model(std, seed):
    sizes = GPT2_VOCABULARY | dict(vocab_size=50257, block_size=1024)
    return grown(tiny(**sizes, n_head=4, n_embd=64), std, seed).eval()


def as_transformers(model):
    """Our GPT -> the equal transformers.GPT2LMHeadModel, by way of its own names and layout."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    size = dict(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd)
    shape = dict(n_layer=c.n_layer, n_head=c.n_head)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, **shape)).eval()
    conv = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    weights = {k: v.t() if k.endswith(conv) else v for k, v in model.state_dict().items()}
    theirs.load_state_dict(weights)
    return theirs


def harness_scores(model, folder, yaml, split, data):
    """Score the file `data` as `split` of the task file `yaml`, below lm_eval's own tasks ->
    (results, samples in the file's order)."""
    lm_eval = pytest.importorskip("lm_eval")
    import transformers
    from lm_eval.models.huggingface import HFLM

    as_transformers(model).save_pretrained(folder)
    vocabulary = vocabulary_files()[1]
    shutil.copy(vocabulary["encoder.json"], folder / "vocab.json")
    shutil.copy(vocabulary["vocab.bpe"], folder / "merges.txt")
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(folder)
    (folder / "tasks").mkdir()
    fields = dict(dataset_path="json", dataset_name=None, tag=None)
    fields |= {f"{name}_split": None for name in ("training", "validation", "test")}
    fields |= {f"{split}_split": split, "dataset_kwargs": {"data_files": {split: str(data)}}}
    lines = [f"{name}: {json.dumps(value)}\n" for name, value in fields.items()]
    whole = Path(lm_eval.__file__).parent / "tasks" / yaml
    (folder / "tasks/local.yaml").write_text(f"include: {whole}\ntask: local\n" + "".join(lines))
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(folder), tokenizer=tokenizer, device="cpu", batch_size=32),
        tasks=["local"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder / "tasks")),
        bootstrap_iters=2,  # of the perplexity: one has no standard deviation
    )
    return found["results"]["local"], sorted(found["samples"]["local"], key=lambda s: s["doc_id"])
