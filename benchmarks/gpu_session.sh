#!/usr/bin/env bash
# GPU checks of about an hour, most valuable first. One part per call, each under ten minutes:
#
#   OUT=results/gpu benchmarks/gpu_session.sh PART
#
#   1  correctness: tests, one rank against plain torch, a run, bit-for-bit resume
#   2  speed at 4K, 8K and 16K, and memory against the planner's estimate
#   3  fp8: speed and loss gap; cost of a Muon step
#   4  tokens of Muon and AdamW to a loss, attention kernels, loss head
#   5  other training loops on the same batches, DPO memory, a short run of the 1.1B model
#
# A part continues when a command fails or times out: partN.json has the status of each command,
# partN.log its output. --list prints a part's commands; --tiny uses small shapes, for a CPU.
# Needs torch 2.11 or newer and transformers, accelerate, numpy, PyYAML, safetensors, tokenizers,
# tqdm, pytest; no network. float8 also needs torchao.
set -u
cd "$(dirname "$0")/.." || exit 2

part=${1:?which part: 1 to 5} mode=${2:-run} tiny=${3:-}
[ "$mode" = --tiny ] && mode=run tiny=--tiny
python=${PYTHON:-python3} out=${OUT:-results/gpu} limit=${PART_SECONDS:-570}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
log=$out/part$part.log status=$out/part$part.json entries=""
scratch=$(mktemp -d) && trap 'rm -rf "$scratch"' EXIT
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=20
began=$SECONDS

note() {  # name status seconds command: add an entry to partN.json, valid JSON after each command
  local command=${4//\\/\\\\} is_tiny=false
  [ "$tiny" ] && is_tiny=true
  entries+="${entries:+,}"$'\n'"  {\"name\": \"$1\", \"status\": \"$2\", \"seconds\": $3,"
  entries+=" \"command\": \"${command//\"/\\\"}\"}"
  printf '{"part": %s, "tiny": %s, "commands": [%s\n]}\n' "$part" "$is_tiny" "$entries" >"$status"
  printf '%-28s %s after %s s\n' "$1" "$2" "$3" | tee -a "$log"
}

try() {  # name seconds command...: run a command with a timeout
  local name=$1 timeout=$2 left=$((limit - SECONDS + began)) start=$SECONDS code
  shift 2
  [ "$mode" = --list ] && { echo "$name: $*"; return; }
  [ "$left" -lt 15 ] && { note "$name" "no time left" 0 "$*"; return; }
  printf '\n==== %s: %s\n' "$name" "$*" >>"$log"
  timeout --kill-after=10 "$((left < timeout ? left : timeout))" "$@" >>"$log" 2>&1
  code=$?
  case $code in 0) code=ok ;; 124 | 137) code="overran" ;; *) code="failed with $code" ;; esac
  note "$name" "$code" $((SECONDS - start)) "$*"
}

launch=("$python" -m torch.distributed.run --standalone --nproc_per_node=1)
speed=("$python" -m benchmarks.train_speed --rounds 2)
real=(--config configs/phase1_pretrain.yaml)
real+=(model.max_position_embeddings=16384 data.tokens_per_step=65536)
rows4k=16 rows8k=8 rows16k=4 short=4096 middle=8192 long=16384 peer_rows=4
model=configs/base_1b.yaml model_settings=(data.tokens_per_step=65536 data.micro_batch_size=8)
kernel_flags=() fp8_flags=() token_flags=()
muon=(--config configs/phase1_pretrain.yaml data.tokens_per_step=65536 data.micro_batch_size=8)
if [ "$tiny" ]; then
  speed+=(--steps 4 --warmup 2)
  real=(--config configs/test_mode.yaml data.tokens_per_step=256)
  rows4k=4 rows8k=2 rows16k=4 short=16 middle=32 long=64 peer_rows=2
  model=configs/test_mode.yaml model_settings=()
  muon=(--config configs/test_mode.yaml --steps 2)
  kernel_flags=(--rounds 1 --tokens 256) fp8_flags=(--steps 3) token_flags=(--steps 12)
fi

ours=("${speed[@]}" "${real[@]}" --contenders ours_documents)

