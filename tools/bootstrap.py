"""Import this first in a script: the project's root replaces the script's folder on the path.

So every module has one import name, its path from the root, whether a script or a test imports it.
Standard output, as standard error does anyway, escapes what a terminal cannot show; closed, it
leads nowhere.
baselines/, data/ and evals/ hold links to this file.
"""

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path[0] = ROOT
sys.stdout = sys.stdout or open(os.devnull, "w")
sys.stdout.reconfigure(errors="backslashreplace")
