"""What every command line shares: three-part errors, flags from a dataclass, field checks.

A dataclass is the whole command line. The comment beside a field is its help text, a comment line
above fields is the heading of their group, and the class attributes `LIMITS` and `CHOICES` say
which values are valid:

    @dataclass
    class Options:
        # Output
        output_dir: Path = Path("out")  # folder to write to
        bits: int = 8  # bits of a weight
        force: bool = False  # replace what is there

        CHOICES: ClassVar = {"bits": (8, 4)}

    options = parse_flags(Options, argv, "python quantize.py [--FLAG VALUE ...]", __doc__)

A script calls `begin` before it imports PyTorch, and at its end `run_cli`.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import difflib
import functools
import gc
import importlib
import inspect
import itertools
import linecache
import math
import os
import re
import signal
import sys
import types
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

# ------------------------------------------------------------------------------------ errors


class UserError(Exception):
    """An error the user can fix: which field or file, what is wrong, what to do."""

    def __init__(self, field: str, problem: str = "", remedy: str = ""):
        super().__init__(field, problem, remedy)

    def __str__(self) -> str:
        field, problem, remedy = self.args
        if problem:
            return f"{field}: {problem}; {remedy}"
        # A DataLoader worker's error comes as one text: a traceback, and last the error itself.
        return field.strip().split("\n")[-1].partition("UserError: ")[2] or field


def require(holds: object, field: str, problem: str, remedy: str) -> None:
    """Raise a UserError unless `holds`."""
    if not holds:
        raise UserError(field, problem, remedy)


def require_plain_name(name: object, field: str) -> None:
    """Reject a name that is unsafe in a path."""
    require(
        isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name),
        field,
        f"{name!r} is not a plain name",
        "use up to 64 letters, digits, - and _",
    )


def grant_or_choose(folder: Path) -> str:
    """What to do about a folder that this user may not write to."""
    if not hasattr(os, "geteuid"):  # Windows
        return "choose another folder"
    return f"choose another folder, or let user {os.geteuid()} write to {folder.resolve()}"


def need(module: str) -> types.ModuleType:
    """Import an optional package; a UserError with the pip line if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(package, "is not installed", f"pip install {package}") from None


def open_standard_streams() -> None:
    """Give each closed standard stream the null device.

    Otherwise the next file that is opened would take its number, and what libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115


def silence(stream: Any) -> None:
    """Send a stream that cannot be written to the null device, with what is in its buffer."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not every stream has a file
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()


def flush_or_silence(stream: Any) -> OSError | None:
    """Flush a stream; why it cannot be written, if so."""
    try:
        stream.flush()
    except OSError as e:
        silence(stream)
        return e
    except (AttributeError, ValueError):  # not a stream, or closed
        pass
    return None


def print_error(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr, flush=True)


def call_main(main: Callable[[], int | None]) -> tuple[Any, str]:
    """The exit code of `main()`, and the line on stderr that explains it."""
    try:
        return main(), ""
    except SystemExit as e:  # of argparse
        return e.code, ""
    except KeyboardInterrupt:
        return 130, ""
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        silence(sys.stdout)
        return 141, ""
    except UserError as e:
        return 2, f"error: {e}"
    except OSError:
        failure = flush_or_silence(sys.stdout)
        if failure is None:
            raise
        return 2, describe_failure(failure)


def describe_failure(failure: OSError) -> str:
    """One line for a standard output that cannot be written."""
    return f"error: stdout: cannot be written ({failure.strerror}); send it elsewhere"


def say(text: object) -> None:
    """Print a line; if nobody can read it any more, this and all that follows is dropped."""
    try:
        print(text, flush=True)
    except UnicodeEncodeError:  # before run_cli has made the console tolerant
        print(ascii(text), flush=True)
    except (OSError, ValueError):  # a full disk, a closed pipe, a closed file
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def end_on_sigterm() -> None:
    """End on SIGTERM as process 1 of a container too: the kernel would ignore it there."""
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))


