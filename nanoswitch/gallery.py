"""python -m nanoswitch.gallery

Writes variants/README.md: a row for every config in configs/variants/, from its variant's
docstring, its proof card experiments/variants/NAME.json, and the ladders' results in
experiments/variants/*/results.json. What was not run is said to be so.
"""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from nanoswitch import cli
from nanoswitch.files import read_json, write_beside
from nanoswitch.ladder import gain_text
from nanoswitch.progress import markdown

ROOT = Path(__file__).parent.parent
BASE = "llama"  # of configs/variants/: what the others are compared with
PARTS = ("pos", "norm", "mlp", "bias")  # flags that tell one ladder's baseline from another's
SIZES = 2  # of a ladder, the smallest

HEAD = """
# Variants

A file here is a choice of a switch: `--attention NAME`, or of `--mlp`, `--norm`, `--pos` or
`--residual`. To write one, copy [template.py](template.py);
[CONTRIBUTING.md](../CONTRIBUTING.md) says how.
`python -m nanoswitch.gallery` wrote this page from `experiments/variants/`. These commands fill
that folder:

    python -m nanoswitch.prove NAME --out experiments/variants    # the checks and the costs
    python compare.py ... --ladder ...    # the losses: configs/ladder_variants.toml has all of it

## What they are and cost

`prove` checks causality, cache, precisions, compiler, counts, checkpoints, ranks and cards. Costs
are what a variant in every layer adds to GPT-2 124M with RoPE: parameters, training FLOPs a token,
cache bytes a token, and the memory that one more sequence of a batch takes in training, in bf16.
"""

MEANING = """
What a variant gives hangs on the baseline, and most of all on its biases:
[EXPERIMENTS.md](../EXPERIMENTS.md#what-is-worth-adding-to-llamas-parts) says more.

Below 0 the variant has the lower loss. The gain is how many times the compute the baseline needs
for the same loss. Intervals of differences hold for all rows at once, those of gains for one row
alone. The last column goes by the adjusted p of the differences, Holm's where spreads differ, which
is a little sharper than the intervals. So a gain above 1 may still be 'no gain shown'. Parameters
are not matched, and a config may keep its variant to some layers, where the costs above are those
of all.
""".strip()


def about(name):
    """A config of configs/variants/ in a line: its variant's docstring, or its own comment."""
    path = ROOT / "variants" / f"{name}.py"
    if path.is_file():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    else:
        text = (ROOT / "configs/variants" / f"{name}.toml").read_text(encoding="utf-8").lstrip("# ")
    return re.sub(r"^--[^:]*: ", "", text.splitlines()[0]).rstrip(".")


def card_cells(card):
    """A proof card -> the checks that hold, and what each cost grows by."""
    held = [one["holds"] for proof in card["proofs"] for one in proof["checks"].values()]
    costs = card["proofs"][-1]["costs"]  # of a file for several switches all together
    wanted = ("parameters", "training FLOPs a token", "cache bytes a token", "bytes of a sequence")
    return [
        f"{sum(held)} of {len(held)}",
        *(f"{costs[what][1] / costs[what][0] - 1:+.1%}" if costs else "-" for what in wanted),
    ]


def refused(card):
    """What a proof card says that the variant refuses."""
    return list(dict.fromkeys(reason for proof in card["proofs"] for reason in proof["refuses"]))


def change_text(diff):
    """A difference in loss and its interval -> text."""
    if diff["mean"] is None:
        return "-"
    low, high = diff["ci95"]
    return f"{diff['mean']:+.4f}" + ("" if low is None else f" [{low:+.4f}, {high:+.4f}]")


def together(verdicts):
    """The verdicts at all sizes -> what they say."""
    if "better" in verdicts and "worse" in verdicts:
        return "better at one size, worse at another"
    for word in ("better", "worse"):
        if word in verdicts:
            return word if set(verdicts) == {word} else f"{word} at one size"
    return "no gain shown"


