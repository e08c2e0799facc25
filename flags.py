"""Turn dataclass fields into command-line flags; also the error that ends a run with one line."""

import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import field
from typing import get_args, get_origin


class RunError(Exception):
    """What failed, where, and the next command to run, in words for a person.

    told: whether this rank should print it.
    """

    def __init__(self, message: str, told: bool = True):
        super().__init__(message)
        self.told = told


def option(default, help_and_unit: str, least: float = 0, hidden: bool = False):
    """A dataclass field that is a flag too; hidden: for tools, not in --help."""
    facts = {"help": help_and_unit, "least": least, "hidden": hidden}
    return field(default=default, metadata=facts)


def as_flag(value):
    """A hyperparameter as one would give it to its flag, and as logs have it."""
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else value


def check_ranges(settings) -> None:
    """RunError for a number in a dataclass of options that is below its least, or not finite."""
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        values = value if isinstance(value, tuple) else (value,)
        least = f.metadata["least"]
        if f.type not in (str, bool) and not all(least <= v < math.inf for v in values):
            raise RunError(f"--{f.name} {as_flag(value)} is out of range: give at least {least}")


def numbers(kind: type, count: int | None) -> Callable[[str], tuple]:
    """A reader of comma-separated numbers, such as 384,896,1408; count: how many, None: any."""

    def list_of_numbers(text: str) -> tuple:
        values = tuple(kind(word) for word in text.split(","))
        if count not in (None, len(values)):
            raise ValueError  # argparse says which flag
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
            metavar=reader.__name__,
            help=argparse.SUPPRESS if f.metadata["hidden"] else text,
        )