def resume_collection() -> None:
    """Search for garbage again after `begin`, but never in what has been imported."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def begin(file: str, spec: Any) -> None:
    """Begin a script, of this file and __spec__, before its large imports.

    With --help the process ends here; see quick_help.py. Otherwise no garbage is searched for until
    `run_cli`: imports leave little, and searches would take a tenth of their time.
    """
    gc.disable()
    words = [*itertools.takewhile(lambda word: word != "--", sys.argv[1:])]
    if "--help" in words or "-h" in words:
        importlib.import_module(f"{__package__}.quick_help").print_help(file, spec)


def run_cli(main: Callable[[], int | None]) -> typing.NoReturn:
    """Exit with what `main()` returns; a UserError becomes one line on stderr and exit code 2."""
    end_on_sigterm()
    open_standard_streams()
    resume_collection()
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack characters that a model writes
        sys.stdout.reconfigure(errors="replace")
    code, line = call_main(main)
    failure = flush_or_silence(sys.stdout)
    if isinstance(failure, BrokenPipeError):
        code = code or 141
    elif failure and not line:
        code, line = 2, describe_failure(failure)
    if line:
        with contextlib.suppress(OSError, ValueError):
            print_error(line)
    flush_or_silence(sys.stderr)
    atexit.register(gc.freeze)  # Python would search all of PyTorch for garbage: up to a second
    sys.exit(code)


class CliParser(argparse.ArgumentParser):
    """Argparse with exact flag names, [defaults] in --help and errors of one line."""

    def __init__(self, **kwargs: Any):
        wide = functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=42, width=110
        )
        super().__init__(allow_abbrev=False, formatter_class=wide, **kwargs)

    def error(self, message: str) -> typing.NoReturn:
        """Print one line in three parts, with the nearest flag for an unknown one; exit code 2."""
        message = re.sub(r"^argument (--[\w-]+)[^:]*: ", r"\1: ", message)
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists every flag"
            message = f"{unknown[1]}: unknown flag; {hint}"
        message += "" if "; " in message else "; --help lists every flag"
        self.exit(2, f"error: {message}\n")


def from_launcher(name: str, default: int) -> int:
    """An environment variable of torchrun or torch.distributed.launch: RANK, WORLD_SIZE, ..."""
    word = os.environ.get(name, str(default))
    require(word.isdecimal(), name, f"{word!r} is not a number", "unset it, or start with torchrun")
    return int(word)


# ------------------------------------------------------------------------------------ fields

DTYPE_NAMES = ("bfloat16", "float16", "float32")
WORDS: dict[Any, dict[str, Any]] = {bool: {"true": True, "1": True, "false": False, "0": False}}
Options = TypeVar("Options")


@functools.cache
def dtypes() -> dict[str, Any]:
    """The dtypes that flags name; also DTYPES. Scripts without a model do without torch."""
    import torch

    return {name: getattr(torch, name) for name in DTYPE_NAMES}


def __getattr__(name: str) -> Any:
    if name == "DTYPES":
        return dtypes()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def show(value: object) -> str:
    """A value as the user would type it."""
    return str(value).removeprefix("torch.")


def has_type(value: Any, hint: Any) -> bool:
    """Is `value` of the annotated type? Whole numbers count as floats, booleans as neither."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return isinstance(value, list) and bool(value) and all(has_type(v, *options) for v in value)
    if typing.get_origin(hint) is dict:
        return isinstance(value, dict)
    if options:
        return any(has_type(value, option) for option in options)
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return isinstance(value, Path) if hint is Path else type(value) is hint


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """The annotations of a dataclass, evaluated once: servers check fields for every answer."""
    return typing.get_type_hints(cls)


def check_fields(holder: Any, limits: dict | None = None, dashes: str = "") -> None:
    """Reject a field of a wrong type, or outside the LIMITS and CHOICES of its class.

    `limits` adds to LIMITS; `dashes` precede field names in messages.
    """
    cls: Any = type(holder)
    hints = field_types(cls)
    limits = {**getattr(cls, "LIMITS", {}), **(limits or {})}
    choices = getattr(cls, "CHOICES", {})
    for field in dataclasses.fields(holder):
        name, value, hint = dashes + field.name, getattr(holder, field.name), hints[field.name]
        remedy = f"the default is {show(field.default)}"
        require(has_type(value, hint), name, f"{value!r} is not {field.type}", remedy)
        if value is None:
            continue
        for each in value if isinstance(value, list) else [value]:
            if field.name in limits:
                low, high = limits[field.name]
                span = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                require(low <= each <= high, name, f"{each} is out of range", f"it must be {span}")
            valid = choices.get(field.name, (each,))
            listed = ", ".join(map(show, valid))
            require(each in valid, name, f"{show(each)} is not a choice", f"use one of {listed}")


# ------------------------------------------------------------------------------------- flags


def parse_as(hint: Any, text: str) -> Any:
    """Convert the text of a flag to the type `hint`."""
    if hint == bool | str:  # a word of its own beside true and false
        return WORDS[bool].get(text.lower(), text)
    words = dtypes() if hint.__module__ == "torch" else WORDS.get(hint)
    try:
        return hint(text) if words is None else words[text.lower()]
    except (ValueError, KeyError):
        valid = hint.__name__ if words is None else "one of " + ", ".join(words)
        raise argparse.ArgumentTypeError(f"{text!r} is invalid; pass {valid}") from None