short_run() {  # name step folder: train on test_mode's dummy data until a step
  try "$1" 120 "$python" train.py --config configs/test_mode.yaml \
    data.store=checkpoints/test_mode/data "data.mix={dummy: 1.0}" steps=40 \
    "schedule={warmup_steps: 4, total_steps: 40, decay_steps: 4}" \
    "checkpoint={every: 20, keep: 2}" validation.every=0 \
    "until=$2" "output_dir=$scratch/$3" "log_dir=$scratch/$3.log"
}

case $part in
  1)
    try environment 60 "$python" -m scripts.check_env
    [ "$tiny" ] || try gpu 20 nvidia-smi
    tests=()
    for name in attention losses fp8 model muon meter; do
      [ -e "tests/test_$name.py" ] && tests+=("tests/test_$name.py")
    done
    try tests 200 "$python" -m pytest -q -x --maxfail=20 -p no:cacheprovider "${tests[@]}"
    try one_rank_equals_plain_torch 240 "${launch[@]}" scripts/test_fsdp.py
    try dummy_run 120 "$python" train.py --test_mode --steps 60
    short_run uninterrupted 40 a
    short_run first_half 20 b
    short_run second_half 40 b
    try resumed_equals_uninterrupted 20 \
      cmp "$scratch/a/step_40/model.safetensors" "$scratch/b/step_40/model.safetensors"
    try overfits_one_batch 150 "$python" -m scripts.verify_model --config "$model"
    ;;
  2)
    try speed_4k 180 "${ours[@]}" data.sequence_length=$short \
      data.micro_batch_size=$rows4k parallel.activation_checkpointing=none \
      --output "$out/speed_4k.json"
    try speed_8k 180 "${ours[@]}" data.sequence_length=$middle \
      data.micro_batch_size=$rows8k parallel.activation_checkpointing=none \
      --output "$out/speed_8k.json"
    try speed_16k 180 "${ours[@]}" data.sequence_length=$long \
      data.micro_batch_size=$rows16k parallel.activation_checkpointing=none \
      --output "$out/speed_16k.json"
    try speed_4k_checkpointing 240 "${ours[@]}" data.sequence_length=$short \
      data.micro_batch_size=$rows4k --vary parallel.activation_checkpointing=selective,full \
      --output "$out/speed_checkpointing.json"
    try profile_4k 150 "${ours[@]}" data.sequence_length=$short \
      data.micro_batch_size=$rows4k parallel.activation_checkpointing=none --profile \
      --output "$out/profile_4k.json"
    ;;
  3)
    for case in "4k $short $rows4k" "8k $middle $rows8k" "16k $long $rows16k"; do
      read -r name length rows <<<"$case"
      try "fp8_$name" 110 "${ours[@]}" "data.sequence_length=$length" \
        "data.micro_batch_size=$rows" parallel.activation_checkpointing=none parallel.fp8=true \
        --output "$out/fp8_$name.json"
    done
    try fp8_gap 150 "$python" -m benchmarks.fp8 "${fp8_flags[@]}" --output "$out/fp8_gap.json"
    try muon_cost 90 "$python" -m benchmarks.muon cost "${muon[@]}" --output "$out/muon.json"
    ;;
  4)
    try muon_tokens 400 "$python" -m benchmarks.muon tokens "${token_flags[@]}" \
      --output "$out/muon.json"
    try attention 90 "$python" -m benchmarks.attention "${kernel_flags[@]}" \
      --output "$out/attention.json"
    try loss_head 80 "$python" -m benchmarks.loss_head "${kernel_flags[@]}" \
      --output "$out/loss_head.json"
    ;;
  5)
    try peers 330 "${speed[@]}" "${real[@]}" data.sequence_length=$short \
      data.micro_batch_size=$peer_rows \
      parallel.activation_checkpointing=none --output "$out/peers.json" \
      --contenders ours:1:$rows4k hf:1 plain:1 plain_compiled:1 hf_compiled:1 liger:1 litgpt:1 \
      torchtitan
    try dpo_memory 120 "$python" -m benchmarks.dpo_memory --output "$out/dpo_memory.json"
    try whole_run 200 "$python" train.py --config "$model" --test_mode --steps 20 \
      "${model_settings[@]}"
    ;;
  *)
    echo "error: unknown part $part; use 1 to 5" >&2
    exit 2
    ;;
esac
[ "$mode" = --list ] || ! grep -qE '"status": "(failed|overran)' "$status"
