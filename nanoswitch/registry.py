"""The choices of a switch: the classes of model.py, and those of variants/NAME.py.

A switch's choices are a Table, a dict {name: class}. A name that is not in it is the name of a file
in variants/, which is imported when it is asked for and not before. The file says which switch it
is for in a line at its end, such as `attention = Gated`; without an import only that line is read.
This is the plug-in rule: no file of ours names a variant's module, so imports still run down only.
"""

import difflib
import functools
import importlib
import re
import traceback
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "variants"


class Table(dict):
    """{name: class} of the switch `flag`. table[NAME] of a variant imports its file; ValueError
    (one line) when there is none, or it is broken. Iteration gives the built-in ones only."""

    def __init__(self, flag, classes):
        super().__init__(classes)
        self.flag = flag

    def names(self):
        """Of all choices, the variants after the built-in ones."""
        return *self, *(name for name in variants() if self.flag in flags_of(name))

    def __missing__(self, name):
        if name not in variants():
            raise unknown(self.flag, name, self.names())
        module = import_variant(name)
        if not hasattr(module, self.flag):
            others = " or ".join(f"--{flag} {name}" for flag in flags_of(name))
            hint = f"it is for {others}" if others else f"end it with: {self.flag} = YourClass"
            raise ValueError(f"variants/{name}.py is no {self.flag}; {hint}")
        return getattr(module, self.flag)


def variants():
    """The names of all files in variants/."""
    return sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))


def flags_of(name):
    """The switches that a variant's file is for, by its lines; it is not imported."""
    path = FOLDER / f"{name}.py"
    return flags_in(path, path.stat().st_mtime_ns)


@functools.cache
def flags_in(path, changed):
    """flags_of, read once for every time that the file was `changed`: each parsed command line asks
    for all files five times and more."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return re.findall(r"^(pos|norm|mlp|attention|residual) = ", text, re.MULTILINE)


def import_variant(name):
    try:
        return importlib.import_module(f"variants.{name}")
    except SyntaxError as error:
        raise ValueError(f"variants/{name}.py, line {error.lineno}: {error.msg}") from error
    except Exception as error:  # whatever a person's file may raise
        raise ValueError(place_in_variant(error) or f"variants/{name}.py: {error}") from error


def place_in_variant(error):
    """An error as a line with the place in variants/ that it came from; None if it did not."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_variant(f.filename)]
    if not frames:
        return None
    place = f"variants/{Path(frames[-1].filename).name}, line {frames[-1].lineno}"
    return f"{place}: {type(error).__name__}: {error}"


def is_variant(path):
    return Path(path).parent == FOLDER


def unknown(flag, value, names):
    """The ValueError for a value that is none of a switch's."""
    near = difflib.get_close_matches(value, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return ValueError(f"{flag} '{value}' is none of: {', '.join(names)}{hint}")


# ----------------------------------------------------------------------------- their numbers


def read_settings(text, used):
    """A text such as "canon.width=3,dyt.alpha=0.8" and the classes in use [(name, class)] -> {name:
    {key: value}} of all that have `settings`, {key: default}, of which the text replaces some.
    ValueError (one line) for a name that is not in use, another key or another type."""
    result = {}
    for name, kind in used:
        result.setdefault(name, {}).update(getattr(kind, "settings", {}))
    for part in filter(None, (part.strip() for part in text.split(","))):
        place, equals, value = part.partition("=")
        name, dot, key = place.strip().partition(".")
        if not (equals and dot):
            raise ValueError(f"settings '{part}' is no NAME.KEY=VALUE")
        keys = result.get(name, {})
        if key not in keys:
            known = [f"{name}.{key}" for name, own in result.items() for key in own]
            near = f"is none of: {', '.join(known)}" if known else "fits no variant that is in use"
            raise ValueError(f"settings '{place.strip()}' {near}")
        kind = type(keys[key])
        try:
            keys[key] = {"true": True, "false": False}[value] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise ValueError(f"settings {place.strip()} is '{value}', no {kind.__name__}") from None
        if not abs(keys[key]) < 2**63:  # nan neither
            raise ValueError(f"settings {place.strip()} is {value}; it must be below 2**63")
    return result