def ladder_part(found, names, where):
    """A ladder's results.json, the names of those of its rows that are shown, and the path of its
    results.md from variants/ -> the paragraphs about it."""
    first, metric, climbed = found["first"], found["metric"], found["ladder"]
    sizes = climbed["sizes"][:SIZES]
    results = [size["results"]["configs"] for size in sizes]
    said = [
        f"n_embd {size['n_embd']} ({row['parameters']:,} parameters, {row['tokens']:,} tokens, "
        f"loss {row[metric]['mean']:.4f})"
        for size, row in zip(sizes, (configs[first] for configs in results), strict=True)
    ]
    seeds, tune = len(results[0][first]["seeds"]), climbed["rule"]["tune"]
    flags = climbed["rule"]["flags"].items()
    parts = ", ".join(f"{flag} {value}" for flag, value in flags if flag in PARTS)
    beside = f"{first} ({parts})" if parts else first
    text = (
        f"Beside {beside} at {' and '.join(said)}; {seeds} seeds; each config at "
        f"{f'its own {tune}' if tune else 'the same rates'}. [All of it]({where})."
    )
    head, rows, shown = ["variant"], [], {}
    for size in sizes:
        head += [f"difference at {size['n_embd']}", f"gain at {size['n_embd']}"]
    for name in names:
        way = ((climbed["curves"] or {}).get(name) or {}).get("equal_flops")
        diffs = [configs[name]["diff"] for configs in results]
        cells = []
        for i, diff in enumerate(diffs):
            cells += [change_text(diff), gain_text(way["gain"][i] if way else None)]
        says = together([diff["verdict"] for diff in diffs])
        rows.append([name, *cells, says])
        shown.setdefault(says.split()[0], []).append(name)
    notes = [
        f"Kept, though this table shows no {what}: {', '.join(shown[word])}."
        for word, what in (("no", "gain"), ("worse", "gain but a loss")) if word in shown
    ]  # fmt: skip
    return [text, markdown([*head, "so"], rows), *notes]


def page(folder=ROOT / "experiments/variants"):
    """variants/README.md. folder: where the proof cards and the ladders' results are."""
    names = sorted({path.stem for path in ROOT.glob("configs/variants/*.toml")} - {BASE})
    cards = {path.stem: read_json(path) for path in folder.glob("*.json")}
    rows = []
    for name in names:
        file = (ROOT / "variants" / f"{name}.py").is_file()
        cells = card_cells(cards[name]) if name in cards else ["not yet run" * file or "-", *"----"]
        rows.append([f"[{name}]({name}.py)" if file else name, about(name), *cells])
    head = ["variant", "what it is", "checks that hold", "parameters", "FLOPs", "cache", "memory"]
    parts = [HEAD.strip(), markdown(head, rows)]
    refusals = {name: refused(cards[name]) for name in names if name in cards}
    lines = [f"- {name}: {'; '.join(reasons)}" for name, reasons in refusals.items() if reasons]
    parts += ["What they refuse:", "\n".join(lines)] if lines else []

    parts.append("## What they give")
    parts.append(MEANING)
    missing = list(names)
    for path in sorted(folder.glob("*/results.json")):
        found = read_json(path)
        sizes = found["ladder"]["sizes"][:SIZES] if found.get("ladder") else []
        shown = [n for n in names if all(n in size["results"]["configs"] for size in sizes)]
        if len(sizes) == SIZES and shown:
            where = f"../experiments/variants/{path.parent.name}/results.md"
            parts += ladder_part(found, shown, where)
            missing = [name for name in missing if name not in shown]
    parts += [f"Without a row: {', '.join(missing)}."] * bool(missing)
    return "\n\n".join(parts) + "\n"


@dataclass
class GalleryConfig:
    out: str = str(ROOT / "variants/README.md")
    """the page"""


def main():
    config = cli.parse(GalleryConfig)
    with write_beside(config.out) as file:
        file.write(page().encode())
    print(f"written: {config.out}")


if __name__ == "__main__":
    cli.run(main)
