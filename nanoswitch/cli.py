"""Flags, config files and error lines, the same in every script.

    config = cli.parse(Config)                        # one dataclass of flags
    model, train = cli.parse(GPTConfig, TrainConfig)  # several, one flat list of flags
    cli.run(main)                                     # an expected failure is one line

A field's name is its flag and its TOML key, and the docstring under it is its help.
Order: defaults < config files (positional, *.toml) < flags; the last of each wins.
This file exists so that every script reads its command line alike.
"""

import contextlib
import dataclasses
import difflib
import errno
import io
import os
import re
import sys
import tomllib
import typing

from nanoswitch.files import pointer_hint
from nanoswitch.registry import place_in_variant, unknown

BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def parse(*classes, argv=None, description=None, configs=False):
    """Fill each dataclass from config files and flags; exit with status 2 on a bad one.

    configs: positional arguments are TOML files, read in order before the flags.
    Returns one instance, or a tuple of them when several classes are given.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    fields = {f.name: f for c in classes for f in dataclasses.fields(c)}
    hints = {k: v for c in classes for k, v in typing.get_type_hints(c).items()}
    flags, positional, asks_help = split_argv(argv)
    if configs:
        flags = [pair for path in positional for pair in read_toml(path)] + flags
        positional = []
    found = {}
    for origin, name, value in flags:
        check_name(origin, name, fields)
        found[name] = typed(origin, value, hints[name])
    if configs and not asks_help and all(is_plain(hints[name]) for name in found):
        try:  # tyro takes eight times as long, and a ladder reads hundreds of command lines
            made = tuple(filled(c, found) for c in classes)
        except ValueError as error:  # a __post_init__ that refuses a combination
            fail(error, status=2)
        return made[0] if len(made) == 1 else made

    import tyro

    args = [f"--{name}={value}" for name, value in found.items()]
    group = dataclasses.make_dataclass("flags", [(c.__name__, c) for c in classes])
    target = classes[0] if len(classes) == 1 else tyro.conf.OmitArgPrefixes[group]
    message = io.StringIO()
    # tyro frames its errors in a box of many lines: catch it, keep its one sentence
    capture = contextlib.ExitStack()
    if not asks_help:
        capture.enter_context(contextlib.redirect_stderr(message))
        capture.enter_context(wide_terminal())
    try:
        with capture:
            result = tyro.cli(
                target,
                args=["--help"] if asks_help else args + positional,
                description=description or sys.modules["__main__"].__doc__,
                config=(tyro.conf.FlagConversionOff, tyro.conf.HelptextFromCommentsOff),
                use_underscores=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        fail(one_sentence(message.getvalue()), status=2)
    except ValueError as error:  # a __post_init__ that refuses a combination
        fail(error, status=2)
    return result if len(classes) == 1 else tuple(getattr(result, c.__name__) for c in classes)


def given(argv=None, configs=False):
    """{name: value as text} of what a command line and its config files say, the last of each:
    parse() alone cannot tell a default that was asked for from one that was not."""
    flags, positional, _ = split_argv(sys.argv[1:] if argv is None else argv)
    read = [pair for path in positional for pair in read_toml(path)] if configs else []
    return {name: value for _, name, value in read + flags}


def split_argv(argv):
    """Command line -> [(origin, name, value)], [positional], whether help was asked for."""
    flags, positional, tokens = [], [], iter(argv)
    for token in tokens:
        if token in ("-h", "--help"):
            return [], [], True
        if not token.startswith("--"):
            positional.append(token)
            continue
        name, equals, value = token[2:].partition("=")
        if not equals:
            value = next(tokens, None)
            if value is None:
                fail(f"--{name} needs a value: --{name} VALUE", status=2)
        flags.append((f"--{name}", name.replace("-", "_"), value))
    return flags, positional, False


def bare_switch(argv, name):
    """The command line with --name as --name=true where no value follows."""
    argv = list(argv)
    for i, token in enumerate(argv):
        if token == f"--{name}" and "".join(argv[i + 1 : i + 2]).lower() not in BOOLS:
            argv[i] = f"--{name}=true"
    return argv


def load_toml(path):
    """A TOML file -> its table."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        fail(f"cannot read config {path}: {error.strerror or error}", status=2)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        fail(f"{path} is not a TOML config: {error}{pointer_hint(path)}", status=2)


