"""How every tool of this folder begins and ends: its flags, its exit code, its words for errors."""

import argparse
import os
import signal
import sys
from collections.abc import Callable

EXIT_FAILED, EXIT_MISUSE, EXIT_INVALID = 1, 2, 4


class InvalidLog(Exception):
    """What is wrong with which line of which log; line 0 is the whole file or folder."""

    def __init__(self, path, line: int, what: str):
        super().__init__(f"{path}:{line}: {what}" if line else f"{path}: {what}")


class ToolError(Exception):
    """What failed, where, and what to do, in words for a person."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which unlike ctrl-C reaches this process alone and not the run that it started."""


def flag_parser(doc: str, usage: str | None = None) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring, as it stands there."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        usage=usage, description=doc, formatter_class=form, allow_abbrev=False
    )


def finish(main: Callable[[], int], failed: int = EXIT_FAILED) -> None:
    """Run a tool and exit with its code; failed: the code of an error that is no invalid log."""
    signal.signal(signal.SIGTERM, terminate)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # where it is closed
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does anyway
    try:
        code = main()
        sys.stdout.flush()
    except InvalidLog as error:
        code = tell(f"INVALID   {error}", EXIT_INVALID)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error
        code = tell(f"error: {what}", failed)
    except RuntimeError as error:
        if "Symlink loop" not in str(error):
            raise
        code = tell(f"error: {error}", failed)
    except ToolError as error:
        code = tell(f"error: {error}", failed)
    except Terminated:
        code = 128 + signal.SIGTERM
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    sys.exit(code)


def terminate(number, frame):
    raise Terminated


def tell(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
