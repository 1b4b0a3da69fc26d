#!/usr/bin/env bash
# From a fresh clone to a ranked table: make .venv, install, and run the first sweep on what this machine has.
# Further arguments are overrides of the sweep, for instance: ./launchers/quickstart.sh train.steps=40
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launchers/setup.sh
gpus=$(list_gpus | wc -l)
if ((gpus == 0)); then
  exec .venv/bin/python launchers/sweep.py sweep=quickstart "$@"
fi
while ((gpus & (gpus - 1))); do
  gpus=$((gpus - 1)) # a power of two shares the batch evenly
done
points=()
for tp in 1 2 4; do
  for pp in 1 2 4; do
    ((gpus % (tp * pp))) || points+=("'parallel.tp=$tp parallel.pp=$pp parallel.dp=$((gpus / tp / pp))'")
  done
done
compute_capabilities=$(nvidia-smi ${CUDA_VISIBLE_DEVICES:+--id="$CUDA_VISIBLE_DEVICES"} --query-gpu=compute_cap --format=csv,noheader || true)
if grep -qE '^[0-7]\.' <<<"$compute_capabilities"; then
  set -- train.precision=fp32 parallel.zero_stage=0 "$@" # before Ampere: no bf16, and less memory
fi
exec .venv/bin/python launchers/sweep.py sweep=quickstart_gpu sweep.points="[$(IFS=,; echo "${points[*]}")]" "$@"