def read_toml(path):
    """A config file -> [(origin, name, value as text)]."""
    table = load_toml(path)
    for name, value in table.items():
        if isinstance(value, (dict, list)):
            fail(f"{path}: '{name}' must be one value, not a table or list", status=2)
    return [(f"{path}: {name}", name, as_flag(value)) for name, value in table.items()]


def as_flag(value):
    """A value as one types it: TOML's true is --name true."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def check_name(origin, name, names):
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "--help lists the valid names"
        fail(f"unknown name {origin}; {hint}", status=2)


def is_plain(kind):
    return kind in (int, float, bool, str) or typing.get_origin(kind) is typing.Literal


def filled(kind, found):
    """A dataclass from those of {field: value} that are its own."""
    return kind(**{name: v for name, v in found.items() if name in kind.__dataclass_fields__})


def typed(origin, value, kind):
    """A flag's text as its kind, where that is plain; else it stays a text, for tyro."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal and value not in choices:
        fail(unknown(origin, value, choices), status=2)
    if kind is bool:
        if value.lower() not in BOOLS:
            fail(f"{origin} is '{value}'; it must be true or false", status=2)
        return BOOLS[value.lower()]
    if kind in (int, float):
        check_number(origin, value, kind)
        return kind(value)
    return value


def check_number(origin, value, kind):
    """Refuse what is no number of its kind, and nan, infinity and what 64 bits do not hold: they
    pass as numbers everywhere."""
    try:
        number = kind(value)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        fail(f"{origin} is '{value}'; it must be {wanted}", status=2)
    if not abs(number) < 2**63:
        fail(f"{origin} is {value}; it must be a number below 2**63", status=2)


def at_least(config, least, names):
    """ValueError unless a config's fields `names`, a text of them, are `least` or more."""
    for name in names.split():
        if not getattr(config, name) >= least:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be {least} or more")


def one_sentence(box):
    """The message inside tyro's framed error text: below its title, above the next rule."""
    box = re.sub(r"\x1b\[[0-9;]*m", "", box)
    body = [line.strip(" │|") for line in box.splitlines()[1:]]
    parts = re.split(r"\n(?:─|-){3,}\n|╰", "\n" + "\n".join(body))
    text = " ".join(next((part for part in parts if part.strip()), "").split())
    text = re.sub(r"^Missing from \S+: (--\w+ \w+|\S+) ", r"Missing \1: ", text)
    text = text.replace(" (required)", "")
    # a class of ours is no news to the user
    return re.sub(r"^Error parsing \w+: ", "", text) or "bad command line; see --help"


@contextlib.contextmanager
def wide_terminal():
    """Have tyro break no line, and so no word, of what it says."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def fail(message, status=1):
    """Print one line to stderr and exit."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    sys.exit(status)


def run(main):
    """Call main(). Expected failures (ValueError, OSError, a missing optional package) end in
    one line and status 1; --debug anywhere on the command line shows the traceback instead."""
    # not all are UTF-8: a pipe on Windows, a Latin-1 locale
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")
    debug = "--debug" in sys.argv
    sys.argv = [a for a in sys.argv if a != "--debug"]
    try:
        main()
    except BrokenPipeError:  # the reader of a pipe (head, less) went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        fail("interrupted", status=130)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if debug:
            raise
        fail(place_hint(error))
    except Exception as error:
        if debug:
            raise
        # torch has no kind of its own for it on CPU; its kind on a card is not imported for this
        wanted = re.search(
            r"tried to allocate ([\d.]+) (\w+)|size calculation overflowed", str(error), re.I
        )
        out = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not (wanted or out):
            if place := place_in_variant(error):
                fail(f"{place}; --debug shows all of it")
            raise
        much = ""
        if wanted and wanted[1]:
            unit = {"bytes": 1, "KiB": 2**10, "MiB": 2**20}.get(wanted[2], 2**30)
            much = f" for {float(wanted[1]) * unit / 2**30:,.1f} GiB at once"
        fail(f"not enough memory{much}; lower the sizes: batch, samples, tokens, context or model")


def place_hint(error):
    """An error of the file system as a sentence with the path and what to do."""
    if not isinstance(error, OSError) or not error.filename:
        return error
    free = "free some, or " if error.errno == errno.ENOSPC else ""
    return f"cannot use {error.filename}: {error.strerror}; {free}give another path"
