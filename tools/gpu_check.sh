#!/usr/bin/env bash
# What has to be seen on a GPU, in three parts of at most nine minutes; each leaves one tar.
#   tools/gpu_check.sh 1      kernels and FlexAttention against fp64, recompilations, warm-up
#   tools/gpu_check.sh 2      peak memory, profiles of each stage at one row and at what fits
#   tools/gpu_check.sh 3      kernels timed, 200 steps in fp8 and in bf16, gradients of the tables
# --shrink: everything tiny, also on a CPU: does the script work? What follows goes to the trainer
# of part 3, such as --train_files 'DIR/train_*.bin' --val_files 'DIR/val_*.bin'.
# PYTHON names an interpreter; else it is that of ./run.sh.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
part=${1:-}
case $part in 1 | 2 | 3) shift ;; *)
    sed -n '2,9s/^# //p' "$0" >&2
    exit 2
    ;;
esac
shrink=()
if [ "${1:-}" = --shrink ]; then
    shrink=(--shrink)
    shift
fi
python=${PYTHON:-.venv/bin/python}
"$python" -c 'import torch' || { echo "error: $python has no torch; run ./run.sh first, or set PYTHON" >&2 && exit 1; }
out=gpu_check_$part
rm -rf "$out" && mkdir "$out"
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/.gpu_cache/inductor}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/.gpu_cache/triton}
failures=0

# check NAME SECONDS COMMAND...: run it, keep what it says, go on whatever happens. What takes too
# long says where each of its threads is.
check() {
    local name=$1 limit=$2 begun=$SECONDS status=0
    shift 2
    PYTHONFAULTHANDLER=1 timeout --signal=ABRT --kill-after=10 "$limit" "$@" >"$out/$name.txt" 2>&1 || status=$?
    [ $status = 0 ] || failures=$((failures + 1))
    echo "$name: exit $status after $((SECONDS - begun)) s" | tee -a "$out/summary.txt"
}

finish() {
    nvidia-smi >"$out/nvidia-smi.txt" 2>&1
    "$python" -c 'import torch, triton; print(torch.__version__, triton.__version__)' >"$out/versions.txt" 2>&1
    tar -cf "$out.tar" "$out" && echo "$out.tar: $failures of the checks failed"
}
trap finish EXIT

tests() { # tests NAME SECONDS FILE-AND-FLAGS...
    local name=$1 limit=$2
    shift 2
    check "$name" "$limit" "$python" -m pytest -p no:cacheprovider -s --durations=0 "$@"
}

small=(--seq_len 1024 --layers sL-S --value_layers 0,3 --mix_at 2,4 --mix_from 0,1
    --bigram_rows 1024 --batch_tokens 8192 --document_cap 896 --stage_lr 1 --model_dim 64
    --num_heads 2 --head_dim 32 --mlp_dim 128 --val_tokens 16384
    --val_seq_len 1024)
[ ${#shrink[@]} = 0 ] && small=()

case $part in
1)
    tests kernels 170 tests/gpu/test_kernels_gpu.py
    tests attention 100 tests/gpu/test_model_gpu.py -k "flex_attention or orthogonalize"
    tests recompilations 200 tests/gpu/test_model_gpu.py -k "recompiles or warm_up"
    ;;
2)
    tests memory 230 tests/gpu/test_model_gpu.py -k memory
    for rows in 1 0; do
        check "profile_rows_$rows" 120 "$python" tools/profile_step.py --track fineweb --steps 2 \
            --num_steps 60 --micro_batch_seqs $rows "${small[@]}" "$@"
    done
    ;;
3)
    check benchmark 150 "$python" tools/benchmark_kernels.py "${shrink[@]}"
    steps=(--track fineweb --num_steps 200 --max_epochs 2 --val_every 100 --val_tokens 1048576
        --log_dir "$out" "${small[@]}")
    [ ${#shrink[@]} = 0 ] || steps+=(--num_steps 6 --val_every 3)
    check train_fp8 160 "$python" train_gpt.py "${steps[@]}" --slug fp8 "$@"
    check train_bf16 160 "$python" -c "
import runpy, sys, harness
begin = harness.Runtime.__init__
def without_fp8(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    self.has_fp8 = False
harness.Runtime.__init__ = without_fp8
sys.argv[0] = 'train_gpt.py'
runpy.run_path('train_gpt.py', run_name='__main__')" "${steps[@]}" --slug bf16 "$@"
    tests table_gradients 60 tests/gpu/test_model_gpu.py -k tables
    ;;
esac
exit $((failures > 0))
