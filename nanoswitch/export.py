"""python -m nanoswitch.export runs/tiny_16m --out exported

Checkpoint -> Hugging Face folder, which AutoModelForCausalLM and AutoTokenizer load without a
network: config.json, model.safetensors, generation_config.json and, for GPT-2's vocabulary, the
tokenizer. CHECKPOINT is a run or step folder, a Hugging Face folder or a hub name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from nanoswitch import cli, hf
from nanoswitch.load import load_model, vocabulary_of
from nanoswitch.tokenizer import N_VOCAB


@dataclass
class ExportConfig:
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")]
    """run folder (its latest step), step folder, Hugging Face folder, or hub name such as gpt2"""
    out: str
    """new folder for the Hugging Face files"""


def main():
    config = cli.parse(ExportConfig)
    model = load_model(config.checkpoint)
    vocab = vocabulary_of(config.checkpoint, model.config) or 0
    kind = hf.save(model, config.out, vocab)
    print(f"{config.out}: {model.num_params():,} parameters in {kind} layout")
    if not (Path(config.out) / "tokenizer.json").exists():
        used = model.config.vocab_used
        print(f"without a tokenizer: vocab_used is {used}, GPT-2's vocabulary has {N_VOCAB}")


if __name__ == "__main__":
    cli.run(main)
