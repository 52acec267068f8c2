#!/usr/bin/env bash
# Train a speedrun model on all GPUs of this machine, or on its CPU.
#
#   ./run.sh [train_gpt.py | train_gpt_medium.py] [flags and settings of that command]
#   GPUS=2 ./run.sh --config configs/speedrun/00_baseline.yaml
#
# GPUS: number of processes, one per GPU (default: all GPUs; without a GPU one process). The steps
# are the same for any number: with fewer GPUs, each accumulates more micro-batches.
set -eu
root=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python3

script=train_gpt.py
case ${1:-} in *.py) script=$1 && shift ;; esac
case $script in
  train_gpt.py | train_gpt_medium.py) ;;
  *) echo "error: $script is not train_gpt.py or train_gpt_medium.py; give one of them" >&2
     exit 2 ;;
esac

gpus=${GPUS:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
case $gpus in
  '' | *[!0-9]* | 0*) echo "error: GPUS=$gpus must be a number of GPUs, such as 8" >&2; exit 2 ;;
  1) exec "$python" "$root/$script" "$@" ;;
esac
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m scripts.launch --nproc_per_node="$gpus" "$root/$script" "$@"
