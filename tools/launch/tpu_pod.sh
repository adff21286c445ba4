#!/bin/bash
# Trains on all workers of a TPU slice (Cloud TPU VMs). Run it where gcloud is set up; it returns when the workers have started.
#
#   tools/launch/tpu_pod.sh NAME ZONE --workdir /mnt/runs/rain --config configs/chameleon_7b_pod.py --data.store /mnt/data/rain
#
# Every worker needs the project in ~/xprompt_jax, installed into .venv there (docs/training.md), and the same disk at the same path.
set -euo pipefail
name=${1:?usage: tpu_pod.sh NAME ZONE TRAIN_FLAGS...}
zone=${2:?usage: tpu_pod.sh NAME ZONE TRAIN_FLAGS...}
shift 2
ssh=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone")

# Workers find each other by the metadata server. nohup: a lost connection must not end the run.
"${ssh[@]}" --worker=all --command="cd ~/xprompt_jax && { nohup .venv/bin/xprompt train $(printf '%q ' "$@") > train.log 2>&1 < /dev/null & }"
cat << EOF
watch:          ${ssh[*]} --worker=0 --command='tail -f xprompt_jax/train.log'
save and stop:  ${ssh[*]} --worker=all --command='pkill -TERM -x xprompt'
go on:          the same command again
EOF
