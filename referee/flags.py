"""The command line: dataclass fields as flags, errors for people, how a script ends."""

import argparse
import dataclasses
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import field
from typing import get_args, get_origin

MOST_INT, MOST_FP32 = 2**63 - 1, 3.4e38
BUG = 70  # the exit code of an error that nobody thought of, as in sysexits.h


class RunError(Exception):
    """What failed, where, and the next command to run, in words for a person."""


def option(default, help_and_unit: str, least: float = 0, hidden: bool = False):
    """A dataclass field that is a flag too; hidden: for tools, not in --help."""
    facts = {"help": help_and_unit, "least": least, "hidden": hidden}
    return field(default=default, metadata=facts)


def as_flag(value):
    """A hyperparameter as one would give it to its flag, and as logs have it."""
    if not isinstance(value, tuple | list):
        return value
    return ",".join(map(str, value)) or "none"


def check_ranges(settings) -> None:
    """RunError for a number that is out of its range or not finite, or a text that is no UTF-8."""
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        values = value if isinstance(value, tuple) else (value,)
        least = f.metadata["least"]
        if isinstance(value, str) and value != value.encode(errors="replace").decode():
            raise RunError(f"--{f.name} {value!r} has bytes that are no UTF-8; give another name")
        if f.type in (str, bool) or all(least <= v <= most(f.name, v) for v in values):
            continue
        raise RunError(f"--{f.name} {as_flag(value)} is out of range: give at least {least} and at "
                       f"most {most(f.name, values[0]):g}")  # fmt: skip


def most(name: str, value: float) -> float:
    """The largest value of a number of this name and type."""
    if name.endswith("_frac"):
        return 1
    return MOST_INT if isinstance(value, int) else MOST_FP32


def numbers(kind: type, count: int | None) -> Callable[[str], tuple]:
    """A reader of comma-separated numbers, such as 384,896,1408; count: how many, None: any.

    The word none stands for no number.
    """

    def list_of_numbers(text: str) -> tuple:
        words = [] if text == "none" else text.split(",")
        values = tuple(kind(word) for word in words)
        if count not in (None, len(values)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {count} numbers, as in 0.9,0.95")
        return values

    return list_of_numbers


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError  # argparse says which flag
    return text.lower() == "true"


def flag_reader(kind: type) -> Callable[[str], object]:
    """The function by which argparse reads the text of a flag of this type."""
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        return numbers(parts[0], None if ... in parts else len(parts))
    return boolean if kind is bool else kind


def metavar(kind: type) -> str:
    """What stands for a flag's value in --help."""
    if get_origin(kind) is tuple:
        return "N,N,..."
    return {int: "N", float: "X", bool: "true|false"}.get(kind, "TEXT")


def join_values(argv: list[str], names: set[str]) -> list[str]:
    """argv with --NAME=VALUE for --NAME VALUE, so that a value may begin with a dash."""
    flags, joined, rest = {f"--{name}" for name in names}, [], list(argv)
    while rest:
        word = rest.pop(0)
        if word in flags and rest and rest[0].partition("=")[0] not in flags | {"-h", "--help"}:
            word = f"{word}={rest.pop(0)}"
        joined.append(word)
    return joined


def add_flags(group, part, choices: dict) -> None:
    """A flag for each field of a dataclass of options; choices: allowed values by field name."""
    for f in dataclasses.fields(part):
        text = f"{f.metadata['help']} (default: {as_flag(getattr(part, f.name))!r})"
        reader = flag_reader(f.type)
        group.add_argument(
            f"--{f.name}",
            type=reader,
            default=argparse.SUPPRESS,
            choices=choices.get(f.name),
            metavar=metavar(f.type),
            help=argparse.SUPPRESS if f.metadata["hidden"] else text,
        )


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, its number: unlike ctrl-C it reaches this process and none it started."""


def on_signals(handler, *numbers: int) -> None:
    """Handle signals, but those that the caller ignores: behind nohup SIGHUP, behind & SIGINT."""
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def open_streams() -> None:
    """Open what is closed of the standard streams, or the next files would take their numbers."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(spare)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does anyway


def finish(main: Callable[[], int | None], failed: int = 1, interrupted: str = "") -> None:
    """Run a script's main and exit with its code, or 0.

    Errors for people become one line and the exit code `failed`, or the error's own exit_code; any
    other is a bug: its traceback is shown, and the code is none that a tool gives a meaning.
    interrupted: what to print after ctrl-C.
    """

    def terminate(number, frame):
        raise Terminated(number)

    on_signals(terminate, signal.SIGTERM, signal.SIGHUP)
    on_signals(signal.default_int_handler, signal.SIGINT)
    open_streams()
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except Exception as error:
        code = getattr(error, "exit_code", failed)
        if isinstance(error, RunError | OSError) or "Symlink loop" in str(error):  # up to 3.12
            named = isinstance(error, OSError) and error.filename
            what = f"{error.filename}: {error.strerror}" if named else error
            print(getattr(error, "heading", "error: ") + str(what), file=sys.stderr)
        else:
            traceback.print_exc()
            code = BUG
    except KeyboardInterrupt as stop:
        print(interrupted, end="\n" if interrupted else "", file=sys.stderr)
        code = 128 + (stop.args[0] if isinstance(stop, Terminated) else signal.SIGINT)
    on_signals(signal.SIG_DFL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Python ends silently
    sys.exit(code)
