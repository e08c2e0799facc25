#!/usr/bin/env bash
# Train in a Slurm job; submit it from the project's folder, which all nodes must see:
#     ./run.sh data/cached_fineweb10B.py          first, on a machine with network
#     sbatch tools/slurm.sh [FLAGS]               8 GPUs of one node
#     sbatch --nodes=2 --time=30 tools/slurm.sh --save_every 250
# Ahead of its time limit the run saves a checkpoint and the job is requeued. A requeued job goes on
# from its newest checkpoint. PET_NPROC_PER_NODE: processes per node, if not one per GPU.
#SBATCH --job-name=photofinish --output=slurm_%j.txt --open-mode=append
#SBATCH --nodes=1 --ntasks-per-node=1 --gpus-per-node=8 --exclusive
#SBATCH --time=60 --signal=USR1@180 --requeue
set -euo pipefail
logs=$PWD/logs/slurm_${SLURM_JOB_ID:?is set in jobs alone; type: sbatch tools/slurm.sh}
mkdir -p "$logs"
export PET_NPROC_PER_NODE=${PET_NPROC_PER_NODE:-gpu}

newest_checkpoint() { # names begin with the time of their run's start
    find "$logs" -maxdepth 1 -name '*_step*[0-9]' | sort | tail -n 1
}

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
resumed=$(newest_checkpoint) code=0
srun ./run.sh torchrun --nnodes="$SLURM_NNODES" --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_endpoint="${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 10000))" \
    train_gpt.py --log_dir="$logs" ${resumed:+--resume="$resumed"} "$@" || code=$?
if [ "$code" = 138 ]; then # 128 + SIGUSR1
    if [ "$(newest_checkpoint)" = "$resumed" ]; then
        echo "error: the job saved no checkpoint within its time limit; give more --time" >&2
        exit 1
    fi
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