def parse_words(
    words: list[str], owner: type, known: Collection[str], remedy: str, help_of: str = ""
) -> dict[str, Any]:
    """FIELD=VALUE words -> values for the fields `known` of the dataclass `owner`.

    Errors advise `remedy`, or --help of the script `help_of`, which is this one by default.
    """
    hints, values = typing.get_type_hints(owner), {}
    for word in words:
        field, equals, value = word.partition("=")
        require(equals, word, "is not FIELD=VALUE", remedy)
        require(
            field in known, field, "no such setting", f"{help_of} --help lists them all".strip()
        )
        try:
            values[field] = parse_as(hints[field], value)
        except argparse.ArgumentTypeError as e:
            raise UserError(field, *str(e).split("; ")) from None
    return values


def class_lines(cls: type) -> list[str]:
    """The lines of a class; `inspect.getsource` would parse the whole file to find them."""
    lines = linecache.getlines(inspect.getfile(cls))
    head = re.compile(rf"class {cls.__name__}\b")
    start = next(i for i, line in enumerate(lines) if head.match(line))
    return [lines[start], *itertools.takewhile(lambda line: line[0] in " \n", lines[start + 1 :])]


@functools.cache
def describe_fields(cls: type) -> dict[str, tuple[str, str]]:
    """The group and the help text of every field that has a comment beside it."""
    found, group = {}, ""
    for line in class_lines(cls):
        if title := re.match(r"    # (\w.*)$", line):
            group = title[1]
        elif field := re.match(r"    (\w+): .*?  # (.*)$", line):
            found[field[1]] = group, field[2]
    return found


def element_type(hint: Any) -> tuple[Any, bool]:
    """The type of one word of a flag, and whether the flag takes several."""
    options = typing.get_args(hint) if not isinstance(hint, type) else (hint,)
    options = (hint,) if typing.get_origin(hint) is list else options
    if hint == bool | str:
        return hint, False
    lists = [option for option in options if typing.get_origin(option) is list]
    if lists:
        return typing.get_args(lists[0])[0], True
    return next(option for option in options if option is not types.NoneType), False


def add_flags(
    parser: argparse.ArgumentParser,
    cls: type,
    defaults: dict | None = None,
    leave_out: Collection[str] = (),
    spelling: dict[str, tuple[str, ...]] | None = None,
) -> None:
    """Add one flag for every described field of a dataclass; a flag not given sets nothing.

    `defaults` are shown in place of the class's own; `spelling` names the flags of some fields.
    """
    groups: dict[str, Any] = {"": parser}
    hints, choices = field_types(cls), getattr(cls, "CHOICES", {})
    for name, (title, text) in describe_fields(cls).items():
        if name in leave_out:
            continue
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind, several = element_type(hints[name])
        if name in choices:
            text += f": {', '.join(map(show, choices[name]))}"
        text += f" [{show((defaults or {}).get(name, getattr(cls, name)))}]"
        count = {"nargs": "?", "const": True} if kind in (bool, bool | str) else {}
        groups[title].add_argument(
            *(f"--{flag}" for flag in (spelling or {}).get(name, (name,))),
            dest=name,
            type=functools.partial(parse_as, kind),
            default=argparse.SUPPRESS,
            metavar=str(getattr(kind, "__name__", "bool")).upper(),
            help=text.replace("%", "%%"),
            **({"nargs": "+"} if several else count),
        )


def given_fields(cls: type, args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a dataclass that flags have set.

    One word for a field of type `str | list[str]` is stored as that word.
    """
    hints, given = field_types(cls), vars(args)
    names = [field.name for field in dataclasses.fields(cls) if field.name in given]
    values = {name: given[name] for name in names}
    for name, value in values.items():
        alone = isinstance(value, list) and len(value) == 1 and has_type(value[0], hints[name])
        values[name] = value[0] if alone else value
    return values


def make_options(cls: type[Options], args: argparse.Namespace) -> Options:
    """The dataclass with the fields that flags have set, checked."""
    options = cls(**given_fields(cls, args))
    check_fields(options, dashes="--")
    return options


def parse_flags(
    cls: type[Options], argv: list[str] | None, usage: str, description: str | None
) -> Options:
    """The dataclass that a command line gives, checked; see the head of this file."""
    parser = CliParser(usage=usage, description=description)
    add_flags(parser, cls)
    return make_options(cls, parser.parse_args(argv))
