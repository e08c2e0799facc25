"""tools/profile_step.py sees every stage, and as many of Adam's steps as a run has."""

import re
import subprocess
import sys

from conftest import ROOT, clean_environment


def profiled(*flags) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / "tools/profile_step.py", *flags],
                          env=clean_environment(), capture_output=True, text=True)  # fmt: skip


def test_every_stage_is_profiled_in_whole_cycles_of_adam(flags):
    done = profiled("--steps", "2", *flags)  # three windows in 20 steps: from step 0, 7 and 14
    assert done.returncode == 0, done.stderr
    seen = re.findall(r"steps (\d+ to \d+): .* a step under", done.stdout)
    assert seen == ["2 to 3", "9 to 10", "16 to 17"]
    odd = profiled("--steps", "3", *flags)
    assert odd.returncode == 1 and odd.stderr.startswith("error: --steps 3 must divide by")
    wrong = profiled("--track", "embedded", "--model_dim", "66")
    assert (
        wrong.returncode == 1
        and "--model_dim 66 does not divide by 4 times --num_heads 2" in wrong.stderr
    )
