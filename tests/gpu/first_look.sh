#!/usr/bin/env bash
# First command on a lent GPU, 330 s: does this source compile and run there, and where does a step's
# time go? Needs .gpu/ of the data for such a run (unpack.py and shards); leaves results in $OUT.
#   tests/gpu/first_look.sh                on the GPU
#   REHEARSE=1 tests/gpu/first_look.sh     the same commands on a CPU, tiny
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. tests/gpu/look_common.sh
python -c "import torch, triton; print(torch.__version__, triton.__version__)" | tee "$OUT/versions.txt"
nvidia-smi | tee -a "$OUT/versions.txt" || true
train first 24 --val_every 12
python tools/profile_step.py --steps 4 "${flags[@]}" --num_steps 24 2>&1 | tee "$OUT/profile.txt"
