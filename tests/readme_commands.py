#!/usr/bin/env python3
"""Run README's commands as they are typed, in a fresh clone with nothing installed.

Every line of README's ```sh blocks runs, in order; LOG stands for the newest log. Takes some twenty
minutes. Exit code 1 if a command fails: an error, or a code that its tool does not document.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {  # exit codes that answer a question: a verdict, or logs that are no records
    "tools/race.py": {0, 1, 5},
    "tools/diff.py": {0, 1, 5},
    "tools/validate.py": {0, 1},
}


def commands(text: str) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    return [line for block in blocks
            for line in block.replace("\\\n", "").splitlines() if line.strip()]  # fmt: skip


def run(command: str, clone: Path) -> bool:
    """Run one command; say how it ended."""
    logs = sorted((clone / "logs").glob("*.txt"))
    command = command.replace(" LOG ", f" {shlex.quote(str(logs[-1]))} " if logs else " LOG ")
    started = time.perf_counter()
    kept = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(["bash", "-c", command], cwd=clone, env=kept)
    tools = [codes for tool, codes in ALLOWED.items() if tool in command]
    good = done.returncode in (tools[0] if tools else {0})
    seconds = time.perf_counter() - started
    print(
        f"{'ok' if good else 'FAILED'} ({done.returncode}, {seconds:.0f} s): {command}", flush=True
    )
    return good


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder, "a fresh clone")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        found = commands((clone / "README.md").read_text())
        good = [run(command, clone) for command in found]
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
