"""A comparison as one HTML page without anything outside of it: to send, to read on a phone, to
print. Made from results.json's dict, the logs and the drawn curves alone."""

import html
import json
import re
import shlex

from model import GPTConfig
from nanoswitch.log import LOSSES
from train_gpt2 import TrainConfig

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 0 auto; padding: 0 1rem; }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right;
         white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas }
th button { font: inherit; font-weight: 600; border: 0; background: none; color: inherit;
            cursor: pointer; padding: 0 }
.better { color: #16803c; font-weight: 600 } .worse { color: #c0262d; font-weight: 600 }
.picture { background: #fff; border-radius: 4px }
.picture svg { width: 100%; min-width: 44rem; height: auto; display: block }
.points { min-width: 34rem } .points line { stroke: currentColor }
.points text { font-size: 12px; fill: currentColor } .points circle { fill: #1f77b4; opacity: 0.7 }
@media screen and (prefers-color-scheme: dark) {
  .better { color: #5fd38d } .worse { color: #ff8087 } .points circle { fill: #6cb6ee } }
pre { background: var(--soft); padding: 0.6rem; font-size: 0.8rem; white-space: pre-wrap;
      overflow-wrap: anywhere }
dt { font-weight: 600 } dd { overflow-wrap: anywhere }
@media print { body { max-width: none; font-size: 10px } .wide { overflow: visible }
  table { font-size: 7px } th, td { white-space: normal; padding: 1px 3px }
  svg, table { break-inside: avoid } h2 { break-after: avoid }
  .picture svg, .points { min-width: 0 } }
"""
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable"))
  table.querySelectorAll("th button").forEach((button, column) => button.onclick = () => {
    const down = button.dataset.order = button.dataset.order == "1" ? "-1" : "1";
    const rows = [...table.tBodies[0].rows], of = row => row.cells[column].dataset.key;
    rows.sort((a, b) => {
      const x = of(a), y = of(b), n = x - y;
      return down * (isNaN(n) ? x.localeCompare(y) : n);
    });
    table.tBodies[0].append(...rows);
  });
"""
SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
UNITS = {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}  # progress.short's


def key(text):
    """A cell's text -> what it is sorted by: its number, its seconds, or itself; no value last."""
    text = text.split(" tokens")[0].strip()
    if text in ("-", "not yet") or text.startswith("no end"):
        return "1e300"
    if re.fullmatch(r"(\d+[dhms])+", text):
        return str(sum(int(n) * SECONDS[u] for n, u in re.findall(r"(\d+)([dhms])", text)))
    number = re.match(r"[+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?(?=([kMB]?)(?:\s|$))", text)
    if not number:
        return text
    return repr(float(number[0].replace(",", "")) * UNITS[number[1]])


def grid(head, rows):
    """Cells of text -> a sortable table."""
    titles = "".join(f"<th><button>{html.escape(text)}</button></th>" for text in head)
    lines = []
    for row in rows:
        cells = ""
        for text in row:
            kind = f' class="{text}"' if text in ("better", "worse") else ""
            cells += f'<td{kind} data-key="{html.escape(key(text))}">{html.escape(text)}</td>'
        lines.append(f"<tr>{cells}</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{titles}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def points(configs, metric="val_loss"):
    """Each seed's final loss as a point, one line a config, its mean as a stroke: an SVG."""
    losses = {name: row[metric]["seeds"] for name, row in configs.items()}
    every = [loss for of in losses.values() for loss in of]
    low, high, left, width = min(every), max(every), 150, 700
    span = (high - low) or 1.0

    def x(loss):
        return round(left + 20 + (loss - low) / span * (width - left - 60), 1)

    parts = []
    for i, (name, of) in enumerate(losses.items()):
        y = 20 + 24 * i
        parts.append(f'<text x="0" y="{y + 4}">{html.escape(name[:22])}</text>')
        for seed, loss in zip(configs[name]["seeds"], of, strict=True):
            title = f"<title>seed {seed}: {loss:.4f}</title>"
            parts.append(f'<circle cx="{x(loss)}" cy="{y}" r="5">{title}</circle>')
        mean = x(configs[name][metric]["mean"])
        parts.append(f'<line x1="{mean}" x2="{mean}" y1="{y - 9}" y2="{y + 9}"/>')
    bottom = 20 + 24 * len(losses)
    parts.append(f'<line x1="{left}" x2="{width}" y1="{bottom}" y2="{bottom}"/>')
    for loss in dict.fromkeys((low, high)):
        parts.append(
            f'<text x="{x(loss)}" y="{bottom + 16}" text-anchor="middle">{loss:.4f}</text>'
        )
    box = f'viewBox="0 0 {width} {bottom + 24}" style="max-width: {width}px; width: 100%"'
    drawn = f'<svg class="points" {box} role="img">{"".join(parts)}</svg>'
    return f'<div class="wide">{drawn}</div>'


def picture(path):
    """An SVG file as part of the page, as wide as it; nothing where there is none."""
    if not path.is_file():
        return ""
    drawn = path.read_text(encoding="utf-8")
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    opening, rest = drawn.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    return f'<div class="wide picture">{opening}>{rest}</div>'


def command(run):
    """The command that makes a Run, without flags at their defaults."""
    words = ["python", "train_gpt2.py"]
    for kind in (GPTConfig, TrainConfig):
        for name, field in kind.__dataclass_fields__.items():
            value = run.config.get(name, field.default)
            if value != field.default:
                text = str(value).lower() if isinstance(value, bool) else str(value)
                words.append(f"--{name}={text}")
    return shlex.join(words)


def origins(groups):
    """{name: Runs} -> where the runs came from: a list of what and which, as HTML."""
    runs, found = [run for runs in groups.values() for run in runs], {}
    for run in runs:
        for what in ("git", "data_sha256", "device", "dtype", "world", "versions"):
            value = run.start.get(what)
            text = value if isinstance(value, str) else json.dumps(value)
            found.setdefault(what, dict.fromkeys([]))[text] = None
    titles = {"git": "commit", "data_sha256": "SHA-256 of a sample of the data", "world": "ranks"}
    lines = [
        f"<dt>{titles.get(what, what)}</dt><dd>{html.escape('; '.join(map(str, values)))}</dd>"
        for what, values in found.items()
    ]
    return f"<dl>{''.join(lines)}</dl>"


def page(found, tables, groups, pictures):
    """-> the page. found: results.json's dict; tables: [(title, head, rows of text, notes)];
    groups: {name: Runs} of all runs; pictures: [(title, path of an .svg)]."""
    others = len(found["configs"]) - 1
    title = f"{others} config{'s' * (others != 1)} against {found['first']}"
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for heading, head, rows, notes in tables:
        parts.append(f"<h2>{html.escape(heading)}</h2>{grid(head, rows)}")
        parts += [f"<p>{html.escape(note)}</p>" for note in notes]
    metric = found["metric"]
    unit = LOSSES[metric]
    parts.append(f"<h2>Every seed's {unit}</h2>{points(found['configs'], metric)}")
    if "tuned" in found:
        flag = html.escape(found["search"]["flag"])
        parts.append(f"<h2>The same, each at its own {flag}</h2>")
        parts.append(points(found["tuned"]["configs"], metric))
    for heading, path in pictures:
        if drawn := picture(path):
            parts.append(f"<h2>{html.escape(heading)}</h2>{drawn}")
    parts.append(f"<h2>Where the runs came from</h2>{origins(groups)}")
    commands = "\n".join(command(run) for runs in groups.values() for run in runs)
    parts.append(f"<h2>Commands</h2><pre>{html.escape(commands)}</pre>")
    data = json.dumps(found).replace("<", "\\u003c")  # no text of ours may end the script
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + f'\n<script type="application/json" id="results">{data}</script>'
        + f"<script>{SCRIPT}</script></body></html>\n"
    )
