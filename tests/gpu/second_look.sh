#!/usr/bin/env bash
# Second command on a lent GPU, 420 s, at once after first_look.sh: kernels against fp64, what cannot be
# decided without a GPU, and a schedule of 210 steps, then the same with the flags given here.
#   tests/gpu/second_look.sh --mtp_weight 0
#   REHEARSE=1 tests/gpu/second_look.sh    the same commands on a CPU, tiny
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. tests/gpu/look_common.sh
python -m pytest tests/gpu/test_kernels_gpu.py -q 2>&1 | tee "$OUT/kernels.txt" || true
python tools/benchmark_kernels.py ${REHEARSE:+--shrink --rows 1} 2>&1 | tee "$OUT/benchmark.txt" || true
train whole "$steps" --val_every "$((steps / 6))"
[[ $# -eq 0 ]] || train changed "$steps" --val_every "$((steps / 6))" "$@"
