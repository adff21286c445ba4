#!/bin/bash
# Several processes of one run on this machine, by explicit addresses: to rehearse a cluster on CPUs, or one process for each GPU.
#
#   JAX_PLATFORMS=cpu tools/launch/local.sh 2 --workdir runs/rain --config configs/debug_cpu.py --data.store data/rain
#
# GPUs of one machine need no launcher: `xprompt train` drives all of them.
set -euo pipefail
count=${1:?usage: local.sh PROCESSES TRAIN_FLAGS...}
shift
address=127.0.0.1:${PORT:-$((20000 + RANDOM % 10000))}

pids=()
trap 'kill -TERM "${pids[@]}"; wait "${pids[@]}"; exit $?' TERM INT # every process saves, then this script leaves
for ((i = 0; i < count; i++)); do
  JAX_LOCAL_DEVICE_IDS=$i xprompt train "$@" --distributed "$address,$count,$i" & # process i drives GPU i
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
