# Of first_look.sh and second_look.sh: data, flags, and a run that keeps its log in $OUT.
export OUT=${OUT:-/tmp/look} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/look_cache}
export TRITON_CACHE_DIR=$TORCHINDUCTOR_CACHE_DIR/triton
mkdir -p "$OUT"
python() { "${PYTHON:-python3}" "$@"; }
if [[ -n ${REHEARSE:-} ]]; then
  steps=24 flags=(--track embedded --compile false --batch_tokens 256 --val_tokens 2048 --window_tokens
                  64,128,256 --micro_batch_seqs 1)
else
  [[ -f /tmp/english/english_val_000000.bin ]] || python .gpu/unpack.py /tmp/english
  # One shape to compile: 8 rows in every stage.
  steps=210 flags=(--track fineweb --micro_batch_seqs 8 --max_epochs 2 --val_tokens 1048576
                   --train_files '/tmp/english/english_train_*.bin'
                   --val_files '/tmp/english/english_val_*.bin')
fi
train() {  # train NAME STEPS FLAGS...
  python train_gpt.py "${flags[@]}" --slug "$1" --num_steps "$2" --log_dir "$OUT" "${@:3}"
}
