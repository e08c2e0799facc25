"""What all tools of this folder share: flags, exit codes, errors."""

import argparse
import os

from referee.flags import RunError

os.environ["MPLBACKEND"] = "agg"  # a notebook's, which its programs inherit, may be unknown here
EXIT_FAILED, EXIT_MISUSE, EXIT_INVALID = 1, 2, 4
ToolError = RunError  # what failed, where, and what to do


class InvalidLog(RunError):
    """What is wrong in which line of a log; line 0 is the whole file or folder."""

    exit_code, heading = EXIT_INVALID, "INVALID   "

    def __init__(self, path, line: int, what: str):
        super().__init__(f"{path}:{line}: {what}" if line else f"{path}: {what}")


def flag_parser(doc: str, usage: str | None = None) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring, as it stands there."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        usage=usage, description=doc, formatter_class=form, allow_abbrev=False
    )
