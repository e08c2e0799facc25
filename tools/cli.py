"""How every tool of this folder begins and ends: flags, exit codes, error messages."""

import argparse
import os
import signal
import sys
from collections.abc import Callable

EXIT_FAILED, EXIT_MISUSE, EXIT_INVALID = 1, 2, 4


class InvalidLog(Exception):
    """What is wrong in which line of a log; line 0 is the whole file or folder."""

    def __init__(self, path, line: int, what: str):
        super().__init__(f"{path}:{line}: {what}" if line else f"{path}: {what}")


class ToolError(Exception):
    """An error message for a person: what failed, where, and what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which unlike ctrl-C reaches this process alone and not the run that it started."""


def flag_parser(doc: str, usage: str | None = None) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring, as it stands there."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        usage=usage, description=doc, formatter_class=form, allow_abbrev=False
    )


def finish(main: Callable[[], int], failed: int = EXIT_FAILED) -> None:
    """Run a tool and exit with its code; failed: the code after any error but an invalid log."""
    signal.signal(signal.SIGTERM, terminate)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # if it is closed
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does anyway
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except InvalidLog as error:
        print(f"INVALID   {error}", file=sys.stderr)
        code = EXIT_INVALID
    except (ToolError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "Symlink loop" not in str(error):
            raise  # a bug; a looping link is one up to Python 3.12
        named = isinstance(error, OSError) and error.filename
        what = f"{error.filename}: {error.strerror}" if named else error
        print(f"error: {what}", file=sys.stderr)
        code = failed
    except KeyboardInterrupt as stop:
        code = 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)
    sys.exit(code)


def terminate(number, frame):
    raise Terminated
