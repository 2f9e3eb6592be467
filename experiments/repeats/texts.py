"""python experiments/repeats/texts.py TEXTS OUT: a folder of parquet files with a column text ->
OUT/repeats.jsonl, whose texts are pieces of 8 to 70 words, each of them twice."""

import json
import random
import sys
from pathlib import Path

import pyarrow.parquet as pq

source, out = map(Path, sys.argv[1:])
rng, texts = random.Random(0), []
for path in sorted(source.glob("*.parquet")):
    for batch in pq.ParquetFile(path).iter_batches(columns=["text"]):
        for text in batch.column(0).to_pylist():
            words, i = text.split(" "), 0
            while i < len(words) - 12:
                n = rng.randint(8, 70)
                piece = " ".join(words[i : i + n])
                texts.append(f"{piece}\n{piece}")
                i += n
rng.shuffle(texts)
out.mkdir(parents=True, exist_ok=True)
with open(out / "repeats.jsonl", "w") as file:
    file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
