"""Runs a folder of sources in a forked process; it imports nothing of the project."""

import os
import runpy
import sys
from pathlib import Path


def run(words: list[str], folder: Path, errors: Path, environment: dict[str, str]) -> None:
    """`python WORDS`, from a folder of sources."""
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.path.insert(0, str(folder))
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
