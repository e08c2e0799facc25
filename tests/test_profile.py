"""tools/profile_step.py sees every stage, and as many of Adam's steps as a run has."""

import re
import sys

import pytest

from tools import profile_step
from tools.cli import ToolError


@pytest.fixture
def profile(monkeypatch, capsys):
    """Profile with these flags, in this process; return what is printed."""
    monkeypatch.setattr(profile_step, "StopRequest", lambda: None)  # it would catch pytest's ctrl-C

    def printed(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["profile_step.py", *flags])
        assert profile_step.main() == 0
        return capsys.readouterr().out

    return printed


def test_every_stage_is_profiled_in_whole_cycles_of_adam(profile, flags):
    printed = profile("--steps", "2", *flags)  # three windows in 20 steps: from step 0, 7 and 14
    seen = re.findall(r"steps (\d+ to \d+): .* ms per step under the profiler", printed)
    assert seen == ["2 to 3", "9 to 10", "16 to 17"]


def test_wrong_flags_are_one_error(profile, flags):
    with pytest.raises(ToolError, match="^--steps 3 must be a multiple of 2"):
        profile("--steps", "3", *flags)
    with pytest.raises(ToolError, match="^--model_dim 66 does not divide by"):
        profile("--track", "embedded", "--model_dim", "66")
