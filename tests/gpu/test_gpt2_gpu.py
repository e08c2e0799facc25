"""The GPT-2 baseline on a GPU: run with `python -m pytest tests/gpu/test_gpt2_gpu.py -s`.

The shards hold random tokens: neither the rate nor the memory of a step depends on the data.
"""

import dataclasses
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, only_log

from baselines.plan import memory
from baselines.train_gpt2 import TRACKS
from referee.shards import write_shard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def result(tmp_path, track: str, *flags) -> dict[str, str]:
    """The fields of the result line of ten steps of a track, and micro_batch_seqs."""
    hp, rng = TRACKS[track], np.random.default_rng(0)
    for name, rows in (("train", 12 * hp.batch_tokens // hp.seq_len), ("val", 9)):
        count = rows * hp.seq_len + 1
        write_shard(tmp_path / f"{name}.bin", rng.integers(0, 50257, count).astype(np.uint16))
    words = [f"--track={track}", f"--train_files={tmp_path}/train.bin", "--num_steps=10",
             f"--val_files={tmp_path}/val.bin", f"--val_tokens={8 * hp.seq_len}",
             f"--val_seq_len={hp.seq_len}", f"--log_dir={tmp_path}/logs", *flags]  # fmt: skip
    done = subprocess.run([sys.executable, str(ROOT / "baselines/train_gpt2.py"), *words],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = only_log(tmp_path / "logs").read_text()
    fields = dict(pair.split(":", 1) for pair in log.splitlines()[-1].split()[1:])
    return fields | {"rows": re.search(r"^trainer: .* (\d+) rows per", log, re.M)[1]}


def test_124m_uses_55_percent_of_an_h200(tmp_path):
    if "H200" not in torch.cuda.get_device_name():
        pytest.skip("the figure is for an H200")
    found = result(tmp_path, "124M")
    print(found)
    assert float(found["mfu"]) >= 0.55 and found["recompiled"] == "0"


@pytest.mark.parametrize("track", ["124M", "1558M"])
@pytest.mark.parametrize("offload", [False, True])
def test_memory_is_what_was_planned(tmp_path, track, offload):
    """Compiled graphs keep fewer activations than planned; never may they need more."""
    flags = ["--checkpoint_blocks=true", f"--cpu_offload={offload}"]
    found = result(tmp_path, track, *flags)
    hp = dataclasses.replace(TRACKS[track], checkpoint_blocks=True, cpu_offload=offload)
    rt = SimpleNamespace(world_size=1, matmul_dtype=torch.bfloat16)
    planned = sum(memory(hp, rt, int(found["rows"])).values()) / 2**20
    print(f"{track} offload:{offload} planned:{planned:.0f}MiB measured:{found['peak_memory']}")
    assert float(found["peak_memory"].removesuffix("MiB")) < 1.05 * planned
