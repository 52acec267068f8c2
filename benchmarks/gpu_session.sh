#!/usr/bin/env bash
# What a quarter of an hour on one GPU can answer, most valuable first. One part per call:
#
#   OUT=results/gpu benchmarks/gpu_session.sh PART
#
#   1  correctness of every GPU path: attention kernels, loss head, float8, Muon, compilation, FSDP,
#      bit-for-bit resume; then the speed of the 1.1B model at 4K
#   2  speed of the 1.1B model at 8K and 16K and with float8; memory against the planner's estimate
#   3  GPT-2 124M: the speedrun's baseline and its newest rung for the same seconds
#   4  other training loops on the same batches
#
# A part takes less than ten minutes and continues when a command fails or times out: partN.json has
# the status of each command, partN.log its output. Repeating a part skips the commands that
# succeeded; delete partN.json to repeat those. --list prints a part's commands; --tiny uses small
# shapes, for a CPU.
# Needs torch 2.11 or newer and transformers, accelerate, numpy, PyYAML, safetensors, tokenizers,
# tqdm, pytest; no network. float8 also needs torchao, part 3 matplotlib, pandas, scipy and the
# shards in data/quickstart_bin.
set -u
cd "$(dirname "$0")/.." || exit 2

part=${1:?which part: 1 to 4} mode=${2:-run} tiny=${3:-}
[ "$mode" = --tiny ] && mode=run tiny=--tiny
python=${PYTHON:-python3} out=${OUT:-results/gpu} limit=${PART_SECONDS:-570}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
log=$out/part$part.log status=$out/part$part.json entries=""
scratch=$(mktemp -d) && trap 'rm -rf "$scratch"' EXIT
is_tiny=false
[ "$tiny" ] && is_tiny=true
if grep -qs "\"tiny\": $is_tiny" "$status"; then  # commands that succeeded in an earlier call
  entries=$(grep '"status": "ok"' "$status" | sed 's/,$//; $!s/$/,/')
  entries=${entries:+$'\n'$entries}
fi
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=20
began=$SECONDS

note() {  # name status seconds command: add an entry to partN.json, valid JSON after each command
  local command=${4//\\/\\\\}
  entries+="${entries:+,}"$'\n'"  {\"name\": \"$1\", \"status\": \"$2\", \"seconds\": $3,"
  entries+=" \"command\": \"${command//\"/\\\"}\"}"
  printf '{"part": %s, "tiny": %s, "commands": [%s\n]}\n' "$part" "$is_tiny" "$entries" >"$status"
  printf '%-28s %s after %s s\n' "$1" "$2" "$3" | tee -a "$log"
}

try() {  # name seconds command...: run a command with a timeout
  local name=$1 timeout=$2 left=$((limit - SECONDS + began)) start=$SECONDS code
  shift 2
  [ "$mode" = --list ] && { printf '%s:%s\n' "$name" "$(printf ' %q' "$@")"; return; }
  grep -q "\"name\": \"$name\", \"status\": \"ok\"" <<<"$entries" && { echo "$name: done"; return; }
  [ "$left" -lt 15 ] && { note "$name" "no time left" 0 "$*"; return; }
  printf '\n==== %s: %s\n' "$name" "$*" >>"$log"
  timeout --kill-after=10 "$((left < timeout ? left : timeout))" "$@" >>"$log" 2>&1
  code=$?
  case $code in 0) code=ok ;; 124 | 137) code="overran" ;; *) code="failed with $code" ;; esac
  note "$name" "$code" $((SECONDS - start)) "$*"
}

launch=("$python" -m torch.distributed.run --standalone --nproc_per_node=1)
speed=("$python" -m benchmarks.train_speed --rounds 2)
real=(--config configs/phase1_pretrain.yaml parallel.activation_checkpointing=none)
real+=(model.max_position_embeddings=16384 data.tokens_per_step=65536)
rows4k=16 rows8k=8 rows16k=4 short=4096 middle=8192 long=16384 peer_rows=4
rungs=() path_flags=()
if [ "$tiny" ]; then
  speed+=(--steps 4 --warmup 2)
  real=(--config configs/test_mode.yaml data.tokens_per_step=256)
  rows4k=4 rows8k=2 rows16k=4 short=16 middle=32 long=64 peer_rows=2
  small=configs/speedrun/miniature
  rungs=("config=$small/00_baseline.yaml" "budget.seconds=4" name=speedrun_tiny)
  rungs+=("variants={baseline: null, current: {config: $small/current.yaml}}")
  path_flags=(--eager)
fi
ours=("${speed[@]}" "${real[@]}" --contenders ours_documents)

measure() {  # name length rows settings...: speed and memory of our loop
  local name=$1 length=$2 rows=$3
  shift 3
  try "$name" 170 "${ours[@]}" "data.sequence_length=$length" "data.micro_batch_size=$rows" "$@" \
    --output "$out/$name.json"
}

short_run() {  # step folder: train on test_mode's dummy data until a step
  "$python" train.py --config configs/test_mode.yaml data.store=checkpoints/test_mode/data \
    "data.mix={dummy: 1.0}" steps=40 optim.name=muon \
    "schedule={warmup_steps: 4, total_steps: 40, decay_steps: 4}" \
    "checkpoint={every: 20, keep: 2}" validation.every=0 \
    "until=$1" "output_dir=$scratch/$2" "log_dir=$scratch/$2.log"
}

case $part in
  1)
    try environment 60 "$python" -m scripts.check_env
    [ "$tiny" ] || try gpu 20 nvidia-smi
    try paths 200 "$python" -m benchmarks.gpu_paths "${path_flags[@]}" --output "$out/paths.json"
    try attention_kernels 100 "$python" -m pytest -q -x --maxfail=20 -p no:cacheprovider \
      tests/test_attention.py -k gpu
    try one_rank_equals_plain_torch 150 "${launch[@]}" scripts/test_fsdp.py
    try dummy_run 90 "$python" train.py --test_mode --steps 20
    try resume 150 "$BASH" benchmarks/gpu_session.sh resume
    measure speed_4k $short $rows4k
    ;;
  resume)
    short_run 40 a && short_run 20 b && short_run 40 b || exit 1
    cmp "$scratch/a/step_40/model.safetensors" "$scratch/b/step_40/model.safetensors"
    exit
    ;;
  2)
    measure speed_8k $middle $rows8k
    measure speed_16k $long $rows16k
    [ "$tiny" ] || measure fp8_4k $short $rows4k parallel.fp8=true
    measure speed_4k_checkpointing $short $rows4k parallel.activation_checkpointing=selective
    ;;
  3)
    try speedrun 540 "$python" -m scripts.experiment configs/lab/speedrun_gpu.yaml "${rungs[@]}" \
      --records "$out"
    ;;
  4)
    try peers 540 "${speed[@]}" "${real[@]}" "data.sequence_length=$short" \
      "data.micro_batch_size=$peer_rows" --output "$out/peers.json" \
      --contenders "ours:1:$rows4k" hf:1 plain:1 plain_compiled:1 hf_compiled:1 liger:1 litgpt:1
    ;;
  *)
    echo "error: unknown part $part; use 1 to 4" >&2
    exit 2
    ;;
esac
[ "$mode" = --list ] || ! grep -qE '"status": "(failed|overran)' "$status"
