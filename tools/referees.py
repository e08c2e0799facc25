#!/usr/bin/env python3
"""Write tools/referees.txt: every version that this repository has had of the referee's files.

Run it after a change to harness.py or another file of the referee, also in a fork of the project:
its logs are then judged as those of a known referee by its own tools, and by nobody else's.
"""

import ast
import re
import subprocess

import bootstrap  # noqa: F401

from tools.audit import REFEREES
from tools.cli import ToolError, finish, flag_parser
from tools.sources import ROOT, sha256_of

LISTED = re.search(r"^REFEREE_FILES = (\([^)]*\))", (ROOT / "harness.py").read_text(), re.M)
FILES = (*ast.literal_eval(LISTED[1]), "records/harness.py")  # the last: where it stood before
HEADING = "# sha256, first 16 digits, and path; written by ./run.sh tools/referees.py\n"


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True)
    if done.returncode:
        raise ToolError(f"git {words[0]}: {done.stderr.decode().strip()}; run this in a clone")
    return done.stdout.decode()


def versions() -> set[str]:
    """A line for each version in git's history, in the checkout, and in the list as it is."""
    found = set(REFEREES.read_text().splitlines()[1:]) if REFEREES.exists() else set()
    history = git("log", "--full-history", "-m", "--format=", "--raw", "--no-abbrev",
                  "--no-renames", "--", *FILES)  # fmt: skip
    blobs = re.findall(r"^:\S+ \S+ \S+ (\w+) [AM]\t(.+)$", history, re.M)
    texts = [(path, git("cat-file", "blob", blob)) for blob, path in set(blobs)]
    texts += [(path, (ROOT / path).read_text()) for path in FILES if (ROOT / path).exists()]
    return found | {f"{sha256_of(text)[:16]} {path}" for path, text in texts}


def main() -> int:
    flag_parser(__doc__).parse_args()
    lines = sorted(versions(), key=lambda line: line.split()[::-1])
    REFEREES.write_text(HEADING + "".join(f"{line}\n" for line in lines))
    print(f"{REFEREES.relative_to(ROOT)}: {len(lines)} versions")
    return 0


if __name__ == "__main__":
    finish(main)
